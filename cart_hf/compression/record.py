"""What a compression made, written down: `compress.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf import __version__
from cart_hf.compression.adapter import Adapter
from cart_hf.compression.outline import Outline
from cart_hf.output.record import COMPRESS_FILE, MERGE_FILE, sources_of, versions
from cart_hf.plan import Plan
from cart_hf.recipe import Compression

if TYPE_CHECKING:
    from cart_hf.compression.masks import Mask

_OF_A_MERGE = ("base", "models", "method", "summary", "equation", "citation", "parameters", "adaptation")


def write_record(
    folder: Path,
    plan: Plan,
    compression: Compression,
    outlines: Sequence[Outline],
    adapters: Mapping[str, Adapter],
    sources: Mapping[str, Any],
    *,
    centre_bytes: int,
    seconds: Mapping[str, float],
) -> None:
    """Write ``compress.json``: bytes of each task, and what every tensor lost.

    :param sources: what is recorded of the base and the models, and of the merge that was made of them, if it was one.
    :param centre_bytes: bytes of the centre's weights (the ``average``, or TSV-C's ``pretrained``); 0 where the base is
        the centre, and was not written.
    """
    data = {
        "cart_hf": __version__,
        "form": compression.form,
        "centre": ("average" if compression.form == "cart" else "pretrained") if centre_bytes else "base",
        **sources,
        "settings": _settings(plan, compression),
        "bytes": {
            "centre": centre_bytes,
            "adapters": sum(adapters[outline.name].nbytes for outline in outlines),
            "models": sum(outline.model_bytes for outline in outlines),
        },
        "tasks": {outline.name: _task(outline, adapters[outline.name]) for outline in outlines},
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "versions": versions(),
    }
    _write(folder, data)


def write_masked_record(
    folder: Path, plan: Plan, masks: Mapping[str, Mask], unified_bytes: int, seconds: Mapping[str, float]
) -> None:
    """Write ``compress.json`` of EMR-Merging: bytes, rescaler and error of each task.

    :param unified_bytes: bytes of the unified model's weights.
    """
    data = {
        "cart_hf": __version__,
        "form": "emr",
        "centre": "base",
        "equation": "W_t ~ base + rescaler_t * mask_t * unified",
        "citation": "Huang et al., EMR-Merging (arXiv 2405.17461)",
        **sources_of(plan),
        "settings": {"form": "emr"},
        "bytes": {
            "unified": unified_bytes,
            "masks": sum(mask.nbytes for mask in masks.values()),
            "models": sum(mask.model_bytes for mask in masks.values()),
        },
        "tasks": {
            model.name: {
                "class": model.architecture.class_name,
                "bytes": masks[model.name].nbytes,
                "model_bytes": masks[model.name].model_bytes,
                "rescaler": masks[model.name].rescaler,
                "error": _short(masks[model.name].error),
            }
            for model in plan.models
        },
        "base_tensors": {tensor.key: tensor.base_input for tensor in plan.tensors if tensor.role == "elementwise"},
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "versions": versions(),
    }
    _write(folder, data)


def _write(folder: Path, data: Mapping[str, Any]) -> None:
    (folder / COMPRESS_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def sources_in(folder: Path) -> dict[str, Any]:
    """Return what a merge's record says of its sources, and of how it was made of them."""
    record = json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))
    return {key: record[key] for key in _OF_A_MERGE if key in record}


def _settings(plan: Plan, compression: Compression) -> dict[str, Any]:
    ranks = {} if compression.budget else {k: v for k, v in plan.recipe.parameters.items() if k in plan.method.one_of}
    made = compression.model_dump(mode="json", exclude_none=True, exclude={"centre"})
    return {**ranks, **made, "restore": compression.restored}


def _task(outline: Outline, adapter: Adapter) -> dict[str, Any]:
    """Return what is told of an adapter; errors are relative Frobenius norms of the difference from the centre."""
    return {
        "class": outline.class_name,
        "bytes": adapter.nbytes,
        "model_bytes": outline.model_bytes,
        "error": _short(adapter.error),
        "heads": list(outline.heads),
        "restored": [module for module in outline.saved if module not in outline.heads],
        "biases": outline.biased,
        "layers": {
            module: {
                "rank": fit.rank,
                "difference": _short(fit.norm),
                "error": _short(fit.error / fit.norm if fit.norm else 0.0),
            }
            for module, fit in adapter.layers.items()
        },
        "left_out": {name: _short(distance) for name, distance in adapter.left_out.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else value
