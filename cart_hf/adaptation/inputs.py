"""The unlabelled inputs: which rows are learnt on, which are held out, and which make a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cart_hf.errors import UserError
from cart_hf.recipe import Adaptation, Evaluation
from cart_hf.tasks import Task, TaskData, load_split


@dataclass(frozen=True)
class Inputs:
    """The inputs of one task.

    :param task: whose they are.
    :param data: the rows; their labels are not looked at.
    :param held_out: how many rows of the split were left out, to be scored.
    """

    task: Task
    data: TaskData
    held_out: int

    def __len__(self) -> int:
        return len(self.data)

    def hashes(self) -> np.ndarray:
        """Return what each input is recognised by, int64, sorted, without duplicates."""
        return np.unique(self.data.input_hashes())

    def batches(self, first: int, stop: int, size: int, seed: int) -> Iterator[list[int]]:
        """Yield the rows of batches ``first`` to ``stop``: each row once in random order, then all in another order.

        Which rows a batch has depends on its number alone, so that an interrupted run goes on as if it had not been.
        """
        size = min(size, len(self))
        orders: dict[int, np.ndarray] = {}
        for batch in range(first, stop):
            places = range(batch * size, (batch + 1) * size)
            for epoch in {place // len(self) for place in places} - orders.keys():
                orders[epoch] = self._order(seed, epoch)
            yield [int(orders[place // len(self)][place % len(self)]) for place in places]
            orders = {epoch: order for epoch, order in orders.items() if epoch >= places[-1] // len(self)}

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        words = f"{seed}|{self.task.name}|{epoch}".encode()
        entropy = int.from_bytes(hashlib.sha256(words).digest()[:8], "little")
        return np.asarray(np.random.default_rng(entropy).permutation(len(self)))


def read_inputs(task: Task, evaluation: Evaluation, adaptation: Adaptation) -> Inputs:
    """Read the inputs of a task, and hold some out.

    Which ones is decided by a hash of each input: the same text or image never stands on both sides.

    :raises UserError: when there are none, or they cannot be read.
    """
    held_out = 0

    def keep(hashes: np.ndarray) -> np.ndarray:
        nonlocal held_out
        kept: np.ndarray = hashes.view(np.uint64) >= np.uint64(int(adaptation.held_out * 2**64))
        held_out = int((~kept).sum())
        if not kept.any():
            raise UserError(
                f"task '{task.name}': --held-out {adaptation.held_out:g} leaves none of its {len(hashes)} inputs to "
                "learn from; hold out fewer"
            )
        return kept

    data = load_split(
        task,
        adaptation.split or evaluation.split,
        data=evaluation.data,
        limit=adaptation.limit,
        stream=evaluation.stream,
        labelled=False,
        keep=keep if adaptation.held_out else None,
    )
    return Inputs(task, data, held_out)
