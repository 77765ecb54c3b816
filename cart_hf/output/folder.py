"""Writing the output folder beside its target, and making it appear with one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from cart_hf.errors import UserError
from cart_hf.merging.reading import is_finite, refuse_broken
from cart_hf.output.record import COMPRESS_FILE, MERGE_FILE
from cart_hf.plan import Plan, Shard
from cart_hf.recipe import Reference
from cart_hf.sources import DTYPES, Checkpoint

INDEX_FILE = "model.safetensors.index.json"
HEAD_FILE = "head.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
OTHER_FILES = ("generation_config.json",)
_SUFFIX, _OUTPUT = ".partial", "output"


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, unless ``overwrite`` and it is an earlier output of ours (or empty).

    :param target: an absolute path, links resolved.
    :raises UserError: with what to do.
    """
    try:
        exists = target.exists()
    except OSError as failure:
        raise UserError(f"{target}: {failure.strerror}; choose another output") from failure
    if not exists:
        return
    if target == Path.cwd() and not any(target.iterdir()):
        raise UserError(f"{target} is the current folder, which cannot be replaced; name a folder in it")
    # a merge, a compression, or the adapter of a single model
    marker = COMPRESS_FILE if (target / COMPRESS_FILE).is_file() else MERGE_FILE
    check_replaceable(target, overwrite=overwrite, what="an output of cart-hf", marker=marker)


def check_replaceable(target: Path, *, overwrite: bool, what: str, marker: str) -> None:
    """Refuse what exists at ``target``, unless it is an empty folder, or ``overwrite`` and what we wrote earlier.

    :param what: what we write there, for messages.
    :param marker: the file by which it is recognised.
    :raises UserError: with what to do.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{target} exists; choose another output, or --overwrite to replace it")
    if not (target / marker).is_file():
        raise UserError(f"{target} is not {what} (no {marker}): it is not overwritten; remove it yourself")


def check_inputs(target: Path, plan: Plan) -> None:
    """Refuse to replace a folder that is one of the inputs, or holds one, or lies in one.

    :raises UserError: naming the model.
    """
    for checkpoint in plan.checkpoints:
        for folder in (folder.resolve() for folder in checkpoint.folders):
            if target == folder or target in folder.parents or folder in target.parents:
                raise UserError(f"the output {target} is or holds {checkpoint.name} ({folder}), which it is made from")


class Check(Protocol):
    """Refuses a target that must not be replaced."""

    def __call__(self, target: Path, *, overwrite: bool) -> None:
        """Raise a UserError, or not."""


class WorkFolder:
    """A hidden folder beside the target, in which the output is made; that is renamed to the target on success.

    :param target: an absolute path, links resolved.
    :param overwrite: whether a target that is not empty is replaced.
    :param keep: told what went wrong, whether the work folder stays; default: it never does.
    :param check: refuses a target that must not be replaced; default: :func:`check_target`.
    :raises UserError: when the target's parent cannot be written, or the target has appeared in the meantime.

    ``path`` is the hidden folder; one that is there already may be given before the context is entered.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool,
        keep: Callable[[BaseException], bool] = lambda _: False,
        check: Check | None = None,
    ) -> None:
        self._target, self._overwrite, self._keep, self._check = target, overwrite, keep, check or check_target
        self._made: list[Path] = []
        self.path: Path | None = None

    def __enter__(self) -> Path:
        """Return the folder that becomes the output; what lies beside it goes with the work folder."""
        parent, existing = self._target.parent, self.path
        try:
            self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            if self.path is None:
                self.path = Path(tempfile.mkdtemp(_SUFFIX, _prefix(self._target), parent))
            output = self.path / _OUTPUT
            output.mkdir(exist_ok=True)
            output.chmod(0o755)
        except OSError as failure:
            if existing is None:
                self._remove()
            raise UserError(f"cannot write beside {self._target}: {failure.strerror or failure}") from failure
        return output

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            if not self._keep(value):
                self._remove()
            return
        assert self.path is not None  # entered
        try:
            self._check(self._target, overwrite=self._overwrite)  # another process may have been faster
            old = self.path.with_suffix(".old") if self._target.exists() else None
            if old is not None:
                self._target.rename(old)
            (self.path / _OUTPUT).rename(self._target)
        except (UserError, OSError) as failure:
            self._remove()
            raise failure if isinstance(failure, UserError) else UserError(f"{self._target}: {failure}") from failure
        if old is not None:
            shutil.rmtree(old)
        shutil.rmtree(self.path, ignore_errors=True)

    def _remove(self) -> None:
        """Remove the work folder, and the parents that were made for it."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def work_folders(target: Path) -> list[Path]:
    """Return the work folders beside ``target`` that may be its own: long names are cut, and then not told apart."""
    names = re.compile(re.escape(_prefix(target)) + r"[^.]+" + re.escape(_SUFFIX))
    try:
        return [path for path in target.parent.iterdir() if names.fullmatch(path.name) and path.is_dir()]
    except OSError:
        return []


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def check_space(folder: Path, nbytes: int) -> None:
    """Refuse to start when the disk cannot hold the output.

    :raises UserError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UserError(f"the output needs {nbytes / 1e9:.2f} GB, the disk of {folder} has {free / 1e9:.2f} GB free")


