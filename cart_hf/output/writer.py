"""Weight files whose size and layout are known beforehand: any worker writes any tensor at its place."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from cart_hf.plan import PlannedTensor, Shard
from cart_hf.sources import element_size


class WeightWriter:
    """Writes the shards of a plan into ``folder``; use it as a context manager.

    :raises OSError: when the disk is full, before any work: the files are allocated whole.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._places = {name: (shard.filename, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._folder, self._shards = folder, shards
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> WeightWriter:
        with ExitStack() as stack:
            for shard in self._shards:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
                descriptor = os.open(self._folder / shard.filename, flags, 0o644)
                stack.callback(os.close, descriptor)
                _allocate(descriptor, shard.nbytes)
                self._descriptors[shard.filename] = descriptor
                self._write_at(descriptor, memoryview(shard.header), 0)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, tensor: PlannedTensor, start: int, values: torch.Tensor) -> None:
        """Write ``values`` (1-D, CPU, the output's type) from element ``start`` of ``tensor`` on."""
        filename, offset = self._places[tensor.name]
        data = memoryview(values.contiguous().view(torch.uint8).numpy().data)
        self._write_at(self._descriptors[filename], data, offset + start * element_size(tensor.dtype))

    def _write_at(self, descriptor: int, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            if hasattr(os, "pwrite"):
                done += os.pwrite(descriptor, data[done:], offset + done)
            else:  # Windows: the file position is shared
                with self._lock:
                    os.lseek(descriptor, offset + done, os.SEEK_SET)
                    done += os.write(descriptor, data[done:])


def _allocate(descriptor: int, nbytes: int) -> None:
    """Reserve the file's bytes, so that a full disk is found before the work and not after it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)
