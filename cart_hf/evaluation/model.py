"""The model that is measured: a merged or compressed folder, a CLIP, or any plain classification checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import torch

from cart_hf.cache import cache_folder
from cart_hf.errors import UserError, shorten
from cart_hf.output.record import ADAPTERS_FOLDER
from cart_hf.recipe import Evaluation, Reference
from cart_hf.recipe.reference import exists, looks_local
from cart_hf.serving.adapters import adapter_names, attach_adapters
from cart_hf.serving.multitask import MultiTaskModel
from cart_hf.serving.zero_shot import DEFAULT_TEMPLATES
from cart_hf.sources import Checkpoint, open_checkpoint
from cart_hf.sources.layout import ADAPTER_CONFIG

_FEWEST_WORDS = 10

Kind = Literal["merged", "classifier", "clip", "clip_vision"]
Logits = Callable[[Sequence[str], Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Located:
    """A model that was found, its weights not loaded.

    :param reference: as the user wrote it.
    :param kind: what sort of model it is.
    :param folder: its local folder.
    :param commit: its Hub commit; None for a local folder.
    :param heads: the names of its heads; a plain classifier has one without a name, a CLIP has none, unless it is
        compressed: then they are those of its adapters.
    :param loaded: the model itself, where the user gave one that is loaded.
    :param checkpoint: the opened checkpoint, where it is a single model.
    """

    reference: Reference
    kind: Kind
    folder: Path
    commit: str | None
    heads: tuple[str, ...]
    loaded: MultiTaskModel | None = None
    checkpoint: Checkpoint | None = None

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
    :param logits: runs the backbone once (with adapters: once for each) and the named heads on it: logits of shape
        (batch, labels) for each.
    :param add_zero_shot: makes a head from class names and templates, for a task and the name of the adapter that
        answers it where there are adapters; None when the heads are given.
    """

    modality: Literal["text", "image"]
    preprocess: Any
    labels: Mapping[str, Sequence[str]]
    logits: Logits
    add_zero_shot: Callable[[str, str, Sequence[str], Sequence[str]], None] | None


def locate(model: str | Path | MultiTaskModel, *, base: str | None = None) -> Located:
    """Find a model and its heads, weights unread.

    :param base: the pretrained CLIP that lends its text tower to a checkpoint with a vision tower only.
    :raises UserError: when there is no such model, or it has nothing to answer tasks with.
    """
    if isinstance(model, MultiTaskModel):
        return _given(model)
    reference = _reference(str(model))
    merged = _merged_folder(reference)
    if merged is not None and (merged / "tasks").is_dir():
        return Located(reference, "merged", merged, _commit_of(reference, merged), _heads(merged))
    checkpoint = open_checkpoint("model", reference)
    kind = _kind(checkpoint, base)
    checkpoint.fetch()
    heads = {"classifier": ("",), "clip": adapter_names(checkpoint.folder)}
    folder, commit = checkpoint.folder, checkpoint.commit
    return Located(reference, kind, folder, commit, heads.get(kind, ()), checkpoint=checkpoint)


def load(located: Located, heads: Sequence[str], *, base: str | None, device: torch.device) -> Model:
    """Load a model's weights, in float32, with these heads.

    :param base: as for :func:`locate`; also whose tokenizer is used when the model has none.
    """
    if located.kind == "classifier":
        return _classifier(located, base, device)
    if located.kind == "merged":
        loaded = located.loaded or MultiTaskModel.from_pretrained(located.folder, tasks=heads, dtype=torch.float32)
        loaded = loaded.to(device).eval()
        assert loaded.backbone is not None
        config = loaded.backbone.config
        return Model(
            modality_of(loaded.backbone),
            preprocessor_of(located.folder, modality_of(loaded.backbone), config, None),
            {name: loaded.labels(name) for name in heads},
            lambda names, inputs: {name: output.logits for name, output in loaded(tasks=names, **inputs).items()},
            None,
        )
    return _clip(located, heads, base, device)


