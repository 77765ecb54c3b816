"""What is known of an architecture is kept, so that a second merge does without transformers' modelling code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_clip, make_family
from commands import environment
from safetensors.torch import load_file
from warm_python import run_python

from cart_hf.api import plan_merge
from cart_hf.cache import keep, recall
from cart_hf.recipe import recipe_from_flags
from cart_hf.sources import architecture, modelling

MERGE = """
import json, sys
from cart_hf import merge
arguments = json.loads(sys.argv[1])
merge(**arguments)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("transformers"))))
"""


def merge(cache: Path, **arguments: object) -> list[str]:
    """Merge in a new process, and return the modules of transformers that it has imported."""
    settings = environment("http://127.0.0.1:9", cache, CART_HF_CACHE=str(cache))
    done = run_python(MERGE, json.dumps(arguments), environment=settings, cwd=cache.parent)
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return modules


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_second_merge_imports_no_modelling_code_and_writes_the_same(tmp_path):
    base, models = make_family(tmp_path, "roberta")
    cache = tmp_path / "cache"
    first = merge(cache, base=base, models=models, method="ties", output=str(tmp_path / "first"))
    assert "transformers.models.roberta.modeling_roberta" in first
    assert list((cache / "architectures").glob("*.json"))
    second = merge(cache, base=base, models=models, method="ties", output=str(tmp_path / "second"))
    assert not [name for name in second if "model" in name or "conversion" in name]
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert load_file(tmp_path / "second" / "model.safetensors")
    for name in ("config.json", "tasks/task1/config.json", "tasks/task1/model.safetensors.index.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()


def forget() -> None:
    """Forget what this process knows, but not what is in the cache."""
    architecture._described.cache_clear()
    modelling.build.cache_clear()


def test_a_damaged_cache_and_none_do_no_harm(tmp_path, monkeypatch):
    base, models = make_family(tmp_path, "roberta")
    recipe = recipe_from_flags({"base": base, "models": models}, {})
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "cache"))
    forget()
    expected = plan_merge(recipe).tensors
    for path in (tmp_path / "cache" / "architectures").iterdir():
        path.write_text(path.read_text()[:-9])
    (tmp_path / "file").write_text("not a folder")
    for cache in ("cache", "file"):
        monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / cache))
        forget()
        assert plan_merge(recipe).tensors == expected
        assert modelling.build.cache_info().misses  # nothing was to be had from the cache


@pytest.mark.parametrize("make", [make_clip, lambda folder: make_family(folder, "gpt2")], ids=["clip", "gpt2"])
def test_what_is_kept_gives_the_same_plan(tmp_path, monkeypatch, make):
    monkeypatch.setenv("CART_HF_CACHE", str(tmp_path / "cache"))
    base, models = make(tmp_path)
    recipe = recipe_from_flags({"base": base, "models": models}, {})
    plans = []
    for _ in range(2):
        forget()
        plans.append(plan_merge(recipe))
    assert modelling.build.cache_info().misses == 0  # the second time nothing was built
    one, two = ([(c.architecture, c.tensors) for c in plan.checkpoints] for plan in plans)
    for (mine, tensors), (kept, tensors_again) in zip(one, two, strict=True):
        assert {name: (t.key, t.slot) for name, t in tensors.items()} == {
            name: (t.key, t.slot) for name, t in tensors_again.items()
        }
        assert vars(mine) == vars(kept)
        assert [list(v) for v in vars(mine).values() if isinstance(v, dict)] == [
            list(v) for v in vars(kept).values() if isinstance(v, dict)
        ]
    assert plans[0].tensors == plans[1].tensors


def test_a_class_that_is_not_of_transformers_is_not_kept():
    import torch
    from transformers import BertConfig, BertModel

    from cart_hf.sources.modelling import is_of_libraries

    class Own(torch.nn.Linear): ...

    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    assert is_of_libraries(model)
    model.pooler.dense = Own(16, 16)
    assert not is_of_libraries(model)


def test_what_is_kept_is_read_back_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "thing.json"
    assert recall(path) is None
    keep(path, {"a": [1, None, "ü"]})
    assert recall(path) == {"a": [1, None, "ü"]}
    assert list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(b"1", b"2", 1), b"\xff" + whole, b"{}"):
        path.write_bytes(damaged)
        assert recall(path) is None
