"""The declaration of a task, as the built-in YAML files and a user's tasks file write it."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cart_hf.recipe.reference import task_name

TEXT, REGRESSION, IMAGE = "text-classification", "text-regression", "image-classification"
LOGICAL_SPLITS = ("train", "validation", "test")
MEAN = "mean"


class DatasetSource(BaseModel):
    """Where a task's examples are.

    :param path: a Hub dataset id, a local file (Parquet, CSV, TSV, JSON lines), or a local folder with a file or an
        image folder for each split.
    :param name: the configuration of a Hub dataset, such as ``sst2`` of ``nyu-mll/glue``.
    :param revision: branch, tag or commit of a Hub dataset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    name: str | None = None
    revision: str | None = None


class Submission(BaseModel):
    """How the task's predictions are written for the GLUE leaderboard.

    :param file: the TSV file's name.
    :param labels: what stands for each label id; empty: the number itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    labels: tuple[str, ...] = ()


class Task(BaseModel):
    """One task: its data, its labels and how it is scored.

    :param name: what ``--tasks`` and the heads of a merged model call it.
    :param title: what people call it.
    :param kind: text-classification, text-regression or image-classification.
    :param dataset: where the examples are; may be left out when they come from ``--data``.
    :param text: one or two columns of text.
    :param image: the column of images.
    :param label: the column of labels.
    :param splits: the dataset's own name of a logical split (train, validation, test), where it differs.
    :param split: the split that is scored unless another is asked for.
    :param labels: names of the dataset's labels, in the order of their numbers; default: the dataset's ``ClassLabel``.
    :param aliases: other words that checkpoints use for a label.
    :param label_mapping: ``name`` matches a checkpoint's label names with the dataset's, ``index`` trusts their order.
    :param classes: names of the classes as a prompt has them, in the order of the labels (zero-shot heads).
    :param templates: prompts with ``{}`` for the class name (zero-shot heads).
    :param metrics: names of metrics; a name that is not built in is looked up by ``evaluate.load``.
    :param score: the metric that is the task's score, or ``mean`` of all; default: the first.
    :param max_length: tokens after which a text is cut.
    :param head: the head that answers the task when it is not called like the task (MNLI's for MNLI mismatched).
    :param folders: other names of its folder below ``--data``.
    :param submission: how the GLUE leaderboard wants the predictions.
    :param note: a trap to know about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(task_name)]
    title: str = ""
    kind: Literal["text-classification", "text-regression", "image-classification"]
    dataset: DatasetSource | None = None
    text: tuple[str, ...] = ()
    image: str = "image"
    label: str = "label"
    splits: dict[str, str] = Field(default_factory=dict)
    split: str = "test"
    labels: tuple[str, ...] = ()
    aliases: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    label_mapping: Literal["name", "index"] = "name"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    score: str = ""
    max_length: int | None = Field(default=128, gt=0)
    head: str = ""
    folders: tuple[str, ...] = ()
    submission: Submission | None = None
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        default_metric = "pearson" if data.get("kind") == REGRESSION else "accuracy"
        filled = {"title": data.get("name"), "head": data.get("name"), "metrics": [default_metric]}
        return filled | {key: value for key, value in data.items() if value is not None}

    @field_validator("text", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("labels", "classes", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        if any(isinstance(word, bool) for word in value):
            raise ValueError("YAML reads an unquoted yes, no, on or off as true or false: quote it")
        return tuple(str(word) if isinstance(word, int) else word for word in value)

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.kind == IMAGE and self.text:
            raise ValueError("text: an image-classification task has no text columns")
        if self.kind != IMAGE and len(self.text) not in (1, 2):
            raise ValueError("text: name one column of text, or two for pairs")
        if not self.metrics:
            raise ValueError("metrics: name at least one")
        if self.score not in ("", MEAN, *self.metrics):
            raise ValueError(f"score: '{self.score}' is none of the metrics ({', '.join(self.metrics)}) and not 'mean'")
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong:
            raise ValueError(f"templates: a prompt needs '{{}}' for the class name: {wrong[0]!r}")
        unknown = [name for name in self.splits if name not in LOGICAL_SPLITS]
        if unknown:
            raise ValueError(f"splits: '{unknown[0]}' is none of {', '.join(LOGICAL_SPLITS)}")
        return self

    @model_validator(mode="after")
    def _consistent_names(self) -> Task:
        for key in ("labels", "classes"):
            names = getattr(self, key)
            twice = [name for place, name in enumerate(names) if name in names[:place]]
            if twice:
                raise ValueError(f"{key}: '{twice[0]}' stands twice")
        strange = [name for name in self.aliases if self.labels and name not in self.labels]
        if strange:
            raise ValueError(f"aliases: '{strange[0]}' is none of the labels ({', '.join(self.labels)})")
        if self.classes and self.labels and len(self.classes) != len(self.labels):
            raise ValueError(f"classes: {len(self.classes)} names for {len(self.labels)} labels")
        return self

    @property
    def digest(self) -> str:
        """Return a name for exactly this declaration: results of two that differ cannot be compared."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def scored_by(self) -> str:
        """Return what the score is, for people: ``matthews``, or ``mean of accuracy and f1``."""
        chosen = self.score or self.metrics[0]
        return f"mean of {' and '.join(self.metrics)}" if chosen == MEAN and len(self.metrics) > 1 else chosen
