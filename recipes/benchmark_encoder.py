"""Whole encoders on this CPU, from text or image to embedding: a ternary model beside the runtimes one would otherwise use.

    python recipes/benchmark_encoder.py MODEL --teacher TEACHER --onnx int8.onnx --openvino int8.xml --ctranslate2 int8

MODEL is a packed sentence-transformers model with mean pooling, or one of images with the class token as embedding (images
are resized beforehand, to the size of its processor); TEACHER is what it was distilled from; the others are exports of
TEACHER, all optional (recipes/README.md says how to make them). Every contender runs in a process of its own
(runtimes.py), so that no thread pool disturbs another. They take turns, so that a slow moment of the machine hits all alike,
and ratios are medians over the turns.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from tokenizers import Tokenizer

import hf_ternary
from documentation import paragraphs
from hf_ternary.provenance import PACKAGES, provenance, weights, write_json
from photographs import photograph
from timing import summary

RECIPES = Path(__file__).resolve().parent
OURS, TEACHER = "ternary", "float32"
LAYER_WEIGHT = re.compile(r"\blayers?\..*\.weight$")


@dataclass(frozen=True)
class Contender:
    name: str
    runtime: str  # a function of runtimes.py
    model: str
    python: str = sys.executable


@dataclass(frozen=True)
class Workload:
    inputs: Any  # texts, a list, or images, float32 [images, channels, height, width]
    at_once: bool  # all inputs in one call, or each in its own
    batch_size: int  # that the runtimes cut a call into

    @property
    def calls(self) -> list[Any]:
        return [self.inputs] if self.at_once else [self.inputs[i : i + 1] for i in range(len(self.inputs))]


def main(
    model: Annotated[Path, typer.Argument(help="folder of a packed model", exists=True, file_okay=False)],
    teacher: Annotated[str | None, typer.Option(help="folder or Hub id of the float32 model")] = None,
    onnx: Annotated[list[Path] | None, typer.Option(help="ONNX file of the teacher; repeatable")] = None,
    openvino: Annotated[list[Path] | None, typer.Option(help="OpenVINO .xml file of the teacher; repeatable")] = None,
    ctranslate2: Annotated[list[Path] | None, typer.Option(help="CTranslate2 folder of the teacher; repeatable")] = None,
    st_onnx: Annotated[list[Path] | None, typer.Option(help="FOLDER/onnx/FILE of sentence-transformers; repeatable")] = None,
    st_python: Annotated[
        Path, typer.Option(help="the Python that loads them: they need transformers 4", exists=True, dir_okay=False)
    ] = Path(sys.executable),
    threads: Annotated[list[int] | None, typer.Option(min=1, help="thread counts; repeatable (default: 1 and all)")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="turns of every contender")] = 7,
    starts: Annotated[int, typer.Option(min=1, help="processes started for start-up time and memory")] = 5,
    quick: Annotated[bool, typer.Option(help="few texts: does it work?")] = False,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
) -> None:
    exports = {"onnxruntime": onnx, "openvino": openvino, "ctranslate2": ctranslate2}
    others = [Contender(f"{name} {path.stem}", name, str(path)) for name, paths in exports.items() for path in paths or ()]
    others += [
        Contender(f"onnxruntime {path.stem}, sentence-transformers", "sentence_transformers_onnx", str(path), str(st_python))
        for path in st_onnx or ()
    ]
    everyone = contenders(model, teacher, others)
    share = 0.02 if quick else 1
    work = workloads(sentences(), share) if reads_text(model) else image_workloads(model, share)
    runs = [measure(everyone, work, model, count, rounds, starts) for count in threads or sorted({1, os.cpu_count() or 1})]
    report = {
        "model": model.resolve().name,
        "weights": weights(model),
        "max_seq_length": max_length(model),
        "rounds": rounds,
        "starts": starts,
        "linear_macs_per_token": linear_macs(model),
        "workloads": {name: describe(workload, model) for name, workload in work.items()},
        "runs": runs,
        "st_onnx_versions": st_versions(st_python) if st_onnx else None,
        **provenance(packages=(*PACKAGES, "onnxruntime", "openvino", "ctranslate2")),
    }
    print_runs(report)
    if output:
        write_json(output, report)


def reads_text(model: Path) -> bool:
    return (model / "tokenizer.json").exists()


def max_length(model: Path) -> int | None:
    """Tokens of a text that the model reads; None for images."""
    return hf_ternary.load(model).max_seq_length if reads_text(model) else None


def st_versions(python: Path) -> dict[str, str]:
    """What sentence-transformers' ONNX backend stands on in the environment of ``python``."""
    names = ["sentence-transformers", "transformers", "optimum-onnx", "onnxruntime", "torch"]
    found = "{d.name: d.version for d in distributions() if d.name in sys.argv}"
    code = f"import json, sys; from importlib.metadata import distributions; print(json.dumps({found}))"
    return json.loads(subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True).stdout)


