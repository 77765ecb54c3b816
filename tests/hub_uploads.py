"""The writing half of the Hub of `hub_server`: accounts, new repositories, uploads and commits.

    with serving({"hf_x": Account("me", {"org": "write"})}, WritableHub) as hub: ...

The tokens are accounts' tokens. As on the Hub, weight files go to the LFS store, which knows them by their SHA-256 and is
not asked for a token; everything else travels in the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hub_server import LFS, ROUTES, Handler, Hub, HubError, HubFile, Repository, find

LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "openrail", "other")  # a few of those the Hub knows
HUB_ID = r"[\w][\w.-]*(/[\w][\w.-]*)?"


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to.

    :param name: the user.
    :param organisations: the user's role in each.
    :param role: what the token may do: read or write.
    """

    name: str
    organisations: Mapping[str, str] = field(default_factory=dict)
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and (
            namespace == self.name or self.organisations.get(namespace) in ("write", "admin")
        )


class WritableHub(Hub):
    """A hub that takes uploads.

    :param tokens: accounts by token.
    """

    def __init__(self, tokens: Mapping[str, Account]) -> None:
        super().__init__(tokens)
        self.accounts = tokens
        self._folder = tempfile.TemporaryDirectory()

    def server_close(self) -> None:
        super().server_close()
        self._folder.cleanup()

    def keep(self, data: bytes) -> Path:
        """Store bytes under their SHA-256."""
        path = self.place(hashlib.sha256(data).hexdigest())
        path.write_bytes(data)
        return path

    def place(self, oid: str) -> Path:
        return Path(self._folder.name) / oid

    def commit(self, repository: Repository, branch: str, files: Mapping[str, HubFile]) -> str:
        """Let a branch point at a new commit."""
        parent = repository.refs.get(branch, "")
        listing = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        commit = hashlib.sha1((parent + listing).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs[branch] = commit
        return commit

    def file(self, name: str, data: bytes) -> HubFile:
        """Store a file that travelled in a commit."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return HubFile(self.keep(data), len(data), oid, False)


def account_of(handler: Handler) -> Account:
    token = handler.request_log.token
    if token is None:
        raise HubError(401, "", **{"X-Error-Message": "Invalid username or password."})
    return handler.server.accounts[token]  # type: ignore[attr-defined,no-any-return]


def check_may_write(handler: Handler, repo: str) -> None:
    account = account_of(handler)
    namespace = repo.removeprefix("datasets/").split("/")[0]
    if not account.may_write(namespace):
        raise HubError(403, "", **{"X-Error-Message": f"You don't have the rights to write to {namespace}"})


def answer_whoami(handler: Handler, parts: Mapping[str, str]) -> None:
    account = account_of(handler)
    handler.send_json(
        {
            "type": "user",
            "name": account.name,
            "orgs": [{"name": name, "roleInOrg": role} for name, role in account.organisations.items()],
            "auth": {"accessToken": {"displayName": "test", "role": account.role}},
        }
    )


def answer_create(handler: Handler, parts: Mapping[str, str]) -> None:
    hub, asked = handler.server, json.loads(handler.body)
    assert isinstance(hub, WritableHub)
    account = account_of(handler)
    name = f"{asked.get('organization') or account.name}/{asked['name']}"
    repo = f"datasets/{name}" if asked.get("type") == "dataset" else name
    check_may_write(handler, repo)
    url = f"{hub.url}/{repo}"
    if repo in hub.repositories:
        handler.send(409, json.dumps({"error": "You already created this model repo", "url": url}).encode(), {})
        return
    namespace = name.split("/")[0]
    members = [token for token, one in hub.accounts.items() if namespace in (one.name, *one.organisations)]
    repository = Repository(private=asked.get("visibility") == "private", readers=members)
    hub.repositories[repo] = repository
    hub.commit(repository, "main", {".gitattributes": hub.file(".gitattributes", b"*.safetensors filter=lfs\n")})
    handler.send_json({"url": url, "name": name})


def answer_validate(handler: Handler, parts: Mapping[str, str]) -> None:
    """Check what the Hub checks of a card's metadata and what cart-hf writes."""
    found = re.match(r"---\r?\n(.*?\n)---\r?\n", json.loads(handler.body)["content"], flags=re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as failure:
        data, errors = {}, [f"not valid YAML: {failure}"]
    else:
        errors = wrong_metadata(data)
    answer = {"errors": [{"message": message} for message in errors], "warnings": []}
    handler.send(400 if errors else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def wrong_metadata(data: Mapping[str, Any]) -> list[str]:
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        errors += [
            f'"{key}" with value "{value}" is not valid. Use a Hub id.'
            for value in (values if isinstance(values, list) else [values])
            if not re.fullmatch(HUB_ID, value)
        ]
    if data.get("license", "mit") not in LICENCES:
        errors.append(f'"license" must be one of [{", ".join(LICENCES)}]')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append('"model-index" needs task.type, dataset.type and dataset.name')
            if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append('"model-index" holds a value that is not a number')
    return errors


def answer_preupload(handler: Handler, parts: Mapping[str, str]) -> None:
    check_may_write(handler, parts["repo"])
    repository, commit = find(handler, parts)
    files = []
    for asked in json.loads(handler.body)["files"]:
        known = repository.commits[commit].get(asked["path"])
        mode = "lfs" if asked["path"].endswith(LFS) else "regular"
        files.append(
            {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | ({"oid": known.oid} if known else {})
        )
    handler.send_json({"files": files, "commitOid": commit})


def answer_batch(handler: Handler, parts: Mapping[str, str]) -> None:
    """Say where to put the objects that the store does not have yet."""
    check_may_write(handler, parts["repo"])
    hub = handler.server
    assert isinstance(hub, WritableHub)
    objects = []
    for asked in json.loads(handler.body)["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if not hub.place(asked["oid"]).exists():
            links = {
                "upload": f"http://localhost:{hub.server_port}/store/{asked['oid']}",
                "verify": f"{hub.url}/api/verify",
            }
            answer["actions"] = {action: {"href": link} for action, link in links.items()}
        objects.append(answer)
    handler.send_json({"transfer": "basic", "objects": objects})


def answer_store(handler: Handler, parts: Mapping[str, str]) -> None:
    assert isinstance(handler.server, WritableHub)
    if hashlib.sha256(handler.body).hexdigest() != parts["oid"]:
        raise HubError(400, "", **{"X-Error-Message": "the content is not what its SHA-256 says"})
    handler.server.keep(handler.body)
    handler.send(200, b"", {})


def answer_verify(handler: Handler, parts: Mapping[str, str]) -> None:
    assert isinstance(handler.server, WritableHub)
    asked = json.loads(handler.body)
    place = handler.server.place(asked["oid"])
    if not place.exists() or place.stat().st_size != asked["size"]:
        raise HubError(404, "")
    handler.send_json({})


def answer_commit(handler: Handler, parts: Mapping[str, str]) -> None:
    hub = handler.server
    assert isinstance(hub, WritableHub)
    check_may_write(handler, parts["repo"])
    repository, head = find(handler, parts)
    lines = [json.loads(line) for line in handler.body.splitlines()]
    parent = lines[0]["value"].get("parentCommit")
    if parent is not None and parent != head:
        raise HubError(412, "", **{"X-Error-Message": "A commit has happened since. Please refresh and try again."})
    files = dict(repository.commits[head])
    for line in lines[1:]:
        value, path = line["value"], line["value"]["path"]
        if line["key"] == "file":
            files[path] = hub.file(path, base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            place = hub.place(value["oid"])
            if not place.exists():
                raise HubError(400, "", **{"X-Error-Message": f"LFS pointer of {path} points at nothing"})
            files[path] = HubFile(place, place.stat().st_size, value["oid"], True)
        elif line["key"] == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "EntryNotFound")
        else:
            files = {name: file for name, file in files.items() if not name.startswith(path)}
    commit = hub.commit(repository, parts["revision"], files)
    handler.send_json({"commitOid": commit, "commitUrl": f"{hub.url}/{parts['repo']}/commit/{commit}", "success": True})


REPO = r"/api/(?:models/)?(?P<repo>.+?)"
ROUTES[:0] = [
    (("GET",), r"/api/whoami-v2", answer_whoami),
    (("POST",), r"/api/repos/create", answer_create),
    (("POST",), r"/api/validate-yaml", answer_validate),
    (("POST",), REPO + r"/preupload/(?P<revision>[^/]+)", answer_preupload),
    (("POST",), r"/(?P<repo>.+?)\.git/info/lfs/objects/batch", answer_batch),
    (("PUT",), r"/store/(?P<oid>[0-9a-f]{64})", answer_store),
    (("POST",), r"/api/verify", answer_verify),
    (("POST",), REPO + r"/commit/(?P<revision>[^/]+)", answer_commit),
]
