#!/usr/bin/env python3
"""What a GPU gives at most: large products, copies, attention and the products of MAE models.

    python scripts/bench/gpu_tables.py --device cuda

Prints one JSON object. Times are medians of several, in microseconds; everything is bf16. Run by
gpu.py, with a Python that has torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Tokens, width of a head, and heads: encoders of base, large and huge, and their decoders.
ATTENTION = {"base": (50, 64, 12), "huge": (65, 80, 16), "decoder": (197, 32, 16),
             "huge decoder": (257, 32, 16)}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
# Tokens an image that the encoder sees, and its width.
ENCODERS = {"base": (50, 768), "large": (50, 1024), "huge": (65, 1280)}
# Outputs and inputs of a block's products, in widths.
PRODUCTS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
REPEATS = 10
# About a millisecond.
SLEEP_CYCLES = 2_000_000


def timed(device: str, work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Returns the median time of `work`, in microseconds."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The card waits a millisecond, so that all of the work is on its way when it begins:
            # otherwise the host's time to launch small kernels would be measured.
            torch.cuda._sleep(SLEEP_CYCLES)  # pylint: disable=protected-access
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def ceilings(device: str, side: int, n_bytes: int) -> dict[str, float]:
    """Returns what one large product and one large copy reach."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_us = timed(device, lambda: a @ b)
    source = torch.empty(n_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_us = timed(device, lambda: target.copy_(source))
    # A copy reads and writes every byte.
    return {"product_side": side, "tflops": 2 * side**3 / product_us / 1e6,
            "copy_bytes": n_bytes, "copy_gb_s": 2 * n_bytes / copy_us / 1e3}


def attention(device: str, batch: int) -> list[dict[str, object]]:
    """Times attention forward and backward by every backend; a refusal is written down."""
    rows: list[dict[str, object]] = []
    for name, (tokens, width, heads) in ATTENTION.items():
        shape = (batch, heads, tokens, width)
        leaves = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
                  for _ in range(3)]
        out_grad = torch.randn(shape, device=device, dtype=torch.bfloat16)
        for word, backend in BACKENDS.items():
            row: dict[str, object] = {"shape": name, "tokens": tokens, "head": width,
                                      "heads": heads, "batch": batch, "backend": word}
            try:
                with sdpa_kernel(backend):
                    row["us"] = timed(device, lambda: both_ways(leaves, out_grad))
            except RuntimeError as error:
                row["refused"] = str(error).splitlines()[0]
            rows.append(row)
    return rows


def both_ways(leaves: list[Tensor], out_grad: Tensor) -> None:
    """Computes attention and the gradients of its three inputs."""
    out = F.scaled_dot_product_attention(*leaves)
    torch.autograd.grad(out, leaves, out_grad)


def products(device: str, batches: list[int]) -> list[dict[str, object]]:
    """Times the products of a block for several numbers of images."""
    rows: list[dict[str, object]] = []
    for model, (tokens, width) in ENCODERS.items():
        for name, (n_out, n_in) in PRODUCTS.items():
            weight = torch.randn(n_out * width, n_in * width, device=device, dtype=torch.bfloat16)
            for batch in batches:
                x = torch.randn(batch * tokens, n_in * width, device=device, dtype=torch.bfloat16)
                us = timed(device, lambda: F.linear(x, weight))
                flops = 2 * x.shape[0] * weight.numel()
                rows.append({"model": model, "product": name, "images": batch, "us": us,
                             "tflops": flops / us / 1e6})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    args = parser.parse_args()
    torch.manual_seed(0)
    side, n_bytes, batches = (256, 1 << 20, [1, 2]) if args.small else (8192, 1 << 30,
                                                                        [64, 128, 256, 512])
    found: dict[str, object] = {"torch": torch.__version__, "device": args.device}
    if args.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found.update(card=card.name, multiprocessors=card.multi_processor_count,
                     memory_gib=card.total_memory / 2**30, cuda=torch.version.cuda)
    found["ceilings"] = ceilings(args.device, side, n_bytes)
    found["attention"] = attention(args.device, 1 if args.small else 256)
    found["products"] = products(args.device, batches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
