"""Tokens a second of one distillation step: what each part of the fast step is worth, on a CPU core or a GPU.

    python recipes/benchmark_distill.py TEACHER --output recipes/results/distill-step.json
    python recipes/benchmark_distill.py TEACHER --device cuda --texts 256 --output recipes/results/distill-step-gpu.json

On a CPU processor time counts, not wall time, so that other programs on the machine matter less. On a GPU the matrix
products' share of what the chip reaches in one large bfloat16 product is reported too.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from hf_ternary import TernaryConfig
from hf_ternary.distill.losses import embedding_distance, hidden_error
from hf_ternary.distill.run import keep_freed_memory
from hf_ternary.distill.student import Encoder, load_teacher, make_student, transformer_of
from hf_ternary.provenance import provenance, write_json


class Variant(NamedTuple):
    name: str
    dense: bool = False  # groups as wide as the model compute the same through dense float weights
    bf16: bool = False
    attention: str = "sdpa"
    keep_memory: bool = False  # comes last: it cannot be undone within a process
    compiled: bool = False


VARIANTS = {
    "cpu": (
        Variant("dense float32 weights", dense=True),
        Variant("int8 products"),
        Variant("and bfloat16", bf16=True),
        Variant("and eager attention", bf16=True, attention="eager"),
        Variant("and freed memory kept", bf16=True, attention="eager", keep_memory=True),
    ),
    "cuda": (
        Variant("float32"),
        Variant("bfloat16", bf16=True),
        Variant("and compiled", bf16=True, compiled=True),  # last: see `counter`
    ),
}


def main(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of a text encoder")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    texts: Annotated[int, typer.Option(help="texts a batch")] = 32,
    tokens: Annotated[int, typer.Option(help="tokens a text")] = 64,
    rounds: Annotated[int, typer.Option(help="steps timed")] = 6,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
) -> None:
    if device not in VARIANTS:
        raise typer.BadParameter(f"--device {device}: use {' or '.join(VARIANTS)}")
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    peak = None if device == "cpu" else bfloat16_peak()
    table = Table("step", "tokens a second", "share of peak")
    speeds, shares, errors = {}, {}, {}
    for variant in VARIANTS[device]:
        if variant.keep_memory:
            keep_freed_memory()
        model = load_teacher(teacher)
        try:
            step = make_step(model, variant, device, texts, tokens)
            seconds = best_seconds(step, device, rounds)
            if peak and not variant.compiled:  # a compiled step does the same products
                with FlopCounterMode(display=False) as counter:
                    step()
            if peak:
                shares[variant.name] = round(counter.get_total_flops() / seconds / peak, 4)
        except Exception as error:  # one variant that fails must not cost the others their times
            errors[variant.name] = f"{type(error).__name__}: {error}"[:500]
            table.add_row(variant.name, "failed")
            continue
        speeds[variant.name] = round(texts * tokens / seconds, 1)
        table.add_row(variant.name, f"{speeds[variant.name]:.0f}", f"{shares[variant.name]:.1%}" if peak else "")
    Console().print(table)
    if output is not None:
        result = {"texts": texts, "tokens": tokens, "tokens_per_second": speeds, "share_of_peak": shares, "peak_flops": peak}
        write_json(output, {**result, "errors": errors, **provenance(0)})
    if errors:
        print("failed:", *(f"{name}: {error}" for name, error in errors.items()), sep="\n")
        raise SystemExit(1)


def make_step(model: SentenceTransformer, variant: Variant, device: str, texts: int, tokens: int) -> Callable[[], None]:
    """One step: the teacher's forward pass, the student's, its backward pass and the optimizer."""
    rows = transformer_of(model).get_input_embeddings().num_embeddings
    group_size = transformer_of(model).config.hidden_size if variant.dense else None
    config = TernaryConfig(embedding_bits=4, group_size=group_size)
    teacher = Encoder(copy.deepcopy(model)).to(device)
    student = Encoder(make_student(model, config, attn_implementation=variant.attention)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(student) if variant.compiled else student  # as the trainer's own torch_compile does
    ids = torch.randint(rows // 2, rows, (texts, tokens), device=device)
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=variant.bf16):
            with torch.no_grad():
                wanted = teacher(ids, mask)
            got = forward(ids, mask)
            pairs = zip(got["hidden"], wanted["hidden"], strict=True)
            loss = embedding_distance(got["embedding"], wanted["embedding"])
            loss = loss + torch.stack([hidden_error(s, t, mask.bool()) for s, t in pairs]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def best_seconds(step: Callable[[], object], device: str, rounds: int) -> float:
    for _ in range(2):  # the second call compiles what the first one's gradients changed
        step()
    seconds = []
    for _ in range(rounds):
        start = _now(device)
        step()
        seconds.append(_now(device) - start)
    return min(seconds)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def bfloat16_peak(size: int = 8192) -> float:
    """Operations a second of a large product, two for a multiply-add."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / best_seconds(lambda: x @ x, "cuda", 20)


if __name__ == "__main__":
    typer.run(main)
