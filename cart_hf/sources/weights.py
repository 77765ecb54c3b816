"""Weight files: headers first, then any slice of any tensor, read at its offset and never mapped."""

from __future__ import annotations

import json
import math
import os
import pickle
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cart_hf.errors import UserError
from cart_hf.sources.dtypes import DTYPES, dtype_name, element_size

if TYPE_CHECKING:
    from cart_hf.sources.download import RemoteFile

MAX_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor.

    :param dtype: safetensors' name of the type, such as ``F32``.
    :param shape: its shape.
    :param start: where its bytes start, counted from the end of the header (0 in pickles).
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.elements * element_size(self.dtype)

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return DTYPES[self.dtype].is_floating_point


class WeightFile(Protocol):
    """A file of named tensors whose header has been read."""

    tensors: dict[str, StoredTensor]
    remote: RemoteFile | None

    def fetch(self) -> Path:
        """Bring the file onto this machine, and return its path."""
        ...

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor as a new 1-D tensor of the stored type."""
        ...

    def read_into(self, out: torch.Tensor, key: str, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, CPU, any type) with the flattened tensor's elements from ``start`` on."""
        ...

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Have the system read elements ``start`` to ``stop`` into its cache, where it can; returns at once."""
        ...


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a checkpoint.

    :param key: its key in the file.
    :param slot: the architecture's slot it fills (several share one where transformers fuses experts).
    :param stored: its header entry.
    :param file: the file that holds it.
    """

    key: str
    slot: str
    stored: StoredTensor
    file: WeightFile


class SafetensorsFile:
    """A safetensors file, read by offset (a memory map would count every page read as ours).

    :param label: what to call it in messages.
    :param tensors: its header, see :func:`parse_header`.
    :param locate: returns the local path, downloading the file first when it must.
    :param remote: the file on the Hub, when it is still to be downloaded.
    """

    def __init__(
        self,
        label: str,
        tensors: dict[str, StoredTensor],
        locate: Callable[[], Path],
        remote: RemoteFile | None = None,
    ) -> None:
        self.tensors, self.remote = tensors, remote
        self._label, self._locate = label, locate
        self._descriptor: int | None = None
        self._data_start = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read the header of a local file.

        :raises UserError: when the file is not valid safetensors or is shorter than its header says.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise UserError(f"{path} is not a safetensors file, or is truncated; download it again")
            raw = file.read(length)
        try:
            header = json.loads(raw)
        except ValueError as failure:
            raise UserError(f"{path}: the safetensors header is damaged ({failure}); download it again") from failure
        tensors = parse_header(str(path), header)
        missing = max((t.start + t.nbytes for t in tensors.values()), default=0) - (size - 8 - length)
        if missing > 0:
            raise UserError(f"{path} is truncated: {missing} bytes are missing; download it again")
        return cls(str(path), tensors, lambda: path)

    def fetch(self) -> Path:
        """Bring the file onto this machine, and return its path."""
        return self._locate()

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor as a new 1-D tensor of the stored type."""
        out = torch.empty(stop - start, dtype=DTYPES[self.tensors[key].dtype])
        self.read_into(out, key, start)
        return out

    def read_into(self, out: torch.Tensor, key: str, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, CPU, any type) with the flattened tensor's elements from ``start`` on."""
        stored = self.tensors[key]
        if out.dtype != DTYPES[stored.dtype]:
            out.copy_(self.read(key, start, start + len(out)))
            return
        view = memoryview(out.view(torch.uint8).numpy().data)
        offset = stored.start + start * element_size(stored.dtype)
        done = 0
        while done < len(view):
            count = self._read_at(view[done:], offset + done)
            if count == 0:
                raise UserError(f"{self._label} ends inside tensor '{key}': it was changed or truncated meanwhile")
            done += count

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Have the system read elements ``start`` to ``stop`` into its cache, where it can; returns at once."""
        if hasattr(os, "posix_fadvise"):
            stored = self.tensors[key]
            size = element_size(stored.dtype)
            with self._lock:
                descriptor = self._open()
            offset = self._data_start + stored.start + start * size
            os.posix_fadvise(descriptor, offset, (stop - start) * size, os.POSIX_FADV_WILLNEED)

    def _read_at(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` (counted from the first tensor byte) and return how much was read."""
        with self._lock:
            descriptor = self._open()
            if not hasattr(os, "preadv"):  # Windows: the file position is shared, so keep the lock
                os.lseek(descriptor, self._data_start + offset, os.SEEK_SET)
                chunk = os.read(descriptor, len(view))
                view[: len(chunk)] = chunk
                return len(chunk)
        return os.preadv(descriptor, [view], self._data_start + offset)

    def _open(self) -> int:
        """Return the file's descriptor, opened the first time; call it with the lock held."""
        if self._descriptor is None:
            self._descriptor = os.open(self._locate(), os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._data_start = 8 + int.from_bytes(os.read(self._descriptor, 8), "little")
        return self._descriptor

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]


