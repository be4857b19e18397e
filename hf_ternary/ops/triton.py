"""The Triton kernels behind ``hf_ternary::linear`` on NVIDIA GPUs; :mod:`hf_ternary.triton_encoder` runs them too.

A byte of packed weights holds the codes of four neighbouring columns, ``4i + j``. So activations are kept as four planes:
plane j holds the columns ``4i + j``, and the tensor cores multiply it by field j of every byte; nothing is interleaved.

* :func:`_to_planes` quantizes activations to int8 and writes the planes, one token a program;
* :func:`_multiply` computes ``y' = W x'``. The weight comes first because that operand may stay in registers, where two
  instructions unpack four codes. Up to :data:`FUSED` tokens it also does the work of :func:`_to_planes`, in one launch. The
  encoder lets it apply the activation function of a layer too.

Sums of int8 products are exact, and every float operation is rounded by itself (``enable_fp_fusion=False``: no fused
multiply-add), so "int8" gives the bits of :mod:`.reference`. Float activations are summed in float32, in another order.
"""

import threading
from bisect import bisect_left
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..packing import pack, packed_size, unpack
from ..ternarize import SMALLEST_ABSMAX
from . import reference
from .layouts import LayoutCache

# A group of columns starts at a multiple of this many bytes, so that 16 are loaded at once.
ALIGNMENT = 16

# Up to this many tokens there is one launch, and every program quantizes the tokens anew.
FUSED = 16

# Sums of 64 * 127 * columns stay in int32.
LONGEST_GROUP = 2**18

_SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
_INFINITY = tl.constexpr(0x7F800000)  # its bits; those of a NaN are greater
_ROUND = tl.constexpr(1.5 * 2**23)  # float32 has no fractions there: adding it rounds half to even, into the lowest bits


