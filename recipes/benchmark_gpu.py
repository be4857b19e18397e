"""Speed and memory on a GPU, of one layer and of whole encoders, beside torch's float32, TF32, bfloat16 and torchao's int8.

    python recipes/benchmark_gpu.py --output recipes/results/gpu.json                # check, then measure everything
    python recipes/benchmark_gpu.py --minutes 0                                      # only check
    python recipes/benchmark_gpu.py --minutes 8 --output recipes/results/gpu.json    # stop in time; again: go on

Weights are random: shapes are those of the real models, and nothing is downloaded. Contenders take turns, so that a slow
moment hits all alike; times are medians over the turns, by CUDA events. The chip's limits are measured too, in the same run.
All that is random is drawn on the CPU, since a capture that fails may leave the GPU's generator unusable.
"ternary" is what a loaded model runs: the encoder of hf_ternary/triton_encoder.py for the models that it knows, beside them
"ternary modules", transformers' own forward with the ternary layers in it, which for the others (Qwen3) is "ternary". Texts
have one length and no padding, so what the encoder gains by dropping padding does not count. The weights of a single layer
stay in the chip's cache from call to call, as a small encoder's do; those of a large encoder are read from memory.
"""

import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import import_utils

from hf_ternary import TernaryConfig, encoder, packing
from hf_ternary.convert import ternarize_model
from hf_ternary.ops import linear, reference
from hf_ternary.ops.backends import capabilities
from hf_ternary.provenance import PACKAGES, provenance, write_json
from hf_ternary.ternarize import dequantize
from timing import summary

Call = Callable[[], Any]

# Class of transformers' config, and what makes it the model's; "tiny" is for trying this file out.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "all-MiniLM-L6-v2": (
        "BertConfig",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "bge-large": (
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "all-mpnet-base-v2": (
        "MPNetConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
    "Qwen3-0.6B": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
        },
    ),
    "tiny": (
        "BertConfig",
        {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    ),
}
# Batch and tokens a text, the most telling first: a run that is cut short has measured those of every model.
BATCHES = ((256, 128), (1, 16), (1, 128), (32, 128), (256, 512), (32, 512), (1, 512), (32, 16), (256, 16))
ROWS = (16, 2048, 1, 128, 32768, 64, 512)
CHECKED_ROWS = (1, 3, 16, 17, 64, 100, 256, 1000, 2048, 5000, 65536)
# More multiply-adds than this take the CPU's reference too long.
MOST_CHECKED = 10**11

console = Console(width=140)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"repeatable: {', '.join(MODELS)} [default: all but tiny]")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="stop cleanly when they are over; 0 measures nothing")] = 60,
    check: Annotated[bool, typer.Option(help="first compare the kernels with the reference on the CPU, bit for bit")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="turns of every contender")] = 9,
    device: Annotated[str, typer.Option(help="'cpu' tries this file out: no graphs, nothing compiled")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="results JSON; what it holds already is not measured again")] = None,
    seed: Annotated[int, typer.Option(help="of weights and inputs")] = 0,
) -> None:
    """Check and measure the ternary kernels on a GPU."""
    deadline = time.monotonic() + 60 * minutes
    names = model or [name for name in MODELS if name != "tiny"]
    if unknown := sorted(set(names) - set(MODELS)):
        raise typer.BadParameter(f"--model {unknown[0]}: use {', '.join(MODELS)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU: run this on a machine with one, or with --device cpu")
    torch.manual_seed(seed)
    result = {**provenance(seed, (*PACKAGES, "triton", "torchao")), "capabilities": capabilities(), "repeats": repeats}
    result |= _earlier(output, result)
    console.print(result["hardware"], result["versions"], result["capabilities"]["gpus"])
    shapes = sorted({shape for name in names for shape in linear_shapes(name)})
    if check:
        with first_tiles(device):
            check_kernels(shapes, device)
            for name in names:
                check_encoder(name, device)
    done = [cell["what"] for cell in result["cells"]]
    with torch.inference_mode():
        for what in _plan(names, shapes):
            if what in done:
                continue
            if time.monotonic() >= deadline:
                console.print("the time is over; run it again to go on")
                break
            result["limits"] = result["limits"] or limits(device)
            cell = measure(what, result["limits"], repeats, device)
            show(cell)
            result["cells"].append(cell)
            if output:
                write_json(output, result)
    failed = [f"{cell['what']}: {cell['errors']}" for cell in result["cells"] if cell["errors"]]
    if failed:
        console.print("failed:", *failed, sep="\n", markup=False)
        raise SystemExit(1)


