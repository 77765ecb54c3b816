"""How many bytes of weights every row of the table takes, for all its tasks together.

What only the base has (the text tower of a CLIP whose models are vision towers) is the same for all rows, and counts
for none of them.
"""

from __future__ import annotations

import torch

from cart_hf.plan import Plan
from cart_hf.recipe import Compression
from cart_hf.sources import Checkpoint


def individual_bytes(plan: Plan) -> int:
    """Return what the fine-tuned models take; of LoRA adapters their own files, and their base once."""
    bases = {id(model.adapts): model.adapts for model in plan.models if model.adapts is not None}
    whole = [*bases.values(), *(model for model in plan.models if model.adapts is None)]
    adapters = (_own_files(model) for model in plan.models if model.adapts is not None)
    return sum(tensor.stored.nbytes for model in whole for tensor in model.tensors.values()) + sum(adapters)


def merged_bytes(plan: Plan) -> int:
    """Return what a merged model takes: the backbone once, and every head."""
    return sum(tensor.nbytes for tensor in plan.tensors if tensor.inputs) + _head_bytes(plan)


def compressed_bytes(plan: Plan, compression: Compression, task_bytes: int) -> int:
    """Return what compressed models take: the backbone once, every head, and what each task has of its own.

    :param task_bytes: of all adapters or masks. Masks need two backbones, the base's and the unified one.
    """
    base = sum(tensor.nbytes for tensor in plan.tensors if tensor.inputs and tensor.base_input is not None)
    return merged_bytes(plan) + task_bytes + (base if compression.form == "emr" else 0)


def size_of(compression: Compression) -> float:
    """Return what decides the size of adapters, to compare those of one sweep: the largest holds all others' factors.

    :param compression: one that decides the ranks; of another the size is not compared, and 0.
    """
    decides = (compression.rank_ratio, compression.rank, compression.energy, compression.budget_bytes)
    return float(next((value for value in decides if value is not None), 0))


def _own_files(model: Checkpoint) -> int:
    own = (file for file in model.files.values() if model.owner_of(file) is model)
    return sum(tensor.nbytes for file in own for tensor in file.tensors.values())


def _head_bytes(plan: Plan) -> int:
    heads = [model.tensors[head.name].stored for model in plan.models for head in plan.heads.get(model.name, ())]
    size = getattr(torch, plan.output_config["dtype"]).itemsize if heads else 0
    return sum(stored.elements * size if stored.is_floating else stored.nbytes for stored in heads)
