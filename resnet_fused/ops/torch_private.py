"""What is used of torch's private names, and what for: the first place to look where a new torch breaks something.

``tests/test_packaging.py`` holds the package to this, and the tests run under every torch that is supported.
"""

import functools

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch._prims_common import suggest_memory_format
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

__all__ = [
    "DeviceContext",
    "TorchDispatchMode",
    "is_legacy_batchedtensor",
    "is_traceable_wrapper_subclass",
    "peek_interpreter_stack",
    "suggest_memory_format",
]

# torch.jit.trace: what it records into, None where it does not.
tracing_state, set_tracing_state = torch._C._get_tracing_state, torch._C._set_tracing_state

# How many modes see calls of torch's functions, and which.
function_modes = torch._C._len_torch_function_stack
function_mode_stack = torch.overrides._get_current_function_mode_stack
# What a subclass of Tensor has as __torch_function__ where it overrides no function.
no_torch_function = torch._C._disabled_torch_function_impl

# The backward that runs in this thread: -1 where none does. Whether it will run a node: since torch 2.1.
NO_TASK = -1
graph_task = torch._C._current_graph_task_id
will_run = getattr(torch._C, "_will_engine_execute_node", lambda node: False)

# The hooks of torch.autograd.graph.saved_tensors_hooks, which is too slow for every forward.
top_saved_hooks = torch._C._autograd._top_saved_tensors_default_hooks
push_saved_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_saved_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
saved_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled

# without_keys(keys): a context in which an operator is not served for these keys of the dispatcher.
without_keys = torch._C._ExcludeDispatchKeyGuard


def keys(*names: str) -> torch._C.DispatchKeySet:
    """The dispatch keys with these names."""
    found = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.reduce(lambda one, other: one | other, found)


_ABOVE_KERNELS = keys(
    "AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA", "AutocastXPU"
)
# below_autograd(): a context in which an operator goes straight to its kernel, past autograd and autocast.
below_autograd = functools.partial(without_keys, _ABOVE_KERNELS)


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator of this package has a kernel for a key of the dispatcher."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fused::{operator}", key)


def fix_weakref(tensor: Tensor) -> None:
    """Keeps the Python object of a tensor that a weak reference gave."""
    tensor._fix_weakref()
