"""Adapters against plain PEFT, and against dense models that NumPy made: centre + best rank-k part, in float64."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from checkpoints import FAMILIES, make_clip, make_family
from commands import assert_absent, call, refuse, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file

import cart_hf
from cart_hf.compression.ranks import allot

WORDS = {
    "input_ids": torch.randint(5, 55, (4, 8), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(4, 8, dtype=torch.long),
}
IMAGES = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TASKS = ("task0", "task1", "task2")
TEXT = ("roberta", "bert", "gpt2")


@pytest.fixture(scope="module", params=TEXT)
def family(request, tmp_path_factory) -> tuple[str, str, list[str]]:
    base, models = make_family(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, base, models


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> tuple[str, list[str]]:
    return make_family(tmp_path_factory.mktemp("models"), "roberta")


@pytest.fixture(scope="module")
def alike(tmp_path_factory) -> tuple[str, list[str]]:
    """Models whose heads have one shape, which one batch may mix."""
    folder = tmp_path_factory.mktemp("alike")
    base, models = make_family(folder, "roberta", tasks=1)
    model = transformers.RobertaForSequenceClassification.from_pretrained(models[0])
    for seed in (5, 6):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        model.save_pretrained(folder / f"task{seed - 4}")
        models.append(str(folder / f"task{seed - 4}"))
    return base, models


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, list[str]]:
    return make_clip(tmp_path_factory.mktemp("clip"))


def logits(model, inputs=WORDS, **options) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs, **options).logits


def centre_of(folder: Path, kind, task: str):
    return kind.from_pretrained(folder, subfolder=f"tasks/{task}")


def adapted(folder: Path, kind, task: str) -> PeftModel:
    return PeftModel.from_pretrained(centre_of(folder, kind, task), folder / "adapters" / task)


def record(folder: Path) -> dict:
    return json.loads((folder / "compress.json").read_text())


def adapter_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def dense(name: str, kind, models: list[str], task: int, rank: int, restored: str) -> torch.nn.Module:
    """The model an adapter should amount to: everything the centre's, but for low-rank parts, and what is restored."""
    model = kind.from_pretrained(models[task])
    states = [kind.from_pretrained(folder).state_dict() for folder in models]
    prefix = model.base_model_prefix + "."
    mixed = {}
    for key, own in model.state_dict().items():
        short = key.removeprefix(prefix)
        if not key.startswith(prefix) or not all(key in state for state in states):
            continue  # the head
        stack = np.stack([state[key].numpy().astype(np.float64) for state in states])
        centre = stack.mean(axis=0)
        if oracle.is_low_rank(name, short):
            mixed[key] = centre + oracle.truncate(stack[task] - centre, rank)
        else:
            mixed[key] = own.numpy() if re.search(restored, short) else centre
    model.load_state_dict({key: torch.from_numpy(value).float() for key, value in mixed.items()}, strict=False)
    return model


SMALL_TENSORS = {
    "roberta": r"LayerNorm|encoder.*bias$",
    "bert": r"LayerNorm|encoder.*bias$",
    "gpt2": r"ln_|h\..*bias$",
}


def test_plain_peft_loads_an_adapter_as_centre_and_low_rank_part(family, tmp_path):
    name, base, models = family
    kind = FAMILIES[name][2]
    made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, rank=3, solver="exact")
    for task in (0, 2):
        found = logits(adapted(made.output, kind, TASKS[task]))
        expected = logits(dense(name, kind, models, task, 3, SMALL_TENSORS[name]))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(logits(adapted(made.output, kind, TASKS[task]).merge_and_unload()), found)


def test_at_full_rank_with_all_restored_it_is_the_original(family, tmp_path):
    name, base, models = family
    kind = FAMILIES[name][2]
    made = cart_hf.compress(
        output=tmp_path / "out", base=base, models=models, rank_ratio=1.0, restore="all", solver="exact"
    )
    for task, folder in zip(TASKS, models, strict=True):
        own = logits(kind.from_pretrained(folder))
        torch.testing.assert_close(logits(adapted(made.output, kind, task)), own, rtol=0, atol=1e-6)
        assert record(made.output)["tasks"][task]["error"] == 0
        assert record(made.output)["tasks"][task]["left_out"] == {}


