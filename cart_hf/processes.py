"""Several processes on one piece of work: started by torchrun, accelerate, or `--num-processes`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cart_hf.device import named_device
from cart_hf.errors import UserError
from cart_hf.parallel import cores

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    :param rank: its number.
    :param count: how many there are.
    :param device: where it computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Return every process's ``item``, in the order of ranks. All of them must call it."""
        if self.count == 1:
            return [item]
        from accelerate.utils import gather_object

        return list(gather_object([item]))

    def together(self, work: Callable[[], Item]) -> list[Item]:
        """Do a share of the work in every process and return all the shares; when one fails, all raise its error.

        A process that failed alone would leave the others waiting for it.

        :raises UserError: of the first process that raised it; anything else is raised where it happened, and as a
            RuntimeError elsewhere.
        """
        problems: list[str] | None = None
        unexpected: Exception | None = None
        share: Item | None = None
        try:
            share = work()
        except UserError as failure:
            problems = failure.problems
        except Exception as failure:
            unexpected = failure
        reason = None if unexpected is None else f"{type(unexpected).__name__}: {unexpected}"
        outcomes = self.gather((problems, reason, share))
        if unexpected is not None:
            raise unexpected
        for rank, (refused, crashed, _) in enumerate(outcomes):
            if refused:
                raise UserError(refused)
            if crashed:
                raise RuntimeError(f"process {rank}: {crashed}")
        return [share for _, _, share in outcomes]  # type: ignore[misc]


def join(device: str = "auto") -> Processes:
    """Take this process's place among those that a launcher started, or stand alone.

    :param device: ``auto``: a GPU for each process where there are GPUs, else the CPU.
    :raises UserError: when the device does not exist here, or one GPU is asked for by several processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, named_device(device))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: {count} processes each take a device of their own; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        named_device(device)  # says what is wrong
    from accelerate import PartialState

    # without cpu=True every process on a machine without GPUs believes to be the only one
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=True) if on_cpu else PartialState()
    return Processes(state.process_index, state.num_processes, torch.device(state.device))


def is_main() -> bool:
    """Whether this process may write and print; known before :func:`join`."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(work: Callable[..., Any], count: int, **arguments: Any) -> Any:
    """Run ``work(**arguments)`` in ``count`` processes of this machine and return what the first one returns.

    :param work: an importable function; its processes find each other with :func:`join`.
    :param arguments: what it is called with; picklable.
    :raises UserError: when one of the processes raises it.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "WORLD_SIZE" in os.environ:
        raise UserError("--num-processes: a launcher has started several processes already; leave one of the two out")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="cart-hf",
        max_restarts=0,
        start_method="spawn",
    )
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = before or str(max(1, cores() // count))
    try:
        returned = elastic_launch(config, _refusable)(work, arguments)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
    problems = next((problems for problems, _ in returned.values() if problems), None)
    if problems:
        raise UserError(problems)
    return returned[0][1]


def _refusable(work: Callable[..., Any], arguments: dict[str, Any]) -> tuple[list[str], Any]:
    """Return the user's mistakes as a value: an exception would reach the launcher as text only."""
    try:
        return [], work(**arguments)
    except UserError as failure:
        return failure.problems, None
