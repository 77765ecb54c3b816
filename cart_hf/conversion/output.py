"""The folder of a converted model: weights, configuration, processor, tokenizer, and a record of what was done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cart_hf import __version__
from cart_hf.conversion.find import Source
from cart_hf.conversion.plan import Conversion
from cart_hf.output.folder import PROCESSOR_FILES, TOKENIZER_FILES, WorkFolder, check_replaceable, check_space
from cart_hf.output.record import versions
from cart_hf.sources import dtype_name

RECORD = "conversion.json"
WEIGHTS = "model.safetensors"


def check_output(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, unless ``overwrite`` and it is an earlier conversion (or empty).

    :raises UserError: with what to do.
    """
    check_replaceable(target, overwrite=overwrite, what="a model that cart-hf convert wrote", marker=RECORD)


@contextmanager
def replacing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a work folder that becomes ``target`` at the end; an earlier conversion there goes only then."""
    old = target.with_name(f".{target.name}.old")
    try:
        with WorkFolder(target, overwrite=False) as folder:
            yield folder
            check_output(target, overwrite=overwrite)  # something may have appeared meanwhile
            if target.exists():
                target.rename(old)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_model(folder: Path, conversion: Conversion, source: Source) -> dict[str, Any]:
    """Write everything into an empty folder.

    :return: the record, as written to ``conversion.json``.
    :raises UserError: when the disk is too small, or a tensor is damaged or not finite.
    """
    write_weights(folder / WEIGHTS, conversion)
    _write_json(folder / "config.json", conversion.config)
    processor = _copy_base(conversion, folder, PROCESSOR_FILES)
    if not processor:
        _write_json(folder / "preprocessor_config.json", image_processor(conversion.image_size))
    tokenizer = _copy_base(conversion, folder, TOKENIZER_FILES)
    record = _record(conversion, source) | {
        "processor": "base" if processor else "OpenAI's image settings",
        "tokenizer": "base" if tokenizer else None,
    }
    _write_json(folder / RECORD, record)
    return record


def write_weights(path: Path, conversion: Conversion) -> None:
    """Write the tensors one after the other, as a safetensors file: one at a time is in memory."""
    name, size = dtype_name(conversion.dtype), conversion.dtype.itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot, shape in conversion.shapes.items():
        start, end = end, end + torch.Size(shape).numel() * size
        header[slot] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    check_space(path.parent, 8 + len(text) + end)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in conversion.shapes:
            file.write(conversion.read(slot).view(-1).view(torch.uint8).numpy().data)


def image_processor(size: int) -> dict[str, Any]:
    """Return the settings of OpenAI's image processor, which open_clip's evaluation uses too.

    :param size: height and width, in pixels.
    """
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
    }


def _copy_base(conversion: Conversion, folder: Path, names: tuple[str, ...]) -> bool:
    """Copy those of the named files that the base has; return whether it has any."""
    if conversion.base is None:
        return False
    present = [name for name in names if (conversion.base.folder / name).is_file()]
    for name in present:
        shutil.copyfile(conversion.base.folder / name, folder / name)
    return bool(present)


def _record(conversion: Conversion, source: Source) -> dict[str, Any]:
    contents, base = conversion.contents, conversion.base
    path = contents.archive.path
    kinds = Counter("base" if place is None else _kind(place.part) for place in conversion.origins.values())
    return {
        "cart_hf": __version__,
        "source": {
            "file": source.label,
            "commit": source.commit,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "pickled": contents.kind,
            "prefix": contents.prefix,
        },
        "base": None if base is None else {"reference": str(base.reference), "commit": base.commit},
        "class": conversion.class_name,
        "activation": conversion.config.get("vision_config", conversion.config).get("hidden_act", "quick_gelu"),
        "dtype": conversion.config["dtype"],
        "tensors": dict(kinds),
        "left_out": [*conversion.left_out, *contents.outside],
        "versions": versions(),
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _kind(part: str | int) -> str:
    return {"whole": "copied", "transposed": "transposed"}.get(str(part), "split from in_proj")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
