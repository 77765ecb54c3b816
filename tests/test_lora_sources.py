"""LoRA adapters as merge sources: as good as PEFT's own merge of adapter and base, and nothing dropped in silence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, clip_config, copy_backbone, perturb, roberta_config, save
from commands import Answer, assert_absent, refuse, run_cli, succeed
from hub_server import serving
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

import cart_hf
from cart_hf.errors import UserError
from cart_hf.output.state import State, check_unchanged
from cart_hf.plan import Plan, lay_out
from cart_hf.recipe import Recipe, Reference
from cart_hf.sources import Checkpoint, open_checkpoint, open_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT: lora_bias, tied weights, fan_in_fan_out

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "roberta.encoder.layer.0.attention.self.query"
A_OF_QUERY, B_OF_QUERY = (f"base_model.model.{QUERY}.lora_{side}.weight" for side in "AB")


def train(model: torch.nn.Module, labels: int, steps: int = 4) -> None:
    """Take a few optimizer steps on random words."""
    generator = torch.Generator().manual_seed(labels)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        words = torch.randint(3, 60, (8, 12), generator=generator)
        loss = model(input_ids=words, labels=words.sum(1) % labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapted(model: PreTrainedModel, folder: Path, seed: int = 1, **options: Any) -> PreTrainedModel:
    """Give a model an adapter whose every number is random, save it, and return PEFT's merge of both."""
    peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
    trained = torch.nn.ModuleList()
    trained.parameters = lambda: (p for p in peft.parameters() if p.requires_grad)
    perturb(trained, seed, size=0.2)
    return keep(peft, folder)


def keep(peft: PeftModel, folder: Path, **options: Any) -> PreTrainedModel:
    """Save an adapter, and return PEFT's merge of it and its base."""
    peft.save_pretrained(folder, **options)
    return copy.deepcopy(peft).merge_and_unload()


def checkpoint_of(reference: object) -> Checkpoint:
    return open_checkpoint("a", Reference.parse(str(reference)))


