#!/usr/bin/env python3
"""Compares the all-reduce between two processes of this machine with PyTorch's over gloo.

Runs `allreduce_bench` (f32, exact i32 and exact i64, through shared memory and through sockets)
and `allreduce_peer.py` in turn, and prints a Markdown table of milliseconds for buffers with as
many elements as the given megabytes of f32 have. A second table is of a slow network: a proxy in
front of each process lets so many bits a second pass.

    python3 scripts/bench/allreduce.py --python v/bin/python --rounds 5 --out allreduce.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folder above is put on the path first)

ROOT = HERE.parent.parent
PROGRAM = "bench-allreduce"
RUN_SECONDS_MAX = 600
MEGABYTES = (1, 12, 100)
GLOO = "gloo, f32"
OURS = {"f32": "f32", "i32 (exact32)": "exact32", "i64 (exact)": "i64",
        "f32, sockets": "f32-sockets", "i32 (exact32), sockets": "exact32-sockets",
        "i64 (exact), sockets": "i64-sockets"}
# What a slow network is tried with.
# What a step sends: the gradient, and the control word behind it.
SLOW = {"f32 (fast)": "fast", "i32 (exact32)": "exact32", "i64 (exact)": "exact"}
SLOW_MEGABYTES = (1, 12)
SLOW_REPEATS = 20

# Milliseconds by row, then by megabytes, one a round.
Times = dict[str, dict[int, list[float]]]


def run(command: list[str]) -> str:
    """Runs a program; returns its last line."""
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE,
                          timeout=RUN_SECONDS_MAX)
    if done.returncode != 0:
        raise Unfit(f"`{' '.join(command)}` ended with {done.returncode}")
    return done.stdout.splitlines()[-1]


def build() -> pathlib.Path:
    """Builds our program; returns it."""
    command = ["cargo", "build", "--release", "--package", "lacuna-collective", "--examples"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Unfit("the program cannot be built")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    return target / "release" / "examples" / "allreduce_bench"


def measure(args: argparse.Namespace, program: pathlib.Path) -> Times:
    """Measures everything, round by round; who comes first changes."""
    times: Times = {}

    def add(row: str, megabytes: int, value: float) -> None:
        times.setdefault(row, {}).setdefault(megabytes, []).append(value)

    def ours() -> None:
        for row, kind in OURS.items():
            for megabytes in MEGABYTES:
                n_bytes = megabytes * 1_000_000 * (2 if kind.startswith("i64") else 1)
                line = run([str(program), "2", kind, str(n_bytes), str(args.repeats)])
                add(row, megabytes, json.loads(line)["median_ms"])

    def gloo() -> None:
        if not args.python:
            return
        line = run([args.python, str(HERE / "allreduce_peer.py"), "--megabytes",
                    *map(str, MEGABYTES), "--repeats", str(args.repeats)])
        for megabytes, value in json.loads(line).items():
            add(GLOO, int(megabytes), value)

    for round_ in range(args.rounds):
        say(PROGRAM, f"round {round_ + 1} of {args.rounds}")
        for act in (ours, gloo) if round_ % 2 == 0 else (gloo, ours):
            act()
    return times


def measure_slow(args: argparse.Namespace, program: pathlib.Path) -> Times:
    """Measures through a network of `args.megabits` a second."""
    times: Times = {}
    for round_ in range(args.rounds):
        say(PROGRAM, f"slow network, round {round_ + 1} of {args.rounds}")
        for row, kind in list(SLOW.items())[:: -1 if round_ % 2 else 1]:
            for megabytes in SLOW_MEGABYTES:
                n_bytes = megabytes * 1_000_000 * (2 if kind == "exact" else 1)
                line = run([str(program), "2", kind, str(n_bytes), str(SLOW_REPEATS),
                            str(args.megabits)])
                times.setdefault(row, {}).setdefault(megabytes, []).append(
                    json.loads(line)["median_ms"])
    return {row: times[row] for row in SLOW}


def table(times: Times, peer_row: str, peer_name: str, all_megabytes: tuple[int, ...]) -> str:
    """Returns a Markdown table: median and range, and the peer's median over it with the range of
    the ratios within a round."""
    heads = "".join(f" {m} MB, ms (range) | {peer_name} to it |" for m in all_megabytes)
    lines = [f"| |{heads}", f"|---|{'---:|---:|' * len(all_megabytes)}"]
    for row, sizes in times.items():
        cells = [row]
        for megabytes in all_megabytes:
            values = sizes[megabytes]
            cells.append(f"{statistics.median(values):.2f} "
                         f"({min(values):.2f}–{max(values):.2f})")
            peer = times.get(peer_row, {}).get(megabytes)
            ratios = [theirs / own for theirs, own in zip(peer or [], values)]
            of_medians = statistics.median(peer) / statistics.median(values) if ratios else 0.0
            cells.append(f"{of_medians:.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
                         if ratios else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python with torch, to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--megabits", type=float, default=1000,
                        help="a second into each process of the slow network (1000)")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the raw numbers, JSON")
    args = parser.parse_args()
    try:
        program = build()
        times = measure(args, program)
        slow = measure_slow(args, program)
    except Unfit as error:
        say(PROGRAM, str(error))
        return EXIT_UNFIT
    print(table(times, GLOO, "gloo's f32", MEGABYTES))
    print(f"\nThrough {args.megabits:g} Mb/s:\n")
    print(table(slow, "f32 (fast)", "f32", SLOW_MEGABYTES))
    if not args.python:
        say(PROGRAM, "gloo: skipped, no Python with torch (--python v/bin/python)")
    if args.out:
        args.out.write_text(json.dumps({"fast": times, "slow": slow}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
