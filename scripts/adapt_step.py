r"""Time and memory of a step of `cart-hf adapt`, beside AdaMerging as it is usually written, and beside plain training.

    python scripts/adapt_step.py run --work DIR --output adapt.json       # MiniLM's size; 2, 4 and 8 tasks
    python scripts/adapt_step.py run --work DIR --shape roberta-base --counts 4 --steps 3 --rounds 1

The peers are written anew from the equation W = centre + sum_t c_t term_t: every term of the whole model dense in
memory, and W formed within the autograd graph; `each-forward` forms it for every task's batch and goes backward once,
as AdaMerging's own code does, `each-step` forms it once and goes backward for each task, as FusionBench does. They are
kinder than these: no gradients for the terms, no second copy of the models. All learn on the same inputs, and their
coefficients are compared at the end. `plain` trains one fine-tuned model (SGD) on the same batches: what there would be
to do without any merge.

Checkpoints are those of `benchmark_merge.py`, random, with updates as of real fine-tunes; texts are random words. Every
measurement has a process of its own, in turns, forwards and backwards. A step's peak memory is the process's peak since
the end of the first step (Linux tells both), the whole process's also that of what comes before and after; what is read
from files without being mapped is in the page cache, not in these numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import merge_checkpoints as checkpoints
import psutil
import torch
import yaml
from measure_command import peak
from merge_commands import RATIO, SCALE, machine
from merge_peers import MATRIX
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from cart_hf import adapt
from cart_hf.cli.console import quiet_libraries, size
from cart_hf.parallel import cores
from cart_hf.plan.coefficients import Coefficients
from cart_hf.tables import Table, markdown

SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "minilm": ("roberta-base", {"layers": 6, "width": 384}),  # MiniLMv2-L6-H384, which has RoBERTa's words
    "roberta-base": ("roberta-base", {}),
    "encoder": ("encoder", {"layers": 1}),
}
METHODS = {"task_arithmetic": {"scale": 0.3}, "cart": {"scale": SCALE, "rank_ratio": RATIO}}
TITLES = {
    "plain": "plain training of one model",
    "disk": "cart-hf, terms on disk",
    "device": "cart-hf, terms in memory",
    "each-step": "formed in the graph, each step",
    "each-forward": "formed in the graph, each forward",
}
LR = 1e-3
Named = dict[str, torch.Tensor]
Inputs = Mapping[str, torch.Tensor]


class Clock:
    """When every step ended, by the clock and by this process's own, and the most memory that it has held."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.first = self.later = 0

    def tick(self) -> None:
        """Note the end of a step."""
        self.ends.append((time.perf_counter(), time.process_time()))
        if len(self.ends) == 1:
            self.first = peak(os.getpid())
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
        self.later = peak(os.getpid())

    def found(self) -> dict[str, Any]:
        """Return the times of each step after the first, and the peaks."""
        spans = list(zip(self.ends, self.ends[1:], strict=False))
        return {
            "seconds": [end - start for (start, _), (end, _) in spans],
            "cpu_seconds": [end - start for (_, start), (_, end) in spans],
            "step_bytes": self.later,
            "peak_bytes": max(self.first, self.later, peak(os.getpid())),
        }


