"""`cart-hf demo`: make the checkpoints, merge them with every method, measure, and leave everything on disk."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cart_hf.demo.comparison import Batches, Grid, Row, compare, encode
from cart_hf.demo.data import TASKS, clinc150
from cart_hf.demo.table import as_json, markdown
from cart_hf.demo.training import MAX_LENGTH, Training, fine_tune, make_tokenizer, pretrain
from cart_hf.merging import Progress, cores
from cart_hf.output.folder import check_replaceable

RESULTS = "results.json"
VALIDATION_ROWS = 150  # of each task; enough to choose settings, and the demo stays short
GRIDS: dict[str, Grid] = {
    "average": {},
    "task_arithmetic": {"scale": [0.2, 0.3, 0.4]},
    "ties": {"density": [0.2], "scale": [0.5, 1.0, 1.5]},
    "consensus": {"mask_threshold": [0.4], "scale": [0.6, 0.8, 1.0]},
    "dare": {"density": [0.5], "scale": [0.2, 0.3, 0.4]},
    "cart": {"rank_ratio": [0.08, 0.16, 0.32, 0.64], "scale": [1.0, 2.0, 4.0, 8.0]},
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    :param rows: the table: pretrained, individual, and every method.
    :param seconds: wall time of each phase.
    """

    rows: list[Row]
    seconds: Mapping[str, float]


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    training: Training | None = None,
    grids: Mapping[str, Grid] = GRIDS,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the whole road in ``output``: base/, models/NAME/, merged/ and the results.

    :param training: how long to train; default: what the demo's table shows.
    :param grids: the methods, and the settings to try for each.
    :raises UserError: when ``output`` exists and is not an earlier demo that may be overwritten.
    """
    check_replaceable(output, overwrite=overwrite, what="a finished demo", marker=RESULTS)
    if (output / RESULTS).is_file():
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
    folders = {task: str(folder) for task, folder in models.items()}
    data = {split: _batches(base, split) for split in ("validation", "test")}
    work, merged = output / "work", output / "merged"
    found = compare(
        str(base),
        folders,
        data["validation"],
        data["test"],
        work,
        grids=grids,
        keep=merged,
        progress=report,
        device="cpu",
    )
    rows = list(found)
    clock.lap("merging and measuring")
    shutil.rmtree(work, ignore_errors=True)
    results = {"seed": seed, "seconds": clock.seconds, "rows": as_json(rows)}
    (output / "results.md").write_text(markdown(rows), encoding="utf-8")
    (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return DemoResult(rows, clock.seconds)


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


def _batches(base: Path, split: str) -> dict[str, Batches]:
    """Return each task's encoded sentences of one split."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {}
    for task in TASKS:
        data = clinc150()[task][split]
        rows = range(len(data.labels))
        if split == "validation":  # an even sample: the rows are ordered by intent
            rows = range(0, len(data.labels), max(1, len(data.labels) // VALIDATION_ROWS))
        sentences, labels = [data.sentences[i] for i in rows], [data.labels[i] for i in rows]
        found[task] = encode(tokenizer, sentences, labels, max_length=MAX_LENGTH, batch_size=150)
    return found
