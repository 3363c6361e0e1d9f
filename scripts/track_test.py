"""Tests that TensorBoard reads what `lacuna-track` writes, also after crashes and steps back.

Needs cargo and, in LACUNA_PEERS_PYTHON, a Python with tensorboard; what cannot be tested is
skipped with one line.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEER = ROOT / "scripts" / "track_peer.py"
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
# The first call builds the sample.
SECONDS_MAX = 600
TAGS = ["loss/train", "optim/grad_norm", "optim/lr", "run/generation", "speed/data_wait",
        "speed/images_per_second", "speed/memory_gib"]
# The first generation's records, and all.
FIRST, ALL = 24, 43


def unmet():
    """Returns what is missing for the tests, or nothing."""
    if not PYTHON:
        return "LACUNA_PEERS_PYTHON is not set"
    if shutil.which("cargo") is None:
        return "there is no cargo"
    try:
        found = subprocess.run([PYTHON, "-c", "import tensorboard"], capture_output=True,
                               timeout=SECONDS_MAX, check=False)
    except OSError as error:
        return f"LACUNA_PEERS_PYTHON cannot be run: {error}"
    return None if found.returncode == 0 else f"{PYTHON} cannot import tensorboard"


def setUpModule():
    """Skips everything where the packages are missing."""
    missing = unmet()
    if missing:
        say("track", f"skipped: {missing}")
        raise unittest.SkipTest(missing)


def run(*words):
    """Runs a program and returns its stdout."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                          cwd=ROOT)
    if done.returncode != 0:
        raise AssertionError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Track(unittest.TestCase):
    """TensorBoard's view of the sample run; each test has a folder of its own."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name) / "run"

    def life(self, n_records):
        """Feeds the first records; returns the highest number before and after."""
        out = run("cargo", "run", "--quiet", "--package", "lacuna-track", "--example",
                  "track_sample", "--", self.folder, n_records)
        return [int(word) for word in out.split()]

    def seen(self):
        """Returns what TensorBoard shows."""
        return json.loads(run(PYTHON, PEER, self.folder))

    def event_files(self):
        """Returns the event files, oldest first."""
        return sorted(self.folder.glob("events.out.tfevents.*"))

    def assert_whole(self):
        """Checks that the whole run is seen, each step once and in order."""
        seen = self.seen()
        steps = list(range(1, 33))
        self.assertEqual(sorted(seen["scalars"]), TAGS)
        for tag in TAGS:
            self.assertEqual([step for step, _ in seen["scalars"][tag]], steps, tag)
            self.assertEqual(seen["steps"][tag], steps, tag)
            self.assertEqual(seen["plugins"][tag], "scalars")
        for step, loss in seen["scalars"]["loss/train"]:
            self.assertAlmostEqual(loss, 1 / step, places=6)
        generations = [generation for _, generation in seen["scalars"]["run/generation"]]
        self.assertEqual(generations, [1] * 15 + [2] * 17)
        pictures = seen["images"]["reconstruction/0"]
        self.assertEqual([picture[:3] for picture in pictures],
                         [[10, 1, 1], [20, 1, 1], [30, 1, 1]])
        for picture in pictures:
            self.assertTrue(bytes.fromhex(picture[3]).startswith(b"\x89PNG\r\n"))
        self.assertEqual(seen["steps"]["reconstruction/0"], [10, 20, 30])
        numbers = []
        for name in ["metrics.jsonl", "events.jsonl"]:
            lines = (self.folder / name).read_text(encoding="utf-8").splitlines()
            numbers += [json.loads(line)["seq"] for line in lines]
        self.assertEqual(sorted(numbers), list(range(1, ALL + 1)))

    def test_one_life(self):
        self.assertEqual(self.life(ALL), [0, ALL])
        self.assert_whole()
        seen = self.seen()
        self.assertEqual(seen["plugins"]["run/spec"], "text")
        self.assertEqual(seen["texts"]["run/spec"], ["    name = \"sample\"\n"])

    def test_a_second_life_that_goes_back(self):
        self.assertEqual(self.life(FIRST), [0, FIRST])
        self.assertEqual(self.seen()["steps"]["loss/train"], list(range(1, 21)))
        self.assertEqual(self.life(ALL), [FIRST, ALL])
        self.assertEqual(len(self.event_files()), 2)
        self.assert_whole()

    def test_torn_ends(self):
        self.life(FIRST)
        for n_bytes in [1, 100, 1000]:
            newest = self.event_files()[-1]
            os.truncate(newest, max(0, newest.stat().st_size - n_bytes))
            metrics = self.folder / "metrics.jsonl"
            os.truncate(metrics, metrics.stat().st_size - 7)
            before, after = self.life(ALL)
            self.assertLess(before, ALL)
            self.assertEqual(after, ALL)
            self.assert_whole()


if __name__ == "__main__":
    unittest.main()
