"""``torch.ops.resnet_fused``: loads the compiled libraries and completes the operators with what Python gives them.

Schemas come from ``_ops``, CPU kernels from ``_cpu`` (shared objects of ``csrc/``); fake kernels, autograd, autocast,
the Triton kernels and the reference, which serves every device that has no kernel of its own, from the modules here.
"""

import torch

from . import library

library.load()

# They need the operators to exist.
from . import autocast, autograd, backend, fake, reference, triton_kernels  # noqa: E402
from .fake import OPERATORS  # noqa: E402

_REGISTRATIONS = torch.library.Library("resnet_fused", "IMPL")


def _register() -> None:
    for name in OPERATORS:
        _REGISTRATIONS.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fused::{name}", getattr(fake, name), lib=_REGISTRATIONS)
    autograd.register(_REGISTRATIONS)
    autocast.register(_REGISTRATIONS)
    triton_kernels.register(_REGISTRATIONS)
    backend.begin()


_register()
