"""What the adapters will be, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cart_hf.compression.adapter import header_bytes
from cart_hf.compression.outline import Outline
from cart_hf.recipe import Compression


@dataclass(frozen=True)
class Estimate:
    """What is known of an adapter beforehand.

    :param task: its task.
    :param class_name: the class it is made for.
    :param layers: how many layers it changes.
    :param ranks: the least and the most rank of a layer; None where the singular values decide.
    :param restored: how many modules it restores whole, besides the head.
    :param left_out: how many tensors stay the centre's.
    :param nbytes: its size, at most; None where nobody knows.
    :param model_bytes: the fine-tuned model's.
    :param wasteful: layers whose factors take more than the layer's weight itself.
    """

    task: str
    class_name: str
    layers: int
    ranks: tuple[int, int] | None
    restored: int
    left_out: int
    nbytes: int | None
    model_bytes: int
    wasteful: int


def estimates(outlines: Sequence[Outline], making: Compression) -> list[Estimate]:
    """Return what is known of each adapter beforehand."""
    return [_estimate(outline, making) for outline in outlines]


def _estimate(outline: Outline, making: Compression) -> Estimate:
    weights = [target.tensor for target in outline.targets]
    ranks = [] if making.budget else [weight.rank for weight in weights if weight.rank is not None]
    size = getattr(torch, making.dtype).itemsize
    nbytes = making.budget_bytes
    if len(ranks) == len(weights):
        factors = sum(rank * sum(weight.shape) for rank, weight in zip(ranks, weights, strict=True))
        nbytes = factors * size + outline.fixed_bytes + header_bytes(outline)
    return Estimate(
        task=outline.name,
        class_name=outline.class_name,
        layers=len(weights),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        restored=len(outline.saved) - len(outline.heads),
        left_out=len(outline.left_out),
        nbytes=nbytes,
        model_bytes=outline.model_bytes,
        wasteful=sum((weight.rank or 0) * sum(weight.shape) > weight.elements for weight in weights if ranks),
    )
