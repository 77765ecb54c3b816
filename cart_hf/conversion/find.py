"""Where files to convert are: a file, the files of a folder, or those of a Hub repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cart_hf.errors import UserError, did_you_mean, shorten
from cart_hf.recipe import Reference
from cart_hf.recipe.reference import exists

ENDINGS = (".pt", ".pth", ".bin")
# beside the encoders: classifiers' weights, and models linearised around the pretrained one, which are no CLIP
SKIPPED = ("head_", "linear_")
_PLAIN = ("finetuned", "nonlinear_finetuned")


@dataclass(frozen=True)
class Source:
    """A file to convert.

    :param label: where it is, as a person would write it.
    :param name: the folder it becomes: the data set's name.
    :param fetch: brings the file onto this machine, and returns its path.
    :param commit: the Hub commit it is from.
    """

    label: str
    name: str
    fetch: Callable[[], Path]
    commit: str | None = None


def find_sources(texts: Sequence[str | Path]) -> tuple[list[Source], bool]:
    """Find the files that references mean.

    :param texts: files, folders, Hub repositories (``org/name``), their folders or files (``org/name/folder``).
    :return: the files, and whether it is one file that was named itself.
    :raises UserError: when one means no file, or two would become one folder.
    """
    found: list[Source] = []
    single = False
    for text in map(str, texts):
        path = Path(text).expanduser()
        if exists(text) and path.is_file():
            single = True
            found.append(_local(path, name_of(PurePosixPath(path.name), path.resolve().parent.name)))
        elif exists(text):
            files = _convertible(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
            found += [_local(path / file, name_of(PurePosixPath(file), path.resolve().name)) for file in files]
            if not files:
                raise UserError(f"{path} holds no file to convert ({', '.join(f'*{end}' for end in ENDINGS)})")
        else:
            sources, is_file = _on_hub(text)
            found, single = found + sources, single or is_file
    _check_names(found)
    return found, single and len(found) == 1


def name_of(file: PurePosixPath, folder: str) -> str:
    """Name what a file becomes: ``MNISTVal/nonlinear_finetuned.pt`` is ``mnist``, ``zeroshot.pt`` is ``zeroshot``.

    :param file: the file, from the folder that was searched.
    :param folder: that folder's name.
    """
    parent = file.parent.name or (folder if file.stem in _PLAIN else "")
    words = [parent.removesuffix("Val").lower(), "" if file.stem in _PLAIN else file.stem.removeprefix("nonlinear_")]
    return re.sub(r"[^\w.-]", "-", "-".join(word for word in words if word)).lstrip("-.") or "model"


def _local(path: Path, name: str) -> Source:
    return Source(str(path), name, lambda: path)


def _convertible(files: Iterable[str]) -> list[str]:
    paths = [PurePosixPath(file) for file in sorted(files)]
    return [str(p) for p in paths if p.suffix in ENDINGS and not p.name.startswith((*SKIPPED, "."))]


def _on_hub(text: str) -> tuple[list[Source], bool]:
    """Find the files of a Hub repository; each is downloaded when it is needed."""
    from cart_hf.sources.download import download
    from cart_hf.sources.fetch import download_all
    from cart_hf.sources.hub import open_repository

    try:
        reference = Reference.parse(text)
    except ValueError as failure:
        raise UserError(str(failure)) from failure
    repository = open_repository("convert", Reference(reference.path, reference.revision))
    files = list(repository.files)

    def source(file: str, name: str) -> Source:
        found = repository.files[file]

        def fetch() -> Path:
            download_all([found])
            return download(found)  # it is here by now

        return Source(found.label, name, fetch, repository.commit)

    inside = reference.subfolder or ""
    if inside in files:
        return [
            source(inside, name_of(PurePosixPath(PurePosixPath(inside).name), PurePosixPath(inside).parent.name))
        ], True
    prefix = f"{inside}/" if inside else ""
    wanted = _convertible(file.removeprefix(prefix) for file in files if file.startswith(prefix))
    if not wanted:
        folders = sorted({str(PurePosixPath(file).parent) for file in _convertible(files)} - {"."})
        raise UserError(f"{reference} holds no file to convert{did_you_mean(inside, folders) if inside else ''}")
    folder = PurePosixPath(inside or reference.path).name
    return [source(prefix + file, name_of(PurePosixPath(file), folder)) for file in wanted], False


def _check_names(sources: Sequence[Source]) -> None:
    """Refuse two files that would become one folder.

    :raises UserError: naming both.
    """
    by_name: dict[str, list[str]] = {}
    for source in sources:
        by_name.setdefault(source.name, []).append(source.label)
    for name, labels in by_name.items():
        if len(labels) > 1:
            raise UserError(
                f"{shorten(labels)} would all become '{name}'; convert one folder at a time, each to its own output"
            )
