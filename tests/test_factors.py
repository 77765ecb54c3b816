"""Factors kept on disk: the same merge at their rank, the right one at any smaller, and never somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from checkpoints import make_clip, make_family
from commands import refuse, succeed
from merge_children import command, start_slurm_step, words
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cart_hf


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, list[str]]:
    return make_family(tmp_path_factory.mktemp("roberta"), "roberta")


def merge(models: tuple[str, list[str]], output: Path, **options) -> dict[str, torch.Tensor]:
    cart_hf.merge(base=models[0], models=models[1], output=output, **options)
    return {name: tensor for path in sorted(output.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_merge_that_keeps_factors_and_one_that_finds_them_are_the_plain_one(models, tmp_path):
    plain = merge(models, tmp_path / "plain", rank_ratio=0.3, scale=1.5)
    kept = merge(models, tmp_path / "kept", rank_ratio=0.3, scale=1.5, factors=tmp_path / "factors")
    before = files(tmp_path / "factors")
    found = merge(models, tmp_path / "found", rank_ratio=0.3, scale=1.5, factors=tmp_path / "factors")
    assert same(plain, kept) and same(plain, found)
    assert files(tmp_path / "factors") == before
    record = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("plain", "kept", "found")]
    count = record[0]["counts"]["low_rank"]
    assert len(before) == count
    assert [r["factors_found"] for r in record] == [None, 0, count]


@pytest.mark.parametrize("wanted", [{"rank_ratio": 0.1}, {"energy": 0.4}, {"rank_ratio": 0.5}])
def test_other_ranks_and_scales_follow_without_reading_the_models(models, tmp_path, wanted):
    """Against the oracle, from one set of factors: the models' own bytes in the blocks are no longer looked at."""
    factors = tmp_path / "factors"
    merge(models, tmp_path / "first", rank_ratio=0.05, factors=factors, factors_rank_ratio=0.5)
    before = files(factors)
    states = [oracle.state_of(path) for path in models[1]]
    shared = {name: [state[name] for state in states] for name in states[0] if not name.startswith("pooler")}
    states = [{name: arrays[i] for name, arrays in shared.items()} for i in range(len(states))]
    expected = oracle.cart(states, "roberta", 2.5, wanted.get("rank_ratio"), wanted.get("energy"))
    merge(models, tmp_path / "second", scale=2.5, factors=factors, **wanted)
    merged = oracle.state_of(str(tmp_path / "second"))
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, atol=5e-5, err_msg=name)
    assert files(factors) == before


def test_too_few_directions_are_computed_anew_and_kept(models, tmp_path):
    merge(models, tmp_path / "first", rank_ratio=0.1, factors=tmp_path / "factors")
    before = files(tmp_path / "factors")
    wider = merge(models, tmp_path / "second", rank_ratio=0.4, factors=tmp_path / "factors")
    assert same(wider, merge(models, tmp_path / "plain", rank_ratio=0.4))
    after = files(tmp_path / "factors")
    assert after.keys() == before.keys() and all(after[name] > before[name] for name in before)
    full = merge(models, tmp_path / "full", rank_ratio=1.0, factors=tmp_path / "factors")
    assert same(full, merge(models, tmp_path / "average", rank_ratio=1.0))


def test_fused_and_weighted_factors_are_others(models, tmp_path):
    for i, options in enumerate([{}, {"fuse_qkv": True}, {"weights": [1, 2, 3]}, {"solver": "exact"}]):
        kept = merge(models, tmp_path / f"{i}", rank_ratio=0.3, factors=tmp_path / "factors", **options)
        assert same(kept, merge(models, tmp_path / f"plain{i}", rank_ratio=0.3, **options))
    fused = [path for path in (tmp_path / "factors").iterdir() if "qkv" in path.name]
    with safe_open(fused[0], "pt") as file:
        assert len(json.loads(file.metadata()["tensors"])) == 3
        assert file.get_tensor("left").shape[1] == 3 * file.get_tensor("right").shape[2]


def test_a_changed_model_finds_no_old_factors(tmp_path):
    models = make_family(tmp_path / "models", "roberta")
    merge(models, tmp_path / "first", factors=tmp_path / "factors")
    path = Path(models[1][0]) / "model.safetensors"
    status = path.stat()
    state = load_file(path)
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, path, {"format": "pt"})
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = merge(models, tmp_path / "second", factors=tmp_path / "factors")
    assert same(second, merge(models, tmp_path / "plain"))


def test_damaged_factors_are_computed_again(models, tmp_path):
    plain = merge(models, tmp_path / "plain", factors=tmp_path / "factors")
    victims = sorted((tmp_path / "factors").iterdir())
    victims[0].write_bytes(victims[0].read_bytes()[:-10])
    victims[1].write_bytes(b"")
    assert same(plain, merge(models, tmp_path / "again", factors=tmp_path / "factors"))
    assert victims[1].stat().st_size > 0


def test_clip_and_the_command_line(tmp_path):
    base, models = make_clip(tmp_path / "models")
    words = ["merge", "--base", base, "--models", *models, "--factors", tmp_path / "factors"]
    succeed(*words, "--factors-rank-ratio", 0.5, "--output", tmp_path / "first")
    out = succeed(*words, "--rank-ratio", 0.4, "--scale", 2, "--output", tmp_path / "second").out
    assert "factors" in out
    succeed("merge", "--base", base, "--models", *models, "--rank-ratio", 0.4, "--scale", 2, "--output", tmp_path / "x")
    one, other = load_file(tmp_path / "second" / "model.safetensors"), load_file(tmp_path / "x" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=0)


def test_what_makes_no_sense_is_refused(models, tmp_path):
    words = ["merge", "--base", models[0], "--models", *models[1], "--output", tmp_path / "out"]
    refuse(tmp_path / "out", *words, "--factors-rank-ratio", 0.5, naming=["--factors"])
    refuse(tmp_path / "out", *words, "--factors", tmp_path / "f", "--method", "ties", naming=["--factors", "ties"])
    refuse(tmp_path / "out", *words, "--factors", tmp_path / "f", "--factors-rank-ratio", 2, naming=["rank-ratio"])
    (tmp_path / "file").write_text("not a folder")
    refuse(tmp_path / "out", *words, "--factors", tmp_path / "file", naming=["--factors"])


def test_processes_fill_one_folder(models, tmp_path):
    folder = Path(models[0]).parent
    arguments = words(folder, tmp_path / "out", "--factors", tmp_path / "factors")
    children = start_slurm_step(tmp_path, command, *arguments)
    assert [child.answer().code for child in children] == [0, 0]
    plain = merge(models, tmp_path / "plain", device="cpu", factors=tmp_path / "factors")
    assert same(plain, load_file(tmp_path / "out" / "model.safetensors"))
    assert json.loads((tmp_path / "plain" / "merge.json").read_text())["factors_found"] == len(
        files(tmp_path / "factors")
    )
