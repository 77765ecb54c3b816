"""An analysis on a model's card: its figures, its numbers, nothing that is not meant for others, and nothing by halves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from analysis_documents import document
from checkpoints import make_family
from hub_server import serving
from hub_uploads import Account, WritableHub, wrong_metadata
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from PIL import Image

import cart_hf
from cart_hf.analysis.figures.parts import FIGURES as DRAWN
from cart_hf.publishing import write_card
from cart_hf.publishing.analysis import add_to_card
from cart_hf.publishing.card import is_ours
from cart_hf.publishing.summary import FIGURES, PUBLISHED

TASKS = ("sst2", "mnli", "rte")
SECRET, TOKEN = "/home/someone/models", "hf_writer"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a merged RoBERTa and a compressed one."""
    folder = tmp_path_factory.mktemp("analysed")
    base, places = make_family(folder, "roberta")
    models = [f"{task}={place}" for task, place in zip(TASKS, places, strict=True)]
    cart_hf.merge(base=base, models=models, output=folder / "merged", rank_ratio=0.08, scale=1.5)
    cart_hf.compress(base=base, models=models, output=folder / "compressed", rank_ratio=0.25)
    return folder


@pytest.fixture
def merged(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "merged", tmp_path / "merged"))


def analysis_of(merged: Path, folder: Path, *, figures: bool = True, **changes: Any) -> Path:
    """Write what `cart-hf analyze` would, of the models that a folder is made of.

    :param changes: of the document.
    """
    record = json.loads((merged / "merge.json").read_text())
    told = document(3, results=None)
    for model, source in zip(told["about"]["models"], record["models"], strict=True):
        model |= {"name": source["name"], "reference": source["reference"]}
    told["about"] |= {"method": record["method"], "parameters": record["parameters"]}
    told["layers"]["share"]["average"] = [[0.1, 0.2, 0.35 - 0.05 * place, 0.15, 0.1, 0.1] for place in range(3)]
    told["warnings"] = [
        {"kind": "merge", "text": f"{SECRET}/a: its head was cut", "models": []},
        {"kind": "near_duplicates", "text": "mnli and rte are near duplicates", "models": ["mnli", "rte"]},
    ]
    told |= changes
    (folder / "figures").mkdir(parents=True)
    (folder / "analysis.json").write_text(json.dumps(told))
    (folder / "index.html").write_text(SECRET)
    for name in DRAWN if figures else ():
        Image.new("RGB", (2, 2)).save(folder / "figures" / f"{name}.png")
        (folder / "figures" / f"{name}.svg").write_text("")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_card_shows_figures_and_says_numbers(merged: Path, tmp_path: Path) -> None:
    before = contents(merged)
    add_to_card(merged, analysis_of(merged, tmp_path / "analysis"))
    after = contents(merged)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", *PUBLISHED}
    text = after["README.md"].decode()
    assert is_ours(text)
    section = text.split("## Analysis\n")[1].split("\n## ")[0]
    assert section.startswith("\n`cart-hf analyze` measured the weights of the 3 models around their average and")
    # rank 5 of 64; I(k) is straight, 4.5 and 13.5 at the full rank; R(k) is a line between samples of exp(-9 k / r)
    assert "At rank ratio 0.0781, the merge keeps 50.3 % of what sets the models apart" in section
    assert "interfere by I = 0.352 centred and 1.05 uncentred (singular values over the norm of all of them)" in section
    assert "R(k) / R(0) = 0.50 and I = 0.352 centred and 1.05 uncentred" in section
    assert "most, uncentred: `sst2` and `rte` (cosine 0.15); most, centred: `sst2` and `rte` (cosine -0.05)." in section
    assert "squared length, 30.0 % in the mean of the models, lies in `encoder.layer.1`." in section
    assert "on the validation split: best at rank_ratio 0.08, scale 1.5 (85.0 %)." in section
    assert "\nWarnings:\n\n- mnli and rte are near duplicates.\n" in section
    assert [f"![{words}](analysis/{name})" in section for name, words in FIGURES.items()] == [True] * 5
    assert not wrong_metadata(ModelCard(text).data.to_dict())


def test_figures_of_the_card_are_drawn() -> None:
    assert {name.removesuffix(".png") for name in FIGURES} < set(DRAWN)


def test_it_is_rendered_again_from_the_folder_alone(merged: Path, tmp_path: Path) -> None:
    analysis = analysis_of(merged, tmp_path / "analysis")
    add_to_card(merged, analysis)
    shutil.rmtree(analysis)
    written = (merged / "README.md").read_bytes()
    write_card(merged, "merged")
    assert (merged / "README.md").read_bytes() == written
    text = written + (merged / "analysis" / "summary.json").read_bytes()
    assert SECRET.encode() not in text and str(tmp_path.parent).encode() not in text
    (merged / "analysis" / "radar.png").unlink()
    write_card(merged, "merged")
    assert "radar.png" not in (merged / "README.md").read_text()
    shutil.rmtree(merged / "analysis")
    write_card(merged, "merged")
    assert "Analysis" not in (merged / "README.md").read_text()


