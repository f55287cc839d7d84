"""The demo's plot: loss curves, time per step and memory of the eager and the fused network."""

import pathlib
import statistics
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from .demo import Run

# Told apart without colour too: the eager curve is broad and pale, the fused one thin and dark upon it.
COLORS = {"eager": "#e69f00", "fused": "#0b4f8a"}
WIDTHS = {"eager": 4.5, "fused": 1.3}


def write(path: pathlib.Path, title: str, eager: "Run", fused: "Run", batch_size: int) -> None:
    """Writes the plot to ``path``."""
    runs = (eager, fused)
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "axes.titlesize": 12}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), width_ratios=(2.2, 1, 1), layout="constrained")
        figure.suptitle(title, fontsize=13, fontweight="bold")
        _losses(axes[0], runs)
        _times(axes[1], runs)
        _memory(axes[2], runs, batch_size)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _losses(axes: Axes, runs: tuple["Run", "Run"]) -> None:
    for run in runs:
        label = f"{run.name} (test accuracy {run.accuracy:.1%})"
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=COLORS[run.name], linewidth=WIDTHS[run.name], label=label)
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy", xlim=(1, None))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _times(axes: Axes, runs: tuple["Run", "Run"]) -> None:
    medians = [1e3 * statistics.median(run.counted_seconds) for run in runs]
    _bars(axes, runs, medians, "{:.0f} ms")
    axes.set(title="Time per training step", ylabel="median, ms")


def _memory(axes: Axes, runs: tuple["Run", "Run"], batch_size: int) -> None:
    _bars(axes, runs, [run.saved_bytes / batch_size / 1e6 for run in runs], "{:.2f} MB")
    axes.set(title="Saved activations", ylabel="MB per image")


def _bars(axes: Axes, runs: tuple["Run", "Run"], values: list[float], label: str) -> None:
    bars = axes.bar([run.name for run in runs], values, color=[COLORS[run.name] for run in runs], width=0.6)
    axes.bar_label(bars, [label.format(value) for value in values], padding=3)
    axes.set_ylim(0, 1.15 * max(values))
    axes.margins(x=0.15)
