"""A few worker threads over many pieces of work, and how they report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import threadpoolctl
import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Progress(Protocol):
    """Receives what was done: the step's name, how much since the last call, how much in all."""

    def __call__(self, step: str, advance: int, total: int) -> None:
        """Take note."""


def silent(step: str, advance: int, total: int) -> None:
    """Report nothing; with no progress at all, libraries such as the Hub's client would report in their own ways."""


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(work: Callable[[Piece], Result], pieces: Iterable[Piece], workers: int) -> Iterator[Result]:
    """Run ``work`` on every piece, yielding results as they come; the queue is bounded, the first failure stops all."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending: set[Future[Result]] = set()
        waiting = iter(pieces)
        more = True
        try:
            while pending or more:
                while more and len(pending) < 2 * workers:
                    for piece in waiting:
                        pending.add(pool.submit(work, piece))
                        break
                    else:
                        more = False
                if pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give every worker one BLAS thread: more would fight each other over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
