"""fusion_report(): what every BatchNorm of a model is fused with, or why not."""

import dataclasses
import json
import sys

import torch
from torch import nn

from ..modules import BatchNormAddReLU2d, FusedBottleneck, FusedResidualBlock
from ..ops import backend
from ..ops.recomputation import COMPILED
from ..tables import table
from . import families, own_modules
from .classes import is_fused
from .elements import normalized_elements
from .flow import Flow
from .selection import Selection, replaced
from .verdicts import BATCH_NORM, Verdict

NOT_APPLIED = "fuse() has not been applied"


@dataclasses.dataclass(frozen=True)
class Row:
    """One BatchNorm of a model.

    Attributes:
        name: where it is, as in ``named_modules()``; a module that is used in several places has a row for each.
        module: the name of its class.
        fused: whether it runs as part of a fused operator.
        operator: what it is, or would be, fused to, such as ``batch_norm+add+relu``; None where there is nothing known.
        reason: why it is not fused, or runs in an operator by itself (``batch_norm``); None where add or ReLU are part.
        backend: ``compiled``, ``triton`` or ``reference``, for its device and dtype; ``reference`` is never fused.
        recompute: whether the activation it ends with is made again in backward and not kept.
        elements: how many values it normalizes on the example input; None without one, and where it is not called.
    """

    name: str
    module: str
    fused: bool
    operator: str | None
    reason: str | None
    backend: str
    recompute: bool = False
    elements: int | None = None


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The rows of a report; ``str()`` gives a table with a summary, :meth:`to_json` the rows as JSON."""

    rows: tuple[Row, ...]
    # Why what was asked for is not recomputed; None where it is, or was not asked for.
    why_not_recomputed: str | None = None
    # The other classes of normalization that the model has, and how many of each.
    others: str = ""

    @property
    def fused(self) -> int:
        """How many BatchNorms are fused."""
        return sum(row.fused for row in self.rows)

    @property
    def total(self) -> int:
        """How many BatchNorms there are."""
        return len(self.rows)

    @property
    def alone(self) -> int:
        """How many of the fused run in an operator by themselves: neither add nor ReLU follows."""
        return sum(row.fused and row.operator == BATCH_NORM for row in self.rows)

    @property
    def traffic(self) -> float | None:
        """The share of all normalized elements of the example input that an add or a ReLU is fused with."""
        counted = [row for row in self.rows if row.elements is not None]
        elements = sum(row.elements for row in counted)
        if not elements:
            return None
        return sum(row.elements for row in counted if row.fused and row.operator != BATCH_NORM) / elements

    @property
    def summary(self) -> str:
        """One line: how many BatchNorms are fused, why the others are not, and how many activations are recomputed."""
        recomputed = sum(row.recompute for row in self.rows)
        line = f"{self.fused} of {self.total} BatchNorms fused"
        if self.alone:
            line += f", {self.alone} of them alone"
        if self.traffic is not None:
            line += f", {self.traffic:.1%} of the normalized elements with an add or a ReLU"
        if recomputed:
            line += f", {recomputed} with their activation recomputed in backward"
        if self.why_not_recomputed is not None:
            line += f", none recomputed ({self.why_not_recomputed})"
        if self.others:
            line += f"; other normalizations, which are not fused: {self.others}"
        reasons = list(dict.fromkeys(row.reason for row in self.rows if not row.fused))
        if len(reasons) == 1:
            return f"{line}; the others are not: {reasons[0]}" if self.fused else f"{line}: {reasons[0]}"
        return f"{line}; {len(reasons)} reasons for the others are in the table" if reasons else line

    def to_json(self) -> str:
        """The summary's figures and the rows as JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        figures = {"fused": self.fused, "alone": self.alone, "total": self.total, "traffic": self.traffic}
        return json.dumps({**figures, "summary": self.summary, "rows": rows}, indent=2)

    def __str__(self) -> str:
        status = {True: "fused", False: "not fused"}
        activation = {True: "recomputed", False: "kept"}
        rows = [
            (row.name, row.module, status[row.fused], row.operator, activation[row.recompute], row.backend, row.reason)
            for row in self.rows
        ]
        headers = ("BatchNorm", "class", "status", "operator", "activation", "backend", "why not")
        return f"{table(rows, headers)}\n\n{self.summary}" if rows else self.summary


