"""What is done to a method's result (`wrap:`, `--wrap`): whole merges against NumPy computed from the files alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import oracle_wudi_ace
import pytest
import torch
import yaml
from checkpoints import make_family
from commands import refuse, succeed
from merge_children import command, contents, merge_and_die, settings, start, start_slurm_step, words
from safetensors.torch import load_file, save_file

import cart_hf
from cart_hf.api import plan_merge
from cart_hf.benchmarking.rows import display_name, trials_of
from cart_hf.errors import UserError
from cart_hf.merging.ahead import look_ahead
from cart_hf.merging.known import Known
from cart_hf.output import unfinished
from cart_hf.processes import Processes
from cart_hf.publishing.card import write_card
from cart_hf.recipe import Recipe
from cart_hf.recipe.wrapping import as_point
from cart_hf.tuning.search import search_coordinates

State = dict[str, np.ndarray]
QKV = ("query", "key", "value")


def weights(folder: Path | str) -> State:
    """Return a folder's backbone as it is stored, by the names of the bare model."""
    tensors = load_file(Path(folder) / "model.safetensors")
    found = {re.sub(r"^(roberta|transformer|bert)\.", "", name): value for name, value in tensors.items()}
    return {n: v.float().numpy() for n, v in found.items() if n.startswith(("embeddings", "encoder", "h.", "wte"))}


def block_of(name: str) -> int | None:
    found = re.match(r"(?:encoder\.layer|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_matrix(name: str) -> bool:
    return any(oracle.is_low_rank(family, name) for family in ("roberta", "gpt2"))


def scaled(base: State, merged: State, factor) -> State:
    return {name: base[name] + factor(name) * (value - base[name]) for name, value in merged.items()}


def line(alpha: float, beta: float):
    """LiNeS' factors of two blocks."""
    return lambda name: alpha + beta * (block_of(name) or 0)


def lines_alpha(base: State, models: list[State], merged: State) -> float:
    summed = sum(np.abs(sum(m[n].astype(np.float64) - base[n] for m in models)).sum() for n in merged)
    return summed / sum(np.abs(merged[n] - base[n]).sum() for n in merged) / len(models)


def larv_factors(base: State, models: list[State], matrix=lambda array: array) -> dict[int, float]:
    """LARV's gate of three levels: of two blocks one is in the lowest third, and one in the highest."""
    numbers: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for name in filter(is_matrix, base):
        stack = np.stack([matrix(m[name]) for m in models]).astype(np.float64)
        numbers[block_of(name)].append(oracle_wudi_ace.larv_numbers(matrix(base[name]).astype(np.float64), stack))
    contrast, conflict = (np.array([np.mean([pair[i] for pair in numbers[b]]) for b in (0, 1)]) for i in (0, 1))
    low, high = np.argsort(oracle_wudi_ace.larv_scores(contrast, conflict, 0.5)).tolist()
    return {low: 0.5, high: 1.5}


def svc(base: State, models: list[State], merged: State, matrix=lambda array: array) -> State:
    def one(name: str, value: np.ndarray) -> np.ndarray:
        stack = np.stack([matrix(m[name]) for m in models]).astype(np.float64)
        return matrix(oracle_wudi_ace.svc(matrix(value), matrix(base[name]).astype(np.float64), stack, 0.1))

    return {name: one(name, value) if is_matrix(name) else value for name, value in merged.items()}


def assert_close(merged: State, expected: State, tolerance: float = 3e-6) -> None:
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=tolerance, err_msg=name)


