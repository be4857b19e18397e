"""The only ternary maths: thresholds, scales, activation and embedding quantization.

One rule each serves the training forward, the reference op and every kernel:

* weights, :func:`ternarize`: ``W ~ scale * T`` with ``T`` in {-1, 0, 1}, the nearest level to each weight, and one scale a
  row, a group of columns, or a tensor;
* activations, :func:`quantize_activation`: int8 per token;
* embedding tables, :func:`quantize_rows`: 8, 4 or 2 bits with one scale a row or a group of columns.
"""

import torch

# Below this a row counts as zero: 127 / absmax stays far from overflowing float32.
SMALLEST_ABSMAX = 2.0**-100


def _grouped(weight: torch.Tensor, group_size: int | str | None) -> torch.Tensor:
    """View ``[rows, cols]`` as ``[rows, groups, group_size]``; a scale is computed over the last dimension."""
    rows, cols = weight.shape
    if group_size == "tensor":
        return weight.reshape(1, 1, rows * cols)
    return weight.reshape(rows, -1, cols if group_size is None else int(group_size))


def ternary_scale(weight: torch.Tensor, scheme: str = "optimal", group_size: int | str | None = None) -> torch.Tensor:
    """Scales of the ternary approximation of a weight matrix.

    Args:
        weight: float ``[out, in]``.
        scheme: ``"optimal"``, the scale of the least-squares solution of ``min ||W - scale * T||^2``. With k non-zeros the
            best T keeps the k largest magnitudes and the best scale is their mean, so the best k maximises
            ``(sum of the k largest)^2 / k`` (Ternary Weight Networks, arXiv 1605.04711, here solved exactly by sorting).
            ``"absmean"``, the rule of Chen et al. (arXiv 2411.15438): ``2 * mean|W|``.
        group_size: columns that share a scale; ``None`` is a whole row, ``"tensor"`` the whole matrix.

    Returns:
        float32 ``[out, in / group_size]``, or ``[out, 1]`` if ``group_size`` is no number.

    Raises:
        ValueError: unknown scheme.
    """
    if weight.device.type == "mps":  # which has no float64
        return ternary_scale(weight.cpu(), scheme, group_size).to(weight.device)
    magnitude = _grouped(weight.detach().float().abs(), group_size)
    if scheme == "absmean":
        scale = 2 * magnitude.mean(-1)
    elif scheme == "optimal":
        sums = magnitude.sort(-1, descending=True).values.double().cumsum(-1)
        counts = torch.arange(1, sums.shape[-1] + 1, device=weight.device, dtype=torch.float64)
        best = (sums.square() / counts).argmax(-1, keepdim=True)
        scale = (sums.gather(-1, best) / (best + 1)).float().squeeze(-1)
    else:
        raise ValueError(f"scheme={scheme!r} is not a weight scheme: use 'optimal' or 'absmean'")
    return scale.expand(len(weight), 1).clone() if group_size == "tensor" else scale


def ternary_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest of -scale, 0, +scale for every weight: ``sign(W) * (|W| > scale / 2)``.

    Args:
        weight: float ``[out, in]``.
        scale: float32 ``[out, groups]``, not negative.

    Returns:
        int8 ``[out, in]`` in {-1, 0, 1}.
    """
    groups = weight.detach().float().reshape(*scale.shape, -1)
    threshold = scale.unsqueeze(-1) / 2
    return ((groups > threshold).view(torch.int8) - (groups < -threshold).view(torch.int8)).reshape(weight.shape)


def ternarize(
    weight: torch.Tensor, scheme: str = "optimal", group_size: int | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`ternary_scale` and :func:`ternary_codes` in one call: (int8 ``[out, in]``, float32 ``[out, groups]``)."""
    scale = ternary_scale(weight, scheme, group_size)
    return ternary_codes(weight, scale), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale * codes`` in float32: codes ``[rows, cols]``, scale float32 ``[rows, groups]``."""
    rows, groups = scale.shape
    return (codes.float().reshape(rows, groups, -1) * scale.unsqueeze(-1)).reshape(rows, -1)


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per token (absmax), round half to even.

    Args:
        x: float ``[..., K]``; computed in float32.

    Returns:
        codes int8 ``[..., K]`` in [-127, 127] and scale float32 ``[..., 1]``. An all-zero token has scale 0; a token with
        a NaN or an infinity has scale NaN and codes 0, so that whatever is computed from it is NaN too.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    finite, nonzero = absmax.isfinite(), absmax >= SMALLEST_ABSMAX
    levels = torch.full_like(absmax, 127.0)  # tensor by tensor is divided exactly; a number would be turned into a product
    inverse = torch.where(finite & nonzero, levels / absmax, 0.0)
    codes = (x * inverse).round_().to(torch.int8).masked_fill_(~finite, 0)
    scale = torch.where(finite, torch.where(nonzero, absmax / levels, 0.0), torch.nan)
    return codes, scale


def quantize_rows(
    table: torch.Tensor, bits: int, group_size: int | None = None, candidates: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform codes and scales of an embedding table: ``value = (code + 1/2) * scale``.

    The half step makes the 2**bits levels symmetric without wasting one, which matters at 2 and 4 bits. The scale is the
    best in squared error of ``candidates`` clipping points between 30 % and 100 % of the largest magnitude.

    Args:
        table: float ``[rows, dim]``.
        bits: 2, 4 or 8.
        group_size: columns that share a scale; ``None`` is the whole row.

    Returns:
        codes int8 ``[rows, dim]`` in ``[-2**(bits-1), 2**(bits-1) - 1]`` and scale float32 ``[rows, groups]`` (0 for zeros).
    """
    groups = _grouped(table.detach().float(), group_size)
    levels = 1 << (bits - 1)
    absmax = groups.abs().amax(-1, keepdim=True)
    best_error = torch.full_like(absmax, torch.inf)
    best_scale = torch.zeros_like(absmax)
    for clip in torch.linspace(0.3, 1.0, candidates).tolist() if bits < 8 else [1.0]:
        scale = absmax * (clip / levels)
        error = (groups - (_round_to_level(groups, scale, levels) + 0.5) * scale).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    codes = _round_to_level(groups, best_scale, levels).to(torch.int8).reshape(table.shape)
    return codes, best_scale.squeeze(-1)


def _round_to_level(x: torch.Tensor, scale: torch.Tensor, levels: int) -> torch.Tensor:
    return (x / torch.where(scale > 0, scale, 1.0)).floor().clamp_(-levels, levels - 1)


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`quantize_rows`: codes ``[..., dim]``, scale float32 ``[..., groups]`` -> float32 ``[..., dim]``."""
    return ((codes.float() + 0.5).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)
