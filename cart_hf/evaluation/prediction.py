"""Running a model over a split: shared out over the processes, put together again exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cart_hf.evaluation.batches import Batch, batches, split_into_batches
from cart_hf.evaluation.model import Model
from cart_hf.parallel import Progress, cores
from cart_hf.processes import Processes
from cart_hf.tasks import TaskData

HALF_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Predictions:
    """What a model said.

    :param logits: for each head float32, shape (examples, labels), in the order of the split.
    :param broken: rows whose image could not be decoded, with the reason; their logits mean nothing.
    """

    logits: Mapping[str, np.ndarray]
    broken: Mapping[int, str]


@torch.inference_mode()
def predict(
    model: Model,
    heads: Sequence[str],
    data: TaskData,
    processes: Processes,
    *,
    batch_size: int,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Predictions:
    """Return the logits of several heads on the same examples; the backbone reads each once, or once per adapter.

    :param dtype: ``bfloat16`` or ``float16`` runs under autocast.
    """
    everything = split_into_batches(data, batch_size)
    mine = everything[processes.rank :: processes.count]
    # decoding images is worth processes of its own only where the model does not need the cores
    workers = min(8, cores() // processes.count) if model.modality == "image" and processes.device.type != "cpu" else 0

    def share() -> tuple[list[tuple[list[int], dict[str, np.ndarray]]], dict[int, str]]:
        found: list[tuple[list[int], dict[str, np.ndarray]]] = []
        broken: dict[int, str] = {}
        for batch in batches(data, mine, model.preprocess, workers=workers):
            with autocast(processes.device, dtype):
                logits = model.logits(heads, on_device(processes.device, batch))
            found.append((batch.rows, {head: logits[head].float().cpu().numpy() for head in heads}))
            broken |= batch.broken
            if progress is not None:
                progress(f"evaluating {data.task.name}", 1, len(mine))
        return found, broken

    shares = processes.together(share)
    parts = [part for share, _ in shares for part in share]
    rows = np.concatenate([np.asarray(part, dtype=np.int64) for part, _ in parts])
    order = np.argsort(rows)
    if not np.array_equal(rows[order], np.arange(len(data))):
        raise RuntimeError("an example was lost or read twice")  # never: the processes disagree on the data
    logits = {head: np.concatenate([values[head] for _, values in parts])[order] for head in heads}
    return Predictions(logits, {row: why for _, share in shares for row, why in sorted(share.items())})


def on_device(device: torch.device, batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch's inputs on the device."""
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return the context in which a model computes in a half type, or in which nothing changes."""
    return torch.autocast(device.type, HALF_TYPES[dtype]) if dtype in HALF_TYPES else nullcontext()
