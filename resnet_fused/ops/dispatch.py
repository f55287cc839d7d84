"""Where a call enters torch's dispatcher."""

import torch


def _excluded_keys():
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    for name in ("AutogradOther", "AutogradNestedTensor", "AutocastCPU", "AutocastCUDA", "AutocastXPU"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys


_ABOVE_KERNELS = _excluded_keys()


def below_autograd():
    """A context in which an operator goes straight to its kernel, past autograd and autocast."""
    return torch._C._ExcludeDispatchKeyGuard(_ABOVE_KERNELS)
