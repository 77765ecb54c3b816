"""The model that is measured: a merged folder, a CLIP, or any plain classification checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cart_hf.cache import cache_folder
from cart_hf.errors import UserError, shorten
from cart_hf.multitask import MultiTaskModel
from cart_hf.recipe import Reference
from cart_hf.sources import Checkpoint, open_checkpoint
from cart_hf.zero_shot import DEFAULT_TEMPLATES

Kind = Literal["merged", "classifier", "clip", "clip_vision"]
Logits = Callable[[Sequence[str], Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Located:
    """A model that was found, its weights not loaded.

    :param reference: as the user wrote it.
    :param kind: what sort of model it is.
    :param folder: its local folder.
    :param commit: its Hub commit; None for a local folder.
    :param heads: the names of its heads; a plain classifier has one without a name, a CLIP has none.
    """

    reference: Reference
    kind: Kind
    folder: Path
    commit: str | None
    heads: tuple[str, ...]

    @property
    def zero_shot(self) -> bool:
        """Whether its heads are made from class names."""
        return self.kind in ("clip", "clip_vision")


@dataclass(frozen=True)
class Model:
    """A model ready to answer.

    :param modality: what it reads.
    :param preprocess: its tokenizer or image processor.
    :param labels: the label names of each head, in the order of the logits.
    :param logits: runs the backbone once and the named heads on it: logits of shape (batch, labels) for each.
    :param add_zero_shot: makes a head from class names and templates; None when the heads are given.
    """

    modality: Literal["text", "image"]
    preprocess: Any
    labels: Mapping[str, Sequence[str]]
    logits: Logits
    add_zero_shot: Callable[[str, Sequence[str], Sequence[str]], None] | None


def locate(model: str | Path, *, base: str | None = None) -> Located:
    """Find a model and its heads, weights unread.

    :param base: the pretrained CLIP that lends its text tower to a checkpoint with a vision tower only.
    :raises UserError: when there is no such model, or it has nothing to answer tasks with.
    """
    reference = _reference(str(model))
    merged = _merged_folder(reference)
    if merged is not None:
        return Located(reference, "merged", merged, _commit_of(reference, merged), _heads(merged))
    checkpoint = open_checkpoint("model", reference)
    kind = _kind(checkpoint, base)
    checkpoint.fetch()
    return Located(reference, kind, checkpoint.folder, checkpoint.commit, ("",) if kind == "classifier" else ())


def load(located: Located, heads: Sequence[str], *, base: str | None, device: torch.device) -> Model:
    """Load a model's weights, in float32, with these heads.

    :param base: as for :func:`locate`; also whose tokenizer is used when the model has none.
    """
    if located.kind == "classifier":
        return _classifier(located, base, device)
    if located.kind == "merged":
        loaded = MultiTaskModel.from_pretrained(located.folder, tasks=heads, dtype=torch.float32).to(device)
        assert loaded.backbone is not None
        config = loaded.backbone.config
        return Model(
            _modality(loaded.backbone),
            _preprocess(located.folder, _modality(loaded.backbone), config, None),
            {name: loaded.labels(name) for name in heads},
            lambda names, inputs: {name: output.logits for name, output in loaded(tasks=names, **inputs).items()},
            None,
        )
    return _clip(located, base, device)


def fingerprint(located: Located) -> str:
    """Return a name for exactly these weights: the Hub's commit and folder, or a hash of a local folder's files."""
    if located.commit is not None:
        return f"{located.reference.path}/{located.reference.subfolder or ''}@{located.commit}"
    digest = hashlib.sha256()
    for path in sorted(located.folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json":
            digest.update(str(path.relative_to(located.folder)).encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:32]


def individual_models(located: Located) -> dict[str, str]:
    """Return the fine-tuned models that a merged folder was made from, as references, by task; none for others."""
    recipe = _merge_recipe(located.folder)
    return {entry.name: str(entry.model) for entry in recipe.models} if recipe else {}


def base_of(located: Located) -> str | None:
    """Return the base that a merged folder was made from."""
    recipe = _merge_recipe(located.folder)
    return str(recipe.base_model) if recipe and recipe.base_model else None


def _merge_recipe(folder: Path) -> Any:
    from cart_hf.output.record import RECIPE_FILE
    from cart_hf.recipe import Recipe

    path = folder / RECIPE_FILE
    return Recipe.load(path) if path.is_file() else None


def _reference(text: str) -> Reference:
    try:
        return Reference.parse(text)
    except ValueError as failure:
        raise UserError(f"model: {failure}") from failure


def _merged_folder(reference: Reference) -> Path | None:
    """Return the local folder of a merge with heads, or None when it is another kind of model."""
    if reference.is_local:
        folder = Path(reference.path).expanduser().resolve()
        return folder if reference.subfolder is None and (folder / "tasks").is_dir() else None
    if reference.subfolder is not None:
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    from cart_hf.output.record import MERGE_FILE
    from cart_hf.sources.hub import explained

    with explained("model", reference):
        try:
            hf_hub_download(reference.path, MERGE_FILE, revision=reference.revision)
        except EntryNotFoundError:
            return None
        folder = Path(snapshot_download(reference.path, revision=reference.revision))
    return folder if (folder / "tasks").is_dir() else None


def _commit_of(reference: Reference, folder: Path) -> str | None:
    return None if reference.is_local else folder.name  # the cache names a snapshot's folder after its commit


def _heads(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (folder / "tasks").iterdir() if (path / "config.json").is_file()))


def _kind(checkpoint: Checkpoint, base: str | None) -> Kind:
    architecture = checkpoint.architecture.class_name
    if architecture.endswith(("ForSequenceClassification", "ForImageClassification")):
        return "classifier"
    if architecture == "CLIPModel":
        return "clip"
    if architecture in ("CLIPVisionModel", "CLIPVisionModelWithProjection"):
        if base is None:
            raise UserError(
                f"model: {checkpoint.reference} holds a vision tower only; name the CLIP whose text tower "
                "makes the zero-shot heads: --base openai/clip-vit-base-patch32 (or the one it was fine-tuned from)"
            )
        return "clip_vision"
    raise UserError(
        f"model: {checkpoint.reference} is a {architecture}: it has no head to answer a task with. Expected a merged "
        "folder (tasks/NAME), a ...ForSequenceClassification or ...ForImageClassification checkpoint, or a CLIP"
    )


def _classifier(located: Located, base: str | None, device: torch.device) -> Model:
    import transformers

    architecture = json.loads((located.folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        located.folder, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise UserError(f"model: {located.reference} lacks the tensors {shorten(sorted(info['missing_keys']))}")
    model = model.to(device).eval()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]

    def logits(heads: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = model(**inputs).logits
        return dict.fromkeys(heads, found)

    preprocess = _preprocess(located.folder, _modality(model), model.config, base)
    return Model(_modality(model), preprocess, {"": names}, logits, None)


def _clip(located: Located, base: str | None, device: torch.device) -> Model:
    import transformers

    folder = located.folder
    if located.kind == "clip_vision":
        assert base is not None
        whole = open_checkpoint("base", _reference(base))
        whole.fetch()
        clip = transformers.CLIPModel.from_pretrained(whole.folder, dtype=torch.float32)
        vision = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
        try:
            clip.vision_model.load_state_dict(vision.state_dict())
        except RuntimeError as failure:
            raise UserError(f"model: {located.reference} is not a vision tower of the base {base}") from failure
        folder = whole.folder
    else:
        clip = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
    loaded = MultiTaskModel(None, {}, clip).to(device).eval()
    tokenizer: Any = None

    def add(task: str, class_names: Sequence[str], templates: Sequence[str]) -> None:
        nonlocal tokenizer
        tokenizer = tokenizer or _from_pretrained("AutoTokenizer", folder, base)
        cache = cache_folder("zero_shot")
        loaded.add_zero_shot(task, class_names, templates or DEFAULT_TEMPLATES, tokenizer, cache)

    return Model(
        "image",
        _preprocess(folder, "image", clip.config, base),
        {},
        lambda names, inputs: {name: output.logits for name, output in loaded(tasks=names, **inputs).items()},
        add,
    )


def _modality(model: Any) -> Literal["text", "image"]:
    return "image" if model.main_input_name == "pixel_values" else "text"


def _preprocess(folder: Path, modality: str, config: Any, base: str | None) -> Any:
    """Return the tokenizer or image processor, the model's own or else the base's."""
    found = _from_pretrained("AutoTokenizer" if modality == "text" else "AutoImageProcessor", folder, base)
    if modality == "text":
        # a tokenizer saved without a limit says 10^30; position embeddings know better (RoBERTa's start after padding)
        room = getattr(config, "max_position_embeddings", None)
        if room is not None:
            offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
            found.model_max_length = min(found.model_max_length, room - offset)
    return found


def _from_pretrained(kind: str, folder: Path, base: str | None) -> Any:
    import transformers

    loader = getattr(transformers, kind)
    try:
        return loader.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as failure:
        if base is not None:
            source = open_checkpoint("base", _reference(base)).folder
            if source.resolve() != folder.resolve():
                return _from_pretrained(kind, source, None)
        what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
        reason = " ".join(str(failure).split())[:200]
        raise UserError(f"model: {folder} has no usable {what} ({reason}); --base REF lends the base's") from failure
