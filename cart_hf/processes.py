"""Several processes on one piece of work: started by torchrun, accelerate, Slurm, or `--num-processes`."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch

from cart_hf import slurm
from cart_hf.device import named_device
from cart_hf.errors import UserError
from cart_hf.parallel import cores

Item = TypeVar("Item")

_PATIENCE = timedelta(days=1)  # one process may download for hours while the others wait


class StoppedError(Exception):
    """This process gave up its share because another one failed, which says why."""


class _KnownError(Exception):
    """A failure that every process has been told of already."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    :param rank: its number.
    :param count: how many there are.
    :param device: where it computes.
    :param local_rank, local_count: the same among those on its machine.
    :param threads: how many cores it may use: its part, where they share them.
    """

    rank: int
    count: int
    device: torch.device
    local_rank: int = 0
    local_count: int = 1
    threads: int = field(default_factory=cores)

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Return every process's ``item``, in the order of ranks. All of them must call it.

        In the work of :meth:`together`, it raises what another process raised there instead.
        """
        return self._exchange(None, item)

    def together(self, work: Callable[[], Item], alarm: Callable[[], object] = lambda: None) -> list[Item]:
        """Do a share of the work in every process and return all the shares; when one fails, all raise its error.

        A process that failed alone would leave the others waiting for it.

        :param alarm: called first of all where the work fails: the others may look whether it has been.
        :raises UserError: of the first process that raised it; anything else is raised where it happened, and as a
            RuntimeError elsewhere.
        """
        share: Item | None = None
        own: Exception | None = None
        try:
            share = work()
        except _KnownError as known:
            raise known.failure from None
        except Exception as failure:
            alarm()
            own = failure
        except BaseException:
            alarm()
            raise
        try:
            shares = self._exchange(own, share)
        except _KnownError as known:
            raised = known.failure
        else:
            if own is None:
                return shares
            raised = own  # it had stopped, and nobody says why
        raise raised if own is None or isinstance(own, UserError | StoppedError) else own

    def by_main(self, work: Callable[[], Item]) -> Item:
        """Do some work in the main process only; return its result, or raise its error, in every process."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def everywhere(self, work: Callable[[], Item], *, in_turns: bool = False) -> Item:
        """Do the same work in every process, and return what this one found; when one fails, all raise its error.

        :param in_turns: in the first process of each machine before the others, which share its cache.
        """
        own: list[Item] = []

        def once() -> None:
            if not own:
                own.append(work())

        if in_turns:
            self.together(once if self.local_rank == 0 else lambda: None)
        self.together(once)
        return own[0]

    @contextmanager
    def entered_by_main(self, manager: Callable[[], AbstractContextManager[Item]]) -> Iterator[Item]:
        """Enter a context in the main process only; what it yields, and what it raises, reaches every process."""
        with ExitStack() as stack:
            item = self.by_main(lambda: stack.enter_context(manager()))
            try:
                yield item
            except Exception:
                if self.is_main:
                    stack.__exit__(*sys.exc_info())
                with suppress(RuntimeError):  # where a process is gone
                    self.gather(None)  # launchers end all processes when one ends, and the main one was still at it
                raise
            self.by_main(stack.close)

    def _exchange(self, failure: Exception | None, item: Any) -> list[Any]:
        """Tell the others what came of this process's work, and return what came of everyone's.

        :raises _KnownError: when it failed in one of them.
        """
        refused = failure.problems if isinstance(failure, UserError) else None
        crashed = failure is not None and not isinstance(failure, UserError | StoppedError)
        outcomes = [(refused, f"{type(failure).__name__}: {failure}" if crashed else None, item)]
        if self.count > 1:
            from accelerate.utils import gather_object

            outcomes = gather_object(outcomes)
        for rank, (problems, reason, _) in enumerate(outcomes):
            if problems:
                raise _KnownError(UserError(problems))
            if reason:
                raise _KnownError(RuntimeError(f"process {rank}: {reason}"))
        return [item for _, _, item in outcomes]


def join(device: str = "auto") -> Processes:
    """Take this process's place among those that a launcher or Slurm started, or stand alone.

    :param device: ``auto``: a GPU for each process where there are GPUs, else the CPU.
    :raises UserError: when the device does not exist here, or one GPU is asked for by several processes.
    """
    slurm.adopt()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, named_device(device))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: {count} processes each take a device of their own; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        named_device(device)  # says what is wrong
    from accelerate import PartialState

    # Without cpu=True every process on a machine without GPUs believes to be the only one. Only Python objects are
    # exchanged, so gloo will do, also for two processes on one GPU.
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        atexit.register(_leave)
    state = PartialState(cpu=on_cpu, backend="gloo", timeout=_PATIENCE)
    place = torch.device("cpu") if on_cpu else torch.device(state.device)
    return _placed(Processes(state.process_index, state.num_processes, place))


def _leave() -> None:
    """End the process group: its threads, if they are at work when the program ends, abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _placed(processes: Processes) -> Processes:
    """Say which of the processes are on this machine, and on its same cores (Slurm may give each its own)."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    everyone = processes.gather((socket.gethostname(), mine))
    here = [used for host, used in everyone if host == socket.gethostname()]
    before = sum(host == socket.gethostname() for host, _ in everyone[: processes.rank])
    return replace(processes, local_rank=before, local_count=len(here), threads=max(1, cores() // here.count(mine)))


def is_main() -> bool:
    """Whether this process may write and print; known before :func:`join`."""
    slurm.adopt()
    return int(os.environ.get("RANK", "0")) == 0


def launch(work: Callable[..., Any], count: int, **arguments: Any) -> Any:
    """Run ``work(**arguments)`` in ``count`` processes of this machine and return what the first one returns.

    :param work: an importable function; its processes find each other with :func:`join`.
    :param arguments: what it is called with; picklable.
    :raises UserError: when one of the processes raises it.
    :raises RuntimeError: when one was killed; the others are then ended too.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
        with _own_signals():
            returned = elastic_launch(config, _refusable)(work, arguments)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode >= 0:
            raise
        reason = f"process {rank} was killed ({first.signal_name()}): has the machine run out of memory?"
        raise RuntimeError(reason) from None
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
    problems = next((problems for problems, _ in returned.values() if problems), None)
    if problems:
        raise UserError(problems)
    return returned[0][1]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Undo what the launcher does to signals: it leaves handlers behind, and turns Ctrl-C into an error of its own."""
    from torch.distributed.elastic.multiprocessing import SignalException

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SignalException as failure:
        if failure.sigval == signal.SIGINT:
            raise KeyboardInterrupt from failure
        sys.exit(128 + failure.sigval)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _refusable(work: Callable[..., Any], arguments: dict[str, Any]) -> tuple[list[str], Any]:
    """Return the user's mistakes as a value: an exception would reach the launcher as text only."""
    try:
        return [], work(**arguments)
    except UserError as failure:
        return failure.problems, None
    except KeyboardInterrupt:
        os._exit(130)  # all is tidied up; an ordinary end would find threads of the process group still at work
