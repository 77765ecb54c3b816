"""One backbone pass, every task's head: serving a merged folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cart_hf.errors import UserError, did_you_mean
from cart_hf.output.folder import HEAD_FILE
from cart_hf.recipe import Reference
from cart_hf.zero_shot import DEFAULT_TEMPLATES, cached_class_embeddings, class_embeddings, features


class _Shared(nn.Module):
    """Stands in a task's model for its backbone and returns what the shared backbone has just computed.

    The task's own class then runs its own head code, whatever it is.
    """

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


class MultiTaskModel(nn.Module):
    """A merged model with all its heads: ``model(**inputs)`` returns ``{task: output}``.

    Text and image classifiers bring their heads from ``tasks/NAME``; a merged CLIP gets zero-shot heads from class
    names (:meth:`add_zero_shot`). Build it with :meth:`from_pretrained`.

    :param backbone: the encoder the heads share, or None when there are only zero-shot heads.
    :param heads: a model for each task whose backbone is replaced by the shared one.
    :param clip: a whole CLIP model, for zero-shot heads.

    ``folder`` is where :meth:`from_pretrained` read it: there lie its tokenizer and processor.
    """

    def __init__(
        self, backbone: nn.Module | None, heads: Mapping[str, nn.Module], clip: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.clip = clip
        self._heads: dict[str, nn.Module] = dict(heads)
        for position, head in enumerate(self._heads.values()):
            self.add_module(f"head_{position}", head)  # task names may hold dots, module names may not
        self._zero_shot: dict[str, str] = {}
        self._labels = {name: _label_names(head) for name, head in self._heads.items()}
        self.folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, tasks: Sequence[str] | None = None, revision: str | None = None, **options: Any
    ) -> MultiTaskModel:
        """Load a folder that ``cart_hf.merge`` wrote, or such a repository on the Hub.

        :param tasks: load these heads only; default: all.
        :param options: passed on to transformers' ``from_pretrained`` (``dtype``, ``device_map`` ...).
        :raises UserError: when the folder is not a merged model or has no such task.
        """
        import transformers

        path = _local(folder, revision)
        present = sorted(p.name for p in (path / "tasks").iterdir()) if (path / "tasks").is_dir() else []
        for name in tasks or ():
            if name not in present:
                raise UserError(f"{folder} has no task '{name}'{did_you_mean(name, present)}")
        heads: dict[str, nn.Module] = {}
        backbone: nn.Module | None = None
        outlines = {name: _outline(path, name) for name in tasks or present}
        # the fullest one serves all: a token classifier's backbone lacks the pooler that others need
        fullest = max(outlines, key=lambda name: len(_own_backbone(outlines[name])[0].state_dict()), default=None)
        for name, outline in outlines.items():
            model = None if name == fullest else _head_only(outline, path / "tasks" / name / HEAD_FILE, options)
            if model is None:
                model = type(outline).from_pretrained(path, subfolder=f"tasks/{name}", **options)
            own, attribute = _own_backbone(model)
            if name == fullest:
                backbone = own
            setattr(model, attribute, _Shared())
            heads[name] = model
        clip = None
        if not heads:
            clip = transformers.AutoModel.from_pretrained(path, **options)
            if not hasattr(clip, "get_text_features"):
                raise UserError(f"{folder} has neither task heads (tasks/NAME) nor a CLIP text tower")
        loaded = cls(backbone, heads, clip)
        loaded.folder = path
        return loaded.eval()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it answers."""
        return [*self._heads, *self._zero_shot]

    def labels(self, task: str) -> list[str]:
        """Return the label names of a task, in the order of its logits."""
        if task not in self._labels:
            raise UserError(f"no task '{task}'{did_you_mean(task, self.tasks)}")
        return self._labels[task]

    def add_zero_shot(
        self,
        task: str,
        class_names: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        tokenizer: Any = None,
        cache: Path | None = None,
    ) -> None:
        """Add a zero-shot head to a merged CLIP.

        See :func:`cart_hf.zero_shot.class_embeddings`.

        :param class_names: the classes, in the order of the labels.
        :param templates: prompts with ``{}`` for the class name.
        :param tokenizer: the CLIP tokenizer; default: the one in the folder.
        :param cache: folder that keeps the heads between runs; default: none.
        :raises UserError: when this is not a CLIP model, or a template has no ``{}``.
        """
        if self.clip is None:
            raise UserError("zero-shot heads need a CLIP model; this model's tasks have heads of their own")
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if cache is None:
            weight = class_embeddings(self.clip, tokenizer, class_names, templates)
        else:
            weight = cached_class_embeddings(self.clip, tokenizer, class_names, templates, cache)
        buffer = f"zero_shot_{len(self._zero_shot)}"
        self.register_buffer(buffer, weight)
        self._zero_shot[task] = buffer
        self._labels[task] = list(class_names)

    def forward(self, *, tasks: Sequence[str] | None = None, **inputs: Any) -> dict[str, Any]:
        """Run the backbone once and every head on its output.

        :param tasks: names of the heads to run; default: all.
        :param inputs: what the tokenizer or image processor returned.
        :return: for each task the output its own class gives; ``.logits`` has shape (batch, labels).
        """
        wanted = list(tasks) if tasks is not None else self.tasks
        for name in wanted:
            self.labels(name)
        outputs: dict[str, Any] = {}
        headed = [name for name in wanted if name in self._heads]
        if headed and self.backbone is not None:
            accepted = inspect.signature(self.backbone.forward).parameters
            shared = self.backbone(**{name: value for name, value in inputs.items() if name in accepted})
            for name in headed:
                stand_in = next(m for m in self._heads[name].children() if isinstance(m, _Shared))
                stand_in.output = shared
                outputs[name] = self._heads[name](**inputs)
                stand_in.output = None
        zero_shot = [name for name in wanted if name in self._zero_shot]
        if zero_shot:
            outputs |= self._zero_shot_outputs(zero_shot, inputs["pixel_values"])
        return {name: outputs[name] for name in wanted}

    def _zero_shot_outputs(self, names: Sequence[str], pixel_values: torch.Tensor) -> dict[str, Any]:
        from transformers.modeling_outputs import ImageClassifierOutput

        assert self.clip is not None
        images = features(self.clip.get_image_features(pixel_values=pixel_values))  # type: ignore[operator]
        images = nn.functional.normalize(images, dim=-1) * self.clip.logit_scale.exp()  # type: ignore[operator,union-attr]
        return {name: ImageClassifierOutput(logits=images @ getattr(self, self._zero_shot[name]).T) for name in names}


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


def _label_names(model: Any) -> list[str]:
    names: dict[int, str] = model.config.id2label
    return [names[i] for i in sorted(names)]


def _local(folder: str | Path, revision: str | None) -> Path:
    if Path(folder).expanduser().is_dir():
        return Path(folder).expanduser()
    from cart_hf.sources.hub import download_repository, open_repository

    return download_repository(open_repository("model", Reference(str(folder), revision)))


def _own_backbone(model: Any) -> tuple[nn.Module, str]:
    """Return a task model's backbone and the attribute that holds it: the child that is a model itself."""
    from transformers import PreTrainedModel

    for attribute, child in model.named_children():
        if isinstance(child, PreTrainedModel):
            return child, attribute
    raise UserError(f"{type(model).__name__} has no backbone that tasks could share")
