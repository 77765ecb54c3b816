"""`cart-hf convert`: forward against forward with open_clip's architecture, and files that want to run something."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import assert_absent, environment, leftovers, refuse, succeed
from hub_server import serving
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from warm_python import run_python

import cart_hf
from cart_hf.conversion import convert
from cart_hf.conversion.find import name_of

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # the older format looks for it

VOCABULARY, CONTEXT, EMBED, IMAGE, PATCH, WIDTH, TEXT_WIDTH = 60, 12, 24, 16, 8, 128, 64


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """A block with open_clip's names, on torch's own attention."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 3 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(3 * width, width))

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, activation) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, layers, heads, activation, width=WIDTH, patch=PATCH):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((IMAGE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.proj = nn.Parameter(torch.zeros(width, EMBED))

    def forward(self, images):
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class CLIP(nn.Module):
    """open_clip's CLIP, written anew: the same names, the same function."""

    def __init__(self, activation=QuickGELU, heads=2, layers=2, **vision):
        super().__init__()
        self.visual = VisionTransformer(layers, heads, activation, **vision)
        self.transformer = Transformer(TEXT_WIDTH, 3, 1, activation)
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("attn_mask", torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1), persistent=False)

    def encode_image(self, images):
        return self.visual(images)

    def encode_text(self, tokens):
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class InterpolationMode:
    """Reduces to a call, as torchvision's does."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return InterpolationMode, (self.value,)


class ImageEncoder(nn.Module):
    """What the papers' code pickles: the model under ``model``, and what else it came with."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.val_preprocess = functools.partial(InterpolationMode("bicubic").__class__, size=torch.Size([IMAGE]))
        self.dtype, self.cache_dir, self.device = torch.float32, None, torch.device("cpu")


class ImageClassifier(nn.Module):
    def __init__(self, image_encoder):
        super().__init__()
        self.image_encoder = image_encoder
        self.classification_head = nn.Linear(EMBED, 5)


HOMES = {
    "open_clip.model": (CLIP,),
    "open_clip.transformer": (QuickGELU, ResidualAttentionBlock, Transformer, VisionTransformer),
    "torchvision.transforms.functional": (InterpolationMode,),
}


@contextmanager
def pickled_as(home: str) -> Iterator[None]:
    """Let pickle believe that the classes here live where the papers' code has them; afterwards nothing is there."""
    homes = HOMES | {home: (ImageEncoder, ImageClassifier)}
    parents = {name.rsplit(".", count)[0] for name in homes for count in range(1, name.count(".") + 1)}
    before = {name: sys.modules.get(name) for name in parents | set(homes)}
    for name in before:
        sys.modules[name] = types.ModuleType(name)
        for kind in homes.get(name, ()):
            setattr(sys.modules[name], kind.__name__, kind)
            kind.__module__ = name
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        for classes in homes.values():
            for kind in classes:
                kind.__module__ = __name__


def make_clip(seed: int = 0, **options) -> CLIP:
    """Make a model whose every parameter is random, so that no mapping can be wrong unnoticed."""
    torch.manual_seed(seed)
    model = CLIP(**options).eval()
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def save_state(model: nn.Module, path: Path, prefix: str = "model.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return path


def without_text(model: CLIP) -> CLIP:
    """Delete what Task Arithmetic's code deletes."""
    del model.transformer
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, VOCABULARY - 2, (4, CONTEXT), generator=generator)
    for row, end in enumerate((3, 5, 8, CONTEXT - 1)):
        tokens[row, end:] = 0
        tokens[row, end] = VOCABULARY - 1  # open_clip's end mark is its highest id
    return torch.randn(4, 3, IMAGE, IMAGE, generator=generator), tokens


@torch.no_grad()
def assert_same(model: nn.Module, folder: Path) -> None:
    """Assert that a converted model computes what the original does, image and text."""
    images, tokens = inputs()
    converted = CLIPModel.from_pretrained(folder).eval()
    features = converted.get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(features, model.encode_image(images), rtol=0, atol=1e-5)
    features = converted.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(features, model.encode_text(tokens), rtol=0, atol=1e-5)
    assert torch.equal(converted.logit_scale, model.logit_scale)


@torch.no_grad()
def assert_same_images(model: nn.Module, folder: Path) -> None:
    images, _ = inputs()
    embeds = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(pixel_values=images).image_embeds
    torch.testing.assert_close(embeds, model.encode_image(images), rtol=0, atol=1e-5)


def hf_base(folder: Path, **vision) -> Path:
    """Write a whole CLIP of transformers', with processor and tokenizer files."""
    torch.manual_seed(3)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH}
    text = {"num_hidden_layers": 3, "num_attention_heads": 1, "hidden_size": TEXT_WIDTH}
    text |= {"intermediate_size": 3 * TEXT_WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "projection_dim": EMBED}
    vision = {**tower, "image_size": IMAGE, "patch_size": PATCH, "projection_dim": EMBED, **vision}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "mine": 1}')
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def write_module(path: Path, model: CLIP, home: str = "src.models.modeling", wrap: Callable = ImageEncoder, **options):
    with pickled_as(home):
        torch.save(wrap(model), path, **options)


