"""A small Hugging Face Hub on this machine: repositories served from folders to the unmodified client.

A data set's name starts with ``datasets/``. Weights and Parquet files are LFS files, as on the Hub: the API's host
redirects to a "CDN" on another host name, which sees no token.
Every request is in :attr:`Hub.log`; :meth:`Hub.drop`, :meth:`Hub.fail` and :meth:`Hub.spoil` break things. An endpoint is a line of :data:`ROUTES`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".parquet")
MESSAGES = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
    "GatedRepo": "Access to this model is restricted",
}


@dataclass(frozen=True)
class HubFile:
    """A file of a commit: where it lies, and its git blob id or, for an LFS file, its SHA-256."""

    path: Path
    size: int
    oid: str
    is_lfs: bool

    @classmethod
    def read(cls, path: Path) -> HubFile:
        data = path.read_bytes()
        if path.name.endswith(LFS):
            return cls(path, len(data), hashlib.sha256(data).hexdigest(), True)
        return cls(path, len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), False)

    def entry(self, name: str) -> dict[str, Any]:
        """Return the file as the tree endpoint lists it."""
        listed: dict[str, Any] = {"type": "file", "path": name, "size": self.size, "oid": self.oid[:40]}
        return listed | {"lfs": {"oid": self.oid, "size": self.size, "pointerSize": 134}} if self.is_lfs else listed


@dataclass
class Repository:
    """A repository: its commits' files by name, and the branches and tags that point at commits."""

    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    readers: Collection[str] = ()


@dataclass
class Request:
    """A line of the log: what was asked, and how many bytes of body were sent and received."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Fault:
    """What befalls the next ``times`` requests that ``when`` picks: see the methods of :class:`Hub` that make one."""

    when: Callable[[Request], bool]
    times: int
    drops: bool = False
    after: int | None = None
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    garbled: bool = False
    rangeless: bool = False
    rate: float | None = None


class HubError(Exception):
    """An error answer of the Hub."""

    def __init__(self, status: int, code: str, **headers: str) -> None:
        super().__init__(code)
        self.status, self.code, self.headers = status, code, headers


class Hub(ThreadingHTTPServer):
    """The server: add repositories, then point ``HF_ENDPOINT`` at :attr:`url`."""

    daemon_threads = True

    def __init__(self, tokens: Collection[str] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path | str, *, branch: str = "main", tag: str | None = None, **access: Any) -> str:
        """Commit a folder to a repository, which is made when it is new.

        :param access: ``private``, ``gated`` and ``readers`` (the tokens that are let in) of a new repository.
        :return: the commit.
        """
        repository = self.repositories.setdefault(name, Repository(**access))
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): HubFile.read(path) for path in paths}
        listing = "".join(f"{name} {path} {file.oid}\n" for path, file in files.items())
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[branch] = commit
        if tag:
            repository.refs[tag] = commit
        return commit

    def drop(self, when: Callable[[Request], bool], *, times: int = 10**6, after: int | None = None) -> None:
        """Drop the connections that ``when`` picks after ``after`` bytes of body, or before any answer."""
        self.faults.append(Fault(when, times, drops=after is None, after=after))

    def fail(
        self, when: Callable[[Request], bool], *, status: int, times: int = 10**6, headers: Mapping[str, str] = {}
    ) -> None:
        """Answer the requests that ``when`` picks with a status and a web page, as a proxy in between does."""
        self.faults.append(Fault(when, times, status=status, headers=headers))

    def spoil(self, when: Callable[[Request], bool], *, times: int = 10**6, **how: Any) -> None:
        """Answer the requests that ``when`` picks badly.

        :param how: ``garbled`` (other bytes, as many), ``rangeless`` (all of a file when a range is asked for),
            ``rate`` (so many bytes a second), and ``after`` as for :meth:`drop`.
        """
        self.faults.append(Fault(when, times, **how))

    def fault(self, request: Request) -> Fault | None:
        """Return the fault that this request meets, counting it."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.when(request):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


H = TypeVar("H", bound=Hub)


