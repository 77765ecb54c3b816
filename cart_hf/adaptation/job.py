"""The steps of an adaptation: merge, learn, merge again, describe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cart_hf.adaptation.answering import Answering, open_merged, own_answers
from cart_hf.adaptation.inputs import Inputs
from cart_hf.adaptation.learn import History, Lesson
from cart_hf.adaptation.learnable import Learnable
from cart_hf.adaptation.prepare import Preparation, learnable_groups, parameters_of
from cart_hf.adaptation.record import coefficients_of, record, write_history, write_learnt
from cart_hf.adaptation.request import static
from cart_hf.api import merge
from cart_hf.errors import UserError, telling
from cart_hf.factors import FactorStore, open_store
from cart_hf.output.record import ADAPTATION_FOLDER, COEFFICIENTS_FILE
from cart_hf.output.state import State
from cart_hf.parallel import Progress
from cart_hf.plan import Plan, lay_out
from cart_hf.plan.checks import TWO_MODELS
from cart_hf.plan.coefficients import Coefficients
from cart_hf.processes import Processes
from cart_hf.publishing.card import write_card
from cart_hf.recipe import Adaptation, Evaluation, Recipe

if TYPE_CHECKING:
    import torch

TermsPlace = Literal["disk", "device"]
STATE_FILE = "learning.pt"
_STATIC, _FACTORS, _TERMS, _LEARNT = "static", "factors", "terms", "learnt"


@dataclass(frozen=True)
class Adapted:
    """What an adaptation made.

    :param output: the output folder.
    :param plan: of the merge with the learnt coefficients.
    :param adaptation: the settings.
    :param inputs: of each task, how many inputs were learnt on.
    :param history: the losses.
    :param coefficients: what was learnt.
    :param seconds: wall time of each step.
    :param warnings: what the user should know of the merge.
    :param notes: why there are no figures, where there are none.
    """

    output: Path
    plan: Plan
    adaptation: Adaptation
    inputs: Mapping[str, int]
    history: History
    coefficients: Coefficients
    seconds: Mapping[str, float]
    warnings: Sequence[str]
    notes: Sequence[str]


@dataclass(frozen=True)
class Job:
    """An adaptation under way: what all its steps need."""

    recipe: Recipe
    adaptation: Adaptation
    evaluation: Evaluation
    plan: Plan
    inputs: Sequence[Inputs]
    target: Path
    processes: Processes
    workers: int
    terms: TermsPlace
    factors: Path | None
    progress: Progress | None

    def state(self) -> State:
        """What decides what is learnt."""
        about = {f"adapt.{name}": value for name, value in self.adaptation.model_dump().items()}
        for task, data in ((one.task, one.data) for one in self.inputs):
            head = self.evaluation.heads.get(task.name, task.head)
            about |= {
                f"inputs of {task.name}": data.fingerprint,
                f"head of {task.name}": head,
                f"declaration of {task.name}": task.digest,
            }
        execution = {"device": self.processes.device.type, "processes": self.processes.count, **about}
        return State.of(self.plan, lay_out(self.plan), self.target, execution)

    def carry_out(self, folder: Path, seconds: dict[str, float]) -> Adapted:
        """Fill the output folder; what lies beside it in the work folder goes with that."""
        work = folder.parent
        store = self._store(work)
        with timed("merge", seconds):
            self._merge_static(work, store)
        with timed("adapt", seconds):
            history, coefficients, fixed = self.processes.everywhere(lambda: self._learn(work, store))
        with timed("write", seconds):
            made = self._merge_learnt(folder, work, store, history, coefficients, fixed)
        notes = self.processes.by_main(lambda: self._describe(folder, history, made))
        warnings = [warning for warning in self.plan.warnings if warning != TWO_MODELS]  # whose terms no longer cancel
        counts = {one.task.name: len(one) for one in self.inputs}
        return Adapted(self.target, self.plan, self.adaptation, counts, history, made, seconds, warnings, notes)

    def _store(self, work: Path) -> FactorStore | None:
        if self.plan.method.of_factors is None:
            return None
        return open_store(self.factors or work / _FACTORS, self.adaptation.mask_ratio)

    def _merge_static(self, work: Path, store: FactorStore | None) -> None:
        if not (work / _STATIC).is_dir():  # an interrupted run may have made it
            kept = {"factors": store.folder, "factors_rank_ratio": self.adaptation.mask_ratio} if store else {}
            self._merge(static(self.recipe), work / _STATIC, kept, self.progress)

    def _merge(self, recipe: Recipe, output: Path, kept: Mapping[str, Any], progress: Progress | None) -> None:
        place = self.processes.device
        device = str(place) if self.processes.count == 1 or place.type == "cpu" else "auto"  # each its own GPU
        # what an interrupted run has merged already, but not described yet, is merged again
        options: dict[str, Any] = {
            "device": device,
            "workers": self.workers,
            "overwrite": True,
            "progress": progress,
        }
        merge(recipe, output=output, **options, **kept)

    @telling("cannot adapt")
    def _learn(self, work: Path, store: FactorStore | None) -> tuple[History, Coefficients, int]:
        base = str(self.recipe.base_model) if self.recipe.base_model is not None else None
        answering = open_merged(work / _STATIC, self.inputs, self.evaluation, base, self.processes.device)
        targets: Mapping[str, Any] = {}
        if self.adaptation.objective == "self-labels":
            targets = own_answers(self.recipe, self.inputs, self.evaluation, self.processes, self.progress)
        lesson = Lesson(
            answering, self.inputs, targets, self.adaptation, self.recipe.seed, self.processes, self.workers
        )
        parameters = lesson.reached(parameters_of(answering.module, self.plan))
        if not learnable_groups(self.plan, parameters):
            raise UserError("nothing to learn: no tensor that the tasks' outputs depend on has coefficients")
        preparation = Preparation(
            self.plan,
            parameters,
            work / _TERMS if self.terms == "disk" else None,
            store,
            self.adaptation.mask_ratio,
            self.processes.device,
            self.workers,
        )
        terms = preparation.everywhere(self.processes, self.progress)
        masks = self.adaptation.mask_ratio is not None
        heads = self._heads(answering)
        weights = [weight for head in heads.values() for weight in head.values()]
        learnable = Learnable(self.plan, terms, self.adaptation.granularity, masks=masks, heads=weights)
        history = lesson.learn(terms, learnable, self.progress, work / STATE_FILE)
        coefficients = coefficients_of(self.plan, terms, learnable, heads)
        with_coefficients = [group for group in self.plan.groups() if self.plan.own_coefficients(group) is not None]
        return history, coefficients, len(with_coefficients) - len(terms)

    def _heads(self, answering: Answering) -> Mapping[str, Mapping[str, torch.nn.Parameter]]:
        """Return the weights of the heads that are learnt, by task; none where heads stay as they are.

        :raises UserError: when there are none to learn.
        """
        if self.adaptation.head_lr is None:
            return {}
        if not answering.head_weights:
            raise UserError(
                "--head-lr: zero-shot heads are made from class names, there is nothing to learn; leave it out"
            )
        for weights in answering.head_weights.values():
            for weight in weights.values():
                weight.requires_grad_(True)
        return answering.head_weights

    def _merge_learnt(
        self,
        folder: Path,
        work: Path,
        store: FactorStore | None,
        history: History,
        coefficients: Coefficients,
        fixed: int,
    ) -> Coefficients:
        """Merge with what was learnt, as `cart-hf merge` on the output's recipe would."""
        told = record(self.adaptation, self.recipe.seed, self.inputs, history, coefficients, fixed)
        learnt = work / _LEARNT
        made = self.processes.by_main(lambda: write_learnt(learnt, coefficients, told, self.inputs))
        recipe = self.recipe.model_copy(update={"coefficients": str(learnt / COEFFICIENTS_FILE)})
        # factors of another rank may differ in their last digits from those that a merge of the output's recipe finds
        shared = store is not None and (self.factors is not None or self.adaptation.mask_ratio is None)
        kept = {"factors": store.folder} if store is not None and shared else {}
        self._merge(recipe, folder, kept, _once_more(self.progress))
        return made

    @telling("cannot write the output")
    def _describe(self, folder: Path, history: History, coefficients: Coefficients) -> list[str]:
        notes = write_history(folder / ADAPTATION_FOLDER, self.plan, self.adaptation, history, coefficients)
        write_card(folder, self.target.name)
        return notes


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a step took."""
    started = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - started


def _once_more(progress: Progress | None) -> Progress | None:
    """Return what reports the steps of a second merge by names of their own: the first one's are done."""
    if progress is None:
        return None

    def again(step: str, advance: int, total: int) -> None:
        progress(f"{step} with what was learnt", advance, total)

    return again
