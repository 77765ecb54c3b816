"""One model, many ways to store it: the merge must not depend on class, naming, sharding or container."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    FAMILIES,
    SMALL,
    clip_config,
    copy_backbone,
    make_clip,
    make_family,
    perturb,
    roberta_config,
    save,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModelWithProjection,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import cart_hf


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    base, models = make_family(folder, "roberta")
    cart_hf.merge(base=base, models=models, output=folder / "out", rank_ratio=0.3, scale=1.5)
    return folder, base, models, load_file(folder / "out" / "model.safetensors")


def rewrite(source: str, target: Path, change) -> str:
    """Copy a checkpoint with its state dict changed."""
    shutil.copytree(source, target)
    state = change(load_file(target / "model.safetensors"))
    (target / "model.safetensors").unlink()
    if state is not None:
        save_file(state, target / "model.safetensors")
    return str(target)


def merged_state(tmp_path: Path, base: str, models: list[str], **options) -> dict[str, torch.Tensor]:
    cart_hf.merge(base=base, models=models, output=tmp_path / "out", rank_ratio=0.3, scale=1.5, **options)
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def same_names(models: list[str], *others: str) -> list[str]:
    """Give variants the names of the originals: merges run in the order of names."""
    return [f"task{i}={path}" for i, path in enumerate([*others, *models[len(others) :]])]


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_sharded_safetensors(roberta, tmp_path):
    _, base, models, expected = roberta
    model = RobertaForSequenceClassification.from_pretrained(models[0])
    sharded = save(model, tmp_path / "sharded", max_shard_size="10KB")
    assert len(list(Path(sharded).glob("*.safetensors"))) > 2
    assert_same(merged_state(tmp_path, base, same_names(models, sharded)), expected)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_pickles(roberta, tmp_path, shards, legacy):
    _, base, models, expected = roberta

    def to_pickle(state):
        items = list(state.items())
        parts = [dict(items[i::shards]) for i in range(shards)]
        names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
        for name, part in zip(names, parts, strict=True):
            torch.save(part, tmp_path / "pickled" / name, _use_new_zipfile_serialization=not legacy)
        if shards > 1:
            weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    pickled = rewrite(models[1], tmp_path / "pickled", to_pickle)
    assert_same(merged_state(tmp_path, base, same_names(models, models[0], pickled)), expected)


def test_old_layer_norm_names_and_position_buffers(roberta, tmp_path):
    """BERT's first checkpoints say gamma and beta, and hold integer buffers that no model reads any more."""
    _, base, models, expected = roberta

    def age(state):
        renamed = {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in state.items()
        }
        return renamed | {"roberta.embeddings.position_ids": torch.arange(20)[None]}

    old = rewrite(models[2], tmp_path / "old", age)
    assert_same(merged_state(tmp_path, base, same_names(models, models[0], models[1], old)), expected)


def test_base_class_does_not_matter(roberta, tmp_path):
    """A base saved as RobertaModel has other keys than one saved for masked words; the output has the tasks' keys."""
    _, base, models, expected = roberta
    bare = save(RobertaModel.from_pretrained(base, add_pooling_layer=False), tmp_path / "bare")
    assert "encoder.layer.0.output.dense.weight" in load_file(Path(bare) / "model.safetensors")
    assert_same(merged_state(tmp_path, bare, models), expected)
    task = RobertaForSequenceClassification.from_pretrained(
        tmp_path / "out", subfolder="tasks/task1", output_loading_info=True
    )
    assert not any(task[1].values())


def test_a_pooler_of_the_base_alone_is_kept_apart(tmp_path):
    """The real roberta-base file holds a pooler that classifiers drop: the root keeps it, the tasks never see it."""
    base, models = make_family(tmp_path, "roberta")
    pooler = {"roberta.pooler.dense.weight": torch.randn(16, 16), "roberta.pooler.dense.bias": torch.randn(16)}
    full = rewrite(base, tmp_path / "full", lambda state: state | pooler)
    merged_state(tmp_path, full, models)
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.pooler.dense.weight, pooler["roberta.pooler.dense.weight"])
    _, info = RobertaForSequenceClassification.from_pretrained(
        tmp_path / "out", subfolder="tasks/task0", output_loading_info=True
    )
    assert not any(info.values())