def test_without_its_adapter_it_is_the_centre(family, tmp_path):
    name, base, models = family
    kind = FAMILIES[name][2]
    made = cart_hf.compress(output=tmp_path / "out", base=base, models=models[:2], rank=4)
    with torch.no_grad():
        bare = transformers.AutoModel.from_pretrained(made.output).eval()(**WORDS)[0]
    model = adapted(made.output, kind, "task0").eval()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model.get_base_model().base_model(**WORDS)[0], bare)


def test_adapters_of_equal_heads_switch(alike, tmp_path):
    base, models = alike
    kind = transformers.RobertaForSequenceClassification
    made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, rank=4)
    adapters = made.output / "adapters"
    model = PeftModel.from_pretrained(centre_of(made.output, kind, "task0"), adapters / "task0", adapter_name="task0")
    for task in TASKS[1:]:
        model.load_adapter(adapters / task, adapter_name=task)
    for task in ("task2", "task0", "task1"):
        model.set_adapter(task)
        torch.testing.assert_close(logits(model), logits(adapted(made.output, kind, task)))


def test_with_nothing_restored_one_batch_mixes_tasks(alike, tmp_path):
    base, models = alike
    kind = transformers.RobertaForSequenceClassification
    made = cart_hf.compress(output=tmp_path / "out", base=base, models=models, rank=4, restore="none")
    adapters = made.output / "adapters"
    model = PeftModel.from_pretrained(centre_of(made.output, kind, "task0"), adapters / "task0", adapter_name="task0")
    model.load_adapter(adapters / "task1", adapter_name="task1")
    rows = ["task0", "task1", "task1", "task0"]
    mixed = logits(model, adapter_names=rows)
    each = {task: logits(adapted(made.output, kind, task)) for task in TASKS[:2]}
    torch.testing.assert_close(mixed, torch.stack([each[task][i] for i, task in enumerate(rows)]))
    restored = dense("roberta", kind, models, 0, 4, r"nothing")
    torch.testing.assert_close(each["task0"], logits(restored), rtol=0, atol=1e-4)


def test_what_else_loads_an_adapter(roberta, tmp_path):
    kind = transformers.RobertaForSequenceClassification
    made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1], rank=2)
    adapter = made.output / "adapters" / "task1"
    expected = logits(adapted(made.output, kind, "task1"))
    for load in (AutoPeftModelForSequenceClassification, transformers.AutoModelForSequenceClassification):
        torch.testing.assert_close(logits(load.from_pretrained(adapter)), expected)
    config = adapter_config(adapter)
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("SEQ_CLS", 2, 2)
    assert config["modules_to_save"][-1] == "classifier"
    assert all(module.startswith("roberta.encoder.layer.") for module in config["target_modules"])
    assert config["target_modules"] == sorted(config["target_modules"])


