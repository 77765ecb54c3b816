"""An analysis's and a search's figures: the numbers that are drawn, where, and what is left out."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_documents import NAMES, RATIOS, document
from PIL import Image

from cart_hf.analysis.figures import draw
from cart_hf.analysis.figures.parts import FIGURES
from cart_hf.errors import UserError
from cart_hf.tuning.figures import Points, rank_curve, tuning_map, weight_average

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = [Path("figure.png")]
BEST = {"rank_ratio": 0.08, "scale": 2}  # 2 is 2.0


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keep what is drawn, and write nothing."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    return kept


@pytest.fixture
def drawn(figures: list[Figure]) -> Callable[[str, Mapping[str, Any]], Figure]:
    """Return a function that draws one figure of a document."""

    def drawn(name: str, told: Mapping[str, Any]) -> Figure:
        FIGURES[name](told, HERE)
        return figures[-1]

    return drawn


def lines(axes: Axes) -> list[list[tuple[float, float]]]:
    """Return the curves; not the marks, which are single points, nor what lies along the axes."""
    found = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
    return [[(float(x), float(y)) for x, y in points] for points in found if len(points) > 2]


def labels(ticks: Any) -> list[str]:
    return [tick.get_text() for tick in ticks]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def image(axes: Axes) -> np.ndarray[Any, Any]:
    """Return the cells' numbers; NaN where there is none."""
    (found,) = axes.images
    array = found.get_array()
    assert array is not None
    return np.ma.filled(array, math.nan)


def points(*, missing: tuple[float, float] | None = None) -> Points:
    return [
        ({"rank_ratio": ratio, "scale": scale}, ratio + scale / 10)
        for scale in (3.0, 2.0, 1.0)
        for ratio in (0.32, 0.02, 0.08)
        if (ratio, scale) != missing
    ]


def test_two_settings_are_a_map(figures):
    tuning_map(points(missing=(0.02, 3.0)), ["rank_ratio", "scale"], BEST, HERE)
    axes = figures[0].axes[0]
    expected = [[100 * (ratio + scale / 10) for ratio in (0.02, 0.08, 0.32)] for scale in (3.0, 2.0, 1.0)]
    cells = image(axes)
    assert np.isnan(cells).tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert cells[1:] == pytest.approx(np.array(expected)[1:])
    assert (labels(axes.get_xticklabels()), labels(axes.get_yticklabels())) == (["0.02", "0.08", "0.32"], list("321"))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == ("rank ratio", "scale", "")
    (frame,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert frame.get_xy() == (0.5, 0.5)  # second column, second row
    assert sorted(texts(axes))[:2] == ["12.0", "18.0"] and len(texts(axes)) == 8


def test_more_settings_than_two_are_drawn_at_the_best_of_the_others(figures):
    tried = [
        ({"weighting": "norm", "fuse": fuse, "rank": rank, "scale": scale}, rank / 100 + scale / 10 + fuse / 1000)
        for fuse in (True, False)
        for rank in (1, 2, 4)
        for scale in (2, 1)
    ]
    best = {"weighting": "norm", "fuse": True, "rank": 4, "scale": 2}
    tuning_map(tried, list(best), best, HERE)
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "at the best scale 2"
    assert (axes.get_xlabel(), labels(axes.get_xticklabels())) == ("fuse", ["true", "false"])
    assert (axes.get_ylabel(), labels(axes.get_yticklabels())) == ("rank", ["4", "2", "1"])
    assert image(axes).tolist()[0] == pytest.approx([24.1, 24.0])


def test_true_is_not_one(figures):
    """They are equal for Python, and two columns here."""
    tuning_map(
        [({"a": value, "b": b}, 0.5 + b) for value in (True, 1) for b in (0.1, 0.2)],
        ["a", "b"],
        {"a": 1, "b": 0.2},
        HERE,
    )
    axes = figures[0].axes[0]
    assert labels(axes.get_xticklabels()) == ["true", "1"]
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, -0.5)]


