"""Zero-shot heads: class names and prompt templates through a CLIP text tower."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cart_hf.errors import UserError
from cart_hf.sources.fingerprint import tensors_fingerprint

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_PROMPTS_AT_ONCE = 256


def class_embeddings(
    clip: Any, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> torch.Tensor:
    """Return a unit vector for each class, shape (classes, projection).

    It is the mean of the class's normalised prompt embeddings, normalised again (Radford et al., CLIP, section 3.1.4).

    :param clip: a CLIPModel.
    :param templates: prompts with ``{}`` for the class name.
    :raises UserError: when a template has no ``{}``.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise UserError(f"a prompt template needs '{{}}' for the class name: {wrong or 'none given'}")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    parts = [
        _prompt_embeddings(clip, tokenizer, prompts[start : start + _PROMPTS_AT_ONCE])
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE)
    ]
    rows = torch.cat(parts)
    by_class = rows.view(len(class_names), len(templates), rows.shape[-1])
    return nn.functional.normalize(by_class.mean(dim=1), dim=-1)


def cached_class_embeddings(
    clip: Any,
    tokenizer: Any,
    class_names: Sequence[str],
    templates: Sequence[str],
    cache: Path,
    tensors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Do the same, but keep the result in ``cache``, by text tower, class names and templates.

    :param tensors: what ``clip`` answers with, by name: its own tensors, and those of an adapter that is active.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from cart_hf.cache import write_through

    recipe = json.dumps([list(class_names), list(templates)])
    key = hashlib.sha256((recipe + _text_tower_hash(tensors)).encode()).hexdigest()[:32]
    path = cache / f"{key}.safetensors"
    device = next(clip.parameters()).device
    with suppress(OSError, SafetensorError):  # not there yet, or damaged
        stored: torch.Tensor = load_file(path)["classes"]
        return stored.to(device)
    found = class_embeddings(clip, tokenizer, class_names, templates)
    write_through(path, lambda place: save_file({"classes": found.cpu().contiguous()}, place))
    return found


def features(output: Any) -> torch.Tensor:
    """Return projected features: transformers 5 wraps them in an output object."""
    found = getattr(output, "pooler_output", output)
    assert isinstance(found, torch.Tensor)
    return found


@torch.no_grad()
def _prompt_embeddings(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    device = next(clip.parameters()).device
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
    known = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
    return nn.functional.normalize(features(clip.get_text_features(**known)), dim=-1)


def _text_tower_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    return tensors_fingerprint({name: tensor for name, tensor in tensors.items() if name.startswith("text")})
