"""Hub repositories: resolved to a commit once, small files and headers first, weights when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cart_hf.errors import UserError, did_you_mean, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.layout import INDEX, LAYOUTS, PICKLE_INDEX, sharded_weight_files
from cart_hf.sources.weights import PickleFile, SafetensorsFile, WeightFile, parse_header

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "merges.txt")
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2")


def open_repository(name: str, reference: Reference) -> tuple[Path, str, Callable[[], dict[str, WeightFile]]]:
    """Resolve a Hub reference and download its small files.

    :return: the local folder of the small files, the commit, and a function that opens the weight files' headers (by
        range requests for those that are not in the cache).
    :raises UserError: when the repository, revision or subfolder does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi, is_offline_mode

    api = HfApi(library_name="cart-hf")
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    with explained(name, reference):
        offline = is_offline_mode()
        revision = api.resolve_revision(reference.path, revision=reference.revision, local_files_only=offline)
        commit = str(revision.resolved)  # the object itself is a string too: the branch's name
        snapshot = api.snapshot_download(
            reference.path,
            revision=commit,
            allow_patterns=[prefix + pattern for pattern in SMALL_FILES],
            ignore_patterns=[f"{prefix}*/*"],  # the star of a pattern matches slashes too
        )
        everything = _list_files(api, reference, commit, Path(snapshot))
    present = {path.removeprefix(prefix) for path in everything if path.startswith(prefix)}
    if prefix and not present:
        known = sorted({str(PurePosixPath(path).parent) for path in everything if path.endswith("/config.json")})
        raise UserError(
            f"{name}: {reference.path} has no folder '{reference.subfolder}' (commit {commit[:8]})"
            + did_you_mean(str(reference.subfolder), known)
        )
    folder = Path(snapshot) / prefix

    def weight_files() -> dict[str, WeightFile]:
        with explained(name, reference):
            return _weight_files(name, reference, commit, folder, present)

    return folder, commit, weight_files


def _list_files(api: Any, reference: Reference, commit: str, snapshot: Path) -> Collection[str]:
    """List the files of a commit; offline and without a list in the cache, those that are on this machine."""
    from huggingface_hub import errors, get_cached_repo_tree, is_offline_mode

    try:
        return [file.path for file in get_cached_repo_tree(reference.path, revision=commit)]
    except errors.CachedRepoTreeNotFoundError:  # the cache is an older client's, or may not be written
        if is_offline_mode():
            return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        return list(api.list_repo_files(reference.path, revision=commit))


def _weight_files(
    name: str, reference: Reference, commit: str, folder: Path, present: Collection[str]
) -> dict[str, WeightFile]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    api = HfApi(library_name="cart-hf")
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""

    def download(file: str) -> Path:
        with explained(name, reference):
            return Path(api.hf_hub_download(reference.path, prefix + file, revision=commit))

    def open_file(file: str) -> WeightFile:
        if not file.endswith(".safetensors"):
            return PickleFile(download(file))
        local = try_to_load_from_cache(reference.path, prefix + file, revision=commit)
        if isinstance(local, str):
            return SafetensorsFile.open(Path(local))
        metadata = api.parse_safetensors_file_metadata(reference.path, prefix + file, revision=commit)
        header = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in metadata.tensors.items()
        }
        label = f"{reference.path}/{prefix}{file}"
        return SafetensorsFile(label, parse_header(label, header), lambda: download(file))

    layout = next((file for file in LAYOUTS if file in present), None)
    if layout is None:
        raise UserError(
            f"{name}: {reference} holds no weights: looked for {', '.join(LAYOUTS)} (has {shorten(sorted(present), 6)})"
        )
    if layout in (INDEX, PICKLE_INDEX):
        text = (folder / layout).read_text(encoding="utf-8")
        return sharded_weight_files(f"{reference.path}/{prefix}{layout}", text, open_file, lambda n: n in present)
    return {layout: open_file(layout)}


@contextmanager
def explained(name: str, reference: Reference | str) -> Iterator[None]:
    """Turn the Hub client's errors into one message each."""
    try:
        yield
    except Exception as failure:
        explanation = _explanation(failure, reference if isinstance(reference, str) else reference.path)
        if explanation is None:
            raise
        raise UserError(f"{name}: {reference}{explanation}") from failure


def _explanation(failure: Exception, repository: str) -> str | None:
    """Say what an error means and what to do, or return None when it is not about the Hub."""
    from huggingface_hub import constants, errors

    page, reason = f"{constants.ENDPOINT}/{repository}", _first_line(failure)
    missing = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    meanings: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (errors.GatedRepoError, f" is gated: accept its terms at {page} and log in (hf auth login)"),
        (
            errors.RepositoryNotFoundError,
            ": no such folder here and no such repository on the Hub; check the spelling, "
            "and for a private repository log in (hf auth login)",
        ),
        (errors.HFValidationError, f": no such folder here, and not a valid Hub id: {reason}"),
        (errors.RevisionNotFoundError, f": the repository has no such branch, tag or commit; see {page}/tree/main"),
        (missing, f": not in the local cache, and {_obstacle(failure)}"),
        (errors.SafetensorsParsingError, f" holds a damaged weight file: {reason}"),
        ((errors.HfHubHTTPError, OSError), f": {_answer(failure)}"),
        (
            json.JSONDecodeError,
            f": {constants.ENDPOINT} does not answer like a Hub; check HF_ENDPOINT and the network's proxy",
        ),
    ]
    if type(failure).__module__.split(".")[0] in _HTTP_CLIENTS:
        # a dropped connection reaches us as the HTTP client's own error, which is no OSError
        return f": the connection to the Hub failed ({reason}); try again, files that are complete are kept"
    return next((meaning for kinds, meaning in meanings if isinstance(failure, kinds)), None)


def _obstacle(failure: Exception) -> str:
    """Say why something that is not in the cache could not be downloaded."""
    from huggingface_hub import constants, errors, is_offline_mode

    cause = failure.__cause__
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids downloading it; run once without HF_HUB_OFFLINE"
    if isinstance(cause, errors.HfHubHTTPError | errors.FileMetadataError):
        return _answer(cause)
    why = f" ({_first_line(cause)})" if isinstance(cause, Exception) else ""
    return f"{constants.ENDPOINT} cannot be reached{why}; check the connection and try again"


def _answer(failure: Exception) -> str:
    """Say what an answer of the Hub, or an error of this machine, means."""
    if getattr(getattr(failure, "response", None), "status_code", None) == 401:
        return "the Hub does not know the access token; log in again (hf auth login), or correct HF_TOKEN"
    return f"the Hub could not be read: {_first_line(failure)}"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