def write_folder(folder: Path, plan: Plan, shards: Sequence[Shard]) -> None:
    """Write everything around the weight files: configurations, indexes, tokenizer, task heads."""
    _write_json(folder / "config.json", plan.output_config)
    if len(shards) > 1:
        weight_map = {tensor.key: shard.filename for shard in shards for tensor in shard.tensors}
        _write_index(folder, weight_map, plan.nbytes)
    donor = tokenizer_source(plan)
    _copy_files([donor, *plan.checkpoints], folder, TOKENIZER_FILES)
    _copy_files(plan.checkpoints, folder, PROCESSOR_FILES)
    _copy_files(plan.checkpoints[:1], folder, OTHER_FILES)
    for model in plan.models:
        if model.name in plan.heads:
            _write_task(folder, plan, model, shards)


def tokenizer_source(plan: Plan) -> Checkpoint:
    """Return the checkpoint whose tokenizer the output gets.

    :raises UserError: when ``tokenizer_source`` names none of the recipe's models.
    """
    wanted = plan.recipe.tokenizer_source
    if wanted == "base":
        return plan.checkpoints[0]
    for checkpoint in plan.checkpoints:
        if wanted in (checkpoint.name, str(checkpoint.reference)) or Reference(wanted) == checkpoint.reference:
            return checkpoint
    names = ", ".join(checkpoint.name for checkpoint in plan.models)
    raise UserError(f"tokenizer_source: '{wanted}' is neither 'base' nor one of the models ({names})")


def _copy_files(donors: Iterable[Checkpoint], folder: Path, names: Sequence[str]) -> None:
    """Copy the named files of the first donor that has any."""
    for place in (place for donor in donors for place in donor.folders):
        present = [name for name in names if (place / name).is_file()]
        for name in present:
            shutil.copyfile(place / name, folder / name)
        if present:
            return


def _write_task(folder: Path, plan: Plan, model: Checkpoint, shards: Sequence[Shard]) -> None:
    """Write ``tasks/NAME``: the merged backbone by hard link, and the model's own head, labels and tokenizer."""
    task = folder / "tasks" / model.name
    task.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in shards:
        if model.name in shard.tasks:
            # another name than the root's: transformers would take a model.safetensors for the whole model
            linked = shard.filename.replace("model", "backbone", 1)
            _link(folder / shard.filename, task / linked)
            weight_map |= {tensor.key: linked for tensor in shard.tensors}
            total += sum(tensor.nbytes for tensor in shard.tensors)
    head = {tensor.key: _head_tensor(plan, model, tensor.name) for tensor in plan.heads[model.name]}
    save_file(head, task / HEAD_FILE, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(head, HEAD_FILE)
    _write_index(task, weight_map, total + sum(t.numel() * t.element_size() for t in head.values()))
    config = {k: v for k, v in model.config.items() if k not in ("_name_or_path", "torch_dtype", "dtype")}
    config |= {"architectures": [model.architecture.class_name], "dtype": plan.output_config["dtype"]}
    _write_json(task / "config.json", config)
    _copy_files([model, tokenizer_source(plan)], task, TOKENIZER_FILES)
    _copy_files([model, *plan.checkpoints], task, PROCESSOR_FILES)


def _head_tensor(plan: Plan, model: Checkpoint, name: str) -> torch.Tensor:
    stored = model.tensors[name].stored
    learnt = plan.coefficients.heads.get(model.name, {}).get(name) if plan.coefficients is not None else None
    values = model.read(name).view(stored.shape) if learnt is None else learnt
    if not DTYPES[stored.dtype].is_floating_point:
        return values
    refuse_broken(values, model, name)
    result: torch.Tensor = values.to(getattr(torch, plan.output_config["dtype"]))
    if not is_finite(result):
        raise UserError(
            f"tensor '{name}' of {model.name} ({model.reference}): its values do not fit "
            f"{plan.output_config['dtype']}; choose --out-dtype float32 or bfloat16"
        )
    return result


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_index(folder: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    _write_json(
        folder / INDEX_FILE, {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
