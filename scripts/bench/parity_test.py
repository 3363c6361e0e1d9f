"""Tests of parity.py: what is computed of loss curves, and that the plot is one. Nothing trains."""

import sys
import unittest
import xml.etree.ElementTree

from bench import parity
from common import Unfit


class Curves(unittest.TestCase):
    """Figures of curves."""

    def test_smoothed_curves_start_with_the_first_full_window(self):
        self.assertEqual(parity.smooth([1.0, 2.0, 3.0, 4.0, 8.0], 2), [1.5, 2.5, 3.5, 6.0])

    def test_gaps_and_spreads(self):
        self.assertEqual(parity.gaps([1.0, 2.0], [1.5, 0.0]), [0.5, 2.0])
        self.assertEqual(parity.spreads([[1.0, 2.0], [3.0, 2.5], [2.0, 0.0]]), [2.0, 2.5])

    def test_tables_set_programs_and_seeds_apart(self):
        n = parity.WINDOW + 1
        curves = {"PyTorch": {1: [1.0] * n, 2: [1.5] * n},
                  "lacuna exact": {1: [1.25] * n, 2: [1.5] * n}}
        self.assertEqual(parity.table(curves).splitlines()[2:], [
            "| PyTorch | 1 | 1.00000 |  |  |  |",
            "| PyTorch | 2 | 1.50000 |  |  |  |",
            "| lacuna exact | 1 | 1.25000 | 2.50e-01 | 2.50e-01 | 2.50e-01 |",
            "| lacuna exact | 2 | 1.50000 | 0.00e+00 | 0.00e+00 | 0.00e+00 |",
        ])
        self.assertEqual(parity.table_of_seeds(curves).splitlines()[2:], [
            "| PyTorch | 5.00e-01 | 5.00e-01 | 5.00e-01 |",
            "| lacuna exact | 2.50e-01 | 2.50e-01 | 2.50e-01 |",
        ])
        xml.etree.ElementTree.fromstring(parity.plot(curves))


    def test_one_seed_has_one_curve(self):
        curves = {}
        parity.keep(curves, "lacuna exact", 1, [0.5])
        parity.keep(curves, "lacuna exact", 1, [0.5])
        parity.keep(curves, "lacuna exact", 2, [0.25])
        with self.assertRaises(Unfit):
            parity.keep(curves, "lacuna exact", 1, [0.25])
        self.assertEqual(curves, {"lacuna exact": {1: [0.5], 2: [0.25]}})


class Runs(unittest.TestCase):
    """The two programs of a seed."""

    def test_a_failure_of_either_ends_both(self):
        fails = [sys.executable, "-c", "raise SystemExit(3)"]
        reads = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        quiet = "import os, signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)"
        writes = [sys.executable, "-c", f"{quiet}\nwhile True: os.write(1, b'x' * 9999)"]
        for ours, peer in [(fails, reads), (writes, fails), (fails, None)]:
            with self.assertRaises(Unfit):
                parity.train(ours, peer, 60)


if __name__ == "__main__":
    unittest.main()
