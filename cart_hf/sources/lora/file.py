"""The weights of a base with a LoRA adapter on it, as one file that is not there: computed slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cart_hf.errors import UserError
from cart_hf.sources.dtypes import DTYPES
from cart_hf.sources.lora.tensors import Change
from cart_hf.sources.weights import StoredTensor, WeightFile

if TYPE_CHECKING:
    from cart_hf.sources.download import RemoteFile

Factors = tuple[torch.Tensor, torch.Tensor]

_KEPT = 8  # modules whose factors stay in memory: several threads work at several tensors


@dataclass(frozen=True)
class Part:
    """A tensor of an adapted model.

    :param stored: what its header entry would be.
    :param file, key: what it is read from: the base's file, or the adapter's where that replaces it.
    :param change: what the adapter does to it; None for a tensor of the base.
    :param transposed: whether what is added is the transpose of B A: the weight of a Conv1D, or an embedding's.
    """

    stored: StoredTensor
    file: WeightFile
    key: str
    change: Change | None = None
    transposed: bool = False

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a tensor of the base, plus factors."""
        return self.change is not None and self.change.replaced is None and self.change.a is not None

    @property
    def done(self) -> list[Any]:
        """What is done to the numbers that are read, for telling one result from another."""
        return [] if self.change is None else [*self.change.keys, self.change.scaling, self.transposed]


class AdaptedFile:
    """Tensors of a base model, some of them adapted: ``W + scaling * B A``, in float32 (float64 where asked for it).

    :param label: what to call the adapter in messages.
    :param adapter: its file.
    :param parts: the tensors.
    """

    remote: RemoteFile | None = None  # the real files are downloaded, not this one

    def __init__(self, label: str, adapter: WeightFile, parts: Mapping[str, Part]) -> None:
        self.adapter = adapter
        self._label = label
        self.parts = dict(parts)
        self.tensors = {key: part.stored for key, part in parts.items()}
        self._factors = lru_cache(maxsize=_KEPT)(self._read_factors)

    def fetch(self) -> Path:
        """Bring the adapter's file onto this machine, and return its path; the base's file is the base's business."""
        return self.adapter.fetch()

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return elements ``start`` to ``stop`` of the flattened tensor as a new 1-D tensor of the base's type."""
        out = torch.empty(stop - start, dtype=DTYPES[self.tensors[key].dtype])
        self.read_into(out, key, start)
        return out

    def read_into(self, out: torch.Tensor, key: str, start: int) -> None:
        """Fill ``out`` (1-D, contiguous, CPU, any type) with the flattened tensor's elements from ``start`` on.

        They are rounded to the type of ``out`` only, which may be wider than the base's.
        """
        part = self.parts[key]
        change = part.change
        if change is None or (change.a is None and change.added is None):
            part.file.read_into(out, part.key, start)
            return
        wide = out if out.dtype in (torch.float32, torch.float64) else torch.empty(len(out))
        part.file.read_into(wide, part.key, start)
        if change.added is not None:
            added = self.adapter.read(change.added, start, start + len(out))
            wide.add_(added.to(wide.dtype), alpha=change.scaling)
        else:
            _add(wide, start, *self._factors(key, wide.dtype))
        if wide is not out:
            out.copy_(wide)

    def will_need(self, key: str, start: int, stop: int) -> None:
        """Have the system read elements ``start`` to ``stop`` into its cache, where it can; returns at once."""
        part = self.parts[key]
        part.file.will_need(part.key, start, stop)

    def factors(self, key: str) -> Factors | None:
        """Return what is added to the base's matrix, as factors, or None when the tensor is not base + low rank.

        :return: shapes (m, r), scaling included, and (r, n), float32; m and n are the sides of the stored tensor (its
            rows, and all that a row holds). Not to be written to.
        :raises UserError: when the adapter's file holds NaN or Inf.
        """
        return self._factors(key, torch.float32) if self.parts[key].is_low_rank else None

    def _read_factors(self, key: str, dtype: torch.dtype) -> Factors:
        part = self.parts[key]
        assert part.change is not None and part.change.a is not None and part.change.b is not None
        a, b = (self._whole(name).flatten(1).to(dtype) for name in (part.change.a, part.change.b))
        b = b * part.change.scaling
        return (a.T.contiguous(), b.T.contiguous()) if part.transposed else (b, a)

    def _whole(self, key: str) -> torch.Tensor:
        stored = self.adapter.tensors[key]
        values = self.adapter.read(key, 0, stored.elements).view(stored.shape)
        if not bool(torch.isfinite(values).all()):
            kind = "NaN" if bool(torch.isnan(values).any()) else "Inf"
            raise UserError(
                f"{self._label}: tensor '{key}' holds {kind}: the adapter is broken; save or download it again, or "
                "leave it out"
            )
        return values


def _add(values: torch.Tensor, start: int, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add elements of the flattened ``left @ right`` to ``values``, from element ``start`` on."""
    for first, last, begin, end in _rows(start, start + len(values), right.shape[1]):
        position = first * right.shape[1] + begin - start
        rows = values[position : position + (last - first) * (end - begin)].view(last - first, end - begin)
        rows.addmm_(left[first:last], right[:, begin:end])


def _rows(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Divide a span of elements into blocks of whole rows, and a part of a row before and after them.

    :return: first and last row, first and last column.
    """
    while start < stop:
        row, column = divmod(start, width)
        whole = (stop - start) // width if column == 0 else 0
        end = width if whole else min(width, column + stop - start)
        yield row, row + max(whole, 1), column, end
        start += max(whole, 1) * (end - column)
