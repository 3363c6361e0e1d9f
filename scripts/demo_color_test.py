"""Tests of demo_color.py: which textures are for what."""

import pathlib
import tempfile
import unittest
import unittest.mock

import demo_color


class Materials(unittest.TestCase):
    """What file names tell."""

    def test_the_first_material_in_the_own_name_counts(self):
        self.assertEqual(demo_color.material_of("tex_mattn-wood001.jpg")[0], "wood")
        self.assertEqual(demo_color.material_of("tex_woods-brick_1.jpg")[0], "brick")
        self.assertEqual(demo_color.material_of("tex_misc-mtl_l1_fx.jpg")[0], "metal")
        self.assertEqual(demo_color.material_of("tex_misc-crate.jpg"), (None, None))

    def test_variants_are_one_texture(self):
        for one, other in [("tex_mattn-wood007a.jpg", "tex_mattn-wood007b.png"),
                           ("tex_base-woodceiling1b.jpg", "tex_base-woodceiling1bdark.jpg"),
                           ("tex_nature-grass003.jpg", "tex_nature-grass003_way_l2u.jpg")]:
            self.assertEqual(demo_color.material_of(one), demo_color.material_of(other))
        of = demo_color.material_of
        self.assertNotEqual(of("tex_mattn-wood007.jpg"), of("tex_mattn-wood008.jpg"))
        self.assertNotEqual(of("tex_mattn-wood007.jpg"), of("tex_material-wood007.jpg"))


class Split(unittest.TestCase):
    """Which textures are for what."""

    def test_the_test_is_seen_by_nobody(self):
        names = [f"tex_{place}-{kind}{number}{variant}.jpg" for place in ("a", "b")
                 for kind in ("wood", "brick", "crate") for number in range(20)
                 for variant in ("", "b")]
        with tempfile.TemporaryDirectory() as text:
            folder = pathlib.Path(text)
            (folder / "all").mkdir()
            for name in names:
                (folder / "all" / name).write_text(name)
            with unittest.mock.patch.object(demo_color, "OUT", folder):
                count = demo_color.split(folder / "all")
            found = {part: {path.name for path in (folder / "images" / part).rglob("*.jpg")}
                     for part in demo_color.PARTS}
        self.assertEqual(count, {part: len(files) for part, files in found.items()})
        unlabelled, train, test = (found[part] for part in demo_color.PARTS)
        self.assertEqual(unlabelled | test, set(names))
        self.assertFalse(test & (unlabelled | train))
        self.assertLess(train, unlabelled)
        self.assertTrue(40 < len(test) < 120, len(test))
        sides = {demo_color.material_of(name)[1] for name in train}
        self.assertFalse(sides & {demo_color.material_of(name)[1] for name in test})


class Numbers(unittest.TestCase):
    """What is printed."""

    def test_means_and_errors(self):
        self.assertEqual(demo_color.shown([0.5]), "50.0")
        self.assertEqual(demo_color.shown([0.4, 0.5, 0.6]), "50.0 ± 10.0")
        self.assertAlmostEqual(demo_color.standard_error([0.1, 0.5], 100), 5.0)


if __name__ == "__main__":
    unittest.main()