def write_classifier(path: Path, model: CLIP) -> None:
    write_module(path, model, "src.modeling", lambda m: ImageClassifier(ImageEncoder(m)))


def write_custom_text(path: Path, model: CLIP) -> None:
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    torch.save({f"text.{k}" if k.startswith(text) else k: v for k, v in model.state_dict().items()}, path)


FORMS: dict[str, tuple[Callable[[Path, CLIP], object], str, str]] = {
    "an encoder's state dict": (lambda p, m: save_state(m, p), "state dict", "model."),
    "open_clip's state dict": (lambda p, m: save_state(m, p, ""), "state dict", ""),
    "a training checkpoint": (
        lambda p, m: torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}}, p),
        "state dict",
        "state_dict.module.",
    ),
    "a text tower of its own": (write_custom_text, "state dict", ""),
    "a whole encoder": (write_module, "src.models.modeling.ImageEncoder", "model."),
    "a whole classifier": (write_classifier, "src.modeling.ImageClassifier", "image_encoder.model."),
    "open_clip's module": (lambda p, m: write_module(p, m, wrap=lambda x: x), "open_clip.model.CLIP", ""),
    "the older format": (
        lambda p, m: write_module(p, m, _use_new_zipfile_serialization=False),
        "src.models.modeling.ImageEncoder",
        "model.",
    ),
    "one storage for all": (
        lambda p, m: torch.save(share_storage(m.state_dict()), p),
        "state dict",
        "",
    ),
}


