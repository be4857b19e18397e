"""What ``hf_ternary::linear`` computes, in plain torch, for every device. The kernels give the same bits for "int8".

With int8 codes ``q`` and scale ``s`` of a token (:func:`~hf_ternary.ternarize.quantize_activation`), ternary codes ``T`` and
scales ``a`` of an output, and groups ``g`` of columns::

    y = (sum_g (q_g . T_g) * a_g) * s + bias        in float32, every operation rounded; q_g . T_g exact
"""

import torch

from ..config import ACTIVATIONS
from ..packing import packed_size, unpack
from ..ternarize import dequantize, quantize_activation


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Raise ValueError unless the arguments of the op fit together."""
    check_weight(weight, weight_scale, x.shape[-1] if x.dim() else 0)
    check_call(x, weight.shape[0], bias, activation)


def check_weight(weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int) -> None:
    """The part of :func:`check` that stays true for a weight and a width of x."""
    if weight.dtype != torch.uint8 or weight.dim() != 2:
        raise ValueError(f"weight is {_describe(weight)}: use uint8 [out_features, ceil(in_features / 4)]")
    out_features, row_bytes = weight.shape
    if packed_size(in_features) != row_bytes:
        raise ValueError(
            f"x has in_features={in_features} and needs a weight of {packed_size(in_features)} bytes a row, but weight is "
            f"{_describe(weight)}"
        )
    if weight_scale.dtype != torch.float32 or weight_scale.dim() != 2 or weight_scale.shape[0] != out_features:
        raise ValueError(f"weight_scale is {_describe(weight_scale)}: use float32 [{out_features}, groups]")
    groups = weight_scale.shape[1]
    if groups == 0 or in_features % groups:
        raise ValueError(f"weight_scale has {groups} groups: their number must divide in_features={in_features}")


def check_call(x: torch.Tensor, out_features: int, bias: torch.Tensor | None, activation: str | None) -> None:
    """The part of :func:`check` that must be looked at in every call."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not allowed: use 'int8' or None")
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(f"x is {_describe(x)}: use a floating-point tensor [..., in_features]")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features or not bias.is_floating_point()):
        raise ValueError(f"bias is {_describe(bias)}: use a floating-point tensor [{out_features}] or None")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "int8",
) -> torch.Tensor:
    """The op; arguments and errors as in :func:`hf_ternary.ops.library.linear`."""
    check(x, weight, weight_scale, bias, activation)
    with torch.autocast(x.device.type, enabled=False):  # it would round the integers to bfloat16
        codes = unpack(weight, x.shape[-1])
        if activation is None:
            y = x.float() @ dequantize(codes, weight_scale).T
        else:
            q, scale = quantize_activation(x)
            y = _grouped_product(q, codes, weight_scale) * scale
        if bias is not None:
            y = y + bias.float()
    return y.to(x.dtype)


def _grouped_product(q: torch.Tensor, codes: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """``sum_g (q_g . T_g) * a_g``: int8 ``[..., K]``, int8 ``[N, K]``, float32 ``[N, G]`` -> float32 ``[..., N]``."""
    groups = weight_scale.shape[1]
    size = q.shape[-1] // groups
    # Matmuls of whole numbers are exact, in any order, while no partial sum can leave the mantissa.
    exact = torch.float32 if 127 * size < 2**24 else torch.float64
    q, codes = q.to(exact).unflatten(-1, (groups, size)), codes.to(exact).unflatten(-1, (groups, size))
    total = None
    for g in range(groups):
        part = (q[..., g, :] @ codes[:, g].T).float() * weight_scale[:, g]
        total = part if total is None else total + part
    assert total is not None
    return total
