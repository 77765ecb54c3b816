"""mergekit's own files give mergekit's own numbers.

tests/golden/mergekit.json was written by mergekit 0.1.4 (transformers 4.57.6, `mergekit-yaml FILE OUT
--no-copy-tokenizer`) from the recipes below and checkpoints whose weights are closed formulas: for each recipe, a few
entries of the merged tensors. To write it anew: python tests/test_mergekit.py PATH/TO/mergekit-yaml
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import roberta_config, save
from safetensors.torch import load_file
from transformers import RobertaForMaskedLM

import cart_hf

GOLDEN = Path(__file__).parent / "golden" / "mergekit.json"
WEIGHTS, DENSITIES = (0.5, 0.3, 0.9), (0.5, 0.2, 0.7)


def write_checkpoints(folder: Path) -> tuple[str, list[str]]:
    """Write a base and three models whose entry i of tensor n is a sine of i, n and the model."""
    folders = []
    for model_number in range(4):
        model = RobertaForMaskedLM(roberta_config())
        with torch.no_grad():
            for n, parameter in enumerate(model.parameters()):
                i = torch.arange(parameter.numel(), dtype=torch.float64)
                base = 0.2 * torch.sin(0.7 * i + n)
                update = 0.02 * torch.sin((1.3 + 0.11 * model_number) * i + 2 * n + model_number)
                parameter.copy_((base + (update if model_number else 0)).view(parameter.shape))
        folders.append(save(model, folder / ("base" if not model_number else f"model{model_number}")))
    return folders[0], folders[1:]


def recipes(base: str, models: list[str]) -> dict[str, dict]:
    def entries(*parameters):
        return [{"model": m, "parameters": p} for m, p in zip(models, parameters, strict=True)]

    filtered = [{"weight": [{"filter": "attention", "value": [0.1, 0.8]}, {"value": w}]} for w in WEIGHTS]
    ties = [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)]
    return {
        "linear": {"merge_method": "linear", "models": entries(*({"weight": w} for w in WEIGHTS))},
        "linear, not normalised": {
            "merge_method": "linear",
            "models": entries(*({"weight": w} for w in WEIGHTS)),
            "parameters": {"normalize": False},
        },
        "task arithmetic, base among the models": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": base}, *entries(*({"weight": [0.2, w]} for w in WEIGHTS))],
            "parameters": {"lambda": 0.7},
        },
        "task arithmetic, normalised": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": entries(*({"weight": w} for w in WEIGHTS)),
            "parameters": {"normalize": True},
        },
        "task arithmetic, filters and gradients": {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": entries(*filtered),
        },
        "ties": {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": base}, *entries(*ties)],
            "parameters": {"normalize": True, "int8_mask": True},
        },
        "ties, summed": {
            "merge_method": "ties",
            "base_model": base,
            "models": entries(*ties),
            "parameters": {"normalize": False, "lambda": 0.4},
        },
    }


def sample(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return entries spread over each tensor."""
    return {
        key: [round(float(x), 7) for x in t.flatten()[:: max(1, t.numel() // 5)][:6]]
        for key, t in sorted(state.items())
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("closed-form"))


@pytest.mark.parametrize("name", list(recipes("", ["", "", ""])))
def test_same_numbers_as_mergekit(checkpoints, tmp_path, name):
    recipe = {**recipes(*checkpoints)[name], "dtype": "float32"}
    if recipe["merge_method"] == "ties":  # mergekit trims by tensor; our default is the paper's global trim
        recipe["parameters"]["per_tensor"] = True
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cart_hf.merge(cart_hf.Recipe.load(tmp_path / "recipe.yaml"), output=tmp_path / "out")
    ours = sample(load_file(tmp_path / "out" / "model.safetensors"))
    theirs = json.loads(GOLDEN.read_text())[name]
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        assert ours[key] == pytest.approx(values, abs=5e-7), key


def main(program: str, work: Path) -> None:
    """Write the golden file with a real mergekit."""
    golden = {}
    for number, (name, recipe) in enumerate(recipes(*write_checkpoints(work)).items()):
        (work / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
        subprocess.run([program, work / "recipe.yaml", work / f"out{number}", "--no-copy-tokenizer"], check=True)
        files = sorted((work / f"out{number}").glob("*.safetensors"))
        golden[name] = sample({k: t for file in files for k, t in load_file(file).items()})
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Path(folder))
