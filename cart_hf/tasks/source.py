"""Where a split's rows come from: a Hub dataset, or a local file or folder, both read through `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cart_hf.errors import UserError, shorten
from cart_hf.recipe.reference import exists, looks_local
from cart_hf.tasks.task import IMAGE, DatasetSource, Task

_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}
# Task Arithmetic's folders of DTD and SUN397 call their test split "val" and have no other
_ALIASES = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing", "val")}


def rows_of(task: Task, split: str, *, data: Path | None, first: int | None) -> tuple[Any, str]:
    """Return a split's rows as a ``datasets.Dataset`` and a word for people on where they came from.

    :param data: folder with a folder for each task; None: what the task declares.
    :param first: read this many rows over the network instead of the whole Hub dataset.
    :raises UserError: when there are none.
    """
    import datasets

    datasets.disable_progress_bars()
    place = _local(task, data)
    if place is None:
        assert task.dataset is not None
        return _from_hub(task.dataset, task.splits.get(split, split), first), _title(task.dataset)
    if place.is_file():
        return _read([place], _BUILDERS.get(place.suffix, ""), place), str(place)
    return _from_folder(task, place, split), str(place)


def _local(task: Task, data: Path | None) -> Path | None:
    """Return the task's local file or folder, or None when its rows are on the Hub."""
    if data is not None:
        names = [task.name, *task.folders]
        if not data.is_dir():
            raise UserError(f"--data {data}: no such folder")
        for name in names:
            if (data / name).is_dir():
                return data / name
        expected = " or ".join(str(data / name) for name in names)
        raise UserError(f"task '{task.name}': no folder {expected}")
    if task.dataset is None:
        raise UserError(f"task '{task.name}' declares no dataset: give --data DIR with DIR/{task.name}/SPLIT.parquet")
    path = task.dataset.path
    if exists(path):
        return Path(path).expanduser()
    if looks_local(path) or Path(path).suffix in _BUILDERS:
        raise UserError(f"task '{task.name}': no such file or folder: {path}")
    return None


def _from_folder(task: Task, folder: Path, split: str) -> Any:
    import datasets

    names = list(dict.fromkeys([task.splits.get(split, split), split, *_ALIASES.get(split, ())]))
    for name in names:
        if (folder / name / "state.json").is_file():  # written by save_to_disk
            return datasets.load_from_disk(str(folder / name))
        for suffix, builder in _BUILDERS.items():
            shards = sorted([*folder.glob(f"{name}-*{suffix}"), *folder.glob(f"data/{name}-*{suffix}")])
            files = [folder / f"{name}{suffix}"] if (folder / f"{name}{suffix}").is_file() else shards
            if files:
                return _read(files, builder, folder)
        if task.kind == IMAGE and (folder / name).is_dir():
            return _image_folder(folder / name)
    found = sorted(path.name for path in folder.iterdir())
    raise UserError(
        f"task '{task.name}': {folder} has no split '{split}' (looked for {names[0]}.parquet, .csv, .tsv, .jsonl"
        f"{f' and an image folder {names[0]}/' if task.kind == IMAGE else ''}; found {shorten(found) or 'nothing'})"
    )


def _read(files: list[Path], builder: str, place: Path) -> Any:
    import datasets

    if not builder:
        raise UserError(f"{place}: not a Parquet, CSV, TSV or JSON lines file")
    # a TSV of the GLUE kind has quotation marks that quote nothing
    options: dict[str, Any] = {"sep": "\t", "quoting": 3} if files[0].suffix == ".tsv" else {}
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
    except Exception as failure:  # datasets wraps what its readers raise, in classes of its own
        if "corresponds to no data" in str(failure):
            raise UserError(f"{shorten([str(file) for file in files])}: the split is empty") from failure
        raise UserError(f"cannot read {shorten([str(file) for file in files])}: {_reason(failure)}") from failure


def _image_folder(folder: Path) -> Any:
    import datasets

    try:  # data_files, not data_dir, which takes a class called t_train_railway for a split
        return datasets.load_dataset("imagefolder", data_files={"train": str(folder / "**")}, split="train")
    except Exception as failure:
        raise UserError(f"cannot read the image folder {folder}: {_reason(failure)}") from failure


def _from_hub(source: DatasetSource, split: str, first: int | None) -> Any:
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=split, revision=source.revision, streaming=first is not None
        )
        if first is None:
            return rows
        rows = rows.decode(False)  # images stay as they are: one that is broken must not lose the others
        return datasets.Dataset.from_list(list(rows.take(first)), features=rows.features)
    except Exception as failure:  # what datasets, the Hub's client and its HTTP client raise
        raise UserError(f"dataset {_title(source)}{_explanation(failure, split)}") from failure


def _explanation(failure: Exception, split: str) -> str:
    """Say what an error means and what to do."""
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(failure, DatasetNotFoundError):
        return ": not found on the Hub, or private or gated without a token (hf auth login)"
    if isinstance(failure, ConnectionError) or type(failure).__module__.startswith(("httpx", "httpcore")):
        return (
            ": the Hub cannot be reached and the data is not cached; "
            "connect and try again, or give --data DIR with local copies"
        )
    if isinstance(failure, ValueError):  # an unknown configuration or split
        return f", split '{split}': {_reason(failure)}"
    return f": {_reason(failure)}"


def _title(source: DatasetSource) -> str:
    name = f"{source.path} ({source.name})" if source.name else source.path
    return f"{name}@{source.revision}" if source.revision else name


def _reason(failure: BaseException) -> str:
    """Return the innermost cause in one line."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return " ".join(str(failure).split())[:300] or type(failure).__name__
