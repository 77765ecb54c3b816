"""The methods' authors' own numbers, on matrices that are closed formulas.

tests/golden/peers.json holds the first six entries of the merged update (of EMR: of the first task's) as the public
code computed them in float64 (KnOTS': float32) with torch 2.13, in November 2026, its functions called as they are on
the tensors of `drawn`:

- tsv_m: AntoAndGar/task_singular_vectors a6c97188, compute_and_sum_svd_mem_reduction
- iso_c, iso_cts: danielm1405/iso-merging d34010af, iso_c and iso_cts (common_space_fraction 0.6)
- knots: gstoica27/KnOTS baa35e85, SVDMerger with ties, topK 40, scaling 0.6
- wudi: nathanielyvo/WUDI-Merging dc3cd120, vit/wudi_main.py, 300 steps
- ace, ace unequal: unravel-xu/ACE-Merging 22d9dfea, ace_merging, eps 1e-5; the latter above its threshold
- regmean: bloomberg/dataless-model-merging 92247aec, regmean_mean_params, regmean_reduce_nondiag 0.5
- fisher: mmatena/model_merging 46802f98, _merge_with_coeffs, on torch tensors
- emr: harveyhuang18/EMR_Merging cc225ecb, emr_merge of a model of this one tensor
- svc: tanganke/fusion_bench 54c9e8c9, subspace_consistency_spectral_calibration_accelerated, of half
  the sum of the task vectors, alpha 0.3
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cart_hf.compression.emr import Sums, mask, unify
from cart_hf.methods import get_method
from cart_hf.methods.wrappers import get_wrapper

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peers.json").read_text())
TASKS = 3


def drawn(unequal: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A base (12, 8) and three models, float64, each update ``unequal`` times as long as the one before."""
    i = torch.arange(96, dtype=torch.float64)
    base = 0.5 * torch.sin(0.37 * i**2 + 1)
    updates = [0.02 * unequal**t * torch.sin((0.11 + 0.07 * t) * i**2 + 0.9 * i + t) for t in range(TASKS)]
    return base.view(12, 8), torch.stack([base + update for update in updates]).view(TASKS, 12, 8)


def grams() -> list[torch.Tensor]:
    """Each task's Gram matrix of 20 inputs, (8, 8)."""
    inputs = [
        torch.sin((0.3 + 0.1 * t) * torch.arange(160, dtype=torch.float64) ** 2 + t).view(20, 8) for t in (0, 1, 2)
    ]
    return [x.mT @ x / len(x) for x in inputs]


def information() -> torch.Tensor:
    """The diagonal of each task's Fisher information, (3, 12, 8)."""
    return 1 + 0.9 * torch.sin(torch.arange(TASKS * 96, dtype=torch.float64) ** 2).view(TASKS, 12, 8)


def update(name: str) -> torch.Tensor:
    base, models = drawn(unequal=10.0 if name == "ace unequal" else 1.0)
    weight = [1.0] * TASKS
    told = {
        "tsv_m": {"scale": 1.0, "rank": 2, "solver": "exact"},
        "iso_c": {"scale": 1.0},
        "iso_cts": {"scale": 1.0, "common_fraction": 0.6, "solver": "exact"},
        "knots": {"scale": 0.6, "density": [0.4] * TASKS, "weight": weight},
        "wudi": {"scale": 1.0, "solver": "iterative"},
        "ace": {"scale": 1.0, "epsilon": 1e-5},
        "ace unequal": {"scale": 1.0, "epsilon": 1e-5},
        "regmean": {"grams": grams(), "weight": weight, "non_diagonal": 0.5},
        "fisher": {"fisher": information(), "weight": weight, "floor": 1e-12},
    }
    if name == "emr":
        unified = unify(models=models.flatten(1), base=base.flatten())  # the models are now task vectors
        kept = unified * mask(task_vector=models[0].flatten(), unified=unified)
        return kept * Sums.of(models[0].flatten(), kept).rescaler
    if name == "svc":
        merged = base + 0.5 * (models - base).sum(dim=0)
        return get_wrapper("svc").matrix(merged=merged, base=base, models=models, alpha=0.3) - base
    needs = {} if name in ("regmean", "fisher") else {"base": base}
    return get_method(name.split()[0]).function(models=models, **needs, **told[name]) - base


@pytest.mark.parametrize("name", GOLDEN)
def test_same_numbers_as_the_authors(name):
    tolerance = 1e-5 if name == "knots" else 1e-7  # of the largest entry: as many digits as are in the file
    theirs = GOLDEN[name]
    largest = max(map(abs, theirs))
    assert update(name).flatten()[: len(theirs)].tolist() == pytest.approx(theirs, abs=tolerance * largest)
