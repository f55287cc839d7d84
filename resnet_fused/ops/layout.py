"""How a tensor lies in memory, as far as the operators care, and the bit mask that follows it.

Every tensor of shape (N, C, *) is seen as rows: a pixel of C channels where the channels are innermost
(channels_last, or a single position), a plane of H·W positions otherwise. The mask packs each row on its own, so that
no byte is shared by two rows and a mask written by one backend is read by another.
"""

import torch
from torch import Tensor

from .torch_private import suggest_memory_format


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _positions(input: Tensor) -> int:
    """H·W, of however many dimensions."""
    positions = 1
    for size in input.shape[2:]:
        positions = positions * size
    return positions


def format_of(input: Tensor, channels_last: bool | None = None) -> torch.memory_format:
    """The format that an operator works in: the one that is asked for, or that of its input (``csrc/layout.h``)."""
    if channels_last is None:
        return suggest_memory_format(input)
    if not channels_last or input.dim() not in (4, 5):
        return torch.contiguous_format
    return torch.channels_last if input.dim() == 4 else torch.channels_last_3d


def is_channels_last(input: Tensor) -> bool:
    """What ``channels_last`` has to be for an operator to work in the format that its input has."""
    return suggest_memory_format(input) != torch.contiguous_format


# What follows takes ``channels_last`` as the operators do: None for the format of ``input`` or ``like``.


def channels_innermost(input: Tensor, channels_last: bool | None = None) -> bool:
    """Whether a row of ``input`` is a pixel (True) or a plane (False)."""
    if input.dim() == 2:
        return True
    return bool(_positions(input) == 1) or format_of(input, channels_last) != torch.contiguous_format


def dense(input: Tensor, like: Tensor, channels_last: bool | None = None) -> Tensor:
    """``input`` without gaps, in the memory format of ``like``."""
    return input.contiguous(memory_format=format_of(like, channels_last))


def restored(saved: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A saved tensor in the layout that it had: saved-tensor hooks such as ``save_on_cpu`` may change it."""
    if saved.stride() == strides:
        return saved
    return dense(saved, torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device="meta"))


def rows(input: Tensor, channels_last: bool | None = None) -> Tensor:
    """(N, C, *) as (outer, inner) rows in memory order; copies where ``input`` has gaps."""
    batch, channels, positions = *input.shape[:2], _positions(input)
    if channels_innermost(input, channels_last):
        return input.movedim(1, -1).reshape(batch * positions, channels)
    return input.reshape(batch * channels, positions)


def unrows(flat: Tensor, like: Tensor, channels_last: bool | None = None) -> Tensor:
    """(outer, inner) rows back as a tensor of the shape and memory format of ``like``."""
    if not channels_innermost(like, channels_last):
        return flat.reshape(like.shape)
    shape = (like.shape[0], *like.shape[2:], like.shape[1])
    return dense(flat.reshape(shape).movedim(-1, 1), like, channels_last)


def mask_shape(input: Tensor, channels_last: bool | None = None) -> tuple[int, int]:
    """Shape of the packed mask for a tensor like ``input``."""
    channels, positions = input.shape[1], _positions(input)
    if channels_innermost(input, channels_last):
        return input.shape[0] * positions, (channels + 7) // 8
    return input.shape[0] * channels, (positions + 7) // 8


def _bits(device: torch.device) -> Tensor:
    """1, 2, 4 ... 128, without a constant, which torch.export would have to lift."""
    options = {"dtype": torch.uint8, "device": device}
    return torch.ones(8, **options) << torch.arange(8, **options)


def pack(keep: Tensor) -> Tensor:
    """(outer, inner) booleans as (outer, ceil(inner / 8)) bytes, the lowest bit first."""
    outer, inner = keep.shape
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -inner % 8))
    bits = _bits(keep.device)
    return (padded.reshape(outer, (inner + 7) // 8, 8) * bits).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, inner: int) -> Tensor:
    """The inverse of :func:`pack`: (outer, inner) booleans."""
    bits = _bits(mask.device)
    return ((mask.unsqueeze(-1) & bits) != 0).reshape(mask.shape[0], mask.shape[1] * 8)[:, :inner]


def flat(input: Tensor, channels_last: bool | None = None) -> Tensor:
    """The elements of a tensor of any shape, in the order of a format, as one row (1, numel)."""
    innermost = format_of(input, channels_last) != torch.contiguous_format
    return (input.movedim(1, -1) if innermost else input).reshape(1, -1)


def unflat(row: Tensor, like: Tensor, channels_last: bool | None = None) -> Tensor:
    """The inverse of :func:`flat`."""
    if format_of(like, channels_last) == torch.contiguous_format:
        return row.reshape(like.shape)
    return row.reshape(like.movedim(1, -1).shape).movedim(-1, 1)