@triton.jit
def magnitude(x):
    """The bits of |x|: they are ordered as the values are, with infinity and NaN on top."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_scale(top):
    """Scale of a token and its inverse, from its largest :func:`magnitude`."""
    finite = top < _INFINITY
    absmax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    nonzero = absmax >= _SMALLEST
    divisor = tl.where(nonzero, absmax, 1.0)
    levels = tl.full(absmax.shape, 127.0, tl.float32)
    scale = tl.where(nonzero, tl.div_rn(absmax, levels), 0.0)
    return tl.where(finite, scale, float("nan")), tl.where(nonzero, tl.div_rn(levels, divisor), 0.0)


@triton.jit
def quantize(x, inverse):
    """Codes int8; zeros where ``inverse`` is 0, whatever ``x`` is."""
    x = tl.where(inverse == 0.0, 0.0, x.to(tl.float32)) * inverse
    return (x + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def column_of(byte, field, group, group_bytes, groups: tl.constexpr):
    """Column of ``x`` that a byte of plane ``field`` holds, and whether it holds one: the others pad a group."""
    g = 0 if groups == 1 else byte // group_bytes
    within = (byte - g * group_bytes) * 4 + field
    return g * group + within, (within < group) & (byte < groups * group_bytes)


@triton.jit
def _activated(x, FUNCTION: tl.constexpr):
    """An activation function by its name in :data:`hf_ternary.architectures.ACTIVATION_FUNCTIONS`; a NaN stays one."""
    if FUNCTION == "gelu":
        x *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3)
        x *= tl.sigmoid(x * (1.5957691216057308 + 0.07135481282635437 * x * x))
    elif FUNCTION == "quick_gelu":
        x *= tl.sigmoid(1.702 * x)
    elif FUNCTION == "silu":
        x *= tl.sigmoid(x)
    else:
        tl.static_assert(FUNCTION == "relu")
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _codes(packed, FIELD: tl.constexpr, OPERAND: tl.constexpr, COMPILED: tl.constexpr):
    """A field of every byte: 64 * the codes as int8, or the codes as ``OPERAND``."""
    if COMPILED:  # four bytes at once; the compiler would take them one by one
        codes = tl.inline_asm_elementwise(
            f"shl.b32 $0, $1, {6 - 2 * FIELD}; and.b32 $0, $0, 0xC0C0C0C0; xor.b32 $0, $0, 0x80808080;",
            "=r,r",
            [packed],
            tl.int8,
            True,
            4,
        )
    else:
        codes = (((packed << (6 - 2 * FIELD)) & 0xC0) ^ 0x80).to(tl.int8, bitcast=True)
    if OPERAND != tl.int8:
        codes = (codes >> 6).to(OPERAND)
    return codes


@triton.jit
def _to_planes(planes, scales, x, group, group_bytes, groups: tl.constexpr, stride_m, stride_k, BLOCK: tl.constexpr):
    """``x[row]`` -> ``planes[row, j, :]`` with its scale if the planes are int8, else as it is; padding is 0."""
    row = tl.program_id(0).to(tl.int64)
    row_bytes, columns = groups * group_bytes, groups * group
    x += row * stride_m
    planes += row * 4 * row_bytes
    quantized: tl.constexpr = planes.dtype.element_ty == tl.int8
    inverse = 0.0
    if quantized:
        top = tl.zeros([4 * BLOCK], tl.int32)
        for start in range(0, columns, 4 * BLOCK):
            column = start + tl.arange(0, 4 * BLOCK)
            top = tl.maximum(top, magnitude(tl.load(x + column * stride_k, mask=column < columns, other=0.0)))
        scale, inverse = token_scale(tl.max(top, 0))
        tl.store(scales + row, scale)
    field = tl.arange(0, 4)[None, :]
    for start in range(0, row_bytes, BLOCK):
        byte = start + tl.arange(0, BLOCK)[:, None]
        column, inside = column_of(byte, field, group, group_bytes, groups)
        value = tl.load(x + column * stride_k, mask=inside, other=0.0)
        value = quantize(value, inverse) if quantized else value.to(planes.dtype.element_ty)
        tl.store(planes + field * row_bytes + byte, value, mask=byte < row_bytes)


@triton.jit(do_not_specialize=["M"])
def _multiply(
    y,
    x,
    scales,
    weight,
    weight_scale,
    bias,
    M,
    N,
    group,
    group_bytes,
    groups,
    stride_m,
    stride_k,
    OPERAND: tl.constexpr,
    PLANES: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[M, N]`` from planes and scales, or from ``x`` itself (not ``PLANES``); BLOCK_K bytes of a weight at a time.

    ``FUNCTION`` (see :func:`_activated`) or None is what ``y`` goes through.
    """
    program, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    first = (program // blocks).to(tl.int64) * BLOCK_M
    m, n, k = tl.arange(0, BLOCK_M), program % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_m, in_n = first + m < M, n < N
    row_bytes = groups * group_bytes
    # Rows beyond the last are read as row 0 and not written.
    weight += tl.where(in_n, n, 0)[:, None] * row_bytes + k[None, :]
    rows = first + tl.where(in_m, m, 0)
    quantized: tl.constexpr = OPERAND == tl.int8
    if PLANES:
        x += (rows * (4 * row_bytes))[None, :] + k[:, None]
        if quantized:
            scale = tl.load(scales + rows)
    else:
        x += rows * stride_m
        if quantized:
            top = tl.zeros([BLOCK_M, 4 * BLOCK_K], tl.int32)
            for start in range(0, groups * group, 4 * BLOCK_K):
                column = start + tl.arange(0, 4 * BLOCK_K)[None, :]
                value = tl.load(x[:, None] + column * stride_k, mask=column < groups * group, other=0.0)
                top = tl.maximum(top, magnitude(value))
            scale, inverse = token_scale(tl.max(top, 1))
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g in range(groups):
        partial = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if quantized else tl.float32)
        for start in range(0, group_bytes, BLOCK_K):
            rest = group_bytes - start
            packed = tl.load(weight + (g * group_bytes + start), mask=k[None, :] < rest, other=0)
            for field in tl.static_range(4):
                if PLANES:
                    at = field * row_bytes + g * group_bytes + start
                    value = tl.load(x + at, mask=k[:, None] < rest, other=0).to(OPERAND)
                else:
                    within = (start + k[:, None]) * 4 + field
                    value = tl.load(x[None, :] + (g * group + within) * stride_k, mask=within < group, other=0.0)
                    value = quantize(value, inverse[None, :]) if quantized else value.to(OPERAND)
                codes = _codes(packed, field, OPERAND, COMPILED)
                partial = tl.dot(codes, value, partial, input_precision="tf32x3", out_dtype=partial.dtype)
        if quantized:
            partial = (partial >> 6).to(tl.float32)
        partial *= tl.load(weight_scale + n * groups + g, mask=in_n, other=0.0)[:, None]
        total = tl.where(g == 0, partial, total + partial)
    out = tl.trans(total)
    if quantized:
        out *= scale[:, None]
    if bias is not None:
        out += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if FUNCTION is not None:
        out = _activated(out, FUNCTION)
    y += (first + m)[:, None] * N + n[None, :]
    tl.store(y, out.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


# Most tokens of a size class -> what is tried for it: BLOCK_M, BLOCK_N, BLOCK_K (of int8), warps, stages. The first fits any
# GPU's shared memory. No two lists are equal, since Triton's memory of the best one on disk tells classes apart by them.
# On Hopper a program waits for every int8 product, hence long blocks; wide tiles of float32 spill registers.
CONFIGS = {
    16: [(16, 16, 128, 2, 3), (16, 32, 128, 4, 3), (16, 64, 64, 4, 4), (16, 16, 64, 1, 4)],
    64: [(16, 64, 64, 4, 4), (32, 64, 64, 4, 4), (64, 64, 64, 4, 3), (32, 32, 128, 4, 3)],
    256: [(64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (32, 64, 128, 4, 3), (128, 64, 32, 4, 4)],
    2048: [(64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 128, 8, 2)],
    8192: [(128, 64, 64, 4, 2), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 128, 8, 2), (256, 128, 64, 8, 3)],
    2**31: [(128, 64, 64, 4, 2), (128, 128, 128, 8, 2), (256, 128, 32, 8, 4), (256, 128, 64, 8, 3), (128, 256, 64, 8, 3)],
}
# Whether the first call of a size class times what :data:`CONFIGS` lists (seconds, once a machine) or takes its first.
TUNE = True

_CLASSES = list(CONFIGS)
_COMPILED = isinstance(_multiply, triton.JITFunction)  # False under TRITON_INTERPRET=1
OPERANDS = {
    torch.int8: tl.int8,
    torch.bfloat16: tl.bfloat16 if _COMPILED else tl.float32,  # the interpreter multiplies no bfloat16
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_best: dict[tuple[Any, ...], dict[str, Any]] = {}
_tuning = threading.Lock()  # Triton's tuner keeps the arguments of its call in itself

Shape = tuple[int, int, int]  # of a weight's rows: columns of a group, its bytes with what pads it, groups


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "int8",
) -> torch.Tensor:
    """The op; arguments and errors as in :func:`hf_ternary.ops.library.linear`. All tensors are on one GPU.

    Nothing here waits for the GPU but a first call: with a new size class of tokens, to choose among :data:`CONFIGS`, or
    with a weight that is to be :func:`padded`.

    Raises:
        RuntimeError: such a weight is first used while a CUDA graph is captured.
    """
    *batch, in_features = x.shape if x.dim() else (0,)
    out_features, other = weight.shape[0], _padded_weights(weight, weight_scale, in_features)
    reference.check_call(x, out_features, bias, activation)
    tensors = (weight, weight_scale) if bias is None else (weight, weight_scale, bias)
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"x is on {x.device}, but the layer on {weight.device}: move one of them")
    groups = weight_scale.shape[1]
    y = x.new_empty((*batch, out_features))
    if not y.numel() or not in_features or in_features // groups > LONGEST_GROUP:
        return reference.linear(x, weight, weight_scale, bias, activation)
    weight = weight if other is None else other
    shape = in_features // groups, weight.shape[1] // groups, groups
    dtype = torch.int8 if activation else x.dtype if x.dtype in OPERANDS else torch.float32
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        rows = x.reshape(-1, in_features)
        rows = rows.float() if x.dtype == torch.float64 else rows  # tiles of float64 would not fit
        source, scales = to_operand(rows, shape, dtype)
        multiply(y.view(-1, out_features), source, scales, weight, weight_scale.contiguous(), bias, shape, dtype)
    return y


