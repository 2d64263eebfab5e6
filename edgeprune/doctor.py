"""What is installed, which runtimes work, and what this machine is. Returns data; whatever is missing is a finding."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgeprune import files, host
from edgeprune.cores import available_cores
from edgeprune.errors import EdgepruneError
from edgeprune.recognise import recognise

GIB = 1 << 30
PYTHON_MIN, PYTHON_BELOW = (3, 11), (3, 14)  # `requires-python`
FREE_DISK_GIB = 2.0  # a demo model with its candidates stays below

# Caps that only show when a stage runs. Source: optimum-onnx 0.1.0 needs transformers < 4.58; onnx below 1.21 follows
# external data out of its folder (CVE-2025-51480, CVE-2026-34445).
CAPS: tuple[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None], ...] = (
    ("transformers", (4, 57), (4, 58)),
    ("onnx", (1, 21), None),
)


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None where it is neither right nor wrong: an extra that is not installed, a plain fact."""

    name: str
    ok: bool | None
    detail: str
    remedy: str | None = None


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "4.57.6" -> (4, 57, 6), "2.13.0+cpu" -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def installed(package: str) -> str | None:
    """The version of a distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras_of(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Packages by extra, from a distribution's `Requires-Dist` lines; "" holds those that are always needed.

    An extra that only gathers other extras ("edgeprune[prune,llama]") has no packages of its own and is left out.
    """
    found: dict[str, list[str]] = {}
    for line in requirements:
        requirement, _, marker = line.partition(";")
        name = re.match(r"\s*([A-Za-z0-9._-]+)\s*(\[)?", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if name is None or name[1].lower() == "edgeprune":
            continue
        found.setdefault(extra[1] if extra else "", []).append(name[1])
    return found


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Whether this interpreter is one the project is made for."""
    ok = PYTHON_MIN <= version[:2] < PYTHON_BELOW
    remedy = None if ok else "make the environment with Python 3.11, 3.12 or 3.13"
    return Check("python", ok, f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}", remedy)


def check_extras() -> list[Check]:
    """One check an extra: its packages with versions, or what is missing."""
    try:
        requirements = metadata.requires("edgeprune") or []
    except metadata.PackageNotFoundError:
        return [Check("edgeprune", None, "runs from a folder, not installed", "pip install -e .")]
    checks = []
    for extra, packages in extras_of(requirements).items():
        versions = {package: installed(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        detail = ", ".join(f"{package} {version or '-'}" for package, version in versions.items())
        name = f"extra {extra}" if extra else "base packages"
        if not missing:
            checks.append(Check(name, True, detail))
        else:
            target = f"edgeprune[{extra}]" if extra else "edgeprune"
            ok = False if not extra else None
            checks.append(Check(name, ok, f"{detail}; missing: {', '.join(missing)}", f'pip install "{target}"'))
    return checks


def check_caps(version_of: Callable[[str], str | None] = installed) -> list[Check]:
    """Packages whose versions are bounded by others; absent ones are no finding here."""
    checks = []
    for package, least, below in CAPS:
        version = version_of(package)
        if version is None:
            continue
        number = version_tuple(version)
        ok = (least is None or number >= least) and (below is None or number < below)
        bounds = [
            sign + ".".join(map(str, bound)) for sign, bound in ((">=", least), ("<", below)) if bound is not None
        ]
        wanted = package + ",".join(bounds)
        checks.append(
            Check(f"{package} version", ok, f"{version} (wanted {wanted})", None if ok else f'pip install "{wanted}"')
        )
    return checks


def _probe(name: str, package: str, extra: str, look: Callable[[], str]) -> Check:
    """Run `look` if `package` is installed. A native library can fail to load in many ways; each is a finding."""
    remedy = f'pip install "edgeprune[{extra}]"'
    version = installed(package)
    if version is None:
        return Check(name, None, f"{package} is not installed", remedy)
    try:
        return Check(name, True, f"{package} {version}; {look()}")
    except Exception as error:  # reported: that is what this command is for
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Check(
            name, False, f"{package} {version} does not load: {reason}", f"{remedy} --force-reinstall --no-cache-dir"
        )


# Some compilers optimise its tile configuration away (ggml-org/llama.cpp#26954; GCC 12.2: seen).
_AMX = (
    "compiled for AMX: if quantised files die of SIGILL, install it again with "
    'CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8" pip install --force-reinstall '
    "--no-cache-dir llama-cpp-python"
)


def _llamacpp() -> str:
    library = importlib.import_module("llama_cpp")
    info = library.llama_print_system_info().decode("utf-8", errors="replace")
    on = re.findall(r"([A-Z0-9_]+) = 1\b", info)
    from edgeprune.runtimes.llamacpp_devices import gpus

    found = "; ".join(map(str, gpus())) or "CPU only"
    amx = f"; {_AMX}" if "AMX_INT8" in on else ""
    return f"{found}; {' '.join(dict.fromkeys(on))}{amx}"


def _onnxruntime() -> str:
    library = importlib.import_module("onnxruntime")
    return f"providers: {', '.join(library.get_available_providers())}"


def _genai() -> str:
    importlib.import_module("onnxruntime_genai")
    return "loads"


def _executorch() -> str:
    importlib.import_module("executorch.runtime")
    return "loads"


def check_runtimes() -> list[Check]:
    """Whether llama.cpp and ONNX Runtime load, and with what. PyTorch is looked up, not imported: it takes seconds."""
    torch = installed("torch")
    return [
        _probe("runtime llamacpp", "llama-cpp-python", "llama", _llamacpp),
        _probe("runtime onnxruntime", "onnxruntime", "onnx", _onnxruntime),
        _probe("runtime onnxruntime-genai (optional)", "onnxruntime-genai", "test", _genai),
        _probe("runtime executorch (optional)", "executorch", "executorch", _executorch),
        Check("runtime pytorch", True, f"torch {torch}")
        if torch
        else Check("runtime pytorch", None, "torch is not installed", 'pip install "edgeprune[prune]"'),
    ]


def check_machine() -> list[Check]:
    """What this machine is recognised as, its cores, extensions and memory. Nothing is measured."""
    try:
        cores, memory = available_cores(), host.available_memory()
        found = recognise(host.gather(), logical_cores=cores)
    except (EdgepruneError, OSError, ValueError) as error:
        return [Check("this machine", None, f"cannot be read: {error}")]
    known = found.profile or "no known device; --device host measures it"
    return [
        Check("this machine", None, f"{found.model}; profile: {known}"),
        Check("cores", None, f"{cores} usable, {min(cores, found.big_cores)} of the fastest kind"),
        Check("instruction sets", None, " ".join(found.isa) or "unknown"),
        Check("memory", None, f"{memory / GIB:.1f} GiB"),
    ]


def _nearest_existing(path: Path) -> Path:
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path(path.anchor or "."))


def check_folder(name: str, path: Path, remedy: str) -> Check:
    """Whether `path`, or the folder it would be made in, can be written to. Leaves nothing behind."""
    folder = _nearest_existing(path)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, True, str(path) if folder == path else f"{path} (not made yet)")
    except OSError as error:
        return Check(name, False, f"{path} cannot be written to ({error.strerror or error})", remedy)


def check_disk(path: Path) -> Check:
    """Free space where the cache lives."""
    try:
        free = shutil.disk_usage(_nearest_existing(path)).free / GIB
    except OSError as error:
        return Check("free disk", None, f"{path}: {error.strerror or error}")
    ok = free >= FREE_DISK_GIB
    remedy = None if ok else f"free {FREE_DISK_GIB:.0f} GiB, or set EDGEPRUNE_CACHE to a folder on another disk"
    return Check("free disk", ok, f"{free:.1f} GiB in {path}", remedy)


def diagnose() -> list[Check]:
    """All checks, in the order they are worth reading. Never raises for what is missing or broken."""
    cache, config = files.cache_dir(), files.config_dir()
    return [
        check_python(),
        *check_extras(),
        *check_caps(),
        *check_runtimes(),
        *check_machine(),
        check_folder("cache folder", cache, "set EDGEPRUNE_CACHE to a folder you can write to"),
        check_folder("config folder", config, "set XDG_CONFIG_HOME to a folder you can write to"),
        check_disk(cache),
    ]
