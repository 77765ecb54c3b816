"""Carrying out a plan: pieces of work, read, merged and written by processes and their worker threads.

Element-wise work is cut into chunks of one tensor and low-rank work is one matrix (or one fused group) at a time, so
memory does not grow with the model. Each worker uses one BLAS thread; the solver and the tensor library release
Python's lock. A piece's result does not depend on who computes it or when, so any number of workers and processes
writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import torch

from cart_hf.merging.ahead import look_ahead
from cart_hf.merging.known import Calibration, Known
from cart_hf.merging.matrices import merge_group
from cart_hf.merging.reading import cast, sources_of
from cart_hf.merging.shares import Piece, Span, pieces, share_of
from cart_hf.merging.slices import merge_chunk
from cart_hf.parallel import Progress, in_parallel, one_blas_thread
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.processes import Processes

if TYPE_CHECKING:
    from cart_hf.factors import FactorStore

_LITTLE = 2**24  # bytes to read

Write = Callable[[PlannedTensor, int, torch.Tensor], None]


def default_workers(plan: Plan, processes: Processes) -> int:
    """Return how many workers each process uses: one per core on a CPU, two (to read while computing) elsewhere.

    Fewer, when the tensors that all of them hold would take more than half of the memory that is free; one for models
    so small that threads would only wait for each other.
    """
    if plan.nbytes * len(plan.models) < _LITTLE:
        return 1
    workers = min(processes.threads, 16) if processes.device.type == "cpu" else 2
    budget = psutil.virtual_memory().available / 2 / processes.local_count
    while workers > 1 and plan.memory(workers) > budget:
        workers -= 1
    return workers


def run(
    plan: Plan,
    processes: Processes,
    write: Write,
    *,
    workers: int,
    store: FactorStore | None = None,
    calibration: Calibration | None = None,
    done: Collection[Span] = (),
    check: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> None:
    """Merge this process's share of the planned tensors and hand the results to ``write``.

    :param write: called with a tensor of the plan, the first element's position in it, and a 1-D tensor of the
        output's type; from several threads at once.
    :param store: where the factors of low-rank methods are looked for, and kept.
    :param calibration: statistics of the models at work, for methods that need them.
    :param done: what has been written already; the same in every process.
    :param check: called before each piece, from several threads at once; what it raises ends the work.
    :raises UserError: when an input holds NaN or Inf, or a result does not fit the output's type.
    """

    def report(step: str, advance: int, total: int) -> None:
        check()
        if progress is not None:
            progress(step, advance, total)

    if plan.method.matrices:
        import cart_hf.linalg.low_rank  # noqa: F401  # a limit on BLAS threads reaches only what is loaded by then
    missing = [piece for piece in pieces(plan) if not all(span in done for span in piece.spans)]
    with one_blas_thread():
        known = Known(calibration=calibration)
        if missing:
            known = look_ahead(plan, workers, report, processes, known, store)
        share = share_of(missing, processes.rank, processes.count)
        ahead = iter(share[workers:])
        total = sum(piece.nbytes for piece in share)

        def work(piece: Piece) -> int:
            check()
            with suppress(StopIteration):  # the system reads what is next while this one is computed
                _will_need(plan, next(ahead), store)
            _carry_out(plan, piece, processes.device, known, store, write)
            return piece.nbytes

        for nbytes in in_parallel(work, share, workers):
            if progress is not None:
                progress("merging", nbytes, total)


def _will_need(plan: Plan, piece: Piece, store: FactorStore | None) -> None:
    """Have the system read what a piece is made from; not the models where their factors are likely to do."""
    if store is not None and piece.group.is_whole and store.holds(plan, piece.group):
        return
    for tensor, (_, start, stop) in zip(piece.group.tensors, piece.spans, strict=True):
        for source, name in sources_of(plan, tensor):
            source.will_need(name, start, stop)


def _carry_out(
    plan: Plan,
    piece: Piece,
    device: torch.device,
    known: Known,
    store: FactorStore | None,
    write: Write,
) -> None:
    tensors = piece.group.tensors
    if piece.group.is_whole:
        merged = merge_group(plan, piece.group, device, store, known)
        for tensor, part in zip(tensors, torch.split(merged, [t.shape[0] for t in tensors]), strict=True):
            write(tensor, 0, cast(plan, tensor, part.reshape(-1)))
        return
    (tensor,) = tensors
    write(tensor, piece.start, merge_chunk(plan, tensor, piece.start, piece.stop, device, known))
