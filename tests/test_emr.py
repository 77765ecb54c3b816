"""EMR-Merging and TSV-C: the rules and the files against NumPy in float64, and their rows in a benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import oracle_emr
import pytest
import torch
import transformers
from checkpoints import make_clip, make_family
from commands import call, refuse, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.numpy import load_file
from small_benchmark import TASKS, make_world, recipe_of

import cart_hf
from cart_hf.compression import masked, restoring
from cart_hf.compression.emr import Sums, mask, unify

KIND = transformers.RobertaForSequenceClassification
NAMES = ("task0", "task1", "task2")


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> tuple[str, list[str]]:
    return make_family(tmp_path_factory.mktemp("family"), "roberta")


def state(model: torch.nn.Module, prefix: str = "") -> dict[str, np.ndarray]:
    found = {name.removeprefix(prefix): tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in found.items() if "position_ids" not in name}


def backbones(base: str, models: list[str]) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    start = state(transformers.RobertaModel.from_pretrained(base, add_pooling_layer=False))
    found = [state(KIND.from_pretrained(folder), "roberta.") for folder in models]
    return start, [{name: values for name, values in one.items() if name in start} for one in found]


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


entries = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, 1e-30, -1e-30])


@given(
    st.integers(1, 4).flatmap(
        lambda tasks: st.lists(st.lists(entries, min_size=6, max_size=6), min_size=tasks + 1, max_size=tasks + 1)
    )
)
@settings(max_examples=30, deadline=None)
def test_elect_mask_and_rescale(rows):
    base, *models = [np.array(row) for row in rows]
    unified, masks, rescalers = oracle_emr.emr({"w": base}, [{"w": model} for model in models])
    vectors, start = torch.tensor(np.stack(models)), torch.tensor(base)
    found = unify(models=vectors, base=start)
    np.testing.assert_array_equal(found, unified["w"])
    for task, vector in enumerate(vectors):
        agrees = mask(task_vector=vector, unified=found)
        np.testing.assert_array_equal(agrees, masks[task]["w"])
        parts = [Sums.of(vector[half], (found * agrees)[half]) for half in (slice(0, 4), slice(4, 6))]
        sums = Sums.over(parts)
        assert sums.rescaler == pytest.approx(rescalers[task])
        lost = np.linalg.norm(vector - sums.rescaler * (found * agrees))
        assert sums.error == pytest.approx(lost / np.linalg.norm(vector) if vector.any() else 0.0, abs=1e-7)


def test_an_exact_tie_keeps_the_negative_entries():
    vectors = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    unified = unify(models=vectors, base=torch.zeros(3))
    assert unified.tolist() == [-1.0, -2.0, 0.0]
    assert [mask(task_vector=vector, unified=unified).tolist() for vector in vectors] == [
        [False, False, False],
        [True, True, False],
        [False, False, False],
    ]


class TestOnDisk:
    def test_what_is_restored_is_what_numpy_says(self, family, tmp_path):
        base, models = family
        made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, form="emr")
        start, states = backbones(base, models)
        for task, name in enumerate(NAMES):
            model = KIND.from_pretrained(cart_hf.restore(made.output, name, tmp_path / name))
            close(state(model, "roberta."), oracle_emr.restored(start, states, task))
            own = KIND.from_pretrained(models[task])
            assert model.config.id2label == own.config.id2label
            assert torch.equal(model.classifier.out_proj.weight, own.classifier.out_proj.weight)
        unified, masks, rescalers = oracle_emr.emr(start, states)
        assert [mask.rescaler for mask in made.masks.values()] == pytest.approx(rescalers, rel=1e-5)
        close(
            state(transformers.RobertaModel.from_pretrained(made.output / "unified")),
            {n: start[n] + unified[n] for n in start},
        )
        file = made.output / "masks" / "task1" / "mask.safetensors"
        bits = load_file(file)["mask.roberta.encoder.layer.0.output.dense.weight"]
        expected = masks[1]["encoder.layer.0.output.dense.weight"]
        np.testing.assert_array_equal(np.unpackbits(bits, count=expected.size).reshape(expected.shape), expected)
        assert made.masks["task1"].nbytes == file.stat().st_size
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert stored <= sum(-(-values.size // 8) for values in start.values()) + 8

    def test_slices_and_workers_change_no_byte(self, family, tmp_path, monkeypatch):
        options = {"base": family[0], "models": family[1], "form": "emr"}
        whole = cart_hf.compress(output=tmp_path / "whole", **options).output
        cart_hf.restore(whole, "task2", tmp_path / "one")
        monkeypatch.setattr(masked, "BLOCK", 16)
        for module in (masked, restoring):
            monkeypatch.setattr(module, "CHUNK", 48)
        cut = cart_hf.compress(output=tmp_path / "cut", workers=2, **options).output
        cart_hf.restore(cut, "task2", tmp_path / "two")
        files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
        assert len(files) == 10
        for here, there, names in ((whole, cut, files), (tmp_path / "one", tmp_path / "two", ["backbone.safetensors"])):
            assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)

    def test_half_types_lose_nothing_to_rounding(self, tmp_path):
        """Every entry of the unified model is one of some model's, or the base's."""
        base, models = make_family(tmp_path, "roberta", 2, dtype=torch.bfloat16)
        made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, form="emr")
        start, states = backbones(base, models)
        unified = state(transformers.RobertaModel.from_pretrained(made.output / "unified", add_pooling_layer=False))
        for name, values in unified.items():
            assert np.isin(values, np.stack([start[name], *(one[name] for one in states)])).all()
        restored = KIND.from_pretrained(cart_hf.restore(made.output, "task0", tmp_path / "again"))
        assert restored.dtype == torch.bfloat16
        close(state(restored, "roberta."), oracle_emr.restored(start, states, 0), atol=4e-3)

    def test_what_is_left_out_is_kept_whole(self, family, tmp_path):
        made = cart_hf.compress(
            output=tmp_path / "out", base=family[0], models=family[1], form="emr", exclude=["LayerNorm"]
        )
        restored = state(KIND.from_pretrained(cart_hf.restore(made.output, "task2", tmp_path / "again")))
        own = state(KIND.from_pretrained(family[1][2]))
        assert all((restored[name] == own[name]).all() for name in own if "LayerNorm" in name)

    def test_a_clip_has_its_text_tower(self, tmp_path):
        base, models = make_clip(tmp_path)
        made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, form="emr")
        found = state(transformers.CLIPModel.from_pretrained(cart_hf.restore(made.output, "task1", tmp_path / "again")))
        start = state(transformers.CLIPModel.from_pretrained(base))
        towers = [state(transformers.CLIPVisionModel.from_pretrained(folder)) for folder in models]
        vision = {name: start[f"vision_model.{name}"] for name in towers[0]}
        expected = oracle_emr.restored(vision, towers, 1)
        close(found, start | {f"vision_model.{name}": values for name, values in expected.items()})

    def test_a_model_that_is_the_base_stays_it(self, family, tmp_path):
        KIND.from_pretrained(family[0], num_labels=2).save_pretrained(tmp_path / "still")
        models = [family[1][0], str(tmp_path / "still")]
        made = cart_hf.compress(output=tmp_path / "out", base=family[0], models=models, form="emr")
        assert (made.masks["still"].rescaler, made.masks["still"].error) == (0.0, 0.0)
        restored = state(KIND.from_pretrained(cart_hf.restore(made.output, "still", tmp_path / "again")), "roberta.")
        close(restored, backbones(family[0], [])[0], atol=0)


class TestCommands:
    @pytest.fixture(scope="class")
    def stored(self, family, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("stored")
        shutil.copytree(family[0], folder / "base")
        words = ["--base", folder / "base", "--models", *family[1], "--output", folder / "out", "--form", "emr"]
        dry = json.loads(succeed("compress", *words, "--dry-run", "--format", "json").out)
        told = json.loads(succeed("compress", *words, "--format", "json").out)
        assert dry == {"unified": told["bytes"]["unified"], "masks": {n: t["bytes"] for n, t in told["tasks"].items()}}
        assert told["form"] == "emr"
        shown = succeed("compress", *words, "--overwrite").out
        assert f"{told['tasks']['task1']['rescaler']:.3f}" in shown
        assert f"cart-hf restore {folder / 'out'} task0 OUTPUT" in shown.replace("\n", "")
        return folder

    def test_a_base_that_has_moved_is_named(self, stored, tmp_path):
        (stored / "base").rename(stored / "moved")
        words = ["restore", stored / "out", "task0", tmp_path / "again"]
        refuse(tmp_path / "again", *words, naming=["base", "folder not found", "--base REF says where it is now"])
        assert "again" in succeed(*words, "--base", stored / "moved").out
        assert "exists" in call(*words, "--base", stored / "moved").err

    def test_what_cannot_be_restored(self, stored, family, tmp_path):
        out = tmp_path / "again"
        refuse(out, "restore", stored / "out", "tsk1", out, naming=["no task 'tsk1' - did you mean 'task1'"])
        refuse(out, "restore", family[0], "task1", out, naming=["holds no masks of EMR-Merging"])
        assert "`cart-hf restore` makes a task's model" in call("push", stored / "out", "me/x").err

    @pytest.mark.parametrize(
        ("words", "naming"),
        [
            (["--form", "emr", "--rank", "3"], ["compress: rank: emr makes masks"]),
            (["--form", "emr", "--push-to-hub", "me/x"], ["--push-to-hub: masks are not a model"]),
            (["--form", "emr", "--factors", "kept"], ["--factors: emr decomposes nothing"]),
            (["--form", "tsv_c", "--centre", "average"], ["centre: the adapters of tsv_c are of the base"]),
        ],
    )
    def test_what_a_form_says_nothing_about(self, family, tmp_path, words, naming):
        out = tmp_path / "out"
        refuse(out, "compress", "--base", family[0], "--models", *family[1], "--output", out, *words, naming=naming)

    @pytest.mark.parametrize("form", ["emr", "tsv_c"])
    def test_a_form_needs_the_base_and_several_models(self, family, tmp_path, form):
        out = tmp_path / "out"
        words = ["compress", "--output", out, "--form", form, "--models"]
        refuse(out, *words, *family[1], naming=["base_model", f"{form} works on task vectors"])
        refuse(out, *words, family[1][0], "--base", family[0], naming=["only one model", form])


def test_tsv_c_is_the_base_and_each_tasks_share_of_the_directions(family, tmp_path):
    base, models = family
    options = {"base": base, "models": models, "form": "tsv_c", "factors": tmp_path / "factors", "solver": "exact"}
    made = cart_hf.compress(output=tmp_path / "out", **options)
    start, states = backbones(base, models)
    for task, name in enumerate(NAMES):
        centre = KIND.from_pretrained(made.output, subfolder=f"tasks/{name}")
        close(state(centre, "roberta."), start, atol=0)
        model = PeftModel.from_pretrained(centre, made.output / "adapters" / name).merge_and_unload()
        expected = dict(states[task])  # all but matrices is restored
        for key, values in expected.items():
            if oracle.is_low_rank("roberta", key):
                expected[key] = start[key] + oracle_emr.top(values - start[key], min(values.shape) // 3)
        close(state(model, "roberta."), expected)
        assert made.adapters[name].left_out == {}
    words = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        together = cart_hf.MultiTaskModel.from_pretrained(made.output)(input_ids=words)["task2"].logits
        torch.testing.assert_close(together, model.eval()(input_ids=words).logits)
    assert "TSV-C" in (made.output / "README.md").read_text() + (made.output / "adapters/task0/README.md").read_text()
    kept = sorted(tmp_path.glob("factors/*"))
    cart_hf.compress(output=tmp_path / "base", **options | {"form": "cart", "centre": "base", "rank": 2})
    assert sorted(tmp_path.glob("factors/*")) == kept  # one decomposition around the base serves both


@pytest.mark.usefixtures("own_caches")
def test_rows_of_a_benchmark(tmp_path):
    compress = {"forms": ["tsv_c", "emr"]}
    data = recipe_of(tmp_path, make_world(tmp_path)) | {"benchmark": {"compress": compress}}
    recipe = cart_hf.Recipe.from_mapping(data)
    result = cart_hf.benchmark(recipe, output=tmp_path / "out", keep_models=True)
    rows = {row.name: row for row in result.rows}
    assert list(rows)[2:] == ["TSV-C", "EMR-Merging"]
    models, backbone = tmp_path / "out" / "models", rows["pretrained"].nbytes
    told = {name: json.loads((models / name / "compress.json").read_text())["bytes"] for name in list(rows)[2:]}
    assert rows["TSV-C"].nbytes == backbone + told["TSV-C"]["adapters"]
    assert rows["EMR-Merging"].nbytes == backbone + told["EMR-Merging"]["unified"] + told["EMR-Merging"]["masks"]
    again = cart_hf.restore(models / "EMR-Merging", TASKS[1], tmp_path / "again")
    measured = cart_hf.evaluate(again, recipe.evaluation.model_copy(update={"tasks": TASKS[1:2]}))
    assert rows["EMR-Merging"].results.tasks[TASKS[1]].score == measured.tasks[TASKS[1]].score
    assert all(list(row.results.tasks) == list(TASKS) for row in rows.values())


@pytest.mark.parametrize(
    ("compress", "words"),
    [
        ({"forms": ["emr"], "rank": [2]}, "rank: sizes are compared of CART-Indexing"),
        ({"forms": ["emr", "emr"]}, "two values for 'EMR-Merging'"),
        ({"forms": []}, "forms: no values to compare"),
    ],
)
def test_what_a_benchmark_cannot_compare(compress, words):
    data = {"merge_method": "cart", "models": ["a/b", "a/c"], "benchmark": {"compress": compress}}
    with pytest.raises(cart_hf.UserError, match=words):
        cart_hf.Recipe.from_mapping(data)


def test_another_form_takes_the_place_of_all_that_a_recipe_says():
    recipe = cart_hf.Recipe.from_mapping(
        {"merge_method": "cart", "models": ["a/b", "a/c"], "compress": {"rank": 4, "restore": "none"}}
    )
    changed = recipe.compress.changed({"form": "emr"})
    assert changed.model_dump(exclude_defaults=True) == {"form": "emr"}
    assert recipe.compress.changed({"rank_ratio": 0.5}).model_dump(exclude_defaults=True) == {
        "rank_ratio": 0.5,
        "restore": "none",
    }
