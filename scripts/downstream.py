#!/usr/bin/env python3
"""Shows whether pre-training helps: k-NN, linear probe and fine-tuning on Fashion-MNIST with few
labels, for raw pixels, an encoder of random weights and one that was pre-trained.

    python3 scripts/downstream.py [--full] [--seeds N] [--fractions 0.01,0.1,1.0] [--steps N]

Every training is a run of `lacuna train` under --work, and every result a file there: what is done
is not done again, so an interrupted call goes on where it was, and one with more seeds adds them. A
folder holds results of one recipe (steps, passes, rates): another recipe needs another folder.
The quick default (one seed, 1 % and 10 % of the labels, 4,000 steps, fewer passes over the labels)
is made for half an hour on two cores; `--full` (three seeds, all labels too, 8,000 steps) takes
some five hours there. Programs are taken from LACUNA_BIN (default: target/release).
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from common import EXIT_UNFIT, Unfit, say  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / os.environ.get("LACUNA_BIN", "target/release")
PROGRAM = "downstream"
# Training runs two workers of one thread; what one process computes takes all processors.
THREADS = os.cpu_count() or 1
FEATURES = ("raw pixels", "random", "pre-trained")
# Fashion-MNIST's images to train on.
IMAGES = 60_000
# Passes over the labelled images: fewer labels need more of them.
EPOCHS = {"linear": {0.01: 40, 0.1: 10, 1.0: 2}, "finetune": {0.01: 40, 0.1: 5, 1.0: 1}}
QUICK_EPOCHS = {"linear": {0.01: 40, 0.1: 5, 1.0: 1}, "finetune": {0.01: 30, 0.1: 3, 1.0: 1}}
# What is done where nothing is asked for, and what `--full` stands for.
QUICK = {"seeds": 1, "fractions": [0.01, 0.1], "steps": 4000}
FULL = {"seeds": 3, "fractions": [0.01, 0.1, 1.0], "steps": 8000}


@dataclasses.dataclass(frozen=True)
class Case:
    """One number of the table."""

    protocol: str
    features: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Names its run and its file."""
        features = self.features.replace(" ", "-")
        return f"{self.protocol}-{features}-{self.fraction:g}-{self.seed}"


