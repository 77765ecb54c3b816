"""An adaptation's figures: files that open, the same every time, with the names and numbers in them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from cart_hf.adaptation.figures import curves, heat_map
from cart_hf.errors import UserError
from cart_hf.figures.blocks import blocks_of, in_order

TASKS = ("sst2", "stanford_cars", "$x_0")
LAYERED = ["vision_model.embeddings.a", "vision_model.pre_layrnorm.b"]
LAYERED += [f"vision_model.encoder.layers.{i}.{name}" for i in (0, 1, 10, 2) for name in ("fc1.weight", "fc2.weight")]
LAYERED += ["visual_projection.weight", "logit_scale"]


def coefficients(names: list[str], tasks: tuple[str, ...] = TASKS) -> dict[str, dict[str, float]]:
    return {name: {task: 0.3 + 0.01 * i - 0.1 * j for j, task in enumerate(tasks)} for i, name in enumerate(names)}


def texts(path: Path) -> list[str]:
    """Return the texts of an SVG file, in the order they were drawn."""
    return [element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def drawn(folder: Path, values: dict[str, dict[str, float]], initial: float | None = 0.3) -> list[str]:
    pytest.importorskip("matplotlib")
    heat_map(values, [folder / "figure.svg"], initial=initial)
    return texts(folder / "figure.svg")


def test_names_are_cut_into_layers_and_what_is_beside_them():
    found = blocks_of(in_order(LAYERED))
    assert [(block.path, block.number, block.start) for block in found] == [
        ("embeddings", None, 0),
        ("pre_layrnorm", None, 1),
        *(("vision_model.encoder.layers", number, 2 + 2 * i) for i, number in enumerate((0, 1, 2, 10))),
        ("visual_projection", None, 10),
        ("logit_scale", None, 11),
    ]
    assert found[2].names == ("fc1.weight", "fc2.weight")
    assert [block.path for block in blocks_of(["h.0", "h.1", "ln_f.weight"])] == ["h", "h", "ln_f"]


def test_few_columns_are_named_and_their_values_written(tmp_path):
    written = drawn(tmp_path, coefficients(LAYERED))
    assert {*TASKS, "mean", "λ (before: 0.3)", "vision_model.encoder.layers"} <= set(written)
    assert [text for text in written if text in ("0", "1", "2", "10")] == ["0", "1", "2", "10"]
    assert written.count("fc1.weight") == 4
    assert {"embeddings.a", "pre_layrnorm.b", "visual_projection.weight", "logit_scale"} <= set(written)
    assert {"0.41", "0.20"} <= set(written)  # the last column of the first task, the first of the second


def test_many_columns_are_named_by_their_blocks(tmp_path):
    names = [*(f"embeddings.{i}x" for i in range(9)), *(f"layer.{i}.w{j}" for i in range(24) for j in range(16))]
    written = drawn(tmp_path, coefficients(names))
    assert {"embeddings", "layer", *map(str, range(24))} <= set(written)
    assert not any("w1" in text for text in written)


def test_a_task_without_a_tensor(tmp_path):
    values = coefficients(["a", "b"])
    del values["b"]["sst2"]
    values["b"]["stanford_cars"] = math.nan
    written = drawn(tmp_path, values)
    assert {"0.30", "0.20", "0.10", "0.11"} <= set(written)
    assert not {"0.31", "0.21", "nan", "--"} & set(written)


@pytest.mark.parametrize(
    ("tasks", "names", "initial"), [(1, ["all"], None), (1, ["all"], 0.3), (20, LAYERED[:3], None), (2, LAYERED, 0.3)]
)
def test_every_size_opens(tmp_path, tasks, names, initial):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "map.png", tmp_path / "again.png"]
    for path in paths:
        heat_map(coefficients(names, tuple(f"task {i}" for i in range(tasks))), [path], initial=initial)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert min(image.size) > 60


def test_curves_are_named_with_their_mean(tmp_path):
    pytest.importorskip("matplotlib")
    losses = {task: [1 / (step + 1) + i for step in range(200)] for i, task in enumerate(TASKS)}
    losses["sst2"][3] = math.nan
    paths = [tmp_path / "curves.svg", tmp_path / "curves.png"]
    curves(losses, paths, objective="entropy")
    written = texts(paths[0])
    assert [text for text in written if text in (*TASKS, "mean")] == [*TASKS, "mean"]
    assert {"step", "entropy of the predictions"} <= set(written)
    with Image.open(paths[1]) as image:
        assert min(image.size) > 300
    curves({"sst2": [0.5]}, paths[:1], objective="self-labels", first_step=7)
    assert "mean" not in texts(paths[0])
    assert {"7", "loss against the models' own predictions"} <= set(texts(paths[0]))


def test_nothing_to_draw(tmp_path):
    for nothing in ({}, {"a": {}}, {"a": {"sst2": math.nan}}):
        with pytest.raises(UserError, match="no coefficient to draw"):
            heat_map(nothing, [tmp_path / "map.png"], initial=0.3)
    for nothing in ({}, {"sst2": []}, {"sst2": [math.nan]}):
        with pytest.raises(UserError, match="no loss to draw"):
            curves(nothing, [tmp_path / "curves.png"], objective="entropy")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_missing(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'cart-hf\[plot\]'"):
        heat_map(coefficients(LAYERED), [tmp_path / "map.png"], initial=0.3)
    with pytest.raises(UserError, match=r"pip install 'cart-hf\[plot\]'"):
        curves({"sst2": [0.5]}, [tmp_path / "curves.png"], objective="entropy")
    assert not list(tmp_path.iterdir())
