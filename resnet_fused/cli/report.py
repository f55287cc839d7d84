"""``python -m resnet_fused report MODEL``: builds a model without weights, fuses it and shows its fusion report."""

import collections
import copy
import warnings

from .. import fuse, fusion_report
from ..conversion import FusionReport
from ..example_inputs import example_input
from ..tables import table
from .model_names import build


def report(name: str) -> FusionReport:
    """The fusion report of a copy of the model called ``name``, as it would run on the CPU.

    Args:
        name: as in :func:`resnet_fused.cli.model_names.build`.

    Raises:
        ModelError: there is no such model, or it cannot be built.
    """
    # A copy, for a callable may hand out a model that somebody else uses.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing is fused, which the report says
        model = fuse(copy.deepcopy(build(name)).eval())
    try:
        return fusion_report(model.train(), device="cpu", example_inputs=example_input(model))
    except Exception:
        # One that takes more than images is reported without the share of its elements.
        return fusion_report(model.train(), device="cpu")


def reasons(report: FusionReport) -> list[tuple[str, list[str]]]:
    """The reasons why BatchNorms are not fused, each with their names, the most frequent first."""
    names = collections.defaultdict(list)
    for row in report.rows:
        if not row.fused:
            names[row.reason].append(row.name)
    return sorted(names.items(), key=lambda item: -len(item[1]))


def why(report: FusionReport) -> str:
    """A table of the reasons why BatchNorms are not fused, and the summary."""
    rows = [(len(names), names[0], reason) for reason, names in reasons(report)]
    if not rows:
        return report.summary
    return f"{table(rows, ('not fused', 'first', 'why not'))}\n\n{report.summary}"
