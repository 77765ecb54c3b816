"""Recipes: mergekit's files mean what mergekit means, flags and files give one recipe, references are read right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import make_family
from safetensors.torch import load_file

import cart_hf
from cart_hf.api import plan_merge
from cart_hf.errors import UserError
from cart_hf.plan import Plan
from cart_hf.recipe import Recipe, Reference, recipe_from_flags
from cart_hf.recipe.reference import split_name
from cart_hf.recipe.settings import evaluate, filters, matches_filter, matches_pattern, scalars
from cart_hf.recipe.sizes import parse_size

LAYERS = 5
OUTSIDE, FIRST, MIDDLE, LAST = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.2.attention.self.query.weight",
    "encoder.layer.4.attention.self.query.weight",
)
DENSE = "encoder.layer.2.intermediate.dense.weight"


def from_flags(parameters=None, **settings):
    """Call recipe_from_flags with keywords."""
    return recipe_from_flags(settings, parameters or {})


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A BERT base and two classifiers with five layers: gradients have something to vary over."""
    from checkpoints import FAMILIES

    folder = tmp_path_factory.mktemp("family")
    config, *classes = FAMILIES["bert"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "bert", (lambda **c: config(num_hidden_layers=LAYERS, **c), *classes))
        base, models = make_family(folder, "bert", tasks=2)
    return {"BASE": base, "A": models[0], "B": models[1]}


def read(text: str, family: dict[str, str] | None = None) -> Recipe:
    """Read a recipe's YAML; BASE, A and B in it stand for the folders of the family."""
    data = yaml.safe_load(text)

    def place(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, list):
            return [place(item) for item in value]
        return (family or {}).get(value, value) if isinstance(value, str) else value

    return Recipe.from_mapping(place(data))


def planned(plan: Plan, name: str, parameter: str) -> Any:
    """Return the value a parameter has for one tensor: a list for a per-model parameter, in the models' order."""
    (tensor,) = [tensor for tensor in plan.tensors if tensor.name == name]
    return tensor.parameters[parameter]


