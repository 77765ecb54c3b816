"""Fine-tuned models at work on examples of their own tasks: whose task is whose, and which vectors are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cart_hf.adaptation.answering import owner_of
from cart_hf.errors import UserError
from cart_hf.evaluation.batches import Batch
from cart_hf.evaluation.model import Model, load_complete, modality_of, preprocessor_of
from cart_hf.plan import Plan
from cart_hf.recipe import Evaluation
from cart_hf.sources import Checkpoint
from cart_hf.tasks import Task, find_tasks


def tasks_of_models(plan: Plan, evaluation: Evaluation) -> list[Task]:
    """Return each model's own task, of several the first, in the order of the models.

    :raises UserError: when a task has no model, or a model no task.
    """
    names = [model.name for model in plan.models]
    found: dict[str, Task] = {}
    for task in find_tasks(evaluation.tasks, suite=evaluation.suite, tasks_file=evaluation.tasks_file):
        found.setdefault(owner_of(task, evaluation, names), task)
    lacking = [name for name in names if name not in found]
    if lacking:
        raise UserError(
            [
                f"{name}: none of the tasks is this model's own, so there are no inputs for it; name one of that "
                f"name, or say which task it answers (evaluation: heads: {{TASK: {name}}})"
                for name in lacking
            ]
        )
    return [found[name] for name in names]


def opened(checkpoint: Checkpoint, base: str | None, device: torch.device) -> tuple[torch.nn.Module, Model]:
    """Load a fine-tuned model of any class: there need not be a head that answers.

    :param base: lends its tokenizer or image processor to a model without.
    :return: the module, its weights in float32, and a model whose ``logits`` runs it and returns none.
    """
    import transformers

    checkpoint.fetch()
    module = load_complete(checkpoint, getattr(transformers, checkpoint.architecture.class_name)).to(device).eval()
    run = getattr(module, "get_image_features", module)  # what a CLIP answers with; its text tower names the classes
    modality = modality_of(module) if run is module else "image"
    if checkpoint.adapts is not None:  # which lends an adapter its tokenizer
        base = str(checkpoint.adapts.pinned)
    preprocess = preprocessor_of(checkpoint.folder, modality, module.config, base)

    def logits(heads: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        run(**inputs)
        return {}

    return module, Model(modality, preprocess, {}, logits, None)


def real_tokens(batch: Batch) -> torch.Tensor:
    """Return which tokens of a batch are no padding, bool, shape (examples, tokens); (examples, 1) for images.

    What stands for an image that cannot be decoded is not real either.
    """
    real = batch.inputs.get("attention_mask", torch.ones(len(batch.rows), 1)) > 0
    real[[batch.rows.index(row) for row in batch.broken]] = False
    return real


def real_places(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return which of the vectors in ``x``, shape (..., n), are of a real token of a real example.

    :param real: see :func:`real_tokens`.
    :return: their places among all the vectors, 1-D, on the CPU.
    """
    count = x[..., 0].numel()
    if count == real.numel():  # tokens, whatever shape they are in
        chosen = real.flatten()
    elif len(x) == len(real):  # an example's patches, or its one pooled vector
        chosen = real.any(dim=1).repeat_interleave(count // len(x))
    else:  # such as windows of an image
        chosen = torch.ones(count)
    return chosen.nonzero().flatten()


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a layer was called with, by place or by name."""
    found = (*args, *kwargs.values())[0]
    assert isinstance(found, torch.Tensor)
    return found
