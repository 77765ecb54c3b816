"""transformers' configuration of an open_clip model: the base's, or deduced from the shapes of its tensors."""

from __future__ import annotations

import math
from typing import Any

from cart_hf.conversion.contents import Contents
from cart_hf.errors import UserError
from cart_hf.sources import Checkpoint

HEAD_WIDTH = 64  # of OpenAI's models and of open_clip's up to this width; its larger ones vary
WIDEST_KNOWN = 1024
_BLOCK = "transformer.resblocks.0."


def base_config(base: Checkpoint, vision_only: bool) -> dict[str, Any]:
    """Return the base's configuration for the class that is written."""
    config = {k: v for k, v in base.config.items() if k not in ("_name_or_path", "torch_dtype", "dtype")}
    if not vision_only:
        return config
    width = base.architecture.slots["visual_projection.weight"].shape[0]
    vision = {k: v for k, v in config["vision_config"].items() if k not in ("_name_or_path", "torch_dtype", "dtype")}
    return vision | {"model_type": "clip_vision_model", "projection_dim": width}


def deduced_config(contents: Contents, activation: str, vision_only: bool) -> dict[str, Any]:
    """Deduce a configuration from shapes: width, blocks, patch, resolution, heads (64 wide), vocabulary.

    :raises UserError: when a tensor that says it is missing, or shapes do not fit each other.
    """
    width, _, patch, other = _shape(contents, "visual.conv1.weight", 4)
    positions, _ = _shape(contents, "visual.positional_embedding", 2)
    grid = math.isqrt(positions - 1)
    if patch != other or grid * grid != positions - 1:
        raise UserError(
            f"{contents.archive.path}: the image or its patches are not square; transformers' CLIP has both so"
        )
    vision = {
        "model_type": "clip_vision_model",
        "hidden_act": activation,
        "image_size": grid * patch,
        "patch_size": patch,
        "projection_dim": _shape(contents, "visual.proj", 2)[1],
    } | _tower(contents, "visual.", width)
    if vision_only:
        return vision
    vocabulary, width = _shape(contents, "token_embedding.weight", 2)
    text = {
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(contents, "positional_embedding", 2)[0],
        "projection_dim": _shape(contents, "text_projection", 2)[1],
        "bos_token_id": vocabulary - 2,  # open_clip's tokenizer adds its two marks last, and pools at the highest id
        "eos_token_id": vocabulary - 1,
    } | _tower(contents, "", width)
    return {
        "model_type": "clip",
        "projection_dim": vision["projection_dim"],
        "vision_config": vision,
        "text_config": text,
    }


def check_settings(contents: Contents, base: Checkpoint, activation: str | None) -> None:
    """Refuse a base that computes something else with the same tensors, as far as file or user say.

    :raises UserError: naming both settings.
    """
    problems = []
    for tower, path in (("visual.", "vision_model"), ("", "text_model")):
        theirs = base.architecture.settings.get(path, {})
        ours = {"hidden_act": contents.activation or activation, "num_attention_heads": contents.heads(tower)}
        problems += [
            f"{contents.archive.path} has {key} {value!r} where the base ({base.reference}) has {theirs[key]!r}"
            for key, value in ours.items()
            if value is not None and theirs.get(key, value) != value
        ]
    if problems:
        raise UserError(problems[0])


def chosen_activation(contents: Contents, wanted: str | None) -> str:
    """Return the activation: what the file says, else what is wanted, else OpenAI's QuickGELU.

    Training code that starts from OpenAI's weights gets QuickGELU from open_clip even where the model's name
    (``ViT-B-32``) stands for plain GELU; weights that open_clip itself trained under that name use GELU.

    :raises UserError: when file and wish differ.
    """
    found = contents.activation
    if found and wanted and found != wanted:
        raise UserError(f"{contents.archive.path}: its blocks use {found}, not {wanted}; leave --activation out")
    return found or wanted or "quick_gelu"


def _tower(contents: Contents, tower: str, width: int) -> dict[str, int]:
    heads = contents.heads(tower)
    if heads is None and (width > WIDEST_KNOWN or width % HEAD_WIDTH):
        raise UserError(
            f"{contents.archive.path}: a tower of width {width}, and the file does not say how many attention heads it "
            "has; give --base, whose configuration says"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": contents.blocks(tower),
        "num_attention_heads": heads or width // HEAD_WIDTH,
        "intermediate_size": _shape(contents, f"{tower}{_BLOCK}mlp.c_fc.weight", 2)[0],
    }


def _shape(contents: Contents, name: str, dimensions: int) -> tuple[int, ...]:
    tensor = contents.tensors.get(name)
    if tensor is None or len(tensor.shape) != dimensions:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise UserError(f"{contents.archive.path}: tensor '{name}' is {found}; no CLIP of open_clip's without it")
    return tensor.shape
