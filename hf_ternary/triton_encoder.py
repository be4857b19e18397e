"""A whole BERT-class encoder on an NVIDIA GPU, from token ids to hidden states: what csrc/encoder.h is on the CPU.

How: tokens of all sequences lie one after the other, without padding; ``spans`` and ``ends`` say where. The residual stream
has the model's dtype; what a product reads are int8 planes and a scale a token (see :mod:`.ops.triton`). A layer is

    qkv product -> attention -> quantize -> out product -> residual sum, norm, quantize
    -> up product, activation function -> quantize -> down product -> residual sum, norm, quantize

where every arrow is a launch; up to 16 tokens the two lone "quantize" are part of the product that follows.

* :func:`_span` reads the mask; :func:`_embed` looks tokens up, adds, normalizes and quantizes;
* :func:`_add_norm` holds a token's row in registers: x and y are read once, x and its planes written once;
* :func:`_attend` is FlashAttention's forward pass (arXiv 2307.08691) over sequences of any lengths, with biases by distance.

Trade-offs. Memory and grids follow from the number of tokens, so a call with a mask waits for the GPU once, to read the
lengths, and the host loses its lead. A CUDA graph cannot wait: while one is captured, a call with a mask is refused and
transformers' forward is captured; a call without a mask is captured as it is. Nothing is tuned but the products: tiles of
the attention follow from the width of a head, and every sum from the sequence alone, so an embedding has the same bits in
any batch. The stacked weight of q, k and v is a copy, a quarter of a layer's bytes; the rest is the modules' own memory.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .architectures import ACTIVATION_FUNCTIONS, Architecture, UnsupportedError, check, distance_buckets
from .ops.triton import (
    OPERANDS,
    Shape,
    column_of,
    empty_planes,
    finish,
    magnitude,
    multiply,
    padded,
    quantize,
    to_operand,
    token_scale,
)
from .packing import BITS, packed_size

WIDEST_HEAD = 128
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["columns"])
def _span(spans, mask, columns, BLOCK: tl.constexpr):
    """``spans[row]`` = first column and number of the tokens that ``mask`` keeps; the number is 0 if they are no run."""
    row = tl.program_id(0)
    begin, end, length = columns, 0, 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        kept = column < columns
        if mask is not None:
            kept &= tl.load(mask + row * columns + column, mask=kept, other=0) != 0
        begin = tl.minimum(begin, tl.min(tl.where(kept, column, columns), 0))
        end = tl.maximum(end, tl.max(tl.where(kept, column + 1, 0), 0))
        length += tl.sum(kept.to(tl.int32), 0)
    tl.store(spans + 2 * row, begin)
    tl.store(spans + 2 * row + 1, tl.where(length == end - begin, length, 0))


@triton.jit
def _look_up(table, row, column, inside, width):
    """A row of a table, float32: of floats, or of codes as in :class:`.modules.QuantizedEmbedding`."""
    values, scale, rows, bits, groups = table
    tl.device_assert((row >= 0) & (row < rows), "an id or a position without a row in its table")
    if scale is None:
        value = tl.load(values + row * width + column, mask=inside, other=0.0).to(tl.float32)
    else:
        byte = tl.load(values + row * ((width * bits + 7) // 8) + column * bits // 8, mask=inside, other=0).to(tl.int32)
        code = (byte >> (column * bits % 8)) & ((1 << bits) - 1)
        value = code.to(tl.float32) + (0.5 - (1 << (bits - 1)))
        value *= tl.load(scale + row * groups + column // (width // groups), mask=inside, other=0.0)
    return value


@triton.jit
def _normalize(x, planes, scales, token, value, byte, field, column, inside, weight, bias, width, epsilon, row_bytes):
    """LayerNorm of a row -> ``x[token]``, and quantized -> its planes and scale."""
    mean = tl.sum(value) / width
    value = tl.where(inside, value - mean, 0.0)
    value *= 1.0 / tl.sqrt(tl.sum(value * value) / width + epsilon)
    value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty)
    tl.store(x + token * width + column, value, mask=inside)
    scale, inverse = token_scale(tl.max(magnitude(value)))
    tl.store(scales + token, scale)
    tl.store(planes + (token * 4 + field) * row_bytes + byte, quantize(value, inverse), mask=byte < row_bytes)


@triton.jit
def _add_norm(
    x, planes, scales, y, weight, bias, width, epsilon, group, group_bytes, groups: tl.constexpr, BLOCK: tl.constexpr
):
    """``x = LayerNorm(x + y)``, one token a program."""
    token = tl.program_id(0).to(tl.int64)
    byte, field = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    column, inside = column_of(byte, field, group, group_bytes, groups)
    value = tl.load(x + token * width + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(y + token * width + column, mask=inside, other=0.0).to(tl.float32)
    row_bytes = groups * group_bytes
    _normalize(x, planes, scales, token, value, byte, field, column, inside, weight, bias, width, epsilon, row_bytes)


@triton.jit(do_not_specialize=["columns"])
def _embed(
    x,
    planes,
    scales,
    places,
    ids,
    type_ids,
    spans,
    ends,
    tokens,
    types,
    positions,
    weight,
    bias,
    columns,
    padding,
    width,
    epsilon,
    group,
    group_bytes,
    groups: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Embed the token of a column, if it is one, where its sequence lies; ``places`` remembers the column.

    ``padding``: positions count ids other than this one, from ``padding + 1`` on; None: they are columns. ``TYPES``: there
    is a table of types. (Triton before 3.7 cannot compare a tuple that holds None with None.)
    """
    place = tl.program_id(0)
    row, at = place // columns, place % columns
    begin, length = tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1)
    if (at < begin) | (at >= begin + length):
        return
    token = (tl.load(ends + row) - length + at - begin).to(tl.int64)
    tl.store(places + token, place)
    token_id = tl.load(ids + place)
    position = at.to(tl.int64)
    if padding is not None:
        position = tl.full([], padding + 1, tl.int64)
        for start in range(0, at, BLOCK):
            before = start + tl.arange(0, BLOCK)
            earlier = tl.load(ids + row * columns + before, mask=before < at, other=padding)
            position += tl.sum((earlier != padding).to(tl.int64), 0)
        position = tl.where(token_id == padding, padding, position)
    byte, field = tl.arange(0, BLOCK)[:, None], tl.arange(0, 4)[None, :]
    column, inside = column_of(byte, field, group, group_bytes, groups)
    value = _look_up(tokens, token_id, column, inside, width)
    if TYPES:
        type_id = tl.zeros([], tl.int64)
        if type_ids is not None:
            type_id = tl.load(type_ids + place)
        value += _look_up(types, type_id, column, inside, width)
    value += _look_up(positions, position, column, inside, width)
    row_bytes = groups * group_bytes
    _normalize(x, planes, scales, token, value, byte, field, column, inside, weight, bias, width, epsilon, row_bytes)