def weights_of(plan: Plan, name: str) -> dict[str, Any]:
    (tensor,) = [tensor for tensor in plan.tensors if tensor.name == name]
    return {
        plan.models[i].name: value
        for (i, _), value in zip(tensor.inputs, tensor.parameters["weight"], strict=True)
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# mergekit's files, as found in the wild
# ---------------------------------------------------------------------------------------------------------------------

TIES = """
models:
  - model: TheBloke/Llama-2-13B-fp16
    # no parameters necessary for base model
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

LINEAR = """
models:
  - model: org/first
    parameters: {weight: 0.7}
  - model: {model: {path: org/second, revision: v1.0}}
    parameters: {weight: 0.3}
merge_method: linear
dtype: torch.bfloat16
"""


def test_ties():
    """The base among the models is no model, int8_mask changes no number, the rest is kept as written."""
    recipe = read(TIES)
    assert recipe.merge_method == "ties"
    assert recipe.base_model == Reference("TheBloke/Llama-2-13B-fp16")
    assert recipe.dtype == "float16"
    assert [str(entry.model) for entry in recipe.models] == [
        "psmathur/orca_mini_v3_13b",
        "garage-bAInd/Platypus2-13B",
        "WizardLM/WizardMath-13B-V1.0",
    ]
    assert [entry.name for entry in recipe.models] == ["orca_mini_v3_13b", "Platypus2-13B", "WizardMath-13B-V1.0"]
    assert recipe.models[0].parameters == {"density": [1, 0.7, 0.1], "weight": 1.0}
    assert recipe.models[2].parameters["weight"] == [{"filter": "mlp", "value": 0.5}, {"value": 0}]
    assert recipe.parameters["normalize"] is True
    assert recipe.parameters["scale"] == 1.0
    assert "int8_mask" not in recipe.parameters


def test_linear():
    """``linear`` is the average; a model may be a mapping, a dtype may say torch."""
    recipe = read(LINEAR)
    assert (recipe.merge_method, recipe.dtype, recipe.base_model) == ("average", "bfloat16", None)
    assert recipe.models[1].model == Reference("org/second", "v1.0")
    assert recipe.models[1].name == "second"
    assert [entry.parameters["weight"] for entry in recipe.models] == [0.7, 0.3]
    assert recipe.parameters["normalize"] is True


def test_linear_keeps_the_base_among_the_models():
    """A method on weights, not on task vectors, merges the base when it is listed."""
    text = "{merge_method: linear, base_model: org/a, models: [{model: org/a}, {model: org/b}]}"
    assert [entry.name for entry in read(text).models] == ["a", "b"]


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("task_arithmetic", {"normalize": False}),
        ("ties", {"normalize": True}),
        ("dare_linear", {"normalize": False, "rescale": True}),
    ],
)
def test_lambda(method, own):
    """``lambda`` is the scale; the other defaults are mergekit's."""
    text = f"""
merge_method: {method}
base_model: {{path: org/base, revision: main}}
models:
- model: org/a@v1
  parameters: {{weight: 0.5}}
- model: org/b
  parameters: {{weight: 1.5}}
parameters: {{lambda: 0.7}}
"""
    recipe = read(text)
    assert recipe.parameters["scale"] == 0.7
    assert "lambda" not in recipe.parameters
    assert recipe.parameters.items() >= own.items()
    assert recipe.base_model == Reference("org/base", "main")
    assert recipe.models[0].model == Reference("org/a", "v1")
    assert recipe.merge_method == {"dare_linear": "dare"}.get(method, method)


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_density_left_to_the_default(method):
    """A mergekit file that gives weights and no density keeps every entry."""
    text = f"{{merge_method: {method}, base_model: o/x, models: [{{model: o/a, parameters: {{weight: 1}}}}, o/b]}}"
    assert read(text).parameters["density"] == 1.0


GRADIENTS = """
merge_method: task_arithmetic
base_model: BASE
models:
- model: BASE
- model: A
  name: one
  parameters: {weight: [0, 0.5, 1]}
- model: {model: {path: B}}
  name: two
  parameters:
    weight:
    - {filter: self.query, value: [4, 8]}
    - {filter: query, value: 100}
    - {filter: intermediate, value: 3}
parameters:
  lambda: [1, 2]
  weight:
  - {filter: embeddings, value: 7}
  - {value: [10, 50]}
dtype: bfloat16
"""


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        (FIRST, 0, 4),  # position 0
        (MIDDLE, 0.5, 6),  # position 2 / 4
        ("encoder.layer.1.attention.self.query.weight", 0.25, 5),
        (LAST, 1, 8),  # position 1
        (OUTSIDE, 0, 7),  # outside the layers: position 0; no filter of the model's own, so the recipe's
        (DENSE, 0.5, 3),  # the model's own filter before the recipe's
        ("encoder.layer.3.output.dense.weight", 0.75, 40),  # the recipe's gradient
        ("encoder.layer.4.output.LayerNorm.bias", 1, 50),
    ],
)
def test_settings_of_every_tensor(family, name, one, two):
    """Gradients run over the layers, the first filter that matches wins, a model's own setting before the recipe's."""
    plan = plan_merge(read(GRADIENTS, family))
    assert weights_of(plan, name) == pytest.approx({"one": one, "two": two})


def test_global_gradient_and_dtype(family):
    plan = plan_merge(read(GRADIENTS, family))
    assert [planned(plan, name, "scale") for name in (OUTSIDE, FIRST, MIDDLE, LAST)] == [1, 1, 1.5, 2]
    assert {tensor.dtype for tensor in plan.tensors} == {"BF16"}
    assert [model.name for model in plan.models] == ["one", "two"]


def test_merged_numbers(family, tmp_path):
    """The gradient and the filters reach the numbers written: against the formula, computed here."""
    text = GRADIENTS.replace("dtype: bfloat16", "dtype: float64")
    cart_hf.merge(read(text, family), output=tmp_path / "out")
    state = {key: load_file(Path(folder) / "model.safetensors") for key, folder in family.items()}
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, (one, two, scale) in {
        FIRST: (0, 4, 1),
        MIDDLE: (0.5, 6, 1.5),
        LAST: (1, 8, 2),
        DENSE: (0.5, 3, 1.5),
        OUTSIDE: (0, 7, 1),
    }.items():
        base, a, b = (state[key][f"bert.{name}"].double() for key in ("BASE", "A", "B"))
        expected = base + scale * (one * (a - base) + two * (b - base))
        torch.testing.assert_close(merged[f"bert.{name}"], expected.float(), rtol=1e-6, atol=1e-7)


