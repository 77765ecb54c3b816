"""`cart_hf.conversion.convert`: open_clip checkpoints become folders that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cart_hf.api import resolved_target
from cart_hf.conversion.archive import Archive
from cart_hf.conversion.contents import find_model
from cart_hf.conversion.find import Source, find_sources
from cart_hf.conversion.output import check_output, replacing, write_model
from cart_hf.conversion.plan import Conversion, plan_conversion
from cart_hf.errors import UserError
from cart_hf.parallel import Progress
from cart_hf.recipe import Reference
from cart_hf.sources import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Converted:
    """A model that was converted.

    :param folder: where it is.
    :param record: what was done, as in its ``conversion.json``.
    :param warnings: what to know about it.
    """

    folder: Path
    record: Mapping[str, Any]
    warnings: tuple[str, ...]


def convert(
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    base: str | None = None,
    *,
    vision_only: bool = False,
    activation: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Converted]:
    """Convert open_clip checkpoints (vision transformers that ``torch.save`` wrote) to transformers' CLIP.

    Files hold a whole module or a state dict; they are read by a restricted unpickler that runs nothing.

    :param source: a file, a folder of such files, a Hub reference, or several of these.
    :param output: the folder to write: the model's for one file, else one that gets a folder for each file.
    :param base: a whole CLIP model (Hub id or folder): its configuration, processor and tokenizer are the output's, and
        its text tower where the file has none. Without it the configuration is deduced from shapes.
    :param vision_only: write vision towers with their projections (CLIPVisionModelWithProjection), nothing of the text.
    :param activation: ``quick_gelu`` (default, OpenAI's) or ``gelu``, for state dicts, which do not say.
    :param dtype: the output's type (``float32``, ``bfloat16`` ...); default: the file's.
    :param overwrite: replace earlier conversions.
    :param progress: called with (step, advance, total) as the work goes on.
    :return: the converted models, in the order of the files.
    :raises UserError: when a file is damaged or wants to run something, or does not fit the base; every file is checked
        before the first is written.
    """
    sources, single = find_sources([source] if isinstance(source, str | Path) else source)
    if not sources:
        raise UserError("nothing to convert: name a file, a folder or a Hub repository")
    target = resolved_target(output)
    targets = [target] if single else [target / one.name for one in sources]
    for place in targets:
        check_output(place, overwrite=overwrite)
    opened = None if base is None else _open_base(base)
    if opened is not None and any(_overlap(place, opened.folder.resolve()) for place in targets):
        raise UserError(f"the output {target} is or holds the base ({opened.reference}), which it is made from")
    with ExitStack() as stack:
        plans: list[Conversion] = []
        problems: list[str] = []
        for one in sources:
            try:
                contents = find_model(stack.enter_context(Archive(one.fetch())))
                plans.append(
                    plan_conversion(contents, opened, vision_only=vision_only, activation=activation, dtype=dtype)
                )
            except UserError as failure:
                problems += failure.problems
            if progress:
                progress("check", 1, len(sources))
        if problems:
            raise UserError(problems)
        converted = []
        for one, plan, place in zip(sources, plans, targets, strict=True):
            converted.append(_write(one, plan, place, overwrite))
            if progress:
                progress("convert", 1, len(sources))
    return converted


def _write(source: Source, plan: Conversion, place: Path, overwrite: bool) -> Converted:
    try:
        with replacing(place, overwrite=overwrite) as folder:
            record = write_model(folder, plan, source)
    except OSError as failure:
        raise UserError(f"cannot write the output {place}: {failure.strerror or failure}") from failure
    return Converted(place, record, tuple(_warnings(source, plan)))


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _warnings(source: Source, plan: Conversion) -> list[str]:
    if plan.base is not None:
        return []
    if not plan.contents.has_text_tower:
        return [
            f"{source.label} has no text tower: {plan.class_name} was written; --base adds the pretrained text tower"
        ]
    if plan.class_name == "CLIPModel":
        return [f"{source.label}: an image processor was written, but no tokenizer; --base adds one"]
    return []


def _open_base(text: str) -> Checkpoint:
    """Open the base, which must be a whole CLIP model.

    :raises UserError: when it is not, or cannot be opened.
    """
    try:
        reference = Reference.parse(text)
    except ValueError as failure:
        raise UserError(f"--base: {failure}") from failure
    base = open_checkpoint("base", reference)
    if base.architecture.class_name != "CLIPModel":
        raise UserError(
            f"the base ({reference}) is a {base.architecture.class_name}; give a whole CLIP model, such as "
            "openai/clip-vit-base-patch32"
        )
    return base
