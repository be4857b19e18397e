"""Compensates rounding errors, before distillation or instead of it.

Layer by layer, in the order in which data flows, weights are rounded as the layer's own inputs weigh the errors
(:mod:`.gptq`). The inputs are those that the student sees, behind layers rounded before; the target is what the teacher
computes from its own (as in GPTAQ, arXiv 2504.02692), so that errors do not add up from layer to layer. A layer whose output
is added to the residual stream makes up for the error of that stream too, as far as its inputs tell.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.utils.logging import tqdm

from ..config import TernaryConfig
from ..modules import FakeTernaryLinear
from ..ternarize import dequantize, quantize_activation, ternary_codes, ternary_scale
from .data import by_length
from .gptq import coordinate_descent, gptq_round
from .student import Encoder, add_dense, dense_of, load_teacher, make_student, pack_student, ternary_layers
from .texts import Collator, TokenizedTexts

# Added to the diagonal of the Hessian, as a share of its mean: GPTQ's default times twenty, as few texts are enough then.
DAMPING = 0.2

# Scales that are tried for every row, as multiples of the least-squares scale.
MULTIPLES = (0.7, 0.8, 0.9, 1.0, 1.1)

# What `a + b` may be to a TorchFunctionMode.
SUMS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__)

# Strengths of the ridge that are tried for the Dense module.
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def calibrate(
    model: str | Path, texts: Iterable[str], config: TernaryConfig | None = None, device: str | None = None
) -> SentenceTransformer:
    """Ternarize an encoder of texts without training it: in minutes, and far closer to the original than rounding alone.

    Every ternary layer makes up for rounding errors (:func:`compensate`), and a Dense module in float behind the pooling for
    what is linear in the error of the embeddings (:func:`fit_dense`).

    Args:
        model: full-precision sentence-transformers or transformers encoder (which gets mean pooling), a Hub id or folder.
        texts: of the kind that it will embed. More are better and take longer; with too few it fits them alone. Compare on
            texts that are not among them.
        config: what to make.
        device: where to compute [the best there is, but not MPS, which lacks float64].

    Returns:
        The packed model, on the CPU.

    Raises:
        ValueError: no list of texts, or a model that cannot be a teacher (see :func:`.student.load_teacher`).
    """
    if isinstance(texts, str) or not (texts := list(texts)):
        raise ValueError(f"texts={texts!r} is no list of texts; give some hundreds of the kind that the model will embed")
    best = get_device_name()
    config, device = config or TernaryConfig(), device or ("cpu" if best == "mps" else best)
    if config.group_size == "tensor":
        raise ValueError("group_size='tensor' leaves no scale to fit to a row: use None, or a number of columns")
    teacher = load_teacher(model)
    data, collate = TokenizedTexts.of(texts, teacher), Collator(teacher.tokenizer.pad_token_id or 0)
    batches = [collate([data[int(i)] for i in index]) for index in by_length(data.lengths)]
    inputs = [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
    student = make_student(teacher, config)
    add_dense(student)
    encoders = Encoder(student).to(device), Encoder(teacher).to(device)
    compensate(*encoders, inputs)
    fit_dense(*encoders, inputs)
    return pack_student(student.to("cpu"), config)


@torch.no_grad()
def compensate(student: Encoder, teacher: Encoder, batches: Iterable[dict[str, Any]]) -> None:
    """Replace the master weights, scales and biases of every ternary layer of ``student``, in place.

    Args:
        student: with learned scales; its ternary layers hold the teacher's weights.
        teacher: the same encoder in full precision.
        batches: inputs of both, a few hundred texts or images; of several processes, each gives its own.
    """
    batches = list(batches)
    layers, originals = ternary_layers(student), dict(teacher.named_modules())
    order, into_stream = _in_order(student, batches[0])
    groups = tqdm(order, desc="Compensating rounding errors")
    with _Replay(student, batches) as students, _Replay(teacher, batches) as teachers:
        for block, inside in groupby(groups, lambda names: _block(student, names[0])):
            for names in inside:
                statistics = _Statistics.of(students, teachers, names[0], into_stream.issuperset(names) and len(names) == 1)
                for name in names:
                    original = originals[name]
                    assert isinstance(original, nn.Linear)
                    _compensate_layer(layers[name], original, statistics)
            if block is not None:
                students.finish(block)
                teachers.finish(block)


@torch.no_grad()
def fit_dense(student: Encoder, teacher: Encoder, batches: Iterable[dict[str, Any]]) -> None:
    """Let the Dense module behind the student's pooling make up for what is linear in the error of its embeddings, in place.

    Ridge regression of the error of the student's embeddings on what the module reads. Its strength is that of
    :data:`RIDGES` which does best when each half of the inputs is predicted from the other; where none does better than
    nothing, nothing is changed. The same relative error weighs the same in every input. Embeddings are compared before an
    activation function.

    Args:
        student: with :func:`.student.add_dense`, new or trained.
        teacher: the same encoder in full precision.
        batches: inputs of both, best ten times as many as an embedding has dimensions; of several processes, each gives its
            own.
    """
    linear, own = add_dense(student.model).linear, dense_of(teacher.model)
    width, device = linear.in_features, linear.weight.device
    # Of each half of the batches, of x with a 1 and errors e: x x', [width + 1, width + 1], and x e', [width + 1, outputs].
    squares, errors = (torch.zeros((2, width + 1, columns), device=device) for columns in (width + 1, linear.out_features))
    for number, batch in enumerate(batches):
        x, t = student.pooled(**batch).float(), teacher.pooled(**batch).float()
        with torch.autocast(device.type, enabled=False):
            t = t if own is None else own.linear(t)
            length = t.norm(dim=1, keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
            error = (t - linear(x)) / length
            x = torch.cat([x, torch.full_like(x[:, :1], linear.bias is not None)], 1) / length
            squares[number % 2] += x.t() @ x
            errors[number % 2] += x.t() @ error
    squares, errors = (total.cpu().double() for total in reduce([squares, errors], "sum"))
    eye = torch.eye(width + 1, dtype=torch.float64)
    unit = width * eye * squares.sum(0).diagonal()[:-1].mean() / squares.sum(0)[-1, -1].clamp_min(1)

    def solve(xx: torch.Tensor, xe: torch.Tensor, ridge: float) -> torch.Tensor:
        return torch.cholesky_solve(xe, torch.linalg.cholesky(xx + ridge * unit))

    def gain(ridge: float) -> float:
        changes = solve(squares, errors, ridge).flip(0)
        return (2 * (changes * errors).sum() - (changes * (squares @ changes)).sum()).item()

    best = max(RIDGES, key=gain)
    if gain(best) > 0:
        change = solve(squares.sum(0), errors.sum(0), best).t().to(linear.weight)
        linear.weight += change[:, :-1]
        if linear.bias is not None:
            linear.bias += change[:, -1]


def _in_order(student: Encoder, batch: dict[str, Any]) -> tuple[list[list[str]], set[str]]:
    """Names of the ternary layers that see every token, first used first, those with one input together; and of those whose
    output is added to something, the residual stream."""
    groups: list[tuple[torch.Tensor, list[str]]] = []
    outputs: dict[str, torch.Tensor] = {}
    into_stream: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            # A pooler, which may see one token of its own (SigLIP's), or a shared layer's second use.
            if args[0].shape[:-1] != batch["attention_mask"].shape or name in outputs:
                return
            outputs[name] = output
            if groups and groups[-1][0] is args[0]:
                groups[-1][1].append(name)
            else:
                groups.append((args[0], [name]))

        return hook

    def added(one: torch.Tensor, other: torch.Tensor) -> None:
        into_stream.update(name for name, output in outputs.items() if output is one)

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in ternary_layers(student).items()]
    with _Sums(added):
        student(**batch)
    for hook in hooks:
        hook.remove()
    return [names for _, names in groups], into_stream


def _block(encoder: Encoder, name: str) -> str | None:
    """Name of the transformer block that holds the layer ``name``: a member of the outermost list of modules."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(encoder.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