class Handler(BaseHTTPRequestHandler):
    """One connection: finds the route, keeps the log, and turns errors into the Hub's error headers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that follows its header would wait 40 ms for the client's word
    server: Hub
    body = b""

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.request_log = Request(self.command, unquote(self.path), self.headers.get("Range"), token)
        self.request_log.received = len(self.body)
        self.server.log.append(self.request_log)
        self.fault = fault = self.server.fault(self.request_log)
        self.cut_at = fault.after if fault else None
        if fault and fault.status:
            self.send(fault.status, b"<html>no hub</html>", {"Content-Type": "text/html", **fault.headers})
            return
        if fault and fault.drops:
            self.hang_up()
            return
        try:
            if token is not None and token not in self.server.tokens:
                raise HubError(401, "", **{"X-Error-Message": "Invalid credentials in Authorization header"})
            path = urlsplit(self.path).path
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    answer(self, {key: unquote(value or "") for key, value in found.groupdict().items()})
                    return
            raise HubError(404, "")
        except HubError as error:
            message = error.headers.setdefault("X-Error-Message", MESSAGES.get(error.code, "Not found"))
            code = {"X-Error-Code": error.code} if error.code else {}
            self.send(error.status, json.dumps({"error": message}).encode(), error.headers | code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Read the body, also of what is then refused: the connection is used again."""
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
        self.body = b""

    def do_PUT(self) -> None:
        self.do_POST()

    def send(self, status: int, body: bytes, headers: Mapping[str, str], size: int | None = None) -> None:
        """Answer; ``size`` is the body's length where it is not sent (HEAD)."""
        self.request_log.status = status
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body) if size is None else size)} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[: self.cut_at]
        if self.fault and self.fault.garbled:
            body = body[::-1]
        for piece in self.pieces(body):
            self.request_log.sent += len(piece)  # before the client can have them, so that a test never reads too early
            self.wfile.write(piece)
        if self.cut_at is not None:
            self.hang_up()

    def pieces(self, body: bytes) -> Iterator[bytes]:
        """Yield a body as slowly as a fault wants it."""
        if not self.fault or self.fault.rate is None:
            yield body
            return
        step = max(int(self.fault.rate / 20), 1)
        for start in range(0, len(body), step):
            yield body[start : start + step]
            threading.Event().wait(0.05)  # tests may let time.sleep pass faster

    def send_json(self, data: Any) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send_file(self, file: HubFile, headers: Mapping[str, str]) -> None:
        """Answer with a file, or with the range of it that was asked for."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.range or "")
        if self.command == "HEAD":
            self.send(200, b"", headers, file.size)
        elif asked is None or (self.fault and self.fault.rangeless):
            self.send(200, file.path.read_bytes(), headers)
        elif int(asked[1]) >= file.size:
            raise HubError(416, "", **{"Content-Range": f"bytes */{file.size}"})
        else:
            start, last = int(asked[1]), min(int(asked[2] or file.size), file.size - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{file.size}"
            with file.path.open("rb") as data:
                data.seek(start)
                self.send(206, data.read(last + 1 - start), headers)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the log is :attr:`Hub.log`."""


def find(handler: Handler, parts: Mapping[str, str]) -> tuple[Repository, str]:
    """Return the repository and commit of a request, as far as its token may see them."""
    token = handler.request_log.token
    repository = handler.server.repositories.get(parts["repo"])
    if repository is None or (repository.private and token not in repository.readers):
        raise HubError(401 if token is None else 404, "RepoNotFound")
    revision = parts["revision"] or "main"
    commit = repository.refs.get(revision, revision)
    if commit not in repository.commits:
        raise HubError(404, "RevisionNotFound")
    return repository, commit


def answer_info(handler: Handler, parts: Mapping[str, str]) -> None:
    repository, commit = find(handler, parts)
    handler.send_json(
        {
            "id": parts["repo"].removeprefix("datasets/"),
            "sha": commit,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "cardData": card_data(repository.commits[commit]),
            "siblings": [{"rfilename": name} for name in repository.commits[commit]],
        }
    )


def card_data(files: Mapping[str, HubFile]) -> dict[str, Any] | None:
    """Return the metadata that a commit's README.md begins with."""
    if "README.md" not in files:
        return None
    found = re.match(r"---\n(.*?\n)---\n", files["README.md"].path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def answer_tree(handler: Handler, parts: Mapping[str, str]) -> None:
    repository, commit = find(handler, parts)
    prefix = f"{parts['folder']}/" if parts["folder"] else ""
    files = {name: file for name, file in repository.commits[commit].items() if name.startswith(prefix)}
    if prefix and not files:
        raise HubError(404, "EntryNotFound")
    folders: dict[str, dict[str, Any]] = {}
    if parse_qs(urlsplit(handler.path).query).get("recursive", ["false"])[0].lower() != "true":
        for name in [name for name in files if "/" in name[len(prefix) :]]:
            folder = prefix + name[len(prefix) :].split("/")[0]
            folders[folder] = {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}
            del files[name]
    handler.send_json([*folders.values(), *(file.entry(name) for name, file in files.items())])


def answer_file(handler: Handler, parts: Mapping[str, str]) -> None:
    repository, commit = find(handler, parts)
    token = handler.request_log.token
    if repository.gated and token not in repository.readers:
        raise HubError(401 if token is None else 403, "GatedRepo")
    file = repository.commits[commit].get(parts["file"])
    if file is None:
        raise HubError(404, "EntryNotFound", **{"X-Repo-Commit": commit})
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
    if not file.is_lfs:
        handler.send_file(file, headers)
        return
    # another host name than the API's, so that the client treats it as another origin
    place = f"http://localhost:{handler.server.server_port}/cdn/{parts['repo']}/{commit}/{parts['file']}"
    linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size), "Location": place}
    handler.send(302, b"", headers | linked)


def answer_cdn(handler: Handler, parts: Mapping[str, str]) -> None:
    file = handler.server.repositories[parts["repo"]].commits[parts["revision"]][parts["file"]]
    handler.send_file(file, {"ETag": f'"{file.oid}"'})


# methods, path, answer; the first that fits is used. Names are quoted in the path: a revision is one part of it.
ROUTES: list[tuple[tuple[str, ...], str, Callable[[Handler, Mapping[str, str]], None]]] = [
    (("GET",), r"/api/(?:models/)?(?P<repo>.+?)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", answer_tree),
    (("GET",), r"/api/(?:models/)?(?P<repo>.+?)(?:/revision/(?P<revision>[^/]+))?", answer_info),
    (("GET", "HEAD"), r"/cdn/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file>.+)", answer_cdn),
    (("GET", "HEAD"), r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", answer_file),
]


@contextmanager
def serving(tokens: Collection[str] = (), kind: type[H] = Hub) -> Iterator[H]:  # type: ignore[assignment]
    """Run a hub in a thread for as long as the block lasts."""
    with kind(tokens) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
