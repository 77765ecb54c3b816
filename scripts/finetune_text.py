r"""Fine-tune one pretrained encoder on several text tasks, one checkpoint per task: what a merge is made of.

Tasks are those of ``cart-hf tasks`` (``--suite glue``, ``--tasks sst2 mrpc``) or your own (``--tasks-file``): one text
or a pair, classes or, like STS-B, a number (one output, squared error). Their examples come from the Hub, or from
``DATA/NAME/{train,validation,test}.parquet``. Model (safetensors, with the task's label names) and tokenizer go to
``OUTPUT/NAME``, and with them ``training.json``: settings, scores before and after, seconds. The scores are those of
``cart-hf evaluate`` (float32, the task's maximum length); a task whose test labels are hidden, as GLUE's are, is scored
on its validation split only. A finished task is skipped, so the same command takes a stopped run up.

The defaults are those of the RoBERTa-base checkpoints that merging papers use (``train_plms_glue.py`` of MergeLM,
Yu et al. 2024: https://github.com/yule-BUAA/MergeLM): batch 16, 10 epochs, AdamW at 1e-5 (their MRPC checkpoint: 5e-5)
with weight decay 0.01, warm-up over 6% of the steps, then linear decay, 128 tokens. They hold out a tenth of the
training split and keep the epoch that is best on it; here the last one is kept::

    python scripts/finetune_text.py --base FacebookAI/roberta-base --suite glue --output roberta/models

A small encoder takes larger steps, and a larger rate for its new head. These are the settings of the MiniLM-L6
checkpoints in the README's table (22M parameters; two to five minutes a task on one CPU core)::

    echo 'tasks: {sick_e: {kind: text-classification, text: [sentence1, sentence2]}}' > tasks.yaml
    common="--base minilm/base --data data --tasks-file tasks.yaml --output minilm/models --mixed-precision bf16
        --steps 220 --warmup-steps 20 --batch-size 32 --lr 8e-5 --head-lr 2e-3"
    python scripts/finetune_text.py $common --max-length 64 \
        --tasks clinc150_banking clinc150_travel clinc150_work clinc150_small_talk sst2
    python scripts/finetune_text.py $common --max-length 96 --tasks sick_e mrpc qnli

``bf16`` concerns the computation only, the weights stay float32; it pays where the processor has it (AMX, any recent
GPU). Several GPUs: ``accelerate launch`` or ``torchrun --nproc-per-node 2`` in the place of ``python`` (on a CPU only
the second starts several processes); ``--batch-size`` is then per process.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from cart_hf.cli.console import quiet_libraries
from cart_hf.errors import UserError
from cart_hf.evaluation.heads import logit_order
from cart_hf.evaluation.model import Model
from cart_hf.evaluation.prediction import predict
from cart_hf.evaluation.results import TaskResult
from cart_hf.evaluation.scoring import predicted, scored
from cart_hf.processes import Processes, is_main
from cart_hf.recipe import Evaluation
from cart_hf.tasks import IMAGE, REGRESSION, Task, TaskData, find_tasks, load_split

RECORD = "training.json"
LR, LR_OF = 1e-5, {"mrpc": 5e-5}
BATCHES_PER_BUCKET = 16
EVALUATION_BATCH = Evaluation().batch_size


@dataclass(frozen=True)
class Settings:
    """What one task is trained with; written to ``training.json`` as it is."""

    epochs: float
    steps: int | None
    warmup_ratio: float
    warmup_steps: int | None
    batch_size: int
    lr: float
    head_lr: float
    weight_decay: float
    max_length: int | None
    seed: int
    mixed_precision: str


@dataclass(frozen=True)
class Job:
    """One task with everything its training needs.

    :param splits: train, validation and, where its labels are known, test.
    :param target: folder of the checkpoint.
    """

    task: Task
    splits: Mapping[str, TaskData]
    settings: Settings
    target: Path

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of the head's labels; none for a regression."""
        return self.splits["train"].label_names


class LengthBucketSampler(Sampler[list[int]]):
    """Endless batches of rows of like length: shuffle, sort within buckets of batches, shuffle the batches.

    A text left over when the last batch of an epoch is not full waits for a later epoch's shuffle.
    """

    drop_last = True

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
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


def read(task: Task, data: Path | None) -> dict[str, TaskData]:
    """Read a task's splits; the test split only where there is one with labels.

    :raises UserError: when training or validation examples are missing or wrong, or nothing names the labels.
    """
    if task.kind == IMAGE:
        raise UserError(f"task '{task.name}' is of images: see scripts/finetune_clip.py")
    splits = {split: load_split(task, split, data=data) for split in ("train", "validation")}
    try:
        test = load_split(task, "test", data=data, labelled=False)
        if test.labels is not None:
            splits["test"] = test
    except UserError as failure:
        if is_main():
            print(f"{task.name}: not scored on a test split: {failure}", file=sys.stderr)
    if task.kind != REGRESSION:
        for split in splits.values():  # another order is no harm, other labels are
            logit_order(split, splits["train"].label_names, task.label_mapping)
    return splits


