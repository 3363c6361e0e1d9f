"""Checks what lies in deploy/: the programs' flags, other people's checkers, and the Slurm scripts
by running them, without Slurm, as jobs would.

Needs `lacuna` and `lacuna-worker` in LACUNA_BIN or target/; checkers come from `make peers`. What
cannot be checked is skipped with one line.
"""

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

from common import say
from readme_test import ROOT, binaries

DEPLOY = ROOT / "deploy"
SECONDS_MAX = 120
PYTHON = os.environ.get("LACUNA_PEERS_PYTHON", "")
PEERS = pathlib.Path(PYTHON).parent if PYTHON else None
# What a unit that names programs of another place says to whoever verifies it elsewhere.
NOT_INSTALLED = re.compile(r"Command /opt/lacuna/\S+ is not executable")


def run(*words, **more):
    """Runs a program and returns what became of it."""
    words = [str(word) for word in words]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
                          **more)


def checker(name):
    """Finds a checker, or says that it is not there."""
    found = shutil.which(name, path=os.pathsep.join(filter(None, [
        str(PEERS) if PEERS else "", os.environ["PATH"]])))
    if found is None:
        say("deploy", f"not checked by {name}: it is not here (make peers)")
    return found


def files(pattern):
    """Lists files of deploy/."""
    found = sorted(DEPLOY.glob(pattern))
    assert found, pattern
    return found


