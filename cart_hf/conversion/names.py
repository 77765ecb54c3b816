"""Which tensor of open_clip's CLIP fills which slot of transformers' CLIP."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # in this order in open_clip's in_proj
_OUTER = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # transformers' own spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_BLOCK = {
    "layer_norm1": "ln_1.",
    "layer_norm2": "ln_2.",
    "self_attn.out_proj": "attn.out_proj.",
    "mlp.fc1": "mlp.c_fc.",
    "mlp.fc2": "mlp.c_proj.",
} | dict.fromkeys(PROJECTIONS, "attn.in_proj_")
_IN_BLOCK = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


class Origin(NamedTuple):
    """Where a slot's values come from.

    :param name: open_clip's name.
    :param part: ``whole``, ``transposed``, or which third of the rows.
    """

    name: str
    part: Literal["whole", "transposed", 0, 1, 2]

    def shape(self, slot: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that open_clip's tensor must have to fill a slot of the shape ``slot``."""
        if self.part == "transposed":
            return slot[::-1]
        return slot if self.part == "whole" else (3 * slot[0], *slot[1:])

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Return the slot's values from open_clip's tensor."""
        if self.part == "transposed":
            return values.T
        return values if self.part == "whole" else values.chunk(3)[self.part]


def origin(slot: str) -> Origin:
    """Return where the values of a slot of transformers' CLIPModel come from.

    :raises KeyError: for a slot that open_clip's CLIP does not have.
    """
    if slot in _TRANSPOSED:
        return Origin(_TRANSPOSED[slot], "transposed")
    block = _IN_BLOCK.fullmatch(slot)
    if block is None:
        return Origin(_OUTER[slot], "whole")
    tower, index, module, kind = block.groups()
    name = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{index}.{_BLOCK[module]}{kind}"
    return Origin(name, PROJECTIONS.index(module) if module in PROJECTIONS else "whole")  # type: ignore[arg-type]


def is_text(slot: str) -> bool:
    """Whether a slot belongs to the text tower."""
    return slot.startswith(("text_model.", "text_projection."))
