"""``python -m resnet_fused memory MODEL``: the memory of a training step, predicted with fake tensors.

Operators run on tensors that have shapes and no data, so that a model of any size is examined in seconds and takes no
memory. What is counted is what :class:`resnet_fused.measure.LiveMemory` counts: tensors. Workspaces of convolutions,
the fragments of an allocator and the context of a GPU come on top.
"""

import copy
import dataclasses
import pathlib
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .. import fuse, measure
from ..measure import Step
from ..tables import table
from .model_names import ModelError, build

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
VARIANTS = ("eager", "fused", "fused + recompute", "fused + recompute, convolutions too")
# The largest batch that is looked for.
_LARGEST = 1 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training step, and the memory that it should fit into."""

    model: str
    batch_size: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    image_size: int = 224
    channels_last: bool = True
    memory: int | None = None
    output: str | None = None

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def predict(model: nn.Module, images: Tensor, momentum: bool = True) -> Step:
    """Runs one training step, forward and backward of a cross entropy, and a forward before it, and counts its bytes.

    Args:
        model: of real tensors, or of fake ones inside their mode.
        images: the batch.
        momentum: whether an optimizer stands by with a momentum for every parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = [torch.empty_like(p) for p in parameters] if momentum else []
    labels = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
    model.zero_grad()
    # A forward of its own: what is recomputed inside the hooks that count would be held longer.
    with measure.SavedActivations(model) as saved:
        F.cross_entropy(_logits(model(images)), labels)
    with measure.LiveMemory(*model.parameters(), *model.buffers(), *state, images, labels) as memory:
        before = memory.bytes
        loss = F.cross_entropy(_logits(model(images)), labels)
        forward = len(memory.curve)
        loss.backward()
    return Step(before, saved.bytes, memory.peak, tuple(memory.curve), forward)


def _logits(output) -> Tensor:
    """The tensor of a model's output: GoogLeNet and others return several in training."""
    while not isinstance(output, Tensor):
        if not output or not isinstance(output, dict | list | tuple):
            raise TypeError(f"the model returns no tensor but a {type(output).__name__}")
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.flatten(1).float()


def predict_fake(model: nn.Module, change: Callable[[nn.Module], nn.Module], settings: Settings, batch: int) -> Step:
    """:func:`predict` for a fake copy of ``model``, changed as ``change`` does, and a fake batch."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = change(_fake(model, mode, settings))
        shape = (batch, 3, settings.image_size, settings.image_size)
        images = torch.empty(shape, dtype=DTYPES[settings.dtype]).contiguous(memory_format=settings.memory_format)
        return predict(model.train(), images)


def _fake(model: nn.Module, mode: FakeTensorMode, settings: Settings) -> nn.Module:
    """A copy whose tensors have no data, of the dtype and memory format asked for."""
    known: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = DTYPES[settings.dtype] if tensor.is_floating_point() else tensor.dtype
        value = torch.empty(tensor.shape, dtype=dtype)
        if tensor.dim() == 4:
            value = value.contiguous(memory_format=settings.memory_format)
        parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value
    # deepcopy takes these for copies it made already.
    return copy.deepcopy(model, known)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "fused": fuse,
    "fused + recompute": lambda model: fuse(model, recompute=True),
    "fused + recompute, convolutions too": lambda model: fuse(model, recompute="convolutions"),
}


def largest_batch(peak_of: Callable[[int], int], memory: int) -> int:
    """The largest batch whose peak is at most ``memory`` bytes, 0 where not even two images are.

    The peak is close to a straight line in the batch, so that a line through two known peaks ends near the answer.
    """
    low, low_peak = 2, peak_of(2)
    if low_peak > memory:
        return 0
    high, high_peak = 64, peak_of(64)
    while high_peak <= memory:
        if high >= _LARGEST:
            return high
        slope = (high_peak - low_peak) / (high - low)
        low, low_peak = high, high_peak
        high = min(_LARGEST, low + int((memory - low_peak) / slope) + 2)
        high_peak = peak_of(high)
    while high - low > 1:
        guess = low + int((memory - low_peak) * (high - low) / (high_peak - low_peak))
        guess = min(max(guess, low + 1), high - 1)
        peak = peak_of(guess)
        if peak <= memory:
            low, low_peak = guess, peak
        else:
            high, high_peak = guess, peak
    return low


def bytes_of(text: str) -> int:
    """The bytes of ``24GB``, ``24GiB`` or ``24000000000``.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"must be a number of bytes such as 24GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def run(settings: Settings) -> dict[str, Step]:
    """Predicts the step of each variant, prints the table and, where ``output`` asks for it, writes the plot.

    Raises:
        ModelError: there is no such model, it does not train on such images, or the plot cannot be written: before the
            work where that is known.
        ModuleNotFoundError: a plot is asked for without matplotlib.
    """
    plot = None if settings.output is None else _plot_to(settings.output)
    model = build(settings.model)

    def step(variant: str, batch: int) -> Step:
        try:
            return predict_fake(model, CHANGES[variant], settings, batch)
        except Exception as error:
            raise ModelError(
                f"{settings.model} takes no training step on {batch} images of {settings.image_size} x "
                f"{settings.image_size}: {type(error).__name__}: {error}"
            ) from error

    steps = {variant: step(variant, settings.batch_size) for variant in VARIANTS}
    largest = {}
    if settings.memory is not None:
        for variant in VARIANTS:
            largest[variant] = largest_batch(lambda batch, v=variant: step(v, batch).peak, settings.memory)
    print(render(settings, steps, largest))
    if plot is not None:
        plot(_title(settings), steps, settings.memory)
        print(f"\nmemory over the step: {settings.output}")
    return steps


