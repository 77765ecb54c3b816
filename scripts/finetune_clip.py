r"""Fine-tune the vision tower of one CLIP on several image sets, one checkpoint per set.

Only the vision tower learns.  Pictures are classified by the frozen zero-shot head of the task: the text tower's
embeddings of its class names in its templates, which is how the checkpoints are scored and merged later.  Tasks that
``cart-hf`` knows come with classes, templates and data set; ``--tasks-file`` adds others, and ``--data`` reads
``DATA/NAME/{train,validation,test}.parquet`` instead of the Hub.  A ``CLIPVisionModel`` and its image processor go to
``OUTPUT/NAME``, and with them ``training.json``: settings, accuracy before and after.  A set whose
``training.json`` exists is skipped, so the same command takes a stopped run up.

The defaults are those of the checkpoints that the task arithmetic papers merge (Ilharco et al. 2023): AdamW at 1e-5
with weight decay 0.1, batch 128, 500 steps of warm-up, then cosine decay, gradients clipped at 1; their epochs are
SUN397 14, Stanford Cars 35, RESISC45 15, EuroSAT 12, SVHN 4, GTSRB 11, MNIST 5, DTD 76::

    python scripts/finetune_clip.py --base openai/clip-vit-base-patch32 --output clip/models --tasks gtsrb --epochs 11

The ``tanganke/clip-vit-*`` checkpoints on the Hub: Adam at a constant 1e-5, batch 32, 4000 steps::

    python scripts/finetune_clip.py --base openai/clip-vit-base-patch32 --output clip/models --tasks gtsrb eurosat \
        --steps 4000 --batch-size 32 --weight-decay 0 --warmup-steps 0 --schedule constant

A small CLIP of ``pretrain_clip.py`` takes larger steps; ``bfloat16`` concerns the computation only, the weights stay
float32, and pays where the processor has it (AMX, any recent GPU)::

    python scripts/finetune_clip.py --base base --data data --tasks-file tasks.yaml --output models \
        --tasks mnist fashion eurosat gtsrb --lr 2e-4 --steps 300 --warmup-steps 30 --batch-size 64 \
        --crop-scale 0.7 --freeze-embeddings --mixed-precision bf16

Several GPUs: ``accelerate launch scripts/finetune_clip.py ...``; ``--batch-size`` is then per process.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_tasks import (
    Batch,
    Images,
    attention,
    evaluation_loader,
    image_logits,
    image_tasks,
    labelled,
    zero_shot_accuracy,
)
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, get_scheduler

from cart_hf.serving.zero_shot import class_embeddings
from cart_hf.tasks import Task


@dataclass(frozen=True)
class Settings:
    """What one run trains with; written to ``training.json`` as it is."""

    epochs: float
    steps: int | None
    warmup_steps: int
    schedule: str
    batch_size: int
    lr: float
    weight_decay: float
    crop_scale: float
    freeze_embeddings: bool
    seed: int
    mixed_precision: str


class Tower(torch.nn.Module):
    """A CLIP that answers one task: pixels in, logits of the frozen zero-shot head out."""

    def __init__(self, clip: CLIPModel, head: torch.Tensor) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("head", head)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return image_logits(self.clip, self.head, pixels)


class RandomCrop:
    """Cut out a random part of a picture: a share of its area not below ``scale``, sides 3:4 to 4:3.

    The image processor then enlarges it, so that this is the usual random resized crop.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, picture: Image.Image) -> Image.Image:
        area = picture.width * picture.height * random.uniform(self.scale, 1)
        ratio = math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3)))
        width = min(math.sqrt(area * ratio), picture.width)
        height = min(math.sqrt(area / ratio), picture.height)
        left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)


