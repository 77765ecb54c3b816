"""The test suite's own Hub takes what the unmodified client sends, and gives it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import serving
from hub_uploads import Account, WritableHub
from huggingface_hub import HfApi, errors
from safetensors.torch import load_file, save_file

OWNER, READER, OTHER = "hf_owner", "hf_reader", "hf_other"
ACCOUNTS = {
    OWNER: Account("me", {"org": "admin"}),
    READER: Account("you", {"org": "read"}),
    OTHER: Account("them"),
}


@pytest.fixture
def hub() -> Iterator[WritableHub]:
    with serving(ACCOUNTS, WritableHub) as hub:
        yield hub


def api(hub: WritableHub, token: str = OWNER) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def fetch(hub: WritableHub, repo: str, file: str, cache: Path, token: str = OWNER, **options: str) -> Path:
    return Path(api(hub, token).hf_hub_download(repo, file, cache_dir=cache, **options))


def test_a_folder_goes_up_and_comes_back(hub: WritableHub, tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(60_000.0)}
    (tmp_path / "model" / "deep").mkdir(parents=True)
    save_file(tensors, tmp_path / "model" / "deep" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    client = api(hub)
    assert client.whoami()["name"] == "me"
    client.create_repo("org/model", private=True)
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        client.create_repo("org/model")
    client.create_repo("org/model", exist_ok=True)
    first = client.upload_folder(repo_id="org/model", folder_path=tmp_path / "model").oid
    second = client.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id="org/model").oid
    assert client.list_repo_files("org/model") == [".gitattributes", "config.json", "deep/model.safetensors"]
    assert client.parse_safetensors_file_metadata("org/model", "deep/model.safetensors").parameter_count == {
        "F32": 60_000
    }
    loaded = load_file(fetch(hub, "org/model", "deep/model.safetensors", tmp_path / "cache"))
    assert torch.equal(loaded["weight"], tensors["weight"])
    read = [
        fetch(hub, "org/model", "config.json", tmp_path / "cache", revision=one).read_text() for one in (first, second)
    ]
    assert read == ["{}", "[]"]
    client.delete_folder("deep", "org/model")
    assert client.list_repo_files("org/model") == [".gitattributes", "config.json"]


def test_only_those_who_may(hub: WritableHub, tmp_path: Path) -> None:
    api(hub).create_repo("org/secret", private=True)
    assert api(hub, READER).model_info("org/secret").private
    with pytest.raises(errors.RepositoryNotFoundError):
        api(hub, OTHER).model_info("org/secret")
    for token in (READER, OTHER):
        with pytest.raises(errors.HfHubHTTPError, match="403"):
            api(hub, token).create_repo("org/another")
    api(hub).create_repo("org/open")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        api(hub, READER).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/open")


def test_commits_that_do_not_fit(hub: WritableHub) -> None:
    client = api(hub)
    client.create_repo("me/model")
    head = client.model_info("me/model").sha
    client.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id="me/model", parent_commit=head)
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        client.upload_file(path_or_fileobj=b"b", path_in_repo="b", repo_id="me/model", parent_commit=head)
    with pytest.raises(ValueError, match="base_model"):
        card = b"---\nbase_model: /a/folder\n---\n"
        client.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="me/model")


def test_data_sets_too(hub: WritableHub, tmp_path: Path) -> None:
    client = api(hub)
    client.create_repo("me/rows", repo_type="dataset")
    client.upload_file(path_or_fileobj=b"a,b\n1,2\n", path_in_repo="train.csv", repo_id="me/rows", repo_type="dataset")
    assert fetch(hub, "me/rows", "train.csv", tmp_path, repo_type="dataset").read_text() == "a,b\n1,2\n"
    assert "datasets/me/rows" in hub.repositories