def _plot_to(output: str) -> Callable[..., None]:
    """What writes the plot, once it is known that nothing forbids it."""
    from . import memory_plot

    path = pathlib.Path(output)
    reason = (
        "it is a folder"
        if path.is_dir()
        else f"there is no folder {path.parent}"
        if not path.parent.is_dir()
        else memory_plot.why_not(path)
    )
    if reason is not None:
        raise ModelError(f"the plot cannot be written to {output or repr(output)}: {reason}")

    def write(*what):
        try:
            memory_plot.write(path, *what)
        except OSError as error:
            raise ModelError(f"the plot cannot be written to {path}: {error}") from error

    return write


def _number(batch: int) -> str:
    return f"{batch} or more" if batch >= _LARGEST else str(batch or "none")


def _title(settings: Settings) -> str:
    layout = "channels_last" if settings.channels_last else "NCHW"
    size = f"{settings.image_size}x{settings.image_size}"
    return f"{settings.model}, batch {settings.batch_size}, {size}, {settings.dtype}, {layout}"


def render(settings: Settings, steps: dict[str, Step], largest: dict[str, int]) -> str:
    """The table, and what it does not count."""
    eager = steps["eager"]
    headers = ["", "saved for backward, MB", "of eager", "peak, MB", "of eager"]
    rows = [
        [
            name,
            f"{step.saved / 1e6:.1f}",
            f"{step.saved / eager.saved:.3f}",
            f"{step.peak / 1e6:.1f}",
            f"{step.peak / eager.peak:.3f}",
        ]
        for name, step in steps.items()
    ]
    if largest:
        headers.append(f"largest batch in {settings.memory / 1e9:.4g} GB")
        rows = [[*row, _number(largest[row[0]])] for row in rows]
    lines = [
        _title(settings),
        "",
        table(rows, headers, right=(1, 3, 5)),
        "",
        f"The peak includes parameters, buffers, momentum and the batch ({eager.before / 1e6:.1f} MB), and gradients.",
        "Tensors alone are counted: leave room for the workspaces of convolutions and for the allocator.",
    ]
    if settings.device != "cpu":
        lines.append(
            f"Predicted on fake CPU tensors, of the sizes that {settings.device} tensors have: no GPU was used."
        )
    return "\n".join(lines)