def share_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same tensors as views of one storage, matrices stored transposed."""
    pieces = [(tensor.T if tensor.ndim == 2 else tensor).reshape(-1) for tensor in state.values()]
    flat = torch.cat(pieces).split([len(piece) for piece in pieces])
    return {
        name: part.view(tensor.T.shape).T if tensor.ndim == 2 else part.view(tensor.shape)
        for (name, tensor), part in zip(state.items(), flat, strict=True)
    }


@pytest.mark.parametrize("form", FORMS)
def test_converted_computes_the_same(tmp_path: Path, form: str) -> None:
    write, kind, prefix = FORMS[form]
    model = make_clip()
    write(tmp_path / "finetuned.pt", model)
    assert "src.models.modeling" not in sys.modules
    converted = convert(tmp_path / "finetuned.pt", tmp_path / "out")
    assert_same(model, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record == converted[0].record
    assert (record["source"]["pickled"], record["source"]["prefix"]) == (kind, prefix)
    assert record["tensors"] == {"copied": 12 + 10 * 5, "split from in_proj": 6 * 5, "transposed": 2}
    assert not leftovers(tmp_path / "out")


@pytest.mark.parametrize("activation", [QuickGELU, nn.GELU])
def test_a_module_says_its_activation_and_heads(tmp_path: Path, activation: type[nn.Module]) -> None:
    model = make_clip(activation=activation, heads=4)  # heads of 32, where a state dict is taken to have 64
    write_module(tmp_path / "encoder.pt", model)
    convert(tmp_path / "encoder.pt", tmp_path / "out")
    assert_same(model, tmp_path / "out")
    name = {QuickGELU: "gelu", nn.GELU: "quick_gelu"}[activation]
    refuse(
        tmp_path / "no", "convert", tmp_path / "encoder.pt", "--output", tmp_path / "no", "--activation", name,
        naming=[f"not {name}"],
    )  # fmt: skip


def test_a_state_dict_is_told_its_activation(tmp_path: Path) -> None:
    model = make_clip(activation=nn.GELU)
    convert(save_state(model, tmp_path / "a.pt"), tmp_path / "out", activation="gelu")
    assert_same(model, tmp_path / "out")


def test_a_base_gives_the_text_tower_and_the_files_around(tmp_path: Path) -> None:
    base = hf_base(tmp_path / "base")
    model = make_clip()
    path = save_state(without_text(make_clip()), tmp_path / "MNISTVal" / "nonlinear_finetuned.pt")
    succeed("convert", path, "--output", tmp_path / "out", "--base", base)
    images, tokens = inputs()
    ours, theirs = (CLIPModel.from_pretrained(folder).eval() for folder in (tmp_path / "out", base))
    with torch.no_grad():
        features = ours.get_image_features(pixel_values=images).pooler_output
        torch.testing.assert_close(features, model.encode_image(images), rtol=0, atol=1e-5)
        text = [m.get_text_features(input_ids=tokens).pooler_output for m in (ours, theirs)]
    assert torch.equal(*text)
    for name in ("preprocessor_config.json", "vocab.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["tensors"]["base"] == 5 + 16 * 3


def test_without_text_tower_and_base_the_vision_tower_is_written(tmp_path: Path) -> None:
    write_module(tmp_path / "encoder.pt", without_text(make_clip()))
    answer = succeed("convert", tmp_path / "encoder.pt", "--output", tmp_path / "out")
    assert "no text tower" in answer.err
    assert "--base" in answer.err
    assert_same_images(make_clip(), tmp_path / "out")
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": IMAGE, "width": IMAGE}
    assert processor["image_mean"] == [0.48145466, 0.4578275, 0.40821073]  # OpenAI's
    from transformers import CLIPImageProcessor

    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "out")(torch.zeros(3, 20, 30, dtype=torch.uint8))
    assert torch.as_tensor(pixels["pixel_values"][0]).shape == (3, IMAGE, IMAGE)


@pytest.mark.parametrize("vision_only", [False, True], ids=["whole", "vision only"])
def test_converted_models_merge_as_in_the_paper(tmp_path: Path, vision_only: bool) -> None:
    """Fused q, k, v of the merged model are CART of open_clip's in_proj, computed here from its definition."""
    base = hf_base(tmp_path / "base")
    models = [make_clip(seed) for seed in range(3)]
    for name, model in zip(("MNIST", "SVHN", "DTD"), models, strict=True):
        save_state(model, tmp_path / "files" / f"{name}Val" / "nonlinear_finetuned.pt")
    save_state(nn.Linear(2, 2), tmp_path / "files" / "head_MNISTVal.pt")
    done = convert(tmp_path / "files", tmp_path / "hf", str(base), vision_only=vision_only)
    assert sorted(model.folder.name for model in done) == ["dtd", "mnist", "svhn"]
    folders = [str(tmp_path / "hf" / name) for name in ("mnist", "svhn", "dtd")]
    merged = tmp_path / "merged"
    cart_hf.merge(base=str(base), models=folders, output=merged, rank_ratio=0.1, scale=2.0, fuse_qkv=True)
    state = CLIPModel.from_pretrained(merged).state_dict()
    weights = torch.stack([m.visual.transformer.resblocks[1].attn.in_proj_weight.detach().double() for m in models])
    centre = weights.mean(0)
    u, s, v = torch.linalg.svd(weights - centre, full_matrices=False)
    k = int(0.1 * WIDTH)
    expected = centre + 2.0 * (u[..., :k] * s[:, None, :k] @ v[:, :k]).sum(0)
    layer = "vision_model.encoder.layers.1.self_attn"
    fused = torch.cat([state[f"{layer}.{p}_proj.weight"] for p in "qkv"]).double()
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)
    projection = torch.stack([model.visual.proj.detach() for model in models]).mean(0).T
    torch.testing.assert_close(state["visual_projection.weight"], projection, rtol=0, atol=1e-6)


