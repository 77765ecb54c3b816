"""The `adapter_config.json` of an adapter, made by PEFT itself, so that old and new versions read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cart_hf.compression.outline import Outline
from cart_hf.recipe import Reference

_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def adapter_config(outline: Outline, ranks: Mapping[str, int], base: Reference | str) -> Any:
    """Return the ``LoraConfig`` of an adapter.

    The layers are named in full: a last name such as ``q_proj`` would reach CLIP's text tower too. ``lora_alpha`` is
    the rank, for each layer, so that the factors are added as they are.

    :param ranks: the rank of each layer, by module.
    :param base: the model that people add it to: a folder's path, or a reference.
    """
    from peft import LoraConfig

    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    task_type = _task_type(outline)
    config = LoraConfig(
        task_type=task_type,
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        modules_to_save=list(outline.saved) or None,
        lora_bias=outline.biased,
        fan_in_fan_out=any(target.transposed for target in outline.targets),
        inference_mode=True,
        base_model_name_or_path=base if isinstance(base, str) else base.path,
        revision=None if isinstance(base, str) else base.revision,
    )
    config.target_modules = sorted(ranks)  # PEFT would make it a set, whose order is another one in each run
    if task_type is None:
        config.auto_mapping = _auto_mapping(outline.class_name)
    return config


def _task_type(outline: Outline) -> str | None:
    """Return PEFT's name for the task; none where the head is saved layer by layer, which PEFT's classes cannot."""
    if any("." in module for module in outline.heads):
        return None
    return next((kind for ending, kind in _TASK_TYPES.items() if outline.class_name.endswith(ending)), None)


def _auto_mapping(class_name: str) -> dict[str, str]:
    """Return which class ``AutoPeftModel`` must load."""
    import transformers

    return {"base_model_class": class_name, "parent_library": getattr(transformers, class_name).__module__}
