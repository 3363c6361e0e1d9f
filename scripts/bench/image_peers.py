#!/usr/bin/env python3
"""What usual loaders of Python make of a folder of JPEG images, one JSON line each.

    python image_peers.py FOLDER --what pillow|opencv|torchvision|webdataset|streaming
        [--workers 0] [--seconds 4]

Decode, random resized crop to 224 (scale 0.2 to 1, ratio 3/4 to 4/3, bicubic and antialiased where
the library can), flip, uint8. `images_per_s` is by wall time, `per_cpu_s` by CPU time of all
processes. With `--workers 0` everything runs in this process.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import math
import os
import random
import resource
import signal
import tempfile
import time


def box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Draws left, top, width and height of a crop."""
    for _ in range(10):
        area = width * height * rng.uniform(0.2, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def pillow(data: bytes, rng: random.Random) -> bytes:
    """Pillow: what torchvision's transforms do to images of PIL."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, w, h = box(*image.size, rng)
    image = image.crop((left, top, left + w, top + h)).resize((224, 224), Image.BICUBIC)
    return (image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image).tobytes()


def opencv(data: bytes, rng: random.Random) -> bytes:
    """OpenCV: INTER_AREA is its antialiased filter."""
    import cv2
    import numpy

    cv2.setNumThreads(1)
    image = cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    left, top, w, h = box(image.shape[1], image.shape[0], rng)
    part = image[top : top + h, left : left + w]
    image = cv2.resize(part, (224, 224), interpolation=cv2.INTER_AREA)
    return image[:, ::-1].tobytes() if rng.random() < 0.5 else image.tobytes()


def torchvision(data: bytes, rng: random.Random) -> bytes:
    """torchvision on tensors: its own JPEG decoder and antialiased resize of uint8."""
    import torch
    import torchvision.io
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)
    image = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8),
                                       mode=torchvision.io.ImageReadMode.RGB)
    left, top, w, h = box(image.shape[2], image.shape[1], rng)
    image = functional.resized_crop(image, top, left, h, w, [224, 224],
                                    functional.InterpolationMode.BICUBIC, antialias=True)
    image = functional.horizontal_flip(image) if rng.random() < 0.5 else image
    return image.permute(1, 2, 0).contiguous().numpy().tobytes()


def read_all(folder: str) -> list[bytes]:
    """Reads the files."""
    files = []
    for path in sorted(glob.glob(f"{folder}/*.jpg")):
        with open(path, "rb") as file:
            files.append(file.read())
    return files


def source(what: str, folder: str, workers: int, scratch: str):
    """Returns an endless iterator over images, or over batches of them."""
    decode = {"opencv": opencv, "torchvision": torchvision}.get(what, pillow)
    files = read_all(folder)
    if what in ("pillow", "opencv", "torchvision") and workers == 0:
        def loop():
            rng = random.Random(0)
            while True:
                for data in files:
                    yield decode(data, rng)
        return loop(), 1
    import torch.utils.data

    if what == "webdataset":
        import webdataset

        with webdataset.TarWriter(f"{scratch}/set.tar") as writer:
            for i, data in enumerate(files):
                writer.write({"__key__": f"{i:06}", "jpg": data})
        rng = random.Random(0)
        shards = [f"{scratch}/set.tar"] * max(1, workers)
        data_set = webdataset.WebDataset(shards, shardshuffle=False,
                                         nodesplitter=webdataset.split_by_node)
        data_set = data_set.repeat().shuffle(100).map(lambda s: pillow(s["jpg"], rng))
    elif what == "streaming":
        import streaming

        with streaming.MDSWriter(out=f"{scratch}/mds", columns={"image": "bytes"}) as writer:
            for data in files:
                writer.write({"image": data})

        class Streamed(streaming.StreamingDataset):
            """Decodes each sample."""

            def __getitem__(self, at):
                return pillow(super().__getitem__(at)["image"], random.Random(int(at)))

        # What an earlier process left in shared memory would be taken for this set.
        streaming.base.util.clean_stale_shared_memory()
        data_set = Streamed(local=f"{scratch}/mds", shuffle=True, batch_size=64)
    else:
        class Listed(torch.utils.data.Dataset):
            """The files in memory."""

            def __len__(self):
                return len(files)

            def __getitem__(self, at):
                return decode(files[at], random.Random(int(at)))

        data_set = Listed()
    loader = torch.utils.data.DataLoader(data_set, batch_size=64, num_workers=workers,
                                         collate_fn=list, persistent_workers=workers > 0)

    def again():
        while True:
            yield from loader
    return again(), None


def children() -> list[int]:
    """Lists the processes that this one has started."""
    found = []
    for path in glob.glob(f"/proc/{os.getpid()}/task/*/children"):
        with open(path) as file:
            found += [int(child) for child in file.read().split()]
    return found


def cpu_seconds() -> float:
    """CPU time of this process and of ended children; running children count by /proc."""
    total = 0.0
    own = resource.getrusage(resource.RUSAGE_SELF)
    total += own.ru_utime + own.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    for child in children():
        try:
            with open(f"/proc/{child}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / tick
        except OSError:
            pass
    return total


def main() -> None:
    """Measures one loader."""
    parser = argparse.ArgumentParser(description="Measures a loader of Python.")
    parser.add_argument("folder")
    parser.add_argument("--what", required=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        items, _ = source(args.what, args.folder, args.workers, scratch)
        size = lambda item: len(item) if isinstance(item, list) else 1  # noqa: E731
        warm = 0
        while warm < 100:
            warm += size(next(items))
        count, start, cpu = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - start < args.seconds:
            count += size(next(items))
        wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        print(json.dumps({"what": args.what, "workers": args.workers,
                          "images_per_s": count / wall, "per_cpu_s": count / cpu}), flush=True)
    # Loaders with workers may take long to end, and what is left of them holds the output open.
    for child in children():
        os.kill(child, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
