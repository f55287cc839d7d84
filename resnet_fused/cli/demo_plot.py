"""The demo's plot: loss curves, time per step and memory of the eager and the fused network."""

import pathlib
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Told apart without colour too: the eager curve is broad and pale, the fused one thin and dark upon it.
COLORS = {"eager": "#e69f00", "fused": "#0b4f8a"}
WIDTHS = {"eager": 4.5, "fused": 1.3}


class Drawn(NamedTuple):
    """What is drawn of a network: the loss of each step, the median milliseconds of a step, MB saved for an image."""

    name: str
    accuracy: float
    losses: list[float]
    milliseconds: float
    megabytes: float


def write(path: pathlib.Path, title: str, runs: tuple[Drawn, Drawn]) -> None:
    """Writes the plot to ``path``."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 12}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), width_ratios=(2.2, 1, 1), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        _losses(axes[0], runs)
        _times(axes[1], runs)
        _memory(axes[2], runs)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _losses(axes: Axes, runs: tuple[Drawn, Drawn]) -> None:
    for run in runs:
        label = f"{run.name} (test accuracy {run.accuracy:.1%})"
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=COLORS[run.name], linewidth=WIDTHS[run.name], label=label)
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy", xlim=(1, None))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _times(axes: Axes, runs: tuple[Drawn, Drawn]) -> None:
    _bars(axes, runs, [run.milliseconds for run in runs], "{:.0f} ms")
    axes.set(title="Time per training step", ylabel="median, ms")


def _memory(axes: Axes, runs: tuple[Drawn, Drawn]) -> None:
    _bars(axes, runs, [run.megabytes for run in runs], "{:.2f} MB")
    axes.set(title="Saved activations", ylabel="MB per image")


def _bars(axes: Axes, runs: tuple[Drawn, Drawn], values: list[float], label: str) -> None:
    bars = axes.bar([run.name for run in runs], values, color=[COLORS[run.name] for run in runs], width=0.6)
    axes.bar_label(bars, [label.format(value) for value in values], padding=3)
    axes.set_ylim(0, 1.15 * max(values))
    axes.margins(x=0.15)
