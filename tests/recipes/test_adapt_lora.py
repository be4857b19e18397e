"""The adapter recipe: only the adapter is trained and saved, and it loads from a folder and from the Hub."""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("mteb")

from sentence_transformers import SentenceTransformer

import adapt_lora
import hf_ternary
from hf_ternary.modules import TernaryLinear
from tests.conftest import SENTENCES
from tests.hub_server import TOKEN, HubServer

RECIPES = Path(__file__).parents[2] / "recipes"
ANIMALS = ["cat", "dog", "day", "green", "red"]


@pytest.fixture(scope="module")
def model(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"quantization_config": hf_ternary.TernaryConfig()}
    packed = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    return hf_ternary.save_pretrained(packed, tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder whose titles are to find their texts; one document lacks a title."""
    folder = tmp_path_factory.mktemp("data") / "animals"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"the {a} sat on the {b} and ran" for a in ANIMALS for b in ANIMALS]
    rows = [{"_id": f"d{i}", "title": " ".join(t.split()[1::4]), "text": t} for i, t in enumerate(texts)]
    rows.append({"_id": "d25", "title": "", "text": "nothing"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t[4:12]}) + "\n" for i, t in enumerate(texts))
    )
    labels = "".join(f"q{i}\td{i}\t1\n" for i in range(len(texts)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + labels)
    return folder


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def adapt(*flags: object) -> dict[str, Any]:
        config = RECIPES / "configs" / "lora" / "cranfield.yaml"
        where = ["--model", model, "--pairs", data / "corpus.jsonl", "--eval_data", data, "--output_dir", tmp_path / "run"]
        arguments = ["--config", config, *where, "--per_device_train_batch_size", 5, *flags]
        monkeypatch.setattr(sys, "argv", ["adapt_lora.py", *map(str, arguments)])
        adapt_lora.main()
        return json.loads((tmp_path / "run" / "summary.json").read_text())

    return adapt


def test_only_the_adapter_is_trained_and_saved(run: Run, model: Path, tmp_path: Path) -> None:
    summary = run("--learning_rate", 0.01, "--num_train_epochs", 4, "--base_model", "me/model")
    assert {"commit", "hardware", "versions", "seed", "weights"} <= summary.keys()
    assert summary["pairs"]["count"] == 25
    assert summary["training"]["steps"] == 20
    (score,) = summary["scores"]
    assert score["score"] > score["baseline"]
    folder = tmp_path / "run" / "adapter"
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    # Two layers of query, key and value, each with A [8, 32] and B [32, 8].
    assert summary["adapter"]["parameters"] == 2 * 3 * 2 * 8 * 32
    assert summary["adapter"]["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/model"

    plain, adapted = (SentenceTransformer(str(model), device="cpu") for _ in range(2))
    adapted.load_adapter(str(folder))
    assert not np.array_equal(adapted.encode(SENTENCES), plain.encode(SENTENCES))
    packed = [
        [m.weight.numpy().tobytes() for m in each.modules() if isinstance(m, TernaryLinear)] for each in (plain, adapted)
    ]
    assert packed[0] == packed[1]
    adapted.disable_adapters()
    np.testing.assert_allclose(adapted.encode(SENTENCES), plain.encode(SENTENCES), atol=1e-2)


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path) -> None:
    """To the same bits as one that was never stopped."""
    flags = ["--num_train_epochs", 2, "--save_total_limit", 5]
    run(*flags)
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    last = tmp_path / "run" / "checkpoint-10"
    last.rename(tmp_path / "gone")  # as if killed after the first epoch
    last.mkdir()  # and while writing the second one's checkpoint
    assert run(*flags)["training"]["steps"] == 10
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def _push_and_load(model: Path, folder: Path, repo: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs in a process for which the Hub is on loopback."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    found = []
    for source in (repo, str(folder)):
        adapted = SentenceTransformer(str(model), device="cpu")
        adapted.load_adapter(source)
        found.append(adapted.encode(SENTENCES))
    return found[0], found[1]


def test_the_adapter_loads_from_the_hub(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("--max_steps", 2)
    with HubServer() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        for name, value in {**environment, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process starts now, with this environment
            loaded = pool.submit(_push_and_load, model, tmp_path / "run" / "adapter", "me/adapter").result()
        assert hub.unhandled == []
    np.testing.assert_array_equal(*loaded)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", ""], "--model is missing"),
        (["--pairs", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--anchor", "headline"], "'headline' must be"),
        (["--target_modules", "wq"], "Target modules"),
        (["--eval_tasks", "Cranfield"], "holds no task Cranfield"),
    ],
)
def test_errors_are_one_line(run: Run, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert message in str(stop.value)
    assert str(stop.value).startswith("error: ")
    assert "\n" not in str(stop.value)
