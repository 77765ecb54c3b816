"""An analysis goes onto the card of the model that it is about: its figures, and few of its numbers."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError, telling
from cart_hf.output.record import COMPRESS_FILE, MERGE_FILE, RECIPE_FILE
from cart_hf.publishing.card import cards, is_ours, write_card
from cart_hf.publishing.contents import Contents, read_contents
from cart_hf.publishing.disclosure import reference_text
from cart_hf.publishing.summary import ANALYSIS_FOLDER, FIGURES, FORMAT, SUMMARY_FILE

_COMMIT = re.compile(r"[0-9a-f]{40}")


def add_to_card(folder: Path, analysis: Path) -> None:
    """Copy an analysis's figures and few of its numbers into an output folder, and write its card anew.

    The folder gets ``analysis/``, in place of an earlier one. When something fails, it stays as it was.

    :param folder: what :func:`cart_hf.merge` or :func:`cart_hf.compress` wrote.
    :param analysis: what ``cart-hf analyze`` wrote about the same models.
    :raises UserError: when one of them is something else, the analysis is of other models or of another merge, people
        have edited the card, or the folder cannot be written.
    """
    from cart_hf.analysis.card import read_document, summary  # a room above this one
    from cart_hf.analysis.files import FIGURES_FOLDER

    folder = folder.expanduser().resolve()
    if not any((folder / name).is_file() for name in (MERGE_FILE, COMPRESS_FILE)):
        raise UserError(f"{folder} is not an output of cart-hf (no {MERGE_FILE}): give a merged or compressed folder")
    contents = read_contents(folder)
    document = read_document(analysis)
    _check_same(document["about"], contents, analysis)
    _check_replaceable(contents)
    told = json.dumps({"format": FORMAT, **summary(document)}, indent=2, ensure_ascii=False) + "\n"
    with telling(f"cannot write {folder}"):
        work = Path(tempfile.mkdtemp(".partial", f".{ANALYSIS_FOLDER}.", folder))
        try:
            new = work / "new"
            new.mkdir()
            (new / SUMMARY_FILE).write_text(told, encoding="utf-8")
            for name in FIGURES:
                figure = analysis / FIGURES_FOLDER / name
                if figure.is_file():
                    shutil.copyfile(figure, new / name)
            _put_in_place(folder, new, work / "old")
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _put_in_place(folder: Path, new: Path, old: Path) -> None:
    """Put the figures where the card finds them, and write it; take them away again where that fails.

    :param old: where an earlier analysis goes.
    """
    place = folder / ANALYSIS_FOLDER
    if place.exists():
        place.rename(old)
    new.rename(place)
    try:
        write_card(folder, folder.name)
    except BaseException:
        place.rename(new)
        if old.exists():
            old.rename(place)
        raise


def _check_replaceable(contents: Contents) -> None:
    """Refuse to replace what people made: a folder such as a whole analysis, or a card.

    :raises UserError: naming it.
    """
    place = contents.folder / ANALYSIS_FOLDER
    if place.exists() and not (place / SUMMARY_FILE).is_file():
        raise UserError(f"{place} exists and was not made for the card: rename it, or analyse into another folder")
    name = contents.folder.name
    for path in cards(contents.public(name), name):
        card = contents.folder / path
        if card.is_file() and not is_ours(card.read_text(encoding="utf-8", errors="replace")):
            raise UserError(f"{card} was edited by people and is not replaced: remove it to get a new one")


def _check_same(about: Mapping[str, Any], contents: Contents, analysis: Path) -> None:
    """Compare what was analysed with what was merged.

    :raises UserError: when they differ.
    """
    entries = dict(zip((model.name for model in contents.models), contents.recipe["models"], strict=True))
    told = {model["name"]: model["reference"] for model in about["models"]}
    advice = f"analyse {contents.folder / RECIPE_FILE}"
    if set(told) != set(entries):
        raise UserError(
            f"{analysis} is an analysis of other models ({', '.join(told)}) than {contents.folder} is made of "
            f"({', '.join(entries)}): {advice}"
        )
    for model in contents.models:
        pinned = reference_text(entries[model.name]["model"])
        if told[model.name] != model.reference and not _alike(told[model.name], pinned):
            raise UserError(
                f"{analysis} is an analysis of other models than {contents.folder} is made of: its {model.name} is "
                f"{told[model.name]}, not {pinned}; {advice}"
            )
    if contents.compression is None:
        merged, analysed = (_settings(one["method"], one["parameters"]) for one in (contents.record, about))
        if merged != analysed:
            raise UserError(
                f"{analysis} is an analysis of another merge ({_said(*analysed)}) than {contents.folder} is "
                f"({_said(*merged)}): {advice}"
            )


def _settings(method: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a method with its parameters, these with as many digits as an analysis has."""
    return method, {key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in parameters.items()}


def _said(method: str, parameters: Mapping[str, Any]) -> str:
    return ", ".join([method, *(f"{name} {value}" for name, value in parameters.items() if value is not None)])


def _alike(one: str, other: str) -> bool:
    """Whether two references are to one model, as far as they say: one of them may name no commit."""
    (place, _, revision), (elsewhere, _, another) = (text.rpartition("+")[2].partition("@") for text in (one, other))
    if _COMMIT.fullmatch(revision) and _COMMIT.fullmatch(another) and revision != another:
        return False
    return place == elsewhere or Path(place).expanduser().resolve() == Path(elsewhere).expanduser().resolve()
