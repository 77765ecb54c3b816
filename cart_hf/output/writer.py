"""Weight files whose size and layout are known beforehand: any worker writes any tensor at its place."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from xxhash import xxh3_64_intdigest as checksum_of

from cart_hf.merging.shares import Span
from cart_hf.output.journal import Journal
from cart_hf.plan import PlannedTensor, Shard
from cart_hf.sources import element_size


def allocate(folder: Path, shards: Sequence[Shard]) -> None:
    """Make the shards' files, headers written and the bytes of the tensors reserved.

    What they hold already stays, and anything else in ``folder`` goes: a merge that was killed at its end left it.

    :raises OSError: when the disk is full: found before the work, and not after it.
    """
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in {shard.filename for shard in shards}:
            path.unlink()
    for shard in shards:
        descriptor = _open(folder / shard.filename, os.O_CREAT)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, shard.nbytes)
            else:
                os.ftruncate(descriptor, shard.nbytes)
            os.write(descriptor, shard.header)
        finally:
            os.close(descriptor)


def missing_bytes(folder: Path, shards: Sequence[Shard]) -> int:
    """Return how many bytes the shards need beyond those that files in ``folder`` hold already."""
    held = [path.stat().st_size for path in (folder / shard.filename for shard in shards) if path.exists()]
    return max(0, sum(shard.nbytes for shard in shards) - sum(held))


class WeightWriter:
    """Writes into files that :func:`allocate` made; use it as a context manager.

    :param folder: where they are.
    :param shards: what they are to hold.
    :param journal: told of all that has been written.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], journal: Journal) -> None:
        self._places = {name: (shard.filename, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._folder, self._journal = folder, journal
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> WeightWriter:
        with ExitStack() as stack:
            for filename in {filename for filename, _ in self._places.values()}:
                self._descriptors[filename] = _open(self._folder / filename)
                stack.callback(os.close, self._descriptors[filename])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, tensor: PlannedTensor, start: int, values: torch.Tensor) -> None:
        """Write ``values`` (1-D, CPU, the output's type) from element ``start`` of ``tensor`` on."""
        data = memoryview(values.contiguous().view(torch.uint8).numpy().data)
        descriptor, offset = self._place(tensor, start)
        done = 0
        while done < len(data):
            done += self._write_at(descriptor, data[done:], offset + done)
        self._journal.add((tensor.name, start, start + len(values)), checksum_of(data))

    def holds(self, span: Span, checksum: int) -> bool:
        """Whether the files hold what was written to ``span``, by its checksum."""
        name, start, stop = span
        tensor = self._tensors.get(name)
        if tensor is None or not 0 <= start <= stop <= tensor.elements:
            return False
        descriptor, offset = self._place(tensor, start)
        return checksum_of(self._read_at(descriptor, (stop - start) * element_size(tensor.dtype), offset)) == checksum

    def _place(self, tensor: PlannedTensor, start: int) -> tuple[int, int]:
        filename, offset = self._places[tensor.name]
        return self._descriptors[filename], offset + start * element_size(tensor.dtype)

    def _write_at(self, descriptor: int, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(descriptor, data, offset)
        with self._lock:  # Windows: the file position is shared
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)

    def _read_at(self, descriptor: int, count: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(descriptor, count, offset)
        with self._lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, count)


def _open(path: Path, more: int = 0) -> int:
    return os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | more, 0o644)
