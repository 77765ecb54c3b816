"""Which methods a benchmark compares, and what each may choose from: the recipe's `benchmark:` key."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cart_hf.recipe.adaptation import Adaptation
from cart_hf.recipe.compression import RANKS, AdapterType, Compression, Form, Restore, Solver
from cart_hf.recipe.sizes import parse_size
from cart_hf.recipe.wrapping import Wrap, names_of, read_wrap

INDEXING = "CART-Indexing"
"""What people call one centre with an adapter for each task."""

FORMS = {"tsv_c": "TSV-C", "emr": "EMR-Merging"}
"""What people call the other forms that models are compressed to."""

ADAPTED = " + adaptation"
"""What the name of a row ends with whose coefficients are learnt."""

_DECIDES = (*RANKS, "budget")
_RANK_RATIOS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)


def usual_name(method: str, wrappers: Iterable[str], *, adapted: bool) -> str:
    """Return the name of a row from those of its method and its wrappers: ``cart + lines``, ``ties + adaptation``."""
    return " + ".join([method, *wrappers]) + (ADAPTED if adapted else "")


class Trial(BaseModel):
    """One row of the table: a method, and the settings it may choose from.

    :param method: a registered method.
    :param name: the row's name; default: the method's, with its wrappers (``cart + lines``), and ``cart + adaptation``
        where its coefficients are learnt.
    :param parameters: settings that stay.
    :param grid: for each further parameter the values to try, every combination of them; the best on the selection
        split is scored.
    :param wrap: what is done to the method's result.
    :param adapt: how the coefficients of the scored merge are learnt on unlabelled inputs, if they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    adapt: Adaptation | None = None
    wrap: Wrap = Field(default_factory=dict)

    @field_validator("wrap", mode="before")
    @classmethod
    def _read_wrap(cls, value: Any) -> Any:
        return read_wrap(value)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"method": data}
        if not isinstance(data, dict):
            return data
        usual = usual_name(str(data.get("method")), names_of(data.get("wrap")), adapted=data.get("adapt") is not None)
        return {**data, "name": data.get("name") or usual}

    @model_validator(mode="after")
    def _values_to_try(self) -> Trial:
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]}: no values to try")
        twice = [name for name in self.grid if name in self.parameters]
        if twice:
            raise ValueError(f"{twice[0]}: stands in parameters and in grid; keep one")
        return self

    @property
    def points(self) -> list[dict[str, Any]]:
        """Every combination of settings."""
        combinations = itertools.product(*self.grid.values())
        return [{**self.parameters, **dict(zip(self.grid, values, strict=True))} for values in combinations]

    def on_edge(self, chosen: dict[str, Any]) -> list[str]:
        """Return the parameters whose chosen value lies on the edge of its grid: a wider grid may do better."""
        return [
            name
            for name, values in self.grid.items()
            if len(values) > 1 and all(map(_is_number, values)) and chosen.get(name) in (min(values), max(values))
        ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Sweep(BaseModel):
    """CART-Indexing at several sizes, a row of the table for each: see :class:`cart_hf.recipe.Compression`.

    :param forms: also, or instead: ``tsv_c`` and ``emr`` are one row each; default: ``cart`` alone.
    :param rank_ratio, rank, energy, budget: one of them, with the values to compare; default: rank ratios from 1 % to
        100 %.
    :param restore, dtype, solver: what the rows have in common.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forms: tuple[Form, ...] = ("cart",)
    rank_ratio: tuple[float, ...] | None = None
    rank: tuple[int, ...] | None = None
    energy: tuple[float, ...] | None = None
    budget: tuple[str, ...] | None = None
    restore: Restore | None = None
    dtype: AdapterType = "float32"
    solver: Solver | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if data is True:
            return {}
        if not isinstance(data, dict | Sweep):
            raise ValueError(f"expected true, or a mapping such as {{rank_ratio: [0.04, 0.08]}}, not {data!r}")
        return data

    @field_validator("forms", *_DECIDES, mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list | tuple) else (value,)

    @field_validator("budget")
    @classmethod
    def _readable_sizes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for size in value or ():
            parse_size(size)
        return value

    @model_validator(mode="after")
    def _one_of(self) -> Sweep:
        given = [name for name in _DECIDES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one")
        if given and "cart" not in self.forms:
            raise ValueError(f"{given[0]}: sizes are compared of CART-Indexing; add cart to forms, or leave it out")
        names = [name for name, _ in self.rows]
        if not names:
            raise ValueError(f"{given[0] if given else 'forms'}: no values to compare")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{given[0] if given else 'forms'}: two values for '{twice}'; keep one")
        return self

    @property
    def rows(self) -> list[tuple[str, Compression]]:
        """Each row's name, and how its models are compressed."""
        return [row for form in self.forms for row in (self._sizes() if form == "cart" else [self._one(form)])]

    def _one(self, form: Form) -> tuple[str, Compression]:
        alike = {"restore": self.restore, "dtype": self.dtype, "solver": self.solver} if form == "tsv_c" else {}
        return FORMS[form], Compression.model_validate({"form": form, **alike})

    def _sizes(self) -> list[tuple[str, Compression]]:
        given = {name: getattr(self, name) for name in _DECIDES if getattr(self, name) is not None}
        decides, values = next(iter(given.items()), ("rank_ratio", _RANK_RATIOS))
        alike = {"restore": self.restore, "dtype": self.dtype, "solver": self.solver}
        return [
            (f"{INDEXING} {_in_words(decides, value)}", Compression.model_validate({decides: value, **alike}))
            for value in values
        ]


def _in_words(decides: str, value: Any) -> str:
    """Return what decides the size of adapters, short: ``8 %``, ``rank 16``, ``90 % energy``, ``5MB``."""
    if decides == "budget":
        return str(value)
    return f"rank {value}" if decides == "rank" else f"{100 * value:g} %" + " energy" * (decides == "energy")


class Selection(BaseModel):
    """The examples that settings are chosen on.

    :param split: their split; never the one that is scored.
    :param limit: at most so many of each task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = "validation"
    limit: int | None = Field(default=None, gt=0)


class Benchmark(BaseModel):
    """What `cart-hf benchmark` compares.

    :param methods: the rows, besides the pretrained model and the individual ones.
    :param selection: where settings are chosen.
    :param compress: sizes of CART-Indexing, and other forms of compressed models, which are rows too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: tuple[Trial, ...] = ()
    selection: Selection = Selection()
    compress: Sweep | None = None

    @field_validator("compress", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _rows_have_names(self) -> Benchmark:
        if not self.methods and self.compress is None:
            raise ValueError("methods: name at least one")
        names = [trial.name for trial in self.methods]
        names += [name for name, _ in self.compress.rows] if self.compress is not None else []
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"methods: two rows are called '{twice}'; give one a name")
        return self
