"""The output folder: complete, loadable by plain transformers, and all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import make_clip, make_family, perturb, roberta_config, save
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    RobertaModel,
)

import cart_hf
import cart_hf.api
from cart_hf.recipe import recipe_from_flags


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A merged BERT whose models carry a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    base, models = make_family(folder, "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
    for place in (base, *models):
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(place)
    cart_hf.merge(base=base, models=models, output=folder / "out", rank_ratio=0.3, scale=1.5)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A merged CLIP whose base carries a processor."""
    folder = tmp_path_factory.mktemp("clip")
    base, models = make_clip(folder)
    words = [
        "!",
        "a</w>",
        "photo</w>",
        "of</w>",
        "cat</w>",
        "dog</w>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "bcdefghijklmnopqrstuvwxy"),
    ]
    vocab = {word: i for i, word in enumerate(words[:57])} | {"<|startoftext|>": 57, "<|endoftext|>": 58}
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        CLIPTokenizer(vocab=vocab, merges=[]),
    )
    processor.save_pretrained(base)
    cart_hf.merge(base=base, models=models, output=folder / "out", rank_ratio=0.3, scale=1.5)
    return folder


def test_each_task_is_the_merged_backbone_with_its_own_head(bert):
    backbone = AutoModel.from_pretrained(bert / "out").state_dict()
    for task in range(3):
        merged = AutoModelForSequenceClassification.from_pretrained(bert / "out", subfolder=f"tasks/task{task}")
        own = AutoModelForSequenceClassification.from_pretrained(bert / f"task{task}")
        assert merged.config.id2label == own.config.id2label
        assert torch.equal(merged.classifier.weight, own.classifier.weight)
        for name, tensor in merged.bert.state_dict().items():
            assert torch.equal(tensor, backbone[name]), name


def test_tasks_cost_almost_no_bytes(bert):
    root = (bert / "out" / "model.safetensors").stat()
    for task in range(3):
        linked = (bert / "out" / "tasks" / f"task{task}" / "backbone.safetensors").stat()
        assert (linked.st_dev, linked.st_ino) == (root.st_dev, root.st_ino)


def test_tokenizers_load_from_root_and_tasks(bert):
    for folder in (bert / "out", bert / "out" / "tasks" / "task1"):
        assert AutoTokenizer.from_pretrained(folder)("w3 w5")["input_ids"] == [2, 8, 10, 3]


def test_sharded_output_loads_alike(bert):
    models = [str(bert / f"task{i}") for i in range(3)]
    cart_hf.merge(
        base=str(bert / "base"), models=models, output=bert / "shards", rank_ratio=0.3, scale=1.5, max_shard_size="6KB"
    )
    files = list((bert / "shards").glob("model-*.safetensors"))
    assert len(files) > 2
    one, many = (AutoModel.from_pretrained(bert / name).state_dict() for name in ("out", "shards"))
    assert all(torch.equal(one[name], many[name]) for name in one)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        bert / "shards", subfolder="tasks/task2", output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(model.bert.pooler.dense.weight, one["pooler.dense.weight"])


def test_record_tells_what_was_done(bert):
    record = json.loads((bert / "out" / "merge.json").read_text())
    assert record["method"] == "cart"
    assert record["counts"]["low_rank"] == 12
    assert record["tensors"]["encoder.layer.0.output.dense.weight"] == {
        "key": "bert.encoder.layer.0.output.dense.weight", "role": "low_rank", "reason": "Linear in encoder.layer", "rank": 4,
    }  # fmt: skip
    assert [m["name"] for m in record["models"]] == ["task0", "task1", "task2"]
    size = (bert / "task0" / "model.safetensors").stat().st_size
    assert record["models"][0]["files"]["model.safetensors"]["bytes"] == size
    assert record["versions"]["torch"] == torch.__version__