def _earlier(output: Path | None, now: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same code on the same kind of GPU measured."""
    if output is None or not output.exists():
        return {"limits": {}, "cells": []}
    earlier = json.loads(output.read_text(encoding="utf-8"))
    for what, (then, here) in {
        "GPU": (earlier["hardware"]["gpu"], now["hardware"]["gpu"]),
        **{key: (earlier[key], now[key]) for key in ("commit", "versions", "seed", "repeats")},
    }.items():
        if then != here:
            raise typer.BadParameter(f"{output} was measured with {what} {then}, this is {here}: name another file")
    return {"limits": earlier["limits"], "cells": [cell for cell in earlier["cells"] if not cell["errors"]]}


def _plan(names: list[str], shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """What is measured, the most telling first."""
    for rows in ROWS[:2]:
        yield from ({"layer": list(shape), "rows": rows} for shape in shapes)
    for batch, tokens in BATCHES:
        yield from ({"model": name, "batch": batch, "tokens": tokens} for name in names)
    for rows in ROWS[2:]:
        yield from ({"layer": list(shape), "rows": rows} for shape in shapes)


def measure(what: dict[str, Any], best: dict[str, float], repeats: int, device: str) -> dict[str, Any]:
    """One cell: ``milliseconds`` of every contender (median and spread), ``errors`` of those that failed, and more.

    ``best`` is what :func:`limits` found.
    """
    extra: dict[str, Any] = {}
    if "layer" in what:
        contenders = layer_contenders(*what["layer"], what["rows"], device)
        layers, rows = [((what["layer"][0], what["layer"][1]), 1)], what["rows"]
    else:
        contenders = encoder_contenders(what["model"], what["batch"], what["tokens"], device)
        layers, rows = _layers(what["model"]), what["batch"] * what["tokens"]
        extra["weight_bytes"] = weight_bytes(what["model"], device)
    ready: dict[str, Call] = {}
    errors, memory = {}, {}
    for name, make in contenders.items():
        try:
            call = make()
            memory[name] = peak_memory(call, device)
            ready[name] = call
        except Exception as error:  # one contender that fails must not cost the others their turn on a rented machine
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    seconds = take_turns(ready, repeats, device)
    work = {
        "int8": sum(2 * i * o * rows * count for (i, o), count in layers),
        "bandwidth": sum((i * o / 4 + 2 * rows * (i + o)) * count for (i, o), count in layers),
    }
    cell = {
        "what": what,
        "milliseconds": {name: summary([1e3 * s for s in times], 5) for name, times in seconds.items()},
        # What the ternary layers need of what the chip can do in that time: operations; bytes of weights and activations.
        "share_of_limits": {
            name: {limit: round(work[limit] / statistics.median(seconds[name]) / 1e12 / best[limit], 4) for limit in work}
            for name in ready
            if name.startswith("ternary")
        },
        "working_bytes": memory,
        "errors": errors,
        **extra,
    }
    del contenders, ready
    gc.collect()
    return cell


def take_turns(calls: dict[str, Call], repeats: int, device: str, least: float = 0.005) -> dict[str, list[float]]:
    """Seconds a call of each contender, once for every turn; a turn is as many calls as take ``least`` seconds."""
    count = {name: max(1, int(least / max(timed(call, 1, device), 1e-7))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call, count[name], device))
    return seconds


def timed(call: Call, times: int, device: str) -> float:
    """Seconds a call, of ``times`` of them: from the first launch to the end of the last kernel."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def peak_memory(call: Call, device: str) -> int:
    """Bytes that a call (after two that warm up) allocates beyond what is there; 0 on a CPU. A graph holds its own."""
    call()
    call()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def graphed(call: Call) -> Call:
    """The call as a CUDA graph: one launch for all its kernels."""
    with capturable("cuda"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


@contextmanager
def capturable(device: str) -> Iterator[None]:
    """transformers' forward makes no mask, as outside of a capture, and MPNet's table of positions on the device."""
    not_capturing = mock.patch.object(import_utils, "is_cuda_stream_capturing", return_value=False, create=True)
    with not_capturing, torch.device(device):
        yield


def limits(device: str) -> dict[str, float]:
    """What the chip reaches in one large operation: 10^12 operations, or bytes read and written by a copy, a second."""
    size, bytes_copied = (8192, 2**32) if device != "cpu" else (128, 2**20)
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8).to(device)
    matrix = torch.randn(size, size, dtype=torch.bfloat16).to(device)
    source = torch.empty(bytes_copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "int8": lambda: torch._int_mm(codes, codes.t()),
        "bfloat16": lambda: matrix @ matrix.t(),
        "bandwidth": lambda: target.copy_(source),
    }
    for call in calls.values():
        timed(call, 3, device)
    amount = {"int8": 2 * size**3, "bfloat16": 2 * size**3, "bandwidth": 2 * bytes_copied}
    return {name: float(f"{amount[name] / timed(call, 10, device) / 1e12:.4g}") for name, call in calls.items()}


def layer_contenders(in_features: int, out_features: int, rows: int, device: str) -> dict[str, Callable[[], Call]]:
    """One layer of bfloat16 activations, launched from a graph; torch's int8 product is given its int8 activations."""
    x = torch.randn(rows, in_features, dtype=torch.bfloat16).to(device)
    bias = torch.randn(out_features, dtype=torch.bfloat16).to(device)
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8).to(device)
    weight, scale = packing.pack(codes), torch.rand(out_features, 1).to(device)
    dense = torch.randn(out_features, in_features, dtype=torch.bfloat16).to(device)
    tokens = torch.randint(-127, 128, (max(rows, 32), in_features), dtype=torch.int8).to(device)
    calls: dict[str, Call] = {
        "ternary": lambda: linear(x, weight, scale, bias),
        "ternary, bfloat16 activations": lambda: linear(x, weight, scale, bias, None),
        "bfloat16": lambda: nn.functional.linear(x, dense, bias),
        "int8 product alone": lambda: torch._int_mm(tokens, codes.t()),
    }
    wrap = graphed if device != "cpu" else lambda call: call
    return {name: partial(wrap, call) for name, call in calls.items()}


