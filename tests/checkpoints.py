"""Small real checkpoints, written by transformers itself, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}


def roberta_config(**changes) -> RobertaConfig:
    return RobertaConfig(**{**SMALL, "type_vocab_size": 1, **changes})


def clip_config() -> CLIPConfig:
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 60,
            "max_position_embeddings": 12,
            "projection_dim": 8,
            "bos_token_id": 57,
            "eos_token_id": 58,
            "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )


def save(model: PreTrainedModel, folder: Path, **options) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


def perturb(model: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    """Move every floating parameter as a fine-tune would: each tensor by its own random direction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def copy_backbone(target: PreTrainedModel, source: PreTrainedModel) -> None:
    """Start ``target``'s backbone from ``source``'s, as fine-tuning a pretrained model does."""
    state = source.base_model.state_dict()
    target.base_model.load_state_dict(
        {k: v for k, v in state.items() if k in target.base_model.state_dict()}, strict=False
    )


FAMILIES = {
    "roberta": (lambda **c: roberta_config(**c), RobertaForMaskedLM, RobertaForSequenceClassification),
    "bert": (lambda **c: BertConfig(**{**SMALL, **c}), BertForPreTraining, BertForSequenceClassification),
    "distilbert": (
        lambda **c: DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20, **c),
        DistilBertForMaskedLM,
        DistilBertForSequenceClassification,
    ),
    "deberta": (
        lambda **c: DebertaV2Config(**{**SMALL, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p"], **c}),
        DebertaV2ForMaskedLM,
        DebertaV2ForSequenceClassification,
    ),
    "vit": (
        lambda **c: ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8, **c),
        ViTModel,
        ViTForImageClassification,
    ),
    "gpt2": (
        lambda **c: GPT2Config(vocab_size=60, n_positions=20, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **c),
        GPT2LMHeadModel,
        GPT2ForSequenceClassification,
    ),
}  # fmt: skip


def make_family(
    folder: Path, family: str, tasks: int = 3, *, dtype: torch.dtype | None = None, **options
) -> tuple[str, list[str]]:
    """Write a base and ``tasks`` fine-tuned classifiers with 2, 3, 4 ... labels; return their folders."""
    config, base_class, task_class = FAMILIES[family]
    torch.manual_seed(0)
    base = base_class(config())
    base_folder = save(base.to(dtype) if dtype else base, folder / "base", **options)
    folders = []
    for task in range(tasks):
        model = task_class(config(num_labels=task + 2, id2label={i: f"{family}{task}-{i}" for i in range(task + 2)}))
        copy_backbone(model, base)
        perturb(model, seed=task + 1)
        folders.append(save(model.to(dtype) if dtype else model, folder / f"task{task}", **options))
    return base_folder, folders


def make_clip(folder: Path, tasks: int = 3) -> tuple[str, list[str]]:
    """Write a whole CLIP and ``tasks`` fine-tuned vision towers, without a processor, as on the Hub."""
    torch.manual_seed(0)
    base = CLIPModel(clip_config())
    base_folder = save(base, folder / "base")
    folders = []
    for task in range(tasks):
        tower = CLIPVisionModel(base.config.vision_config)
        tower.load_state_dict(base.vision_model.state_dict())
        perturb(tower, seed=task + 1)
        folders.append(save(tower, folder / f"task{task}"))
    return base_folder, folders


transformers.logging.set_verbosity_error()