def prepare(arguments: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Build the checkpoints, or find them, and write the tasks: for each a batch of random texts."""
    shape, smaller = SHAPES[arguments.shape]
    base, models = checkpoints.build(arguments.work, shape, max(arguments.counts), **smaller)
    count = AutoConfig.from_pretrained(base).vocab_size
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(4, count))]
    tokens = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>").save_pretrained(base)
    for seed, model in enumerate(models):
        chosen = random.Random(seed)
        texts = [" ".join(chosen.choices(words[4:], k=arguments.length)) for _ in range(arguments.batch_size)]
        folder = base.parent / "data" / model.name
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "test.parquet")
    tasks = {model.name: {"kind": "text-classification", "text": "text", "split": "test"} for model in models}
    (base.parent / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}), encoding="utf-8")
    return base, models


def ours(arguments: argparse.Namespace, clock: Clock) -> Coefficients:
    """Adapt as a user does."""
    folder = arguments.base.parent
    names = [model.name for model in arguments.models]
    made = adapt(
        base=str(arguments.base),
        models=[str(model) for model in arguments.models],
        method=arguments.method,
        output=folder / f"adapted-{arguments.way}",
        learning={"steps": arguments.steps + 1, "lr": LR, "batch_size": arguments.batch_size},
        examples={"tasks": names, "tasks_file": str(folder / "tasks.yaml"), "data": str(folder / "data")},
        device="cpu",
        workers=arguments.threads,
        terms=arguments.way,
        overwrite=True,
        progress=lambda step, advance, total: clock.tick() if step == "adapting" else None,
        **METHODS[arguments.method],
    )
    return made.coefficients


def plain(arguments: argparse.Namespace, clock: Clock) -> None:
    """Train one fine-tuned model on the same batches."""
    model = classifier(arguments.models[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    work = read_batches(arguments)
    for _ in range(arguments.steps + 1):
        for inputs in work:
            mean_entropy(model(**inputs).logits).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def in_graph(arguments: argparse.Namespace, clock: Clock) -> Coefficients:
    """Adapt with dense terms in memory, the weights formed within the graph."""
    model = classifier(arguments.models[0])
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    states = [checkpoints.open_weights(folder) for folder in arguments.models]
    heads = [{name: checkpoints.read(state, name) for name in state if name not in names} for state in states]
    rest = dict(model.named_buffers())
    model.to("meta")  # every weight is given in the call
    centres, terms = dense_terms(arguments, names)
    learnt = torch.nn.Parameter(torch.full((len(names), len(heads)), METHODS[arguments.method]["scale"]))
    optimizer = torch.optim.Adam([learnt], lr=LR)
    work = read_batches(arguments)

    def weights() -> Named:
        return {
            name: sum((c * term for c, term in zip(row, terms[name], strict=True)), centres[name])
            for name, row in zip(names, learnt, strict=True)
        }

    def loss(formed: Named, head: Named, inputs: Inputs) -> torch.Tensor:
        answer = torch.func.functional_call(model, {**formed, **head, **rest}, kwargs=dict(inputs))
        return mean_entropy(answer.logits)

    def backward() -> None:
        if arguments.way == "each-forward":
            total = torch.zeros(())
            for head, inputs in zip(heads, work, strict=True):
                total = total + loss(weights(), head, inputs)
            total.backward()
        else:
            formed = weights()
            for head, inputs in zip(heads, work, strict=True):
                loss(formed, head, inputs).backward(retain_graph=True)

    for _ in range(arguments.steps + 1):
        optimizer.zero_grad()
        backward()
        optimizer.step()
        clock.tick()
    values = {name.removeprefix(prefix): row for name, row in zip(names, learnt.detach().clone(), strict=True)}
    return Coefficients(arguments.method, tuple(model.name for model in arguments.models), values, {})


def dense_terms(arguments: argparse.Namespace, names: list[str]) -> tuple[Named, dict[str, list[torch.Tensor]]]:
    """Return every tensor's centre, and its term of each model."""
    states = [checkpoints.open_weights(folder) for folder in arguments.models]
    base = checkpoints.open_weights(arguments.base)
    centres, terms = {}, {}
    for name in names:
        own = [checkpoints.read(state, name) for state in states]
        if arguments.method == "task_arithmetic":
            centres[name] = checkpoints.read(base, name).clone()
        else:
            centres[name] = torch.stack(own).mean(dim=0)
        terms[name] = [values - centres[name] for values in own]
        if arguments.method == "cart" and own[0].ndim == 2 and MATRIX.search(name):
            k = max(1, int(RATIO * min(own[0].shape)))
            terms[name] = [truncated(term, k) for term in terms[name]]
    return centres, terms


def truncated(matrix: torch.Tensor, k: int) -> torch.Tensor:
    """Return the best rank-k approximation: the projection on the top eigenvectors of the smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        return truncated(matrix.T, k).T.contiguous()
    wide = matrix.double()
    top = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -k:]
    return ((wide @ top) @ top.T).float()


def mean_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean Shannon entropy of predictions."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()


def classifier(folder: Path) -> Any:
    """Return a fine-tuned model, with the attention that cart-hf has on a CPU."""
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


def read_batches(arguments: argparse.Namespace) -> list[Inputs]:
    """Return the batch of each task."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    files = [arguments.base.parent / "data" / model.name / "test.parquet" for model in arguments.models]
    return [tokenizer(list(datasets.Dataset.from_parquet(str(file))["text"]), return_tensors="pt") for file in files]


def step(arguments: argparse.Namespace) -> None:
    """Take the steps of one way, and write what they took."""
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    clock = Clock()
    ways: dict[str, Callable[[argparse.Namespace, Clock], Coefficients | None]] = {
        "plain": plain,
        "disk": ours,
        "device": ours,
        "each-step": in_graph,
        "each-forward": in_graph,
    }
    coefficients = ways[arguments.way](arguments, clock)
    values = {} if coefficients is None else {name: row.tolist() for name, row in coefficients.values.items()}
    arguments.output.write_text(json.dumps({**clock.found(), "values": values}), encoding="utf-8")


def measured(arguments: argparse.Namespace, base: Path, models: list[Path], method: str, way: str) -> dict[str, Any]:
    """Run one way in a process of its own."""
    output = base.parent / "step.json"
    settings = {"method": method, "way": way, "base": base, "steps": arguments.steps, "threads": arguments.threads}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--batch-size", str(arguments.batch_size), "--output", str(output), "--models", *map(str, models)]
    busy = psutil.cpu_percent(interval=0.5)
    alone(["step", *words])
    return {**json.loads(output.read_text(encoding="utf-8")), "busy": busy}


def alone(words: list[str]) -> None:
    """Run this script in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-4000:]}\nended with exit code {done.returncode}")


def run(arguments: argparse.Namespace) -> None:
    """Measure every way in turns; print the table after the last round, write what is known after each count."""
    quiet_libraries()
    datasets.disable_progress_bars()
    base, models = prepare(arguments)
    found: dict[str, Any] = {
        "machine": machine(),
        "shape": arguments.shape,
        "model_bytes": (models[0] / "model.safetensors").stat().st_size,
        **{name: getattr(arguments, name) for name in ("batch_size", "length", "threads", "steps", "rounds")},
        "rows": [],
    }
    for method in arguments.methods:
        for count in arguments.counts:
            rows = [{"method": method, "tasks": count, "way": way, "runs": []} for way in arguments.ways]
            found["rows"] += rows
            for turn in range(arguments.rounds):
                for row in rows if turn % 2 == 0 else rows[::-1]:
                    row["runs"].append(measured(arguments, base, models[:count], method, row["way"]))
                    told = f"{method}, {count} tasks, {row['way']}: {median(row['runs'][-1]['cpu_seconds']):.2f} s"
                    print(f"{told} of CPU a step, {size(row['runs'][-1]['step_bytes'])}", file=sys.stderr, flush=True)
            learnt = {row["way"]: row["runs"][0].get("values") for row in rows}
            for row in rows:
                row["apart"] = apart(learnt.get("disk") or {}, learnt[row["way"]] or {})
                for one in row["runs"]:
                    del one["values"]
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(report(found))


def apart(left: Mapping[str, list[float]], right: Mapping[str, list[float]]) -> float | None:
    """Return the largest difference of two sets of coefficients, or None where there are none."""
    pairs = [(left[name], right[name]) for name in left if name in right]
    return max((abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)), default=None)


def report(found: Mapping[str, Any]) -> str:
    """Return the measurement as Markdown."""
    lines = []
    for row in found["rows"]:
        rivals = [
            other for other in found["rows"] if (other["method"], other["tasks"]) == (row["method"], row["tasks"])
        ]
        floor = next((other for other in rivals if other["way"] == "plain"), row)
        took, more = per_step(row, "cpu_seconds"), held(row, "step_bytes") - held(floor, "step_bytes")
        lines.append(
            [
                row["method"],
                str(row["tasks"]),
                TITLES[row["way"]],
                f"{per_step(row, 'seconds'):.2f}",
                f"{took:.2f}",
                f"{took / per_step(floor, 'cpu_seconds'):.2f}",
                size(held(row, "step_bytes")),
                f"{more / found['model_bytes']:+.1f}",
                size(held(row, "peak_bytes")),
                "" if row["apart"] is None or row["way"] == "disk" else f"{row['apart']:.0e}",
            ]
        )
    header = [
        "method",
        "tasks",
        "",
        "s a step",
        "CPU s",
        "x plain",
        "peak, steps",
        "models more",
        "peak, process",
        "apart",
    ]
    busy = [one["busy"] for row in found["rows"] for one in row["runs"]]
    return (
        f"{found['shape']}, {size(found['model_bytes'])} a model; {found['batch_size']} texts of {found['length']} "
        f"words for each task; {found['threads']} threads; medians of {found['rounds']} x {found['steps']} steps in "
        f"turns.\n\n{markdown(Table(header, lines))}\n"
        "x plain: of the CPU seconds, which other processes disturb less. models more: the peak of the steps over that "
        "of plain training, in models. apart: the largest difference of a coefficient from that of `cart-hf adapt` "
        f"after {found['steps'] + 1} steps of Adam at {LR:g}.\n"
        f"Other processes used {median(busy):.0f} % of the cores before the starts, {max(busy):.0f} % at most.\n"
        + ", ".join(found["machine"].values())
    )


def per_step(row: Mapping[str, Any], what: str) -> float:
    """Return the median of a row's times."""
    return median(seconds for one in row["runs"] for seconds in one[what])


def held(row: Mapping[str, Any], what: str) -> int:
    """Return the median of a row's peaks."""
    return int(median(one[what] for one in row["runs"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("run", help="all ways, beside one another")
    verb.set_defaults(call=run)
    add = verb.add_argument
    add("--work", type=Path, required=True, help="folder for checkpoints and merges")
    add("--shape", choices=SHAPES, default="minilm")
    add("--counts", type=int, nargs="+", default=[2, 4, 8], help="how many tasks")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--ways", nargs="+", choices=TITLES, default=list(TITLES))
    add("--length", type=int, default=32, help="words of a text")
    add("--rounds", type=int, default=3, help="times that each way is measured")
    verb.add_argument("--output", type=Path, help="JSON file for every measured number")
    one = verbs.add_parser("step", help="one way, in this process")
    one.set_defaults(call=step)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--way", choices=TITLES, required=True)
    one.add_argument("--base", type=Path, required=True)
    one.add_argument("--models", type=Path, nargs="+", required=True)
    one.add_argument("--output", type=Path, required=True)
    for parser_ in (verb, one):
        parser_.add_argument("--steps", type=int, default=5, help="steps that are measured, after a first one")
        parser_.add_argument("--batch-size", type=int, default=16, help="texts of each task")
        parser_.add_argument("--threads", type=int, default=cores())
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
