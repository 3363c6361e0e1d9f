#!/usr/bin/env python3
"""Compares training steps on a GPU with PyTorch's, beside what the card gives at most.

    python3 scripts/bench/gpu.py --worker target/gpu-check/lacuna-worker --out gpu-bench.json

Our cases and PyTorch's take turns, and the order turns round every time; what PyTorch compiles
first has one turn. A step has the update; ours has the way of the images to the card too. MFU is
the arithmetic that a model needs for an image, nothing left out for work that is skipped, divided
by a large bf16 product of the same run. Every case of ours is trained twice from its start and must
give the same bits, but for `:free` ones, in which libtorch may choose other kernels: what these
save is what exactness costs. `fast` sums floats. What does not fit into `--minutes` is left out,
and named. Run by `make gpu-bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folders above come first)
from step import find_python, spread, with_range  # noqa: E402

PROGRAM = "gpu-bench"
# Images a step, for each model; the slots of ours divide them.
IMAGES = {"base": 512, "large": 256, "huge": 128}
SLOT = 128
SLOTS = (32, 64, 128, 256)
PRECISIONS = ("bf16", "tf32", "f32")
SMALL = {"micro": 8}
# Longest time of one program: max-autotune of a large model takes minutes.
COMMAND_SECONDS_MAX = 150
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contest:
    """Steps of one model that are compared: ours by case, and PyTorch's by name."""

    model: str
    images: int
    ours: tuple[str, ...]
    peers: dict[str, tuple[str, ...]]


