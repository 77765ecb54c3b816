"""The files of EMR-Merging: what a task's mask file holds, and what is where in the output folder.

OUTPUT/unified/      base + unified task vector: an ordinary merged folder, every task's head in tasks/NAME
OUTPUT/masks/NAME/   mask.safetensors: for each masked tensor its bits, for others the whole tensor; the rescaler
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cart_hf.plan import Plan, PlannedTensor, Shard, lay_out

UNIFIED_FOLDER, MASKS_FOLDER = "unified", "masks"
BITS, WHOLE = "mask.", "whole."
"""What stands before a tensor's key: its bits, packed as ``np.packbits`` does, or its values."""

RESCALER = PlannedTensor(
    name="rescaler",
    key="rescaler",
    dtype="F64",
    shape=(1,),
    role="base",
    reason="of the task",
    inputs=(),
    base_input=None,
    parameters={},
)


@dataclass(frozen=True)
class Mask:
    """What one task has of its own.

    :param nbytes: size of its files: a bit for each weight, its rescaler, and what the base lacks.
    :param rescaler: what the masked task vector is multiplied with.
    :param error: relative distance from the fine-tuned model: 0 is the model, 1 the base.
    :param model_bytes: size of the fine-tuned model's weights.
    """

    nbytes: int
    rescaler: float
    error: float
    model_bytes: int


def masked(tensor: PlannedTensor) -> PlannedTensor:
    """Return the mask of a planned tensor, as it is stored: shape (elements / 8, rounded up)."""
    key = BITS + tensor.key
    return replace(tensor, name=key, key=key, dtype="U8", shape=(-(-tensor.elements // 8),), tasks=())


def whole(plan: Plan, tensor: PlannedTensor, position: int) -> PlannedTensor:
    """Return one model's own tensor, as it is stored: in its own type."""
    key, name = WHOLE + tensor.key, dict(tensor.inputs)[position]
    stored = plan.models[position].tensors[name].stored
    return replace(tensor, name=key, key=key, dtype=stored.dtype, shape=tuple(stored.shape), tasks=())


def mask_shards(plan: Plan, position: int) -> list[Shard]:
    """Return what the files of one task hold: masks, what the base lacks or was left out, and the rescaler."""
    mine = [tensor for tensor in plan.tensors if position in dict(tensor.inputs)]
    tensors = [masked(tensor) for tensor in mine if tensor.role == "elementwise"]
    tensors += [whole(plan, tensor, position) for tensor in mine if tensor.role == "average"]
    shards = lay_out(replace(plan, tensors=(RESCALER, *tensors)))
    return [replace(shard, filename=shard.filename.replace("model", "mask", 1)) for shard in shards]


def mask_bytes(plan: Plan) -> int:
    """Return what the files of all tasks take."""
    return sum(shard.nbytes for position in range(len(plan.models)) for shard in mask_shards(plan, position))
