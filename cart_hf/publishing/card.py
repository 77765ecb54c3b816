"""The model cards: what was made, how, how well it works, and how to load it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cart_hf import __version__
from cart_hf.evaluation.report import as_table, conventions, transductive
from cart_hf.evaluation.results import Results
from cart_hf.output.record import ADAPTERS_FOLDER
from cart_hf.publishing import reconstruction, summary
from cart_hf.publishing.adaptation import described
from cart_hf.publishing.contents import CARD_FILE, Contents, Source, read_contents, recipe_text
from cart_hf.publishing.loading import Adapter, adapters_of, loading
from cart_hf.publishing.metadata import HOMEPAGE, adapter_metadata, licence_of, metadata
from cart_hf.tables import markdown

_MARK = re.compile(r"\n<!-- cart-hf wrote this card: ([0-9a-f]{16}) -->\s*\Z")

_NOT_THE_MODEL = (
    "An adapter of limited rank is not the fine-tuned model: a task may lose accuracy; measure yours before you rely "
    "on it."
)


def write_card(folder: Path, title: str) -> None:
    """Write ``README.md`` of an output folder, and of each adapter in it.

    :param title: what the model is called.
    """
    for path, text in cards(read_contents(folder).public(title), title).items():
        card = folder / path
        beside = card.with_name(f".{card.name}.partial")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(card)
        finally:
            beside.unlink(missing_ok=True)


def cards(contents: Contents, title: str, licence: str | None = None, *, family: bool = False) -> dict[str, str]:
    """Return the cards of a folder by their paths in it: its own, and each adapter's.

    :param contents: what they may tell; see :meth:`Contents.public`.
    :param title: what the model is called: a folder's name or a Hub id, as ``from_pretrained`` takes it.
    :param licence: the licence, if the user names one.
    :param family: whether each adapter has a repository of its own besides.
    """
    adapters = adapters_of(contents, title, family=family)
    if contents.is_adapter:
        return {CARD_FILE: _of_adapter(contents, adapters[0], licence)}
    own = {f"{ADAPTERS_FOLDER}/{one.task}/{CARD_FILE}": _of_adapter(contents, one, licence) for one in adapters}
    if adapters:
        return {CARD_FILE: _of_centre(contents, adapters, title, licence, family=family), **own}
    return {CARD_FILE: render(contents, title, licence)}


def render(contents: Contents, title: str, licence: str | None = None) -> str:
    """Return the card of a merge, marked as ours.

    :param contents, title, licence: as for :func:`cards`.
    """
    return _signed(
        "merge.md.jinja",
        metadata(contents, title, licence),
        **_common(contents, title),
        limitations=_limitations(
            contents, "Merging costs accuracy on every task; measure yours before you rely on it."
        ),
        loading=loading(contents, title),
        tasks=list(contents.tasks),
        clip=contents.record["loader"] == "CLIPModel",
        measured="the merged model",
        verb="merge",
        again="weights",
        record_file="`merge.json` has every tensor's role and rank, the versions and the hashes of the sources",
    )


def _of_centre(
    contents: Contents, adapters: Sequence[Adapter], title: str, licence: str | None, *, family: bool
) -> str:
    """Return the card of a centre with its adapters."""
    compression = contents.compression
    assert compression is not None  # there are adapters
    groups = reconstruction.alike(adapters)
    return _signed(
        "compressed.md.jinja",
        metadata(contents, title, licence),
        **_common(contents, title),
        limitations=_limitations(contents, _NOT_THE_MODEL),
        loading=loading(contents, title, family=family),
        family=family,
        adapters=adapters,
        several=next((group for group in groups if len(group) > 1), None),
        apart=[[adapter.task for adapter in group] for group in groups] if len(groups) > 1 else None,
        mixes=compression["settings"]["restore"] == "none",
        clip=contents.record["loader"] == "CLIPModel",
        tsv_c=compression.get("form") == "tsv_c",
        sizes=reconstruction.totals(compression["bytes"]),
        table=markdown(reconstruction.as_table(adapters)),
        kept=reconstruction.kept(adapters, "the centre's"),
        measured="the centre with its adapter",
        verb="compress",
        again="bytes",
        record_file="`compress.json` has every layer's rank and error, the versions and the hashes of the sources",
    )


def _of_adapter(contents: Contents, adapter: Adapter, licence: str | None) -> str:
    """Return the card of an adapter: of a centre's, or of one that is alone.

    :param contents: of the whole folder.
    """
    alone = contents.is_adapter
    merged = contents.record.get("method") if alone else None  # of several models, and not of one
    rank = contents.record["settings"].get("rank") if merged else None
    model = next((source for source in contents.models if source.name == adapter.task), contents.models[0])
    return _signed(
        "adapter.md.jinja",
        adapter_metadata(adapter, licence),
        **_common(adapter.contents, adapter.title),
        limitations=_limitations(adapter.contents, _NOT_THE_MODEL),
        loading=adapter.lines(),
        adapter=adapter,
        alone=alone,
        model=_described(model),
        page=f"https://huggingface.co/{adapter.base_id}" if adapter.base_id else None,
        table=markdown(reconstruction.as_table([adapter])),
        kept=reconstruction.kept([adapter], "the base's" if alone else "the centre's"),
        measured="the base with the adapter" if alone else "the centre with the adapter",
        merged=merged,
        tsv_c=(adapter.contents.compression or {}).get("form") == "tsv_c",
        verb=f"merge --as-adapter {rank}" if merged else "compress",
        again="bytes",
        record_file="`compress.json` has every layer's rank and error, the versions and the hashes of the sources",
    )


def is_ours(text: str) -> bool:
    """Whether a card is one of ours that nobody has edited since."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip().encode()).hexdigest()[:16]


