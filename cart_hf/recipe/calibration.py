"""On which examples `regmean` and `fisher` look at the models: the recipe's `calibration:` key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.recipe import Recipe

Labels = Literal["exact", "sampled"]


class Calibration(BaseModel):
    """Which examples of the tasks that ``evaluation`` names, and how the Fisher information is estimated on them.

    :param split: the split whose inputs the models read; labels are not looked at.
    :param limit: at most so many examples of each task, spread evenly over the split.
    :param labels: ``exact`` takes the expectation over all labels, with their probabilities; ``sampled`` draws one
        label for each example (seeded by the recipe's ``seed``). Default: exact for up to 64 labels. For ``fisher``
        only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    split: str = "train"
    limit: int = Field(default=256, gt=0)
    labels: Labels | None = None


def check_examples(recipe: Recipe) -> None:
    """Refuse a method that looks at the models at work, where the recipe does not say on what.

    :raises UserError: saying what to write.
    """
    if recipe.evaluation is None:
        raise UserError(
            f"{recipe.merge_method} looks at what the models do with examples of their own tasks: say in a recipe "
            "which, evaluation: {tasks: [...], data: FOLDER}, the models called like the tasks; labels are not used"
        )
