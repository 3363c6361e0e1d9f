#!/usr/bin/env python3
"""Writes the golden images of `crates/pixels`: encoded files, and what Pillow makes of them.

    python3 scripts/golden/pillow.py crates/pixels/tests/golden     # Pillow 13.0, numpy

Every image is a made-up picture. `golden.json` says, for each file, the CRC-32 of all its pixels as
RGB rows, and a box; the file with the suffix `.rgb` holds that box resized to 48x40 with BICUBIC.
"""

import io
import json
import pathlib
import sys
import zlib

import numpy
from PIL import Image

SIZE = (150, 101)
TARGET = (48, 40)
BOX = (11, 9, 11 + 117, 9 + 78)


def picture(channels: int, seed: int) -> numpy.ndarray:
    """Draws slopes, edges, a disc and grain."""
    rng = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[0 : SIZE[1], 0 : SIZE[0]].astype(float)
    planes = []
    for channel in range(channels):
        plane = 60 + 90 * numpy.sin(x / (9 + 4 * channel) + y / 17) + 0.5 * y
        plane += 60 * ((x // 13 + y // 11 + channel) % 2)
        plane[(x - 90) ** 2 + (y - 45) ** 2 < 500 + 300 * channel] = 230 - 70 * channel
        planes.append(plane + rng.normal(0, 6, plane.shape))
    return numpy.clip(numpy.stack(planes, -1), 0, 255).astype(numpy.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encodes an image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def files() -> dict[str, bytes]:
    """Makes the encoded files."""
    rgb = Image.fromarray(picture(3, 1), "RGB")
    cmyk = Image.fromarray(picture(4, 2), "CMYK")
    rgba = Image.fromarray(picture(4, 3), "RGBA")
    grey = Image.fromarray(picture(1, 4)[..., 0], "L")
    return {
        "photo-420.jpg": encoded(rgb, "JPEG", quality=90, subsampling=2),
        "photo-422.jpg": encoded(rgb, "JPEG", quality=85, subsampling=1),
        "photo-444.jpg": encoded(rgb, "JPEG", quality=97, subsampling=0),
        "progressive.jpg": encoded(rgb, "JPEG", quality=80, subsampling=2, progressive=True),
        "grey.jpg": encoded(grey, "JPEG", quality=90),
        "cmyk.jpg": encoded(cmyk, "JPEG", quality=92),
        "palette.png": encoded(rgb.quantize(60), "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "lossy.webp": encoded(rgb, "WEBP", quality=80),
        "lossless.webp": encoded(rgba, "WEBP", lossless=True),
        # A PNG whose name says JPEG, as one file of ImageNet has it.
        "png-inside.jpg": encoded(rgb, "PNG"),
    }


def main() -> None:
    """Writes everything."""
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    golden = {}
    for name, data in files().items():
        (folder / name).write_bytes(data)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        part = image.crop(BOX).resize(TARGET, Image.Resampling.BICUBIC)
        (folder / f"{name}.rgb").write_bytes(part.tobytes())
        left, top, right, bottom = BOX
        golden[name] = {
            "crc": zlib.crc32(image.tobytes()), "width": image.width, "height": image.height,
            "top": top, "left": left, "crop_height": bottom - top, "crop_width": right - left,
        }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
