"""Tests that shards go from Lacuna to the Python packages and back, byte by byte.

Needs `lacuna` in LACUNA_BIN (default: target/release) and, in LACUNA_PEERS_PYTHON, a Python
with webdataset, mosaicml-streaming and pillow; without them the tests are skipped with one line.
"""

import hashlib
import json
import os
import pathlib
import struct
import subprocess
import tempfile
import unittest

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
LACUNA = ROOT / os.environ.get("LACUNA_BIN", "target/release") / "lacuna"
PEER = ROOT / "scripts" / "interop_peer.py"
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
# Importing streaming imports torch, which takes seconds where the disk is cold.
SECONDS_MAX = 300
CODECS = {".png": 1, ".jpg": 2, ".webp": 3}
NO_LABEL = 0xFFFFFF


def unmet():
    """Returns what is missing for the tests, or nothing."""
    if not PYTHON:
        return "LACUNA_PEERS_PYTHON is not set"
    if not LACUNA.is_file():
        return f"{LACUNA} is missing (make build)"
    try:
        found = subprocess.run([PYTHON, "-c", "import webdataset, streaming, PIL"],
                               capture_output=True, timeout=SECONDS_MAX, check=False)
    except OSError as error:
        return f"LACUNA_PEERS_PYTHON cannot be run: {error}"
    if found.returncode != 0:
        return f"{PYTHON} cannot import webdataset, streaming and PIL"
    return None


def setUpModule():
    """Skips everything where the packages or the binary are missing."""
    missing = unmet()
    if missing:
        say("interop", f"skipped: {missing}")
        raise unittest.SkipTest(missing)


def run(*words, code=0):
    """Runs a program, checks its exit code, and returns its stdout, or stderr where it fails."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if done.returncode != code:
        raise AssertionError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr}")
    return done.stdout if code == 0 else done.stderr


def lacuna(*words, code=0):
    """Runs `lacuna data`."""
    return run(LACUNA, "data", *words, code=code)


def peer(*words):
    """Runs a command of interop_peer.py."""
    return run(PYTHON, PEER, *words)


def read_index(folder):
    """Reads the samples of a data set by docs/formats.md: codec, class and bytes of each."""
    raw = (folder / "index.lacuna").read_bytes()
    head = struct.unpack_from("<8s2IQ2I2Q", raw)
    magic, version, _, size, n_shards, n_chunks, n_samples, _ = head
    assert (magic, version, size) == (b"LACUNAIX", 1, len(raw))
    at = 48
    places = []
    for _ in range(n_shards):
        _, n, _, length = struct.unpack_from("<2Q32sH", raw, at)
        name = raw[at + 50:at + 50 + length].decode()
        shard = (folder / name).read_bytes()
        places += [shard] * n
        at += 50 + length
    at += 8 * (n_chunks + 1)
    samples = []
    for i in range(n_samples):
        offset, length, _, _, _, last = struct.unpack_from("<Q2I2HI", raw, at + 24 * i)
        samples.append((last >> 24, last & NO_LABEL, places[i][offset:offset + length]))
    return samples


class Interop(unittest.TestCase):
    """Shards between the programs; each test has a folder of its own beside the same images."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.images = pathlib.Path(folder.name) / "images"
        peer("images", cls.images)
        cls.files = [(file, label) for label in range(2)
                     for file in sorted((cls.images / f"class{label}").iterdir())]

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)

    def wanted(self, suffixes=tuple(CODECS)):
        """Returns what an index of the images must lead to."""
        return [(CODECS[file.suffix], label, file.read_bytes())
                for file, label in self.files if file.suffix in suffixes]

    def check(self, folder, wanted):
        """Checks that a data set holds these samples, and that Lacuna decodes them all."""
        self.assertEqual(read_index(folder), wanted)
        report = json.loads(lacuna("verify", folder, "-o", "json"))
        self.assertTrue(report["clean"])
        self.assertEqual(report["n_samples"], len(wanted))

    def test_webdataset_reads_what_lacuna_packs(self):
        out = self.root / "out"
        lacuna("pack", self.images, out, "--shard-size", "16KiB")
        shards = sorted(out.glob("*.tar"))
        self.assertGreater(len(shards), 2)
        found = json.loads(peer("read-tar", *shards))
        digest = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()  # noqa: E731
        self.assertEqual(found, [
            {"key": f"{i:09}-{file.stem}", "cls": str(label),
             "members": {file.suffix[1:]: digest(file)}}
            for i, (file, label) in enumerate(self.files)])

    def test_lacuna_indexes_what_webdataset_writes(self):
        peer("write-tar", self.images, self.root)
        self.assertGreater(len(list(self.root.glob("*.tar"))), 2)
        lacuna("index", self.root)
        self.check(self.root, self.wanted())

    def test_lacuna_indexes_and_packs_plain_mds(self):
        for kind, wanted in [("jpeg", self.wanted([".jpg"])), ("bytes", self.wanted())]:
            with self.subTest(kind=kind):
                mds, out = self.root / kind, self.root / f"{kind}-out"
                peer("write-mds", self.images, mds, kind)
                self.assertGreater(len(list(mds.glob("*.mds"))), 1)
                lacuna("pack", mds, out)
                self.check(out, wanted)
                lacuna("index", mds)
                self.check(mds, wanted)

    def test_lacuna_packs_compressed_mds(self):
        for compression in ["zstd", "zstd:19", "gz"]:
            with self.subTest(compression=compression):
                mds, out = self.root / compression, self.root / f"{compression}-out"
                peer("write-mds", self.images, mds, f"bytes+{compression}")
                self.assertEqual(list(mds.glob("*.mds")), [])
                self.assertIn("`lacuna data pack`", lacuna("index", mds, code=74))
                lacuna("pack", mds, out, "--from", "mds")
                self.check(out, self.wanted())

    def test_other_compression_is_refused(self):
        mds = self.root / "mds"
        peer("write-mds", self.images, mds, "jpeg+bz2")
        self.assertIn("zstd and gz are read", lacuna("pack", mds, self.root / "out", code=74))


if __name__ == "__main__":
    unittest.main()