def test_a_later_analysis_takes_the_place_of_an_earlier_one(merged: Path, tmp_path: Path) -> None:
    add_to_card(merged, analysis_of(merged, tmp_path / "first"))
    told = json.loads((tmp_path / "first" / "analysis.json").read_text())
    scores = (("CART", "cart", 0.94), ("TIES", "ties", 1.0), ("merged model", None, 0.9), ("individual", None, 1.0))
    rows = [{"name": name, "method": method, "normalized": score} for name, method, score in scores]
    results = {"source": "benchmark", "tasks": [], "rows": rows}
    second = analysis_of(merged, tmp_path / "second", results=results, mean={"average": told["mean"]["average"]})
    (second / "figures" / "similarity.png").unlink()
    add_to_card(merged, second)
    assert {path.name for path in (merged / "analysis").iterdir()} == {"summary.json", *FIGURES} - {"similarity.png"}
    text = (merged / "README.md").read_text()
    assert "Normalised scores, relative to each task's own model: CART 94.0 %, merged model 90.0 % on average." in text
    assert "around their average." in text and "uncentred" not in text and "similarity.png" not in text


def test_numbers_alone_are_told_without_figures(merged: Path, tmp_path: Path) -> None:
    """Where there was no matplotlib, no matrix that all models have, and no search."""
    nothing = {"average": {"reconstruction": [], "interference": [], "cosine": []}}
    changes = {"matrices": [], "mean": nothing, "tuning": None, "warnings": []}
    add_to_card(merged, analysis_of(merged, tmp_path / "analysis", figures=False, **changes))
    section = (merged / "README.md").read_text().split("## Analysis\n")[1].split("\n## ")[0]
    assert section.strip() == "`cart-hf analyze` measured the weights of the 3 models around their average."


def test_the_card_of_a_compressed_folder(world: Path, tmp_path: Path) -> None:
    """Of another method than the analysis: a compression has none."""
    folder = Path(shutil.copytree(world / "compressed", tmp_path / "compressed"))
    before = contents(folder)
    add_to_card(folder, analysis_of(world / "merged", tmp_path / "analysis"))
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", *PUBLISHED}
    assert b"## Analysis" in after["README.md"]


