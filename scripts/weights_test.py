"""Tests that weights go from Lacuna to transformers and timm and back, bit by bit.

Needs `lacuna` in LACUNA_BIN (default: target/release) and, in LACUNA_PEERS_PYTHON, a Python
with torch, safetensors and transformers, for one test also timm; what cannot be tested is skipped
with one line.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
LACUNA = ROOT / os.environ.get("LACUNA_BIN", "target/release") / "lacuna"
PEER = ROOT / "scripts" / "weights_peer.py"
GOLDEN = ROOT / "tests" / "golden"
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
# Importing torch takes seconds where the disk is cold.
SECONDS_MAX = 300
# What f32 may differ by from results that were computed in f64.
NEAR = 2e-5
# The model of the golden set `mid`.
SPEC = """schema = 1
name = "{name}"
base = "preset:micro"
[model]
img_size = [32, 32]
patch_size = 4
width = 64
depth = 3
heads = 4
decoder_width = 32
decoder_depth = 2
decoder_heads = 4
[data]
shards = "d"
[checkpoint]
to = "runs"
"""


def can_import(modules):
    """Tells whether the other Python has these modules."""
    found = subprocess.run([PYTHON, "-c", f"import {modules}"], capture_output=True,
                           timeout=SECONDS_MAX, check=False)
    return found.returncode == 0


def unmet():
    """Returns what is missing for the tests, or nothing."""
    if not PYTHON:
        return "LACUNA_PEERS_PYTHON is not set"
    if not LACUNA.is_file():
        return f"{LACUNA} is missing (make build)"
    try:
        if not can_import("torch, safetensors, transformers"):
            return f"{PYTHON} cannot import torch, safetensors and transformers"
    except OSError as error:
        return f"LACUNA_PEERS_PYTHON cannot be run: {error}"
    return None


def setUpModule():
    """Skips everything where the packages or the binary are missing."""
    missing = unmet()
    if missing:
        say("weights", f"skipped: {missing}")
        raise unittest.SkipTest(missing)


def run(*words, folder=None, code=0):
    """Runs a program, checks its exit code, and returns its stdout, or stderr where it fails."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                          cwd=folder)
    if done.returncode != code:
        raise AssertionError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr}")
    return done.stdout if code == 0 else done.stderr


def peer(*words):
    """Runs a command of weights_peer.py."""
    return json.loads(run(PYTHON, PEER, *words))


NOTHING_WRONG = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


class Weights(unittest.TestCase):
    """Weights between the programs; each test has runs of its own over the same data."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        self.lacuna("data", "synthetic", "d", "--n", 40, "--size", "32x32", "--channels", 3)

    def lacuna(self, *words, code=0):
        """Runs `lacuna` in the test's folder."""
        return run(LACUNA, *words, folder=self.root, code=code)

    def imported(self, name, source, *more):
        """Begins the run `name` from weights; returns its spec."""
        (self.root / f"{name}.toml").write_text(SPEC.format(name=name), encoding="utf-8")
        self.lacuna("ckpt", "import", source, "--run", f"{name}.toml", *more)
        return f"{name}.toml"

    def test_parts_are_read_by_the_package(self):
        self.imported("golden", GOLDEN / "mid.weights.f32.safetensors")
        parts = sorted(self.root.rglob("part-*.safetensors"))
        self.assertTrue(parts)
        found = peer("read-parts", *parts)
        self.assertTrue(all(n > 0 for n in found.values()), found)

    def exported(self, spec, to, layout, *more):
        """Exports the newest checkpoint of a run; returns the folder."""
        self.lacuna("ckpt", "export", spec, "--layout", layout, "--to", to, *more)
        return self.root / to

    def test_golden_weights_give_golden_results_in_transformers(self):
        spec = self.imported("golden", GOLDEN / "mid.weights.f32.safetensors", "--layout", "mae")
        io = GOLDEN / "mid.io.safetensors"
        cases = [("whole", [], 1), ("sharded", ["--max-shard-bytes", 200000], 4)]
        for name, more, n_files in cases:
            folder = self.exported(spec, name, "hf", *more)
            self.assertEqual(len(list(folder.glob("*.safetensors"))), n_files, name)
            found = peer("load-hf", folder, "ViTMAEForPreTraining", io)
            off = found.pop("off")
            self.assertEqual(found, NOTHING_WRONG)
            self.assertLess(off, NEAR)
        folder = self.exported(spec, "encoder", "hf", "--encoder-only")
        found = peer("load-hf", folder, "ViTMAEModel", io)
        off = found.pop("off")
        self.assertEqual(found, NOTHING_WRONG)
        self.assertLess(off, NEAR)

    def test_golden_weights_give_golden_features_in_timm(self):
        if not can_import("timm"):
            say("weights", f"timm's test is skipped: {PYTHON} cannot import timm")
            self.skipTest("no timm")
        spec = self.imported("golden", GOLDEN / "mid.weights.f32.safetensors")
        file = self.exported(spec, "t", "timm") / "timm.safetensors"
        found = peer("load-timm", file, GOLDEN / "mid.io.safetensors",
                     GOLDEN / "mid.features.safetensors")
        self.assertLess(found["off"], NEAR)

    def test_what_transformers_writes_comes_back(self):
        for name, shard_bytes in [("one", 10 ** 9), ("several", 200000)]:
            folder = self.root / name
            files = peer("write-hf", folder, "ViTMAEForPreTraining", shard_bytes)["files"]
            self.assertEqual("model.safetensors.index.json" in files, name == "several", files)
            spec = self.imported(name, folder, "--layout", "hf")
            back = self.exported(spec, f"{name}-back", "hf")
            found = peer("compare", folder, back, "ViTMAEForPreTraining")
            self.assertTrue(found["loaded"])
            self.assertEqual(found["differ"], [])
            self.assertGreater(found["n"], 80)

    def test_an_encoder_that_transformers_writes_comes_back(self):
        folder = self.root / "encoder"
        peer("write-hf", folder, "ViTMAEModel", 10 ** 9)
        spec = self.imported("encoder", folder)
        back = self.exported(spec, "back", "hf", "--encoder-only")
        found = peer("compare", folder, back, "ViTMAEModel")
        self.assertTrue(found["loaded"])
        self.assertEqual(found["differ"], [])

    def test_an_export_that_is_saved_again_is_the_same_state(self):
        spec = self.imported("golden", GOLDEN / "mid.weights.f32.safetensors")
        folder = self.exported(spec, "out", "hf", "--max-shard-bytes", 200000)
        again = self.root / "again"
        self.assertEqual(peer("save-again", folder, "ViTMAEForPreTraining", again), NOTHING_WRONG)
        found = peer("compare", folder, again, "ViTMAEForPreTraining")
        self.assertEqual((found["loaded"], found["differ"], found["tables"]), (True, [], 0))
        self.imported("again", again)
        said = self.lacuna("ckpt", "diff", spec, "again.toml")
        self.assertIn("the same state", said)


if __name__ == "__main__":
    unittest.main()
