#!/usr/bin/env python3
"""The peer of `step_bench`: one process of masked-autoencoder training in PyTorch.

What a careful PyTorch user would write: SDPA attention, fused AdamW with decay for matrices only,
gradients set to None, images already normalised and in memory. The arithmetic is that of the
reference MAE with normalised target. Prints one JSON line with the fields of `step_bench`.

    python scripts/bench/pytorch_step.py --model tiny --batch 16 --steps 10 [--compile]

On a GPU (`--device cuda`) its own precision is asked for: f32, tf32, or bf16 as autocast has it.

Several processes, each started with its own rank and a file that is not there yet, train together
(DDP over gloo, `--batch` images each):

    python scripts/bench/pytorch_step.py --world 2 --rank 0 --store FILE &
    python scripts/bench/pytorch_step.py --world 2 --rank 1 --store FILE
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import statistics
import time

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

# Losses to report, for a look at whether both programs learn the same task.
LOSSES = 3
# A rank whose peers are gone gives up; compiling alone takes a minute or two.
WAIT_SECONDS_MAX = 600


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shape of a model; the names are those of `lacuna_recipe::model`."""

    img_size: int
    patch_size: int
    channels: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    mask_ratio: float = 0.75

    @property
    def grid(self) -> int:
        return self.img_size // self.patch_size

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * self.channels


# The table of `PRESETS` in crates/recipe/src/model.rs.
PRESETS = {
    "micro": Sizes(8, 2, 3, 8, 2, 2, 8, 1, 2),
    "demo": Sizes(28, 4, 1, 192, 6, 3, 96, 2, 3),
    "tiny": Sizes(224, 16, 3, 192, 12, 3, 192, 4, 6),
    "small": Sizes(224, 16, 3, 384, 12, 6, 256, 8, 8),
    "base": Sizes(224, 16, 3, 768, 12, 12, 512, 8, 16),
    "large": Sizes(224, 16, 3, 1024, 24, 16, 512, 8, 16),
    "huge": Sizes(224, 14, 3, 1280, 32, 16, 512, 8, 16),
}


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [batch, tokens, 3 * width] -> three of [batch, heads, tokens, width / heads]
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def position_table(width: int, grid: int) -> Tensor:
    """Returns fixed sine-cosine positions, `[1, 1 + grid², width]`, zero for the class token."""
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves.repeat(grid, 1)
    rows = waves.repeat_interleave(grid, dim=0)
    return F.pad(torch.cat([columns, rows], dim=1), (0, 0, 1, 0)).unsqueeze(0).float()


class MaskedAutoencoder(nn.Module):
    """The masked autoencoder; `forward` returns the loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.len_keep = int(s.grid**2 * (1 - s.mask_ratio))
        self.patch_embed = nn.Conv2d(s.channels, s.width, s.patch_size, stride=s.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, s.width))
        self.blocks = nn.Sequential(*(Block(s.width, s.heads) for _ in range(s.depth)))
        self.norm = nn.LayerNorm(s.width, eps=1e-6)
        self.decoder_embed = nn.Linear(s.width, s.decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, s.decoder_width))
        self.decoder_blocks = nn.Sequential(
            *(Block(s.decoder_width, s.decoder_heads) for _ in range(s.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(s.decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(s.decoder_width, s.patch_values)
        self.register_buffer("pos_embed", position_table(s.width, s.grid))
        self.register_buffer("decoder_pos_embed", position_table(s.decoder_width, s.grid))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def target(self, images: Tensor) -> Tensor:
        """Returns the patches, each normalised, `[batch, patches, patch_values]`."""
        side, grid = self.sizes.patch_size, self.sizes.grid
        patches = images.unflatten(3, (grid, side)).unflatten(2, (grid, side))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) * torch.rsqrt(var + 1e-6)

    def forward(self, images: Tensor, shuffle: Tensor | None = None) -> Tensor:
        """Returns the loss; `shuffle` has each image's patches, the kept ones first."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        batch, n_patches, width = tokens.shape
        if shuffle is None:
            shuffle = torch.rand(batch, n_patches, device=tokens.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1).unsqueeze(2)
        keep = shuffle[:, : self.len_keep].unsqueeze(2)
        kept = tokens.gather(1, keep.expand(-1, -1, width))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        latent = self.norm(self.blocks(torch.cat([cls, kept], dim=1)))

        seen = self.decoder_embed(latent)
        unseen = self.mask_token.expand(batch, n_patches - self.len_keep, -1)
        shuffled = torch.cat([seen[:, 1:], unseen], dim=1)
        ordered = shuffled.gather(1, restore.expand(-1, -1, shuffled.shape[2]))
        decoded = torch.cat([seen[:, :1], ordered], dim=1) + self.decoder_pos_embed
        decoded = self.decoder_norm(self.decoder_blocks(decoded))
        prediction = self.decoder_pred(decoded)[:, 1:]

        removed = (restore.squeeze(2) >= self.len_keep).float()
        errors = (prediction - self.target(images)).square().mean(dim=-1)
        return (errors * removed).sum() / removed.sum()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW with the settings of `step_bench`; tokens count as matrices."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)