class Bench:
    """A folder of data, runs and results."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.work = pathlib.Path(args.work).resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.env = dict(os.environ, OMP_NUM_THREADS="1", RUST_LOG="warn")
        self.pretrained: set[int] = set()
        self.known = known(args.known, self.recipe()) if args.known else {}

    def keep(self, name: str, found: dict) -> None:
        """Writes a small file that is there whole or not at all."""
        path = self.work / name
        path.with_suffix(".part").write_text(json.dumps(found, indent=1))
        path.with_suffix(".part").rename(path)

    def recipe(self) -> dict:
        """Returns what all results of a folder have in common: steps, and specs by their names."""
        cases = [Case(protocol, features, fraction, 0)
                 for protocol in ("linear", "finetune") for features in FEATURES
                 for fraction in self.args.epochs[protocol]
                 if (protocol, features) != ("finetune", "raw pixels")]
        specs = {case.name: self.spec(case, round(IMAGES * case.fraction)) for case in cases}
        return {"steps": self.args.steps, "specs": specs}

    def is_one_recipe(self) -> None:
        """Refuses a folder whose results come of another recipe."""
        recipe = self.recipe()
        path = self.work / "recipe.json"
        if path.exists() and json.loads(path.read_text()) != recipe:
            raise Unfit(f"{self.work} has results of another recipe ({path.name} there): "
                        "give another folder (--work)")
        self.keep(path.name, recipe)

    def run(self, *words, threads: int = 1) -> str:
        """Runs a command and returns what it wrote."""
        words = [str(word) for word in words]
        env = dict(self.env, OMP_NUM_THREADS=str(threads))
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False,
                              env=env, cwd=self.work)
        if done.returncode != 0:
            raise Unfit(f"`{' '.join(words)}` ended with {done.returncode}")
        return done.stdout

    def data(self) -> None:
        """Packs Fashion-MNIST, and parts of it by label."""
        if not (self.work / "test" / "pack.json").exists():
            folder = self.run(sys.executable, ROOT / "scripts" / "data.py").strip().splitlines()[-1]
            for split in ("train", "test"):
                self.run(BIN / "lacuna", "data", "pack", folder, split, "--split", split)
        for fraction in self.args.fractions:
            for seed in range(self.args.seeds):
                self.run(BIN / "lacuna", "data", "subset", "train", self.part(fraction, seed),
                         "--label-fraction", fraction, "--seed", seed)

    def part(self, fraction: float, seed: int) -> str:
        """Names the folder of a labelled part."""
        return f"part-{fraction:g}-{seed}"

    def samples(self, fraction: float, seed: int) -> int:
        """Counts a part's images."""
        text = self.run(BIN / "lacuna", "data", "stats", self.part(fraction, seed), "-o", "json")
        return int(json.loads(text)["n_samples"])

    def train(self, name: str, spec: str) -> None:
        """Trains a run to its end, or goes on with it."""
        path = self.work / f"{name}.toml"
        path.write_text(spec)
        began = time.monotonic()
        self.run(BIN / "lacuna", "train", path.name, "--progress", "off")
        say(PROGRAM, f"{name}: {time.monotonic() - began:.0f} s")

    def pretrain(self, seed: int) -> str:
        """Pre-trains an encoder without labels where that is not done; returns its run's folder."""
        name = f"mae-{seed}"
        if seed in self.pretrained:
            return f"runs/{name}"
        self.pretrained.add(seed)
        self.train(name, f"""schema = 1
name = "{name}"
base = "preset:demo"
data.shards = "train"
train.duration = "{self.args.steps}step"
train.seed = {seed}
elastic.workers = "1:2"
checkpoint = {{ to = "runs", every = ["1000step"] }}
""")
        return f"runs/{name}"

    def knn(self, case: Case) -> None:
        """Judges all three kinds of features by their neighbours in one pass."""
        report = self.work / f"{case.name}.part.json"
        self.run(BIN / "lacuna-worker", "eval", "knn", self.pretrain(case.seed),
                 "--train", self.part(case.fraction, case.seed), "--val", "test",
                 "--seed", case.seed, "--k", "10", "--out", report, threads=THREADS)
        found = json.loads(report.read_text())["rows"]
        rows = {row["features"]: row["results"][0] for row in found}
        report.unlink()
        names = {"raw pixels": "raw pixels", "random encoder": "random", "encoder": "pre-trained"}
        for row, features in names.items():
            one = dataclasses.replace(case, features=features)
            self.keep(f"{one.name}.json", {"top1": rows[row]["top1"]})

    def spec(self, case: Case, n: int) -> str:
        """Writes the spec of a probe or of fine-tuning on `n` labelled images."""
        epochs = self.args.epochs[case.protocol][case.fraction]
        batch = 64 if n >= 64 * 4 else 32
        per_epoch = n // batch
        # One or two epochs, and not more than a fifth of a short run.
        warmup = min((1 if case.protocol == "linear" else 2) * per_epoch, epochs * per_epoch // 5)
        encoder = f'encoder = "runs/mae-{case.seed}"\n' if case.features == "pre-trained" else ""
        # What a layer knows already it shall keep; one of random weights knows nothing.
        decay = 0.75 if case.features == "pre-trained" else 1.0
        pool = 'pool = "pixels"\n' if case.features == "raw pixels" else ""
        # What is fixed cannot learn what crops of an image have in common: a line sees images as
        # they are judged.
        still = "crop_scale = [1.0, 1.0], crop_ratio = [1.0, 1.0], flip = 0.0"
        view = still if case.protocol == "linear" else "crop_scale = [0.7, 1.0]"
        if case.protocol == "linear":
            task = f'kind = "linear"\noptimizer = "sgd"\n{pool}'
            optim = 'base_lr = 0.1\nweight_decay = 0.0'
        else:
            task = (f'kind = "finetune"\nlayer_decay = {decay}\nmixup = 0.0\ncutmix = 0.0\n'
                    'random_erasing = 0.0\nrand_augment = 0.0\n')
            optim = 'base_lr = 2e-3\nbetas = [0.9, 0.999]\ndecay_tokens = false'
        return f"""schema = 1
name = "{case.name}"
base = "preset:demo"
data = {{ shards = "{self.part(case.fraction, case.seed)}", {view} }}
checkpoint = {{ to = "runs", every = ["{max(epochs // 2, 1)}ep"] }}
elastic.workers = "1:2"
[train]
duration = "{epochs}ep"
batch = {batch}
slot_batch = {batch // 2}
seed = {case.seed}
[optim]
{optim}
warmup = "{warmup}step"
[task]
{encoder}{task}classes = 10
"""

    def learn(self, case: Case) -> None:
        """Trains a head, or everything, on a labelled part."""
        if case.features == "pre-trained":
            self.pretrain(case.seed)
        self.train(case.name, self.spec(case, self.samples(case.fraction, case.seed)))
        self.run(BIN / "lacuna-worker", "eval", "classify", f"runs/{case.name}", "--val", "test",
                 "--out", f"{case.name}.part.json", threads=THREADS)
        report = json.loads((self.work / f"{case.name}.part.json").read_text())
        self.keep(f"{case.name}.json", {"top1": report["results"][-1]["top1"]})
        (self.work / f"{case.name}.part.json").unlink()

    def top1(self, case: Case) -> float:
        """Returns a case's share of right predictions, computed where it is not there yet."""
        if case in self.known:
            return self.known[case]
        path = self.work / f"{case.name}.json"
        if not path.exists():
            if case.protocol == "knn":
                self.knn(case)
            else:
                self.learn(case)
        return float(json.loads(path.read_text())["top1"])


def known(path: str, recipe: dict) -> dict[Case, float]:
    """Reads the results of an earlier call, as it wrote them into downstream.json."""
    try:
        earlier = json.loads(pathlib.Path(path).read_text())
        rows = earlier["rows"]
        if earlier["recipe"] != recipe:
            raise Unfit(f"{path} has results of another recipe (`recipe` there)")
        return {Case(row["protocol"], row["features"], float(row["fraction"]), int(row["seed"])):
                float(row["top1"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unfit(f"{path} holds no results of this program: {error!r}") from None


def cases(args: argparse.Namespace) -> list[Case]:
    """Lists the numbers of the table."""
    return [Case(protocol, features, fraction, seed)
            for seed in range(args.seeds)
            for fraction in args.fractions
            for protocol in ("knn", "linear", "finetune")
            for features in FEATURES
            if (protocol, features) != ("finetune", "raw pixels")]


def table(args: argparse.Namespace, found: dict[Case, float]) -> str:
    """Lays the results out as Markdown: top-1 in percent, mean and deviation over seeds."""
    names = {"knn": "k-NN, k = 10", "linear": "linear probe", "finetune": "fine-tuning"}
    out = "| labels | protocol | " + " | ".join(FEATURES) + " |\n|---|---|---:|---:|---:|\n"
    for fraction in args.fractions:
        for protocol, name in names.items():
            cells = []
            for features in FEATURES:
                values = [100 * value for case, value in found.items()
                          if (case.protocol, case.features, case.fraction)
                          == (protocol, features, fraction)]
                if not values:
                    cells.append("–")
                elif len(values) == 1:
                    cells.append(f"{values[0]:.1f}")
                else:
                    cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
            out += f"| {100 * fraction:g} % | {name} | " + " | ".join(cells) + " |\n"
    return out


def whisker(x: float, top: float, values: list[float], scale: float) -> str:
    """Draws the deviation of `values` around the top of their bar, where there are several."""
    if len(values) < 2:
        return ""
    away = statistics.stdev(values) * scale
    return (f'<path d="M{x} {top - away:.1f}V{top + away:.1f}M{x - 4} {top - away:.1f}h8'
            f'M{x - 4} {top + away:.1f}h8" stroke="#24292f" fill="none"/>')


def plot(args: argparse.Namespace, found: dict[Case, float]) -> str:
    """Draws the results as bars, by protocol and share of labels."""
    colors = {"raw pixels": "#8b949e", "random": "#d29922", "pre-trained": "#1f6feb"}
    groups = [(protocol, fraction) for protocol in ("knn", "linear", "finetune")
              for fraction in args.fractions]
    width, height, left, bar = 90 * len(groups) + 60, 300, 40, 22
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 70}" '
             'font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height + 70}" fill="white"/>']
    scale = (height - 20) / 100
    for level in range(0, 101, 20):
        y = height - level * scale
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y}" y2="{y}" stroke="#d9dee3"/>'
                     f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{level}</text>')
    for at, (protocol, fraction) in enumerate(groups):
        x = left + 14 + at * 90
        for i, features in enumerate(FEATURES):
            values = [100 * value for case, value in found.items()
                      if (case.protocol, case.features, case.fraction)
                      == (protocol, features, fraction)]
            if values:
                tall, mid = statistics.mean(values) * scale, x + i * (bar + 2) + bar / 2
                parts.append(f'<rect x="{mid - bar / 2}" y="{height - tall:.1f}" width="{bar}" '
                             f'height="{tall:.1f}" fill="{colors[features]}"/>'
                             f'<text x="{mid}" y="{height - 6}" text-anchor="middle" fill="white" '
                             f'font-size="10">{statistics.mean(values):.0f}</text>')
                parts.append(whisker(mid, height - tall, values, scale))
        parts.append(f'<text x="{x + 36}" y="{height + 16}" text-anchor="middle">{protocol}</text>'
                     f'<text x="{x + 36}" y="{height + 32}" text-anchor="middle">'
                     f'{100 * fraction:g} % labels</text>')
    for i, features in enumerate(FEATURES):
        x = left + i * 130
        parts.append(f'<rect x="{x}" y="{height + 46}" width="12" height="12" '
                     f'fill="{colors[features]}"/><text x="{x + 18}" y="{height + 56}">{features}'
                     '</text>')
    return "\n".join(parts + ["</svg>"]) + "\n"


def fractions(text: str) -> list[float]:
    """Reads shares of the labels."""
    found = [float(word) for word in text.split(",")]
    if any(fraction not in EPOCHS["linear"] for fraction in found):
        raise argparse.ArgumentTypeError(f"{text}: of 0.01, 0.1 and 1.0")
    return found


def main() -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="k-NN, linear probe and fine-tuning.")
    parser.add_argument("--work", help="folder [default: downstream-out/STEPS-steps]")
    parser.add_argument("--seeds", type=int, help="how often all is done [default: 1]")
    parser.add_argument("--fractions", type=fractions, help="of the labels [default: 0.01,0.1]")
    parser.add_argument("--steps", type=int, help="of pre-training [default: 4000]")
    parser.add_argument("--known", metavar="FILE",
                        help="downstream.json of the same recipe: what it has is not done again")
    parser.add_argument("--full", action="store_true",
                        help="three seeds, all labels, 8,000 steps, more passes over the labels")
    args = parser.parse_args()
    args.epochs = EPOCHS if args.full else QUICK_EPOCHS
    for key, value in (FULL if args.full else QUICK).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    # Results of longer training are others.
    args.work = args.work or ROOT / "downstream-out" / (
        f"{'full' if args.full else 'quick'}-{args.steps}-steps")
    began = time.monotonic()
    try:
        if not (BIN / "lacuna-worker").exists():
            raise Unfit("build first: make build")
        bench = Bench(args)
        bench.is_one_recipe()
        bench.data()
        found: dict[Case, float] = {}
        for case in cases(args):
            found[case] = bench.top1(case)
            say(PROGRAM, f"{case.name}: {100 * found[case]:.1f} %")
    except Unfit as error:
        say(PROGRAM, str(error))
        return EXIT_UNFIT
    text = table(args, found)
    (bench.work / "downstream.svg").write_text(plot(args, found))
    (bench.work / "downstream.json").write_text(json.dumps(
        {"recipe": bench.recipe(),
         "rows": [{**dataclasses.asdict(case), "top1": value} for case, value in found.items()]},
        indent=1))
    print(text)
    say(PROGRAM, f"{time.monotonic() - began:.0f} s; the plot is {bench.work}/downstream.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
