#!/usr/bin/env python3
"""Prepares a checkout: checks the tools, puts libtorch into third_party/, builds the binaries.

    python3 scripts/setup.py [--no-build]

Environment: LIBTORCH (use that libtorch, fetch none), CUDA=1 (fetch the CUDA libraries too),
TURBO=0 (decode JPEG in Rust, without libjpeg-turbo and the tools to build it), XDG_CACHE_HOME
(downloads are kept in its folder `lacuna/wheels`, and never fetched twice).
Exit codes: 0 done, 1 the build failed, 78 this machine lacks something; the last line says what.
No root needed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import Iterable, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import tools  # noqa: E402
from common import EXIT_UNFIT, Unfit, cache_dir, locked, say, sha256_of  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
# tch 0.24.0 is generated from this version's operator list; torch-sys refuses every other one.
LIBTORCH_VERSION = "2.11.0"
RUST_VERSION_MIN = (1, 95)
STAMP = "stamp.json"

# Enough for the wheels, for what is unpacked of them, and for the release build.
GB = 10**9
WHEEL_BYTES = {"cpu": GB * 7 // 10, "cuda": GB * 26 // 10}
UNPACKED_BYTES = {"cpu": GB * 8 // 10, "cuda": GB * 46 // 10}
BUILD_BYTES = 3 * GB
# What `make ci` compiles: every test, example and benchmark, without the incremental cache.
TESTS_BYTES = 7 * GB

DOWNLOAD_TRIES = 3
# Tags of the wheels that run on glibc 2.28 and later; named so that the fetch does not depend on
# the host's Python.
PLATFORMS = ["any", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"] + [
    f"manylinux_2_{minor}_x86_64" for minor in (5, 12, *range(17, 29))
]

# What linking and running need of the wheels; the rest of torch is Python.
SHARED_LIBRARY = re.compile(r"\.so(\.\d+)*$")
TORCH_LIBRARIES = {
    "cpu": {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"},
    "cuda": {
        "libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libtorch_cuda.so", "libc10_cuda.so",
        "libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so",
    },
}


class Wheel(NamedTuple):
    """One pinned line of a requirements file."""

    name: str
    version: str
    sha256: str

    @property
    def prefix(self) -> str:
        """How the file name of this wheel begins."""
        return f"{re.sub(r'[-_.]+', '_', self.name)}-{self.version}-"

    @property
    def requirement(self) -> str:
        """The line that pip reads."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n"


def parse_requirements(text: str) -> list[Wheel]:
    """Reads `name==version --hash=sha256:digest` lines."""
    wheels = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)\s+--hash=sha256:([0-9a-f]{64})", line)
        if match is None:
            raise ValueError(f"not a pinned requirement: {line}")
        wheels.append(Wheel(*match.groups()))
    return wheels


def wanted_wheels(flavor: str) -> list[Wheel]:
    """Lists the wheels of a flavor, `cpu` or `cuda`."""
    files = ["libtorch-cpu.txt"] + (["libtorch-cuda.txt"] if flavor == "cuda" else [])
    return [wheel for name in files for wheel in parse_requirements((SCRIPTS / name).read_text())]


# --- tools -----------------------------------------------------------------------------------