class TestClip:
    @pytest.fixture(scope="class")
    def made(self, clip, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("compressed") / "out"
        options = {"rank_ratio": 1.0, "restore": "all", "solver": "exact"}
        return cart_hf.compress(output=folder, base=clip[0], models=clip[1], **options).output

    def test_the_vision_tower_is_the_original_and_the_text_tower_untouched(self, clip, made):
        base = transformers.CLIPModel.from_pretrained(clip[0]).eval()
        for task, folder in zip(TASKS, clip[1], strict=True):
            centre = transformers.CLIPModel.from_pretrained(made)
            model = PeftModel.from_pretrained(centre, made / "adapters" / task).eval()
            whole = transformers.CLIPModel.from_pretrained(clip[0])
            tower = transformers.CLIPVisionModel.from_pretrained(folder)
            whole.vision_model.load_state_dict(tower.state_dict())
            with torch.no_grad():
                found = model.get_image_features(**IMAGES).pooler_output
                torch.testing.assert_close(
                    found, whole.eval().get_image_features(**IMAGES).pooler_output, atol=2e-6, rtol=0
                )
                words = {"input_ids": torch.tensor([[57, 3, 4, 58]])}
                text = model.get_text_features(**words).pooler_output
                assert torch.equal(text, base.get_text_features(**words).pooler_output)

    def test_it_names_its_layers_in_full(self, made):
        config = adapter_config(made / "adapters" / "task0")
        assert all(module.startswith("vision_model.encoder.layers.") for module in config["target_modules"])
        assert config["task_type"] is None
        assert config["auto_mapping"]["base_model_class"] == "CLIPModel"
        assert isinstance(AutoPeftModel.from_pretrained(made / "adapters" / "task0"), PeftModel)

    def test_mixed_batches(self, clip, tmp_path):
        made = cart_hf.compress(output=tmp_path / "out", base=clip[0], models=clip[1], rank=4, restore="none").output

        adapters = made / "adapters"
        model = PeftModel.from_pretrained(
            transformers.CLIPModel.from_pretrained(made), adapters / "task0", adapter_name="task0"
        ).eval()
        model.load_adapter(adapters / "task1", adapter_name="task1")
        inputs = {**IMAGES, "input_ids": torch.tensor([[57, 3, 4, 58]] * 4)}
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=["task0", "task1", "task0", "task1"]).image_embeds
            for task in ("task0", "task1"):
                model.set_adapter(task)
                alone = model(**inputs).image_embeds
                rows = [0, 2] if task == "task0" else [1, 3]
                torch.testing.assert_close(mixed[rows], alone[rows])


