#!/usr/bin/env python3
"""The demo in colour: pre-train on 1,600 textures without labels, look at what it fills in, and see
what its features know about materials.

Standard library only. Run by `make demo-color`; half an hour on two cores after the build. The
textures are those of Debian's `ufoai-textures` (336 MB, GPL and Creative Commons), which is fetched
into the cache and never becomes part of this project. Materials are told by file names. Half of
the textures with one are kept for the test, which pre-training does not see either; pictures that
differ only behind their number (wood007a, wood007b) stay on one side.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import debian  # noqa: E402  (the folder above is put on the path first)
from common import EXIT_NO_DATA, EXIT_UNFIT, cache_dir, locked, say  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-color-out"
BIN = ROOT / "target" / "release"
STEPS = int(os.environ.get("LACUNA_DEMO_STEPS", "0")) or 2000
PROGRAM = "demo-color"
PACKAGE = "ufoai-textures"
ARCHIVE = "usr/share/games/ufoai/base/0textures.pk3"
# Maps of normals, speculars and glow are no pictures.
MAPS = re.compile(r"_(nm|sm|gm)\.[a-z]+$")
# A material is the first whose word is in the file's name.
MATERIALS = {"wood": r"wood|plank", "concrete": r"concrete", "metal": r"metal|mtl|steel|tin",
             "grass": r"grass", "rock": r"rock|stone", "carpet": r"carpet|textil",
             "brick": r"brick", "tile": r"tile", "dirt": r"dirt|desert|sand|mud", "roof": r"roof"}
# One texture of so many is for the test.
TEST_EVERY = 2
# What the textures are sorted into.
PARTS = ("unlabelled", "materials-train", "materials-test")
# Each probe and fine-tuning is done with so many seeds.
SEEDS = int(os.environ.get("LACUNA_DEMO_SEEDS", "0")) or 3

SPEC = """\
schema = 1
name = "textures"
base = "preset:demo"

[model]
img_size = [64, 64]
patch_size = 8
channels = 3
# Materials differ in colour and brightness, which targets normalised by patch leave out.
norm_pix_loss = false

[data]
shards = "unlabelled"
crop_scale = [0.2, 1.0]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[train]
duration = "{steps}step"
batch = 64
slot_batch = 16

[elastic]
workers = "1:2"

[checkpoint]
to = "runs"
every = ["500step"]

[track]
every = "50step"
"""

TASK = """\
schema = 1
name = "{name}"
base = "preset:demo-{kind}"

[model]
img_size = [64, 64]
patch_size = 8
channels = 3

[data]
shards = "materials-train"
{view}
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[train]
duration = "40ep"
batch = 64
slot_batch = 32
seed = {seed}

[optim]
warmup = "2ep"

[checkpoint]
to = "runs"
every = ["40ep"]

[track]
every = "50step"

[task]
classes = {classes}
{more}
"""
# What is fixed cannot learn what crops have in common: probes see images as they are judged.
VIEWS = {"linear": "crop_scale = [1.0, 1.0]\nflip = 0.0", "finetune": "crop_scale = [0.5, 1.0]"}
# What each way of learning begins with. One rate for all layers that know nothing yet.
ENCODER = 'encoder = "runs/textures"'
WAYS = {"linear": {"pixels": 'pool = "pixels"', "random": "", "pre-trained": ENCODER},
        "finetune": {"random": "layer_decay = 1.0", "pre-trained": ENCODER}}


def run(*words, **more):
    """Runs a command of ours, and stops where it fails."""
    words = [str(word) for word in words]
    print("$ " + " ".join(word.replace(f"{ROOT}/", "") for word in words), flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    return subprocess.run(words, check=True, text=True, env=env, cwd=OUT, **more)


def material_of(name):
    """Returns the material that a file's name tells of, and what its variants have in common."""
    folder, own = name.lower().rsplit(".", 1)[0].split("-", 1)
    for material, words in MATERIALS.items():
        found = re.match(rf".*?(?:{words})\D*\d*", own)
        if found:
            return material, f"{folder}-{found.group()}"
    return None, None


def textures():
    """Returns the folder of all textures, fetched into the cache where it is not there."""
    place = cache_dir() / PACKAGE
    with locked(cache_dir() / ".textures-lock", PROGRAM):
        if place.exists():
            return place / "all" / "textures"
        with tempfile.TemporaryDirectory(prefix=".textures-", dir=cache_dir()) as text:
            scratch = pathlib.Path(text)
            files = debian.unpack(PACKAGE, scratch, cache_dir() / "apt")
            for archive in scratch.glob("*.deb"):
                archive.unlink()
            unpack(files / ARCHIVE, scratch / "pictures" / "all" / "textures")
            (scratch / "pictures").rename(place)
    return place / "all" / "textures"


def unpack(archive, folder):
    """Unpacks the pictures, each of them once."""
    folder.mkdir(parents=True)
    seen = set()
    with zipfile.ZipFile(archive) as pack:
        for entry in sorted(pack.infolist(), key=lambda entry: entry.filename):
            name = entry.filename.removeprefix("textures/").replace("/", "-")
            if entry.is_dir() or MAPS.search(name) or entry.CRC in seen:
                continue
            seen.add(entry.CRC)
            (folder / name).write_bytes(pack.read(entry))