def test_references_in_other_words_are_the_same_models(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis = analysis_of(merged, tmp_path / "analysis")
    told = json.loads((analysis / "analysis.json").read_text())
    record = json.loads((merged / "merge.json").read_text())
    recipe = yaml.safe_load((merged / "cart_hf.yaml").read_text())
    place = Path(recipe["models"][0]["model"])
    monkeypatch.chdir(place.parent)
    for source, entry, reference in zip(
        record["models"][1:], recipe["models"][1:], ("org/mnli@main", "org/rte"), strict=True
    ):
        source["reference"] = reference
        entry["model"] = f"{reference.partition('@')[0]}@{'b' * 40}"
    (merged / "merge.json").write_text(json.dumps(record))
    (merged / "cart_hf.yaml").write_text(yaml.safe_dump(recipe))
    for model, reference in zip(
        told["about"]["models"], (f"./{place.name}", f"org/mnli@{'b' * 40}", "org/rte@v1"), strict=True
    ):
        model["reference"] = reference
    (analysis / "analysis.json").write_text(json.dumps(told))
    add_to_card(merged, analysis)
    assert "## Analysis" in (merged / "README.md").read_text()
    told["about"]["models"][1]["reference"] = f"org/mnli@{'c' * 40}"
    (analysis / "analysis.json").write_text(json.dumps(told))
    with pytest.raises(cart_hf.UserError, match=r"its mnli is org/mnli@cccccc.*, not org/mnli@bbbbbb"):
        add_to_card(merged, analysis)


def rename_model(folder: Path, analysis: Path) -> None:
    change_about(analysis, lambda about: about["models"][0].update(name="cola"))


def change_reference(folder: Path, analysis: Path) -> None:
    change_about(analysis, lambda about: about["models"][2].update(reference="org/other"))


def change_scale(folder: Path, analysis: Path) -> None:
    change_about(analysis, lambda about: about["parameters"].update(scale=2.0))


def change_method(folder: Path, analysis: Path) -> None:
    change_about(analysis, lambda about: about.update(method="ties", parameters={"density": 0.2}))


def change_about(analysis: Path, change: Callable[[dict[str, Any]], object]) -> None:
    told = json.loads((analysis / "analysis.json").read_text())
    change(told["about"])
    (analysis / "analysis.json").write_text(json.dumps(told))


def change_format(folder: Path, analysis: Path) -> None:
    (analysis / "analysis.json").write_text('{"format": "cart-hf analysis 9"}')


def truncate(folder: Path, analysis: Path) -> None:
    (analysis / "analysis.json").write_text('{"format": ')


def remove(folder: Path, analysis: Path) -> None:
    (analysis / "analysis.json").unlink()


def empty(folder: Path, analysis: Path) -> None:
    (folder / "merge.json").unlink()


def edit_card(folder: Path, analysis: Path) -> None:
    with (folder / "README.md").open("a") as card:
        card.write("\nMy own words.\n")


def analyse_into_it(folder: Path, analysis: Path) -> None:
    shutil.rmtree(folder / "analysis", ignore_errors=True)
    shutil.copytree(analysis, folder / "analysis")


def block_card(folder: Path, analysis: Path) -> None:
    """What is there cannot be replaced by a file."""
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    (folder / "README.md" / "note.txt").write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename_model, r"of other models \(cola, mnli, rte\) than .*merged is made of \(sst2, mnli, rte\): analyse .*yaml"),
        (change_reference, r"its rte is org/other, not .*task2; analyse .*cart_hf.yaml"),
        (change_scale, r"another merge \(cart, .*scale 2\.0.*\) than .*merged is \(cart, .*scale 1\.5"),
        (change_method, r"another merge \(ties, density 0\.2\) than .* is \(cart, "),
        (change_format, r"analysis\.json is not what this version of cart-hf writes \(format 'cart-hf analysis 9'"),
        (truncate, r"analysis\.json is damaged"),
        (remove, r"is not an analysis \(analysis\.json: No such file.*expected a folder of cart-hf analyze"),
        (empty, r"merged is not an output of cart-hf \(no merge\.json\)"),
        (edit_card, r"README\.md was edited by people and is not replaced"),
        (analyse_into_it, r"merged/analysis exists and was not made for the card: rename it"),
        (block_card, r"cannot write .*merged: Is a directory"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("earlier", [False, True])
def test_what_does_not_fit_is_refused_and_nothing_changes(
    merged: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str, earlier: bool
) -> None:
    analysis = analysis_of(merged, tmp_path / "analysis")
    if earlier:
        add_to_card(merged, analysis_of(merged, tmp_path / "before", tuning=None))
    spoil(merged, analysis)
    before = contents(merged)
    with pytest.raises(cart_hf.UserError, match=message) as found:
        add_to_card(merged, analysis)
    assert len(found.value.problems) == 1
    assert contents(merged) == before
    assert not [path for path in merged.rglob("*") if path.is_dir() and path.name.startswith(".")]


def test_a_damaged_summary_is_refused(merged: Path, tmp_path: Path) -> None:
    add_to_card(merged, analysis_of(merged, tmp_path / "analysis"))
    summary = merged / "analysis" / "summary.json"
    for text, message in (("{", "is damaged"), ("{}", "is damaged"), ('{"format": "x"}', "not what this version")):
        summary.write_text(text)
        with pytest.raises(cart_hf.UserError, match=rf"summary\.json {message}|summary\.json is {message}"):
            write_card(merged, "merged")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with serving({TOKEN: Account("me", {})}, WritableHub) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        close_session()  # the client made it with other settings
        yield hub
        close_session()


def analysed(folder: Path) -> set[str]:
    """Return the files of an analysis in a folder."""
    return {name for name in contents(folder) if name.startswith("analysis/")}


def test_figures_arrive_on_the_hub_and_nothing_else_of_the_analysis(
    hub: WritableHub, merged: Path, tmp_path: Path
) -> None:
    """What is not there any more goes from the repository; what else lies in the folder stays at home."""
    add_to_card(merged, analysis_of(merged, tmp_path / "analysis"))
    shutil.copytree(tmp_path / "analysis", merged / "analysis", dirs_exist_ok=True)
    assert len(analysed(merged)) > 20
    first = cart_hf.push(merged, "me/analysed", token=TOKEN)
    assert {name for name in first.files if name.startswith("analysis/")} == PUBLISHED
    repository = hub.repositories["me/analysed"]
    files = {name: file.path.read_bytes() for name, file in repository.commits[repository.refs["main"]].items()}
    assert {name for name in files if name.startswith("analysis/")} == PUBLISHED
    assert all(files[name] == (merged / name).read_bytes() for name in PUBLISHED)
    assert "![normalised scores](analysis/radar.png)" in files["README.md"].decode()
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data or SECRET.encode() in data]
    (merged / "analysis" / "radar.png").unlink()
    assert cart_hf.push(merged, "me/analysed", token=TOKEN).deleted == ["analysis/radar.png"]
    (merged / "analysis" / "summary.json").unlink()
    third = cart_hf.push(merged, "me/analysed", token=TOKEN)
    assert list(third.files) == ["README.md"] and "analysis/summary.json" in third.deleted
