#!/usr/bin/env python3
"""Takes the pictures of the page that the documentation shows, of a run that really trains.

    python3 scripts/page_pictures.py DATA [OUT]       # DATA: packed 28x28 images; OUT: docs

Two workers train; one is killed and another joins, and headless Chromium takes a picture while they
train, after the loss, after the join, and in a narrow window. It also notes every request that the
browser makes: one that leaves this machine is an error.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from common import EXIT_UNFIT, say  # noqa: E402  (the folder above is put on the path first)
from face_test import BIN, LACUNA, ends, free_port, run, until  # noqa: E402

PROGRAM = "pictures"
STEPS = 1200
SPEC = """schema = 1
name = "fashion"
base = "preset:demo"
data.shards = "{data}"
[train]
duration = "{steps}step"
batch = 64
slot_batch = 16
[optim]
warmup = "60step"
[elastic]
workers = "1:2"
[checkpoint]
to = "runs"
every = ["200step"]
read_back = true
[track]
every = "10step"
reconstructions = {{ every = "200step", images = 4 }}
"""


class Stage:
    """A coordinator, its workers, and a browser."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def begin(self, *words: object) -> subprocess.Popen[bytes]:
        """Starts a program that goes on."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_LOG": "warn"}
        with open(self.folder / f"{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log,
                                       cwd=self.folder, env=env)
        self.processes.append(process)
        return process

    def coordinator(self) -> None:
        """Starts the coordinator and waits until it answers."""
        address = self.url.removeprefix("http://")
        self.begin(LACUNA, "coordinator", "--listen", address, "--state", "state", "--local")

        def up() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", timeout=5):
                    return True
            except OSError:
                return False
        until(up, "the coordinator")

    def worker(self, name: str) -> subprocess.Popen[bytes]:
        """Starts an agent with one worker."""
        return self.begin(BIN / "lacuna-worker", "-c", self.url, "--devices", "cpu:1",
                          "--node-name", name)

    def status(self) -> dict:
        """Returns what is known of the run."""
        return json.loads(run(LACUNA, "status", "fashion", "-o", "json", "-c", self.url))

    def wait(self, step: int, members: int) -> None:
        """Waits until so many members have applied a step."""
        def there() -> bool:
            status = self.status()
            n = sum(worker["rank"] is not None for worker in status["workers"])
            return status["step"] >= step and n == members and status["state"] == "running"
        until(there, f"step {step} with {members}")

    def picture(self, out: pathlib.Path, width: int, height: int, *more: str) -> None:
        """Takes a picture of the run's page, and looks where the browser has been."""
        log = self.folder / "net.json"
        run("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-component-update", "--disable-background-networking",
            f"--window-size={width},{height}", f"--log-net-log={log}", "--timeout=6000",
            f"--user-data-dir={self.folder}/browser", *more,
            f"--screenshot={out}", f"{self.url}/runs/fashion")
        hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/"]+)', log.read_text()))
        here = self.url.removeprefix("http://")
        # What a browser asks its maker by itself is none of the page's.
        own = {host for host in hosts if re.search(r"(google|gstatic|gvt1|chromium)", host)}
        if hosts - own != {here}:
            raise AssertionError(f"the page asked {hosts - own}, not {here} alone")
        say(PROGRAM, f"{out}: {width} x {height}; asked {here} alone")

    def end(self) -> None:
        """Ends everything."""
        for process in reversed(self.processes):
            ends(process)


def main() -> int:
    """Runs the program and returns its exit code."""
    if len(sys.argv) < 2:
        say(PROGRAM, "give the folder of packed images")
        return EXIT_UNFIT
    data = pathlib.Path(sys.argv[1]).resolve()
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "docs").resolve()
    with tempfile.TemporaryDirectory(prefix="lacuna-pictures-") as folder:
        stage = Stage(pathlib.Path(folder))
        try:
            (stage.folder / "run.toml").write_text(SPEC.format(data=data, steps=STEPS))
            stage.coordinator()
            run(LACUNA, "submit", "run.toml", "-c", stage.url, cwd=stage.folder)
            first, _ = stage.worker("gpu-01"), stage.worker("gpu-02")
            stage.wait(260, 2)
            stage.picture(out / "page-training.png", 1160, 1500)
            os.kill(int(run("pgrep", "-P", first.pid).split()[0]), signal.SIGKILL)
            first.kill()
            stage.wait(420, 1)
            stage.picture(out / "page-lost.png", 1160, 2600)
            stage.worker("gpu-03")
            stage.wait(640, 2)
            stage.picture(out / "page.png", 1160, 2600)
            stage.picture(out / "page-narrow.png", 420, 1500)
            until(lambda: stage.status()["state"] == "finished", "the end of the run")
        finally:
            stage.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
