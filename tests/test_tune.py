"""`cart-hf tune`: points from one decomposition are the merges' own; what is chosen, told and kept."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from checkpoints import make_clip
from commands import call, refuse, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import is_low_rank, state_of
from safetensors.torch import load_file
from small_benchmark import TASKS, make_world, recipe_of

import cart_hf
from cart_hf.linalg import low_rank
from cart_hf.methods import all_methods
from cart_hf.recipe import Trial
from cart_hf.tuning import data_free, search
from cart_hf.tuning.merges import Merges
from cart_hf.tuning.sample import Sample

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder)


@pytest.fixture
def recipe(world):
    return recipe_of(*world) | {"tune": GRID}


@pytest.fixture(scope="module")
def searched(world, tmp_path_factory):
    """The output of a search with the verb, and its answer."""
    folder = tmp_path_factory.mktemp("searched")
    answer = succeed("tune", written(folder, recipe_of(*world) | {"tune": GRID}), folder / "out")
    return folder / "out", answer


GRID = {"grid": {"rank": [1, 3], "scale": [0.5, 9.0]}}


def written(tmp_path, recipe, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(recipe))
    return path


def averages(output):
    """Return the average of each point of a search, by its settings."""
    points = json.loads((output / "tuning.json").read_text())["points"]
    return {tuple(point["parameters"].values()): point["average"] for point in points}


def test_every_point_scores_what_the_two_verbs_find(recipe, searched, tmp_path):
    """The best one's recipe keeps all else."""
    wanted = {key: value for key, value in recipe["evaluation"].items() if key != "split"}
    scores = {}
    for rank in (1, 3):
        for scale in (0.5, 9.0):
            own = recipe | {"parameters": {"rank": rank, "scale": scale}}
            place = tmp_path / f"{rank}-{scale}"
            cart_hf.merge(cart_hf.Recipe.from_mapping(own), output=place)
            scores[rank, scale] = cart_hf.evaluate(place, split="validation", **wanted).average
    assert averages(searched[0]) == scores
    best = max(scores, key=scores.__getitem__)
    found = cart_hf.Recipe.load(searched[0] / "recipe.yaml")
    assert (found.parameters["rank"], found.parameters["scale"]) == best
    plain = cart_hf.Recipe.from_mapping(recipe)
    assert (found.evaluation, found.tune, found.models) == (plain.evaluation, plain.tune, plain.models)


@pytest.mark.parametrize("method", ["cart", "task_arithmetic", "ties", "consensus", "dare"])
@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_models_on_a_line_are_the_merges(tmp_path, world, method, out_dtype):
    """What is mixed from two merges is the merge itself, but for rounding; heads and tokenizer are there."""
    own = {key: value for key, value in recipe_of(*world).items() if key != "parameters"}
    recipe = cart_hf.Recipe.from_mapping(own | {"merge_method": method, "out_dtype": out_dtype})
    merges = Merges(tmp_path / "work", {}, "cpu", None)
    for scale in (0.7, 2.5):
        variant = recipe.variant(method, {"scale": scale})
        made = merges.make(variant)
        cart_hf.merge(variant, output=tmp_path / str(scale))
        mixed, merged = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / str(scale)))
        assert mixed.keys() == merged.keys()
        unit = 2e-6 if out_dtype is None else 2**-7  # a value beside a rounding boundary moves by one unit
        for key, values in merged.items():
            assert torch.allclose(mixed[key].float(), values.float(), rtol=unit, atol=2e-6), key
    heads = {path.name for path in (made / "tasks").iterdir()}
    assert heads == set(TASKS)


def test_a_line_of_two_merges(tmp_path, world, monkeypatch):
    """Five scales of one rank take two merges, and another rank a third."""
    from cart_hf.tuning import merges as room

    recipe, done, real = cart_hf.Recipe.from_mapping(recipe_of(*world)), [], room.merge
    monkeypatch.setattr(room, "merge", lambda variant, **options: done.append(variant) or real(variant, **options))
    merges = Merges(tmp_path / "work", {}, "cpu", None)
    for rank in (2, 3):
        for scale in (0.5, 1.0, 1.5, 2.0, 2.5):
            merges.make(recipe.variant("cart", {"rank": rank, "scale": scale}))
    assert [variant.parameters["scale"] for variant in done] == [0.0, 1.0, 1.0]