def test_cart_settings(family):
    """Rank by gradient and filter; ``rank`` where a filter matches, the default ratio elsewhere."""
    models = [f"a={family['A']}", f"b={family['B']}", f"c={family['BASE']}"]
    gradient = plan_merge(from_flags(base=None, models=models, parameters={"rank": [1, 9]}))
    ranks = {tensor.name: tensor.rank for tensor in gradient.tensors if tensor.role == "low_rank"}
    assert [ranks[name] for name in (FIRST, MIDDLE, LAST)] == [1, 5, 9]
    rule = [{"filter": "query", "value": 16}]
    filtered = plan_merge(from_flags(base=None, models=models, parameters={"rank": rule}))
    ranks = {tensor.name: tensor.rank for tensor in filtered.tensors if tensor.role == "low_rank"}
    assert (ranks[FIRST], ranks[DENSE]) == (16, max(1, int(0.08 * 16)))
    ratio = plan_merge(from_flags(base=None, models=models, parameters={"rank_ratio": 0.5}))
    assert {tensor.rank for tensor in ratio.tensors if tensor.role == "low_rank"} == {8}
    energy = plan_merge(from_flags(base=None, models=models, parameters={"energy": [0.2, 0.6]}))
    (middle,) = [tensor for tensor in energy.tensors if tensor.name == MIDDLE]
    assert (middle.rank, middle.energy) == (None, pytest.approx(0.4))


def test_rank_above_the_dimension(family):
    """A rank larger than a matrix has directions means all of them."""
    models = [f"a={family['A']}", f"b={family['B']}"]
    plan = plan_merge(from_flags(base=None, models=models, parameters={"rank": 1000}))
    assert {tensor.rank for tensor in plan.tensors if tensor.role == "low_rank"} == {16}


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

A, B = ("encoder.layer.0.mlp.weight", "bert.encoder.layer.0.mlp.weight"), ("head.weight",)


@pytest.mark.parametrize(
    ("setting", "names", "position", "expected"),
    [
        (3, A, 0.7, 3),
        (True, A, 0.0, True),
        ("word", A, 0.0, "word"),
        ([0, 0.5, 1], A, 0.0, 0),
        ([0, 0.5, 1], A, 0.25, 0.25),
        ([0, 0.5, 1], A, 0.5, 0.5),
        ([0, 0.5, 1], A, 1.0, 1),
        ([4, 0], A, 0.75, 1),
        ([1, 2, 10], A, 0.75, 6),
        ([0.25], A, 0.0, 0.25),
        ([0.25], A, 1.0, 0.25),
        ([False, True], A, 0.99, False),  # not numbers: indexed, not interpolated
        ([False, True], A, 1.0, True),
        (["a", "b", "c"], A, 0.5, "b"),
        ([{"filter": "mlp", "value": 0.5}, {"value": 1}], A, 0.0, 0.5),
        ([{"filter": "mlp", "value": 0.5}, {"value": 1}], B, 0.0, 1),
        ([{"filter": "mlp", "value": 0.5}, {"filter": "*", "value": 1}], B, 0.0, 1),
        ([{"value": 1}, {"filter": "mlp", "value": 0.5}], A, 0.0, 1),  # the first that matches wins
        ([{"filter": "layer.0", "value": 1}, {"filter": "mlp", "value": 2}], A, 0.0, 1),
        ([{"filter": "attn", "value": 1}], A, 0.0, None),
        ({"filter": "mlp", "value": 2}, A, 0.0, 2),
        ({"filter": "mlp", "value": 2}, B, 0.0, None),
        ({"value": 2}, B, 0.0, 2),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": [4, 2]}], A, 0.5, 0.5),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": [4, 2]}], B, 0.5, 3),
        ([{"filter": "bert.", "value": 1}, {"value": 2}], A, 0.0, 1),  # either of a tensor's names
        ([{"filter": r"re:layer\.\d\.mlp", "value": 1}, {"value": 2}], A, 0.0, 1),
        ([{"filter": "m.p", "value": 1}, {"value": 2}], A, 0.0, 2),  # no regular expression without re:
        ([{"filter": "mlp*", "value": 1}, {"value": 2}], A, 0.0, 2),  # nor a glob, as in mergekit
    ],
)
def test_evaluate(setting, names, position, expected):
    assert evaluate(setting, names, position) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [("mlp", True), ("m.p", False), ("re:m.p", True), ("re:^bert", True), ("*.mlp.*", True), ("mlp.*", False)],
)
def test_patterns(pattern, matches):
    """Patterns of include and exclude: substring, glob over the whole name, or regular expression."""
    assert matches_pattern(pattern, A) is matches
    assert matches_filter(pattern, A) is (matches and "*" not in pattern)


