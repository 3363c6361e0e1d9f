#!/usr/bin/env python3
"""Trains the same small model here and in PyTorch, and compares the loss curves.

    python3 scripts/bench/parity.py --python v/bin/python --out docs/benchmarks/parity.json

Beside the file of `--out` a plot is written, parity.svg. For every seed the example `parity` trains
and hands its weights, pixels, masks and learning rates to parity_peer.py, which trains at the same
time. Curves are means over the last 50 steps. What two programs differ by at one seed is set
against what seeds differ by in one program, and with `--control` against what PyTorch differs from
itself by where it adds up the gradients of four parts of a batch.

Curves that the file of `--out` has already are kept with `--keep`: then a mode that is new trains
alone, without PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folders above come first)
from debian import NoPackage  # noqa: E402
from photos import photographs  # noqa: E402
from step import BUILD_SECONDS_MAX, ONE_THREAD, cpu_name, find_python, target_dir  # noqa: E402

PROGRAM = "parity"
WINDOW = 50
PEER = "PyTorch"
PARTS = 4
CONTROL = f"PyTorch, {PARTS} parts a batch"
# Digits of a loss that are kept: those of an f32 near 1.
DIGITS = 7
# Per program (`PyTorch`, `lacuna exact`) and seed, the losses of all steps.
Curves = dict[str, dict[int, list[float]]]


def smooth(losses: list[float], window: int = WINDOW) -> list[float]:
    """Returns the means of the last `window` losses, from the first full window on."""
    sums = list(itertools.accumulate(losses, initial=0.0))
    return [(high - low) / window for low, high in zip(sums, sums[window:])]


def gaps(one: list[float], other: list[float]) -> list[float]:
    """Returns how far two curves are apart, step by step."""
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def spreads(curves: list[list[float]]) -> list[float]:
    """Returns how far the outermost of several curves are apart, step by step."""
    return [max(values) - min(values) for values in zip(*curves, strict=True)]


def table(curves: Curves) -> str:
    """Returns a Markdown table: what each program ends with, and its distance from the peer."""
    lines = [
        "| | seed | smoothed loss at the end | largest gap to PyTorch | mean gap "
        "| largest gap of single steps |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for program, by_seed in curves.items():
        for seed, losses in by_seed.items():
            cells = [program, str(seed), f"{smooth(losses)[-1]:.5f}"]
            if program == PEER:
                cells += ["", "", ""]
            else:
                apart = gaps(smooth(losses), smooth(curves[PEER][seed]))
                single = gaps(losses, curves[PEER][seed])
                cells += [f"{max(apart):.2e}", f"{statistics.mean(apart):.2e}",
                          f"{max(single):.2e}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_seeds(curves: Curves) -> str:
    """Returns a Markdown table: how far the smoothed curves of several seeds are apart."""
    lines = ["| | at the end | largest | mean |", "|---|---:|---:|---:|"]
    for program, by_seed in curves.items():
        apart = spreads([smooth(losses) for losses in by_seed.values()])
        lines.append(f"| {program} | {apart[-1]:.2e} | {max(apart):.2e} "
                     f"| {statistics.mean(apart):.2e} |")
    return "\n".join(lines)


# The plot: two panels of one width, curves above and differences below.
LEFT, WIDTH, HEIGHT, ABOVE, BELOW = 64, 720, 300, 40, 396
COLOURS = ["#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280"]


class Panel:
    """A part of the plot with axes of its own."""

    def __init__(self, top: float, steps: int, low: float, high: float) -> None:
        self.top, self.steps, self.low, self.high = top, steps, low, high

    def x(self, step: float) -> float:
        return LEFT + WIDTH * step / self.steps

    def y(self, value: float) -> float:
        return self.top + HEIGHT * (self.high - value) / (self.high - self.low)

    def axes(self, title: str) -> list[str]:
        """Draws the frame and the ticks of both axes."""
        lines = [f'<text x="{LEFT}" y="{self.top - 8}">{title}</text>',
                 f'<rect x="{LEFT}" y="{self.top}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
                 'stroke="#a0aec0"/>']
        for value in [self.low + (self.high - self.low) * i / 4 for i in range(5)]:
            lines.append(f'<path d="M{LEFT} {self.y(value):.1f}h{WIDTH}" stroke="#e2e8f0"/>'
                         f'<text x="{LEFT - 6}" y="{self.y(value) + 4:.1f}" '
                         f'text-anchor="end">{value:.3g}</text>')
        for step in range(0, self.steps + 1, max(self.steps // 4, 1)):
            lines.append(f'<text x="{self.x(step):.1f}" y="{self.top + HEIGHT + 16}" '
                         f'text-anchor="middle">{step}</text>')
        return lines

    def line(self, first: int, values: list[float], style: str) -> str:
        """Draws a curve whose first value belongs to step `first`; every fourth step is enough."""
        points = [f"{self.x(first + i):.1f} {self.y(value):.2f}"
                  for i, value in list(enumerate(values))[::4]]
        return f'<path d="M{"L".join(points)}" fill="none" {style}/>'


def plot(curves: Curves) -> str:
    """Draws the smoothed curves, and below what programs and what seeds differ by."""
    smoothed = {program: {seed: smooth(losses) for seed, losses in by_seed.items()}
                for program, by_seed in curves.items()}
    peers = smoothed[PEER]
    steps = len(next(iter(curves[PEER].values())))
    # The first tenth, where the loss falls steeply, would set the scales alone.
    late = [value for by_seed in smoothed.values() for curve in by_seed.values()
            for value in curve[len(curve) // 10:]]
    margin = (max(late) - min(late)) / 10 or 1e-3
    above = Panel(ABOVE, steps, min(late) - margin, max(late) + 3 * margin)
    lines = ['<defs>', *(f'<clipPath id="{name}"><rect x="{LEFT}" y="{top}" width="{WIDTH}" '
                         f'height="{HEIGHT}"/></clipPath>'
                         for name, top in [("above", above.top), ("below", BELOW)]), '</defs>']
    lines += above.axes(f"loss, mean of {WINDOW} steps: PyTorch wide and pale, lacuna thin; a "
                        "colour for each seed")
    lines.append('<g clip-path="url(#above)">')
    for i, (seed, curve) in enumerate(peers.items()):
        colour = COLOURS[i % len(COLOURS)]
        lines.append(above.line(WINDOW, curve,
                                f'stroke="{colour}" stroke-width="5" stroke-opacity="0.3"'))
        lines += [above.line(WINDOW, by_seed[seed], f'stroke="{colour}" stroke-width="1.2"')
                  for program, by_seed in smoothed.items() if program not in (PEER, CONTROL)]
    lines.append("</g>")

    between = [[a - b for a, b in zip(one, other)]
               for one, other in itertools.combinations(peers.values(), 2)]
    reach = max((abs(value) for curve in between for value in curve[len(curve) // 10:]),
                default=0.0) * 1.2 or 1e-3
    below = Panel(BELOW, steps, -reach, reach)
    lines += below.axes("differences: lacuna less PyTorch at one seed (colours; dashed: PyTorch in "
                        f"{PARTS} parts less PyTorch), two seeds of PyTorch (grey)")
    lines.append('<g clip-path="url(#below)">')
    lines += [below.line(WINDOW, curve, 'stroke="#a0aec0"') for curve in between]
    for program, by_seed in smoothed.items():
        for i, (seed, curve) in enumerate(by_seed.items()):
            if program != PEER:
                apart = [a - b for a, b in zip(curve, peers[seed])]
                dashes = ' stroke-dasharray="4 3"' if program == CONTROL else ""
                style = f'stroke="{COLOURS[i % len(COLOURS)]}"{dashes}'
                lines.append(below.line(WINDOW, apart, style))
    lines.append("</g>")
    size = f'width="{LEFT + WIDTH + 24}" height="{BELOW + HEIGHT + 30}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
                      'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
                      *lines, "</svg>"]) + "\n"


def build() -> None:
    """Builds the example."""
    command = ["cargo", "build", "--release", "--package", "lacuna-mae", "--example", "parity"]
    done = subprocess.run(command, cwd=HERE.parent.parent, timeout=BUILD_SECONDS_MAX, check=False)
    if done.returncode != 0:
        raise Unfit("`parity` cannot be built (`make setup` fetches libtorch)")


def read_curve(path: pathlib.Path, steps: int) -> list[float]:
    """Reads the losses that a program wrote."""
    losses: list[float] = json.loads(path.read_text())
    if len(losses) != steps:
        raise Unfit(f"{path.name} has {len(losses)} losses, not {steps}")
    return [round(loss, DIGITS) for loss in losses]


def train(ours: list[str], peer: list[str] | None, seconds_max: int) -> None:
    """Runs our program, with the peer at the other end of its stream where there is one."""
    env = {**os.environ, **ONE_THREAD}
    pipe = subprocess.PIPE if peer else None
    first = subprocess.Popen(ours, env=env, stdout=pipe)
    children = [first]
    deadline = time.monotonic() + seconds_max
    try:
        if peer:
            children.append(subprocess.Popen(peer, env=env, stdin=first.stdout))
            if first.stdout:
                first.stdout.close()  # Ours hears when the peer is gone.
        for child in reversed(children):
            if child.wait(timeout=max(deadline - time.monotonic(), 0)) != 0:
                raise Unfit(f"a program failed with exit code {child.returncode}")
    finally:
        for child in children:
            child.kill()
            child.wait()


def keep(curves: Curves, program: str, seed: int, losses: list[float]) -> None:
    """Adds a curve; one that is there must be the same, because nothing but the seed decides it."""
    if curves.setdefault(program, {}).setdefault(seed, losses) != losses:
        raise Unfit(f"{program}, seed {seed}: not the curve of another run of the same")


def measure(args: argparse.Namespace, program: pathlib.Path, python: str, curves: Curves) -> None:
    """Adds the curves that are missing: every seed in every mode, and once a seed in PyTorch."""
    photos = photographs()[0].parent
    peers = {PEER: []} | ({CONTROL: ["--parts", str(PARTS)]} if args.control else {})
    for seed in args.seeds:
        missing = [name for name in peers if seed not in curves.get(name, {})]
        jobs = [(args.reduce[0], name) for name in missing]
        jobs += [(mode, None) for mode in args.reduce[1 if missing else 0:]
                 if seed not in curves.get(f"lacuna {mode}", {})]
        for mode, name in jobs:
            with tempfile.TemporaryDirectory(prefix="parity-") as text:
                folder = pathlib.Path(text)
                ours = [str(program), "--photos", str(photos), "--work", str(args.work),
                        "--curve", str(folder / "ours"), "--seed", str(seed),
                        "--steps", str(args.steps), "--reduce", mode]
                peer = None
                if name:
                    ours.append("--stream")
                    peer = [python, str(HERE / "parity_peer.py"), "--curve",
                            str(folder / "peer"), *peers[name]]
                start = time.monotonic()
                train(ours, peer, args.seconds_max)
                if name:
                    keep(curves, name, seed, read_curve(folder / "peer", args.steps))
                keep(curves, f"lacuna {mode}", seed, read_curve(folder / "ours", args.steps))
            say(PROGRAM, f"seed {seed}, {mode}, {name}: {time.monotonic() - start:.0f} s")
            write(args, curves)


def read(args: argparse.Namespace) -> Curves:
    """Reads the curves that are to be kept."""
    if not (args.keep and args.out.is_file()):
        return {}
    record = json.loads(args.out.read_text())
    if record["steps"] != args.steps:
        raise Unfit(f"`{args.out}` has curves of {record['steps']} steps")
    return {program: {int(seed): losses for seed, losses in by_seed.items()}
            for program, by_seed in record["curves"].items()}


def write(args: argparse.Namespace, curves: Curves) -> None:
    """Writes the curves, where a file is given."""
    if args.out:
        args.out.write_text(json.dumps({"steps": args.steps, "curves": curves}) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python with torch (python3)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3],
                        help="seeds of weights, order, crops and masks (1 2 3)")
    parser.add_argument("--reduce", nargs="+", default=["exact"], help="modes of the sum (exact)")
    parser.add_argument("--work", type=pathlib.Path, help="folder for the pictures (in the target)")
    parser.add_argument("--seconds-max", type=int, default=3600, help="for one training (3600)")
    parser.add_argument("--control", action="store_true",
                        help=f"train in PyTorch again, with {PARTS} parts a batch")
    parser.add_argument("--keep", action="store_true", help="train what --out lacks")
    parser.add_argument("--no-build", action="store_true", help="run the example that is there")
    parser.add_argument("--out", type=pathlib.Path, help="write the curves to this JSON file")
    args = parser.parse_args()
    if args.steps < 2 * WINDOW:
        parser.error(f"--steps must be {2 * WINDOW} at least")
    if args.keep and not args.out:
        parser.error("--keep needs --out")
    args.work = args.work or target_dir() / "parity"
    return args


def main() -> int:
    args = parse()
    try:
        python = find_python(args.python)
        if not args.no_build:
            build()
        program = target_dir() / "release" / "examples" / "parity"
        if not program.is_file():
            raise Unfit(f"no `{program}`: leave out --no-build")
        curves = read(args)
        measure(args, program, python, curves)
    except (Unfit, NoPackage, subprocess.TimeoutExpired) as reason:
        say(PROGRAM, str(reason))
        return EXIT_UNFIT
    print(f"{args.steps} steps; {cpu_name()}, {os.cpu_count()} CPUs.\n")
    print(table(curves))
    print(f"\nSmoothed curves of {len(args.seeds)} seeds, outermost to outermost:\n")
    print(table_of_seeds(curves))
    if args.out:
        write(args, curves)
        args.out.with_suffix(".svg").write_text(plot(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
