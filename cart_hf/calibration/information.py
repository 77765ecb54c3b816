"""The diagonal of a model's Fisher information, exactly: from the gradients of single examples and labels.

With logits z, probabilities p and J = dz / dtheta, the gradient of log p_c is J^T (e_c - p), so the expectation over
the labels of its square is ``sum_k (J^T l_k)^2`` for any l_k with ``sum_k l_k l_k^T = diag(p) - p p^T``. The
eigenvectors of that matrix, times the roots of their eigenvalues, are such: C labels need C - 1 gradients at most, and
fewer where the model is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cart_hf.cache import cache_folder
from cart_hf.calibration.reading import opened
from cart_hf.errors import UserError
from cart_hf.evaluation.batches import batches
from cart_hf.evaluation.heads import check_modality, make_zero_shot
from cart_hf.evaluation.model import Model, load_complete, preprocessor_of
from cart_hf.evaluation.prediction import on_device
from cart_hf.recipe.calibration import Labels
from cart_hf.serving.multitask import MultiTaskModel
from cart_hf.serving.zero_shot import DEFAULT_TEMPLATES
from cart_hf.sources import Checkpoint
from cart_hf.tasks import TaskData

MOST_EXACT = 64  # labels that are all looked at unless a recipe says otherwise
_LEFT_OUT = 1e-6  # share of the trace of diag(p) - p p^T
_WITH_HEAD = ("ForSequenceClassification", "ForImageClassification")
_VISION = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


@dataclass(frozen=True)
class Answering:
    """A fine-tuned model with what answers its task.

    :param module: whose weights are merged, by their names in the checkpoint.
    :param preprocess: its tokenizer or image processor.
    :param logits: returns the answers to a batch of inputs, shape (batch, labels).
    """

    module: torch.nn.Module
    preprocess: Any
    logits: Callable[[dict[str, torch.Tensor]], torch.Tensor]


def fisher_information(
    checkpoint: Checkpoint,
    data: TaskData,
    *,
    base: Checkpoint | None,
    device: torch.device,
    labels: Labels | None,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Return ``mean_x sum_c p_c(x) (d log p_c(x) / d theta)^2`` for every parameter theta of a model with a head.

    For a regression it is ``mean_x (d y(x) / d theta)^2``: that of a Gaussian of unit variance around the answer y.

    Memory: the model, its gradient and the result. Time: for each example a pass forward, and a pass back and a pass
    over all parameters for each of at most C - 1 directions of C labels; one where labels are drawn.

    :param base: the CLIP whose text tower makes the head of a vision tower, and who lends its tokenizer.
    :param labels, seed: see :class:`cart_hf.recipe.calibration.Calibration`.
    :param advance: called with the number of examples as they are done.
    :return: float32, 1-D, on the device, by parameter.
    :raises UserError: when the model has no head.
    """
    model = _answering(checkpoint, data, base, device)
    for part in model.module.modules():
        if isinstance(part, torch.nn.Embedding) and device.type != "mps":
            part.sparse = True  # the gradient of the few rows that a text uses
    parameters = {name: value for name, value in model.module.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, memory_format=torch.contiguous_format) for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    read = 0
    for batch in batches(data, [[row] for row in range(len(data))], model.preprocess):
        advance(1)
        if batch.broken:
            continue
        read += 1
        (logits,) = model.logits(on_device(device, batch))
        directions = _directions(logits.detach().cpu().double(), labels, generator)
        for place, direction in enumerate(directions.to(logits)):
            gradients = torch.autograd.grad(
                logits,
                list(parameters.values()),
                direction,
                retain_graph=place + 1 < len(directions),
                allow_unused=True,
            )
            for total, gradient in zip(sums.values(), gradients, strict=True):
                _add_square(total, gradient)
    aliases = model.module.named_parameters(remove_duplicate=False)
    whole = {id(value): sums[name].div_(max(read, 1)).view(-1) for name, value in parameters.items()}
    return {name: whole[id(value)] for name, value in aliases if id(value) in whole}


def _add_square(total: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Add the squares of a gradient; None is that of a parameter that the answer does not depend on."""
    if gradient is None:
        return
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        total.index_add_(0, gradient.indices()[0], gradient.values().square())
    else:
        total.addcmul_(gradient, gradient)


def _directions(logits: torch.Tensor, labels: Labels | None, generator: torch.Generator) -> torch.Tensor:
    """Return the l_k of one example (see above), shape (k, labels).

    :param logits: float64, shape (labels,).
    """
    count = len(logits)
    if count == 1:  # a regression
        return torch.ones(1, 1, dtype=logits.dtype)
    p = logits.softmax(dim=0)
    if labels == "sampled" or (labels is None and count > MOST_EXACT):
        drawn = torch.multinomial(p, 1, generator=generator)
        return (torch.eye(count, dtype=p.dtype)[drawn] - p).view(1, -1)
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))  # ascending
    values = values.clamp(min=0)
    first = int((values.cumsum(0) <= _LEFT_OUT * values.sum()).sum())
    found: torch.Tensor = (vectors[:, first:] * values[first:].sqrt()).T
    return found


def _answering(checkpoint: Checkpoint, data: TaskData, base: Checkpoint | None, device: torch.device) -> Answering:
    named = None if base is None else str(base.reference)
    module, model = opened(checkpoint, named, device)
    check_modality(data.task, model)
    kind = checkpoint.architecture.class_name
    if kind.endswith(_WITH_HEAD):
        return Answering(module, model.preprocess, lambda inputs: module(**inputs).logits)
    if kind != "CLIPModel" and not (kind in _VISION and base is not None):
        raise UserError(
            f"{checkpoint.name}: {checkpoint.reference} is a {kind}: fisher needs models that answer, "
            "...ForSequenceClassification, ...ForImageClassification or CLIP (a vision tower with its CLIP as "
            "base_model); regmean does without"
        )
    return Answering(module, model.preprocess, _zero_shot(module, checkpoint, model, data, base, device))


def _zero_shot(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    model: Model,
    data: TaskData,
    base: Checkpoint | None,
    device: torch.device,
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Return what answers with the names of a task's classes; their embeddings are given, not learnt."""
    import transformers

    clip: Any = module
    owner = checkpoint if checkpoint.adapts is None else checkpoint.adapts
    if checkpoint.architecture.class_name != "CLIPModel":
        assert base is not None  # refused before
        base.fetch()
        owner, clip = base, load_complete(base, transformers.CLIPModel)
        clip.vision_model = getattr(module, "vision_model", module)
    loaded = MultiTaskModel(None, {}, clip).to(device).eval()
    tokenizer = preprocessor_of(
        owner.folder, "text", clip.config.text_config, None if base is None else str(base.reference)
    )

    def add(task: str, adapter: str, class_names: Sequence[str], templates: Sequence[str]) -> None:
        loaded.add_zero_shot(task, class_names, templates or DEFAULT_TEMPLATES, tokenizer, cache_folder("zero_shot"))

    make_zero_shot(Model("image", model.preprocess, {}, model.logits, add), "", data)
    task = data.task.name

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = loaded(tasks=[task], **inputs)[task].logits
        return found

    return logits