def test_scalars_and_filters():
    setting = [{"filter": "a", "value": [1, 2]}, {"filter": "*", "value": 3}, {"value": 4}]
    assert list(scalars(setting)) == [1, 2, 3, 4]
    assert filters(setting) == ["a"]
    assert filters({"filter": "b", "value": 1}) == ["b"]
    assert filters([1, 2]) == filters(1) == []
    for wrong in ([], {"filter": "a"}, [{"filtre": "a", "value": 1}]):
        with pytest.raises(ValueError, match="value"):
            list(scalars(wrong))


def test_nested_filters():
    """A filter inside a filter's value is checked as well."""
    assert filters([{"filter": "a", "value": [{"filter": "b", "value": 1}]}]) == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------------
# Defaults, and the roads to a recipe
# ---------------------------------------------------------------------------------------------------------------------

TWO = ("org/a", "org/b")


@pytest.mark.parametrize(
    ("method", "given", "weights", "expected"),
    [
        ("cart", {}, None, {"rank_ratio": 0.08, "scale": 1.0, "fuse_qkv": False}),
        ("cart", {"rank": 4}, None, {"rank": 4, "rank_ratio": None}),
        ("cart", {"energy": 0.9}, None, {"energy": 0.9, "rank_ratio": None}),
        ("cart", {"rank_ratio": 0.16, "prior": 2}, None, {"rank_ratio": 0.16, "scale": 2, "prior": None}),
        ("cart", {}, [1, 2], {"scale": 1.0}),
        ("task_arithmetic", {}, None, {"scale": 0.3, "normalize": False}),
        ("task_arithmetic", {}, [1, 2], {"scale": 1.0}),
        ("task_arithmetic", {"weight": 0.5}, None, {"scale": 1.0}),
        ("task_arithmetic", {"scale": 0.5}, [1, 2], {"scale": 0.5}),
        ("task_arithmetic", {"lambda": 0.5}, None, {"scale": 0.5, "lambda": None}),
        ("dare", {}, None, {"scale": 0.3, "density": 0.5, "rescale": True}),
        ("dare", {}, [1, 2], {"scale": 1.0}),
        ("ties", {}, None, {"scale": 1.0, "density": 0.2, "normalize": True, "per_tensor": False}),
        ("consensus", {}, None, {"scale": 0.3, "mask_threshold": 0.6, "min_tasks": 2}),
        ("average", {}, None, {"normalize": True, "weight": 1.0}),
        ("linear", {}, None, {"normalize": True}),
    ],
)
def test_defaults(method, given, weights, expected):
    """What the method implies stands in the recipe (None: it does not)."""
    recipe = from_flags(base="org/base", models=TWO, method=method, parameters=given, weights=weights)
    assert {name: recipe.parameters.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "merge_method: cart\nmodels: [org/a, org/b]"),
        ({"models": ["x=org/a@v1", "org/b"]}, "merge_method: cart\nmodels: [{model: org/a@v1, name: x}, org/b]"),
        ({"models": ["x=org/a@v1", "org/b"]}, "merge_method: cart\nmodels: [x=org/a@v1, {model: org/b}]"),
        ({"weights": [1.0, 2.0]}, "merge_method: cart\nmodels: [{model: org/a, parameters: {weight: 1.0}}, "
                                  "{model: org/b, parameters: {weight: 2.0}}]"),
        ({"base": "org/x@v1", "method": "ties", "parameters": {"density": 0.4, "scale": None}},
         "merge_method: ties\nbase_model: {path: org/x, revision: v1}\nmodels: [org/a, org/b]\n"
         "parameters: {density: 0.4}"),
        ({"parameters": {"rank_ratio": [0.1, 0.2], "scale": [{"filter": "mlp", "value": 2}, {"value": 1}]}},
         "merge_method: cart\nmodels: [org/a, org/b]\nparameters:\n  rank_ratio: [0.1, 0.2]\n"
         "  scale: [{filter: mlp, value: 2}, {value: 1}]"),
        ({"dtype": "float64", "out_dtype": "float16", "include": ["x"], "exclude": ["y", "re:z"], "seed": 3,
          "max_shard_size": "1GB", "tokenizer_source": "a"},
         "merge_method: cart\nmodels: [org/a, org/b]\ndtype: float64\nout_dtype: float16\ninclude: [x]\n"
         "exclude: [y, 're:z']\nseed: 3\nmax_shard_size: 1GB\ntokenizer_source: a"),
        ({"include": None, "seed": None}, "merge_method: cart\nmodels: [org/a, org/b]\nparameters:\n"),
    ],
)  # fmt: skip
def test_flags_are_yaml(flags, text):
    """A merge by flags is the recipe that a file says."""
    assert from_flags(**{"base": None, "models": TWO, **flags}) == read(text)


