"""The plan for people: one line, or the table (or JSON) that `--dry-run` shows."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from cart_hf.cli.console import out, size
from cart_hf.plan import Plan, PlannedTensor
from cart_hf.plan.model import WHOLE
from cart_hf.tables import span


def grouped(plan: Plan) -> list[dict[str, Any]]:
    """Gather tensors that differ only in their block's number: pattern, role, shapes, ranks, count, bytes."""
    rows: dict[tuple[str, str, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        pattern = re.sub(r"\.\d+\.", ".*.", tensor.name)
        rows.setdefault((pattern, tensor.role, tensor.reason), []).append(tensor)
    return [
        {
            "tensors": pattern,
            "role": role,
            "reason": reason,
            "count": len(members),
            "shape": list(members[0].shape),
            "rank": _rank(members),
            "models": len(members[0].inputs),
            "bytes": sum(t.nbytes for t in members),
        }
        for (pattern, role, reason), members in rows.items()
    ]


def _summary(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row for each pattern of decomposed tensors, and one for each reason among the others."""
    rows: list[tuple[str, ...]] = []
    others: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in grouped(plan):
        if row["role"] in WHOLE:
            shape = " x ".join(map(str, row["shape"]))
            rows.append((row["role"], row["tensors"], shape, row["rank"] or "", str(row["count"]), size(row["bytes"])))
        else:
            others.setdefault((row["role"], row["reason"]), []).append(row)
    for (role, reason), members in others.items():
        count, nbytes = sum(m["count"] for m in members), sum(m["bytes"] for m in members)
        rows.append((role, "" if reason == role else f"({reason})", "", "", str(count), size(nbytes)))
    return rows


def _rank(members: list[PlannedTensor]) -> str | None:
    energies = {t.energy for t in members if t.energy is not None}
    if energies:
        return f"energy {min(energies):g}" if len(energies) == 1 else f"energy {min(energies):g}-{max(energies):g}"
    ranks = sorted({t.rank for t in members if t.rank is not None})
    if not ranks:
        return None
    return span(ranks[0], ranks[-1])


def as_json(plan: Plan, workers: int) -> dict[str, Any]:
    """Return the plan for programs."""
    return {
        "method": plan.method.name,
        "output_class": plan.output_class,
        "models": [str(model.reference) for model in plan.models],
        "groups": grouped(plan),
        "heads": {name: [tensor.key for tensor in head] for name, head in plan.heads.items()},
        "output_bytes": plan.nbytes,
        "memory_bytes": plan.memory(workers),
        "workers": workers,
        "warnings": list(plan.warnings),
    }


def show(plan: Plan, workers: int) -> None:
    """Print the plan for people; nothing was written."""
    table = Table("role", "tensors", "shape", "rank", "count", "bytes", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    table.columns[1].min_width = 44
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for row in _summary(plan):
        table.add_row(*row)
    # a pipe has no width: keep names whole
    (out if out.is_terminal else Console(width=160, highlight=False, markup=False)).print(table)
    for name, head in plan.heads.items():
        out.print(f"head of {name}: {', '.join(tensor.key for tensor in head)}")
    for model in plan.models:
        if model.ignored:
            out.print(
                f"{model.name}: {len(model.ignored)} tensors belong to no part of {model.architecture.class_name}"
            )
    out.print(headline(plan))
    out.print(
        f"output {size(plan.nbytes)}, about {size(plan.memory(workers))} of memory for tensors with {workers} workers; "
        "dry run: nothing was written"
    )


def headline(plan: Plan) -> str:
    """One line: what was merged how, and on how many tensors the method acted."""
    acted = sum(tensor.role in (*WHOLE, "elementwise") for tensor in plan.tensors)
    kind = "low-rank" if plan.method.low_rank else plan.method.name
    parts = [f"{kind}: {acted} of {len(plan.tensors)} tensors"] if acted else []
    parts += [f"averaged: {plan.count('average')}"] if plan.count("average") else []
    parts += [f"from the base: {plan.count('base')}"] if plan.count("base") else []
    parts += [f"heads kept: {len(plan.heads)}"] if plan.heads else []
    name = " + ".join([plan.method.name, *(one.wrapper.name for one in plan.wrappings)])
    return f"{name}, {len(plan.models)} models into one {plan.output_class} - " + ", ".join(parts)
