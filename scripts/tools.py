"""Finds or fetches what building libjpeg-turbo needs: cmake and nasm.

`third_party/features` then holds cargo's arguments for all that this machine can build; the
Makefile and the scripts read them there. Without the tools JPEG is decoded in Rust, which takes
about half again as long and gives other pixels.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import tempfile
import zipfile
from typing import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import debian  # noqa: E402
from common import say  # noqa: E402

# What needs no tools, and what needs them.
PLAIN = "--features lacuna-cli/parquet,lacuna-cli/otlp"
FEATURES = f"{PLAIN},lacuna-cli/turbo"


def link(place: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `place` a relative link to `target`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(os.path.relpath(target, place.parent))


def have(name: str, tools: pathlib.Path) -> bool:
    """Tells whether a tool is in the folder or on the path."""
    return os.access(tools / "bin" / name, os.X_OK) or shutil.which(name) is not None


def add_cmake(tools: pathlib.Path, wheel: pathlib.Path) -> None:
    """Unpacks cmake from its wheel; it finds its modules beside itself."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tools / "cmake-wheel")
    program = tools / "cmake-wheel" / "cmake" / "data" / "bin" / "cmake"
    program.chmod(0o755)
    link(tools / "bin" / "cmake", program)


def add_nasm(tools: pathlib.Path, state: pathlib.Path) -> None:
    """Unpacks nasm from Debian's package."""
    tools.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".nasm-", dir=tools) as text:
        files = debian.unpack("nasm", pathlib.Path(text), state)
        (tools / "bin").mkdir(exist_ok=True)
        shutil.copy2(files / "usr" / "bin" / "nasm", tools / "bin" / "nasm")


def prepare(third_party: pathlib.Path, state: pathlib.Path,
            cmake_wheel: Callable[[], pathlib.Path]) -> str:
    """Writes third_party/features; returns one line about it."""
    features = third_party / "features"
    third_party.mkdir(exist_ok=True)
    features.write_text(PLAIN + "\n")
    if os.environ.get("TURBO") == "0":
        return "JPEG is decoded in Rust (TURBO=0)"
    tools = third_party / "tools"
    try:
        if not have("cmake", tools):
            add_cmake(tools, cmake_wheel())
        if not have("nasm", tools):
            add_nasm(tools, state)
    except debian.NoPackage as error:
        say("setup", f"note: JPEG will be decoded in Rust: {error} (Debian: apt-get install nasm)")
        return "JPEG is decoded in Rust"
    features.write_text(FEATURES + "\n")
    return "JPEG is decoded by libjpeg-turbo"
