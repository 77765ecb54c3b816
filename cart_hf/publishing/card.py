"""The model card: what was merged, how, how well it works, and how to load it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from cart_hf import __version__
from cart_hf.evaluation.report import as_table, conventions
from cart_hf.evaluation.results import Results
from cart_hf.publishing.contents import CARD_FILE, Contents, Source, read_contents, recipe_text
from cart_hf.publishing.metadata import HOMEPAGE, licence_of, metadata
from cart_hf.tables import markdown

_TEMPLATE = "card.md.jinja"
_MARK = re.compile(r"\n<!-- cart-hf wrote this card: ([0-9a-f]{16}) -->\s*\Z")


def write_card(folder: Path, title: str) -> None:
    """Write ``README.md`` of a merged folder.

    :param title: what the model is called.
    """
    (folder / CARD_FILE).write_text(render(read_contents(folder).public(title), title), encoding="utf-8")


def render(contents: Contents, title: str, licence: str | None = None) -> str:
    """Return the card of a merged folder, marked as ours.

    :param contents: what it may tell; see :meth:`Contents.public`.
    :param title: what the model is called: a folder's name or a Hub id, as ``from_pretrained`` takes it.
    :param licence: the licence, if the user names one.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.from_template(
        metadata(contents, title, licence),
        template_path=str(Path(__file__).with_name(_TEMPLATE)),
        title=title,
        name=title.rpartition("/")[2],
        version=__version__,
        homepage=HOMEPAGE,
        record=contents.record,
        base=_described(contents.base) if contents.base else None,
        models=[_described(model) for model in contents.models],
        unnamed=[source.name for source in contents.sources if source.hub_id is None],
        loading=loading(contents, title),
        tasks=list(contents.tasks),
        clip=contents.record["loader"] == "CLIPModel",
        results=_results(contents.results),
        recipe=recipe_text(contents.recipe),
        limitations=_limitations(contents),
    )
    text = str(card).rstrip() + "\n"
    return f"{text}\n<!-- cart-hf wrote this card: {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is one of ours that nobody has edited since."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def loading(contents: Contents, title: str) -> list[str]:
    """Return the two lines of Python that load the model; of a task with its own head, if there are any."""
    for task, kind in contents.tasks.items():
        return [
            f"from transformers import {kind}",
            f'model = {kind}.from_pretrained("{title}", subfolder="tasks/{task}")',
        ]
    loader = contents.record["loader"]
    return [f"from transformers import {loader}", f'model = {loader}.from_pretrained("{title}")']


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def _described(source: Source) -> dict[str, Any]:
    text = source.reference
    if source.hub_id is not None:
        text = f"[{source.reference.partition('@')[0]}](https://huggingface.co/{source.hub_id})"
        if source.commit:
            text += f" at [`{source.commit[:8]}`](https://huggingface.co/{source.hub_id}/tree/{source.commit})"
    return {"name": source.name, "text": text, "class_name": source.class_name, "licence": licence_of(source)}


def _results(results: Results | None) -> dict[str, Any] | None:
    if results is None or not results.tasks:
        return None
    return {
        "table": markdown(as_table(results)),
        "note": conventions(results),
        "splits": sorted({result.settings.get("split") or "unnamed" for result in results.tasks.values()}),
        "limit": results.environment.get("limit"),
        "individual": bool(results.individual),
        "errors": list(results.errors),
    }


def _limitations(contents: Contents) -> list[str]:
    lines = ["Merging costs accuracy on every task; measure yours before you rely on it."]
    if contents.tasks:
        lines.append("Each task keeps its own head: the task must be known when the model is used.")
    if contents.results is None:
        lines.append("It has not been measured yet.")
    elif any(result.settings.get("split") != "test" for result in contents.results.tasks.values()):
        lines.append(
            "Scores on another split than the test split are optimistic if settings were chosen on the same examples."
        )
    return lines + [f"{warning[:1].upper()}{warning[1:]}." for warning in contents.record["warnings"]]
