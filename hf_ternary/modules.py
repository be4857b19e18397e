"""The layers: packed ones for inference, fake-quantized ones for training.

``TernaryLinear`` and ``QuantizedEmbedding`` hold what is on disk, as buffers named ``weight`` and ``weight_scale``.
``FakeTernaryLinear`` and ``FakeQuantizedEmbedding`` hold float weights and compute what their packed twin will compute,
with straight-through gradients; ``pack()`` makes the twin.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import ops, packing
from .ternarize import (
    dequantize,
    dequantize_rows,
    quantize_activation,
    quantize_rows,
    ternarize,
    ternary_codes,
    ternary_scale,
)


def table_multiplier(table: nn.Embedding) -> float | None:
    """The constant by which ``table`` multiplies the rows that it looks up; None if its class does something else."""
    if type(table) is nn.Embedding:
        return 1.0
    if isinstance(table, FakeQuantizedEmbedding):
        return table.multiplier
    if not type(table).__name__.endswith("ScaledWordEmbedding"):  # as transformers calls them: Gemma's, BART's
        return None
    scale = getattr(table, "scalar_embed_scale", getattr(table, "embed_scale", None))
    return float(scale) if isinstance(scale, (int, float)) else None


def _straight_through(value: torch.Tensor, gradient_to: torch.Tensor) -> torch.Tensor:
    """``value`` forward; backward the gradient goes to ``gradient_to`` too, as if the two were equal."""
    return value + (gradient_to - gradient_to.detach())


class _Packed(nn.Module):
    """Two buffers: ``weight`` (uint8 codes) and ``weight_scale``, float32 whatever ``.half()`` and ``.to()`` do."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        scale = self.weight_scale

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is not scale:
                return fn(tensor)
            integers = scale.view(torch.int32)  # they are moved, but never cast
            moved = fn(integers)
            # Unmoved, the same tensor: an encoder made of it holds when sentence-transformers calls to() in every encode().
            return scale if moved is integers else moved.view(torch.float32)

        return super()._apply(move, recurse)


