"""The analysis page: one file that holds everything, whatever the models are called and whatever is missing; and, in a
browser, plots that are drawn, read and switched."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, Page, opened, started

from cart_hf.analysis.model import RATIOS
from cart_hf.analysis.page import write_page
from cart_hf.analysis.page.render import rendered
from cart_hf.figures.style import CART, COLOURS

TASKS = (
    *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "sun397", "stanford_cars", "resisc45", "eurosat"),
    *("svhn", "gtsrb", "mnist", "dtd", "flowers102", "pcam", "fer2013", "oxford-iiit-pet"),
)
PARTS = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
HOSTILE = (
    "</script><script>throw Error('ran')</script>",
    "\"'><img src=x onerror=\"throw Error('ran')\">",
    "<b>bold</b> & \u2028 {{ 7 * 7 }}",
    "非常に長い名前-" * 12 + "\udcff",
)
Document = dict[str, Any]


def rounded(values: Any) -> Any:
    """Return an array as `analysis.json` has it."""
    if isinstance(values, np.ndarray | list):
        return [rounded(value) for value in values]
    return None if np.isnan(values) else float(f"{values:.6g}")


def symmetric(random: np.random.Generator, count: int, middle: float, spread: float, diagonal: float) -> np.ndarray:
    values = middle + spread * random.standard_normal((count, count))
    values = (values + values.T) / 2
    np.fill_diagonal(values, diagonal)
    return values


def around(random: np.random.Generator, count: int, full: int, centre: str) -> Document:
    """Return measurements of one matrix that look like those of real models."""
    at = np.unique(np.linspace(1, full, 64).round()).astype(int)
    scales = 0.4 + random.random((count, 1))
    decay = 0.03 + 0.02 * random.random((count, 1))
    spectra = scales * (np.exp(-decay * np.arange(full)) + 0.12 * (1 - np.arange(full) / full) + 1e-4)
    squares = (spectra**2).sum(axis=1)
    kept = np.concatenate([np.zeros((count, 1)), np.cumsum(spectra**2, axis=1) / squares[:, None]], axis=1)
    ranks = np.array([int(ratio * full) for ratio in RATIOS])
    reconstruction = (squares[:, None] * (1 - kept[:, ranks])).sum(axis=0)
    pairs = count * (count - 1)
    height = (0.05 if centre == "average" else 0.085) * pairs
    sigma = spectra / np.sqrt(squares)[:, None]
    shares = sigma**2 / (sigma**2).sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(shares)).sum(axis=1)
    return {
        "spectra": rounded(spectra[:, at - 1]),
        "spectra_at": at.tolist(),
        "squares": rounded(squares),
        "reconstruction": rounded(reconstruction),
        "interference": rounded(height * np.sqrt(kept.mean(axis=0)[ranks])),
        "pairs": rounded(symmetric(random, count, 0.04, 0.01, 0.0)),
        "cosine": rounded(symmetric(random, count, -1 / count if centre == "average" else 0.06, 0.04, 1.0)),
        "overlap": rounded(symmetric(random, count, 0.16, 0.03, 1.0)),
        "effective_rank": rounded(np.exp(entropy)),
        "stable_rank": rounded(squares / spectra[:, 0] ** 2),
        "energy": rounded(kept[:, int(0.08 * full)]),
    }


def results_of(random: np.random.Generator, tasks: tuple[str, ...]) -> Document:
    alone = dict(zip(tasks, rounded(0.7 + 0.28 * random.random(len(tasks))), strict=True))

    def row(name: str, method: str | None, settings: str, share: float) -> Document:
        scores = {task: float(alone[task] * (share + 0.04 * random.standard_normal())) for task in tasks}
        if share == 1:
            scores = dict(alone)
        average = float(np.mean(list(scores.values())))
        normalized = float(np.mean([scores[task] / alone[task] for task in tasks]))
        return {
            "name": name,
            "method": method,
            "settings": settings,
            "scores": scores,
            "average": average,
            "normalized": normalized,
            "nbytes": None,
        }

    return {
        "source": "benchmark",
        "tasks": list(tasks),
        "rows": [
            row("pretrained", None, "", 0.45),
            row("weight average", "average", "", 0.78),
            row("task arithmetic", "task_arithmetic", "scale 0.3", 0.84),
            row("TIES", "ties", "density 0.2, scale 1", 0.86),
            row("CART", "cart", "rank_ratio 0.08, scale 2", 0.95),
            row("individual", None, "", 1),
        ],
    }


def tuning_of(tasks: tuple[str, ...], grid: dict[str, tuple[Any, ...]]) -> Document:
    names = list(grid)
    points = []
    for values in np.stack(np.meshgrid(*(np.array(grid[name], dtype=object) for name in names)), -1).reshape(
        -1, len(names)
    ):
        parameters = dict(zip(names, values.tolist(), strict=True))
        ratio, scale = parameters.get("rank_ratio", 0.08), parameters.get("scale", 2.0)
        bump = 0 if ratio in (0, 1) else scale * np.exp(-((np.log(ratio) - np.log(0.08)) ** 2) / 1.6) - 0.22 * scale**2
        average = float(np.round(0.71 + 0.13 * bump, 4))
        scores = {task: average + 0.01 * i for i, task in enumerate(tasks)}
        points.append({"parameters": parameters, "average": average, "scores": scores})
    best = max(points, key=lambda point: point["average"])["parameters"]
    return {
        "method": "cart",
        "parameters": names,
        "split": "validation",
        "limit": 250,
        "points": points,
        "best": best,
        "on_edge": ["scale"],
    }


GRID = {"rank_ratio": (0.02, 0.04, 0.08, 0.16, 0.32, 1.0), "scale": (1.0, 1.5, 2.0, 2.5)}


def make(
    models: int = 8,
    blocks: int = 12,
    *,
    base: bool = True,
    names: tuple[str, ...] = (),
    parts: tuple[str, ...] = PARTS,
    evaluated: bool = True,
    theorem: bool = True,
) -> Document:
    """Return a whole document, as `cart-hf analyze` would write it for that many models and blocks."""
    random = np.random.default_rng(models * 1000 + blocks)
    tasks = names or TASKS[:models]
    full, centres = 768, ("average", "base") if base else ("average",)
    matrices = [
        {
            "name": f"encoder.layer.{block}.{part}.weight",
            "path": "encoder.layer",
            "block": block,
            "part": part,
            "shape": [full, full],
            "rank": 61,
            "models": list(tasks),
            "around": {centre: around(random, models, full, centre) for centre in centres},
        }
        for block in range(blocks)
        for part in parts
    ]
    mean = {}
    for centre in centres:
        first: Document = matrices[0]["around"][centre]  # type: ignore[index]
        curve = np.array(first["reconstruction"])
        mean[centre] = {
            "reconstruction": rounded(curve / curve[0]),
            "interference": first["interference"],
            "spectra": rounded(
                np.array(first["spectra"]) / np.sqrt(len(matrices) * np.array(first["squares"])[:, None])
            ),
            "spectra_at": rounded(np.array(first["spectra_at"]) / full),
            "pairs": first["pairs"],
            "cosine": first["cosine"],
            "overlap": first["overlap"],
        }
    places = [{"path": "embeddings", "block": None, "label": "embeddings"}]
    places += [{"path": "encoder.layer", "block": block, "label": f"encoder.layer.{block}"} for block in range(blocks)]
    weights = random.random((models, len(places))) + np.linspace(0.3, 1.5, len(places))
    grown = 0.01 + 0.02 * random.random((models, len(places))) * np.linspace(0.5, 1.6, len(places))
    kept = 0.35 + 0.12 * random.standard_normal((models, len(places)))
    bounds = [
        {
            "name": matrix["name"],
            "path": matrix["path"],
            "block": matrix["block"],
            "part": matrix["part"],
            "centre": centre,
            "rank": 61,
            "inputs": 512,
            "loss": 0.02 + random.random(),
            "bound": 40.0,
            "unprojected": 3.0,
            "inside": 0.61,
        }
        for matrix in matrices
        for centre in centres
    ]
    return {
        "format": "cart-hf analysis 1",
        "about": {
            "method": "cart", "title": "CART", "parameters": {"rank_ratio": 0.08, "scale": 1.5},
            "base": "FacebookAI/roberta-base" if base else None,
            "base_hub_id": "FacebookAI/roberta-base" if base else None,
            "models": [{"name": task, "reference": f"textattack/roberta-base-{i}", "class": "RobertaForSequenceClassification", "hub_id": f"textattack/roberta-base-{i}"} for i, task in enumerate(tasks)],
            "output_class": "RobertaModel", "roles": {"low_rank": len(matrices), "average": 125, "base": 2}, "normalizer": "all",
            "ratios": list(RATIOS), "version": "0.1.0",
        },
        "matrices": matrices,
        "mean": mean,
        "blocks": places,
        "layers": {
            "share": {centre: rounded(weights / weights.sum(axis=1, keepdims=True)) for centre in centres},
            "growth": rounded(grown) if base else None,
            "merged_growth": rounded(grown.mean(axis=0)) if base else None,
            "retention": rounded(kept) if base else None,
        },
        "whole": {
            "update": rounded(4 * random.random(models)) if base else None, "centred": rounded(3 * random.random(models)),
            "growth": rounded(grown.mean(axis=1)) if base else None, "merged_growth": 0.012 if base else None,
            "merged_update": 3.3 if base else None, "retention": rounded(kept.mean(axis=1)) if base else None,
            "cosine": {centre: mean[centre]["cosine"] for centre in centres},
            "merged_cosine": rounded(0.4 + 0.05 * random.standard_normal(models)) if base else None,
        },
        "theorem": bounds if theorem else [],
        "warnings": [
            {"kind": "near_duplicates", "text": f"{tasks[0]} and {tasks[1]} are nearly the same model: the cosine of their updates is 0.98", "models": list(tasks[:2])},
            {"kind": "large_update", "text": f"{tasks[-1]}'s update is 20 times larger than the others'", "models": [tasks[-1]]},
        ],
        "results": results_of(random, tasks) if evaluated else None,
        "tuning": tuning_of(tasks, GRID) if evaluated else None,
    }  # fmt: skip


def without_numbers(document: Document) -> Document:
    """Replace numbers inside arrays by null, as NaN is written."""
    for matrix in document["matrices"][:2]:
        for measured in matrix["around"].values():
            measured["spectra"][0] = [0.0] * len(measured["spectra_at"])  # one model has not moved
            measured["squares"][0] = 0.0
            for key in ("effective_rank", "stable_rank", "energy"):
                measured[key][0] = None
            measured["cosine"][0] = [None] * len(matrix["models"])
    for measured in document["mean"].values():
        measured["spectra"][0] = [None] * len(measured["spectra_at"])
        measured["reconstruction"] = [None] * len(RATIOS)
        measured["interference"][3] = None
        measured["cosine"] = [[None] * len(row) for row in measured["cosine"]]
    document["whole"]["growth"][0] = document["layers"]["growth"][0][0] = document["layers"]["merged_growth"][0] = None
    document["layers"]["retention"] = [[None] * len(row) for row in document["layers"]["retention"]]
    document["results"]["rows"][0] |= {"average": None, "normalized": None, "scores": {}}
    document["tuning"]["points"][0] |= {"average": None, "scores": {}}
    document["theorem"][0]["bound"] = 0.0
    return document


def zero_spectra(document: Document) -> Document:
    for matrix in document["matrices"]:
        for measured in matrix["around"].values():
            measured["spectra"] = [[0.0] * len(row) for row in measured["spectra"]]
            measured["reconstruction"] = measured["interference"] = [0.0] * len(RATIOS)
    for measured in document["mean"].values():
        measured["spectra"] = [[0.0] * len(row) for row in measured["spectra"]]
    return document


def missing_models(document: Document) -> Document:
    """Let the last matrix be of two models, and the base lack it."""
    last = document["matrices"][-1]
    last["models"] = last["models"][1:3]
    del last["around"]["base"]
    measured = last["around"]["average"]
    for key in ("spectra", "squares", "effective_rank", "stable_rank", "energy", "pairs", "cosine", "overlap"):
        measured[key] = measured[key][1:3]
    for key in ("pairs", "cosine", "overlap"):
        measured[key] = [row[1:3] for row in measured[key]]
    return document


def nothing_in_common(document: Document) -> Document:
    empty: Document = {
        "reconstruction": [],
        "interference": [],
        "spectra": [],
        "spectra_at": [],
        "pairs": [],
        "cosine": [],
        "overlap": [],
    }
    return document | {"mean": {centre: dict(empty) for centre in document["mean"]}}


def partial_spectra(document: Document) -> Document:
    """Let only a quarter of the singular values be known."""
    count = sum(ratio <= 0.24 for ratio in RATIOS)
    document["about"]["ratios"] = list(RATIOS[:count])
    for measured in [
        *document["mean"].values(),
        *(m for matrix in document["matrices"] for m in matrix["around"].values()),
    ]:
        measured["spectra"] = [row[:16] for row in measured["spectra"]]
        for key in ("reconstruction", "interference"):
            measured[key] = measured[key][:count]
        measured["spectra_at"] = measured["spectra_at"][:16]
    return document


def evaluated(document: Document) -> Document:
    rows = document["results"]["rows"]
    merged = rows[4] | {"name": "merged model", "method": None, "nbytes": 91_000_000}
    return document | {
        "results": document["results"] | {"source": "evaluation", "rows": [merged, rows[5]]},
        "tuning": None,
    }


EDGES: dict[str, Callable[[], Document]] = {
    "nothing but two models and one matrix": lambda: make(
        2, 1, base=False, parts=("dense",), evaluated=False, theorem=False
    ),
    "20 models": lambda: make(20, 2),
    "300 matrices": lambda: make(2, 50, evaluated=False, theorem=False),
    "no matrices": lambda: nothing_in_common(make(3, 1, theorem=False) | {"matrices": []}),
    "no matrix of all models": lambda: nothing_in_common(missing_models(make(3, 1))),
    "a matrix of some models": lambda: missing_models(make(4, 2)),
    "nulls": lambda: without_numbers(make(4, 1)),
    "zeros": lambda: zero_spectra(make(3, 1)),
    "a part of the spectra": lambda: partial_spectra(make(3, 1)),
    "an evaluation": lambda: evaluated(make(5, 1)),
    "one parameter": lambda: (
        make(3, 1) | {"tuning": tuning_of(TASKS[:3], {"rank_ratio": (0.0, 0.01, 0.02, 0.08, 0.09, 0.32, 0.95, 1.0)})}
    ),
    "three parameters": lambda: (
        make(3, 1) | {"tuning": tuning_of(TASKS[:3], {"solver": ("exact", "fast"), **GRID, "trim": (0.0, 0.5)})}
    ),
    "one point": lambda: make(3, 1) | {"tuning": tuning_of(TASKS[:3], {"scale": (1.5,)}) | {"best": None}},
    "hostile names": lambda: make(4, 1, names=HOSTILE),
}


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Document], Path]:
    def written(document: Document) -> Path:
        path = tmp_path_factory.mktemp("page") / "index.html"
        write_page(document, path)
        return path

    return written


@pytest.fixture(scope="module")
def whole() -> Document:
    return make(8, 2)


class Tags(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def read(path: Path) -> Tags:
    return Tags(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", [name for name in EDGES if name != "20 models" and name != "300 matrices"])
def test_a_page_is_written_whatever_is_missing(case: str, page_of: Callable[[Document], Path]):
    document = EDGES[case]()
    page = read(page_of(document))
    assert page.text.count("models merged with CART") == 2  # title and heading
    places = {attributes.get("data-section") for _, attributes in page.tags} - {None}
    assert ("tuning" in places) == (document["tuning"] is not None)
    assert ("curves" in places) == bool(document["mean"]["average"]["reconstruction"])
    assert ("explorer" in places) == bool(document["matrices"])
    assert ("Theorem 1, checked" in page.text) == bool(document["theorem"])


def test_everything_is_in_the_file(whole: Document, page_of: Callable[[Document], Path]):
    path = page_of(whole)
    text, page = path.read_text(encoding="utf-8"), read(path)
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert {"http-equiv": "Content-Security-Policy", "content": policy} in [attributes for _, attributes in page.tags]
    assert not [
        attributes for _, attributes in page.tags if {"src", "srcset", "action", "background"} & attributes.keys()
    ]
    addresses = {attributes["href"] for _, attributes in page.tags if "href" in attributes}
    assert all(address.startswith(("#", "data:", "https://huggingface.co/")) for address in addresses if address)
    assert set(re.findall(r"https?://[\w.]+", text)) == {"https://huggingface.co", "http://www.w3.org"}  # SVG's name
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert all(colour in text for colour in (CART, *COLOURS))


def test_names_are_only_ever_text(page_of: Callable[[Document], Path]):
    document = EDGES["hostile names"]()
    document["about"] |= {"base": "</p><b>base", "output_class": "<i>Model", "parameters": {"<b>": "<b>"}}
    document["about"]["models"][0] |= {"reference": "\"><b onclick='x'>", "class": "<b>"}
    document["warnings"][0] |= {"kind": "<b>", "text": "<b>"}
    document["matrices"][0] |= {"name": "</script><b>", "path": "<b>", "part": "<b>"}
    document["theorem"][0] |= {"name": "</script><b>"}
    plain, hostile = read(page_of(make(4, 1))), read(page_of(document))
    tags = [
        sum(tag == name for tag, _ in page.tags) for page in (plain, hostile) for name in ("script", "img", "b", "i")
    ]
    assert tags[:4] == tags[4:]
    assert not [attributes for _, attributes in hostile.tags if any(name.startswith("on") for name in attributes)]
    for name in HOSTILE[:3]:
        assert name in hostile.text
    embedded = next(script for script in hostile.scripts if script.startswith('{"format"'))
    assert not re.search("[<>&\u2028\u2029]", embedded)
    assert [model["name"] for model in json.loads(embedded)["about"]["models"]][:3] == list(HOSTILE[:3])


def test_the_same_document_makes_the_same_bytes_and_is_left_alone(whole: Document, page_of: Callable[[Document], Path]):
    before = copy.deepcopy(whole)
    first = page_of(whole).read_bytes()
    assert whole == before
    assert first == page_of(json.loads(json.dumps(whole))).read_bytes()


def test_a_page_about_8_models_of_72_matrices_is_small(page_of: Callable[[Document], Path]):
    assert page_of(make(8, 12)).stat().st_size < 1.5e6


def test_numbers_that_json_lacks_are_refused(tmp_path: Path):
    document = make(2, 1)
    document["whole"]["centred"][0] = float("nan")
    with pytest.raises(ValueError):
        write_page(document, tmp_path / "index.html")
    assert not list(tmp_path.iterdir())


def test_hub_references_are_links_and_others_are_not(whole: Document, page_of: Callable[[Document], Path]):
    document = copy.deepcopy(whole)
    references = [
        "org/model",
        "org/model@main",
        "./local",
        "/abs/model",
        "org/base+adapter",
        "a/b/c",
        "model",
        "javascript:x",
    ]
    for model, reference in zip(document["about"]["models"], references, strict=True):
        model |= {"reference": reference, "hub_id": "org/model" if reference.startswith("org/model") else None}
    page = read(page_of(document))
    links = [
        attributes["href"]
        for tag, attributes in page.tags
        if tag == "a" and not (attributes["href"] or "").startswith("#")
    ]
    assert links == ["https://huggingface.co/FacebookAI/roberta-base", *["https://huggingface.co/org/model"] * 2]
    assert all(reference in page.text for reference in references)


def test_what_is_words_and_tables_needs_no_scripts(whole: Document, page_of: Callable[[Document], Path]):
    path = page_of(whole)
    page = read(path)
    for warning in whole["warnings"]:
        assert warning["text"] in page.text
    for row in whole["results"]["rows"]:
        for value in (*row["scores"].values(), row["average"], row["normalized"]):
            assert f"{100 * value:.1f}" in page.text
    best = re.findall(r'<td><b class="best">([\d.]+)</b>', path.read_text(encoding="utf-8"))
    merged = [row for row in whole["results"]["rows"] if row["method"]]
    most = [max(row["scores"][task] for row in merged) for task in TASKS[:8]]
    most += [max(row[key] for row in merged) for key in ("average", "normalized")]
    assert sorted(best) == sorted(f"{100 * value:.1f}" for value in most)
    assert "24 settings were scored on the validation split, at most 250 examples of each task" in page.text
    assert "the best scale lies on the edge" in page.text.lower()


def test_the_verdict_says_how_good_the_merge_is_or_else_what_its_rank_trades(whole: Document):
    def verdict(document: Document) -> str:
        found = re.search(r'<p class="verdict">(.*?)</p>', rendered(document))
        assert found is not None
        return found[1]

    rows = {row["name"]: row for row in whole["results"]["rows"]}
    kept, plain = (f"{100 * rows[name]['normalized']:.1f}\u202f%" for name in ("CART", "weight average"))
    average = f"{100 * rows['CART']['average']:.1f}"
    first = f"The merged model keeps {kept} of the 8 models’ own scores, {average} on average"
    assert verdict(whole) == f"{first}; their weight average keeps {plain}."
    assert verdict(evaluated(whole)) == f"{first}."
    alone = evaluated(whole)
    alone["results"] |= {"rows": [alone["results"]["rows"][0] | {"normalized": None}]}
    assert verdict(alone) == f"The merged model scores {average} on average over 8 tasks."

    unmeasured = whole | {"results": None, "mean": copy.deepcopy(whole["mean"])}
    for centre, height in (("average", 3.0), ("base", 4.0)):
        unmeasured["mean"][centre] |= {
            "reconstruction": [1 - ratio for ratio in RATIOS],
            "interference": [height] * len(RATIOS),
        }
    rank = f"{100 * 61 / 768:.3g}\u202f%"
    lost = f"At {rank} of the full rank, the merge leaves out 92\u202f% of what sets the models apart"
    assert verdict(unmeasured) == f"{lost}; centred, they collide 25\u202f% less than uncentred."
    unmeasured["mean"]["base"]["interference"] = [2.0] * len(RATIOS)
    assert verdict(unmeasured) == f"{lost}; centred, they collide 50\u202f% more than uncentred."
    unmeasured["mean"]["base"]["interference"] = [3.01] * len(RATIOS)
    assert verdict(unmeasured) == f"{lost}; centred, they collide about as much as uncentred."
    assert verdict(nothing_in_common(unmeasured)) == "8 models, merged by CART."


def test_theorem_1_is_told_as_loss_over_bound(page_of: Callable[[Document], Path]):
    document = make(2, 1, parts=("a", "b"))
    losses = (10.0, 20.0, 60.0, 4.0)
    for bound, loss in zip(document["theorem"], losses, strict=True):
        bound["loss"] = loss
    document["theorem"][3]["bound"] = 0.0
    text = page_of(document).read_text(encoding="utf-8")
    assert "In 2 of 3 checks loss / bound is at most 1; its median is 0.5, its largest value 1.5." in text
    assert text.count('<tr class="broken">') == 1


# What follows is what a reader does.

CHECK = """(() => {
  const outside = (box, frame) => box.left < frame.left - 1.5 || box.right > frame.right + 1.5 || box.top < frame.top - 1.5 || box.bottom > frame.bottom + 1.5;
  const plots = [...document.querySelectorAll('.plot svg')];
  return {
    wide: document.documentElement.scrollWidth - innerWidth,
    empty: [...document.querySelectorAll('[data-section]')].filter((place) => !place.querySelector('svg, .nothing')).map((place) => place.dataset.section),
    unnamed: plots.filter((plot) => !plot.getAttribute('aria-label')).length,
    strange: plots.filter((plot) => /NaN|undefined|null|Infinity/.test(plot.outerHTML)).map((plot) => plot.getAttribute('aria-label')),
    clipped: plots.flatMap((plot) => [...plot.querySelectorAll('text')].filter((text) => outside(text.getBoundingClientRect(), plot.getBoundingClientRect())).map((text) => text.textContent)),
    touching: plots.flatMap((plot) => [...plot.querySelectorAll('text.tick:not([transform])')].map((text) => [text, text.getBoundingClientRect()]).filter(([a, one], i, all) => all.slice(i + 1).some(([b, two]) => one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 4 && two.top < one.bottom - 4)).map(([text]) => text.textContent)),
  };
})()"""
SOUND = {"wide": 0, "empty": [], "unnamed": 0, "strange": [], "clipped": [], "touching": []}
PRESS_ALL = """(() => {
  const buttons = [...document.querySelectorAll('main button')];
  buttons.forEach((button) => button.click());
  document.querySelectorAll('main input').forEach((input) => input.click());
  document.querySelectorAll('main select').forEach((select) => [...select.options].map((option) => option.value).forEach((value) => {
    select.value = value;
    select.dispatchEvent(new Event('change'));
  }));
  return buttons.length;
})()"""


def middle(page: Page, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """Bring an element into view and return a place in it."""
    box = page.evaluate(
        f"""(() => {{
          const found = document.querySelector({selector!r});
          found.scrollIntoView({{ block: "center", behavior: "instant" }});
          const box = found.getBoundingClientRect();
          return [box.left, box.top, box.width, box.height];
        }})()"""
    )
    page.settle()
    return box[0] + x * box[2], box[1] + y * box[3]


def tip(page: Page) -> str | None:
    """Return what the tooltip says; None while there is none."""
    page.settle()
    return page.evaluate("document.querySelector('.tip').hidden ? null : document.querySelector('.tip').innerText")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        yield found


@pytest.mark.browser
@pytest.mark.parametrize("case", EDGES)
def test_every_page_is_drawn_on_a_phone(case: str, browser: Browser, page_of: Callable[[Document], Path]):
    path = page_of(EDGES[case]())
    with opened(browser, path, width=360, height=800) as page:
        assert page.evaluate(CHECK) == SOUND
        page.evaluate(PRESS_ALL)
        page.settle()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.problems == []
        assert page.requests == [path.resolve().as_uri()]


@pytest.fixture(scope="module")
def desktop(browser: Browser, whole: Document, page_of: Callable[[Document], Path]) -> Iterator[Page]:
    with opened(browser, page_of(whole), dark=True) as page:
        yield page
        assert page.problems == []


@pytest.mark.browser
def test_a_page_is_drawn_on_a_desktop_and_anew_when_the_window_changes(desktop: Page):
    assert desktop.evaluate(CHECK) == SOUND
    width = "document.querySelector('#spectra .plot svg').viewBox.baseVal.width"
    before = desktop.evaluate(width)
    for size in (700, 1280):
        desktop.resize(size)
        desktop.settle()
        assert (desktop.evaluate(width) == before) == (size == 1280)
        assert desktop.evaluate(CHECK) == SOUND


@pytest.mark.browser
@pytest.mark.parametrize(
    ("plot", "place", "says"),
    [
        ("#spectra .plot svg", (0.6, 0.6), ("rank: ", "cola", "stsb")),
        (
            "#trade-off .plot svg",
            (0.6, 0.6),
            ("rank: ", "centred (around the average)", "uncentred (around the base)", "%"),
        ),
        ("#results .plot svg", (0.6, 0.6), ("relative to the task's own model", "CART", "TIES")),
        ("#tuning .plot svg", (0.6, 0.6), ("rank_ratio 0.16, scale", "average score")),
        ("#layers .plot svg", (0.2, 0.7), ("encoder.layer.0", "share of the update", "%")),
        ("#similarity .plot svg", (0.9, 0.5), ("and", "cosine")),
        ("#movement .plot svg", (0.6, 0.6), ("growth", "%")),
        ("#explorer .plot svg", (0.6, 0.6), ("rank: ", "cola")),
    ],
)
def test_the_pointer_reads_values(desktop: Page, plot: str, place: tuple[float, float], says: tuple[str, ...]):
    desktop.hover(*middle(desktop, plot, *place))
    found = tip(desktop)
    assert found is not None
    assert all(word in found for word in says), found
    desktop.hover(2, 2)
    assert tip(desktop) is None


@pytest.mark.browser
def test_keys_read_values(desktop: Page, whole: Document):
    middle(desktop, "#trade-off .plot svg")
    desktop.evaluate("document.querySelector('#trade-off input').focus()")
    desktop.press("Tab")
    first = tip(desktop)
    assert first is not None
    assert "rank: 0\u202f%" in first
    desktop.press("ArrowRight")
    values = [f"{100 * whole['mean'][centre]['reconstruction'][1]:.1f}\u202f%" for centre in ("average", "base")]
    found = tip(desktop)
    assert found is not None
    assert all(value in found for value in ("rank: 0.5\u202f%", *values))
    assert values[0] in desktop.evaluate("document.querySelector('[aria-live]').textContent")
    desktop.press("Escape")
    assert tip(desktop) is None


@pytest.mark.browser
def test_a_finger_reads_values_one_plot_after_the_other(
    browser: Browser, whole: Document, page_of: Callable[[Document], Path]
):
    with opened(browser, page_of(whole), width=360) as page:
        for plot, word in (
            ("#results .plot svg", "CART"),
            ("#layers .plot svg", "share"),
            ("#movement .plot svg", "growth"),
        ):
            page.tap(*middle(page, plot, 0.6, 0.6))
            found = tip(page)
            assert found is not None
            assert word in found
        page.tap(*middle(page, "h2"))
        assert tip(page) is None
        assert page.problems == []


@pytest.mark.browser
def test_legends_and_switches_change_what_is_drawn(desktop: Page):
    def lines() -> int:
        desktop.settle()
        return int(desktop.evaluate("document.querySelectorAll('#spectra path.line').length"))

    click = "document.querySelector('#spectra .legend button{}').click()"
    assert lines() == 16  # of 8 models around two centres
    desktop.evaluate(click.format(""))
    assert lines() == 14
    desktop.evaluate(click.format(".all"))
    assert lines() == 16
    ticks = "[...document.querySelectorAll('#spectra .plot svg')].map((plot) => [...plot.querySelectorAll('text.tick')].map((text) => text.textContent))"
    before = desktop.evaluate(ticks)
    for box in (1, 2):  # a logarithm, and the small ranks
        desktop.evaluate(f"document.querySelectorAll('#spectra input')[{box - 1}].click()")
        desktop.settle()
        after = desktop.evaluate(ticks)
        assert after != before
        before = after
    cells = "[...document.querySelectorAll('#layers text.value')].map((text) => text.textContent).join()"
    seen = set()
    for i in range(4):  # share around two centres, growth, retention
        desktop.evaluate(f"document.querySelectorAll('#layers .choice button')[{i}].click()")
        desktop.settle()
        seen.add(desktop.evaluate(cells))
    assert len(seen) == 3  # the two shares of the made-up document are the same


@pytest.mark.browser
def test_the_explorer_goes_from_matrix_to_matrix(desktop: Page, whole: Document):
    def at() -> list[str]:
        desktop.settle()
        return list(
            desktop.evaluate(
                "[document.querySelector('#explorer h3').textContent, ...[...document.querySelectorAll('#explorer select')].map((one) => one.selectedOptions[0].textContent)]"
            )
        )

    names = [matrix["name"] for matrix in whole["matrices"]]
    assert at() == [names[0], "encoder.layer.0", PARTS[0]]
    for place in range(1, 8):
        desktop.evaluate("document.querySelectorAll('#explorer .steps button')[1].click()")
        assert at() == [names[place], f"encoder.layer.{place // 6}", PARTS[place % 6]]
    choose = "(() => {{ const select = document.querySelectorAll('#explorer select')[{}]; select.value = {!r}; select.dispatchEvent(new Event('change')); }})()"
    desktop.evaluate(choose.format(0, "encoder.layer.0"))
    assert at()[0] == names[1]  # the same part in the other block
    desktop.evaluate(choose.format(1, "5"))
    assert at()[0] == names[5]
    desktop.evaluate("document.querySelector('#explorer input').click()")  # a logarithm stays one
    desktop.evaluate("document.querySelectorAll('#explorer .steps button')[0].click()")
    assert at()[0] == names[4]
    assert desktop.evaluate("document.querySelector('#explorer input').checked")
    kept = whole["matrices"][4]["around"]["base"]["energy"][7]
    assert f"{100 * kept:.1f}\u202f%" in desktop.evaluate(
        "document.querySelector('#explorer tbody tr:last-child').textContent"
    )


@pytest.mark.browser
def test_without_scripts_the_words_and_tables_stay(
    browser: Browser, whole: Document, page_of: Callable[[Document], Path]
):
    with opened(browser, page_of(whole), scripts=False) as page:
        text = page.evaluate("document.body.innerText")
        shown = page.evaluate(
            "[...document.querySelectorAll('main section')].filter((one) => one.offsetHeight).map((one) => one.id)"
        )
    assert shown == ["", "merged", "results", "tuning", "theorem", "glossary"]
    assert "The plots need JavaScript" in text
    assert whole["warnings"][0]["text"] in text
    assert f"{100 * whole['results']['rows'][4]['average']:.1f}" in text
