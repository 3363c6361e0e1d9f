"""Tests of gpu_check.sh and of what it starts: all of it, with the CPU as the device, and its
verdicts alone, with programs that only say what the real ones would."""

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


class Verdicts(unittest.TestCase):
    """What becomes of the exit codes of the programs that it starts."""

    LACUNA = """#!/usr/bin/env bash
[ "$1" != train ] || echo "state digest 0123456789abcdef"
"""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        shutil.copy(ROOT / "scripts" / "gpu_check.sh", self.folder)
        for name in ("bench", "lib", "programs"):
            (self.folder / name).mkdir()
        (self.folder / "lib" / "libtorch_cpu.so").touch()
        (self.folder / "build-version").write_text("2.11.0+cpu\n")
        self.program("lacuna", self.LACUNA)
        self.program("lacuna-worker", "#!/usr/bin/env bash\n")
        (self.folder / "bench" / "gpu_pair.py").write_text("print('pair: alike')\n")
        # A machine without Python: all programs of this one but that.
        for place in ("/bin", "/usr/bin"):
            for path in pathlib.Path(place).iterdir():
                link = self.folder / "programs" / path.name
                if not path.name.startswith("python") and not link.is_symlink():
                    link.symlink_to(path)

    def program(self, name, text):
        """Writes a program."""
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def check(self, *words, **env):
        """Runs the script; returns its exit code and its words."""
        env = {**os.environ, "LIBTORCH": str(self.folder), "OUT": str(self.folder / "out"), **env}
        done = subprocess.run([self.folder / "gpu_check.sh", *words], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                              check=False)
        return done.returncode, done.stdout

    def test_without_python_it_has_not_all_passed(self):
        code, said = self.check("run")
        self.assertEqual(code, 0, said)
        self.assertIn("pair: alike\ngpu-check: passed; ", said)
        bare = str(self.folder / "programs")
        code, said = self.check("run", PATH=bare)
        self.assertEqual(code, 3, said)
        self.assertIn("gpu-check: passed, but not: two trainers over NCCL", said)
        self.assertNotIn("passed;", said)
        # What failed is worse than what was not tried, whatever its code.
        for worse in (1, 3):
            self.program("lacuna-worker", f"#!/usr/bin/env bash\nexit {worse}\n")
            code, said = self.check("run", PATH=bare)
            self.assertEqual(code, worse, said)
            self.assertIn(f"gpu-check: FAILED (exit code {worse})", said)
            self.assertNotIn("passed", said)

    def test_a_comparison_that_is_not_complete_is_said_and_kept(self):
        for wanted in (0, 1, 3):
            text = ("import pathlib, sys\n"
                    "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
                    f"out.write_text('{wanted}')\n"
                    "print('a table', sys.argv[-2:])\n"
                    f"sys.exit({wanted})\n")
            (self.folder / "bench" / "gpu.py").write_text(text)
            code, said = self.check("run-bench", "--minutes", "1")
            self.assertEqual(code, wanted, said)
            self.assertIn("a table ['--minutes', '1']", said)
            self.assertEqual((self.folder / "out" / "gpu-bench.json").read_text(), str(wanted))
            self.assertEqual("not complete (exit code 3)" in said, wanted == 3, said)


if __name__ == "__main__":
    unittest.main()
