#!/usr/bin/env python3
"""Compares training steps on a GPU with PyTorch's, beside what the card gives at most.

    python3 scripts/bench/gpu.py --worker target/gpu-check/lacuna-worker --out gpu-bench.json

Our cases and PyTorch's take turns, and the order turns round every time; what PyTorch compiles
first has one turn. A step has the update; ours has the way of the images to the card too. MFU is
the arithmetic that a model needs for an image, nothing left out for work that is skipped, divided
by a large bf16 product of the same run. Every case of ours is trained twice from its start and must
give the same bits, but for `:free` ones, in which libtorch may choose other kernels: what these
save is what exactness costs. `fast` sums floats.

The peer is the repository's own `pytorch_step.py` and no outside reference, because the comparison
must run from the repository alone, with nothing but torch.

What does not fit into `--minutes` is left out, and named; what was measured is written all the
same, and `complete` is false there. Run by `make gpu-bench`. Exit codes: 0 all was measured, 1 a
case failed or a program died, 2 wrong usage, 3 nothing failed but something was left out for lack
of time, 78 no Python with the right torch.
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
# A program that hangs takes this part of all the time, and not all of it. More minutes give more to
# each: max-autotune of a large model takes several.
PROGRAM_SHARE_MAX = 0.5
# What all of it takes, by an estimate from the rates in docs/benchmarks/gpu.md: a step of `base`
# takes 0.2 s in bf16 and 0.8 s in f32, compiling one to two minutes, tuning three to five. The five
# minutes that are the default hold about the tables, `base` beside eager and compiled, its slots
# and sums, and `large` beside eager.
MINUTES_ALL = 40
EXIT_USAGE = 2
EXIT_LEFT_OUT = 3
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contest:
    """Steps of one model that are compared: ours by case, and PyTorch's by name."""

    model: str
    images: int
    ours: tuple[str, ...]
    peers: dict[str, tuple[str, ...]]


def contests(small: bool) -> list[Contest]:
    """Lists what is compared, what matters most first. Times are compared with the first case."""
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
    bf16 = {name: (*flags, "--precision", "bf16") for name, flags in peers.items()}
    base, *larger = [Contest(model, images, (case(model, images, SLOT),
                                             case(model, images, SLOT, reduce="exact:free")), bf16)
                     for model, images in IMAGES.items()]
    # The same once more, so that the others have it beside them.
    sizes = (SLOT, *(slot for slot in SLOTS if slot != SLOT))
    alone = Contest("base", base.images,
                    (*(case("base", base.images, slot) for slot in sizes),
                     # The slowest of them, and so the last.
                     case("base", base.images, SLOT, reduce="fast")), {})
    precisions = [Contest("base", base.images, (case("base", base.images, SLOT, precision),),
                          {f"PyTorch eager, {precision}": ("--precision", precision)})
                  for precision in PRECISIONS if precision != "bf16"]
    # So few that the host's launches may set the pace.
    few = Contest("large", 64, (case("large", 64, 64),), bf16)
    return [base, alone, *larger, *precisions, few]


def schedule(all_of_them: list[Contest], rounds: int) -> list[tuple[int, str, Contest]]:
    """Lists the turns, so that time that is over early leaves out what costs most or matters least:
    round, what kind of peer has its turn, and in which contest.

    The first contest has what compiles at once. The others have what needs no compiling before, and
    rounds that only say how steady the card is come after all of that. What is tuned for minutes is
    at the very end.
    """
    first, others = all_of_them[:1], all_of_them[1:]
    again = [(number, "eager", all_of_them) for number in range(1, rounds)]
    passes = [(0, "eager", first), (0, "compiled", first), (0, "eager", others),
              (0, "compiled", others), *again, (0, "tuned", all_of_them)]
    return [(number, kind, contest) for number, kind, some in passes for contest in some
            # One that is ours alone has its turn with those that need no compiling.
            if kind == "eager" or kind in map(kind_of, contest.peers.values())]


