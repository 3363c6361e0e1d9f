"""The other side of interop_test.py: what the Python packages write and read.

Run by a Python that has webdataset, mosaicml-streaming and pillow:

    python interop_peer.py images DIR
    python interop_peer.py read-tar SHARD...
    python interop_peer.py write-tar DIR OUT
    python interop_peer.py write-mds DIR OUT jpeg|bytes[+COMPRESSION]

Results are JSON on stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import sys

# Two classes of nine; over several shards of the sizes below.
N_PER_CLASS = 9
SHARD_SAMPLES = 7
SHARD_BYTES = 1 << 14


def sources(folder: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Lists the images below `folder` in order, with the number of their class."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]


def write_images(folder: pathlib.Path) -> None:
    """Writes images of noise: two thirds JPEG, one third PNG and WebP, of different sizes."""
    from PIL import Image

    noise = random.Random(7)
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(N_PER_CLASS):
            size = (40 + 6 * i, 32 + label)
            image = Image.frombytes("RGB", size, noise.randbytes(size[0] * size[1] * 3))
            suffix = ["jpg", "png", "jpg", "jpg", "webp", "jpg"][i % 6]
            image.save(folder / f"class{label}" / f"{i:02}.{suffix}")


def read_tar(shards: list[str]) -> list[dict[str, object]]:
    """Reads shards with webdataset, and returns each sample's members as digests, `cls` as text."""
    import webdataset

    found = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        members = {name: value for name, value in sample.items() if not name.startswith("__")}
        label = members.pop("cls").decode()
        digests = {name: hashlib.sha256(value).hexdigest() for name, value in members.items()}
        found.append({"key": sample["__key__"], "cls": label, "members": digests})
    return found


def write_tar(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes shards with webdataset's TarWriter, other members among them."""
    import webdataset

    files = sources(folder)
    for start in range(0, len(files), SHARD_SAMPLES):
        with webdataset.TarWriter(str(out / f"part-{start:06}.tar")) as writer:
            for i, (file, label) in enumerate(files[start:start + SHARD_SAMPLES], start):
                writer.write({
                    "__key__": f"deep/{i:04}", file.suffix[1:]: file.read_bytes(), "cls": label,
                    "json": {"name": file.name}, "mask.png": b"not the image",
                })


def write_mds(folder: pathlib.Path, out: pathlib.Path, kind: str) -> None:
    """Writes shards with MDSWriter: `jpeg`, or `bytes` and a compression."""
    import streaming
    from PIL import Image

    name, _, compression = kind.partition("+")
    columns = {"image": name, "label": "int", "box": "ndarray:int32:4", "text": "str"}
    if name == "bytes":
        columns = {"img": "bytes", "cls": "uint16", "extra": "pkl", "mask": "png"}
    with streaming.MDSWriter(out=str(out), columns=columns, compression=compression or None,
                             hashes=["sha1", "xxh3_64"], size_limit=SHARD_BYTES) as writer:
        import numpy

        for file, label in sources(folder):
            if name == "bytes":
                writer.write({
                    "img": file.read_bytes(), "cls": numpy.uint16(label), "extra": {"a": [1, 2]},
                    "mask": Image.new("L", (4, 4)),
                })
            elif file.suffix == ".jpg":
                writer.write({
                    "image": Image.open(file), "label": label,
                    "box": numpy.arange(4, dtype=numpy.int32), "text": file.name,
                })


def main() -> int:
    """Runs the program and returns its exit code."""
    command, *args = sys.argv[1:]
    paths = [pathlib.Path(arg) for arg in args]
    if command == "images":
        write_images(paths[0])
    elif command == "read-tar":
        json.dump(read_tar(args), sys.stdout)
    elif command == "write-tar":
        write_tar(paths[0], paths[1])
    elif command == "write-mds":
        write_mds(paths[0], paths[1], args[2])
    else:
        raise SystemExit(f"interop_peer: no command {command!r}")
    sys.stdout.flush()
    # What the packages leave running must not keep the test waiting.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
