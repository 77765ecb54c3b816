"""Where tensors stand in the model: in its order, and in which block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cart_hf.figures.blocks import blocks_of
from cart_hf.plan import Plan
from cart_hf.plan.align import reference_architecture


class Place(NamedTuple):
    """Where a tensor stands.

    :param path: the list of its block, such as ``encoder.layer``; of others the outermost module without blocks.
    :param block: the block's number; None outside the blocks.
    :param part: what the tensor is called there, without ``.weight``.
    """

    path: str
    block: int | None
    part: str

    @property
    def label(self) -> str:
        """What the block is called."""
        return self.path if self.block is None else f"{self.path}.{self.block}"


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Return where tensors stand, by name."""
    found = {}
    for block in blocks_of(names):
        for name, inner in zip(names[block.start : block.end], block.names, strict=True):
            # outside the layers a block's own name lacks what lies above it, which two towers share
            path = block.path if block.number is not None else name.removesuffix(f".{inner}" if inner else "")
            found[name] = Place(path, block.number, inner.removesuffix(".weight"))
    return found


def in_model_order(plan: Plan, names: Iterable[str]) -> list[str]:
    """Sort names of tensors (and fused groups) as the model's class has them: files have them in another order.

    What the class has no tensor for, such as one expert of a mixture, comes after what has most of its name.
    """
    last: dict[str, int] = {}
    for place, slot in enumerate(reference_architecture(plan.base, plan.models).slots):
        parts = slot.split(".")
        last |= {".".join(parts[:length]): place for length in range(1, len(parts) + 1)}

    def key(name: str) -> int:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((last[prefix] for prefix in prefixes if prefix in last), len(last))

    return sorted(names, key=key)
