"""The card's metadata, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cart_hf import __version__
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.publishing.contents import Contents, Source
from cart_hf.tasks import Task, find_tasks, known_among

HOMEPAGE = "https://github.com/cart-hf/cart-hf"
_PIPELINES = {"SequenceClassification": "text-classification", "ImageClassification": "image-classification"}
_METRIC_IDS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr", "f1_macro": "f1"}


def metadata(contents: Contents, title: str, licence: str | None) -> Any:
    """Return the card's ``ModelCardData``.

    :param title: what the model is called.
    :param licence: the licence, if the user names one; default: the one that all sources share.
    """
    from huggingface_hub import ModelCardData

    ids = unique(source.hub_id for source in contents.sources if source.hub_id)
    origins = [source.origin for source in contents.sources]
    results = eval_results(contents.results, _pipeline(contents)) if contents.results else []
    return ModelCardData(
        **({"base_model": ids, "base_model_relation": "merge"} if ids else {}),
        library_name="transformers",
        pipeline_tag=_pipeline(contents),
        tags=unique(["merge", "cart-hf", contents.record["method"]]),
        **licence_keys(contents.sources, licence),
        datasets=unique(name for origin in origins for name in origin.datasets) or None,
        language=unique(name for origin in origins for name in origin.language) or None,
        metrics=unique(result.metric_type for result in results) or None,
        **({"model_name": title.rpartition("/")[2], "eval_results": results} if results else {}),
    )


def licence_keys(sources: Sequence[Source], licence: str | None) -> dict[str, str]:
    """Return the licence's keys: what the user says, what all sources share, or ``other`` when some are known."""
    if licence is not None:
        return {"license": licence}
    found = {(s.origin.license, s.origin.license_name, s.origin.license_link) for s in sources}
    if len(found) == 1:
        keys = zip(("license", "license_name", "license_link"), found.pop(), strict=True)
        return {key: value for key, value in keys if value is not None}
    return {"license": "other", "license_name": "those-of-the-merged-models"}


def licence_of(source: Source) -> str:
    """Return a source's licence for people."""
    origin = source.origin
    return (origin.license_name if origin.license == "other" else origin.license) or origin.license or "unknown"


def eval_results(results: Results, pipeline: str | None) -> list[Any]:
    """Return each metric of each task, as fractions, for the card's ``model-index``."""
    from huggingface_hub import EvalResult

    found = []
    for name, result in results.tasks.items():
        task = declaration(name, result)
        dataset = task.dataset if task is not None else None
        for metric, value in result.metrics.items():
            found.append(
                EvalResult(
                    task_type=(task.kind if task is not None else pipeline) or "other",
                    dataset_type=dataset.path if dataset is not None else name,
                    dataset_name=task.title if task is not None else name,
                    dataset_config=dataset.name if dataset is not None else None,
                    dataset_split=result.settings.get("split"),
                    dataset_revision=dataset.revision if dataset is not None else None,
                    metric_type=_METRIC_IDS.get(metric, metric),
                    metric_name=metric,
                    metric_value=float(value),
                    source_name=f"cart-hf {__version__}",
                    source_url=HOMEPAGE,
                )
            )
    return found


def declaration(name: str, result: TaskResult) -> Task | None:
    """Return the built-in task that a result is of; None for a user's own, which may have the same name."""
    if not known_among([name]):
        return None
    task = find_tasks([name])[0]
    return task if result.settings.get("task") == task.digest else None


def unique(names: Iterable[str]) -> list[str]:
    """Return names once each, in order."""
    return list(dict.fromkeys(names))


def _pipeline(contents: Contents) -> str | None:
    if contents.record["loader"] == "CLIPModel":
        return "zero-shot-image-classification"
    endings: Mapping[str, str] = _PIPELINES
    names = [model.class_name for model in contents.models]
    return next((tag for ending, tag in endings.items() if any(name.endswith(ending) for name in names)), None)
