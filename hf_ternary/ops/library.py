"""``hf_ternary::linear`` as torch knows it: schema, fake tensors, autograd, and an implementation for every device."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..packing import unpack
from ..ternarize import dequantize
from . import backends, reference
from .native import NativeLinear

_choice = backends.choose()

_library = torch.library.Library("hf_ternary", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation) -> Tensor")

_quiet = {"cpu", "meta"}  # kinds of devices of which nothing is to be said, or nothing any more


def _reference(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """What computes on every device without kernels; says once for each kind of device that it is slow."""
    kind = x.device.type
    if kind not in _quiet and not torch.compiler.is_compiling():
        _quiet.add(kind)
        if backends.requested() != "reference":
            why = backends.choose_gpu(x.get_device()).reason if kind == "cuda" else "there are no kernels for it"
            warnings.warn(
                f"hf_ternary: the slower torch reference runs on {kind} ({why}). Fix: model.to('cpu')",
                RuntimeWarning,
                stacklevel=2,
            )
    return reference.linear(x, *rest)


_library.impl("linear", _reference, "CompositeExplicitAutograd")

if _choice.backend != "reference":
    _library.impl("linear", NativeLinear(_choice.backend), "CPU")
elif not _choice.forced:
    warnings.warn(
        f"hf_ternary: {_choice.reason}, so the slower torch reference runs. Fix: install a C++ compiler, then "
        f"{backends.REINSTALL} (-v shows why a build failed)",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _on_gpu(device: int) -> Callable[..., torch.Tensor]:
    """What computes on a CUDA device; Triton is imported when that is it."""
    if backends.choose_gpu(device).backend == "reference":
        return _reference
    from . import triton

    return triton.linear


def _cuda(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _on_gpu(max(x.get_device(), weight.get_device()))(x, weight, *rest)


if backends.requested() == backends.GPU_KERNELS:
    backends.choose_gpu(0)  # raises where it cannot run
_library.impl("linear", _cuda, "CUDA")


@torch.library.register_fake("hf_ternary::linear", lib=_library)
def _fake(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    reference.check(x, weight, weight_scale, bias, activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, _, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.in_features = x.shape[-1]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """To x through the frozen weight, straight through the rounding of the activations (STE, arXiv 1308.3432)."""
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = dequantize(unpack(weight, ctx.in_features), weight_scale)
        grad_x = (grad.float() @ dense).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None


torch.library.register_autograd("hf_ternary::linear", _backward, setup_context=_setup_context, lib=_library)

_linear = torch.ops.hf_ternary.linear.default


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "int8",
) -> torch.Tensor:
    """A linear layer with packed ternary weights.

    Args:
        x: ``[..., in_features]``, any float dtype; computed in float32.
        weight: uint8 ``[out_features, ceil(in_features / 4)]``, the codes as in :mod:`hf_ternary.packing`.
        weight_scale: float32 ``[out_features, groups]``; ``groups`` divides ``in_features``.
        bias: float ``[out_features]``, or None.
        activation: ``"int8"`` quantizes every token of ``x``; ``None`` multiplies ``x`` as it is by the dequantized weight.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``. A token's output depends on no other token; a token with a NaN or an
        infinity gives NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown ``activation``.
    """
    return _linear(x, weight, weight_scale, bias, activation)