def test_a_search_decomposes_every_matrix_once(recipe, tmp_path, monkeypatch):
    decomposed, real = [], low_rank.best_of_tall

    def counted(matrices, **options):
        decomposed.append(options["rank"])
        return real(matrices, **options)

    monkeypatch.setattr(low_rank, "best_of_tall", counted)
    plain = cart_hf.Recipe.from_mapping(recipe)
    cart_hf.tune(plain, output=tmp_path / "out")
    expected = [3] * sum(tensor.role == "low_rank" for tensor in cart_hf.api.plan_merge(plain).tensors)
    assert decomposed == expected


def test_files_of_a_search(searched, tmp_path):
    """What the verb writes and says, and that the recipe it writes merges."""
    output, answer = searched
    told = json.loads((output / "tuning.json").read_text())
    assert told["format"] == "cart-hf tuning 1" and told["parameters"] == ["rank", "scale"]
    assert len(told["points"]) == 4 and set(told["points"][0]["scores"]) == set(TASKS)
    best = max(told["points"], key=lambda point: point["average"])
    assert told["best"] == best["parameters"]
    with (output / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(float(row["rank"]), float(row["scale"])) for row in rows] == list(averages(output))
    assert [float(row["average"]) for row in rows] == [round(100 * point["average"], 1) for point in told["points"]]
    assert told["on_edge"] == ["rank", "scale"]  # of two values both are
    for name in told["on_edge"]:
        assert f"The best {name}, {told['best'][name]}, is the" in answer.err
    assert f"rank {best['parameters']['rank']}, scale {best['parameters']['scale']}" in answer.out
    left = {path.name for path in output.iterdir()}
    figures = {"heat-map.png", "heat-map.svg"}
    assert left == {"points.json", "points.csv", "recipe.yaml", "tuning.json", *figures}  # no factors, no model
    succeed("merge", output / "recipe.yaml", tmp_path / "merged")
    again = succeed("tune", output / "recipe.yaml", output, "--resume", "--format", "json")
    assert json.loads(again.out)["points"] == told["points"]


def test_the_edge_of_a_grid():
    trial = Trial(method="cart", name="x", grid={"scale": (3.0, 1.0, 2.0), "fuse_qkv": (True, False)})
    assert trial.on_edge({"scale": 2.0, "fuse_qkv": True}) == []
    assert trial.on_edge({"scale": 3.0, "fuse_qkv": True}) == ["scale"]


