"""The files of a folder, told apart by their bytes: hard links are one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.publishing.remote import RemoteFile

_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class Content:
    """The bytes of a file.

    :param source: where they lie, or the bytes themselves.
    :param size: how many they are.
    """

    source: Path | bytes
    size: int

    @classmethod
    def of(cls, data: bytes) -> Content:
        """Return bytes that lie in no file."""
        return cls(data, len(data))

    @cached_property
    def sha256(self) -> str:
        """Their SHA-256, in hex."""
        return self._digest("sha256")

    def read(self) -> bytes:
        """Return them."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def equals(self, remote: RemoteFile | None) -> bool:
        """Whether a file of the repository has the same bytes."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return remote.git_sha1 == self._digest("sha1", b"blob %d\0" % self.size)

    def _digest(self, kind: str, head: bytes = b"") -> str:
        digest = hashlib.new(kind, head, usedforsecurity=False)
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with self.source.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        return digest.hexdigest()


def list_files(folder: Path) -> dict[str, Content]:
    """Return the files of a folder by their path in it, hidden ones left out; hard links share their content.

    :raises UserError: naming a file that cannot be read.
    """
    found: dict[str, Content] = {}
    linked: dict[tuple[int, int], Content] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        try:
            with path.open("rb"):  # what cannot be read must be found before anything is sent
                status = path.stat()
        except OSError as failure:
            raise UserError(f"cannot read {path}: {failure.strerror}") from failure
        content = linked.setdefault((status.st_dev, status.st_ino), Content(path, status.st_size))
        found[name.as_posix()] = content
    return found


def same_bytes(files: Mapping[str, Content]) -> dict[str, str]:
    """Return for each file the first that has the same bytes: itself, mostly."""
    sizes: dict[int, list[Content]] = {}
    for content in files.values():
        alike = sizes.setdefault(content.size, [])
        if all(content is not other for other in alike):
            alike.append(content)
    firsts: dict[int | str, str] = {}
    # a hash is worth reading the file only where another file has its size
    return {
        path: firsts.setdefault(id(content) if len(sizes[content.size]) == 1 else content.sha256, path)
        for path, content in files.items()
    }