def test_resolved_recipe_gives_the_same_bytes(bert):
    recipe = cart_hf.Recipe.load(bert / "out" / "cart_hf.yaml")
    cart_hf.merge(recipe, output=bert / "again")
    one, two = ((bert / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two


def test_weight_files_are_valid_safetensors_with_metadata(bert):
    with safe_open(bert / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_permissions_are_those_of_ordinary_files(bert):
    umask = os.umask(0)
    os.umask(umask)
    assert (bert / "out").stat().st_mode & 0o777 == 0o755
    assert (bert / "out" / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_multi_task_model_equals_the_tasks_one_by_one(bert):
    model = cart_hf.MultiTaskModel.from_pretrained(bert / "out")
    assert model.tasks == ["task0", "task1", "task2"]
    assert model.labels("task1") == ["bert1-0", "bert1-1", "bert1-2"]
    batch = AutoTokenizer.from_pretrained(bert / "out")(["w1 w2", "w3 w4 w5 w6"], padding=True, return_tensors="pt")
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        outputs = model(**batch)
        assert calls == [1]
        for task in model.tasks:
            one = AutoModelForSequenceClassification.from_pretrained(bert / "out", subfolder=f"tasks/{task}").eval()
            torch.testing.assert_close(outputs[task].logits, one(**batch).logits)
        assert list(model(tasks=["task2"], **batch)) == ["task2"]
    with pytest.raises(cart_hf.UserError, match="did you mean 'task1'"):
        model(tasks=["tsk1"], **batch)
    assert cart_hf.MultiTaskModel.from_pretrained(bert / "out", tasks=["task1"]).tasks == ["task1"]


@pytest.mark.parametrize("family", ["roberta", "distilbert", "deberta", "vit", "gpt2"])
def test_multi_task_model_runs_any_head(tmp_path, family):
    from transformers import AutoModelForImageClassification

    base, models = make_family(tmp_path, family)
    cart_hf.merge(base=base, models=models, output=tmp_path / "out")
    model = cart_hf.MultiTaskModel.from_pretrained(tmp_path / "out")
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    if family == "vit":
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        batch = {
            "input_ids": torch.tensor([[4, 5, 6, 7], [8, 9, 1, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        }
    with torch.no_grad():
        outputs = model(**batch)
        for task in model.tasks:
            one = auto.from_pretrained(tmp_path / "out", subfolder=f"tasks/{task}").eval()
            torch.testing.assert_close(outputs[task].logits, one(**batch).logits)


def test_merged_clip_is_whole(clip):
    model, info = CLIPModel.from_pretrained(clip / "out", output_loading_info=True)
    assert not any(info.values())
    base = CLIPModel.from_pretrained(clip / "base")
    for name, tensor in base.state_dict().items():
        if not name.startswith("vision_model."):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert CLIPProcessor.from_pretrained(clip / "out").image_processor.crop_size["height"] == 16


def test_zero_shot_heads_equal_clip_itself(clip):
    """With one template, the head's logits are CLIP's own logits per image."""
    model = cart_hf.MultiTaskModel.from_pretrained(clip / "out")
    model.add_zero_shot("animals", ["cat", "dog", "a"], ["photo of {}"])
    model.add_zero_shot("letters", ["b", "c"], ["photo of {}", "a {}"])
    images = torch.randn(4, 3, 16, 16)
    plain = CLIPModel.from_pretrained(clip / "out").eval()
    tokens = AutoTokenizer.from_pretrained(clip / "out")(
        ["photo of cat", "photo of dog", "photo of a"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(pixel_values=images)
        expected = plain(pixel_values=images, **tokens).logits_per_image
    torch.testing.assert_close(outputs["animals"].logits, expected, atol=1e-5, rtol=1e-5)
    assert outputs["letters"].logits.shape == (4, 2)
    assert model.labels("letters") == ["b", "c"]
    with pytest.raises(cart_hf.UserError, match=r"needs '\{\}'"):
        model.add_zero_shot("wrong", ["a"], ["a photo"])


def test_zero_shot_needs_clip(bert):
    model = cart_hf.MultiTaskModel.from_pretrained(bert / "out")
    with pytest.raises(cart_hf.UserError, match="need a CLIP model"):
        model.add_zero_shot("x", ["a"])


def test_a_failure_keeps_the_earlier_output(bert, monkeypatch):
    """--overwrite replaces the old folder only when the new one is complete."""
    models = [str(bert / f"task{i}") for i in range(3)]
    cart_hf.merge(base=str(bert / "base"), models=models, output=bert / "kept")
    before = (bert / "kept" / "model.safetensors").read_bytes()

    def fail(*_, **__):
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(cart_hf.api, "write_record", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            cart_hf.merge(base=str(bert / "base"), models=models, output=bert / "kept", overwrite=True, scale=2.0)
    assert (bert / "kept" / "model.safetensors").read_bytes() == before
    cart_hf.merge(base=str(bert / "base"), models=models, output=bert / "kept", overwrite=True, scale=2.0)
    assert (bert / "kept" / "model.safetensors").read_bytes() != before
    assert not [p.name for p in bert.iterdir() if p.name.startswith(".")]


def test_an_output_that_appears_meanwhile_is_not_replaced(bert, monkeypatch):
    models = [str(bert / f"task{i}") for i in range(3)]

    def intrude(*arguments):
        (bert / "race").mkdir()
        (bert / "race" / "precious").write_text("x")

    with monkeypatch.context() as patch:
        patch.setattr(cart_hf.api, "write_card", intrude)
        with pytest.raises(cart_hf.UserError, match="race exists"):
            cart_hf.merge(base=str(bert / "base"), models=models, output=bert / "race")
    assert [p.name for p in (bert / "race").iterdir()] == ["precious"]
    assert not [p.name for p in bert.iterdir() if p.name.startswith(".")]


def test_planned_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """By the plan's own estimate, which chooses the number of workers."""
    estimates = []
    for layers in (1, 6):
        model = RobertaModel(roberta_config(num_hidden_layers=layers))
        folders = [save(model, tmp_path / f"{layers}-{i}") for i in range(3)]
        plan = cart_hf.api.plan_merge(recipe_from_flags({"base": folders[0], "models": folders}, {}))
        estimates.append(plan.memory(2))
    assert estimates[0] == estimates[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory anew")
def test_memory_is_a_few_matrices_of_every_model(tmp_path):
    """A deep model: what a merge adds to the process's memory is bounded by one stack of matrices for each worker."""
    config = roberta_config(num_hidden_layers=8, hidden_size=320, intermediate_size=1280, num_attention_heads=8)
    model, folders = RobertaModel(config), []
    for i in range(3):
        perturb(model, i)
        folders.append(save(model, tmp_path / f"{i}"))
    del model
    stack = 3 * 320 * 1280 * 4
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) > 24 * stack
    for method in ("cart", "average"):  # the first merge loads libraries, too
        cart_hf.merge(models=folders, output=tmp_path / f"{method}-1", method=method, workers=2)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        cart_hf.merge(models=folders, output=tmp_path / f"{method}-2", method=method, workers=2)
        assert memory("VmHWM") - before < 6 * stack, method


def memory(field: str) -> int:
    """Return what the kernel says of this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))