def split(folder):
    """Lays the textures out as folders of OUT/images: those of the test by material, those with
    labels by material, and without labels all that are not in the test. Returns their numbers."""
    count = dict.fromkeys(PARTS, 0)
    for path in sorted(folder.iterdir()):
        material, texture = material_of(path.name)
        places = {"unlabelled": "textures"}
        if material:
            number = int(hashlib.sha256(texture.encode()).hexdigest(), 16)
            if number % TEST_EVERY == 0:
                places = {"materials-test": material}
            else:
                places["materials-train"] = material
        for part, label in places.items():
            count[part] += 1
            place = OUT / "images" / part / label / path.name
            if place.exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                place.hardlink_to(path)
            except OSError:
                shutil.copy(path, place)
    return count


def begin():
    """Makes the folder. One that a call with the same recipe was interrupted in is gone on with:
    trainings by themselves, and what they are judged by is not computed again."""
    recipe = json.dumps([SPEC, TASK, VIEWS, WAYS, STEPS, TEST_EVERY, MATERIALS], indent=1)
    stamp = OUT / "recipe.json"
    if stamp.exists() and stamp.read_text() == recipe:
        say(PROGRAM, f"going on in {OUT.name}")
        return
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    stamp.write_text(recipe)


def learn(kind, features, seed):
    """Trains a probe or fine-tunes, and returns how often it is right on the test's files."""
    name = f"{kind}-{features}-{seed}"
    (OUT / f"{name}.toml").write_text(TASK.format(
        name=name, kind=kind, seed=seed, classes=len(MATERIALS), view=VIEWS[kind],
        more=WAYS[kind][features]))
    report = OUT / f"{name}.json"
    if report.exists():
        return json.loads(report.read_text())["results"][-1]["top1"]
    run(BIN / "lacuna", "train", f"{name}.toml", "--workers", "2", "--progress", "off")
    run(BIN / "lacuna-worker", "eval", "classify", f"runs/{name}", "--val", "materials-test",
        "--out", report, "--page", report.with_suffix(".html"))
    return json.loads(report.read_text())["results"][-1]["top1"]


def standard_error(values, n):
    """Returns the largest standard error, in percent, of shares of `n` test images."""
    worst = min(values, key=lambda share: abs(share - 0.5))
    return 100 * (worst * (1 - worst) / n) ** 0.5


def shown(values):
    """Writes shares in percent, as their mean and deviation where there are several."""
    percent = [100 * value for value in values]
    mean = f"{statistics.mean(percent):.1f}"
    return mean if len(percent) == 1 else f"{mean} ± {statistics.stdev(percent):.1f}"


def main():
    """Runs the demo and returns its exit code."""
    if not (BIN / "lacuna").exists() or not (BIN / "lacuna-worker").exists():
        say(PROGRAM, "build first: make build")
        return EXIT_UNFIT
    try:
        folder = textures()
    except debian.NoPackage as reason:
        say(PROGRAM, f"skipped: {reason}")
        return EXIT_NO_DATA
    begin()
    count = split(folder)
    for part in PARTS:
        if not (OUT / part / "pack.json").exists():
            run(BIN / "lacuna", "data", "pack", OUT / "images" / part, part)
    (OUT / "textures.toml").write_text(SPEC.format(steps=STEPS))
    run(BIN / "lacuna", "train", "textures.toml")
    run(BIN / "lacuna-worker", "reconstruct", "runs/textures", "--data", "materials-test",
        "--out", "textures.png")
    run(BIN / "lacuna-worker", "eval", "knn", "runs/textures", "--train", "materials-train",
        "--val", "materials-test", "--k", "5", "--pool", "mean", "--out", "knn.json",
        "--page", "knn.html")
    found = {row["features"]: row["results"][0]["top1"]
             for row in json.loads((OUT / "knn.json").read_text())["rows"]}
    rows = {"5 nearest neighbours": [[found[name]] for name in
                                     ("raw pixels", "random encoder", "encoder")]}
    for kind, title in (("linear", "linear probe"), ("finetune", "fine-tuning")):
        rows[title] = [[learn(kind, features, seed) for seed in range(SEEDS)]
                       if features in WAYS[kind] else []
                       for features in ("pixels", "random", "pre-trained")]
    error = standard_error([share for row in rows.values() for cell in row for share in cell],
                           count["materials-test"])
    print(f"\nTop-1 in % on materials of {count['materials-test']} textures that were kept apart, "
          f"from {count['materials-train']} with labels,\n"
          f"after {STEPS} steps on {count['unlabelled']} without; mean ± deviation over {SEEDS} "
          f"seeds of what was trained with\nlabels. So few test images alone are worth "
          f"± {error:.1f} (standard error).")
    print(f"{'':22} {'pixels':>14} {'random':>14} {'pre-trained':>14}")
    for name, cells in rows.items():
        raw, random, trained = (shown(cell) if cell else "–" for cell in cells)
        print(f"{name:22} {raw:>14} {random:>14} {trained:>14}")
    (OUT / "results.json").write_text(json.dumps(
        {"test_images": count["materials-test"], "columns": ["pixels", "random", "pre-trained"],
         "top1": rows}, indent=1))
    (OUT / "recipe.json").unlink()  # The next call begins anew.
    print("\nLook at demo-color-out/textures.png (original | masked | filled in | random weights),"
          "\nand at knn.html and finetune-pre-trained-0.html beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