def contests(small: bool) -> list[Contest]:
    """Lists what is compared, what matters most first."""
    def case(model: str, images: int, slot: int, precision: str = "bf16",
             reduce: str = "exact") -> str:
        return f"{model}:{slot}:{images // slot}:{precision}:{reduce}"

    if small:
        peer = ("--precision", "f32")
        return [Contest(model, images,
                        tuple(case(model, images, images // 2, "f32", reduce)
                              for reduce in ("exact", "exact:free", "fast")),
                        {"PyTorch eager": peer})
                for model, images in SMALL.items()]
    peers = {"PyTorch eager": (), "PyTorch compiled": ("--compile",),
             "PyTorch max-autotune": ("--compile", "--mode", "max-autotune")}
    out = [Contest(model, images, (case(model, images, min(SLOT, images)),
                                   case(model, images, min(SLOT, images), reduce="exact:free")),
                   {name: (*flags, "--precision", "bf16") for name, flags in peers.items()})
           for model, images in IMAGES.items()]
    sizes = tuple(case("base", IMAGES["base"], slot) for slot in SLOTS if slot != SLOT)
    others = (*(case("base", IMAGES["base"], SLOT, precision)
                for precision in PRECISIONS if precision != "bf16"),
              case("base", IMAGES["base"], SLOT, reduce="fast"))
    eager = {f"PyTorch eager, {precision}": ("--precision", precision)
             for precision in PRECISIONS if precision != "bf16"}
    return [*out, Contest("base", IMAGES["base"], sizes + others, eager),
            Contest("large", 64, (case("large", 64, 64),),
                    {name: (*flags, "--precision", "bf16") for name, flags in peers.items()})]


class Bench:
    """Runs programs while there is time."""

    def __init__(self, args: argparse.Namespace, python: str):
        self.args, self.python = args, python
        self.ends = time.monotonic() + 60 * args.minutes
        self.left_out: list[str] = []
        self.measured: Line = {}

    def run(self, name: str, command: list[str], n_lines: int = 1) -> list[Line]:
        """Returns the lines of JSON that a program prints; some where it is ended early."""
        left = min(self.ends - time.monotonic(), COMMAND_SECONDS_MAX)
        if left <= 0:
            self.left_out.append(name)
            return []
        env = dict(os.environ, OMP_NUM_THREADS="1", RUST_LOG="error",
                   CUBLAS_WORKSPACE_CONFIG=":4096:8")
        why = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
            try:
                text, _ = child.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                child.kill()
                text, _ = child.communicate()
                why = f"ended after {left:.0f} s"
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        # A case that failed has a line too; a program that died has none.
        if len(lines) < n_lines:
            self.left_out.append(f"{name} ({why or f'ended with {child.returncode}'})")
        say(PROGRAM, f"{name}: done, {self.ends - time.monotonic():.0f} s are left")
        return lines

    def tables(self) -> Line:
        """Measures what the card gives at most."""
        small = ["--small"] if self.args.small else []
        lines = self.run("tables", [self.python, str(HERE / "gpu_tables.py"), "--device",
                                    self.args.device, *small])
        self.measured = lines[-1] if lines else {}
        return self.measured

    def ours(self, contest: Contest) -> list[Line]:
        """Trains our cases, in one process."""
        device = "cuda0" if self.args.device == "cuda" else "cpu0"
        cases = [word for case in contest.ours for word in ("--case", case)]
        return self.run(f"lacuna, {', '.join(contest.ours)}",
                        [self.args.worker, "gpu-bench", "--device", device, "--steps",
                         str(self.args.steps), *cases], len(contest.ours))

    def peer(self, contest: Contest, name: str) -> list[Line]:
        """Trains in PyTorch."""
        lines = self.run(f"{name}, {contest.model}",
                         [self.python, str(HERE / "pytorch_step.py"), "--device", self.args.device,
                          "--model", contest.model, "--batch", str(contest.images), "--steps",
                          str(self.args.steps), "--warmup", "5", *contest.peers[name]])
        return [{**line, "case": name} for line in lines]

    def compare(self, all_of_them: list[Contest]) -> list[tuple[Contest, list[Line]]]:
        """Lets everybody run beside ours, a card being not as fast all the time: all contests with
        what begins at once, then, once, with what compiles first, then the other rounds, and at the
        very end with what is tuned for minutes. So time that is over early leaves out what costs
        most."""
        found: list[tuple[Contest, list[Line]]] = [(contest, []) for contest in all_of_them]
        rounds = [(number, "eager") for number in range(self.args.rounds)]
        for number, kind in [*rounds[:1], (0, "compiled"), *rounds[1:], (0, "tuned")]:
            for contest, lines in found:
                turns = [lambda name=name, contest=contest: self.peer(contest, name)
                         for name, flags in contest.peers.items() if kind_of(flags) == kind]
                if not turns:
                    continue
                turns.insert(0, lambda contest=contest: self.ours(contest))
                # Whoever runs second finds a warmer machine; turning the order shares that out.
                for turn in turns[:: -1 if number % 2 else 1]:
                    lines += [{"round": number, "beside": kind, **line} for line in turn()]
                self.keep(found)
        return found

    def keep(self, found: list[tuple[Contest, list[Line]]]) -> None:
        """Writes what was measured so far."""
        if self.args.out:
            pathlib.Path(self.args.out).write_text(json.dumps({
                "format": "lacuna-gpu-bench/1", "unix_seconds": int(time.time()),
                "tables": self.measured, "lines": [line for _, lines in found for line in lines],
                "left_out": self.left_out}, indent=1) + "\n", encoding="utf-8")


def kind_of(flags: tuple[str, ...]) -> str:
    """Tells how long a peer takes before its first step."""
    if "--mode" in flags:
        return "tuned"
    return "compiled" if "--compile" in flags else "eager"


def table(contest: Contest, lines: list[Line], peak: float | None, flops: float | None) -> str:
    """Lays a contest out as Markdown: rates, MFU, and the time of a step to our first case's."""
    out = (f"| {contest.model}, {contest.images} images a step | ms a step (range) | images/s "
           "| MFU | time to ours (range) |\n|---|---:|---:|---:|---:|\n")
    by_case: dict[str, dict[tuple, float]] = {}
    for line in lines:
        if line.get("step_ms"):
            turn = (line.get("round"), line.get("beside"))
            by_case.setdefault(line["case"], {})[turn] = line["step_ms"]["median"]
    ours = by_case.get(contest.ours[0], {})
    for case in (*contest.ours, *contest.peers):
        by_turn = by_case.get(case, {})
        times = list(by_turn.values())
        if not times:
            why = next((line["error"] for line in lines
                        if line["case"] == case and line.get("error")), "left out")
            out += f"| {case} | {why} | | | |\n"
            continue
        rate = contest.images / statistics.median(times) * 1e3
        mfu = f"{rate * flops / peak:.3f}" if peak and flops else "–"
        # Each with ours of the same turn: a card is not as fast all the time.
        ratios = [ms / ours[turn] for turn, ms in by_turn.items() if turn in ours]
        ratio = with_range(statistics.median(ratios), ratios, 3) if ratios else "–"
        if by_turn is ours:
            ratio = "1"
        out += f"| {case} | {spread(times)} | {rate:.0f} | {mfu} | {ratio} |\n"
    return out


def report(tables: Line, results: list[tuple[Contest, list[Line]]], left_out: list[str]) -> str:
    """Writes everything for people."""
    out = ""
    peak = None
    if tables:
        limits = tables["ceilings"]
        peak = limits["tflops"] * 1e12
        out += (f"{tables.get('card', tables['device'])}, torch {tables['torch']}: "
                f"{limits['tflops']:.1f} TFLOP/s in a bf16 product of {limits['product_side']}, "
                f"{limits['copy_gb_s']:.0f} GB/s in a copy\n\n")
        out += "| attention, both ways | " + " | ".join(
            row["backend"] for row in tables["attention"][:4]) + " |\n|---|---:|---:|---:|---:|\n"
        rows = tables["attention"]
        for at in range(0, len(rows), 4):
            one = rows[at]
            cells = [f"{row['us']:.0f} µs" if "us" in row else "refused"
                     for row in rows[at:at + 4]]
            out += (f"| {one['batch']} x {one['heads']} x {one['tokens']} x {one['head']} | "
                    + " | ".join(cells) + " |\n")
        out += "\n" + products(tables["products"]) + "\n"
    for contest, lines in results:
        flops = next((line["flops_per_image"] for line in lines if "flops_per_image" in line), None)
        out += table(contest, lines, peak, flops) + "\n"
    ours = [line for _, lines in results for line in lines
            if line.get("repeats") is not None and line.get("kernels") != "free"]
    same = len(ours) - sum(differs(line) for line in ours)
    out += f"{same} of {len(ours)} exact trainings of ours gave the same bits twice.\n"
    return out + "".join(f"left out: {name}\n" for name in left_out)


def differs(line: Line) -> bool:
    """Tells whether a case of ours that must repeat itself did not."""
    return line.get("repeats") is False and line.get("kernels") != "free"


def products(rows: list[Line]) -> str:
    """Lays the products out: TFLOP/s by number of images."""
    counts = sorted({row["images"] for row in rows})
    out = "| product, TFLOP/s | " + " | ".join(f"{n} images" for n in counts) + " |\n|---"
    out += "|---:" * len(counts) + "|\n"
    for at in range(0, len(rows), len(counts)):
        some = rows[at:at + len(counts)]
        cells = [f"{row['tflops']:.3g}" for row in some]
        out += f"| {some[0]['model']} {some[0]['product']} | " + " | ".join(cells) + " |\n"
    return out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", required=True, help="the program `lacuna-worker`")
    parser.add_argument("--python", help="a Python with torch (python3)")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="sizes that a CPU does in seconds")
    parser.add_argument("--models", type=lambda text: text.split(","),
                        help="like base,large [default: all]")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a case in a round")
    parser.add_argument("--minutes", type=float, default=5, help="after which nothing is begun")
    parser.add_argument("--out", help="file for everything that was measured, JSON")
    return parser.parse_args()


def main() -> int:
    """Runs the program and returns its exit code."""
    args = parse()
    try:
        bench = Bench(args, find_python(args.python))
    except Unfit as why:
        say(PROGRAM, str(why))
        return EXIT_UNFIT
    tables = bench.tables()
    wanted = [contest for contest in contests(args.small)
              if args.models is None or contest.model in args.models]
    results = bench.compare(wanted)
    bench.keep(results)
    print(report(tables, results, bench.left_out))
    lines = [line for _, lines in results for line in lines]
    failed = [line["case"] for line in lines if line.get("error") or differs(line)]
    for case in failed:
        say(PROGRAM, f"FAILED: {case}")
    ours = [line for line in lines if line.get("peer") == "lacuna"]
    return 1 if failed or not ours or not tables else 0


if __name__ == "__main__":
    sys.exit(main())
