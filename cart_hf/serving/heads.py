"""The backbone that tasks share, and each task's head, read from a merged folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cart_hf.errors import UserError
from cart_hf.output.folder import HEAD_FILE


class Shared(nn.Module):
    """Stands in a task's model for its backbone and returns what the shared backbone has just computed.

    The task's own class then runs its own head code, whatever it is.
    """

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def read_heads(
    folder: Path, tasks: Sequence[str], options: Mapping[str, Any]
) -> tuple[nn.ModuleDict, dict[str, nn.Module]]:
    """Load the shared backbone and the models of some tasks, in which a :class:`Shared` stands for it.

    :param tasks: at least one.
    :param options: of transformers' ``from_pretrained``.
    :return: the backbone under the name that it has in a task's model, and the models by task.
    """
    outlines = {name: _outline(folder, name) for name in tasks}
    # the fullest one serves all: a token classifier's backbone lacks the pooler that others need
    fullest = max(outlines, key=lambda name: len(_own_backbone(outlines[name])[0].state_dict()))
    backbone = nn.ModuleDict()
    heads: dict[str, nn.Module] = {}
    for name, outline in outlines.items():
        model = None if name == fullest else _head_only(outline, folder / "tasks" / name / HEAD_FILE, options)
        if model is None:
            model = type(outline).from_pretrained(folder, subfolder=f"tasks/{name}", **options)
        own, attribute = _own_backbone(model)
        if name == fullest:
            backbone[attribute] = own
        setattr(model, attribute, Shared())
        heads[name] = model
    return backbone, heads


def _outline(path: Path, task: str) -> Any:
    """Return a task's model on the meta device: its class and its shapes."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, subfolder=f"tasks/{task}")
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with torch.device("meta"):
        return kind(config)


def _head_only(outline: Any, file: Path, options: Mapping[str, Any]) -> Any:
    """Fill a model's head from its own file, the backbone left out; None when there is more to it than that."""
    from safetensors.torch import load_file

    if set(options) - {"dtype"} or not file.is_file():
        return None
    tensors = load_file(file)
    _, attribute = _own_backbone(outline)
    needed = {name for name in outline.state_dict() if not name.startswith(f"{attribute}.")}
    buffers = [name for name, _ in outline.named_buffers() if not name.startswith(f"{attribute}.")]
    if needed != set(tensors) or buffers:
        return None
    dtype = options.get("dtype")
    if isinstance(dtype, torch.dtype):
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    outline.load_state_dict(tensors, strict=False, assign=True)
    return outline.eval()


def _own_backbone(model: Any) -> tuple[nn.Module, str]:
    """Return a task model's backbone and the attribute that holds it: the child that is a model itself."""
    from transformers import PreTrainedModel

    for attribute, child in model.named_children():
        if isinstance(child, PreTrainedModel):
            return child, attribute
    raise UserError(f"{type(model).__name__} has no backbone that tasks could share")