@triton.jit(do_not_specialize=["blocks"])
def _attend(
    y,
    qkv,
    spans,
    ends,
    bias,
    reach,
    heads,
    blocks,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """BLOCK_M queries of one head of one sequence: qkv ``[tokens, 3, heads, DIM]`` -> y ``[tokens, heads, DIM]``.

    ``bias`` float32 ``[heads, 2 * reach + 1]`` or None is added to the scores by key - query + reach.
    """
    program = tl.program_id(0)
    first, head, sequence = program % blocks * BLOCK_M, program // blocks % heads, program // blocks // heads
    length = tl.load(spans + 2 * sequence + 1)
    if first >= length:
        return
    start = (tl.load(ends + sequence) - length).to(tl.int64)
    width = heads * DIM
    y += start * width + head * DIM
    qkv += start * 3 * width + head * DIM
    m, n, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    in_d = d < DIM
    in_q = (m < length)[:, None] & in_d[None, :]
    q = tl.load(qkv + m[:, None] * (3 * width) + d[None, :], mask=in_q, other=0.0).to(OPERAND)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, length, BLOCK_N):
        key = begin + n
        in_k = (key < length)[:, None] & in_d[None, :]
        at = qkv + key[:, None] * (3 * width) + d[None, :]
        k = tl.load(at + width, mask=in_k, other=0.0).to(OPERAND)
        v = tl.load(at + 2 * width, mask=in_k, other=0.0).to(OPERAND)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * (scale * _LOG2_E)
        if bias is not None:
            distance = key[None, :] - m[:, None]
            near = (key < length)[None, :] & (m < length)[:, None]
            scores += tl.load(bias + head * (2 * reach + 1) + reach + distance, mask=near, other=0.0) * _LOG2_E
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(OPERAND), v, out * shrink[:, None], input_precision="tf32x3")
        top = higher
    out = out / total[:, None]
    tl.store(y + m[:, None] * width + d[None, :], out.to(y.dtype.element_ty), mask=in_q)


