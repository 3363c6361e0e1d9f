"""Tests that an objective can live in a crate of its own, outside of this workspace: the one that
docs/extending.md shows, with an example of this project as its source.

Builds it, which takes minutes: with LACUNA_SLOW_TESTS=1 only.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS_MAX = 1800


class OwnCrate(unittest.TestCase):
    """The page's files as they stand there."""

    def test_it_builds_and_starts(self):
        if os.environ.get("LACUNA_SLOW_TESTS") != "1":
            say("extending", "skipped: it builds a crate for minutes (LACUNA_SLOW_TESTS=1)")
            self.skipTest("LACUNA_SLOW_TESTS is not set")
        page = (ROOT / "docs" / "extending.md").read_text()
        manifest = re.search(r"```toml\n(\[package\].*?)```", page, re.S).group(1)
        build = re.search(r"```rust\n(// build.rs.*?)```", page, re.S).group(1)
        with tempfile.TemporaryDirectory(prefix="lacuna-own-") as text:
            crate = pathlib.Path(text)
            (crate / "src").mkdir()
            (crate / "Cargo.toml").write_text(manifest.replace("/path/to/lacuna", str(ROOT)))
            (crate / "build.rs").write_text(build)
            shutil.copy(ROOT / "crates/mae/examples/simmim.rs", crate / "src" / "main.rs")
            shutil.copy(ROOT / "Cargo.lock", crate / "Cargo.lock")
            target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
            env = {**os.environ, "CARGO_TARGET_DIR": target,
                   "LIBTORCH": os.environ.get("LIBTORCH", str(ROOT / "third_party/libtorch"))}
            subprocess.run(["cargo", "build", "--quiet"], cwd=crate, env=env, check=True,
                           timeout=SECONDS_MAX)
            said = subprocess.run([f"{target}/debug/my-objective", "--version"], check=True,
                                  capture_output=True, text=True, timeout=60).stdout
        self.assertRegex(said, r"lacuna .*libtorch 2\.11\.0")
