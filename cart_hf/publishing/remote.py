"""The repositories that are pushed to: who may write there, what is there already, and whether it is ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cart_hf.errors import UserError, shorten
from cart_hf.output.record import COMPRESS_FILE, MERGE_FILE
from cart_hf.publishing.failures import explained
from cart_hf.sources.patience import patiently

_MADE_BY_THE_HUB = (".gitattributes",)
_WRITE_ROLES = ("write", "admin", "contributor")
_LONGEST = 96  # characters of namespace/name


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
    """

    name: str
    head: str | None
    private: bool | None
    files: Mapping[str, RemoteFile]


def check(api: Any, repos: Sequence[str], *, private: bool | None, overwrite: bool) -> list[Repository]:
    """Find out whether a push may work, before any work is done for it.

    :param repos: ``namespace/name``, or names in the user's own namespace: the main repository, and its members.
    :raises UserError: when a name is wrong, the token may not write there, or what is there is not ours.
    """
    from huggingface_hub import is_offline_mode

    _check_names(repos)
    if is_offline_mode():
        raise UserError(f"{repos[0]}: HF_HUB_OFFLINE forbids pushing; unset it")
    with explained(repos[0]):
        account = patiently(repos[0], api.whoami)
        if "/" not in repos[0]:
            repos = [f"{account['name']}/{repo}" for repo in repos]
            _check_names(repos)
        _check_account(account, repos[0])
    return [_checked(api, repo, private=private, overwrite=overwrite) for repo in repos]


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


def read(api: Any, found: Repository, path: str) -> str | None:
    """Return a text file of a repository, newlines as they are; None where there is none."""
    if path not in found.files:
        return None
    place = patiently(found.name, lambda: api.hf_hub_download(found.name, path, revision=found.head))
    with open(place, encoding="utf-8", newline="") as file:  # noqa: PTH123 - newlines as they are
        return file.read()


def _check_names(repos: Sequence[str]) -> None:
    """Refuse what the Hub does not take as a name.

    :raises UserError: for the main repository's name, or else with those of its members.
    """
    problems = {repo: problem for repo in repos if (problem := _problem(repo))}
    if repos[0] in problems:
        raise UserError(f"'{repos[0]}' cannot name a repository: {problems[repos[0]]}")
    if problems:
        raise UserError(
            f"{shorten([repr(repo) for repo in problems])} cannot name the repository of an adapter: "
            f"{next(iter(problems.values()))}; give the task a shorter or plainer name, or push without such "
            "repositories (--no-family)"
        )


def _problem(repo: str) -> str | None:
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except errors.HFValidationError as failure:
        return str(failure)
    return f"the Hub allows {_LONGEST} characters, it has {len(repo)}" if len(repo) > _LONGEST else None


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


def _checked(api: Any, repo: str, *, private: bool | None, overwrite: bool) -> Repository:
    """Refuse a repository that is public and must not be, or is not ours."""
    with explained(repo):
        found = look(api, repo)
        if found.head is None:
            return found
        if private and not found.private:
            raise UserError(f"{repo} exists and is public; make it private in its settings, or leave --private out")
        if not overwrite and set(found.files) - set(_MADE_BY_THE_HUB) and not _is_ours(api, found):
            raise UserError(
                f"{repo} exists and was not written by cart-hf (no {MERGE_FILE} or {COMPRESS_FILE} of ours); choose "
                "another name, or write into it with cart-hf push --overwrite"
            )
    return found


def _is_ours(api: Any, found: Repository) -> bool:
    return any(_is_record(read(api, found, path)) for path in (MERGE_FILE, COMPRESS_FILE))


def _is_record(text: str | None) -> bool:
    try:
        data = json.loads(text or "")
    except ValueError:
        return False
    return isinstance(data, dict) and "cart_hf" in data
