"""Tests of gpu_check.sh and of what it starts: all of it, with the CPU as the device."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / os.environ.get("LACUNA_BIN", "target/debug")
LIBTORCH = os.environ.get("LIBTORCH") or ROOT / "third_party" / "wheels" / "torch"
BENCH = ("gpu", "gpu_pair", "gpu_tables", "pytorch_step", "step")


def skip_reason():
    """Says what is missing."""
    for program in ("lacuna", "lacuna-worker"):
        if not (BIN / program).exists():
            return f"no {BIN / program}"
    if not (pathlib.Path(LIBTORCH) / "lib" / "libtorch_cpu.so").exists():
        return f"no libtorch in {LIBTORCH}"
    return ""


@unittest.skipIf(skip_reason(), skip_reason())
class GpuCheck(unittest.TestCase):
    """The folder that travels, as `gpu_check.sh build` makes it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for program in ("lacuna", "lacuna-worker"):
            (self.folder / program).symlink_to((BIN / program).resolve())
        (self.folder / "golden").symlink_to(ROOT / "tests" / "golden")
        (self.folder / "bench").mkdir()
        for name in BENCH:
            shutil.copy(ROOT / "scripts" / "bench" / f"{name}.py", self.folder / "bench")
        shutil.copy(ROOT / "scripts" / "common.py", self.folder / "bench")
        shutil.copy(ROOT / "scripts" / "gpu_check.sh", self.folder)

    def check(self, *words, **env):
        """Runs the script; returns its exit code and its words."""
        env = {**os.environ, "LIBTORCH": str(LIBTORCH), "OUT": str(self.folder / "out"),
               "DEVICES": "cpu", **env}
        done = subprocess.run([self.folder / "gpu_check.sh", *words], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
                              check=False)
        return done.returncode, done.stdout

    def test_a_machine_is_checked_and_trains_over_a_kill(self):
        code, said = self.check("run", "--device", "cpu", "--model", "micro", "--images", "4",
                                "--slots", "2", NVIDIA_TF32_OVERRIDE="1")
        self.assertEqual(code, 0, said)
        self.assertIn("trained twice on cpu: state digest ", said)
        self.assertRegex(said, r"pair: two trainers on cpu, one killed: digest (\w{16}), by one \1")
        record = json.loads((self.folder / "out" / "gpu-check.json").read_text())
        self.assertTrue(record["passed"] and record["complete"], said)
        self.assertIsNone(record["environment"]["NVIDIA_TF32_OVERRIDE"])

    def test_what_is_missing_is_said(self):
        code, said = self.check("run", "--device", "cpu", LIBTORCH=str(self.folder))
        self.assertEqual(code, 78, said)
        self.assertIn("no libtorch in", said)
        (self.folder / "lacuna-worker").unlink()
        code, said = self.check("run")
        self.assertEqual(code, 78, said)
        self.assertIn("gpu_check.sh build", said)


if __name__ == "__main__":
    unittest.main()
