"""One backbone, every task's head, and its adapter where there is one: serving a merged folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cart_hf.errors import UserError, did_you_mean
from cart_hf.recipe import Reference
from cart_hf.serving.adapters import TaskAdapters, adapter_names, attach_adapters
from cart_hf.serving.heads import Shared, read_heads
from cart_hf.serving.zero_shot import DEFAULT_TEMPLATES, cached_class_embeddings, class_embeddings, features


class MultiTaskModel(nn.Module):
    """A merged model with all its heads: ``model(**inputs)`` returns ``{task: output}``.

    Text and image classifiers bring their heads from ``tasks/NAME``; a merged CLIP gets zero-shot heads from class
    names (:meth:`add_zero_shot`). Build it with :meth:`from_pretrained`.

    The backbone runs once for all tasks. In a compressed folder (``adapters/NAME``) it runs once for each task, with
    that task's adapter active, and memory holds one backbone and the adapters of all tasks that were loaded. Which
    adapter is active is state of the model, so one model answers one call at a time.

    :param backbone: the encoder the heads share, or None when there are only zero-shot heads.
    :param heads: a model for each task whose backbone is replaced by the shared one.
    :param clip: a whole CLIP model, for zero-shot heads.
    :param adapters: the tasks' adapters on the backbone or the CLIP; None when a single model answers all tasks.

    ``folder`` is where :meth:`from_pretrained` read it: there lie its tokenizer and processor.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        heads: Mapping[str, nn.Module],
        clip: nn.Module | None = None,
        adapters: TaskAdapters | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.clip = clip
        self.adapters = adapters
        self._heads: dict[str, nn.Module] = dict(heads)
        for position, head in enumerate(self._heads.values()):
            self.add_module(f"head_{position}", head)  # task names may hold dots, module names may not
        self._zero_shot: dict[str, str] = {}
        self._adapter_of = {name: name for name in self._heads}
        self._labels = {name: _label_names(head) for name, head in self._heads.items()}
        self.folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, tasks: Sequence[str] | None = None, revision: str | None = None, **options: Any
    ) -> MultiTaskModel:
        """Load a folder that ``cart_hf.merge`` or ``cart_hf.compress`` wrote, or such a repository on the Hub.

        :param tasks: load these heads (and adapters) only; default: all.
        :param options: passed on to transformers' ``from_pretrained`` (``dtype``, ``device_map`` ...).
        :raises UserError: when the folder is not a merged model, has no such task, or an adapter does not fit it.
        """
        path = _local(folder, revision)
        adapted = adapter_names(path)
        headed = sorted(p.name for p in (path / "tasks").iterdir()) if (path / "tasks").is_dir() else []
        for name in tasks or ():
            if name not in (headed or adapted):
                raise UserError(f"{folder} has no task '{name}'{did_you_mean(name, headed or adapted)}")
        wanted = list(tasks or headed or adapted)
        adapters = None
        if headed:
            shared, heads = read_heads(path, wanted, options)
            if adapted:
                adapters = attach_adapters(path, wanted, shared, heads)
            loaded = cls(next(iter(shared.values())), heads, adapters=adapters)
        else:
            clip = _clip(path, folder, options)
            if adapted:
                adapters = attach_adapters(path, wanted, clip)
            loaded = cls(None, {}, clip, adapters)
        loaded.folder = path
        return loaded.eval()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks it answers."""
        return [*self._heads, *self._zero_shot]

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        """Each task's model without the backbone, by task; none where the heads are zero-shot."""
        return self._heads

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
        adapter: str | None = None,
    ) -> None:
        """Add a zero-shot head to a merged CLIP.

        See :func:`cart_hf.serving.zero_shot.class_embeddings`.

        :param class_names: the classes, in the order of the labels.
        :param templates: prompts with ``{}`` for the class name.
        :param tokenizer: the CLIP tokenizer; default: the one in the folder.
        :param cache: folder that keeps the heads between runs; default: none.
        :param adapter: in a compressed CLIP, whose adapter answers; default: the one called like the task.
        :raises UserError: when this is not a CLIP model, it has no such adapter, or a template has no ``{}``.
        """
        if self.clip is None:
            raise UserError("zero-shot heads need a CLIP model; this model's tasks have heads of their own")
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self.adapters is not None:
            self.adapters.activate(adapter or task)  # it may change the text tower, too
            self._adapter_of[task] = adapter or task
        if cache is None:
            weight = class_embeddings(self.clip, tokenizer, class_names, templates)
        else:
            tensors = self.clip.state_dict() if self.adapters is None else self.adapters.tensors(adapter or task)
            weight = cached_class_embeddings(self.clip, tokenizer, class_names, templates, cache, tensors)
        buffer = f"zero_shot_{len(self._zero_shot)}"
        self.register_buffer(buffer, weight)
        self._zero_shot[task] = buffer
        self._labels[task] = list(class_names)

    def forward(self, *, tasks: Sequence[str] | None = None, **inputs: Any) -> dict[str, Any]:
        """Run the backbone once (with adapters: once for each of them) and every head on its output.

        :param tasks: names of the heads to run; default: all.
        :param inputs: what the tokenizer or image processor returned.
        :return: for each task the output its own class gives; ``.logits`` has shape (batch, labels).
        """
        wanted = list(tasks) if tasks is not None else self.tasks
        for name in wanted:
            self.labels(name)
        outputs: dict[str, Any] = {}
        for names in self._passes(wanted):
            headed = [name for name in names if name in self._heads]
            if headed:
                outputs |= self._head_outputs(headed, inputs)
            zero_shot = [name for name in names if name in self._zero_shot]
            if zero_shot:
                outputs |= self._zero_shot_outputs(zero_shot, inputs["pixel_values"])
        return {name: outputs[name] for name in wanted}

    def _passes(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Yield the tasks that one pass answers: all, or those of one adapter, which is then active."""
        if self.adapters is None:
            yield names
            return
        for adapter in dict.fromkeys(self._adapter_of[name] for name in names):
            self.adapters.activate(adapter)
            yield [name for name in names if self._adapter_of[name] == adapter]

    def _head_outputs(self, names: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert self.backbone is not None
        accepted = inspect.signature(self.backbone.forward).parameters
        shared = self.backbone(**{name: value for name, value in inputs.items() if name in accepted})
        outputs: dict[str, Any] = {}
        for name in names:
            stand_in = next(m for m in self._heads[name].children() if isinstance(m, Shared))
            stand_in.output = shared
            outputs[name] = self._heads[name](**inputs)
            stand_in.output = None
        return outputs

    def _zero_shot_outputs(self, names: Sequence[str], pixel_values: torch.Tensor) -> dict[str, Any]:
        from transformers.modeling_outputs import ImageClassifierOutput

        assert self.clip is not None
        images = features(self.clip.get_image_features(pixel_values=pixel_values))  # type: ignore[operator]
        images = nn.functional.normalize(images, dim=-1) * self.clip.logit_scale.exp()  # type: ignore[operator,union-attr]
        return {name: ImageClassifierOutput(logits=images @ getattr(self, self._zero_shot[name]).T) for name in names}


def _clip(path: Path, named: str | Path, options: Mapping[str, Any]) -> nn.Module:
    import transformers

    if not (path / "config.json").is_file():
        what = "only adapters, which PEFT adds to their base" if adapter_names(path) else "so it is no merged model"
        raise UserError(f"{named} has no config.json, {what}")
    clip: nn.Module = transformers.AutoModel.from_pretrained(path, **options)
    if not hasattr(clip, "get_text_features"):
        raise UserError(f"{named} has neither task heads (tasks/NAME) nor a CLIP text tower")
    return clip


def _label_names(model: Any) -> list[str]:
    names: dict[int, str] = model.config.id2label
    return [names[i] for i in sorted(names)]


def _local(folder: str | Path, revision: str | None) -> Path:
    if Path(folder).expanduser().is_dir():
        return Path(folder).expanduser()
    from cart_hf.sources.hub import download_repository, open_repository

    return download_repository(open_repository("model", Reference(str(folder), revision)))
