"""Which files of a model folder hold its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from cart_hf.errors import UserError, shorten
from cart_hf.sources.weights import PickleFile, SafetensorsFile, WeightFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = (SINGLE, INDEX, PICKLE, PICKLE_INDEX)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_LAYOUTS = (ADAPTER_WEIGHTS, "adapter_model.bin")
ADAPTER_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


def local_weight_files(folder: Path, layouts: Sequence[str] = LAYOUTS) -> dict[str, WeightFile]:
    """Open the headers of a local folder's weight files, by file name.

    :param layouts: the files that may hold weights, or list those that do; the first that is there counts.
    :raises UserError: when there are none, or one is missing or damaged, or an index is wrong.
    """

    def open_file(name: str) -> WeightFile:
        return SafetensorsFile.open(folder / name) if name.endswith(".safetensors") else PickleFile(folder / name)

    present = [name for name in layouts if (folder / name).is_file()]
    if not present:
        found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        raise UserError(
            f"{folder} holds no weights: looked for {', '.join(layouts)}; "
            + (f"the folder has {shorten(found, 6)}" if found else "the folder is empty")
        )
    if not present[0].endswith(".index.json"):
        return {present[0]: open_file(present[0])}
    index = folder / present[0]
    return sharded_weight_files(
        str(index), index.read_text(encoding="utf-8"), open_file, lambda n: (folder / n).is_file()
    )


def sharded_weight_files(
    label: str, text: str, open_file: Callable[[str], WeightFile], exists: Callable[[str], bool]
) -> dict[str, WeightFile]:
    """Open the shards that an index names.

    :param label: what to call the index in messages.
    :param text: the index, as JSON.
    :raises UserError: when the index is damaged, points outside its folder, or names a shard or tensor that is missing.
    """
    weight_map = shards_of(label, text)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not exists(shard)]
    if missing:
        raise UserError(f"{label} names shards that are missing: {shorten(missing)}; download the model again")
    files = {shard: open_file(shard) for shard in shards}
    absent = [key for key, shard in weight_map.items() if key not in files[shard].tensors]
    if absent:
        raise UserError(
            f"{label} lists tensors that its shards do not hold: {shorten(absent)}; download the model again"
        )
    return files


def shards_of(label: str, text: str) -> dict[str, str]:
    """Return the shard of each tensor that an index names.

    :param label: what to call the index in messages.
    :param text: the index, as JSON.
    :raises UserError: when the index is damaged, or points outside its folder.
    """
    try:
        weight_map = {key: str(shard) for key, shard in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise UserError(f"{label} is not a valid index of shards; download it again") from failure
    for shard in sorted(set(weight_map.values())):
        path = PurePosixPath(shard.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in shard:
            raise UserError(f"{label} points outside its folder: '{shard}'; cart-hf reads only the model's own files")
    return weight_map
