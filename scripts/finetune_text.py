r"""Fine-tune one pretrained encoder on several text-classification sets, one checkpoint per set.

The checkpoints share their base, so they are what a merge benchmark needs.  Each set NAME is read from
``DATA/NAME/{train,validation,test}.parquet``: a ``label`` column whose ``datasets`` feature is ``ClassLabel``
(its names become the model's ``id2label``), and text columns out of ``TEXT_COLUMNS``.  Model (safetensors)
and tokenizer go to ``OUTPUT/<last part of NAME>``, and with them ``training.json``: settings, validation and
test accuracy.  A set whose ``training.json`` exists is skipped, so the same command takes a stopped run up.

Settings hold for all tasks of one call; a task that needs others gets a call of its own::

    common="--base minilm/base --data data --output minilm/models --mixed-precision bf16"
    python scripts/finetune_text.py $common --max-length 64 \
        --tasks clinc150/banking clinc150/travel clinc150/work clinc150/small_talk sst2
    python scripts/finetune_text.py $common --max-length 96 --tasks sick_e mrpc qnli

These made the MiniLM-L6 checkpoints of the merge benchmark (22M parameters; two to five minutes a task on one
CPU core, with ``OMP_NUM_THREADS=1``).  ``bfloat16`` concerns the computation only, the weights stay float32;
it pays where the processor has it (AMX, any recent GPU).

Several GPUs: ``accelerate launch scripts/finetune_text.py ...``; ``--batch-size`` is then per process.

The usual setting for RoBERTa-base on GLUE is batch 16, learning rate 1e-5 for all parameters, 10 epochs, 6%
warm-up and weight decay 0.1; for the 6000 training sentences of the SST-2 subset that reads::

    python scripts/finetune_text.py --base roberta-base --data data --output roberta/models --tasks sst2 \
        --batch-size 16 --steps 3750 --warmup-steps 225 --encoder-lr 1e-5 --head-lr 1e-5 --weight-decay 0.1 \
        --max-length 128 --mixed-precision bf16
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import ClassLabel, Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

TEXT_COLUMNS = (("sentence1", "sentence2"), ("question", "sentence"), ("sentence",))
Example = dict[str, Any]
Loader = DataLoader[Any]
SPLITS = ("train", "validation", "test")
BATCHES_PER_BUCKET = 16


@dataclass(frozen=True)
class Settings:
    """What one run trains with; written to ``training.json`` as it is."""

    steps: int
    warmup_steps: int
    batch_size: int
    encoder_lr: float
    head_lr: float
    weight_decay: float
    max_length: int
    seed: int
    mixed_precision: str


class LengthBucketSampler(Sampler[list[int]]):
    """Endless batches of like length: shuffle, sort within buckets of batches, shuffle the batches.

    A text left over when the last batch of an epoch is not full waits for a later epoch's shuffle.
    """

    drop_last = True

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = min(batch_size, len(lengths))
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from self._epoch()

    def _epoch(self) -> list[list[int]]:
        order = self._permutation(len(self.lengths))
        bucket_size = self.batch_size * BATCHES_PER_BUCKET
        batches = []
        for start in range(0, len(order), bucket_size):
            bucket = sorted(order[start : start + bucket_size], key=self.lengths.__getitem__)
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        return [full[i] for i in self._permutation(len(full))]

    def _permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()


def text_columns(dataset: Dataset) -> tuple[str, ...]:
    """The first entry of ``TEXT_COLUMNS`` that the set has in full."""
    for columns in TEXT_COLUMNS:
        if set(columns) <= set(dataset.column_names):
            return columns
    raise ValueError(f"no known text columns in {dataset.column_names}; TEXT_COLUMNS lists {TEXT_COLUMNS}")


def label_names(dataset: Dataset) -> list[str]:
    """Class names of the ``label`` column."""
    feature = dataset.features["label"]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"the label column must be a ClassLabel, not {feature}")
    return list(feature.names)


def load_splits(directory: Path) -> dict[str, Dataset]:
    """Read the three splits of one task."""
    return {split: Dataset.from_parquet(str(directory / f"{split}.parquet")) for split in SPLITS}


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Token ids (unpadded, cut at ``max_length``) and labels, one dictionary per example."""
    texts = [list(dataset[column]) for column in text_columns(dataset)]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    return [{**row, "labels": label} for row, label in zip(rows, dataset["label"], strict=True)]


def token_count(example: Example) -> int:
    """Length of a tokenized example."""
    return len(example["input_ids"])