def test_one_setting_is_a_line(figures):
    one = [(settings, score) for settings, score in points() if settings["scale"] == 2.0]
    tuning_map(one, ["rank_ratio", "scale"], BEST, HERE)
    (line,) = lines(figures[0].axes[0])
    assert line == [pytest.approx(point) for point in ((0.02, 22.0), (0.08, 28.0), (0.32, 52.0))]
    assert texts(figures[0].axes[0]) == ["28.0"]
    words = [({"weighting": word}, 0.1 * place) for place, word in enumerate(("uniform", "norm", "size"), 5)]
    tuning_map(words, ["weighting"], {"weighting": "size"}, HERE)
    axes = figures[1].axes[0]
    assert labels(axes.get_xticklabels()) == ["uniform", "norm", "size"]
    assert lines(axes) == [[pytest.approx(point) for point in ((0, 50), (1, 60), (2, 70))]]


def test_the_curve_over_the_rank_has_a_line_for_each_scale(figures):
    rank_curve(points(missing=(0.02, 3.0)), BEST, HERE, 0.35)
    axes = figures[0].axes[0]
    assert axes.get_xscale() == "log"
    curves = {line.get_label(): line for line in axes.get_lines()}
    assert list(curves) == ["scale 1", "scale 2 (best)", "scale 3", "weight average"]
    assert curves["scale 2 (best)"].get_xydata() == pytest.approx(np.array([(0.02, 22), (0.08, 28), (0.32, 52)]))
    assert curves["scale 3"].get_xdata().tolist() == [0.08, 0.32]
    assert list(curves["weight average"].get_ydata()) == [35.0, 35.0]
    assert curves["scale 2 (best)"].get_linewidth() > curves["scale 1"].get_linewidth()
    rank_curve([({"rank_ratio": ratio}, ratio) for ratio in (0.1, 0.2, 0.0)], {"rank_ratio": 0.1}, HERE, None)
    (line,) = lines(figures[1].axes[0])
    assert [x for x, _ in line] == [0.0, 0.1, 0.2]


def test_the_weight_average_is_found_among_the_points():
    assert weight_average([({"rank_ratio": 0.1, "scale": 1.0}, 0.8), ({"rank_ratio": 1.0, "scale": 2}, 0.7)]) == 0.7
    assert weight_average([({"rank_ratio": 0.1, "scale": 0}, 0.6)]) == 0.6
    assert weight_average([({"rank_ratio": 0.1, "scale": 1.0}, 0.8), ({"rank_ratio": 1, "scale": 1}, math.nan)]) is None


def test_a_search_without_scores(tmp_path):
    for nothing in ([], [(BEST, 0.5)], [({"rank_ratio": ratio, "scale": 1}, math.nan) for ratio in (0.1, 0.2)]):
        with pytest.raises(UserError, match="fewer than two settings"):
            tuning_map(nothing, ["rank_ratio", "scale"], BEST, [tmp_path / "a.png"])
        with pytest.raises(UserError, match="fewer than two rank ratios"):
            rank_curve(nothing, BEST, [tmp_path / "a.png"], 0.5)
    assert not list(tmp_path.iterdir())


def test_spectra_have_a_panel_for_each_centre(drawn):
    told = document()
    told["mean"]["average"]["spectra"][1] = [0.4, 0.2, None, 0.0]
    figure = drawn("spectra", told)
    assert [axes.get_title() for axes in figure.axes] == [
        "centred: from the models' average",
        "uncentred: from the base",
    ]
    centred, uncentred = (lines(axes) for axes in figure.axes)
    assert centred[0] == [(0.01, 0.5), (0.1, 0.2), (0.3, 0.05), (1.0, 0.004)]
    assert [math.isnan(y) for _, y in centred[1]] == [False, False, True, True]
    assert len(uncentred) == 3
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert labels(figure.legends[0].get_texts()) == list(NAMES[:3])