def assert_reads(checkpoint: Checkpoint, expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Assert that a checkpoint has exactly these tensors, whole and in slices that begin and end anywhere."""
    owners = {name: tensor for name, tensor in expected.items() if name not in checkpoint.architecture.tied}
    assert set(checkpoint.tensors) == set(owners)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in owners.items():
        flat = tensor.detach().reshape(-1)
        spans = [(0, len(flat))]
        for _ in range(3):
            spans.append(tuple(sorted(torch.randint(0, len(flat) + 1, (2,), generator=generator).tolist())))
        for start, stop in spans:
            for dtype in (torch.float32, torch.float64):
                out = torch.empty(stop - start, dtype=dtype)
                checkpoint.read_into(out, name, start)
                torch.testing.assert_close(out, flat[start:stop].to(dtype), atol=tolerance, rtol=0, msg=name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of an output, heads too."""
    files = (path for path in sorted(folder.rglob("*.safetensors")) if "backbone" not in path.name)
    return {f"{path.parent.name}/{name}": t for path in files for name, t in load_file(path).items() if path.parent}


def assert_alike(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    found, expected = weights(one), weights(other)
    found = {name.replace(f"{one.name}/", "", 1): tensor for name, tensor in found.items()}
    expected = {name.replace(f"{other.name}/", "", 1): tensor for name, tensor in expected.items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0, msg=name)


@dataclass(frozen=True)
class Trained:
    """A base, trained adapters on it, the same as whole models, and a full fine-tune."""

    folder: Path
    base: str
    adapters: list[str]
    whole: list[str]
    full: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    base = RobertaForMaskedLM(roberta_config())
    save(base, folder / "base")
    for task in range(3):
        model = RobertaForSequenceClassification.from_pretrained(folder / "base", num_labels=task + 2)
        settings = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value", "dense"])
        settings.exclude_modules = ["classifier.dense"]
        peft = get_peft_model(model, settings)
        train(peft, labels=task + 2)
        save(keep(peft, folder / f"task{task}"), folder / "whole" / f"task{task}")
        (folder / f"task{task}" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": task}))
        shutil.copy(folder / f"task{task}" / "tokenizer_config.json", folder / "whole" / f"task{task}")
    full = RobertaForSequenceClassification(roberta_config(num_labels=5))
    copy_backbone(full, base)
    perturb(full, seed=9)
    save(full, folder / "full")
    return Trained(
        folder,
        str(folder / "base"),
        [str(folder / f"task{task}") for task in range(3)],
        [str(folder / "whole" / f"task{task}") for task in range(3)],
        str(folder / "full"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Merging adapters is merging the models that PEFT makes of them
# ---------------------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "weighted sum": {"method": "average", "weights": [1, 2, 3]},
    "cart": {"rank_ratio": 0.3, "scale": 1.5},
    "fused cart": {"method": "cart", "rank_ratio": 0.3, "fuse_qkv": True},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.3},
    "consensus": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_adapters_merge_as_the_models_they_make(trained, tmp_path, name):
    options = {"method": name, **METHODS[name]}
    cart_hf.merge(base=trained.base, models=trained.adapters, output=tmp_path / "a", **options)
    cart_hf.merge(base=trained.base, models=trained.whole, output=tmp_path / "b", **options)
    assert_alike(tmp_path / "a", tmp_path / "b", 2e-6)
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert one == other


@pytest.mark.parametrize("method", ["cart", "ties"])
def test_adapters_and_full_fine_tunes_mix(trained, tmp_path, method):
    for output, models in (("a", trained.adapters), ("b", trained.whole)):
        cart_hf.merge(base=trained.base, models=[*models[:2], trained.full], method=method, output=tmp_path / output)
    assert_alike(tmp_path / "a", tmp_path / "b", 2e-6)


def test_without_a_base_in_the_recipe(trained, tmp_path):
    """The adapters' own base is what fills the tensors that none of them changes."""
    cart_hf.merge(models=trained.adapters, output=tmp_path / "a", rank_ratio=0.3)
    cart_hf.merge(models=trained.whole, output=tmp_path / "b", rank_ratio=0.3)
    assert_alike(tmp_path / "a", tmp_path / "b")
    base, merged = load_file(Path(trained.base) / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    untouched = [name for name in merged if ".key." in name]
    assert untouched
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


def test_every_task_answers_with_its_own_head(trained, tmp_path):
    cart_hf.merge(base=trained.base, models=trained.adapters, output=tmp_path / "out")
    words = torch.tensor([[5, 6, 7, 8]])
    for i, adapter in enumerate(trained.adapters):
        whole = AutoModelForSequenceClassification.from_pretrained(trained.whole[i])
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "tasks" / Path(adapter).name)
        torch.testing.assert_close(model.classifier.state_dict(), whole.classifier.state_dict())
        assert model(words).logits.shape == (1, i + 2)
        settings = (tmp_path / "out" / "tasks" / Path(adapter).name / "tokenizer_config.json").read_text()
        assert json.loads(settings)["model_max_length"] == i


def plan_of(**recipe: Any) -> Plan:
    return cart_hf.api.plan_merge(Recipe.from_mapping({"merge_method": "cart", **recipe}))


def test_what_no_adapter_changes_is_copied(trained):
    plan = plan_of(base_model=trained.base, models=trained.adapters)
    roles = {tensor.name: (tensor.role, tensor.reason) for tensor in plan.tensors}
    assert roles["encoder.layer.0.attention.self.key.weight"] == ("base", "changed by no model")
    assert roles["encoder.layer.0.attention.self.query.weight"][0] == "low_rank"
    assert plan.count("low_rank") == 10
    # one model that changes everything, and everything is computed again
    mixed = plan_of(base_model=trained.base, models=[trained.adapters[0], trained.full])
    # a sum of the models, and not their mean, is not the base where they all are
    summed = plan_of(merge_method="linear", models=trained.adapters, parameters={"normalize": False})
    for plan in (mixed, summed):
        assert not [tensor for tensor in plan.tensors if tensor.reason == "changed by no model"]


def test_a_dry_run_says_what_no_adapter_changes(trained):
    words = ["merge", "--base", trained.base, "--models", *trained.adapters, "--dry-run"]
    told = succeed(*words).out
    assert "changed by no model" in told
    assert "low-rank: 10 of " in told
    assert "belong to no part" not in told
    groups = json.loads(succeed(*words, "--format", "json").out)["groups"]
    assert {group["role"] for group in groups if group["reason"] == "changed by no model"} == {"base"}


def test_low_rank_methods_need_something_to_decompose(trained, tmp_path):
    model = RobertaForSequenceClassification.from_pretrained(trained.base, num_labels=2)
    for name in ("a", "b"):
        adapted(copy.deepcopy(model), tmp_path / name, target_modules=["word_embeddings"], task_type="SEQ_CLS")
    words = ["merge", "--base", trained.base, "--models", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out"]
    refuse(tmp_path / "out", *words, naming=["nothing to decompose", "--method average"])
    succeed(*words, "--method", "average")


def test_the_resolved_recipe_gives_the_same_bytes(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.folder)
    models = ["one=base+task0", "task1", str(trained.folder / "full")]
    cart_hf.merge(base="base", models=models, output=tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load(tmp_path / "first" / "cart_hf.yaml")
    assert [str(entry.model) for entry in recipe.models][:2] == [
        f"{trained.base}+{trained.adapters[0]}",
        f"{trained.base}+{trained.adapters[1]}",
    ]
    cart_hf.merge(recipe, output=tmp_path / "second")
    assert_alike(tmp_path / "first", tmp_path / "second", 0)
    model = json.loads((tmp_path / "first" / "merge.json").read_text())["models"][1]
    assert model["reference"] == f"{trained.base}+task1" or model["reference"].endswith("base+task1")
    assert model["adapts"]["class"] == "RobertaForMaskedLM"
    assert set(model["files"]) == {WEIGHTS, "base/model.safetensors"}


def test_factors_are_those_of_this_adapter_on_this_base(trained, tmp_path):
    """An adapter whose settings or weights change, and one on another base, find none of the factors that were kept."""
    shutil.copytree(trained.folder, tmp_path / "models")
    base, adapters = tmp_path / "models" / "base", [tmp_path / "models" / f"task{i}" for i in range(3)]
    models = [f"{base}+{adapter}" for adapter in adapters]

    def found(output: str) -> int:
        return cart_hf.merge(
            base=str(base), models=models, output=tmp_path / output, factors=tmp_path / "f"
        ).factors_found

    assert [found("1"), found("2")] == [0, 10]
    settings = json.loads((adapters[0] / CONFIG).read_text())
    (adapters[0] / CONFIG).write_text(json.dumps(settings | {"lora_alpha": 7}))
    assert found("3") == 0
    state = load_file(adapters[1] / WEIGHTS)
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, adapters[1] / WEIGHTS, {"format": "pt"})
    assert found("4") == 0
    state = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    assert found("5") == 0


def test_settings_and_base_are_part_of_what_is_merged(trained, tmp_path):
    """What tells one merge, and one model, from another sees a changed scaling, and another base."""

    def state() -> tuple[State, str]:
        plan = plan_of(base_model=trained.base, models=[*trained.adapters[:2], str(tmp_path / "adapter")])
        return State.of(plan, lay_out(plan), tmp_path / "out", {}), plan.models[2].fingerprint()

    shutil.copytree(trained.adapters[2], tmp_path / "adapter")
    before = state()
    assert state() == before
    settings(lora_alpha=7)(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"config\.json has changed"):
        check_unchanged(before[0], state()[0])
    assert before[1] != state()[1]
    shutil.copytree(trained.base, tmp_path / "other")
    perturbed = {k: v + 1 for k, v in load_file(tmp_path / "other" / "model.safetensors").items()}
    save_file(perturbed, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    one, other = (checkpoint_of(f"{base}+{tmp_path / 'adapter'}") for base in (trained.base, tmp_path / "other"))
    assert one.fingerprint() != other.fingerprint()


def test_an_adapter_of_another_base_is_a_warning(trained, tmp_path):
    shutil.copytree(trained.base, tmp_path / "other")
    models = [trained.adapters[0], f"{tmp_path / 'other'}+{trained.adapters[1]}", trained.adapters[2]]
    (warning,) = plan_of(base_model=trained.base, models=models).warnings
    assert warning.startswith(f"task1 is an adapter of {tmp_path / 'other'}, and not of the base, {trained.base}")


# ---------------------------------------------------------------------------------------------------------------------
# What PEFT can write
# ---------------------------------------------------------------------------------------------------------------------


def classifier(family: str, folder: Path) -> PreTrainedModel:
    """Save a base, and return a classifier that starts from it."""
    config, base_class, task_class = FAMILIES[family]
    torch.manual_seed(0)
    base = save(base_class(config()), folder / "base")
    return task_class.from_pretrained(base, num_labels=3)


SEQ_CLS = {"task_type": "SEQ_CLS"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks and alphas by module": (
        "roberta",
        SEQ_CLS
        | {"target_modules": ["query", "dense"], "exclude_modules": ["classifier.dense"]}
        | {
            "rank_pattern": {r"layer\.\d+\.output.dense": 2, "query": 4},
            "alpha_pattern": {"0.attention.self.query": 9},
        },
    ),
    "rsLoRA": ("roberta", SEQ_CLS | {"target_modules": ["query"], "use_rslora": True}),
    "bias of B": ("roberta", SEQ_CLS | {"target_modules": ["query", "value"], "lora_bias": True}),
    "all biases": ("roberta", SEQ_CLS | {"target_modules": ["query"], "bias": "all"}),
    "biases of the adapted": ("roberta", SEQ_CLS | {"target_modules": ["query"], "bias": "lora_only"}),
    "embedding": ("roberta", SEQ_CLS | {"target_modules": ["query", "word_embeddings"]}),
    "saved modules": (
        "roberta",
        {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "key", "classifier"]},
    ),
    "BERT": ("bert", SEQ_CLS | {"target_modules": ["query", "key", "value", "pooler.dense"]}),
    "DistilBERT": ("distilbert", SEQ_CLS | {"target_modules": ["q_lin", "v_lin"]}),
    "GPT-2": ("gpt2", SEQ_CLS | {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "ViT with its patches": (
        "vit",
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path, name):
    family, options = VARIANTS[name]
    whole = adapted(classifier(family, tmp_path), tmp_path / "adapter", **options)
    checkpoint = checkpoint_of(tmp_path / "adapter")
    assert checkpoint.architecture.class_name == type(whole).__name__
    assert len(checkpoint.config["id2label"]) == 3
    assert_reads(checkpoint, whole.state_dict())


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_an_embedding_that_is_tied_to_the_output_layer(tmp_path, target):
    """PEFT may save it beside its factors, and the output layer that is a copy of it."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(save(LlamaForCausalLM(config), tmp_path / "base"))
    peft = get_peft_model(model, LoraConfig(target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False))
    whole = keep(peft, tmp_path / "a", save_embedding_layers=True)
    kept = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "a" / WEIGHTS)}
    assert kept & {"lm_head.weight", "model.embed_tokens.base_layer.weight"}
    assert_reads(checkpoint_of(tmp_path / "a"), whole.state_dict())


def test_half_precision_is_not_rounded_before_the_sum(tmp_path):
    model = classifier("roberta", tmp_path)
    save(model.base_model.to(torch.bfloat16), tmp_path / "base")
    model = RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32)
    whole = adapted(model, tmp_path / "adapter", target_modules=["query"], **SEQ_CLS)
    checkpoint = checkpoint_of(tmp_path / "adapter")
    assert checkpoint.tensors[f"{QUERY}.weight"].stored.dtype == "BF16"
    assert_reads(checkpoint, whole.state_dict())
    expected = whole.get_submodule(QUERY).weight.to(torch.bfloat16).reshape(-1)
    assert torch.equal(checkpoint.read(f"{QUERY}.weight"), expected)


def test_a_bare_base_is_renamed_for_the_class_with_the_head(tmp_path):
    torch.manual_seed(0)
    save(RobertaModel(roberta_config(), add_pooling_layer=False), tmp_path / "base")
    for i in range(2):
        model = RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=i + 2)
        whole = adapted(model, tmp_path / f"a{i}", seed=i, target_modules=["query"], **SEQ_CLS)
        save(whole, tmp_path / "whole" / f"a{i}")
        assert_reads(checkpoint_of(tmp_path / f"a{i}"), whole.state_dict())
    for output, folder in (("x", tmp_path), ("y", tmp_path / "whole")):
        models = [str(folder / f"a{i}") for i in range(2)]
        cart_hf.merge(base=str(tmp_path / "base"), models=models, method="average", output=tmp_path / output)
    assert_alike(tmp_path / "x", tmp_path / "y")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, and two adapters of its vision tower, as transformers 5 names it; and as transformers 4 did."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    base = CLIPModel(clip_config())
    save(base, folder / "base")
    for i in range(2):
        tower = CLIPVisionModel(base.config.vision_config)
        tower.load_state_dict(base.vision_model.state_dict())
        tower.name_or_path = tower.config._name_or_path = str(folder / "base")
        adapted(tower, folder / f"new{i}", seed=i, target_modules=["q_proj", "v_proj"])
        shutil.copytree(folder / f"new{i}", folder / f"old{i}")
        state = load_file(folder / f"old{i}" / WEIGHTS)
        old = {name.replace("model.encoder", "model.vision_model.encoder"): tensor for name, tensor in state.items()}
        default = {name.replace(".weight", ".default.weight"): tensor for name, tensor in old.items()}
        save_file(default if i else old, folder / f"old{i}" / WEIGHTS)
    return folder


@pytest.mark.parametrize("names", ["new", "old"])
def test_adapters_of_a_tower_make_a_whole_clip(clip, tmp_path, names):
    models = [str(clip / f"{names}{i}") for i in range(2)]
    cart_hf.merge(base=str(clip / "base"), models=models, method="task_arithmetic", scale=1.0, output=tmp_path / "out")
    base, merged = CLIPModel.from_pretrained(clip / "base"), CLIPModel.from_pretrained(tmp_path / "out")
    towers = []
    for i in range(2):
        tower = CLIPVisionModel(base.config.vision_config)
        tower.load_state_dict(base.vision_model.state_dict())
        towers.append(PeftModel.from_pretrained(tower, clip / f"new{i}").merge_and_unload().state_dict())
    start = base.vision_model.state_dict()
    for name, tensor in merged.vision_model.state_dict().items():
        torch.testing.assert_close(tensor, towers[0][name] + towers[1][name] - start[name], atol=1e-6, rtol=0, msg=name)
    torch.testing.assert_close(merged.text_model.state_dict(), base.text_model.state_dict(), atol=0, rtol=0)


def test_a_tower_that_nothing_tells_apart_is_asked_for(clip, tmp_path):
    shutil.copytree(clip / "new0", tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings | {"auto_mapping": None}))
    with pytest.raises(UserError, match=r"fit text_model, vision_model of .* alike.*base_model_class"):
        checkpoint_of(tmp_path / "adapter")


def test_pickles(trained, tmp_path):
    shutil.copytree(trained.adapters[0], tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / WEIGHTS), tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    whole = RobertaForSequenceClassification.from_pretrained(trained.whole[0])
    assert_reads(checkpoint_of(tmp_path / "adapter"), whole.state_dict())


@pytest.mark.parametrize("base", ["base", "whole/task0"])
def test_labels_are_those_of_the_configuration_beside_it(trained, tmp_path, base):
    """Whether its head is new, or takes the place of the base's own."""
    shutil.copytree(trained.adapters[0], tmp_path / "adapter")
    names = {"0": "bad", "1": "good"}
    config = {"architectures": ["RobertaForSequenceClassification"], "id2label": names}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    assert checkpoint_of(f"{trained.folder / base}+{tmp_path / 'adapter'}").config["id2label"] == names


def test_a_head_over_another_head(trained, tmp_path):
    """A classifier that is tuned further: with as many labels it keeps its names, with others it gets another head."""
    save(
        RobertaForSequenceClassification.from_pretrained(trained.whole[1], id2label=dict(enumerate("xyz"))),
        tmp_path / "b",
    )
    for labels, name in ((3, "x"), (4, "LABEL_0")):
        model = RobertaForSequenceClassification.from_pretrained(
            tmp_path / "b", num_labels=labels, ignore_mismatched_sizes=True
        )
        whole = adapted(model, tmp_path / f"{labels}", target_modules=["query"], **SEQ_CLS)
        checkpoint = checkpoint_of(tmp_path / f"{labels}")
        assert checkpoint.config["id2label"]["0"] == name
        assert_reads(checkpoint, whole.state_dict())


def test_patterns_match_as_in_peft():
    from cart_hf.sources.lora.settings import LoraSettings

    patterns = {"query": 2, r"layer\.1\..*value": 3, "^roberta.encoder.layer.0.output.dense": 5, "ense": 7}
    config = {"peft_type": "LORA", "r": 8, "rank_pattern": patterns, "alpha_pattern": patterns, "lora_alpha": 16}
    settings = LoraSettings.read("a", config)
    for name in ("query", "value", "output.dense", "dense"):
        for layer in (0, 1, 10):
            module = f"roberta.encoder.layer.{layer}.{name}"
            expected = patterns.get(get_pattern_key(patterns, module), 8)
            assert settings.rank(module) == expected
            assert settings.scaling(module) == (1 if expected != 8 else 2)


def test_what_a_factored_merge_reads(trained):
    """Factors where a matrix is the base's plus low rank; and the one base that all adapters share."""
    base, *models = open_checkpoints(
        [("base", Reference.parse(trained.base))]
        + [(f"m{i}", Reference.parse(adapter)) for i, adapter in enumerate(trained.adapters)]
    )
    name = f"{QUERY}.weight"
    for model, folder in zip(models, trained.whole, strict=True):
        assert model.adapts is base
        part = model.part(name)
        assert part.is_low_rank
        assert (part.file, part.key) == (base.tensors[name].file, name)
        left, right = model.factors(name)
        assert (left.shape, right.shape, left.dtype) == ((16, 3), (3, 16), torch.float32)
        expected = load_file(Path(folder) / "model.safetensors")[name]
        torch.testing.assert_close(base.read(name).view(16, 16) + left @ right, expected, atol=1e-6, rtol=0)
        assert model.factors("classifier.dense.weight") is None
        assert model.factors(name.replace("query", "key")) is None


def test_factors_of_a_transposed_layer(tmp_path):
    whole = adapted(
        classifier("gpt2", tmp_path), tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True, **SEQ_CLS
    )
    checkpoint = checkpoint_of(tmp_path / "a")
    name = "transformer.h.0.attn.c_attn.weight"
    left, right = checkpoint.factors(name)
    base = checkpoint.adapts.read(name).view(16, 48)
    torch.testing.assert_close(base + left @ right, whole.state_dict()[name], atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def settings(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def tensors(**changes: torch.Tensor | None) -> Change:
    """Change tensors of the file; None removes one."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS) | changes
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / WEIGHTS)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


MERGE_IT = "merge_and_unload"
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "another kind": (settings(peft_type="IA3"), ("type IA3", "LoRA")),
    "DoRA": (settings(use_dora=True), ("use_dora", MERGE_IT)),
    "aLoRA": (settings(alora_invocation_tokens=[1]), ("alora_invocation_tokens", MERGE_IT)),
    "tokens": (settings(trainable_token_indices=[1]), ("trainable_token_indices",)),
    "parameters": (settings(target_parameters=["x"]), ("target_parameters",)),
    "more layers": (settings(layer_replication=[[0, 1], [0, 2]]), ("layer_replication",)),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), ("pissa_niter_4", "path_initial_model_for_weight")),
    "LoftQ": (settings(init_lora_weights="loftq"), ("loftq",)),
    "unknown variant": (settings(use_xlora=True), ("use_xlora", "does not know")),
    "no rank": (settings(r="many"), (CONFIG, "r:", "integer")),
    "no pattern": (settings(rank_pattern={"(": 1}), (CONFIG, "regular expression")),
    "another rank": (settings(r=5), ("lora_A.weight", "[3, 16]", "r = 5")),
    "no base": (settings(base_model_name_or_path=None), ("names no base model", "BASE+")),
    "base gone": (settings(base_model_name_or_path="/no/such/base"), ("/no/such/base", "BASE+")),
    "no settings": (lambda folder: (folder / CONFIG).write_text("{"), (CONFIG, "not valid JSON")),
    "no weights": (remove(WEIGHTS), ("holds no weights", WEIGHTS)),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS), ("holds no tensors",)),
    "half a pair": (tensors(**{B_OF_QUERY: None}), ("lora_B", QUERY, "missing")),
    "no pair": (tensors(**{B_OF_QUERY: torch.ones(16, 2)}), (A_OF_QUERY, B_OF_QUERY, "do not belong together")),
    "a vector": (tensors(**{A_OF_QUERY: torch.ones(3)}), (A_OF_QUERY, "no factors")),
    "another width": (tensors(**{A_OF_QUERY: torch.ones(3, 8)}), (B_OF_QUERY, "[16, 8]", "[16, 16]")),
    "no such module": (
        tensors(**{"base_model.model.roberta.x.weight": torch.ones(2)}),
        ("roberta.x.weight", "no module"),
    ),
    "two adapters": (
        tensors(**{A_OF_QUERY.replace("weight", "other.weight"): torch.ones(3, 16)}),
        ("two adapters", QUERY),
    ),
    "half a head": (
        tensors(**{"base_model.model.classifier.dense.bias": None}),
        ("head lacks", "classifier.dense.bias"),
    ),
    "not a number": (tensors(**{A_OF_QUERY: torch.full((3, 16), torch.nan)}), (A_OF_QUERY, "holds NaN")),
    "not a number in a bias": (
        tensors(**{"base_model.model.classifier.dense.bias": torch.full((16,), torch.inf)}),
        ("classifier.dense.bias", "holds Inf"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(trained, tmp_path, name):
    change, naming = REFUSED[name]
    shutil.copytree(trained.adapters[0], tmp_path / "broken")
    change(tmp_path / "broken")
    models = [tmp_path / "broken", trained.adapters[1]]
    words = ["merge", "--base", trained.base, "--models", *models, "--output", tmp_path / "out"]
    errors = refuse(tmp_path / "out", *words, naming=["broken", *naming])
    assert "Traceback" not in errors[0]


def test_an_adapter_of_another_model_is_refused(trained, tmp_path):
    classifier("bert", tmp_path)
    other, adapter = tmp_path / "base", trained.adapters[0]
    words = ["merge", "--models", f"{other}+{adapter}", trained.adapters[1], "--method", "average"]
    found = refuse(
        tmp_path / "out", *words, "--output", tmp_path / "out", count=4, naming=["belongs to no module", "BASE+ADAPTER"]
    )
    assert found[-1].endswith("more tensors")


def test_tied_tensors_that_part_are_refused(tmp_path):
    config, base_class, _ = FAMILIES["gpt2"]
    model = base_class.from_pretrained(save(base_class(config()), tmp_path / "base"))
    adapted(model, tmp_path / "a", target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    with pytest.raises(
        UserError, match=r"'lm_head.weight' alone, which GPT2LMHeadModel ties to 'transformer.wte.weight'"
    ):
        checkpoint_of(tmp_path / "a")


def test_an_adapter_on_an_adapter_and_a_model_as_an_adapter_are_refused(trained, tmp_path):
    one, other = trained.adapters[:2]
    output = ["--method", "average", "--output", tmp_path / "out"]
    refuse(tmp_path / "out", "merge", "--models", f"{one}+{other}", one, *output, naming=["an adapter itself", one])
    refuse(
        tmp_path / "out", "merge", "--models", f"{trained.base}+{trained.full}", one, *output, naming=[CONFIG, "PEFT"]
    )


def test_an_output_that_would_replace_the_base_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="which it is made from"):
        cart_hf.merge(models=trained.adapters, output=Path(trained.base) / "out")


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------


def test_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a+b", "adapter"):
        (tmp_path / name).mkdir()
    hub, local = (
        Reference("org/base", "v1", adapter=Reference("org/ad")),
        Reference("base", adapter=Reference("adapter")),
    )
    assert Reference.parse("org/base@v1+org/ad") == hub
    assert Reference.parse("base+adapter") == local
    assert Reference.parse("a+b") == Reference("a+b")
    assert Reference.parse("a+b+adapter") == Reference("a+b", adapter=Reference("adapter"))
    assert Reference.parse("org/base/sub@v1+a+b") == Reference("org/base", "v1", "sub", Reference("a+b"))
    assert Reference.from_yaml({"model": {"path": "org/base", "revision": "v1"}, "lora": "org/ad"}) == hub
    assert Reference.from_yaml({"model": "base", "lora": {"path": "adapter"}}) == local
    assert Reference.from_yaml({"path": "org/base", "lora": None}) == Reference("org/base")
    for reference in (hub, local, Reference.parse("a+b+adapter"), Reference("o/b", "1+2", adapter=Reference("o/a"))):
        again = Reference.from_yaml(reference.to_yaml())
        assert again.to_yaml() == reference.to_yaml()
        assert (again.default_name, again.is_local) == (reference.default_name, reference.is_local)
    assert (hub.default_name, str(hub), hub.is_local) == ("ad", "org/base@v1+org/ad", False)
    assert local.is_local
    assert not Reference("base", adapter=Reference("org/ad")).is_local


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("org/base+", "nothing on one side"),
        ("./nowhere+org/ad", r"folder not found: \./nowhere"),
        ("org/base+./nowhere", r"folder not found: \./nowhere"),
        ("org/a+org/b+org/c", "one adapter"),
        ("org/my base+org/ad", "neither an existing folder nor a Hub id"),
        ({"model": "org/a+org/b", "lora": "org/c"}, "one adapter"),
        ({"path": "org/a+org/b", "revision": "v1"}, "two models"),
        ({"model": "org/a", "lora": 5}, "not 5"),
    ],
)
def test_references_that_are_none(written, why):
    with pytest.raises(ValueError, match=why):
        Reference.from_yaml(written)


# ---------------------------------------------------------------------------------------------------------------------
# From the Hub
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """What commands answered that met a working hub, and the folder of their outputs."""

    folder: Path
    answers: dict[str, Answer]
    commits: dict[str, str]


@pytest.fixture(scope="module")
def online(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Online:
    folder = tmp_path_factory.mktemp("online")
    for i in range(3):
        shutil.copytree(trained.adapters[i], folder / f"ad{i}")
        name = ("org/base", "org/gated", "org/absent")[i]
        settings(base_model_name_or_path=name, revision=None)(folder / f"ad{i}")
    shutil.copytree(folder / "ad0", folder / "collection" / "sub")
    shutil.copytree(trained.adapters[1], folder / "pickle")
    settings(base_model_name_or_path="org/base")(folder / "pickle")
    torch.save(load_file(folder / "pickle" / WEIGHTS), folder / "pickle" / "adapter_model.bin")
    remove(WEIGHTS)(folder / "pickle")
    with serving() as hub:
        commits = {"base": hub.add("org/base", Path(trained.base))}
        hub.add("org/gated", Path(trained.base), gated=True, readers=("hf_reader",))
        for name in ("ad0", "ad1", "ad2", "collection", "pickle"):
            commits[name] = hub.add(f"org/{name}", folder / name)

        def words(output: str, *models: str, base: str = "org/base") -> list[str]:
            options = ["--device", "cpu", "--workers", "1", "--rank-ratio", "0.3"]
            return ["merge", "--base", base, "--models", *models, "--output", str(folder / output), *options]

        commands = {
            "dry": [*words("dry", "org/ad0", "org/pickle", "org/base+org/ad2"), "--dry-run"],
            "merged": words("merged", "org/ad0", "org/pickle", "org/base+org/ad2"),
            "again": ["merge", str(folder / "merged" / "cart_hf.yaml"), str(folder / "again"), "--device", "cpu"],
            "subfolder": words("subfolder", "a=org/collection/sub", "b=org/base+org/collection/sub", "org/pickle"),
            "gated": words("gated", "org/ad0", "org/ad1"),
            "absent": words("absent", "org/ad0", "org/ad2"),
            "no adapter": words("none", "org/ad0", "org/base+org/base"),
        }
        answers = run_cli(list(commands.values()), hub.url, folder / "home")
    return Online(folder, dict(zip(commands, answers, strict=True)), commits)


def test_adapters_on_the_hub(online, trained, tmp_path):
    for name in ("dry", "merged", "again", "subfolder"):
        assert online.answers[name].code == 0, online.answers[name]
    cart_hf.merge(base=trained.base, models=trained.whole, rank_ratio=0.3, output=tmp_path / "whole")
    merged = load_file(online.folder / "merged" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor, atol=2e-6, rtol=0, msg=name)
    assert_alike(online.folder / "merged", online.folder / "again", 0)


def test_commits_of_adapters_and_bases_are_recorded(online):
    model = json.loads((online.folder / "merged" / "merge.json").read_text())["models"][0]
    assert (model["hub_id"], model["commit"]) == ("org/ad0", online.commits["ad0"])
    assert (model["adapts"]["hub_id"], model["adapts"]["commit"]) == ("org/base", online.commits["base"])
    recipe = (online.folder / "merged" / "cart_hf.yaml").read_text()
    for name in ("base", "ad0", "pickle", "ad2"):
        assert f"org/{name}@{online.commits[name]}" in recipe


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("gated", ["ad1", "org/gated", "is gated", "accept its terms", "BASE+org/ad1"]),
        ("absent", ["ad2", "org/absent", "no such repository", "BASE+org/ad2"]),
        ("no adapter", ["org/base", CONFIG, "PEFT adapter"]),
    ],
)
def test_what_the_hub_lacks_is_said_of_the_adapter(online, name, naming):
    answer = online.answers[name]
    assert (answer.code, len(answer.errors)) == (2, 1), answer
    assert not [words for words in naming if words not in answer.errors[0]], answer.errors
    assert_absent(online.folder / ("none" if name == "no adapter" else name))
