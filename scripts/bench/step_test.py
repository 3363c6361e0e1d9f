"""Tests of step.py: the table, the order of runs, the search for a Python. Nothing is timed."""

import contextlib
import io
import unittest
import unittest.mock

from bench import step
from bench.step import Contestant, Timing
from common import Unfit


class Table(unittest.TestCase):
    """What is printed of the timings."""

    def test_medians_ranges_and_ratios(self):
        text = step.table({
            "lacuna": [Timing(100.0, 110.0), Timing(200.0, 210.0), Timing(120.0, 1500.0)],
            "PyTorch": [Timing(90.0, 100.0), Timing(240.0, 250.0), Timing(132.0, 140.0)],
        })
        self.assertEqual(text.splitlines()[2:], [
            "| lacuna | 120.0 (100.0–200.0) | 210.0 (110.0–1500.0) | 1 |",
            "| PyTorch | 132.0 (90.0–240.0) | 140.0 (100.0–250.0) | 1.100 (0.900–1.200) |",
        ])

    def test_columns_match(self):
        lines = step.table({"a": [Timing(1.0, 1.0)], "b": [Timing(1234.5, 1.0)]}).splitlines()
        self.assertEqual({line.count("|") for line in lines}, {5})
        self.assertIn("| 1234 (1234–1234) |", lines[3])


class Runs(unittest.TestCase):
    """The rounds and what they need."""

    def test_the_order_turns_every_round(self):
        order = []

        def run_one(contestant):
            order.append(contestant.name)
            ms = {"median": float(len(order))}
            return {"cpu_ms": ms, "step_ms": ms}

        contestants = [Contestant("a", (), {}), Contestant("b", (), {})]
        with unittest.mock.patch.object(step, "run_one", run_one), \
                contextlib.redirect_stderr(io.StringIO()):
            rounds, records = step.compare(contestants, 3)
        self.assertEqual(order, ["a", "b", "b", "a", "a", "b"])
        self.assertEqual([timing.cpu_ms for timing in rounds["a"]], [1.0, 4.0, 5.0])
        self.assertEqual([record["round"] for record in records], [0, 0, 1, 1, 2, 2])

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