def test_a_base_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = save_state(make_clip(), tmp_path / "a.pt")
    module = tmp_path / "module.pt"
    write_module(module, make_clip())
    cases: list[tuple[Path, dict, list[str]]] = [
        (path, {"hidden_size": 64, "intermediate_size": 64}, ["'model", "[128]", "[64]"]),
        (path, {"patch_size": 4}, ["'visual.conv1.weight'", "[128, 3, 8, 8]", "[128, 3, 4, 4]"]),
        (path, {"num_hidden_layers": 3}, ["'visual.transformer.resblocks.2.", "missing", "[384, 128]"]),
        (path, {"num_hidden_layers": 1}, ["has no room for", "visual.transformer.resblocks.1."]),
        (module, {"hidden_act": "gelu"}, ["hidden_act 'quick_gelu'", "'gelu'"]),
        (module, {"num_attention_heads": 4}, ["num_attention_heads 2", "has 4"]),
    ]
    for number, (file, vision, naming) in enumerate(cases):
        base = hf_base(tmp_path / f"base{number}", **vision)
        command = ("convert", file, "--output", tmp_path / "out", "--base", base)
        count = 4 if number < 1 else 2 if number == 1 else 4 if number == 2 else 1
        refuse(tmp_path / "out", *command, naming=[n for n in naming if n != "'model"] + [str(file)], count=count)


def test_files_that_are_no_clip_are_refused(tmp_path: Path) -> None:
    model = make_clip()
    state = model.state_dict()
    block = "visual.transformer.resblocks.0"
    cases: dict[str, tuple[object, list[str]]] = {
        "head": (nn.Linear(3, 2).state_dict(), ["no open_clip vision transformer", "bias, weight"]),
        "empty": ({}, ["no tensors"]),
        "list": ([1, 2], ["no tensors"]),
        "two": (
            {f"{k}.{n}": t for k in ("model", "ema") for n, t in state.items()},
            ["2 open_clip models", "ema.visual"],
        ),
        "scaled": ({**state, f"{block}.ls_1.gamma": torch.ones(WIDTH)}, [f"{block}.ls_1.gamma", "no room"]),
        "no norm": ({k: v for k, v in state.items() if k != "visual.ln_pre.bias"}, ["'visual.ln_pre.bias'", "missing"]),
        "integers": ({**state, "visual.proj": state["visual.proj"].int()}, ["'visual.proj'", "int32"]),
        "broken": ({**state, "visual.proj": state["visual.proj"] * torch.nan}, ["'visual.proj'", "NaN"]),
        "oblong": ({**state, "visual.positional_embedding": torch.ones(4, WIDTH)}, ["square"]),
        "odd heads": ({**state, "visual.conv1.weight": torch.ones(100, 3, 8, 8)}, ["width 100", "--base"]),
    }
    for name, (content, naming) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        refuse(tmp_path / "out", "convert", tmp_path / f"{name}.pt", "--output", tmp_path / "out", naming=naming)


def test_the_output_type_is_the_files_or_what_is_asked(tmp_path: Path) -> None:
    model = make_clip().half()
    model.visual.ln_pre.float()  # open_clip's fp16 models keep such
    convert(save_state(model, tmp_path / "a.pt"), tmp_path / "mixed")
    assert {t.dtype for t in load_file(tmp_path / "mixed" / "model.safetensors").values()} == {torch.float32}
    convert(tmp_path / "a.pt", tmp_path / "small", dtype="bfloat16")
    assert CLIPModel.from_pretrained(tmp_path / "small").dtype == torch.bfloat16
    model = make_clip()
    model.visual.proj.data[0, 0] = 1e6
    save_state(model, tmp_path / "large.pt")
    command = ("convert", tmp_path / "large.pt", "--output", tmp_path / "out", "--dtype", "float16")
    refuse(tmp_path / "out", *command, naming=["'visual.proj'", "float16", "--dtype"])


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def attacks(mark: Path) -> dict[str, tuple[object, str]]:
    """Objects that make a plain unpickler write ``mark``, and the name each must be refused by."""
    import importlib
    import runpy

    command, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    return {
        "os.system": (Call(os.system, command), f"{os.system.__module__}.system"),
        "exec": (Call(exec, code), "__builtin__.exec"),
        "eval": (Call(eval, code), "__builtin__.eval"),
        "open": (Call(open, str(mark), "w"), "io.open"),
        "getattr": (Call(getattr, torch.device("cpu"), "type"), "__builtin__.getattr"),
        "importlib": (Call(importlib.import_module, "this"), "importlib.import_module"),
        "popen": (Call(subprocess.Popen, ["touch", str(mark)]), ".Popen"),
        "runpy": (Call(runpy.run_path, str(mark)), "runpy.run_path"),
        "partial": (functools.partial(os.system, command), f"{os.system.__module__}.system"),
        "torch.load": (Call(torch.load, str(mark)), "torch.serialization.load"),
        "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "path": (mark, "pathlib."),
    }


