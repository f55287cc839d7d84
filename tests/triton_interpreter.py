"""Triton's interpreter as a GPU would have it: its arithmetic mended, and every tensor of a launch among guards.

The interpreter rounds a fused multiply-add twice and float32 to bfloat16 towards zero, and reads whatever lies beyond a
tensor where a mask is missing. Here each rounds as IEEE 754 says and as NVIDIA's and AMD's instructions do, and each
tensor lies in a buffer of NaN, whose surroundings must be as they were once the kernel is done.
"""

import threading

import numpy as np
import torch

# Elements on either side: more than a tile has.
_MARGIN = 16384
# The interpreter is in one place of one grid.
_one_launch = threading.Lock()


def mend() -> None:
    """Mends the arithmetic, and bounds of loops under Triton 3.6 with numpy 2.4."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def create_fma(self, x, y, z):
        with np.errstate(all="ignore"):
            if z.data.dtype == np.float32:
                # The product is exact in float64; the sum is rounded to 64 bits before it is to 24.
                wide = np.longdouble
                value = (x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)).astype(np.float32)
            else:
                value = _fma_of_doubles(x.data, y.data, z.data)
        return handle(value, z.dtype.scalar)

    def cast_impl(self, src, dst_type):
        source, to = src.dtype.scalar, dst_type.scalar
        if to == tl.bfloat16 and source == tl.float32:
            narrow = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            return handle(narrow.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape), to)
        if source == tl.bfloat16 and to == tl.float32:
            return handle((src.data.astype(np.uint32) << 16).view(np.float32), to)
        if source == tl.bfloat16:
            return cast(self, cast_impl(self, src, tl.float32), dst_type)
        if to == tl.bfloat16:
            return cast_impl(self, cast(self, src, tl.float32), dst_type)
        return cast(self, src, dst_type)

    builder.create_fma = create_fma
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding: cast_impl(self, src, dst_type)
    _index_by_item(interpreter)
    _patch_once(interpreter)


def _index_by_item(interpreter) -> None:
    """numpy 2.4 refuses int(array) of one element with an axis, which Triton 3.6 makes of the bounds of a loop."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _patch_once(interpreter) -> None:
    """Has functions that a kernel calls find the language patched: to do it again for each takes half of the time."""
    patch, patched = interpreter._patch_lang, {}

    class Scope:
        def restore(self):
            for scope in reversed(list(patched.values())):
                scope.restore()
            patched.clear()

    def patch_once(fn):
        # The language's own functions see another module than kernels do. Only the kernel's scope is restored.
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = patch(fn)
        return Scope()

    interpreter._patch_lang = patch_once


def _fma_of_doubles(x, y, z):
    """x y + z by Dekker's exact product; of what is rounded twice only the last bit of 64 is lost."""
    product = x * y
    parts = []
    for value in (x, y):
        high = (value * 134217729.0) - (value * 134217729.0 - value)
        parts.append((high, value - high))
    (x1, x2), (y1, y2) = parts
    error = ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2
    exact = np.isfinite(error)
    wide = np.longdouble
    total = product.astype(wide) + z.astype(wide) + np.where(exact, error, 0).astype(wide)
    return total.astype(np.float64)


def guarded(launch):
    """``launch`` with every tensor among guards."""

    def among_guards(kernel, grid, warps, arguments):
        guards = {name: _Guarded(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        with _one_launch:
            launch(kernel, grid, warps, arguments | {name: guard.view for name, guard in guards.items()})
        for name, guard in guards.items():
            assert guard.is_intact(), f"{kernel.__name__} wrote beside {name}"
            guard.give_back()

    return among_guards


class _Guarded:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        garbage = float("nan") if tensor.is_floating_point() else 0xAA
        self.buffer = torch.full((extent + 2 * _MARGIN,), garbage, dtype=tensor.dtype)
        self.view = self.buffer.as_strided(tensor.shape, tensor.stride(), _MARGIN)
        self.view.copy_(tensor)
        self.before = self.view.clone()

    def is_intact(self) -> bool:
        """Whether what lies around is as it was."""
        margins = torch.cat([self.buffer[:_MARGIN], self.buffer[-_MARGIN:]])
        return bool(margins.isnan().all() if margins.is_floating_point() else (margins == 0xAA).all())

    def give_back(self) -> None:
        """What the kernel wrote goes to the tensor; of an expanded one nothing was written."""
        if not torch.equal(self._bits(self.view), self._bits(self.before)):
            self.tensor.copy_(self.view)

    @staticmethod
    def _bits(tensor: torch.Tensor) -> torch.Tensor:
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return tensor.view(kinds[tensor.dtype.itemsize])
