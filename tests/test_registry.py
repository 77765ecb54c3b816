"""A method that a user's package brings by entry point."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import make_family
from safetensors.torch import load_file
from warm_python import run_python

from cart_hf import UserError
from cart_hf.methods import all_methods, get_method

PLUGIN = """
from cart_hf.methods import WEIGHT, Parameter, method

@method(
    "halfway", parameters=(Parameter("scale", 0.5, "how far"), WEIGHT), summary="half way to the average",
    equation="merged = base + scale * (mean - base)", citation="a test",
)
def halfway(*, models, base, scale, weight):
    return base + scale * (models.mean(dim=0) - base)
"""

PROGRAM = """
import sys
import cart_hf, cart_hf.methods
output, base, *models = sys.argv[1:]
cart_hf.merge(base=base, models=models, output=output, method="halfway", scale=0.25)
print(len(cart_hf.methods.all_methods()))
"""
NAME = "roberta.encoder.layer.0.output.dense.weight"


def test_entry_points_add_methods_and_a_broken_one_only_warns(tmp_path):
    site = tmp_path / "site"
    info = site / "their_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_package.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cart_hf.methods]\nhalfway = their_package\nbroken = no_such_module\n")
    base, models = make_family(tmp_path, "roberta")
    done = run_python(PROGRAM, "out", base, *models, environment=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(all_methods()) + 1
    assert done.stderr.count("cannot be loaded") == 1
    assert "'broken' (no_such_module) cannot be loaded" in done.stderr
    merged, start, *tuned = (
        load_file(Path(folder) / "model.safetensors")[NAME] for folder in (tmp_path / "out", base, *models)
    )
    torch.testing.assert_close(merged, start + 0.25 * (torch.stack(tuned).mean(0) - start))


def test_every_method_says_what_it_is():
    for name, method in all_methods().items():
        assert method.summary and method.equation and method.citation, name
        assert method.function.__doc__, name
        assert all(p.help for p in method.parameters), name
        assert set(method.one_of) <= {p.name for p in method.parameters}, name
        for alias in method.aliases:
            assert get_method(alias) is method


def test_unknown_method_suggests_the_closest():
    with pytest.raises(UserError, match=r"unknown method 'tie' - did you mean 'ties'\?"):
        get_method("tie")
