"""The recipe schema: mergekit's `models:` YAML with our keys added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cart_hf.errors import UserError
from cart_hf.recipe.reference import Reference, is_task_name, split_name

FloatType = Literal["float32", "float64", "bfloat16", "float16"]
UNSUPPORTED = {
    "slices": "stacking layer ranges",
    "modules": "merging sub-modules separately",
    "tokenizer": "tokenizer surgery",
    "chat_template": "replacing chat templates",
    "name": "multi-stage merges (mergekit-multi)",
}


class ModelEntry(BaseModel):
    """One model to merge.

    :param model: where it is.
    :param name: the task's name, the folder under ``tasks/``; default: the reference's last part.
    :param parameters: this model's own parameters (weight, density ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: Reference
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, str):
            name, reference = split_name(data)
            data = {"model": reference} | ({"name": name} if name else {})
        if not isinstance(data, dict) or "model" not in data or isinstance(data["model"], Reference):
            return data
        model = Reference.from_yaml(data["model"])
        return {**data, "model": model, "name": data.get("name") or model.default_name}

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not is_task_name(value):
            raise ValueError(f"'{value}' cannot name a task: use letters, digits, '.', '_' and '-'")
        return value


class Recipe(BaseModel):
    """A merge, declared: which models, which method, with which parameters.

    :param merge_method: name of a registered method.
    :param base_model: the pretrained checkpoint; methods on task vectors need it.
    :param models: the fine-tuned models.
    :param parameters: the method's parameters: scalar, gradient over layers, or filters.
    :param dtype: type of the arithmetic; a half type means float32 arithmetic and a half-precision output.
    :param out_dtype: type of the output's floating tensors; default: the inputs' own.
    :param tokenizer_source: ``base`` or one of the models, by name or reference.
    :param include, exclude: patterns adjusting which tensors the method is applied to.
    :param seed: seed of the methods that draw random numbers.
    :param max_shard_size: largest weight file, such as ``5GB``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    merge_method: str
    base_model: Reference | None = None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: FloatType = "float32"
    out_dtype: FloatType | None = None
    tokenizer_source: str = "base"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    max_shard_size: str = "5GB"

    @field_validator("base_model", mode="before")
    @classmethod
    def _read_base(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Reference) else Reference.from_yaml(value)

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _plain_dtype(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @field_validator("tokenizer_source")
    @classmethod
    def _no_surgery(cls, value: str) -> str:
        if value == "union":
            raise ValueError("'union' (tokenizer surgery) is valid mergekit, but cart-hf does not support it")
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _readable_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        :raises UserError: with every problem found, when the file or anything in it is wrong.
        """
        from cart_hf.recipe.reading import recipe_from_mapping

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as failure:
            raise UserError(f"cannot read the recipe {path}: {failure.strerror}") from failure
        except (yaml.YAMLError, UnicodeDecodeError) as failure:
            raise UserError(f"{path} is not valid YAML: {failure}") from failure
        if not isinstance(data, dict):
            raise UserError(f"{path}: a recipe is a mapping with merge_method, base_model and models")
        try:
            return recipe_from_mapping(data)
        except UserError as failure:
            raise UserError([f"{path}: {problem}" for problem in failure.problems]) from failure

    def to_yaml(self) -> str:
        """Return the recipe as YAML that :meth:`load` reads back to the same recipe."""
        data: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model is not None:
            data["base_model"] = self.base_model.to_yaml()
        data["models"] = [
            {"model": entry.model.to_yaml(), "name": entry.name}
            | ({"parameters": entry.parameters} if entry.parameters else {})
            for entry in self.models
        ]
        defaults = Recipe.model_fields
        for key in (
            "parameters",
            "dtype",
            "out_dtype",
            "tokenizer_source",
            "include",
            "exclude",
            "seed",
            "max_shard_size",
        ):
            value = getattr(self, key)
            if key == "dtype" or (value not in (None, (), {}) and value != defaults[key].default):
                data[key] = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB`` or ``200MiB``.

    :raises ValueError: when it is not one.
    """
    units = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9, "b": 1}
    cleaned = str(text).strip().lower().replace(" ", "")
    for unit, factor in units.items():
        number = cleaned.removesuffix(unit)
        if number != cleaned and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * factor)
    raise ValueError(f"'{text}' is not a size such as 5GB or 200MB")
