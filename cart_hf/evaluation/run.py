"""The loop over tasks: load the data, run the model once over what several tasks share, score."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from cart_hf.errors import UserError
from cart_hf.evaluation.adapted import adapted_inputs, inputs_of, unseen
from cart_hf.evaluation.heads import check_modality, head_of, logit_order, make_zero_shot
from cart_hf.evaluation.model import Located, Model, load
from cart_hf.evaluation.prediction import predict
from cart_hf.evaluation.results import TaskResult
from cart_hf.evaluation.scoring import predicted, scored
from cart_hf.parallel import Progress
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation
from cart_hf.sources import fingerprint, tensors_fingerprint
from cart_hf.tasks import Task, TaskData, load_split

INTERNAL = "internal error: "
"""How the message of an error begins that is not the user's."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task.

    :param result: its result; None when there is none.
    :param error: why there is none.
    :param data, predictions: the examples and what was predicted for them, when it was run just now.
    """

    result: TaskResult | None = None
    error: str | None = None
    data: TaskData | None = None
    predictions: np.ndarray | None = None


Report = Callable[[str, Outcome], None]
Reader = Callable[[Task], TaskData]


@dataclass(frozen=True)
class _Ready:
    """A task with its data and the head, or the adapter, that answers it.

    :param adapted_on: how many of the examples the model was adapted on.
    """

    task: Task
    head: str
    data: TaskData
    settings: Mapping[str, Any]
    adapted_on: int


def run_tasks(
    located: Located,
    tasks: Sequence[Task],
    evaluation: Evaluation,
    *,
    base: str | None,
    processes: Processes,
    report: Report,
    known: Callable[[Task, Mapping[str, Any]], TaskResult | None] = lambda task, settings: None,
    read: Reader | None = None,
    progress: Progress | None = None,
) -> None:
    """Evaluate a model on tasks; one that fails does not stop the others.

    :param base: lends a CLIP vision tower its text tower.
    :param report: receives each task's outcome as soon as there is one.
    :param known: returns the result of an earlier run with these settings, if there is one; the first process is asked.
    :param read: returns a task's examples; default: :func:`reader` of ``evaluation``.
    """
    read = read or reader(evaluation)
    heads: dict[str, str] = {}
    for task in tasks:
        with _reporting(task, report):
            heads[task.name] = head_of(task, located, evaluation.heads)
    model: Model | None = None
    identity = _identity(located, base, processes) if heads else ""
    adapted = processes.everywhere(lambda: adapted_inputs(located)) if heads else None
    for group in _groups([task for task in tasks if task.name in heads], evaluation):
        started = time.perf_counter()
        ready = []
        for task in group:
            with _reporting(task, report):
                data = processes.everywhere(partial(read, task))
                # the first process decides for all: caches on other machines may differ from its own
                settings = processes.gather(_settings(identity, task, data, evaluation, adapted))[0]
                earlier = processes.gather(known(task, settings) if processes.is_main else None)[0]
                if earlier is not None:
                    report(task.name, Outcome(earlier))
                else:
                    seen = 0 if adapted is None else int(np.isin(data.input_hashes(), adapted).sum())
                    ready.append(_Ready(task, heads[task.name], data, settings, seen))
        if not ready:
            continue
        if model is None:
            model = load(located, list(dict.fromkeys(heads.values())), base=base, device=processes.device)
        _run_group(model, ready, evaluation, processes, report, progress, started)


def _run_group(
    model: Model,
    group: Sequence[_Ready],
    evaluation: Evaluation,
    processes: Processes,
    report: Report,
    progress: Progress | None,
    started: float,
) -> None:
    """Run tasks that read the same examples: one pass of the backbone (with adapters: of each), every task's head."""
    from cart_hf.evaluation.metrics import check

    orders: dict[str, list[int] | None] = {}
    for ready in group:
        with _reporting(ready.task, report):
            check_modality(ready.task, model)
            if ready.data.labels is not None:
                check(ready.task.metrics)
            orders[ready.task.name] = _order(model, ready, evaluation)
    group = [ready for ready in group if ready.task.name in orders]
    if not group:
        return
    try:
        found = predict(
            model,
            list(dict.fromkeys(_logits_of(ready, model) for ready in group)),
            group[0].data,
            processes,
            batch_size=evaluation.batch_size,
            dtype=evaluation.dtype,
            progress=progress,
        )
    except Exception as failure:
        for ready in group:
            report(ready.task.name, _failed(failure))
        return
    seconds = (time.perf_counter() - started) / len(group)
    for ready in group:
        with _reporting(ready.task, report):
            logits = found.logits[_logits_of(ready, model)]
            predictions = predicted(ready.data, logits, orders[ready.task.name], found.broken)
            result = None
            if ready.data.labels is not None:
                result = replace(
                    scored(ready.data, predictions, found.broken, seconds),
                    settings=dict(ready.settings),
                    adapted_on=ready.adapted_on,
                )
            report(ready.task.name, Outcome(result, None, ready.data, predictions))


