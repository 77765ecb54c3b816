"""Combinations of thin products against NumPy's SVD of the whole matrices, and merges of adapters against dense ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from checkpoints import make_family
from commands import refuse, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import cart_hf
from cart_hf.linalg.low_rank import Factors
from cart_hf.linalg.products import factorize_products
from cart_hf.merging import decomposing, matrices

CENTRING = torch.eye(3, dtype=torch.float64) - 1 / 3


def products(ranks, rows=20, columns=14, seed=0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator)) for r in ranks]


def combinations(thin, coefficients) -> list[np.ndarray]:
    whole = [(left.double() @ right.double()).numpy() for left, right in thin]
    return [sum(c * one for c, one in zip(row, whole, strict=True)) for row in coefficients.tolist()]


def assembled(factors: Factors, t: int) -> np.ndarray:
    return ((factors.left[t] * factors.singular[t]) @ factors.right[t]).double().numpy()


@given(st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any), st.integers(1, 14), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_the_best_of_each_rank(ranks, k, seed):
    thin = products(ranks, seed=seed)
    factors = factorize_products(thin, CENTRING, rank=k)
    assert factors.singular.shape == (3, k)
    for t, whole in enumerate(combinations(thin, CENTRING)):
        np.testing.assert_allclose(assembled(factors, t), oracle.truncate(whole, k), atol=1e-5)
        assert float(factors.squares[t]) == pytest.approx((whole**2).sum(), abs=1e-9)


def test_energy_chooses_for_each():
    thin = products([2, 3, 4])
    factors = factorize_products(thin, CENTRING, energy=0.8)
    for t, whole in enumerate(combinations(thin, CENTRING)):
        rank = oracle.energy_rank(whole, 0.8)
        assert int((factors.singular[t] > 0).sum()) == rank
        np.testing.assert_allclose(assembled(factors, t), oracle.truncate(whole, rank), atol=1e-5)
    assert factors.ranks(energy=0.5) == [oracle.energy_rank(whole, 0.5) for whole in combinations(thin, CENTRING)]


def test_more_directions_than_the_matrix_has():
    thin = products([9, 8, 7])
    factors = factorize_products(thin, CENTRING, rank=14)
    for t, whole in enumerate(combinations(thin, CENTRING)):
        np.testing.assert_allclose(assembled(factors, t), whole, atol=1e-4)


def test_the_type_is_the_products():
    thin = [(left.double(), right.double()) for left, right in products([2, 2, 2])]
    factors = factorize_products(thin, CENTRING, rank=3)
    assert factors.left.dtype == torch.float64
    np.testing.assert_allclose(assembled(factors, 0), oracle.truncate(combinations(thin, CENTRING)[0], 3), atol=1e-13)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[str, list[str]]:
    """Three adapters of rank 2 on other layers each, one of them with a head: together less than half a matrix has."""
    folder = tmp_path_factory.mktemp("adapters")
    base, _ = make_family(folder, "roberta", tasks=1)
    for task, targets in enumerate((["query", "value"], ["query", "intermediate.dense"], ["query", "value"])):
        torch.manual_seed(task)
        model = transformers.RobertaForMaskedLM.from_pretrained(base)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / f"lora{task}")
    return base, [str(folder / f"lora{task}") for task in range(3)]


@pytest.mark.parametrize(
    "options",
    [{"rank": 3, "scale": 2.0}, {"energy": 0.7}, {"rank_ratio": 0.2, "weights": [1, 2, 3]}, {"dtype": "float64"}],
)
def test_a_merge_of_adapters_decomposes_no_whole_matrix(adapters, tmp_path, monkeypatch, options):
    base, models = adapters
    with monkeypatch.context() as patch:
        for module in (decomposing, matrices):
            patch.setattr(module, "find_thin", lambda plan, group, centre="average": None)
        cart_hf.merge(base=base, models=models, output=tmp_path / "dense", **options)
    for module in (decomposing, matrices):
        monkeypatch.setattr(module, "read_group", None)  # whole matrices cannot be read
    cart_hf.merge(base=base, models=models, output=tmp_path / "thin", **options)
    cart_hf.merge(base=base, models=models, output=tmp_path / "kept", factors=tmp_path / "factors", **options)
    dense, thin, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "thin", "kept"))
    assert thin.keys() == dense.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(thin[name], tensor, rtol=0, atol=2e-6)
        torch.testing.assert_close(kept[name], thin[name], rtol=0, atol=1e-6)


class TestAsAdapter:
    def test_at_the_sum_of_the_ranks_nothing_is_lost(self, adapters, tmp_path):
        base, models = adapters
        words = ["merge", "--base", base, "--models", *models, "--rank", "2", "--scale", "1.5", "--output"]
        succeed(*words, tmp_path / "whole")
        answer = succeed(*words, tmp_path / "lora", "--as-adapter", "6")
        assert "peft.PeftModel.from_pretrained" in answer.out
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "lora").iterdir()}
        whole = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "whole").eval()
        start = transformers.RobertaForMaskedLM.from_pretrained(base)
        lora = PeftModel.from_pretrained(start, tmp_path / "lora").eval()
        inputs = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(lora(inputs).logits, whole(inputs).logits, rtol=0, atol=1e-5)

    def test_tasks_with_heads_get_one_each(self, tmp_path):
        base, models = make_family(tmp_path / "models", "roberta")
        cart_hf.merge(base=base, models=models, output=tmp_path / "whole", rank=4)
        succeed(
            "merge",
            "--base",
            base,
            "--models",
            *models,
            "--rank",
            "4",
            "--as-adapter",
            "16",
            "--output",
            tmp_path / "out",
        )
        record = json.loads((tmp_path / "out" / "compress.json").read_text())
        assert (record["method"], record["centre"]) == ("cart", "base")
        assert [Path(model["reference"]) for model in record["models"]] == [Path(model) for model in models]
        kind = transformers.RobertaForSequenceClassification
        task = kind.from_pretrained(tmp_path / "whole", subfolder="tasks/task1").eval()
        start = kind.from_pretrained(base, num_labels=3)
        lora = PeftModel.from_pretrained(start, tmp_path / "out" / "adapters" / "task1").eval()
        with torch.no_grad():  # the embeddings, which a merge averages, stay the base's
            found, expected = lora.base_model.model.roberta.encoder, task.roberta.encoder
            hidden = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(found(hidden)[0], expected(hidden)[0], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("more", [["--resume"], ["--num-processes", "2"], ["--factors", "somewhere"]])
    def test_what_is_about_whole_models_is_refused(self, adapters, tmp_path, more):
        words = [
            "merge",
            "--base",
            adapters[0],
            "--models",
            *adapters[1],
            "--output",
            tmp_path / "out",
            "--as-adapter",
            "4",
        ]
        refuse(tmp_path / "out", *words, *more, naming=["--as-adapter: leave out"])

    def test_it_needs_the_base(self, adapters, tmp_path):
        words = ["merge", "--models", *adapters[1], "--output", tmp_path / "out", "--as-adapter", "4"]
        refuse(tmp_path / "out", *words, naming=["--as-adapter", "--base"])
