#!/usr/bin/env python3
"""Saves and loads a state of a given size with torch.distributed.checkpoint, once.

Prints one JSON line with GB/s (10^9 bytes) of a save that is synced and of a load from files that
are not in the page cache.

    python checkpoint_peer.py FOLDER --bytes 1340000000 --threads 4
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import time

import torch
import torch.distributed.checkpoint as dcp

# As many tensors as ViT-B's encoder and decoder have, for parameters and both moments.
N_TENSORS = 3 * 252


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    numel = args.bytes // 4 // N_TENSORS
    state = {f"tensor.{i}": torch.arange(numel, dtype=torch.float32) + i for i in range(N_TENSORS)}
    n_bytes = 4 * numel * N_TENSORS
    shutil.rmtree(args.folder, ignore_errors=True)
    writer = dcp.FileSystemWriter(args.folder, thread_count=args.threads, sync_files=True)
    os.sync()
    start = time.perf_counter()
    dcp.save(state, storage_writer=writer)
    saved = time.perf_counter() - start
    for path in args.folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loaded = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    os.sync()
    start = time.perf_counter()
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(args.folder))
    took = time.perf_counter() - start
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    shutil.rmtree(args.folder)
    print(json.dumps({"save": n_bytes / 1e9 / saved, "load": n_bytes / 1e9 / took}))


if __name__ == "__main__":
    main()
