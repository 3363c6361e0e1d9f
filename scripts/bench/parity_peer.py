#!/usr/bin/env python3
"""The peer of `parity`: trains in eager PyTorch what the stream on stdin says.

The stream is described in crates/mae/examples/parity.rs. Model and optimizer are those of
pytorch_step.py: one batch a step, without slots. Writes the loss of every step to a file, as a JSON
array. With `--parts 4` the batch is cut and the gradients of its parts are added up: the same in
exact arithmetic, and so what PyTorch differs from itself by.

    parity ... --stream | python scripts/bench/parity_peer.py --curve FILE
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import struct
import sys
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pytorch_step import MaskedAutoencoder, Sizes, make_optimizer


def exactly(stream: BinaryIO, n_bytes: int) -> bytearray:
    """Reads so many bytes, into memory that may be written to."""
    data = bytearray(stream.read(n_bytes))
    if len(data) != n_bytes:
        raise SystemExit("parity_peer: the stream ended early")
    return data


def sizes_of(model: dict[str, Any]) -> Sizes:
    """Returns the sizes of the stream's model."""
    side, width = model["img_size"]
    if side != width or model["mlp_ratio"] != 4 or not model["norm_pix_loss"]:
        raise SystemExit("parity_peer: this model is not built here")
    names = ("patch_size", "channels", "width", "depth", "heads", "decoder_width", "decoder_depth",
             "decoder_heads", "mask_ratio")
    return Sizes(img_size=side, **{name: model[name] for name in names})


def own_name(name: str) -> str:
    """Returns what a tensor of the stream is called here."""
    name = name.replace("patch_embed.proj.", "patch_embed.")
    return re.sub(r"\.mlp\.fc([12])\.", lambda m: f".mlp.{'02'[int(m[1]) - 1]}.", name)


@torch.no_grad()
def load(model: MaskedAutoencoder, tensors: list[dict[str, Any]], stream: BinaryIO) -> None:
    """Fills the model with the weights of the stream, every one of them."""
    wanted = dict(model.named_parameters())
    for tensor in tensors:
        parameter = wanted.pop(own_name(tensor["name"]))
        if list(parameter.shape) != tensor["shape"]:
            raise SystemExit(f"parity_peer: {tensor['name']} has shape {tensor['shape']}")
        data = exactly(stream, 4 * math.prod(tensor["shape"]))
        parameter.copy_(torch.frombuffer(data, dtype=torch.float32).view_as(parameter))
    if wanted:
        raise SystemExit(f"parity_peer: no weights for {sorted(wanted)}")


def check(optimizer: torch.optim.Optimizer, adamw: dict[str, float]) -> None:
    """Checks that the optimizer has the constants of the stream."""
    decayed = optimizer.param_groups[0]
    found = (*decayed["betas"], decayed["eps"], decayed["weight_decay"])
    if found != tuple(adamw[name] for name in ("beta1", "beta2", "eps", "weight_decay")):
        raise SystemExit(f"parity_peer: AdamW has other constants: {adamw}")


class Pixels:
    """Turns bytes into normalised images: a table computed in f64 and rounded once."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        values = np.arange(256, dtype=np.float64)[:, None] / 255.0
        table = ((values - np.array(mean)) / np.array(std)).astype(np.float32)
        self.table, self.channel = table, np.arange(len(mean))

    def normalise(self, data: bytearray, sizes: Sizes) -> Tensor:
        pixels = np.frombuffer(data, dtype=np.uint8)
        pixels = pixels.reshape(-1, sizes.img_size, sizes.img_size, sizes.channels)
        return torch.from_numpy(self.table[pixels, self.channel]).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve", type=pathlib.Path, required=True)
    parser.add_argument("--parts", type=int, default=1, help="parts of a batch (1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    stream = sys.stdin.buffer
    head = json.loads(stream.readline())
    sizes = sizes_of(head["model"])
    model = MaskedAutoencoder(sizes)
    load(model, head["tensors"], stream)
    optimizer = make_optimizer(model)
    check(optimizer, head["adamw"])
    pixels = Pixels(head["mean"], head["std"])
    n_ids = head["batch"] * head["n_patches"]
    losses: list[float] = []
    for _ in range(head["steps"]):
        (lr,) = struct.unpack("<d", exactly(stream, 8))
        images = pixels.normalise(
            exactly(stream, head["batch"] * sizes.channels * sizes.img_size**2), sizes)
        ids = torch.frombuffer(exactly(stream, 4 * n_ids), dtype=torch.int32)
        for group in optimizer.param_groups:
            group["lr"] = lr
        shuffle = ids.view(head["batch"], -1).long()
        total = 0.0
        for part in zip(images.chunk(args.parts), shuffle.chunk(args.parts)):
            loss = model(*part) / args.parts
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    args.curve.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
