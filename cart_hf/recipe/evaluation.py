"""What is measured, and on which examples: the recipe's `evaluation:` key, and the flags of `cart-hf evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cart_hf.errors import UserError, did_you_mean


class Evaluation(BaseModel):
    """Which tasks, on which data, how.

    :param suite: a named list of tasks; or
    :param tasks: the tasks by name. Neither: those that the model's heads are called after.
    :param tasks_file: YAML file that declares further tasks.
    :param data: folder that holds ``NAME/{split}.parquet``; default: what the tasks declare.
    :param split: the split to score; default: each task's own.
    :param limit: at most so many examples of each task, spread evenly over the split.
    :param stream: read the first ``limit`` rows of a Hub dataset over the network instead of downloading all of it.
    :param unseen_by: score only the inputs that this adapted model (``cart-hf adapt``) was not adapted on.
    :param heads: the head that answers a task, where it is called differently.
    :param label_mapping: ``name`` matches label names, ``index`` trusts their order; default: as the task says.
    :param batch_size: examples at a time, in each process.
    :param dtype: ``bfloat16`` and ``float16`` run under autocast.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: str | None = None
    tasks: tuple[str, ...] = ()
    tasks_file: str | None = None
    data: str | None = None
    split: str | None = None
    limit: int | None = Field(default=None, gt=0)
    stream: bool = False
    unseen_by: str | None = None
    heads: dict[str, str] = Field(default_factory=dict)
    label_mapping: Literal["name", "index"] | None = None
    batch_size: int = Field(default=64, gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        if self.suite is not None and self.tasks:
            raise ValueError("suite and tasks: give one of the two")
        if self.stream and self.limit is None:
            raise ValueError("stream: it reads the first rows only; say how many with limit")
        return self

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> Evaluation:
        """Build it from flags; None means that a flag was not given.

        :raises UserError: with every problem found.
        """
        try:
            return cls.model_validate({name: value for name, value in flags.items() if value is not None})
        except ValidationError as failure:
            raise UserError([_explain(error) for error in failure.errors()]) from failure  # type: ignore[arg-type]


def with_examples(declared: Evaluation | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an evaluation: what is given goes before what a recipe declares.

    :param declared: the recipe's; None when it has none.
    :param given: fields that say which tasks on which data; ``tasks`` or ``suite`` takes the place of both.
    """
    fields = declared.model_dump(exclude_defaults=True) if declared is not None else {}
    if "tasks" in given or "suite" in given:
        fields = {name: value for name, value in fields.items() if name not in ("tasks", "suite")}
    return {**fields, **given}


def _explain(error: Mapping[str, Any]) -> str:
    flag = f"--{'-'.join(str(error['loc'][0]).split('_'))}: " if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"{flag}unknown{did_you_mean(str(error['loc'][0]), Evaluation.model_fields)}"
    return flag + str(error["msg"]).removeprefix("Value error, ")
