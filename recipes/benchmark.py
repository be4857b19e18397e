"""Speed of what this package runs, beside what one would otherwise use, in the same run.

    python recipes/benchmark.py kernels --output recipes/results/kernels.json

Contenders take turns, so that a slow moment of the machine hits all alike; the speed-ups are medians over the turns. One
thread is timed by its CPU time, which other programs do not count in; several threads by the clock on the wall.
"""

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_ternary import packing
from hf_ternary.distill.run import keep_freed_memory
from hf_ternary.ops import linear
from hf_ternary.ops.backends import capabilities
from hf_ternary.provenance import provenance, write_json
from timing import summary, take_turns

SHAPES = [(384, 384), (384, 1536), (1536, 384), (768, 3072), (1024, 4096)]  # in_features, out_features
ROWS = [1, 4, 12, 16, 32, 64, 128, 512, 2048]
OURS = "ternary"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0])


@app.callback()
def main() -> None:
    """Keeps `kernels` a subcommand while it is the only one."""


@app.command()
def kernels(
    threads: Annotated[list[int] | None, typer.Option(min=1, help="thread counts; repeatable (default: 1 and all)")] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="rows of activations; repeatable")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="turns of every contender")] = 9,
    quick: Annotated[bool, typer.Option(help="one shape, few rows: does it work?")] = False,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
    seed: Annotated[int, typer.Option(help="of weights and activations")] = 0,
) -> None:
    """One linear layer, float32 in and out: ternary beside torch's int8 and float32."""
    torch.manual_seed(seed)
    keep_freed_memory()  # else every large output is, or is not, fetched anew from the system, by chance
    shapes, rows = (SHAPES[:1], rows or [1, 64]) if quick else (SHAPES, rows or ROWS)
    cells = [(t, *shape, m) for t in threads or sorted({1, os.cpu_count() or 1}) for shape in shapes for m in rows]
    measured = [_measure(*cell, repeats) for cell in track(cells, "measuring", transient=True)]
    print_kernels(measured)
    if output:
        write_json(output, {**provenance(seed), "capabilities": capabilities(), "repeats": repeats, "cells": measured})


def _measure(threads: int, in_features: int, out_features: int, rows: int, repeats: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            contenders = _contenders(in_features, out_features, rows)
            seconds = take_turns(contenders, repeats, time.thread_time if threads == 1 else time.perf_counter)
    finally:
        torch.set_num_threads(before)
    return {
        "threads": threads,
        "in_features": in_features,
        "out_features": out_features,
        "rows": rows,
        "microseconds": {name: summary([1e6 * s for s in times], 3) for name, times in seconds.items()},
        "speedup": {
            name: summary([theirs / ours for theirs, ours in zip(times, seconds[OURS], strict=True)], 3)
            for name, times in seconds.items()
            if name != OURS
        },
    }


def _contenders(in_features: int, out_features: int, rows: int) -> dict[str, Callable[[], Any]]:
    """Calls that compute the same layer; torch's int8 ones where this build of torch has them."""
    x, bias = torch.randn(rows, in_features), torch.randn(out_features)
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    weight, scale, dense = packing.pack(codes), torch.rand(out_features, 1), torch.randn(out_features, in_features)
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: linear(x, weight, scale, bias),
        "float32": lambda: torch.nn.functional.linear(x, dense, bias),
    }
    for engine in ("onednn", "x86"):
        if engine in torch.backends.quantized.supported_engines:
            contenders[f"int8 dynamic {engine}"] = _dynamic_int8(engine, x, dense, bias)
    if torch.backends.mkldnn.is_available():
        contenders["int8 static onednn"] = _static_int8(x, dense, bias)
    return contenders


def _dynamic_int8(engine: str, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """torch's dynamically quantized Linear: the activations' range is found in every call, one for the whole batch."""
    scales, zeros = dense.abs().amax(1) / 127, torch.zeros(len(dense), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and still what torch users have
        quantized = torch.quantize_per_channel(dense, scales, zeros, 0, torch.qint8)
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(quantized, bias)
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, False)


def _static_int8(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor) -> Callable[[], torch.Tensor]:
    """oneDNN's int8 matmul alone: it is given uint8 activations, so what it costs to make them is not counted."""
    codes = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    scales, zeros = dense.abs().amax(1) / 127, torch.zeros(len(dense), dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack((dense / scales[:, None]).round().to(torch.int8), list(x.shape))
    rest: Any = scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    return lambda: torch.ops.onednn.qlinear_pointwise(codes, 0.02, 128, packed, *rest)


def print_kernels(cells: list[dict[str, Any]]) -> None:
    """A table of :func:`kernels`' measurements: our time and rate, and how many times faster than each other one."""
    others = list(cells[0]["speedup"])
    table = Table(title=f"ternary linear on {capabilities()['backend']}: times faster than …")
    for column in ("threads", "in x out", "rows", "us", "GMAC/s", *others):
        table.add_column(column, justify="right")
    for cell in cells:
        inputs, outputs, rows = cell["in_features"], cell["out_features"], cell["rows"]
        microseconds = cell["microseconds"][OURS]["median"]
        rate = inputs * outputs * rows / microseconds / 1e3
        ratios = [f"{cell['speedup'][name]['median']:.2f}" for name in others]
        where = str(cell["threads"]), f"{inputs} x {outputs}", str(rows)
        table.add_row(*where, f"{microseconds:.1f}", f"{rate:.0f}", *ratios, end_section=rows == cells[-1]["rows"])
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
