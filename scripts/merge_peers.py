"""What `benchmark_merge.py` measures cart-hf against, each in a process of its own.

    python scripts/merge_peers.py official --base BASE --models A B C --output FILE   # CART by its definition
    python scripts/merge_peers.py copy --output FILE --write BYTES FILE:BYTES ...      # reads and writes, nothing else
    python scripts/merge_peers.py products                                             # this machine's GEMM rates

`official` is the CART authors' procedure written anew from its equation: every state dict in memory, float32, a full
SVD of each centred matrix, every core. It is kinder than it need be: matrices are centred one at a time, where task
vectors are truncated model by model in a second set of state dicts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
BUFFER = 8 * 2**20
MATRIX = re.compile(r"\blayers?\.\d+\.(?P<kind>.*)\.weight$")


def official(arguments: argparse.Namespace) -> None:
    """Write ``A + scale * sum_t SVD_k(τ_t + θ_0 - A)`` of the backbone to one file."""
    import torch
    from safetensors.torch import load_file, save_file
    from weight_names import find

    torch.set_num_threads(CORES)
    base = load_file(arguments.base / "model.safetensors")
    task_vectors = []
    for path in arguments.models:
        state = load_file(path / "model.safetensors")
        places = {name: find(base, name) for name in state}
        task_vectors.append({name: state[name] - base[place] for name, place in places.items() if place})
    merged = {}
    for name in task_vectors[0]:
        start = base[find(base, name) or name]
        centre = start + sum(vector[name] for vector in task_vectors) / len(task_vectors)
        total = torch.zeros_like(centre)
        for vector in task_vectors:
            centred = vector[name] + start - centre
            if centred.ndim == 2 and MATRIX.search(name):
                k = max(1, int(arguments.rank_ratio * min(centred.shape)))
                u, s, vt = torch.linalg.svd(centred, full_matrices=False)
                centred = (u[:, :k] * s[:k]) @ vt[:k]
            total += centred
        merged[name] = centre + arguments.scale * total
    save_file(merged, arguments.output, {"format": "pt"})


def copy(arguments: argparse.Namespace) -> None:
    """Read the first bytes of files by offset, and write as many bytes as the merge does."""
    buffers = [bytearray(BUFFER) for _ in range(arguments.threads)]

    def read(place: int, path: str, size: int) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        for start in range(place * BUFFER, size, arguments.threads * BUFFER):
            os.preadv(descriptor, [memoryview(buffers[place])[: min(BUFFER, size - start)]], start)
        os.close(descriptor)

    def write(place: int, descriptor: int) -> None:
        for start in range(place * BUFFER, arguments.write, arguments.threads * BUFFER):
            os.pwrite(descriptor, memoryview(buffers[place])[: min(BUFFER, arguments.write - start)], start)

    places = range(arguments.threads)
    with ThreadPoolExecutor(arguments.threads) as pool:
        for word in arguments.files:
            path, _, size = word.rpartition(":")
            list(pool.map(read, places, [path] * len(places), [int(size)] * len(places)))
        descriptor = os.open(arguments.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.posix_fallocate(descriptor, 0, arguments.write)
        list(pool.map(write, places, [descriptor] * len(places)))
        os.close(descriptor)


def products(_: argparse.Namespace) -> None:
    """Print the rates of matrix products on every core, float operations a second: the best of ten, two libraries."""
    import numpy as np
    import torch

    torch.set_num_threads(CORES)
    n, rates = 2048, {}
    for dtype in ("float32", "float64"):
        left = np.random.default_rng(0).standard_normal((n, n)).astype(dtype)
        tensor, times = torch.from_numpy(left), []
        for multiply, factor in ((torch.mm, tensor), (np.matmul, left)):
            for _ in range(10):
                started = time.perf_counter()
                multiply(factor, factor)
                times.append(time.perf_counter() - started)
        rates[dtype] = 2 * n**3 / min(times)
    print(json.dumps(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("official")
    verb.set_defaults(call=official)
    verb.add_argument("--base", type=Path, required=True)
    verb.add_argument("--models", type=Path, nargs="+", required=True)
    verb.add_argument("--output", type=Path, required=True)
    verb.add_argument("--rank-ratio", type=float, default=0.08)
    verb.add_argument("--scale", type=float, default=1.0)
    verb = verbs.add_parser("copy")
    verb.set_defaults(call=copy)
    verb.add_argument("files", nargs="+", metavar="FILE:BYTES")
    verb.add_argument("--output", type=Path, required=True)
    verb.add_argument("--write", type=int, required=True, metavar="BYTES")
    verb.add_argument("--threads", type=int, default=CORES)
    verb = verbs.add_parser("products")
    verb.set_defaults(call=products)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
