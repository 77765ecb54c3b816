"""What `adapter_config.json` says: how strong each LoRA update is; and what only PEFT itself can compute, refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cart_hf.errors import UserError

_CHANGES_MORE = {
    "use_dora": "DoRA rescales the rows of the weights",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "trainable_token_indices": "it trains single tokens of the vocabulary",
    "target_parameters": "it adapts parameters that are no modules",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "it is for Megatron's parallel layers",
    "arrow_config": "Arrow chooses between adapters for each token",
    "use_bdlora": "BD-LoRA keeps its factors as blocks",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "kasa_config": "KaSA takes directions out of the base's weights",
}
"""PEFT's settings under which the weights are not base + scaling * B A."""

_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_bias", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_version", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
"""Settings about training, or that the tensors tell themselves, or that are read elsewhere."""

_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""The values of init_lora_weights that leave the base's weights as they are."""

_Pattern = Annotated[dict[str, float], BeforeValidator(lambda value: value or {})]


class LoraSettings(BaseModel):
    """The settings of a LoRA adapter that decide what it adds to the weights.

    :param r: rank.
    :param lora_alpha: numerator of the scaling.
    :param use_rslora: whether the scaling's denominator is the rank's square root.
    :param rank_pattern, alpha_pattern: other ranks and numerators, for modules whose names match.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    r: Annotated[int, Field(gt=0)] = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: _Pattern = {}
    alpha_pattern: _Pattern = {}

    @classmethod
    def read(cls, label: str, config: Mapping[str, Any]) -> LoraSettings:
        """Read an ``adapter_config.json``.

        :param label: the adapter, for messages.
        :raises UserError: when it is no LoRA, or one that adds more than a low-rank matrix to the base's weights.
        """
        kind = config.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{label} is a PEFT adapter of type {kind}; cart-hf merges LoRA adapters")
        advice = "merge it into its base first (PEFT: merge_and_unload, save_pretrained) and name that folder"
        for key, why in _CHANGES_MORE.items():
            if config.get(key):
                raise UserError(f"{label} has {key}: {why}, which cart-hf cannot compute; {advice}")
        start = config.get("init_lora_weights")
        if start not in _KEEPS_THE_BASE:
            raise UserError(
                f"{label} has init_lora_weights '{start}', which changes the base's weights before training; convert "
                f"it to a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion), or {advice}"
            )
        for key, value in config.items():
            unknown = key not in _HARMLESS and key not in _CHANGES_MORE and key not in cls.model_fields
            if unknown and key != "peft_type" and (value is True or (value and isinstance(value, dict | list))):
                raise UserError(f"{label} has the setting {key}, which this version of cart-hf does not know; {advice}")
        try:
            settings = cls.model_validate(dict(config))
            for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
                re.compile(pattern)
        except ValidationError as failure:
            first = failure.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{label}: adapter_config.json: {place}: {first['msg']}") from failure
        except re.error as failure:
            raise UserError(f"{label}: adapter_config.json: a pattern is no regular expression: {failure}") from failure
        return settings

    def rank(self, module: str) -> int:
        """Return the rank of a module's update."""
        return int(self.rank_pattern.get(_matching(self.rank_pattern, module), self.r))

    def scaling(self, module: str) -> float:
        """Return the factor of a module's update."""
        alpha, rank = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matching(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that is the end of a module's name, or a regular expression for it, as PEFT matches."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")