def contenders(model: Path, teacher: str | None, others: list[Contender]) -> list[Contender]:
    if reads_text(model):
        library, name = "sentence_transformers", "sentence-transformers"
        ours = [Contender(OURS, "ternary", str(model)), Contender(f"{OURS}, {name}", library, str(model))]
        last = [Contender("tokenizer alone", "tokenizer", str(model))]
    else:
        library, name = "transformers", "transformers"
        ours, last = [Contender(OURS, library, str(model))], []
    everyone = [*ours, *others, *([Contender(f"{TEACHER}, {name}", library, teacher)] if teacher else ()), *last]
    twice = {c.name for c in everyone if [d.name for d in everyone].count(c.name) > 1}
    if twice:
        raise typer.BadParameter(f"two exports are called {', '.join(twice)}: give their files different names")
    return everyone


def sentences() -> list[str]:
    """Distinct sentences of Python's documentation, in an order drawn once and for all."""
    prose = [p for p in paragraphs() if not re.search(r"^   |::=|\*\*\*|===|---|>>>", p, re.MULTILINE)]
    split = {s for p in prose for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(p.split()))}
    whole = sorted(s for s in split if s[:1].isalpha() and s[-1] in ".!?" and len(s) > 25)
    return [whole[i] for i in np.random.default_rng(0).permutation(len(whole))]


def workloads(sentences: list[str], share: float) -> dict[str, Workload]:
    """A share of 50 queries, 1,024 sentences and 128 passages; for BERT's vocabulary about 16, 18 and 190 tokens each."""
    queries, short = ([s for s in sentences if low <= len(s.split()) <= high] for low, high in ((9, 11), (6, 20)))
    words = " ".join(sentences).split()
    passages = [" ".join(words[i : i + 130]) for i in range(0, len(words), 130)]
    return {
        "query": Workload(queries[: math.ceil(50 * share)], at_once=False, batch_size=1),
        "short": Workload(short[: math.ceil(1024 * share)], at_once=True, batch_size=32),
        "passage": Workload(passages[: math.ceil(128 * share)], at_once=True, batch_size=16),
    }


def image_workloads(model: Path, share: float) -> dict[str, Workload]:
    """A share of 20 images one by one, and of as many in batches as make 16,384 tokens."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    few = [photograph(number) for number in range(math.ceil(20 * share))]
    one = processor(few, return_tensors="np")["pixel_values"].astype(np.float32)
    many = math.ceil(16384 * share / image_tokens(one, model))
    rest = [photograph(number) for number in range(len(few), len(few) + many)]
    batch = processor(rest, return_tensors="np")["pixel_values"].astype(np.float32)
    return {"one": Workload(one, at_once=False, batch_size=1), "batch": Workload(batch, at_once=True, batch_size=16)}


class Process:
    """A contender that has loaded its model and embedded one input, and waits for more."""

    def __init__(self, contender: Contender, folder: Path, max_length: int | None, threads: int, first: Any) -> None:
        self.name = contender.name
        tokenizer = [folder, max_length] if max_length else ["", 0]
        command = [contender.python, RECIPES / "runtimes.py", contender.runtime, contender.model, *tokenizer, threads]
        begin = time.perf_counter()
        self._process: Any = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask(Workload(first, at_once=True, batch_size=1))
        self.start_seconds = time.perf_counter() - begin

    def ask(self, workload: Workload) -> tuple[float, np.ndarray, int | None]:
        """Median seconds of a call, embeddings of all inputs, and the peak memory until now in bytes."""
        try:
            pickle.dump((workload.calls, workload.batch_size), self._process.stdin)
            self._process.stdin.flush()
            seconds, embeddings, memory = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self.close()
            raise RuntimeError(f"{self.name} failed; its own message stands above") from None
        return statistics.median(seconds), embeddings, memory

    def close(self) -> None:
        self._process.communicate()


def measure(
    everyone: list[Contender], work: dict[str, Workload], folder: Path, threads: int, rounds: int, starts: int
) -> dict[str, Any]:
    """All contenders with a number of threads: ``starts`` times a fresh process, the last of which stay and take turns."""
    length = max_length(folder)
    single, batch, *_ = work.values()
    fresh: dict[str, list[tuple[float, Any]]] = {c.name: [] for c in everyone}

    def start(contender: Contender) -> Process:
        process = Process(contender, folder, length, threads, single.inputs[:1])
        fresh[contender.name].append((process.start_seconds, process.ask(batch)[2]))
        return process

    for _ in track(range(starts - 1), f"starting with {threads} threads", transient=True):
        for contender in everyone:
            start(contender).close()
    with ExitStack() as stack:
        processes = [stack.enter_context(closing(start(contender))) for contender in everyone]
        embeddings = {p.name: np.concatenate([p.ask(workload)[1] for workload in work.values()]) for p in processes}
        wanted = next((embeddings[name] for name in embeddings if name.startswith(TEACHER)), None)
        seconds: dict[str, dict[str, list[float]]] = {name: {p.name: [] for p in processes} for name in work}
        for _ in track(range(rounds), f"measuring with {threads} threads", transient=True):
            for name, workload in work.items():
                for p in processes:
                    seconds[name][p.name].append(p.ask(workload)[0])
    return {
        "threads": threads,
        "peak_gmacs": peak_gmacs(threads),
        "gmacs": {name: gmacs(w, folder, statistics.median(seconds[name][OURS])) for name, w in work.items()},
        "contenders": [
            {
                "name": c.name,
                "runtime": c.runtime,
                "bytes": file_size(c),
                "cosine": cosine(embeddings[c.name], wanted),
                "start_seconds": summary([s for s, _ in fresh[c.name]], 4),
                "peak_bytes": None if fresh[c.name][0][1] is None else summary([m for _, m in fresh[c.name]], 4),
                "milliseconds": {name: summary([1e3 * s for s in seconds[name][c.name]], 4) for name in work},
                "times_slower": {name: ratios(seconds[name][c.name], seconds[name][OURS]) for name in work},
            }
            for c in everyone
        ],
    }


def ratios(seconds: list[float], ours: list[float]) -> dict[str, float]:
    return summary([s / o for s, o in zip(seconds, ours, strict=True)], 4)


def cosine(embeddings: np.ndarray, wanted: np.ndarray | None) -> float | None:
    """Mean over the inputs; embeddings have length 1. None for no teacher, or for no embeddings."""
    if wanted is None or embeddings.shape != wanted.shape:
        return None
    return round(float((embeddings * wanted).sum(1).mean()), 5)


def file_size(contender: Contender) -> int | None:
    """Bytes of the weights, and of the graph where it is stored."""
    path = Path(contender.model)
    if contender.runtime == "tokenizer":
        return None
    if contender.runtime == "ctranslate2":
        return (path / "model.bin").stat().st_size
    if contender.runtime == "openvino":
        return path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return path.stat().st_size if path.is_file() else weights(contender.model)["bytes"]


def linear_macs(folder: Path) -> int:
    """Multiply-adds of the layers' linear maps for one token: one a weight, four weights a byte."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        slices = [file.get_slice(name) for name in file.keys() if LAYER_WEIGHT.search(name)]  # noqa: SIM118
        return sum(4 * math.prod(s.get_shape()) for s in slices if s.get_dtype() == "U8")


