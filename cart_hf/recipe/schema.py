"""The recipe schema: mergekit's `models:` YAML with our keys added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cart_hf.errors import UserError
from cart_hf.methods import Method, all_methods, get_method
from cart_hf.recipe import validation
from cart_hf.recipe.adaptation import Adaptation
from cart_hf.recipe.benchmark import Benchmark, Selection, Sweep, Trial
from cart_hf.recipe.calibration import Calibration
from cart_hf.recipe.compression import Compression
from cart_hf.recipe.evaluation import Evaluation
from cart_hf.recipe.reading import read_mapping
from cart_hf.recipe.reference import Reference, split_name, task_name
from cart_hf.recipe.settings import pattern_problem
from cart_hf.recipe.sizes import parse_size
from cart_hf.recipe.tuning import Tuning
from cart_hf.recipe.wrapping import Wrap, read_wrap, searches, with_point

FloatType = Literal["float32", "float64", "bfloat16", "float16"]


class ModelEntry(BaseModel):
    """One model to merge.

    :param model: where it is.
    :param name: the task's name, the folder under ``tasks/``; default: the reference's last part.
    :param parameters: this model's own parameters (weight, density ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: Reference
    name: Annotated[str, AfterValidator(task_name)]
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


class Recipe(BaseModel):
    """A merge, declared: which models, which method, with which parameters.

    :param merge_method: name of a registered method.
    :param base_model: the pretrained checkpoint; methods on task vectors need it.
    :param models: the fine-tuned models.
    :param parameters: the method's parameters: scalar, gradient over layers, or filters.
    :param dtype: type of the arithmetic; a half type means float32 arithmetic and a half-precision output.
    :param out_dtype: type of the output's floating tensors; default: the inputs' own.
    :param tokenizer_source: ``base`` or one of the models, by name or reference.
    :param wrap: what is done to the method's result, see :mod:`cart_hf.methods.wrappers`.
    :param include, exclude: patterns adjusting which tensors the method is applied to.
    :param seed: seed of the methods that draw random numbers.
    :param max_shard_size: largest weight file, such as ``5GB``.
    :param evaluation: what the merged model is measured on.
    :param benchmark: which methods `cart-hf benchmark` compares.
    :param compress: how `cart-hf compress` makes adapters.
    :param adapt: how `cart-hf adapt` learns coefficients.
    :param tune: which settings `cart-hf tune` tries.
    :param calibration: which examples the statistics of the models at work are taken from.
    :param coefficients: file of coefficients that `cart-hf adapt` has learnt; beside the recipe, when it is relative.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    merge_method: str
    base_model: Reference | None = None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: FloatType = "float32"
    out_dtype: FloatType | None = None
    tokenizer_source: str = "base"
    wrap: Wrap = Field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    seed: int = 0
    max_shard_size: str = "5GB"
    evaluation: Evaluation | None = None
    benchmark: Benchmark | None = None
    compress: Compression | None = None
    adapt: Adaptation | None = None
    tune: Tuning | None = None
    coefficients: str | None = None
    calibration: Calibration | None = None

    @field_validator("base_model", mode="before")
    @classmethod
    def _read_base(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, Reference) else Reference.from_yaml(value)

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("wrap", mode="before")
    @classmethod
    def _read_wrap(cls, value: Any) -> Any:
        return read_wrap(value)

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _plain_dtype(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @field_validator("include", "exclude")
    @classmethod
    def _readable_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems = [problem for problem in map(pattern_problem, value) if problem]
        if problems:
            raise ValueError("; ".join(problems))
        return value

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
    def load(cls, path: str | Path, *, fewest: int = 2) -> Recipe:
        """Read a recipe from a YAML file.

        :param fewest: how many models there must be.
        :raises UserError: with every problem found, when the file or anything in it is wrong.
        """
        data = read_mapping(path, "recipe", "a recipe is a mapping with merge_method, base_model and models")
        if isinstance(data.get("coefficients"), str):
            data["coefficients"] = str(Path(path).parent / data["coefficients"])
        try:
            return cls.from_mapping(data, fewest=fewest)
        except UserError as failure:
            raise UserError([f"{path}: {problem}" for problem in failure.problems]) from failure

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, fewest: int = 2) -> Recipe:
        """Read a recipe from what YAML holds: check everything, and make the method's defaults explicit.

        :param fewest: how many models there must be.
        :raises UserError: with every problem found.
        """
        problems = validation.unsupported(data)
        if "slices" in data or "modules" in data:  # another kind of recipe: nothing else of it can be judged
            raise UserError(problems)
        cleaned = {key: value for key, value in data.items() if key not in validation.UNSUPPORTED}
        recipe = None
        try:
            recipe = cls.model_validate(cleaned)
        except ValidationError as failure:
            problems.extend(validation.explain(error, _keys_at) for error in failure.errors())  # type: ignore[arg-type]
        method = validation.method_of(cleaned, problems)
        if method is not None:
            validation.check_parameters(cleaned, method, problems)
            if recipe is not None:
                recipe = recipe._settled(method, problems, fewest)
        if recipe is not None and not problems:
            recipe._check_benchmark(problems)
            recipe._check_compress(problems)
            recipe._check_adapt(problems)
            recipe._check_tune(problems)
        if problems or recipe is None:
            raise UserError(problems)
        return recipe

    def _settled(self, method: Method, problems: list[str], fewest: int) -> Recipe:
        """Make explicit what the method implies, and check the models against it."""
        models = self.models
        if method.needs_base:
            if self.base_model is None:
                problems.append(f"base_model: {method.name} works on task vectors and needs the base model")
            # mergekit's files list the base among the models; its own task vector is zero
            models = tuple(entry for entry in models if entry.model != self.base_model)
        elif method.ordered:  # mergekit's slerp starts at base_model, wherever it is listed
            base = self.base_model
            if base is not None and len(models) == 1 and models[0].model != base:
                models = (ModelEntry(model=base, name=base.default_name), *models)
            models = tuple(sorted(models, key=lambda entry: entry.model != base))
        if self.wrap and self.base_model is None and not method.needs_base:
            problems.append(f"base_model: wrap ({', '.join(self.wrap)}) acts on the update of the base, and needs it")
        if len(models) < fewest:
            found = f"only one model ({models[0].model})" if models else "no model to merge"
            problems.append(f"models: {found}; a merge needs at least two")
        elif method.model_count is not None and len(models) != method.model_count:
            problems.append(f"models: {method.name} merges {method.model_count} models, and not {len(models)}")
        names = [entry.name.lower() for entry in models]  # folders: not every file system tells a from A
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            places = " and ".join(str(entry.model) for entry in models if entry.name.lower() == name)
            problems.append(
                f"models: {places} are both called '{name}'; give each its own name (flags: NAME=REF, recipe: name:)"
            )
        parameters = {**method.presets.get(self.merge_method, {}), **validation.canonical(method, self.parameters)}
        weighted = any("weight" in scope for scope in (self.parameters, *(entry.parameters for entry in models)))
        return self.model_copy(
            update={
                "merge_method": method.name,
                "parameters": validation.settled_parameters(method, parameters, weighted=weighted),
                "models": tuple(
                    entry.model_copy(update={"parameters": validation.canonical(method, entry.parameters)})
                    for entry in models
                ),
            }
        )

    def variant(
        self,
        method: str,
        parameters: Mapping[str, Any],
        adapt: Adaptation | None = None,
        wrap: Wrap | None = None,
    ) -> Recipe:
        """Return the recipe with another method; of the models' own parameters only what it knows stays.

        :param parameters: its parameters, and those of the wrappers (``lines.beta``).
        :param adapt: how its coefficients are learnt, if they are.
        :param wrap: what is done to its result.
        :raises UserError: when the method or a parameter does not exist.
        """
        known = get_method(method)
        per_model = [
            parameter.name
            for parameter in known.parameters
            if parameter.per_model and (known.name == self.merge_method or parameter.name == "weight")
        ]
        models = [
            entry.model_copy(update={"parameters": {k: v for k, v in entry.parameters.items() if k in per_model}})
            for entry in self.models
        ]
        shared = {name: getattr(self, name) for name in Recipe.model_fields if name not in _OF_THE_METHOD}
        wrapped, own = with_point(wrap or {}, parameters)
        changed = {"merge_method": method, "models": models, "parameters": own, "adapt": adapt, "wrap": wrapped}
        return Recipe.from_mapping({**shared, **changed}, fewest=min(2, len(models)))

    def of_trial(self, trial: Trial, point: Mapping[str, Any]) -> Recipe:
        """Return the recipe of one point of a trial, nothing learnt.

        :raises UserError: when the method or a parameter does not exist.
        """
        return self.variant(trial.method, point, wrap=trial.wrap)

    def tuned(self) -> Trial:
        """Return what `cart-hf tune` tries: the recipe's method and parameters, those of the grid left open.

        :raises UserError: when there is no grid, and the method suggests none.
        """
        method, grid = get_method(self.merge_method), {}
        for name, values in self.tune.grid.items() if self.tune is not None else ():
            known = method.parameter(name)
            grid[known.name if known is not None else name] = values  # an unknown one is told of with its points
        grid = grid or {one.name: one.search for one in method.parameters if one.search} | searches(self.wrap)
        if not grid:
            raise UserError(f"tune.grid: {method.name} suggests no values to try; name a parameter and its values")
        replaced = {*grid, *(method.one_of if any(name in method.one_of for name in grid) else ())}
        fixed = {name: value for name, value in self.parameters.items() if name not in replaced}
        return Trial(method=method.name, name=method.name, parameters=fixed, grid=grid, wrap=self.wrap)

    def _check_benchmark(self, problems: list[str]) -> None:
        for trial in self.benchmark.methods if self.benchmark is not None else ():
            problems.extend(f"benchmark, row '{trial.name}': {problem}" for problem in self._problems_of(trial))

    def _check_tune(self, problems: list[str]) -> None:
        if self.tune is not None and self.tune.grid:
            problems.extend(f"tune.grid: {problem}" for problem in self._problems_of(self.tuned()))

    def _problems_of(self, trial: Trial) -> list[str]:
        """Return what is wrong with any point of a trial."""
        found: dict[str, None] = {}
        for point in trial.points:
            try:
                self.variant(trial.method, point, trial.adapt, trial.wrap)
            except UserError as failure:
                found |= dict.fromkeys(failure.problems)
        return list(found)

    def _check_compress(self, problems: list[str]) -> None:
        asked = [("compress", self.compress)] if self.compress is not None else []
        if self.benchmark is not None and self.benchmark.compress is not None:
            asked += [("benchmark.compress", compression) for _, compression in self.benchmark.compress.rows]
        for place, compression in asked:
            for name, value in compression.parameters.items():
                problem = validation.parameter_problem(get_method("cart"), name, value)
                if problem:
                    problems.append(f"{place}.{name}: {problem}")

    def _check_adapt(self, problems: list[str]) -> None:
        method = get_method(self.merge_method)
        asked = [key for key in ("adapt", "coefficients") if getattr(self, key) is not None]
        if asked and method.linear is None:
            linear = [name for name, known in all_methods().items() if known.linear is not None]
            problems.append(f"{asked[0]}: {method.name} has no coefficients to learn; {', '.join(linear)} have")
        elif asked and self.wrap:
            problems.append(f"{asked[0]}: coefficients are learnt of a method's own result; leave out wrap")
        elif self.adapt is not None and self.adapt.mask_ratio is not None and method.of_factors is None:
            problems.append(f"adapt.mask_ratio: {method.name} has no singular directions; it is for cart")

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
            "wrap",
            "include",
            "exclude",
            "seed",
            "max_shard_size",
            "coefficients",
        ):
            value = getattr(self, key)
            if key == "dtype" or (value not in (None, (), {}) and value != defaults[key].default):
                data[key] = list(value) if isinstance(value, tuple) else value
        for key in ("evaluation", "calibration", "benchmark", "compress", "adapt", "tune"):
            part = getattr(self, key)
            if part is not None:
                data[key] = part.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _keys_at(place: tuple[int | str, ...]) -> Iterable[str]:
    """Return the keys that may stand where an unknown one was found."""
    if len(place) == 1:
        return Recipe.model_fields
    inner: dict[tuple[str, ...], type[BaseModel]] = {
        ("evaluation",): Evaluation,
        ("benchmark",): Benchmark,
        ("compress",): Compression,
        ("adapt",): Adaptation,
        ("calibration",): Calibration,
        ("tune",): Tuning,
        ("benchmark", "methods"): Trial,
        ("benchmark", "methods", "adapt"): Adaptation,
        ("benchmark", "compress"): Sweep,
    }
    parts = tuple(part for part in place[:-1] if isinstance(part, str))
    return (ModelEntry if parts == ("models",) else inner.get(parts, Selection)).model_fields


_OF_THE_METHOD = (
    "merge_method",
    "models",
    "parameters",
    "wrap",
    "benchmark",
    "compress",
    "adapt",
    "tune",
    "coefficients",
)
