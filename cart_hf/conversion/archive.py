"""Files that ``torch.save`` wrote, the zip format and the one before it: the pickle now, the numbers when asked for."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cart_hf.conversion.unpickle import PickledTensor, RestrictedUnpickler, Storage
from cart_hf.errors import UserError

LARGEST_PICKLE = 64 * 2**20  # a whole ViT-L/14 module takes a quarter of a megabyte
_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files before PyTorch 1.6 start


class Archive:
    """An open file of ``torch.save``; use it as a context manager.

    :param path: the file.
    :raises UserError: when it is damaged, no such file, or its pickle wants more than tensors and known classes.
    """

    root: Any
    """What was saved: mappings, tensors as :class:`PickledTensor`, objects as :class:`Shell`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path), ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            is_zip = file.read(len(_ZIP)) == _ZIP
            file.seek(0)
            if is_zip:
                self.root, sizes, read = _open_zip(stack.enter_context(zipfile.ZipFile(file)), str(path))
            else:
                self.root, sizes, read = _open_legacy(file, path.stat().st_size, str(path))
            self._sizes: Mapping[str, int] = sizes
            self._read = lru_cache(maxsize=4)(read)  # query, key and value are read from one storage
            self._stack = stack.pop_all()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, tensor: PickledTensor) -> None:
        """Refuse a tensor whose bytes the file does not hold.

        :raises UserError: then.
        """
        storage = tensor.storage
        if self._sizes.get(storage.key) != storage.elements * storage.dtype.itemsize:
            raise UserError(f"{self.path} is damaged: storage '{storage.key}' is missing or cut; download it again")

    def read(self, tensor: PickledTensor) -> torch.Tensor:
        """Return a tensor, as a view of its storage.

        :raises UserError: when the bytes are damaged.
        """
        with _explained(self.path):
            values: torch.Tensor = torch.frombuffer(self._read(tensor.storage), dtype=tensor.storage.dtype)
        return values.as_strided(tensor.shape, tensor.stride, tensor.offset)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises (nearly anything) into one message."""
    try:
        yield
    except UserError:
        raise
    except OSError as failure:
        raise UserError(f"{path} cannot be read: {failure.strerror or failure}") from failure
    except Exception as failure:
        reason = " ".join(str(failure).split())[:120] or type(failure).__name__
        raise UserError(f"{path} is damaged, or no file of torch.save ({reason}); download it again") from failure


_Opened = tuple[Any, Mapping[str, int], Callable[[Storage], bytearray]]


def _open_zip(archive: zipfile.ZipFile, label: str) -> _Opened:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("a zip archive without data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise UserError(
            f"{label} is a TorchScript program, which cart-hf does not run; load it with torch.jit.load where you "
            "trust it, and save its state_dict() with torch.save"
        )
    if f"{prefix}byteorder" in entries and archive.read(f"{prefix}byteorder") != b"little":
        raise UserError(f"{label} was written by a big-endian machine; save it again on another one")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise ValueError("it is compressed, and torch.save does not compress")
    if entries[pickles[0]].file_size > LARGEST_PICKLE:
        raise ValueError("its pickle is larger than any model's")
    root = RestrictedUnpickler(io.BytesIO(archive.read(pickles[0])), label).load()
    start = f"{prefix}data/"
    sizes = {name.removeprefix(start): info.file_size for name, info in entries.items() if name.startswith(start)}
    return root, sizes, lambda storage: bytearray(archive.read(start + storage.key))


def _open_legacy(file: io.BufferedReader, size: int, label: str) -> _Opened:
    """Read the pickles of the older format; the storages follow them, each after its number of elements."""
    if RestrictedUnpickler(file, label).load() != _MAGIC or RestrictedUnpickler(file, label).load() != _PROTOCOL:
        raise ValueError("a pickle, but not torch.save's")
    RestrictedUnpickler(file, label).load()  # the writing machine's sizes of int and long
    unpickler = RestrictedUnpickler(file, label)
    root = unpickler.load()
    keys = RestrictedUnpickler(file, label).load()
    places: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for key in keys:
        storage = unpickler.storages[key]
        elements = int.from_bytes(file.read(8), "little")
        nbytes = elements * storage.dtype.itemsize
        places[key], sizes[key] = file.tell(), nbytes
        if places[key] + nbytes > size:
            raise ValueError(f"it ends within storage '{key}'")
        file.seek(nbytes, io.SEEK_CUR)

    def read(storage: Storage) -> bytearray:
        file.seek(places[storage.key])
        return bytearray(file.read(sizes[storage.key]))

    return root, sizes, read
