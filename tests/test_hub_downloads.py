"""Downloads from a Hub that breaks: asked again, resumed, checked, and told in one message when it does not help.

The client reads its settings when it is imported; here they are set anew for each test. Waiting is fifty times faster.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import pytest
import torch
from commands import environment
from hub_server import Hub, Request, serving
from safetensors.torch import save_file

from cart_hf.errors import UserError
from cart_hf.recipe import Reference
from cart_hf.sources.download import ask, bytes_to_come, cached, receive, sha256_in_cache
from cart_hf.sources.fetch import download_all
from cart_hf.sources.hub import Repository, download_repository, open_repository
from cart_hf.sources.patience import LONGEST, TRIES

TOKEN = "hf_readerSECRETtoken"
WEIGHTS = "model.safetensors"
SIZE = 1_200_000  # about; several of the pieces that a download is written in
HOST = "127.0.0.1"


@dataclass
class World:
    """A hub with repositories ``org/0`` to ``org/5``, the last one private, and this process as its client."""

    hub: Hub
    cache: Path
    models: Path
    slept: list[float] = field(default_factory=list)

    def open(self, name: str = "0") -> Repository:
        return open_repository("b", Reference(f"org/{name}"))

    def content(self, name: str = "0") -> bytes:
        return (self.models / name / WEIGHTS).read_bytes()

    def stored(self, name: str = "0") -> list[str]:
        """Return the names of the blobs of weights, and of the parts of them, in the cache."""
        folder = self.cache / f"models--org--{name}" / "blobs"
        return sorted(path.name for path in folder.iterdir() if len(path.name) > 40)

    def weight_requests(self, name: str = "0") -> list[Request]:
        """Return the downloads of weights that were begun; headers are asked for with a range that has an end."""
        return [r for r in self.hub.log if is_download(r) and f"org/{name}/" in r.path]


def is_download(request: Request) -> bool:
    return request.method == "GET" and request.path.startswith("/cdn/") and not re.search(r"-\d+$", request.range or "")


def is_info(request: Request) -> bool:
    return request.path.startswith("/api/") and "/tree/" not in request.path


def is_head(request: Request) -> bool:
    return request.method == "HEAD" and request.path.endswith(WEIGHTS)


def is_header(request: Request) -> bool:
    return request.path.startswith("/cdn/") and not is_download(request)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in range(6):
        (root / str(name)).mkdir()
        (root / str(name) / "config.json").write_text('{"model_type": "none"}')
        generator = torch.Generator().manual_seed(name)
        save_file({"weight": torch.rand(SIZE // 4, generator=generator)}, root / str(name) / WEIGHTS)
    return root


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    sleep, cache = time.sleep, tmp_path / "hub"
    with serving(tokens=(TOKEN,)) as hub:
        for name in range(5):
            hub.add(f"org/{name}", models / str(name))
        hub.add("org/5", models / "5", private=True, readers=(TOKEN,))
        world = World(hub, cache, models)

        def hurry(seconds: float) -> None:
            world.slept.append(seconds)
            sleep(seconds / 50)

        monkeypatch.setattr(time, "sleep", hurry)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("NO_PROXY", f"{HOST},localhost")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()  # the client made it with other settings
        yield world
        close_session()


def lose_ranges(hub: Hub) -> None:
    """Cut one download, and answer with the whole file when the rest of it is asked for."""
    hub.drop(is_download, times=1, after=600_000)
    hub.spoil(is_download, rangeless=True)


PASSING: dict[str, Callable[[Hub], None]] = {
    "nothing": lambda hub: None,
    "the commit, 503": lambda hub: hub.fail(is_info, status=503, times=2),
    "the commit, limited": lambda hub: hub.fail(is_info, status=429, times=1),
    "the commit, dropped": lambda hub: hub.drop(is_info, times=1),
    "the list of files, 502": lambda hub: hub.fail(lambda r: "/tree/" in r.path, status=502, times=2),
    "a small file, 500": lambda hub: hub.fail(lambda r: r.path.endswith("config.json") and r.method == "GET", status=500, times=2),
    "a small file's HEAD, dropped": lambda hub: hub.drop(lambda r: r.path.endswith("config.json"), times=1),
    "the header, 503": lambda hub: hub.fail(is_header, status=503, times=2),
    "the header, dropped": lambda hub: hub.drop(is_header, times=2),
    "the weights, 503": lambda hub: hub.fail(is_download, status=503, times=3),
    "the weights, limited": lambda hub: hub.fail(is_download, status=429, times=1, headers={"Retry-After": "7"}),
    "the weights, dropped": lambda hub: hub.drop(is_download, times=3),
    "the weights, cut": lambda hub: hub.drop(is_download, times=4, after=300_000),
    "the weights' HEAD, dropped": lambda hub: hub.drop(is_head, times=2),
    "the weights' HEAD, 500": lambda hub: hub.fail(is_head, status=500, times=2),
    "the weights, other bytes": lambda hub: hub.spoil(is_download, times=1, garbled=True),
    "the weights, no ranges": lambda hub: lose_ranges(hub),
}  # fmt: skip


@pytest.mark.parametrize("case", PASSING)
def test_faults_that_pass_leave_the_file_and_no_trace(world: World, case: str) -> None:
    PASSING[case](world.hub)
    seen: list[tuple[str, int, int]] = []
    repository = world.open()
    (file,) = repository.weight_files().values()
    assert file.remote is not None
    download_all([file.remote], lambda *step: seen.append(step))
    path = file.fetch()
    assert path.read_bytes() == world.content()
    assert world.stored() == [hashlib.sha256(world.content()).hexdigest()] == [path.resolve().name]
    assert path == repository.folder / WEIGHTS
    assert {(step, total) for step, _, total in seen} == {("downloading", len(world.content()))}
    assert sum(advance for _, advance, _ in seen) == len(world.content())
    assert not [fault for fault in world.hub.faults if fault.times in (1, 2, 3, 4)], "the fault never happened"


def test_a_cut_download_goes_on_where_it_ended(world: World) -> None:
    PASSING["the weights, cut"](world.hub)
    download_repository(world.open())
    starts = [int(r.range.removeprefix("bytes=").removesuffix("-")) if r.range else 0 for r in world.weight_requests()]
    assert starts[0] == 0 < starts[1] < starts[2] < starts[3] < starts[4]
    assert sum(r.sent for r in world.weight_requests()) < 2 * len(world.content())


def test_the_hub_is_given_the_time_it_asks_for(world: World, caplog: pytest.LogCaptureFixture) -> None:
    limit = {"RateLimit": '"resolvers";r=0;t=41', "RateLimit-Policy": '"fixed window";"resolvers";q=100;w=300'}
    world.hub.fail(is_download, status=429, times=1, headers=limit)
    with caplog.at_level(logging.WARNING, "cart_hf"):
        download_repository(world.open())
    assert 41 <= sum(world.slept) <= 44
    assert [r.getMessage() for r in caplog.records] == ["b: the Hub answered 429; asking again in 42 s (try 2 of 5)"]


LASTING: dict[str, tuple[Callable[[Hub], None], tuple[str, ...]]] = {
    "503": (lambda hub: hub.fail(is_download, status=503), ("the Hub is out of order (503 Service Unavailable)", "try again later")),
    "header 500": (lambda hub: hub.fail(is_header, status=500), ("the Hub is out of order (500", "try again later")),
    "commit 504": (lambda hub: hub.fail(is_info, status=504), ("the Hub is out of order (504", "try again")),
    "limited": (lambda hub: hub.fail(is_download, status=429), ("the Hub limits how often it is asked (429)", "hf auth login")),
    "limited for an hour": (
        lambda hub: hub.fail(is_info, status=429, headers={"Retry-After": "3600"}),
        ("the Hub limits how often it is asked (429)", "try again in 3600 s"),
    ),
    "dropped": (lambda hub: hub.drop(is_download), ("the connection to the Hub failed", "what has arrived is kept")),
    "HEAD dropped": (lambda hub: hub.drop(is_head), ("the connection to the Hub failed", "try again")),
    "cut without end": (lambda hub: hub.spoil(is_download, rangeless=True, after=900_000), ("the connection to the Hub failed",)),
    "other bytes": (lambda hub: hub.spoil(is_download, garbled=True), ("arrived damaged twice", "SHA-256", "check HF_ENDPOINT")),
    "more bytes": (lambda hub: grow(hub), ("arrived damaged twice",)),
    "forbidden": (lambda hub: hub.fail(is_download, status=403), ("the Hub could not be read", "403 Forbidden")),
    "a web page": (lambda hub: hub.fail(is_info, status=200), ("does not answer like a Hub", "HF_ENDPOINT")),
}  # fmt: skip


def grow(hub: Hub) -> None:
    """Let ``org/0`` serve the weights of ``org/1`` and more under the name and hash of its own."""
    files = next(iter(hub.repositories["org/0"].commits.values()))
    longer = files[WEIGHTS].path.parent.parent / "longer"
    longer.write_bytes(files[WEIGHTS].path.read_bytes() + b"more")
    files[WEIGHTS] = replace(files[WEIGHTS], path=longer)


@pytest.mark.parametrize("case", LASTING)
def test_faults_that_stay_are_told_in_one_message(world: World, case: str) -> None:
    fault, phrases = LASTING[case]
    fault(world.hub)
    with pytest.raises(UserError) as caught:
        repository = world.open()
        repository.weight_files()
        download_repository(repository)
    (message,) = caught.value.problems
    assert message.startswith("b: org/0"), message
    assert not [phrase for phrase in phrases if phrase not in message], message
    assert not list(world.cache.rglob(f"snapshots/*/{WEIGHTS}"))
    asked = Counter((r.method, r.path, (r.range or "").endswith("-100000")) for r in world.hub.log)
    assert max(asked.values()) == {
        "limited for an hour": 1,
        "forbidden": 1,
        "a web page": 1,
        "other bytes": 2,
        "more bytes": 2,
    }.get(case, TRIES)
    assert sum(world.slept) < LONGEST


@pytest.mark.parametrize("times", [1, 2])
def test_what_the_client_downloads_is_checked_too(world: World, times: int) -> None:
    """The client's own road is that of files in Xet storage, which this hub has not."""
    world.hub.spoil(is_download, times=times, garbled=True)
    incoming, seen = replace(ask(world.open().files[WEIGHTS]), by_client=True), []
    if times == 1:
        assert receive(incoming, seen.append, Event()).read_bytes() == world.content()
    else:
        with pytest.raises(UserError, match=r"^b: org/0/model.safetensors arrived damaged twice: its SHA-256"):
            receive(incoming, seen.append, Event())
        assert world.stored() == []
        assert cached(incoming.file) is None
    assert len(world.weight_requests()) == 2
    assert sum(seen) == (len(world.content()) if times == 1 else 0)


