"""Rounds a weight matrix to ternary levels as the inputs of its layer weigh the errors: GPTQ and coordinate descent.

The columns are rounded one after the other, and the error of each is made up for by the columns not rounded yet (GPTQ,
Frantar et al., arXiv 2210.17323). Then every column is rounded anew, given all others, again and again (QuantEase, Behdin et
al., arXiv 2309.01885). The Hessian is the second moment of the inputs.
"""

import torch

from ..ternarize import dequantize, ternary_codes

# Columns whose errors are spread over the rest of the matrix at once.
BLOCK = 128

# Rounds of the coordinate descent; later ones hardly change anything.
SWEEPS = 10


def gptq_round(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ's rounding, columns of large Hessian diagonal first.

    Args:
        weight: float ``[out, in]``.
        scale: float ``[out, groups]``.
        hessian: positive definite ``[in, in]``.

    Returns:
        Weights ``[out, in]`` as they were when their column was rounded, errors of earlier columns included, and the scale
        (with one a row refitted to the codes): :func:`hf_ternary.ternarize.ternary_codes` of the two are the codes.
    """
    order = hessian.diagonal().argsort(descending=True)
    # Columns as rows, so that what is read together lies together.
    rest = weight.t()[order].contiguous()
    levels = scale.t().repeat_interleave(weight.shape[1] // scale.shape[1], 0)[order].contiguous()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order])), upper=True)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            errors[i - start] = (rest[i] - _to_level(rest[i], levels[i])) / inverse[i, i]
            rest[i + 1 : stop].addr_(inverse[i, i + 1 : stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
    return _refit(weight, rest[order.argsort()].t().contiguous(), scale, hessian)


def coordinate_descent(
    weight: torch.Tensor, master: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent: round every column to the level that is best given the codes of all others, :data:`SWEEPS` times.

    Args:
        weight: float ``[out, in]``, what is approximated.
        master, scale: a rounding of it, as :func:`gptq_round` returns; the error never grows from there.
        hessian: positive definite ``[in, in]``.

    Returns:
        As :func:`gptq_round`; a weight is what would have been best for it without rounding.
    """
    for _ in range(SWEEPS):
        levels = scale.t().repeat_interleave(weight.shape[1] // scale.shape[1], 0)
        rounded = dequantize(ternary_codes(master, scale), scale).t().contiguous()  # columns as rows, as above
        best = torch.empty_like(rounded)
        slope = hessian @ (weight.t() - rounded)
        for start in range(0, len(rounded), BLOCK):
            stop = min(start + BLOCK, len(rounded))
            before = rounded[start:stop].clone()
            for i in range(start, stop):
                best[i] = rounded[i] + slope[i] / hessian[i, i]
                new = _to_level(best[i], levels[i])
                slope[i:stop].addr_(hessian[i:stop, i], new - rounded[i], alpha=-1)
                rounded[i] = new
            slope[stop:].addmm_(hessian[stop:, start:stop], rounded[start:stop] - before, alpha=-1)
        master, scale = _refit(weight, best.t().contiguous(), scale, hessian)
    return master, scale


def _to_level(column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A column ``[out]`` of a weight, rounded to the levels that its scales ``[out]`` give."""
    return dequantize(ternary_codes(column[:, None], scale[:, None]), scale[:, None])[:, 0]


def _refit(
    weight: torch.Tensor, master: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale for the codes if there is one a row, and weights that keep these codes."""
    if scale.shape[1] > 1:
        return master, scale
    codes = ternary_codes(master, scale).float()
    weighted = codes @ hessian
    refitted = (weighted * weight).sum(1, keepdim=True) / (weighted * codes).sum(1, keepdim=True)
    refitted = torch.where(refitted > 0, refitted, scale)  # not for a row of zeros (NaN)
    return master * torch.where(scale > 0, refitted / scale, 1.0), refitted
