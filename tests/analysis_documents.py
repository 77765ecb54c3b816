"""Documents such as `analysis.json` holds, made up: with the shape of a real one, and numbers that follow simple rules."""

from __future__ import annotations

import math
from typing import Any

RATIOS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
NAMES = ("sst2", "mnli", "clinc150_kitchen_and_dining", "rte", "stanford_cars", "$x_0", "cola", "qqp")


def document(models: int = 3, layers: int = 4, *, base: bool = True, **changes: Any) -> dict[str, Any]:
    """Return an analysis of CART at rank ratio 0.08, scale 1.5.

    Matrix ``i`` has ``I(k) = (i + 1) * (k / r)`` around the average, three times as much around the base.

    :param changes: values that take the place of some at the top.
    """
    names = [*NAMES, *(f"task_{i}" for i in range(len(NAMES), models))][:models]
    centres = ["average", *(["base"] if base else [])]
    matrices = [_matrix(names, layer, part, centres) for layer in range(layers) for part in ("query", "dense")]
    blocks = [_block("embeddings", None), *(_block("encoder.layer", i) for i in range(layers)), _block("pooler", None)]
    told = {
        "format": "cart-hf analysis 1",
        "about": {
            "method": "cart",
            "title": "CART",
            "parameters": {"rank_ratio": 0.08, "scale": 1.5},
            "base": "org/base" if base else None,
            "base_hub_id": "org/base" if base else None,
            "models": [
                {"name": name, "reference": f"org/{name}", "class": "RobertaModel", "hub_id": f"org/{name}"}
                for name in names
            ],
            "output_class": "RobertaModel",
            "roles": {"low_rank": 2 * layers, "average": 9, "base": 0},
            "normalizer": "all",
            "ratios": list(RATIOS),
            "version": "0.1.0",
        },
        "matrices": matrices,
        "mean": {
            centre: {
                "reconstruction": [math.exp(-9 * ratio) * (ratio < 1) for ratio in RATIOS],
                "interference": _mean([matrix["around"][centre]["interference"] for matrix in matrices]),
                "spectra_at": [0.01, 0.1, 0.3, 1.0],
                "spectra": [[0.5 - 0.01 * t, 0.2, 0.05, 0.004] for t in range(models)],
                **{key: matrices[0]["around"][centre][key] for key in ("pairs", "cosine", "overlap")},
            }
            for centre in centres
        },
        "blocks": blocks,
        "layers": {
            "share": {centre: [_shares(len(blocks), t) for t in range(models)] for centre in centres},
            "growth": [[0.02 + 0.01 * t + 0.001 * b for b in range(len(blocks))] for t in range(models)],
            "merged_growth": [0.015] * len(blocks),
            "retention": [[0.3 + 0.1 * t + 0.02 * b for b in range(len(blocks))] for t in range(models)],
        },
        "whole": {},
        "theorem": [],
        "warnings": [],
        "results": results(names),
        "tuning": tuning(),
    }
    if not base:
        told["layers"] |= dict.fromkeys(("growth", "merged_growth", "retention"))
    return told | changes


def results(names: list[str]) -> dict[str, Any]:
    def row(name: str, method: str | None, score: float) -> dict[str, Any]:
        scores = {task: score - 0.01 * place for place, task in enumerate(names)}
        return {"name": name, "method": method, "settings": "", "scores": scores, "average": score, "nbytes": None}

    rows = [row("pretrained", None, 0.5), row("individual", None, 0.9), row("TIES", "ties", 0.7)]
    return {"source": "benchmark", "tasks": names, "rows": [*rows, row("CART", "cart", 0.85)]}


def tuning() -> dict[str, Any]:
    """Return a hill with its top at 0.08 and scale 1.5, over the weight average at rank ratio 1."""
    points = [
        {"parameters": {"rank_ratio": ratio, "scale": scale}, "average": _hill(ratio, scale), "scores": {}}
        for ratio in (0.02, 0.08, 0.32, 1)
        for scale in (1.0, 1.5, 2.0)
    ]
    return {
        "method": "cart",
        "parameters": ["rank_ratio", "scale"],
        "split": "validation",
        "limit": None,
        "points": points,
        "best": {"rank_ratio": 0.08, "scale": 1.5},
        "on_edge": [],
    }


def _hill(ratio: float, scale: float) -> float:
    return 0.7 if ratio == 1 else 0.7 + 0.15 * math.exp(-(math.log(ratio / 0.08) ** 2) - (scale - 1.5) ** 2)


def _matrix(names: list[str], layer: int, part: str, centres: list[str]) -> dict[str, Any]:
    factor = 2 * layer + (part == "dense") + 1
    count = len(names)

    def around(centre: str) -> dict[str, Any]:
        times = 1 if centre == "average" else 3
        alike = 0.05 * times
        return {
            "interference": [times * factor * ratio for ratio in RATIOS],
            "reconstruction": [100 * math.exp(-9 * ratio) for ratio in RATIOS],
            "spectra": [[5.0, 2.0, 0.1]] * count,
            "spectra_at": [1, 10, 64],
            "squares": [29.0] * count,
            "pairs": [[0.0 if i == j else 0.2 * times + 0.01 * (i + j) for j in range(count)] for i in range(count)],
            "cosine": [
                [1.0 if i == j else alike - 0.1 * (i != j and times == 1) for j in range(count)] for i in range(count)
            ],
            "overlap": [[1.0 if i == j else 0.1 * times for j in range(count)] for i in range(count)],
            "effective_rank": [20.0] * count,
            "stable_rank": [3.0] * count,
            "energy": [0.3 + 0.02 * t for t in range(count)],
        }

    return {
        "name": f"encoder.layer.{layer}.{part}.weight",
        "path": "encoder.layer",
        "block": layer,
        "part": part,
        "shape": [64, 64],
        "rank": 5,
        "models": names,
        "around": {centre: around(centre) for centre in centres},
    }


def _block(path: str, number: int | None) -> dict[str, Any]:
    return {"path": path, "block": number, "label": path if number is None else f"{path}.{number}"}


def _mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _shares(count: int, task: int) -> list[float]:
    weights = [1.0 + (place + task) % 3 for place in range(count)]
    return [weight / sum(weights) for weight in weights]
