"""Tests that `lacuna-worker features` gives what timm gives for the same weights and images, and
that a fine-tuned model gives timm's logits when it is exported.

Needs `lacuna` and `lacuna-worker` in LACUNA_BIN (default: target/release) and, in
LACUNA_PEERS_PYTHON, a Python with torch, timm, safetensors, numpy and Pillow; what cannot be tested
is skipped with one line.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from common import say
from readme_test import png

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / os.environ.get("LACUNA_BIN", "target/release")
PEER = ROOT / "scripts" / "features_peer.py"
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
MODULES = "torch, timm, safetensors, numpy, PIL"
# Importing torch takes seconds where the disk is cold.
SECONDS_MAX = 300
# Both compute in f32; their sums have other orders.
NEAR = 1e-5


def unmet():
    """Returns what is missing for the tests, or nothing."""
    if not PYTHON:
        return "LACUNA_PEERS_PYTHON is not set"
    for name in ("lacuna", "lacuna-worker"):
        if not (BIN / name).is_file():
            return f"{BIN / name} is missing (make build)"
    try:
        found = subprocess.run([PYTHON, "-c", f"import {MODULES}"], capture_output=True,
                               timeout=SECONDS_MAX, check=False)
    except OSError as error:
        return f"LACUNA_PEERS_PYTHON cannot be run: {error}"
    return None if found.returncode == 0 else f"{PYTHON} cannot import {MODULES}"


def setUpModule():
    """Skips everything where the packages or the binaries are missing."""
    missing = unmet()
    if missing:
        say("features", f"skipped: {missing}")
        raise unittest.SkipTest(missing)


def run(*words, folder=None):
    """Runs a program to its end and returns its stdout."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                          cwd=folder)
    if done.returncode != 0:
        raise AssertionError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Features(unittest.TestCase):
    """Features of one model of timm's, computed twice."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        run(PYTHON, PEER, "write", self.root / "timm.safetensors")

    def compared(self, size, pool, *more):
        """Computes features of images that have the size already; returns the comparison."""
        data = self.root / f"data-{size}"
        if not data.exists():
            run(BIN / "lacuna", "data", "synthetic", data, "--n", 37, "--size", size,
                "--channels", 3)
        out = self.root / f"{size}-{pool}.npy"
        # Pixels are normalised as ImageNet's: the default for such files.
        said = run(BIN / "lacuna-worker", "features", self.root / "timm.safetensors", "--data",
                   data, "--heads", 4, "--pool", pool, "--batch", 16, "--out", out, *more)
        found = run(PYTHON, PEER, "compare", self.root / "timm.safetensors", data, size, out, pool)
        return json.loads(found), said

    def test_features_are_those_of_timm(self):
        for pool, shape in [("cls", [37, 64]), ("mean", [37, 64]), ("tokens", [37, 65, 64])]:
            found, said = self.compared("32x32", pool)
            self.assertEqual((found["n"], found["shape"]), (37, shape))
            self.assertTrue(found["model_returns_cls"])
            self.assertLess(found["off"], NEAR, pool)
            self.assertIn("position table: the file's own, for 8 x 8 patches", said)

    def test_a_table_for_another_size_is_that_of_timm(self):
        for size in ("48x32", "24x24"):
            found, said = self.compared(size, "cls", "--img-size", size)
            self.assertLess(found["off"], NEAR, size)
            self.assertIn("as timm does", said)
        found, said = self.compared("24x24", "mean", "--img-size", "24x24", "--pos-resize", "mae")
        self.assertGreater(found["off"], 100 * NEAR)
        self.assertIn("without antialiasing", said)


class Classifier(unittest.TestCase):
    """A fine-tuned model: what `predict` writes, and what timm computes from its export."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        # As large as the model's images: nobody resizes them.
        for i in range(48):
            kind = self.root / "pictures" / ("some", "others", "more")[i % 3]
            kind.mkdir(parents=True, exist_ok=True)
            (kind / f"{i:02}.png").write_bytes(png(8, i))
        run(BIN / "lacuna", "data", "pack", self.root / "pictures", self.root / "data")

    def tuned(self, pool):
        """Fine-tunes for some steps; returns the run's folder."""
        (self.root / f"{pool}.toml").write_text(f"""schema = 1
name = "{pool}"
base = "preset:micro"
data.shards = "data"
elastic.workers = "1:1"
checkpoint.to = "runs"
[task]
kind = "finetune"
classes = 3
pool = "{pool}"
""")
        run(BIN / "lacuna", "train", f"{pool}.toml", "--progress", "off", folder=self.root)
        return self.root / "runs" / pool

    def test_logits_are_those_of_timm(self):
        for pool in ("avg", "cls"):
            with self.subTest(pool=pool):
                tuned, logits = self.tuned(pool), self.root / f"{pool}.npy"
                said = run(BIN / "lacuna-worker", "predict", tuned, "--data", self.root / "data",
                           "--out", logits, "--batch", 16)
                self.assertIn("logits of 48 images, 3 classes", said)
                self.assertIn("% of the 48 labelled ones are right", said)
                run(BIN / "lacuna", "ckpt", "export", tuned, "--layout", "timm", "--to",
                    self.root / f"export-{pool}")
                weights = self.root / f"export-{pool}" / "timm.safetensors"
                found = json.loads(run(PYTHON, PEER, "classify", weights, self.root / "data",
                                       logits, pool))
                self.assertEqual(found["shape"], [48, 3])
                self.assertLess(found["off"], NEAR)
                self.assertGreater(found["spread"], 100 * NEAR, "they are not all alike")


if __name__ == "__main__":
    unittest.main()