def test_a_killed_search_goes_on_and_widens(recipe, searched, tmp_path, monkeypatch):
    """What was measured is not measured again, by a wider grid either; on other examples it is."""
    plain, out, real, measured = cart_hf.Recipe.from_mapping(recipe), tmp_path / "out", Sample.measure, []

    def counted(sample, name, folder, **options):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(sample, name, folder, **options)

    monkeypatch.setattr(Sample, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        cart_hf.tune(plain, output=out)
    again = call("tune", written(tmp_path, recipe), out)
    assert again.code == 2 and f"{out} exists" in again.err
    cart_hf.tune(plain, output=out, resume=True)
    assert len(measured) == 4 + 1
    wider = {"grid": {"rank": [3], "scale": [0.5, 4.0, 9.0]}}
    found = cart_hf.tune(plain, output=out, tuning=wider, resume=True)
    assert len(measured) == 5 + 1
    shared = [averages(searched[0])[3, scale] for scale in (0.5, 9.0)]
    assert [found.points[place].results.average for place in (0, 2)] == shared
    fewer = {"grid": {"rank": [3], "scale": [9.0]}, "selection": {"limit": 5}}
    cart_hf.tune(plain, output=out, tuning=fewer, resume=True)
    assert len(measured) == 6 + 1


def peak(point):
    """A hill over two settings with its top at rank 3, scale 2."""
    return -((point["rank"] - 3) ** 2) - (point["scale"] - 2) ** 2


def test_coordinate_search_climbs_with_few_points():
    tried = []
    trial = Trial(method="cart", name="x", grid={"rank": (1, 2, 3, 4, 5), "scale": (0.0, 1.0, 2.0, 3.0, 4.0)})

    def score(point):
        if point not in tried:
            tried.append(point)
        return peak(point)

    assert search.search_coordinates(trial, {"rank": 5, "scale": 7.0}, score) == {"rank": 3, "scale": 2.0}
    assert tried[0] == {"rank": 5, "scale": 2.0}  # the recipe's own rank, and the middle for what is not in the grid
    assert len(tried) == 13
    assert search.search_grid(trial, score) == {"rank": 3, "scale": 2.0}
    assert len(tried) == 25


def test_coordinate_search_stays_where_nothing_is_better():
    trial = Trial(method="cart", name="x", grid={"rank": (1, 2), "scale": (1.0, 2.0)})
    assert search.search_coordinates(trial, {"rank": 2, "scale": 1.0}, lambda point: 0.5) == {"rank": 2, "scale": 1.0}


def test_coordinate_search_of_a_recipe(recipe, tmp_path):
    found = cart_hf.tune(cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out", tuning={"search": "coordinate"})
    assert 3 <= len(found.points) <= 4
    score = {str(point.parameters): point.results.average for point in found.points}
    assert score[str(found.best)] == max(score.values())


def test_what_methods_suggest_can_be_merged(world):
    """Without a grid the method's own values are tried, all of which it accepts."""
    own = {key: value for key, value in recipe_of(*world).items() if key != "parameters"}
    for name, method in all_methods().items():
        if method.model_count is not None:
            continue
        suggested = {one.name: one.search for one in method.parameters if one.search}
        plain = cart_hf.Recipe.from_mapping(own | {"merge_method": name})
        if not suggested:
            with pytest.raises(cart_hf.UserError, match="suggests no values"):
                plain.tuned()
            continue
        trial = plain.tuned()
        assert trial.grid == suggested
        assert all(list(values) == sorted(values) for values in suggested.values())
        for point in trial.points:
            plain.variant(name, point)
    assert len(cart_hf.Recipe.from_mapping(own).tuned().points) == 25


def rule(stacks, weights):
    """Rank ratio and scale by the definition: full SVDs, M formed whole, in float64."""
    centred = [
        np.linalg.svd(stack - np.average(stack, axis=0, weights=weights), full_matrices=False) for stack in stacks
    ]
    relative = np.array(weights) / np.mean(weights)

    def summed(u, s, v, k):
        return sum(w * (u[t, :, :k] * s[t, :k]) @ v[t, :k] for t, w in enumerate(relative))

    def rank_of(ratio, s):
        return max(1, int(ratio * s.shape[1]))

    explained = []
    for ratio in data_free.RATIOS:
        agreement = within = 0.0
        for u, s, v in centred:
            k = rank_of(ratio, s)
            for t in range(len(s)):
                inside = u[t, :, :k].T @ summed(u, s, v, k) @ v[t, :k].T
                agreement += (inside * np.diag(s[t, :k])).sum()
                within += (inside**2).sum()
        explained.append(agreement**2 / within)
    ratio = round(3 * data_free.RATIOS[int(np.argmax(explained))], 3)
    whole = sum((relative**2 * (s**2).sum(axis=1)).sum() for _, s, _ in centred)
    length = sum((summed(u, s, v, rank_of(ratio, s)) ** 2).sum() for u, s, v in centred)
    return ratio, np.sqrt(whole / length)


def test_the_rule_without_data(world, tmp_path):
    """The recipe that it writes has what the definition gives; nothing is measured."""
    folder, family = world
    recipe = recipe_of(folder, family) | {"parameters": {"rank": 2, "scale": 5.0}}
    answer = succeed("tune", written(tmp_path, recipe), tmp_path / "out", "--data-free")
    models = [state_of(str(family[name])) for name in TASKS]
    names = [name for name in models[0] if is_low_rank("roberta", name)]
    ratio, scale = rule([np.stack([m[name] for m in models]).astype(np.float64) for name in names], [1.0] * 3)
    told = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert told["best"] == {"rank_ratio": ratio, "scale": pytest.approx(scale, abs=0.006)}
    assert told["points"] == [] and "orthogonal" in told["rule"]
    assert "Chosen without data" in answer.err
    best = cart_hf.Recipe.load(tmp_path / "out" / "recipe.yaml")
    assert best.parameters["rank_ratio"] == ratio and "rank" not in best.parameters


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 5), st.integers(20, 60), st.integers(20, 60))
def test_the_rule_is_its_definition(seed, tasks, m, n):
    """On matrices of any shape, weights and decay of singular values, added up over two of them."""
    random = np.random.default_rng(seed)
    stacks = [
        random.normal(size=(tasks, rows, columns)) * 0.9 ** np.arange(columns) for rows, columns in ((m, n), (n, m))
    ]
    weights = list(random.uniform(0.5, 2.0, size=tasks))
    relative = [w / np.mean(weights) for w in weights]
    total = None
    for stack in stacks:
        centred = stack - np.average(stack, axis=0, weights=weights)
        k = max(1, int(data_free.FACTOR * data_free.RATIOS[-1] * min(m, n)))
        factors = low_rank.factorize(torch.from_numpy(centred), rank=k)
        lengths = data_free.lengths_of(factors, relative)
        total = lengths if total is None else total + lengths
    ratio, scale = rule(stacks, weights)
    assert total.settings() == (ratio, pytest.approx(scale, abs=0.006))


