"""fusion_report(): what every BatchNorm of a model is fused with, or why not."""

import dataclasses
import json
from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import nn

from ..modules import BatchNormAddReLU2d
from ..ops import backend
from . import own_modules, sites
from .classes import Fused, Refused
from .convert import conversion_of

NOT_APPLIED = "fuse() has not been applied"


@dataclasses.dataclass(frozen=True)
class Row:
    """One BatchNorm of a model.

    Attributes:
        name: where it is, as in ``named_modules()``; a module that is used in several places has a row for each.
        module: the name of its class.
        fused: whether it runs as part of a fused operator.
        operator: what it is, or would be, fused to, such as ``batch_norm+add+relu``; None where there is nothing known.
        reason: why it is not fused; None where it is.
        backend: ``compiled``, ``triton`` or ``reference``, for its device and dtype; ``reference`` is never fused.
    """

    name: str
    module: str
    fused: bool
    operator: str | None
    reason: str | None
    backend: str


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The rows of a report; ``str()`` gives a table with a summary, :meth:`to_json` the rows as JSON."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> int:
        """How many BatchNorms are fused."""
        return sum(row.fused for row in self.rows)

    @property
    def total(self) -> int:
        """How many BatchNorms there are."""
        return len(self.rows)

    @property
    def summary(self) -> str:
        """One line: how many BatchNorms are fused, and why the others are not."""
        line = f"{self.fused} of {self.total} BatchNorms fused"
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason is not None))
        if len(reasons) == 1:
            return f"{line}; the others are not: {reasons[0]}" if self.fused else f"{line}: {reasons[0]}"
        return f"{line}; {len(reasons)} reasons for the others are in the table" if reasons else line

    def to_json(self) -> str:
        """The summary's figures and the rows as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({"fused": self.fused, "total": self.total, "rows": rows}, indent=2)

    def __str__(self) -> str:
        status = {True: "fused", False: "not fused"}
        table = [(row.name, row.module, status[row.fused], row.operator, row.backend, row.reason) for row in self.rows]
        headers = ("BatchNorm", "class", "status", "operator", "backend", "why not")
        return f"{tabulate(table, headers=headers, disable_numparse=True)}\n\n{self.summary}" if table else self.summary


def fusion_report(model: nn.Module, device: torch.device | str | None = None) -> FusionReport:
    """Says of every BatchNorm of ``model`` what it is fused with at this moment, or why it is not.

    Hooks, replaced modules and the backend chosen count as they are now, by the checks that the fused forward makes.
    What only an input can decide is not in it: a residual of another shape or dtype than the normalized value is added
    by torch.

    Args:
        model: fused or not.
        device: judge as if the model were there, for one on the meta device say; by default where it is.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report() takes a torch.nn.Module, got {type(model).__name__}")
    device = None if device is None else torch.device(device)
    known: dict[str, tuple[str | None, str | None]] = {}
    unknown: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        try:
            for bn, operator, reason in _judge(module):
                known[prefix + bn] = operator, reason
        except Refused as refusal:
            unknown[prefix] = str(refusal)
    rows = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(module):
            operator, reason = known.get(name) or (None, _why_unknown(name, unknown))
            if isinstance(module, BatchNormAddReLU2d) and reason is not None:
                operator, reason = own_modules.alone(module), None
            rows.append(_row(name, module, operator, reason, device, model))
    return FusionReport(tuple(rows))


def _judge(module: nn.Module) -> Iterator[tuple[str, str | None, str | None]]:
    """(name, operator, reason) for each BatchNorm that the forward of ``module`` is known to use."""
    if isinstance(module, Fused):
        for site in module._fusion_sites(module):
            yield from sites.judge(module, site)
        return
    yield from own_modules.judge(module)
    cls = conversion_of(module)
    if cls is None:
        return
    for site in cls._fusion_sites(module):
        for name, operator, reason in sites.judge(module, site):
            yield name, operator, reason or NOT_APPLIED


def _why_unknown(name: str, unknown: dict[str, str]) -> str:
    """Why no known forward uses a BatchNorm: the refusal of the innermost module around it that has one."""
    path = name.split(".")
    for length in range(len(path) - 1, -1, -1):
        reason = unknown.get("".join(f"{part}." for part in path[:length]))
        if reason is not None:
            return reason
    return "stands in no block that is known here"


def _is_batch_norm(module: nn.Module) -> bool:
    # FrozenBatchNorm2d of torchvision, detectron2 and others derives from nn.Module alone.
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__


def _row(name, module, operator, reason, device, model) -> Row:
    served_by, why = _backend(_tensor(module, model), device)
    reasons = "; ".join(r for r in (reason, why) if r is not None) or None
    return Row(name, type(module).__name__, reasons is None, operator, reasons, served_by)


def _tensor(module: nn.Module, model: nn.Module) -> torch.Tensor | None:
    """A tensor that tells device and dtype; one without parameters and statistics works where the model is."""
    for source in (module, model):
        for tensor in (*source.parameters(), *source.buffers()):
            if tensor.is_floating_point():
                return tensor
    return None


def _backend(tensor: torch.Tensor | None, device: torch.device | None) -> tuple[str, str | None]:
    """The backend that serves tensors like this one, and why it is none with fused kernels."""
    if backend.current() == "reference":
        return "reference", "the backend 'reference' was asked for"
    if device is None:
        device = torch.device("cpu") if tensor is None else tensor.device
    served_by, reason = backend.serving(device)
    if served_by != "reference" and tensor is not None and tensor.dtype not in backend.DTYPES:
        served_by, reason = "reference", f"no kernels for {str(tensor.dtype).removeprefix('torch.')}"
    return served_by, reason if served_by == "reference" else None
