#!/usr/bin/env python3
"""Compares the time of a training step with PyTorch's on this machine.

Runs `step_bench` and `pytorch_step.py` in turn, with the same model and batch, one thread each, and
prints a Markdown table. CPU time is the primary figure: a busy machine disturbs it less than wall
time.

    python3 scripts/bench/step.py --python v/bin/python --rounds 5 --out step.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folder above is put on the path first)

TORCH_VERSION = "2.11.0"
PROGRAM = "bench"
# `base` at batch 64 is about 60 times the arithmetic of the defaults, which take 12 s.
RUN_SECONDS_MAX = 1800
# A build on two cores takes two minutes, and several more if libtorch's bindings are not built.
BUILD_SECONDS_MAX = 3600
ASK_SECONDS_MAX = 60

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# The instruction sets that `step_bench` is held to, so that equal steps give equal bits.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
NO_PYTHON = f"""no Python with torch {TORCH_VERSION}: {{why}}
To make one (about 5 GB), outside of the checkout:
  python3 -m venv v && v/bin/pip install torch=={TORCH_VERSION} numpy
  make bench BENCH="--python v/bin/python\""""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A program to time."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Timing:
    """The median step of one process, in milliseconds."""

    cpu_ms: float
    wall_ms: float


# Per contestant, one timing a round; the first contestant is ours.
Rounds = dict[str, list[Timing]]


def table(rounds: Rounds) -> str:
    """Returns a Markdown table: medians over the rounds, their range, and peer / ours.

    The ratio is that of the median CPU times; its range is that of the ratios within a round.
    """
    ours = next(iter(rounds.values()))
    lines = [
        "| | CPU ms a step (range) | wall ms a step (range) | CPU time to ours (range) |",
        "|---|---:|---:|---:|",
    ]
    for name, timings in rounds.items():
        cpu = [timing.cpu_ms for timing in timings]
        wall = [timing.wall_ms for timing in timings]
        ratio = "1"
        if timings is not ours:
            own_cpu = [timing.cpu_ms for timing in ours]
            ratios = [peer / own for peer, own in zip(cpu, own_cpu)]
            middle = statistics.median(cpu) / statistics.median(own_cpu)
            ratio = with_range(middle, ratios, digits=3)
        cells = [name, spread(cpu), spread(wall), ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Returns the median and the range, in tenths below a second and whole numbers above."""
    digits = 1 if statistics.median(values) < 1000 else 0
    return with_range(statistics.median(values), values, digits)


def with_range(middle: float, values: list[float], digits: int) -> str:
    """Returns `middle (least–most)`."""
    return f"{middle:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def torch_of(python: str) -> str:
    """Returns the version of torch that a Python has; empty if it has none or cannot start."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True,
                                timeout=ASK_SECONDS_MAX)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def find_python(wanted: str | None) -> str:
    """Returns a Python with the right torch: the one asked for, or else the one on the path."""
    python = wanted or shutil.which("python3") or sys.executable
    found = torch_of(python)
    # A suffix such as `+cpu` or `+cu130` names a build of the same version.
    if found.split("+")[0] == TORCH_VERSION:
        return python
    why = f"`{python}` has torch {found}" if found else f"`{python}` has no torch"
    raise Unfit(NO_PYTHON.format(why=why))


def target_dir() -> pathlib.Path:
    """Returns cargo's target folder."""
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or HERE.parent.parent / "target")


def build() -> None:
    """Builds `step_bench`."""
    command = ["cargo", "build", "--release", "--package", "lacuna-mae", "--example", "step_bench"]
    root = HERE.parent.parent
    if subprocess.run(command, cwd=root, timeout=BUILD_SECONDS_MAX).returncode != 0:
        raise Unfit("`step_bench` cannot be built (`make setup` fetches libtorch)")


def run_one(contestant: Contestant) -> dict[str, Any]:
    """Runs a contestant once; returns the line it printed."""
    done = subprocess.run(contestant.command, env={**os.environ, **contestant.env},
                          stdout=subprocess.PIPE, text=True, timeout=RUN_SECONDS_MAX)
    if done.returncode != 0:
        raise Unfit(f"{contestant.name} failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(contestants: list[Contestant], n_rounds: int) -> tuple[Rounds, list[dict[str, Any]]]:
    """Runs everybody once a round, in an order that turns round every time.

    Returns the timings and every line that was printed.
    """
    rounds: Rounds = {contestant.name: [] for contestant in contestants}
    records: list[dict[str, Any]] = []
    for idx in range(n_rounds):
        # Whoever runs second finds a warmer machine; turning the order shares that out.
        for contestant in contestants[:: -1 if idx % 2 else 1]:
            record = run_one(contestant)
            timing = Timing(record["cpu_ms"]["median"], record["step_ms"]["median"])
            rounds[contestant.name].append(timing)
            load = os.getloadavg()[0]
            records.append({"round": idx, "contestant": contestant.name, "load": load, **record})
            say(PROGRAM, f"round {idx + 1} of {n_rounds}, {contestant.name}: "
                f"{timing.cpu_ms:.1f} ms CPU, {timing.wall_ms:.1f} ms wall, load {load:.1f}")
    return rounds, records


def cpu_name() -> str:
    """Returns what the kernel calls the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown CPU"
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown CPU")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help=f"a Python with torch {TORCH_VERSION} (python3)")
    parser.add_argument("--model", default="tiny", help="preset (tiny)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (16)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process (6)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (2)")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (5)")
    parser.add_argument("--avx2", action="store_true",
                        help="add a third row: PyTorch held to the instructions ours is held to")
    parser.add_argument("--no-build", action="store_true", help="time the step_bench that is there")
    parser.add_argument("--out", type=pathlib.Path, help="write every figure to this JSON file")
    args = parser.parse_args()
    if min(args.batch, args.steps, args.rounds) < 1 or args.warmup < 0:
        parser.error("--batch, --steps and --rounds must be positive, --warmup not negative")
    return args


def main() -> int:
    args = parse()
    try:
        python = find_python(args.python)
        if not args.no_build:
            build()
        ours = target_dir() / "release" / "examples" / "step_bench"
        if not ours.is_file():
            raise Unfit(f"no `{ours}`: leave out --no-build")
        flags = [(f"--{name}", str(getattr(args, name)))
                 for name in ("model", "batch", "steps", "warmup")]
        sizes = tuple(word for flag in flags for word in flag)
        peer = (python, str(HERE / "pytorch_step.py"), *sizes)
        contestants = [
            Contestant("lacuna", (str(ours), *sizes), ONE_THREAD),
            Contestant("PyTorch", peer, ONE_THREAD),
        ]
        if args.avx2:
            contestants.append(Contestant("PyTorch, AVX2", peer, ONE_THREAD | AVX2))
        rounds, records = compare(contestants, args.rounds)
    except (Unfit, subprocess.TimeoutExpired) as reason:
        say(PROGRAM, str(reason))
        return EXIT_UNFIT
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs"
    print(f"Preset `{args.model}`, batch {args.batch}, f32, one thread, {args.rounds} rounds of "
          f"{args.steps} steps; {machine}.\n")
    print(table(rounds))
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        record = {"machine": machine, "settings": settings, "runs": records}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