def _logits_of(ready: _Ready, model: Model) -> str:
    """Return what the model calls a task's logits: zero-shot heads are made for the task."""
    return ready.head if model.add_zero_shot is None else ready.task.name


def _order(model: Model, ready: _Ready, evaluation: Evaluation) -> list[int] | None:
    task = ready.task
    if model.add_zero_shot is None:
        mapping = evaluation.label_mapping or task.label_mapping
        return logit_order(ready.data, model.labels[ready.head], mapping)
    return list(range(len(make_zero_shot(model, ready.head, ready.data))))


def reader(evaluation: Evaluation, *, labelled: bool = True) -> Reader:
    """Return what reads a task's examples.

    :param labelled: whether examples without labels are refused.
    :raises UserError: when the inputs that are to be left out are not known.
    """
    if evaluation.unseen_by is not None and evaluation.stream:
        raise UserError("--unseen-by: --stream reads the first rows only, often those adapted on; leave it out")
    inputs = inputs_of(evaluation.unseen_by) if evaluation.unseen_by is not None else None

    def read(task: Task) -> TaskData:
        where = f"task '{task.name}', split '{evaluation.split or task.split}'"
        return load_split(
            task,
            evaluation.split,
            data=evaluation.data,
            limit=evaluation.limit,
            stream=evaluation.stream,
            labelled=labelled,
            keep=unseen(inputs, where) if inputs is not None else None,
        )

    return read


def _groups(tasks: Sequence[Task], evaluation: Evaluation) -> list[list[Task]]:
    """Put tasks together that read the same texts or images in the same way."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        source = task.name if evaluation.data or task.dataset is None else task.dataset.model_dump_json()
        split = evaluation.split or task.split
        key = (source, task.splits.get(split, split), task.kind, task.text, task.image, task.max_length)
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _identity(located: Located, base: str | None, processes: Processes) -> str:
    """Return a name for the weights that answer: a vision tower answers with its base's text tower."""
    name = ""
    if processes.is_main:
        loaded = located.loaded
        if located.checkpoint is not None:
            name = located.checkpoint.fingerprint()
        elif loaded is None:
            name = fingerprint(located.reference, located.commit, located.folder)
        else:
            scales = loaded.adapters.scales() if loaded.adapters is not None else {}
            name = tensors_fingerprint(loaded.state_dict() | scales)
    return processes.gather(f"{name} {base}" if located.kind == "clip_vision" else name)[0]


def _settings(
    identity: str, task: Task, data: TaskData, evaluation: Evaluation, adapted: np.ndarray | None
) -> dict[str, Any]:
    """Return what two runs must have in common to have the same result."""
    known = {} if adapted is None else {"adapted": hashlib.sha256(adapted.tobytes()).hexdigest()[:16]}
    return {
        "model": identity,
        "task": task.digest,
        "data": data.fingerprint,
        "split": data.split,
        "source": data.source,
        "limit": evaluation.limit,
        "dtype": evaluation.dtype,
        "label_mapping": evaluation.label_mapping or task.label_mapping,
        "head": evaluation.heads.get(task.name, task.head),
        **known,
    }


@contextmanager
def _reporting(task: Task, report: Report) -> Iterator[None]:
    """Report an error of the task instead of raising it."""
    try:
        yield
    except Exception as failure:
        report(task.name, _failed(failure))


def _failed(failure: Exception) -> Outcome:
    if isinstance(failure, UserError):
        return Outcome(error="; ".join(failure.problems))
    if "out of memory" in str(failure).lower():  # each device raises a class of its own
        return Outcome(error="the device has not enough memory: give a smaller --batch-size, or --dtype bfloat16")
    logging.getLogger("cart_hf").error("unexpected", exc_info=failure)
    return Outcome(error=f"{INTERNAL}{type(failure).__name__}: {' '.join(str(failure).split())[:500]}")
