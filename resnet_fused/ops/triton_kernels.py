"""The Triton kernels as torch's dispatcher sees them: who they serve, and how torch.compile looks into them.

Triton itself is imported by the first call that runs or traces a kernel, never before.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable

import torch

from . import fake, reference
from .torch_private import has_kernel

# Dispatch keys of the devices that Triton has kernels for: CUDA is AMD's as well, and the CPU's is the interpreter's.
KEYS = {"cuda": "CUDA", "xpu": "XPU", "cpu": "CPU"}
# What Triton's own compiler supports and tools/triton_checks.py compiles for.
LEAST_CAPABILITY = (8, 0)

_MUTATING = ("batch_norm_add_relu_train_with_update", "dual_batch_norm_add_relu_train_with_update")
_OPAQUE = (*_MUTATING, "update_running_stats")


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, which is how they run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve ``device``; None where they can."""
    if device.type not in KEYS:
        return f"there are no Triton kernels for {device.type} tensors"
    return _why_not(device.type, device.index)


@functools.cache
def _why_not(kind: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: `pip install triton`"
    if is_interpreted():
        return None
    if kind == "cpu":
        return "Triton runs on CPU tensors in its interpreter alone, which TRITON_INTERPRET=1 starts"
    if not getattr(torch, kind).is_available():
        return "torch finds no GPU"
    if kind == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            needed, has = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
            return f"Triton needs a GPU of compute capability {needed}, and this one has {has}"
    return None


def may_serve(kind: str) -> bool:
    """Whether Triton may come to serve devices of this kind, as far as one sees without asking a driver."""
    built = {
        "cuda": torch.version.cuda is not None or torch.version.hip is not None,
        "xpu": torch.xpu._is_compiled(),
        "cpu": is_interpreted(),
    }
    return built.get(kind, False) and importlib.util.find_spec("triton") is not None


# Kernels of the dispatcher.
#
# Once registered they stay, for other threads may be inside them at any moment: who is to be served is asked at each
# call, and the compiled kernel that they stand in front of is called where it is to serve.

_registered: dict[str, torch.library.Library] = {}
_serving: set[str] = set()
_LOCK = threading.Lock()

# Whether the thread that calls asks for the compiled kernels, whoever else asks for Triton's; backend.py knows.
asks_for_compiled: Callable[[], bool] = bool


def serves(kind: str) -> bool:
    """Whether the operators go to Triton for tensors of this kind of device."""
    return kind in _serving


def serve(kind: str, wanted: bool) -> None:
    """Has the operators go to Triton for this kind of device, in place of the compiled kernels, or ends that."""
    if wanted == (kind in _serving):
        return
    with _LOCK:
        if not wanted:
            _serving.discard(kind)
            return
        if kind not in _registered:
            compiled = {name: _compiled(name, kind) for name in fake.OPERATORS}
            library = _registered[kind] = torch.library.Library("resnet_fused", "IMPL")
            for name in fake.OPERATORS:
                kernel = _kernel(name, kind, compiled[name])
                library.impl(name, kernel, KEYS[kind], with_keyset=True, allow_override=True)
        _serving.add(kind)


def _compiled(name: str, kind: str) -> Callable | None:
    """The kernel of the compiled library, where there is one."""
    if not has_kernel(name, KEYS[kind]):
        return None
    return torch.library.get_kernel(f"resnet_fused::{name}", KEYS[kind]).call_boxed


def _kernel(name: str, kind: str, compiled: Callable | None) -> Callable:
    def kernel(keys, *arguments):
        if compiled is not None and (kind not in _serving or asks_for_compiled()):
            return compiled(keys, *arguments)
        # A machine may have a GPU that Triton does not reach.
        if _why_not(kind, _index(arguments)) is not None:
            return getattr(reference, name)(*arguments)
        return getattr(_launchers(), name)(*arguments)

    return kernel


def _index(arguments) -> int | None:
    """Of the device of the first tensor."""
    for value in arguments:
        if isinstance(value, torch.Tensor):
            return value.device.index
    return None


@functools.cache
def _launchers():
    from ..triton import launchers

    return launchers


# torch.compile.


def _decomposition(name: str) -> Callable:
    """What torch.library.triton_op does, for an operator that has its schema already: where a graph is made functional,
    the launches of its kernels take its place, so that Inductor sees them.

    torch.export keeps the operator: the program shall run on another backend as well.
    """

    def rule(mode, op, types, arguments, keywords):
        if keywords or not _is_traceable(arguments) or _is_exporting():
            return mode.__torch_dispatch__(op, types, arguments, keywords)
        with mode, _launchers().traced():
            return getattr(_launchers(), name)(*arguments)

    return rule


def _is_traceable(arguments) -> bool:
    """Sizes that are not known yet stay with the operator: a plan for tiles needs numbers."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    device = tensors[0].device
    if not serves(device.type) or is_interpreted() or _why_not(device.type, device.index) is not None:
        return False
    return all(isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride(), t.storage_offset()))


def _is_exporting() -> bool:
    try:
        from torch.export._trace import custom_triton_ops_decomposition_disabled
    except ImportError:
        return False
    return custom_triton_ops_decomposition_disabled()


class _Kernels(list):
    """The kernels of an operator, for the key of torch's cache of graphs; not before it looks."""

    def __iter__(self):
        from triton.runtime.jit import JITFunction

        return (
            k for k in vars(_launchers().kernels).values() if isinstance(k, JITFunction) and k.fn.__name__[0] != "_"
        )


def register(registrations: torch.library.Library) -> None:
    """Tells torch.compile how to look into the operators."""
    from torch._library import triton as torch_triton
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    for name in fake.OPERATORS:
        if name in _OPAQUE:
            continue  # these change tensors, and launch next to nothing beside what the others do
        torch.library.register_torch_dispatch(
            f"resnet_fused::{name}", FunctionalTensorMode, _decomposition(name), lib=registrations
        )
        known = getattr(torch_triton, "triton_ops_to_kernels", None)
        if known is not None:
            known[f"resnet_fused::{name}"] = _Kernels()
