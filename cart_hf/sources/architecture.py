"""Architectures, known without weights: the model class built on the meta device, and what its tensors are.

File keys are not module names (CLIP's vision prefix, ViT, fused experts), and transformers reverses on saving whatever
renaming it did on loading. So file keys are mapped to module names by transformers' own rules, and two classes of one
family (RobertaForMaskedLM, RobertaForSequenceClassification) are aligned by the sub-models they share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAMES_ONLY = ("_name_or_path", "finetuning_task", "transformers_version")
FUNCTIONAL_SETTINGS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "activation",
    "activation_function",
    "position_embedding_type",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "rope_theta",
    "relative_attention",
    "pos_att_type",
)
"""Settings that change what the same tensors compute: models that differ in one cannot be merged."""


@dataclass(frozen=True)
class Block:
    """Where a tensor stands among the repeated blocks of its tower.

    :param path: the module list, such as ``encoder.layer``.
    :param index: the block's place in it, from 0.
    :param count: how many blocks it has.
    """

    path: str
    index: int
    count: int

    @property
    def position(self) -> float:
        """0 for the first block, 1 for the last (and for a single one), as mergekit's gradients count."""
        return self.index / (self.count - 1) if self.count > 1 else 1.0


@dataclass(frozen=True)
class Slot:
    """A tensor that an architecture has room for.

    :param shape: its shape.
    :param linear: whether it is the weight of a linear layer (nn.Linear or GPT-2's Conv1D).
    :param block: its block, or None outside the blocks.
    """

    shape: tuple[int, ...]
    linear: bool
    block: Block | None


class Architecture:
    """A model class with a configuration.

    :param model: the model on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel

        self.class_name = type(model).__name__
        self.slots = _slots(model)
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        # type name of every sub-model by path; "" is the model itself
        self.submodels: dict[str, str] = {
            path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, PreTrainedModel)
        }
        # what each sub-model computes with its tensors, as far as their shapes do not tell
        self.settings: dict[str, dict[str, Any]] = {
            path: {key: getattr(model.get_submodule(path).config, key, None) for key in FUNCTIONAL_SETTINGS}
            for path in self.submodels
        }
        self._model = model

    def module_names(self, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Map a checkpoint's file keys to (module name, slot) by transformers' own rules.

        The two differ only for tensors that transformers fuses on loading (experts of a mixture): many file tensors
        then share one slot, and each keeps a name of its own.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        # Made anew for each checkpoint, and applied in order: some rules remember what they have matched.
        rules = get_model_conversion_mapping(self._model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        names: dict[str, tuple[str, str]] = {}
        for key in sorted(keys):
            slot, converted = rename_source_key(key, renamings, converters, prefix, state)
            name = slot
            if converted is not None:
                name, _ = rename_source_key(key, renamings, [])
                unprefixed, _ = rename_source_key(key, renamings, converters)
                if slot != unprefixed:  # the base model's prefix was added or removed: the same for the name
                    added = slot.startswith(f"{prefix}.")
                    name = f"{prefix}.{name}" if added else name.removeprefix(f"{prefix}.")
            names[key] = name, slot
        return names

    def path_of(self, other: Architecture) -> dict[str, str]:
        """Say which sub-models of ``other`` are this architecture's: {path in other: path here}, outermost first.

        A path stands for everything below it. Sub-models match by class; among several of one class (T5's two
        stacks), by class and path.
        """
        found: dict[str, str] = {}
        for path, kind in other.submodels.items():
            if renamed(path, found) is not None:
                continue
            here = [p for p, k in self.submodels.items() if k == kind]
            if here:
                found[path] = path if path in here else here[0]
        return found


def describe(config: Mapping[str, Any], label: str, *, bare: bool = False) -> Architecture:
    """Build the architecture that a ``config.json`` describes, on the meta device (no memory, no weights).

    :param config: the parsed ``config.json``.
    :param label: whose it is, for messages.
    :param bare: the model without any head (what ``AutoModel`` builds), whatever ``architectures`` says.
    :raises UserError: when transformers does not know it, or it needs remote code or is quantised.
    """
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{label}: config.json names no model_type; cart-hf merges transformers models")
    quantization = config.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
        raise UserError(f"{label} is quantised ({kind}); merge the full-precision weights")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{label}: architectures in config.json must be a list of class names, not {names!r}")
    # names of models and runs do not change the structure: leave them out of the cache's key
    structural = {key: value for key, value in config.items() if key not in NAMES_ONLY}
    try:
        return _build(json.dumps(structural, sort_keys=True, default=str), "" if bare or not names else names[0])
    except UserError as failure:
        raise UserError([f"{label}: {problem}" for problem in failure.problems]) from failure


def renamed(name: str, paths: Mapping[str, str]) -> str | None:
    """Rename what lies at or under one of ``paths`` ({path: new path}, "" for the root); None for what does not."""
    for path, new in paths.items():
        if path == "" or name == path or name.startswith(f"{path}."):
            rest = name.removeprefix(path).removeprefix(".")
            return ".".join(part for part in (new, rest) if part)
    return None


@cache
def _build(config_json: str, class_name: str) -> Architecture:
    """Build the architecture once for all models of one configuration; errors do not say whose it is."""
    import transformers

    data = json.loads(config_json)
    model_type = data.pop("model_type")
    installed = f"transformers {transformers.__version__}"
    if model_type not in transformers.CONFIG_MAPPING:
        reason = (
            "and needs remote code, which cart-hf never runs" if data.get("auto_map") else "; upgrade transformers?"
        )
        raise UserError(f"model type '{model_type}' is unknown to {installed} {reason}".replace(" ;", ";"))
    config_class = transformers.CONFIG_MAPPING[model_type]
    model_class = getattr(transformers, class_name, None) if class_name else _bare_class(config_class)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UserError(f"{installed} has no model class {class_name or model_type} (config.json: architectures)")
    try:
        with torch.device("meta"):
            model = model_class(config_class.from_dict(data))
    except Exception as failure:  # whatever a configuration or a model raises for values that make no sense
        reason = " ".join(str(failure).split())[:300]
        raise UserError(f"transformers cannot build {model_class.__name__} from config.json: {reason}") from failure
    return Architecture(model)


def _bare_class(config_class: type) -> Any:
    """Return the class without a head that belongs to a configuration, or None."""
    import transformers

    found = transformers.MODEL_MAPPING.get(config_class, None)
    return found[0] if isinstance(found, tuple) else found


def _slots(model: torch.nn.Module) -> dict[str, Slot]:
    from transformers.pytorch_utils import Conv1D

    linear: set[str] = set()
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            linear.add(f"{path}.weight")
        elif isinstance(module, torch.nn.ModuleList):
            lists[path] = len(module)
    return {
        name: Slot(tuple(tensor.shape), name in linear, _block_of(name, lists))
        for name, tensor in model.state_dict().items()
    }


def _block_of(name: str, lists: Mapping[str, int]) -> Block | None:
    """Find the outermost module list that ``name`` lies in."""
    for match in re.finditer(r"\.(\d+)\.", name):
        path = name[: match.start()]
        if path in lists:
            return Block(path, int(match.group(1)), lists[path])
    return None
