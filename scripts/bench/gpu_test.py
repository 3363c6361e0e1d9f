"""Tests of gpu.py: what is compared, what is written, and what becomes of the time."""

import argparse
import json
import pathlib
import sys
import tempfile
import time
import unittest

from bench import gpu


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
        cases = [case for contest in found for case in contest.ours]
        self.assertEqual(len(cases), len(set(cases)))
        self.assertIn("base:128:4:bf16:fast", cases)
        for slot in gpu.SLOTS:
            self.assertTrue(any(case.startswith(f"base:{slot}:") for case in cases), slot)


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
        text = gpu.report({}, results, ["slow"])
        self.assertIn("1 of 2 exact trainings of ours gave the same bits twice.\n", text)
        self.assertTrue(text.endswith("left out: slow\n"), text)


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

    def test_nothing_begins_after_the_end(self):
        bench = self.bench(-1)
        began = time.monotonic()
        self.assertEqual(bench.run("late", [sys.executable, "-c", "input()"]), [])
        self.assertLess(time.monotonic() - began, 1)
        self.assertEqual(bench.left_out, ["late"])

    def test_what_takes_too_long_is_ended(self):
        bench = self.bench(2)
        program = "import signal; print('{}', flush=True); signal.pause()"
        self.assertEqual(bench.run("hangs", [sys.executable, "-c", program], n_lines=2), [{}])
        self.assertRegex(bench.left_out[0], r"hangs \(ended after [12] s\)")


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

            bench.ours = lambda contest: turn(f"ours {contest.model}")
            bench.peer = lambda contest, name: turn(name)
            peers = {"eager": (), "compiled": ("--compile",),
                     "tuned": ("--compile", "--mode", "max-autotune")}
            bench.compare([gpu.Contest("base", 8, ("ours base",), peers),
                           gpu.Contest("large", 8, ("ours large",), {"other": ()})])
            self.assertEqual(said, [
                "ours base", "eager", "ours large", "other", "ours base", "compiled",
                "eager", "ours base", "other", "ours large", "ours base", "tuned"])
            kept = json.loads(out.read_text())
            self.assertEqual([row["case"] for row in kept["lines"] if row["beside"] == "tuned"],
                             ["ours base", "tuned"])


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
