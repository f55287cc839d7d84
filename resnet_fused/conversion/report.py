"""fusion_report(): what every BatchNorm of a model is fused with, or why not."""

import dataclasses
import json
import sys
from collections.abc import Iterator

import torch
from tabulate import tabulate
from torch import nn

from ..modules import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from ..ops import backend
from ..ops.recomputation import COMPILED
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
        recompute: whether the activation it ends with is made again in backward and not kept.
    """

    name: str
    module: str
    fused: bool
    operator: str | None
    reason: str | None
    backend: str
    recompute: bool = False


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The rows of a report; ``str()`` gives a table with a summary, :meth:`to_json` the rows as JSON."""

    rows: tuple[Row, ...]
    # Why what was asked for is not recomputed; None where it is, or was not asked for.
    why_not_recomputed: str | None = None

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
        """One line: how many BatchNorms are fused, why the others are not, and how many activations are recomputed."""
        recomputed = sum(row.recompute for row in self.rows)
        line = f"{self.fused} of {self.total} BatchNorms fused"
        if recomputed:
            line += f", {recomputed} with their activation recomputed in backward"
        if self.why_not_recomputed is not None:
            line += f", none recomputed ({self.why_not_recomputed})"
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
        activation = {True: "recomputed", False: "kept"}
        table = [
            (row.name, row.module, status[row.fused], row.operator, activation[row.recompute], row.backend, row.reason)
            for row in self.rows
        ]
        headers = ("BatchNorm", "class", "status", "operator", "activation", "backend", "why not")
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
    compiled = _is_compiled(model)
    known: dict[str, tuple[str | None, str | None, bool]] = {}
    unknown: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        try:
            recompute = _recomputes(module)
            for bn, operator, reason in _judge(module):
                known[prefix + bn] = operator, reason, recompute
        except Refused as refusal:
            unknown[prefix] = str(refusal)
    rows = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(module):
            operator, reason, recompute = known.get(name) or (None, _why_unknown(name, unknown), False)
            if isinstance(module, BatchNormAddReLU2d) and reason is not None:
                operator, reason = own_modules.alone(module), None
            rows.append(_row(name, module, operator, reason, device, model, recompute and not compiled))
    asked = any(recompute for _, _, recompute in known.values())
    return FusionReport(tuple(rows), COMPILED if compiled and asked else None)


def _recomputes(module: nn.Module) -> bool:
    """Whether the forward of ``module`` runs inside :class:`resnet_fused.recompute`."""
    if isinstance(module, Fused):
        return module._fusion_recompute
    return isinstance(module, FusedBottleneck | FusedResidualBlock) and module.recompute


def _is_compiled(model: nn.Module) -> bool:
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and isinstance(model, eval_frame.OptimizedModule):
        return True
    return getattr(model, "_compiled_call_impl", None) is not None


def _judge(module: nn.Module) -> Iterator[tuple[str, str | None, str | None]]:
    """(name, operator, reason) for each BatchNorm that the forward of ``module`` is known to use."""
    if isinstance(module, Fused):
        yield from _verdicts(module, type(module), module._fusion_plan)
        return
    yield from own_modules.judge(module)
    conversion = conversion_of(module)
    if conversion is not None:
        for name, operator, reason in _verdicts(module, *conversion):
            yield name, operator, reason or NOT_APPLIED


def _verdicts(module: nn.Module, family: type[Fused], plan) -> Iterator[sites.Verdict]:
    obstacle = family._fusion_obstacle(module, plan)
    for site in family._fusion_sites(module, plan):
        yield from sites.judge(module, site, obstacle)


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


def _row(name, module, operator, reason, device, model, recompute) -> Row:
    served_by, why = _backend(_tensor(module, model), device)
    reasons = "; ".join(r for r in (reason, why) if r is not None) or None
    fused = reasons is None
    return Row(name, type(module).__name__, fused, operator, reasons, served_by, fused and recompute)


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
