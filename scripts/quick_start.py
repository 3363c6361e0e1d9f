#!/usr/bin/env python3
"""Records docs/first-ten-minutes.md anew: runs its commands and writes what they say.

    python3 scripts/quick_start.py [--out FILE]

Needs `lacuna` and `lacuna-worker` in LACUNA_BIN (default: target/release). Takes three minutes on
two cores. Two runs of one spec are disturbed in different ways; it fails if their digests differ.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from common import EXIT_UNFIT, say  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = ROOT / os.environ.get("LACUNA_BIN", "target/release")
PAGE = ROOT / "docs" / "first-ten-minutes.md"
PROGRAM = "quick-start"
SECONDS_MAX = 600
LENGTH = "--set train.duration=300step --set track.every=25step"


class Recording:
    """A folder in which commands run, and what a terminal would show."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.text = ""
        self.env = dict(os.environ, PATH=f"{BIN}:{os.environ['PATH']}", RUST_LOG="error")
        for key in [key for key in self.env if key.startswith("LACUNA_")]:
            del self.env[key]
        self.env["XDG_STATE_HOME"] = str(folder / "state")

    def start(self, line: str) -> subprocess.Popen:
        """Starts a command, whose output comes with its errors."""
        return subprocess.Popen(line.split(), cwd=self.folder, env=self.env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def show(self, line: str, code: int = 0, until: str = "", then=lambda process: None,
             shown: str = "") -> str:
        """Runs a command to its end, records and returns what it said; once a line begins with
        `until`, `then` is called."""
        process, said = self.start(line), ""
        for out in process.stdout:
            said += out
            if until and out.startswith(until):
                then(process)
                until = ""
        if process.wait(timeout=SECONDS_MAX) != code or until:
            raise SystemExit(f"`{line}` ended with {process.returncode}:\n{said}")
        self.text += f"$ {shown or line}\n{said}\n"
        return said


def trainer_of(agent: int) -> int:
    """Returns the process that an agent has started, from any of its threads."""
    threads = pathlib.Path(f"/proc/{agent}/task").glob("*/children")
    return int(next(pid for file in threads for pid in file.read_text().split()))


def offline(record: Recording) -> str:
    """Looks at the machine, packs images, writes a spec; returns what `train` says at its end."""
    record.show("lacuna doctor --offline")
    data = subprocess.run([sys.executable, ROOT / "scripts" / "data.py"], check=True, text=True,
                          stdout=subprocess.PIPE).stdout.strip().splitlines()[-1]
    record.text += ("$ python3 scripts/data.py                          # fetches Fashion-MNIST, "
                    "and prints where it is\n/home/you/.cache/lacuna/fashion-mnist\n\n")
    record.show(f"lacuna data pack {data} data --split train",
                shown="lacuna data pack ~/.cache/lacuna/fashion-mnist data --split train")
    record.show("lacuna data stats data")
    record.show("lacuna init --preset demo --name first --data data")
    record.show("lacuna plan run.toml --set train.duration=300step")
    record.show("lacuna plan run.toml --set train.bacth=64", code=2)
    record.show(f"lacuna train run.toml --workers 2 {LENGTH} --set name=alone", code=75,
                until="step 75/", then=lambda process: process.send_signal(signal.SIGINT))
    record.text += "Ctrl-C was pressed there. The same command goes on:\n\n"
    return record.show(f"lacuna train run.toml --workers 1 {LENGTH} --set name=alone")


def served(record: Recording) -> str:
    """Trains the same spec under a coordinator; returns what `status` says."""
    servers = [record.start("lacuna coordinator")]
    try:
        servers[0].stdout.readline()
        servers += [record.start(f"lacuna-worker --node-name {name}") for name in ("a", "b")]
        record.text += ("$ lacuna coordinator &\n"
                        "$ lacuna-worker --node-name a & lacuna-worker --node-name b &\n\n")
        record.show(f"lacuna submit run.toml {LENGTH} --watch", until="step 125/",
                    then=lambda _: os.kill(trainer_of(servers[2].pid), signal.SIGKILL))
        record.show("lacuna events first")
        status = record.show("lacuna status first")
        record.show("lacuna ckpt ls runs/first")
        record.show("lacuna submit run.toml --set train.duration=300step --set train.seed=7",
                    code=2)
        return status
    finally:
        for server in servers[::-1]:
            server.terminate()
            server.wait(timeout=SECONDS_MAX)


def main() -> int:
    """Runs the program and returns its exit code."""
    parser = argparse.ArgumentParser(description="Records docs/first-ten-minutes.md anew.")
    parser.add_argument("--out", default=PAGE, type=pathlib.Path, help=f"page [default: {PAGE}]")
    args = parser.parse_args()
    if not (BIN / "lacuna-worker").exists():
        say(PROGRAM, "build first: make build")
        return EXIT_UNFIT
    began, folder = time.monotonic(), pathlib.Path(tempfile.mkdtemp(prefix="ten-"))
    try:
        record = Recording(folder)
        alone, status = offline(record), served(record)
    finally:
        shutil.rmtree(folder)
    digests = [re.search(r"state digest ([0-9a-f]{16})", alone).group(1),
               re.search(r"^digest +([0-9a-f]{16})$", status, re.M).group(1)]
    if len(set(digests)) != 1:
        say(PROGRAM, f"one spec, two states: {digests}")
        return 1
    text = record.text.replace(str(folder), "/tmp/ten").replace(f"{BIN}/", "target/release/")
    stopped = re.search(r"stopped at step (\d+)", text).group(1)
    killed = re.search(r"lost at step (\d+)", text).group(1)
    page = PAGE.read_text()
    head, _, rest = page.partition("```\n")
    head = re.sub(r"(with Ctrl-C at step )\d+", rf"\g<1>{stopped}", head)
    head = re.sub(r"(with SIGKILL at step )\d+", rf"\g<1>{killed}", head)
    args.out.write_text(f"{head}```\n{text.rstrip()}\n```\n{rest.partition('```' + chr(10))[2]}")
    say(PROGRAM, f"{args.out} in {time.monotonic() - began:.0f} s, digest {digests[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
