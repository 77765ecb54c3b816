"""Downloading a file of the Hub into Hugging Face's cache: resumed where it broke off, checked, never twice at a time.

The client starts a file again when its process was killed, and believes what it receives. So the bytes of large (LFS)
files are fetched here, into the place where the client looks for them, and the client makes the rest of the cache's
layout. What is in the cache already is believed, as the client believes it: a file is hashed once, when it arrives.

Files in Xet storage are the client's when it can read Xet: it asks again itself, starts a file that broke off from its
beginning, and checks every chunk; the whole is hashed here too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from cart_hf.errors import UserError
from cart_hf.recipe.reference import Reference
from cart_hf.sources.explain import explained
from cart_hf.sources.patience import Patience, patiently

Report = Callable[[int], None]

_PIECE = 1 << 16  # bytes; at most so many are lost when a connection breaks
_BLOCK = 1 << 22  # bytes
_SHA256 = re.compile("[0-9a-f]{64}")


class StoppedError(Exception):
    """A download was given up because another failed or the user interrupted; what has arrived is kept."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hub repository at one commit.

    :param name: what to call its model in messages.
    :param reference: the repository.
    :param commit: the commit.
    :param path: its path in the repository.
    """

    name: str
    reference: Reference
    commit: str
    path: str

    @property
    def label(self) -> str:
        """What to call it in messages."""
        return f"{self.reference.path}/{self.path}"


@dataclass(frozen=True)
class Incoming:
    """A file that is to be downloaded, and what the Hub says it holds.

    :param file: the file.
    :param size: its bytes.
    :param sha256: the hash of its bytes, its ETag; None for a small file that git itself keeps.
    :param by_client: whether the client downloads it.
    """

    file: RemoteFile
    size: int
    sha256: str | None
    by_client: bool


def cached(file: RemoteFile) -> Path | None:
    """Return the file's path in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.reference.path, file.path, revision=file.commit)
    return Path(found) if isinstance(found, str) else None


def sha256_in_cache(path: Path) -> str | None:
    """Return the hash under which the cache keeps an LFS file.

    :param path: in a snapshot: it links to the blob, and that perhaps to Xet's store, where names are other hashes.
    """
    name = path.readlink().name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def ask(file: RemoteFile, stop: Event | None = None) -> Incoming:
    """Ask the Hub what a file holds.

    :raises UserError: when it does not say.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.reference.path, file.path, revision=file.commit)
    with explained(file.name, file.reference):
        found = patiently(file.name, lambda: get_hf_file_metadata(url, library_name="cart-hf"), stop)
    sha256 = found.etag if _SHA256.fullmatch(found.etag or "") and found.size is not None else None
    in_xet = found.xet_file_data is not None and _client_reads_xet()
    return Incoming(file, found.size or 0, sha256, sha256 is None or in_xet)


def bytes_to_come(incoming: Incoming) -> int:
    """Return how many bytes of a file are not on this machine yet."""
    if incoming.by_client:
        return incoming.size
    if _place(incoming).exists():
        return 0
    partial = _partial(incoming)
    return max(incoming.size - partial.stat().st_size, 0) if partial.exists() else incoming.size


def download(file: RemoteFile) -> Path:
    """Bring a file into the cache, unless it is there.

    :raises UserError: as :func:`receive` does.
    """
    return cached(file) or receive(ask(file), lambda count: None, Event())


def receive(incoming: Incoming, report: Report, stop: Event) -> Path:
    """Bring a file into the cache.

    :param report: called with the number of bytes that have come; less than 0 when some must come again.
    :param stop: when set, the download ends with :class:`StoppedError`.
    :raises UserError: when it cannot be had, or is not what the Hub says it is.
    """
    if stop.is_set():
        raise StoppedError
    file = incoming.file
    with explained(file.name, file.reference):
        if incoming.by_client:
            return _checked_from_client(incoming, report, stop)
        _fetch(incoming, report, stop)
        return _from_client(file, stop)  # it finds the bytes in their place, and links the snapshot to them


def _fetch(incoming: Incoming, report: Report, stop: Event) -> None:
    """Bring an LFS file to its place, going on with what an earlier process received of it.

    The client takes the same lock. Where a file system's locks lock nothing, two processes write the same bytes to the
    same positions, and the second finds the file gone to its place: it fails, and finds it there the next time.
    """
    from huggingface_hub.utils import WeakFileLock

    place, partial, storage = _place(incoming), _partial(incoming), _storage(incoming.file)
    lock = storage.parent / ".locks" / storage.name / f"{incoming.sha256}.lock"
    for folder in (place.parent, partial.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if place.exists():  # another process was faster, or another commit has the same file
            report(incoming.size)
            return
        for _ in range(2):
            _fill(incoming, partial, report, stop)
            if _sha256(partial, stop) == incoming.sha256:
                partial.replace(place)
                return
            partial.unlink()
            report(-incoming.size)
    raise _damaged(incoming.file)


def _fill(incoming: Incoming, partial: Path, report: Report, stop: Event) -> None:
    """Receive what ``partial`` lacks."""
    file, size = incoming.file, incoming.size
    with partial.open("r+b" if partial.exists() else "w+b") as out:
        done = out.seek(0, os.SEEK_END)
        if done > size:
            done = out.truncate(0)
        report(done)
        furthest, patience = done, Patience(file.name, stop)
        while done < size:
            try:
                for start, piece in _pieces(file, done):
                    if stop.is_set():
                        raise StoppedError
                    out.seek(start)
                    out.write(piece)
                    report(start + len(piece) - done)
                    done = start + len(piece)
                    if done > furthest:
                        furthest = done
                        patience.renew()
                    if done > size:
                        return  # not this file: it will not have its hash
                if done < size:
                    raise ConnectionError(f"{file.label} ended after {done} of {size} bytes")
            except Exception as failure:
                out.flush()
                patience.wait(failure)


def _pieces(file: RemoteFile, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield a file's bytes from ``start`` on, each piece with its position; from 0 when the server knows no ranges."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # the client's session sends the token to the Hub and drops it where it is redirected to another host
    headers = build_hf_headers(library_name="cart-hf") | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(file.reference.path, file.path, revision=file.commit)
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        position = start if response.status_code == 206 else 0
        for piece in response.iter_bytes(_PIECE):
            yield position, piece
            position += len(piece)


def _checked_from_client(incoming: Incoming, report: Report, stop: Event) -> Path:
    """Have the client download a file, and compare its hash where the Hub gives one."""
    for _ in range(2):
        path = _from_client(incoming.file, stop, report)
        if incoming.sha256 is None or _sha256(path, stop) == incoming.sha256:
            return path
        _discard(path)
        report(-incoming.size)
    raise _damaged(incoming.file)


def _discard(path: Path) -> None:
    """Remove a file of the cache: the snapshot's link, the blob, and what that leads to in the store of all models."""
    target = path.parent / path.readlink() if path.is_symlink() else None
    path.unlink()
    if target is not None:
        _discard(target)


