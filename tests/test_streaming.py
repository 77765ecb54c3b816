"""Element-wise work is read block by block: no byte depends on the size of a block, and thresholds are exact."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_family
from safetensors.torch import load_file, save_file

import cart_hf
from cart_hf.api import plan_merge
from cart_hf.errors import UserError
from cart_hf.linalg.magnitude import MagnitudeHistogram
from cart_hf.merging import reading, slices, survey
from cart_hf.merging.survey import magnitude_thresholds
from cart_hf.processes import Processes
from cart_hf.recipe import recipe_from_flags

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("roberta"), "roberta")


def silent(step: str, advance: int, total: int) -> None:
    """Report nothing."""


def plan_of(base: str, models: list[str], **parameters: object):
    return plan_merge(recipe_from_flags({"base": base, "models": models, "method": "ties"}, parameters))


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "consensus", "dare"])
def test_the_size_of_a_block_changes_no_byte(roberta, tmp_path, monkeypatch, method):
    base, models = roberta
    written = []
    for block in (2**17, 100, 37):
        for module in (reading, slices):
            monkeypatch.setattr(module, "BLOCK", block)
        cart_hf.merge(base=base, models=models, method=method, output=tmp_path / str(block))
        written.append((tmp_path / str(block) / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_a_broken_value_in_any_block_is_named(roberta, tmp_path, monkeypatch, dtype):
    base, models = roberta
    for module in (reading, slices):
        monkeypatch.setattr(module, "BLOCK", 50)
    file = Path(models[1]) / "model.safetensors"
    state = load_file(file)
    broken = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}[dtype]
    state["roberta.embeddings.word_embeddings.weight"].view(-1)[333] = float("nan")
    copy = tmp_path / "broken"
    copy.mkdir()
    (copy / "config.json").write_text((file.parent / "config.json").read_text())
    save_file({key: t.to(broken) for key, t in state.items()}, copy / "model.safetensors", metadata={"format": "pt"})
    for method in ("average", "ties"):
        with pytest.raises(UserError, match=r"word_embeddings.weight' of broken .* holds NaN"):
            cart_hf.merge(base=base, models=[models[0], str(copy)], method=method, output=tmp_path / "out")


def expected(plan, density: float, *, per_tensor: bool) -> dict[tuple[int, str], float]:
    """Sort all of every task vector."""
    found = {}
    for i, model in enumerate(plan.models):
        tensors = [t for t in plan.tensors if t.role == "elementwise" and i in dict(t.inputs)]
        vectors = {
            t.name: (model.read(dict(t.inputs)[i]).float() - plan.base.read(t.base_input).float()).abs().numpy()
            for t in tensors
        }
        whole = np.sort(np.concatenate(list(vectors.values())))
        for name, vector in vectors.items():
            own = np.sort(vector) if per_tensor else whole
            k = len(own) - int(density * len(own)) + per_tensor
            found[i, name] = float(own[min(max(k, 1), len(own)) - 1])
    return found


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("sampled", [1, 3, 10**6])  # a sample of everything, a fair one, one entry of each block
def test_thresholds_are_exact_whatever_the_sample_says(roberta, monkeypatch, per_tensor, sampled):
    base, models = roberta
    monkeypatch.setattr(survey, "_SAMPLED", sampled)
    monkeypatch.setattr(survey, "BLOCK", 300)
    monkeypatch.setattr(survey, "CHUNK", 1000)
    for density in (0.2, 0.001):
        plan = plan_of(base, models, density=density, per_tensor=per_tensor)
        assert magnitude_thresholds(plan, 2, silent, ALONE) == expected(plan, density, per_tensor=per_tensor)


def test_the_threshold_of_a_task_vector_of_zeros_is_zero(roberta):
    base, models = roberta
    plan = plan_of(base, models, density=0.2)
    elementwise = [t for t in plan.tensors if t.role == "elementwise"]
    unchanged = tuple(replace(t, inputs=((0, t.base_input), *t.inputs[1:])) for t in elementwise)
    plan = replace(plan, models=(plan.base, *plan.models[1:]), tensors=unchanged)
    found = magnitude_thresholds(plan, 1, silent, ALONE)
    assert {value for (i, _), value in found.items() if i == 0} == {0.0}
    assert found == expected(plan, 0.2, per_tensor=False)


@dataclass(frozen=True)
class Rank(Processes):
    """One of several threads that stand for processes: what they gather are copies."""

    barrier: threading.Barrier | None = None
    shares: list[object] = field(default_factory=list)

    def gather(self, item):
        self.shares[self.rank] = item
        self.barrier.wait()
        everyone = copy.deepcopy(self.shares)
        self.barrier.wait()
        return everyone


@pytest.mark.parametrize("per_tensor", [False, True])
def test_processes_share_the_survey_and_agree(roberta, monkeypatch, per_tensor):
    """Each rank sees a part of the slices, and all of them the same thresholds as one that sees everything."""
    base, models = roberta
    monkeypatch.setattr(survey, "CHUNK", 1000)
    plan = plan_of(base, models, density=0.3, per_tensor=per_tensor)
    barrier, shares = threading.Barrier(3, timeout=60), [None] * 3
    ranks = [Rank(rank, 3, torch.device("cpu"), barrier=barrier, shares=shares) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: magnitude_thresholds(plan, 1, silent, rank), ranks))
    assert found == [expected(plan, 0.3, per_tensor=per_tensor)] * 3


def test_a_sample_may_point_elsewhere():
    numbers = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    truth = np.sort(numbers.abs().numpy())
    histogram = MagnitudeHistogram()
    histogram.add(numbers[:100])
    histogram.narrow(60, margin=1)
    histogram.add(numbers)
    values = [histogram.value(k) for k in range(1, 5001)]
    inside = [value is not None for value in values]
    assert 0 < sum(inside) < 5000
    assert all(value == wanted for value, wanted in zip(values, truth, strict=True) if value is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "consensus", "dare"])
def test_cuda_agrees_with_the_cpu(roberta, tmp_path, method):
    base, models = roberta
    states = []
    for device in ("cpu", "cuda"):
        cart_hf.merge(base=base, models=models, method=method, device=device, output=tmp_path / device)
        states.append(load_file(tmp_path / device / "model.safetensors"))
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key], tensor, atol=1e-6, rtol=0)