def test_clip_towers_saved_by_old_transformers(tmp_path):
    """transformers 4 wrote `vision_model.` before the vision tower's keys, transformers 5 does not."""
    base, models = make_clip(tmp_path)
    new = merged_state(tmp_path, base, models)
    shutil.rmtree(tmp_path / "out")
    assert not any(key.startswith("vision_model.") for key in load_file(Path(models[0]) / "model.safetensors"))
    old = [
        rewrite(m, tmp_path / f"old{i}", lambda s: {f"vision_model.{k}": v for k, v in s.items()})
        for i, m in enumerate(models)
    ]
    assert_same(merged_state(tmp_path, base, same_names(models, *old)), new)


def test_every_clip_class_with_the_same_tower_merges_alike(tmp_path):
    base, models = make_clip(tmp_path)
    expected = merged_state(tmp_path, base, models)
    shutil.rmtree(tmp_path / "out")
    whole = CLIPModel.from_pretrained(base)
    whole.vision_model.load_state_dict(AutoModel.from_pretrained(models[0]).state_dict())
    projected = CLIPVisionModelWithProjection(whole.config.vision_config)
    projected.vision_model.load_state_dict(AutoModel.from_pretrained(models[1]).state_dict())
    projected.visual_projection.load_state_dict(whole.visual_projection.state_dict())
    variants = [save(whole, tmp_path / "whole"), save(projected, tmp_path / "projected")]
    got = merged_state(tmp_path, base, same_names(models, *variants))
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=1e-6, rtol=0)


def test_clip_classifiers_keep_their_heads(tmp_path):
    torch.manual_seed(0)
    base = CLIPModel(clip_config())
    folders = []
    for task in range(3):
        config = clip_config()
        config.num_labels = task + 2
        model = CLIPForImageClassification(config)
        model.vision_model.load_state_dict(base.vision_model.state_dict())
        perturb(model, task + 1)
        folders.append(save(model, tmp_path / f"task{task}"))
    merged_state(tmp_path, save(base, tmp_path / "base"), folders)
    _, info = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for task in range(3):
        model, info = CLIPForImageClassification.from_pretrained(
            tmp_path / "out", subfolder=f"tasks/task{task}", output_loading_info=True
        )
        assert not any(info.values())
        assert model.classifier.out_features == task + 2


def family_of(tmp_path: Path, model, count: int = 3) -> tuple[str, list[str]]:
    base = save(model, tmp_path / "base")
    folders = []
    for task in range(count):
        copy = type(model).from_pretrained(base)
        perturb(copy, task + 1)
        folders.append(save(copy, tmp_path / f"task{task}"))
    return base, folders


@pytest.mark.parametrize(
    ("make", "low_rank"),
    [
        (lambda: RobertaForMaskedLM(roberta_config()), 12),
        (lambda: GPT2LMHeadModel(FAMILIES["gpt2"][0]()), 8),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)), 14),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
            ),
            12 + 20,
        ),
    ],
    ids=["masked", "gpt2", "llama", "t5"],
)
def test_language_models_merge_with_their_shared_output_layer(tmp_path, make, low_rank):
    torch.manual_seed(0)
    model = make()
    base, models = family_of(tmp_path, model)
    result = cart_hf.merge(base=base, models=models, output=tmp_path / "out", rank=2)
    assert result.plan.count("low_rank") == low_rank
    assert not result.plan.heads
    merged, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    originals = [type(model).from_pretrained(m) for m in models]
    mean = torch.stack([m.get_output_embeddings().weight for m in originals]).mean(0)
    torch.testing.assert_close(merged.get_output_embeddings().weight, mean, atol=1e-6, rtol=0)


