"""Where a ternary encoder's time goes on this CPU: by length of the text, and by function of the native code.

    pip install . -C cmake.build-type=RelWithDebInfo -C install.strip=false  # functions keep their names
    python recipes/profile_encoder.py all-MiniLM-L6-v2-ternary --output profile.json

One text at a time, without its tokenizer. Functions need Linux's `perf`, which samples this process while it encodes.
Then one query through sentence-transformers: how much of `encode` is the encoder, and how much everything around it.
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from sentence_transformers import SentenceTransformer

import hf_ternary
from benchmark_encoder import linear_macs, peak_gmacs
from hf_ternary.provenance import provenance, write_json

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)  # tokens
SAMPLED = (16, 192)  # tokens: about a query and a passage
QUERY = "what does a context manager do when its block is left"
LEAST = 0.01  # share of the samples below which a function is not told


def main(
    model: Annotated[Path, typer.Argument(help="folder of a packed model", exists=True, file_okay=False)],
    threads: Annotated[list[int] | None, typer.Option(min=1, help="thread counts; repeatable (default: 1 and all)")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of every length")] = 7,
    seconds: Annotated[float, typer.Option(help="of calls in a turn, and of sampling by perf")] = 0.5,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
) -> None:
    macs, counts = linear_macs(model), threads or sorted({1, os.cpu_count() or 1})
    runs = []
    for count in counts:
        encode = encoder(model, count)
        times = measure({n: partial(encode, n) for n in LENGTHS}, rounds, seconds)
        runs.append(
            {
                "threads": count,
                "peak_gmacs": peak_gmacs(count),
                "lengths": [
                    {"tokens": n, "microseconds": round(1e6 * t, 1), "gmacs": round(macs * n / t / 1e9, 1)}
                    for n, t in times.items()
                ],
                "functions": {n: functions(partial(encode, n), 10 * seconds) for n in SAMPLED}
                if shutil.which("perf")
                else None,
                "sentence_transformers": query_through(model, count, rounds, seconds),
            }
        )
    report = {"model": model.resolve().name, "linear_macs_per_token": macs, "rounds": rounds, "runs": runs, **provenance()}
    Console().print_json(data=runs)
    if output:
        write_json(output, report)


def encoder(model: Path, threads: int) -> Callable[[int], np.ndarray]:
    """Embeds a text of so many tokens. Which ones does not matter to the time."""
    native = hf_ternary.load(model)._native
    ids = [i % 16 for i in range(max(LENGTHS))]
    return lambda n: native.embeddings([ids[:n]], "mean", True, threads)


@torch.inference_mode()
def query_through(folder: Path, threads: int, rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of `SentenceTransformer.encode` of one query, and of the forward pass of its transformer alone."""
    torch.set_num_threads(threads)
    model = SentenceTransformer(str(folder), device="cpu")
    ids = model.tokenizer([QUERY], return_tensors="pt")
    calls = {"encode": partial(model.encode, QUERY), "forward": partial(model[0].auto_model, **ids)}
    return {name: round(1e6 * taken, 1) for name, taken in measure(calls, rounds, seconds).items()}


def measure(calls: dict[Any, Callable[[], Any]], rounds: int, seconds: float) -> dict[Any, float]:
    """Seconds of each call: the median over turns, in each of which it is called for ``seconds``."""
    turns: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), "measuring", transient=True):
        for name, call in calls.items():
            turns[name].append(repeat(call, seconds))
    return {name: statistics.median(values) for name, values in turns.items()}


def repeat(call: Callable[[], Any], seconds: float) -> float:
    """Call again and again for so long; seconds a call."""
    start, number = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds or not number:
        call()
        number += 1
    return passed / number


def functions(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Share of the processor's time by function, while ``call`` is repeated; those without a name are left out."""
    with TemporaryDirectory() as folder:
        command = ["perf", "record", "--freq=2000", f"--pid={os.getpid()}", f"--output={folder}/samples"]
        perf = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        repeat(call, seconds)
        perf.send_signal(signal.SIGINT)
        perf.wait()
        told = subprocess.run(
            ["perf", "report", f"--input={folder}/samples", "--stdio", "--fields=overhead,symbol", "--field-separator=;"],
            capture_output=True,
            text=True,
        ).stdout
    rows = re.findall(r"^ *([\d.]+)% *;\[[.k]\] (?!0x)(.+?) *$", told, re.MULTILINE)
    return {name: round(float(share) / 100, 4) for share, name in rows if float(share) >= 100 * LEAST}


if __name__ == "__main__":
    typer.run(main)
