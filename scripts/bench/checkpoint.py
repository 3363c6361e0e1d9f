#!/usr/bin/env python3
"""Compares saving and loading a checkpoint with torch.distributed.checkpoint and with the disk.

Runs `ckpt_bench` (which also writes and reads as many bytes raw, with O_DIRECT) and
`checkpoint_peer.py` in turn, on one disk, and prints a Markdown table of GB/s.

    python3 scripts/bench/checkpoint.py --python v/bin/python --rounds 5 --out checkpoint.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folder above is put on the path first)

ROOT = HERE.parent.parent
PROGRAM = "bench-ckpt"
RUN_SECONDS_MAX = 600
THREADS = (1, 4)

Rates = dict[str, dict[str, list[float]]]


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a program that prints one JSON line."""
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE,
                          timeout=RUN_SECONDS_MAX)
    if done.returncode != 0:
        raise Unfit(f"`{' '.join(command)}` ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def build() -> pathlib.Path:
    """Builds our program; returns it."""
    command = ["cargo", "build", "--release", "--package", "lacuna-checkpoint", "--examples"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Unfit("the program cannot be built")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    return target / "release" / "examples" / "ckpt_bench"


def run(args: argparse.Namespace, program: pathlib.Path, folder: str) -> Rates:
    """Measures everything, round by round."""
    rates: Rates = {"save": {}, "load": {}}

    def add(what: str, name: str, value: float) -> None:
        rates[what].setdefault(name, []).append(value)

    def ours(first: str) -> int:
        found = measured([str(program), folder, "--preset", args.preset, "--rounds", "1",
                          "--first", first])
        add("save", "raw O_DIRECT", found["raw_write"][0])
        add("load", "raw O_DIRECT", found["raw_read"][0])
        add("save", "ours", found["save"][0])
        add("load", "ours, every digest compared", found["load"][0])
        return found["bytes"]

    def peer(threads: int, n_bytes: int) -> None:
        found = measured([args.python, str(HERE / "checkpoint_peer.py"), f"{folder}/dcp",
                          "--bytes", str(n_bytes), "--threads", str(threads)])
        name = f"torch DCP, {threads} thread{'s' if threads > 1 else ''}"
        add("save", name, found["save"])
        add("load", name, found["load"])

    n_bytes = 0
    for round_ in range(args.rounds):
        say(PROGRAM, f"round {round_ + 1} of {args.rounds}")
        # Whoever comes first finds a rested disk: everybody does in turn.
        if n_bytes == 0 or round_ % 2 == 0:
            n_bytes = ours("raw" if round_ % 4 == 0 else "ours")
        for threads in THREADS if args.python else ():
            peer(threads, n_bytes)
        if round_ % 2 == 1:
            ours("ours" if round_ % 4 == 1 else "raw")
    return rates


def table(results: dict[str, list[float]]) -> str:
    """Returns a Markdown table: median and range, and the ratio to raw in the same rounds."""
    lines = ["| | GB/s (range) | to raw (range) |", "|---|---:|---:|"]
    raw = results["raw O_DIRECT"]
    for name, values in results.items():
        ratios = [value / base for value, base in zip(values, raw)]
        lines.append(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}–"
                     f"{max(values):.2f}) | {statistics.median(ratios):.2f} "
                     f"({min(ratios):.2f}–{max(ratios):.2f}) |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python with torch, to compare with")
    parser.add_argument("--preset", default="base", help="the model whose state is saved")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=pathlib.Path, help="a folder on the disk that is measured")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the raw numbers, JSON")
    args = parser.parse_args()
    try:
        program = build()
        base = args.dir or ROOT / "target"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as folder:
            rates = run(args, program, folder)
        print(f"\n## Save, durable\n\n{table(rates['save'])}\n")
        print(f"## Load, not in the page cache\n\n{table(rates['load'])}")
        if not args.python:
            say(PROGRAM, "torch DCP: skipped, no Python with torch (--python v/bin/python)")
        if args.out:
            args.out.write_text(json.dumps(rates, indent=1) + "\n")
    except Unfit as error:
        say(PROGRAM, str(error))
        return EXIT_UNFIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
