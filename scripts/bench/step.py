#!/usr/bin/env python3
"""Compares the time of a training step with PyTorch's on this machine.

Runs `step_bench` and `pytorch_step.py` in turn, with the same model and batch, one thread each, and
prints a Markdown table. CPU time is the primary figure: a busy machine disturbs it less than wall
time.

    python3 scripts/bench/step.py --python v/bin/python --rounds 5 --out step.json

`--compile` adds PyTorch with torch.compile, and `--ddp` a second table: two processes that train
together, ours with the exact sum between them and PyTorch's with DDP over gloo. `--same-malloc`
adds PyTorch with the settings of glibc's allocator that trainers have. `--sums` instead compares
nothing but the exact sum and the float sum, in as many rounds as it says.
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
import tempfile
import time
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
# The settings of glibc's allocator that trainers get (`CPU_ENV` in crates/mae/src/runtime.rs):
# freed memory is kept.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
# Where gloo looks for the other process of this machine; it may take another address otherwise.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
# The words of `train.reduce`.
SUMS = ("exact", "exact32", "fast")
# Processes of the second table.
WORLD = 2
NO_PYTHON = f"""no Python with torch {TORCH_VERSION}: {{why}}
To make one (about 5 GB), outside of the checkout:
  python3 -m venv v && v/bin/pip install torch=={TORCH_VERSION} numpy
  make bench BENCH="--python v/bin/python\""""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A program to time, and how many processes of it train together."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    world: int = 1
    # The flag for the path, unique to a run, at which several processes meet.
    meet: str = ""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The median step of a contestant, in milliseconds, and the memory of its largest process: at
    most, and before there was a model."""

    cpu_ms: float
    wall_ms: float
    peak_gib: float
    start_gib: float = 0.0


# Per contestant, one timing a round; the first contestant is ours.
Rounds = dict[str, list[Timing]]


def table(rounds: Rounds) -> str:
    """Returns a Markdown table: medians over the rounds, their range, and peer / ours.

    The ratio is that of the median CPU times; its range is that of the ratios within a round.
    """
    ours = next(iter(rounds.values()))
    lines = [
        "| | CPU ms a step (range) | wall ms a step (range) | CPU time to ours (range) "
        "| peak GiB (without a model) |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, timings in rounds.items():
        cpu, wall = columns(timings)
        ratio = "1" if timings is ours else to_ours(cpu, columns(ours)[0])
        cells = [name, spread(cpu), spread(wall), ratio, peak(timings)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_together(rounds: Rounds, images: int) -> str:
    """Returns the same for processes that train together, on `images` a step.

    CPU time is that of all processes; wall time is the primary figure here, because it has what a
    process waits for the others.
    """
    ours = next(iter(rounds.values()))
    lines = [
        "| | wall ms a step (range) | images/s (range) | wall time to ours (range) "
        "| CPU ms a step, all (range) | CPU time to ours (range) "
        "| peak GiB of a process (without a model) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, timings in rounds.items():
        cpu, wall = columns(timings)
        rates = [images / ms * 1e3 for ms in wall]
        ratios = ["1", "1"]
        if timings is not ours:
            ratios = [to_ours(theirs, own) for theirs, own in zip((cpu, wall), columns(ours))]
        cells = [name, spread(wall), spread(rates), ratios[1], spread(cpu), ratios[0],
                 peak(timings)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def columns(timings: list[Timing]) -> tuple[list[float], list[float]]:
    """Returns CPU and wall times, one a round."""
    return [timing.cpu_ms for timing in timings], [timing.wall_ms for timing in timings]


def to_ours(theirs: list[float], ours: list[float]) -> str:
    """Returns the ratio of the medians with the range of the ratios within a round."""
    ratios = [peer / own for peer, own in zip(theirs, ours)]
    return with_range(statistics.median(theirs) / statistics.median(ours), ratios, digits=3)


def peak(timings: list[Timing]) -> str:
    """Returns the most memory of any round, and what there was of it before the model."""
    return (f"{max(timing.peak_gib for timing in timings):.2f} "
            f"({max(timing.start_gib for timing in timings):.2f})")


def cost_of_sums(rounds: Rounds) -> str:
    """Says what the exact sum costs over the float sum: median and quartiles of the ratios within
    a round, of CPU and wall time."""
    exact, fast = (columns(rounds[f"lacuna, {word}"]) for word in ("exact", "fast"))
    out = []
    for what, ours, theirs in zip(("CPU", "wall"), exact, fast):
        ratios = [100 * (one / other - 1) for one, other in zip(ours, theirs)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        out.append(f"exact over fast, {what} time: {middle:+.1f} % (quartiles {low:+.1f} and "
                   f"{high:+.1f}, {len(ratios)} rounds)")
    return "\n".join(out)


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


def run_one(contestant: Contestant) -> list[dict[str, Any]]:
    """Runs a contestant once, all its processes at the same time; returns a line of each."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        children: list[subprocess.Popen[str]] = []
        try:
            for rank in range(contestant.world):
                command = [*contestant.command]
                if contestant.world > 1:
                    command += ["--world", str(contestant.world), "--rank", str(rank),
                                contestant.meet, f"{folder}/meet"]
                env = {**os.environ, **contestant.env}
                children.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE,
                                                 text=True))
            return outputs(contestant, children)
        finally:
            for child in children:
                child.kill()
                child.wait()
                if child.stdout:
                    child.stdout.close()