def encoder_contenders(name: str, batch: int, tokens: int, device: str) -> dict[str, Callable[[], Call]]:
    """Whole encoders, from token ids to hidden states, without padding."""
    here = models(name, device)
    ids = torch.randint(0, 200, (batch, tokens)).to(device)

    def forward(variant: str, precision: str = "highest") -> Call:
        def call() -> Any:
            torch.set_float32_matmul_precision(precision)
            return here[variant](input_ids=ids, attention_mask=no_mask(here[variant])).last_hidden_state

        return call

    makers: dict[str, Callable[[], Call]] = {
        "float32": lambda: forward("float32"),
        "tf32": lambda: forward("float32", "high"),
        "bfloat16": lambda: forward("bfloat16"),
        "ternary": lambda: forward("ternary"),
    }
    if has_encoder(here["ternary"]):
        makers["ternary modules"] = lambda: partial(by_modules, here["ternary"], ids)
    if device == "cpu":
        return makers

    def graph(variant: str, precision: str = "highest") -> Call:
        return graphed(forward(variant, precision))

    def compiled_graph(variant: str) -> Call:
        return graphed(compiled(here[variant], ids))

    makers["tf32 graph"] = partial(graph, "float32", "high")
    for variant in ("float32", "bfloat16", "ternary"):
        makers[f"{variant} graph"] = partial(graph, variant)
    for variant in sorted({"bfloat16", "ternary", "int8 torchao"} & here.keys()):
        makers[f"{variant} compiled"] = partial(compiled_graph, variant)
    return makers


def has_encoder(model: Any) -> bool:
    """Whether the whole model runs in one call, not module by module."""
    return set(encoder.explain(model).values()) <= {"native", "triton"}