def to_operand(x: torch.Tensor, shape: Shape, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :func:`multiply` reads of x ``[tokens, in_features]``: planes and scales; x itself up to :data:`FUSED` tokens."""
    tokens = x.shape[0]
    if tokens <= FUSED:
        return x, None
    planes, scales = empty_planes(x, shape, dtype)
    block = min(triton.next_power_of_2(planes.shape[2]), 1024)
    warps = max(1, block // 128)
    _to_planes[(tokens,)](planes, scales, x, *shape, *x.stride(), BLOCK=block, num_warps=warps, enable_fp_fusion=False)
    return planes, scales


def empty_planes(x: torch.Tensor, shape: Shape, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for the planes ``[tokens, 4, bytes of a row]`` of x, and for the scales ``[tokens]`` of int8 ones."""
    _, group_bytes, groups = shape
    planes = x.new_empty((x.shape[0], 4, group_bytes * groups), dtype=dtype)
    return planes, x.new_empty(x.shape[0], dtype=torch.float32) if dtype == torch.int8 else None


def multiply(
    y: torch.Tensor,
    source: torch.Tensor,
    scales: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Shape,
    dtype: torch.dtype = torch.int8,
    function: str | None = None,
) -> None:
    """Fill ``y`` ``[tokens, out_features]`` in one launch.

    Args:
        source, scales: see :func:`to_operand`.
        weight: as :func:`padded` makes it; like ``weight_scale`` and ``bias`` contiguous.
        shape: columns of a group, its bytes with what pads it, groups.
        dtype: in which is multiplied: int8, or that of float activations.
        function: what ``y`` goes through, one of :func:`_activated`.
    """
    (tokens, out_features), planes = y.shape, source.dim() == 3
    arguments = y, source, scales, weight, weight_scale, bias, tokens, out_features, *shape, *source.stride()[:2]
    options = {"OPERAND": OPERANDS[dtype], "PLANES": planes, "FUNCTION": function, "COMPILED": _COMPILED}
    options["enable_fp_fusion"] = False
    size = _CLASSES[bisect_left(_CLASSES, tokens)]
    device = y.get_device()
    key = size, out_features, shape, dtype, y.dtype, planes, function, device
    config = _best.get(key)
    if config is None:
        tuner = _tuner(size, dtype.itemsize, device)
        config = tuner.configs[0].all_kwargs()
        if TUNE and _COMPILED and not torch.cuda.is_current_stream_capturing():  # a capture cannot be timed
            with _tuning:
                if key not in _best:  # another thread may have chosen meanwhile
                    tuner[_grid(tokens, out_features)](*arguments, **options)
                    _best[key] = tuner.best_config.all_kwargs()
            config = _best[key]
    _multiply[_grid(tokens, out_features)(config)](*arguments, **options, **config)


@cache
def _tuner(size: int, itemsize: int, device: int) -> Any:
    """Times :data:`CONFIGS` of a size class on a device; wider operands get shorter blocks, which take as much memory."""
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": max(16, k // itemsize)}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in CONFIGS[size]
    ]
    key = ["N", "group", "group_bytes", "groups", "PLANES", "FUNCTION"]
    return triton.autotune(configs, key=key, cache_results=True)(_multiply)


