"""Tests of the table and the plot of `make downstream`, and of going on where a call was."""

import argparse
import json
import pathlib
import tempfile
import unittest
import xml.etree.ElementTree as xml

import downstream
from downstream import Case


def options(folder, **more):
    """Returns what a call with these flags has."""
    given = {"work": folder, "seeds": 3, "fractions": [0.01, 1.0], "steps": 8000, "known": None,
             "epochs": downstream.EPOCHS}
    return argparse.Namespace(**{**given, **more})


def found(args):
    """Makes up results that differ by seed."""
    return {case: 0.5 + case.seed / 100 for case in downstream.cases(args)}


class Downstream(unittest.TestCase):
    """No program of ours runs here."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def test_the_table_has_means_and_deviations_over_seeds(self):
        args = options(self.folder)
        rows = downstream.table(args, found(args)).splitlines()
        self.assertEqual(rows[2], "| 1 % | k-NN, k = 10 | 51.0 ± 1.0 | 51.0 ± 1.0 | 51.0 ± 1.0 |")
        self.assertEqual(rows[-1], "| 100 % | fine-tuning | – | 51.0 ± 1.0 | 51.0 ± 1.0 |")
        one = options(self.folder, seeds=1)
        self.assertIn("| 1 % | linear probe | 50.0 | 50.0 | 50.0 |",
                      downstream.table(one, found(one)))

    def test_the_plot_is_a_picture_with_a_bar_for_each_mean(self):
        args = options(self.folder)
        picture = xml.fromstring(downstream.plot(args, found(args)))
        named = "{http://www.w3.org/2000/svg}"
        bars = [bar for bar in picture.iter(f"{named}rect") if bar.get("width") == "22"]
        self.assertEqual(len(bars), 2 * (3 + 3 + 2))
        self.assertEqual(len([line for line in picture.iter(f"{named}path")]), len(bars))

    def test_what_is_known_is_not_done_again(self):
        args = options(self.folder)
        rows = [{"protocol": case.protocol, "features": case.features, "fraction": case.fraction,
                 "seed": case.seed, "top1": top1} for case, top1 in found(args).items()]
        known = self.folder / "known.json"
        recipe = downstream.Bench(args).recipe()
        known.write_text(json.dumps({"recipe": recipe, "rows": rows}))
        bench = downstream.Bench(options(self.folder, known=known))
        case = Case("linear", "pre-trained", 0.01, 2)
        self.assertEqual(bench.top1(case), 0.52)
        bench.keep(f"{Case('knn', 'random', 0.1, 7).name}.json", {"top1": 0.25})
        self.assertEqual(bench.top1(Case("knn", "random", 0.1, 7)), 0.25)
        with self.assertRaisesRegex(downstream.Unfit, "another recipe"):
            downstream.Bench(options(self.folder, known=known, steps=4000))
        known.write_text('{"rows": [{}]}')
        with self.assertRaisesRegex(downstream.Unfit, "no results"):
            downstream.Bench(options(self.folder, known=known))

    def test_a_folder_holds_one_recipe(self):
        downstream.Bench(options(self.folder)).is_one_recipe()
        downstream.Bench(options(self.folder, seeds=1)).is_one_recipe()
        with self.assertRaises(downstream.Unfit):
            downstream.Bench(options(self.folder, steps=4000)).is_one_recipe()

    def test_the_recipe_has_the_specs_that_run(self):
        bench = downstream.Bench(options(self.folder))
        specs = bench.recipe()["specs"]
        self.assertEqual(len(specs), 3 * (3 + 2))
        for case in [case for case in downstream.cases(options(self.folder, seeds=1))
                     if case.protocol != "knn"]:
            spec = bench.spec(case, {0.01: 600, 1.0: 60_000}[case.fraction])
            self.assertEqual(specs[case.name], spec)
            self.assertEqual('encoder = "runs/mae-0"' in spec, case.features == "pre-trained")
            self.assertEqual('pool = "pixels"' in spec, case.features == "raw pixels")
            self.assertEqual("layer_decay = 0.75" in spec,
                             (case.protocol, case.features) == ("finetune", "pre-trained"))
        for name, warmup in (("linear-random-0.01-0", 9), ("linear-random-1-0", 374),
                             ("finetune-random-0.01-0", 18), ("finetune-pre-trained-1-0", 187)):
            self.assertIn(f'warmup = "{warmup}step"', specs[name])


if __name__ == "__main__":
    unittest.main()
