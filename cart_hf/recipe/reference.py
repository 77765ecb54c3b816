"""References to models: a Hub id, `id@revision`, a subfolder of one, a local folder, or `base+adapter`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_HUB_PART = re.compile(r"[\w][\w.-]{0,95}")
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Reference:
    """Where a checkpoint is.

    :param path: a Hub id (``org/name`` or ``name``), or a local folder.
    :param revision: branch, tag or commit of a Hub id.
    :param subfolder: folder inside a Hub repository or a local folder.
    :param adapter: the LoRA adapter (PEFT) on top of it, which has none itself.
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None
    adapter: Reference | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``id``, ``id@revision``, ``org/name/sub/folder@revision`` or a path, or two of them: ``base+adapter``.

        A path that exists always wins.

        :raises ValueError: when the text can be neither a Hub id nor a folder.
        """
        if not text:
            raise ValueError("an empty model reference")
        if "+" not in text or exists(text):
            return cls._parse_one(text)
        problems = []
        for base, adapter in _splits(text):
            try:
                return replace(cls._parse_one(base), adapter=cls._parse_one(adapter))
            except ValueError as problem:
                problems.append(str(problem))
        advice = "" if len(problems) == 1 else "; a model has one adapter: base+adapter"
        raise ValueError(f"'{text[:200]}' is no folder, and no base+adapter: {problems[0]}{advice}")

    @classmethod
    def _parse_one(cls, text: str) -> Reference:
        """Read a reference that names no adapter."""
        if not text:
            raise ValueError("nothing on one side of the '+'")
        if exists(text):
            return cls(str(Path(text).expanduser()))
        head, at, revision = text.partition("@")
        if at and head and exists(head):
            raise ValueError(f"'{head}' is a local folder: '@{revision}' is for Hub ids only")
        if looks_local(text):
            raise ValueError(f"folder not found: {text}")
        parts = head.split("/")
        if not all(_HUB_PART.fullmatch(part) for part in parts) or (at and not revision) or "@" in revision:
            raise ValueError(f"'{text[:100]}' is neither an existing folder nor a Hub id (org/name, org/name@revision)")
        return cls("/".join(parts[:2]), revision or None, "/".join(parts[2:]) or None)

    @classmethod
    def from_yaml(cls, value: Any) -> Reference:
        """Read a reference from a recipe: a string, or mergekit's mappings.

        Those are ``{path, revision}`` (plus ``subfolder``), and ``{model: ..., lora: ...}``, whose values are strings
        or such mappings.

        :raises ValueError: for anything else; valid mergekit that is not supported is named.
        """
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, dict):
            raise ValueError(f"expected a Hub id or a folder, not {value!r}")
        if value.get("override_architecture") is not None:
            raise ValueError("'override_architecture' is valid mergekit, but cart-hf does not support it")
        base = cls._from_part(value.get("model", {key: part for key, part in value.items() if key != "lora"}))
        if value.get("lora") is None:
            return base
        adapter = cls._from_part(value["lora"])
        if base.adapter is not None or adapter.adapter is not None:
            raise ValueError(f"'{base}' with lora '{adapter}': one adapter for each model")
        return replace(base, adapter=adapter)

    @classmethod
    def _from_part(cls, value: Any) -> Reference:
        """Read a string, or a mapping ``{path, revision, subfolder}``."""
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            raise ValueError(f"expected a Hub id, a folder or {{path, revision, subfolder}}, not {value!r}")
        unknown = ", ".join(str(key) for key in value if key not in ("path", "revision", "subfolder"))
        if unknown:
            raise ValueError(f"expected {{path, revision, subfolder}}, found {unknown}")
        return cls.parse(value["path"])._with(value.get("revision"), value.get("subfolder"))

    def _with(self, revision: Any, subfolder: Any) -> Reference:
        """Return this reference with the revision and subfolder that a mapping names beside it."""
        if self.adapter is not None and (revision or subfolder):
            raise ValueError(f"'{self}' is two models: say {{model: {{path, revision}}, lora: {{path, revision}}}}")
        if revision is not None and not isinstance(revision, str):
            raise ValueError(f"revision {revision!r} is not text; quote it: YAML reads some commits as numbers")
        if revision and self.is_local:
            raise ValueError(f"'{self.path}' is a local folder: a revision ({revision}) is for Hub ids only")
        if subfolder and not all(_HUB_PART.fullmatch(part) for part in str(subfolder).split("/")):
            raise ValueError(f"subfolder '{subfolder}' is not a plain folder of the repository")
        return replace(self, revision=revision or self.revision, subfolder=str(subfolder or "") or self.subfolder)

    @property
    def is_local(self) -> bool:
        """Whether it names a folder (or file) of this machine; its adapter, too, if it has one."""
        return exists(self.path) and (self.adapter is None or self.adapter.is_local)

    @property
    def without_adapter(self) -> Reference:
        """The model that the adapter is on."""
        return replace(self, adapter=None)

    @property
    def default_name(self) -> str:
        """The last part of the reference, or of its adapter's."""
        if self.adapter is not None:
            return self.adapter.default_name
        last = self.subfolder or (str(Path(self.path).resolve()) if self.is_local else self.path)
        return re.sub(r"[^\w.-]", "-", Path(last).name).lstrip("-.") or "model"

    def to_yaml(self) -> str | dict[str, Any]:
        """Return what a recipe would hold: a string where one says it all, else a mapping."""
        if self.adapter is not None:
            base, adapter = self.without_adapter.to_yaml(), self.adapter.to_yaml()
            plain = isinstance(base, str) and isinstance(adapter, str) and "+" not in base + adapter
            return f"{base}+{adapter}" if plain else {"model": base, "lora": adapter}
        if self.is_local:
            path = str(Path(self.path).expanduser().resolve())
            return {"path": path, "subfolder": self.subfolder} if self.subfolder else path
        if self.subfolder is None and "+" not in str(self):
            return str(self)
        mapping = {"path": self.path, "subfolder": self.subfolder, "revision": self.revision}
        return {key: value for key, value in mapping.items() if value is not None}

    def __str__(self) -> str:
        place = self.path if self.subfolder is None else f"{self.path}/{self.subfolder}"
        text = place if self.revision is None else f"{place}@{self.revision}"
        return text if self.adapter is None else f"{text}+{self.adapter}"


def _splits(text: str) -> Iterator[tuple[str, str]]:
    """Yield the parts on both sides of each ``+``."""
    for place, character in enumerate(text):
        if character == "+":
            yield text[:place], text[place + 1 :]


def exists(text: str) -> bool:
    """Whether ``text`` names something on this machine; what cannot be a path (too long, no such user) does not."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def looks_local(text: str) -> bool:
    """Whether a person who writes ``text`` means a path: it starts like one, or has a Windows drive or backslash."""
    return text.startswith(("/", "./", "../", "~", ".\\")) or text in (".", "..") or "\\" in text or text.endswith("/")


def split_name(text: str) -> tuple[str | None, str]:
    """Split ``NAME=REF`` into (name, ref); the name is None when there is none or the whole text is a path."""
    name, equals, reference = text.partition("=")
    if equals and _NAME.fullmatch(name) and not exists(text):
        return name, reference
    return None, text


def task_name(name: str) -> str:
    """Return ``name``, which becomes a folder under ``tasks/``.

    :raises ValueError: when it cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"'{name}' cannot name a task: use letters, digits, '.', '_' and '-'")
    return name