class _Linear(NamedTuple):
    """As :func:`~.ops.triton.multiply` reads it."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    shape: Shape


class _Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


class _Tensors(dict[str, torch.Tensor]):
    def __missing__(self, name: str) -> torch.Tensor:
        raise UnsupportedError(f"{name} is missing")


class _Layer(NamedTuple):
    qkv: _Linear
    out: _Linear
    attention_norm: _Norm
    up: _Linear
    down: _Linear
    output_norm: _Norm


class TritonEncoder:
    """A post-norm text encoder (BERT, RoBERTa, MPNet, DistilBERT, ...) on one GPU.

    Args:
        architecture: the family.
        config: the entries of config.json.
        tensors: those of the base model by name, on one device; floats in one dtype: float32, float16 or bfloat16.

    Raises:
        UnsupportedError: the model is of a kind that these kernels do not know, or not ternary throughout.
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        get, tensors = partial(architecture.get, config), _Tensors(tensors)
        self.hidden, self.heads = int(get(architecture.hidden)), int(get(architecture.heads))
        check(config, architecture, self.hidden, self.heads)
        if architecture.pre_norm or architecture.tokens is None or architecture.positions is None:
            raise UnsupportedError("the GPU's encoder knows text encoders with a norm after every residual sum only")
        if self.hidden // self.heads > WIDEST_HEAD:
            raise UnsupportedError(f"its heads are wider than {WIDEST_HEAD} columns, the most that the GPU's encoder knows")
        self._function = ACTIVATION_FUNCTIONS[get(architecture.activation)]
        self._epsilon = float(get(architecture.epsilon))
        self._padding = None if architecture.padding is None else int(get(architecture.padding))
        names = architecture.tokens, architecture.types, architecture.positions
        self._tokens, self._types, self._positions = (_table(tensors, name, self.hidden) for name in names)
        self.positions = len(tensors[f"{architecture.positions}.weight"])
        norm = partial(_norm_of, tensors)
        self._norm = norm(architecture.norm)
        self._dtype = self._norm.weight.dtype
        bias = architecture.bias
        self._bias = None if bias is None else _by_distance(tensors[f"{bias}.weight"], self.positions)
        self._layers = []
        for name in map(architecture.layer.format, range(int(get(architecture.layers)))):
            up = _linear(tensors, name, architecture.up, self.hidden)
            self._layers.append(
                _Layer(
                    qkv=_linear(tensors, name, architecture.qkv, self.hidden),
                    out=_linear(tensors, name, (architecture.out,), self.hidden),
                    attention_norm=norm(f"{name}.{architecture.norms[0]}"),
                    up=up,
                    down=_linear(tensors, name, (architecture.down,), len(up.weight)),
                    output_norm=norm(f"{name}.{architecture.norms[1]}"),
                )
            )
        finish(self._norm.weight.device)

    def hidden_states(self, ids: torch.Tensor, types: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Of int64 ids, types and a mask of whole numbers ``[rows, columns]``: ``[rows, columns, hidden]``, 0 at padding.

        None: an empty row, a mask that is no run of ones in each row, a sequence longer than the positions, or a mask while
        a CUDA graph is captured. An id out of range is a failed assertion on the device, as in torch.
        """
        if mask is not None and ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        rows, columns = ids.shape
        with torch.cuda.device_of(ids):
            spans = ids.new_empty((rows, 2), dtype=torch.int32)
            _span[(rows,)](spans, None if mask is None else mask.contiguous(), columns, BLOCK=512)
            # The one time that a call waits for the GPU.
            lengths = [columns] * rows if mask is None else spans.cpu()[:, 1].tolist()
            if min(lengths) == 0 or max(lengths) > self.positions:
                return None
            tokens = sum(lengths)
            ends = spans[:, 1].cumsum(0, dtype=torch.int32)
            x, places = self._encode(ids.contiguous(), types, spans, ends, tokens, max(lengths))
        if tokens == rows * columns:
            return x.view(rows, columns, self.hidden)
        return x.new_zeros((rows * columns, self.hidden)).index_copy_(0, places, x).view(rows, columns, self.hidden)

    def _encode(
        self,
        ids: torch.Tensor,
        types: torch.Tensor | None,
        spans: torch.Tensor,
        ends: torch.Tensor,
        tokens: int,
        longest: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[tokens, hidden]``, and the place of each token among the ids."""
        rows, columns = ids.shape
        x = ids.new_empty((tokens, self.hidden), dtype=self._dtype)
        places = ids.new_empty(tokens)
        shapes = [layer.qkv.shape for layer in self._layers]
        planes, scales = empty_planes(x, shapes[0])
        _embed[(rows * columns,)](
            x,
            planes,
            scales,
            places,
            ids,
            None if types is None else types.contiguous(),
            spans,
            ends,
            self._tokens,
            self._types,
            self._positions,
            *self._norm,
            columns,
            self._padding,
            self.hidden,
            self._epsilon,
            *shapes[0],
            TYPES=self._types is not None,
            **_row_options(shapes[0]),
            debug=True,  # asserts; overflows of int32 are not looked for
            sanitize_overflow=False,
        )
        for layer, following in zip(self._layers, [*shapes[1:], shapes[0]], strict=True):
            y = self._attend(_product(x, planes, scales, layer.qkv), spans, ends, longest)
            y = _product(x, *to_operand(y, layer.out.shape), layer.out)
            planes, scales = self._add_norm(x, y, layer.attention_norm, layer.up.shape)
            y = _product(x, planes, scales, layer.up, self._function)
            y = _product(x, *to_operand(y, layer.down.shape), layer.down)
            planes, scales = self._add_norm(x, y, layer.output_norm, following)
        return x, places

    def _attend(self, qkv: torch.Tensor, spans: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        y = qkv.new_empty((qkv.shape[0], self.hidden))
        dim = self.hidden // self.heads
        block_d = max(16, triton.next_power_of_2(dim))
        row_bytes = block_d * qkv.itemsize  # wider rows, smaller tiles: they fit any GPU's registers and shared memory
        block_m, block_n = 64 if row_bytes <= 256 else 32, 64 if row_bytes <= 128 else 32
        blocks = triton.cdiv(longest, block_m)
        _attend[(blocks * self.heads * len(ends),)](
            y,
            qkv,
            spans,
            ends,
            self._bias,
            self.positions,
            self.heads,
            blocks,
            dim**-0.5,
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            OPERAND=OPERANDS[qkv.dtype],
            num_warps=4,
            num_stages=2,
        )
        return y

    def _add_norm(
        self, x: torch.Tensor, y: torch.Tensor, norm: _Norm, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``x`` becomes LayerNorm(x + y); returns it quantized for a weight of ``shape``."""
        planes, scales = empty_planes(x, shape)
        _add_norm[(x.shape[0],)](x, planes, scales, y, *norm, self.hidden, self._epsilon, *shape, **_row_options(shape))
        return planes, scales


def _row_options(shape: Shape) -> dict[str, Any]:
    """For kernels that hold a row in registers, four columns a thread."""
    block = triton.next_power_of_2(shape[1] * shape[2])
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 32)), "enable_fp_fusion": False}


def _product(
    x: torch.Tensor, source: torch.Tensor, scales: torch.Tensor | None, linear: _Linear, function: str | None = None
) -> torch.Tensor:
    """``[tokens, out_features]`` in the dtype of x."""
    y = x.new_empty((source.shape[0], linear.weight.shape[0]))
    multiply(y, source, scales, *linear, function=function)
    return y


def _linear(tensors: Mapping[str, torch.Tensor], layer: str, modules: tuple[str, ...], in_features: int) -> _Linear:
    """A linear layer, or several stacked into one."""
    names = [f"{layer}.{module}" for module in modules]
    for name in names:
        if f"{name}.weight_scale" not in tensors:
            raise UnsupportedError(f"{name} is not ternary")
    weight, scale = (_stack([tensors[f"{name}.{kind}"] for name in names]) for kind in ("weight", "weight_scale"))
    other = padded(weight, scale, in_features)
    weight = weight if other is None else other
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    groups = scale.shape[1]
    shape = in_features // groups, weight.shape[1] // groups, groups
    return _Linear(weight, scale.contiguous(), _stack(biases).contiguous() if biases else None, shape)


def _norm_of(tensors: Mapping[str, torch.Tensor], name: str | None) -> _Norm:
    return _Norm(tensors[f"{name}.weight"].contiguous(), tensors[f"{name}.bias"].contiguous())


def _table(tensors: Mapping[str, torch.Tensor], name: str | None, width: int) -> Any:
    """As :func:`_look_up` reads it: values, scales or None, rows, bits, groups."""
    if name is None:
        return None
    values, scale = tensors[f"{name}.weight"].contiguous(), tensors.get(f"{name}.weight_scale")
    if scale is None:
        return values, None, len(values), 0, 1
    bits = next(bits for bits in BITS if packed_size(width, bits) == values.shape[1])
    return values, scale.contiguous(), len(values), bits, scale.shape[1]


def _by_distance(table: torch.Tensor, reach: int) -> torch.Tensor:
    """MPNet's biases, float32 ``[heads, 2 * reach + 1]``, of a table ``[buckets, heads]``."""
    buckets = torch.from_numpy(distance_buckets(reach)).to(table.device)
    return table[buckets].T.float().contiguous()


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
