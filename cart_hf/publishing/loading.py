"""The lines of Python that load what a folder or a repository holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cart_hf.output.record import ADAPTERS_FOLDER
from cart_hf.publishing.contents import Contents
from cart_hf.sources.layout import ADAPTER_PREFIX, ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: what it is for, and where people find it.

    :param task: whose it is.
    :param title: what it is called: a folder's name or a Hub id.
    :param contents: the adapter alone; see :attr:`Contents.adapters`.
    :param base: the model that it is for, by the name that people have for it.
    :param base_id: that model's Hub id; None where it has none.
    :param model: the arguments by which transformers finds that model.
    :param place: the arguments by which PEFT finds the adapter.
    """

    task: str
    title: str
    contents: Contents
    base: str
    base_id: str | None
    model: str
    place: str

    @property
    def told(self) -> dict[str, Any]:
        """What ``compress.json`` says of it."""
        compression = self.contents.compression
        assert compression is not None  # it is an adapter's
        return dict(compression["tasks"][self.task])

    @property
    def class_name(self) -> str:
        """The class that it is for."""
        return str(self.told["class"])

    @cached_property
    def outputs(self) -> int | None:
        """How many numbers the task's head returns; None where it has no head."""
        return _outputs(self.contents.folder / ADAPTER_WEIGHTS, self.told["heads"])

    @property
    def name(self) -> str:
        """What PEFT may call it among others: its names hold no dots."""
        return re.sub(r"\W", "_", self.task)

    def lines(self) -> list[str]:
        """Return what loads it."""
        return [
            "from peft import PeftModel",
            f"from transformers import {self.class_name}",
            f"model = {self.class_name}.from_pretrained({self.model})",
            f"model = PeftModel.from_pretrained(model, {self.place})",
        ]


def adapters_of(contents: Contents, title: str, *, family: bool) -> list[Adapter]:
    """Return the adapters of a folder.

    :param contents: what it may tell; see :meth:`Contents.public`.
    :param title: what the folder is called: its name, or a Hub id.
    :param family: whether each adapter has a repository of its own besides: see :func:`repository_of`.
    """
    if contents.is_adapter:
        return [_alone(contents, title, task) for task in contents.adapters]
    found = []
    for task, own in contents.adapters.items():
        adapter_title = repository_of(title, task) if family else task
        place = call(adapter_title) if family else call(title, subfolder=f"{ADAPTERS_FOLDER}/{task}")
        model = call(title, subfolder=f"tasks/{task}" if task in contents.tasks else None)
        found.append(Adapter(task, adapter_title, own, title, hub_id_of(title), model, place))
    return found


def repository_of(title: str, task: str) -> str:
    """Return what the repository of one task's adapter is called."""
    return f"{title}-{task}"


def hub_id_of(title: str) -> str | None:
    """Return a title if it is a Hub id, and no folder's name."""
    return title if "/" in title else None


def loading(contents: Contents, title: str, *, family: bool = False) -> list[str]:
    """Return the lines of Python that load the model; of the first task, if there are several.

    :param title, family: as for :func:`adapters_of`.
    """
    for adapter in adapters_of(contents, title, family=family):
        return adapter.lines()
    for task, kind in contents.tasks.items():
        return [
            f"from transformers import {kind}",
            f"model = {kind}.from_pretrained({call(title, subfolder=f'tasks/{task}')})",
        ]
    loader = contents.record["loader"]
    return [f"from transformers import {loader}", f"model = {loader}.from_pretrained({call(title)})"]


def call(place: str, **options: Any) -> str:
    """Return the arguments of a call as Python; options that are None are left out."""
    given = [f"{name}={json.dumps(value)}" for name, value in options.items() if value is not None]
    return ", ".join([json.dumps(place, ensure_ascii=False), *given])


def _alone(contents: Contents, title: str, task: str) -> Adapter:
    """Return the adapter of a single model: it is for the base, not for a centre."""
    base, written = contents.base, contents.recipe["base_model"]
    assert base is not None  # compress refuses a single model without one
    if base.hub_id is None:
        found = Adapter(task, title, contents, str(written), None, "", call(title))
        return replace(found, model=call(f"path/to/{written}", num_labels=found.outputs))
    found = Adapter(task, title, contents, base.hub_id, base.hub_id, "", call(title))
    subfolder = written.get("subfolder") if isinstance(written, Mapping) else None
    return replace(found, model=call(base.hub_id, subfolder=subfolder, num_labels=found.outputs))


def _outputs(file: Path, heads: Sequence[str]) -> int | None:
    """Return the rows of a head's last matrix: it is the one that is not square."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    own = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and any(name.startswith(f"{ADAPTER_PREFIX}{head}.") for head in heads)
    ]
    return min((rows for rows, columns in own if rows != columns), default=own[0][0] if own else None)
