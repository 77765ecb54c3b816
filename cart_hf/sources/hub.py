"""Hub repositories: resolved to a commit once, small files and headers first, weights when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cart_hf.errors import UserError, shorten
from cart_hf.recipe.reference import Reference
from cart_hf.sources.layout import INDEX, LAYOUTS, PICKLE_INDEX, sharded_weight_files
from cart_hf.sources.weights import PickleFile, SafetensorsFile, WeightFile, parse_header

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.spm", "merges.txt")


def open_repository(name: str, reference: Reference) -> tuple[Path, str, Callable[[], dict[str, WeightFile]]]:
    """Resolve a Hub reference and download its small files.

    :return: the local folder of the small files, the commit, and a function that opens the weight files' headers (by
        range requests for those that are not in the cache).
    :raises UserError: when the repository, revision or subfolder does not exist, is gated, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="cart-hf")
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    with explained(name, reference):
        commit = str(api.resolve_revision(reference.path, revision=reference.revision))
        patterns = [prefix + pattern for pattern in SMALL_FILES]
        snapshot = api.snapshot_download(reference.path, revision=commit, allow_patterns=patterns)
    folder = Path(snapshot) / prefix

    def weight_files() -> dict[str, WeightFile]:
        with explained(name, reference):
            return _weight_files(name, reference, commit, folder, prefix)

    if not folder.is_dir():
        raise UserError(f"{name}: {reference.path} has no folder '{reference.subfolder}' (commit {commit[:8]})")
    return folder, commit, weight_files


def _weight_files(name: str, reference: Reference, commit: str, folder: Path, prefix: str) -> dict[str, WeightFile]:
    from huggingface_hub import HfApi, try_to_load_from_cache

    api = HfApi(library_name="cart-hf")

    def cached(file: str) -> Path | None:
        found = try_to_load_from_cache(reference.path, prefix + file, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def download(file: str) -> Path:
        with explained(name, reference):
            return Path(api.hf_hub_download(reference.path, prefix + file, revision=commit))

    def exists(file: str) -> bool:
        return cached(file) is not None or api.file_exists(reference.path, prefix + file, revision=commit)

    def open_file(file: str) -> WeightFile:
        local = cached(file)
        if not file.endswith(".safetensors"):
            return PickleFile(local or download(file))
        if local is not None:
            return SafetensorsFile.open(local)
        metadata = api.parse_safetensors_file_metadata(reference.path, prefix + file, revision=commit)
        header = {
            key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for key, info in metadata.tensors.items()
        }
        label = f"{reference.path}/{prefix}{file}"
        return SafetensorsFile(label, parse_header(label, header), lambda: download(file))

    present = next((file for file in LAYOUTS if exists(file)), None)
    if present is None:
        found = sorted(p.name for p in folder.iterdir())
        raise UserError(
            f"{name}: {reference} holds no weights: looked for {', '.join(LAYOUTS)} (has {shorten(found, 6)})"
        )
    if present in (INDEX, PICKLE_INDEX):
        text = (folder / present).read_text(encoding="utf-8")
        return sharded_weight_files(f"{reference.path}/{prefix}{present}", text, open_file, exists)
    return {present: open_file(present)}


@contextmanager
def explained(name: str, reference: Reference | str) -> Iterator[None]:
    """Turn the Hub client's errors into one message each."""
    from huggingface_hub import errors

    who = f"{name}: {reference}"
    try:
        yield
    except errors.GatedRepoError as failure:
        raise UserError(
            f"{who} is gated: accept its terms at https://huggingface.co/{_repository(reference)} "
            "and log in (hf auth login)"
        ) from failure
    except errors.RepositoryNotFoundError as failure:
        raise UserError(
            f"{who}: no such folder here and no such repository on the Hub; check the spelling, "
            "and for a private repository log in (hf auth login)"
        ) from failure
    except errors.RevisionNotFoundError as failure:
        raise UserError(f"{who}: the repository has no such revision") from failure
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as failure:
        raise UserError(
            f"{who}: not in the local cache, and the Hub cannot be reached (offline mode, or no connection)"
        ) from failure
    except (errors.HfHubHTTPError, OSError) as failure:
        raise UserError(f"{who}: the Hub could not be read: {_first_line(failure)}") from failure
    except Exception as failure:
        # a dropped connection reaches us as the HTTP client's own error, which is no OSError
        if type(failure).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore"):
            raise
        raise UserError(f"{who}: the connection to the Hub failed: {_first_line(failure)}") from failure


def _repository(reference: Reference | str) -> str:
    return reference if isinstance(reference, str) else reference.path


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
