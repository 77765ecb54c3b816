"""The repository that is pushed to: who may write there, what is there already, and whether it is ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cart_hf.errors import UserError
from cart_hf.output.record import MERGE_FILE
from cart_hf.publishing.card import is_ours
from cart_hf.publishing.contents import CARD_FILE
from cart_hf.publishing.failures import explained
from cart_hf.sources.patience import patiently

_MADE_BY_THE_HUB = (".gitattributes",)
_WRITE_ROLES = ("write", "admin", "contributor")


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository.

    :param size: its bytes.
    :param sha256: of an LFS file.
    :param git_sha1: the git blob's id, of any other.
    """

    size: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class Repository:
    """A repository as it was when it was looked at.

    :param name: ``namespace/name``.
    :param head: its last commit; None when there is no such repository yet.
    :param private: whether only some may see it; None when it does not exist.
    :param files: its files by path.
    :param keeps_card: whether its card was edited by people, and stays.
    """

    name: str
    head: str | None
    private: bool | None
    files: Mapping[str, RemoteFile]
    keeps_card: bool = False


def check(api: Any, repo: str, *, private: bool | None, overwrite: bool) -> Repository:
    """Find out whether a push may work, before any work is done for it.

    :param repo: ``namespace/name``, or a name in the user's own namespace.
    :raises UserError: when the name is wrong, the token may not write there, or what is there is not ours.
    """
    from huggingface_hub import errors, is_offline_mode
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as failure:
        raise UserError(f"'{repo}' cannot name a repository: {failure}") from failure
    if is_offline_mode():
        raise UserError(f"{repo}: HF_HUB_OFFLINE forbids pushing; unset it")
    with explained(repo):
        account = patiently(repo, api.whoami)
        repo = repo if "/" in repo else f"{account['name']}/{repo}"
        _check_account(account, repo)
        found = look(api, repo)
        if found.head is None:
            return found
        if private and not found.private:
            raise UserError(f"{repo} exists and is public; make it private in its settings, or leave --private out")
        return found if overwrite else _checked(api, found)


def look(api: Any, repo: str) -> Repository:
    """Return what is in a repository now."""
    from huggingface_hub import RepoFile, errors

    try:
        info = patiently(repo, lambda: api.model_info(repo))
    except errors.RepositoryNotFoundError:
        return Repository(repo, None, None, {})
    files = {}
    for entry in patiently(repo, lambda: list(api.list_repo_tree(repo, recursive=True, revision=info.sha))):
        if isinstance(entry, RepoFile):
            files[entry.path] = RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
    return Repository(repo, info.sha, bool(info.private), files)


def _check_account(account: Mapping[str, Any], repo: str) -> None:
    """Refuse what the token's own description already rules out.

    :raises UserError: naming what is missing.
    """
    namespace = repo.split("/")[0]
    token = account.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError(
            f"{repo}: the access token is read-only; make one with the write role (https://huggingface.co/settings/tokens)"
        )
    roles = {entry["name"]: entry.get("roleInOrg", "write") for entry in account.get("orgs", ())}
    if namespace != account["name"] and namespace not in roles:
        where = ", ".join([account["name"], *roles])
        raise UserError(f"{repo}: '{namespace}' is neither you nor an organisation of yours (you may write to {where})")
    if namespace != account["name"] and roles[namespace] not in _WRITE_ROLES:
        raise UserError(
            f"{repo}: your role in '{namespace}' is '{roles[namespace]}', which may not write; ask its admin"
        )


def _checked(api: Any, found: Repository) -> Repository:
    """Refuse a repository that is not ours, and notice a card that people have edited."""
    if not set(found.files) - set(_MADE_BY_THE_HUB):
        return found
    record = _read(api, found, MERGE_FILE)
    if not _is_record(record):
        raise UserError(
            f"{found.name} exists and was not written by cart-hf (no {MERGE_FILE} of ours); choose another name, "
            "or write into it with cart-hf push --overwrite"
        )
    card = _read(api, found, CARD_FILE)
    keeps_card = card is not None and not is_ours(card)
    return Repository(found.name, found.head, found.private, found.files, keeps_card)


def _read(api: Any, found: Repository, path: str) -> str | None:
    if path not in found.files:
        return None
    place = patiently(found.name, lambda: api.hf_hub_download(found.name, path, revision=found.head))
    with open(place, encoding="utf-8", newline="") as file:  # noqa: PTH123 - newlines as they are
        return file.read()


def _is_record(text: str | None) -> bool:
    try:
        data = json.loads(text or "")
    except ValueError:
        return False
    return isinstance(data, dict) and "cart_hf" in data
