"""`cart_hf.push`: a merged folder becomes a repository on the Hub, in one commit, every byte sent once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cart_hf.errors import UserError, shorten
from cart_hf.output.origin import origins
from cart_hf.publishing.card import is_ours, loading, render
from cart_hf.publishing.contents import CARD_FILE, Contents, read_contents
from cart_hf.publishing.failures import explained
from cart_hf.publishing.files import Content, list_files, same_bytes
from cart_hf.publishing.metadata import licence_keys, licence_of
from cart_hf.publishing.remote import Repository, check, look
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
    :param loading: the two lines of Python that load the model.
    :param notes: what the user should know.
    """

    repo: str
    url: str
    commit: str | None
    files: Mapping[str, int]
    deleted: Sequence[str]
    nbytes: int
    loading: Sequence[str]
    notes: Sequence[str]


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    licence: str | None = None,
    name_private_sources: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> Pushed:
    """Push a merged folder to the Hub, with a model card made for it.

    Files that the repository already has are not sent again, so that a push that was interrupted, or repeated after a
    change, sends only the rest. A card that people have edited, here or there, stays as it is.

    :param folder: an output of :func:`cart_hf.merge`; a ``results.json`` in it (``cart-hf evaluate --output``) goes
        into the card.
    :param repo: ``namespace/name``, or a name in your own namespace.
    :param private: whether a new repository is private; default: the Hub's (or the organisation's) default.
    :param overwrite: write into a repository that cart-hf did not write, and replace a card that people have edited.
    :param dry_run: say what would be sent, and send nothing.
    :param licence: the card's licence; default: the one that all sources share, else ``other``.
    :param name_private_sources: name private sources in a public repository.
    :param token: default: the token that the library finds.
    :raises UserError: when the folder is not a merged model, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="cart-hf", token=token)
    contents = read_contents(Path(folder).expanduser())
    present = list_files(contents.folder)
    repository = check(api, repo, private=private, overwrite=overwrite)
    repo = repository.name
    with explained(repo):
        if repository.head is None and not dry_run:
            patiently(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
            repository = look(api, repo)
        is_public = not (private if repository.private is None else repository.private)
        contents = _looked_up(contents, token)
        hidden = _private_sources(contents) if is_public and not name_private_sources else set()
        public = contents.public(repo, hidden)
        files = present | {path: Content.of(data) for path, data in public.files().items()}
        notes = [*_with_card(files, public, repository, licence, hidden), *_notes(contents, hidden, licence)]
        changes = changes_of(files, repository)
        commit = None
        if not dry_run:
            _write_card(contents.folder, files.get(CARD_FILE))
            commit = upload(api, repository, files, changes, commit_message or "Upload a merge by cart-hf")
    distinct = {first: changes.files[first].size for first in same_bytes(changes.files).values()}
    return Pushed(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=commit,
        files={path: content.size for path, content in changes.files.items()},
        deleted=changes.deleted,
        nbytes=sum(distinct.values()),
        loading=loading(contents, repo),
        notes=notes,
    )


def check_push(repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Find out whether a push may work, before there is anything to push; return ``namespace/name``.

    :raises UserError: when it cannot.
    """
    from huggingface_hub import HfApi

    return check(HfApi(library_name="cart-hf", token=token), repo, private=private, overwrite=False).name


def _with_card(
    files: dict[str, Content], public: Contents, repository: Repository, licence: str | None, hidden: Collection[str]
) -> list[str]:
    """Put the card among the files: ours, or one that people have edited; return what the user should know.

    :raises UserError: when an edited card names a source that is not to be named.
    """
    card = files.pop(CARD_FILE, None)
    if repository.keeps_card:
        return ["the card on the Hub was edited by people and stays as it is; --overwrite replaces it"]
    text = card.read().decode(errors="replace") if card is not None else ""
    if card is not None and not is_ours(text):
        path = public.folder / CARD_FILE
        named = sorted(name for name in hidden if name in text)
        if named:
            raise UserError(f"{path} names {named[0]}, which is private; take it out, or --name-private-sources")
        files[CARD_FILE] = card
        return [f"{path} was edited by people and is sent as it is; remove it to get a new one"]
    files[CARD_FILE] = Content.of(render(public, repository.name, licence).encode())
    return []


def _notes(contents: Contents, hidden: Collection[str], licence: str | None) -> list[str]:
    notes = []
    if hidden:
        notes.append(
            f"{len(hidden)} of the sources are private, or the Hub does not show them: they are not named "
            "(--name-private-sources names them)"
        )
    if licence is None and licence_keys(contents.sources, None).get("license") in (None, "other"):
        known = shorten([f"{source.name}: {licence_of(source)}" for source in contents.sources])
        notes.append(f"the sources do not share one known licence ({known}); name yours with --licence")
    return notes


def _private_sources(contents: Contents) -> set[str]:
    return {s.hub_id for s in contents.sources if s.hub_id is not None and s.origin.private is not False}


def _looked_up(contents: Contents, token: str | None) -> Contents:
    """Ask again what the Hub knows of the sources: it may have changed, or the merge was made offline."""
    named = {source.name: (source.hub_id, source.commit) for source in contents.sources if source.hub_id}
    return contents.with_origins(dict(zip(named, origins(list(named.values()), token), strict=True)))


def _write_card(folder: Path, card: Content | None) -> None:
    """Keep the card that is published in the folder, where it can be edited; a folder may be read-only."""
    if card is not None and isinstance(card.source, bytes):
        with suppress(OSError):
            (folder / CARD_FILE).write_bytes(card.source)
