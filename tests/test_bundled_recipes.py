"""The recipes that come along: they load, name the tasks of their suite, and say above what to type and to expect."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
import yaml
from commands import succeed

from cart_hf.cli import app
from cart_hf.conversion.find import name_of
from cart_hf.methods import all_methods
from cart_hf.recipe import Recipe, Reference
from cart_hf.recipe.bundled import bundled_recipes, title_of
from cart_hf.tasks import find_tasks, suites

RECIPES = bundled_recipes()
CLIP = [name for name in RECIPES if name.startswith("clip-vit-")]
PAPER = [name for name in CLIP if name.endswith("-paper")]
FUSION_BENCH = [name for name in CLIP if name not in PAPER]
GLUE = [name for name in RECIPES if name.startswith("roberta-base-glue-")]
BENCHMARKS = [*CLIP, *GLUE]
LOCAL = ["minilm-text-8", "small-clip-images-6"]
BACKBONES = {"b32": "base-patch32", "b16": "base-patch16", "l14": "large-patch14"}
# the data sets' names in the folders of the CART and TALL-masks checkpoints, in the order of their tables
DATA_SETS = (
    *("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SVHN", "SUN397"),
    *("STL10", "OxfordIIITPet", "Flowers102", "CIFAR100", "PCAM", "FER2013"),
    *("CIFAR10", "Food101", "FashionMNIST", "RenderedSST2", "EMNIST", "KMNIST"),
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder that has what `cart-hf convert` and our scripts would have written."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in [*PAPER, *LOCAL]:
        declared = yaml.safe_load(text_of(name))
        for place in [declared["base_model"], *(entry["model"] for entry in declared["models"])]:
            if place.startswith("./"):
                (folder / place).mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def text_of(name: str) -> str:
    return RECIPES[name].read_text(encoding="utf-8")


@cache
def loaded(name: str) -> Recipe:
    """Return a recipe as it is read in :func:`folder`."""
    return Recipe.load(RECIPES[name])


def commands(name: str) -> list[list[str]]:
    """Return the words of the commands in a recipe's header, without their remarks."""
    comment = [line[1:] for line in text_of(name).splitlines() if line.startswith("#")]
    lines = "\n".join(comment).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("   cart-hf ")]


def of_verb(name: str, verb: str) -> list[list[str]]:
    return [words[2:] for words in commands(name) if words[1] == verb]