class Models:
    """A base and fine-tuned models, as folders and as numbers."""

    def __init__(self, folder: Path, family: str = "roberta", tasks: int = 3) -> None:
        self.folder = folder
        self.base_folder, self.folders = make_family(folder, family, tasks)
        self.base, self.states = weights(self.base_folder), [weights(path) for path in self.folders]

    def merge(self, output: Path, **options: Any) -> State:
        cart_hf.merge(base=self.base_folder, models=self.folders, output=output, device="cpu", **options)
        return weights(output)

    def recipe(self, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
        return {"merge_method": method, "base_model": self.base_folder, "models": self.folders, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


class TestNumbers:
    def test_lines_with_alpha(self, models, tmp_path):
        """What is excluded from the method is averaged, and its update is scaled like every other."""
        told = {"lines": {"alpha": 0.3, "beta": 0.8}}
        found = models.merge(
            tmp_path / "out", method="task_arithmetic", scale=0.4, exclude=["layer.1.output"], wrap=told
        )
        merged = oracle.task_arithmetic(models.base, models.states, 0.4)
        average = {n: oracle.average(np.stack([m[n] for m in models.states])) for n in merged}
        merged |= {n: average[n] for n in merged if "layer.1.output" in n}
        assert_close(found, scaled(models.base, merged, line(0.3, 0.8)))

    @pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
    def test_lines_finds_alpha(self, models, tmp_path, out_dtype):
        """From the numbers before they are rounded to the output's type."""
        found = models.merge(tmp_path / "out", method="ties", density=0.3, scale=0.7, wrap="lines", out_dtype=out_dtype)
        merged = oracle.ties(models.base, models.states, 0.3, 0.7)
        alpha = lines_alpha(models.base, models.states, merged)
        assert abs(alpha - 1 / 3) > 0.01
        expected = scaled(models.base, merged, line(alpha, 1.0))
        if out_dtype is None:
            assert_close(found, expected)
        else:
            for name, value in found.items():
                np.testing.assert_allclose(value, expected[name], rtol=2**-8, atol=1e-6, err_msg=name)

    def test_one_and_nothing_change_nothing(self, models, tmp_path):
        plain = models.merge(tmp_path / "plain", method="consensus")
        same = models.merge(tmp_path / "same", method="consensus", wrap={"lines": {"alpha": 1, "beta": 0}})
        assert all(np.array_equal(plain[name], same[name]) for name in plain)

    def test_svc_and_lines_after_ties(self, models, tmp_path):
        """In either order: what recomputes matrices acts first, and what multiplies them measures what it leaves."""
        told: dict[str, Any] = {"lines": {"beta": 0.5}, "svc": {}}
        found = models.merge(tmp_path / "out", method="ties", density=0.3, wrap=told)
        other = models.merge(tmp_path / "other", method="ties", density=0.3, wrap=dict(reversed(told.items())))
        merged = svc(models.base, models.states, oracle.ties(models.base, models.states, 0.3, 1.0))
        alpha = lines_alpha(models.base, models.states, merged)
        assert_close(found, scaled(models.base, merged, line(alpha, 0.5)), 1e-5)
        assert all(np.array_equal(found[name], other[name]) for name in found)

    def test_larv_then_lines_after_cart(self, models, tmp_path):
        """Factors multiply; the second one measures what the first one leaves. With kept factors, too."""
        options = {"rank_ratio": 0.3, "scale": 1.7, "wrap": ["larv", "lines"], "solver": "exact"}
        found = models.merge(tmp_path / "out", **options)
        merged = oracle.cart(models.states, "roberta", 1.7, ratio=0.3)
        gate = larv_factors(models.base, models.states)
        merged = scaled(models.base, merged, lambda name: gate.get(block_of(name), 1.0))
        alpha = lines_alpha(models.base, models.states, merged)
        assert_close(found, scaled(models.base, merged, line(alpha, 1.0)))
        for name, kept in (("first", 0), ("second", 12)):
            models.merge(tmp_path / name / "out", **options, factors=tmp_path / "factors")
            record = json.loads((tmp_path / name / "out" / "merge.json").read_text())
            assert record["factors_found"] == kept
            assert_close(weights(tmp_path / name / "out"), found)

    def test_fused_matrices_are_wrapped_as_one(self, models, tmp_path):
        """In float64, which does not depend on how directions of nearly one length are told apart."""
        told: dict[str, Any] = {"svc": {}, "lines": {"alpha": 0.5}}
        found = models.merge(tmp_path / "out", rank_ratio=0.3, fuse_qkv=True, wrap=told, dtype="float64")
        merged = svc(models.base, models.states, oracle.cart(models.states, "roberta", 1.0, ratio=0.3))
        for layer in (0, 1):
            names = [f"encoder.layer.{layer}.attention.self.{part}.weight" for part in QKV]
            base, *stack = (
                np.concatenate([m[n] for n in names]).astype(np.float64) for m in [models.base, *models.states]
            )
            fused = oracle.cart_matrix(np.stack(stack), lambda _: int(0.3 * 16), 1.0)
            fused = oracle_wudi_ace.svc(fused, base, np.stack(stack), 0.1)
            merged |= dict(zip(names, np.split(fused, 3), strict=True))
        assert_close(found, scaled(models.base, merged, line(0.5, 1.0)), 1e-6)

    def test_matrices_that_are_stored_the_other_way(self, tmp_path):
        """GPT-2's; the left directions are those of its outputs."""
        gpt2 = Models(tmp_path / "gpt2", "gpt2", tasks=2)
        found = gpt2.merge(tmp_path / "out", method="task_arithmetic", scale=0.6, wrap=["svc", "larv"], dtype="float64")
        merged = oracle.task_arithmetic(gpt2.base, gpt2.states, 0.6)
        merged = svc(gpt2.base, gpt2.states, {n: merged[n] for n in found}, np.transpose)
        gate = larv_factors(gpt2.base, gpt2.states, np.transpose)
        expected = scaled(gpt2.base, merged, lambda name: gate.get(block_of(name), 1.0))
        assert_close(found, expected, 1e-6)
        of_rows = svc(gpt2.base, gpt2.states, merged)
        assert max(np.abs(of_rows[name] - merged[name]).max() for name in found) > 1e-3

    def test_what_the_base_lacks_stays_the_average(self, tmp_path):
        """It has no update: whoever measures and scales updates leaves it alone."""
        bert = Models(tmp_path / "bert", "bert", tasks=2)
        path = Path(bert.base_folder) / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if "pooler" not in k}, path, metadata={"format": "pt"})
        found = bert.merge(tmp_path / "out", method="task_arithmetic", wrap=["svc", "lines", "larv"])
        base = bert.base["embeddings.LayerNorm.weight"]
        states = [state["embeddings.LayerNorm.weight"] for state in bert.states]
        assert not np.allclose(found["embeddings.LayerNorm.weight"], base + sum(s - base for s in states), atol=1e-3)
        stack = torch.stack(
            [load_file(Path(f) / "model.safetensors")["bert.pooler.dense.weight"] for f in bert.folders]
        )
        merged = load_file(tmp_path / "out" / "model.safetensors")["bert.pooler.dense.weight"]
        torch.testing.assert_close(merged, stack.mean(dim=0))

    def test_adapters(self, models, tmp_path):
        """Adapters merge as the models that they are: a block that none changes is the base's, and is a block still."""
        from peft import LoraConfig, get_peft_model
        from transformers import RobertaForMaskedLM

        references, folders = [], []
        for task in range(3):
            config = LoraConfig(r=3, target_modules=["query"], layers_to_transform=[0], init_lora_weights=False)
            torch.manual_seed(task)
            peft = get_peft_model(RobertaForMaskedLM.from_pretrained(models.base_folder), config)
            peft.save_pretrained(tmp_path / f"lora{task}")
            peft.merge_and_unload().save_pretrained(tmp_path / f"whole{task}")
            references.append(f"{models.base_folder}+{tmp_path / f'lora{task}'}")
            folders.append(str(tmp_path / f"whole{task}"))
        found = []
        for name, those in (("thin", references), ("whole", folders)):
            told: dict[str, Any] = {"svc": {}, "larv": {"gate": "continuous"}, "lines": {}}
            cart_hf.merge(
                base=models.base_folder, models=those, output=tmp_path / name, rank=4, wrap=told, device="cpu"
            )
            found.append(weights(tmp_path / name))
        assert_close(*found, 1e-5)
        changed = {name for name, value in found[0].items() if not np.array_equal(value, models.base[name])}
        assert changed == {"encoder.layer.0.attention.self.query.weight"}

    def test_a_wrapper_that_fails_says_where(self, models, tmp_path):
        """On numbers whose squares are not finite."""
        shutil.copytree(models.folders[0], tmp_path / "huge")
        path, name = tmp_path / "huge" / "model.safetensors", "encoder.layer.1.output.dense.weight"
        tensors = {key: value.double() for key, value in load_file(path).items()}
        tensors[f"roberta.{name}"] *= 1e200
        save_file(tensors, path, metadata={"format": "pt"})
        told = {"method": "average", "wrap": "svc", "dtype": "float64", "device": "cpu"}
        with pytest.raises(RuntimeError, match=re.escape(f"svc failed on tensor '{name}' (shape [16, 24])")):
            models_of = [tmp_path / "huge", models.folders[1]]
            cart_hf.merge(base=models.base_folder, models=list(map(str, models_of)), output=tmp_path / "out", **told)
        assert not (tmp_path / "out").exists()


