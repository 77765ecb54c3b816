"""An analysis in a few lines, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from cart_hf.tables import span

Document = Mapping[str, Any]
_AROUND = {"average": "around their average", "base": "around the base"}


def lines(document: Document) -> list[str]:
    """Return what a person wants to know first.

    :param document: what ``analysis.json`` holds.
    """
    names = [model["name"] for model in document["about"]["models"]]
    found = [_matrices(document), *_interference(document)]
    parts = (_alike(document["whole"]["cosine"], names), _updates(document["whole"], names), _theorem(document))
    return found + [line for line in parts if line is not None]


def _matrices(document: Document) -> str:
    """Say what is decomposed, and how much of it the rank keeps."""
    matrices, about = document["matrices"], document["about"]
    ranks = [matrix["rank"] for matrix in matrices]
    pairs = [
        (energy, square)
        for matrix in matrices
        for energy, square in zip(
            matrix["around"]["average"]["energy"], matrix["around"]["average"]["squares"], strict=True
        )
        if energy is not None
    ]
    total = sum(square for _, square in pairs)
    kept = sum(energy * square for energy, square in pairs) / total if total else 1.0
    what = "keeps" if about["method"] == "cart" else "would keep"
    return (
        f"{about['title']} of {len(about['models'])} models; {len(matrices)} matrices, of which CART at rank "
        f"{span(min(ranks), max(ranks))} {what} {kept:.0%} (squared length around the average)"
    )


def _interference(document: Document) -> Iterator[str]:
    """Say how much the row spaces interfere at the rank that is kept."""
    sums = {
        centre: sum(value for row in mean["pairs"] for value in row if value is not None)
        for centre, mean in document["mean"].items()
    }
    told = ", ".join(f"{value:.3f} {_AROUND[centre]}" for centre, value in sums.items())
    yield f"interference of the row spaces at that rank, mean of the matrices: {told}"


def _alike(cosines: Mapping[str, Sequence[Sequence[float | None]]], names: Sequence[str]) -> str | None:
    cosine = cosines.get("base", cosines["average"])
    known = [(value, i, j) for i, j in combinations(range(len(names)), 2) if (value := cosine[i][j]) is not None]
    if not known:
        return None
    value, i, j = max(known)
    return f"most alike: {names[i]} and {names[j]} (cosine of their task vectors {value:.2f})"


def _updates(whole: Mapping[str, Any], names: Sequence[str]) -> str | None:
    if whole["update"] is None:
        return None
    order = sorted(range(len(names)), key=whole["update"].__getitem__)
    low, high = (f"{whole['growth'][place]:.2%} ({names[place]})" for place in (order[0], order[-1]))
    text = f"updates: {low} to {high} of the base's norm; the merge's {whole['merged_growth']:.2%}"
    retained = sorted((value, name) for value, name in zip(whole["retention"], names, strict=True) if value is not None)
    if not retained:
        return text
    (least, worst), (most, best) = retained[0], retained[-1]
    return f"{text}, along each model's own {least:.0%} ({worst}) to {most:.0%} ({best}) of it"


def _theorem(document: Document) -> str | None:
    bounds = document["theorem"]
    if not bounds:
        return None
    held = sum(one["loss"] <= one["bound"] for one in bounds)
    return f"Theorem 1's bound holds in {held} of {len(bounds)} cases (matrices and centres)"
