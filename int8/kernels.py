"""The two Triton kernels: quantising an input, with what comes before it, and the int8 matmul.

Each does what ``reference.py`` does; the integers are the same to the bit. They are launched by
``launch.py`` with the sizes of ``configs.py``.
"""

# mypy: disallow-untyped-defs=False
# Triton gives pointers and tensors their types at compile time; annotations of its own kind only.

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # scheme.ROTATION_BLOCK
STAGES = tl.constexpr(7)
INVERSE_SQRT_BLOCK = tl.constexpr(128**-0.5)
MIN_ABSMAX = tl.constexpr(1e-30)
INT8_MAX = tl.constexpr(127.0)
INVERSE_INT8_MAX = tl.constexpr(1 / 127)
ROUNDING = tl.constexpr(
    12582912.0
)  # 1.5·2^23: adding it leaves no bit for a fraction, ties go to even
NORM_EPS = tl.constexpr(1e-5)
INVERSE_SQRT_2 = tl.constexpr(0.5**0.5)


@triton.jit
def _butterfly(y, half: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """One stage of the transform: (a, b) → (a + b, a − b) for channels ``half`` apart.

    The partner's value comes out of an integer sum over the pair (sum of bits minus own bits, modulo
    2^32: exact), which Triton does in registers or by one shuffle, without changing the layout.
    """
    pairs = tl.reshape(y, [ROWS * GROUP // (2 * half), 2, half])
    bits = pairs.to(tl.int32, bitcast=True)
    partner = (tl.sum(bits, axis=1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    own_sign = tl.where(tl.arange(0, 2)[None, :, None] == 0, 1.0, -1.0)
    # ±own + partner: the product is exact, so that one fused operation rounds as a sum does.
    return tl.reshape(tl.fma(pairs, own_sign, partner), [ROWS, GROUP])


@triton.jit
def _rotate(y, sign, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Signs, then the normalised transform of every block of 128 channels."""
    y = y * sign
    for stage in tl.static_range(STAGES):
        y = _butterfly(y, 1 << stage, ROWS, GROUP)
    return y * INVERSE_SQRT_BLOCK


@triton.jit
def _rounded(y, BY_HAND: tl.constexpr):
    """y, so that the cast to bfloat16 that follows cannot round: Triton's interpreter would cut bits off."""
    if BY_HAND:
        bits = y.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        y = (bits & -65536).to(tl.float32, bitcast=True)
    return y


@triton.jit
def _row_statistics(x, offsets, row_ok, K, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Mean and 1/√(variance + eps) of each row, [ROWS, 1]; a group at a time, merged as by Chan et al."""
    columns = tl.arange(0, GROUP)[None, :]
    mean = tl.zeros([ROWS, 1], tl.float32)
    squares = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, GROUP):
        inside = columns < K - start
        count = tl.minimum(K - start, GROUP).to(tl.float32)
        part = tl.load(x + offsets + start + columns, mask=row_ok & inside, other=0.0)
        part = part.to(tl.float32)
        part_mean = tl.sum(part, axis=1, keep_dims=True) / count
        centred = tl.where(inside, part - part_mean, 0.0)
        part_squares = tl.sum(centred * centred, axis=1, keep_dims=True)
        delta = part_mean - mean
        share = count / (start + count)
        squares += part_squares + delta * delta * (start * share)
        mean += delta * share
    return mean, 1.0 / tl.sqrt_rn(squares / K + NORM_EPS)


@triton.jit
def quantize_kernel(
    x,
    shift,
    scale,
    signs,
    values,
    scales,
    M,
    K,
    rotated,
    groups,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    ROTATE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BY_HAND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x [M, K] → values int8 [M, K], scales float32 [M, groups]; a program does ROWS rows.

    signs float32 [128]; shift and scale float32 [K] with NORM; ``rotated``: how many channels
    are rotated, all of them unless HAS_TAIL.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_ok = rows < M
    offsets = rows.to(tl.int64) * K
    columns = tl.arange(0, GROUP)[None, :]
    if NORM:
        mean, inverse_deviation = _row_statistics(x, offsets, row_ok, K, ROWS, GROUP)
    if ROTATE:
        sign = tl.load(signs + columns % BLOCK)
    for group in range(0, groups):
        channels = group * GROUP + columns
        inside = channels < K
        loaded = tl.load(x + offsets + channels, mask=row_ok & inside, other=0.0)
        y = loaded.to(tl.float32)
        if NORM:
            factor = tl.load(scale + channels, mask=inside, other=0.0).to(tl.float32) + 1.0
            summand = tl.load(shift + channels, mask=inside, other=0.0).to(tl.float32)
            y = (y - mean) * inverse_deviation * factor + summand
            # The unfused code hands on x's dtype: so many bits, no more.
            y = _rounded(tl.where(inside, y, 0.0), BY_HAND).to(loaded.dtype).to(tl.float32)
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * INVERSE_SQRT_2))
            y = _rounded(y, BY_HAND).to(loaded.dtype).to(tl.float32)
        if ROTATE:
            turned = _rotate(y, sign, ROWS, GROUP)
            y = tl.where(channels < rotated, turned, y) if HAS_TAIL else turned
        absmax = tl.max(tl.abs(y), axis=1, keep_dims=True)
        empty = absmax < MIN_ABSMAX
        inverse = tl.where(empty, 0.0, tl.div_rn(INT8_MAX, tl.where(empty, 1.0, absmax)))
        # The sum's last byte is the integer: 1.5·2^23 ends in zeros.
        integers = (y * inverse + ROUNDING).to(tl.int32, bitcast=True)
        tl.store(values + offsets + channels, integers.to(tl.int8), mask=row_ok & inside)
        out = tl.where(empty, 0.0, absmax * INVERSE_INT8_MAX)
        # The card's max gives the operand that is a number: a NaN would be lost, the row come out finite.
        broken = tl.max((y != y).to(tl.int32), axis=1, keep_dims=True)
        out = tl.where(broken > 0, float("nan"), out)
        tl.store(scales + rows.to(tl.int64) * groups + group, out, mask=row_ok)


@triton.jit
def _pick(section, first, second, third, SECTIONS: tl.constexpr):
    """The pointer of the program's section: of q, k or v where three matmuls are one."""
    if SECTIONS > 1:
        first = tl.where(section == 1, second, first)
    if SECTIONS > 2:
        first = tl.where(section == 2, third, first)
    return first


@triton.jit
def matmul_kernel(
    xq,
    x_scales,
    w0,
    w1,
    w2,
    scales0,
    scales1,
    scales2,
    bias0,
    bias1,
    bias2,
    out0,
    out1,
    out2,
    M,
    N,
    K,
    groups,
    SECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUPER_M: tl.constexpr,
):
    """int8 [M, K] times up to three int8 [N, K]ᵀ → [M, N] each, scaled, with bias, in out's dtype.

    EVEN_K: K is a multiple of BLOCK_K. Programs go through SUPER_M tiles of M before the next tile of N,
    so that what runs at once shares its weights and inputs in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    in_super = SUPER_M * tiles_n * SECTIONS
    first_m = (program // in_super) * SUPER_M
    height = tl.minimum(tiles_m - first_m, SUPER_M)
    tile_m = first_m + (program % in_super) % height
    section_tile = (program % in_super) // height
    section = section_tile // tiles_n
    tile_n = section_tile % tiles_n

    w = _pick(section, w0, w1, w2, SECTIONS)
    w_scales = _pick(section, scales0, scales1, scales2, SECTIONS)
    out = _pick(section, out0, out1, out2, SECTIONS)

    # One 64-bit base for a tile and 32-bit offsets within it: half the registers of 64-bit pointers.
    first_row = tile_m * BLOCK_M
    first_col = tile_n * BLOCK_N
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one again; their results are not stored.
    safe_rows = tl.minimum(rows, M - 1 - first_row)
    safe_cols = tl.minimum(cols, N - 1 - first_col)
    x_offsets = safe_rows[:, None] * K + depth[None, :]
    w_offsets = safe_cols[None, :] * K + depth[:, None]
    x_base = xq + first_row.to(tl.int64) * K
    w_base = w + first_col.to(tl.int64) * K
    x_scale_base = x_scales + first_row.to(tl.int64) * groups
    w_scale_base = w_scales + first_col.to(tl.int64) * groups

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    inner = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x_tile = tl.load(x_base + x_offsets)
            w_tile = tl.load(w_base + w_offsets)
        else:
            x_tile = tl.load(x_base + x_offsets, mask=depth[None, :] < K - start, other=0)
            w_tile = tl.load(w_base + w_offsets, mask=depth[:, None] < K - start, other=0)
        inner = tl.dot(x_tile, w_tile, inner, out_dtype=tl.int32)
        x_base += BLOCK_K
        w_base += BLOCK_K
        following = start + BLOCK_K
        if (following % GROUP == 0) | (following >= K):
            group = start // GROUP
            x_scale = tl.load(x_scale_base + safe_rows * groups + group)
            w_scale = tl.load(w_scale_base + safe_cols * groups + group)
            total += inner.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
            inner = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)

    if HAS_BIAS:
        bias = _pick(section, bias0, bias1, bias2, SECTIONS)
        total += tl.load(bias + first_col + safe_cols).to(tl.float32)[None, :]
    place = first_row.to(tl.int64) * N + first_col + (rows[:, None] * N + cols[None, :])
    inside = (rows[:, None] < M - first_row) & (cols[None, :] < N - first_col)
    tl.store(out + place, _rounded(total, BY_HAND).to(out.dtype.element_ty), mask=inside)
