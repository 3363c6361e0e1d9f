#!/usr/bin/env python3
"""The demo: pack real images, pre-train with two workers, kill one on the way, look at the result.

Standard library only. Run by `make demo`; takes about three minutes on two cores after the build.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-out"
BIN = ROOT / "target" / "release"
STEPS = int(os.environ.get("LACUNA_DEMO_STEPS", "0"))

SPEC = """\
schema = 1
name = "demo"
base = "preset:demo"

[data]
shards = "data"

[elastic]
workers = "1:2"

[checkpoint]
to = "runs"
every = ["200step"]

[track]
every = "10step"
"""


def say(text=""):
    print(text, flush=True)


def run(*args, **kwargs):
    """Runs a command of ours and stops the demo where it fails."""
    words = [str(arg) for arg in args]
    say("$ " + " ".join(os.path.relpath(w) if w.startswith(str(ROOT)) else w for w in words))
    return subprocess.run(words, check=True, **kwargs)


def pack_images():
    """Packs Fashion-MNIST, the user's images, or generated ones; returns what they are called."""
    found = subprocess.run(
        [sys.executable, ROOT / "scripts" / "data.py"], stdout=subprocess.PIPE, text=True
    )
    data = OUT / "data"
    if found.returncode == 0:
        folder = found.stdout.strip().splitlines()[-1]
        run(BIN / "lacuna", "data", "pack", folder, data)
        return "your images" if os.environ.get("DATA_DIR") else "Fashion-MNIST"
    if os.environ.get("DATA_DIR"):
        sys.exit(found.returncode)
    say("No images could be fetched: this demo runs on generated ones.")
    run(BIN / "lacuna", "data", "synthetic", data, "--n", "20000", "--size", "28x28",
        "--channels", "1", "--seed", "1")
    return "generated images"


def trainer_pids(worker):
    """Finds the processes that train as `worker` under this demo's agent."""
    own = str(BIN.resolve()).encode()
    pids = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            args = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainer" in args and worker.encode() in args and args[0].startswith(own):
            pids.append(int(entry.name))
    return pids


def train(spec):
    """Trains, kills a worker after a third of the steps; returns figures by step and the end."""
    command = [BIN / "lacuna", "train", spec, "--progress", "json"]
    if STEPS:
        command += ["--set", f'train.duration="{STEPS}step"']
    say("$ lacuna train demo-out/demo.toml")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    figures, victim, total, last_said, end = {}, None, None, 0.0, ""
    told = []
    for line in process.stdout:
        try:
            update = json.loads(line)
        except ValueError:
            end = line.strip()
            continue
        if "total_steps" in update:
            total = update["total_steps"]
        elif "event" in update:
            told.append(update)
            say(("! " if update["warning"] else "  ") + update["text"])
        elif "loss" in update:
            figures[update["step"]] = update
            if time.monotonic() - last_said > 5:
                last_said = time.monotonic()
                say(f"  step {update['step']:>5}/{total}  loss {update['loss']:.4f}"
                    f"  {update['images_per_second']:,.0f} img/s")
            if victim is None and total and update["step"] >= total // 3:
                victim = "local:cpu1"
                pids = trainer_pids(victim)
                if len(pids) != 1:
                    process.terminate()
                    sys.exit(f"expected one process of {victim}, found {pids}")
                say(f"$ kill -9 {pids[0]}        # worker {victim}, in the middle of a step")
                os.kill(pids[0], signal.SIGKILL)
    code = process.wait()
    if code != 0:
        say(end)
        sys.exit(code)
    # What the summary says must have happened.
    lost = [e for e in told if e["event"] == "lost" and victim and victim in e["text"]]
    healed = [e for e in told if victim and f"{victim} healed from" in e["text"]]
    if not lost or not healed:
        sys.exit(f"the run did not lose {victim} and take it back: {[e['text'] for e in told]}")
    if max(figures) != total:
        sys.exit(f"the last step reported is {max(figures)} of {total}")
    return figures, victim, end


def curve(figures, lines):
    """Draws the loss over steps, with the baselines as dashes."""
    width, height = 64, 12
    steps = sorted(figures)
    losses = [figures[s]["loss"] for s in steps]
    columns = []
    for x in range(width):
        start, end = x * len(losses) // width, (x + 1) * len(losses) // width
        part = losses[start:max(end, start + 1)]
        columns.append(sum(part) / len(part))
    top, bottom = max(max(columns[1:]), *lines.values()), min(columns)
    top = min(top, max(lines.values()) * 1.6)
    row = lambda y: min(height - 1, max(0, round((top - y) / (top - bottom) * (height - 1))))
    grid = [[" "] * width for _ in range(height)]
    for level in lines.values():
        grid[row(level)] = ["-"] * width
    for x, y in enumerate(columns):
        grid[row(y)][x] = "*"
    for i, cells in enumerate(grid):
        level = top - (top - bottom) * i / (height - 1)
        names = [name for name, value in lines.items() if row(value) == i]
        say(f"  {level:6.3f} |{''.join(cells)} {' = '.join(names)}")
    say(f"         +{'-' * width}\n          step {steps[0]} to {steps[-1]}")


def main():
    if not (BIN / "lacuna").exists() or not (BIN / "lacuna-worker").exists():
        sys.exit("build first: make build")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    images = pack_images()
    spec = OUT / "demo.toml"
    spec.write_text(SPEC)
    stats = run(BIN / "lacuna", "data", "stats", OUT / "data", "--patch-size", "4", "-o", "json",
                stdout=subprocess.PIPE, text=True)
    baselines = json.loads(stats.stdout)["baselines"]
    zero, mean = baselines["zero"], baselines["mean_patch"]
    say(f"  what a model that learned nothing would lose: predicting zero {zero:.4f}, "
        f"predicting the mean patch {mean:.4f}")
    say()
    started = time.monotonic()
    figures, victim, end = train(spec)
    took = time.monotonic() - started
    say()
    curve(figures, {"predict zero": zero, "predict the mean patch": mean})
    tail = [figures[s]["loss"] for s in sorted(figures)[-10:]]
    loss = sum(tail) / len(tail)
    say()
    picture = OUT / "reconstruction.png"
    run(BIN / "lacuna-worker", "reconstruct", OUT / "runs" / "demo", "--out", picture,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"})
    run(BIN / "lacuna", "ckpt", "ls", OUT / "runs" / "demo")
    run(BIN / "lacuna", "ckpt", "export", OUT / "runs" / "demo", "--layout", "timm",
        "--to", OUT / "export-timm")
    say()
    say(f"What happened: two workers pre-trained a masked autoencoder on {images}, {took:.0f} s.")
    say(f"  {victim} was killed with SIGKILL on the way; the other went on from its own memory,")
    say("  a new process joined and was healed by it; no sample was lost or counted twice.")
    say(f"  final loss {loss:.4f}; predicting zero gives {zero:.4f}, the mean patch {mean:.4f}")
    say(f"  {end}")
    if loss >= min(zero, mean):
        sys.exit("the loss did not fall below the baselines")
    say("What to try next:")
    say(f"  look at {picture.relative_to(ROOT)}:")
    say("    original | masked | reconstruction | reconstruction by random weights")
    say("  run the same spec with one worker, undisturbed: the state digest is the same:")
    say("    target/release/lacuna train demo-out/demo.toml --set name=alone --workers 1"
        + (f" --set 'train.duration=\"{STEPS}step\"'" if STEPS else ""))
    say("  your own images: DATA_DIR=/path/to/images make demo")


if __name__ == "__main__":
    main()
