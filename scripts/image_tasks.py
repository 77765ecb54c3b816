"""What ``pretrain_clip.py`` and ``finetune_clip.py`` share: pictures as the model wants them, zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from cart_hf.serving.zero_shot import class_embeddings, features
from cart_hf.tasks import IMAGE, Task, TaskData, find_tasks, load_split

Batch = dict[str, torch.Tensor]


def image_tasks(names: list[str], tasks_file: Path | None) -> list[Task]:
    """Find the tasks; each has to be of images, with class names and templates for its prompts."""
    found = find_tasks(names, tasks_file=tasks_file)
    for task in found:
        if task.kind != IMAGE or not task.classes or not task.templates:
            raise ValueError(f"task '{task.name}' needs the kind {IMAGE}, classes and templates")
    return found


def labelled(task: Task, split: str, data: Path | None) -> tuple[TaskData, torch.Tensor]:
    """Read one split; the labels are int64, shape (examples,)."""
    examples = load_split(task, split, data=data)
    labels = torch.from_numpy(examples.labels).long()
    if int(labels.max()) >= len(task.classes):
        raise ValueError(f"task '{task.name}': label {int(labels.max())}, but only {len(task.classes)} classes")
    return examples, labels


class Images(torch.utils.data.Dataset[Batch]):
    """Examples as ``pixel_values`` (3, height, width) and ``labels``, made when asked for.

    :param change: applied to the picture before the image processor.
    """

    def __init__(self, examples: TaskData, labels: torch.Tensor, processor: Any, change: Any = None) -> None:
        self.examples, self.labels, self.processor, self.change = examples, labels, processor, change

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Batch:
        picture = self.examples.image(index)
        if self.change is not None:
            picture = self.change(picture)
        pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


def attention(device: torch.device) -> str:
    """The attention to train with: on a processor, plain products beat sdpa's backward pass on short sequences."""
    return "eager" if device.type == "cpu" else "sdpa"


def image_logits(clip: Any, head: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Zero-shot logits, shape (batch, classes), of a CLIPModel and a head of shape (classes, projection)."""
    images = torch.nn.functional.normalize(features(clip.get_image_features(pixel_values=pixels)), dim=-1)
    return clip.logit_scale.exp() * images @ head.T


@torch.no_grad()
def zero_shot_accuracy(
    clip: Any, tokenizer: Any, task: Task, batches: Iterable[Batch], accelerator: Accelerator
) -> float:
    """Share of examples that a CLIPModel labels correctly from the task's prompts."""
    clip.eval()
    head = class_embeddings(clip, tokenizer, task.classes, task.templates)
    correct = total = 0
    for batch in batches:
        with accelerator.autocast():
            logits = image_logits(clip, head, batch["pixel_values"])
        hits = accelerator.gather_for_metrics(logits.argmax(-1) == batch["labels"])
        correct += int(hits.sum())
        total += len(hits)
    return correct / total


def evaluation_loader(images: Images, batch_size: int, accelerator: Accelerator) -> DataLoader[Batch]:
    """Every example once, shared out over the processes."""
    loader: DataLoader[Batch] = accelerator.prepare(DataLoader(images, batch_size=batch_size))
    return loader
