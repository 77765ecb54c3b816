"""The loop: form the weights, ask the model, find the slopes, change the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cart_hf.adaptation.answering import Answering
from cart_hf.adaptation.inputs import Inputs
from cart_hf.adaptation.learnable import Learnable
from cart_hf.adaptation.objective import losses
from cart_hf.adaptation.terms import Slopes, Terms
from cart_hf.errors import UserError
from cart_hf.evaluation.batches import Batch, batches
from cart_hf.evaluation.prediction import autocast, on_device
from cart_hf.parallel import Progress, cores, in_parallel, one_blas_thread
from cart_hf.processes import Processes
from cart_hf.recipe import Adaptation

Result = TypeVar("Result")

WINDOW = 25  # steps whose mean loss is compared when stopping early
_SAVED_EVERY = 25  # steps


@dataclass(frozen=True)
class History:
    """What happened.

    :param losses: the loss of each task at every step, before the step's update.
    :param stopped_early: whether it stopped before the last step.
    """

    losses: Mapping[str, Sequence[float]]
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        """How many updates there were."""
        return len(next(iter(self.losses.values()), ()))

    @property
    def total(self) -> list[float]:
        """The objective at every step: the sum over tasks."""
        return [sum(step) for step in zip(*self.losses.values(), strict=True)]


def ends(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean loss of the first steps and of the last: of a window each, of half of all where they are few."""
    if not losses:
        return None
    count = max(1, min(WINDOW, len(losses) // 2))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


@dataclass
class _Progressing:
    """What an interrupted run goes on with."""

    losses: dict[str, list[float]]
    best: float = float("inf")
    best_state: list[torch.Tensor] | None = None
    since_best: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Lesson:
    """What is learnt from, and how.

    :param answering: the merged model.
    :param inputs: the unlabelled inputs of each task.
    :param targets: for each task the logits of its own model; empty: entropy.
    :param adaptation: the settings.
    :param seed: decides which inputs come when.
    :param processes: who shares each batch.
    :param workers: threads that form weights.
    """

    answering: Answering
    inputs: Sequence[Inputs]
    targets: Mapping[str, torch.Tensor]
    adaptation: Adaptation
    seed: int
    processes: Processes
    workers: int

    def learn(
        self, terms: Sequence[Terms], learnable: Learnable, progress: Progress | None = None, saved: Path | None = None
    ) -> History:
        """Learn; the last step's coefficients are left in ``learnable``, or those of the best window.

        :param terms: what the weights are formed from.
        :param saved: file that keeps the state now and then, and from which an interrupted run goes on.
        :raises UserError: when a loss is not finite.
        """
        optimizer = _optimizer(self.adaptation, learnable)
        now = _Progressing({one.task.name: [] for one in self.inputs})
        if saved is not None and saved.is_file():
            now = _restored(saved, learnable, optimizer)
        first = len(next(iter(now.losses.values())))
        supplies = [self._supply(one, first) for one in self.inputs]
        for step in range(first, self.adaptation.steps):
            if now.finished:
                break
            self.form(terms, learnable)
            found = self._step(terms, learnable, supplies, step)
            for task, loss in found.items():
                now.losses[task].append(loss)
            optimizer.step()
            _note_window(now, learnable, self.adaptation.patience)
            if saved is not None and self.processes.is_main and (step + 1) % _SAVED_EVERY == 0:
                _save(saved, now, learnable, optimizer)
            if progress is not None:
                progress("adapting", 1, self.adaptation.steps - first)
        if now.best_state is not None:
            learnable.restore(now.best_state)
        history = History(now.losses)
        return History(now.losses, history.steps < self.adaptation.steps)

    def form(self, terms: Sequence[Terms], learnable: Learnable) -> None:
        """Write the weights, as the coefficients say, into the model."""
        self._for_each(terms, lambda term: term.form(learnable.learnt(term.group)))

    def gradients(self, terms: Sequence[Terms], learnable: Learnable) -> None:
        """Turn the gradients of the model's weights into those of what is learnt; the former are then gone."""
        learnable.clear()

        def slopes(term: Terms) -> tuple[Terms, Slopes]:
            return term, term.slopes(learnable.learnt(term.group))

        found = {id(term): slope for term, slope in self._for_each(terms, slopes)}
        for term in terms:  # in their order, whichever was ready first: sums depend on it
            learnable.add(term.group, found[id(term)])
        self.answering.module.zero_grad(set_to_none=True)

    def reached(self, weights: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
        """Return the weights that some task's loss depends on; only these need gradients from now on."""
        found: set[str] = set()
        for weight in weights.values():
            weight.requires_grad_(True)
        for one in self.inputs:
            rows = next(one.batches(0, 1, 2, self.seed))
            (batch,) = batches(one.data, [rows], self.answering.model.preprocess)
            slopes = torch.autograd.grad(self.loss(one, batch, 1), list(weights.values()), allow_unused=True)
            found |= {name for name, slope in zip(weights, slopes, strict=True) if slope is not None}
        for name, weight in weights.items():
            weight.requires_grad_(name in found)
        return {name: weight for name, weight in weights.items() if name in found}

    def _for_each(self, terms: Sequence[Terms], work: Callable[[Terms], Result]) -> list[Result]:
        if self.processes.device.type != "cpu":
            return [work(term) for term in terms]
        with one_blas_thread():
            return list(in_parallel(work, terms, self.workers))

    def _supply(self, one: Inputs, first: int) -> Iterator[tuple[int, Batch | None]]:
        """Yield this process's part of every batch of a task, and the size of the whole batch."""
        rank, count = self.processes.rank, self.processes.count
        whole = list(one.batches(first, self.adaptation.steps, self.adaptation.batch_size, self.seed))
        mine = [rows[rank::count] for rows in whole]
        model = self.answering.model
        on_gpu = self.processes.device.type != "cpu"
        workers = min(4, cores() // count) if model.modality == "image" and on_gpu else 0
        ready = batches(one.data, [rows for rows in mine if rows], model.preprocess, workers=workers)
        for rows, part in zip(whole, mine, strict=True):
            yield len(rows), next(ready) if part else None

    def _step(
        self,
        terms: Sequence[Terms],
        learnable: Learnable,
        supplies: Sequence[Iterator[tuple[int, Batch | None]]],
        step: int,
    ) -> dict[str, float]:
        """Find the gradients of what is learnt, in every process those of all; return the loss of each task."""
        own: dict[str, float] = {}
        for head in learnable.heads:
            head.grad = None
        for one, supply in zip(self.inputs, supplies, strict=True):
            size, batch = next(supply)
            loss = None if batch is None else self.loss(one, batch, size)
            own[one.task.name] = 0.0 if loss is None else float(loss.detach())
            if loss is not None and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        self.gradients(terms, learnable)
        shares = self.processes.gather((own, learnable.gradients()))
        for place, parameter in enumerate(learnable.parameters):
            parameter.grad = torch.stack([gradients[place] for _, gradients in shares]).sum(dim=0).to(parameter.device)
        found = {task: sum(losses[task] for losses, _ in shares) for task in own}
        broken = [task for task, loss in found.items() if not torch.isfinite(torch.tensor(loss))]
        if broken:
            raise UserError(
                f"task '{broken[0]}': the loss is not finite at step {step + 1}: the learning rate may be too high "
                "(--lr), or the model's own outputs are broken"
            )
        return found

    def loss(self, one: Inputs, batch: Batch, size: int) -> torch.Tensor:
        """Return the sum of a batch's losses, divided by ``size``; inputs that cannot be decoded do not count."""
        device, task = self.processes.device, one.task.name
        with autocast(device, self.adaptation.dtype):
            logits = self.answering.model.logits([self.answering.heads[task]], on_device(device, batch))
        found = logits[self.answering.heads[task]].float()
        whole = [place for place, row in enumerate(batch.rows) if row not in batch.broken]
        rows = [batch.rows[place] for place in whole]
        return losses(task, found[whole], rows, self.targets).sum() / size


def _optimizer(adaptation: Adaptation, learnable: Learnable) -> torch.optim.Optimizer:
    groups = [{"params": learnable.coefficients}]
    if learnable.heads:
        groups.append({"params": learnable.heads, "lr": adaptation.head_lr})  # type: ignore[dict-item]
    if adaptation.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=adaptation.lr)
    kind = torch.optim.AdamW if adaptation.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=adaptation.lr)


def _note_window(now: _Progressing, learnable: Learnable, patience: int | None) -> None:
    """At the end of a window, remember the best one's coefficients, and stop when nothing gets better."""
    history = History(now.losses)
    if patience is None or history.steps % WINDOW:
        return
    loss = sum(history.total[-WINDOW:]) / WINDOW
    if loss < now.best:
        now.best, now.best_state, now.since_best = loss, learnable.state(), 0
    else:
        now.since_best += 1
        now.finished = now.since_best >= patience


def _save(path: Path, now: _Progressing, learnable: Learnable, optimizer: torch.optim.Optimizer) -> None:
    draft = path.with_name(f".{path.name}")
    state = {"now": vars(now), "learnt": learnable.state(), "optimizer": optimizer.state_dict()}
    torch.save(state, draft)
    draft.replace(path)


def _restored(path: Path, learnable: Learnable, optimizer: torch.optim.Optimizer) -> _Progressing:
    state = torch.load(path, weights_only=True)
    learnable.restore(state["learnt"])
    optimizer.load_state_dict(state["optimizer"])
    return _Progressing(**state["now"])
