"""How `cart-hf compress` makes adapters: the recipe's `compress:` key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from cart_hf.recipe.sizes import parse_size

RANKS = ("rank_ratio", "rank", "energy")

Restore = Literal["small", "all", "none"]
AdapterType = Literal["float32", "bfloat16", "float16"]
Solver = Literal["fast", "exact"]
Centre = Literal["average", "base"]


class Compression(BaseModel):
    """What an adapter keeps of a fine-tuned model.

    :param rank_ratio, rank, energy: the directions kept of each matrix, as for the method ``cart``; or
    :param budget: the size of each adapter, such as ``20MB``: the directions are then chosen that reduce the error
        most. None of them: what the recipe's own parameters say.
    :param restore: which tensors besides the matrices are kept exactly: ``small`` (norms and biases), ``all``
        (embeddings too), or ``none`` (an adapter that mixed batches can use).
    :param dtype: type of the factors; what is restored keeps its own.
    :param centre: what the adapters are added to: the ``average`` of the models, which is written, or the ``base``.
        A single model's is always for the base.
    :param solver: how the directions are found, as for ``cart``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank_ratio: Any = None
    rank: Any = None
    energy: Any = None
    budget: str | None = None
    restore: Restore = "small"
    dtype: AdapterType = "float32"
    centre: Centre = "average"
    solver: Solver | None = None

    @field_validator("budget")
    @classmethod
    def _readable_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Compression:
        given = [name for name in (*RANKS, "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """What of it are parameters of ``cart``."""
        return {name: getattr(self, name) for name in (*RANKS, "solver") if getattr(self, name) is not None}

    @property
    def decides_ranks(self) -> bool:
        """Whether it says which directions are kept, and not the recipe's own parameters."""
        return any(getattr(self, name) is not None for name in (*RANKS, "budget"))

    def changed(self, given: Mapping[str, Any]) -> Compression:
        """Return it with other settings; one that decides the ranks takes the place of all of them.

        :raises ValidationError: when one is wrong.
        """
        kept = self.model_dump(exclude_none=True)
        if any(name in given for name in (*RANKS, "budget")):
            kept = {name: value for name, value in kept.items() if name not in (*RANKS, "budget")}
        return Compression.model_validate({**kept, **given})

    @property
    def budget_bytes(self) -> int | None:
        """The size of each adapter, if that is what is given."""
        return None if self.budget is None else parse_size(self.budget)