def test_the_rule_where_no_tasks_are_named(world, tmp_path):
    recipe = recipe_of(*world)
    del recipe["evaluation"]
    found = cart_hf.tune(cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out")
    assert found.trial is None and found.best["scale"] > 1


def test_kept_factors_serve_the_rule(world, tmp_path, monkeypatch):
    """The folder of factors that a merge has filled is read, and gives the same scale."""
    recipe = cart_hf.Recipe.from_mapping(recipe_of(*world) | {"parameters": {"rank_ratio": 0.4}})
    cart_hf.merge(recipe, output=tmp_path / "merged", factors=tmp_path / "factors")
    fresh = cart_hf.tune(recipe, output=tmp_path / "fresh", data_free=True)
    monkeypatch.setattr(low_rank, "best_of_tall", None)  # nothing is decomposed
    found = cart_hf.tune(recipe, output=tmp_path / "out", data_free=True, factors=tmp_path / "factors")
    assert found.best == fresh.best


def test_a_clip_is_searched(tmp_path_factory, tmp_path):
    """Lines of a whole CLIPModel: the tower is mixed, the text side stays the base's."""
    base, models = make_clip(tmp_path_factory.mktemp("clip"))
    recipe = cart_hf.Recipe.from_mapping(
        {"merge_method": "cart", "base_model": str(base), "models": [str(model) for model in models[:3]]}
    )
    merges = Merges(tmp_path / "work", {}, "cpu", None)
    variant = recipe.variant("cart", {"scale": 1.7})
    made = merges.make(variant)
    cart_hf.merge(variant, output=tmp_path / "merged")
    mixed, merged = (load_file(folder / "model.safetensors") for folder in (made, tmp_path / "merged"))
    assert mixed.keys() == merged.keys()
    for key, values in merged.items():
        assert torch.allclose(mixed[key], values, rtol=2e-6, atol=2e-6), key
        assert values.is_floating_point() or torch.equal(mixed[key], values)


BAD = {
    "no such parameter": (["--grid", "rank_ration=0.1"], ["rank_ration", "did you mean 'rank_ratio'?"]),
    "a value out of range": (["--grid", "rank_ratio=0.1,2"], ["tune.grid", "rank_ratio", "at most 1"]),
    "no values": (["--grid", "scale="], ["--grid scale=", "expected PARAMETER=VALUE,VALUE"]),
    "no equals sign": (["--grid", "scale"], ["--grid scale", "expected PARAMETER=VALUE,VALUE"]),
    "twice": (["--grid", "scale=1", "scale=2"], ["--grid scale: given twice"]),
    "not YAML": (["--grid", "scale=[1"], ["--grid scale=[1", "not valid YAML"]),
    "no such search": (["--search", "random"], ["random"]),
    "no such split": (["--split", "dev"], ["red", "dev"]),
    "no such task": (["--tasks", "redd"], ["redd"]),
    "no such data": (["--data", "/nowhere"], ["/nowhere"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(recipe, tmp_path, case):
    flags, naming = BAD[case]
    path = written(tmp_path, recipe)
    text = refuse(
        tmp_path / "out",
        "tune",
        path,
        tmp_path / "out",
        *flags,
        naming=naming,
        count=3 if "split" in case else 1,
    )
    assert text


def test_tasks_take_the_place_of_a_suite(recipe, tmp_path):
    """As they do for `adapt` and `analyze`: a recipe's suite and a flag's tasks do not contradict each other."""
    recipe["evaluation"] = {name: recipe["evaluation"][name] for name in ("tasks_file", "data")} | {"suite": "glue-7"}
    one = {"grid": {"rank": [3], "scale": [9.0]}}
    found = cart_hf.tune(
        cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out", tuning=one, examples={"tasks": ["red"]}
    )
    assert set(found.points[0].results.tasks) == {"red"}


def test_learnt_coefficients_leave_nothing_to_search(recipe, tmp_path):
    path = written(tmp_path, recipe | {"coefficients": "learnt.safetensors"})
    refuse(tmp_path / "out", "tune", path, tmp_path / "out", naming=["coefficients", "leave them out"])


def test_methods_without_a_rule(recipe, tmp_path):
    path = written(tmp_path, recipe | {"merge_method": "task_arithmetic", "parameters": {}, "tune": {}})
    refuse(tmp_path / "out", "tune", path, tmp_path / "out", "--data-free", naming=["the rule is for cart"])


def test_two_models_cancel(world, tmp_path):
    recipe = recipe_of(*world)
    recipe["models"] = recipe["models"][:2]
    path = written(tmp_path, recipe)
    refuse(tmp_path / "out", "tune", path, tmp_path / "out", "--data-free", naming=["cancel", "weight average"])
