"""Tests of gpu.py: what is compared, what is written, and what becomes of the time."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

from bench import gpu, step

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WORKER = ROOT / os.environ.get("LACUNA_BIN", "target/debug") / "lacuna-worker"
# Two rounds of it take 20 s on two idle cores, most of it to load torch.
SMALL_SECONDS_MAX = 300


def parts_that_are_missing():
    """Says what the true programs cannot run without; empty if all is there."""
    if not WORKER.exists():
        return f"no {WORKER}"
    python = os.environ.get("LACUNA_PEERS_PYTHON", "python3")
    if step.torch_of(python).split("+")[0] != step.TORCH_VERSION:
        return f"{python} has no torch {step.TORCH_VERSION} (LACUNA_PEERS_PYTHON names another)"
    return ""


def line(case, ms, **more):
    """What a program prints of its steps."""
    return {"case": case, "step_ms": {"median": ms}, **more}


class Contests(unittest.TestCase):
    """What is compared."""

    def test_every_case_computes_the_images_of_its_contest(self):
        found = gpu.contests(small=False)
        self.assertEqual({contest.model for contest in found}, {"base", "large", "huge"})
        for contest in found:
            for case in contest.ours:
                parts = case.removesuffix(":free").split(":")
                model, slot, slots, precision, reduce = parts
                self.assertEqual((model, int(slot) * int(slots)), (contest.model, contest.images))
                self.assertIn(precision, gpu.PRECISIONS)
                self.assertIn(reduce, ("exact", "fast"))
        # Slots and sums stand beside the case that the first contest is about, in the same turn.
        base, alone = found[:2]
        self.assertEqual((alone.ours[0], alone.peers), (base.ours[0], {}))
        others = [*base.ours, *alone.ours[1:], *(case for one in found[2:] for case in one.ours)]
        self.assertEqual(len(others), len(set(others)))
        self.assertIn("base:128:4:bf16:fast", alone.ours)
        for slot in gpu.SLOTS:
            self.assertTrue(any(case.startswith(f"base:{slot}:") for case in alone.ours), slot)

    def test_what_matters_most_runs_first(self):
        turns = [(number, kind, contest.model, contest.images)
                 for number, kind, contest in gpu.schedule(gpu.contests(small=False), rounds=2)]
        self.assertEqual(turns[:5], [
            (0, "eager", "base", 512), (0, "compiled", "base", 512), (0, "eager", "base", 512),
            (0, "eager", "large", 256), (0, "eager", "huge", 128)])
        self.assertEqual(len(turns), 7 + 4 + 7 + 4)
        self.assertEqual([turn[:2] for turn in turns[-5:]], [(1, "eager"), *4 * [(0, "tuned")]])


class Reports(unittest.TestCase):
    """What is written."""

    CONTEST = gpu.Contest("base", 100, ("ours", "other"), {"peer": (), "slow": ()})

    def test_ratios_and_utilisation(self):
        lines = [line("ours", 50.0, round=0), line("peer", 60.0, round=0),
                 line("ours", 75.0, round=0, beside="compiled"),
                 line("ours", 100.0, round=1), line("peer", 90.0, round=1),
                 {"case": "other", "step_ms": None, "error": "out of memory"}]
        rows = gpu.table(self.CONTEST, lines, peak=4e12, flops=1e9).splitlines()[2:]
        self.assertEqual(rows, [
            "| ours | 75.0 (50.0–100.0) | 1333 | 0.333 | 1 |",
            "| other | out of memory | | | |",
            "| peer | 75.0 (60.0–90.0) | 1333 | 0.333 | 1.050 (0.900–1.200) |",
            "| slow | left out | | | |",
        ])

    def test_bits_that_differ_are_counted(self):
        results = [(self.CONTEST, [line("ours", 1.0, repeats=True),
                                   line("other", 1.0, repeats=False), line("peer", 2.0),
                                   line("free", 1.0, repeats=False, kernels="free")])]
        text = gpu.report({}, results)
        self.assertIn("1 of 2 exact trainings of ours gave the same bits twice.", text)


class Time(unittest.TestCase):
    """What becomes of the time."""

    def bench(self, seconds):
        return gpu.Bench(argparse.Namespace(minutes=seconds / 60), sys.executable)

    def test_lines_are_read_and_failures_named(self):
        bench = self.bench(60)
        program = "print('a log'); print('{\"case\": 1}')"
        self.assertEqual(bench.run("good", [sys.executable, "-c", program]), [{"case": 1}])
        self.assertEqual(bench.run("bad", [sys.executable, "-c", "raise SystemExit(3)"]), [])
        self.assertEqual(bench.left_out, ["bad (ended with 3)"])
        # More time does not help what died.
        self.assertEqual(bench.missing(), "NOT COMPLETE, left out: bad (ended with 3)")

    def test_nothing_begins_after_the_end(self):
        bench = self.bench(-1)
        began = time.monotonic()
        self.assertEqual(bench.run("late", [sys.executable, "-c", "input()"]), [])
        self.assertLess(time.monotonic() - began, 1)
        self.assertEqual((bench.left_out, bench.died), (["late"], []))

    def test_what_takes_too_long_is_ended(self):
        bench = self.bench(4)
        program = "import signal; print('{}', flush=True); signal.pause()"
        began = time.monotonic()
        self.assertEqual(bench.run("hangs", [sys.executable, "-c", program], n_lines=2), [{}])
        # It had half of the time, and the other half is there for others.
        self.assertEqual((bench.left_out, bench.died), (["hangs (ended after 2 s)"], []))
        self.assertLess(time.monotonic() - began, 3.5)
        bench.run("hangs", [sys.executable, "-c", program], n_lines=2)
        self.assertEqual(bench.missing().count("hangs (ended after 2 s)"), 1)
        self.assertIn("`--minutes 40`", bench.missing())


class Order(unittest.TestCase):
    """Who runs when."""

    def test_what_costs_most_comes_last_and_all_is_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "out.json"
            bench = gpu.Bench(argparse.Namespace(minutes=1, rounds=2, out=out), sys.executable)
            said = []

            def turn(case):
                said.append(case)
                return [line(case, 1.0)]

            bench.ours = lambda cases: turn(" ".join(cases))
            bench.peer = lambda contest, name: turn(name)
            peers = {"eager": (), "compiled": ("--compile",),
                     "tuned": ("--compile", "--mode", "max-autotune")}
            found = bench.compare([gpu.Contest("base", 8, ("base", "free"), peers),
                                   gpu.Contest("large", 8, ("large",), {"other": ()}),
                                   gpu.Contest("base", 8, ("alone",), {})])
            self.assertEqual(said, [
                "base free", "eager", "base", "compiled", "large", "other", "alone",
                "eager", "base free", "other", "large", "alone", "base", "tuned"])
            kept = json.loads(out.read_text())
            self.assertEqual([row["case"] for row in kept["lines"] if row["beside"] == "tuned"],
                             ["base", "tuned"])
            # A file whose writer was ended before the end says that it is not complete.
            self.assertIs(kept["complete"], False)
            bench.keep(found, complete=True)
            self.assertIs(json.loads(out.read_text())["complete"], True)


class Program(unittest.TestCase):
    """All of the program, small and on the CPU."""

    # A Python, and a worker, that only say what the true ones would: any number of steps, at once.
    PYTHON = """#!{python}