def by_modules(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states by transformers' own forward."""
    forward = getattr(type(model), "hf_ternary_base", type(model)).forward
    return forward(model, input_ids=ids, attention_mask=no_mask(model) if mask is None else mask).last_hidden_state


def no_mask(model: Any) -> dict[str, None] | None:
    """What Qwen3 is given instead of None, with which it reads from the GPU whether texts are packed into a row."""
    return {"full_attention": None} if model.config.model_type == "qwen3" else None


def compiled(model: Any, ids: torch.Tensor) -> Call:
    """A copy of the model whose layers are compiled for this shape: all of them are one graph, so this takes seconds."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a layer that is compiled anew must not run uncompiled instead
    model = copy.deepcopy(model)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for layer in layers:
        layer.compile(dynamic=False)
    return partial(by_modules, model, ids)


def config_of(name: str) -> Any:
    config_class, options = MODELS[name]
    return getattr(transformers, config_class)(**{"max_position_embeddings": 1024, **options})


def linear_shapes(name: str) -> set[tuple[int, int]]:
    """(in_features, out_features) of the layers that are ternarized."""
    return {shape for shape, _ in _layers(name)}


@cache
def _layers(name: str) -> list[tuple[tuple[int, int], int]]:
    """Shapes and numbers of the layers that are ternarized."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config_of(name))
    inner = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".0." in f".{n}."]
    shapes = [(m.in_features, m.out_features) for m in inner]
    return [(shape, shapes.count(shape) * model.config.num_hidden_layers) for shape in sorted(set(shapes))]


@cache
def models(name: str, device: str) -> dict[str, Any]:
    """The model in every precision: random weights, on the device."""
    with torch.inference_mode(False), torch.no_grad():  # torch.compile is at home with ordinary tensors
        dense = transformers.AutoModel.from_config(config_of(name)).eval().requires_grad_(False).to(device)
        dense.config.use_cache = False
        ternary = ternarize_model(copy.deepcopy(dense), TernaryConfig()).bfloat16()
        encoder.bind(ternary)
        found = {"float32": dense, "bfloat16": copy.deepcopy(dense).bfloat16(), "ternary": ternary}
        if device != "cpu" and find_spec("torchao"):
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            found["int8 torchao"] = copy.deepcopy(found["bfloat16"])
            quantize_(found["int8 torchao"], Int8DynamicActivationInt8WeightConfig())
    return found


@cache
def weight_bytes(name: str, device: str) -> dict[str, int]:
    """Bytes that the model takes in every precision once it has run, with the copies that its kernels make of weights."""
    return {variant: _weight_bytes(model, device) for variant, model in models(name, device).items()}


@torch.inference_mode()
def _weight_bytes(model: nn.Module, device: str) -> int:
    if device == "cpu":
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    ids = torch.zeros(1, 16, dtype=torch.int64, device=device)
    model(input_ids=ids)  # what libraries allocate for themselves is there from now on
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    own = copy.deepcopy(model)
    own(input_ids=ids)
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def show(cell: dict[str, Any]) -> None:
    """A line a cell: milliseconds, and ternary's share of the others' time."""
    table = Table(" ".join(str(value) for value in cell["what"].values()), show_edge=False)
    times = {name: summary["median"] for name, summary in cell["milliseconds"].items()}
    ours = min(
        (times[name] for name in ("ternary", "ternary graph", "ternary compiled") if name in times), default=float("nan")
    )
    for name in times:
        table.add_column(name, justify="right")
    table.add_row("ms", *(f"{t:.4f}" for t in times.values()))
    table.add_row("ternary / it", *(f"{ours / t:.2f}" for t in times.values()))
    console.print(table)


@contextmanager
def first_tiles(device: str) -> Iterator[None]:
    """Nothing is tuned: any tile gives the same bits, and the tests go through all of them."""
    if device == "cpu":
        yield
        return
    from hf_ternary.ops import triton as kernels

    with mock.patch.object(kernels, "TUNE", False):
        yield


