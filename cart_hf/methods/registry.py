"""The registry of merge methods: ours, and those that a user's package adds by the entry point `cart_hf.methods`."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, TypeVar

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods.linear import Linear
from cart_hf.methods.parameters import Parameter, Value

if TYPE_CHECKING:
    import torch

    Merge = Callable[..., torch.Tensor]

F = TypeVar("F", bound="Callable[..., object]")

ENTRY_POINT_GROUP = "cart_hf.methods"
BUILT_IN = (
    "cart",
    "average",
    "task_arithmetic",
    "ties",
    "consensus",
    "dare",
    "breadcrumbs",
    "della",
    "model_stock",
    "slerp",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "wudi",
    "ace",
    "regmean",
    "fisher",
    "knots",
)
Centre = Literal["average", "base"]
Survey = Literal["magnitude", "outliers", "products"]
Statistic = Literal["gram", "fisher"]


@dataclass(frozen=True)
class Method:
    """A merge method: one pure function and what the other rooms must know about it.

    :param name: its name in recipes (``merge_method``) and flags (``--method``).
    :param function: the tensors of one name in, the merged tensor out; see :func:`method` for its arguments.
    :param parameters: what it may be told.
    :param summary: one line for ``--help`` and the model card.
    :param equation: the rule in plain text, for the model card.
    :param citation: where it comes from.
    :param needs_base: whether the arithmetic uses the base model's tensor.
    :param low_rank: True when it keeps some singular directions of whole matrices, and takes ``rank`` or ``energy``.
    :param matrices: True when it works on whole matrices: it is then applied to the Linear weights of the blocks only,
        and every other tensor is averaged. False: it works element by element on every floating tensor, and may be
        given any slice of them. A low-rank method works on matrices.
    :param rows: True when, element by element otherwise, it must be given whole rows.
    :param ordered: True when the order of the models matters; they come as the recipe has them, else by name.
    :param model_count: how many models it merges; None: any number.
    :param one_of: names of parameters of which at most one may be given.
    :param survey: name of a statistic over whole tensors or models which the function needs beforehand, see
        :mod:`cart_hf.merging.survey`.
    :param calibration: name of a statistic of the models at work on examples of their tasks which it needs, see
        :mod:`cart_hf.calibration`.
    :param random: True when the function takes ``generators``, one seeded generator per model, which goes on over the
        slices that the function is given.
    :param title: what people call it, in tables and plots.
    :param of_factors: the same rule from the factors of the centred matrices, where there is one: called with
        ``centre``, ``factors`` (:class:`cart_hf.linalg.low_rank.Factors`), ``ranks`` and the declared parameters, but
        not with ``solver``.
    :param factors_centre: what those matrices are centred at: their average, or the base's.
    :param linear: its centre, terms and coefficients, where its result is linear in a coefficient for each model: what
        coefficients that were learnt need.
    :param presets: names under which mergekit has it with other settings, and those settings.
    :param line: whether models that differ in ``scale`` alone lie on a line, so that two of them give all.
    """

    name: str
    function: Merge
    parameters: tuple[Parameter, ...]
    summary: str
    equation: str
    citation: str
    needs_base: bool = True
    low_rank: bool = False
    matrices: bool = False
    rows: bool = False
    ordered: bool = False
    model_count: int | None = None
    one_of: tuple[str, ...] = ()
    survey: Survey | None = None
    calibration: Statistic | None = None
    random: bool = False
    aliases: tuple[str, ...] = field(default=())
    title: str = ""
    of_factors: Merge | None = None
    factors_centre: Centre = "average"
    linear: Linear | None = None
    line: bool = False
    presets: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter called ``name`` (or having that alias), or None."""
        return next((p for p in self.parameters if name == p.name or name in p.aliases), None)

    def parameter_names(self) -> list[str]:
        """Return every name a recipe may use, aliases included."""
        return [name for p in self.parameters for name in (p.name, *p.aliases)]


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    parameters: tuple[Parameter, ...] = (),
    summary: str,
    equation: str,
    citation: str,
    needs_base: bool = True,
    low_rank: bool = False,
    matrices: bool = False,
    rows: bool = False,
    ordered: bool = False,
    model_count: int | None = None,
    one_of: tuple[str, ...] = (),
    survey: Survey | None = None,
    calibration: Statistic | None = None,
    random: bool = False,
    aliases: tuple[str, ...] = (),
    title: str = "",
    of_factors: Merge | None = None,
    factors_centre: Centre = "average",
    linear: Linear | None = None,
    line: bool = False,
    presets: Mapping[str, Mapping[str, Value]] | None = None,
) -> Callable[[F], F]:
    """Register the decorated function as the merge method ``name``.

    The function is called with keyword arguments only: ``models`` (a tensor of shape (T, ...): the T models' tensors
    of one name, float32 or float64), ``base`` (the base model's tensor, shape (...), when ``needs_base``), one
    argument for each declared parameter (a list of T values for a ``per_model`` one), ``rank`` (int or None) and
    ``energy`` (float or None) when ``low_rank``, and ``generators`` when ``random``. It returns the merged tensor and
    may overwrite ``models``, never ``base``. Matrices come as (out, in), however the model stores them.

    A survey adds ``thresholds`` (T floats, or T pairs of floats) or ``products`` (float64, shape (T, T)); a
    calibration ``grams`` (T matrices of shape (in, in), read as they are asked for) or ``fisher`` (of the shape of
    ``models``).
    """

    def register(function: F) -> F:
        _METHODS[name] = Method(
            name=name,
            function=function,  # type: ignore[arg-type]
            parameters=parameters,
            summary=summary,
            equation=equation,
            citation=citation,
            needs_base=needs_base,
            low_rank=low_rank,
            matrices=matrices or low_rank,
            rows=rows,
            ordered=ordered,
            model_count=model_count,
            one_of=one_of,
            survey=survey,
            calibration=calibration,
            random=random,
            aliases=aliases,
            title=title or name,
            of_factors=of_factors,
            factors_centre=factors_centre,
            linear=linear,
            line=line or linear is not None,
            presets=presets or {},
        )
        return function

    return register


@cache
def _load_all() -> None:
    for name in BUILT_IN:
        importlib.import_module(f"cart_hf.methods.{name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as failure:  # whatever a foreign package raises: the other methods must still work
            warnings.warn(f"the merge method '{entry.name}' ({entry.value}) cannot be loaded: {failure}", stacklevel=2)


def all_methods() -> dict[str, Method]:
    """Return every registered method by name: ours first, in one order whichever module was imported before."""
    _load_all()
    return {name: _METHODS[name] for name in dict.fromkeys((*BUILT_IN, *_METHODS))}


def get_method(name: str) -> Method:
    """Return the method called ``name`` or having that alias.

    :raises UserError: when there is none; the message suggests the closest name.
    """
    methods = all_methods()
    for known in methods.values():
        if name in (known.name, *known.aliases, *known.presets):
            return known
    names = [alias for known in methods.values() for alias in (known.name, *known.aliases, *known.presets)]
    raise UserError(f"merge_method: unknown method '{name}'{did_you_mean(name, names)}")