def summary(times_ms: list[float]) -> dict[str, float]:
    """Returns median and outer tenths, by the same rule as `step_bench`."""
    times_ms = sorted(times_ms)
    tenth = len(times_ms) // 10
    median = statistics.median(times_ms)
    return {"median": median, "p10": times_ms[tenth], "p90": times_ms[-1 - tenth]}


def peak_gib() -> float:
    """Returns the most memory that this process has held."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    # Some sandboxes do not count it.
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    return kib / 2**20


def prepare(model: MaskedAutoencoder, args: argparse.Namespace) -> nn.Module:
    """Joins the other processes and compiles, where it is asked for; returns what to call."""
    loss_of: nn.Module = model
    if args.world > 1:
        wait = datetime.timedelta(seconds=WAIT_SECONDS_MAX)
        store = distributed.FileStore(args.store, args.world)
        distributed.init_process_group("gloo", store=store, rank=args.rank,
                                       world_size=args.world, timeout=wait)
        loss_of = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return torch.compile(loss_of, mode=args.mode) if args.compile else loss_of


def synchronize(device: str) -> None:
    """Waits for what a GPU still does."""
    if device == "cuda":
        torch.cuda.synchronize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=16, help="images a step of this process")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--mode", default="default", help="of torch.compile, as max-autotune")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="f32", choices=["f32", "tf32", "bf16"])
    parser.add_argument("--world", type=int, default=1, help="processes that train together")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--store", help="a file that all of them can reach, not there yet")
    args = parser.parse_args()
    if not 0 <= args.rank < args.world:
        parser.error("--rank must be below --world")
    if args.world > 1 and not args.store:
        parser.error("--world needs --store")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    # The residual stream is f32 there too: the position table is.
    lower = torch.autocast(args.device, torch.bfloat16)
    lowered = lower if args.precision == "bf16" else contextlib.nullcontext()
    start_gib = peak_gib()
    sizes = PRESETS[args.model]
    model = MaskedAutoencoder(sizes).to(args.device)
    optimizer = make_optimizer(model)
    loss_of = prepare(model, args)
    if args.rank > 0:
        torch.manual_seed(args.rank)  # other images and masks, the same weights
    pixels = torch.rand(args.batch, sizes.channels, sizes.img_size, sizes.img_size)
    images = ((pixels - 0.45) / 0.25).to(args.device)

    wall_ms, cpu_ms, losses = [], [], []
    for step in range(args.warmup + args.steps):
        synchronize(args.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        with lowered:
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        synchronize(args.device)
        if step < LOSSES:
            losses.append(value)
        if step >= args.warmup:
            wall_ms.append((time.perf_counter() - start) * 1e3)
            cpu_ms.append((time.process_time() - start_cpu) * 1e3)
    step_ms = summary(wall_ms)
    print(json.dumps({
        "peer": "pytorch",
        "torch": torch.__version__,
        "model": args.model,
        "world": args.world,
        "rank": args.rank,
        "batch_per_process": args.batch,
        "compile": args.mode if args.compile else False,
        "device": args.device,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_s": args.world * args.batch / step_ms["median"] * 1e3,
        "step_ms": step_ms,
        "cpu_ms": summary(cpu_ms),
        "peak_gib": peak_gib(),
        "device_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        "start_gib": start_gib,
        "first_losses": losses,
    }))
    if args.world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