def _from_client(file: RemoteFile, stop: Event, report: Report = lambda count: None) -> Path:
    from huggingface_hub import HfApi

    api, path, commit = HfApi(library_name="cart-hf"), file.path, file.commit
    found = patiently(
        file.name,
        lambda: api.hf_hub_download(file.reference.path, path, revision=commit, tqdm_class=_bar(report)),
        stop,
    )
    return Path(found)


def _bar(report: Report) -> type:
    """Return a class that the client takes for a progress bar, and that hands the bytes on."""

    class Bar:
        """Shows nothing."""

        n = total = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, count: float | None = 1) -> None:
            """Bytes of the file were written."""
            report(int(count or 0))

        def _nothing(self, *_: Any, **__: Any) -> None: ...

        # Xet counts the bytes it receives apart from those it writes
        update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = refresh = close = _nothing

    return Bar


def _client_reads_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


def _storage(file: RemoteFile) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / str(repo_folder_name(repo_id=file.reference.path, repo_type="model"))


def _place(incoming: Incoming) -> Path:
    """Return where the client looks for a file's bytes: under their hash; in the snapshot where there are no links."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import are_symlinks_supported

    if are_symlinks_supported(constants.HF_HUB_CACHE):
        return _storage(incoming.file) / "blobs" / str(incoming.sha256)
    return _storage(incoming.file) / "snapshots" / incoming.file.commit / incoming.file.path


def _partial(incoming: Incoming) -> Path:
    """Return where a file grows: named so that `hf cache prune` counts it among the incomplete downloads."""
    return _storage(incoming.file) / "blobs" / f"{incoming.sha256}.cart_hf.incomplete"


def _sha256(path: Path, stop: Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if stop.is_set():
                raise StoppedError
            digest.update(block)
    return digest.hexdigest()


def _damaged(file: RemoteFile) -> UserError:
    return UserError(
        f"{file.name}: {file.label} arrived damaged twice: its SHA-256 is not the one that the Hub lists. It was not "
        "kept; a proxy or mirror in between may serve another file: check HF_ENDPOINT and try again"
    )
