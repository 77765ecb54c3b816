"""`cart_hf.evaluate`: a model and a list of tasks become results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cart_hf.errors import UserError, did_you_mean
from cart_hf.evaluation.individual import score_individuals
from cart_hf.evaluation.model import Located, base_of, declared_evaluation, individual_models, locate
from cart_hf.evaluation.results import Results, TaskResult
from cart_hf.evaluation.run import Outcome, reader, run_tasks
from cart_hf.evaluation.submission import GLUE_SUITE, Submission
from cart_hf.parallel import Progress
from cart_hf.processes import Processes, join
from cart_hf.recipe import Evaluation, Reference
from cart_hf.serving.multitask import MultiTaskModel
from cart_hf.tasks import Task, find_tasks, known_among


def evaluate(
    model: str | Path | MultiTaskModel,
    evaluation: Evaluation | None = None,
    *,
    base: str | None = None,
    normalize: bool = False,
    device: str = "auto",
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    submission: str | Path | None = None,
    progress: Progress | None = None,
    **flags: Any,
) -> Results:
    """Measure a model on tasks.

    Under ``torchrun`` or ``accelerate launch`` the examples are shared out, and every process returns all results.

    :param model: a merged or compressed folder, a classification checkpoint or a CLIP: a folder, a Hub id or
        ``id@revision``; or a :class:`cart_hf.MultiTaskModel` (which is moved to the device).
    :param evaluation: which tasks, on which data, how; or leave it out and give its fields as arguments
        (``suite="glue"``, ``tasks=["sst2"]``, ``data=DIR``, ``limit=100`` ...).
    :param base: the pretrained model; a CLIP vision tower borrows its text tower. Default: what the merge was made of.
    :param normalize: also score the individual models that a merged folder was made from (cached by their weights).
    :param device: ``auto``, ``cpu``, ``cuda`` ...
    :param output: file for the results; written after each task.
    :param resume: take over the finished tasks of ``output``.
    :param overwrite: replace ``output``.
    :param submission: zip file for the GLUE leaderboard: predictions instead of scores; of the test split by default.
    :param progress: called with (step, advance, total) in each process.
    :raises UserError: when nothing can be evaluated. A task that fails is in ``results.errors`` and stops no other.
    """
    if evaluation is not None and any(value is not None for value in flags.values()):
        raise UserError("give an Evaluation or its fields, not both")
    evaluation = evaluation or Evaluation.from_flags(flags)
    target = Path(output).expanduser() if output is not None else None
    earlier = _earlier(target, resume=resume, overwrite=overwrite)
    sheets = Submission(Path(submission).expanduser(), overwrite=overwrite) if submission is not None else None
    processes = join(device)
    located = locate(model, base=base)
    base = base or base_of(located)
    evaluation = _as_merged(evaluation, located, for_submission=sheets is not None)
    tasks = _tasks(evaluation, located, for_submission=sheets is not None)
    _check(evaluation, tasks, located, normalize=normalize, for_submission=sheets is not None)
    read = reader(evaluation, labelled=sheets is None)
    results = Results(
        str(located.reference),
        located.commit,
        evaluation.suite,
        evaluation.split,
        {},
        environment=_environment(processes, evaluation),
    )
    done: dict[str, TaskResult] = {}
    errors: dict[str, str] = {}

    def update(**changes: Any) -> Results:
        # a run that is killed must not have lost what an earlier one finished and this one has not reached
        unreached = {name: result for name, result in earlier.items() if name not in errors}
        shown = done if changes else unreached | done
        found = replace(results, tasks=_in_order(shown, tasks), errors=_in_order(errors, tasks), **changes)
        if target is not None and processes.is_main:
            found.save(target)
        return found

    def report(name: str, outcome: Outcome) -> None:
        if outcome.error is not None:
            errors[name] = outcome.error
        elif outcome.result is not None:
            done[name] = outcome.result
        if sheets is not None and outcome.predictions is not None and outcome.data is not None:
            sheets.add(outcome.data, outcome.predictions)
        update()

    def known(task: Task, settings: Mapping[str, Any]) -> TaskResult | None:
        found = earlier.get(task.name) if sheets is None else None
        return found if found is not None and found.settings == settings else None

    run_tasks(
        located,
        tasks,
        evaluation,
        base=base,
        processes=processes,
        report=report,
        known=known,
        read=read,
        progress=progress,
    )
    if sheets is not None and processes.is_main:
        sheets.write()
    alone = _individual(located, tasks, done, errors, evaluation, base, processes, progress) if normalize else {}
    return update(individual=alone)


def _individual(
    located: Located,
    tasks: Sequence[Task],
    done: Mapping[str, TaskResult],
    errors: dict[str, str],
    evaluation: Evaluation,
    base: str | None,
    processes: Processes,
    progress: Progress | None,
) -> dict[str, float]:
    scores: dict[str, float] = {}

    def report(name: str, outcome: Outcome) -> None:
        if outcome.result is not None:
            scores[name] = outcome.result.score
        else:
            errors[name] = f"individual model: {outcome.error}"

    score_individuals(
        individual_models(located),
        [task for task in tasks if task.name in done],
        evaluation,
        base=base,
        processes=processes,
        report=report,
        progress=progress,
    )
    return scores


def _as_merged(evaluation: Evaluation, located: Located, *, for_submission: bool) -> Evaluation:
    """Where no task is named, return what the merge's recipe declares, changed by what is asked for.

    A submission is of the test split, unless another is asked for.
    """
    declared = declared_evaluation(located)
    if declared is not None and not evaluation.suite and not evaluation.tasks:
        evaluation = declared.model_copy(update={key: getattr(evaluation, key) for key in evaluation.model_fields_set})
    if for_submission and evaluation.split is None:
        return evaluation.model_copy(update={"split": "test"})
    return evaluation


def _tasks(evaluation: Evaluation, located: Located, *, for_submission: bool) -> list[Task]:
    """Return the tasks asked for; by default those that the model's heads are called after."""
    if evaluation.suite or evaluation.tasks:
        return find_tasks(evaluation.tasks, suite=evaluation.suite, tasks_file=evaluation.tasks_file)
    if for_submission:
        return find_tasks(suite=GLUE_SUITE)
    if evaluation.tasks_file is not None and located.kind != "merged":
        return find_tasks(tasks_file=evaluation.tasks_file)
    names = known_among(located.heads, evaluation.tasks_file)
    if not names:
        raise UserError("which tasks? give --suite or --tasks (`cart-hf tasks` lists them), or a --tasks-file")
    return find_tasks(names, tasks_file=evaluation.tasks_file)


