"""The benchmark's figures: files that open, the same every time, with the names and numbers in them."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from cart_hf.benchmarking.figures import bars, radar, sizes
from cart_hf.errors import UserError

CURVE = {"1 %": (0.14, 0.84), "8 %": (0.24, 0.97), "100 %": (1.58, 1.0)}
ROWS = ("weight average", "task arithmetic", "TIES", "CART")
TASKS = ("sst2", "clinc150_kitchen_and_dining", "rte", "mnli")


def normalised(tasks: int = 4, rows: tuple[str, ...] = ROWS) -> dict[str, dict[str, float]]:
    names = [*TASKS, *(f"task_{i}" for i in range(tasks - 4))][:tasks]
    return {row: {name: 0.7 + 0.05 * i - 0.01 * j for j, name in enumerate(names)} for i, row in enumerate(rows)}


def needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


def texts(path: Path) -> list[str]:
    """Return the texts of an SVG file, in the order they were drawn."""
    return [element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def placed(path: Path) -> dict[str, tuple[float, float]]:
    """Return where each text of an SVG file lies: to the right, and down; of equal texts the last."""
    found = {}
    for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text"):
        moved = re.match(r"translate\(([\d.-]+) ([\d.-]+)\)", element.get("transform", ""))
        x, y = moved.groups() if moved else (element.get("x", "nan"), element.get("y", "nan"))
        found[element.text or ""] = (float(x), float(y))
    return found


def drawn(draw, folder: Path, *arguments: object) -> list[str]:
    """Draw to an SVG file and return its texts."""
    draw(*arguments[:1], [folder / "figure.svg"], *arguments[1:])
    return texts(folder / "figure.svg")


def points(path: Path, colour: str) -> list[int]:
    """Return how many points the lines of a colour have in an SVG file."""
    lines = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}path")
    return [
        line.get("d", "").count("L") + line.get("d", "").count("M")
        for line in lines
        if f"stroke: {colour}" in line.get("style", "") and "fill: none" in line.get("style", "")
    ]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 20])
def test_radar_files(tmp_path, tasks):
    needs_matplotlib()
    paths = [tmp_path / "radar.png", tmp_path / "radar.svg"]
    radar(normalised(tasks), paths)
    with Image.open(paths[0]) as image:
        image.load()
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert 800 < image.width < 1700
    shown = texts(paths[1])
    assert {*ROWS, "individual (100 %)"} <= set(shown)
    if tasks >= 3:
        assert "100 %" in shown
        assert [name for name in ("clinc150_", "kitchen_and_", "dining") if name not in shown] == []


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_same_bytes_twice(tmp_path, kind):
    """Neither the date nor what was drawn before, nor the user's own settings, change a file."""
    needs_matplotlib()
    import matplotlib

    files = [tmp_path / f"{i}.{kind}" for i in range(6)]
    radar(normalised(), [files[0]])
    bars({"CART": 0.8}, [files[1]], {})
    sizes(CURVE, [files[4]], {"CART": (0.13, 0.9)})
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        radar(normalised(), [files[2]])
        bars({"CART": 0.8}, [files[3]], {})
        sizes(CURVE, [files[5]], {"CART": (0.13, 0.9)})
        assert dict(matplotlib.rcParams) == settings
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[1].read_bytes() == files[3].read_bytes()
    assert files[4].read_bytes() == files[5].read_bytes()
    assert files[0].read_bytes() != files[1].read_bytes()


