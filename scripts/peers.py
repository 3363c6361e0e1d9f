#!/usr/bin/env python3
"""Makes the Python environment in which the tests of other people's tools run: grpcurl, buf, a gRPC
client, TensorBoard. It is `third_party/peers`, of the packages that scripts/peers.txt pins. etcd,
for the tests of several coordinators, is Debian's, in third_party/tools.

    python3 scripts/peers.py        # `make peers`

Where it cannot be made, one line says why, and those tests are skipped.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import debian  # noqa: E402  (the folder above is put on the path first)
from common import EXIT_UNFIT, cache_dir, say  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = ROOT / "third_party" / "peers"
TOOLS = ROOT / "third_party" / "tools"
WANTED = ROOT / "scripts" / "peers.txt"
PROGRAM = "peers"
# Some hundred megabytes.
SECONDS_MAX = 600


def is_there() -> bool:
    """Tells whether the environment has what is wanted."""
    made_of = PLACE / "made-of.txt"
    return made_of.is_file() and made_of.read_text() == WANTED.read_text()


def make() -> None:
    """Makes the environment anew."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    venv.create(PLACE, with_pip=True)
    command = [PLACE / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-deps", "-r", WANTED]
    subprocess.run(command, check=True, timeout=SECONDS_MAX)
    (PLACE / "made-of.txt").write_text(WANTED.read_text())


def add_etcd() -> None:
    """Unpacks etcd, unless there is one."""
    if (TOOLS / "bin" / "etcd").exists() or shutil.which("etcd"):
        return
    (TOOLS / "bin").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".etcd-", dir=TOOLS) as text:
        files = debian.unpack("etcd-server", pathlib.Path(text), cache_dir() / "apt")
        shutil.copy2(files / "usr" / "bin" / "etcd", TOOLS / "bin" / "etcd")
    say(PROGRAM, f"put etcd into {TOOLS.relative_to(ROOT)}")


def main() -> int:
    """Runs the program and returns its exit code."""
    code = 0
    try:
        if not is_there():
            make()
            say(PROGRAM, f"made {PLACE.relative_to(ROOT)}")
    except (OSError, subprocess.SubprocessError) as error:
        say(PROGRAM, f"the environment cannot be made: {error}")
        code = EXIT_UNFIT
    try:
        add_etcd()
    except (OSError, debian.NoPackage) as error:
        say(PROGRAM, f"tests of several coordinators are skipped: {error}")
        code = EXIT_UNFIT
    return code


if __name__ == "__main__":
    sys.exit(main())
