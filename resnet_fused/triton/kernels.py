"""The kernels: device code alone, which knows neither torch nor how it is launched.

Every kernel that goes over a tensor sees tiles of it. The innermost axis of memory is the second of a tile: channels in
rows (``ROWS``: channels_last, or a single position), positions in planes. A program owns ``CHANNELS`` channels, whose
constants it makes once, and of what lies along them the chunks ``split``, ``split + splits``, ...: ``OTHERS`` rows, or
``OTHERS`` positions of one plane of each channel. All programs go through the batch together. The pass that follows
another one begins at the end, which is what the L2 still has.

Sizes come as units times a constexpr unit, so that the compiler knows what divides them and makes accesses of 16 bytes.

Arithmetic is float32, for float64 tensors float64. Sums are taken in short groups of terms and the groups in float64;
programs that share channels write theirs to ``partials``, (splits, sums, C) in float64, and whoever needs them adds
them up, always in the same order. There are no atomics. Maths and the reasons for its steps are those of
``csrc/batch_norm.h``; where sums are compensated, ``zero`` is a zero that the compiler does not know, so that it leaves
a product's rounding where it is.
"""

import triton
import triton.language as tl

# Programs whose sums are added up at once.
MERGED: tl.constexpr = tl.constexpr(8)


# Numbers whose values are not compiled in: units say what 16 divides, and one image needs no kernel of its own.
_SIZES = ["batch", "channels", "channel_units", "position_units", "units", "count", "width"]
_STRIDES = ["mean_stride", "var_stride", "mean_stride2", "var_stride2"]
_NUMBERS = [*_SIZES, *_STRIDES, "chunks", "splits", "programs", "terms"]


# Where a program is.


@triton.jit
def _along(vector, ROWS: tl.constexpr):
    """One value a channel, as a column or row of tiles."""
    if ROWS:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def _place(
    channel, chunk, chunks, batch, channels, positions, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OTHERS: tl.constexpr
):
    """Offsets of a tile's values, and which of them are there. ``batch`` counts rows, or planes of a channel."""
    if ROWS:
        row = chunk.to(tl.int64) * OTHERS + tl.arange(0, OTHERS)
        at = row[:, None] * channels + channel[None, :]
        there = (row < batch)[:, None] & (channel < channels)[None, :]
    else:
        parts = (positions + OTHERS - 1) // OTHERS
        n = chunk // parts
        position = (chunk - n * parts) * OTHERS + tl.arange(0, OTHERS)
        plane = n.to(tl.int64) * channels + channel
        at = plane[:, None] * positions + position[None, :]
        there = (channel < channels)[:, None] & (position < positions)[None, :] & (chunk < chunks)
    return at, there


