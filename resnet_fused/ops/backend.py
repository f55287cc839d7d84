"""Which backend serves a call: the compiled kernels where there are some for the device, plain torch elsewhere.

``RESNET_FUSED_BACKEND`` or :func:`backend` ask for one. Asking for one that cannot run is an error that says why.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from . import architectures, library

BACKENDS = ("auto", "compiled", "reference")
DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_FROM_ENVIRONMENT = _checked(os.environ.get("RESNET_FUSED_BACKEND") or "auto", "RESNET_FUSED_BACKEND")
_choice: contextvars.ContextVar[str] = contextvars.ContextVar("resnet_fused_backend", default=_FROM_ENVIRONMENT)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend of the calls inside: ``"auto"``, ``"compiled"`` or ``"reference"``, plain torch operations.

    What torch.compile compiles keeps the choice of the moment it was traced. A thread that is started inside has the
    choice of the environment, as with every context variable.

    Raises:
        ValueError: ``name`` is no backend.
    """
    token = _choice.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _choice.reset(token)


def current() -> str:
    """The backend asked for."""
    return _choice.get()


@torch.compiler.assume_constant_result
def _current_while_compiling() -> str:
    """The choice as a constant of the compiled graph: Dynamo of some torch versions cannot trace a context variable."""
    return _choice.get()


def why_not_compiled(device: torch.device) -> str | None:
    """Why the compiled kernels do not serve ``device``; None where they do."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _why_not_cuda(device.index)
    return f"this build has no compiled kernels for {device.type} tensors"


@functools.cache
def _why_not_cuda(index: int | None) -> str | None:
    # A machine does not change its GPUs, and to ask for one costs the host more than a small kernel takes.
    reason = library.why_no_cuda()
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds no GPU"
    if reason is not None:
        return reason
    return architectures.why_not_on(library.cuda_architectures(), torch.cuda.get_device_capability(index))


@torch.compiler.assume_constant_result
def _is_served_while_compiling(kind: str, index: int | None) -> bool:
    """A constant of the compiled graph: Dynamo need not trace what asks the driver."""
    return why_not_compiled(torch.device(kind, index)) is None


def is_fused(input: Tensor) -> bool:
    """Whether the fused operators run for ``input``, rather than the unfused torch operations.

    Raises:
        RuntimeError: the compiled backend was asked for and does not serve the device of ``input``.
    """
    compiling = torch.compiler.is_compiling()
    choice = _current_while_compiling() if compiling else _choice.get()
    if choice == "reference" or input.dtype not in DTYPES or input.layout is not torch.strided:
        return False
    if not input.is_cpu:
        device = input.device
        if compiling:
            served = _is_served_while_compiling(device.type, device.index)
        else:
            served = why_not_compiled(device) is None
        if not served:
            if choice == "compiled":
                raise RuntimeError(f"the backend 'compiled' was asked for, but {why_not_compiled(device)}")
            return False
    # functorch's transforms and forward-mode AD differentiate torch's operations, not ours; torch.jit.trace records
    # them.
    if not compiling and (
        peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    kind = type(input)
    return compiling or kind is Tensor or kind is torch.nn.Parameter or not _is_wrapper(input)


def _is_wrapper(input: Tensor) -> bool:
    """Tensors that stand for others, such as DTensor: they know torch's operators and not ours."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(input)
