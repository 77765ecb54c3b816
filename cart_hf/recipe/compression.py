"""What `cart-hf compress` makes of fine-tuned models: the recipe's `compress:` key."""

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
Form = Literal["cart", "tsv_c", "emr"]

_OF_ADAPTERS = (*RANKS, "budget", "restore", "dtype", "centre", "solver")


class Compression(BaseModel):
    """What is kept of each fine-tuned model.

    :param form: ``cart`` (CART-Indexing: adapters of the models' average), ``tsv_c`` (adapters of the base, which is
        written with every task's head; each gets the same share of a matrix's directions, 1/T), or ``emr``
        (EMR-Merging: one task vector for all, and a bit for each weight and task). The others are about adapters.
    :param rank_ratio, rank, energy: the directions kept of each matrix, as for the method ``cart``; or
    :param budget: the size of each adapter, such as ``20MB``: the directions are then chosen that reduce the error
        most. None of them: what the recipe's own parameters say, or 1/T for ``tsv_c``.
    :param restore: which tensors besides the matrices are kept exactly: ``small`` (norms and biases), ``all``
        (embeddings too), or ``none`` (an adapter that mixed batches can use); default: ``small``, with ``tsv_c`` all.
    :param dtype: type of the factors; what is restored keeps its own.
    :param centre: what the adapters are added to: the ``average`` of the models, which is written, or the ``base``.
        A single model's is always for the base, and so are those of ``tsv_c``.
    :param solver: how the directions are found, as for ``cart``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form = "cart"
    rank_ratio: Any = None
    rank: Any = None
    energy: Any = None
    budget: str | None = None
    restore: Restore | None = None
    dtype: AdapterType = "float32"
    centre: Centre | None = None
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

    @model_validator(mode="after")
    def _fits_the_form(self) -> Compression:
        if self.form == "tsv_c" and self.centre == "average":
            raise ValueError("centre: the adapters of tsv_c are of the base, not of the average; leave it out")
        given = [name for name in _OF_ADAPTERS if getattr(self, name) != type(self).model_fields[name].default]
        if self.form == "emr" and given:
            raise ValueError(f"{given[0]}: emr makes masks, and no adapters that it could be about; leave it out")
        return self

    @property
    def restored(self) -> Restore:
        """Which tensors besides the matrices are kept exactly."""
        return self.restore or ("all" if self.form == "tsv_c" else "small")

    @property
    def around(self) -> Centre:
        """What it is that the models are kept as differences from."""
        return self.centre or ("average" if self.form == "cart" else "base")

    @property
    def parameters(self) -> dict[str, Any]:
        """What of it are parameters of ``cart``."""
        return {name: getattr(self, name) for name in (*RANKS, "solver") if getattr(self, name) is not None}

    @property
    def decides_ranks(self) -> bool:
        """Whether it says which directions are kept, and not the recipe's own parameters."""
        return any(getattr(self, name) is not None for name in (*RANKS, "budget"))

    def changed(self, given: Mapping[str, Any]) -> Compression:
        """Return it with other settings; one that decides the ranks takes the place of all of them, a form of it all.

        :raises ValidationError: when one is wrong.
        """
        kept = self.model_dump(exclude_none=True) if given.get("form", self.form) == self.form else {}
        if any(name in given for name in (*RANKS, "budget")):
            kept = {name: value for name, value in kept.items() if name not in (*RANKS, "budget")}
        return Compression.model_validate({**kept, **given})

    @property
    def budget_bytes(self) -> int | None:
        """The size of each adapter, if that is what is given."""
        return None if self.budget is None else parse_size(self.budget)
