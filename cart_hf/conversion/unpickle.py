"""A restricted unpickler: tensors become descriptions, known classes become inert shells, all else is refused.

Nothing that a pickle names is imported or called. What a pickle program can get hold of are the objects made here, and
none of them does anything: shells keep a state, descriptions and builders cannot be changed.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch

from cart_hf.errors import UserError

STORAGES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Modules that open_clip's models, and the training code of the papers, pickle classes and functions of.
SHELL_MODULES = ("torch.nn", "torchvision.transforms", "open_clip", "clip", "timm", "src", "modeling", "__main__")
# Single names that occur among such models' attributes; their values are of no interest.
SHELL_NAMES = {
    "argparse.Namespace",
    "functools.partial",
    "torch.Size",
    "torch.device",
    "torch._C._nn.gelu",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
} | {str(dtype) for dtype in STORAGES.values()}


class Storage(NamedTuple):
    """A run of elements in the file.

    :param key: its name in the file.
    :param dtype: the elements' type.
    :param elements: how many there are.
    """

    key: str
    dtype: torch.dtype
    elements: int


class PickledTensor(NamedTuple):
    """A tensor as a pickle describes it: a view of a storage, which lies within it.

    :param storage: where its elements are.
    :param offset: its first element.
    :param shape: its shape.
    :param stride: its strides, in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Shell:
    """Stands in for an object, a class or a function that a pickle names: it keeps the state it is given."""

    path = ""
    state: Mapping[Any, Any] = {}

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Mapping(dict[Any, Any]):
    """An OrderedDict without the attributes (a state dict's ``_metadata``) that a pickle would set on it."""

    def __setstate__(self, state: object) -> None: ...


class _Builder:
    """A function that a pickle may call, and may not change."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., object]) -> None:
        self._build = build

    def __call__(self, *args: object) -> object:
        return self._build(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function's state is not set")


class _StorageType(NamedTuple):
    dtype: torch.dtype


def _tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> PickledTensor:
    """Describe the tensor that ``torch._utils._rebuild_tensor_v2`` would build.

    :raises ValueError: when it does not lie within its storage.
    """
    if not isinstance(storage, Storage) or not isinstance(offset, int) or offset < 0:
        raise ValueError("a tensor without a storage")
    sizes, steps = _numbers(shape), _numbers(stride)
    if len(sizes) != len(steps):
        raise ValueError("a tensor whose shape and strides differ in length")
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and (last >= storage.elements or math.prod(sizes) > storage.elements):
        raise ValueError("a tensor that is larger than its storage")
    return PickledTensor(storage, offset, sizes, steps)


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(isinstance(v, int) and v >= 0 for v in values):
        raise ValueError("a shape or stride that is none")
    return values


def _parameter(tensor: object, *_: object) -> object:
    return tensor


_BUILDERS: dict[str, object] = {
    "collections.OrderedDict": _Mapping,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch._utils._rebuild_tensor": _Builder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Builder(_tensor),
    "torch._utils._rebuild_parameter": _Builder(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Builder(_parameter),
} | {path: _StorageType(dtype) for path, dtype in STORAGES.items()}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads one pickle of a file that ``torch.save`` wrote.

    :param file: where the pickle starts.
    :param label: the file's name, for messages.
    """

    def __init__(self, file: BinaryIO, label: str) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}
        self._file, self._label = file, label
        self._shells: dict[str, type[Shell]] = {}

    def load(self) -> Any:
        """Read the pickle, and leave the file behind it.

        :raises ValueError: when it is damaged; much else is raised for the same reason.
        """
        start = self._file.tell()
        for operation, argument, position in pickletools.genops(self._file):
            # a writer numbers what it remembers; room for a number of four bytes would take all memory
            if operation.name.endswith("PUT") and isinstance(argument, int) and argument > (position or 0):
                raise ValueError("it remembers more than it holds")
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name of the pickle; nothing is imported.

        :raises UserError: for a name that no open_clip checkpoint needs.
        """
        path = f"{module}.{name}"
        if path in _BUILDERS:
            return _BUILDERS[path]
        if path not in SHELL_NAMES and not any(module == m or module.startswith(f"{m}.") for m in SHELL_MODULES):
            raise UserError(
                f"{self._label} wants to use {path[:200]!r}, which is neither a tensor nor a part of an open_clip "
                "model: refused, nothing of it was run; where you trust the file, load it with the code that wrote it "
                "and save its state_dict() with torch.save"
            )
        if path not in self._shells:
            self._shells[path] = type("Shell", (Shell,), {"path": path})
        return self._shells[path]

    def persistent_load(self, pid: Any) -> Any:
        """Describe a storage; the zip format names it with five values, the one before with six.

        :raises ValueError: for anything else.
        """
        if not isinstance(pid, tuple) or not pid:
            raise ValueError("an unknown reference")
        if pid[0] == "module" and len(pid) == 4:  # the older format's way to keep a class with its source code
            return pid[1]
        kind, storage_type, key, _, elements, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(v is not None for v in view):
            raise ValueError("an unknown reference")
        if not isinstance(key, str) or not isinstance(elements, int):
            raise ValueError("a storage without a name or a size")
        return self.storages.setdefault(key, Storage(key, storage_type.dtype, elements))
