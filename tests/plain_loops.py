"""What an evaluation must equal: a loop as anyone writes it with transformers, one example at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from cart_hf.evaluation.model import locate
from cart_hf.evaluation.run import Outcome, run_tasks
from cart_hf.processes import join
from cart_hf.recipe import Evaluation
from cart_hf.tasks import find_tasks


@torch.no_grad()
def text_logits(
    folder: Path | str, columns: Sequence[Sequence[str]], most: int, *, head: str = "", tokenizer: Path | str = ""
) -> np.ndarray:
    """Return a text classifier's logits, shape (examples, labels).

    :param most: tokens after which a text is cut.
    :param head: the task of a merged folder.
    :param tokenizer: where the tokenizer is, when not in ``folder``.
    """
    inside = {"subfolder": f"tasks/{head}"} if head else {}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **inside).eval()
    tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer or folder)
    rows = [
        model(**tokenize(*texts, truncation=True, max_length=most, return_tensors="pt")).logits[0]
        for texts in zip(*columns, strict=True)
    ]
    return torch.stack(rows).numpy()


@torch.no_grad()
def image_features(model: Any, images: Sequence[Any], processor: Path | str) -> torch.Tensor:
    """Return a CLIP's unit vectors of images, shape (images, projection)."""
    process = transformers.AutoImageProcessor.from_pretrained(processor)
    found = [
        model.get_image_features(**process(images=image, return_tensors="pt")).pooler_output[0] for image in images
    ]
    return functional.normalize(torch.stack(found), dim=-1)


@torch.no_grad()
def class_vectors(model: Any, classes: Sequence[str], templates: Sequence[str], tokenizer: Path | str) -> torch.Tensor:
    """Return a CLIP's zero-shot head, shape (classes, projection): the mean over prompts of their unit vectors."""
    tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
    rows = []
    for name in classes:
        prompts = [tokenize(template.format(name), return_tensors="pt") for template in templates]
        vectors = [model.get_text_features(**prompt).pooler_output[0] for prompt in prompts]
        rows.append(torch.stack([functional.normalize(vector, dim=0) for vector in vectors]).mean(0))
    return functional.normalize(torch.stack(rows), dim=-1)


@contextmanager
def forwards_of(kind: type) -> Iterator[list[Mapping[str, Any]]]:
    """Note what models of one class are run on, by the name of the argument."""
    seen: list[Mapping[str, Any]] = []

    def note(module: torch.nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> None:
        if isinstance(module, kind):
            seen.append(inspect.signature(module.forward).bind(*args, **inputs).arguments)

    handle = torch.nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def outcomes(model: Path | str, evaluation: Evaluation, *, base: str | None = None) -> Mapping[str, Outcome]:
    """Evaluate in this process and return what became of each task, predictions included."""
    found: dict[str, Outcome] = {}
    names = evaluation.tasks or None
    run_tasks(
        locate(model, base=base),
        find_tasks(names, suite=evaluation.suite, tasks_file=evaluation.tasks_file),
        evaluation,
        base=base,
        processes=join("cpu"),
        report=found.__setitem__,
    )
    return found
