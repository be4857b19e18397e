"""The speed recipe of whole encoders: contenders take turns in processes of their own, and what it writes is complete."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from typer import Typer
from typer.testing import CliRunner

import benchmark_encoder
import hf_ternary
import runtimes
from tests.conftest import save_tiny_vit


@pytest.fixture(scope="module")
def packed(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf_ternary.TernaryConfig(embedding_bits=4, modules_to_not_convert=[])
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs={"quantization_config": config})
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(str(folder))
    return folder


def test_a_run_without_exports(packed: Path, tmp_path: Path) -> None:
    output = tmp_path / "encoder.json"
    app = Typer()
    app.command()(benchmark_encoder.main)
    options = ["--quick", "--threads", "1", "--rounds", "2", "--starts", "1", "--output", str(output)]
    done = CliRunner().invoke(app, [str(packed), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output

    written = json.loads(output.read_text())
    assert {"commit", "hardware", "versions"} <= written.keys()
    assert str(packed.parent) not in output.read_text()
    assert written["weights"]["bytes"] == (packed / "model.safetensors").stat().st_size
    assert written["linear_macs_per_token"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert [w["texts"] for w in written["workloads"].values()] == [1, 21, 3]
    (run,) = written["runs"]
    ours, through, tokenizer = run["contenders"]
    assert {ratio["median"] for ratio in ours["times_slower"].values()} == {1}
    assert ours["bytes"] == through["bytes"] == (packed / "model.safetensors").stat().st_size
    assert all(c["milliseconds"][name]["median"] > 0 for c in run["contenders"] for name in written["workloads"])
    assert run["gmacs"].keys() == written["workloads"].keys()
    assert tokenizer["bytes"] is None
    if sys.platform == "linux":
        assert ours["peak_bytes"]["median"] < through["peak_bytes"]["median"]


def test_a_run_of_images(tmp_path: Path) -> None:
    teacher, packed, output = save_tiny_vit(tmp_path / "vit"), tmp_path / "packed", tmp_path / "encoder.json"
    config = hf_ternary.TernaryConfig(modules_to_not_convert=[])
    AutoModel.from_pretrained(teacher, quantization_config=config).save_pretrained(packed)
    shutil.copy(teacher / "preprocessor_config.json", packed)
    app = Typer()
    app.command()(benchmark_encoder.main)
    options = ["--teacher", str(teacher), "--quick", "--threads", "1", "--rounds", "2", "--starts", "1"]
    done = CliRunner().invoke(app, [str(packed), *options, "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output

    written = json.loads(output.read_text())
    assert written["max_seq_length"] is None
    assert written["linear_macs_per_token"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    # 2 % of 20 and of 16,384 tokens, rounded up; 16 patches of 4 pixels and the class token.
    assert [(w["images"], w["tokens"]) for w in written["workloads"].values()] == [(1, 17), (20, 20 * 17)]
    ours, float32 = written["runs"][0]["contenders"]
    assert (ours["name"], float32["name"]) == ("ternary", "float32, transformers")
    assert ours["bytes"] < float32["bytes"]
    assert 0.5 < ours["cosine"] < float32["cosine"] == 1


def test_cosine() -> None:
    ours, teacher = np.array([[1.0, 0], [0.6, 0.8]]), np.array([[1.0, 0], [0, 1]])
    assert benchmark_encoder.cosine(ours, teacher) == 0.9
    assert benchmark_encoder.cosine(ours, None) is None
    assert benchmark_encoder.cosine(ours[:, :0], teacher) is None  # the tokenizer alone


def test_a_contender_that_fails_is_named(packed: Path) -> None:
    contender = benchmark_encoder.Contender("ternary of nothing", "ternary", "nothing")
    with pytest.raises(RuntimeError, match="ternary of nothing failed"):
        benchmark_encoder.Process(contender, packed, 128, 1, ["a cat"])


def test_two_exports_of_one_name_are_refused(packed: Path) -> None:
    twice = [benchmark_encoder.Contender("onnxruntime int8", "onnxruntime", f"{folder}/int8.onnx") for folder in "ab"]
    with pytest.raises(Exception, match="onnxruntime int8: give their files different names"):
        benchmark_encoder.contenders(packed, None, twice)


def test_an_export_for_sentence_transformers_runs_in_its_own_python(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "model" / "onnx" / "int8.onnx"
    export.parent.mkdir(parents=True)
    export.write_bytes(b"1234567")
    python = tmp_path / "python"
    python.touch()
    start, started = subprocess.Popen, []

    def stand_in(command: list[str], **options: Any) -> Any:
        """This Python for the other, and torch for its ONNX Runtime."""
        if command[0] == str(python):
            started.append(command[2])
            command = [sys.executable, *command[1:]]
        if "sentence_transformers_onnx" in command:
            command[2:4] = ["sentence_transformers", str(packed)]
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", stand_in)
    output = tmp_path / "encoder.json"
    app = Typer()
    app.command()(benchmark_encoder.main)
    options = ["--quick", "--threads", "1", "--rounds", "1", "--starts", "1", "--teacher", str(packed)]
    options += ["--st-onnx", str(export), "--st-python", str(python), "--output", str(output)]
    done = CliRunner().invoke(app, [str(packed), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output

    written = json.loads(output.read_text())
    assert started[0] == "sentence_transformers_onnx"
    assert len(started) == 2  # and for its versions
    assert written["st_onnx_versions"]["transformers"] == transformers.__version__
    peer = written["runs"][0]["contenders"][2]
    assert (peer["name"], peer["bytes"]) == ("onnxruntime int8, sentence-transformers", 7)
    assert peer["cosine"] == 1


def test_the_texts_are_distinct_and_of_their_length() -> None:
    work = benchmark_encoder.workloads(benchmark_encoder.sentences(), 1)
    assert [len(w.inputs) for w in work.values()] == [50, 1024, 128]
    assert all(len(set(w.inputs)) == len(w.inputs) for w in work.values())
    assert {len(text.split()) for text in work["passage"].inputs} == {130}


def test_what_is_around_a_runtime_gives_the_embeddings_of_sentence_transformers(tiny_sentence_transformer: Path) -> None:
    """Padding, pooling, normalization and the order of texts of unequal length."""
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")

    @torch.inference_mode()
    def run(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return model[0].auto_model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).last_hidden_state.numpy()

    texts = ["a dog", "the cat sat on the red dog", "it runs", "green " * 200, "to"]
    encode = runtimes.batched(str(tiny_sentence_transformer), 128, run)
    np.testing.assert_allclose(encode(texts, 2), model.encode(texts), rtol=0, atol=1e-5)
