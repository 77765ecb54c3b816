"""What goes into each repository of a family: the whole folder into one, and each adapter into another of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cart_hf.errors import UserError
from cart_hf.output.record import ADAPTERS_FOLDER, COMPRESS_FILE
from cart_hf.publishing.card import cards
from cart_hf.publishing.contents import CARD_FILE, Contents
from cart_hf.publishing.files import Content
from cart_hf.publishing.loading import Adapter, adapters_of, loading
from cart_hf.sources.layout import ADAPTER_CONFIG


@dataclass(frozen=True)
class Parcel:
    """What goes into one repository.

    :param files: by path, as they are sent; of the cards those that lie in the folder.
    :param cards: the cards that are made for it.
    :param loading: the lines of Python that load it.
    """

    files: Mapping[str, Content]
    cards: Mapping[str, str]
    loading: list[str]


def parcels(
    contents: Contents, present: Mapping[str, Content], title: str, licence: str | None, *, family: bool
) -> dict[str, Parcel]:
    """Return what goes into the main repository, under ``""``, and into each adapter's own, by task.

    :param contents: what others may see; see :meth:`Contents.public`.
    :param present: the folder's files by path.
    :param title: the main repository.
    :param licence: the cards' licence, if the user names one.
    :param family: whether the adapters have repositories of their own.
    :raises UserError: when an adapter's configuration cannot be read.
    """
    made = cards(contents, title, licence, family=family)
    written = {path: Content.of(data) for path, data in contents.files().items()}
    adapters = adapters_of(contents, title, family=family)
    for adapter in adapters:
        path = ADAPTER_CONFIG if contents.is_adapter else f"{_folder(adapter)}{ADAPTER_CONFIG}"
        written[path] = _config(present[path], adapter.base)
    whole = {**present, **written}
    found = {"": Parcel(whole, made, loading(contents, title, family=family))}
    if contents.is_adapter or not family:
        return found
    for adapter in adapters:
        folder = _folder(adapter)
        own = {path.removeprefix(folder): content for path, content in whole.items() if path.startswith(folder)}
        own[COMPRESS_FILE] = Content.of(adapter.contents.files()[COMPRESS_FILE])
        found[adapter.task] = Parcel(own, {CARD_FILE: made[f"{folder}{CARD_FILE}"]}, adapter.lines())
    return found


def _folder(adapter: Adapter) -> str:
    return f"{ADAPTERS_FOLDER}/{adapter.task}/"


def _config(content: Content, base: str) -> Content:
    """Return an adapter's configuration with the name that others have for its base, written as PEFT writes it."""
    try:
        config = json.loads(content.read())
    except ValueError as failure:
        raise UserError(f"{content.source!s} is damaged: {failure}") from failure
    if not isinstance(config, dict):
        raise UserError(f"{content.source!s} is damaged: it holds no mapping")
    config["base_model_name_or_path"] = base
    return Content.of(json.dumps(config, indent=2, sort_keys=True).encode())
