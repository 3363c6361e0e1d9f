#!/usr/bin/env python3
"""Finds images for the demo and prints the folder that holds them.

    python3 scripts/data.py

Environment: DATA_DIR (use that folder of images or IDX files), XDG_CACHE_HOME.
Without DATA_DIR: Fashion-MNIST, from Debian's package `dataset-fashion-mnist`, fetched and unpacked
into the cache without root. Exit codes: 0 the folder is on stdout; 3 there are no images to be had
here (the demo then generates some); 78 DATA_DIR is set and wrong.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from common import EXIT_NO_DATA, EXIT_UNFIT, Unfit, cache_dir, locked, say, sha256_of  # noqa: E402
from debian import NoPackage, unpack  # noqa: E402

PACKAGE = "dataset-fashion-mnist"
PACKAGE_DATA = "usr/share/datasets/fashion-mnist"
# Of version 0.0~git20200523.55506a9-1, the only one that Debian and Ubuntu have had since 2020.
FILES = {
    "train-images-idx3-ubyte.gz":
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz":
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz":
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz":
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
# The check of DATA_DIR stops at the first image; so many entries without one are not a data set.
ENTRIES_MAX = 100_000

def is_image_file(name: str) -> bool:
    """Tells whether a file name is that of an image or of an IDX file of images."""
    bare = name[: -len(".gz")] if name.endswith(".gz") else name
    return pathlib.Path(name).suffix.lower() in IMAGE_SUFFIXES or bare.endswith("-idx3-ubyte")


def check_data_dir(text: str) -> pathlib.Path:
    """Checks that the user's folder holds an image or an IDX file, at any depth."""
    root = pathlib.Path(text).resolve()
    if not root.is_dir():
        raise Unfit(f"DATA_DIR={text} is not a folder")
    n_entries = 0
    for _folder, _folders, names in os.walk(root, followlinks=True):
        if any(is_image_file(name) for name in names):
            say("data", f"DATA_DIR={text} is used as it is; its content is not checked")
            return root
        n_entries += len(names) + 1
        if n_entries > ENTRIES_MAX:
            break
    raise Unfit(f"DATA_DIR={text} holds neither PNG, JPEG or WebP images nor IDX files")


def is_complete(folder: pathlib.Path) -> bool:
    """Tells whether a folder holds the four files of Fashion-MNIST, bit for bit."""
    return all((folder / name).is_file() and sha256_of(folder / name) == digest
               for name, digest in FILES.items())


def fashion_mnist(cache: pathlib.Path) -> pathlib.Path:
    """Returns the folder of Fashion-MNIST's four files; fetches them where they are missing."""
    place = cache / "fashion-mnist"
    for folder in [pathlib.Path("/") / PACKAGE_DATA, place]:
        if is_complete(folder):
            return folder
    with locked(cache / ".data-lock", "data"):
        if is_complete(place):
            return place
        with tempfile.TemporaryDirectory(prefix=".data-", dir=cache) as text:
            scratch = pathlib.Path(text)
            found = unpack(PACKAGE, scratch, cache / "apt") / PACKAGE_DATA
            if not is_complete(found):
                raise NoPackage(f"{PACKAGE} holds other files than the pinned ones")
            if place.exists():
                os.rename(place, scratch / "old")
            os.rename(found, place)
    return place


def main() -> int:
    """Runs the program and returns its exit code."""
    own = os.environ.get("DATA_DIR")
    try:
        print(check_data_dir(own) if own else fashion_mnist(cache_dir()))
    except NoPackage as error:
        say("data", f"no images here: {error}; set DATA_DIR to a folder of images")
        return EXIT_NO_DATA
    except Unfit as error:
        say("data", str(error))
        return EXIT_UNFIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