class TestRanks:
    def test_energy_keeps_the_least_that_is_enough(self, roberta, tmp_path):
        made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1], energy=0.7, solver="exact")
        kind = transformers.RobertaForSequenceClassification
        states = [kind.from_pretrained(folder).state_dict() for folder in roberta[1]]
        config = adapter_config(made.output / "adapters" / "task1")
        layers = record(made.output)["tasks"]["task1"]["layers"]
        assert len({layer["rank"] for layer in layers.values()}) > 1
        for module, layer in layers.items():
            stack = np.stack([state[f"{module}.weight"].numpy().astype(np.float64) for state in states])
            difference = stack[1] - stack.mean(axis=0)
            rank = oracle.energy_rank(difference, 0.7)
            assert layer["rank"] == rank == config["rank_pattern"].get(module, config["r"])
            assert config["alpha_pattern"] == config["rank_pattern"]
            error = np.linalg.norm(difference - oracle.truncate(difference, rank)) / np.linalg.norm(difference)
            assert layer["error"] == pytest.approx(error, abs=1e-4)
            assert layer["difference"] == pytest.approx(np.linalg.norm(difference), rel=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_budget_is_kept_and_used(self, roberta, tmp_path, dtype):
        made = cart_hf.compress(
            output=tmp_path / "out", base=roberta[0], models=roberta[1], budget="18kB", adapter_dtype=dtype
        )
        for name, adapter in made.adapters.items():
            size = (made.output / "adapters" / name / "adapter_model.safetensors").stat().st_size
            assert size == adapter.nbytes == record(made.output)["tasks"][name]["bytes"]
            assert 0.9 * 18_000 < size <= 18_000

    @given(
        st.lists(
            st.tuples(st.lists(st.floats(0.01, 10), min_size=1, max_size=4), st.integers(1, 5)), min_size=1, max_size=3
        ),
        st.integers(0, 40),
    )
    @settings(max_examples=60, deadline=None)
    def test_no_other_division_of_what_was_spent_is_better(self, matrices, extra):
        spectra = [np.array(sorted(values, reverse=True)) for values, _ in matrices]
        costs = [cost for _, cost in matrices]
        budget = sum(costs) + extra
        ranks = allot(spectra, costs, budget)
        spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        assert spent <= budget
        assert all(1 <= rank <= len(values) for rank, values in zip(ranks, spectra, strict=True))

        def gain(chosen: tuple[int, ...]) -> float:
            return sum(float((values[:rank] ** 2).sum()) for values, rank in zip(spectra, chosen, strict=True))

        others = itertools.product(*(range(1, len(values) + 1) for values in spectra))
        rivals = [o for o in others if sum(r * c for r, c in zip(o, costs, strict=True)) <= spent]
        assert gain(tuple(ranks)) >= max(map(gain, rivals)) - 1e-9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_factors(roberta, tmp_path, dtype):
    kind = transformers.RobertaForSequenceClassification
    options = {"base": roberta[0], "models": roberta[1], "rank_ratio": 1.0, "restore": "all"}
    made = cart_hf.compress(output=tmp_path / "half", adapter_dtype=dtype, **options)
    tensors = load_file(made.output / "adapters" / "task0" / "adapter_model.safetensors")
    types = {str(tensor.dtype) for name, tensor in tensors.items() if name.endswith(("lora_A.weight", "lora_B.weight"))}
    assert types == {f"torch.{dtype}"}
    error = record(made.output)["tasks"]["task0"]["error"]
    assert 1e-5 < error < (2e-2 if dtype == "bfloat16" else 2e-3)
    own = logits(kind.from_pretrained(roberta[1][0]))
    torch.testing.assert_close(logits(adapted(made.output, kind, "task0")), own, rtol=0, atol=10 * error)


class TestOneModel:
    def test_its_adapter_is_for_the_base(self, family, tmp_path):
        name, base, models = family
        kind = FAMILIES[name][2]
        made = cart_hf.compress(
            output=tmp_path / "out", base=base, models=[models[1]], rank_ratio=1.0, restore="all", solver="exact"
        )
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in made.output.iterdir()}
        assert not (made.output / "adapters").exists()
        config = adapter_config(made.output)
        assert Path(config["base_model_name_or_path"]) == Path(base)
        own = kind.from_pretrained(models[1])
        start = kind.from_pretrained(base, num_labels=own.config.num_labels)
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(start, made.output)), logits(own), rtol=0, atol=1e-6
        )

    def test_it_is_the_best_of_its_rank(self, roberta, tmp_path):
        made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1][:1], rank=2, solver="exact")
        kind = transformers.RobertaForSequenceClassification
        own, start = (
            kind.from_pretrained(roberta[1][0]).state_dict(),
            transformers.AutoModel.from_pretrained(roberta[0]),
        )
        tensors = load_file(made.output / "adapter_model.safetensors")
        for module in adapter_config(made.output)["target_modules"]:
            before = start.state_dict()[f"{module.removeprefix('roberta.')}.weight"].numpy().astype(np.float64)
            best = oracle.truncate(own[f"{module}.weight"].numpy() - before, 2)
            a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].numpy() for side in "AB")
            np.testing.assert_allclose(b @ a, best, atol=1e-6)

    def test_a_tensor_that_the_base_lacks_comes_along(self, tmp_path):
        """BERT's pooler: a masked language model has none."""
        base, models = make_family(tmp_path, "bert", tasks=1)
        transformers.BertForMaskedLM.from_pretrained(base).save_pretrained(tmp_path / "masked")
        made = cart_hf.compress(
            output=tmp_path / "out", base=str(tmp_path / "masked"), models=models, rank=2, restore="none"
        )
        assert record(made.output)["tasks"]["task0"]["restored"] == ["bert.pooler.dense"]
        tensors = load_file(made.output / "adapter_model.safetensors")
        own = transformers.BertForSequenceClassification.from_pretrained(models[0]).state_dict()
        name = "bert.pooler.dense.weight"
        assert torch.equal(tensors[f"base_model.model.{name}"], own[name])

    def test_it_needs_the_base(self, roberta, tmp_path):
        refuse(tmp_path / "out", "compress", "--models", roberta[1][0], "--output", tmp_path / "out", naming=["--base"])


