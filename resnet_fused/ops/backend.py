"""Which backend serves a call: the compiled kernels where there are some for the device, Triton's where it has some,
plain torch elsewhere.

``RESNET_FUSED_BACKEND`` or :func:`backend` ask for one. Asking for one that cannot run is an error that says why.

The dispatcher has one kernel of an operator for a kind of device. Where Triton serves CUDA, it does so on every GPU of
the machine; and while some thread is inside ``backend("triton")``, it does so for all of them but those inside
``backend("compiled")``: whoever asked for nothing gets the same maths from another kernel.
"""

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import architectures, library, triton_kernels
from .torch_private import is_traceable_wrapper_subclass, peek_interpreter_stack, tracing_state

BACKENDS = ("auto", "compiled", "triton", "reference")
DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_FROM_ENVIRONMENT = _checked(os.environ.get("RESNET_FUSED_BACKEND") or "auto", "RESNET_FUSED_BACKEND")
_choice: contextvars.ContextVar[str] = contextvars.ContextVar("resnet_fused_backend", default=_FROM_ENVIRONMENT)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend of the calls inside: ``"auto"``, ``"compiled"``, ``"triton"`` or ``"reference"``, plain torch
    operations.

    What torch.compile compiles keeps the choice of the moment it was traced. A thread that is started inside has the
    choice of the environment, as with every context variable.

    Raises:
        ValueError: ``name`` is no backend.
    """
    token = _choice.set(_checked(name, "backend"))
    try:
        with _installed(name):
            yield
    finally:
        _choice.reset(token)


def current() -> str:
    """The backend asked for."""
    return _choice.get()


def _constant_while_compiling(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, which imports Dynamo: a second and 160 MB for who compiles nothing."""
    function._dynamo_marked_constant = True
    return function


@_constant_while_compiling
def _current_while_compiling() -> str:
    """The choice as a constant of the compiled graph: Dynamo of some torch versions cannot trace a context variable."""
    return _choice.get()


def why_not_compiled(device: torch.device) -> str | None:
    """Why the compiled kernels do not serve ``device``; None where they do."""
    if device.type == "cpu":
        return library.why_no_cpu()
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


def serving(device: torch.device, choice: str | None = None) -> tuple[str, str | None]:
    """The backend that serves ``device``, ``"compiled"``, ``"triton"`` or ``"reference"``, and why none before it does.

    Args:
        choice: the backend asked for; by default the current one. Where it cannot run, the answer is ``"reference"``.
    """
    return _serving(device.type, device.index, choice or _choice.get())


@functools.cache
def _serving(kind: str, index: int | None, choice: str) -> tuple[str, str | None]:
    device = torch.device(kind, index)
    if choice == "reference":
        return "reference", "the backend 'reference' was asked for"
    not_compiled = why_not_compiled(device)
    if choice == "triton":
        reason = triton_kernels.why_not(device)
        return ("triton", None) if reason is None else ("reference", reason)
    if not_compiled is None:
        return "compiled", None
    if choice == "compiled":
        return "reference", not_compiled
    # The interpreter is for tests, and has to be asked for.
    not_triton = "there are no kernels of Triton for the CPU" if kind == "cpu" else triton_kernels.why_not(device)
    if not_triton is None:
        _found.add(kind)
        triton_kernels.serve(kind, True)
        return "triton", not_compiled
    return "reference", not_compiled if kind == "cpu" else f"{not_compiled}; {not_triton}"


def begin() -> None:
    """Has Triton serve what the environment asks for, or what no compiled library may serve, before any call."""
    triton_kernels.asks_for_compiled = lambda: _choice.get() == "compiled"
    _install()


# What the threads inside backend() ask for now.
_asked: list[str] = [_FROM_ENVIRONMENT]
_LOCK = threading.Lock()


@contextlib.contextmanager
def _installed(name: str) -> Iterator[None]:
    """The kernels of a choice, for as long as it lasts."""
    with _LOCK:
        _asked.append(name)
        _install()
    try:
        yield
    finally:
        with _LOCK:
            _asked.remove(name)
            _install()


def _install() -> None:
    for kind in triton_kernels.KEYS:
        if not triton_kernels.may_serve(kind):
            continue
        # A library that is loaded is asked about each GPU at the GPU's first call.
        unasked = kind != "cpu" and (kind != "cuda" or library.why_no_cuda() is not None or kind in _found)
        triton_kernels.serve(kind, unasked or "triton" in _asked)


# Kinds of devices of which a call of the automatic choice found that the compiled library does not serve them all.
_found: set[str] = set()


@_constant_while_compiling
def _server_while_compiling(kind: str, index: int | None, choice: str) -> str:
    """A constant of the compiled graph: Dynamo need not trace what asks the driver."""
    return _serving(kind, index, choice)[0]


def is_fused(input: Tensor) -> bool:
    """Whether the fused operators run for ``input``, rather than the unfused torch operations.

    Raises:
        RuntimeError: a backend was asked for that cannot serve the device of ``input``.
    """
    compiling = torch.compiler.is_compiling()
    choice = _current_while_compiling() if compiling else _choice.get()
    if choice == "reference" or input.dtype not in DTYPES or input.layout is not torch.strided:
        return False
    if not input.is_cpu or choice == "triton" or not _CPU_IS_COMPILED:
        device = input.device
        if compiling:
            served = _server_while_compiling(device.type, device.index, choice)
        else:
            served = _serving(device.type, device.index, choice)[0]
        if served == "reference":
            if choice != "auto":
                raise RuntimeError(f"the backend {choice!r} was asked for, but {serving(device, choice)[1]}")
            return False
    # functorch's transforms and forward-mode AD differentiate torch's operations, not ours; torch.jit.trace records
    # them.
    if not compiling and (
        peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or tracing_state() is not None
    ):
        return False
    kind = type(input)
    return compiling or kind is Tensor or kind is torch.nn.Parameter or not _is_wrapper(input)


_CPU_IS_COMPILED = library.why_no_cpu() is None


def _is_wrapper(input: Tensor) -> bool:
    """Tensors that stand for others, such as DTensor: they know torch's operators and not ours."""
    return is_traceable_wrapper_subclass(input)