def is_finished(target: Path, base: str, settings: Settings) -> bool:
    """Whether a checkpoint is there already.

    :raises UserError: when it was made with other settings, or something else is in its place.
    """
    if not target.exists():
        return False
    if not (target / RECORD).is_file():
        raise UserError(f"{target} exists and holds no {RECORD}: give another --output, or remove it")
    record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    made = {"base": record.get("base"), **record.get("settings", {})}
    wanted = {"base": base, **asdict(settings)}
    differ = [f"{key} {made.get(key)}, not {value}" for key, value in wanted.items() if made.get(key) != value]
    if differ:
        raise UserError(f"{target} was made with {', '.join(differ)}: give another --output, or remove it")
    return True


def load_model(base: str, job: Job) -> PreTrainedModel:
    """Load the pretrained encoder in float32, with a new head for the task."""
    names = job.label_names
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if names:
        head = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **head)
    return model


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    """Make AdamW with a learning rate for the encoder and one for the head; biases and norms do not decay."""
    encoder = {id(parameter) for parameter in model.base_model.parameters()}
    groups = []
    for is_encoder, lr in ((True, settings.lr), (False, settings.head_lr)):
        part = [parameter for parameter in model.parameters() if (id(parameter) in encoder) is is_encoder]
        for is_matrix, decay in ((True, settings.weight_decay), (False, 0.0)):
            parameters = [parameter for parameter in part if (parameter.ndim > 1) is is_matrix]
            groups.append({"params": parameters, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def training_batches(data: TaskData, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> DataLoader[Any]:
    """Return endless batches, each padded to its longest text."""
    assert data.labels is not None
    labels = torch.from_numpy(data.labels)
    labels = labels.float() if data.task.kind == REGRESSION else labels.long()
    most = settings.max_length or tokenizer.model_max_length

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        texts = data.texts(rows)
        inputs = tokenizer(*texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
        return {**inputs, "labels": labels[rows]}

    lengths = [sum(map(len, texts)) for texts in zip(*data.texts(range(len(data))), strict=True)]
    sampler = LengthBucketSampler(lengths, settings.batch_size, settings.seed)
    return DataLoader(range(len(data)), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


def train(
    model: PreTrainedModel,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    settings: Settings,
    steps: int,
    warmup_steps: int,
    log_every: int,
) -> None:
    """Train ``model`` in place for ``steps`` optimizer steps."""
    optimizer = make_optimizer(model, settings)
    # not prepared: accelerate would advance it once for each process
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared.train()
    total = torch.zeros((), device=accelerator.device)
    for step, batch in zip(range(1, steps + 1), loader, strict=False):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % log_every == 0:
            accelerator.print(f"  step {step:5d}  loss {float(total) / log_every:.4f}", flush=True)
            total.zero_()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    accelerator.free_memory()


def evaluate(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job, processes: Processes
) -> dict[str, TaskResult]:
    """Score the model on the held-out splits, as ``cart-hf evaluate`` does."""
    names = job.label_names

    def logits(heads: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(heads, network(**inputs).logits)

    model = Model("text", tokenizer, {"": names}, logits, None)
    results = {}
    for split, data in held_out(job).items():
        started = time.perf_counter()
        order = logit_order(data, names, job.task.label_mapping) if names else None
        found = predict(model, [""], data, processes, batch_size=EVALUATION_BATCH)
        answers = predicted(data, found.logits[""], order, found.broken)
        results[split] = scored(data, answers, found.broken, time.perf_counter() - started)
    return results


def held_out(job: Job) -> dict[str, TaskData]:
    """Return the splits that are scored."""
    return {split: data for split, data in job.splits.items() if split != "train"}


def constant_score(data: TaskData) -> float:
    """Return the score of one answer for all examples: the most frequent label, or the mean."""
    assert data.labels is not None
    answer = data.labels.mean() if data.task.kind == REGRESSION else np.bincount(data.labels).argmax()
    return scored(data, np.full_like(data.labels, answer), {}, 0).score


def finetune(base: str, job: Job, accelerator: Accelerator, log_every: int) -> dict[str, Any]:
    """Train, score and save one task; return what ``training.json`` holds.

    :raises UserError: when the warm-up is longer than the training.
    """
    started = time.perf_counter()
    settings, train_data = job.settings, job.splits["train"]
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
    batch = settings.batch_size * processes.count
    steps = settings.steps or max(1, round(settings.epochs * len(train_data) / batch))
    warmup_steps = math.ceil(settings.warmup_ratio * steps) if settings.warmup_steps is None else settings.warmup_steps
    if warmup_steps > steps:
        raise UserError(f"task '{job.task.name}': {warmup_steps} steps of warm-up, but only {steps} steps in all")
    set_seed(settings.seed)  # every process makes the same head ...
    model = load_model(base, job).to(accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = evaluate(model, tokenizer, job, processes)
    set_seed(settings.seed, device_specific=True)  # ... and its own dropout
    loader = training_batches(train_data, tokenizer, settings)
    train(model, loader, accelerator, settings, steps, warmup_steps, log_every)
    after = evaluate(model, tokenizer, job, processes)
    record = {
        "task": job.task.name,
        "base": name_of(base),
        "settings": asdict(settings),
        "processes": processes.count,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "train": {"examples": len(train_data)},
        **{
            split: {
                "examples": len(data),
                "constant": constant_score(data),
                "before": before[split].score,
                "score": after[split].score,
                "metric": after[split].metric,
                "metrics": after[split].metrics,
            }
            for split, data in held_out(job).items()
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    if processes.is_main:
        save(model, base, job.target, record)
    accelerator.wait_for_everyone()
    return record


def save(model: PreTrainedModel, base: str, target: Path, record: Mapping[str, Any]) -> None:
    """Write the checkpoint beside its place and move it there when it is whole: the folder says that it is finished.

    The tokenizer is read afresh, for a used one stores the truncation it was last called with.
    """
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    AutoTokenizer.from_pretrained(base).save_pretrained(beside)
    (beside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    beside.rename(target)


def name_of(base: str) -> str:
    """Return a Hub id as it is, and of a folder the last part: where it lies says nothing elsewhere."""
    return Path(base).resolve().name if Path(base).exists() else base


def summary(record: Mapping[str, Any]) -> str:
    """Return one line for the log."""
    scores = ", ".join(
        "{} {} {score:.4f} (before {before:.4f}, constant {constant:.4f})".format(
            split, record[split]["metric"], **{key: record[split][key] for key in ("score", "before", "constant")}
        )
        for split in ("validation", "test")
        if split in record
    )
    return f"{record['task']}: {scores}, {record['seconds']} s"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="encoder: a folder or a Hub id, such as FacebookAI/roberta-base")
    add("--suite", help="a named list of tasks, such as glue")
    add("--tasks", nargs="+", metavar="NAME", help="text tasks, see `cart-hf tasks`; default: all of --tasks-file")
    add("--tasks-file", type=Path, help="tasks that cart-hf does not know")
    add("--data", type=Path, help="folder that holds NAME/{train,validation,test}.parquet; default: the Hub")
    add("--output", type=Path, required=True, help="checkpoints go to OUTPUT/NAME")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=10, help="passes over the training texts")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    warmup = parser.add_mutually_exclusive_group()
    warmup.add_argument("--warmup-ratio", type=float, default=0.06, help="share of the steps with linear warm-up")
    warmup.add_argument("--warmup-steps", type=int, help="steps of warm-up, instead of --warmup-ratio")
    add("--batch-size", type=int, default=16, help="per process")
    add("--lr", type=float, help="learning rate; default: 1e-5, and 5e-5 for MRPC")
    add("--head-lr", type=float, help="learning rate of the new head; default: --lr")
    add("--weight-decay", type=float, default=0.01)
    add("--max-length", type=int, help="tokens after which a training text is cut; default: the task's (GLUE: 128)")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    add("--log-every", type=int, default=50, help="steps between two lines on the training loss")
    return parser.parse_args()


def settings_of(task: Task, arguments: argparse.Namespace) -> Settings:
    """Return the settings of one task: what was asked for, else its defaults."""
    given = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    lr = given["lr"] or LR_OF.get(task.name, LR)
    return Settings(
        **{**given, "lr": lr, "head_lr": given["head_lr"] or lr, "max_length": given["max_length"] or task.max_length}
    )


def run(arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    """Fine-tune the tasks that are not finished.

    :raises UserError: for what is wrong with any of them, before the first is trained.
    """
    tasks = find_tasks(arguments.tasks, suite=arguments.suite, tasks_file=arguments.tasks_file)
    if not tasks:
        raise UserError("name the tasks: --suite, --tasks or --tasks-file")
    jobs = []
    for task in tasks:
        target, settings = arguments.output / task.name, settings_of(task, arguments)
        if task.head != task.name:
            accelerator.print(f"{task.name}: has no training of its own, the head of {task.head} answers it")
        elif is_finished(target, name_of(arguments.base), settings):
            accelerator.print(f"{task.name}: finished already, skipped")
        else:
            jobs.append(Job(task, read(task, arguments.data), settings, target))
    for job in jobs:
        accelerator.print(f"{job.task.name}:", flush=True)
        accelerator.print(summary(finetune(arguments.base, job, accelerator, arguments.log_every)), flush=True)


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    # without cpu=True every process on a machine without accelerators believes to be the only one
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=arguments.mixed_precision)
    try:
        run(arguments, accelerator)
    except UserError as failure:
        if is_main():
            print("\n".join(f"error: {problem}" for problem in failure.problems), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
