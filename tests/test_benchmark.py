"""`cart-hf benchmark` on small checkpoints: every number again by hand, nothing measured twice, nothing lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import make_clip
from commands import call, refuse, succeed
from safetensors.torch import load_file, save_file
from small_benchmark import TASKS, make_world, recipe_of

import cart_hf
import cart_hf.api
from cart_hf.benchmarking import run as benchmarking
from cart_hf.benchmarking.report import as_json, write_files
from cart_hf.benchmarking.rows import trials_of
from cart_hf.benchmarking.sizes import individual_bytes, merged_bytes
from cart_hf.linalg import low_rank
from cart_hf.methods import all_methods
from cart_hf.recipe import Trial
from cart_hf.tuning.sample import Sample


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder)


pytestmark = pytest.mark.usefixtures("own_caches")


def compared(world):
    return recipe_of(*world) | {
        "benchmark": {
            "methods": [
                "average",
                {"method": "task_arithmetic", "grid": {"scale": [0.1, 1.0, 30.0]}},
                {"method": "cart", "name": "CART, rank 2", "parameters": {"rank": 2}, "grid": {"scale": [1.0, 3.0]}},
            ]
        },
    }


@pytest.fixture
def recipe(world):
    return compared(world)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What a run finds that nobody interrupts, with its models kept."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return cart_hf.benchmark(cart_hf.Recipe.from_mapping(compared(world)), output=output, keep_models=True)


@pytest.fixture
def no_figures(monkeypatch):
    """Be a machine without matplotlib: drawing takes longer than measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def write(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_every_number_by_hand(recipe, tmp_path, whole):
    """Merging and evaluating point by point with the two verbs gives the table of the one."""
    rows = {row.name: row for row in whole.rows}
    assert list(rows) == ["pretrained", "individual", "weight average", "task arithmetic", "CART, rank 2"]
    settings = {name: recipe["evaluation"][name] for name in ("tasks", "tasks_file", "data")}

    def scored(name, method, split, **parameters):
        models = [f"{entry['name']}={entry['model']}" for entry in recipe["models"]]
        place = tmp_path / name
        cart_hf.merge(base=recipe["base_model"], models=models, method=method, output=place, **parameters)
        return cart_hf.evaluate(place, split=split, **settings)

    points = [
        scored(f"ta{i}", "task_arithmetic", "validation", scale=scale) for i, scale in enumerate((0.1, 1.0, 30.0))
    ]
    assert [point["average"] for point in rows["task arithmetic"].points] == [found.average for found in points]
    best = max(range(3), key=lambda i: points[i].average)
    assert rows["task arithmetic"].parameters == {"scale": (0.1, 1.0, 30.0)[best]}
    assert rows["task arithmetic"].on_edge == ([] if best == 1 else ["scale"])
    on_test = scored("best", "task_arithmetic", "test", **rows["task arithmetic"].parameters)
    assert rows["task arithmetic"].results.average == on_test.average
    cart = [scored(f"c{i}", "cart", "validation", rank=2, scale=scale) for i, scale in enumerate((1.0, 3.0))]
    assert [point["average"] for point in rows["CART, rank 2"].points] == [found.average for found in cart]
    assert rows["weight average"].results.average == scored("average", "average", "test").average
    assert rows["pretrained"].results.average == scored("nothing", "task_arithmetic", "test", scale=0.0).average
    alone = {
        name: cart_hf.evaluate(
            family_member, tasks=[name], split="test", **{k: settings[k] for k in ("tasks_file", "data")}
        )
        for name, family_member in ((entry["name"], entry["model"]) for entry in recipe["models"])
    }
    for name in TASKS:
        assert rows["individual"].results.tasks[name].score == alone[name].average
    expected = sum(on_test.tasks[name].score / alone[name].average for name in TASKS) / 3
    assert rows["task arithmetic"].results.normalized == pytest.approx(expected)
    assert rows["individual"].results.normalized == pytest.approx(1.0)
    assert not (whole.output / "attempt").exists()


def test_a_grid_decomposes_every_matrix_once(recipe, tmp_path, monkeypatch):
    """Four points and the one that is scored share the factors of the largest rank, which do not stay."""
    decomposed = []
    real = low_rank.best_of_tall

    def counted(matrices, **options):
        decomposed.append(options["rank"])
        return real(matrices, **options)

    monkeypatch.setattr(low_rank, "best_of_tall", counted)
    grid = {"rank_ratio": [0.1, 0.4], "scale": [1.0, 3.0]}
    recipe |= {"parameters": {}, "benchmark": {"methods": [{"method": "cart", "grid": grid}]}}
    result = cart_hf.benchmark(cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out")
    assert len(result.rows[-1].points) == 4
    tensors = cart_hf.api.plan_merge(cart_hf.Recipe.from_mapping(recipe)).tensors
    expected = [int(0.4 * min(tensor.shape)) for tensor in tensors if tensor.role == "low_rank"]
    assert sorted(decomposed) == sorted(expected)
    assert not [name for name in ("factors", "attempt", "models") if (tmp_path / "out" / name).exists()]


def test_files_and_formats(recipe, tmp_path, whole, monkeypatch):
    """The command, for which everything is measured already."""
    path, output = write(tmp_path, recipe), Path(shutil.copytree(whole.output, tmp_path / "out"))
    answer = succeed("benchmark", path, output, "--resume")
    for word in ("pretrained", "individual", "weight average", "task arithmetic", "CART, rank 2", "norm."):
        assert word in answer.out
    assert "Chosen by the average score on the validation split" in answer.out.replace("\n", " ")
    saved = json.loads((output / "benchmark.json").read_text())
    assert saved == json.loads(json.dumps(as_json(whole)))
    page = (output / "benchmark.md").read_text()
    for row in saved["rows"]:
        assert f"| {row['name']} |" in page
        assert f"{100 * row['average']:.1f}" in page
    assert "bars.png" in page and "radar.png" in page
    assert "size" not in page + (output / "benchmark.csv").read_text() and "nbytes" not in saved["rows"][0]
    names = {file.name for file in output.iterdir()}
    assert names >= {"benchmark.csv", "benchmark.tex", "bars.svg", "radar.svg", "recipe.yaml", "points.json", "models"}
    kept = cart_hf.MultiTaskModel.from_pretrained(output / "models" / "CART, rank 2")
    assert kept.tasks == sorted(TASKS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    again = succeed("benchmark", path, output, "--resume", "--format", "csv")
    assert again.out == (output / "benchmark.csv").read_text()
    assert json.loads(succeed("benchmark", path, output, "--resume", "--format", "json").out) == saved


@pytest.fixture
def sweep(recipe):
    """A recipe that compares sizes of CART-Indexing, too."""
    methods = ["average", {"method": "cart", "parameters": {"rank": 2}}]
    return recipe | {"benchmark": {"methods": methods, "compress": {"rank_ratio": [0.1, 1.0], "restore": "all"}}}


def test_sizes_of_cart_indexing(sweep, tmp_path, world):
    """Scores and bytes from 10 % to 100 % rank, beside those of the methods and of the models themselves."""
    output = tmp_path / "out"
    answer = succeed("benchmark", write(tmp_path, sweep), output, "--keep-models")
    assert answer.out.splitlines()[0].split()[-2:] == ["norm.", "MB"]
    rows = {row["name"]: row for row in json.loads((output / "benchmark.json").read_text())["rows"]}
    small, whole = names = ["CART-Indexing 10 %", "CART-Indexing 100 %"]
    assert list(rows) == ["pretrained", "individual", "weight average", "CART", *names]
    assert rows[small]["parameters"] == {"rank_ratio": 0.1, "restore": "all"}
    scores = {row: {task: found["score"] for task, found in rows[row]["tasks"].items()} for row in rows}
    assert scores[whole] == scores["individual"] != scores["weight average"]
    assert rows[whole]["normalized"] == 1.0

    def stored(*files):
        return sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    kept = output / "models"
    assert rows["individual"]["nbytes"] == stored(*(Path(world[1][task]) / "model.safetensors" for task in TASKS))
    centre = stored(kept / "average" / "model.safetensors", *kept.glob("average/tasks/*/head.safetensors"))
    assert rows["weight average"]["nbytes"] == rows["CART"]["nbytes"] == rows["pretrained"]["nbytes"] == centre
    for name in names:
        adapters = [path.stat().st_size for path in (kept / name / "adapters").glob("*/*.safetensors")]
        assert len(adapters) == len(TASKS)
        assert rows[name]["nbytes"] == centre + sum(adapters)
    page, table = (output / "benchmark.md").read_text(), (output / "benchmark.csv").read_text().splitlines()
    assert "sizes.png" in page and (output / "sizes.svg").is_file()
    assert "Sizes are of weights" in page
    assert table[0].split(",")[-2:] == ["size (MB)", "settings"]
    sizes = [line.split(",")[len(TASKS) + 3] for line in table[1:]]
    assert sizes == [f"{row['nbytes'] / 1e6:.1f}" for row in rows.values()]


def test_sizes_are_resumed_and_share_one_decomposition(sweep, tmp_path, monkeypatch):
    """A run that is killed goes on with the factors of the largest rank; CART's row finds them, too."""
    made, decomposed = [], []
    compress, factorize = benchmarking.compress, low_rank.factorize

    def compress_twice(recipe, **options):
        made.append(recipe.compress.rank_ratio)
        if made == [1.0, 0.1]:
            raise KeyboardInterrupt
        return compress(recipe, **options)

    def count(matrices, **options):
        decomposed.append(options["rank"] / min(matrices.shape[1:]))
        return factorize(matrices, **options)

    monkeypatch.setattr(benchmarking, "compress", compress_twice)
    monkeypatch.setattr(low_rank, "factorize", count)
    what, output = cart_hf.Recipe.from_mapping(sweep), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cart_hf.benchmark(what, output=output)
    resumed = cart_hf.benchmark(what, output=output, resume=True)
    assert made == [1.0, 0.1, 0.1]
    assert decomposed == [1.0] * sum(tensor.role == "low_rank" for tensor in cart_hf.api.plan_merge(what).tensors)
    assert not (output / "factors").exists()
    again = cart_hf.benchmark(what, output=output, resume=True)
    assert made == [1.0, 0.1, 0.1]
    assert [row.nbytes for row in again.rows] == [row.nbytes for row in resumed.rows]
    assert again.rows[-2].nbytes < again.rows[-1].nbytes


def test_towers_are_compared_with_towers(tmp_path):
    """A merge of vision towers is a whole CLIP: the text tower, which no model has, is in nobody's size."""
    base, models = make_clip(tmp_path)
    plan = cart_hf.api.plan_merge(
        cart_hf.Recipe.from_mapping({"merge_method": "cart", "base_model": base, "models": models})
    )
    tower = sum(tensor.nbytes for tensor in load_file(Path(models[0]) / "model.safetensors").values())
    assert merged_bytes(plan) == tower
    assert individual_bytes(plan) == 3 * tower


def test_adapters_are_stored_with_one_base(world, tmp_path):
    """Fine-tuned models that are LoRA adapters take their own files, and their base once."""
    family, adapters = world[1], []
    for task in TASKS[:2]:
        made = cart_hf.compress(base=str(family["base"]), models=[str(family[task])], rank=2, output=tmp_path / task)
        adapters.append(made.output)
    recipe = {"merge_method": "average", "models": [str(folder) for folder in adapters]}
    plan = cart_hf.api.plan_merge(cart_hf.Recipe.from_mapping(recipe))
    files = [Path(family["base"]) / "model.safetensors", *(f / "adapter_model.safetensors" for f in adapters)]
    assert individual_bytes(plan) == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_resume_measures_nothing_twice(recipe, tmp_path, whole, monkeypatch):
    """A run that is killed half-way goes on; a changed model starts again."""
    path, output = write(tmp_path, recipe), tmp_path / "out"
    measured = []
    real = Sample.measure

    def counted(sample, name, folder, **options):
        measured.append(name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(sample, name, folder, **options)

    monkeypatch.setattr(Sample, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        cart_hf.benchmark(cart_hf.Recipe.load(path), output=output)
    finished = len(measured) - 1
    resumed = cart_hf.benchmark(cart_hf.Recipe.load(path), output=output, resume=True)
    points = 1 + 1 + (3 + 1) + (2 + 1)  # pretrained, average, task arithmetic, cart
    assert len(measured) - 1 - finished == points - finished
    strip = [{name: r.metrics for name, r in row.results.tasks.items()} for row in whole.rows]
    assert strip == [{name: r.metrics for name, r in row.results.tasks.items()} for row in resumed.rows]


def test_another_model_voids_what_was_measured(recipe, tmp_path):
    """The same folder with other weights is another model."""
    own = Path(shutil.copytree(recipe["models"][0]["model"], tmp_path / "red"))
    recipe["models"][0]["model"] = str(own)
    recipe["benchmark"]["methods"] = ["average"]
    merged = []
    for _ in range(2):
        known = cart_hf.benchmark(cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out", resume=bool(merged))
        merged.append({row.name: row.results.tasks["red"].settings["model"] for row in known.rows})
        weights = load_file(own / "model.safetensors")
        weights["classifier.out_proj.bias"] += 100 * torch.arange(2.0)
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    assert all(merged[0][name] != merged[1][name] for name in ("pretrained", "individual", "weight average"))
    assert known.rows[1].results.tasks["red"].score == pytest.approx(12 / 25)  # it says 1 to everything now


def test_without_a_list_every_method(recipe):
    del recipe["benchmark"]
    trials = trials_of(cart_hf.Recipe.from_mapping(recipe))
    known = {name: one for name, one in all_methods().items() if one.model_count is None and one.calibration is None}
    assert {trial.method for trial in trials} == set(known)
    assert trials[-1].parameters["rank"] == 2
    del recipe["base_model"]
    methods = [trial.method for trial in trials_of(cart_hf.Recipe.from_mapping(recipe))]
    assert methods == [name for name, method in known.items() if not method.needs_base and name != "cart"] + ["cart"]


def test_selection_on_the_scored_split_is_said(recipe, tmp_path, no_figures):
    methods = [{"method": "task_arithmetic", "grid": {"scale": [0.1, 1.0]}}]
    recipe["benchmark"] = {"methods": methods, "selection": {"split": "test"}}
    answer = succeed("benchmark", write(tmp_path, recipe), tmp_path / "out")
    assert "the numbers flatter methods with many settings" in answer.out.replace("\n", " ")


def test_which_sizes():
    """One value is a list of one; true is the default list, and both are read back from YAML as they are."""

    def rows(compress):
        read = cart_hf.Recipe.from_mapping(
            {"merge_method": "cart", "models": ["a/b", "a/c"], "benchmark": {"compress": compress}}
        )
        again = cart_hf.Recipe.from_mapping(yaml.safe_load(read.to_yaml()))
        assert again == read
        return [name.removeprefix("CART-Indexing ") for name, _ in again.benchmark.compress.rows]

    assert rows(True) == ["1 %", "2 %", "4 %", "8 %", "16 %", "32 %", "64 %", "100 %"]
    assert rows({"rank_ratio": 0.07}) == ["7 %"]
    assert rows({"rank": [4, 16], "restore": "none"}) == ["rank 4", "rank 16"]
    assert rows({"energy": [0.9]}) == ["90 % energy"]
    assert rows({"budget": ["5MB", "1.5GB"], "dtype": "bfloat16"}) == ["5MB", "1.5GB"]


def test_edges():
    trial = Trial(method="cart", grid={"scale": [1, 2, 3], "rank": [4], "rank_ratio": [0.1, 0.2]})
    assert len(trial.points) == 6
    assert trial.on_edge({"scale": 2, "rank": 4, "rank_ratio": 0.1}) == ["rank_ratio"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["evaluation"].update(tasks=["red", "gren"]), "no task 'gren' - did you mean 'green'"),
        (lambda r: r["evaluation"].update(split="dev"), "has no split 'dev'"),
        (lambda r: r["evaluation"].update(suit="glue"), "evaluation.suit: unknown key - did you mean 'suite'"),
        (
            lambda r: r["benchmark"].update(selection={"splt": "x"}),
            "selection.splt: unknown key - did you mean 'split'",
        ),
        (lambda r: r["benchmark"].update(methods=["crt"]), "row 'crt': merge_method: unknown method 'crt'"),
        (lambda r: r["benchmark"].update(methods=["cart", "cart"]), "two rows are called 'cart'; give one a name"),
        (lambda r: r["benchmark"].update(methods=[]), "benchmark: methods: name at least one"),
        (
            lambda r: r["benchmark"].update(compress={"rank_ration": 0.1}),
            "benchmark.compress.rank_ration: unknown key - did you mean 'rank_ratio'",
        ),
        (
            lambda r: r["benchmark"].update(compress={"rank_ratio": [0.1, 2]}),
            "benchmark.compress.rank_ratio: must be at most 1, not 2.0",
        ),
        (
            lambda r: r["benchmark"].update(compress={"rank": 4, "budget": "5MB"}),
            "benchmark.compress: rank and budget exclude each other; give one",
        ),
        (lambda r: r["benchmark"].update(compress={"rank": []}), "benchmark.compress: rank: no values to compare"),
        (
            lambda r: r["benchmark"].update(compress={"energy": [0.9, 0.9]}),
            "benchmark.compress: energy: two values for 'CART-Indexing 90 % energy'; keep one",
        ),
        (lambda r: r["benchmark"].update(compress={"budget": ["5MB", "lots"]}), "'lots' is not a size such as 5GB"),
        (lambda r: r["benchmark"].update(compress=[0.1]), "benchmark.compress: expected true, or a mapping such as"),
        (
            lambda r: r["benchmark"].update(methods=[{"method": "cart", "name": "CART-Indexing 8 %"}], compress=True),
            "two rows are called 'CART-Indexing 8 %'",
        ),
        (
            lambda r: (r["benchmark"].update(methods=["average"], compress=True), r.update(exclude=["*"])),
            "cart found no Linear weight in encoder blocks",
        ),
        (
            lambda r: r["benchmark"].update(compress={"budget": ["1MB", "2kB"]}),
            "benchmark.compress.budget: 2kB is too small: with one direction of each layer an adapter takes",
        ),
        (
            lambda r: r["benchmark"].update(methods=[{"method": "ties", "grid": {"densty": [0.1]}}]),
            "row 'ties': parameters.densty: ties has no such parameter - did you mean 'density'",
        ),
        (
            lambda r: r["benchmark"].update(methods=[{"method": "cart", "grid": {"rank_ratio": []}}]),
            "grid.rank_ratio: no values to try",
        ),
        (
            lambda r: r["benchmark"].update(
                methods=[{"method": "cart", "parameters": {"scale": 1}, "grid": {"scale": [1]}}]
            ),
            "scale: stands in parameters and in grid",
        ),
    ],
)
def test_bad_input_before_any_merge(recipe, change, message, tmp_path):
    change(recipe)
    output = tmp_path / "out"
    refuse(
        output,
        "benchmark",
        write(tmp_path, recipe),
        output,
        naming=[message],
        count=3 if "split" in message and "dev" in message else 1,
    )


def test_an_output_is_not_lost(recipe, tmp_path):
    path = write(tmp_path, recipe)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for flags, why in (((), "exists"), (("--overwrite",), "is not a benchmark of cart-hf")):
        answer = call("benchmark", path, tmp_path / "out", *flags)
        assert answer.code == 2
        assert why in answer.err
    assert (tmp_path / "out" / "precious").exists()


def test_a_missing_model_is_named_first(recipe, tmp_path):
    recipe["models"][0]["model"] = "./not-here"
    output = tmp_path / "out"
    refuse(output, "benchmark", write(tmp_path, recipe), output, naming=["folder not found: ./not-here"])


def test_a_row_whose_coefficients_are_learnt(tmp_path, recipe, no_figures):
    """It is what adapting and evaluating by hand find, and the page says on how many inputs it was learnt."""
    settings = {"steps": 2, "lr": 0.1, "held_out": 0.4}
    recipe["benchmark"] = {"methods": [{"method": "cart", "parameters": {"rank": 2}, "adapt": settings}]}
    result = cart_hf.benchmark(cart_hf.Recipe.from_mapping(recipe), output=tmp_path / "out")
    row = result.rows[-1]
    assert row.name == "CART + adaptation"
    own = {name: value for name, value in recipe.items() if name != "benchmark"}
    made = cart_hf.adapt(cart_hf.Recipe.from_mapping(own), output=tmp_path / "adapted", learning=settings)
    found = cart_hf.evaluate(tmp_path / "adapted")
    assert {name: task.score for name, task in row.results.tasks.items()} == {
        name: task.score for name, task in found.tasks.items()
    }
    seen = {name: task.adapted_on for name, task in row.results.tasks.items()}
    assert all(seen[name] >= made.inputs[name] > 0 for name in TASKS)  # tasks may have inputs in common
    write_files(result)
    assert "CART + adaptation: transductive: " in (tmp_path / "out" / "benchmark.md").read_text()


def test_a_row_is_refused_whose_method_has_nothing_to_learn(tmp_path, recipe):
    recipe["benchmark"]["methods"] = [
        {"method": "average", "adapt": {"steps": 2}},
        {"method": "cart", "adapt": {"x": 1}},
    ]
    refuse(tmp_path / "out", "benchmark", write(tmp_path, recipe), tmp_path / "out", naming=["unknown key"])
    recipe["benchmark"]["methods"].pop()
    naming = ["row 'average + adaptation'", "no coefficients"]
    refuse(tmp_path / "out", "benchmark", write(tmp_path, recipe), tmp_path / "out", naming=naming)