import json, sys, time
if sys.argv[1] == "-c":
    print("{version}")
elif sys.argv[1].endswith("gpu_tables.py"):
    row = dict(batch=1, heads=1, tokens=1, head=1, us=1.0)
    print(json.dumps(dict(
        torch="{version}", device="cpu", ceilings=dict(tflops=1.0, copy_gb_s=1.0, product_side=1),
        attention=[dict(row, backend=word) for word in "abcd"],
        products=[dict(model="m", product="p", images=1, tflops=1.0)])))
else:
    time.sleep({seconds})
    print(json.dumps(dict(peer="pytorch", images_per_s=8.0, step_ms=dict(median=1000.0))))
"""
    WORKER = """#!{python}
import json, sys
for case in sys.argv[1:]:
    if case.startswith("micro:"):
        print(json.dumps(dict(peer="lacuna", case=case, images_per_s=8.0, repeats=True,
                              step_ms=dict(median=1000.0), flops_per_image=1e9, error={error})))
sys.exit({code})
"""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def stand_ins(self, error=None, code=0, seconds=0):
        """Writes both programs; returns their paths."""
        for name, text in (("python", self.PYTHON), ("worker", self.WORKER)):
            for word, value in (("python", sys.executable), ("version", step.TORCH_VERSION),
                                ("error", repr(error)), ("code", str(code)),
                                ("seconds", str(seconds))):
                text = text.replace(f"{{{word}}}", value)
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        return self.folder / "python", self.folder / "worker"

    def program(self, python, worker, *words):
        """Runs gpu.py; returns its exit code, the JSON it wrote and what it printed."""
        out = self.folder / "out.json"
        out.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "bench" / "gpu.py", "--small", "--device", "cpu",
             "--worker", worker, "--python", python, "--steps", "2", "--out", out, *words],
            stdout=subprocess.PIPE, text=True, timeout=SMALL_SECONDS_MAX, check=False)
        return done.returncode, json.loads(out.read_text()), done.stdout

    def assert_whole(self, code, found, said):
        """Asserts that everything small was measured."""
        self.assertEqual((code, found["complete"], found["left_out"]), (0, True, []), said)
        self.assertEqual(found["format"], "lacuna-gpu-bench/1")
        self.assertGreater(found["tables"]["ceilings"]["tflops"], 0)
        self.assertGreater(found["tables"]["ceilings"]["copy_gb_s"], 0)
        self.assertTrue(found["tables"]["attention"] and found["tables"]["products"])
        contest, = gpu.contests(small=True)
        self.assertEqual(sorted((row["round"], row["case"]) for row in found["lines"]),
                         sorted((number, case) for number in range(2)
                                for case in (*contest.ours, *contest.peers)))
        for row in found["lines"]:
            self.assertGreater(row["images_per_s"], 0)
            self.assertAlmostEqual(row["images_per_s"] * row["step_ms"]["median"] / 1e3,
                                   contest.images, places=6)
            self.assertIs(row.get("repeats", True), True)
        self.assertNotIn("NOT COMPLETE", said)
        for case in (*contest.ours, *contest.peers):
            self.assertRegex(said, rf"\| {case} \| [0-9.]+ \(")

    def assert_out_of_time(self, code, found, said):
        """Asserts that nothing was measured for lack of time, and that this is said."""
        self.assertEqual((code, found["complete"], found["lines"]), (3, False, []), said)
        # It may have begun, and was ended then.
        self.assertRegex(found["left_out"][0], r"^tables( \(ended after 0 s\))?$")
        self.assertIn("PyTorch eager, micro, 8 images", found["left_out"])
        last = said.splitlines()[-1]
        self.assertTrue(last.startswith("NOT COMPLETE, left out: tables"), last)
        self.assertIn("; lacuna, micro:", last)
        self.assertIn("`--minutes 40`", last)

    def test_small_and_true(self):
        missing = parts_that_are_missing()
        if missing:
            gpu.say("gpu", f"skipped: {missing}")
            self.skipTest(missing)
        python = os.environ.get("LACUNA_PEERS_PYTHON", "python3")
        self.assert_whole(*self.program(python, WORKER))
        self.assert_out_of_time(*self.program(python, WORKER, "--minutes", "0.00001"))

    def test_exit_codes(self):
        self.assert_whole(*self.program(*self.stand_ins()))
        self.assert_out_of_time(*self.program(*self.stand_ins(), "--minutes", "0.00001"))
        # What there was time for is kept.
        code, found, said = self.program(*self.stand_ins(seconds=60), "--minutes", "0.1")
        self.assertEqual((code, found["complete"]), (3, False), said)
        self.assertIn("PyTorch eager, micro, 8 images (ended after 3 s)", found["left_out"])
        self.assertEqual([row["case"] for row in found["lines"] if row["round"] == 0],
                         list(gpu.contests(small=True)[0].ours))
        self.assertIn("| PyTorch eager | left out |", said)
        # What failed is there, and so complete; what died is not, and is no matter of time.
        code, found, _ = self.program(*self.stand_ins(error="no memory", code=1))
        self.assertEqual((code, found["complete"], found["left_out"]), (1, True, []))
        worker = self.folder / "dies"
        worker.write_text(f"#!{sys.executable}\nraise SystemExit(101)\n")
        worker.chmod(0o755)
        code, found, said = self.program(self.stand_ins()[0], worker)
        self.assertEqual((code, found["complete"]), (1, False))
        self.assertRegex(found["left_out"][0], r"lacuna, micro:.* \(ended with 101\)")
        self.assertIn("NOT COMPLETE", said)
        self.assertNotIn("--minutes", said)


class Tables(unittest.TestCase):
    """The card's own numbers."""

    def test_rows_of_products(self):
        rows = [{"model": "base", "product": "qkv", "images": n, "tflops": n / 3}
                for n in (64, 128)]
        self.assertEqual(gpu.products(rows).splitlines(), [
            "| product, TFLOP/s | 64 images | 128 images |", "|---|---:|---:|",
            "| base qkv | 21.3 | 42.7 |"])


if __name__ == "__main__":
    unittest.main()