def after(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def test_which_recipes_there_are():
    sizes = (8, 14, 20)
    expected = {f"clip-vit-{backbone}-{size}" for backbone in BACKBONES for size in sizes}
    expected |= {f"clip-vit-{backbone}-{size}-paper" for backbone in ("b32", "l14") for size in sizes}
    expected |= set(LOCAL)
    expected |= {"roberta-base-glue-8", "roberta-base-glue-7", "roberta-two-tasks-ties"}
    assert expected <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_loads_without_network(name, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a recipe is read without the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    recipe = Recipe.load(RECIPES[name])
    assert len({str(entry.model) for entry in recipe.models}) == len(recipe.models) >= 2


@pytest.mark.parametrize("name", RECIPES)
def test_list_show_copy(name, tmp_path):
    listed = next(line for line in succeed("recipes").out.splitlines() if line.split()[0] == name)
    assert listed.split(maxsplit=1)[1] == title_of(RECIPES[name])
    assert succeed("recipes", "show", name).out == text_of(name)
    succeed("recipes", "copy", name, tmp_path / "copy.yaml")
    assert (tmp_path / "copy.yaml").read_text(encoding="utf-8") == text_of(name)


@pytest.mark.parametrize("name", RECIPES)
def test_commands_are_understood(name):
    """Every command of the header is one, with options that exist, on this recipe; a folder is used once written."""
    written = set()
    for words in commands(name):
        app.parse_args(words[1 : words.index(">") if ">" in words else None], exit_on_error=False)
        files = [word for word in words[2:] if word.endswith(".yaml")]
        assert set(files) <= {f"{name}.yaml", "emnist.yaml"}
        if words[1] == "merge" and "--dry-run" not in words:
            written.add(words[3])
        if words[1] == "evaluate":
            assert words[2] in written
    assert [["copy", name]] == of_verb(name, "recipes")
    assert f"{name}.yaml" in of_verb(name, "merge")[-1]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_header_leads_from_the_recipe_to_the_table(name):
    verbs = [words[1] for words in commands(name)]
    first = ["recipes", "merge", "merge", "evaluate", "benchmark"]
    assert [verb for verb in verbs if verb not in ("convert", "tasks")] == first
    assert "--dry-run" in of_verb(name, "merge")[0]
    evaluation, (words,) = loaded(name).evaluation, of_verb(name, "evaluate")
    assert after(words, "--suite") == evaluation.suite
    assert after(words, "--label-mapping") == evaluation.label_mapping
    assert after(words, "--tasks-file") == evaluation.tasks_file
    assert "Published averages" in text_of(name)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_models_are_the_suites_tasks(name):
    recipe = loaded(name)
    assert tuple(entry.name for entry in recipe.models) == suites()[recipe.evaluation.suite]
    assert str(len(recipe.models)) in name.split("-")


COMPARED = {"average", "task_arithmetic", "ties", "consensus", "dare", "cart"}
COMPARED |= {"tsv_m", "iso_c", "iso_cts", "wudi", "ace", "regmean"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark(name):
    """The methods that papers compare with, settings chosen off the scored split, and as many as the header says."""
    recipe = loaded(name)
    trials = recipe.benchmark.methods
    assert {trial.method for trial in trials} == COMPARED
    assert set(all_methods()) > COMPARED
    assert recipe.benchmark.selection.split == "train"
    assert recipe.benchmark.selection.limit
    for trial in trials:
        assert all(list(values) == sorted(values) for values in trial.grid.values())  # its ends are its edges
    tried = sum(len(trial.points) for trial in trials if trial.grid)
    assert f" {tried} settings " in text_of(name)


@pytest.mark.parametrize("name", FUSION_BENCH)
def test_fusion_bench_ids(name):
    backbone = BACKBONES[name.split("-")[2]]
    recipe = loaded(name)
    assert str(recipe.base_model) == f"openai/clip-vit-{backbone}"
    for entry in recipe.models:
        assert re.fullmatch(rf"tanganke/clip-vit-{backbone}_[a-z0-9_-]+", str(entry.model))
        assert str(entry.model).partition("_")[2].replace("-", "_") == entry.name


@pytest.mark.parametrize("name", GLUE)
def test_glue_ids(name):
    recipe = loaded(name)
    for entry in recipe.models:
        assert entry.model == Reference("vanillaOVO/roberta_base_glue_ckpts", None, entry.model.subfolder)
        assert re.fullmatch(rf"{entry.name}/roberta-base_lr[15]e-05", entry.model.subfolder)
    assert recipe.evaluation.label_mapping == "index"  # the checkpoints' labels are only numbered
    assert recipe.evaluation.split == "validation"  # the test labels are hidden


@pytest.mark.parametrize("name", PAPER)
def test_converted_folders(name):
    """The folders are what the header's `cart-hf convert` writes, for the data set that the task is about."""
    recipe = loaded(name)
    outputs = {}
    for words in of_verb(name, "convert"):
        assert after(words, "--base") == str(recipe.base_model)
        outputs[after(words, "--output")] = words[0]
    for place, (entry, data_set) in enumerate(zip(recipe.models, DATA_SETS, strict=False)):
        folder = Path(entry.model.path)
        assert outputs[str(folder.parent)].endswith("_TA") == (place < 8)
        assert folder.name == name_of(PurePosixPath(data_set, "finetuned.pt"), "")
        assert folder.name == name_of(PurePosixPath(f"{data_set}Val", "nonlinear_finetuned.pt"), "")
        assert folder.name in entry.name.replace("_", "")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    """What the CART authors' configurations say, where there are any: prior is our scale."""
    _, _, backbone, size, _ = name.split("-")
    parameters = loaded(name).parameters
    assert parameters["fuse_qkv"] is True
    if backbone == "b32":
        official = {"8": (0.12, 2.0), "14": (0.16, 1.5), "20": (0.32, 1.9)}[size]
        assert (parameters["rank_ratio"], parameters["scale"]) == official
    else:
        assert "are not published" in text_of(name)


@pytest.mark.parametrize("name", LOCAL)
def test_our_own_benchmarks(name, folder):
    """The header's tasks file makes every task known, and settings are chosen off the scored split."""
    recipe = loaded(name)
    written = "".join(re.findall(r"^#   (tasks: .*)$", text_of(name), flags=re.MULTILINE))
    written = written or (Path(__file__).parents[1] / "scripts" / "image_tasks.yaml").read_text(encoding="utf-8")
    (folder / "tasks.yaml").write_text(written)
    found = find_tasks(recipe.evaluation.tasks, tasks_file=folder / recipe.evaluation.tasks_file)
    assert [task.name for task in found] == [entry.name for entry in recipe.models]
    assert recipe.benchmark.selection.split == "validation" != recipe.evaluation.split
    verbs = [words[1] for words in commands(name)]
    assert verbs == ["recipes", "merge", "merge", "evaluate", "benchmark"]


def test_emnist_is_declared_as_the_header_says(folder):
    """`cart-hf tasks emnist_digits > emnist.yaml` and one more line make a suite whose every task has its data."""
    name = "clip-vit-b32-20-paper"
    assert of_verb(name, "tasks") == [["emnist_digits", ">", "emnist.yaml"]]
    added = re.search(r"`(dataset: \S+)`", text_of(name))[1]
    (folder / "emnist_digits").mkdir()
    text = succeed("tasks", "emnist_digits").out
    (folder / "emnist.yaml").write_text(f"{text}    {added}\n", encoding="utf-8")
    evaluation = loaded(name).evaluation
    tasks = find_tasks(suite=evaluation.suite, tasks_file=evaluation.tasks_file)
    assert len(tasks) == 20
    assert all(task.dataset is not None for task in tasks)
