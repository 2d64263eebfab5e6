"""An ARM board without hardware: Debian arm64 under qemu's user emulation, with an sshd of its own on loopback.

    sudo python tests/arm/arm_board.py

makes the root file system and the wheels, once, in the user's cache (a quarter of an hour, 2 GB). It needs root for
chroot and mounts, and Debian's packages `DEBIAN`. Speed under emulation means nothing and is never reported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edgeprune.files import cache_dir
from edgeprune.runtimes.ssh import Board

CPU = "cortex-a76"  # of the Raspberry Pi 5 and the RK3588
ISA = "armv8.2-a+dotprod"
SUITE = "bookworm"
DEBIAN = ("debootstrap", "qemu-user-static", "binfmt-support", "g++-aarch64-linux-gnu", "cmake", "openssh-client")
THERE = "openssh-server,python3,python3-venv,libgomp1"
PYTHON = "3.11"  # of that suite
RUNTIMES = ("numpy", "onnxruntime", "tokenizers")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")
BINFMT = Path("/proc/sys/fs/binfmt_misc")


def folder() -> Path:
    """Where all of it is kept."""
    return cache_dir() / "arm-board"


def missing() -> str | None:
    """Why no board can be made here, in one line; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an emulated board needs Linux and root"
    lacking = [
        name for name in ("debootstrap", "qemu-aarch64-static", "aarch64-linux-gnu-g++") if not shutil.which(name)
    ]
    return f"{', '.join(lacking)} lacking: apt-get install {' '.join(DEBIAN)}" if lacking else None


def run(*command: str | Path, **options: object) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-2000:]}")
    return str(done.stdout)


def emulate() -> None:
    """Let the kernel run arm64 programs through qemu."""
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        run("update-binfmts", "--enable", "qemu-aarch64")


def cpuinfo() -> str:
    """What /proc/cpuinfo of a Raspberry Pi 5 says (Cortex-A76), with this machine's number of processors."""
    features = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
    core = (
        f"BogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    )
    return "".join(f"processor\t: {number}\n{core}" for number in range(os.cpu_count() or 1))


def root() -> Path:
    """The root file system, made at first use."""
    out = folder() / "root"
    if (out / "ready").exists():
        return out
    emulate()
    shutil.rmtree(out, ignore_errors=True)
    # From wherever this machine's own packages come, if they are of the same Debian.
    wanted = ("Created-By: Packages", f"Codename: {SUITE}", "Component: main")
    known = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
    mirror = known[0] if known else "http://deb.debian.org/debian"
    run(
        "debootstrap",
        "--foreign",
        "--arch=arm64",
        "--variant=minbase",
        f"--include={THERE}",
        SUITE,
        out,
        mirror.rstrip("/"),
    )
    shutil.copy2(shutil.which("qemu-aarch64-static") or "", out / "usr/bin")
    run("chroot", out, "/debootstrap/debootstrap", "--second-stage")
    (out / "ready").touch()
    return out


def wheels() -> Path:
    """Wheels for the board: llama-cpp-python cross-compiled, the rest from the registry."""
    version = importlib.metadata.version("llama-cpp-python")
    out = folder() / f"wheels-{version}"
    if (out / "ready").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "GGML_NATIVE": "OFF",
        "GGML_CPU_ARM_ARCH": ISA,
        "MTMD_BUILD": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    environment = {**os.environ, "CMAKE_ARGS": " ".join(f"-D{key}={value}" for key, value in settings.items())}
    llama = f"llama-cpp-python=={version}"
    run(*pip, "wheel", "--no-deps", "--no-cache-dir", "--no-binary=:all:", "-w", out, llama, env=environment)
    (built,) = out.glob("llama_cpp_python-*.whl")
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", "linux_aarch64", built)
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in RUNTIMES]
    needs = ["typing-extensions", "diskcache", "jinja2"]  # llama-cpp-python's own
    target = [word for platform in PLATFORMS for word in ("--platform", platform)]
    run(*pip, "download", "-d", out, "--only-binary=:all:", "--python-version", PYTHON, *target, *wanted, *needs)
    (out / "ready").touch()
    return out


@contextlib.contextmanager
def board() -> Iterator[Board]:
    """The board, running: an address that ssh reaches."""
    emulate()
    there = root()
    mounts = [("proc", "proc", there / "proc"), ("sysfs", "sys", there / "sys"), ("devtmpfs", "dev", there / "dev")]
    keys = folder() / "keys"
    keys.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        if not (keys / name).exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = there / "etc/edgeprune-board"
    home.mkdir(exist_ok=True)
    for name in ("host", "user.pub"):
        shutil.copy2(keys / name, home / name)
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey /etc/edgeprune-board/host\n"
        "AuthorizedKeysFile /etc/edgeprune-board/user.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        f"PermitRootLogin yes\nPidFile none\nSetEnv QEMU_CPU={CPU}\n"
    )
    public = (keys / "host.pub").read_text().split()[:2]
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(public)}\n")
    (keys / "ssh_config").write_text(
        f"IdentityFile {keys}/user\nIdentitiesOnly yes\nUserKnownHostsFile {keys}/known_hosts\n"
    )
    with contextlib.ExitStack() as stack:
        for kind, source, target in mounts:
            run("mount", "-t", kind, source, target)
            stack.callback(run, "umount", "-l", target)
        # qemu shows this machine's own /proc/cpuinfo, in which an ARM program finds no ARM processor.
        (there / "etc/edgeprune-board/cpuinfo").write_text(cpuinfo())
        run("mount", "--bind", there / "etc/edgeprune-board/cpuinfo", there / "proc/cpuinfo")
        stack.callback(run, "umount", "-l", there / "proc/cpuinfo")
        (there / "run/sshd").mkdir(parents=True, exist_ok=True)
        with (folder() / "sshd.log").open("wb") as log:
            daemon = subprocess.Popen(
                ["chroot", there, "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/edgeprune-board/sshd_config"],
                env={**os.environ, "QEMU_CPU": CPU},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield Board.of(f"ssh://root@127.0.0.1:{port}", ssh_config=keys / "ssh_config")


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    print("wheels:", wheels())
    print("root file system:", root())