class PickleFile:
    """A PyTorch pickle (``pytorch_model.bin``), read by torch's restricted unpickler only.

    :raises UserError: when it holds anything but a mapping from names to tensors.
    """

    remote: RemoteFile | None = None  # to know its tensors is to have it

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = _load_pickle(path)
        self.tensors = {key: StoredTensor(dtype_name(t.dtype), tuple(t.shape)) for key, t in self._state.items()}

    def fetch(self) -> Path:
        """Return the file's path: a pickle's header cannot be read without the file."""
        return self._path

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor as a new 1-D tensor of the stored type."""
        return self._state[key].reshape(-1)[start:stop].clone()

    def read_into(self, out: torch.Tensor, key: str, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, CPU, any type) with the flattened tensor's elements from ``start`` on."""
        out.copy_(self._state[key].reshape(-1)[start : start + len(out)])

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Do nothing: torch maps the file, or has read it."""


def parse_header(label: str, header: Any) -> dict[str, StoredTensor]:
    """Turn a safetensors header into :class:`StoredTensor`, checking that types, shapes and offsets agree.

    :raises UserError: naming the file and the tensor that is wrong.
    """
    if not isinstance(header, Mapping):
        raise UserError(f"{label}: the safetensors header is damaged; download the file again")
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = str(entry["dtype"]), tuple(map(int, entry["shape"])), entry["data_offsets"]
            if not (isinstance(start, int) and isinstance(stop, int)):
                raise TypeError("offsets are numbers")
        except (KeyError, TypeError, ValueError) as failure:
            raise UserError(f"{label}: the header of tensor '{key}' is damaged; download the file again") from failure
        if dtype not in DTYPES:
            raise UserError(f"{label}: tensor '{key}' has type {dtype}; cart-hf reads {', '.join(DTYPES)}")
        stored = StoredTensor(dtype, shape, start)
        if start < 0 or min(shape, default=0) < 0 or stop - start != stored.nbytes:
            raise UserError(f"{label}: tensor '{key}' has offsets that do not fit its shape; download the file again")
        tensors[key] = stored
    return tensors


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    advice = (
        "cart-hf reads pickles with weights_only=True and nothing else; where you trust the file, load the model and "
        "save it as safetensors (save_pretrained)"
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is said below
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as failure:
                if "mmap" not in str(failure):
                    raise
                state = torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a pickle of plain tensors; {advice}") from None
    except Exception:  # torch raises RuntimeError, EOFError, KeyError, ... for a damaged file
        raise UserError(f"{path} is damaged, or no PyTorch file; download it again") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a mapping of names to tensors; {advice}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {key!r} is not a tensor with a name; {advice}")
        if value.dtype not in DTYPES.values() or value.layout != torch.strided or value.is_meta:
            kind = f"{value.layout}, {value.dtype}".replace("torch.", "")
            raise UserError(f"{path}: tensor '{key}' is {kind}; cart-hf reads dense tensors of {', '.join(DTYPES)}")
    return dict(state)