def version_of(command: list[str]) -> str | None:
    """Returns what a tool says about its version, or None where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_tools() -> None:
    """Checks what a build needs, and reports all that is missing at once."""
    missing = []
    rust = version_of(["rustc", "--version"])
    wanted = ".".join(map(str, RUST_VERSION_MIN))
    if rust is None or version_of(["cargo", "--version"]) is None:
        missing.append(f"Rust {wanted} or later (rustup.rs; Debian 13: apt-get install rustup)")
    else:
        found = tuple(int(part) for part in re.findall(r"\d+", rust)[:2])
        if found < RUST_VERSION_MIN:
            missing.append(f"Rust {wanted} or later; found `{rust}` (rustup update stable)")
    for tool, package in [("cc", "gcc"), ("g++", "g++")]:
        if version_of([tool, "--version"]) is None:
            missing.append(f"`{tool}` (Debian: apt-get install {package})")
    if missing:
        raise Unfit("missing on this machine:\n  " + "\n  ".join(missing))
    for component in ["fmt", "clippy"]:
        if version_of(["cargo", component, "--version"]) is None:
            say("setup", f"note: `cargo {component}` is missing; only `make check` needs it "
                f"(rustup component add {'rustfmt' if component == 'fmt' else 'clippy'})")


def check_space(needs: list[tuple[pathlib.Path, int]]) -> None:
    """Checks the free space of every file system that is about to be written."""
    total: dict[int, tuple[pathlib.Path, int]] = {}
    for path, n_bytes in needs:
        while not path.exists():
            path = path.parent
        device = path.stat().st_dev
        first, sum_bytes = total.get(device, (path, 0))
        total[device] = (first, sum_bytes + n_bytes)
    for path, n_bytes in total.values():
        free = shutil.disk_usage(path).free
        if free < n_bytes:
            raise Unfit(f"not enough disk space at {path}: {free / GB:.1f} GB free, "
                        f"about {n_bytes / GB:.1f} GB needed")


# --- a libtorch that the user brings ----------------------------------------------------------


def libtorch_version(root: pathlib.Path) -> str | None:
    """Reads the version of a libtorch folder, or of the `torch` folder of a Python package."""
    if (root / "build-version").is_file():
        return (root / "build-version").read_text().strip()
    if (root / "version.py").is_file():
        match = re.search(r"__version__ = '([^']+)'", (root / "version.py").read_text())
        return match.group(1) if match else None
    return None


def check_libtorch(text: str) -> str:
    """Checks the folder that LIBTORCH names and returns its version."""
    root = pathlib.Path(text)
    if not root.is_absolute():
        raise Unfit(f"LIBTORCH={text} must be an absolute path")
    for part in ["include/torch", "lib/libtorch_cpu.so"]:
        if not (root / part).exists():
            raise Unfit(f"LIBTORCH={text} holds no {part}: libtorch {LIBTORCH_VERSION} is wanted "
                        "(unset LIBTORCH to have it fetched)")
    found = libtorch_version(root)
    if found is None or found.split("+")[0] != LIBTORCH_VERSION:
        raise Unfit(f"LIBTORCH={text} is libtorch {found or 'of an unknown version'}, "
                    f"wanted {LIBTORCH_VERSION} (unset LIBTORCH to have it fetched)")
    return found


# --- fetching ---------------------------------------------------------------------------------


def cached(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the wheel's file where it is in the cache, whole and right."""
    for path in sorted(folder.glob(wheel.prefix + "*.whl")):
        if sha256_of(path) == wheel.sha256:
            return path
        say("setup", f"{path} has another digest than the pinned one; fetched again")
        path.unlink()
    return None


