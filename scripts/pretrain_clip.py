r"""Train a small CLIP from scratch: the base that ``finetune_clip.py`` starts from where no real CLIP is at hand.

Captions are class names in the templates of the tasks (``cart-hf`` knows the usual ones; ``--tasks-file`` adds
others), a fresh template each time.  The loss is CLIP's, in which all pictures and captions of one class in the
batch are positives (UniCL, Yang et al. 2022): with so few classes a batch holds each of them several times.
``--tasks`` are sets that a model will be fine-tuned on: the base sees only ``--examples-per-class`` of their
training pictures, so that fine-tuning has something left to teach.  ``--extra`` sets are used in full::

    python scripts/pretrain_clip.py --data data --tasks-file tasks.yaml --output base --mixed-precision bf16 \
        --tasks mnist usps digits fashion eurosat gtsrb letters dots --extra glyphs shapes \
        --flip fashion eurosat dots shapes

``OUTPUT`` is a whole CLIP folder: ``CLIPModel``, a byte-pair tokenizer learnt from the captions, an image
processor, and ``training.json`` with the settings and the zero-shot accuracy on each validation split.
``bfloat16`` concerns the computation only; it pays where the processor has it (AMX, any recent GPU).
Several GPUs: ``accelerate launch scripts/pretrain_clip.py ...``; each process contrasts its own batch.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_tasks import Images, attention, evaluation_loader, image_tasks, labelled, zero_shot_accuracy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    get_cosine_schedule_with_warmup,
)

from cart_hf.tasks import Task

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CONTEXT = 32  # tokens of a caption


@dataclass(frozen=True)
class Settings:
    """What one run trains with; written to ``training.json`` as it is."""

    examples_per_class: int
    steps: int
    warmup_steps: int
    batch_size: int
    lr: float
    weight_decay: float
    image_size: int
    patch_size: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    projection: int
    seed: int
    mixed_precision: str


@dataclass(frozen=True)
class Corpus:
    """All training pictures.

    :param pixels: what the image processor made of them, shape (examples, 3, size, size).
    :param classes: class name of each, in lower case: pictures that share it are positives of one another.
    :param templates: prompts that fit each.
    :param weights: how often each is drawn, shape (examples,).
    :param flip: where a mirror image shows the same class, bool, shape (examples,).
    """

    pixels: torch.Tensor
    classes: list[str]
    templates: list[tuple[str, ...]]
    weights: torch.Tensor
    flip: torch.Tensor


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the captions is one token.

    The end-of-text token has the largest id, as in OpenAI's.  It must not be 2: transformers takes that for the
    mark of an old configuration and pools the caption where the token id is largest.
    """
    clip = CLIPTokenizer().backend_tokenizer
    learnt = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learnt.normalizer, learnt.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=50_000, end_of_word_suffix=WORD_END, show_progress=False)
    learnt.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def make_model(settings: Settings, tokenizer: CLIPTokenizer, device: torch.device) -> CLIPModel:
    """A fresh CLIP: heads of 64 channels, feed-forward four times as wide, GELU (faster than CLIP's quick GELU)."""
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (START, END))
    shared = {"hidden_act": "gelu", "projection_dim": settings.projection}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=settings.text_width,
        intermediate_size=4 * settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=settings.text_width // 64,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        **shared,
    )
    vision = CLIPVisionConfig(
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 64,
        **shared,
    )
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection)
    return CLIPModel._from_config(config, attn_implementation=attention(device))


def chosen(labels: torch.Tensor, per_class: int, generator: torch.Generator) -> list[int]:
    """Positions of at most ``per_class`` random examples of each class."""
    taken: Counter[int] = Counter()
    positions = []
    for position in torch.randperm(len(labels), generator=generator).tolist():
        label = int(labels[position])
        if taken[label] < per_class:
            taken[label] += 1
            positions.append(position)
    return positions


def make_corpus(
    tasks: list[Task], extra: list[Task], flip: list[str], data: Path, processor: CLIPImageProcessor, settings: Settings
) -> Corpus:
    """Read the training pictures; a set is drawn from in proportion to the square root of its number of classes."""
    generator = torch.Generator().manual_seed(settings.seed)
    pixels, weights, mirrored = [], [], []
    classes: list[str] = []
    templates: list[tuple[str, ...]] = []
    for task in [*tasks, *extra]:
        examples, labels = labelled(task, "train", data)
        images = Images(examples, labels, processor)
        part = chosen(labels, settings.examples_per_class, generator) if task in tasks else range(len(images))
        pixels += [images[position]["pixel_values"] for position in part]
        classes += [task.classes[int(labels[position])].lower() for position in part]
        templates += [task.templates] * len(part)
        weights += [len(task.classes) ** 0.5 / len(part)] * len(part)
        mirrored += [task.name in flip] * len(part)
        print(f"{task.name}: {len(part)} of {len(images)} training pictures", flush=True)
    return Corpus(torch.stack(pixels), classes, templates, torch.tensor(weights), torch.tensor(mirrored))