class TernaryLinear(_Packed, nn.Linear):
    """A Linear layer with packed ternary weights: ``y = scale * (codes @ x) + bias``, through ``hf_ternary::linear``.

    Buffers: ``weight`` uint8 ``[out_features, ceil(in_features / 4)]`` (layout: :mod:`hf_ternary.packing`) and
    ``weight_scale`` float32 ``[out_features, groups]``. Parameter: ``bias`` ``[out_features]``, frozen. It is an
    ``nn.Linear`` so that PEFT puts adapters on it, but never allocates a dense weight.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; ``dtype`` is the bias's.
        groups: scales a row.
        activation: ``"int8"`` (per token) or ``None``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        groups: int = 1,
        activation: str | None = "int8",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the dense weight
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        shape = out_features, packing.packed_size(in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), False) if bias else None  # type: ignore[assignment]

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation: str | None = "int8"
    ) -> "TernaryLinear":
        """From codes int8 ``[out, in]`` in {-1, 0, 1}, scale float32 ``[out, groups]`` and bias ``[out]``."""
        out_features, in_features = codes.shape
        layer = cls(in_features, out_features, bias is not None, scale.shape[1], activation, device="meta")
        layer.weight, layer.weight_scale = packing.pack(codes), scale.float()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        weight_scheme: str = "optimal",
        group_size: int | str | None = None,
        activation: str | None = "int8",
    ) -> "TernaryLinear":
        """Ternarize a float layer."""
        codes, scale = ternarize(linear.weight, weight_scheme, group_size)
        return cls.from_codes(codes, scale, linear.bias, activation)

    @classmethod
    def empty_like(cls, linear: nn.Linear, groups: int, activation: str | None) -> "TernaryLinear":
        """An uninitialised layer on the meta device with the shape of ``linear``."""
        shape = linear.in_features, linear.out_features, linear.bias is not None
        return cls(*shape, groups, activation, device="meta", dtype=linear.weight.dtype)

    @property
    def codes(self) -> torch.Tensor:
        """The unpacked weight: int8 ``[out_features, in_features]`` in {-1, 0, 1}."""
        return packing.unpack(self.weight, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a dense ``[out_features, in_features]`` tensor."""
        return dequantize(self.codes, self.weight_scale).to(dtype)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The same layer as a plain ``nn.Linear``."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - HQQ's name, by which PEFT knows a layer to ask for ``dequantize()`` (DoRA)
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` of any float dtype -> ``[..., out_features]`` of the same dtype."""
        return ops.linear(x, self.weight, self.weight_scale, self.bias, self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"groups={self.weight_scale.shape[1]}, activation={self.activation}"
        )


class QuantizedEmbedding(_Packed):
    """An embedding table of 8, 4 or 2 bits: ``row = (codes + 1/2) * scale * multiplier``.

    Buffers: ``weight`` uint8 ``[num_embeddings, ceil(embedding_dim * bits / 8)]`` and ``weight_scale`` float32
    ``[num_embeddings, groups]``. Only the rows that are looked up are ever unpacked. ``multiplier`` is the constant by which
    ``float_class`` multiplies what it looks up (see :func:`table_multiplier`).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        groups: int = 1,
        padding_idx: int | None = None,
        multiplier: float = 1.0,
        float_class: type[nn.Embedding] = nn.Embedding,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.padding_idx, self.multiplier, self.float_class = padding_idx, multiplier, float_class
        self.dtype = dtype or torch.get_default_dtype()
        shape = num_embeddings, packing.packed_size(embedding_dim, bits)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(num_embeddings, groups, dtype=torch.float32, device=device))

    @classmethod
    def from_float(cls, embedding: nn.Embedding, bits: int, group_size: int | None = None) -> "QuantizedEmbedding":
        """Quantize a float table."""
        codes, scale = quantize_rows(embedding.weight, bits, group_size)
        layer = cls.empty_like(embedding, bits, scale.shape[1])
        layer.weight, layer.weight_scale = packing.pack(codes, bits), scale
        return layer

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, bits: int, groups: int) -> "QuantizedEmbedding":
        """An uninitialised table on the meta device with the shape of ``embedding``."""
        rows, columns = embedding.weight.shape
        multiplier = table_multiplier(embedding)
        if multiplier is None:
            raise ValueError(f"{type(embedding).__name__} does more than look up rows. Fix: keep it in floating point")
        float_class = getattr(embedding, "float_class", type(embedding))
        dtype, padding_idx = embedding.weight.dtype, embedding.padding_idx
        return cls(rows, columns, bits, groups, padding_idx, multiplier, float_class, device="meta", dtype=dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The table as a dense ``[num_embeddings, embedding_dim]`` tensor."""
        return self._rows(self.weight, self.weight_scale).to(dtype)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """The same table as the ``nn.Embedding`` it was made from."""
        options = () if self.multiplier == 1 else (self.multiplier,)
        table = self.float_class(self.num_embeddings, self.embedding_dim, self.padding_idx, *options)
        table.weight = nn.Parameter(self.dequantize(dtype))
        return table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int ids ``[...]`` -> ``[..., embedding_dim]`` of the model's dtype."""
        rows = self._rows(F.embedding(ids, self.weight), F.embedding(ids, self.weight_scale)).to(self.dtype)
        return rows * rows.new_tensor(self.multiplier) if self.multiplier != 1 else rows

    def _rows(self, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dequantize_rows(packing.unpack(packed, self.embedding_dim, self.bits), scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, groups={self.weight_scale.shape[1]}"


class TiedEmbedding(nn.Module):
    """A second name of a ``QuantizedEmbedding`` (T5's encoder.embed_tokens); it owns no tensor: nothing is saved twice."""

    def __init__(self, source: QuantizedEmbedding) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple: not a submodule, yet copied and pickled with the model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._source[0](ids)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        return self._source[0].to_float(dtype)


class TiedLinear(nn.Linear):
    """An output layer whose weight is a ``QuantizedEmbedding`` (a masked-language-model head); it owns only its bias."""

    def __init__(self, source: QuantizedEmbedding, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self._source = (source,)
        self.in_features, self.out_features = source.embedding_dim, source.num_embeddings
        self.bias = bias  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._source[0].dequantize(x.dtype), self.bias)

    def to_float(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self._source[0].dequantize(dtype)), self.bias
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the token table"


class _TernaryProduct(torch.autograd.Function):
    """``dequantize(codes, scale) @ x`` for ternary codes with one scale a row and x quantized to int8 per token.

    The forward pass is the packed twin's integer product; the backward pass treats both roundings as the identity and
    multiplies in the output's dtype (bfloat16 under autocast). Faster than dense float weights: int8 is multiplied two
    to four times as fast, and nothing of the weight's size is made per step but the codes.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tokens, token_scale = quantize_activation(x.flatten(0, -2))
        codes = ternary_codes(weight, scale)
        ctx.save_for_backward(tokens, token_scale, codes, scale)
        ctx.x_dtype = x.dtype
        y = (_integer_product(tokens, codes, dtype) * scale.t()).mul_(token_scale)
        return y.to(dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, token_scale, codes, scale = ctx.saved_tensors
        dtype, shape = gradient.dtype, gradient.shape[:-1]
        gradient, codes = gradient.flatten(0, -2), codes.to(dtype)
        for_x = (gradient * scale.t().to(dtype)) @ codes
        for_weight = (gradient * token_scale.to(dtype)).t() @ tokens.to(dtype)
        for_scale = (for_weight * codes).sum(1, keepdim=True, dtype=torch.float32)
        return for_x.to(ctx.x_dtype).unflatten(0, shape), for_weight.float(), for_scale, None


def _integer_product(x: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x @ codes.T`` of int8 matrices. Exact, but for the rounding of the sums to ``dtype`` on a GPU."""
    return torch._int_mm(x, codes.t()) if x.is_cpu else _float_product(x, codes, dtype)


def _float_product(x: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same by float matrices: every factor is exact in ``dtype``, a sum is rounded to it (from float32, by GPUs)."""
    if dtype != torch.float16:
        return x.to(dtype) @ codes.t().to(dtype)
    # A sum may exceed 65504: 256 times smaller it does not. Not in float32, as autocast would cast that to float16.
    return (x.to(dtype) / 256 @ codes.t().to(dtype)).float() * 256


class FakeTernaryLinear(nn.Linear):
    """A trainable Linear that computes what its packed twin will compute (quantization-aware training).

    Float master weights; the forward pass uses their ternary values and int8 activations, the backward pass treats both
    roundings as the identity (straight-through estimator).

    Args:
        linear: the float layer to start from; its parameters are reused.
        weight_scheme, group_size, activation: as in :class:`hf_ternary.TernaryConfig`.
        learned_scale: train the scales as parameters, starting from the scheme's; otherwise they follow the weights.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight_scheme: str = "optimal",
        group_size: int | str | None = None,
        activation: str | None = "int8",
        learned_scale: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_scheme, self.group_size, self.activation = weight_scheme, group_size, activation
        self.strength = 1.0  # share of the ternary weight in the forward pass; raised from 0 for gradual quantization
        if learned_scale:
            self.weight_scale = nn.Parameter(ternary_scale(self.weight, weight_scheme, group_size))
        else:
            self.register_parameter("weight_scale", None)

    def scale(self) -> torch.Tensor:
        """The scales now in force, float32 ``[out_features, groups]``."""
        if self.weight_scale is not None:
            return self.weight_scale.abs()
        return ternary_scale(self.weight, self.weight_scheme, self.group_size)

    def codes(self) -> torch.Tensor:
        """The codes now in force, int8 ``[out_features, in_features]``."""
        return ternary_codes(self.weight, self.scale().detach())

    def ternary_weight(self) -> torch.Tensor:
        """The dense weight of the packed twin; its gradient goes to the master weight and to a learned scale."""
        scale = self.scale()
        return _straight_through(dequantize(ternary_codes(self.weight, scale), scale), self.weight.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.activation == "int8" and self.strength == 1 and not isinstance(self.group_size, int):
            y = _TernaryProduct.apply(x, self.weight, self.scale(), dtype)
            return y if bias is None else y + bias
        weight = self.ternary_weight()
        if self.strength < 1:
            weight = torch.lerp(self.weight.float(), weight, self.strength)
        if self.activation == "int8":
            codes, token_scale = quantize_activation(x.detach())
            x = _straight_through((codes * token_scale).to(x.dtype), x)
        return F.linear(x.to(dtype), weight.to(dtype), bias)

    def pack(self) -> TernaryLinear:
        """The packed twin."""
        return TernaryLinear.from_codes(self.codes(), self.scale().detach(), self.bias, self.activation)


class FakeQuantizedEmbedding(nn.Embedding):
    """A trainable embedding that returns the rows its packed twin will return, with straight-through gradients."""

    def __init__(self, embedding: nn.Embedding, bits: int, group_size: int | None = None) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(rows, columns, embedding.padding_idx, device="meta")
        self.weight = embedding.weight
        self.bits, self.group_size = bits, group_size
        self.multiplier = table_multiplier(embedding) or 1.0
        self.float_class = type(embedding)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        distinct, position = ids.unique(return_inverse=True)
        rows = F.embedding(distinct, self.weight, self.padding_idx)
        quantized = dequantize_rows(*quantize_rows(rows, self.bits, self.group_size)).to(rows.dtype)
        rows = F.embedding(position, _straight_through(quantized, rows))
        return rows * rows.new_tensor(self.multiplier) if self.multiplier != 1 else rows

    def pack(self) -> QuantizedEmbedding:
        """The packed twin."""
        return QuantizedEmbedding.from_float(self, self.bits, self.group_size)
