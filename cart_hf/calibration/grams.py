"""Gram matrices of what reaches the Linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch

from cart_hf.calibration.reading import first_argument, opened, real_places, real_tokens
from cart_hf.evaluation.batches import Batch, batches, split_into_batches
from cart_hf.evaluation.heads import check_modality
from cart_hf.evaluation.prediction import on_device
from cart_hf.sources import Checkpoint
from cart_hf.tasks import TaskData


def gram_matrices(
    checkpoint: Checkpoint,
    data: TaskData,
    *,
    base: str | None,
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Let a model read examples, and return ``X^T X / n`` of the n vectors X that reach each of its Linear layers.

    Padding is left out, and so are images that cannot be decoded. Memory: the model, a Gram matrix for each set of
    layers that read the same vectors (query, key and value), and the activations of one batch.

    :param base: lends its tokenizer or image processor to a model without.
    :param advance: called with the number of examples after each batch.
    :return: float32, shape (inputs, inputs), on the device, by the name of the layer's weight; one tensor where
        several layers read the same. A layer that nothing reaches is missing.
    """
    module, model = opened(checkpoint, base, device)
    check_modality(data.task, model)
    sums = _Sums()
    slots = checkpoint.architecture.slots
    for name, part in module.named_modules(remove_duplicate=False):
        slot = slots.get(f"{name}.weight")
        if slot is not None and slot.linear:
            part.register_forward_pre_hook(sums.hook(f"{name}.weight"), with_kwargs=True)
    with torch.no_grad():
        for batch in batches(data, split_into_batches(data, batch_size), model.preprocess):
            sums.start(batch)
            model.logits([], on_device(device, batch))
            sums.finish()
            advance(len(batch.rows))
    return sums.means()


class _Sums:
    """Sums over what layers are called with; layers called with one and the same tensor in a row share them."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._real = torch.empty(0)
        self._seen: tuple[torch.Tensor, int] | None = None  # a tensor, and its version: it may be written to
        self._product = torch.empty(0)
        self._count = 0
        self._names: list[str] = []

    def start(self, batch: Batch) -> None:
        """Say what is read next."""
        self._real = real_tokens(batch)

    def hook(self, name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """Return what is called before a layer."""

        def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_argument(args, kwargs)
            if self._seen is None or self._seen[0] is not x or self._seen[1] != x._version:
                self.finish()
                places = real_places(x, self._real)
                vectors = x.detach().reshape(-1, x.shape[-1])
                if len(places) < len(vectors):
                    vectors = vectors[places.to(x.device)]
                self._seen, self._product, self._count = (x, x._version), vectors.mT @ vectors, len(vectors)
            self._names.append(name)

        return look

    def finish(self) -> None:
        """Add up what the last layers were called with."""
        if self._seen is None:
            return
        names = tuple(self._names)
        if names in self._sums:
            self._sums[names].add_(self._product)
        else:
            self._sums[names] = self._product
        self._counts[names] = self._counts.get(names, 0) + self._count
        self._seen, self._names = None, []

    def means(self) -> dict[str, torch.Tensor]:
        """Return the sums over the numbers of vectors, by layer."""
        keys: dict[str, list[tuple[str, ...]]] = {}
        for names in self._sums:
            for name in names:  # twice, if it was called twice
                keys.setdefault(name, []).append(names)
        found: dict[tuple[tuple[str, ...], ...], torch.Tensor] = {}
        for of_one in sorted(map(tuple, keys.values()), key=lambda of_one: -len(of_one)):  # what is shared: the last
            count = sum(self._counts[names] for names in of_one)
            if count and of_one not in found:
                total = reduce(add, (self._sums[names] for names in of_one))
                found[of_one] = total.div_(count)
        return {name: found[tuple(of_one)] for name, of_one in keys.items() if tuple(of_one) in found}
