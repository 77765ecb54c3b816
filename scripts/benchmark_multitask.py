r"""Throughput of a merged model that answers every task in one call, against its models run one by one.

``MultiTaskModel`` reads a text once for all heads; without it each task's own model reads it. Both run here on the same
batches in the same process, in turns, after a check that their logits are equal. A ratio of two times measured side by
side stands where a busy machine makes each of them unsteady; the table shows its range over the rounds, too. Prints a
Markdown table, and writes every measured time to ``--output``. Tokenizing is left out of both.

    cart-hf merge --base BASE --models sst2=MODELS/sst2 mrpc=MODELS/mrpc ... --output merged
    python scripts/benchmark_multitask.py merged                              # 256 texts of 64 random tokens
    python scripts/benchmark_multitask.py merged --tasks sst2 mrpc --limit 128 --output throughput.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cart_hf.cli.console import quiet_libraries, size
from cart_hf.device import named_device
from cart_hf.errors import UserError
from cart_hf.evaluation.batches import batches, split_into_batches
from cart_hf.parallel import cores
from cart_hf.serving.multitask import MultiTaskModel
from cart_hf.tables import Table, markdown
from cart_hf.tasks import IMAGE, Task, find_tasks, load_split

Inputs = dict[str, torch.Tensor]
Answer = Callable[[Inputs], dict[str, torch.Tensor]]
TOLERANCE = 1e-4


def random_batches(config: Any, count: int, length: int, batch_size: int) -> list[Inputs]:
    """Return batches of random tokens, none of them padding: shape (batch, length), int64."""
    ids = torch.randint(1, config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    ids[ids == config.pad_token_id] -= 1
    parts = [ids[start : start + batch_size] for start in range(0, count, batch_size)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def task_batches(tasks: Sequence[Task], arguments: argparse.Namespace) -> list[Inputs]:
    """Return the tokenized texts of tasks, as the evaluation makes batches of them."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    found = []
    for task in tasks:
        if task.kind == IMAGE:
            raise UserError(f"task '{task.name}' is of images: only texts are measured here")
        data = load_split(task, data=arguments.data, limit=arguments.limit, labelled=False)
        rows = split_into_batches(data, arguments.batch_size)
        found += [dict(batch.inputs) for batch in batches(data, rows, tokenizer)]
    return found


def together(model: MultiTaskModel) -> Answer:
    """Return what asks all heads in one call."""
    return lambda inputs: {name: output.logits for name, output in model(**inputs).items()}


def one_by_one(models: Mapping[str, torch.nn.Module]) -> Answer:
    """Return what asks one model after another."""
    return lambda inputs: {name: model(**inputs).logits for name, model in models.items()}


def largest_difference(left: Answer, right: Answer, work: Iterable[Inputs]) -> float:
    """Return the largest difference of two answers' logits."""
    worst = 0.0
    for inputs in work:
        others = right(inputs)
        worst = max([worst, *(float((logits - others[name]).abs().max()) for name, logits in left(inputs).items())])
    return worst


def seconds(answer: Answer, work: Iterable[Inputs], device: torch.device) -> float:
    """Return the time for all batches."""
    started = time.perf_counter()
    for inputs in work:
        answer(inputs)
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def parameter_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of the models' parameters, shared ones counted once."""
    parameters = {id(parameter): parameter.nbytes for model in models for parameter in model.parameters()}
    return sum(parameters.values())


def machine(device: torch.device) -> str:
    """Return what it was measured on, for people."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{processor}, {cores()} cores, {torch.get_num_threads()} threads, device {on}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load both, compare them, and run them in turns.

    :raises UserError: when the folder has no heads for texts, or the two do not agree.
    """
    device = named_device(arguments.device)
    tasks = find_tasks(arguments.tasks, tasks_file=arguments.tasks_file)
    merged = MultiTaskModel.from_pretrained(arguments.folder, dtype=torch.float32).to(device)
    if merged.backbone is None or merged.backbone.main_input_name != "input_ids":
        raise UserError(f"{arguments.folder}: not a merge with heads (tasks/NAME) for texts")
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(
            arguments.folder, subfolder=f"tasks/{name}", dtype=torch.float32
        ).to(device)
        for name in merged.tasks
    }
    if tasks:
        work = task_batches(tasks, arguments)
    else:
        work = random_batches(merged.backbone.config, arguments.limit, arguments.length, arguments.batch_size)
    work = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in work]
    answers = {"together": together(merged), "one_by_one": one_by_one(models)}
    difference = largest_difference(answers["together"], answers["one_by_one"], work)  # warms both up, too
    if difference > TOLERANCE:
        raise UserError(f"{arguments.folder}: the logits of the two differ by up to {difference:.1e}")
    times: dict[str, list[float]] = {way: [] for way in answers}
    for turn in range(arguments.rounds):
        for way in list(answers)[:: 1 if turn % 2 == 0 else -1]:
            times[way].append(seconds(answers[way], work, device))
    ratios = [alone / shared for shared, alone in zip(times["together"], times["one_by_one"], strict=True)]
    return {
        "machine": machine(device),
        "tasks": merged.tasks,
        "texts": sum(len(inputs["input_ids"]) for inputs in work),
        "tokens": sum(inputs["input_ids"].numel() for inputs in work),
        "batch_size": arguments.batch_size,
        "seconds": times,
        "ratio": median(times["one_by_one"]) / median(times["together"]),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "largest_logit_difference": difference,
        "parameter_bytes": {"together": parameter_bytes([merged]), "one_by_one": parameter_bytes(models.values())},
    }


def report(found: Mapping[str, Any]) -> str:
    """Return the measurement as Markdown."""
    count, texts, stored = len(found["tasks"]), found["texts"], found["parameter_bytes"]
    rows = []
    for way, title in (("together", "`MultiTaskModel`, one call"), ("one_by_one", f"{count} models, one by one")):
        took = median(found["seconds"][way])
        rows.append([title, f"{texts / took:.1f}", f"{took:.3f}", size(stored[way])])
    low, high = found["ratio_lowest"], found["ratio_highest"]
    ratio = f"{found['ratio']:.2f} x ({low:.2f} to {high:.2f})"
    rows.append(["ratio", ratio, "", f"{stored['one_by_one'] / stored['together']:.2f} x"])
    difference, tokens = found["largest_logit_difference"], found["tokens"] / texts
    return (
        markdown(Table([f"{count} tasks, {texts} texts", "texts/s, all tasks", "s", "parameters"], rows))
        + f"\nMedians of {len(found['seconds']['together'])} rounds in turns; {tokens:.0f} tokens a text, "
        f"batches of {found['batch_size']}; largest difference of two logits: {difference:.1g}.\n{found['machine']}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="what `cart-hf merge` wrote, with tasks/NAME")
    add("--tasks", nargs="+", metavar="NAME", help="texts of these tasks; default: random tokens")
    add("--tasks-file", type=Path, help="tasks that cart-hf does not know")
    add("--data", type=Path, help="folder that holds NAME/SPLIT.parquet; default: the Hub")
    add("--limit", type=int, default=256, help="texts, of each task where tasks are named")
    add("--length", type=int, default=64, help="tokens of a random text")
    add("--batch-size", type=int, default=32)
    add("--rounds", type=int, default=7, help="times that each is measured")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    add("--output", type=Path, help="JSON file for every measured time")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet_libraries()
    try:
        found = measure(arguments)
    except UserError as failure:
        print("\n".join(f"error: {problem}" for problem in failure.problems), file=sys.stderr)
        sys.exit(2)
    print(report(found))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
