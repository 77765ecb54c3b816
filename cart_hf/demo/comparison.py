"""Comparing merge methods fairly: settings are chosen on the validation split and scored on the test split."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cart_hf.api import merge
from cart_hf.multitask import MultiTaskModel

Scores = dict[str, float]
"""Accuracy in percent, by task."""

Batches = Sequence[tuple[Mapping[str, torch.Tensor], torch.Tensor]]
"""Model inputs and labels of shape (batch,)."""

Grid = Mapping[str, Sequence[Any]]
"""For each parameter of a method the values to try."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :param name: what was measured: ``pretrained``, ``individual`` or a method.
    :param settings: the parameters chosen on the validation split.
    :param scores: test accuracy by task.
    """

    name: str
    settings: Mapping[str, Any]
    scores: Scores

    @property
    def average(self) -> float:
        """Mean accuracy over tasks."""
        return sum(self.scores.values()) / len(self.scores)

    def normalised(self, individual: Row) -> float:
        """Mean over tasks of this accuracy over the individual model's, in percent."""
        return 100 * sum(self.scores[t] / individual.scores[t] for t in self.scores) / len(self.scores)


def compare(
    base: str,
    models: Mapping[str, str],
    validation: Mapping[str, Batches],
    test: Mapping[str, Batches],
    work: Path,
    *,
    grids: Mapping[str, Grid],
    keep: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda step, advance, total: None,
    **options: Any,
) -> Iterator[Row]:
    """Yield a row for the pretrained model, the individual ones, and each method of ``grids``.

    :param base: folder of the pretrained model.
    :param models: folder of each task's fine-tuned model.
    :param validation, test: each task's batches.
    :param work: folder for the merges that are tried; they are removed again.
    :param grids: the methods, and the settings to try for each.
    :param keep: where the best CART merge stays.
    :param options: passed on to :func:`cart_hf.merge`.
    """
    named = [f"{task}={folder}" for task, folder in models.items()]

    def attempt(
        method: str, settings: Mapping[str, Any], data: Mapping[str, Batches], stays: Path | None = None
    ) -> Scores:
        output = stays or work / "attempt"
        merge(base=base, models=named, output=output, method=method, overwrite=True, **settings, **options)
        scores = accuracy(MultiTaskModel.from_pretrained(output), data)
        if stays is None:
            shutil.rmtree(output)
        return scores

    # the base's encoder under each task's head: a task vector of length zero
    yield Row("pretrained", {}, attempt("task_arithmetic", {"scale": 0.0}, test))
    alone = {task: individual_accuracy(folder, test[task]) for task, folder in models.items()}
    yield Row("individual", {}, alone)
    for method, grid in grids.items():
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        best, most = points[0], -1.0
        for settings in points if len(points) > 1 else []:
            scores = attempt(method, settings, validation)
            average = sum(scores.values()) / len(scores)
            if average > most:
                best, most = settings, average
            progress(f"merging: {method}", 1, len(points))
        yield Row(method, best, attempt(method, best, test, keep if method == "cart" else None))


def accuracy(model: MultiTaskModel, data: Mapping[str, Batches]) -> Scores:
    """Return each task's accuracy in percent; a task's data is run through its own head only."""

    def logits_of(task: str) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
        return lambda inputs: model(tasks=[task], **inputs)[task].logits

    return {task: _percent_right(logits_of(task), batches) for task, batches in data.items()}


def individual_accuracy(folder: str, batches: Batches) -> float:
    """Return the accuracy in percent of one fine-tuned model by itself."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return _percent_right(lambda inputs: model(**inputs).logits, batches)


@torch.inference_mode()
def _percent_right(logits: Callable[[Mapping[str, torch.Tensor]], torch.Tensor], batches: Batches) -> float:
    right = sum(int((logits(inputs).argmax(-1) == labels).sum()) for inputs, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def encode(
    tokenizer: Any, texts: Sequence[Any], labels: Sequence[int], *, max_length: int, batch_size: int = 64
) -> Batches:
    """Tokenise texts (or pairs of texts) into batches of similar length.

    :param texts: sentences, or (first, second) pairs.
    """
    pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    batches = []
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        columns = [list(column) for column in zip(*(pairs[i] for i in part), strict=True)]
        inputs = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        batches.append((dict(inputs), torch.tensor([labels[i] for i in part])))
    return batches


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings for people: ``rank_ratio 0.08, scale 1.5``."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def edges(row: Row, grid: Grid) -> list[str]:
    """Return the parameters whose chosen value lies on the edge of its grid: a wider grid may do better."""
    return [
        name
        for name, values in grid.items()
        if len(values) > 1 and row.settings.get(name) in (min(values), max(values))
    ]