@triton.jit
def _mask_place(
    group, chunk, chunks, batch, channels, positions, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OTHERS: tl.constexpr
):
    """The same of the mask's bytes."""
    if ROWS:
        row = chunk.to(tl.int64) * OTHERS + tl.arange(0, OTHERS)
        byte = group * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
        row_bytes = (channels + 7) // 8
        at = row[:, None] * row_bytes + byte[None, :]
        there = (row < batch)[:, None] & (byte < row_bytes)[None, :]
    else:
        parts = (positions + OTHERS - 1) // OTHERS
        n = chunk // parts
        channel = group * CHANNELS + tl.arange(0, CHANNELS)
        byte = (chunk - n * parts) * (OTHERS // 8) + tl.arange(0, OTHERS // 8)
        plane_bytes = (positions + 7) // 8
        at = (n.to(tl.int64) * channels + channel)[:, None] * plane_bytes + byte[None, :]
        there = (channel < channels)[:, None] & (byte < plane_bytes)[None, :] & (chunk < chunks)
    return at, there


# Numbers.


@triton.jit
def _wide(value):
    """In the type of the arithmetic."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def _compute(value, DOUBLE: tl.constexpr):
    """A float64 in the type of the arithmetic."""
    if DOUBLE:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def _as_written(value, TYPE: tl.constexpr):
    """As it is once it has been stored as ``TYPE``."""
    return _wide(value.to(TYPE))


@triton.jit
def _fma(a, b, c):
    """With one rounding; factors that are the same for a column or a row are spread out first."""
    a, b = tl.broadcast(a, b)
    a, c = tl.broadcast(a, c)
    b, c = tl.broadcast(b, c)
    return tl.fma(a, b, c)


@triton.jit
def _passes(output):
    """Whether the gradient passes the ReLU: torch's rule is "result <= 0 ? 0 : grad", which NaN passes too."""
    return ~(output <= 0)


@triton.jit
def _vector(pointer, channel, there, otherwise, DOUBLE: tl.constexpr):
    """One value a channel; ``otherwise`` without a tensor."""
    if pointer is None:
        value = tl.full(channel.shape, otherwise, tl.float64)
    else:
        value = tl.load(pointer + channel, mask=there, other=0).to(tl.float64)
    return _compute(value, DOUBLE)


@triton.jit
def _packed(keep, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OTHERS: tl.constexpr):
    """A tile of booleans as bytes, the lowest bit first."""
    OUTER: tl.constexpr = OTHERS if ROWS else CHANNELS
    INNER: tl.constexpr = CHANNELS if ROWS else OTHERS
    bits = tl.reshape(keep.to(tl.int32), (OUTER, INNER // 8, 8))
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _unpacked(byte, ROWS: tl.constexpr, CHANNELS: tl.constexpr, OTHERS: tl.constexpr):
    """The inverse."""
    OUTER: tl.constexpr = OTHERS if ROWS else CHANNELS
    INNER: tl.constexpr = CHANNELS if ROWS else OTHERS
    bits = (byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (OUTER, INNER)) != 0


# Sums.


@triton.jit
def _merged(partials, k, SUMS: tl.constexpr, splits, channel, there, channels):
    """The ``k``-th sum of each channel over all programs that have a part of it."""
    total = tl.zeros(channel.shape, tl.float64)
    split = tl.arange(0, MERGED)
    for first in range(0, splits, MERGED):
        at = ((first + split).to(tl.int64) * SUMS + k)[:, None] * channels + channel[None, :]
        part = tl.load(partials + at, mask=(first + split < splits)[:, None] & there[None, :], other=0.0)
        total += tl.sum(part, axis=0)
    return total


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_merge_kernel(partials, merged, splits, width, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """(splits, width) of each branch added up over the splits, where every program of the next pass would have too many
    of them to add up.
    """
    branch = tl.program_id(1)
    partials += branch.to(tl.int64) * splits * width
    merged += branch * width
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    total = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, splits, SPLITS):
        at = (first + split).to(tl.int64)[:, None] * width + column[None, :]
        part = tl.load(partials + at, mask=(first + split < splits)[:, None] & (column < width)[None, :], other=0.0)
        total += tl.sum(part, axis=0)
    tl.store(merged + column, total, mask=column < width)


@triton.jit
def _plus(sum_, rest, term, COMPENSATED: tl.constexpr):
    """A sum and what its additions rounded off, by Knuth's two-sum."""
    total = sum_ + term
    if COMPENSATED:
        part = total - sum_
        rest += (sum_ - (total - part)) + (term - part)
    return total, rest


@triton.jit
def _rounded_off(a, b, difference):
    """a - b without what ``difference`` has of it."""
    part = difference - a
    return (a - (difference - part)) - (b + part)


@triton.jit
def _plus_product(sum_, rest, a, b, zero, COMPENSATED: tl.constexpr):
    """The same with a product, and what that rounded off."""
    if COMPENSATED:
        product = tl.fma(a, b, zero)
        rest += tl.fma(a, b, -product)
        return _plus(sum_, rest, product, COMPENSATED)
    else:
        return tl.fma(a, b, sum_), rest


@triton.jit
def _total(sum_, rest, COMPENSATED: tl.constexpr):
    wide = sum_.to(tl.float64)
    if COMPENSATED:
        # Of an infinite sum the rest is not a number.
        return tl.where(sum_ - sum_ == 0, wide + rest.to(tl.float64), wide)
    else:
        return wide


@triton.jit
def _smaller(a, b):
    return tl.where(b < a, b, a)


@triton.jit
def _larger(a, b):
    return tl.where(a < b, b, a)


@triton.jit
def _sample(x, i, channel, there, count, batch, channels, positions, ROWS: tl.constexpr):
    at = (count - 1) * i // 4
    at = at * channels + channel if ROWS else at + channel.to(tl.int64) * positions
    return _wide(tl.load(x + at, mask=there & (count > 0), other=0.0))


@triton.jit
def _shift(x, channel, there, batch, channels, positions, ROWS: tl.constexpr):
    """A value amid five of a channel: their median, which no single outlier is. Where it is infinite, zero."""
    count = tl.cast(batch, tl.int64)
    if not ROWS:
        count = tl.cast(count > 0, tl.int64) * positions
    v0 = _sample(x, 0, channel, there, count, batch, channels, positions, ROWS)
    v1 = _sample(x, 1, channel, there, count, batch, channels, positions, ROWS)
    v2 = _sample(x, 2, channel, there, count, batch, channels, positions, ROWS)
    v3 = _sample(x, 3, channel, there, count, batch, channels, positions, ROWS)
    v4 = _sample(x, 4, channel, there, count, batch, channels, positions, ROWS)
    low = _larger(_smaller(v0, v1), _smaller(v2, v3))
    high = _smaller(_larger(v0, v1), _larger(v2, v3))
    median = _larger(_smaller(low, high), _smaller(_larger(low, high), v4))
    return tl.where(median - median == 0, median, 0.0)


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_statistics_kernel(
    x,
    x2,
    partials,
    shifts,
    zero,
    batch,
    channel_units,
    position_units,
    chunks,
    splits,
    terms,
    ROWS: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHERS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of x - shift and of its square, of one input or of both: the third axis of the grid. Reads each once."""
    channels, positions = channel_units * CHANNEL_UNIT, position_units * POSITION_UNIT
    group, split, branch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if x2 is not None:
        x = tl.where(branch == 0, x, x2)
        partials += branch.to(tl.int64) * splits * 2 * channels
        shifts += branch * channels
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    shift = _shift(x, channel, known, batch, channels, positions, ROWS)
    tl.store(shifts + channel, shift.to(tl.float64), mask=known & (split == 0))
    shift = _along(shift, ROWS)

    SHAPE: tl.constexpr = (OTHERS, CHANNELS) if ROWS else (CHANNELS, OTHERS)
    # Of float values: one that is far off the others, or a shift that is, would take their digits.
    COMPENSATED: tl.constexpr = x.dtype.element_ty == tl.float32
    nothing = tl.zeros(SHAPE, shift.dtype)
    unknown_zero = nothing + zero
    total = tl.zeros(SHAPE, tl.float64)
    total_square = tl.zeros(SHAPE, tl.float64)
    for first in range(split, chunks, splits * terms):
        sum_, rest = nothing, nothing
        square, rest_square = nothing, nothing
        for step in range(0, terms, UNROLL):
            for u in tl.static_range(UNROLL):
                chunk = first + (step + u) * splits
                at, there = _place(channel, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
                value = _wide(tl.load(x + at, mask=there, other=0.0))
                difference = tl.where(there, value - shift, 0.0)
                sum_, rest = _plus(sum_, rest, difference, COMPENSATED)
                square, rest_square = _plus_product(
                    square, rest_square, difference, difference, unknown_zero, COMPENSATED
                )
                if COMPENSATED:
                    lost = tl.where(there, _rounded_off(value, shift, difference), 0.0)
                    rest += lost
                    rest_square = tl.fma(difference + difference, lost, rest_square)
        total += _total(sum_, rest, COMPENSATED)
        total_square += _total(square, rest_square, COMPENSATED)
    AXIS: tl.constexpr = 0 if ROWS else 1
    to = partials + split.to(tl.int64) * 2 * channels + channel
    tl.store(to, tl.sum(total, axis=AXIS), mask=known)
    tl.store(to + channels, tl.sum(total_square, axis=AXIS), mask=known)


@triton.jit
def _statistics(partials, shifts, splits, channel, known, channels, count, EPS: tl.constexpr, DOUBLE: tl.constexpr):
    """Mean, biased variance and invstd of each channel. Of no values they are zeros, so that the gradients of weight
    and bias over an empty batch are zero and not NaN.
    """
    number = tl.cast(count, tl.float64)
    divisor = tl.where(number == 0, 1.0, number)
    shift = tl.load(shifts + channel, mask=known, other=0.0)
    offset = _merged(partials, 0, 2, splits, channel, known, channels) / divisor
    var = _merged(partials, 1, 2, splits, channel, known, channels) / divisor - offset * offset
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    invstd = 1.0 / tl.sqrt(var + EPS)
    return _compute(shift + offset, DOUBLE), _compute(var, DOUBLE), _compute(invstd, DOUBLE)


@triton.jit
def _update_running(running, stride, channel, known, batch_value, momentum):
    to = running + channel.to(tl.int64) * stride
    value = (1.0 - momentum) * tl.load(to, mask=known, other=0).to(tl.float64) + momentum * batch_value
    # Warps that have the same channel have all read it before one of them writes.
    tl.debug_barrier()
    # Through float32 where the tensor is narrower: a conversion from float64 would not round as torch's does.
    tl.store(to, value if running.dtype.element_ty == tl.float64 else value.to(tl.float32), mask=known)


@triton.jit
def _update(running_mean, mean_stride, running_var, var_stride, channel, known, mean, var, momentum, count):
    """running = (1 - momentum) running + momentum batch, with the unbiased variance."""
    number = tl.cast(count, tl.float64)
    if running_mean is not None:
        _update_running(running_mean, mean_stride, channel, known, mean.to(tl.float64), momentum)
    if running_var is not None:
        unbiased = number / (number - 1.0)
        _update_running(running_var, var_stride, channel, known, unbiased * var.to(tl.float64), momentum)


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_finish_statistics_kernel(
    partials,
    shifts,
    mean,
    var,
    splits,
    channels,
    count,
    DOUBLE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics that no pass over the tensor follows."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    m, v, _ = _statistics(partials, shifts, splits, channel, known, channels, count, 1.0, DOUBLE)
    tl.store(mean + channel, m, mask=known)
    tl.store(var + channel, v, mask=known)


@triton.jit(do_not_specialize=_NUMBERS)
def running_stats_update_kernel(
    running_mean,
    mean_stride,
    running_var,
    var_stride,
    mean,
    var,
    channels,
    momentum: tl.float64,
    count,
    CHANNELS: tl.constexpr,
):
    """Running statistics on their own."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    m = _vector(mean, channel, known, 0.0, True)
    v = _vector(var, channel, known, 0.0, True)
    _update(running_mean, mean_stride, running_var, var_stride, channel, known, m, v, momentum, count)


# The pass that normalizes.


@triton.jit
def _scale(weight, invstd, var, channel, known, EPS: tl.constexpr, DOUBLE: tl.constexpr):
    """weight invstd, with one rounding where it is made from the variance."""
    if invstd is not None:
        return _vector(weight, channel, known, 1.0, DOUBLE) * _vector(invstd, channel, known, 0.0, DOUBLE)
    else:
        spread = tl.sqrt(_vector(var, channel, known, 0.0, DOUBLE).to(tl.float64) + EPS)
        return _compute(_vector(weight, channel, known, 1.0, True) / spread, DOUBLE)


@triton.jit
def _normalization(
    weight,
    mean,
    var,
    invstd,
    partials,
    shifts,
    splits,
    running_mean,
    mean_stride,
    running_var,
    var_stride,
    momentum,
    count,
    writes,
    channel,
    known,
    channels,
    EPS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Mean and scale of each channel: of statistics that are given, or of sums, whose statistics one program writes."""
    if partials is None:
        return _vector(mean, channel, known, 0.0, DOUBLE), _scale(weight, invstd, var, channel, known, EPS, DOUBLE)
    else:
        m, v, i = _statistics(partials, shifts, splits, channel, known, channels, count, EPS, DOUBLE)
        tl.store(mean + channel, m, mask=known & writes)
        tl.store(var + channel, v, mask=known & writes)
        tl.store(invstd + channel, i, mask=known & writes)
        # torch leaves the running statistics alone where the batch is empty.
        updates = known & writes & (tl.cast(count, tl.int64) > 0)
        _update(running_mean, mean_stride, running_var, var_stride, channel, updates, m, v, momentum, count)
        return m, _vector(weight, channel, known, 1.0, DOUBLE) * i


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_forward_kernel(
    x,
    weight,
    bias,
    mean,
    var,
    invstd,
    partials,
    shifts,
    running_mean,
    mean_stride,
    running_var,
    var_stride,
    momentum: tl.float64,
    x2,
    weight2,
    bias2,
    mean2,
    var2,
    invstd2,
    partials2,
    shifts2,
    running_mean2,
    mean_stride2,
    running_var2,
    var_stride2,
    momentum2: tl.float64,
    residual,
    output,
    mask,
    batch,
    channel_units,
    position_units,
    count,
    chunks,
    programs,
    splits,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Normalizes, adds, applies the ReLU, writes the mask: reads every input once and writes the output once."""
    channels, positions = channel_units * CHANNEL_UNIT, position_units * POSITION_UNIT
    TYPE: tl.constexpr = x.dtype.element_ty
    DOUBLE: tl.constexpr = tl.float64 == TYPE
    group, program = tl.program_id(0), tl.program_id(1)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    m, scale = _normalization(
        weight,
        mean,
        var,
        invstd,
        partials,
        shifts,
        splits,
        running_mean,
        mean_stride,
        running_var,
        var_stride,
        momentum,
        count,
        program == 0,
        channel,
        known,
        channels,
        EPS,
        DOUBLE,
    )
    b = _vector(bias, channel, known, 0.0, DOUBLE)
    if x2 is not None:
        m2, scale2 = _normalization(
            weight2,
            mean2,
            var2,
            invstd2,
            partials2,
            shifts2,
            splits,
            running_mean2,
            mean_stride2,
            running_var2,
            var_stride2,
            momentum2,
            count,
            program == 0,
            channel,
            known,
            channels,
            EPS2,
            DOUBLE,
        )
        b += _vector(bias2, channel, known, 0.0, DOUBLE)
        m2, scale2 = _along(m2, ROWS), _along(scale2, ROWS)
    m, scale, b = _along(m, ROWS), _along(scale, ROWS), _along(b, ROWS)
    for back in range(program, chunks, programs):
        chunk = chunks - 1 - back
        at, there = _place(channel, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
        value = _wide(tl.load(x + at, mask=there, other=0.0))
        if x2 is not None:
            other = _wide(tl.load(x2 + at, mask=there, other=0.0))
            value = _fma(value - m, scale, _fma(other - m2, scale2, b))
        elif residual is not None:
            other = _wide(tl.load(residual + at, mask=there, other=0.0))
            value = _fma(value - m, scale, b) + other
        else:
            value = _fma(value - m, scale, b)
        if RELU:
            value = tl.where(_passes(value), value, 0.0)
        result = value.to(TYPE)
        tl.store(output + at, result, mask=there)
        if mask is not None:
            # Of the rounded value: a small positive one may become zero, and then the gradient stops there.
            bits = _packed(_passes(_wide(result)) & there, ROWS, CHANNELS, OTHERS)
            at, there = _mask_place(group, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
            tl.store(mask + at, bits, mask=there)


# Backward.


@triton.jit
def _gradient(gradient, gradient2, at, there, TYPE: tl.constexpr):
    """What comes from above: one gradient, or the sum of two, rounded as one that was written to memory."""
    grad = _wide(tl.load(gradient + at, mask=there, other=0.0))
    if gradient2 is not None:
        grad = _as_written(grad + _wide(tl.load(gradient2 + at, mask=there, other=0.0)), TYPE)
    return grad


@triton.jit
def _kept(
    gradient,
    there,
    difference,
    scale,
    b,
    mask,
    group,
    chunk,
    chunks,
    batch,
    channels,
    positions,
    TYPE: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """The gradient behind the ReLU: kept by the mask, by the forward made again, or all of it."""
    if mask is not None:
        at, inside = _mask_place(group, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
        byte = tl.load(mask + at, mask=inside, other=0)
        return tl.where(_unpacked(byte, ROWS, CHANNELS, OTHERS), gradient, 0.0)
    elif FROM_INPUT:
        # As the forward rounded it, to the bit.
        return tl.where(_passes(_as_written(_fma(difference, scale, b), TYPE)), gradient, 0.0)
    else:
        return gradient


@triton.jit
def _origin(mean, TYPE: tl.constexpr):
    """What differences are taken from: the mean as a value of ``TYPE``, so that of 16-bit values they are exact."""
    origin = _as_written(mean, TYPE)
    return tl.where(origin - origin == 0, origin, 0.0)


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_backward_reduce_kernel(
    gradient,
    gradient2,
    x,
    weight,
    bias,
    mean,
    var,
    invstd,
    x2,
    weight2,
    mean2,
    var2,
    invstd2,
    mask,
    grad_input,
    grad_input2,
    grad_residual,
    partials,
    zero,
    batch,
    channel_units,
    position_units,
    chunks,
    splits,
    terms,
    TWO: tl.constexpr,
    ROWS: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHERS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sums of the gradient behind the ReLU, of it times (x - mean), and of it times (x2 - mean2) with a second branch.

    Reads the gradients of the output, inputs and mask once; an input that is None is not needed. With constant
    statistics the gradients of the inputs need no sum: then this pass writes them, too, and is the only one.
    """
    channels, positions = channel_units * CHANNEL_UNIT, position_units * POSITION_UNIT
    TYPE: tl.constexpr = gradient.dtype.element_ty
    DOUBLE: tl.constexpr = tl.float64 == TYPE
    # Float values' sums are compensated: a gradient's sum is often a small rest of large terms.
    COMPENSATED: tl.constexpr = tl.float32 == TYPE
    SUMS: tl.constexpr = 3 if TWO else 2
    SHAPE: tl.constexpr = (OTHERS, CHANNELS) if ROWS else (CHANNELS, OTHERS)
    group, split = tl.program_id(0), tl.program_id(1)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    m = _vector(mean, channel, known, 0.0, DOUBLE)
    scale = _along(_scale(weight, invstd, var, channel, known, EPS, DOUBLE), ROWS)
    b = _along(_vector(bias, channel, known, 0.0, DOUBLE), ROWS)
    from_origin = _along(_origin(m, TYPE), ROWS)
    m = _along(m, ROWS)
    if TWO:
        m2 = _vector(mean2, channel, known, 0.0, DOUBLE)
        scale2 = _along(_scale(weight2, invstd2, var2, channel, known, EPS2, DOUBLE), ROWS)
        from_origin2 = _along(_origin(m2, TYPE), ROWS)
    nothing = tl.zeros(SHAPE, m.dtype)
    unknown_zero = nothing + zero
    total = tl.zeros(SHAPE, tl.float64)
    total_xmu = tl.zeros(SHAPE, tl.float64)
    total_xmu2 = tl.zeros(SHAPE, tl.float64)
    for first in range(split, chunks, splits * terms):
        sum_, rest = nothing, nothing
        xmu, rest_xmu = nothing, nothing
        xmu2, rest_xmu2 = nothing, nothing
        for step in range(0, terms, UNROLL):
            for u in tl.static_range(UNROLL):
                chunk = first + (step + u) * splits
                at, there = _place(channel, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
                value = nothing
                grad = _gradient(gradient, gradient2, at, there, TYPE)
                if x is not None:
                    value = _wide(tl.load(x + at, mask=there, other=0.0))
                if x2 is not None:
                    value2 = _wide(tl.load(x2 + at, mask=there, other=0.0))
                kept = _kept(
                    grad,
                    there,
                    value - m,
                    scale,
                    b,
                    mask,
                    group,
                    chunk,
                    chunks,
                    batch,
                    channels,
                    positions,
                    TYPE,
                    FROM_INPUT,
                    ROWS,
                    CHANNELS,
                    OTHERS,
                )
                sum_, rest = _plus(sum_, rest, kept, COMPENSATED)
                if x is not None:
                    # Zero where there is no value, and not zero times what is there: that may be infinite.
                    difference = tl.where(there, value - from_origin, 0.0)
                    xmu, rest_xmu = _plus_product(xmu, rest_xmu, kept, difference, unknown_zero, COMPENSATED)
                if x2 is not None:
                    difference = tl.where(there, value2 - from_origin2, 0.0)
                    xmu2, rest_xmu2 = _plus_product(xmu2, rest_xmu2, kept, difference, unknown_zero, COMPENSATED)
                if grad_residual is not None:
                    tl.store(grad_residual + at, kept.to(TYPE), mask=there)
                if grad_input is not None:
                    tl.store(grad_input + at, (kept * scale).to(TYPE), mask=there)
                if grad_input2 is not None:
                    tl.store(grad_input2 + at, (kept * scale2).to(TYPE), mask=there)
        total += _total(sum_, rest, COMPENSATED)
        if x is not None:
            total_xmu += _total(xmu, rest_xmu, COMPENSATED)
        if x2 is not None:
            total_xmu2 += _total(xmu2, rest_xmu2, COMPENSATED)
    AXIS: tl.constexpr = 0 if ROWS else 1
    to = partials + split.to(tl.int64) * SUMS * channels + channel
    tl.store(to, tl.sum(total, axis=AXIS), mask=known)
    tl.store(to + channels, tl.sum(total_xmu, axis=AXIS), mask=known)
    if TWO:
        tl.store(to + 2 * channels, tl.sum(total_xmu2, axis=AXIS), mask=known)


@triton.jit
def _from_origin_to_mean(mean, grad, TYPE: tl.constexpr):
    """What comes off the sum of products; of an infinite sum nothing does."""
    distance = mean.to(tl.float64) - _origin(mean, TYPE).to(tl.float64)
    return tl.where(grad - grad == 0, distance * grad, 0.0)


@triton.jit
def _sums(
    partials, splits, mean, mean2, channel, known, channels, TWO: tl.constexpr, TYPE: tl.constexpr, DOUBLE: tl.constexpr
):
    """The sums of each channel, products about the means themselves."""
    SUMS: tl.constexpr = 3 if TWO else 2
    grad = _merged(partials, 0, SUMS, splits, channel, known, channels)
    m = _vector(mean, channel, known, 0.0, DOUBLE)
    xmu = _merged(partials, 1, SUMS, splits, channel, known, channels)
    xmu -= _from_origin_to_mean(m, grad, TYPE)
    xmu2 = xmu
    if TWO:
        m = _vector(mean2, channel, known, 0.0, DOUBLE)
        xmu2 = _merged(partials, 2, SUMS, splits, channel, known, channels)
        xmu2 -= _from_origin_to_mean(m, grad, TYPE)
    return grad, xmu, xmu2


@triton.jit
def _store(to, channel, value, where):
    """A float64 as one value a channel of any dtype; to 16 bits through float32, as torch rounds."""
    if to is not None:
        tl.store(to + channel, value if to.dtype.element_ty == tl.float64 else value.to(tl.float32), mask=where)


@triton.jit
def _invstd(invstd, var, channel, known, EPS: tl.constexpr, DOUBLE: tl.constexpr):
    return _scale(None, invstd, var, channel, known, EPS, DOUBLE).to(tl.float64)


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_finish_sums_kernel(
    gradient,
    partials,
    mean,
    var,
    invstd,
    mean2,
    var2,
    invstd2,
    sum_grad,
    sum_grad_xmu,
    grad_weight,
    grad_bias,
    grad_weight2,
    grad_bias2,
    splits,
    channels,
    TWO: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums that no pass over the tensor follows: as they are, or as gradients of weights and biases. Of ``gradient``
    only the dtype counts.
    """
    TYPE: tl.constexpr = gradient.dtype.element_ty
    DOUBLE: tl.constexpr = tl.float64 == TYPE
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    grad, xmu, xmu2 = _sums(partials, splits, mean, mean2, channel, known, channels, TWO, TYPE, DOUBLE)
    _store(sum_grad, channel, grad, known)
    _store(sum_grad_xmu, channel, xmu, known)
    _store(grad_bias, channel, grad, known)
    _store(grad_bias2, channel, grad, known)
    if grad_weight is not None:
        _store(grad_weight, channel, xmu * _invstd(invstd, var, channel, known, EPS, DOUBLE), known)
    if grad_weight2 is not None:
        _store(grad_weight2, channel, xmu2 * _invstd(invstd2, var2, channel, known, EPS2, DOUBLE), known)


@triton.jit
def _input_gradient(kept, difference, slope, mean_grad, scale, CONSTANT: tl.constexpr):
    if CONSTANT:
        return kept * scale
    else:
        return _fma(-difference, slope, kept - mean_grad) * scale


@triton.jit(do_not_specialize=_NUMBERS)
def batch_norm_backward_kernel(
    gradient,
    gradient2,
    x,
    weight,
    bias,
    mean,
    var,
    invstd,
    x2,
    weight2,
    mean2,
    var2,
    invstd2,
    mask,
    mean_grad,
    mean_grad_xmu,
    partials,
    grad_input,
    grad_input2,
    grad_residual,
    grad_weight,
    grad_bias,
    grad_weight2,
    grad_bias2,
    batch,
    channel_units,
    position_units,
    count,
    chunks,
    programs,
    splits,
    TWO: tl.constexpr,
    CONSTANT: tl.constexpr,
    ROWS: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    EPS: tl.constexpr,
    EPS2: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """The gradients of inputs and residual, and, from the sums, of weights and biases.

    Reads the gradients of the output, the inputs that are given and the mask once and writes every gradient once. The
    gradient's means are made from sums, or given, or, where statistics are constants (``CONSTANT``), not needed:
        grad_input = (grad - mean_grad - (x - mean) slope) scale
    """
    channels, positions = channel_units * CHANNEL_UNIT, position_units * POSITION_UNIT
    TYPE: tl.constexpr = gradient.dtype.element_ty
    DOUBLE: tl.constexpr = tl.float64 == TYPE
    SHAPE: tl.constexpr = (OTHERS, CHANNELS) if ROWS else (CHANNELS, OTHERS)
    group, program = tl.program_id(0), tl.program_id(1)
    channel = group * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    m = _along(_vector(mean, channel, known, 0.0, DOUBLE), ROWS)
    scale = _along(_scale(weight, invstd, var, channel, known, EPS, DOUBLE), ROWS)
    b = _along(_vector(bias, channel, known, 0.0, DOUBLE), ROWS)
    offset = m
    slope = m
    if TWO:
        m2 = _along(_vector(mean2, channel, known, 0.0, DOUBLE), ROWS)
        scale2 = _along(_scale(weight2, invstd2, var2, channel, known, EPS2, DOUBLE), ROWS)
        slope2 = m2
    if partials is not None:
        grad, xmu, xmu2 = _sums(partials, splits, mean, mean2, channel, known, channels, TWO, TYPE, DOUBLE)
        number = tl.cast(count, tl.float64)
        deviation = _invstd(invstd, var, channel, known, EPS, DOUBLE)
        offset = _along(_compute(grad / number, DOUBLE), ROWS)
        slope = _along(_compute(xmu / number * deviation * deviation, DOUBLE), ROWS)
        writes = known & (program == 0)
        _store(grad_bias, channel, grad, writes)
        _store(grad_weight, channel, xmu * deviation, writes)
        if TWO:
            deviation2 = _invstd(invstd2, var2, channel, known, EPS2, DOUBLE)
            slope2 = _along(_compute(xmu2 / number * deviation2 * deviation2, DOUBLE), ROWS)
            _store(grad_bias2, channel, grad, writes)
            _store(grad_weight2, channel, xmu2 * deviation2, writes)
    elif not CONSTANT:
        deviation = _invstd(invstd, var, channel, known, EPS, DOUBLE)
        offset = _along(_vector(mean_grad, channel, known, 0.0, DOUBLE), ROWS)
        xmu = _vector(mean_grad_xmu, channel, known, 0.0, DOUBLE).to(tl.float64)
        slope = _along(_compute(xmu * deviation * deviation, DOUBLE), ROWS)
    for back in range(program, chunks, programs):
        chunk = chunks - 1 - back
        at, there = _place(channel, chunk, chunks, batch, channels, positions, ROWS, CHANNELS, OTHERS)
        kept = _gradient(gradient, gradient2, at, there, TYPE)
        difference = tl.zeros(SHAPE, m.dtype)
        if x is not None:
            difference = _wide(tl.load(x + at, mask=there, other=0.0)) - m
        if x2 is not None:
            difference2 = _wide(tl.load(x2 + at, mask=there, other=0.0)) - m2
        kept = _kept(
            kept,
            there,
            difference,
            scale,
            b,
            mask,
            group,
            chunk,
            chunks,
            batch,
            channels,
            positions,
            TYPE,
            FROM_INPUT,
            ROWS,
            CHANNELS,
            OTHERS,
        )
        if grad_residual is not None:
            tl.store(grad_residual + at, kept.to(TYPE), mask=there)
        if grad_input is not None:
            result = _input_gradient(kept, difference, slope, offset, scale, CONSTANT)
            tl.store(grad_input + at, result.to(TYPE), mask=there)
        if grad_input2 is not None:
            result = kept * scale2
            if not CONSTANT:
                result = _input_gradient(kept, difference2, slope2, offset, scale2, CONSTANT)
            tl.store(grad_input2 + at, result.to(TYPE), mask=there)


# Addition and ReLU.


@triton.jit(do_not_specialize=_NUMBERS)
def add_relu_forward_kernel(x, residual, output, mask, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """relu(x + residual) over elements in memory order, whose bits are one run."""
    numel = tl.cast(units, tl.int64) * UNIT
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    there = at < numel
    value = _wide(tl.load(x + at, mask=there, other=0.0)) + _wide(tl.load(residual + at, mask=there, other=0.0))
    result = tl.where(_passes(value), value, 0.0).to(x.dtype.element_ty)
    tl.store(output + at, result, mask=there)
    if mask is not None:
        bits = _packed((_passes(_wide(result)) & there)[None, :], True, BLOCK, 1)
        byte = first // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask + byte[None, :], bits, mask=(byte < (numel + 7) // 8)[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def add_relu_backward_kernel(gradient, mask, grad_input, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of both operands."""
    numel = tl.cast(units, tl.int64) * UNIT
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)[None, :]
    there = at < numel
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    bits = tl.load(mask + byte, mask=byte < (numel + 7) // 8, other=0)
    grad = tl.load(gradient + at, mask=there, other=0.0)
    kept = tl.where(_unpacked(bits[None, :], True, BLOCK, 1), grad, 0.0)
    tl.store(grad_input + at, kept, mask=there)