class Flags(unittest.TestCase):
    """Every flag that a file gives to a program is one of that program's."""

    def test_flags_are_known(self):
        folder = binaries()
        if folder is None:
            say("deploy", "skipped: no `lacuna` and `lacuna-worker` in target (make setup)")
            self.skipTest("no programs")
        coordinator = run(folder / "lacuna", "coordinator", "--help").stdout
        worker = run(folder / "lacuna-worker", "--help").stdout
        known = {"coordinator": set(re.findall(r"--[a-z-]+", coordinator)),
                 "worker": set(re.findall(r"--[a-z-]+", worker))}
        self.assertIn("--listen", known["coordinator"])
        n_checked = 0
        for path in files("*/*"):
            is_image = "Dockerfile" in path.name
            if path.suffix not in (".sbatch", ".service", ".yaml") and not is_image:
                continue
            lines = [line for line in path.read_text().splitlines()
                     if not line.lstrip().startswith(("#", "build:"))]
            text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
            of = "worker" if "worker" in path.name or path.name == "compose.yaml" else "coordinator"
            flags = [flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
                     if flag not in OTHERS]
            for flag in flags:
                self.assertIn(flag, known[of], f"{path.relative_to(ROOT)}")
            n_checked += len(flags)
        self.assertGreater(n_checked, 20)


    def test_the_coordinator_takes_the_arguments_of_each_file(self):
        folder = binaries()
        if folder is None:
            say("deploy", "skipped: no `lacuna` and `lacuna-worker` in target (make setup)")
            self.skipTest("no programs")
        manifest = (DEPLOY / "k8s" / "coordinator.yaml").read_text()
        image = (DEPLOY / "docker" / "Dockerfile.coordinator").read_text()
        unit = (DEPLOY / "systemd" / "lacuna-coordinator.service").read_text()
        lists = {"k8s": re.findall(r"(?m)^ +- (coordinator|--\S+)$", manifest),
                 "docker": re.findall(r'"([^"]+)"', image[image.index("CMD"):]),
                 "systemd": re.search(r"ExecStart=\S+ (.*)", unit).group(1).split()}
        for name, words in lists.items():
            with self.subTest(name=name), tempfile.TemporaryDirectory() as work:
                self.assertIn("coordinator", words)
                tokens = pathlib.Path(work) / "tokens"
                made = run(folder / "lacuna", "token", "new", "--role", "view", "--add-to", tokens,
                           "--out", f"{work}/view.token")
                self.assertEqual(made.returncode, 0, made.stderr)
                text = " ".join(words).replace("0.0.0.0:7070", "127.0.0.1:0")
                text = text.replace("${LISTEN}", "127.0.0.1:0")
                text = re.sub(r"(--state[= ])\S+", rf"\1{work}/state", text)
                text = re.sub(r"(--token-file[= ])\S+", rf"\1{tokens}", text)
                with subprocess.Popen([folder / "lacuna", *text.split()], text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                    said = process.stdout.readline()
                    process.terminate()
                    process.wait(timeout=SECONDS_MAX)
                    self.assertIn("listening on", said, process.stderr.read())


def own_address():
    """Returns this machine's address in a network, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            # Nothing is sent: it only chooses the way.
            one.connect(("192.0.2.1", 9))
            return one.getsockname()[0]
        except OSError:
            return None


# Flags of apt, cargo, useradd and install in Dockerfiles.
OTHERS = {"--yes", "--no-install-recommends", "--uid", "--create-home", "--release", "--locked",
          "--package", "--from"}


class Checkers(unittest.TestCase):
    """What other people's programs say of the files."""

    def quiet(self, *words):
        """Runs a checker that must be content."""
        done = run(*words)
        self.assertEqual(done.returncode, 0, f"{words}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def test_kubernetes(self):
        program = checker("kubernetes-validate")
        if program:
            for path in files("k8s/*.yaml"):
                self.assertIn("passed", self.quiet(program, "--strict", path))

    def test_docker(self):
        program = checker("hadolint")
        if program:
            self.quiet(program, *files("docker/Dockerfile.*"))

    def test_shell(self):
        program = checker("shellcheck")
        if program:
            self.quiet(program, "--severity=warning", *files("slurm/*.sbatch"),
                       ROOT / "scripts" / "install.sh", ROOT / "scripts" / "gpu_check.sh")

    def test_prometheus(self):
        program = checker("promtool")
        if program:
            self.quiet(program, "check", "rules", *files("prometheus/alerts.yml"))
            self.quiet(program, "test", "rules", *files("prometheus/alerts_test.yml"))

    def test_alerts_are_about_metrics_that_there_are(self):
        text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
        page = (ROOT / "docs" / "operations.md").read_text()
        source = (ROOT / "crates" / "coordinator" / "src" / "http" / "metrics.rs").read_text()
        names = set(re.findall(r"lacuna_[a-z_]+", text))
        self.assertGreater(len(names), 3)
        for name in names:
            self.assertIn(re.sub(r"_total$", "", name), source)
        self.assertIn("lacuna_run_state", page)

    def test_systemd(self):
        if not shutil.which("systemd-analyze"):
            return say("deploy", "not checked by systemd-analyze: it is not here")
        # A word that it does not know is only a warning, with exit code 0.
        said = run("systemd-analyze", "verify", *files("systemd/*.service"))
        lines = [line for line in said.stderr.splitlines() if not NOT_INSTALLED.search(line)]
        return self.assertEqual(lines, [])


class Slurm(unittest.TestCase):
    """The job scripts, as jobs would run them, on this machine's network address."""

    def setUp(self):
        folder = binaries()
        address = own_address()
        if folder is None or not address:
            say("deploy", "the Slurm scripts are not run: no programs, or no network address")
            self.skipTest("nothing to run them with")
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="lacuna-deploy-"))
        self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        self.env = dict(os.environ, HOME=str(self.home), LACUNA_HOME=str(self.home / "lacuna"),
                        LACUNA_PORT="0", OMP_NUM_THREADS="1", SLURM_ARRAY_TASK_ID="3",
                        SLURM_JOB_ID="1", LACUNA_ADDRESS=address,
                        LACUNA_STATE=str(self.home / "state"),
                        PATH=os.pathsep.join([str(folder), os.environ["PATH"]]))
        (self.home / "lacuna").mkdir()
        self.running = []
        self.addCleanup(self.end_all)

    def end_all(self):
        for process in reversed(self.running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def lacuna(self, *words):
        """Runs a command that must succeed."""
        done = run("lacuna", *words, cwd=self.home, env=self.env)
        self.assertEqual(done.returncode, 0, f"{words}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def start(self, script, until):
        """Starts a job's script and waits until it has said something; returns what it said."""
        log = self.home / f"{len(self.running)}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(["bash", DEPLOY / "slurm" / script], cwd=self.home,
                                       env=self.env, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        self.running.append(process)
        end = time.monotonic() + SECONDS_MAX
        while time.monotonic() < end and process.poll() is None:
            found = re.search(until, log.read_text(errors="replace"))
            if found:
                return process, found
            time.sleep(0.1)
        return self.fail(f"{script} did not say `{until}`:\n{log.read_text(errors='replace')}")

    def test_jobs_train_a_run_and_leave_when_they_are_told(self):
        tokens = self.home / "lacuna" / "tokens"
        self.lacuna("token", "new", "--role", "worker", "--add-to", tokens, "--out",
                    self.home / "lacuna" / "worker.token")
        self.lacuna("token", "new", "--role", "submit", "--add-to", tokens, "--out", "my.token")
        _, found = self.start("coordinator.sbatch", r"listening on (http://\S+)")
        url = found.group(1)
        self.assertTrue((self.home / "lacuna" / "coordinator.url").is_file())
        # Port 0 is this test's; a job has one that workers.sbatch reads there.
        self.env["LACUNA_COORDINATOR"] = url
        self.lacuna("data", "synthetic", "data", "--n", "64", "--size", "8x8", "--channels", "3",
                    "--seed", "1")
        (self.home / "run.toml").write_text(
            'schema = 1\nname = "job"\nbase = "preset:micro"\ndata.shards = "data"\n'
            'train.duration = "6step"\noptim.warmup = "1step"\ncheckpoint.to = "runs"\n')
        self.env["LACUNA_DEVICES"] = "cpu"
        process, _ = self.start("workers.sbatch", "trainer")
        said = self.lacuna("submit", "run.toml", "-c", url, "--token-file", "my.token", "--watch")
        self.assertIn("step 6/6", said)
        os.kill(process.pid, signal.SIGTERM)
        self.assertEqual(process.wait(timeout=SECONDS_MAX), 75)


if __name__ == "__main__":
    unittest.main()