def _grid(tokens: int, out_features: int) -> Any:
    return lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]) * triton.cdiv(out_features, meta["BLOCK_N"]),)


def padded(weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int) -> torch.Tensor | None:
    """The weight with every group padded to :data:`ALIGNMENT` bytes; None if it is so already, as in most models."""
    groups = weight_scale.shape[1]
    group = in_features // groups
    group_bytes = -(-packed_size(group) // ALIGNMENT) * ALIGNMENT
    aligned = groups == 1 or group % 4 == 0
    if aligned and weight.is_contiguous() and weight.shape[1] == groups * group_bytes:
        return None
    codes = unpack(weight, in_features).unflatten(1, (groups, group))
    return pack(torch.nn.functional.pad(codes, (0, 4 * group_bytes - group))).flatten(1)


def _make_padded(weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int) -> torch.Tensor | None:
    other = padded(weight, weight_scale, in_features)
    if other is not None:
        finish(weight.device)
    return other


def finish(device: torch.device) -> None:
    """Wait for what was made of a weight at its first use: later calls may come on other streams.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would make it only when it is replayed.
    """
    if device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a ternary layer is first used while a CUDA graph is captured. Fix: call the model once before")
    torch.cuda.current_stream(device).synchronize()


_padded_weights = LayoutCache(_make_padded)
