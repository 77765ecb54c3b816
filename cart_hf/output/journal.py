"""The journal of a merge: what each process has written, so that another merge can go on where it was killed.

A line is added after the bytes it speaks of, and no disk is waited for: after a loss of power some of them may be
missing. So a line holds their checksum, and whoever goes on reads them again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from cart_hf.merging.shares import Span

_PREFIX, _SUFFIX = "journal-", ".jsonl"


class Journal:
    """One process's journal, a new file in ``folder``; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1

    def __enter__(self) -> Journal:
        self._descriptor, _ = tempfile.mkstemp(_SUFFIX, _PREFIX, self._folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def add(self, span: Span, checksum: int) -> None:
        """Note that a span of a tensor was written; from any thread: the system appends a line in one go."""
        os.write(self._descriptor, json.dumps([*span, checksum]).encode() + b"\n")


def entries(folder: Path) -> Iterator[tuple[Span, int]]:
    """Yield the spans that the journals in ``folder`` speak of, and their checksums; what cannot be read is skipped."""
    for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
        for line in path.read_bytes().splitlines():
            try:
                name, start, stop, checksum = json.loads(line)
            except (TypeError, ValueError):  # cut off, or damaged
                continue
            if isinstance(name, str) and all(isinstance(number, int) for number in (start, stop, checksum)):
                yield (name, start, stop), checksum


def is_empty(folder: Path) -> bool:
    """Whether nothing was finished in ``folder``."""
    return next(entries(folder), None) is None