def _given(model: MultiTaskModel) -> Located:
    if model.folder is None:
        raise UserError("model: it does not know its folder, where its tokenizer is; load it with from_pretrained")
    reference = Reference(str(model.folder))
    if model.clip is None:
        return Located(reference, "merged", model.folder, None, tuple(model.tasks), model)
    adapters = () if model.adapters is None else tuple(model.adapters.tasks)
    return Located(reference, "clip", model.folder, None, adapters, model)


def individual_models(located: Located) -> dict[str, str]:
    """Return the fine-tuned models that a merged folder was made from, as references, by task; none for others."""
    return {entry["name"]: _reference_text(entry["model"]) for entry in _merge_recipe(located.folder).get("models", ())}


def base_of(located: Located) -> str | None:
    """Return the base that a merged folder was made from; None when it was a folder that is gone."""
    written = _merge_recipe(located.folder).get("base_model")
    base = _reference_text(written) if written is not None else None
    return None if base is None or (looks_local(base) and not exists(base)) else base


def declared_evaluation(located: Located) -> Evaluation | None:
    """Return what the recipe of a merged folder says about measuring it."""
    declared = _merge_recipe(located.folder).get("evaluation")
    return Evaluation.model_validate(declared) if declared is not None else None


def _merge_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe beside a merge as it is written: to load it would ask for models that may be gone by now."""
    from cart_hf.output.record import RECIPE_FILE
    from cart_hf.recipe.reading import parse_yaml

    path = folder / RECIPE_FILE
    found = parse_yaml(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _reference_text(written: str | Mapping[str, Any]) -> str:
    """Return a reference of a recipe, a string or a mapping, as one string."""
    if isinstance(written, str):
        return written
    if "lora" in written:
        return f"{_reference_text(written['model'])}+{_reference_text(written['lora'])}"
    return str(Reference(written["path"], written.get("revision"), written.get("subfolder")))


def _reference(text: str) -> Reference:
    try:
        return Reference.parse(text)
    except ValueError as failure:
        raise UserError(f"model: {failure}") from failure


def _merged_folder(reference: Reference) -> Path | None:
    """Return the local folder of a merge with heads or adapters, or None when it is another kind of model."""
    if reference.adapter is not None:
        return None
    if reference.is_local:
        folder = Path(reference.path).expanduser().resolve()
        several = (folder / "tasks").is_dir() or bool(adapter_names(folder))
        return folder if reference.subfolder is None and several else None
    if reference.subfolder is not None:
        return None
    from cart_hf.output.record import MERGE_FILE
    from cart_hf.sources.hub import download_repository, open_repository

    repository = open_repository("model", reference)
    headed = MERGE_FILE in repository.files and any(name.startswith("tasks/") for name in repository.files)
    if not headed and not any(fnmatch(name, f"{ADAPTERS_FOLDER}/*/{ADAPTER_CONFIG}") for name in repository.files):
        return None
    return download_repository(repository)


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

    assert located.checkpoint is not None
    kind = getattr(transformers, located.checkpoint.architecture.class_name)
    model = load_complete(located.checkpoint, kind).to(device).eval()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]

    def logits(heads: Sequence[str], inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = model(**inputs).logits
        return dict.fromkeys(heads, found)

    if located.checkpoint.adapts is not None:  # which lends an adapter its tokenizer
        base = str(located.checkpoint.adapts.pinned)
    preprocess = preprocessor_of(located.folder, modality_of(model), model.config, base)
    return Model(modality_of(model), preprocess, {"": names}, logits, None)


def _clip(located: Located, heads: Sequence[str], base: str | None, device: torch.device) -> Model:
    import transformers

    folder, adapters = located.folder, None
    if located.kind == "clip_vision":
        assert base is not None
        whole = open_checkpoint("base", _reference(base))
        whole.fetch()
        if whole.architecture.class_name != "CLIPModel":
            raise UserError(
                f"base: {base} is a {whole.architecture.class_name}; zero-shot heads need a whole CLIPModel"
            )
        assert located.checkpoint is not None
        clip = load_complete(whole, transformers.CLIPModel)
        vision = load_complete(located.checkpoint, transformers.CLIPVisionModel)
        try:
            clip.vision_model.load_state_dict(vision.state_dict())
        except RuntimeError as failure:
            raise UserError(f"model: {located.reference} is not a vision tower of the base {base}") from failure
        folder = whole.folder
    elif located.loaded is not None:
        clip, adapters = located.loaded.clip, located.loaded.adapters
    else:
        assert located.checkpoint is not None
        clip = load_complete(located.checkpoint, transformers.CLIPModel)
        if located.checkpoint.adapts is not None:
            folder = located.checkpoint.adapts.folder
        adapters = attach_adapters(folder, heads, clip) if located.heads else None
    loaded = MultiTaskModel(None, {}, clip, adapters).to(device).eval()
    tokenizer: Any = None

    def add(task: str, adapter: str, class_names: Sequence[str], templates: Sequence[str]) -> None:
        nonlocal tokenizer
        tokenizer = tokenizer or _tokenizer(folder, clip.config.text_config, base)
        cache = cache_folder("zero_shot")
        loaded.add_zero_shot(task, class_names, templates or DEFAULT_TEMPLATES, tokenizer, cache, adapter)

    return Model(
        "image",
        preprocessor_of(folder, "image", clip.config, base),
        {},
        lambda names, inputs: {name: output.logits for name, output in loaded(tasks=names, **inputs).items()},
        add,
    )


def load_complete(checkpoint: Checkpoint, kind: Any) -> Any:
    """Load a model in float32, and refuse it when transformers would make up what the file lacks."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if checkpoint.adapts is None:
        model, info = kind.from_pretrained(checkpoint.folder, **options)
    else:
        shapes = {name: tensor.stored.shape for name, tensor in checkpoint.tensors.items()}
        options["state_dict"] = {name: checkpoint.read(name).view(shape) for name, shape in shapes.items()}
        model, info = kind.from_pretrained(None, config=kind.config_class.from_dict(checkpoint.config), **options)
    if info["missing_keys"]:
        lacking = shorten(sorted(info["missing_keys"]))
        raise UserError(f"{checkpoint.name}: {checkpoint.reference} lacks the tensors {lacking}")
    return model