ALL = ("--method", "ties", "--wrap", "svc", "lines:beta=0.5", "larv")
OPTIONS: dict[str, Any] = {"method": "ties", "wrap": {"svc": {}, "lines": {"beta": 0.5}, "larv": {}}}


class TestWork:
    """Who shares the work, and whether it is done in one go, changes no byte."""

    @pytest.fixture(scope="class")
    def whole(self, models, tmp_path_factory) -> dict[str, Any]:
        output = tmp_path_factory.mktemp("whole") / "out"
        answer = succeed(*words(models.folder, output, *ALL))
        assert answer.out.startswith("ties + svc + lines + larv, 3 models into one")
        return contents(output)

    def test_threads(self, models, whole, tmp_path):
        models.merge(tmp_path / "out", **OPTIONS, workers=3)
        assert contents(tmp_path / "out") == whole

    def test_processes(self, models, whole, tmp_path):
        children = start_slurm_step(tmp_path, command, *words(models.folder, tmp_path / "out", *ALL))
        assert [child.answer().code for child in children] == [0, 0]
        assert contents(tmp_path / "out") == whole

    def test_resume(self, models, whole, tmp_path):
        arguments = settings(models.folder, tmp_path / "out") | OPTIONS
        start(tmp_path, merge_and_die, 10, arguments).answer()
        assert len(unfinished(tmp_path / "out")) == 1
        with pytest.raises(UserError, match=r"--resume: wrap.lines.beta was 0.5, is 1.0"):
            cart_hf.merge(**arguments | {"wrap": ["svc", "lines", "larv"]}, resume=True)
        cart_hf.merge(**arguments, resume=True)
        assert contents(tmp_path / "out") == whole

    def test_what_is_told_of_it(self, models, whole, tmp_path):
        record = whole["merge.json"]
        assert [(one["name"], one["parameters"]) for one in record["wrap"]] == [
            ("svc", {"alpha": 0.1}),
            ("lines", {"alpha": None, "beta": 0.5}),
            ("larv", {"gate": "three", "low": 0.5, "high": 1.5, "depth": 0.5}),
        ]
        card = whole["README.md"].decode()
        for one in record["wrap"]:
            assert (
                f"\n\nThen {one['title']} ({one['summary']}):\n\n    {one['equation']}\n\n{one['citation']}\n" in card
            )
        (tmp_path / "recipe.yaml").write_bytes(whole["cart_hf.yaml"])
        assert Recipe.load(tmp_path / "recipe.yaml").wrap == {one["name"]: one["parameters"] for one in record["wrap"]}

    def test_the_card_of_an_older_record(self, models, tmp_path):
        """As `cart-hf push` renders it again."""
        models.merge(tmp_path / "out", method="average")
        path = tmp_path / "out" / "merge.json"
        record = {
            key: value for key, value in json.loads(path.read_text()).items() if key not in ("wrap", "calibration")
        }
        path.write_text(json.dumps(record))
        card = (tmp_path / "out" / "README.md").read_text()
        write_card(tmp_path / "out", "out")
        assert (tmp_path / "out" / "README.md").read_text() == card

    def test_measuring_a_plan_that_measures_nothing(self, models):
        """Factors that are told need no pass over the models."""
        recipe = Recipe.from_mapping(models.recipe(wrap={"lines": {"alpha": 0.5, "beta": 0.25}}))
        plan = plan_merge(recipe)
        steps: list[str] = []
        processes = Processes(0, 1, torch.device("cpu"))
        known = look_ahead(plan, 1, lambda step, *_: steps.append(step), processes, Known())
        assert steps == []
        assert set(known.scales.values()) == {0.5, 0.75}