def test_the_recipe_in_the_output_gives_the_same_bytes(roberta, tmp_path):
    options = ["--restore", "none", "--adapter-dtype", "bfloat16", "--budget", "14kB"]
    words = ["--base", roberta[0], "--models", *(f"{t}={m}" for t, m in zip("abc", roberta[1], strict=True))]
    answer = succeed("compress", *words, *options, "--output", tmp_path / "one")
    assert re.search(r"^a +\d+-\d+ +0\.\d+ +1[23]\.\d kB", answer.out, re.M)
    succeed("compress", tmp_path / "one" / "cart_hf.yaml", tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    one, two = (adapter_config(tmp_path / name / "adapters" / "a") for name in ("one", "two"))
    places = [config.pop("base_model_name_or_path") for config in (one, two)]
    assert places == [str(tmp_path / name / "tasks" / "a") for name in ("one", "two")]
    assert one == two


def test_a_merge_and_a_compression_share_their_factors(roberta, tmp_path):
    factors = tmp_path / "factors"
    cart_hf.compress(output=tmp_path / "one", base=roberta[0], models=roberta[1], rank=4, factors=factors)
    times = {path.name: path.stat().st_mtime_ns for path in factors.iterdir()}
    assert len(times) == 12
    merged = cart_hf.merge(output=tmp_path / "two", base=roberta[0], models=roberta[1], rank=3, factors=factors)
    assert merged.factors_found == 12
    cart_hf.compress(output=tmp_path / "three", base=roberta[0], models=roberta[1], rank=2, factors=factors)
    assert {path.name: path.stat().st_mtime_ns for path in factors.iterdir()} == times
    cart_hf.compress(output=tmp_path / "four", base=roberta[0], models=roberta[1][:1], rank=2, factors=factors)
    assert len(list(factors.iterdir())) == 24  # around the base they are others


def test_the_dry_run_says_what_will_be(roberta, tmp_path):
    words = ["--base", roberta[0], "--models", *roberta[1], "--rank", "3"]
    shown = json.loads(succeed("compress", *words, "--dry-run", "--format", "json").out)
    made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1], rank=3)
    for estimate in shown:
        adapter = made.adapters[estimate["task"]]
        assert adapter.nbytes <= estimate["nbytes"] < adapter.nbytes + 1500  # of header
        assert (estimate["ranks"], estimate["layers"], estimate["restored"]) == ([3, 3], 12, 5)
    full = call("compress", "--base", roberta[0], "--models", *roberta[1], "--rank", "16", "--dry-run")
    assert "take more bytes than the layers themselves" in full.err
    assert not list(tmp_path.glob(".out*"))


