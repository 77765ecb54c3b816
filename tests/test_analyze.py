"""`cart-hf analyze` from end to end, on small checkpoints: its numbers against NumPy, its warnings, files and refusals."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
import pandas
import pytest
import torch
from checkpoints import FAMILIES, copy_backbone, make_clip, make_family, perturb, save
from commands import assert_absent, leftovers, refuse, succeed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_tasks import save_tokenizer, texts, write_split, write_tasks
from transformers import RobertaForSequenceClassification, RobertaModel

import cart_hf
from cart_hf.analysis import FRAMES, frame
from cart_hf.analysis.document import as_document
from cart_hf.analysis.model import Analysis, Matrix, Tensor
from cart_hf.errors import UserError
from cart_hf.plan.checks import TWO_MODELS

QUERY = "encoder.layer.0.attention.self.query.weight"
NAMES = ("zebra", "apple", "mango")  # a plan has the models in the order of their names; an analysis in the recipe's
OPTIONS = {"rank_ratio": 0.3, "scale": 1.5, "dtype": "float64"}
EXACT = {"rtol": 1e-5, "atol": 1e-7}  # float32 is what the merged model is written in


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes, on disk and as NumPy has them."""

    base: str
    folders: list[str]

    @property
    def models(self) -> list[str]:
        return [f"{name}={folder}" for name, folder in zip(NAMES, self.folders, strict=True)]

    def states(self) -> tuple[oracle.State, list[oracle.State]]:
        """What all have: base and models in float64."""
        base, *models = (
            {n: a.astype(np.float64) for n, a in oracle.state_of(f).items()} for f in (self.base, *self.folders)
        )
        shared = [name for name in models[0] if "pooler" not in name]
        return base, [{name: model[name] for name in shared} for model in models]

    def analyze(self, **options) -> Analysis:
        return cart_hf.analyze(base=self.base, models=self.models, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Family:
    return Family(*make_family(tmp_path_factory.mktemp("roberta"), "roberta"))


@pytest.fixture(scope="module")
def written(roberta, tmp_path_factory) -> Path:
    """The folder of one whole run of the command."""
    folder = tmp_path_factory.mktemp("analysis") / "out"
    succeed("analyze", "--base", roberta.base, "--models", *roberta.models, "--output", folder, *flags())
    return folder


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Do without matplotlib, as those do who have not installed it: drawing takes longer than all the rest."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def flags() -> list[str]:
    return ["--rank-ratio", "0.3", "--scale", "1.5", "--dtype", "float64"]


def matrix_of(analysis: Analysis, name: str) -> Matrix:
    return next(matrix for matrix in analysis.matrices if matrix.name == name)


def tensor_of(analysis: Analysis, name: str) -> Tensor:
    return next(tensor for tensor in analysis.tensors if tensor.name == name)


def inner(stack: list[np.ndarray]) -> np.ndarray:
    flat = np.stack([part.ravel() for part in stack])
    return flat @ flat.T


def alike(one: Analysis, other: Analysis, **tolerance: float) -> None:
    """Assert that two analyses have the same numbers."""
    assert [m.name for m in one.matrices] == [m.name for m in other.matrices]
    for mine, theirs in zip(one.matrices, other.matrices, strict=True):
        assert (mine.rank, mine.models) == (theirs.rank, theirs.models)
        for centre, around in mine.around.items():
            for name, values in vars(around).items():
                np.testing.assert_allclose(getattr(theirs.around[centre], name), values, **tolerance, err_msg=name)
    for mine, theirs in zip(one.tensors, other.tensors, strict=True):
        for name in ("centred", "products", "merged_products"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(mine, name), **tolerance, err_msg=name)


# --- the numbers


def test_matrices_are_measured_around_both_centres_in_the_order_of_the_recipe(roberta):
    base, models = roberta.states()
    analysis = roberta.analyze()
    assert {m.name for m in analysis.matrices} == {name for name in models[0] if oracle.is_low_rank("roberta", name)}
    for matrix in analysis.matrices:
        assert matrix.models == NAMES and matrix.rank == 4
        stack = np.stack([model[matrix.name] for model in models])
        for centre, origin in (("average", stack.mean(axis=0)), ("base", base[matrix.name])):
            found, apart = matrix.around[centre], stack - origin
            singular = np.linalg.svd(apart, compute_uv=False)
            np.testing.assert_allclose(found.spectra, singular, **EXACT)
            np.testing.assert_allclose(found.squares, (apart**2).sum(axis=(1, 2)), **EXACT)
            gram = inner(list(apart))
            np.testing.assert_allclose(
                found.cosine, gram / np.sqrt(np.outer(gram.diagonal(), gram.diagonal())), **EXACT
            )
            rows = np.linalg.svd(apart, full_matrices=False)[2][:, :4]
            shared = [[np.linalg.norm(a @ b.T) ** 2 / 4 for b in rows] for a in rows]
            np.testing.assert_allclose(found.overlap, shared, **EXACT)
            kept = [(singular[:, :k] ** 2).sum() for k in (0, 4, 16)]
            at = [analysis.about.ratios.index(ratio) for ratio in (0.0, 0.28, 1.0)]
            np.testing.assert_allclose(found.reconstruction[at], (singular**2).sum() - kept, **EXACT)


@pytest.mark.parametrize("method", ["cart", "ties", "task_arithmetic"])
def test_tensors_tell_how_far_models_and_merge_moved(roberta, method):
    base, models = roberta.states()
    merged = {
        "cart": lambda: oracle.cart(models, "roberta", 1.5, 0.3),
        "ties": lambda: oracle.ties(base, models, 0.2, 1.0),
        "task_arithmetic": lambda: oracle.task_arithmetic(base, models, 0.3),
    }[method]()
    own = {} if method == "cart" else {"method": method, "rank_ratio": None, "scale": None, "dtype": "float32"}
    analysis = roberta.analyze(**own)
    assert [m.rank for m in analysis.matrices] == [4 if method == "cart" else 1] * 12
    tolerance = {"rtol": 2e-5, "atol": 1e-5}
    for name, values in merged.items():
        found = tensor_of(analysis, name)
        taus = [model[name] - base[name] for model in models]
        moved = values - base[name]
        np.testing.assert_allclose(found.products, inner(taus), **tolerance)
        np.testing.assert_allclose(found.centred, inner([tau - sum(taus) / 3 for tau in taus]), **tolerance)
        np.testing.assert_allclose(found.merged_products, [(moved * tau).sum() for tau in taus], **tolerance)
        np.testing.assert_allclose(found.merged_square, (moved**2).sum(), **tolerance)
        np.testing.assert_allclose(found.norms, [np.linalg.norm(model[name]) for model in models], **tolerance)
        assert found.base_norm == pytest.approx(np.linalg.norm(base[name]), rel=1e-6)
    document = as_document(analysis)
    assert document["about"]["roles"] == ({"low_rank": 12, "average": 25} if method == "cart" else {"elementwise": 37})
    taus = [np.concatenate([(model[n] - base[n]).ravel() for n in merged]) for model in models]
    moved, start = (np.concatenate([part.ravel() for part in parts]) for parts in (
        [merged[n] - base[n] for n in merged], [base[n] for n in merged]))  # fmt: skip
    whole = document["whole"]
    for name, expected in {
        "update": [np.linalg.norm(tau) for tau in taus],
        "growth": [np.linalg.norm(tau) / np.linalg.norm(start) for tau in taus],
        "retention": [moved @ tau / (tau @ tau) for tau in taus],
        "merged_cosine": [moved @ tau / np.sqrt(tau @ tau * (moved @ moved)) for tau in taus],
        "merged_growth": np.linalg.norm(moved) / np.linalg.norm(start),
        "merged_update": np.linalg.norm(moved),
    }.items():
        np.testing.assert_allclose(whole[name], expected, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(np.sum(document["layers"]["share"]["average"], axis=1), 1.0, rtol=1e-4)


def test_weights_move_the_centre(roberta):
    _, models = roberta.states()
    analysis = roberta.analyze(weights=[1.0, 2.0, 5.0])
    stack = np.stack([model[QUERY] for model in models])
    apart = stack - np.average(stack, axis=0, weights=[1, 2, 5])
    np.testing.assert_allclose(tensor_of(analysis, QUERY).centred, inner(list(apart)), **EXACT)
    found = matrix_of(analysis, QUERY).around["average"]
    np.testing.assert_allclose(found.spectra, np.linalg.svd(apart, compute_uv=False), **EXACT)


def test_row_spaces_of_conv1d_are_those_of_its_inputs(tmp_path):
    family = Family(*make_family(tmp_path, "gpt2"))
    _, models = family.states()
    analysis = family.analyze(rank_ratio=0.2)
    name = "h.0.mlp.c_fc.weight"  # stored as (16, 64), inputs first
    stack = np.stack([model[name] for model in models])
    left = np.linalg.svd(stack - stack.mean(axis=0), full_matrices=False)[0].transpose(0, 2, 1)[:, :3]
    shared = [[np.linalg.norm(a @ b.T) ** 2 / 3 for b in left] for a in left]
    np.testing.assert_allclose(matrix_of(analysis, name).around["average"].overlap, shared, **EXACT)
    assert next(t.name for t in analysis.tensors) == "wte.weight"  # which the file has last


def test_without_a_base_there_are_no_task_vectors_and_the_rest_is_the_same(roberta):
    whole, alone = roberta.analyze(), cart_hf.analyze(models=roberta.models, **OPTIONS)
    for mine, theirs in zip(whole.matrices, alone.matrices, strict=True):
        assert list(theirs.around) == ["average"]
        for name, values in vars(mine.around["average"]).items():
            np.testing.assert_allclose(getattr(theirs.around["average"], name), values, rtol=1e-7, atol=1e-9)
    document = as_document(alone)
    assert document["about"]["base"] is None and list(document["mean"]) == ["average"]
    assert document["layers"]["growth"] is None and document["whole"]["update"] is None
    assert frame(alone, "tensors")["update"].isna().all()


def test_fused_projections_are_one_matrix_and_three_tensors(roberta):
    _, models = roberta.states()
    analysis = roberta.analyze(fuse_qkv=True)
    assert len(analysis.matrices) == 8
    fused = matrix_of(analysis, "encoder.layer.1.attention.self.qkv")
    parts = [f"encoder.layer.1.attention.self.{name}.weight" for name in ("query", "key", "value")]
    stack = np.stack([np.concatenate([model[name] for name in parts]) for model in models])
    gram = inner(list(stack - stack.mean(axis=0)))
    np.testing.assert_allclose(fused.around["average"].squares, gram.diagonal(), **EXACT)
    np.testing.assert_allclose(
        fused.around["average"].cosine[0, 1] * np.sqrt(gram[0, 0] * gram[1, 1]), gram[0, 1], **EXACT
    )
    assert fused.shape == (48, 16) and {tensor_of(analysis, name).role for name in parts} == {"low_rank"}
    assert next(m for m in as_document(analysis)["matrices"] if m["name"] == fused.name)["block"] == 1


def test_energy_says_the_rank_even_where_less_is_looked_at(roberta):
    _, models = roberta.states()
    analysis = roberta.analyze(rank_ratio=None, energy=0.7, up_to=0.1)
    stack = np.stack([model[QUERY] for model in models])
    assert matrix_of(analysis, QUERY).rank == max(oracle.energy_rank(m - stack.mean(axis=0), 0.7) for m in stack)
    assert max(analysis.about.ratios) == 0.1


def test_adapters_are_measured_as_the_models_that_they_make(roberta, tmp_path):
    adapters, dense = [], []
    for seed in (1, 2, 3):
        model = RobertaForSequenceClassification.from_pretrained(roberta.base, num_labels=2)
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        peft.save_pretrained(tmp_path / f"adapter{seed}")
        adapters.append(str(tmp_path / f"adapter{seed}"))
        dense.append(save(peft.merge_and_unload(), tmp_path / f"dense{seed}"))
    thin = cart_hf.analyze(base=roberta.base, models=[f"m{i}={p}" for i, p in enumerate(adapters)], **OPTIONS)
    whole = cart_hf.analyze(
        base=roberta.base,
        models=[f"m{i}={p}" for i, p in enumerate(dense)],
        include=["query"],
        exclude=["key", "value", "dense"],
        **OPTIONS,
    )
    for matrix in thin.matrices:
        for centre, around in matrix.around.items():
            other = matrix_of(whole, matrix.name).around[centre]
            for name in ("interference", "reconstruction", "squares", "overlap", "pairs", "cosine"):
                np.testing.assert_allclose(
                    getattr(other, name), getattr(around, name), rtol=1e-4, atol=1e-5, err_msg=name
                )
    growth = as_document(thin)["whole"]["growth"]  # of the whole model, though adapters change little of it
    np.testing.assert_allclose(growth, as_document(whole)["whole"]["growth"], rtol=1e-4)
    assert not [w for w in thin.warnings if w.kind == "no_update"]


def test_a_tensor_that_some_models_lack_is_measured_of_the_others(roberta, tmp_path):
    model = RobertaModel.from_pretrained(roberta.folders[1])  # with a pooler
    with_pooler = Family(roberta.base, [roberta.folders[0], save(model, tmp_path / "bare"), roberta.folders[2]])
    analysis = with_pooler.analyze()
    found = tensor_of(analysis, "pooler.dense.weight")
    assert found.models == ("apple",) and found.base_norm is None and found.products is None
    assert found.centred.tolist() == [[0.0]]
    document = as_document(analysis)
    assert document["blocks"][-1]["label"] == "pooler" and document["layers"]["growth"][0][-1] is None


def test_bfloat16_models_and_a_clip(tmp_path):
    base, models = make_family(tmp_path / "half", "bert", dtype=torch.bfloat16)
    half = cart_hf.analyze(base=base, models=models, up_to=0.32)
    assert len(half.matrices) == 12 and np.isfinite(half.matrices[0].around["base"].interference).all()
    clip, towers = make_clip(tmp_path / "clip")
    analysis = cart_hf.analyze(base=clip, models=towers)
    assert {m.name for m in analysis.matrices} == {
        t.name for t in analysis.tensors if oracle.is_low_rank("clip", t.name)
    }
    assert not [t.name for t in analysis.tensors if t.name.startswith("text_model")]  # which no tower has


def test_kept_factors_give_the_same_numbers(roberta, tmp_path):
    factors = tmp_path / "factors"
    cart_hf.merge(base=roberta.base, models=roberta.models, output=tmp_path / "out", factors=factors, **OPTIONS)
    plain, first = roberta.analyze(), roberta.analyze(factors=factors)
    before = {path: path.stat().st_mtime_ns for path in factors.iterdir()}
    assert len(before) == 24  # around the average as the merge has them, now of all ranks, and around the base
    second = roberta.analyze(factors=factors, up_to=0.32)
    assert {path: path.stat().st_mtime_ns for path in factors.iterdir()} == before
    alike(plain, first, rtol=1e-9, atol=1e-12)
    alike(roberta.analyze(up_to=0.32), second, rtol=1e-9, atol=1e-12)


def test_the_number_of_workers_changes_no_digit(roberta):
    one, three = (as_document(roberta.analyze(workers=workers, up_to=0.32)) for workers in (1, 3))
    assert one == three


@pytest.mark.gpu
def test_a_gpu_finds_the_same(roberta):
    alike(roberta.analyze(), roberta.analyze(device="cuda"), rtol=1e-6, atol=1e-8)


# --- warnings


def fine_tunes(folder: Path, *sizes: float, labels: list[list[str]] | None = None) -> tuple[str, list[str]]:
    """Write a base and models at these distances from it, and with these labels."""
    config, base_class, task_class = FAMILIES["roberta"]
    torch.manual_seed(0)
    base = base_class(config())
    folders = []
    for place, size in enumerate(sizes):
        names = labels[place] if labels else [f"{place}-{i}" for i in range(place + 2)]
        model = task_class(config(num_labels=len(names), id2label=dict(enumerate(names))))
        copy_backbone(model, base)
        perturb(model.base_model, seed=place + 1, size=size)
        folders.append(save(model, folder / f"task{place}"))
    return save(base, folder / "base"), folders


def warned(base: str | None, models: list[str], **options) -> dict[str, tuple[str, tuple[str, ...]]]:
    found = cart_hf.analyze(base=base, models=models, up_to=0.1, **options).warnings
    return {one.kind: (one.text, one.models) for one in found}


def test_ordinary_models_raise_no_warning(roberta):
    assert not roberta.analyze(up_to=0.1, method="task_arithmetic", rank_ratio=None, scale=0.3).warnings


def test_near_duplicates_are_found_with_a_base_and_without(roberta, tmp_path):
    twin = RobertaForSequenceClassification.from_pretrained(roberta.folders[0])
    perturb(twin.base_model, seed=9, size=0.005)
    models = [*roberta.folders, "twin=" + save(twin, tmp_path / "twin")]
    text, pair = warned(roberta.base, models)["near_duplicates"]
    assert pair == ("task0", "twin") and "task0 and twin are near duplicates" in text and "0.99" in text
    assert warned(None, models)["near_duplicates"][1] == pair


def test_a_model_that_outweighs_the_others_is_named_with_its_factor(tmp_path):
    base, models = fine_tunes(tmp_path, 0.02, 0.02, 0.4, 0.02)
    text, names = warned(base, models)["large_update"]
    assert names == ("task2",) and "task2's update is 20x larger than the others' median" in text
    assert "large_update" not in warned(base, [*models[:2], models[3]])


def test_a_model_that_is_the_base_is_named_and_no_duplicate(tmp_path):
    base, models = fine_tunes(tmp_path, 0.05, 0.0, 0.05, 0.0)
    analysis = cart_hf.analyze(base=base, models=models)
    assert [w.models for w in analysis.warnings if w.kind == "no_update"] == [("task1",), ("task3",)]
    assert not [w for w in analysis.warnings if w.kind in ("near_duplicates", "large_update")]
    text = json.dumps(as_document(analysis), allow_nan=False)
    assert json.loads(text)["whole"]["retention"][1] is None


def test_two_models_cancel(roberta):
    assert warned(roberta.base, roberta.folders[:2])["two_models"] == (TWO_MODELS, ("task0", "task1"))


def test_a_scale_that_carries_the_merge_away_is_noticed(roberta):
    assert "large_merge" in warned(roberta.base, roberta.folders, scale=20.0, rank_ratio=0.2)
    assert "large_merge" not in warned(roberta.base, roberta.folders, scale=3.0, rank_ratio=0.2)


def test_what_is_only_averaged_is_noticed_where_most_of_the_change_is_there(roberta):
    text, _ = warned(roberta.base, roberta.folders, exclude=["dense"])["mostly_averaged"]
    assert "CART only averages" in text and "embeddings.word_embeddings.weight" in text


@pytest.mark.parametrize(
    "labels, kind, naming",
    [
        ([["no", "yes"], ["no", "yes"], ["bad", "good"]], "head_labels", "(task0: no, yes; task2: bad, good ...)"),
        ([["No", "yes"], ["yes", "no"], ["a", "b", "c"]], "label_order", "(No, yes; yes, no)"),
        ([["no", "yes"], ["no", "yes"], ["NO", "Yes"]], None, ""),
        ([["no", "yes"], ["LABEL_0", "LABEL_1"], ["a", "b", "c"]], None, ""),
    ],
)
def test_heads_that_fit_but_mean_something_else(tmp_path, labels, kind, naming):
    base, models = fine_tunes(tmp_path, 0.05, 0.05, 0.05, labels=labels)
    found = {key: text for key, (text, _) in warned(base, models).items() if key in ("head_labels", "label_order")}
    assert list(found) == ([kind] if kind else [])
    assert naming in "".join(found.values())


def test_what_the_plan_warns_of_is_told_too(roberta, tmp_path):
    half = RobertaForSequenceClassification.from_pretrained(roberta.folders[0]).half()
    models = [save(half, tmp_path / "half"), *roberta.folders[1:]]
    assert "stored in different types" in warned(roberta.base, models)["merge"][0]


# --- files


def test_the_folder_has_a_page_numbers_and_figures(roberta, written):
    document = json.loads((written / "analysis.json").read_text())
    assert document["format"] == "cart-hf analysis 1"
    assert document == json.loads(json.dumps(as_document(roberta.analyze()), allow_nan=False))
    assert [model["name"] for model in document["about"]["models"]] == list(NAMES)
    assert all(model["hub_id"] is None for model in document["about"]["models"])  # they are folders
    assert [block["label"] for block in document["blocks"]] == ["embeddings", "encoder.layer.0", "encoder.layer.1"]
    page = (written / "index.html").read_text()
    assert all(name in page for name in NAMES)
    assert {path.suffix for path in (written / "figures").iterdir()} == {".png", ".svg"}
    assert not leftovers(written)


def test_tables_are_those_of_the_notebook(roberta, written):
    analysis = roberta.analyze()
    assert {path.stem for path in written.glob("*.csv")} == set(FRAMES)
    for name in FRAMES:
        expected = frame(analysis, name)
        found = pandas.read_csv(written / f"{name}.csv")
        assert list(found) == list(expected) and len(found) == len(expected), name
        numbers = expected.select_dtypes("number").columns
        np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-6, atol=1e-9, err_msg=name)
    curve = frame(analysis, "curves").query("matrix == @QUERY and centre == 'base'")
    assert curve["k"].iloc[-1] == 16 and curve["reconstruction"].iloc[-1] == 0
    spectrum = frame(analysis, "spectra").query("matrix == @QUERY and centre == 'average' and model == 'apple'")
    np.testing.assert_allclose(
        spectrum.iloc[0, 3:].astype(float), matrix_of(analysis, QUERY).around["average"].spectra[1]
    )
    with pytest.raises(UserError, match="did you mean 'spectra'"):
        frame(analysis, "spectrum")


@pytest.mark.usefixtures("undrawn")
def test_an_earlier_analysis_is_replaced_on_request_only(roberta, written, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(written, output)
    words = ["analyze", "--models", *roberta.models, "--up-to", "0.1", "--output", output]
    before = (output / "analysis.json").read_bytes()
    errors = refuse(tmp_path / "none", *words)
    assert errors == [f"{output} exists; choose another output, or --overwrite to replace it"]
    assert (output / "analysis.json").read_bytes() == before
    answer = succeed(*words, "--overwrite", "--format", "json")
    document = json.loads(answer.out)
    assert document["about"]["base"] is None and max(document["about"]["ratios"]) == 0.1
    assert json.loads((output / "analysis.json").read_text()) == document
    assert not leftovers(output) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("undrawn")
def test_people_get_a_few_lines_and_the_way_to_the_page(roberta, tmp_path):
    words = ["--base", roberta.base, "--models", *roberta.models[:2], "--method", "ties", "--up-to", "0.1"]
    answer = succeed("analyze", *words, "--output", tmp_path / "out")
    assert f"read on: {tmp_path / 'out' / 'index.html'}" in answer.out
    for words in ("TIES of 2 models", "around the base", "most alike: zebra and apple", "of the base's norm"):
        assert words in answer.out
    assert "warning: two models" in answer.err and "warning: plots need matplotlib" in answer.err
    assert (tmp_path / "out" / "spectra.csv").is_file() and not list((tmp_path / "out" / "figures").iterdir())


def test_the_theorem_is_checked_where_examples_are_named(roberta, tmp_path, own_caches):
    models = [shutil.copytree(folder, tmp_path / Path(folder).name) for folder in roberta.folders]
    save_tokenizer("roberta", *models)
    declared = {}
    for place, name in enumerate(NAMES):
        write_split(tmp_path / "data" / name, "test", {"text": texts(6, seed=place)})
        declared[name] = {
            "kind": "text-classification",
            "text": ["text"],
            "labels": ["a", "b"],
            "metrics": ["accuracy"],
        }
    write_tasks(tmp_path / "tasks.yaml", **declared)
    named = [f"{name}={folder}" for name, folder in zip(NAMES, models, strict=True)]
    analysis = cart_hf.analyze(
        base=roberta.base,
        models=named,
        inputs=5,
        examples={"tasks": NAMES, "tasks_file": str(tmp_path / "tasks.yaml"), "data": str(tmp_path / "data")},
        **OPTIONS,
    )
    assert [(b.name, b.centre) for b in analysis.bounds] == [(m.name, c) for m in analysis.matrices for c in m.around]
    assert all(b.inputs == 15 and b.rank == 4 and 0 < b.loss <= b.bound and 0 < b.inside <= 1 for b in analysis.bounds)
    assert len(frame(analysis, "theorem")) == 24
    assert as_document(analysis)["theorem"][0]["part"] == "attention.self.query"


def test_scores_and_a_search_are_shown_beside(roberta, tmp_path):
    task = {"metrics": {"accuracy": 0.5}, "score": 0.5, "metric": "accuracy", "examples": 2, "seconds": 0.1}
    results = {"model": "merged", "revision": None, "suite": None, "split": None, "tasks": {"zebra": task}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    document = as_document(roberta.analyze(results=tmp_path, up_to=0.1))
    assert document["results"]["tasks"] == ["zebra"] and document["tuning"] is None


@pytest.mark.usefixtures("undrawn")
def test_the_card_of_a_merge_tells_of_its_analysis(roberta, tmp_path):
    words = ["--base", roberta.base, "--models", *roberta.models]
    succeed("merge", *words, "--output", tmp_path / "merged")
    before = (tmp_path / "merged" / "README.md").read_text()
    succeed("analyze", *words, "--up-to", "0.1", "--output", tmp_path / "out", "--card", tmp_path / "merged")
    assert "interfere" not in before and "interfere" in (tmp_path / "merged" / "README.md").read_text()


# --- refusals


@pytest.mark.parametrize(
    "words, naming",
    [
        (["--up-to", "0"], "up_to: must be above 0 and at most 1, not 0.0"),
        (["--up-to", "1.5"], "up_to: must be above 0 and at most 1, not 1.5"),
        (["--normalizer", "most"], "most"),
        (["--inputs", "-1"], "inputs"),
        (["--results", "nowhere"], "nowhere"),
        (["--tuning", "nowhere"], "nowhere"),
        (["--card", "nowhere"], "--card: nowhere is not an output of cart-hf"),
        (["--method", "carte"], "did you mean 'cart'"),
        (["--rank-ratio", "2"], "rank_ratio"),
        (["--device", "nothing"], "--device: 'nothing' is not a device"),
        (["--factors", __file__], "is not a folder"),
        (["--exclude", "*"], "nothing to decompose|found no Linear weight|0 of"),
        (["--data", "nowhere"], "task"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(roberta, tmp_path, words, naming):
    output = tmp_path / "out"
    (error,) = refuse(
        output, "analyze", "--base", roberta.base, "--models", *roberta.models, "--output", output, *words
    )
    assert any(part in error for part in naming.split("|")), error


def test_one_model_a_foreign_folder_an_input_and_no_output_are_refused(roberta, tmp_path, monkeypatch):
    output = tmp_path / "out"
    (error,) = refuse(output, "analyze", "--base", roberta.base, "--models", roberta.models[0], "--output", output)
    assert "needs at least two" in error
    models = ["analyze", "--base", roberta.base, "--models", *roberta.models]
    (error,) = refuse(output, *models)
    assert "no output folder" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (error,) = refuse(output, *models, "--output", tmp_path / "mine", "--overwrite")
    assert "is not an analysis of cart-hf" in error and (tmp_path / "mine" / "thesis.txt").is_file()
    (error,) = refuse(output, *models, "--output", Path(roberta.folders[0]) / "analysis")
    assert "which it is made from" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs as one process"):
        monkeypatch.setattr(
            "cart_hf.analysis.run.join", lambda device: cart_hf.processes.Processes(0, 2, torch.device("cpu"))
        )
        roberta.analyze(output=output)
    assert_absent(output)


@pytest.mark.parametrize("name", [f"roberta.{QUERY}", "roberta.embeddings.word_embeddings.weight"])
def test_a_broken_checkpoint_leaves_nothing_behind(roberta, tmp_path, name):
    broken = shutil.copytree(roberta.folders[2], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[name][3, 3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    output = tmp_path / "new" / "out"
    models = ["--models", *roberta.models[:2], f"broken={broken}"]
    (error,) = refuse(output, "analyze", "--base", roberta.base, *models, "--output", output)
    assert "of broken" in error and "holds NaN" in error
    assert not output.parent.exists()