def test_error_and_interference_share_their_axes(drawn):
    told = document()
    figure = drawn("reconstruction_interference", told)
    left, right, other_left, other_right = figure.axes
    for axes, centre, key in (
        (left, "average", "reconstruction"),
        (right, "average", "interference"),
        (other_left, "base", "reconstruction"),
        (other_right, "base", "interference"),
    ):
        curve = max(lines(axes), key=len)
        assert curve == list(zip(RATIOS, told["mean"][centre][key], strict=True))
    assert right.get_ylim() == other_right.get_ylim()
    assert left.get_ylim() == other_left.get_ylim()
    kept = 5 / 64  # the rank of every matrix
    mark = next(line for line in right.get_lines() if len(line.get_xdata()) == 1)
    assert mark.get_xydata() == pytest.approx(np.array([(kept, 4.5 * kept)]))  # I(k) is straight, and 4.5 at full rank
    assert "0.35" in texts(right)


def test_interference_of_each_layer_is_the_mean_of_its_matrices(drawn):
    axes = drawn("interference", document(layers=2)).axes[0]
    curves = {round(points[-1][1], 6): points for points in lines(axes)}
    assert sorted(curves) == [1.5, 2.5, 3.5, 4.5, 7.5, 10.5]  # (1 + 2) / 2, all, (3 + 4) / 2; around the base threefold
    thick = {line.get_label(): line.get_ydata()[-1] for line in axes.get_lines() if line.get_linewidth() > 2}
    assert thick == {"centred": 2.5, "uncentred": 7.5}


def test_similarity_has_the_same_colours_below_each_other(drawn):
    told = document(3)
    told["mean"]["average"]["cosine"][0][1] = None
    maps = [axes for axes in drawn("similarity", told).axes if axes.images and len(axes.images[0].get_array()) == 3]
    assert len(maps) == 6
    cosine, base_cosine, overlap, base_overlap, pairs, base_pairs = maps
    assert np.isnan(image(cosine)).tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    assert image(cosine)[1, 0] == pytest.approx(-0.05)
    assert cosine.images[0].get_clim() == base_cosine.images[0].get_clim() == pytest.approx((-0.15, 0.15))
    assert overlap.images[0].get_clim() == base_overlap.images[0].get_clim() == pytest.approx((0, 0.3))
    assert image(base_pairs)[1, 2] == told["mean"]["base"]["pairs"][1][2]
    assert "0.63" in texts(base_pairs) and "0.63" not in texts(pairs)
    assert [axes.get_ylabel() for axes in (cosine, base_cosine, overlap)] == ["centred", "uncentred", ""]
    assert labels(cosine.get_yticklabels()) == labels(base_pairs.get_xticklabels()) == list(NAMES[:3])


def test_layers_show_what_carries_which_task(drawn):
    told = document(3, layers=2)
    told["layers"]["retention"][0][1] = None
    panels = [axes for axes in drawn("layers", told).axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "share of the centred task vector's squared length (%)",
        "share of the uncentred task vector's squared length (%)",
        "change relative to the base (%)",
        "task vector found in the merge (1: all of it)",
    ]
    share, _, growth, retention = panels
    assert np.allclose(image(share), 100 * np.array(told["layers"]["share"]["average"]))
    assert image(growth)[2] == pytest.approx([4.0, 4.1, 4.2, 4.3])
    assert image(growth)[3] == pytest.approx([1.5] * 4)
    assert labels(growth.get_yticklabels()) == [*NAMES[:3], "merged"]
    assert np.isnan(image(retention)).tolist()[0] == [False, True, False, False]
    assert retention.images[0].get_clim() == (0.0, 1.0)
    assert [text for text in texts(share) if text] == ["0", "1", "encoder.layer"]
    assert labels(retention.get_xticklabels()) == ["embeddings", "", "", "pooler"]


