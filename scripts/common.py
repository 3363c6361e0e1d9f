"""What the setup and data scripts share: exit codes, the cache folder, hashes, a lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import sys
import time
from typing import Iterator

# The exit codes of every Lacuna program: this machine cannot do it as it is.
EXIT_UNFIT = 78
# `data.py` only: there is no way to get the images here; the demo then generates its own.
EXIT_NO_DATA = 3

# One holder downloads about 2.5 GB at most; a slower line than 12 Mbit/s is the user's to retry.
LOCK_SECONDS_MAX = 1800


class Unfit(Exception):
    """This machine cannot do what was asked; the text says why and what helps."""


def say(program: str, text: str) -> None:
    """Prints one line on stderr: stdout is for results."""
    print(f"{program}: {text}", file=sys.stderr, flush=True)


def cache_dir() -> pathlib.Path:
    """Returns the folder that every checkout of this user shares."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(base) / "lacuna"


def sha256_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: pathlib.Path, program: str) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which two setups at the same time would share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS_MAX
    with open(path, "w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unfit(f"another setup held {path} for {LOCK_SECONDS_MAX} s") from None
                if not told:
                    say(program, f"waiting for another setup, which holds {path}")
                    told = True
                time.sleep(0.5)
        yield
