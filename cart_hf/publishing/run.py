"""`cart_hf.push`: an output folder goes to the Hub, one commit for each repository, every byte sent once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError, shorten
from cart_hf.output.origin import origins
from cart_hf.publishing.card import is_ours
from cart_hf.publishing.contents import Contents, read_contents
from cart_hf.publishing.failures import explained
from cart_hf.publishing.family import Parcel, parcels
from cart_hf.publishing.files import Content, list_files, same_bytes
from cart_hf.publishing.loading import repository_of
from cart_hf.publishing.metadata import licence_keys, licence_of
from cart_hf.publishing.remote import Repository, check, look, read
from cart_hf.publishing.summary import is_private
from cart_hf.publishing.upload import changes_of, upload
from cart_hf.sources.patience import patiently


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    :param repo: ``namespace/name``.
    :param url: its page.
    :param commit: the new commit; the last one when nothing had changed; None after a dry run.
    :param files: the files that are new or changed, by path, and their sizes.
    :param deleted: files of an earlier push that are no longer there.
    :param nbytes: bytes of the changed files, those with the same content counted once.
    :param loading: the lines of Python that load the model.
    :param notes: what the user should know.
    :param members: the same of each adapter's own repository.
    """

    repo: str
    url: str
    commit: str | None
    files: Mapping[str, int]
    deleted: Sequence[str]
    nbytes: int
    loading: Sequence[str]
    notes: Sequence[str]
    members: Sequence[Pushed] = ()


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    family: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    licence: str | None = None,
    name_private_sources: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> Pushed:
    """Push a merged or compressed folder to the Hub, with model cards made for it.

    Of a compressed folder, ``namespace/name`` gets all of it, and ``namespace/name-TASK`` each task's adapter, so that
    the Hub shows them as adapters of the first.

    Files that a repository already has are not sent again, so that a push that was interrupted, or repeated after a
    change, sends only the rest. A card that people have edited, here or there, stays as it is.

    :param folder: an output of :func:`cart_hf.merge` or :func:`cart_hf.compress`; a ``results.json`` in it
        (``cart-hf evaluate --output``) goes into the card.
    :param repo: ``namespace/name``, or a name in your own namespace.
    :param private: whether new repositories are private; default: the Hub's (or the organisation's) default.
    :param family: whether each adapter gets a repository of its own besides.
    :param overwrite: write into repositories that cart-hf did not write, and replace cards that people have edited.
    :param dry_run: say what would be sent, and send nothing.
    :param licence: the cards' licence; default: the one that all sources share, else ``other``.
    :param name_private_sources: name private sources in a public repository.
    :param token: default: the token that the library finds.
    :raises UserError: when the folder is no output of cart-hf, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="cart-hf", token=token)
    contents = read_contents(Path(folder).expanduser())
    present = {path: file for path, file in list_files(contents.folder).items() if not is_private(path)}
    tasks = list(contents.adapters) if family and not contents.is_adapter else []
    repos = [repo, *(repository_of(repo, task) for task in tasks)]
    main, *others = check(api, repos, private=private, overwrite=overwrite)
    with explained(main.name):
        contents = _looked_up(contents, token)
    shown = cache(
        lambda hidden: parcels(contents.public(main.name, hidden), present, main.name, licence, family=family)
    )
    message = commit_message or "Upload by cart-hf"
    job = _Job(api, contents, shown, licence, overwrite, dry_run, name_private_sources, message)
    pushed = job.send(main, "", private)
    with_main = main.private if private is None else private  # what belongs to a private repository is private
    members = [job.send(other, task, with_main) for other, task in zip(others, tasks, strict=True)]
    return replace(pushed, members=members)


def check_push(repo: str, *, private: bool | None = None, tasks: Sequence[str] = (), token: str | None = None) -> str:
    """Find out whether a push may work, before there is anything to push; return ``namespace/name``.

    :param tasks: those whose adapters will have repositories of their own.
    :raises UserError: when it cannot.
    """
    from huggingface_hub import HfApi

    repos = [repo, *(repository_of(repo, task) for task in tasks)]
    return check(HfApi(library_name="cart-hf", token=token), repos, private=private, overwrite=False)[0].name


@dataclass(frozen=True)
class _Job:
    """A push under way: what is the same for all its repositories.

    :param contents: the folder.
    :param shown: returns what goes into each repository when some Hub ids are not named.
    """

    api: Any
    contents: Contents
    shown: Callable[[frozenset[str]], Mapping[str, Parcel]]
    licence: str | None
    overwrite: bool
    dry_run: bool
    name_private_sources: bool
    message: str

    def _hidden(self, repository: Repository, private: bool | None) -> frozenset[str]:
        """Return the sources that a repository must not name."""
        is_private = private if repository.private is None else repository.private
        if is_private or self.name_private_sources:
            return frozenset()
        ingredients = self.contents.ingredients
        return frozenset(s.hub_id for s in ingredients if s.hub_id is not None and s.origin.private is not False)

    def send(self, repository: Repository, task: str, private: bool | None) -> Pushed:
        """Bring one repository up to date.

        :param task: whose adapter it is; ``""`` is the main repository, of the whole folder.
        :param private: what a new one will be.
        """
        name = repository.name
        with explained(name):
            if repository.head is None and not self.dry_run:
                patiently(name, lambda: self.api.create_repo(name, private=private, exist_ok=True))
                repository = look(self.api, name)
            hidden = self._hidden(repository, private)
            parcel = self.shown(hidden)[task]
            files, kept, notes = self._with_cards(parcel, repository, hidden)
            if not task:
                notes += _notes(self.contents, hidden, self.licence)
            changes = changes_of(files, repository, kept)
            commit = None
            if not self.dry_run:
                if not task:
                    _keep_cards(self.contents.folder, {path: files[path] for path in parcel.cards if path in files})
                commit = upload(self.api, repository, changes, self.message)
        distinct = {first: changes.files[first].size for first in same_bytes(changes.files).values()}
        return Pushed(
            repo=name,
            url=f"{self.api.endpoint}/{name}",
            commit=commit,
            files={path: content.size for path, content in changes.files.items()},
            deleted=changes.deleted,
            nbytes=sum(distinct.values()),
            loading=parcel.loading,
            notes=notes,
        )

    def _with_cards(
        self, parcel: Parcel, repository: Repository, hidden: Collection[str]
    ) -> tuple[dict[str, Content], list[str], list[str]]:
        """Return the files, cards among them; the cards that stay as they are there; and what the user should know.

        A card that people have edited is not replaced, whether here or there.
        """
        files, kept, notes = dict(parcel.files), [], []
        for path, text in parcel.cards.items():
            found = files.pop(path, None)
            is_edited = found is not None and not is_ours(_text(found))
            card = found if found is not None and is_edited else Content.of(text.encode())
            if not self.overwrite and not card.equals(repository.files.get(path)):
                there = read(self.api, repository, path)
                if there is not None and not is_ours(there):
                    kept.append(path)
                    notes.append(
                        f"the card on the Hub was edited by people and stays as it is ({repository.name}: {path}); "
                        "--overwrite replaces it"
                    )
                    continue
            if is_edited:
                notes.append(_edited(card, hidden))
            files[path] = card
        return files, kept, notes


def _edited(card: Content, hidden: Collection[str]) -> str:
    """Say that a card is sent as it lies in the folder.

    :raises UserError: when it names a source that is not to be named.
    """
    text = _text(card)
    named = sorted(name for name in hidden if name in text)
    if named:
        raise UserError(f"{card.source!s} names {named[0]}, which is private; take it out, or --name-private-sources")
    return f"{card.source!s} was edited by people and is sent as it is; remove it to get a new one"


def _text(card: Content) -> str:
    return card.read().decode(errors="replace")


def _notes(contents: Contents, hidden: Collection[str], licence: str | None) -> list[str]:
    notes = []
    if contents.is_adapter and contents.base is not None and contents.base.hub_id in {None, *hidden}:
        notes.append("the base is a local or a private model: the adapter does not say where it is")
    if hidden:
        notes.append(
            f"{len(hidden)} of the sources are private, or the Hub does not show them: they are not named "
            "(--name-private-sources names them)"
        )
    if licence is None and licence_keys(contents.ingredients, None).get("license") in (None, "other"):
        known = shorten([f"{source.name}: {licence_of(source)}" for source in contents.ingredients])
        notes.append(f"the sources do not share one known licence ({known}); name yours with --licence")
    return notes


def _looked_up(contents: Contents, token: str | None) -> Contents:
    """Ask again what the Hub knows of the sources: it may have changed, or the merge was made offline."""
    named = list(dict.fromkeys((source.hub_id, source.commit) for source in contents.ingredients if source.hub_id))
    return contents.with_origins(dict(zip(named, origins(named, token), strict=True)))


def _keep_cards(folder: Path, cards: Mapping[str, Content]) -> None:
    """Keep the cards that are published in the folder, where they can be edited; a folder may be read-only."""
    for path, card in cards.items():
        if isinstance(card.source, bytes):
            with suppress(OSError):
                (folder / path).write_bytes(card.source)