def test_the_first_gpt2_layout(tmp_path):
    """The Hub's gpt2 file has no prefix, and holds the causal masks that no model reads any more."""
    base, models = make_family(tmp_path, "gpt2")
    cart_hf.merge(base=base, models=models, output=tmp_path / "new", method="task_arithmetic", scale=0.5)
    expected = load_file(tmp_path / "new" / "model.safetensors")

    def age(state):
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 20, 20) for layer in range(2)}
        return {key.removeprefix("transformer."): tensor for key, tensor in state.items()} | masks

    old = rewrite(base, tmp_path / "old", age)
    result = cart_hf.merge(base=old, models=models, output=tmp_path / "out", method="task_arithmetic", scale=0.5)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert set(result.plan.base.ignored) == {"h.0.attn.bias", "h.1.attn.bias"}


def test_experts_that_transformers_fuses_are_merged_one_by_one(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    base, models = family_of(tmp_path, MixtralForCausalLM(config))
    keys = [k for k in load_file(Path(base) / "model.safetensors") if "experts" in k]
    assert len(keys) == 2 * 3 * 3  # layers x experts x (w1, w2, w3): fused in memory, apart on disk
    result = cart_hf.merge(base=base, models=models, output=tmp_path / "out", rank=16)
    roles = {t.key: t.role for t in result.plan.tensors}
    assert {roles[key] for key in keys} == {"low_rank"}
    merged, info = MixtralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    # full rank: the average
    name = "model.layers.1.mlp.experts.gate_up_proj"
    originals = [MixtralForCausalLM.from_pretrained(m).state_dict()[name] for m in models]
    torch.testing.assert_close(merged.state_dict()[name], torch.stack(originals).mean(0), atol=1e-6, rtol=0)


def test_a_language_model_among_classifiers_keeps_its_output_layer(tmp_path):
    base, models = make_family(tmp_path, "roberta", tasks=2)
    masked = RobertaForMaskedLM.from_pretrained(base)
    perturb(masked, 9)
    merged_state(tmp_path, base, [*models, f"words={save(masked, tmp_path / 'words')}"])
    model, info = RobertaForMaskedLM.from_pretrained(
        tmp_path / "out", subfolder="tasks/words", output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(model.lm_head.dense.weight, masked.lm_head.dense.weight)
    assert model.lm_head.decoder.weight.data_ptr() == model.roberta.embeddings.word_embeddings.weight.data_ptr()


def test_models_of_different_classes_share_what_they_have(tmp_path):
    """A token classifier has no pooler: the pooler is averaged over the models that have one."""
    from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel

    base, models = make_family(tmp_path, "bert", tasks=2)
    tagger = BertForTokenClassification(FAMILIES["bert"][0](num_labels=5))
    copy_backbone(tagger, BertModel.from_pretrained(base))
    perturb(tagger, 7)
    result = cart_hf.merge(
        base=base, models=[*models, f"tags={save(tagger, tmp_path / 'tags')}"], output=tmp_path / "out"
    )
    pooler = next(t for t in result.plan.tensors if t.name == "pooler.dense.weight")
    assert len(pooler.inputs) == 2
    for kind, task in ((BertForSequenceClassification, "task0"), (BertForTokenClassification, "tags")):
        _, info = kind.from_pretrained(tmp_path / "out", subfolder=f"tasks/{task}", output_loading_info=True)
        assert not info["missing_keys"], task
    both = cart_hf.MultiTaskModel.from_pretrained(tmp_path / "out")
    outputs = both(input_ids=torch.arange(4, 12)[None])
    assert outputs["tags"].logits.shape == (1, 8, 5)
    assert outputs["task1"].logits.shape == (1, 3)


def test_base_is_not_needed_for_the_arithmetic_of_cart(roberta, tmp_path):
    _, _, models, expected = roberta
    cart_hf.merge(models=models, output=tmp_path / "out", rank_ratio=0.3, scale=1.5)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_a_path_that_exists_wins(roberta, tmp_path, monkeypatch):
    _, base, models, expected = roberta
    for i, name in enumerate(["me@lab", "a=b", "x+y"]):
        shutil.copytree(models[i], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = [f"task{i}={name}" for i, name in enumerate(["me@lab", "a=b", "x+y"])]
    assert_same(merged_state(tmp_path, base, names), expected)