def _described(source: Source) -> dict[str, Any]:
    """Return what a card tells of a source: ``link`` is it alone, ``text`` has its commit, too."""
    link = text = source.reference
    if source.hub_id is not None:
        name = source.reference.rpartition("+")[2].partition("@")[0]  # of base+adapter, the adapter
        link = text = f"[{name}](https://huggingface.co/{source.hub_id})"
        if source.commit:
            text += f" at [`{source.commit[:8]}`](https://huggingface.co/{source.hub_id}/tree/{source.commit})"
    if source.adapts is not None and source.adapts.hub_id is not None:
        text += f" on {_described(source.adapts)['text']}"
    return {
        "name": source.name,
        "link": link,
        "text": text,
        "class_name": source.class_name,
        "licence": licence_of(source),
    }


def _results(results: Results | None) -> dict[str, Any] | None:
    if results is None or not results.tasks:
        return None
    return {
        "table": markdown(as_table(results)),
        "note": conventions(results),
        "transductive": transductive(results),
        "splits": sorted({result.settings.get("split") or "unnamed" for result in results.tasks.values()}),
        "limit": results.environment.get("limit"),
        "individual": bool(results.individual),
        "errors": list(results.errors),
    }


def _limitations(contents: Contents, first: str) -> list[str]:
    """Return what to beware of.

    :param first: what is true of all that is made in this way.
    """
    lines = [first]
    if contents.tasks:
        lines.append("Each task keeps its own head: the task must be known when the model is used.")
    if contents.adaptation:
        lines.append(
            "Its coefficients were learnt on unlabelled inputs: scores on these same inputs are transductive, and new "
            "inputs of another kind may be answered worse."
        )
    if contents.results is None:
        lines.append("It has not been measured yet.")
    elif any(result.settings.get("split") != "test" for result in contents.results.tasks.values()):
        lines.append(
            "Scores on another split than the test split are optimistic if settings were chosen on the same examples."
        )
    return lines + [f"{warning[:1].upper()}{warning[1:]}." for warning in contents.record.get("warnings", ())]


def _common(contents: Contents, title: str) -> dict[str, Any]:
    """Return what every card tells."""
    return {
        "title": title,
        "name": title.rpartition("/")[2],
        "version": __version__,
        "homepage": HOMEPAGE,
        "record": contents.record,
        "base": _described(contents.base) if contents.base else None,
        "models": [_described(model) for model in contents.models],
        "unnamed": [source.name for source in contents.sources if source.hub_id is None],
        "results": _results(contents.results),
        "recipe": recipe_text(contents.recipe),
        "coefficients": contents.recipe.get("coefficients"),
        "adaptation": described(contents.adaptation, contents.folder),
        "analysis": summary.described(contents.folder),
    }


@cache
def _templates() -> Any:
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    return jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def _signed(template: str, data: Any, **fields: Any) -> str:
    """Fill a template, and mark the card as ours."""
    text = _templates().get_template(template).render(card_data=data.to_yaml(), **fields).rstrip() + "\n"
    return f"{text}\n<!-- cart-hf wrote this card: {_digest(text)} -->\n"
