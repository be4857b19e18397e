"""A tiny teacher, a tiny corpus, and options that train on them in seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.conftest import WORDS

# A run that is killed after its eighth step; its options are the argument.
KILL = """
import json, os, signal, sys
from hf_ternary.distill import DistillArguments, distill
from hf_ternary.distill.student import Encoder
from hf_ternary.distill.health import Health

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

Health.on_step_end = on_step_end
distill(DistillArguments(**json.loads(sys.argv[1])))
"""


def make_texts(count: int = 400, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, rng.integers(2, 20))) for i in range(count)]


def output_error(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared error of ``x @ weight.T`` for inputs with that second moment."""
    error = weight - other
    return ((error @ hessian) * error).sum().item() / len(weight)


def weights(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(options["output_dir"]) / "model" / "model.safetensors")


def log(options: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(options["output_dir"]) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts()))
    return path


@pytest.fixture(scope="session")
def teacher(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model with larger weights: as it is, its layers hardly change the embeddings."""
    path = tmp_path_factory.mktemp("teacher") / "model"
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.ndim == 2:
                parameter *= 15
    model.save_pretrained(str(path))
    return path


@pytest.fixture
def options(teacher: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Options of a run of 12 steps; ``options(learning_rate=1e-3)`` changes some."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "teacher": str(teacher),
            "texts": [str(corpus_file)],
            "output_dir": str(tmp_path / "run"),
            "max_length": 32,
            "passage_words": [10, 20],
            "batch_tokens": 256,
            "max_steps": 12,
            "eval_texts": 20,
            "eval_steps": 6,
            "save_steps": 5,
            "logging_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }

    return make