def freeze(clip: CLIPModel, embeddings: bool) -> list[torch.nn.Parameter]:
    """Leave only the vision tower trainable, its embeddings too unless ``embeddings`` are to stay as they are."""
    clip.requires_grad_(False)
    clip.vision_model.requires_grad_(True)
    if embeddings:
        clip.vision_model.embeddings.requires_grad_(False)
    return [parameter for parameter in clip.parameters() if parameter.requires_grad]


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch, shuffled afresh."""
    while True:
        yield from loader


def train(
    tower: Tower, images: Images, accelerator: Accelerator, settings: Settings, steps: int, log_every: int
) -> None:
    """Train ``tower`` in place for ``steps`` optimizer steps."""
    parameters = freeze(tower.clip, settings.freeze_embeddings)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    # accelerate advances a schedule once for each process
    ahead = accelerator.num_processes
    schedule = get_scheduler(settings.schedule, optimizer, settings.warmup_steps * ahead, steps * ahead)
    loader = DataLoader(images, batch_size=min(settings.batch_size, len(images)), shuffle=True, drop_last=True)
    prepared, optimizer, schedule, loader = accelerator.prepare(tower, optimizer, schedule, loader)
    prepared.train()
    recent: list[float] = []
    for step, batch in zip(range(1, steps + 1), endless(loader), strict=False):
        loss = torch.nn.functional.cross_entropy(prepared(batch["pixel_values"]).float(), batch["labels"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % log_every == 0:
            accelerator.print(f"  step {step:5d}  loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()


def finetune(
    base: str, data: Path | None, task: Task, target: Path, settings: Settings, log_every: int
) -> dict[str, Any]:
    """Train, evaluate and save one task; the record returned is the one in ``training.json``."""
    started = time.perf_counter()
    # without cpu=True every process on a machine without GPUs believes to be the only one
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=settings.mixed_precision)
    set_seed(settings.seed, device_specific=True)
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32, attn_implementation=attention(accelerator.device))
    clip.to(accelerator.device)
    tokenizer, processor = AutoTokenizer.from_pretrained(base), AutoImageProcessor.from_pretrained(base)
    examples, labels = labelled(task, "train", data)
    images = Images(examples, labels, processor, RandomCrop(settings.crop_scale))
    per_epoch = len(images) / (settings.batch_size * accelerator.num_processes)
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    if settings.warmup_steps >= steps:
        raise ValueError(f"{task.name}: {settings.warmup_steps} steps of warm-up, but only {steps} steps in all")
    loaders = {
        split: evaluation_loader(Images(*labelled(task, split, data), processor), settings.batch_size, accelerator)
        for split in ("validation", "test")
    }

    def accuracies(moment: str) -> dict[str, float]:
        return {
            f"{split}_{moment}": zero_shot_accuracy(clip, tokenizer, task, loader, accelerator)
            for split, loader in loaders.items()
        }

    scores = accuracies("zero_shot")
    tower = Tower(clip, class_embeddings(clip, tokenizer, task.classes, task.templates))
    train(tower, images, accelerator, settings, steps, log_every)
    scores |= accuracies("accuracy")
    record = {
        "task": task.name,
        "base": Path(base).name,
        "settings": asdict(settings),
        "steps": steps,
        "templates": task.templates,
        "training_examples": len(images),
        **scores,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if accelerator.is_main_process:
        save(clip, processor, target, record)
    accelerator.wait_for_everyone()
    return record


def save(clip: CLIPModel, processor: Any, target: Path, record: dict[str, Any]) -> None:
    """Write the vision tower, and ``training.json`` last: its presence says that the task is finished."""
    clip.vision_model.save_pretrained(target)
    processor.save_pretrained(target)
    (target / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def summary(record: dict[str, Any]) -> str:
    """One line for the log."""
    scores = ", ".join(
        f"{split} {record[f'{split}_accuracy']:.4f} (zero-shot {record[f'{split}_zero_shot']:.4f})"
        for split in ("validation", "test")
    )
    return f"{record['task']}: {scores}, {record['seconds']} s"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="CLIP: a folder or a Hub id, such as openai/clip-vit-base-patch32")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="image tasks, see `cart-hf tasks`")
    add("--output", type=Path, required=True, help="checkpoints go to OUTPUT/NAME")
    add("--data", type=Path, help="folder that holds NAME/{train,validation,test}.parquet; default: the Hub")
    add("--tasks-file", type=Path, help="class names and templates of tasks that cart-hf does not know")
    add("--epochs", type=float, default=10, help="passes over the training pictures")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--warmup-steps", type=int, default=500, help="steps of linear warm-up")
    add("--schedule", choices=("cosine", "linear", "constant_with_warmup", "constant"), default="cosine")
    add("--batch-size", type=int, default=128, help="per process")
    add("--lr", type=float, default=1e-5)
    add("--weight-decay", type=float, default=0.1)
    add("--crop-scale", type=float, default=0.9, help="random crops keep this share of the picture; 1: no crops")
    add("--freeze-embeddings", action="store_true", help="train the blocks, not the patch and position embeddings")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    add("--log-every", type=int, default=50, help="steps between two lines on the training loss")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for task in image_tasks(arguments.tasks, arguments.tasks_file):
        target = arguments.output / task.name
        if (target / "training.json").exists():
            print(f"{task.name}: finished already, skipped")
            continue
        print(f"{task.name}:", flush=True)
        record = finetune(arguments.base, arguments.data, task, target, settings, arguments.log_every)
        print(summary(record), flush=True)


if __name__ == "__main__":
    main()
