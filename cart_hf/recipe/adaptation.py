"""How `cart-hf adapt` learns merge coefficients on unlabelled inputs: the recipe's `adapt:` key."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Objective = Literal["entropy", "self-labels"]
Granularity = Literal["task", "layer", "tensor"]
Optimizer = Literal["adam", "adamw", "sgd"]


class Adaptation(BaseModel):
    """What is learnt, and how. The defaults are AdaMerging's (layer-wise; Yang et al., arXiv 2310.02575).

    :param objective: ``entropy`` of the predictions, or ``self-labels``: the cross-entropy with what each task's own
        fine-tuned model predicts (for a regression the squared difference), as SyMerge has it.
    :param granularity: a coefficient for each ``task``, for each task and ``layer`` (block), or for each task and
        ``tensor``, which AdaMerging calls layer-wise.
    :param steps: updates of the coefficients; 0 leaves them as the method has them.
    :param lr: learning rate.
    :param batch_size: inputs of each task in a step.
    :param optimizer: ``adam``, ``adamw`` or ``sgd``.
    :param init: the scale to begin with; default: the recipe's own.
    :param mask_ratio: also learn which singular directions of each task are kept, among the first of them, this share
        of the smaller dimension (AdaRank, arXiv 2503.22178; ``cart`` only).
    :param head_lr: also learn each task's head, at this rate, from self-labels (after SyMerge, which learns one layer
        of each task); default: heads stay as they are.
    :param split: the split whose inputs are used; default: the one that is scored.
    :param limit: at most so many inputs of each task.
    :param held_out: share of the inputs that is left out, to be scored.
    :param patience: stop when the objective has not got better in so many windows of steps, and keep the best window's
        coefficients; default: all steps, and the last step's.
    :param dtype: ``bfloat16`` runs the model under autocast; the coefficients stay float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Objective = "entropy"
    granularity: Granularity = "tensor"
    steps: int = Field(default=500, ge=0)
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=16, gt=0)
    optimizer: Optimizer = "adam"
    init: float | None = Field(default=None, allow_inf_nan=False)
    mask_ratio: float | None = Field(default=None, gt=0, le=1)
    head_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    split: str | None = None
    limit: int | None = Field(default=None, gt=0)
    held_out: float = Field(default=0.0, ge=0, lt=1)
    patience: int | None = Field(default=None, gt=0)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _heads_need_teachers(self) -> Adaptation:
        if self.head_lr is not None and self.objective == "entropy":
            raise ValueError("head_lr: a head makes any prediction sure; heads are learnt from self-labels (objective)")
        return self