def test_no_hub_at_the_address_is_said_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with serving() as gone:
        address = gone.url.replace("//", "//user:SECRET@")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(
        UserError, match=f"b: org/0: not in the local cache, and {gone.url} cannot be reached"
    ) as caught:
        world.open()
    assert "SECRET" not in str(caught.value)
    assert world.slept == []


def test_room_is_checked_for_all_files_before_the_first_byte(world: World) -> None:
    for name in "12":
        files = next(iter(world.hub.repositories[f"org/{name}"].commits.values()))
        files[WEIGHTS] = replace(files[WEIGHTS], size=10**17)
    weights = [world.open(name).files[WEIGHTS] for name in "012"]
    with pytest.raises(UserError, match=r"^the downloads need 200000000\.00 GB, .* free; make room .*HF_HOME"):
        download_all(weights)
    with pytest.raises(UserError, match=r"^the downloads and the output need 200000000\.00 GB"):
        download_all(weights[:2], beside=(world.cache / "not yet" / "there", 10**17))
    assert not [r for r in world.hub.log if is_download(r)]


def test_a_disk_that_fills_up_is_told_and_what_arrived_is_kept(world: World) -> None:
    resource = pytest.importorskip("resource")
    repository, limits = world.open(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))  # Python ignores the signal: EFBIG
        with pytest.raises(
            UserError, match=r"^b: org/0: the cache .* cannot be written \(.*; make room or set HF_HOME"
        ):
            download_repository(repository)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_to_come(ask(repository.files[WEIGHTS])) == len(world.content()) - 700_000
    assert (download_repository(repository) / WEIGHTS).read_bytes() == world.content()
    assert [r.range for r in world.weight_requests()] == [None, "bytes=700000-"]


