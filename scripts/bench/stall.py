#!/usr/bin/env python3
"""Measures what saving costs a run: the stall of a snapshot, steps meanwhile, and memory.

Two runs on one worker, whose maths use one core so that the other is there to write, as one is
beside an accelerator. The first saves every few steps: times of steps, with the copy and while a
part is written, are compared with those of steps in between. The second is small and saves 200
times: the worker's memory after the tenth and after the last save.

    python3 scripts/bench/stall.py --preset small --steps 120 --out stall.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402  (the folder above is put on the path first)

ROOT = HERE.parent.parent
BIN = ROOT / "target" / "release"
PROGRAM = "bench-stall"
# `state copied for a checkpoint … step=20 … stall=12.3ms`, without the colours of a terminal.
COPIED = re.compile(r"state copied for a checkpoint.*?step=(\d+).*?stall=([\d.]+)(µs|ms|s)")
UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}


class Run:
    """A run of `lacuna train`, watched until its end."""

    def __init__(self) -> None:
        self.step_seconds: dict[int, float] = {}
        self.step_at: dict[int, float] = {}
        self.saved_at: dict[int, float] = {}
        self.stalls: dict[int, float] = {}
        self.rss: list[int] = []


def worker_of(parent: int) -> int | None:
    """Finds the trainer among the descendants of a process."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    todo = [parent]
    while todo:
        pid = todo.pop()
        if " trainer " in names.get(pid, ""):
            return pid
        todo += children.get(pid, [])
    return None


def rss_of(pid: int) -> int:
    """Returns the resident bytes of a process without those of mapped files."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def watch(folder: pathlib.Path, settings: dict[str, Any], batch: int) -> Run:
    """Trains with these settings."""
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "run.toml").write_text(keys)
    env = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1",
                        "LACUNA_WORKER": str(BIN / "lacuna-worker")}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([BIN / "lacuna", "train", "run.toml", "--workers", "1", "-v",
                                    "--progress", "json"], cwd=folder, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=log)
        run, pid = Run(), None
        for line in process.stdout:
            if not line.startswith("{"):
                log.write(line)
                continue
            update = json.loads(line)
            if "grad_norm" in update:
                step = update["step"]
                run.step_seconds[step] = batch / update["images_per_second"]
                run.step_at[step] = time.monotonic()
            elif update.get("event") == "saved":
                step = int(re.search(r"step (\d+)", update["text"])[1])
                run.saved_at[step] = time.monotonic()
                pid = pid or worker_of(process.pid)
                if pid:
                    run.rss.append(rss_of(pid))
        if process.wait(timeout=60) != 0:
            raise Unfit(f"the run ended with {process.returncode}:\n"
                        + "".join((folder / "log").read_text().splitlines(True)[-20:]))
    logs = [folder / "log", *folder.rglob("*.log")]
    for text in (path.read_text(errors="replace") for path in logs):
        for step, number, unit in COPIED.findall(re.sub(r"\x1b\[[0-9;]*m", "", text)):
            run.stalls[int(step)] = float(number) * UNITS[unit]
    return run


def quantile(values: list[float], share: float) -> float:
    """Returns the value below which `share` of the others lie."""
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


def spec(folder: pathlib.Path, preset: str, n_steps: int, every: int, batch: int,
         size: str) -> dict[str, Any]:
    """Makes data, and the settings of a run over it."""
    command = [BIN / "lacuna", "data", "synthetic", folder / "data", "--n", "512", "--size", size,
               "--channels", "3"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {
        "schema": 1, "name": "stall", "base": f"preset:{preset}", "data.shards": "data",
        "data.mean": [0.5, 0.5, 0.5], "data.std": [0.25, 0.25, 0.25], "data.threads": 1,
        "train.duration": f"{n_steps}step", "train.batch": batch, "train.slot_batch": batch // 2,
        "train.digest_every": 1_000_000, "optim.warmup": "1step", "elastic.workers": "1:1",
        "checkpoint.to": "ckpt", "checkpoint.every": [f"{every}step"], "track.every": "1step",
    }


def steps(args: argparse.Namespace, base: pathlib.Path) -> dict[str, Any]:
    """Compares steps while a part is written with others."""
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = pathlib.Path(name)
        settings = spec(folder, args.preset, args.steps, args.every, args.batch, "224x224")
        run = watch(folder, settings, args.batch)
        parts = list(folder.rglob("part-*.safetensors"))
        n_bytes = parts[0].stat().st_size if parts else 0
    copying = set(run.stalls)
    # A step is beside a part if it ended after the copy and began before the commit.
    beside = {step for copied, end in run.saved_at.items() for step, at in run.step_at.items()
              if step > copied and at - run.step_seconds[step] < end}
    warm = [step for step in run.step_seconds if step > 5]
    quiet = [run.step_seconds[s] for s in warm if s not in copying | beside]
    busy = [run.step_seconds[s] for s in warm if s in beside - copying]
    if not quiet or not busy or not run.stalls:
        raise Unfit(f"{len(quiet)} quiet steps, {len(busy)} beside writing, {len(run.stalls)} "
                    "copies: take more steps or save less often")
    # The first copy finds no memory to use again.
    first, later = run.stalls[min(run.stalls)], [run.stalls[s] for s in sorted(run.stalls)[1:]]
    return {
        "preset": args.preset, "bytes": n_bytes, "saves": len(run.saved_at),
        "stall_first_s": first, "stall_median_s": statistics.median(later or [first]),
        "stall_max_s": max(later or [first]),
        "write_median_s": statistics.median(
            end - run.step_at[step] for step, end in run.saved_at.items() if step in run.step_at),
        "quiet_steps": len(quiet), "busy_steps": len(busy),
        "quiet_p50_s": quantile(quiet, 0.5), "quiet_p99_s": quantile(quiet, 0.99),
        "busy_p50_s": quantile(busy, 0.5), "busy_p99_s": quantile(busy, 0.99),
    }


def memory(args: argparse.Namespace, base: pathlib.Path) -> dict[str, Any]:
    """Watches the worker's memory over many saves."""
    with tempfile.TemporaryDirectory(dir=base) as name:
        folder = pathlib.Path(name)
        settings = spec(folder, "micro", 3 * args.saves, 3, 8, "32x32")
        settings |= {"checkpoint.keep.last": 2, "checkpoint.when_busy": "wait"}
        run = watch(folder, settings, 8)
    if len(run.rss) < 20:
        raise Unfit(f"only {len(run.rss)} saves were seen")
    early = statistics.median(run.rss[10:20])
    late = statistics.median(run.rss[-10:])
    return {"saves": len(run.rss), "rss_early": early, "rss_late": late,
            "rss_max": max(run.rss), "drift": late / early - 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--dir", type=pathlib.Path, help="a folder on the disk that is measured")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the numbers, JSON")
    args = parser.parse_args()
    base = args.dir or ROOT / "target"
    try:
        for name in ("lacuna", "lacuna-worker"):
            if not (BIN / name).exists():
                raise Unfit(f"`{BIN / name}` is not there (make build)")
        found = {"steps": steps(args, base), "memory": memory(args, base)}
        print(json.dumps(found, indent=1))
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    except Unfit as error:
        say(PROGRAM, str(error))
        return EXIT_UNFIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
