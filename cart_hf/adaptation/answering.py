"""The models that answer: the merged one, whose weights are learnt, and each task's own, which it may learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cart_hf.adaptation.inputs import Inputs
from cart_hf.errors import UserError, did_you_mean
from cart_hf.evaluation.heads import check_modality, head_of, make_zero_shot
from cart_hf.evaluation.model import Located, Model, load, locate
from cart_hf.evaluation.prediction import predict
from cart_hf.parallel import Progress
from cart_hf.processes import Processes
from cart_hf.recipe import Evaluation, Recipe
from cart_hf.serving.multitask import MultiTaskModel
from cart_hf.tasks import Task


@dataclass(frozen=True)
class Answering:
    """The merged model.

    :param module: what holds the weights that are learnt: the backbone, or the CLIP.
    :param model: runs it, with its tokenizer or image processor.
    :param heads: what the model calls the logits of each task.
    :param head_weights: the weights of the heads that answer, by head and name; none of a zero-shot head.
    """

    module: torch.nn.Module
    model: Model
    heads: Mapping[str, str]
    head_weights: Mapping[str, Mapping[str, torch.nn.Parameter]]


def open_merged(
    folder: Path, everything: Sequence[Inputs], evaluation: Evaluation, base: str | None, device: torch.device
) -> Answering:
    """Load a merged folder with the heads of the tasks, none of its weights to be learnt yet.

    :raises UserError: when it has no head for a task, or reads another kind of input.
    """
    # on a CPU the backward pass of the fused attention takes twice the time of the plain one
    faster = {"attn_implementation": "eager"} if device.type == "cpu" else {}
    whole = MultiTaskModel.from_pretrained(folder, dtype=torch.float32, **faster)
    located = locate(whole)
    names = {one.task.name: head_of(one.task, located, evaluation.heads) for one in everything}
    model = load(located, list(dict.fromkeys(names.values())), base=base, device=device)
    heads = {one.task.name: _head(model, one, names[one.task.name]) for one in everything}
    module = whole.clip if whole.backbone is None else whole.backbone
    assert module is not None  # it has heads
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Embedding):
            layer.sparse = True  # a batch has few words: its gradient is dense only once in a step, not for every task
    answer = {name: dict(head.named_parameters()) for name, head in whole.heads.items() if name in names.values()}
    return Answering(module, model, heads, answer)


def own_answers(
    recipe: Recipe,
    everything: Sequence[Inputs],
    evaluation: Evaluation,
    processes: Processes,
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    """Return the logits of each task's own fine-tuned model on its inputs, by task; one model is loaded at a time.

    :raises UserError: when a task has no model of its own.
    """
    base = str(recipe.base_model) if recipe.base_model is not None else None
    references = {entry.name: str(entry.model) for entry in recipe.models}
    found = {}
    for one in everything:
        name = owner_of(one.task, evaluation, list(references))
        located = locate(references[name], base=base)
        model = load(located, [_only_head(located)], base=base, device=processes.device)
        head = _head(model, one, _only_head(located))
        predictions = predict(model, [head], one.data, processes, batch_size=evaluation.batch_size, progress=progress)
        found[one.task.name] = torch.from_numpy(predictions.logits[head])
    return found


def owner_of(task: Task, evaluation: Evaluation, models: Sequence[str]) -> str:
    """Return the name of the fine-tuned model that a task belongs to.

    :raises UserError: when the recipe has none of that name.
    """
    name = evaluation.heads.get(task.name, task.head)
    if name not in models:
        raise UserError(
            f"task '{task.name}': none of the models is called '{name}'{did_you_mean(name, models)}; name one so "
            f"(NAME=REF, in a recipe name:), or say whose head answers the task (--heads {task.name}=NAME)"
        )
    return name


def _only_head(located: Located) -> str:
    return located.heads[0] if located.heads else ""


def _head(model: Model, one: Inputs, head: str) -> str:
    """Return what the model calls the logits of a task; a zero-shot head is made."""
    check_modality(one.task, model)
    if model.add_zero_shot is None:
        return head
    make_zero_shot(model, head, one.data)
    return one.task.name
