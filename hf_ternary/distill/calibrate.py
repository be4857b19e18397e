"""A start that compensates rounding errors: GPTQ and coordinate descent with ternary levels.

Layer by layer, in the order in which data flows: the columns of a weight matrix are rounded one after the other, and the
error of each is made up for by the columns not rounded yet, as the layer's own inputs weigh it (GPTQ, Frantar et al., arXiv
2210.17323). Then every column is rounded anew, given all others, again and again (QuantEase, Behdin et al., arXiv
2309.01885). The inputs are those that the student sees, behind layers rounded before; the target is what the teacher
computes from its own (as in GPTAQ, arXiv 2504.02692), so that errors do not add up from layer to layer.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..modules import FakeTernaryLinear
from ..ternarize import dequantize, quantize_activation, ternary_codes, ternary_scale
from .student import Encoder, ternary_layers

# Added to the diagonal of the Hessian, as a share of its mean: GPTQ's default times five, as few texts are enough then.
DAMPING = 0.05

# Scales that are tried for every row, as multiples of the least-squares scale.
MULTIPLES = (0.7, 0.8, 0.9, 1.0, 1.1)

# Columns whose errors are spread over the rest of the matrix at once.
BLOCK = 128

# Rounds of the coordinate descent; later ones hardly change anything.
SWEEPS = 10


@torch.no_grad()
def compensate(student: Encoder, teacher: Encoder, batches: Iterable[dict[str, Any]]) -> None:
    """Replace the master weights, scales and biases of every ternary layer of ``student``, in place.

    Args:
        student: with learned scales; its ternary layers hold the teacher's weights.
        teacher: the same encoder in full precision.
        batches: inputs of both, a few hundred texts or images.
    """
    batches = list(batches)
    layers, originals = ternary_layers(student), dict(teacher.named_modules())
    for names in tqdm(_in_order(student, batches[0]), desc="Compensating rounding errors"):
        statistics = _statistics(student, teacher, names[0], batches)
        for name in names:
            original = originals[name]
            assert isinstance(original, nn.Linear)
            _compensate_layer(layers[name], original, *statistics)


def _in_order(student: Encoder, batch: dict[str, Any]) -> list[list[str]]:
    """Names of the ternary layers that see every token (not a pooler's), first used first; those with one input together."""
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            elif args[0].ndim == 3:
                groups.append((args[0], [name]))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in ternary_layers(student).items()]
    student(**batch)
    for hook in hooks:
        hook.remove()
    return [names for _, names in groups]


def _statistics(
    student: Encoder, teacher: Encoder, name: str, batches: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean of ``x x'``, mean of ``x x_teacher'`` (both ``[in, in]``) and means of x and x_teacher over the real tokens."""
    layer = student.get_submodule(name)
    assert isinstance(layer, FakeTernaryLinear)
    width = layer.in_features
    sums = [torch.zeros(shape, device=layer.weight.device) for shape in ((width, width), (width, width), (width,), (width,))]
    count = 0
    for batch in batches:
        mask = batch["attention_mask"].bool()
        x, target = (_input(encoder, name, batch)[mask] for encoder in (student, teacher))
        if layer.activation == "int8":
            codes, scale = quantize_activation(x)
            x = codes * scale
        for total, value in zip(sums, (x.t() @ x, x.t() @ target, x.sum(0), target.sum(0)), strict=True):
            total += value
        count += len(x)
    return tuple(total / count for total in sums)  # type: ignore[return-value]


class _Seen(Exception):  # noqa: N818 - no error, it ends a forward pass early
    pass


def _input(encoder: Encoder, name: str, batch: dict[str, Any]) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0].float())
        raise _Seen

    handle = encoder.get_submodule(name).register_forward_pre_hook(hook)
    with suppress(_Seen):
        encoder(**batch)
    handle.remove()
    return seen[0]


def _compensate_layer(
    layer: FakeTernaryLinear,
    original: nn.Linear,
    second: torch.Tensor,
    cross: torch.Tensor,
    mean: torch.Tensor,
    target_mean: torch.Tensor,
) -> None:
    weight = original.weight.float()
    # The bias takes care of the means, the weights of what varies around them.
    second = second - mean.outer(mean)
    cross = cross - mean.outer(target_mean)
    damping = DAMPING * second.diagonal().mean()
    hessian = second + damping * torch.eye(len(second), device=second.device)
    wanted = torch.linalg.solve(hessian, cross @ weight.t() + damping * weight.t()).t()

    scale = ternary_scale(wanted, layer.weight_scheme, layer.group_size)
    # Every row with every multiple at once, then the best of each row.
    candidates = torch.cat([scale * multiple for multiple in MULTIPLES])
    masters, scales = round_with_compensation(wanted.repeat(len(MULTIPLES), 1), candidates, hessian)
    errors = wanted.repeat(len(MULTIPLES), 1) - dequantize(ternary_codes(masters, scales), scales)
    best = ((errors @ hessian) * errors).sum(1).view(len(MULTIPLES), -1).argmin(0)
    row = best * len(wanted) + torch.arange(len(wanted), device=best.device)
    master, scale = round_again(wanted, masters[row], scales[row], hessian)
    layer.weight.copy_(master)
    assert layer.weight_scale is not None
    layer.weight_scale.copy_(scale)
    if layer.bias is not None:
        layer.bias.copy_(original.bias + weight @ target_mean - dequantize(ternary_codes(master, scale), scale) @ mean)


def round_with_compensation(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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
            rounded = dequantize(ternary_codes(rest[i, :, None], levels[i, :, None]), levels[i, :, None])[:, 0]
            errors[i - start] = (rest[i] - rounded) / inverse[i, i]
            rest[i + 1 : stop].addr_(inverse[i, i + 1 : stop], errors[i - start], alpha=-1)
        rest[stop:].addmm_(inverse[start:stop, stop:].t(), errors, alpha=-1)
    return _refit(weight, rest[order.argsort()].t().contiguous(), scale, hessian)


def round_again(
    weight: torch.Tensor, master: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent: round every column to the level that is best given the codes of all others, :data:`SWEEPS` times.

    Args:
        weight: float ``[out, in]``, what is approximated.
        master, scale: a rounding of it, as :func:`round_with_compensation` returns; the error never grows from there.
        hessian: positive definite ``[in, in]``.

    Returns:
        As :func:`round_with_compensation`; a weight is what would have been best for it without rounding.
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
                new = dequantize(ternary_codes(best[i, :, None], levels[i, :, None]), levels[i, :, None])[:, 0]
                slope[i:stop].addr_(hessian[i:stop, i], new - rounded[i], alpha=-1)
                rounded[i] = new
            slope[stop:].addmm_(hessian[stop:, start:stop], rounded[start:stop] - before, alpha=-1)
        master, scale = _refit(weight, best.t().contiguous(), scale, hessian)
    return master, scale


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
