"""Batches of model inputs: texts of similar length, padded no further than they need; images decoded as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cart_hf.tasks import IMAGE, TaskData


@dataclass(frozen=True)
class Batch:
    """Some rows, ready for the model.

    :param rows: their numbers in the split.
    :param inputs: what the tokenizer or image processor returned.
    :param broken: rows whose image cannot be decoded, with the reason; a blank image stands in their place.
    """

    rows: list[int]
    inputs: Mapping[str, torch.Tensor]
    broken: Mapping[int, str]


def split_into_batches(data: TaskData, batch_size: int) -> list[list[int]]:
    """Return the rows of each batch, longest texts first: memory runs out at once or not at all.

    The batches do not depend on the number of processes, so neither do the results.
    """
    rows = range(len(data))
    if data.task.kind != IMAGE:
        lengths = [sum(map(len, texts)) for texts in zip(*data.texts(rows), strict=True)]
        rows = sorted(rows, key=lambda row: -lengths[row])  # type: ignore[assignment]
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def batches(data: TaskData, rows: Sequence[list[int]], preprocess: Any, *, workers: int = 0) -> Iterator[Batch]:
    """Yield the batches of these rows.

    :param preprocess: the model's tokenizer or image processor.
    :param workers: processes that prepare batches ahead; 0: none.
    """
    ahead = {"num_workers": workers, "prefetch_factor": 2} if workers else {}
    yield from DataLoader(_Batches(data, rows, preprocess), batch_size=None, **ahead)  # type: ignore[arg-type]


class _Batches(Dataset[Batch]):
    """One item is one whole batch."""

    def __init__(self, data: TaskData, rows: Sequence[list[int]], preprocess: Any) -> None:
        self._data, self._rows, self._preprocess = data, rows, preprocess

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Batch:
        prepare = _images if self._data.task.kind == IMAGE else _texts
        return prepare(self._data, self._rows[position], self._preprocess)


def _texts(data: TaskData, rows: list[int], tokenizer: Any) -> Batch:
    most = min(data.task.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    inputs = tokenizer(*data.texts(rows), truncation=True, max_length=most, padding=True, return_tensors="pt")
    return Batch(rows, dict(inputs), {})


def _images(data: TaskData, rows: list[int], processor: Any) -> Batch:
    from PIL import Image

    images, broken = [], {}
    for row in rows:
        try:
            images.append(data.image(row))
        except Exception as failure:  # each image format's decoder raises errors of its own
            broken[row] = " ".join(str(failure).split()) or type(failure).__name__
            images.append(Image.new("RGB", (32, 32)))
    return Batch(rows, dict(processor(images=images, return_tensors="pt")), broken)
