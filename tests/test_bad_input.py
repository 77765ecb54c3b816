"""Everything a user can get wrong: one message of one line for each mistake, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_clip, make_family, save
from commands import Answer, assert_absent, call, leftovers, refuse, succeed
from safetensors.torch import load_file, save_file

QUERY = "roberta.encoder.layer.0.attention.self.query.weight"
HEAD = "classifier.dense.weight"
WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
Change = Callable[[Path], object]

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked")


@dataclass(frozen=True)
class Bench:
    """A good base, three good models, and a place for a bad one and for the output."""

    folder: Path
    base: str
    models: tuple[str, ...]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def culprit(self, change: Change) -> str:
        """Copy a good model as ``culprit``, change it, and return its folder."""
        folder = self.folder / "culprit"
        shutil.copytree(self.models[1], folder)
        change(folder)
        return str(folder)

    def arguments(self, *extra: object, base: str | None = "", models: Any = None) -> list[object]:
        """Return the arguments of a merge of good models, but for what is given."""
        base = self.base if base == "" else base
        models = self.models if models is None else models
        return ["merge", *(["--base", base] if base else []), "--models", *models, "--output", self.output, *extra]

    def refuse(self, *extra: object, naming: Any = (), count: int = 1, **changes: Any) -> list[str]:
        """Run a merge that must be refused."""
        return refuse(self.output, *self.arguments(*extra, **changes), naming=naming, count=count)

    def refuse_culprit(self, change: Change, *extra: object, naming: Any = (), count: int = 1, **changes: Any) -> None:
        """Run a merge of a changed model between two good ones; the message must name it."""
        models = [self.models[0], self.culprit(change), self.models[2]]
        self.refuse(*extra, naming=("culprit", *naming), count=count, models=models, **changes)

    def recipe(self, text: str, **places: str) -> Path:
        """Write a recipe; ``{B}``, ``{M0}``, ``{M1}`` and ``{M2}`` in it stand for the good models."""
        places = {"B": self.base} | {f"M{i}": model for i, model in enumerate(self.models)} | places
        for name, value in places.items():
            text = text.replace(f"{{{name}}}", value)
        path = self.folder / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A RoBERTa base and three classifiers fine-tuned from it."""
    return make_family(tmp_path_factory.mktemp("family"), "roberta")


@pytest.fixture
def bench(family, tmp_path):
    return Bench(tmp_path, family[0], tuple(family[1]))


def case(name: str, change: Any, *naming: str) -> Any:
    """A row of a table: what is wrong and what the message must say."""
    return pytest.param(change, naming, id=name)


# ---------------------------------------------------------------------------------------------------------------------
# Changes to a model folder
# ---------------------------------------------------------------------------------------------------------------------


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def keep_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate(size: int, name: str = WEIGHTS) -> Change:
    """Cut the file to ``size`` bytes, or by ``-size``."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def content(data: bytes | str, name: str = WEIGHTS) -> Change:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def header(data: Any) -> Change:
    """Replace the weights by a safetensors file with this header."""
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return content(len(text).to_bytes(8, "little") + text + bytes(64))


def index(weight_map: Callable[[list[str]], Any] | str) -> Change:
    """Turn the weights into one shard with this index (JSON text, or a function of the tensors' names)."""

    def change(folder: Path) -> None:
        keys = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map(keys)})
        (folder / INDEX).write_text(text, encoding="utf-8")

    return change


def tensors(**changes: Any) -> Change:
    """Change tensors: a new tensor, None to remove it, or a number to put into it."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        for key, value in changes.items():
            if value is None:
                del state[key]
            elif isinstance(value, torch.Tensor):
                state[key] = value
            else:
                state[key].view(-1)[-1] = value
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def config(**changes: Any) -> Change:
    """Change ``config.json``; None removes a key."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        data = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), encoding="utf-8")

    return change


def another(family: str, **options: Any) -> Change:
    """Replace the model by a new one of another architecture or size."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        torch.manual_seed(0)
        make_config, _, task_class = FAMILIES[family]
        save(task_class(make_config(**options)), folder)

    return change


def pickled(make: Callable[[dict[str, torch.Tensor]], Any], **options: Any) -> Change:
    """Replace the weights by a pickle of what ``make`` returns for them."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(make(state), folder / PICKLE, **options)

    return change


