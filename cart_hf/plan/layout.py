"""The output files' layout: every tensor's bytes have their place before any arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cart_hf.plan.model import Plan, PlannedTensor
from cart_hf.recipe.sizes import parse_size
from cart_hf.sources import element_size


@dataclass(frozen=True)
class Shard:
    """One weight file of the output.

    :param filename: its name.
    :param header: its safetensors header, length prefix included.
    :param offsets: tensor name -> offset of its first byte in the file.
    :param nbytes: size of the whole file.
    :param tensors: what it holds.
    :param tasks: the tasks whose ``tasks/NAME`` link it.
    """

    filename: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    tensors: tuple[PlannedTensor, ...]
    tasks: tuple[str, ...]


def lay_out(plan: Plan) -> list[Shard]:
    """Assign every tensor a file and an offset.

    Tensors lie together only if the same tasks have them: a task links whole files, and finds nothing unknown in them.
    """
    limit = parse_size(plan.recipe.max_shard_size)
    batches: list[list[PlannedTensor]] = []
    for tasks in dict.fromkeys(tensor.tasks for tensor in plan.tensors):
        size = 0
        for tensor in (t for t in plan.tensors if t.tasks == tasks):
            if size == 0 or size + tensor.nbytes > limit:
                batches.append([])
                size = 0
            batches[-1].append(tensor)
            size += max(tensor.nbytes, 1)
    total = len(batches)
    return [
        _shard("model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors", batch)
        for i, batch in enumerate(batches, start=1)
    ]


def _shard(filename: str, tensors: Sequence[PlannedTensor]) -> Shard:
    # larger element types first keeps every tensor aligned, as safetensors' own writer does
    ordered = sorted(tensors, key=lambda t: (-element_size(t.dtype), t.key))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for tensor in ordered:
        starts[tensor.name] = position
        entries[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(filename, header, offsets, len(header) + position, tuple(ordered), tensors[0].tasks)
