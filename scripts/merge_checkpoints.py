"""Checkpoints of real shape for `benchmark_merge.py`: random weights, updates with the spectra of real fine-tunes.

Tensors are made and written one at a time, so a model of any size is built without being held in memory; without
values the files hold their headers alone, over a hole that takes no disk, which is all that a dry run reads.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)
from weight_names import find

MAX_SHARD = 5 * 10**9
POWER = 0.6
UPDATE = 0.02  # a fine-tune's update over its weights, root mean squares
SIZES = {
    "vit-b32": (768, 12),
    "vit-l14": (1024, 24),
    "roberta-base": (768, 12),
    "roberta-large": (1024, 24),
    "mistral-7b": (4096, 32),
    "llama-70b": (8192, 80),
    "encoder": (256, 4),
}
DECODERS = ("mistral-7b", "llama-70b")
Spec = tuple[type[PreTrainedModel], PreTrainedConfig]
Values = Callable[[str, torch.Size], torch.Tensor]


def specs(shape: str, *, layers: int | None = None, width: int | None = None) -> tuple[Spec, Spec]:
    """Return class and configuration of the base and of its fine-tuned models."""
    usual, depth = SIZES[shape]
    width, depth = width or usual, layers or depth
    heads = max(1, width // (128 if shape in DECODERS else 64))
    blocks = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    if shape.startswith("vit"):
        patch, projection, text = (32, 512, 512) if shape == "vit-b32" else (14, 768, 768)
        vision = {**blocks, "intermediate_size": 4 * width, "patch_size": patch, "projection_dim": projection}
        words = {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64}
        whole = CLIPConfig(
            vision_config=vision,
            text_config={**words, "num_hidden_layers": min(depth, 12), "projection_dim": projection},
            projection_dim=projection,
        )
        return (CLIPModel, whole), (CLIPVisionModel, whole.vision_config)
    if shape == "mistral-7b":
        mistral = MistralConfig(**blocks, num_key_value_heads=max(1, width // 512), intermediate_size=7 * width // 2)
        return (MistralForCausalLM, mistral), (MistralForCausalLM, mistral)
    if shape == "llama-70b":
        grouped = {"num_key_value_heads": max(1, width // 1024), "vocab_size": 128256}
        llama = LlamaConfig(**blocks, **grouped, intermediate_size=7 * width // 2)
        return (LlamaForCausalLM, llama), (LlamaForCausalLM, llama)
    vocabulary = 1000 if shape == "encoder" else 50265
    positions = {"vocab_size": vocabulary, "max_position_embeddings": 514, "type_vocab_size": 1}
    encoder = RobertaConfig(**blocks, **positions, intermediate_size=4 * width)
    return (RobertaForMaskedLM, encoder), (RobertaForSequenceClassification, encoder)


def build(
    work: Path,
    shape: str,
    count: int,
    *,
    layers: int | None = None,
    width: int | None = None,
    power: float = POWER,
    empty: bool = False,
) -> tuple[Path, list[Path]]:
    """Write ``base`` and ``task0`` ... below a folder of ``work`` named after what is asked; keep those that are there.

    :param power: the update's singular values fall as i^-power.
    :param empty: headers only.
    :return: the folders of the base and of the models.
    """
    changes = {"layers": layers, "width": width, "power": None if power == POWER else power}
    parts = [shape, *(f"{name}{value}" for name, value in changes.items() if value), *(["empty"] if empty else [])]
    folder = work / "-".join(parts)
    base, models = folder / "base", [folder / f"task{i}" for i in range(count)]
    dtype = torch.bfloat16 if shape in DECODERS else torch.float32
    base_spec, task_spec = specs(shape, layers=layers, width=width)
    write_checkpoint(base, base_spec, dtype, None if empty else pretrained)
    weights = {} if empty else open_weights(base)
    for task, path in enumerate(models):

        def fine_tuned(name: str, size: torch.Size, task: int = task) -> torch.Tensor:
            start = read(weights, name) if find(weights, name) else pretrained(name, size)
            step = UPDATE * float(start.std(correction=0))
            return start + step * update(size, generator(f"{name} {task}"), power)

        write_checkpoint(path, task_spec, dtype, None if empty else fine_tuned)
    return base, models


def base_as_classifier(base: Path, task: Path) -> Path:
    """Write the base with a task's class and head beside it: mergekit refuses a base of another class.

    :return: its folder.
    """
    weights, head = open_weights(base), open_weights(task)
    folder = base.with_name("base-as-classifier")
    spec: Spec = (RobertaForSequenceClassification, RobertaConfig.from_pretrained(task))
    write_checkpoint(
        folder, spec, torch.float32, lambda name, size: read(weights if find(weights, name) else head, name)
    )
    return folder


def generator(name: str) -> torch.Generator:
    """Return a random generator that the name seeds."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def pretrained(name: str, shape: torch.Size) -> torch.Tensor:
    """Return a base's tensor: normal numbers, around 1 for the weight of a norm."""
    values = torch.randn(shape, generator=generator(name)).mul_(0.02)
    return values + 1 if len(shape) == 1 and name.endswith("weight") else values


def update(shape: torch.Size, random: torch.Generator, power: float) -> torch.Tensor:
    """Return a random update of unit root mean square: a power law over a Gaussian bulk for matrices."""
    noise = torch.randn(shape, generator=random)
    if len(shape) != 2 or min(shape) < 64:
        return noise
    k = min(128, min(shape))
    left, right = torch.randn(shape[0], k, generator=random), torch.randn(k, shape[1], generator=random)
    signal = (left * torch.arange(1, k + 1) ** -power) @ right
    return signal.mul_(0.95 / float(signal.std())).add_(noise, alpha=0.3)


def write_checkpoint(folder: Path, spec: Spec, dtype: torch.dtype, values: Values | None) -> None:
    """Write a checkpoint's configuration and safetensors shards, tensor by tensor, unless the folder is there.

    :param values: gives each tensor, float32; None writes headers only.
    """
    if folder.exists():
        return
    model_class, config = spec
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in model_class(config).named_parameters()}
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = cut(shapes, dtype.itemsize)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for shard, file in zip(shards, names if len(shards) > 1 else ["model.safetensors"], strict=True):
        write_shard(partial / file, shard, dtype, values)
    if len(shards) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        places = {name: file for shard, file in zip(shards, names, strict=True) for name in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        (partial / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config = config.__class__(**config.to_dict())
    config.architectures, config.dtype = [model_class.__name__], dtype
    config.save_pretrained(partial)
    partial.rename(folder)


def cut(shapes: Mapping[str, torch.Size], itemsize: int) -> list[dict[str, torch.Size]]:
    """Cut tensors into shards, in order."""
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * itemsize
        if shards[-1] and filled + nbytes > MAX_SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    return shards


def write_shard(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, values: Values | None) -> None:
    """Write one safetensors file: the header's length, the header, and one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind, end = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if values is None:
            os.ftruncate(file.fileno(), 8 + len(text) + end)
            return
        for name, shape in shapes.items():
            tensor = values(name, shape).to(dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def open_weights(place: Path) -> dict[str, Any]:
    """Return the open file that holds each tensor of a checkpoint's folder (or one file), by the tensor's name."""
    files = [safe_open(path, "pt") for path in (sorted(place.glob("*.safetensors")) if place.is_dir() else [place])]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping


def read(weights: Mapping[str, Any], name: str) -> torch.Tensor:
    """Return a tensor by its name in a fine-tuned model, float32 or wider."""
    found = find(weights, name)
    if found is None:
        raise KeyError(name)
    tensor: torch.Tensor = weights[found].get_tensor(found)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