def adapter(folder: Path) -> None:
    keep_nothing(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


class Malicious:
    """A pickle that creates a file when it is loaded by Python's own unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, incomplete and foreign checkpoints
# ---------------------------------------------------------------------------------------------------------------------

AGAIN = "again"  # "download it again"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

FILES = [
    case("no weights", remove(WEIGHTS), "holds no weights", WEIGHTS, PICKLE, "config.json"),
    case("no config", remove("config.json"), "no config.json", "save_pretrained"),
    case("empty folder", keep_nothing, "no config.json"),
    case("truncated", truncate(-100), WEIGHTS, "truncated: 100 bytes are missing", AGAIN),
    case("truncated in the header", truncate(100), WEIGHTS, "truncated", AGAIN),
    case("empty file", truncate(0), WEIGHTS, "not a safetensors file", AGAIN),
    case("git LFS pointer", content("version https://git-lfs.github.com/spec/v1\n"), "not a safetensors file", AGAIN),
    case("header not JSON", header(b'{"a": [1,'), WEIGHTS, "header is damaged", AGAIN),
    case("header not UTF-8", header(b"\xff\xfe\xfd"), WEIGHTS, "header is damaged", AGAIN),
    case("header a list", header([1]), WEIGHTS, "header is damaged", AGAIN),
    case("entry without offsets", header({QUERY: {"dtype": "F32", "shape": [1]}}), QUERY, "is damaged", AGAIN),
    case("entry a number", header({QUERY: 5}), QUERY, "is damaged", AGAIN),
    case("offsets are words", header({QUERY: ENTRY | {"data_offsets": ["0", "4"]}}), QUERY, "is damaged", AGAIN),
    case("type is a list", header({QUERY: ENTRY | {"dtype": ["F32"]}}), QUERY, "has type ['F32']", "reads F64, F32"),
    case("offsets do not fit", header({QUERY: ENTRY | {"data_offsets": [0, 8]}}), QUERY, "do not fit its shape", AGAIN),
    case("negative offset", header({QUERY: ENTRY | {"data_offsets": [-4, 0]}}), QUERY, "do not fit its shape", AGAIN),
    case("unknown type", header({QUERY: ENTRY | {"dtype": "F8_E4M3"}}), QUERY, "F8_E4M3", "reads F64, F32"),
    case(
        "shard above", index(lambda keys: dict.fromkeys(keys, "../x.safetensors")), INDEX, "points outside its folder"
    ),
    case("shard absolute", index(lambda keys: dict.fromkeys(keys, "/x.safetensors")), INDEX, "outside its folder"),
    case("shard backslash", index(lambda keys: dict.fromkeys(keys, "..\\x")), INDEX, "points outside its folder"),
    case("shard on a drive", index(lambda keys: dict.fromkeys(keys, "C:/x")), INDEX, "points outside its folder"),
    case("shard missing", index(lambda keys: dict.fromkeys(keys, "x.safetensors")), INDEX, "x.safetensors", "again"),
    case("shard lacks a tensor", index(lambda k: dict.fromkeys([*k, "a.b"], "shard.safetensors")), "a.b", "again"),
    case("index not JSON", index("weights"), INDEX, "not a valid index", AGAIN),
    case("index a list", index("[]"), INDEX, "not a valid index", AGAIN),
    case("index without a map", index("{}"), INDEX, "not a valid index", AGAIN),
    case("index map a list", index('{"weight_map": []}'), INDEX, "not a valid index", AGAIN),
    case("adapter without a base", adapter, "adapter_config.json", "names no base model", "BASE+"),
]


@pytest.mark.parametrize(("change", "naming"), FILES)
def test_files(bench, change, naming):
    """Files that are missing, damaged or not what their name says."""
    bench.refuse_culprit(change, naming=naming)


CONFIGS = [
    case("not JSON", content("{", "config.json"), "config.json", "not valid JSON"),
    case("not text", content(b"\xff\xfe{", "config.json"), "config.json", "not valid JSON"),
    case("a list", content("[]", "config.json"), "config.json", "not a JSON object"),
    case("no model type", config(model_type=None), "model_type"),
    case("unknown model type", config(model_type="foobar"), "'foobar'", "unknown to transformers", "upgrade"),
    case("remote code", config(model_type="foobar", auto_map={"AutoModel": "a.b"}), "foobar", "remote code", "never"),
    case("unknown class", config(architectures=["NoSuchModel"], auto_map={"AutoModel": "a.b"}), "NoSuchModel"),
    case(
        "quantised",
        config(quantization_config={"quant_method": "gptq"}),
        "is quantised (gptq)",
        "merge the full-precision weights",
    ),
    case("impossible size", config(num_attention_heads=5), "multiple", "config.json"),
    case("a class of another model", config(architectures=["BertModel"]), "BertModel"),
    case("model type a list", config(model_type=["roberta"]), "config.json names no model_type"),
    case("class a number", config(architectures=[5]), "architectures in config.json", "not [5]"),
    case("class not a model", config(architectures=["RobertaTokenizer"]), "RobertaTokenizer", "architectures"),
    case("quantised by a word", config(quantization_config="int8"), "is quantised (int8)", "full-precision"),
    case("size a word", config(hidden_size="abc"), "config.json", "'hidden_size' expected int"),
]


@pytest.mark.parametrize(("change", "naming"), CONFIGS)
def test_configs(bench, change, naming):
    """Configurations that are damaged, or of models that cart-hf does not merge."""
    bench.refuse_culprit(change, naming=naming)


NAN, INF = float("nan"), float("inf")
VALUES = [
    case("NaN in a matrix", {QUERY: NAN}, QUERY, "NaN"),
    case("Inf in a matrix", {QUERY: INF}, QUERY, "Inf"),
    case("-Inf in a bias", {QUERY.replace("weight", "bias"): -INF}, "query.bias", "Inf"),
    case("NaN in an embedding", {"roberta.embeddings.word_embeddings.weight": NAN}, "word_embeddings", "NaN"),
    case("NaN in a head", {HEAD: NAN}, HEAD, "NaN"),
    case("Inf in a head", {HEAD: INF}, HEAD, "Inf"),
]


@pytest.mark.parametrize(("changes", "naming"), VALUES)
@pytest.mark.parametrize("method", ["cart", "task_arithmetic", "ties"])
def test_values(bench, changes, naming, method):
    """NaN and Inf are named with tensor and model, whichever part of the work reads them first."""
    bench.refuse_culprit(tensors(**changes), "--method", method, naming=naming)


def test_nan_in_the_base(bench, family, tmp_path):
    """A base whose numbers the method uses is read as strictly as a model."""
    folder = tmp_path / "culprit"
    shutil.copytree(family[0], folder)
    tensors(**{QUERY: NAN})(folder)
    bench.refuse("--method", "task_arithmetic", base=str(folder), naming=(QUERY, "NaN", "of base", "culprit"))
    succeed(*bench.arguments("--method", "cart", base=str(folder)))  # CART reads no such number


def test_large_values_are_no_infinities(bench):
    """Finite values whose sum overflows float32 are not mistaken for Inf."""
    models = [bench.models[0], bench.culprit(tensors(**{HEAD: torch.full((16, 16), 3e38)})), bench.models[2]]
    succeed(*bench.arguments(models=models))


MISMATCHES = [
    case(
        "positions", another("roberta", max_position_embeddings=24), "position_embeddings", "[20, 16] in base and [24"
    ),
    case("vocabulary", another("roberta", vocab_size=64), "60 and 64 tokens", "base's tokenizer"),
    case("bert", another("bert"), "BertForSequenceClassification", "RobertaModel"),
    case("distilbert", another("distilbert"), "DistilBertForSequenceClassification", "RobertaModel"),
    case("vit", another("vit"), "ViTForImageClassification", "RobertaModel"),
    case(
        "attention heads",
        config(num_attention_heads=4),
        "num_attention_heads 4 where base has 2",
        "another architecture",
    ),
    case("activation", config(hidden_act="relu"), "hidden_act 'relu' where base has 'gelu'"),
    case("norm epsilon", config(layer_norm_eps=1e-3), "layer_norm_eps 0.001", "1e-12"),
    case("tensor missing", tensors(**{QUERY: None}), "missing", "layer.0.attention.self.query.weight"),
    case("embedding missing", tensors(**{"roberta.embeddings.word_embeddings.weight": None}), "word_embeddings"),
    case("half a head", tensors(**{HEAD: None}), "head lacks", HEAD),
    case("file against config", tensors(**{QUERY: torch.zeros(16, 15)}), QUERY, "[16, 15]", "[16, 16]", "config.json"),
    case("integers", tensors(**{QUERY: torch.zeros(16, 16, dtype=torch.int32)}), "F32 in base and I32", "query.weight"),
    case("more layers", another("roberta", num_hidden_layers=3), "num_hidden_layers 3 where base has 2"),
    case("fewer layers", another("roberta", num_hidden_layers=1), "num_hidden_layers 1 where base has 2"),
]


@pytest.mark.parametrize(("change", "naming"), MISMATCHES)
def test_mismatches(bench, change, naming):
    """Models that are no fine-tunes of one pretrained model; both sides are named."""
    bench.refuse_culprit(change, naming=naming)


@pytest.mark.parametrize("anchor", ["base", "task0"])
def test_mismatches_are_counted(bench, anchor):
    """A model of another size has all its tensors in other shapes: a few are listed, the others counted."""
    shapes = f"has shape [16] in {anchor} and [32] in culprit"
    rest = f"and 32 more tensors of culprit do not fit those of {anchor}"
    change = another("roberta", hidden_size=32)
    bench.refuse_culprit(change, base=bench.base if anchor == "base" else None, naming=(shapes, rest), count=4)


def test_activation_left_to_the_default(bench, tmp_path):
    """A config.json that is silent means transformers' default: here GELU, where the others say ReLU."""
    relu = [shutil.copytree(folder, tmp_path / Path(folder).name) for folder in (bench.base, *bench.models)]
    for folder in relu:
        config(hidden_act="relu")(folder)
    relu[2].rename(tmp_path / "culprit")
    config(hidden_act=None)(tmp_path / "culprit")
    bench.refuse(
        base=relu[0],
        models=[relu[1], tmp_path / "culprit", relu[3]],
        naming=("culprit", "hidden_act 'gelu' where base has 'relu'"),
    )


@pytest.mark.parametrize("method", ["cart", "average"])
def test_attention_heads_without_a_base(bench, method):
    """The same shapes with another number of heads compute something else, base or no base."""
    bench.refuse_culprit(
        config(num_attention_heads=4),
        "--method",
        method,
        base=None,
        naming=("num_attention_heads 4 where task0 has 2",),
    )


@pytest.mark.parametrize(
    ("name", "change"), [("distilbert", {"n_heads": 4}), ("gpt2", {"n_head": 4})], ids=["distilbert", "gpt2"]
)
def test_attention_heads_by_other_names(tmp_path, name, change):
    """Families that call the number of heads otherwise are checked as well."""
    base, models = make_family(tmp_path / "family", name)
    bench = Bench(tmp_path, base, tuple(models))
    bench.refuse_culprit(config(**change), naming=("num_attention_heads 4 where base has 2",))


def test_attention_heads_of_a_whole_clip(tmp_path):
    """A composite model's settings are those of its parts."""
    base, _ = make_clip(tmp_path / "family", tasks=0)
    models = []
    for task in range(3):
        models.append(shutil.copytree(base, tmp_path / f"clip{task}"))
    data = json.loads((models[1] / "config.json").read_text(encoding="utf-8"))
    data["vision_config"]["num_attention_heads"] = 4
    (models[1] / "config.json").write_text(json.dumps(data), encoding="utf-8")
    Bench(tmp_path, base, tuple(map(str, models))).refuse(naming=("clip1", "num_attention_heads 4 where base has 2"))


def test_shapes_differ_without_a_base(bench):
    """Two models are compared with each other when there is no base."""
    change = another("roberta", max_position_embeddings=24)
    bench.refuse_culprit(change, base=None, naming=("[20, 16] in task0", "[24, 16] in culprit"))


def test_swapped(bench, tmp_path):
    """Base and models swapped: the only head is the base's."""
    copy = shutil.copytree(bench.base, tmp_path / "base2")
    bench.refuse(base=bench.models[0], models=[bench.base, copy], naming=("only the base", "swapped"))


DAMAGED = "is damaged, or no PyTorch file"
PICKLES = [
    case(
        "a module",
        pickled(lambda state: torch.nn.Linear(2, 2)),
        "is not a pickle of plain tensors",
        "weights_only=True",
        "safetensors",
    ),
    case("a list", pickled(lambda state: list(state.values())), "a list, not a mapping", "safetensors"),
    case("a tensor", pickled(lambda state: torch.zeros(3)), "a Tensor, not a mapping", "safetensors"),
    case("a nested dict", pickled(lambda state: {"state_dict": state}), "'state_dict' is not a tensor", "safetensors"),
    case("truncated", lambda f: (pickled(dict)(f), truncate(3000, PICKLE)(f)), DAMAGED, AGAIN),
    case("text", lambda f: (remove(WEIGHTS)(f), content("hello", PICKLE)(f)), DAMAGED, AGAIN),
    case("an empty file", lambda f: (remove(WEIGHTS)(f), content("", PICKLE)(f)), DAMAGED, AGAIN),
    case(
        "numbers for names", pickled(lambda state: {0: torch.zeros(3)}), "0 is not a tensor with a name", "safetensors"
    ),
    case(
        "complex numbers",
        pickled(lambda state: state | {"z": torch.zeros(3, dtype=torch.complex64)}),
        "'z'",
        "complex64",
    ),
    case(
        "float8", pickled(lambda state: state | {"z": torch.zeros(3).to(torch.float8_e4m3fn)}), "'z'", "float8_e4m3fn"
    ),
    case("a sparse tensor", pickled(lambda state: state | {HEAD: torch.eye(16).to_sparse()}), HEAD, "sparse"),
]


@pytest.mark.parametrize(("change", "naming"), PICKLES)
def test_pickles(bench, change, naming):
    """Pickles that hold anything but named tensors."""
    bench.refuse_culprit(change, naming=(PICKLE, *naming))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.filterwarnings("error:Detected pickle protocol")
def test_malicious_pickle_does_not_run(bench, tmp_path, protocol):
    """A pickle that runs code is refused, and its code does not run."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malicious(mark), protocol))
    assert mark.exists(), "the pickle would run where it is trusted"
    mark.unlink()
    bench.refuse_culprit(
        lambda f: (remove(WEIGHTS)(f), content(pickle.dumps(Malicious(mark), protocol), PICKLE)(f)),
        naming=("is not a pickle of plain tensors", "weights_only=True"),
    )
    assert not mark.exists()


def test_malicious_entry_does_not_run(bench, tmp_path):
    """Neither does the code of one entry among good tensors."""
    mark = tmp_path / "ran"
    bench.refuse_culprit(
        pickled(lambda state: state | {"z": Malicious(mark)}), naming=("is not a pickle of plain tensors",)
    )
    assert not mark.exists()


@pytest.mark.filterwarnings("error:Detected pickle protocol")
def test_pickle_message_does_not_advise_to_trust(bench):
    """The message about a pickle never tells how to run its code."""
    (message,) = bench.refuse(models=[bench.models[0], bench.culprit(pickled(lambda state: torch.nn.Linear(2, 2)))])
    assert "\x1b" not in message
    (bench.folder / "culprit" / PICKLE).write_bytes(pickle.dumps(Malicious(bench.folder / "ran")))
    (message,) = bench.refuse(models=[bench.models[0], bench.folder / "culprit"])
    assert "to `False`" not in message


def test_plain_pickles_are_read(bench, tmp_path):
    """A pickle of plain tensors, of either format, gives the same bytes as the safetensors file."""
    for name, options in (("new", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        culprit = bench.culprit(pickled(dict, **options))
        moved = shutil.move(culprit, tmp_path / name / "task1")
        succeed(*bench.arguments(models=[bench.models[0], moved, bench.models[2]]))
        bench.output.rename(tmp_path / f"from_{name}")
    succeed(*bench.arguments())
    expected = (bench.output / WEIGHTS).read_bytes()
    assert all((tmp_path / f"from_{name}" / WEIGHTS).read_bytes() == expected for name in ("new", "legacy"))


# ---------------------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------------------

REFERENCES = [
    case("relative", "./nowhere", "folder not found: ./nowhere"),
    case("absolute", "/no/such/folder", "folder not found: /no/such/folder"),
    case("Windows", "C:\\models\\x", "folder not found: C:\\models\\x"),
    case("spaces", "my model", "'my model'", "neither an existing folder nor a Hub id"),
    case("empty", "", "empty model reference"),
    case("no revision", "org/name@", "org/name@revision"),
    case("no adapter", "org/name+./nowhere", "base+adapter", "folder not found: ./nowhere"),
    case("URL", "https://huggingface.co/org/name", "neither an existing folder nor a Hub id"),
    case("no such user", "~nosuchuser/m", "~nosuchuser/m"),
    case("too long", "x" * 300, "xxx"),
]


@pytest.mark.parametrize(("reference", "naming"), REFERENCES)
def test_references(bench, reference, naming):
    """References that name nothing."""
    bench.refuse(models=[bench.models[0], reference], naming=("models[1]", *naming))
    bench.refuse(base=reference or "@", naming=("base_model", *naming) if reference else ())


def test_revision_of_a_local_folder(bench):
    """A revision is for the Hub."""
    bench.refuse(models=[f"{bench.models[0]}@v1", bench.models[1]], naming=("local folder", "@v1", "Hub ids only"))


def test_hub_out_of_reach(bench, monkeypatch):
    """A Hub id that is not in the cache, offline."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    bench.refuse(models=[bench.models[0], "no-such-org/no-such-model"], naming=("no-such-org/no-such-model", "cache"))


def test_a_file_is_no_model(bench):
    """The weight file instead of its folder."""
    bench.refuse(models=[bench.models[0], f"{bench.models[1]}/{WEIGHTS}"], naming=(WEIGHTS, "is not a folder"))


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------

TIES, TASK_ARITHMETIC, AVERAGE = ("--method", "ties"), ("--method", "task_arithmetic"), ("--method", "average")
FINITE = "must be a finite number"
FLAGS = [
    case("method", ["--method", "cartt"], "merge_method", "'cartt'", "did you mean 'cart'?"),
    case("method with a dash", ["--method", "task-arithmetic"], "did you mean 'task_arithmetic'?"),
    case("method like nothing", ["--method", "zzz"], "'zzz'", "known: cart, average", "ties"),
    case("flag", ["--rank-ration", "0.1"], "--rank-ration", "Did you mean --rank-ratio?"),
    case("argument", ["a", "b", "c"], "'c'"),
    case("no value", ["--rank"], "--rank"),
    case("dtype", ["--dtype", "float8"], "--dtype", "float8", "bfloat16"),
    case("format", ["--format", "xml"], "--format", "xml", "json"),
    case("rank and energy", ["--rank", 3, "--energy", 0.5], "rank and energy exclude each other", "give one"),
    case("rank and ratio", ["--rank", 3, "--rank-ratio", 0.5], "rank_ratio and rank exclude each other", "give one"),
    case("ratio and energy", ["--energy", 0.3, "--rank-ratio", 0.5], "rank_ratio and energy exclude each other"),
    case("rank 0", ["--rank", 0], "rank", "at least 1", "0"),
    case("rank negative", ["--rank=-1"], "rank", "at least 1", "-1"),
    case("rank a word", ["--rank", "x"], "--rank", '"x"'),
    case("rank a fraction", ["--rank", 2.7], "rank", "whole number", "2.7"),
    case("rank half", ["--set", "rank=2.5"], "rank", "whole number", "2.5"),
    case("rank true", ["--set", "rank=true"], "rank", "must be a number", "True"),
    case("rank NaN", ["--set", "rank=.nan"], "parameters.rank", FINITE, "nan"),
    case("rank Inf", ["--set", "rank=.inf"], "parameters.rank", FINITE, "inf"),
    case("ratio 0", ["--rank-ratio", 0], "rank_ratio", "greater than 0"),
    case("ratio 1.5", ["--rank-ratio", 1.5], "rank_ratio", "at most 1", "1.5"),
    case("ratio NaN", ["--rank-ratio", "nan"], "rank_ratio", FINITE, "nan"),
    case("ratio negative", ["--rank-ratio=-0.1"], "rank_ratio", "greater than 0", "-0.1"),
    case("energy 0", ["--energy", 0], "energy", "greater than 0"),
    case("energy above 1", ["--energy", 1.01], "energy", "at most 1", "1.01"),
    case("scale NaN", ["--scale", "nan"], "scale", FINITE, "nan"),
    case("scale Inf", ["--scale", "inf"], "parameters.scale", FINITE, "inf"),
    case("scale a word", ["--scale", "x"], "--scale", '"x"'),
    case("density 0", [*TIES, "--density", 0], "density", "greater than 0"),
    case("density 2", [*TIES, "--density", 2], "density", "at most 1"),
    case("parameter of another method", ["--density", 0.5], "density", "cart has no such parameter", "rank_ratio"),
    case("unknown parameter", ["--set", "rank_ration=0.1"], "rank_ration", "did you mean 'rank_ratio'?"),
    case("--set without =", ["--set", "scale"], "--set scale", "KEY=VALUE"),
    case("--set without a key", ["--set", "=1"], "--set =1", "KEY=VALUE"),
    case("--set a word", ["--set", "scale=abc"], "scale", "must be a number", "'abc'"),
    case("--set a mapping", ["--set", "scale={a: 1}"], "scale", "{filter, value}", "'a'"),
    case("--set an empty list", ["--set", "scale=[]"], "scale", "empty list"),
    case("--set not YAML", ["--set", "scale=[1"], "--set scale=[1", "not valid YAML"),
    case("--set nothing", ["--set", "scale="], "--set scale=", "KEY=VALUE"),
    case("--set against a flag", ["--set", "scale=2", "--scale", 3], "--set scale", "given twice", "keep one"),
    case(
        "two names of one parameter",
        [*TASK_ARITHMETIC, "--set", "lambda=2", "--scale", 3],
        "scale and lambda are the same",
        "give one",
    ),
    case("too few weights", ["--weights", 1, 2], "--weights", "2 values for 3 models", "one for each"),
    case("too many weights", ["--weights", 1, 2, 3, 4], "--weights", "4 values for 3 models"),
    case("weight a word", ["--weights", 1, 2, "x"], "--weights", '"x"'),
    case("weight NaN", ["--weights", 1, "nan", 2], "models[1].parameters.weight", FINITE, "nan"),
    case("weight Inf", ["--weights", 1, "inf", 2], "models[1].parameters.weight", FINITE, "inf"),
    case("weights 0", ["--weights", 0, 0, 0], "weights", "sum to zero", "give others"),
    case("weights that cancel", [*AVERAGE, "--weights", 1, "-1", 0], "weights", "sum to zero", "give others"),
    case(
        "include nothing", ["--include", "nosuch"], "include", "'nosuch' matches no tensor", "names look like encoder"
    ),
    case("exclude nothing", ["--exclude", "nosuch*"], "exclude", "'nosuch*' matches no tensor", "names look like"),
    case("filter nothing", ["--set", "scale=[{filter: mlp, value: 2}, {value: 1}]"], "scale", "'mlp'", "no tensor"),
    case("bad include", ["--include", "re:("], "include", "re:(", "not a regular expression"),
    case("bad exclude", ["--exclude", "re:("], "exclude", "re:(", "not a regular expression"),
    case("bad filter", ["--set", 'scale=[{filter: "re:(", value: 2}]'], "scale", "re:(", "not a regular expression"),
    case(
        "filter a number", ["--set", "scale=[{filter: 5, value: 2}]"], "parameters.scale", "filter must be text, not 5"
    ),
    case("nothing left", ["--exclude", "*"], "low-rank: 0 of 37 tensors", "--include", "--method average"),
    case(
        "float16 overflow", [*TASK_ARITHMETIC, "--scale", 1e6, "--out-dtype", "float16"], "F16", "--out-dtype float32"
    ),
    case("device", ["--device", "nonsense"], "--device", "'nonsense'", "cuda"),
    case("device number", ["--device", "cuda:x"], "--device", "'cuda:x'"),
    case("device without numbers", ["--device", "meta"], "--device", "'meta' is not available", "cpu"),
    case(
        "device unknown to torch", ["--device", "privateuseone"], "--device", "'privateuseone' is not available", "cpu"
    ),
    case("workers negative", ["--workers=-1"], "--workers", '"-1"', ">= 1"),
    case("workers 0", ["--workers", 0], "--workers", '"0"', ">= 1"),
    case("shard size", ["--max-shard-size", "5XB"], "max_shard_size", "'5XB'", "5GB"),
    case("shard size 0", ["--max-shard-size", "0GB"], "max_shard_size", "'0GB'"),
    case("shard size without unit", ["--max-shard-size", "5"], "max_shard_size", "'5'", "200MB"),
    case("tokenizer of nobody", ["--tokenizer-source", "x"], "tokenizer_source", "'x'", "task0, task1, task2"),
    case("tokenizer union", ["--tokenizer-source", "union"], "'union'", "mergekit"),
]


@pytest.mark.parametrize(("flags", "naming"), FLAGS)
def test_flags(bench, flags, naming):
    """Flags with values that mean nothing, on a merge of good models."""
    bench.refuse(*flags, naming=naming)


def test_unavailable_cuda(bench):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    bench.refuse("--device", "cuda", naming=("--device", "'cuda' is not available"))


def test_unavailable_mps(bench):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    (message,) = bench.refuse("--device", "mps", naming=("--device", "'mps' is not available"))
    assert len(message) < 300


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus", "dare"])
def test_no_base(bench, method):
    bench.refuse("--method", method, base=None, naming=("base_model", method, "needs the base"))


def test_how_many_models(bench):
    bench.refuse(models=bench.models[:1], naming=("only one model", "at least two"))
    refuse(bench.output, "merge", "--base", bench.base, "--output", bench.output, naming=("--models", "recipe"))
    refuse(bench.output, "merge", naming=("nothing to merge", "--models", "--help"))


@pytest.mark.parametrize(
    ("names", "naming"),
    [(("a=", "a=", "b="), ("'a'",)), (("", "task0=", "b="), ("'task0'",))],
    ids=["given twice", "given and default"],
)
def test_duplicate_names(bench, names, naming):
    models = [name + model for name, model in zip(names, bench.models, strict=True)]
    bench.refuse(models=models, naming=(*naming, "NAME=REF", bench.models[0], bench.models[1]))


def test_the_same_folder_twice(bench):
    bench.refuse(models=[bench.models[0], bench.models[0]], naming=("'task0'", "NAME=REF"))


def test_no_output(bench):
    refuse(bench.output, "merge", "--models", *bench.models, naming=("no output folder", "--output"))


def test_two_outputs(bench):
    recipe = bench.recipe(PLAIN)
    refuse(
        bench.output,
        "merge",
        recipe,
        bench.folder / "other",
        "--output",
        bench.output,
        naming=("two outputs", "other", "--output", "give one"),
    )


def test_head_that_overflows_float16(bench):
    """A head's values that do not fit the output's type are refused as the backbone's are."""
    bench.refuse_culprit(tensors(**{HEAD: 1e6}), "--out-dtype", "float16", naming=(HEAD, "float16"))


def test_unknown_verb(tmp_path):
    refuse(tmp_path / "out", "frobnicate", naming=("frobnicate", "merge", "evaluate"))


# ---------------------------------------------------------------------------------------------------------------------
# Recipe files
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = "merge_method: cart\nbase_model: {B}\nmodels:\n- model: {M0}\n- model: {M1}\n- model: {M2}\n"
SLICES = "merge_method: ties\nbase_model: {B}\nslices:\n- sources:\n  - {model: {M0}, layer_range: [0, 1]}\n"

RECIPES = [
    case("empty", "", "recipe is a mapping", "merge_method"),
    case("a list", "- a\n", "recipe is a mapping", "merge_method"),
    case("a word", "hello", "recipe is a mapping", "merge_method"),
    case("not YAML", "a: [1\nb: 2", "not valid YAML", "line 2"),
    case("a tab", "a:\n\t- b", "not valid YAML", "line 2"),
    case("two documents", PLAIN + "---\n" + PLAIN, "not valid YAML", "document"),
    case("Python object", PLAIN + "x: !!python/object/apply:os.getcwd []\n", "not valid YAML", "line 7"),
    case("unknown key", PLAIN + "paramters: {}\n", "paramters: unknown key", "did you mean 'parameters'?"),
    case("key like nothing", PLAIN + "xyzzy: 1\n", "xyzzy: unknown key", "known: merge_method", "max_shard_size"),
    case("unknown key of a model", PLAIN + "  wieght: 1\n", "models[2].wieght: unknown key", "parameters"),
    case("unknown parameter", PLAIN + "parameters: {sclae: 1}\n", "parameters.sclae", "did you mean 'scale'?"),
    case("unknown method", PLAIN.replace("cart", "cartt"), "merge_method", "'cartt'", "did you mean 'cart'?"),
    case("no method", PLAIN.replace("merge_method: cart\n", ""), "merge_method: missing"),
    case("method a number", PLAIN.replace("cart", "5"), "merge_method", "string"),
    case("no models", "merge_method: cart\nbase_model: {B}\n", "models: missing"),
    case("models empty", "merge_method: cart\nmodels: []\n", "models: no model"),
    case("models null", "merge_method: cart\nmodels:\n", "models", "list"),
    case("models a mapping", "merge_method: cart\nmodels: {a: {M0}}\n", "models", "list"),
    case("include a word", PLAIN + "include: query\n", "include", "list"),
    case("one model", "merge_method: cart\nmodels: [{M0}]\n", "only one model", "at least two"),
    case("only the base", "merge_method: ties\nbase_model: {B}\nmodels: [{B}, {M0}]\n", "only one model", "{M0}"),
    case("model a number", PLAIN.replace("{M1}", "5"), "models[1]", "Hub id or a folder", "5"),
    case("model null", PLAIN.replace("{M1}", ""), "models[1]", "Hub id or a folder"),
    case("model path a number", PLAIN.replace("{M1}", "{path: 5}"), "models[1]", "path"),
    case("model in a model", PLAIN.replace("{M1}", "{model: 5}"), "models[1]", "Hub id, a folder", "not 5"),
    case("model with a number for a key", PLAIN.replace("{M1}", "{path: a/b, 3: 4, c: 5}"), "models[1]", "found 3, c"),
    case(
        "revision a number",
        PLAIN.replace("{M1}", "{path: a/b, revision: 123}"),
        "models[1]",
        "revision 123",
        "quote it",
    ),
    case(
        "revision of a local folder", PLAIN.replace("{M1}", "{path: {M1}, revision: v1}"), "models[1]", "local folder"
    ),
    case("missing folder", PLAIN.replace("{M1}", "./nowhere"), "models[1]: folder not found: ./nowhere"),
    case(
        "LoRA twice",
        PLAIN.replace("{M1}", "{model: {path: org/base+org/lora}, lora: {path: x}}"),
        "models[1]",
        "one adapter for each model",
    ),
    case("LoRA nowhere", PLAIN.replace("{M1}", "a/b+./nowhere"), "models[1]", "folder not found: ./nowhere"),
    case(
        "override_architecture",
        PLAIN.replace("{M1}", "{model: {path: {M1}}, override_architecture: X}"),
        "'override_architecture'",
        "mergekit",
    ),
    case("tokenizer", PLAIN + "tokenizer: {source: base}\n", "tokenizer: ", "mergekit"),
    case("chat_template", PLAIN + "chat_template: auto\n", "chat_template: ", "mergekit"),
    case("multi-stage", PLAIN + "name: first\n", "name: ", "mergekit-multi"),
    case("tokenizer union", PLAIN + "tokenizer_source: union\n", "tokenizer_source", "'union'", "mergekit"),
    case("slices", SLICES, "slices: ", "mergekit-yaml"),
    case("modules", "merge_method: ties\nbase_model: {B}\nmodules: {}\n", "modules: ", "mergekit-yaml"),
    case("name with a slash", PLAIN + "  name: a/b\n", "models[2].name", "'a/b'", "letters"),
    case("names twice", PLAIN + "  name: task1\n", "both called 'task1'", "{M1}", "{M2}"),
    case("parameters a list", PLAIN + "parameters: [1]\n", "parameters", "dictionary"),
    case("a model's parameters a word", PLAIN + "  parameters: x\n", "models[2].parameters"),
    case("a model's own scale", PLAIN + "  parameters: {scale: 2}\n", "models[2].parameters.scale", "whole merge"),
    case("two ranks", PLAIN + "parameters: {rank: 3, energy: 0.5}\n", "rank and energy exclude each other"),
    case("rank 0", PLAIN + "parameters: {rank: 0}\n", "parameters.rank", "at least 1"),
    case("gradient to 0", PLAIN + "parameters: {rank_ratio: [0, 0.5]}\n", "parameters.rank_ratio", "greater than 0"),
    case(
        "a model's filter", PLAIN + "  parameters: {weight: [{filter: zz, value: 2}]}\n", "task2", "'zz'", "no tensor"
    ),
    case("dtype", PLAIN + "dtype: int64\n", "dtype", "bfloat16"),
    case("seed", PLAIN + "seed: x\n", "seed", "integer"),
    case("shard size a number", PLAIN + "max_shard_size: 5\n", "max_shard_size", "string"),
]


@pytest.mark.parametrize(("text", "naming"), RECIPES)
def test_recipes(bench, text, naming):
    """Recipe files that say too little, too much or nothing."""
    recipe = bench.recipe(text)
    places = [f"{{M{i}}}" for i in range(3)]
    words = [bench.models[places.index(word)] if word in places else word for word in naming]
    messages = refuse(bench.output, "merge", recipe, bench.output)
    assert not [word for word in words if word not in messages[0]], messages
    # what the plan finds has no key in the file
    assert str(recipe) in messages[0] or "no tensor" in messages[0], messages


def test_no_recipe_file(bench, tmp_path):
    refuse(bench.output, "merge", tmp_path / "no.yaml", bench.output, naming=("no.yaml", "No such file"))
    refuse(bench.output, "merge", tmp_path, bench.output, naming=(str(tmp_path), "directory"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refuse(bench.output, "merge", tmp_path / "binary.yaml", bench.output, naming=("binary.yaml", "not valid YAML"))


def test_flags_beside_a_recipe(bench):
    recipe = bench.recipe(PLAIN)
    naming = ("--scale", "--base", "edit the recipe")
    refuse(bench.output, "merge", recipe, bench.output, "--scale", 2, "--base", bench.base, naming=naming)


def test_everything_at_once(bench):
    """Mistakes of every kind in one recipe are reported together, each once."""
    text = PLAIN.replace("{M1}", "./nowhere") + (
        "parameters: {rank: 0, energy: 2, sclae: 1}\ninlude: [a]\nmax_shard_size: 5XB\ndtype: int8\nchat_template: auto\n"
    )
    naming = (
        "models[1]: folder not found", "parameters.rank:", "parameters.energy:", "parameters.sclae:", "exclude each",
        "inlude: unknown key", "max_shard_size:", "dtype:", "chat_template:",
    )  # fmt: skip
    messages = refuse(bench.output, "merge", bench.recipe(text), bench.output, naming=naming, count=len(naming))
    assert len(set(messages)) == len(messages)


def test_all_bad_models_at_once(bench, tmp_path):
    """Every model that cannot be opened is reported, not the first one only."""
    first = shutil.copytree(bench.models[0], tmp_path / "first")
    truncate(-10)(first)
    second = shutil.copytree(bench.models[1], tmp_path / "second")
    remove("config.json")(second)
    naming = ("first", "10 bytes are missing", "second", "no config.json")
    bench.refuse(models=[first, second, bench.models[2]], naming=naming, count=2)


def test_all_mismatches_at_once(bench, tmp_path):
    """So is every model that does not fit."""
    first = shutil.copytree(bench.models[0], tmp_path / "first")
    config(num_attention_heads=4)(first)
    second = shutil.copytree(bench.models[1], tmp_path / "second")
    another("bert")(second)
    bench.refuse(
        models=[first, second, bench.models[2]],
        naming=("first (Roberta", "4 where base has 2", "second (Bert"),
        count=2,
    )


def test_all_patterns_at_once(bench):
    bench.refuse("--include", "aa", "bb", "--exclude", "cc", naming=("'aa'", "'bb'", "'cc'"), count=3)


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------


def refuse_target(bench: Bench, target: object, *flags: object, naming: tuple[str, ...] = ()) -> Answer:
    """Run a merge whose target is refused, which need not be absent."""
    answer = call("merge", "--base", bench.base, "--models", *bench.models, "--output", target, *flags)
    assert answer.code == 2, answer
    assert len(answer.errors) == 1 == len(answer.err.splitlines()), answer
    assert not [word for word in naming if word not in answer.errors[0]], answer
    assert not leftovers(bench.output)
    return answer


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_output_exists(bench, flags):
    """A folder with anything in it is left alone."""
    bench.output.mkdir()
    (bench.output / "mine").write_text("precious", encoding="utf-8")
    refuse_target(bench, bench.output, *flags, naming=(str(bench.output), "exists", "--overwrite"))
    refuse_target(bench, bench.output, "--overwrite", *flags, naming=("not an output of cart-hf", "merge.json"))
    assert [path.name for path in bench.output.iterdir()] == ["mine"]
    assert (bench.output / "mine").read_text(encoding="utf-8") == "precious"


def test_output_is_a_file(bench):
    bench.output.write_text("precious", encoding="utf-8")
    refuse_target(bench, bench.output, naming=("exists",))
    refuse_target(bench, bench.output, "--overwrite", naming=("not an output of cart-hf",))
    refuse_target(bench, bench.output / "sub", naming=("cannot write",))
    assert bench.output.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("flag", ["--overwrite", "--seed=0"])
def test_output_is_an_input(bench, flag):
    """A model folder is never the output."""
    before = {path: path.read_bytes() for path in Path(bench.base).iterdir()}
    refuse_target(bench, bench.base, flag)
    assert {path: path.read_bytes() for path in Path(bench.base).iterdir()} == before


def test_output_is_an_input_of_ours(bench, tmp_path):
    """Neither when cart-hf wrote it and --overwrite is given: the recipe in the output would name the output."""
    earlier = tmp_path / "earlier"
    succeed("merge", "--base", bench.base, "--models", *bench.models, "--output", earlier)
    again = ["merge", "--base", earlier, "--models", *bench.models, "--output", earlier, "--overwrite"]
    answer = call(*again)
    assert (answer.code, len(answer.errors)) == (2, 1), answer


def test_overwrite(bench):
    """An earlier output is replaced whole, and an empty folder is used."""
    bench.output.mkdir()
    succeed(*bench.arguments())
    (bench.output / "stale").touch()
    refuse_target(bench, bench.output, naming=("exists", "--overwrite"))
    succeed(*bench.arguments("--overwrite", "--method", "average"))
    assert json.loads((bench.output / "merge.json").read_text(encoding="utf-8"))["method"] == "average"
    assert not (bench.output / "stale").exists()
    assert not leftovers(bench.output)


def test_failed_overwrite_keeps_the_old(bench):
    """A merge that fails with --overwrite leaves the earlier output as it was."""
    succeed(*bench.arguments())
    before = (bench.output / WEIGHTS).read_bytes()
    models = [bench.models[0], bench.culprit(tensors(**{QUERY: NAN})), bench.models[2]]
    answer = call(*bench.arguments("--overwrite", models=models))
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert (bench.output / WEIGHTS).read_bytes() == before
    assert not leftovers(bench.output)


@pytest.mark.parametrize("earlier", [False, True])
def test_output_is_a_link(bench, tmp_path, earlier):
    """A link to an empty folder or, with --overwrite, to an earlier output."""
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    if earlier:
        succeed("merge", "--models", *bench.models, "--output", real)
    bench.output.symlink_to(real)
    succeed(*bench.arguments("--overwrite"))
    assert (bench.output / WEIGHTS).is_file()
    assert not leftovers(bench.output)


def test_output_is_a_dangling_link(bench, tmp_path):
    """A link to a folder that is not there yet: the output is written where it points, and the link stays."""
    bench.output.symlink_to(tmp_path / "elsewhere" / "nowhere")
    succeed(*bench.arguments())
    assert bench.output.readlink() == tmp_path / "elsewhere" / "nowhere"
    assert (tmp_path / "elsewhere" / "nowhere" / WEIGHTS).is_file()
    assert not leftovers(bench.output)
    assert not leftovers(tmp_path / "elsewhere" / "nowhere")


def test_output_is_here(bench, tmp_path, monkeypatch):
    """``--output .`` in an empty folder works or is refused; nothing is left over."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    answer = call("merge", "--base", bench.base, "--models", *bench.models, "--output", ".")
    assert answer.code == 0 or not list(here.iterdir())


def test_output_name_too_long(bench, tmp_path):
    refuse_target(bench, tmp_path / ("x" * 300), naming=("xxx", "too long", "choose another"))


@pytest.mark.skipif(os.name != "posix" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write anywhere")
def test_output_is_not_writable(bench, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refuse_target(bench, locked / "out", naming=("cannot write", "Permission denied"))


def test_parents_of_a_failed_output(bench):
    """Folders made for the output go with it."""
    bad = bench.culprit(tensors(**{QUERY: NAN}))
    refuse(bench.output, "merge", "--models", *bench.models, bad, "--output", bench.output / "deep" / "down")
    assert_absent(bench.output)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let every write beyond ``nbytes`` of a file fail, as on a full disk. (Python ignores SIGXFSZ.)

    No bytecode is written meanwhile: Python does not see that the file is cut off, and would read it the next time.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = before


@pytest.mark.parametrize("nbytes", [0, 1000, 20000])
@pytest.mark.parametrize("flags", [(), ("--max-shard-size", "4kB")], ids=["one file", "shards"])
def test_disk_full(bench, nbytes, flags):
    """A disk that fills up while the weights, or the small files after them, are written."""
    if flags and nbytes == 20000:
        nbytes = 6000  # enough for every shard, not for merge.json
    arguments = bench.arguments(*flags)
    with largest_file(nbytes):
        answer = call(*arguments)
    assert answer.code == 2, answer
    assert len(answer.errors) == 1 == len(answer.err.splitlines()), answer
    assert "cannot write" in answer.errors[0]
    assert str(bench.output) in answer.errors[0]
    assert_absent(bench.output)


def test_disk_full_at_a_head(bench):
    """A disk that fills up while a head is written."""
    models = [bench.models[0], bench.culprit(another("roberta", num_labels=2000)), bench.models[2]]
    arguments = bench.arguments(models=models)
    with largest_file(60000):
        answer = call(*arguments)
    assert answer.code == 2, answer
    assert "cannot write" in answer.errors[0]
    assert_absent(bench.output)


def test_disk_full_from_the_shell(bench):
    """The same in a process of its own: the exit code and everything on stderr."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-m", "cart_hf", *map(str, bench.arguments())],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)),
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("error: cannot write"), done
    assert len(done.stderr.splitlines()) == 1, done
    assert_absent(bench.output)