def gmacs(workload: Workload, folder: Path, seconds: float) -> float:
    """Multiply-adds of the linear layers over the whole time of a call, 10^9 a second."""
    return round(linear_macs(folder) * count_tokens(workload, folder) / len(workload.calls) / seconds / 1e9, 1)


def count_tokens(workload: Workload, folder: Path) -> int:
    if not reads_text(folder):
        return len(workload.inputs) * image_tokens(workload.inputs, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(hf_ternary.load(folder).max_seq_length)
    return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(workload.inputs))


def image_tokens(pixels: np.ndarray, folder: Path) -> int:
    """Patches of an image and the class token."""
    patch = json.loads((folder / "config.json").read_text())["patch_size"]
    return (pixels.shape[2] // patch) * (pixels.shape[3] // patch) + 1


def describe(workload: Workload, folder: Path) -> dict[str, Any]:
    """How much it is, and which inputs: the documentation differs between versions of Python."""
    inputs = workload.inputs
    kind, content = ("texts", "\0".join(inputs).encode()) if reads_text(folder) else ("images", inputs.tobytes())
    digest = hashlib.sha256(content).hexdigest()
    return {kind: len(inputs), "tokens": count_tokens(workload, folder), "sha256": digest}


def peak_gmacs(threads: int) -> float | None:
    """What peak.cpp prints; None without a C++ compiler or AVX-512 VNNI."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    with TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        flags = ["-O2", "-mavx512f", "-mavx512vnni", "-pthread"]
        built = subprocess.run([compiler, *flags, RECIPES / "peak.cpp", "-o", program], capture_output=True)
        ran = subprocess.run([program, str(threads)], capture_output=True, text=True) if built.returncode == 0 else built
    return float(ran.stdout) if ran.returncode == 0 else None


def print_runs(report: dict[str, Any]) -> None:
    console = Console(width=140)
    for run in report["runs"]:
        table = Table("", title=f"{report['model']}, {run['threads']} threads (times as slow as {OURS})")
        for column in ("start, s", "memory, MB", "file, MB", "cosine", *(f"{name}, ms" for name in report["workloads"])):
            table.add_column(column, justify="right")
        for c in run["contenders"]:
            memory = c["peak_bytes"] and c["peak_bytes"]["median"]
            sizes = ["" if n is None else f"{n / 1e6:.1f}" for n in (memory, c["bytes"])]
            fidelity = "" if c["cosine"] is None else f"{c['cosine']:.4f}"
            times = [f"{t['median']:.2f} ({c['times_slower'][name]['median']:.2f})" for name, t in c["milliseconds"].items()]
            table.add_row(c["name"], f"{c['start_seconds']['median']:.2f}", *sizes, fidelity, *times)
        console.print(table)
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in run["gmacs"].items())
        console.print(f"{OURS}, GMAC/s of linear layers over the whole call: {rates}; vpdpbusd alone {run['peak_gmacs']}")


if __name__ == "__main__":
    typer.run(main)
