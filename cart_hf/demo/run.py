"""`cart-hf demo`: make the checkpoints, merge them with every method, measure, and leave everything on disk."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cart_hf.api import merge
from cart_hf.benchmarking.report import write_files
from cart_hf.benchmarking.run import BenchmarkResult, benchmark
from cart_hf.demo.data import TASKS, write_data
from cart_hf.demo.training import MAX_LENGTH, Training, fine_tune, make_tokenizer, pretrain
from cart_hf.output import check_replaceable
from cart_hf.parallel import Progress, cores
from cart_hf.recipe import Recipe

RECIPE, TIMES = "recipe.yaml", "demo.json"
VALIDATION_ROWS, TEST_ROWS = 150, 450  # of each task; enough to choose settings, and the demo stays short
METHODS: tuple[Any, ...] = (
    "average",
    {"method": "task_arithmetic", "grid": {"scale": [0.2, 0.3, 0.4]}},
    {"method": "ties", "parameters": {"density": 0.2}, "grid": {"scale": [0.5, 1.0, 1.5]}},
    {"method": "consensus", "parameters": {"mask_threshold": 0.4}, "grid": {"scale": [0.6, 0.8, 1.0]}},
    {"method": "dare", "parameters": {"density": 0.5}, "grid": {"scale": [0.2, 0.3, 0.4]}},
    {"method": "cart", "grid": {"rank_ratio": [0.08, 0.16, 0.32, 0.64], "scale": [1.0, 2.0, 4.0, 8.0]}},
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    :param benchmark: the table: pretrained, individual, and every method.
    :param seconds: wall time of each phase.
    """

    benchmark: BenchmarkResult
    seconds: Mapping[str, float]


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    training: Training | None = None,
    methods: Sequence[Any] = METHODS,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the whole road in ``output``: base/, models/NAME/, data/NAME/, recipe.yaml, benchmark/ and merged/.

    :param training: how long to train; default: what the demo's table shows.
    :param methods: what is compared, as a recipe's ``benchmark.methods``.
    :raises UserError: when ``output`` exists and is not an earlier demo that may be overwritten.
    """
    check_replaceable(output, overwrite=overwrite, what="a finished demo", marker=TIMES)
    if (output / TIMES).is_file():
        shutil.rmtree(output)
    report = progress or (lambda step, advance, total: None)
    base, models = output / "base", {task: output / "models" / task for task in TASKS}
    clock = _Clock()
    make_tokenizer(base)
    training = training or Training()
    total = training.pretraining_steps
    pretrain(base, seed, training, lambda steps: report("pretraining a tiny RoBERTa", steps, total))
    clock.lap("pretraining")
    _fine_tune_all(base, models, seed, training, report)
    clock.lap("fine-tuning")
    recipe = _write_recipe(output, base, models, methods)
    found = benchmark(recipe, output=output / "benchmark", device="cpu", progress=report)
    write_files(found)
    cart = next(row for row in found.rows if row.method == "cart")
    merge(recipe.variant("cart", cart.parameters), output=output / "merged", device="cpu")
    clock.lap("merging and measuring")
    (output / TIMES).write_text(json.dumps({"seed": seed, "seconds": clock.seconds}, indent=2) + "\n", encoding="utf-8")
    return DemoResult(found, clock.seconds)


def _write_recipe(output: Path, base: Path, models: Mapping[str, Path], methods: Sequence[Any]) -> Recipe:
    """Write what the user would write for models and data of their own: examples, a tasks file and a recipe."""
    write_data(output / "data", {"validation": VALIDATION_ROWS, "test": TEST_ROWS})
    task = {"kind": "text-classification", "text": ["sentence"], "max_length": MAX_LENGTH}
    (output / "tasks.yaml").write_text(
        yaml.safe_dump({"tasks": {name: dict(task) for name in models}}, sort_keys=False)
    )
    recipe = Recipe.from_mapping(
        {
            "merge_method": "cart",
            "base_model": str(base),
            "models": [{"model": str(folder), "name": name} for name, folder in models.items()],
            "evaluation": {
                "tasks": list(models),
                "tasks_file": str(output / "tasks.yaml"),
                "data": str(output / "data"),
                "split": "test",
                "batch_size": 150,
            },
            "benchmark": {"selection": {"split": "validation"}, "methods": list(methods)},
        }
    )
    (output / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


class _Clock:
    """Notes how long each phase took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._last, 1)
        self._last = now


def _fine_tune_all(base: Path, models: Mapping[str, Path], seed: int, training: Training, report: Progress) -> None:
    """Fine-tune for every domain, in as many processes of one thread as there are cores."""
    workers = min(len(models), cores())
    # started afresh, not forked: a fork of a process that runs threads can hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(fine_tune, base, folder, task, 100 * seed + number, training)
            for number, (task, folder) in enumerate(models.items())
        ]
        for job in as_completed(jobs):
            job.result()
            report("fine-tuning it for 8 domains", 1, len(models))
