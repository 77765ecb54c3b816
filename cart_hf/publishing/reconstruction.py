"""What the cards say of adapters: their sizes, how well they reproduce the models, and what they keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cart_hf.errors import shorten
from cart_hf.publishing.loading import Adapter
from cart_hf.tables import Table, span


def as_table(adapters: Sequence[Adapter]) -> Table:
    """Return one row for each adapter: its ranks, its size, and the error of its matrices."""
    rows = []
    for adapter in adapters:
        told = adapter.told
        ranks = [layer["rank"] for layer in told["layers"].values()]
        rank = span(min(ranks), max(ranks))
        share = f"{told['bytes'] / told['model_bytes']:.1%}"
        rows.append([adapter.task, str(len(ranks)), rank, megabytes(told["bytes"]), share, f"{told['error']:.3f}"])
    return Table(["task", "layers", "rank", "size", "of its model", "error"], rows)


def kept(adapters: Sequence[Adapter], centre: str) -> str:
    """Say what the adapters restore exactly, and what they leave as it is.

    :param centre: what people call the model that the adapters are for.
    """
    told = [adapter.told for adapter in adapters]
    exact = []
    if any(one["heads"] for one in told):
        exact.append("the tasks' heads" if len(told) > 1 else "the task's head")
    if any(one["biases"] for one in told):
        exact.append("the biases of these layers")
    modules = _union(one["restored"] for one in told)
    if modules:
        kinds = _union([module.rpartition(".")[2]] for module in modules)
        exact.append(f"{len(modules)} other modules ({_code(kinds)})")
    left = _union(one["left_out"] for one in told)
    lines = [f"Kept exactly: {', '.join(exact) or 'nothing'}."]
    if left:
        lines.append(f"Still {centre}: {_code(left)}.")
    return "\n".join(lines)


def totals(sizes: dict[str, int]) -> dict[str, str]:
    """Return the bytes of centre, adapters and models for people, and what share of the models' the others take."""
    share = (sizes["centre"] + sizes["adapters"]) / sizes["models"]
    return {name: megabytes(size) for name, size in sizes.items()} | {"share": f"{share:.1%}"}


def alike(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    """Return the adapters that one PEFT model may hold together: their classes and the sizes of their heads are one."""
    groups: dict[Any, list[Adapter]] = {}
    for adapter in adapters:
        groups.setdefault((adapter.class_name, adapter.outputs), []).append(adapter)
    return list(groups.values())


def megabytes(size: int) -> str:
    """Return bytes for people."""
    number = size / 1e6
    return f"{number:,.0f} MB" if number >= 100 else f"{number:.3g} MB"


def _union(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _code(names: Sequence[str]) -> str:
    return shorten([f"`{name}`" for name in names])