def augment(pixels: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Turn, stretch, shift, mirror where ``flip`` allows it, erase a box, change brightness and contrast.

    :param pixels: shape (batch, 3, size, size).
    :param flip: bool, shape (batch,).
    """
    count, size = len(pixels), pixels.shape[-1]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, device=pixels.device).uniform_(low, high)

    turn = uniform(-0.25, 0.25)
    wide, high = uniform(0.8, 1.2), uniform(0.8, 1.2)
    wide = torch.where(flip & (uniform(0, 1) < 0.5), -wide, wide)
    rows = [
        torch.stack([wide * turn.cos(), -high * turn.sin() + uniform(-0.15, 0.15), uniform(-0.15, 0.15)], dim=1),
        torch.stack([wide * turn.sin(), high * turn.cos(), uniform(-0.15, 0.15)], dim=1),
    ]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    place = torch.arange(size, device=pixels.device)
    x, y, side = (uniform(0, size)[:, None] for _ in range(3))
    side = side / 2 - size / 8  # a quarter of the pictures stays whole
    box = ((place - x).abs() < side / 2)[:, None, None, :] & ((place - y).abs() < side / 2)[:, None, :, None]
    moved = moved.masked_fill(box, 0.0)
    return moved * uniform(0.7, 1.3)[:, None, None, None] + uniform(-0.3, 0.3)[:, None, None, None]


def batches(corpus: Corpus, settings: Settings, seed: int) -> Iterator[tuple[torch.Tensor, list[str], torch.Tensor]]:
    """Endless batches: augmented pictures, a caption for each, and the number of each one's class."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    number = {name: index for index, name in enumerate(sorted(set(corpus.classes)))}
    while True:
        drawn = torch.multinomial(corpus.weights, settings.batch_size, generator=generator)
        captions = [rng.choice(corpus.templates[i]).format(corpus.classes[i]) for i in drawn.tolist()]
        classes = torch.tensor([number[corpus.classes[i]] for i in drawn.tolist()])
        yield augment(corpus.pixels[drawn], corpus.flip[drawn]), captions, classes


def contrastive_loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """CLIP's loss with every pair of the same class as a positive.

    :param logits: pictures against captions, shape (batch, batch).
    :param classes: shape (batch,).
    """
    same = (classes[:, None] == classes[None, :]).float()
    targets = same / same.sum(dim=1, keepdim=True)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def make_optimizer(model: CLIPModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW with CLIP's betas; no weight decay for biases, norms, embeddings' scale (vectors and numbers)."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def train(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    corpus: Corpus,
    accelerator: Accelerator,
    settings: Settings,
    log_every: int,
) -> CLIPModel:
    """Train for ``settings.steps`` optimizer steps and return the model."""
    optimizer = make_optimizer(model, settings)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    recent: list[float] = []
    started = time.perf_counter()
    source = batches(corpus, settings, settings.seed + accelerator.process_index)
    for step, (pixels, captions, classes) in zip(range(1, settings.steps + 1), source, strict=False):
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(accelerator.device)
        pixels = pixels.to(accelerator.device)
        output = prepared(pixel_values=pixels, **tokens)
        loss = contrastive_loss(output.logits_per_image.float(), classes.to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % log_every == 0:
            rate = step * settings.batch_size / (time.perf_counter() - started)
            mean = sum(recent) / len(recent)
            accelerator.print(f"  step {step:5d}  loss {mean:.4f}  {rate:.0f} pictures a second", flush=True)
            recent.clear()
    trained: CLIPModel = accelerator.unwrap_model(prepared)
    return trained


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that holds NAME/{train,validation}.parquet")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="sets to be fine-tuned on later")
    add("--extra", nargs="*", default=[], metavar="NAME", help="sets used in full, for variety")
    add("--tasks-file", type=Path, help="class names and templates of tasks that cart-hf does not know")
    add("--flip", nargs="*", default=[], metavar="NAME", help="sets whose mirror images show the same class")
    add("--output", type=Path, required=True, help="folder for the model")
    add("--examples-per-class", type=int, default=20, help="training pictures of each class of --tasks")
    add("--steps", type=int, default=3000, help="optimizer steps")
    add("--warmup-steps", type=int, default=200, help="steps of linear warm-up; cosine decay follows")
    add("--batch-size", type=int, default=128, help="per process")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--image-size", type=int, default=32)
    add("--patch-size", type=int, default=8)
    add("--width", type=int, default=256, help="channels of the vision tower, a multiple of 64")
    add("--layers", type=int, default=6, help="blocks of the vision tower")
    add("--text-width", type=int, default=128, help="channels of the text tower, a multiple of 64")
    add("--text-layers", type=int, default=2)
    add("--projection", type=int, default=128, help="channels that pictures and captions share")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    add("--log-every", type=int, default=50, help="steps between two lines on the training loss")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    # without cpu=True every process on a machine without GPUs believes to be the only one
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=settings.mixed_precision)
    set_seed(settings.seed, device_specific=True)
    tasks = image_tasks(arguments.tasks, arguments.tasks_file)
    extra = image_tasks(arguments.extra, arguments.tasks_file) if arguments.extra else []
    size = settings.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    corpus = make_corpus(tasks, extra, arguments.flip, arguments.data, processor, settings)
    captions = [text.format(name) for task in [*tasks, *extra] for name in task.classes for text in task.templates]
    tokenizer = make_tokenizer(captions)
    model = make_model(settings, tokenizer, accelerator.device)
    model = train(model, tokenizer, corpus, accelerator, settings, arguments.log_every)
    scores = {}
    for task in tasks:
        loader = evaluation_loader(Images(*labelled(task, "validation", arguments.data), processor), 250, accelerator)
        scores[task.name] = zero_shot_accuracy(model, tokenizer, task, loader, accelerator)
        accelerator.print(f"{task.name}: zero-shot {scores[task.name]:.4f}", flush=True)
    record = {
        "tasks": arguments.tasks,
        "extra": arguments.extra,
        "flip": arguments.flip,
        "settings": asdict(settings),
        "pictures": len(corpus.classes),
        "zero_shot_validation_accuracy": scores,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if accelerator.is_main_process:
        model.save_pretrained(arguments.output)
        tokenizer.save_pretrained(arguments.output)
        processor.save_pretrained(arguments.output)
        (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
