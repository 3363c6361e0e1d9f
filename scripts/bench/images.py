#!/usr/bin/env python3
"""Compares loading of JPEG images with the usual loaders of Python on this machine.

    python3 scripts/bench/images.py --python v/bin/python [--rounds 5] [--out data.json]

Beside the file of `--out` a plot is written, data.svg.
The Python needs Pillow; OpenCV, torchvision, webdataset and mosaicml-streaming are measured where
it has them, and named where not. All take turns, round by round. `images/s of CPU time` is one
core's work; `images/s, two workers` is by wall time, with as many processes or threads that decode.
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
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402

SETS = {"a": "39 KB, quality 90, 4:2:0", "c": "107 KB, quality 97, 4:4:4"}
PEERS = {"pillow": "PIL", "opencv": "cv2", "torchvision": "torchvision",
         "webdataset": "webdataset", "streaming": "streaming"}
OURS = {"part": "ours, bit-exact", "whole": "ours, whole image first",
        "planes": "ours, from planes"}
SECONDS_MAX = 600

Results = dict[str, list[float]]


def run(command: list[str]) -> str:
    """Runs a program of the comparison and returns what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, env=env,
                          check=False)
    if done.returncode != 0:
        raise Unfit(f"`{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def measured(command: list[str]) -> dict[str, float]:
    """Runs a program and reads the line of JSON it ends with."""
    return json.loads(run(command).strip().splitlines()[-1])


def installed(python: str) -> list[str]:
    """Lists the peers that a Python has."""
    found = []
    for peer, module in PEERS.items():
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"
        if subprocess.run([python, "-c", code], check=False).returncode == 0:
            found.append(peer)
        else:
            say("bench-data", f"{peer}: skipped, {python} has no module `{module}`")
    if "pillow" not in found:
        raise Unfit(f"{python} has no Pillow: python3 -m venv v && v/bin/pip install pillow numpy "
                    "opencv-python-headless webdataset mosaicml-streaming; then "
                    '--python v/bin/python')
    return found


def build() -> tuple[pathlib.Path, pathlib.Path]:
    """Builds our programs; returns the folders of binaries and of examples."""
    features = ["--features", "lacuna-cli/turbo"]
    command = ["cargo", "build", "--release", "--package", "lacuna-cli", "--package", "lacuna-data",
               "--package", "lacuna-pixels", "--bins", "--examples", *features]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise Unfit("the programs cannot be built (`make setup` fetches what libjpeg-turbo needs)")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target") / "release"
    return target, target / "examples"


def add(results: Results, name: str, value: float) -> None:
    """Keeps one measurement."""
    results.setdefault(name, []).append(value)


def one_core(folder: pathlib.Path, args: argparse.Namespace, peers: list[str],
             examples: pathlib.Path) -> Results:
    """Measures images per second of CPU time."""
    results: Results = {}
    for _ in range(args.rounds):
        for what, name in OURS.items():
            command = [str(examples / "decode_bench"), str(folder), "--what", what, "--rounds", "3"]
            add(results, name, measured(command)["images_per_s"])
        for peer in peers:
            if peer in ("webdataset", "streaming"):
                continue  # They decode with Pillow here; what they add shows with workers.
            command = [args.python, str(HERE / "image_peers.py"), str(folder), "--what", peer,
                       "--seconds", str(args.seconds)]
            add(results, peer, measured(command)["per_cpu_s"])
    return results


def two_workers(folder: pathlib.Path, packed: pathlib.Path, args: argparse.Namespace,
                peers: list[str], examples: pathlib.Path) -> tuple[Results, Results]:
    """Measures whole loaders with two workers by wall time; and the loader against bare loops."""
    results: Results = {}
    overhead: Results = {}
    loader = [str(examples / "loader_bench"), str(packed), "--threads", "2", "--rounds", "4",
              "--seconds", "1.5"]
    planes = folder.parent / f"{folder.name}-planes"
    for _ in range(args.rounds):
        ways = [("ours, bit-exact", []), ("ours, from planes", ["--planes", str(planes)])]
        for name, more in ways:
            got = measured(loader + more)
            add(results, name, got["stream_per_s"])
            overhead.setdefault(name, []).extend(got["overheads"])
        for peer in peers:
            command = [args.python, str(HERE / "image_peers.py"), str(folder), "--what", peer,
                       "--workers", "2", "--seconds", str(args.seconds)]
            add(results, peer, measured(command)["images_per_s"])
    return results, overhead


def table(results: Results, unit: str) -> str:
    """Returns a Markdown table: median and range, and the ratio to Pillow in the same rounds."""
    lines = [f"| | {unit} (range) | to Pillow (range) |", "|---|---:|---:|"]
    base = results["pillow"]
    for name, values in results.items():
        ratios = [value / own for value, own in zip(values, base)]
        middle = statistics.median(values) / statistics.median(base)
        lines.append(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f}–"
                     f"{max(values):.0f}) | {middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |")
    return "\n".join(lines)


def plot(everything: dict[str, dict[str, Results]]) -> str:
    """Draws bars: medians of images per second of CPU time, with their ranges, set by set."""
    rows = [(f"{name}, set {which}" if name != "" else "", values)
            for which, results in everything.items()
            for name, values in [*results["cpu"].items(), ("", [])]]
    most = max(max(values) for _, values in rows if values)
    left, width, step = 210, 480, 22
    at = lambda value: left + width * value / most  # noqa: E731
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" '
             f'height="{step * len(rows) + 30}" font-family="sans-serif" font-size="12">',
             '<rect width="100%" height="100%" fill="white"/>',
             '<text x="8" y="16">images a second of one core; line: range over rounds</text>']
    for i, (label, values) in enumerate(rows):
        if not values:
            continue
        y, middle = 30 + step * i, statistics.median(values)
        colour = "#2b6cb0" if label.startswith("ours") else "#a0aec0"
        lines += [f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{label}</text>',
                  f'<rect x="{left}" y="{y}" width="{at(middle) - left:.1f}" height="15" '
                  f'fill="{colour}"/>',
                  f'<path d="M{at(min(values)):.1f} {y + 7.5}H{at(max(values)):.1f}" '
                  'stroke="black"/>',
                  f'<text x="{at(max(values)) + 5:.1f}" y="{y + 12}">{middle:.0f}</text>']
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="Compares loading of JPEG images.")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    try:
        peers = installed(args.python)
        binaries, examples = build()
        work = binaries.parent / "bench-data"
        run([args.python, str(HERE / "photos.py"), str(work)])
        everything = {}
        for name, about in SETS.items():
            folder, packed = work / name, work / f"{name}-packed"
            run([str(binaries / "lacuna"), "data", "pack", str(folder), str(packed)])
            cpu = one_core(folder, args, peers, examples)
            wall, overhead = two_workers(folder, packed, args, peers, examples)
            print(f"\n## Set {name}: {about}\n\n{table(cpu, 'images/s of CPU time')}\n")
            print(f"{table(wall, 'images/s, two workers')}\n")
            for path, values in overhead.items():
                low, middle, high = (100 * f(values) for f in (min, statistics.median, max))
                print(f"The loader over bare loops, {path}: {middle:.1f} % more CPU time an image "
                      f"({low:.1f} to {high:.1f}).")
            everything[name] = {"cpu": cpu, "two_workers": wall, "overhead": overhead}
        if args.out:
            args.out.write_text(json.dumps(everything, indent=1) + "\n")
            args.out.with_suffix(".svg").write_text(plot(everything))
    except Unfit as error:
        say("bench-data", str(error))
        return EXIT_UNFIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