def test_files_come_side_by_side(world: World) -> None:
    rate = SIZE  # bytes a second: one after the other they would take five seconds
    world.hub.spoil(is_download, rate=rate)
    files = [file for name in "01234" for file in world.open(name).files.values()]
    started = time.perf_counter()
    download_all(files)
    assert time.perf_counter() - started < 4
    assert {world.content(name) for name in "01234"} == {
        cached(file).read_bytes() for file in files if file.path == WEIGHTS
    }


def test_one_failure_ends_the_other_downloads(world: World) -> None:
    world.hub.fail(lambda r: is_download(r) and "org/1/" in r.path, status=403)
    world.hub.spoil(is_download, rate=SIZE / 20)  # twenty seconds for each of the others
    files = [file for name in "0123" for file in world.open(name).files.values()]
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"^b: org/1: .*403"):
        download_all(files)
    assert time.perf_counter() - started < 15
    assert not list(world.cache.rglob(f"snapshots/*/{WEIGHTS}"))


def test_without_links_files_lie_in_the_snapshot(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    path = download_repository(world.open()) / WEIGHTS
    assert path.read_bytes() == world.content() and not path.is_symlink()
    assert world.stored() == []
    seen = len(world.weight_requests())
    download_repository(world.open())
    assert len(world.weight_requests()) == seen == 1


def test_the_same_file_in_two_commits_comes_once(world: World, tmp_path: Path) -> None:
    download_repository(world.open())
    (tmp_path / WEIGHTS).write_bytes(world.content())
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    world.hub.add("org/0", tmp_path, branch="next")
    repository = open_repository("b", Reference("org/0", "next"))
    assert bytes_to_come(ask(repository.files[WEIGHTS])) == 0
    assert (download_repository(repository) / WEIGHTS).read_bytes() == world.content()
    assert len(world.weight_requests()) == 1


def test_a_token_reaches_the_hub_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    world.hub.fail(is_download, status=503, times=4)
    world.hub.drop(is_head, times=3)
    with caplog.at_level(logging.DEBUG):
        download_repository(world.open("5"))
        world.hub.fail(is_download, status=500)
        with pytest.raises(UserError) as caught:
            download_repository(world.open("4"))
    assert TOKEN in {r.token for r in world.hub.log if "/resolve/" in r.path}
    assert {r.token for r in world.hub.log if r.path.startswith("/cdn/")} == {None}
    files = [path for path in world.cache.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"SECRET" in path.read_bytes()]
    said = capfd.readouterr()
    assert "SECRET" not in caplog.text + said.out + said.err + str(caught.value)
    assert "asking again" in caplog.text


def test_the_recorded_hash_is_the_blobs_also_where_xet_keeps_it_elsewhere(world: World) -> None:
    path = download_repository(world.open()) / WEIGHTS
    sha256 = hashlib.sha256(world.content()).hexdigest()
    assert sha256_in_cache(path) == sha256
    blob, store = path.resolve(), world.cache / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert path.read_bytes() == world.content() and sha256_in_cache(path) == sha256
    assert sha256_in_cache(path.parent / "config.json") is None
    assert sha256_in_cache(store) is None


# Says that it is ready, waits for a line, downloads, and says where the files are.
CHILD = """
import sys
from cart_hf.recipe import Reference
from cart_hf.sources.hub import download_repository, open_repository
repository = open_repository("b", Reference("org/0"))
print("ready", flush=True)
sys.stdin.readline()
print(download_repository(repository))
"""


def child(settings: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process that is about to download."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CHILD], env=settings, **pipes)


def test_a_killed_download_is_resumed_by_others(models: Path, tmp_path: Path) -> None:
    """The first process is killed in the middle; two more find its part, and one of them goes on."""
    content = (models / "0" / WEIGHTS).read_bytes()
    with serving() as hub:
        hub.add("org/0", models / "0")
        hub.spoil(is_download, times=1, rate=SIZE / 4)
        children = [child(environment(hub.url, tmp_path / "home")) for _ in range(3)]
        assert [process.stdout.readline() for process in children] == ["ready\n"] * 3
        killed, *pair = children
        print(file=killed.stdin, flush=True)
        partial = blobs(tmp_path) / f"{hashlib.sha256(content).hexdigest()}.cart_hf.incomplete"
        until(lambda: partial.exists() and partial.stat().st_size > 0)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        there = partial.stat().st_size
        assert 0 < there < len(content)
        hub.spoil(is_download, rate=SIZE)  # slow enough for both to want it at the same time
        for process in pair:
            print(file=process.stdin, flush=True)
        paths = {Path(process.communicate(timeout=60)[0].strip()) / WEIGHTS for process in pair}
        assert [process.returncode for process in pair] == [0, 0]
        downloads = [r for r in hub.log if is_download(r)]
    assert [path.read_bytes() == content for path in paths] == [True]
    assert [r.range for r in downloads] == [None, f"bytes={there}-"], "begun twice, or from the beginning"
    assert downloads[1].sent == len(content) - there
    assert not list(blobs(tmp_path).glob("*.incomplete"))


def blobs(folder: Path) -> Path:
    return folder / "home" / "hub" / "models--org--0" / "blobs"


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