def outputs(contestant: Contestant, children: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Waits for the processes of one run; returns the last line of each."""
    deadline = time.monotonic() + RUN_SECONDS_MAX
    lines: list[dict[str, Any]] = []
    for child in children:
        text, _ = child.communicate(timeout=max(deadline - time.monotonic(), 0))
        if child.returncode != 0:
            raise Unfit(f"{contestant.name} failed with exit code {child.returncode}")
        lines.append(json.loads(text.strip().splitlines()[-1]))
    return lines


def timing_of(lines: list[dict[str, Any]]) -> Timing:
    """Returns the timing of one run: CPU time of all processes, wall time of the slowest."""
    return Timing(sum(line["cpu_ms"]["median"] for line in lines),
                  max(line["step_ms"]["median"] for line in lines),
                  max(line["peak_gib"] for line in lines),
                  max(line.get("start_gib", 0.0) for line in lines))


def compare(contestants: list[Contestant], n_rounds: int) -> tuple[Rounds, list[dict[str, Any]]]:
    """Runs everybody once a round, in an order that turns round every time.

    Returns the timings and every line that was printed.
    """
    rounds: Rounds = {contestant.name: [] for contestant in contestants}
    records: list[dict[str, Any]] = []
    for idx in range(n_rounds):
        # Whoever runs second finds a warmer machine; turning the order shares that out.
        for contestant in contestants[:: -1 if idx % 2 else 1]:
            lines = run_one(contestant)
            timing = timing_of(lines)
            rounds[contestant.name].append(timing)
            load = os.getloadavg()[0]
            records += [{"round": idx, "contestant": contestant.name, "load": load, **line}
                        for line in lines]
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
                        help="add a row: PyTorch held to the instructions ours is held to")
    parser.add_argument("--compile", action="store_true",
                        help="add rows: PyTorch with torch.compile (needs a C++ compiler)")
    parser.add_argument("--ddp", action="store_true",
                        help=f"add a table: {WORLD} processes, ours and PyTorch's over gloo")
    parser.add_argument("--same-malloc", action="store_true",
                        help="add rows: PyTorch with the settings of the allocator that ours has")
    parser.add_argument("--sums", type=int, metavar="ROUNDS", default=0,
                        help="compare the exact with the float sum only, in so many rounds")
    parser.add_argument("--no-build", action="store_true", help="time the step_bench that is there")
    parser.add_argument("--out", type=pathlib.Path, help="write every figure to this JSON file")
    args = parser.parse_args()
    if min(args.batch, args.steps, args.rounds) < 1 or args.warmup < 0:
        parser.error("--batch, --steps and --rounds must be positive, --warmup not negative")
    return args


def contestants_of(args: argparse.Namespace, ours: tuple[str, ...],
                   peer: tuple[str, ...]) -> tuple[list[Contestant], list[Contestant]]:
    """Returns who runs alone, and who runs in several processes."""
    alone = [Contestant("lacuna", ours, ONE_THREAD), Contestant("PyTorch", peer, ONE_THREAD)]
    together = [
        *(Contestant(f"lacuna, {word}", (*ours, "--reduce", word), ONE_THREAD, WORLD,
                     "--rendezvous") for word in SUMS),
        Contestant("PyTorch, DDP over gloo", peer, ONE_THREAD | LOOPBACK, WORLD, "--store"),
    ]
    if args.compile:
        compiled = (*peer, "--compile")
        alone.append(Contestant("PyTorch, compiled", compiled, ONE_THREAD))
        together.append(Contestant("PyTorch, DDP over gloo, compiled", compiled,
                                   ONE_THREAD | LOOPBACK, WORLD, "--store"))
    if args.avx2:
        alone.append(Contestant("PyTorch, AVX2", peer, ONE_THREAD | AVX2))
    if args.same_malloc:
        alone.append(Contestant("PyTorch, memory kept", peer, ONE_THREAD | MALLOC))
        together.append(Contestant("PyTorch, DDP over gloo, memory kept", peer,
                                   ONE_THREAD | LOOPBACK | MALLOC, WORLD, "--store"))
    return alone, together if args.ddp or args.sums else []


def main() -> int:
    args = parse()
    try:
        python = "" if args.sums else find_python(args.python)
        if not args.no_build:
            build()
        ours = target_dir() / "release" / "examples" / "step_bench"
        if not ours.is_file():
            raise Unfit(f"no `{ours}`: leave out --no-build")
        flags = [(f"--{name}", str(getattr(args, name)))
                 for name in ("model", "batch", "steps", "warmup")]
        sizes = tuple(word for flag in flags for word in flag)
        peer = (python, str(HERE / "pytorch_step.py"), *sizes)
        alone, together = contestants_of(args, (str(ours), *sizes), peer)
        if args.sums:
            chosen = [one for one in together if one.name in ("lacuna, exact", "lacuna, fast")]
            print(cost_of_sums(compare(chosen, args.sums)[0]))
            return 0
        rounds, records = compare(alone, args.rounds)
        rounds_together, more = compare(together, args.rounds)
    except (Unfit, subprocess.TimeoutExpired) as reason:
        say(PROGRAM, str(reason))
        return EXIT_UNFIT
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs"
    about = f"f32, {args.rounds} rounds of {args.steps} steps; {machine}"
    print(f"Preset `{args.model}`, batch {args.batch}, one thread, {about}.\n")
    print(table(rounds))
    if together:
        print(f"\nPreset `{args.model}`, {WORLD} processes of one thread, batch {args.batch} each, "
              f"{about}.\n")
        print(table_together(rounds_together, WORLD * args.batch))
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        record = {"machine": machine, "settings": settings, "runs": records + more}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
