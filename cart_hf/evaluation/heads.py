"""Which head answers a task, and in which order its logits stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cart_hf.errors import UserError, did_you_mean
from cart_hf.evaluation.model import Located, Model
from cart_hf.tasks import IMAGE, REGRESSION, Task, TaskData
from cart_hf.tasks.labels import are_generic, positions


def head_of(task: Task, located: Located, renamed: Mapping[str, str]) -> str:
    """Return the name of the head that answers a task, or in a compressed CLIP of the adapter.

    :param renamed: the head of a task, where the user says that it is called differently.
    :raises UserError: when the model has no such head.
    """
    if located.kind == "classifier" or (located.zero_shot and not located.heads):
        return ""
    wanted = renamed.get(task.name, task.head)
    if wanted not in located.heads:
        article, what = ("an", "adapter") if located.zero_shot else ("a", "head")
        raise UserError(
            f"task '{task.name}': {located.reference} has no {what} '{wanted}'{did_you_mean(wanted, located.heads)}; "
            f"{article} {what} of another name is given with --heads {task.name}={what.upper()}"
        )
    return wanted


def check_modality(task: Task, model: Model) -> None:
    """Refuse images for a model that reads text, and the other way round.

    :raises UserError: naming both.
    """
    needed = "image" if task.kind == IMAGE else "text"
    if needed != model.modality:
        raise UserError(f"task '{task.name}': its examples are {needed}s, the model reads {model.modality}s")


def make_zero_shot(model: Model, head: str, data: TaskData) -> Sequence[str]:
    """Give a CLIP the head of a task, made from the names of its classes; return these, in the order of the logits.

    :param head: the adapter that answers, where there are adapters.
    :raises UserError: when nothing names the classes.
    """
    task = data.task
    names = task.classes or data.label_names
    if not names:
        raise UserError(f"task '{task.name}': nothing names its classes: add `classes: [...]` to the task")
    assert model.add_zero_shot is not None  # what a CLIP has
    model.add_zero_shot(task.name, head, names, task.templates)
    return names


def logit_order(data: TaskData, head: Sequence[str], mapping: str) -> list[int] | None:
    """Return for each label of the data the position of its logit; None for a regression.

    :param head: the head's label names.
    :param mapping: ``name`` or ``index``.
    :raises UserError: when head and data cannot be about the same labels.
    """
    task = data.task
    where = f"task '{task.name}'"
    if task.kind == REGRESSION:
        if len(head) != 1:
            raise UserError(f"{where}: a regression needs a head with one output, this one has {len(head)} labels")
        return None
    if len(head) == 1:
        raise UserError(f"{where}: the head is a regression (one output), the task has classes")
    names = data.label_names
    count = len(names) or (int(data.labels.max()) + 1 if data.labels is not None else len(head))
    if mapping == "index":
        if count > len(head) or (names and len(names) != len(head)):
            raise UserError(f"{where}: the data has {count} labels, the head {len(head)}")
        return list(range(len(head)))
    if not names:
        raise UserError(
            f"{where}: nothing names the data's labels: add `labels: [...]` to the task, "
            "or trust the order with --label-mapping index"
        )
    order = positions(names, head, task.aliases)
    if order is not None:
        return order
    if are_generic(head) and len(head) == len(names):
        raise UserError(
            f"{where}: the head's labels are only numbered ({', '.join(head[:3])} ...), the data's are "
            f"{_shown(names)}: if the model was trained in this order, say --label-mapping index"
        )
    raise UserError(
        f"{where}: the head's labels ({_shown(head)}) are not the data's ({_shown(names)}); rename them in the model's "
        "config.json, add `aliases:` to the task, or, if only the words differ, say --label-mapping index"
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:4])) + (f" ... {len(names)} in all" if len(names) > 4 else "")
