"""The plot of ``python -m resnet_fused memory``: bytes alive over a training step."""

import pathlib

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from ..measure import Step

# Told apart without colour too.
STYLES = {
    "eager": {"color": "#e69f00", "linewidth": 4.0},
    "fused": {"color": "#0b4f8a", "linewidth": 1.3, "linestyle": "--"},
    "fused + recompute": {"color": "#0b4f8a", "linewidth": 2.0},
    "fused + recompute, convolutions too": {"color": "#009e73", "linewidth": 1.6, "linestyle": "-."},
}


def why_not(path: pathlib.Path) -> str | None:
    """Why ``path`` is none that a plot can be written to: for its ending, which says the format."""
    formats = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    ending = path.suffix.removeprefix(".")
    return None if ending.lower() in formats else f"its name must end in one of {', '.join(sorted(formats))}"


def write(path: pathlib.Path, title: str, steps: dict[str, Step], memory: int | None) -> None:
    """Writes the plot to ``path``; forward and backward take half of its width each."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
        for name, step in steps.items():
            label = f"{name} (peak {step.peak / 1e6:,.0f} MB)"
            axes.plot(_places(step), [value / 1e6 for value in step.curve], label=label, **STYLES[name])
        if memory is not None and memory <= 1.5e6 * axes.get_ylim()[1]:
            axes.axhline(memory / 1e6, color="black", linewidth=1)
            axes.annotate(f"{memory / 1e9:.4g} GB", (0, memory / 1e6), xytext=(2, 3), textcoords="offset points")
        axes.axvline(1, color="black", alpha=0.3, linewidth=1)
        axes.set(title=title, ylabel="memory, MB", xlim=(0, 2))
        axes.set_xticks([0.5, 1.5], ["forward", "backward"])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        # Outside, for the curves fill the axes.
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _places(step: Step) -> list[float]:
    """Where along the step an operator stands: its share of the forward, or one and its share of the backward."""
    backward = len(step.curve) - step.forward
    first = [i / step.forward for i in range(step.forward)]
    return first + [1 + i / max(backward - 1, 1) for i in range(backward)]
