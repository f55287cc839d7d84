"""Tensors that go from one stream to another: a node runs backward on the stream of its forward."""

import torch
from torch import Tensor


def current(tensor: Tensor) -> torch.Stream | None:
    """The stream of this thread on the device of ``tensor``; None where a device has none."""
    if tensor.device.type in ("cpu", "meta"):
        return None
    return torch.get_device_module(tensor.device).current_stream(tensor.device)


def handed(tensor: Tensor, stream: torch.Stream | None) -> Tensor:
    """``tensor``, made on ``stream`` or behind it, for use on the current one.

    The current stream waits for the other, and the allocator for the current stream before it gives the memory away.
    """
    if stream is not None and (here := current(tensor)) != stream:
        here.wait_stream(stream)
        tensor.record_stream(here)
    return tensor
