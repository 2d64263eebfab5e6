"""The sdist and the wheel made of it, installed into an environment of its own with nothing but the base."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `build` makes of the sdist that it makes of the tree."""
    out = tmp_path_factory.mktemp("dist")
    # A copy of what git would hand out: what lies about in a working tree must not be needed, nor get in.
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], check=True)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_has_every_module_and_what_they_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for folder in ("edgeprune", "export", "runtimes", "profiles"):
        prefix = "" if folder == "edgeprune" else "edgeprune/"
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".toml", ".jinja", ".html", ".ts", ".typed"}:
                assert prefix + path.relative_to(ROOT).as_posix() in inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks", "docs"))]


def test_a_clean_environment_runs_doctor(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "install", "--quiet", *constraints, str(wheel)], check=True)
    command = str(home / "bin" / "edgeprune")
    done = subprocess.run([command, "doctor"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch is not installed" in done.stdout and 'edgeprune[prune]"' in done.stdout
    shown = subprocess.run([command, "devices", "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "rpi5" in shown.stdout
    fitted = subprocess.run([command, "fit"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert fitted.returncode == 2 and "pip install" in fitted.stderr
