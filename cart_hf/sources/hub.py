"""Hub repositories: resolved to a commit once, small files and headers first, weights when they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError, did_you_mean, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.download import RemoteFile, cached, download
from cart_hf.sources.explain import explained
from cart_hf.sources.fetch import download_all
from cart_hf.sources.layout import INDEX, LAYOUTS, PICKLE_INDEX, sharded_weight_files, shards_of
from cart_hf.sources.patience import patiently
from cart_hf.sources.weights import PickleFile, SafetensorsFile, WeightFile, parse_header

if TYPE_CHECKING:
    from cart_hf.parallel import Progress

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "merges.txt")


@dataclass(frozen=True)
class Repository:
    """A repository, or a folder of one, at one commit.

    :param name: what to call it in messages: the task's name, or ``base``.
    :param reference: as the user wrote it.
    :param commit: what its revision was resolved to.
    :param folder: the local folder of its files; the small ones are there.
    :param files: all its files, by their path in the folder.
    :param layouts: the files that may hold its weights, or list those that do.
    """

    name: str
    reference: Reference
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile]
    layouts: Sequence[str] = LAYOUTS

    def missing_pickles(self) -> list[RemoteFile]:
        """Return the weight files that must be downloaded before their headers can be read.

        :raises UserError: when it has no weights, or a wrong index of them.
        """
        names, _ = self._weights()
        files = [self.files[name] for name in names if name in self.files and not name.endswith(".safetensors")]
        return [file for file in files if cached(file) is None]

    def weight_files(self) -> dict[str, WeightFile]:
        """Open the headers of its weight files, by range requests for those that are not in the cache.

        :raises UserError: when there are none, or one is missing or damaged, or an index is wrong.
        """
        names, index = self._weights()
        if index is None:
            return {name: self._open(name) for name in names}
        text = (self.folder / index).read_text(encoding="utf-8")
        return sharded_weight_files(self.files[index].label, text, self._open, self.files.__contains__)

    def _weights(self) -> tuple[Sequence[str], str | None]:
        """Return the names of its weight files, and of the index that lists them, if there is one."""
        layout = next((file for file in self.layouts if file in self.files), None)
        if layout is None:
            raise UserError(
                f"{self.name}: {self.reference} holds no weights: looked for {', '.join(self.layouts)} "
                f"(has {shorten(sorted(self.files), 6)})"
            )
        if layout not in (INDEX, PICKLE_INDEX):
            return [layout], None
        text = (self.folder / layout).read_text(encoding="utf-8")
        return sorted(set(shards_of(self.files[layout].label, text).values())), layout

    def _open(self, name: str) -> WeightFile:
        file = self.files[name]
        local = cached(file)
        if not name.endswith(".safetensors"):
            return PickleFile(local or download(file))
        if local is not None:
            return SafetensorsFile.open(local)
        return SafetensorsFile(file.label, parse_header(file.label, _header(file)), partial(download, file), file)


def open_repository(name: str, reference: Reference) -> Repository:
    """Resolve a Hub reference, list its files and download the small ones.

    :param name: what to call it in messages: the task's name, or ``base``.
    :raises UserError: when the repository, revision or subfolder does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi, is_offline_mode

    api = HfApi(library_name="cart-hf")
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    with explained(name, reference):
        offline = is_offline_mode()
        revision = patiently(
            name,
            lambda: api.resolve_revision(reference.path, revision=reference.revision, local_files_only=offline),
        )
        commit = str(revision.resolved)  # the object itself is a string too: the branch's name
        snapshot = patiently(
            name,
            lambda: api.snapshot_download(
                reference.path,
                revision=commit,
                allow_patterns=[prefix + pattern for pattern in SMALL_FILES],
                ignore_patterns=[f"{prefix}*/*"],  # the star of a pattern matches slashes too
                tqdm_class=_silent_bar(),
            ),
        )
        everything = patiently(name, lambda: _list_files(api, name, reference, commit, Path(snapshot)))
    files = {file.path.removeprefix(prefix): file for file in everything if file.path.startswith(prefix)}
    if prefix and not files:
        paths = [PurePosixPath(file.path) for file in everything]
        known = sorted({str(path.parent) for path in paths if path.name == "config.json" and len(path.parts) > 1})
        raise UserError(
            f"{name}: {reference.path} has no folder '{reference.subfolder}' (commit {commit[:8]})"
            + did_you_mean(str(reference.subfolder), known)
        )
    return Repository(name, reference, commit, Path(snapshot) / prefix, files)


def download_repository(repository: Repository, progress: Progress | None = None) -> Path:
    """Download all files of a repository, and return its local folder.

    :param progress: see :func:`cart_hf.sources.fetch.download_all`.
    :raises UserError: when there is no room, or a file cannot be had.
    """
    download_all(repository.files.values(), progress)
    return repository.folder


def _list_files(api: Any, name: str, reference: Reference, commit: str, snapshot: Path) -> list[RemoteFile]:
    """List the files of a commit; offline and without a list in the cache, those that are on this machine."""
    from huggingface_hub import errors, get_cached_repo_tree, is_offline_mode

    try:
        paths = [file.path for file in get_cached_repo_tree(reference.path, revision=commit)]
    except errors.CachedRepoTreeNotFoundError:  # the cache is an older client's, or may not be written
        if is_offline_mode():
            paths = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        else:
            paths = api.list_repo_files(reference.path, revision=commit)
    return [RemoteFile(name, reference, commit, path) for path in paths]


def _silent_bar() -> type:
    """Return the client's progress bar, disabled: small files are no matter, and several models come at once."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        """Shows nothing."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))

    return Silent


def _header(file: RemoteFile) -> dict[str, Any]:
    """Read the header of a safetensors file on the Hub."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="cart-hf")
    with explained(file.name, file.reference):
        found = patiently(
            file.name,
            lambda: api.parse_safetensors_file_metadata(file.reference.path, file.path, revision=file.commit),
        )
    return {
        key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for key, info in found.tensors.items()
    }