class _Seen(BaseException):
    """Ends a forward pass early. No error: nothing that handles errors should catch it."""


class _Sums(TorchFunctionMode):
    """Calls ``added(a, b)`` and ``added(b, a)`` before every sum of two tensors of one shape."""

    def __init__(self, added: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.added = added

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in SUMS and all(isinstance(each, torch.Tensor) for each in args[:2]) and args[0].shape == args[1].shape:
            self.added(args[0], args[1])
            self.added(args[1], args[0])
        return func(*args, **(kwargs or {}))


class _Replay:
    """Runs an encoder up to one layer after the other, for every batch.

    A block that is finished is not computed again: from then on it returns what it returned last, and so do those before it,
    whose outputs nobody needs any more.
    """

    def __init__(self, encoder: Encoder, batches: list[dict[str, Any]]) -> None:
        self.encoder, self.batches = encoder, batches
        self._finished: list[nn.Module] = []
        self._outputs: list[Any] = []  # of the last finished block, by batch
        self._number = 0

    def __enter__(self) -> "_Replay":
        return self

    def __exit__(self, *error: object) -> None:
        for block in self._finished:
            vars(block).pop("forward")

    def seen(self, name: str, into_stream: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """What the layer ``name`` sees of each batch, float32 ``[real tokens, in]``, and, if it adds to the residual stream,
        what is there: ``[real tokens, out]``."""
        layer = self.encoder.get_submodule(name)
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        streams: list[torch.Tensor] = []

        def before(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            inputs.append(args[0].float())
            if not into_stream:
                raise _Seen

        def after(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            outputs.append(output)

        def added(one: torch.Tensor, other: torch.Tensor) -> None:
            if outputs and one is outputs[0]:
                outputs.clear()
                streams.append(other.float())
                raise _Seen

        handles = layer.register_forward_pre_hook(before), layer.register_forward_hook(after)
        for number, batch in enumerate(self.batches):
            with _Sums(added):
                self._run(number)
            real = batch["attention_mask"].bool()
            yield inputs.pop()[real], streams.pop()[real] if into_stream else None
        for handle in handles:
            handle.remove()

    def finish(self, name: str) -> None:
        """Keep what the block ``name`` returns for each batch, in the place of what the one before it returned."""
        kept = self._outputs or [None] * len(self.batches)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[self._number] = output  # this ends the batch's pass: nothing reads the old value any more
            raise _Seen

        block = self.encoder.get_submodule(name)
        handle = block.register_forward_hook(hook)
        for number in range(len(self.batches)):
            self._run(number)
        handle.remove()
        self._outputs = kept
        block.forward = lambda *args, **options: self._outputs[self._number]
        self._finished.append(block)

    def _run(self, number: int) -> None:
        self._number = number
        before = {module: vars(module).get("forward") for module in self.encoder.modules()}
        with suppress(_Seen):
            self.encoder(**self.batches[number])
        for module, forward in before.items():  # transformers 5.0 leaves its own there when a forward pass ends early
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@dataclass
class _Statistics:
    """Means over the real tokens: of a layer's input x in the student, of x_t in the teacher, and of what the student's
    residual stream lacks, ``d = r_t - r``, for a layer that adds to it (0 for another)."""

    xx: torch.Tensor  # x x', [in, in]
    xt: torch.Tensor  # x x_t', [in, in]
    xd: torch.Tensor  # x d', [in, out]
    x: torch.Tensor
    t: torch.Tensor
    d: torch.Tensor

    @classmethod
    def of(cls, students: _Replay, teachers: _Replay, name: str, into_stream: bool) -> "_Statistics":
        layer = students.encoder.get_submodule(name)
        assert isinstance(layer, FakeTernaryLinear)
        width, rows = layer.in_features, layer.out_features if into_stream else 1
        shapes = (width, width), (width, width), (width, rows), (width,), (width,), (rows,)
        sums = [torch.zeros(shape, device=layer.weight.device) for shape in shapes]
        count = 0
        for (x, r), (t, r_t) in zip(students.seen(name, into_stream), teachers.seen(name, into_stream), strict=True):
            if layer.activation == "int8":
                codes, scale = quantize_activation(x)
                x = codes * scale
            d = x.new_zeros(len(x), 1) if r is None or r_t is None else r_t - r
            for total, value in zip(sums, (x.t() @ x, x.t() @ t, x.t() @ d, x.sum(0), t.sum(0), d.sum(0)), strict=True):
                total += value
            count += len(x)
        *sums, tokens = reduce([*sums, torch.tensor(count, device=layer.weight.device)], "sum")
        return cls(*(total / tokens for total in sums))


def _compensate_layer(layer: FakeTernaryLinear, original: nn.Linear, mean: _Statistics) -> None:
    """Give ``layer`` the ternary weights, scales and bias whose output is closest to what is wanted of it, in place.

    Args:
        layer: of the student, with learned scales.
        original: the same layer of the teacher. Wanted is its output plus what the residual stream lacks.
        mean: what both see.
    """
    weight = original.weight.float()
    # A bias takes care of the means, the weights of what varies around them; without one, the weights do both.
    biased = layer.bias is not None
    x, t, d = (each if biased else torch.zeros_like(each) for each in (mean.x, mean.t, mean.d))
    second = mean.xx - x.outer(x)
    damping = DAMPING * second.diagonal().mean()
    hessian = second + damping * torch.eye(len(second), device=second.device)
    cross = (mean.xt - x.outer(t)) @ weight.t() + mean.xd - x.outer(d)
    wanted = torch.linalg.solve(hessian, cross + damping * weight.t()).t()

    scale = ternary_scale(wanted, layer.weight_scheme, layer.group_size)
    # Every row with every multiple at once, then the best of each row.
    candidates = torch.cat([scale * multiple for multiple in MULTIPLES])
    masters, scales = gptq_round(wanted.repeat(len(MULTIPLES), 1), candidates, hessian)
    errors = wanted.repeat(len(MULTIPLES), 1) - dequantize(ternary_codes(masters, scales), scales)
    best = ((errors @ hessian) * errors).sum(1).view(len(MULTIPLES), -1).argmin(0)
    row = best * len(wanted) + torch.arange(len(wanted), device=best.device)
    master, scale = coordinate_descent(wanted, masters[row], scales[row], hessian)
    layer.weight.copy_(master)
    assert layer.weight_scale is not None
    layer.weight_scale.copy_(scale)
    if biased:
        layer.bias.copy_(original.bias + weight @ t + d - dequantize(ternary_codes(master, scale), scale) @ x)
