"""Tests that `lacuna-worker features` gives what timm gives for the same weights and images.

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


if __name__ == "__main__":
    unittest.main()