def fusion_report(model: nn.Module, device: torch.device | str | None = None, example_inputs=None) -> FusionReport:
    """Says of every BatchNorm of ``model`` what it is fused with at this moment, or why it is not.

    Hooks, replaced modules, the mode and the backend chosen count as they are now, by the checks that the rewritten
    forwards make. Nothing of the model runs, unless ``example_inputs`` are given. What only an input can decide is not
    in it: a residual of another shape or dtype than the normalized value is added by torch, and where a forward
    branches on a tensor both ways are followed.

    Args:
        model: fused or not.
        device: judge as if the model were there, for one on the meta device say; by default where it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; a copy of the model runs on them
            in evaluation, on the meta device where it can, to count the elements that each BatchNorm normalizes.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fusion_report() takes a torch.nn.Module, got {type(model).__name__}")
    device = None if device is None else torch.device(device)
    compiled = _is_compiled(model)
    elements = {} if example_inputs is None else normalized_elements(model, example_inputs)
    judge = _Judge(model)
    rows = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_batch_norm(module):
            operator, reason, recompute = judge.verdict(name, module)
            row = _row(name, module, operator, reason, device, model, bool(recompute) and not compiled)
            rows.append(dataclasses.replace(row, elements=elements.get(name)))
    why_not = COMPILED if compiled and any(map(_recomputes, model.modules())) else None
    return FusionReport(tuple(rows), why_not, _others(model))


class _Judge:
    """Has the verdict on every BatchNorm of a model."""

    def __init__(self, model: nn.Module):
        families.learn({type(module) for module in model.modules()})
        self.model = model
        self.selection = Selection(model)
        self.own: dict[str, Verdict] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for bn, operator, reason in own_modules.judge(module):
                self.own[f"{name}.{bn}" if name else bn] = Verdict(operator, reason, _recomputes(module))
        now = Flow(model, _runs_fused, hopeful=False)
        self.now, self.blocked = now.verdicts, now.blocked
        then = Flow(model, self.selection.allows, hopeful=False)
        self.then, self.lost = then.verdicts, then.lost | now.lost

    def verdict(self, name: str, bn: nn.Module) -> Verdict:
        """What becomes of the BatchNorm with that name."""
        own = self.own.get(name)
        if isinstance(bn, BatchNormAddReLU2d) and (own is None or own.reason is not None):
            return Verdict(own_modules.alone(bn), None)
        if own is not None:
            return own
        if id(bn) in self.now:
            return _best(self.now[id(bn)])
        if id(bn) in self.blocked:
            return Verdict(None, self.blocked[id(bn)])
        if id(bn) in self.then:
            verdict = _best(self.then[id(bn)])
            if verdict.operator in (None, BATCH_NORM):
                return Verdict(None, verdict.reason)
            return Verdict(verdict.operator, NOT_APPLIED)
        return Verdict(None, self.why_unknown(name))

    def why_unknown(self, name: str) -> str:
        """Why no forward that is read calls a BatchNorm: the innermost module around it that is not read tells."""
        path = name.split(".")
        for length in range(len(path) - 1, -1, -1):
            around = self.model.get_submodule(".".join(path[:length]))
            reason = self.selection.why_not(around) or self.lost.get(id(around))
            container = isinstance(around, nn.ModuleList | nn.ModuleDict) or type(around) is nn.Module
            if reason is not None and not container:
                return f"{type(around).__name__} is not read: {reason}"
        return "no forward that is read calls it as a module with one input"


def _runs_fused(module: nn.Module) -> bool:
    return is_fused(module) and replaced(module) is None


def _best(verdicts: list[Verdict]) -> Verdict:
    """One verdict for several calls: what is fused, with what becomes of the others."""
    best = min(verdicts, key=lambda verdict: (verdict.operator is None, verdict.reason is not None))
    others = [verdict.reason for verdict in verdicts if verdict.reason is not None and verdict is not best]
    return best._replace(reason=f"but elsewhere {others[0]}") if others and best.reason is None else best


def _others(model: nn.Module) -> str:
    names = [
        type(module).__name__
        for module in model.modules()
        if "Norm" in type(module).__name__ and not _is_batch_norm(module) and not list(module.children())
    ]
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))


def _recomputes(module: nn.Module) -> bool | str:
    """Whether the forward of ``module`` runs inside :class:`resnet_fused.recompute`."""
    if isinstance(module, FusedBottleneck | FusedResidualBlock):
        return module.recompute
    return getattr(module, "_fusion_recompute", False)


def _is_compiled(model: nn.Module) -> bool:
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and isinstance(model, eval_frame.OptimizedModule):
        return True
    return getattr(model, "_compiled_call_impl", None) is not None


def _is_batch_norm(module: nn.Module) -> bool:
    # FrozenBatchNorm2d of torchvision, detectron2 and others derives from nn.Module alone, as InPlaceABN does.
    name = type(module).__name__
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in name or name.lower().endswith("abn")


def _row(name, module, operator, reason, device, model, recompute) -> Row:
    served_by, why = _backend(_tensor(module, model), device)
    fused = operator is not None and reason != NOT_APPLIED and why is None
    reasons = "; ".join(r for r in (reason, why) if r is not None) or None
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
