#!/usr/bin/env python3
"""Trains one run with two trainers on one device, kills one of them, and compares the digest.

    python3 gpu_pair.py --bin FOLDER --work FOLDER --device cuda:0 --want DIGEST [--set KEY=VALUE …]

`--work` has `run.toml` and its data; `--want` is the digest of the same run by one trainer. NCCL
takes two ranks on one card only where they say that they are of two machines (`NCCL_HOSTID`). Part
of `gpu_check.sh`; with `--device cpu` it shows the same of two processes without a GPU.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys

SECONDS_MAX = 60
# Trainers that compute leave at a boundary; one that hangs on its device does not.
END_SECONDS_MAX = 5
NAME = "pair"
KILL_AT = "step 20/"


class Pair:
    """A coordinator and two agents, whose words go into files of one folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith("LACUNA_")}
        self.env.update(RUST_LOG="info", NCCL_SOCKET_IFNAME="lo",
                        XDG_STATE_HOME=str(args.work / "state"))
        self.processes: list[subprocess.Popen] = []
        self.url = ""

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen:
        """Starts a program of ours in the background."""
        with open(self.args.log / f"pair-{name}.log", "w", encoding="utf-8") as log:
            # pylint: disable=consider-using-with
            process = subprocess.Popen([self.args.bin / words[0], *words[1:]], stderr=log,
                                       cwd=self.args.work, env={**self.env, **env}, text=True,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.processes.append(process)
        return process

    def begin(self) -> list[subprocess.Popen]:
        """Starts all of them; returns the agents."""
        server = self.start("coordinator", "lacuna", "coordinator", "--listen", "127.0.0.1:0")
        said = server.stdout.readline()
        found = re.search(r"http://[0-9.:]+", said)
        if not found:
            raise SystemExit(f"pair: the coordinator said `{said}`")
        self.url = found.group()
        return [self.start(node, "lacuna-worker", "--coordinator", self.url, "--node-name", node,
                           "--devices", self.args.device, NCCL_HOSTID=node)
                for node in ("a", "b")]

    def train(self, agents: list[subprocess.Popen]) -> str:
        """Trains to the end over a kill; returns what was said on the way."""
        changes = [word for change in [f"name={NAME}", 'elastic.workers="2:2"', *self.args.set]
                   for word in ("--set", change)]
        words = [self.args.bin / "lacuna", "submit", "run.toml", "-c", self.url, "--watch",
                 *changes]
        text, killed = "", False
        with subprocess.Popen(words, cwd=self.args.work, env=self.env, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as watch:
            for line in watch.stdout:
                text += line
                if not killed and line.startswith(KILL_AT):
                    os.kill(trainer_of(agents[1].pid), signal.SIGKILL)
                    killed = True
        print(text)
        if watch.returncode != 0 or not killed:
            raise SystemExit(f"pair: ended with {watch.returncode}, killed: {killed}")
        return text

    def status(self) -> str:
        """Returns what the coordinator says of the run."""
        words = [self.args.bin / "lacuna", "status", NAME, "-c", self.url]
        done = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE,
                              timeout=SECONDS_MAX, env=self.env)
        return done.stdout

    def end(self) -> None:
        """Ends all of them, the agents first."""
        for process in self.processes[::-1]:
            process.terminate()
        for process in self.processes[::-1]:
            try:
                process.wait(timeout=END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()


def trainer_of(agent: int) -> int:
    """Returns the process that an agent has started."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            # Behind the name, which is in brackets: state, parent.
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # It has ended since.
        if int(parent) == agent:
            return int(process.name)
    raise SystemExit("pair: the trainer to be killed had ended")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in [("bin", "folder of lacuna and lacuna-worker"),
                       ("work", "folder of run.toml"), ("log", "folder for what is said")]:
        parser.add_argument(f"--{name}", required=True, help=what,
                            type=lambda text: pathlib.Path(text).resolve())
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--want", required=True, help="the digest of the same run by one trainer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def main() -> int:
    """Runs the program and returns its exit code."""
    args = parse()
    # Whoever ends this early wants the device back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("pair: ended early"))
    pair = Pair(args)
    try:
        text = pair.train(pair.begin())
        status = pair.status()
    finally:
        pair.end()
    found = re.search(r"^digest +([0-9a-f]{16})$", status, re.M)
    digest = found.group(1) if found else "none"
    formed = len(re.findall(r"^  generation \d+:", text, re.M))
    print(f"pair: two trainers on {args.device}, one killed: digest {digest}, by one {args.want}; "
          f"{formed} groups formed")
    # A kill that came too late shows nothing.
    return 0 if digest == args.want and formed >= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