def modality_of(model: Any) -> Literal["text", "image"]:
    return "image" if model.main_input_name == "pixel_values" else "text"


def preprocessor_of(folder: Path, modality: str, config: Any, base: str | None) -> Any:
    """Return the tokenizer or image processor, the model's own or else the base's."""
    return (
        _tokenizer(folder, config, base) if modality == "text" else _from_pretrained("AutoImageProcessor", folder, base)
    )


def _tokenizer(folder: Path, config: Any, base: str | None) -> Any:
    """Return the tokenizer, able to cut and pad as the model needs it."""
    found = _from_pretrained("AutoTokenizer", folder, base)
    # a tokenizer saved without a limit says 10^30; position embeddings know better (RoBERTa's start after padding)
    room = getattr(config, "max_position_embeddings", None)
    if room is not None:
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        found.model_max_length = min(found.model_max_length, room - offset)
    if found.pad_token is None:  # GPT-2's: the model finds a text's last token by its own padding token
        if config.pad_token_id is None:
            raise UserError("model: neither its tokenizer nor its config.json names a padding token (pad_token_id)")
        found.pad_token = found.convert_ids_to_tokens(config.pad_token_id)
    return found


def _from_pretrained(kind: str, folder: Path, base: str | None) -> Any:
    import transformers

    loader = getattr(transformers, kind)
    try:
        found = loader.from_pretrained(folder)
        # where there are no files, transformers makes up a tokenizer of special tokens, to which all words are unknown
        if kind == "AutoTokenizer" and len(found) < len(set(found.all_special_ids)) + _FEWEST_WORDS:
            raise ValueError("no vocabulary")
        return found
    except (OSError, ValueError, KeyError) as failure:
        if base is not None:
            source = open_checkpoint("base", _reference(base)).folder
            if source.resolve() != folder.resolve():
                return _from_pretrained(kind, source, None)
        what = "tokenizer" if kind == "AutoTokenizer" else "image processor"
        reason = " ".join(str(failure).split())[:200]
        raise UserError(f"model: {folder} has no usable {what} ({reason}); --base REF lends the base's") from failure
