"""Merges that were killed: found beside their target, and continued."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from cart_hf.errors import UserError, telling
from cart_hf.output.folder import WorkFolder, work_folders
from cart_hf.output.journal import is_empty
from cart_hf.output.state import State, check_unchanged

_STATE_FILE, _LOCK_FILE = "state.json", "lock"


@contextmanager
def merge_folder(
    target: Path,
    state: State,
    *,
    overwrite: bool,
    resume: bool,
    is_empty: Callable[[Path], bool] = is_empty,
) -> Iterator[Path]:
    """Yield the folder that becomes ``target``; its parent is locked, and holds the journals of what was written.

    A new one, or with ``resume`` the one that a merge left which was killed. It stays when something was finished in it
    and the failure is not the user's. A success removes what others left.

    :param is_empty: whether nothing worth keeping was finished in a work folder; default: no tensor.
    :raises UserError: when what was left cannot be continued with these settings or sources.
    """

    def keep(failure: BaseException) -> bool:
        return not isinstance(failure, UserError) and work.path is not None and not is_empty(work.path)

    def tidy() -> None:  # when the lock is free: network file systems keep what is still open
        if work.path is not None:
            with suppress(OSError):
                work.path.rmdir()  # only if it is empty

    work = WorkFolder(target, overwrite=overwrite, keep=keep)
    with ExitStack() as stack:
        stack.callback(tidy)
        if resume:
            work.path = _take(target, state, stack)
        found = work.path is not None
        with work as output:
            if not found:
                with suppress(OSError):  # a file system without locks: nobody will dare to continue it
                    stack.enter_context(_lock(output.parent))
                with telling(cannot_write(target)):
                    _write_state(output.parent, state)
            yield output
        for left in unfinished(target):
            shutil.rmtree(left, ignore_errors=True)


def cannot_write(target: Path) -> str:
    """Return how a message starts that says why there is no output."""
    return f"cannot write the output {target}"


def unfinished(target: Path) -> list[Path]:
    """Return the work folders that dead merges to ``target`` left, the latest first; living ones are locked."""
    found = []
    for path in work_folders(target):
        state = _read_state(path)
        if state is not None and state.target == target.name:
            with suppress(OSError), _lock(path):  # or it lives
                found.append(((path / _STATE_FILE).stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def _take(target: Path, state: State, stack: ExitStack) -> Path | None:
    """Lock the latest work folder that a dead merge left, if there is one.

    :raises UserError: when it cannot be continued.
    """
    for path in unfinished(target):
        before = _read_state(path)
        with suppress(OSError):  # another one was faster
            stack.enter_context(_lock(path))
            if before is not None:
                check_unchanged(before, state)
                return path
    return None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of a work folder, which the system releases when its holder dies.

    :raises OSError: when a living merge holds it, the folder is gone, or its file system has no locks.
    """
    descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _write_state(path: Path, state: State) -> None:
    """Write the state in one go: a folder without one is nobody's to continue or remove."""
    draft = path / f"{_STATE_FILE}.new"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=2, default=str)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path / _STATE_FILE)


def _read_state(path: Path) -> State | None:
    try:
        return State(**json.loads((path / _STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None