def test_bytes_are_what_is_on_the_disk(roberta, tmp_path):
    made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1], rank=3).output
    found = record(made)["bytes"]
    assert found["centre"] == sum(t.numel() * 4 for t in load_file(made / "model.safetensors").values())
    assert found["adapters"] == sum(path.stat().st_size for path in made.glob("adapters/*/adapter_model.safetensors"))
    assert found["models"] == sum(
        t.numel() * 4 for folder in roberta[1] for t in load_file(Path(folder) / "model.safetensors").values()
    )


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _models(self, roberta, tmp_path) -> Iterator[None]:
        self.words = ["compress", "--base", roberta[0], "--models", *roberta[1], "--output", tmp_path / "out"]
        self.output = tmp_path / "out"
        yield
        assert_absent(self.output)

    @pytest.mark.parametrize(
        ("more", "naming"),
        [
            (["--budget", "9kB"], ["--budget", "task0", "one direction of each layer", "give more"]),
            (["--budget", "many"], ["compress.budget", "not a size"]),
            (["--rank", "3", "--energy", "0.5"], ["rank and energy exclude each other"]),
            (["--rank-ratio", "1.5"], ["compress.rank_ratio", "at most 1"]),
            (["--exclude", "encoder"], ["low-rank: 0 of"]),
        ],
    )
    def test_what_cannot_be(self, more, naming):
        refuse(self.output, *self.words, *more, naming=naming)

    def test_a_model_with_nan(self, roberta, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        for path in Path(roberta[1][0]).iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        tensors = load_file(broken / "model.safetensors")
        tensors["classifier.dense.weight"][0, 0] = float("nan")
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        words = ["compress", "--base", roberta[0], "--models", broken, *roberta[1][1:], "--output", self.output]
        refuse(self.output, *words, naming=["classifier.dense.weight", "broken", "NaN"])

    def test_an_unknown_key(self, roberta, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        models = "".join(f"  - {folder}\n" for folder in roberta[1])
        recipe.write_text(f"merge_method: cart\nmodels:\n{models}compress: {{budgt: 3MB}}\n")
        refuse(self.output, "compress", recipe, self.output, naming=["compress.budgt", "budget"])


def test_an_output_is_replaced_only_when_told(roberta, tmp_path):
    words = ["compress", "--base", roberta[0], "--models", *roberta[1], "--rank", "1", "--output", tmp_path / "out"]
    succeed(*words)
    assert "exists" in call(*words).err
    succeed(*words, "--overwrite")
    alone = ["compress", "--base", roberta[0], "--models", roberta[1][0], "--rank", "1", "--output", tmp_path / "one"]
    succeed(*alone)
    succeed(*alone, "--overwrite")


def test_an_adapter_is_a_source_again(roberta, tmp_path):
    """Extracted from fine-tunes at full rank, adapters merge as these do."""
    options = {"base": roberta[0], "rank": 3}
    for name, model in zip(TASKS, roberta[1], strict=True):
        cart_hf.compress(
            output=tmp_path / name, base=roberta[0], models=[model], rank_ratio=1.0, restore="all", solver="exact"
        )
    cart_hf.merge(models=roberta[1], output=tmp_path / "whole", **options)
    cart_hf.merge(models=[str(tmp_path / name) for name in TASKS], output=tmp_path / "lora", **options)
    whole, lora = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "lora"))
    assert whole.keys() == lora.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(lora[name], tensor, rtol=0, atol=5e-6)


def test_adapters_of_the_base_lie_apart(roberta, tmp_path):
    """Each is an adapter like any other; the folder of all of them is none."""
    made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=roberta[1], rank=2, centre="base")
    assert made.centre_bytes == 0
    for name, labels in zip(TASKS, (2, 3, 4), strict=True):
        folder = made.output / "adapters" / name
        assert list(record(folder)["tasks"]) == [name]
        assert [model["name"] for model in record(folder)["models"]] == [name]
        start = transformers.RobertaForSequenceClassification.from_pretrained(roberta[0], num_labels=labels)
        assert logits(PeftModel.from_pretrained(start, folder)).shape == (4, labels)
        assert "num_labels=" + str(labels) in (folder / "README.md").read_text()
    words = ["merge", "--base", roberta[0], "--models", made.output, *roberta[1], "--output", tmp_path / "merged"]
    refuse(tmp_path / "merged", *words, naming=["name an adapter in it", "adapters/task0"])
    assert "push each of" in call("push", made.output, "me/x").err


def test_layers_that_do_not_differ_are_left_alone(roberta, tmp_path):
    kind = transformers.RobertaForSequenceClassification
    model = kind.from_pretrained(roberta[0], num_labels=3)
    changed, shifted = "roberta.encoder.layer.0.attention.self.query", "roberta.encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(changed).weight[0, 0] += 1
        model.get_submodule(shifted).bias += 0.5
    model.save_pretrained(tmp_path / "model")
    made = cart_hf.compress(output=tmp_path / "out", base=roberta[0], models=[str(tmp_path / "model")], rank=4)
    assert adapter_config(made.output)["target_modules"] == [changed, shifted]
    assert adapter_config(made.output)["r"] == 1  # all there is
    start = kind.from_pretrained(roberta[0], num_labels=3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(start, made.output)), logits(model))


def test_a_model_that_is_the_base_needs_no_adapter(roberta, tmp_path):
    kind = transformers.RobertaForSequenceClassification
    kind.from_pretrained(roberta[0], num_labels=3).save_pretrained(tmp_path / "model")
    words = ["compress", "--base", roberta[0], "--models", tmp_path / "model", "--output", tmp_path / "out"]
    refuse(tmp_path / "out", *words, naming=["model: none of its layers differs"])