def test_scores_are_relative_to_the_individual_models(drawn, figures):
    told = document()
    told["results"]["rows"].append({**told["results"]["rows"][-1], "name": "CART-Indexing 8 %", "method": "compress"})
    told["results"]["rows"][2]["scores"]["mnli"] = None
    axes = drawn("radar", told).axes[0]
    curves = {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}
    assert set(curves) == {"TIES", "CART", "individual (100 %)"}
    assert curves["CART"][:2] == pytest.approx([0.85 / 0.9, 0.84 / 0.89])
    assert math.isnan(curves["TIES"][1])
    told["results"]["rows"][1]["scores"] = {}
    with pytest.raises(UserError, match="no normalised score"):
        drawn("radar", told)


def test_the_search_is_drawn_with_its_average(drawn):
    told = document()
    curves = {line.get_label(): line.get_ydata() for line in drawn("rank_curve", told).axes[0].get_lines()}
    assert list(curves["weight average"]) == [70.0, 70.0]
    assert max(curves["scale 1.5 (best)"]) == pytest.approx(85.0)
    assert image(drawn("tuning", told).axes[0]).shape == (3, 4)


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


ALWAYS = ("spectra", "reconstruction_interference", "interference", "similarity", "layers")


def test_all_figures_are_files(tmp_path):
    assert draw(document(2, layers=1), tmp_path / "a") == []
    assert {path.name for path in (tmp_path / "a").iterdir()} == both(*FIGURES)
    for name in FIGURES:
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            assert min(picture.size) > 150
    again = tmp_path / "layers.svg"
    FIGURES["layers"](document(2, layers=1), [again])
    assert again.read_bytes() == (tmp_path / "a" / "layers.svg").read_bytes()


@pytest.mark.parametrize("models", [2, 20])
def test_what_is_missing_is_left_out(tmp_path, figures, models):
    """A single matrix, no base, no scores; many models; and a name that would be mathematics in TeX."""
    told = document(models, layers=1, base=False, results=None, tuning=None)
    told["matrices"] = told["matrices"][:1]
    assert draw(told, tmp_path) == []
    assert len(figures) == 2 * len(ALWAYS)
    assert [axes.get_title(loc="left") for axes in figures[-1].axes] == [
        "share of the centred task vector's squared length (%)",
        "",
    ]


def test_no_matrix_is_in_all_models(tmp_path, figures):
    """The means are empty, and there is no rank to mark; one of the centres may be missing from a matrix."""
    told = document(layers=1)
    whole = copy.deepcopy(told)
    told |= {"matrices": [], "mean": {centre: {key: [] for key in mean} for centre, mean in told["mean"].items()}}
    told["layers"] |= {"growth": None, "merged_growth": None, "retention": None}
    told["tuning"]["points"] = []  # chosen without data
    assert draw(told, tmp_path) == []
    assert len(figures) == 2 * 2  # layers and radar
    del whole["matrices"][0]["around"]["base"]
    whole["matrices"][1]["models"] = whole["matrices"][1]["models"][:2]
    FIGURES["interference"](whole, HERE)
    thin = [line.get_ydata()[-1] for line in figures[-1].axes[0].get_lines() if line.get_linewidth() < 1]
    assert thin == [1.0]  # the first matrix's, around the average
    whole["mean"]["base"] |= {"interference": [None] * len(RATIOS), "spectra": []}
    for name in ("spectra", "reconstruction_interference"):
        FIGURES[name](whole, HERE)
    assert [len(figure.axes) for figure in figures[-2:]] == [1, 2]  # no panel for the base


def test_notes_say_what_could_not_be_drawn(tmp_path, figures, monkeypatch):
    told = document(layers=1)
    told["results"]["rows"] = told["results"]["rows"][-1:]
    told["tuning"]["points"] = told["tuning"]["points"][:1]
    notes = draw(told, tmp_path)
    assert [note.partition(":")[0] for note in notes] == ["no plot"] * 3
    assert len(figures) == 2 * len(ALWAYS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw(document(), tmp_path) == ["plots need matplotlib: pip install 'cart-hf[plot]'"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw(document(layers=1), tmp_path / "file")