class Bench:
    """Runs programs while there is time."""

    def __init__(self, args: argparse.Namespace, python: str):
        self.args, self.python = args, python
        self.ends = time.monotonic() + 60 * args.minutes
        self.left_out: list[str] = []
        # Those of them for which there was time.
        self.died: list[str] = []
        self.measured: Line = {}

    def run(self, name: str, command: list[str], n_lines: int = 1) -> list[Line]:
        """Returns the lines of JSON that a program prints; some where it is ended early."""
        left = min(self.ends - time.monotonic(), PROGRAM_SHARE_MAX * 60 * self.args.minutes)
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
            if not why:
                why = f"ended with {child.returncode}"
                self.died.append(f"{name} ({why})")
            self.left_out.append(f"{name} ({why})")
        say(PROGRAM, f"{name}: done, {self.ends - time.monotonic():.0f} s are left")
        return lines

    def tables(self) -> Line:
        """Measures what the card gives at most."""
        small = ["--small"] if self.args.small else []
        lines = self.run("tables", [self.python, str(HERE / "gpu_tables.py"), "--device",
                                    self.args.device, *small])
        self.measured = lines[-1] if lines else {}
        return self.measured

    def ours(self, cases: tuple[str, ...]) -> list[Line]:
        """Trains cases of ours, in one process."""
        device = "cuda0" if self.args.device == "cuda" else "cpu0"
        words = [word for case in cases for word in ("--case", case)]
        return self.run(f"lacuna, {', '.join(cases)}",
                        [self.args.worker, "gpu-bench", "--device", device, "--steps",
                         str(self.args.steps), *words], len(cases))

    def peer(self, contest: Contest, name: str) -> list[Line]:
        """Trains in PyTorch."""
        lines = self.run(f"{name}, {contest.model}, {contest.images} images",
                         [self.python, str(HERE / "pytorch_step.py"), "--device", self.args.device,
                          "--model", contest.model, "--batch", str(contest.images), "--steps",
                          str(self.args.steps), "--warmup", "5", *contest.peers[name]])
        return [{**line, "case": name} for line in lines]

    def compare(self, all_of_them: list[Contest]) -> list[tuple[Contest, list[Line]]]:
        """Lets everybody run beside ours, a card being not as fast all the time."""
        found: list[tuple[Contest, list[Line]]] = [(contest, []) for contest in all_of_them]
        for number, kind, contest in schedule(all_of_them, self.args.rounds):
            # Compilers have time; beside them only what they are compared with runs once more.
            cases = contest.ours if kind == "eager" else contest.ours[:1]
            turns = [lambda cases=cases: self.ours(cases)]
            turns += [lambda name=name, contest=contest: self.peer(contest, name)
                      for name, flags in contest.peers.items() if kind_of(flags) == kind]
            lines = next(lines for one, lines in found if one is contest)
            # Whoever runs second finds a warmer machine; turning the order shares that out.
            for turn in turns[:: -1 if number % 2 else 1]:
                lines += [{"round": number, "beside": kind, **line} for line in turn()]
            self.keep(found)
        return found

    def keep(self, found: list[tuple[Contest, list[Line]]], complete: bool = False) -> None:
        """Writes what was measured so far; it is not complete before the end."""
        if self.args.out:
            pathlib.Path(self.args.out).write_text(json.dumps({
                "format": "lacuna-gpu-bench/1", "unix_seconds": int(time.time()),
                "complete": complete, "left_out": self.left_out, "tables": self.measured,
                "lines": [line for _, lines in found for line in lines],
            }, indent=1) + "\n", encoding="utf-8")

    def missing(self) -> str:
        """Says in one line what was not measured, and what helps; nothing where all was."""
        if not self.left_out:
            return ""
        # What is out in each round has one name.
        names = "; ".join(dict.fromkeys(self.left_out))
        advice = ""
        if len(self.left_out) > len(self.died):
            minutes = max(MINUTES_ALL, 2 * self.args.minutes)
            advice = (f": what time was too short for is measured with `--minutes {minutes:g}`, "
                      f"and not with {self.args.minutes:g}")
        return f"NOT COMPLETE, left out: {names}{advice}"


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


def report(tables: Line, results: list[tuple[Contest, list[Line]]]) -> str:
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
    return out + f"{same} of {len(ours)} exact trainings of ours gave the same bits twice."


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
    wanted = [contest for contest in contests(args.small)
              if args.models is None or contest.model in args.models]
    if not wanted:
        say(PROGRAM, f"no contest is of {', '.join(args.models)}")
        return EXIT_USAGE
    try:
        bench = Bench(args, find_python(args.python))
    except Unfit as why:
        say(PROGRAM, str(why))
        return EXIT_UNFIT
    tables = bench.tables()
    results = bench.compare(wanted)
    bench.keep(results, complete=not bench.left_out)
    print(report(tables, results))
    if bench.left_out:
        print(bench.missing())
    lines = [line for _, lines in results for line in lines]
    failed = [line["case"] for line in lines if line.get("error") or differs(line)] + bench.died
    for case in dict.fromkeys(failed):
        say(PROGRAM, f"FAILED: {case}")
    if failed:
        return 1
    return EXIT_LEFT_OUT if bench.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