@pytest.mark.parametrize(
    "text",
    [
        TIES,
        LINEAR,
        "{merge_method: cart, models: [org/a/sub/folder@v1, {model: {path: org/b, subfolder: s, revision: r}}, o/c]}",
        "{merge_method: cart, models: [x=o/a, y=o/a@v1], include: [é], exclude: ['re:a: [b]', '*', 'yes', '1'],"
        " seed: 7, out_dtype: float16, tokenizer_source: x, max_shard_size: 200 MiB}",
        "{merge_method: cart, models: [o/a, o/b], parameters: {scale: 0.00001, rank: [1, 2],"
        " weight: [{filter: 'a: b', value: [1, 0.5]}, {value: 2}]}}",
        "{merge_method: ties, base_model: o/x@refs/pr/1, models: [yes=o/a, 1=o/b, {model: o/c, name: null}]}",
        "{merge_method: dare, base_model: o/x, models: [o/a, o/b], parameters: {rescale: false}, dtype: float16}",
    ],
)
def test_round_trip(text, tmp_path):
    """``to_yaml`` says everything: what it says loads as the same recipe, and says the same again."""
    recipe = read(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe
    assert Recipe.load(path).to_yaml() == recipe.to_yaml()


def test_round_trip_of_folders(family, tmp_path, monkeypatch):
    """Local folders are written as absolute paths, whatever is in their names: the recipe works from anywhere."""
    names = ["plain", "a=b", "me@lab", "with space", "x+y", "#1", "é: [2]"]
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = from_flags(base="plain", models=[f"m{i}={name}" for i, name in enumerate(names)])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    monkeypatch.chdir("/")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert [entry.model.path for entry in again.models] == [str(tmp_path / name) for name in names]
    assert [entry.name for entry in again.models] == [entry.name for entry in recipe.models]
    assert again.to_yaml() == Recipe.load(tmp_path / "recipe.yaml").to_yaml()


def test_canonical_names_only():
    """Aliases of methods and parameters are settled once: two spellings are one recipe."""
    one = read("{merge_method: linear, models: [o/a, o/b]}")
    two = read("{merge_method: average, models: [o/a, o/b]}")
    assert one == two
    one = read("{merge_method: dare_linear, base_model: o/x, models: [o/a, o/b], parameters: {lambda: 2}}")
    two = read("{merge_method: dare, base_model: o/x, models: [o/a, o/b], parameters: {scale: 2}}")
    assert one == two


def test_python_errors_name_every_problem():
    """The API raises what the command line prints."""
    with pytest.raises(UserError) as caught:
        from_flags(base=None, models=TWO, method="ties", parameters={"density": 0, "sclae": 1})
    assert len(caught.value.problems) == 3
    recipe = read("{merge_method: cart, models: [o/a, o/b]}")
    for beside in ({"models": TWO}, {"method": "ties"}, {"seed": 1}, {"rank": 3}):
        with pytest.raises(UserError, match=f"--{next(iter(beside))}: with a recipe file, edit the recipe"):
            cart_hf.merge(recipe, output="x", **beside)


# ---------------------------------------------------------------------------------------------------------------------
# References, names, sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "revision", "subfolder"),
    [
        ("name", "name", None, None),
        ("org/name", "org/name", None, None),
        ("org/name-1.5_x", "org/name-1.5_x", None, None),
        ("org/name@main", "org/name", "main", None),
        ("name@v1.0", "name", "v1.0", None),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1", None),
        ("org/name/sub", "org/name", None, "sub"),
        ("org/name/sub/folder@v1", "org/name", "v1", "sub/folder"),
    ],
)
def test_hub_references(text, path, revision, subfolder, tmp_path, monkeypatch):
    """Hub ids, read and written back."""
    monkeypatch.chdir(tmp_path)
    found = Reference.parse(text)
    assert found == Reference(path, revision, subfolder)
    assert not found.is_local
    assert str(found) == text
    assert Reference.from_yaml(found.to_yaml()) == found
    assert Reference.from_yaml({"path": path, "revision": revision, "subfolder": subfolder}) == found
    assert found.default_name == text.split("@")[0].rpartition("/")[2]


