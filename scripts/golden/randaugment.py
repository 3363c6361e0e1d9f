#!/usr/bin/env python3
"""Writes the golden values of RandAugment's operations: what timm makes of small images.

    v/bin/python scripts/golden/randaugment.py tests/golden/randaugment.json     # timm, Pillow

Images are made-up; every operation is timm's own function with a fixed argument. Bytes are planes,
one channel after another, in hexadecimal.
"""

import json
import pathlib
import sys

import numpy
import PIL
import timm
from PIL import Image
from timm.data import auto_augment as aa

HEIGHT, WIDTH = 13, 17
FILL = 128


def picture(channels: int) -> numpy.ndarray:
    """Draws slopes, an edge and grain."""
    rng = numpy.random.default_rng(7)
    y, x = numpy.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    planes = [40 + 9 * x + 4 * y * (channel + 1) + 60 * (x > 9) + rng.normal(0, 12, (HEIGHT, WIDTH))
              for channel in range(channels)]
    return numpy.clip(numpy.stack(planes), 5, 240).astype(numpy.uint8)


def hexed(planes: numpy.ndarray) -> str:
    """Writes planes `[c, h, w]`."""
    return planes.tobytes().hex()


def cases(channels: int):
    """Lists operations with their arguments."""
    geometry = {"resample": Image.Resampling.BILINEAR,
                "fillcolor": (FILL,) * channels if channels > 1 else FILL}
    yield "AutoContrast", None, aa.auto_contrast, (), {}
    yield "Equalize", None, aa.equalize, (), {}
    yield "Invert", None, aa.invert, (), {}
    for bits in (1, 2, 4):
        yield "Posterize", bits, aa.posterize, (bits,), {}
    for level in (0, 70, 256):
        yield "Solarize", level, aa.solarize, (level,), {}
    for level in (0, 99):
        yield "SolarizeAdd", level, aa.solarize_add, (level,), {}
    for factor in (0.1, 0.55, 1.0, 1.81):
        yield "Color", factor, aa.color, (factor,), {}
        yield "Contrast", factor, aa.contrast, (factor,), {}
        yield "Brightness", factor, aa.brightness, (factor,), {}
        yield "Sharpness", factor, aa.sharpness, (factor,), {}
    for level in (27.0, -11.5):
        yield "Rotate", level, aa.rotate, (level,), geometry
    for level in (0.27, -0.3):
        yield "ShearX", level, aa.shear_x, (level,), geometry
        yield "ShearY", level, aa.shear_y, (level,), geometry
        yield "TranslateX", level, aa.translate_x_rel, (level,), geometry
        yield "TranslateY", level, aa.translate_y_rel, (level,), geometry


def main() -> None:
    """Writes the file."""
    images = []
    for channels in (1, 3):
        planes = picture(channels)
        image = Image.fromarray(planes[0] if channels == 1 else planes.transpose(1, 2, 0))
        ops = []
        for name, argument, function, args, more in cases(channels):
            found = numpy.asarray(function(image, *args, **dict(more)))
            found = found[None] if channels == 1 else found.transpose(2, 0, 1)
            text = hexed(numpy.ascontiguousarray(found))
            ops.append({"op": name, "argument": argument, "bytes": text})
        images.append({"channels": channels, "bytes": hexed(planes), "ops": ops})
    text = json.dumps({"made_by": f"timm {timm.__version__}, Pillow {PIL.__version__}",
                       "height": HEIGHT, "width": WIDTH, "images": images}, indent=1)
    pathlib.Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
