"""Downloading what several models need: room checked before the first byte, then a few files at a time.

A merge reads the same tensor of all models at once, so it cannot begin before the last of them is here; what helps is
to download them side by side.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, TypeVar

from cart_hf.errors import UserError
from cart_hf.sources.download import Incoming, RemoteFile, Report, StoppedError, ask, bytes_to_come, cached, receive

if TYPE_CHECKING:
    from cart_hf.parallel import Progress

Result = TypeVar("Result")

CONNECTIONS = 8  # files at a time, as the client's own snapshot_download


def download_all(
    files: Iterable[RemoteFile], progress: Progress | None = None, *, beside: tuple[Path, int] | None = None
) -> None:
    """Bring files into the cache, those that are not there yet.

    :param progress: called with (step, advance, total); default: the client's own bar, see
        ``HF_HUB_DISABLE_PROGRESS_BARS``.
    :param beside: a path that will be written afterwards, and how many bytes: they need room too.
    :raises UserError: when there is no room, or a file cannot be had; what has arrived is kept for the next time.
    """
    missing = [file for file in dict.fromkeys(files) if cached(file) is None]
    if not missing:
        return
    stop = Event()

    def stopping(work: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return work(*arguments)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="download") as pool:
        try:
            incoming = _results([pool.submit(stopping, ask, file, stop) for file in missing])
            _check_room(incoming, beside)
            with _reporting(progress, sum(one.size for one in incoming)) as report:
                ours = [pool.submit(stopping, receive, one, report, stop) for one in incoming if not one.by_client]
                for one in incoming:
                    if one.by_client and not stop.is_set():  # here, where the user's Ctrl-C reaches the client
                        stopping(receive, one, report, stop)
                _results(ours)
        except BaseException:
            stop.set()
            raise


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    """Wait for all, and return their results.

    :raises Exception: what one of them raised, rather than that another was stopped for it.
    """
    wait(futures)
    failures = [future.exception() for future in futures]
    for failure in failures:
        if failure is not None and not isinstance(failure, StoppedError):
            raise failure
    return [future.result() for future in futures]


@contextmanager
def _reporting(progress: Progress | None, total: int) -> Iterator[Report]:
    """Yield a function that takes advances from several threads."""
    from huggingface_hub.utils import tqdm

    lock = Lock()
    if progress is not None:

        def report(count: int) -> None:
            with lock:
                progress("downloading", count, total)

        yield report
        return
    # silent where HF_HUB_DISABLE_PROGRESS_BARS says so, or where stderr is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="downloading", disable=None) as bar:

        def update(count: int) -> None:
            with lock:
                bar.update(count)

        yield update


def _check_room(incoming: Sequence[Incoming], beside: tuple[Path, int] | None) -> None:
    """Refuse when a disk cannot hold what is to be written to it.

    :raises UserError: with what is needed and what is free.
    """
    from huggingface_hub import constants

    contents = {(one.file.reference.path, one.sha256 or one.file.path): one for one in incoming}
    cache = _existing(Path(constants.HF_HUB_CACHE))
    need, what = sum(map(bytes_to_come, contents.values())), "the downloads need"
    if beside is not None and os.stat(_existing(beside[0])).st_dev == cache.stat().st_dev:  # noqa: PTH116
        need, what = need + beside[1], "the downloads and the output need"
    free = shutil.disk_usage(cache).free
    if need > free:
        raise UserError(
            f"{what} {need / 1e9:.2f} GB, the disk of {constants.HF_HUB_CACHE} has {free / 1e9:.2f} GB free; make room "
            "(hf cache prune), or set HF_HOME to a folder on another disk"
        )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
