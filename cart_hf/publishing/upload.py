"""One commit with every change, each byte string sent once, sent again only where it did not arrive."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cart_hf.errors import UserError
from cart_hf.output.record import ADAPTATION_FOLDER, ADAPTERS_FOLDER, COMPRESS_FILE, MERGE_FILE
from cart_hf.publishing.contents import CARD_FILE
from cart_hf.publishing.files import Content, same_bytes
from cart_hf.publishing.remote import Repository, look
from cart_hf.publishing.summary import PUBLISHED
from cart_hf.sources.layout import ADAPTER_CONFIG
from cart_hf.sources.patience import patiently


@dataclass(frozen=True)
class Changes:
    """What a commit must do.

    :param files: the files that are new or changed.
    :param deleted: the files that must go.
    """

    files: Mapping[str, Content]
    deleted: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.files or self.deleted)

    def are_in(self, repository: Repository) -> bool:
        """Whether a repository has them."""
        there = repository.files
        return all(c.equals(there.get(path)) for path, c in self.files.items()) and there.keys().isdisjoint(
            self.deleted
        )


def changes_of(files: Mapping[str, Content], repository: Repository, kept: Collection[str]) -> Changes:
    """Compare with what is there; of the files that are there only, those of an earlier push go.

    :param kept: files that stay as they are there.
    """
    changed = {path: content for path, content in files.items() if not content.equals(repository.files.get(path))}
    stale = [path for path in repository.files if path not in {*files, *kept} and _is_of_a_push(path)]
    return Changes(changed, stale)


def _is_of_a_push(path: str) -> bool:
    """Whether a path is that of weights, a task, an adapter, an adaptation, an analysis's figure or a record: what
    people add is not."""
    folders = ("tasks/", f"{ADAPTERS_FOLDER}/", f"{ADAPTATION_FOLDER}/")
    if path.startswith(folders) or path in (MERGE_FILE, COMPRESS_FILE, ADAPTER_CONFIG, *PUBLISHED):
        return True
    return path.startswith(("model", "adapter_model")) and ".safetensors" in path and "/" not in path


def _check_card(repo: str, text: str) -> None:
    """Have the Hub check the metadata before anything large is sent.

    :raises UserError: with the Hub's complaints.
    """
    from huggingface_hub import ModelCard, errors

    try:
        patiently(repo, ModelCard(text, ignore_metadata_errors=True).validate)
    except errors.HfHubHTTPError:
        raise
    except ValueError as failure:
        raise UserError(f"{repo}: the Hub refuses the card's metadata: {_complaints(str(failure))}") from failure


def _complaints(answer: str) -> str:
    try:
        return "; ".join(error["message"] for error in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.split())


def upload(api: Any, repository: Repository, changes: Changes, message: str) -> str | None:
    """Send the changes in one commit, each byte string once; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if not changes:
        return repository.head
    if CARD_FILE in changes.files:
        _check_card(repository.name, changes.files[CARD_FILE].read().decode(errors="replace"))
    firsts = same_bytes(changes.files)
    additions = {path: CommitOperationAdd(path, changes.files[path].source) for path in dict.fromkeys(firsts.values())}
    api.preupload_lfs_files(repository.name, additions=list(additions.values()), free_memory=False)
    operations: list[Any] = [CommitOperationDelete(path) for path in changes.deleted]
    for path, first in firsts.items():
        operation = additions[first]
        if path != first:  # the bytes are there: only the commit must learn of their second place
            operation = copy.copy(operation)
            operation.path_in_repo = path
        operations.append(operation)
    sent = False

    def commit() -> str | None:
        nonlocal sent
        if sent:  # it may have arrived although its answer did not
            now = look(api, repository.name)
            if changes.are_in(now):
                return now.head
        sent = True
        done = api.create_commit(repository.name, operations, commit_message=message, parent_commit=repository.head)
        return str(done.oid)

    return patiently(repository.name, commit)