def _check(
    evaluation: Evaluation, tasks: Sequence[Task], located: Located, *, normalize: bool, for_submission: bool
) -> None:
    """Refuse what cannot be done before anything is."""
    names = [task.name for task in tasks]
    unknown = [name for name in evaluation.heads if name not in names]
    if unknown:
        raise UserError(f"--heads {unknown[0]}: no such task here{did_you_mean(unknown[0], names)}")
    if normalize and not individual_models(located):
        raise UserError(f"--normalize: {located.reference} is not a merge (no cart_hf.yaml names its models)")
    if for_submission and evaluation.limit is not None:
        raise UserError("--submission: the leaderboard wants every example; leave --limit out")
    if for_submission and evaluation.unseen_by is not None:
        raise UserError("--submission: the leaderboard wants every example; leave --unseen-by out")
    others = [task.name for task in tasks if task.submission is None]
    if for_submission and others:
        raise UserError(f"--submission: task '{others[0]}' is not on the GLUE leaderboard")


def _earlier(target: Path | None, *, resume: bool, overwrite: bool) -> dict[str, TaskResult]:
    if target is None:
        if resume:
            raise UserError("--resume goes on with the file of --output: name it")
        return {}
    if not target.exists():
        return {}
    if resume:
        return dict(Results.load(target).tasks)
    if not overwrite:
        raise UserError(f"{target} exists; --resume goes on with it, --overwrite replaces it")
    Results.load(target)  # only what we wrote is replaced
    return {}


def _environment(processes: Processes, evaluation: Evaluation) -> dict[str, Any]:
    import torch

    from cart_hf.output.record import versions

    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": processes.count,
        "dtype": evaluation.dtype,
        "batch_size": evaluation.batch_size,
        "limit": evaluation.limit,
        **({"unseen_by": _named(evaluation.unseen_by)} if evaluation.unseen_by is not None else {}),
        "versions": versions(),
    }


def _named(model: str) -> str:
    """Return the name of a model's folder without its path, which says something of the machine, or its Hub id."""
    reference = Reference.parse(model)
    return Path(reference.path).resolve().name if reference.is_local else str(reference)


def _in_order(found: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    return {task.name: found[task.name] for task in tasks if task.name in found}
