"""The losses while the coefficients were learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cart_hf.errors import UserError
from cart_hf.figures.canvas import new_figure
from cart_hf.figures.style import add_legend, line_of, number, without_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"entropy": "entropy of the predictions", "self-labels": "loss against the models' own predictions"}
_LONG = 60  # steps: longer curves are smoothed
_FEW = 8  # tasks: of more the single steps hide each other


def curves(
    losses: Mapping[str, Sequence[float]], paths: Sequence[Path], *, objective: str, first_step: int = 0
) -> None:
    """Draw each task's loss over the steps, and their mean.

    Long curves are smoothed; how the losses of single steps scatter stays visible, faintly, where the tasks are few.

    :param losses: by task, the loss of every step; NaN where a step had none.
    :param paths: the files to write, in the format of their suffix (``.png``, ``.svg``).
    :param objective: what the loss is: ``entropy``, ``self-labels``, or other words.
    :param first_step: the number of the first step.
    :raises UserError: when matplotlib is not installed, or there is nothing to draw.
    """
    lines = [(task, [number(value) for value in values]) for task, values in losses.items()]
    if all(math.isnan(value) for _, values in lines for value in values):
        raise UserError("no plot: there is no loss to draw")
    count = max(len(values) for _, values in lines)
    reach = count // 40 if count >= _LONG else 0
    with new_figure(7.0, max(4.0, 0.25 * len(lines) + 0.5), paths) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_axes((0, 0, 1, 1))
        for place, (task, values) in enumerate(lines):
            if reach and len(lines) <= _FEW:
                _draw_line(axes, values, first_step, color=line_of(place)["color"], linewidth=0.5, alpha=0.22)
            _draw_line(axes, _smooth(values, reach), first_step, **line_of(place), linewidth=1.5, label=task)
        if len(lines) > 1:
            means = [_mean([values[step] for _, values in lines if step < len(values)]) for step in range(count)]
            _draw_line(axes, _smooth(means, reach), first_step, color="#111111", linewidth=2.8, label="mean")
        low, high = axes.get_ylim()
        if 0 < low < 0.3 * high:
            axes.set_ylim(0, high)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        axes.set_ylabel(_LABELS.get(objective, objective))
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        without_frame(axes)
        add_legend(figure, axes)


def _draw_line(axes: Axes, values: Sequence[float], first: int, **style: Any) -> None:
    axes.plot(range(first, first + len(values)), values, **style, marker="o" if len(values) == 1 else "")


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and as many before and after it, fewer at the ends."""
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
