#!/usr/bin/env python3
"""Makes the JPEG sets that loaders are compared on, from photographs of a Debian package.

    python3 scripts/bench/photos.py FOLDER [--images 200]        # needs Pillow

FOLDER/a: quality 90, 4:2:0, about 39 KB; FOLDER/c: quality 97, 4:4:4, about 104 KB; both 500x375,
cut at seeded places of `mate-backgrounds` (Debian), made smaller first so that the photographs' own
JPEG artefacts go.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import debian  # noqa: E402
from common import cache_dir, locked, say  # noqa: E402

PACKAGE = "mate-backgrounds"
FOLDER = "usr/share/backgrounds/mate/nature"
# Those whose cuts come to the sizes of the sets; the others are smoother than usual photographs.
PHOTOS = ["Blinds", "Dune", "GreenMeadow", "RainDrops", "Wood", "YellowFlower"]
SIZE = (500, 375)
SETS = {"a": {"quality": 90, "subsampling": 2}, "c": {"quality": 97, "subsampling": 0}}


def photographs() -> list[pathlib.Path]:
    """Returns the photographs, fetched into the cache where they are not there."""
    place = cache_dir() / PACKAGE
    with locked(cache_dir() / ".photos-lock", "photos"):
        if not place.exists():
            with tempfile.TemporaryDirectory(prefix=".photos-", dir=cache_dir()) as text:
                files = debian.unpack(PACKAGE, pathlib.Path(text), cache_dir() / "apt")
                (files / FOLDER).rename(place)
    return [place / f"{name}.jpg" for name in PHOTOS]


def cut(photo: "Image.Image", rng: random.Random) -> "Image.Image":
    """Cuts a piece out of a photograph made smaller, so that details are as fine as usual."""
    from PIL import Image

    least = max(SIZE[0] / photo.width, SIZE[1] / photo.height)
    scale = rng.uniform(least, least * 1.15)
    small = photo.resize((round(photo.width * scale), round(photo.height * scale)),
                         Image.Resampling.LANCZOS)
    left = rng.randint(0, max(0, small.width - SIZE[0]))
    top = rng.randint(0, max(0, small.height - SIZE[1]))
    return small.crop((left, top, left + SIZE[0], top + SIZE[1]))


def main() -> None:
    """Makes both sets, unless they are there."""
    from PIL import Image

    parser = argparse.ArgumentParser(description="Makes the JPEG sets of the loader benchmark.")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    if all(len(list((args.folder / name).glob("*.jpg"))) == args.images for name in SETS):
        return
    photos = [Image.open(path).convert("RGB") for path in photographs()]
    rng = random.Random(7)
    for name in SETS:
        (args.folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(args.images):
        piece = cut(photos[i % len(photos)], rng)
        for name, options in SETS.items():
            piece.save(args.folder / name / f"{i:04}.jpg", "JPEG", **options)
    for name in SETS:
        sizes = [path.stat().st_size for path in (args.folder / name).glob("*.jpg")]
        mean = sum(sizes) / len(sizes) / 1000
        say("photos", f"set {name}: {len(sizes)} images, {mean:.1f} KB each")


if __name__ == "__main__":
    main()
