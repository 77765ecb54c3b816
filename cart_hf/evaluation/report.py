"""A model's results as a table."""

from __future__ import annotations

from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.tables import Table


def as_table(results: Results) -> Table:
    """Return one row for each task and one for the average, scores in percent."""
    normalised = bool(results.individual)
    adapted = any(result.adapted_on for result in results.tasks.values())
    header = ["task", "score", *(["individual", "normalised"] if normalised else [])]
    header += ["examples", *(["adapted on"] if adapted else []), "seconds", "metrics"]
    rows = []
    for name, result in results.tasks.items():
        alone = results.individual.get(name)
        extra = [percent(alone), percent(result.score / alone if alone else None)] if normalised else []
        examples = [str(result.examples), *([f"{result.adapted_on} of {result.examples}"] if adapted else [])]
        rows.append([name, percent(result.score), *extra, *examples, f"{result.seconds:.1f}", _words(result)])
    known = [results.individual[name] for name in results.tasks if name in results.individual]
    alone = sum(known) / len(known) if known and len(known) == len(results.tasks) else None
    extra = [percent(alone), percent(results.normalized)] if normalised else []
    rows.append(["average", percent(results.average), *extra, "", *([""] if adapted else []), "", ""])
    return Table(header, rows, words=1)


def percent(value: float | None) -> str:
    """Return a fraction as percent, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def _words(result: TaskResult) -> str:
    several = ", ".join(f"{name} {percent(value)}" for name, value in result.metrics.items())
    return several if len(result.metrics) > 1 else result.metric


def conventions(results: Results) -> str | None:
    """Say both averages where they differ: papers report accuracy or the mean of metrics for MRPC, QQP and STS-B."""
    if not any(result.metric.startswith("mean of") for result in results.tasks.values()):
        return None
    return (
        f"average {percent(results.average)} takes the mean of a task's metrics; "
        f"with each task's first metric it is {percent(results.first_metric_average)}"
    )


def transductive(results: Results) -> str | None:
    """Say how many of the scored examples the model was adapted on; None when there are none."""
    seen = sum(result.adapted_on for result in results.tasks.values())
    examples = sum(result.examples for result in results.tasks.values())
    if not seen:
        return None
    if seen == examples:
        return f"transductive: all {examples} examples were among the inputs the model was adapted on"
    return (
        f"transductive: {seen} of {examples} examples were among the inputs the model was adapted on; "
        "`--unseen-by FOLDER` scores the others"
    )