def test_disk_too_small(bench, monkeypatch):
    """A disk that is seen to be too small before the work: both numbers are named."""
    usage = shutil.disk_usage(bench.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    bench.refuse(naming=("the output needs", "GB free"))


# ---------------------------------------------------------------------------------------------------------------------
# Doubtful, but possible
# ---------------------------------------------------------------------------------------------------------------------


def merged(bench: Bench) -> dict[str, torch.Tensor]:
    return load_file(bench.output / WEIGHTS)


@pytest.mark.parametrize("scale", ["1", "3"])
def test_two_models_with_cart(bench, tmp_path, scale):
    """CART of two models is their average: said in a warning, once, and true."""
    answer = succeed(*bench.arguments("--scale", scale, models=bench.models[:2]))
    warnings = [line for line in answer.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "two models" in warnings[0]
    cart = merged(bench)
    bench.output.rename(tmp_path / "cart")
    succeed(*bench.arguments("--method", "average", models=bench.models[:2]))
    torch.testing.assert_close(cart, merged(bench), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "consensus", "dare"])
def test_two_models_without_cart(bench, method):
    assert succeed(*bench.arguments("--method", method, models=bench.models[:2])).err == ""


def test_three_models_have_no_warning(bench):
    assert succeed(*bench.arguments()).err == ""


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "flags", [(), ("--rank", 2), ("--energy", 0.9), ("--scale", 5), ("--method", "average"), ("--method", "ties")]
)
def test_identical_models(bench, count, flags):
    """Copies of one model merge to that model: every centred task vector is zero."""
    models = [f"m{i}={bench.models[0]}" for i in range(count)]
    succeed(*bench.arguments(*flags, *(("--density", 1) if "ties" in flags else ()), models=models))
    source = load_file(Path(bench.models[0]) / WEIGHTS)
    result = merged(bench)
    assert set(result) == {key for key in source if not key.startswith("classifier.")}
    torch.testing.assert_close(result, {key: source[key] for key in result}, rtol=1e-6, atol=1e-7)
