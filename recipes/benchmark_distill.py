"""Tokens a second of one distillation step on one core: what each part of the fast step is worth.

    python recipes/benchmark_distill.py TEACHER --output recipes/results/distill-step.json

Processor time, not wall time, so that other programs on the machine matter less.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from hf_ternary import TernaryConfig
from hf_ternary.distill.losses import embedding_distance, hidden_error
from hf_ternary.distill.run import keep_freed_memory
from hf_ternary.distill.student import Encoder, load_teacher, make_student
from hf_ternary.evaluation.results import provenance, write_json

# (name, the student's config, its attention, bfloat16, keep freed memory). A group as wide as the row computes the same
# through dense float weights. Memory comes last: it cannot be undone within a process.
VARIANTS = (
    ("dense float32 weights", TernaryConfig(embedding_bits=4, group_size=384), "sdpa", False, False),
    ("int8 products", TernaryConfig(embedding_bits=4), "sdpa", False, False),
    ("and bfloat16", TernaryConfig(embedding_bits=4), "sdpa", True, False),
    ("and eager attention", TernaryConfig(embedding_bits=4), "eager", True, False),
    ("and freed memory kept", TernaryConfig(embedding_bits=4), "eager", True, True),
)


def main(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of all-MiniLM-L6-v2")],
    texts: Annotated[int, typer.Option(help="texts a batch")] = 32,
    tokens: Annotated[int, typer.Option(help="tokens a text")] = 64,
    rounds: Annotated[int, typer.Option(help="steps timed")] = 6,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("step", "tokens a second")
    speeds = {}
    for name, config, attention, bf16, keep in VARIANTS:
        if keep:
            keep_freed_memory()
        step = make_step(load_teacher(teacher), config, attention, bf16, texts, tokens)
        speeds[name] = texts * tokens / best_seconds(step, rounds)
        table.add_row(name, f"{speeds[name]:.0f}")
    Console().print(table)
    if output is not None:
        rounded = {name: round(speed, 1) for name, speed in speeds.items()}
        write_json(output, {"texts": texts, "tokens": tokens, "tokens_per_second": rounded, **provenance(0)})


def make_step(
    model: SentenceTransformer, config: TernaryConfig, attention: str, bf16: bool, texts: int, tokens: int
) -> Callable[[], None]:
    """One step: the teacher's forward pass, the student's, its backward pass and the optimizer."""
    teacher = Encoder(copy.deepcopy(model))
    student = Encoder(make_student(model, config, attn_implementation=attention))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(1000, 20000, (texts, tokens))
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                wanted = teacher(ids, mask)
            got = student(ids, mask)
            pairs = zip(got["hidden"], wanted["hidden"], strict=True)
            loss = embedding_distance(got["embedding"], wanted["embedding"])
            loss = loss + torch.stack([hidden_error(s, t, mask.bool()) for s, t in pairs]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def best_seconds(step: Callable[[], None], rounds: int) -> float:
    step()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    typer.run(main)
