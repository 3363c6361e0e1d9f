"""Fetches packages of the system's Debian (or Ubuntu) and unpacks them, without root."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from common import say  # noqa: E402

# A package by apt, and an index of 9 MB where the machine has none.
APT_SECONDS_MAX = 300


class NoPackage(Exception):
    """The package cannot be had here; the text says why."""


def run(command: list[str], folder: pathlib.Path) -> bool:
    """Runs a program in a folder; its output goes to stderr only where it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False,
                              timeout=APT_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        say("debian", f"`{command[0]}` took longer than {APT_SECONDS_MAX} s")
        return False
    if done.returncode != 0:
        say("debian", f"`{' '.join(command[:1] + command[-2:])}` failed: {done.stderr.strip()}")
    return done.returncode == 0


def apt_options(state: pathlib.Path) -> list[str]:
    """Builds the options under which apt reads the system's sources but keeps its own state."""
    for name in ["lists/partial", "cache/archives/partial"]:
        (state / name).mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache",
            "-o", "APT::Sandbox::User=", "-o", "Debug::NoLocking=1", "-qq"]


def download(package: str, scratch: pathlib.Path, state: pathlib.Path) -> pathlib.Path:
    """Fetches a package into `scratch`: by the system's index, else by an index in `state`."""
    for tool in ["apt-get", "dpkg-deb"]:
        if shutil.which(tool) is None:
            raise NoPackage(f"`{tool}` is missing, so Debian's package {package} cannot be fetched")
    say("debian", f"fetching {package}")
    plain = ["apt-get", "-o", "APT::Sandbox::User=", "-qq", "download", package]
    if not run(plain, scratch):
        say("debian", "reading the package index into the cache")
        options = apt_options(state)
        if not run(["apt-get", *options, "update"], scratch):
            raise NoPackage("the package index cannot be read")
        if not run(["apt-get", *options, "download", package], scratch):
            raise NoPackage(f"the package {package} cannot be fetched")
    return next(scratch.glob(f"{package}_*.deb"))


def unpack(package: str, scratch: pathlib.Path, state: pathlib.Path) -> pathlib.Path:
    """Fetches a package and returns the folder in `scratch` that holds its files."""
    archive = download(package, scratch, state)
    if not run(["dpkg-deb", "-x", str(archive), f"{package}-unpacked"], scratch):
        raise NoPackage(f"{archive.name} cannot be unpacked")
    return scratch / f"{package}-unpacked"
