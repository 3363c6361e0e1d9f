#!/usr/bin/env python3
"""Times torch.distributed's all-reduce over gloo between two processes on this machine.

Prints one JSON line with the median milliseconds for each size: `{"1": 2.0, "12": 14.5}`.

    python allreduce_peer.py --megabytes 1 12 100 --repeats 20
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
WARMUP = 3


def member(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                            world_size=WORLD)
    found: dict[str, float] = {}
    for megabytes in args.megabytes:
        values = torch.zeros(megabytes * 1_000_000 // 4)
        times: list[float] = []
        for _ in range(WARMUP + args.repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            times.append((time.perf_counter() - start) * 1e3)
        found[str(megabytes)] = statistics.median(times[WARMUP:])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 12, 100])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(member, args=(port, args), nprocs=WORLD)


if __name__ == "__main__":
    main()