def load_model(base: Path, names: list[str]) -> PreTrainedModel:
    """The pretrained encoder with a fresh classification head for ``names``."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        base,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification",
        dtype=torch.float32,
    )
    return model


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW with one learning rate for the encoder and one for the rest, the head."""
    encoder = list(model.base_model.parameters())
    encoder_ids = {id(parameter) for parameter in encoder}
    head = [parameter for parameter in model.parameters() if id(parameter) not in encoder_ids]
    groups = [{"params": encoder, "lr": settings.encoder_lr}, {"params": head, "lr": settings.head_lr}]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def train(
    model: PreTrainedModel, loader: Loader, accelerator: Accelerator, settings: Settings, log_every: int
) -> torch.nn.Module:
    """Train for ``settings.steps`` optimizer steps and return the prepared model."""
    optimizer = make_optimizer(model, settings)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared.train()
    recent: list[float] = []
    for step, batch in zip(range(1, settings.steps + 1), loader, strict=False):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % log_every == 0:
            accelerator.print(f"  step {step:5d}  loss {sum(recent) / len(recent):.4f}", flush=True)
            recent.clear()
    return prepared


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: Loader, accelerator: Accelerator) -> float:
    """Share of examples of the whole split that the model labels correctly."""
    model.eval()
    correct = total = 0
    for batch in accelerator.prepare(loader):
        labels = batch.pop("labels")
        hits = accelerator.gather_for_metrics(model(**batch).logits.argmax(-1) == labels)
        correct += int(hits.sum())
        total += len(hits)
    return correct / total


def majority_share(dataset: Dataset) -> float:
    """Accuracy of always answering the most frequent class."""
    return Counter(dataset["label"]).most_common(1)[0][1] / len(dataset)


def make_loaders(
    splits: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, Loader]:
    """Endless training batches; validation and test sorted by length.  A batch pads to its longest text."""
    collate = DataCollatorWithPadding(tokenizer)
    loaders: dict[str, Loader] = {}
    for split, dataset in splits.items():
        examples = tokenize(dataset, tokenizer, settings.max_length)
        order: dict[str, Any] = {"batch_size": settings.batch_size}
        if split == "train":
            lengths = [token_count(example) for example in examples]
            order = {"batch_sampler": LengthBucketSampler(lengths, settings.batch_size, settings.seed)}
        else:
            examples.sort(key=token_count)
        # A list is all that a DataLoader needs of its data set.
        loaders[split] = DataLoader(examples, collate_fn=collate, **order)  # type: ignore[arg-type]
    return loaders


def finetune(base: Path, data: Path, task: str, target: Path, settings: Settings, log_every: int) -> dict[str, Any]:
    """Train, evaluate and save one task; the record returned is the one in ``training.json``."""
    started = time.perf_counter()
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    set_seed(settings.seed)
    splits = load_splits(data / task)
    tokenizer = AutoTokenizer.from_pretrained(base)
    loaders = make_loaders(splits, tokenizer, settings)
    model = load_model(base, label_names(splits["train"]))
    prepared = train(model, loaders["train"], accelerator, settings, log_every)
    record: dict[str, Any] = {
        "task": task,
        "base": base.name,
        "text_columns": text_columns(splits["train"]),
        "settings": asdict(settings),
        "examples": {split: len(dataset) for split, dataset in splits.items()},
    }
    for split in ("validation", "test"):
        record[f"{split}_accuracy"] = accuracy(prepared, loaders[split], accelerator)
        record[f"{split}_majority"] = majority_share(splits[split])
    record["seconds"] = round(time.perf_counter() - started, 1)
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(prepared), base, target, record)
    return record


def save(model: PreTrainedModel, base: Path, target: Path, record: dict[str, Any]) -> None:
    """Write the checkpoint, and ``training.json`` last: its presence says that the task is finished.

    The tokenizer is read afresh, for a used one stores the truncation it was last called with.
    """
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    (target / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def summary(record: dict[str, Any]) -> str:
    """One line for the log."""
    scores = ", ".join(
        f"{split} {record[f'{split}_accuracy']:.4f} (majority {record[f'{split}_majority']:.4f})"
        for split in ("validation", "test")
    )
    return f"{record['task']}: {scores}, {record['seconds']} s"


def quiet_libraries() -> None:
    """No progress bars, and no report that the new head is not in the base checkpoint."""
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder of the pretrained encoder")
    add("--data", type=Path, required=True, help="folder that holds NAME/{train,validation,test}.parquet")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="sets below --data")
    add("--output", type=Path, required=True, help="checkpoints go to OUTPUT/<last part of NAME>")
    add("--steps", type=int, default=220, help="optimizer steps")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up; linear decay follows")
    add("--batch-size", type=int, default=32, help="per process")
    add("--encoder-lr", type=float, default=8e-5)
    add("--head-lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.01)
    add("--max-length", type=int, default=64, help="tokens; longer texts are cut")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    add("--log-every", type=int, default=20, help="steps between two lines on the training loss")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    quiet_libraries()
    for task in arguments.tasks:
        target = arguments.output / Path(task).name
        if (target / "training.json").exists():
            print(f"{task}: finished already, skipped")
            continue
        print(f"{task}:", flush=True)
        record = finetune(arguments.base, arguments.data, task, target, settings, arguments.log_every)
        print(summary(record), flush=True)


if __name__ == "__main__":
    main()
