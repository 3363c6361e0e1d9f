"""Tests of step.py: the table, the order of runs, the search for a Python. Nothing is timed."""

import contextlib
import io
import sys
import unittest
import unittest.mock

from bench import step
from bench.step import Contestant, Timing
from common import Unfit


class Tables(unittest.TestCase):
    """What is printed of the timings."""

    def test_medians_ranges_and_ratios(self):
        text = step.table({
            "lacuna": [Timing(100.0, 110.0, 0.5), Timing(200.0, 210.0, 0.75),
                       Timing(120.0, 1500.0, 0.5)],
            "PyTorch": [Timing(90.0, 100.0, 1.0), Timing(240.0, 250.0, 1.0),
                        Timing(132.0, 140.0, 1.25)],
        })
        self.assertEqual(text.splitlines()[2:], [
            "| lacuna | 120.0 (100.0–200.0) | 210.0 (110.0–1500.0) | 1 | 0.75 (0.00) |",
            "| PyTorch | 132.0 (90.0–240.0) | 140.0 (100.0–250.0) | 1.100 (0.900–1.200) "
            "| 1.25 (0.00) |",
        ])

    def test_columns_match(self):
        rounds = {"a": [Timing(1.0, 1.0, 0.1)], "b": [Timing(1234.5, 1.0, 0.1)]}
        lines = step.table(rounds).splitlines()
        self.assertEqual({line.count("|") for line in lines}, {6})
        self.assertIn("| 1234 (1234–1234) |", lines[3])
        lines = step.table_together(rounds, 8).splitlines()
        self.assertEqual({line.count("|") for line in lines}, {8})

    def test_processes_together_are_told_by_wall_time_and_images(self):
        text = step.table_together({
            "ours": [Timing(200.0, 100.0, 0.5), Timing(240.0, 160.0, 0.5)],
            "DDP": [Timing(220.0, 130.0, 1.0), Timing(240.0, 160.0, 1.0)],
        }, images=32)
        self.assertEqual(text.splitlines()[2:], [
            "| ours | 130.0 (100.0–160.0) | 260.0 (200.0–320.0) | 1 | 220.0 (200.0–240.0) | 1 "
            "| 0.50 (0.00) |",
            "| DDP | 145.0 (130.0–160.0) | 223.1 (200.0–246.2) | 1.115 (1.000–1.300) "
            "| 230.0 (220.0–240.0) | 1.045 (1.000–1.100) | 1.00 (0.00) |",
        ])

    def test_a_run_takes_as_long_as_its_slowest_process(self):
        def line(cpu, wall, peak):
            return {"cpu_ms": {"median": cpu}, "step_ms": {"median": wall}, "peak_gib": peak}

        timing = step.timing_of([line(10.0, 12.0, 0.5), line(11.0, 11.5, 0.75)])
        self.assertEqual(timing, Timing(21.0, 12.0, 0.75))


class Runs(unittest.TestCase):
    """The rounds and what they need."""

    def test_the_order_turns_every_round(self):
        order = []

        def run_one(contestant):
            order.append(contestant.name)
            ms = {"median": float(len(order))}
            return [{"cpu_ms": ms, "step_ms": ms, "peak_gib": 0.5}]

        contestants = [Contestant("a", (), {}), Contestant("b", (), {})]
        with unittest.mock.patch.object(step, "run_one", run_one), \
                contextlib.redirect_stderr(io.StringIO()):
            rounds, records = step.compare(contestants, 3)
        self.assertEqual(order, ["a", "b", "b", "a", "a", "b"])
        self.assertEqual([timing.cpu_ms for timing in rounds["a"]], [1.0, 4.0, 5.0])
        self.assertEqual([record["round"] for record in records], [0, 0, 1, 1, 2, 2])

    def test_every_process_learns_its_rank_and_one_place_to_meet(self):
        code = "import json, sys; print(json.dumps(sys.argv[1:]))"
        alone = Contestant("alone", (sys.executable, "-c", code), {})
        self.assertEqual(step.run_one(alone), [[]])
        pair = Contestant("pair", alone.command, {}, 2, "--store")
        lines = step.run_one(pair)
        self.assertEqual([line[:4] for line in lines],
                         [["--world", "2", "--rank", rank] for rank in "01"])
        self.assertEqual(lines[0][4:], lines[1][4:])
        self.assertEqual(lines[0][4], "--store")

    def test_a_process_that_fails_ends_the_others(self):
        code = "import sys, time; '0' in sys.argv and sys.exit(3); time.sleep(60)"
        pair = Contestant("pair", (sys.executable, "-c", code), {}, 2, "--store")
        with self.assertRaises(Unfit) as refusal:
            step.run_one(pair)
        self.assertIn("pair failed with exit code 3", str(refusal.exception))

    def test_a_wrong_torch_is_refused_with_the_way_out(self):
        for found, why in [("", "has no torch"), ("2.10.0+cpu", "has torch 2.10.0+cpu")]:
            with unittest.mock.patch.object(step, "torch_of", return_value=found):
                with self.assertRaises(Unfit) as refusal:
                    step.find_python("some-python")
            self.assertIn(why, str(refusal.exception))
            self.assertIn("pip install torch==2.11.0", str(refusal.exception))

    def test_a_build_of_the_right_torch_is_taken(self):
        with unittest.mock.patch.object(step, "torch_of", return_value="2.11.0+cu130"):
            self.assertEqual(step.find_python("some-python"), "some-python")


if __name__ == "__main__":
    unittest.main()