class TestRecipes:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("svc", {"svc": {"alpha": 0.1}}),
            (["svc", "lines"], {"svc": {"alpha": 0.1}, "lines": {"alpha": None, "beta": 1.0}}),
            ({"lines": {"beta": 2}}, {"lines": {"alpha": None, "beta": 2}}),
            ({"lines": None}, {"lines": {"alpha": None, "beta": 1.0}}),
            ({"lines": {"beta": None, "alpha": 0}}, {"lines": {"alpha": 0, "beta": 1.0}}),
            (None, {}),
            ([], {}),
        ],
    )
    def test_forms(self, models, value, expected):
        recipe = Recipe.from_mapping(models.recipe(wrap=value))
        assert recipe.wrap == expected
        assert list(recipe.wrap) == list(expected)

    def test_it_is_written_as_it_is_read(self, models, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(Recipe.from_mapping(models.recipe(wrap={"svc": {}, "larv": {"gate": "two"}})).to_yaml())
        recipe = Recipe.load(path)
        assert list(recipe.wrap) == ["svc", "larv"]
        assert recipe.wrap["larv"]["gate"] == "two"
        assert recipe.to_yaml() == path.read_text()

    @pytest.mark.parametrize(
        ("wrap", "problem"),
        [
            ("line", "wrap: unknown wrapper 'line' - did you mean 'lines'?"),
            ({"lines": {"bta": 1}}, "wrap: lines has no parameter 'bta' - did you mean 'beta'?"),
            ({"lines": {"alpha": -1}}, "wrap: lines.alpha: must be at least 0, not -1"),
            ({"larv": {"gate": "four"}}, "wrap: larv.gate: must be one of three, two, continuous, not 'four'"),
            ({"lines": False}, "wrap: lines: expected a mapping of its parameters (alpha, beta), not False"),
            ([{"lines": {}}], "wrap: expected wrappers by name, such as {lines: {}}, not [{'lines': {}}]"),
            (7, "wrap: expected wrappers by name, such as {lines: {}}, not 7"),
        ],
    )
    def test_what_is_wrong_with_it(self, models, wrap, problem):
        with pytest.raises(UserError) as caught:
            Recipe.from_mapping(models.recipe(wrap=wrap))
        assert caught.value.problems == [problem]
        with pytest.raises(UserError) as caught:
            Recipe.from_mapping(models.recipe(benchmark={"methods": [{"method": "ties", "wrap": wrap}]}))
        assert caught.value.problems == [f"benchmark.methods[0].{problem}"]

    @pytest.mark.parametrize(
        ("words", "naming"),
        [
            (["--wrap", "swc"], ["wrap: unknown wrapper 'swc'", "svc"]),
            (["--wrap", "lines:gamma=1"], ["wrap: lines has no parameter 'gamma'"]),
            (["--wrap", "lines:beta"], ["--wrap lines:beta: expected KEY=VALUE"]),
            (["--wrap", "lines:beta="], ["--wrap lines:beta=: expected KEY=VALUE"]),
            (["--wrap", "lines:beta=["], ["--wrap lines:beta=[", "not valid YAML"]),
            (["--wrap", "lines:beta=1,beta=2"], ["--wrap lines:beta: given twice"]),
            (["--wrap", "lines:beta=1.5.0"], ["wrap: lines.beta: must be a number"]),
        ],
    )
    def test_flags_that_are_wrong(self, models, tmp_path, words, naming):
        models_of = ["--base", models.base_folder, "--models", *models.folders]
        refuse(tmp_path / "out", "merge", *models_of, "--output", tmp_path / "out", *words, naming=naming)

    def test_flags(self, models):
        words = ["merge", "--base", models.base_folder, "--models", *models.folders, "--print-recipe"]
        answer = succeed(*words, "--wrap", "svc", "larv:gate=two,low=0", "larv:high=2")
        assert "wrap:\n  svc: {alpha: 0.1}\n  larv: {gate: two, low: 0, high: 2, depth: 0.5}\n" in answer.out

    def test_it_needs_the_base(self, models, tmp_path):
        words = ["merge", "--method", "average", "--models", *models.folders, "--output", tmp_path / "out"]
        refuse(tmp_path / "out", *words, "--wrap", "lines", naming=["base_model: wrap (lines)"])

    @pytest.mark.parametrize("key", ["adapt", "coefficients"])
    def test_nothing_is_learnt_of_it(self, models, tmp_path, key):
        recipe = models.recipe(wrap="lines", **{key: {"steps": 3} if key == "adapt" else "coefficients.safetensors"})
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        naming = [f"{key}: coefficients are learnt of a method's own result; leave out wrap"]
        refuse(tmp_path / "out", "merge", tmp_path / "recipe.yaml", tmp_path / "out", naming=naming)


class TestSearches:
    def test_what_a_wrapper_suggests(self, models):
        trial = Recipe.from_mapping(models.recipe("model_stock", wrap="lines")).tuned()
        assert trial.grid == {"lines.beta": (0.25, 0.5, 1.0, 1.5, 2.0)}
        assert trial.wrap == {"lines": {"alpha": None, "beta": 1.0}}

    def test_a_grid(self, models):
        grid = {"lambda": [0.2, 0.4], "lines.beta": [0.5, 2.0]}
        recipe = Recipe.from_mapping(models.recipe(wrap={"lines": {"alpha": 0.3}}, tune={"grid": grid}))
        trial = recipe.tuned()
        assert trial.points[1] == {"weight": 1.0, "normalize": False, "scale": 0.2, "lines.beta": 2.0}
        variant = recipe.of_trial(trial, trial.points[1])
        assert variant.wrap == {"lines": {"alpha": 0.3, "beta": 2.0}}
        assert variant.parameters["scale"] == 0.2
        assert "lines.beta" not in variant.parameters
        assert trial.on_edge(trial.points[1]) == ["scale", "lines.beta"]

    @pytest.mark.parametrize(
        ("grid", "problem"),
        [
            ({"lines.bta": [1]}, "tune.grid: wrap: lines has no parameter 'bta' - did you mean 'beta'?"),
            ({"lines.beta": [1, "x"]}, "tune.grid: wrap: lines.beta: must be a number, not 'x'"),
            ({"svc.alpha": [1]}, "tune.grid: parameters.svc.alpha: model_stock has no such parameter"),
        ],
    )
    def test_a_grid_that_is_wrong(self, models, grid, problem):
        with pytest.raises(UserError) as caught:
            Recipe.from_mapping(models.recipe("model_stock", wrap="lines", tune={"grid": grid}))
        (found,) = caught.value.problems
        assert found.startswith(problem)

    def test_one_at_a_time_begins_with_the_recipes_own(self, models):
        recipe = Recipe.from_mapping(models.recipe(wrap={"lines": {"beta": 2.0}}))
        assert as_point(recipe.wrap) == {"lines.alpha": None, "lines.beta": 2.0}
        seen: list[dict[str, Any]] = []

        def score(point: dict[str, Any]) -> float:
            seen.append(point)
            return 0.0

        search_coordinates(recipe.tuned(), {**recipe.parameters, **as_point(recipe.wrap)}, score)
        assert seen[0]["lines.beta"] == 2.0
        assert seen[0]["scale"] == recipe.parameters["scale"]

    def test_rows_of_a_benchmark(self, models):
        rows = [
            {"method": "ties", "wrap": "lines", "grid": {"lines.beta": [0.5, 1.0]}},
            {"method": "cart", "wrap": {"svc": {}, "larv": {"gate": "two"}}},
            {"method": "cart", "wrap": ["svc"], "name": "mine"},
            {"method": "della_linear"},
            {"method": "della"},
        ]
        recipe = Recipe.from_mapping(models.recipe(benchmark={"methods": rows}))
        trials = trials_of(recipe)
        assert [trial.name for trial in trials] == [
            "ties + lines",
            "cart + svc + larv",
            "mine",
            "della_linear",
            "della",
        ]
        names = ["TIES + LiNeS", "CART + SVC + LARV", "mine", "della_linear", "DELLA"]
        assert [display_name(trial) for trial in trials] == names
        assert recipe.of_trial(trials[0], trials[0].points[0]).wrap["lines"]["beta"] == 0.5
        assert recipe.of_trial(trials[3], {}).parameters["elect_signs"] is False
        again = Recipe.from_mapping(yaml.safe_load(recipe.to_yaml()))
        assert again.benchmark == recipe.benchmark

    def test_without_a_list_the_recipes_own_row_is_wrapped(self, models):
        *others, own = trials_of(Recipe.from_mapping(models.recipe("ties", wrap="lines")))
        assert display_name(own) == "TIES + LiNeS"
        assert own.wrap == {"lines": {"alpha": None, "beta": 1.0}}
        assert not any(trial.wrap for trial in others)


class TestMergekitsNames:
    @pytest.mark.parametrize(
        ("name", "own", "method", "expected"),
        [
            ("della_linear", {}, "della", {"elect_signs": False, "normalize": False, "scale": 1.0}),
            ("della_linear", {"normalize": True}, "della", {"elect_signs": False, "normalize": True}),
            ("breadcrumbs_ties", {"lambda": 2.0}, "breadcrumbs", {"elect_signs": True, "scale": 2.0}),
        ],
    )
    def test_presets(self, models, name, own, method, expected):
        recipe = Recipe.from_mapping(models.recipe(name, parameters=own))
        assert recipe.merge_method == method
        assert recipe.parameters.items() >= expected.items()
        assert (
            Recipe.from_mapping({**models.recipe(), "merge_method": method, "parameters": recipe.parameters}) == recipe
        )

    @pytest.mark.parametrize("listed", [[1], [0, 1], [1, 0]])
    def test_slerp_starts_at_the_base(self, models, tmp_path, listed):
        """With only the other model listed, or both, in any order."""
        first, second = models.folders[:2]
        those = [f"{'ab'[i]}={models.folders[i]}" for i in listed]
        arguments = {"base": first, "models": those, "method": "slerp", "t": 0.25, "device": "cpu"}
        result = cart_hf.merge(**arguments, output=tmp_path / "out")
        found = weights(tmp_path / "out")
        name = "encoder.layer.0.attention.self.query.weight"
        a, b = (weights(folder)[name].astype(np.float64) for folder in (first, second))
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        expected = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
        assert [str(model.reference) for model in result.plan.models] == [first, second]

    def test_slerp_is_of_two(self, models):
        with pytest.raises(UserError, match="slerp merges 2 models, and not 3"):
            Recipe.from_mapping(models.recipe("slerp"))
        with pytest.raises(UserError, match="only one model"):
            Recipe.from_mapping({**models.recipe("slerp"), "models": [models.base_folder]})
        entries = {**models.recipe("slerp"), "models": models.folders[:2], "base_model": None}
        assert [entry.name for entry in Recipe.from_mapping(entries).models] == ["task0", "task1"]
