"""Wrappers: what may be done to the result of any merge method, layer by layer or matrix by matrix.

Both act on the update ``merged - base``. A wrapper of layers multiplies it by one number for each tensor; a wrapper of
matrices recomputes that of each Linear weight of the blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from cart_hf.errors import UserError, did_you_mean
from cart_hf.methods.parameters import Parameter

if TYPE_CHECKING:
    import torch

    Measure = Callable[..., torch.Tensor]
    Factors = Callable[..., dict[str, float]]
    Matrix = Callable[..., torch.Tensor]


class Place(Hashable, Protocol):
    """A block of a model's tower.

    :param index: which one it is, from 0.
    :param count: how many the tower has.
    """

    @property
    def index(self) -> int: ...

    @property
    def count(self) -> int: ...


BUILT_IN = ("lines", "svc", "larv")


@dataclass(frozen=True)
class Wrapper:
    """A wrapper, of layers (``measure`` and ``factors``) or of matrices (``matrix``).

    :param name: its name in recipes (``wrap``) and flags (``--wrap``).
    :param title: what people call it.
    :param parameters: what it may be told.
    :param summary: one line for ``--help`` and the model card.
    :param equation: the rule in plain text.
    :param citation: where it comes from.
    :param factors: called with ``measured`` (what ``measure`` returned of each tensor, by name), ``block`` (each
        tensor's block, None outside of them), ``models`` (how many there are) and the declared parameters; returns
        the factor of each tensor's update.
    :param measure: called with ``base`` and ``models`` (shape (T, ...)), and with ``merged`` unless ``whole``; returns
        float64 numbers, on the CPU.
    :param whole: whether it measures whole matrices of the blocks, and not any slice of any tensor, whose numbers are
        added up.
    :param needs: whether something has to be measured, given the parameters; default: always.
    :param matrix: called with ``merged`` and ``base``, shape (m, n), ``models``, shape (T, m, n), which it may
        overwrite, and the declared parameters; returns the new merged matrix.
    """

    name: str
    title: str
    parameters: tuple[Parameter, ...]
    summary: str
    equation: str
    citation: str
    factors: Factors | None = None
    measure: Measure | None = None
    whole: bool = False
    needs: Callable[[Mapping[str, Any]], bool] = lambda _: True
    matrix: Matrix | None = None

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter called ``name``, or None."""
        return next((p for p in self.parameters if name in (p.name, *p.aliases)), None)


@cache
def all_wrappers() -> dict[str, Wrapper]:
    """Return every wrapper by name."""
    return {name: importlib.import_module(f"cart_hf.methods.wrappers.{name}").WRAPPER for name in BUILT_IN}


def get_wrapper(name: str) -> Wrapper:
    """Return the wrapper called ``name``.

    :raises UserError: when there is none; the message suggests the closest name.
    """
    known = all_wrappers()
    if name not in known:
        raise UserError(f"wrap: unknown wrapper '{name}'{did_you_mean(name, known)}")
    return known[name]
