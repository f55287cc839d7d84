"""``torch.ops.resnet_fused``: loads the compiled libraries and completes the operators with what Python gives them.

Schemas come from ``_ops``, CPU kernels from ``_cpu`` (shared objects of ``csrc/``); fake kernels, autograd, autocast
and the reference, which serves every device that has no kernel of its own, from the modules here.
"""

import torch

from . import library

library.load()

from . import autocast, autograd, fake, reference  # noqa: E402  (they need the operators to exist)

OPERATORS = tuple(
    name for name, member in vars(fake).items() if getattr(member, "__module__", "") == fake.__name__ and name[0] != "_"
)

_REGISTRATIONS = torch.library.Library("resnet_fused", "IMPL")


def _register() -> None:
    for name in OPERATORS:
        _REGISTRATIONS.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fused::{name}", getattr(fake, name), lib=_REGISTRATIONS)
    autograd.register(_REGISTRATIONS)
    autocast.register(_REGISTRATIONS)


_register()