@pytest.mark.parametrize(
    "name", ["model", "org/name", "a@b", "a=b", "org/a@v1", "x+y", "with space", "C:", "é", "a\\b", "-x", "a@", "@v1"]
)
def test_a_path_that_exists_wins(name, tmp_path, monkeypatch):
    """An existing folder is a folder, whatever its name looks like; relative, absolute, and as NAME=REF."""
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in (name, f"./{name}", str(tmp_path / name), f"{name}/"):
        found = Reference.parse(text)
        assert found.is_local
        assert (found.revision, found.subfolder) == (None, None)
        assert Path(found.to_yaml()) == tmp_path / name
    assert split_name(name) == (None, name)
    assert split_name(f"task={name}") == ("task", name)
    assert from_flags(base=None, models=[f"t={name}", f"x={tmp_path}"]).models[0].model.path == name


def test_home(tmp_path, monkeypatch):
    """``~`` is the home folder."""
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Reference.parse("~/model").path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("./no", "folder not found: ./no"),
        ("../no", "folder not found"),
        ("/no/such", "folder not found"),
        ("~/no-such-folder", "folder not found"),
        ("org/name/", "folder not found"),
        (".\\no", "folder not found"),
        ("C:\\models\\no", "folder not found"),
        ("models\\no", "folder not found"),
        ("C:/models/no", "neither an existing folder nor a Hub id"),
        ("my model", "neither an existing folder nor a Hub id"),
        ("org/my model", "neither"),
        ("org//name", "neither"),
        ("org/name@", "neither"),
        ("-org/name", "neither"),
        ("hf://org/name", "neither"),
        ("org/name+/no/such", "folder not found: /no/such"),
        ("org/name@v1@v2", "neither"),
        ("@v1", "neither"),
        ("org/name@v1@v2+org/lora", "neither"),
    ],
)
def test_no_reference(text, why, tmp_path, monkeypatch):
    """What names nothing is an error that says why; it never reaches the Hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why):
        Reference.parse(text)


def test_revision_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        Reference.parse(f"{tmp_path}@main")


@pytest.mark.parametrize(
    ("text", "name", "reference"),
    [
        ("org/model", None, "org/model"),
        ("sst2=org/model@v1", "sst2", "org/model@v1"),
        ("a.b-c_1=./run", "a.b-c_1", "./run"),
        ("a=b=c", "a", "b=c"),
        ("a b=c", None, "a b=c"),
        ("org/x=y", None, "org/x=y"),
        ("=x", None, "=x"),
        (".hidden=x", None, ".hidden=x"),
        ("../up=x", None, "../up=x"),
    ],
)
def test_split_name(text, name, reference, tmp_path, monkeypatch):
    """``NAME=REF``: a name that may be a folder under tasks/, else all of it is the reference."""
    monkeypatch.chdir(tmp_path)
    assert split_name(text) == (name, reference)


@pytest.mark.parametrize(
    ("folder", "name"), [("run", "run"), ("my run", "my-run"), ("a@b", "a-b"), ("x.y_z", "x.y_z"), ("run/", "run")]
)
def test_default_names(folder, name, tmp_path, monkeypatch):
    """A folder's name is its task's name, with - for what a name cannot hold."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert Reference.parse(folder).default_name == name


def test_default_name_of_here(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert Reference.parse(".").default_name == "run"


@pytest.mark.parametrize("folder", [".hidden", " x", "@home"])
def test_default_names_are_names(folder, tmp_path, monkeypatch):
    """The default name is always one that a task may have."""
    (tmp_path / folder).mkdir()
    from_flags(base=None, models=[str(tmp_path / folder), f"other={tmp_path}"])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("200MiB", 200 * 2**20),
        ("1.5 GB", 15 * 10**8),
        ("1gib", 2**30),
        ("10kb", 10**4),
        ("10 KiB", 10240),
        (" 100b ", 100),
        ("2MB", 2 * 10**6),
    ],
)
def test_parse_size(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "5", "-5GB", "0GB", "5XB", "five GB", "5TB", "nanGB", "infGB", "1e3MB", "1.2.3GB"]
)
def test_parse_no_size(text):
    with pytest.raises(ValueError, match="is not a size such as 5GB"):
        parse_size(text)