def check_kernels(shapes: list[tuple[int, int]], device: str) -> None:
    """Compare what the device computes with the reference on the CPU; stops at the first difference.

    Raises:
        AssertionError: it names the shape.
    """
    started = time.monotonic()
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch fill new memory with NaN
    odd = [(1, 1), (63, 5), (385, 33), (1000, 999)]
    cells = [(*shape, rows) for shape in shapes + odd for rows in CHECKED_ROWS]
    checked = [cell for cell in cells if cell[0] * cell[1] * cell[2] <= MOST_CHECKED and (device != "cpu" or cell[2] < 20)]
    for in_features, out_features, rows in checked:
        for groups in {1, in_features // 64 if in_features % 64 == 0 and rows in (3, 100) else 1}:
            _check_layer(in_features, out_features, groups, rows, device)
    torch.use_deterministic_algorithms(False)
    if device != "cpu":
        _check_graph_and_compile()
    console.print(f"checked {len(checked)} shapes in {time.monotonic() - started:.0f} s: equal to the reference")


def _check_layer(in_features: int, out_features: int, groups: int, rows: int, device: str) -> None:
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    weight, scale, bias = packing.pack(codes), torch.rand(out_features, groups), torch.randn(out_features)
    x = torch.randn(rows, in_features) * torch.randn(rows, 1).exp()
    if rows > 2:
        x[0], x[1, -1], x[2, 0] = 0, torch.nan, -torch.inf
    dtype = torch.bfloat16 if rows % 2 else torch.float32
    for activation, given in (("int8", bias), ("int8", None), (None, bias)):
        if activation is None and rows > 256:
            continue
        x_device, weight_device, scale_device = x.to(dtype).to(device), weight.to(device), scale.to(device)
        arguments = x_device, weight_device, scale_device, None if given is None else given.to(device), activation
        y = linear(*arguments).cpu()
        if activation is None:
            equal = _is_close(y, x.to(dtype), dequantize(codes, scale), bias)
        else:
            expected = reference.linear(x.to(dtype), weight, scale, given, activation)
            equal = torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert equal, f"{in_features} x {out_features}, {groups} groups, {rows} rows, {dtype}, activation {activation}"


def _is_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether y is ``x @ weight.T + bias``, summed in float32 in any order and rounded to its dtype."""
    x, weight = x.double(), weight.double()
    exact, finite = x @ weight.T + bias, x.isfinite().all(1)
    bound = 2**-19 * (x.abs() @ weight.abs().T + bias.abs()) + torch.finfo(y.dtype).eps * exact.abs()
    return bool(((y - exact).abs() <= bound)[finite].all() and not y[~finite].isfinite().all(1).any())


@torch.inference_mode()
def check_encoder(name: str, device: str) -> None:
    """Compare the encoder with transformers' forward, and a text's hidden states alone with those in a padded batch.

    A model that has no encoder passes. Int8 codes flip here and there where floats are rounded otherwise, hence a cosine.

    Raises:
        AssertionError: it names the dtype.
    """
    lengths = [3, 1, 17, 128, 65]
    ids = torch.randint(5, 200, (len(lengths), max(lengths))).to(device)
    mask = (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long().to(device)
    kinds = (torch.float32, torch.float16, torch.bfloat16) if device != "cpu" else (torch.float32,)
    for dtype in kinds:
        model = copy.deepcopy(models(name, device)["ternary"]).to(dtype)
        if not has_encoder(model):
            return
        ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
        theirs = by_modules(model, ids, mask)
        weights = mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
        cosine = nn.functional.cosine_similarity(*((states.float() * weights).sum(1) for states in (ours, theirs)))
        assert cosine.min() > 0.99, f"{name}, {dtype}: cosine with transformers' forward {cosine.tolist()}"
        for row, length in enumerate(lengths):
            alone = model(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
            assert torch.equal(alone, ours[row, :length]), f"{name}, {dtype}: {length} tokens differ alone and in a batch"
    console.print(f"checked the encoder of {name}: {cosine.min():.5f} is the least cosine with transformers' forward")


def _check_graph_and_compile() -> None:
    """A captured graph, a compiled module and autocast give the bits of a plain call."""
    codes = torch.randint(-1, 2, (384, 384), dtype=torch.int8)
    weight, scale, bias = packing.pack(codes).cuda(), torch.rand(384, 1).cuda(), torch.randn(384).cuda()
    for rows in (7, 300):
        x = torch.randn(rows, 384, dtype=torch.bfloat16).cuda()
        y = torch.empty(rows, 384, device="cuda", dtype=torch.bfloat16)
        replay = graphed(lambda x=x, y=y: y.copy_(linear(x, weight, scale, bias)))
        x.copy_(torch.randn(rows, 384))
        replay()
        expected = linear(x, weight, scale, bias)
        assert torch.equal(y, expected), f"graph, {rows} rows"
        for mode in ("default", "reduce-overhead"):
            call = torch.compile(lambda x: linear(x, weight, scale, bias), fullgraph=True, mode=mode, dynamic=False)
            for _ in range(3):
                y = call(x)
            assert torch.equal(y, expected), f"compiled ({mode}), {rows} rows"
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(linear(x, weight, scale, bias), expected), f"autocast, {rows} rows"
        x.requires_grad_()
        linear(x, weight, scale, bias).sum().backward()
        assert x.grad is not None, "no gradient"


if __name__ == "__main__":
    typer.run(main)
