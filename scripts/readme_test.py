"""Runs every command of the README, in its order, with small numbers where the README's are large.

A command that is not run here is named in ELSEWHERE with the place where it is; one that is in
neither fails the test. Needs `lacuna` and `lacuna-worker` in target/release or target/debug.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import unittest
import urllib.request
import zlib

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS_MAX = 240
# Programs that a README may name and a machine may lack.
OPTIONAL = ("grpcurl", "tensorboard", "curl")
# Words that begin a command; blocks without any are pictures or other languages.
PROGRAMS = ("make", "lacuna", "lacuna-worker", "cargo", "curl", "grpcurl", "source", "cd",
            "target/release/lacuna", "OMP_NUM_THREADS=1")

# What runs elsewhere, and where that is.
ELSEWHERE = [
    (r"make setup", "whoever builds"),
    (r"make demo", "whoever tries a checkout; minutes"),
    (r"make test", "continuous integration"),
    (r"make (sim|chaos|gpu-check)", "by hand; its target must be in the Makefile"),
    (r"cargo test .*", "continuous integration runs all tests; its filter must name one"),
    (r"cd scripts && .*unittest (face_test|readme_test)", "the test itself"),
]


def blocks(text):
    """Returns the fenced blocks without a language, each a list of lines."""
    out, inside, language = [], None, ""
    for line in text.splitlines():
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, language = [], line[3:]
        else:
            is_picture = any("\u2500" in one for one in inside)
            if not language and not is_picture:
                out.append(inside)
            inside = None
    return out


def commands(lines):
    """Returns the commands of a block: lines joined where they go on, without their comments."""
    text = "\n".join(lines).replace("\\\n", " ")
    out = []
    for line in text.splitlines():
        line = re.sub(r"^\w+\$\s+", "", line)
        line = re.sub(r"\s{2,}#.*$", "", line).strip()
        if line.split(" ")[0] in PROGRAMS:
            out += [part.strip() for part in line.split("; ")]
    return out


def inline_commands(text):
    """Returns the commands that stand in a line of text or a table."""
    prose, outside = [], True
    for line in text.splitlines():
        if line.startswith("```"):
            outside = not outside
        elif outside:
            prose.append(line)
    begins = ("make ", "cargo ", "lacuna ", "cd ")
    return [code for code in re.findall(r"`([^`]+)`", "\n".join(prose)) if code.startswith(begins)]


def elsewhere(command):
    """Returns where a command is run that is not run here."""
    return next((why for rule, why in ELSEWHERE if re.fullmatch(rule, command)), None)


class Commands(unittest.TestCase):
    """The parts of this test."""

    def test_blocks_become_commands(self):
        lines = ["lacuna a --x \\", "    --y       # says why", "head$   lacuna b", "a picture",
                 "lacuna c; lacuna d"]
        self.assertEqual(commands(lines), ["lacuna a --x      --y", "lacuna b", "lacuna c",
                                           "lacuna d"])

    def test_what_is_run_elsewhere_exists(self):
        readme = (ROOT / "README.md").read_text()
        makefile = (ROOT / "Makefile").read_text()
        tests = "\n".join(path.read_text() for folder in ("crates", "tests")
                          for path in (ROOT / folder).rglob("*.rs"))
        found = inline_commands(readme) + [c for b in blocks(readme) for c in commands(b)]
        for command in found:
            words = command.split()
            if words[0] == "make" and len(words) > 1:
                self.assertRegex(makefile, rf"(?m)^{words[1]}:", command)
            if words[:2] == ["cargo", "test"]:
                last = words[-1]
                known = re.search(rf"(fn|mod) \w*{last}\w*\b", tests) or last.startswith("lacuna-")
                targets = list(ROOT.glob(f"**/tests/{last}.rs"))
                self.assertTrue(known or targets, f"`{command}` names no test")
            if words[0] in ("cargo", "cd"):
                self.assertIsNotNone(elsewhere(command), command)


def binaries():
    """Returns the folder with both programs, the newest one where there are two, or nothing."""
    names = ("lacuna", "lacuna-worker")
    folders = [ROOT / "target" / kind for kind in ("release", "debug")]
    whole = [folder for folder in folders if all((folder / name).is_file() for name in names)]
    return max(whole, key=lambda folder: (folder / "lacuna").stat().st_mtime, default=None)


def png(side, seed):
    """Returns a coloured picture: a gradient with a disc, of another kind for each seed."""
    def pixel(y, x):
        inside = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / (3 + seed % 3)) ** 2
        return bytes((x * 255 // side, 255 * inside, (y * (seed + 1)) % 256))
    rows = b"".join(b"\0" + b"".join(pixel(y, x) for x in range(side)) for y in range(side))

    def chunk(kind, body):
        return (struct.pack(">I", len(body)) + kind + body
                + struct.pack(">I", zlib.crc32(kind + body)))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def peers():
    """Lists the folders of programs that `make peers` fetched."""
    places = [ROOT / "third_party" / "peers" / "bin"]
    if os.environ.get("LACUNA_PEERS_PYTHON"):
        places.insert(0, pathlib.Path(os.environ["LACUNA_PEERS_PYTHON"]).parent)
    return [str(place) for place in places if place.is_dir()]


class Readme(unittest.TestCase):
    """The README, from its first command to its last."""

    def setUp(self):
        self.bin = binaries()
        if self.bin is None:
            say("readme", "skipped: no `lacuna` and `lacuna-worker` in target (make setup)")
            self.skipTest("no programs")
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="lacuna-readme-"))
        self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        for i in range(72):
            kind = self.home / "pictures" / ("some" if i % 2 else "others")
            kind.mkdir(parents=True, exist_ok=True)
            (kind / f"{i}.png").write_bytes(png(96, i))
        self.running = []
        self.addCleanup(self.end_all)
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.env = dict(os.environ, HOME=str(self.home), OMP_NUM_THREADS="1",
                        PATH=os.pathsep.join([str(self.bin), os.environ["PATH"], *peers()]),
                        LACUNA_COORDINATOR=f"http://127.0.0.1:{self.port}")
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "RUST_LOG"):
            self.env.pop(name, None)

    def end_all(self):
        for process in reversed(self.running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run_one(self, command, codes=(0,)):
        """Runs a command in the folder and returns what it wrote."""
        done = subprocess.run(["bash", "-c", command], cwd=self.home, env=self.env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=SECONDS_MAX, check=False)
        self.assertIn(done.returncode, codes, f"`{command}`:\n{done.stdout[-3000:]}")
        self.said.append(command)
        return done.stdout

    def start(self, command, until):
        """Starts a command that goes on, and waits until it writes something."""
        log = self.home / f"{len(self.running)}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.home,
                                       env=self.env, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        self.running.append(process)
        self.said.append(command)
        end = time.monotonic() + SECONDS_MAX
        while time.monotonic() < end and process.poll() is None:
            if re.search(until, log.read_text(errors="replace")):
                return process
            time.sleep(0.1)
        self.fail(f"`{command}` did not write `{until}`:\n{log.read_text(errors='replace')}")

    def spec(self, more, **keys):
        """Writes a run.toml of small numbers."""
        text = f'schema = 1\nname = "{keys.get("name", "mine")}"\nbase = "preset:micro"\n{more}'
        (self.home / keys.get("file", "run.toml")).write_text(text)

    def test_every_command(self):
        readme = (ROOT / "README.md").read_text()
        self.said = []
        for command in [c for b in blocks(readme) for c in commands(b)]:
            if elsewhere(command) is not None:
                continue
            with self.subTest(command=command):
                self.prepare(command)
                self.perform(command)
        for command in inline_commands(readme):
            if elsewhere(command) is None:
                with self.subTest(command=command):
                    # Its words up to the first that stands for something.
                    words = command.split()
                    known = [word for word in words if re.fullmatch(r"[a-z-]+", word)]
                    self.run_one(" ".join(words[:len(known)] + ["--help"]))
        self.assertGreater(len(self.said), 30, "the README has commands")

    def prepare(self, command):
        """Makes what the README supposes to be there when it comes to a command."""
        data = self.home / "data" / "train"
        if command.startswith("target/release/lacuna train demo-out"):
            if not (self.home / "demo-out").exists():
                (self.home / "demo-out").mkdir()
                self.run_one("lacuna data pack pictures demo-out/data")
                self.spec('data.shards = "data"\ndata.mean = [0.5, 0.5, 0.5]\n'
                          'data.std = [0.5, 0.5, 0.5]\ntrain.duration = "12step"\n'
                          'train.batch = 8\ntrain.slot_batch = 2\noptim.warmup = "2step"\n'
                          'checkpoint.to = "runs"\n', file="demo-out/demo.toml", name="demo")
            (self.home / "target").mkdir(exist_ok=True)
            if not (self.home / "target" / "release").exists():
                (self.home / "target" / "release").symlink_to(self.bin)
        if command.startswith("lacuna train run.toml "):
            # A smaller machine: the rest of run.toml is as `lacuna init` wrote it.
            path = self.home / "run.toml"
            text = path.read_text()
            for key, value in [("batch", 8), ("slot_batch", 4), ("duration", '"4step"'),
                               ("warmup", '"1step"')]:
                text = re.sub(rf"(?m)^#? ?{key} = .*$", f"{key} = {value}", text)
            path.write_text(text)
        if command.startswith("lacuna ckpt import"):
            shutil.copy(self.home / "run.toml", self.home / "next.toml")
            path = self.home / "next.toml"
            path.write_text(re.sub(r'(?m)^name = .*$', 'name = "next"', path.read_text()))
        if command == "lacuna coordinator":
            # A run that is still on when the README looks at it.
            self.assertTrue(data.is_dir())
            self.run_one("lacuna ckpt verify runs/mine --all")
            shutil.rmtree(self.home / "runs")
            self.spec(f'data.shards = "{data}"\ntrain.duration = "1000000step"\n'
                      'train.batch = 16\ntrain.slot_batch = 4\noptim.warmup = "10step"\n'
                      'elastic.workers = "1:2"\ncheckpoint.to = "runs"\n'
                      'track.reconstructions = { every = "100step", images = 2 }\n')

    def has(self, program):
        """Tells whether a program is there."""
        return shutil.which(program, path=self.env["PATH"]) is not None

    def look_at_board(self, command):
        """Starts TensorBoard on the files of the run that was just submitted, and finds it."""
        self.assertTrue((self.home / "tb" / "shown").is_dir(), "its files are there at once")
        process = self.start(f"{command} --port 0", r"http://\S+")
        log = (self.home / f"{len(self.running) - 1}.log").read_text()
        port = re.search(r"http://[^:/]+:(\d+)", log).group(1)
        end, found = time.monotonic() + SECONDS_MAX, ""
        while "shown" not in found and time.monotonic() < end:
            runs = f"http://127.0.0.1:{port}/data/runs"
            with urllib.request.urlopen(runs, timeout=60) as answer:
                found = answer.read().decode()
            time.sleep(0.2)
        self.assertIn("shown", found)
        os.killpg(process.pid, signal.SIGKILL)

    def perform(self, command):
        """Runs a command of the README."""
        own = f"127.0.0.1:{self.port}"
        command = command.replace("127.0.0.1:7070", own)
        program = command.split()[0]
        if program in OPTIONAL and not self.has(program):
            return say("readme", f"not run: `{command}` ({program} is not here)")
        if command == "lacuna coordinator":
            self.start(f"lacuna coordinator --listen {own}", "listening on")
        elif command.startswith("lacuna coordinator --listen 10.0.0.1"):
            self.far = self.port + 1 if self.port < 65_000 else self.port - 1
            at = command.replace("10.0.0.1:7070", f"127.0.0.1:{self.far}")
            self.start(f"{at} --state far-state", "listening on")
        elif command.startswith("lacuna-worker --devices"):
            self.start(command, "device|worker|trainer")
        elif command.startswith("lacuna-worker --coordinator http://10.0.0.1"):
            at = command.replace("10.0.0.1:7070", f"127.0.0.1:{self.far}")
            at = at.replace("10.0.0.2", "127.0.0.1").replace("--devices all", "--devices cpu:1")
            self.start(f"{at} --node-name other", "trainer")
        elif command.startswith("lacuna submit run.toml -c http://10.0.0.1"):
            at = command.replace("10.0.0.1:7070", f"127.0.0.1:{self.far}")
            out = self.run_one(f"{at} --set name=far --set train.duration=20step")
            self.assertIn("step 20/20", out)
        elif command == "lacuna submit run.toml --watch":
            self.start(command, r"step [1-9]")
        elif command in ("lacuna watch mine", "lacuna events mine -f"):
            if "lacuna stop mine" in self.said and "lacuna resume mine" not in self.said:
                self.run_one("lacuna resume mine")
            # Quitting it stops nothing.
            self.start(command, r"step|formed").send_signal(signal.SIGINT)
        elif command.startswith("lacuna submit run.toml --set track.tensorboard"):
            submit, board = command.split(" && ")
            self.run_one(submit + " --set name=shown")
            if self.has("tensorboard"):
                self.look_at_board(board)
            else:
                say("readme", "not run: `tensorboard --logdir tb` (tensorboard is not here)")
        elif command.startswith("curl"):
            self.assertIn("lacuna_run_step", self.run_one(command))
        elif command.startswith("lacuna train run.toml "):
            self.run_one("lacuna train run.toml")
        else:
            out = self.run_one(command)
            if command.startswith("target/release/lacuna train"):
                digest = re.search(r"state digest\s+(\w+)", out)
                self.assertTrue(digest, out)
                known = getattr(self, "digest", digest.group(1))
                self.assertEqual(digest.group(1), known, "one digest for any number of workers")
                self.digest = known


if __name__ == "__main__":
    unittest.main()