@pytest.mark.parametrize("place", ["root", "value", "attribute", "older format"])
@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_of_a_file_is_run(tmp_path: Path, attack: str, place: str) -> None:
    mark = tmp_path / "mark"
    payload, name = attacks(mark)[attack]
    path, out = tmp_path / "evil.pt", tmp_path / "out"
    model = make_clip()
    if place == "root":
        torch.save(payload, path)
    elif place == "value":
        torch.save({**model.state_dict(), "extra": payload}, path)
    else:
        model.visual.transformer.resblocks[1].mlp.note = [payload]
        write_module(path, model, _use_new_zipfile_serialization=place != "older format")
    refuse(out, "convert", path, "--output", out, naming=[name, "refused"])
    assert not mark.exists()


def test_a_known_modules_function_is_not_called_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`src.*` may be named, for it holds the encoders' classes; even where it can be imported, nothing of it runs."""
    called: list[object] = []

    def boom(*args):
        called.append(args)

    boom.__module__, boom.__qualname__ = "src.evil", "boom"
    module = types.ModuleType("src.evil")
    module.boom = boom
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.evil", module)
    model = make_clip()
    torch.save({**model.state_dict(), "extra": Call(boom, 1)}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert called == [(1,)]  # a plain load calls it
    convert(tmp_path / "a.pt", tmp_path / "out")
    assert called == [(1,)]
    assert_same(model, tmp_path / "out")


def raw(path: Path, program: bytes) -> Path:
    """Write a file as torch.save does, around a pickle program of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("a/data/0", bytes(16))
    return path


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
PROGRAMS = {
    "a state for a builder": TENSOR + b"}X\x01\x00\x00\x00ac__main__\nx\nsb",
    "a state for a class": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb",
    "a slot for a shell's class": b"c__main__\nx\nN}X\x08\x00\x00\x00__init__K\x01s\x86b",
    "a tensor beyond its storage": TENSOR + b"(" + STORAGE.replace(b"K%c", b"K\x04") + b"K\x01(K\x04t(K\x01tI00\nNtR",
    "a tensor before its storage": TENSOR
    + b"("
    + STORAGE.replace(b"K%c", b"K\x04")
    + b"J\xff\xff\xff\xff(K\x04t(K\x01tI00\nNtR",
    "a negative stride": TENSOR + b"(" + STORAGE.replace(b"K%c", b"K\x04") + b"K\x03(K\x04t(J\xff\xff\xff\xfftI00\nNtR",
    "a repeated element": TENSOR
    + b"("
    + STORAGE.replace(b"K%c", b"K\x04")
    + b"K\x00(J\xff\xff\xff\x7ft(K\x00tI00\nNtR",
    "a tensor of a number": TENSOR + b"(K\x01K\x00(t(tI00\nNtR",
    "a memo of all memory": b"Nr\xff\xff\xff\xff",
    "a text of all memory": b"X\xff\xff\xff\x7f",
    "an extension code": b"\x82\x07",
    "no stack": b"R",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_pickle_programs_that_no_torch_writes(tmp_path: Path, program: str) -> None:
    raw(tmp_path / "a.pt", PROGRAMS[program])
    refuse(tmp_path / "out", "convert", tmp_path / "a.pt", "--output", tmp_path / "out", naming=["damaged"])
    good = save_state(make_clip(), tmp_path / "good.pt")  # and nothing of it stays behind
    convert(good, tmp_path / "good")
    assert_same(make_clip(), tmp_path / "good")


def test_a_module_that_holds_itself_ends(tmp_path: Path) -> None:
    model = make_clip()
    model.visual.again = model
    write_module(tmp_path / "a.pt", model)
    convert(tmp_path / "a.pt", tmp_path / "out")
    del model.visual.again
    assert_same(model, tmp_path / "out")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    good = save_state(make_clip(), tmp_path / "good.pt").read_bytes()
    old = io.BytesIO()
    torch.save(make_clip().state_dict(), old, _use_new_zipfile_serialization=False)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # a weight's bit: the archive's checksum tells
    files = {
        "truncated": good[: len(good) // 2],
        "truncated old": old.getvalue()[:-100],
        "empty": b"",
        "text": b"<html>not found</html>",
        "plain pickle": pickle.dumps({"a": 1}),
        "flipped": bytes(flipped),
        "compressed": rezip(good, compression=zipfile.ZIP_DEFLATED),
        "no storage": rezip(good, leave_out="data/3"),
    }
    for name, data in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        refuse(tmp_path / "out", "convert", path, "--output", tmp_path / "out", naming=["damaged", str(path)])
    script = tmp_path / "script.pt"
    script.write_bytes(rezip(good, extra="constants.pkl"))
    refuse(tmp_path / "out", "convert", script, "--output", tmp_path / "out", naming=["TorchScript"])


def rezip(data: bytes, compression: int = zipfile.ZIP_STORED, leave_out: str = "", extra: str = "") -> bytes:
    """Write a file of torch.save again, changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            if not (leave_out and name.endswith(leave_out)):
                new.writestr(name, old.read(name))
        if extra:
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{extra}", b"")
    return target.getvalue()


def test_folders_are_named_after_the_data_sets(tmp_path: Path) -> None:
    from pathlib import PurePosixPath

    names = {
        "MNISTVal/nonlinear_finetuned.pt": "mnist",
        "SUN397Val/nonlinear_zeroshot.pt": "sun397-zeroshot",
        "Cars/finetuned.pt": "cars",
        "zeroshot.pt": "zeroshot",
        "finetuned.pt": "vit-b-32",
        "deep/er/DTDVal/checkpoint_100.pt": "dtd-checkpoint_100",
    }
    assert {file: name_of(PurePosixPath(file), "ViT-B-32") for file in names} == names
    for folder in ("ViT-B-32", "ViT-L-14"):
        save_state(make_clip(), tmp_path / folder / "MNISTVal" / "nonlinear_finetuned.pt")
    files = [save_state(make_clip(), tmp_path / name) for name in ("a.pt", "b.pt")]
    done = succeed("convert", *files, "--output", tmp_path / "two", "--vision-only", "--format", "json")
    assert [Path(model["folder"]).name for model in json.loads(done.out)] == ["a", "b"]
    assert_same_images(make_clip(), tmp_path / "two" / "b")
    command = ("convert", tmp_path, "--output", tmp_path / "out")
    refuse(tmp_path / "out", *command, naming=["ViT-B-32/MNISTVal", "ViT-L-14/MNISTVal", "'mnist'"])


def test_all_files_are_checked_before_any_is_written(tmp_path: Path) -> None:
    save_state(make_clip(), tmp_path / "files" / "A" / "finetuned.pt")
    (tmp_path / "files" / "B").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "files" / "B" / "finetuned.pt")
    (tmp_path / "files" / "C").mkdir()
    (tmp_path / "files" / "C" / "finetuned.pt").write_bytes(b"")
    refuse(tmp_path / "out", "convert", tmp_path / "files", "--output", tmp_path / "out", count=2)
    refuse(tmp_path / "out", "convert", tmp_path / "nothing.pt", "--output", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    refuse(tmp_path / "out", "convert", tmp_path / "bare", "--output", tmp_path / "out", naming=["no file to convert"])


def test_only_an_earlier_conversion_is_replaced(tmp_path: Path) -> None:
    first, second = (save_state(make_clip(seed), tmp_path / f"{seed}.pt") for seed in (0, 1))
    out = tmp_path / "out"
    answer = succeed("convert", first, "--output", out, "--format", "json")
    assert json.loads(answer.out)[0]["source"]["file"] == str(first)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(cart_hf.UserError, match="exists"):
        convert(second, out)
    (tmp_path / "bad.pt").write_bytes(b"")
    with pytest.raises(cart_hf.UserError, match="damaged"):
        convert(tmp_path / "bad.pt", out, overwrite=True)
    model = make_clip()
    model.visual.proj.data[:] = torch.inf  # found only while writing
    with pytest.raises(cart_hf.UserError, match="Inf"):
        convert(save_state(model, tmp_path / "inf.pt"), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    convert(second, out, overwrite=True)
    assert_same(make_clip(1), out)
    assert not leftovers(out)
    with pytest.raises(cart_hf.UserError, match="is or holds the base"):
        convert(first, out, str(out), overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(cart_hf.UserError, match=r"conversion\.json"):
        convert(first, tmp_path / "other", overwrite=True)


HUB = """
import json, sys
from cart_hf.conversion import convert
from cart_hf.errors import UserError
for source, output in json.loads(sys.argv[1]):
    try:
        done = convert(source, output)
        print(json.dumps([[model.folder.name, model.record["source"]["file"], model.record["source"]["commit"]] for model in done]))
    except UserError as failure:
        print(json.dumps(str(failure)))
"""


def test_files_come_from_the_hub(tmp_path: Path) -> None:
    files = tmp_path / "files" / "single_task" / "ViT-B-32"
    for seed, name in enumerate(("MNIST", "DTD")):
        save_state(make_clip(seed), files / f"{name}Val" / "nonlinear_finetuned.pt")
    save_state(nn.Linear(2, 2), files / "head_MNISTVal.pt")
    folder, file = "org/tall/single_task/ViT-B-32", "org/tall/single_task/ViT-B-32/DTDVal/nonlinear_finetuned.pt"
    with serving() as hub:
        commit = hub.add("org/tall", tmp_path / "files")
        jobs = [
            (f"{folder}@main", str(tmp_path / "all")),
            (file, str(tmp_path / "one")),
            ("org/tall/single_task/ViT-B-23", str(tmp_path / "none")),
            ("org/missing", str(tmp_path / "none")),
        ]
        answers = on_hub(jobs, hub.url, tmp_path / "home")
        assert not [request for request in hub.log if "head_" in request.path and "resolve" in request.path]
    assert answers[0] == [
        ["dtd", f"{folder}/DTDVal/nonlinear_finetuned.pt", commit],
        ["mnist", f"{folder}/MNISTVal/nonlinear_finetuned.pt", commit],
    ]
    assert answers[1] == [["one", file, commit]]
    assert "did you mean" in answers[2]
    assert "no such repository" in answers[3]
    assert_absent(tmp_path / "none")
    assert_same(make_clip(0), tmp_path / "all" / "mnist")
    assert_same(make_clip(1), tmp_path / "one")
    offline = on_hub([(folder, str(tmp_path / "offline"))], hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert [name for name, _, _ in offline[0]] == ["dtd", "mnist"]


def on_hub(jobs: list[tuple[str, str]], endpoint: str, home: Path, **more: str) -> list:
    """Convert in a process of its own: the Hub's client reads its settings when it is imported."""
    done = run_python(HUB, json.dumps(jobs), environment=environment(endpoint, home, **more), cwd=home.parent)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["module", "state dict"])
def test_open_clip_itself(tmp_path: Path, quick_gelu: bool, whole: bool) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    torch.manual_seed(0)
    vision = {"layers": 2, "width": WIDTH, "patch_size": PATCH, "image_size": IMAGE}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": TEXT_WIDTH, "heads": 1, "layers": 3}
    model = open_clip.model.CLIP(EMBED, vision, text, quick_gelu=quick_gelu).eval()
    randomise(model)
    torch.save(model if whole else model.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", activation=None if whole or quick_gelu else "gelu")
    assert_same(model, tmp_path / "out")
    images, tokens = inputs()
    reference = CLIP(QuickGELU if quick_gelu else nn.GELU)
    for block in (*reference.visual.transformer.resblocks, *reference.transformer.resblocks):
        width = block.ln_1.normalized_shape[0]
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    reference.load_state_dict(model.state_dict())  # the reference of this file is open_clip's architecture
    with torch.no_grad():
        torch.testing.assert_close(reference.eval().encode_image(images), model.encode_image(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(reference.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=1e-5)
