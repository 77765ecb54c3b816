"""References to models: a Hub id, `id@revision`, a subfolder of one, or a local folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
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
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``id``, ``id@revision``, ``org/name/sub/folder@revision`` or a path; a path that exists always wins.

        :raises ValueError: when the text can be neither a Hub id nor a folder.
        """
        if not text:
            raise ValueError("an empty model reference")
        if exists(text):
            return cls(str(Path(text).expanduser()))
        head, at, revision = text.partition("@")
        if at and head and exists(head):
            raise ValueError(f"'{head}' is a local folder: '@{revision}' is for Hub ids only")
        if looks_local(text):
            raise ValueError(f"folder not found: {text}")
        if "+" in text:
            raise ValueError(
                f"'{text}': LoRA adapters as merge sources (base+adapter) are not supported; "
                "merge the adapter into its base first (PEFT: merge_and_unload) and name that folder"
            )
        parts = head.split("/")
        if not all(_HUB_PART.fullmatch(part) for part in parts) or (at and not revision) or "@" in revision:
            raise ValueError(f"'{text[:100]}' is neither an existing folder nor a Hub id (org/name, org/name@revision)")
        return cls("/".join(parts[:2]), revision or None, "/".join(parts[2:]) or None)

    @classmethod
    def from_yaml(cls, value: Any) -> Reference:
        """Read a reference from a recipe: a string, or mergekit's mapping ``{path, revision}`` (plus ``subfolder``).

        :raises ValueError: for anything else; valid mergekit that is not supported is named.
        """
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, dict):
            raise ValueError(f"expected a Hub id or a folder, not {value!r}")
        for key in ("lora", "override_architecture"):
            if value.get(key) is not None:
                raise ValueError(f"'{key}' is valid mergekit, but cart-hf does not support it")
        inner = value.get("model", value)
        if isinstance(inner, str):
            return cls.parse(inner)
        if not isinstance(inner, dict) or not isinstance(inner.get("path"), str):
            raise ValueError(f"expected a Hub id, a folder or {{path, revision, subfolder}}, not {inner!r}")
        unknown = ", ".join(str(key) for key in inner if key not in ("path", "revision", "subfolder"))
        if unknown:
            raise ValueError(f"expected {{path, revision, subfolder}}, found {unknown}")
        return cls.parse(inner["path"])._with(inner.get("revision"), inner.get("subfolder"))

    def _with(self, revision: Any, subfolder: Any) -> Reference:
        """Return this reference with the revision and subfolder that a mapping names beside it."""
        if revision is not None and not isinstance(revision, str):
            raise ValueError(f"revision {revision!r} is not text; quote it: YAML reads some commits as numbers")
        if revision and self.is_local:
            raise ValueError(f"'{self.path}' is a local folder: a revision ({revision}) is for Hub ids only")
        if subfolder and not all(_HUB_PART.fullmatch(part) for part in str(subfolder).split("/")):
            raise ValueError(f"subfolder '{subfolder}' is not a plain folder of the repository")
        return Reference(self.path, revision or self.revision, str(subfolder) if subfolder else self.subfolder)

    @property
    def is_local(self) -> bool:
        """Whether it names a folder (or file) of this machine."""
        return exists(self.path)

    @property
    def default_name(self) -> str:
        """The reference's last part."""
        last = self.subfolder or (str(Path(self.path).resolve()) if self.is_local else self.path)
        return re.sub(r"[^\w.-]", "-", Path(last).name).lstrip("-.") or "model"

    def to_yaml(self) -> str | dict[str, str]:
        """Return what a recipe would hold: a string where one says it all, else a mapping."""
        if self.is_local:
            path = str(Path(self.path).expanduser().resolve())
            return {"path": path, "subfolder": self.subfolder} if self.subfolder else path
        if self.subfolder is None:
            return str(self)
        mapping = {"path": self.path, "subfolder": self.subfolder}
        return mapping | {"revision": self.revision} if self.revision else mapping

    def __str__(self) -> str:
        place = self.path if self.subfolder is None else f"{self.path}/{self.subfolder}"
        return place if self.revision is None else f"{place}@{self.revision}"


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