def test_two_formats_are_one_figure(tmp_path):
    """A figure is the same alone and beside another format."""
    needs_matplotlib()
    radar(normalised(), [tmp_path / "a.png", tmp_path / "a.svg"])
    radar(normalised(), [tmp_path / "b.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("least", "centre"),
    [
        (0.98, 0.95),
        (0.95, 0.90),
        (0.83, 0.80),
        (0.66, 0.60),
        (0.64, 0.50),
        (0.54, 0.40),
        (0.45, 0.20),
        (0.05, 0.0),
        (-0.3, 0.0),
    ],
)
def test_centre_is_below_the_lowest_score(tmp_path, least, centre):
    needs_matplotlib()
    shown = drawn(radar, tmp_path, {"CART": {"a": least, "b": 1.0, "c": 0.99}})
    circles = [float(text.removesuffix(" %")) for text in shown if text.endswith(" %")]
    assert circles[0] == 100 * centre
    assert circles[-1] == 100
    assert len(circles) <= 6


def test_line_has_a_gap(tmp_path):
    """A task that a row lacks, or NaN, is neither drawn at zero nor bridged."""
    needs_matplotlib()
    whole = {"CART": {"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.9}}
    radar(whole, [tmp_path / "whole.svg"])
    assert 5 in points(tmp_path / "whole.svg", "#d55e00")  # four tasks, and back to the first
    for lacking in ({"a": 0.9, "b": 0.9, "d": 0.9}, {"a": 0.9, "b": 0.9, "c": math.nan, "d": 0.9}):
        radar({"TIES": whole["CART"], "CART": lacking}, [tmp_path / "gap.svg"])
        assert 4 in points(tmp_path / "gap.svg", "#d55e00")
        assert 5 not in points(tmp_path / "gap.svg", "#d55e00")
        assert "c" in texts(tmp_path / "gap.svg")


def test_cart_stands_out(tmp_path):
    needs_matplotlib()
    radar(normalised(rows=(*ROWS, "CART (fused qkv)")), [tmp_path / "radar.svg"])
    styles = [
        line.get("style", "")
        for line in ElementTree.parse(tmp_path / "radar.svg").iter("{http://www.w3.org/2000/svg}path")
        if "stroke-width: 2.8" in line.get("style", "")
    ]
    assert len(styles) == 4  # two lines, and two samples in the legend
    assert all("#d55e00" in style for style in styles)
    assert len([style for style in styles if "dasharray" in style]) == 2


def test_individual_is_the_circle(tmp_path):
    needs_matplotlib()
    shown = drawn(radar, tmp_path, {"individual": dict.fromkeys(TASKS, 1.0), **normalised()})
    assert [text for text in shown if text.startswith("individual")] == ["individual (100 %)"]


def test_bars_of_two_tasks(tmp_path):
    needs_matplotlib()
    scores = {"TIES": {"sst2": 0.81, "rte": math.nan}, "CART": {"sst2": 0.987, "rte": -0.031}}
    shown = drawn(radar, tmp_path, scores)
    assert {"81.0", "98.7", "-3.1", "–", "sst2", "rte", "TIES", "CART"} <= set(shown)


def test_bars(tmp_path):
    """Names in their order, values in percent, and the references with theirs."""
    needs_matplotlib()
    averages = {"weight average": 0.659, "TIES": math.nan, "mine $x$ & <y>": 0.04, "CART": 0.847}
    shown = drawn(bars, tmp_path, averages, {"individual": 0.905, "pretrained": 0.48})
    assert [text for text in shown if text in averages] == list(averages)
    assert {"65.9", "no score", "4.0", "84.7", "individual 90.5", "pretrained 48.0"} <= set(shown)


@pytest.mark.parametrize("reference", [{}, {"individual": 0.9}, {"pretrained": 0.2, "individual": math.nan}])
def test_bars_without_references(tmp_path, reference):
    needs_matplotlib()
    shown = drawn(bars, tmp_path, {"CART": 0.8}, reference)
    lines = [text for text in shown if text.startswith(("individual", "pretrained"))]
    assert len(lines) == sum(not math.isnan(value) for value in reference.values())


def test_sizes(tmp_path):
    """The curve's labels in their places, the other models by name, and the individual ones where they are."""
    needs_matplotlib()
    models = {"individual": (1.0, 1.0), "weight average": (0.125, 0.73), "CART": (0.125, math.nan)}
    paths = [tmp_path / "sizes.png", tmp_path / "figure.svg"]
    sizes(CURVE | {"64 %": (1.1, math.nan)}, paths, models)
    with Image.open(paths[0]) as image:
        image.load()
        assert 800 < image.width < 1400
    shown = placed(paths[1])
    assert {"CART-Indexing", "(labels: rank kept)", "weight average", "individual models", *CURVE} <= set(shown)
    assert not {"CART", "64 %", "individual"} & set(shown)
    lefts = [shown[name][0] for name in ("weight average", "1 %", "8 %", "individual models", "100 %")]
    assert lefts == sorted(lefts)
    heights = [shown[name][1] for name in ("individual models", "100 %", "8 %", "1 %", "weight average")]
    assert heights == sorted(heights)


def test_names_of_many_models_do_not_overlap(tmp_path):
    needs_matplotlib()
    models = {f"method {i}": (0.125, 0.8 + 0.001 * (i % 5)) for i in range(30)}
    sizes(CURVE, [tmp_path / "sizes.svg"], models)
    shown = placed(tmp_path / "sizes.svg")
    heights = sorted(shown[name][1] for name in models)
    assert min(below - above for above, below in itertools.pairwise(heights)) > 12  # a line of 10 points
    in_order = sorted(models, key=lambda name: -shown[name][1])
    scores = [models[name][1] for name in in_order]
    assert scores == sorted(scores)


@pytest.mark.parametrize("curve", [{}, {"8 %": (0.2, math.nan)}])
def test_no_sizes_to_draw(tmp_path, curve):
    with pytest.raises(UserError, match="no size of CART-Indexing has a score"):
        sizes(curve, [tmp_path / "sizes.png"], {"CART": (0.1, 0.9)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "scores", [{}, {"CART": {}}, {"CART": {"a": math.nan, "b": math.nan}}, {"individual": {"a": 1.0}}]
)
def test_nothing_to_draw(tmp_path, scores):
    with pytest.raises(UserError, match="no normalised score"):
        radar(scores, [tmp_path / "radar.png"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("averages", [{}, {"CART": math.nan}])
def test_no_bars_to_draw(tmp_path, averages):
    with pytest.raises(UserError, match="no average score"):
        bars(averages, [tmp_path / "bars.png"], {"individual": 0.9})
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_missing(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'cart-hf\[plot\]'"):
        radar(normalised(), [tmp_path / "radar.png"])
    with pytest.raises(UserError, match=r"pip install 'cart-hf\[plot\]'"):
        bars({"CART": 0.8}, [tmp_path / "bars.png"], {})
    with pytest.raises(UserError, match=r"pip install 'cart-hf\[plot\]'"):
        sizes(CURVE, [tmp_path / "sizes.png"], {})
    assert not list(tmp_path.iterdir())


def test_no_display_and_no_pyplot(tmp_path):
    """Importing the module costs nothing, and drawing starts no window system."""
    needs_matplotlib()
    code = (
        "import sys; from pathlib import Path; from cart_hf.benchmarking.figures import bars; "
        "assert 'matplotlib' not in sys.modules; "
        f"bars({{'CART': 0.8}}, [Path({str(tmp_path / 'bars.png')!r})], {{}}); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
