"""The card's metadata, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cart_hf import __version__
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.publishing.contents import Contents, Source
from cart_hf.publishing.loading import Adapter
from cart_hf.tasks import Task, find_tasks, known_among

HOMEPAGE = "https://github.com/cart-hf/cart-hf"
_PIPELINES = {
    "CLIPModel": "zero-shot-image-classification",
    "SequenceClassification": "text-classification",
    "ImageClassification": "image-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "CausalLM": "text-generation",
}
_METRIC_IDS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr", "f1_macro": "f1"}


def metadata(contents: Contents, title: str, licence: str | None) -> Any:
    """Return the ``ModelCardData`` of a model.

    :param title: what the model is called.
    :param licence: the licence, if the user names one; default: the one that all sources share.
    """
    ids = unique(source.hub_id for source in contents.sources if source.hub_id)
    return _card_data(
        contents,
        contents.sources,
        title,
        licence,
        **({"base_model": ids, "base_model_relation": "merge"} if ids else {}),
        library_name="transformers",
        pipeline_tag=_pipeline([contents.record["loader"], *(model.class_name for model in contents.models)]),
        tags=unique(
            [
                *("merge", "cart-hf", contents.record["method"]),
                *(["cart", "lora"] if contents.adapters else []),
                *(["test-time-adaptation"] if contents.adaptation else []),
            ]
        ),
    )


def adapter_metadata(adapter: Adapter, licence: str | None) -> Any:
    """Return the ``ModelCardData`` of an adapter, which comes from all the sources: the centre holds each of them.

    :param licence: as for :func:`metadata`.
    """
    # a base that is no Hub id would have the Hub refuse the card
    base = {"base_model": adapter.base_id, "base_model_relation": "adapter"} if adapter.base_id else {}
    return _card_data(
        adapter.contents,
        [source for source in adapter.contents.sources if source.name in ("base", adapter.task)],
        adapter.title,
        licence,
        **base,
        library_name="peft",
        pipeline_tag=_pipeline([adapter.class_name]),
        tags=["lora", "cart", "cart-hf"],
    )


def _card_data(contents: Contents, sources: Sequence[Source], title: str, licence: str | None, **keys: Any) -> Any:
    """Return the keys that are the same for models and adapters beside those that are not.

    :param sources: whose languages and data sets are named.
    """
    from huggingface_hub import ModelCardData

    origins = [source.origin for source in sources]
    results = eval_results(contents.results, keys["pipeline_tag"]) if contents.results else []
    return ModelCardData(
        **keys,
        **licence_keys(contents.ingredients, licence),
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


def _pipeline(classes: Sequence[str]) -> str | None:
    return next((tag for ending, tag in _PIPELINES.items() if any(name.endswith(ending) for name in classes)), None)
