"""Model classes of transformers, built on the meta device: what `architecture` knows, it learns here.

Importing transformers' modelling code takes longer than many a merge. So nothing here is needed for an architecture
that was met before: see `architecture`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@cache
def build(structure: str, class_name: str) -> PreTrainedModel:
    """Build a model on the meta device (no memory, no weights), once for all checkpoints of one structure.

    :param structure: a ``config.json``.
    :param class_name: its class; empty for the one without a head.
    :raises UserError: when transformers cannot; it does not say whose configuration it is.
    """
    import transformers

    data = json.loads(structure)
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
            model: PreTrainedModel = model_class(config_class.from_dict(data))
    except Exception as failure:  # whatever a configuration or a model raises for values that make no sense
        reason = " ".join(str(failure).split())[:300]
        raise UserError(f"transformers cannot build {model_class.__name__} from config.json: {reason}") from failure
    return model


def description(model: PreTrainedModel) -> dict[str, Any]:
    """Return what an :class:`~cart_hf.sources.architecture.Architecture` holds, as JSON has it."""
    from transformers import PreTrainedModel

    submodels = {
        path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, PreTrainedModel)
    }
    settings = {
        path: {key: getattr(model.get_submodule(path).config, key, None) for key in FUNCTIONAL_SETTINGS}
        for path in submodels
    }
    class_name = type(model).__name__
    data = {
        "class_name": class_name,
        "shared_head": _has_shared_head(class_name),
        "bare": _is_bare(class_name),
        "slots": _slots(model),
        "tied": dict(getattr(model, "all_tied_weights_keys", None) or {}),
        "submodels": submodels,
        "settings": settings,
    }
    described: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return described


def task_class(model_type: str, task_type: str) -> str | None:
    """Return the class that PEFT's task type means for a kind of model, if there is one."""
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "FEATURE_EXTRACTION": auto.MODEL_MAPPING_NAMES,
    }
    found = tables.get(task_type, {}).get(model_type)
    return found if isinstance(found, str) or found is None else found[0]


def is_of_libraries(model: PreTrainedModel) -> bool:
    """Whether all of the model is defined by transformers and torch, so that their versions say what it is."""
    return all(type(module).__module__.partition(".")[0] in ("transformers", "torch") for module in model.modules())


def module_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Map a checkpoint's file keys to (module name, slot) by transformers' own rules.

    The two differ only for tensors that transformers fuses on loading (experts of a mixture): many file tensors
    then share one slot, and each keeps a name of its own.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    # Made anew for each checkpoint, and applied in order: some rules remember what they have matched.
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
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


def _bare_class(config_class: type) -> Any:
    """Return the class without a head that belongs to a configuration, or None."""
    import transformers

    found = transformers.MODEL_MAPPING.get(config_class, None)
    return found[0] if isinstance(found, tuple) else found


def _has_shared_head(class_name: str) -> bool:
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_MAPPING_NAMES,
        auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return class_name.endswith("WithProjection") or any(class_name in _classes(table) for table in tables)


def _is_bare(class_name: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return class_name in _classes(MODEL_MAPPING_NAMES)


def _classes(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    return {name for entry in table.values() for name in ((entry,) if isinstance(entry, str) else entry)}


def _slots(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    from transformers.pytorch_utils import Conv1D

    linear: set[str] = set()
    transposed: set[str] = set()
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            linear.add(f"{path}.weight")
            if isinstance(module, Conv1D):
                transposed.add(f"{path}.weight")
        elif isinstance(module, torch.nn.ModuleList):
            lists[path] = len(module)
    return {
        name: {
            "shape": tuple(tensor.shape),
            "linear": name in linear,
            "block": _block_of(name, lists),
            "transposed": name in transposed,
        }
        for name, tensor in model.state_dict().items()
    }


def _block_of(name: str, lists: Mapping[str, int]) -> dict[str, Any] | None:
    """Find the outermost module list that ``name`` lies in."""
    for match in re.finditer(r"\.(\d+)\.", name):
        path = name[: match.start()]
        if path in lists:
            return {"path": path, "index": int(match.group(1)), "count": lists[path]}
    return None