def pip_command(requirements: pathlib.Path, dest: pathlib.Path) -> list[str]:
    """Builds the command that downloads pinned wheels for Linux on x86_64."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "--only-binary=:all:", "--require-hashes",
               "--python-version", "3.12", "--implementation", "cp"]
    for tag in PLATFORMS:
        command += ["--platform", tag]
    return command + ["--dest", str(dest), "--requirement", str(requirements)]


def fetch(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path:
    """Downloads one wheel: into a folder of its own, checked, then renamed to its place."""
    if version_of([sys.executable, "-m", "pip", "--version"]) is None:
        raise Unfit(f"`{sys.executable} -m pip` does not run, and libtorch must be fetched "
                    "(Debian: apt-get install python3-pip), or set LIBTORCH")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as text:
        scratch = pathlib.Path(text)
        requirements = scratch / "requirements.txt"
        requirements.write_text(wheel.requirement)
        # pip writes big temporary files; /tmp may be small.
        environment = dict(os.environ, TMPDIR=str(scratch))
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            say("setup", f"fetching {wheel.name} {wheel.version}")
            done = subprocess.run(pip_command(requirements, scratch), env=environment, check=False)
            if done.returncode == 0:
                break
            say("setup", f"pip failed (try {attempt} of {DOWNLOAD_TRIES})")
        found = list(scratch.glob(wheel.prefix + "*.whl"))
        if not found:
            raise Unfit(f"could not fetch {wheel.name} {wheel.version}: see pip's message above; "
                        "what was fetched before is kept, so run `make setup` again")
        if sha256_of(found[0]) != wheel.sha256:
            raise Unfit(f"{found[0].name} has another digest than the pinned one")
        place = folder / found[0].name
        os.replace(found[0], place)
        return place


def gather(wheels: Iterable[Wheel], flavor: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of all wheels; fetches those that the cache lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".fetch-*"):
        shutil.rmtree(left, ignore_errors=True)
    have = {wheel: cached(wheel, folder) for wheel in wheels}
    download = 0 if all(have.values()) else WHEEL_BYTES[flavor]
    check_space([(folder, download), (ROOT, UNPACKED_BYTES[flavor] + BUILD_BYTES)])
    return [path or fetch(wheel, folder) for wheel, path in have.items()]


# --- unpacking --------------------------------------------------------------------------------


def is_needed(member: str, flavor: str) -> bool:
    """Tells whether a build or a run needs this file of a wheel."""
    folder, _, name = member.rpartition("/")
    if member.startswith("torch/include/"):
        return bool(name)
    if folder == "torch/lib":
        return name in TORCH_LIBRARIES[flavor]
    if member == "torch/version.py":
        return True
    parts = folder.split("/")
    return parts[0] == "nvidia" and parts[-1] == "lib" and bool(SHARED_LIBRARY.search(name))


def unpack(archives: Iterable[pathlib.Path], flavor: str, dest: pathlib.Path) -> None:
    """Unpacks the needed files of all wheels into one folder, laid out as Python would."""
    for archive in archives:
        with zipfile.ZipFile(archive) as wheel:
            for member in wheel.namelist():
                if is_needed(member, flavor):
                    wheel.extract(member, dest)


def make_view(third_party: pathlib.Path) -> None:
    """Makes the folder `libtorch`, to which LIBTORCH points: links to the CPU half of libtorch.

    torch-sys links CUDA as soon as it sees libtorch_cuda.so, and libtorch.so would pull it in;
    programs open it at run time instead, so one binary serves both.
    """
    view = third_party / "libtorch"
    (view / "lib").mkdir(parents=True)
    wheel_lib = "../../wheels/torch/lib"
    (view / "include").symlink_to("../wheels/torch/include")
    for name in sorted(TORCH_LIBRARIES["cpu"]):
        (view / "lib" / name).symlink_to(f"{wheel_lib}/{name}")
    (view / "lib" / "libtorch.so").symlink_to("libtorch_cpu.so")
    found = libtorch_version(third_party / "wheels" / "torch")
    (view / "build-version").write_text(f"{found}\n")
    # The libraries look for CUDA's in `$ORIGIN/../../nvidia`, and linkers take the view's path for
    # `$ORIGIN`.
    (third_party / "nvidia").symlink_to("wheels/nvidia")


def replace_folder(new: pathlib.Path, place: pathlib.Path, scratch: pathlib.Path) -> None:
    """Puts a complete folder in the place of an old one, which goes away with `scratch`."""
    if place.exists() or place.is_symlink():
        os.rename(place, scratch / f"old-{place.name}")
    os.rename(new, place)


def is_current(third_party: pathlib.Path, wheels: list[Wheel], flavor: str) -> str | None:
    """Returns the flavor that is unpacked where it serves, else None."""
    try:
        stamp = json.loads((third_party / "wheels" / STAMP).read_text())
    except (OSError, ValueError):
        return None
    have = {tuple(wheel) for wheel in stamp.get("wheels", [])}
    found = stamp.get("flavor")
    if flavor == "cuda" and found != "cuda" or not have.issuperset(map(tuple, wheels)):
        return None
    view = third_party / "libtorch"
    parts = ["include/torch", "build-version", "lib/libtorch.so"]
    parts += [f"lib/{name}" for name in TORCH_LIBRARIES["cpu"]] + ["../nvidia/cu13/lib"]
    return found if all((view / part).exists() for part in parts) else None


def check_loads(third_party: pathlib.Path) -> None:
    """Loads libtorch in a process of its own, so that a missing library is named here."""
    path = third_party / "wheels" / "torch" / "lib" / "libtorch_cpu.so"
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True,
                          timeout=300, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unfit(f"{path} does not load on this machine: {last}")


def install(flavor: str, third_party: pathlib.Path, wheel_dir: pathlib.Path) -> str:
    """Makes third_party/wheels and third_party/libtorch; returns one line about it."""
    wheels = wanted_wheels(flavor)
    current = is_current(third_party, wheels, flavor)
    if current is not None:
        return f"libtorch {LIBTORCH_VERSION} ({current}) is in place"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Unfit(f"setup fetches libtorch for Linux on x86_64 only, not for "
                    f"{platform.system()} on {platform.machine()}: set LIBTORCH to a libtorch "
                    f"{LIBTORCH_VERSION} of your own")
    with locked(wheel_dir / ".lock", "setup"):
        archives = gather(wheels, flavor, wheel_dir)
    third_party.mkdir(exist_ok=True)
    with locked(third_party / ".lock", "setup"):
        for left in third_party.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=third_party) as text:
            scratch = pathlib.Path(text)
            say("setup", f"unpacking libtorch {LIBTORCH_VERSION} ({flavor})")
            unpack(archives, flavor, scratch / "wheels")
            stamp = {"flavor": flavor, "wheels": wheels}
            (scratch / "wheels" / STAMP).write_text(json.dumps(stamp, indent=1))
            make_view(scratch)
            for name in ["nvidia", "libtorch", "wheels"]:
                replace_folder(scratch / name, third_party / name, scratch)
    check_loads(third_party)
    return f"libtorch {LIBTORCH_VERSION} ({flavor}) put into {third_party}"


# --- the whole --------------------------------------------------------------------------------


def prepare(flavor: str) -> str:
    """Finds or fetches libtorch; returns one line about it."""
    own = os.environ.get("LIBTORCH")
    if own:
        return f"libtorch {check_libtorch(own)} of LIBTORCH={own} is used; nothing fetched"
    return install(flavor, ROOT / "third_party", cache_dir() / "wheels")


def cmake_wheel() -> pathlib.Path:
    """Returns the file of the pinned cmake."""
    folder = cache_dir() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    [wheel] = parse_requirements((SCRIPTS / "build-tools.txt").read_text())
    with locked(folder / ".lock", "setup"):
        return cached(wheel, folder) or fetch(wheel, folder)


def prepare_jpeg() -> str:
    """Finds or fetches the tools for libjpeg-turbo; returns one line about it."""
    return tools.prepare(ROOT / "third_party", cache_dir() / "apt", cmake_wheel)


def check_target_space(n_bytes: int) -> None:
    """Checks the space that a target folder still has to grow: a linker whose disk fills up dies
    of a bus error that does not name the disk."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    there = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    check_space([(target, max(n_bytes - there, 0))])


def build() -> int:
    """Builds both binaries and returns make's exit code."""
    say("setup", "make build")
    return subprocess.run(["make", "--no-print-directory", "build"], cwd=ROOT,
                          check=False).returncode


def main() -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="Prepares a checkout of Lacuna.")
    parser.add_argument("--no-build", action="store_true",
                        help="do not build the binaries (what follows builds the tests)")
    args = parser.parse_args()
    started = time.monotonic()
    try:
        check_tools()
        line = prepare("cuda" if os.environ.get("CUDA") == "1" else "cpu")
        line = f"{line}; {prepare_jpeg()}"
        check_target_space(TESTS_BYTES if args.no_build else BUILD_BYTES)
        if not args.no_build and build() != 0:
            say("setup", "the build failed: see cargo's message above")
            return 1
    except Unfit as error:
        say("setup", str(error))
        return EXIT_UNFIT
    say("setup", f"{line} ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
