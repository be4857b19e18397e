"""Comparison with a baseline, means by type, and the table."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.report import (
    _std,
    add_fidelity,
    check_baseline,
    compare,
    evaluate,
    read_baseline,
    summarize,
    table,
)
from hf_ternary.evaluation.tasks import local_tasks
from tests.evaluation.conftest import word_model


def record(task: str, kind: str, score: float, revision: str = "r") -> dict[str, Any]:
    return {"task": task, "type": kind, "metric": "m", "score": score, "revision": revision}


BASELINE = [record("a", "STS", 0.8), record("b", "STS", 0.5), record("c", "Retrieval", 0.4)]
STUDENT = [record("a", "STS", 0.76), record("b", "STS", 0.5), record("c", "Retrieval", 0.3)]


def test_retention_and_means() -> None:
    scores = compare(STUDENT, BASELINE)
    assert [r["retention"] for r in scores] == pytest.approx([0.95, 1, 0.75])
    summary = summarize(scores)
    assert list(summary) == ["STS", "Retrieval", "all"]
    assert summary["STS"] == pytest.approx({"tasks": 2, "score": 0.63, "baseline": 0.65, "retention": 0.975})
    assert summary["all"]["retention"] == pytest.approx(2.7 / 3)
    assert "retention" not in summarize(STUDENT)["all"]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (BASELINE[:2], "the baseline lacks task 'c'; it has a, b"),
        ([*BASELINE[:2], record("c", "Retrieval", 0.4, "other")], "task 'c': the baseline was measured on other data"),
        ([*BASELINE[:2], record("c", "Retrieval", 0.0)], "task 'c': the baseline scores 0.0000"),
        ([*BASELINE[:2], {**BASELINE[2], "splits": ["dev"]}], r"task 'c': the baseline has splits \['dev'\], not None"),
        ([*BASELINE[:2], {**BASELINE[2], "n_experiments": 5}], "task 'c': the baseline has n_experiments 5, not None"),
    ],
)
def test_baselines_that_do_not_fit(baseline: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(STUDENT, baseline)


def test_a_baseline_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("score\tsentence1\tsentence2\n1\ta0\ta90\n2\ta0\ta10\n")
    tasks = local_tasks(tmp_path)
    score = {**record(tmp_path.name, "STS", 1, tasks[0].metadata.revision), "splits": ["test"]}
    check_baseline({"scores": [score], "seed": 42}, tasks, seed=42, languages=None)
    for report, message in (
        ({"scores": [{**score, "revision": "other"}]}, "measured on other data"),
        ({"scores": [{**score, "splits": ["dev"]}]}, r"has splits \['dev'\], not \['test'\]"),
        ({"scores": [score], "seed": 7}, "measured with seed 7, not 42"),
        ({"scores": [score], "seed": 42, "languages": ["eng"]}, r"with languages \['eng'\], not None"),
    ):
        with pytest.raises(ValueError, match=message):
            check_baseline({"seed": 42, **report}, tasks, seed=42, languages=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no scores"),
        ('{"scores": []}', "holds no scores"),
        ("[]", "x.json is not a JSON object"),
        ("", "not JSON"),
    ],
)
def test_a_file_without_scores(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_baseline(path)


def test_table() -> None:
    scores = compare(STUDENT, BASELINE)
    console = Console(file=io.StringIO(), width=120)
    console.print(table({"model": "student", "baseline": "teacher", "scores": scores, "summary": summarize(scores)}))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert "student against teacher" in text
    assert rows == [
        ["a", "STS", "m", "80.00%", "76.00%", "95.0%"],
        ["b", "STS", "m", "50.00%", "50.00%", "100.0%"],
        ["mean of 2", "STS", "", "65.00%", "63.00%", "97.5%"],
        ["c", "Retrieval", "m", "40.00%", "30.00%", "75.0%"],
        ["mean of 3", "all", "", "56.67%", "52.00%", "90.0%"],
    ]


@pytest.mark.parametrize(
    ("metric", "scores", "expected"),
    [
        ("f1", {"scores_per_experiment": [{"f1": 0.1, "accuracy": 0.5}, {"f1": 0.3, "accuracy": 0.5}]}, {"std": 0.1}),
        ("ap", {"scores_per_experiment": [{"ap": None, "accuracy": 0.5}, {"ap": None, "accuracy": 0.7}]}, {}),
        ("kendalltau", {"scores_per_experiment": [{"mse": 0.5}, {"mse": 0.7}]}, {}),
        ("v_measure", {"v_measure": 0.5, "v_measure_std": 0.2}, {"std": 0.2}),
        ("ndcg_at_10", {"ndcg_at_10": 0.5}, {}),
    ],
)
def test_the_deviation_is_that_of_the_main_score(metric: str, scores: dict[str, Any], expected: dict[str, float]) -> None:
    assert _std(SimpleNamespace(scores={"test": [scores]}), metric) == pytest.approx(expected)


def test_fidelity_by_task(angles: SentenceTransformer, tmp_path: Path) -> None:
    rows = "".join(f"{d}\ta0\ta{d}\n" for d in range(1, 15))
    (tmp_path / "test.tsv").write_text("score\tsentence1\tsentence2\n" + rows)
    rotated = word_model({f"a{d}": [np.cos(np.radians(d + 60)), np.sin(np.radians(d + 60))] for d in range(181)})
    student, teacher = CachedEncoder(rotated), CachedEncoder(angles)
    scores = evaluate(student, local_tasks(tmp_path), progress=False)
    evaluate(teacher, local_tasks(tmp_path), progress=False)
    (result,) = add_fidelity(scores, student, teacher, seed=0)
    assert result["fidelity"]["texts"] == 15
    assert result["fidelity"]["cosine"] == pytest.approx(0.5, abs=1e-6)
    assert result["fidelity"]["overlap_at_10"] > 0.9  # a rotation moves no neighbour, but ties may fall differently


def test_constant_embeddings(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("score\tsentence1\tsentence2\n1\ta0\ta90\n2\ta0\ta10\n")
    model = word_model({"a0": [1, 0], "a10": [1, 0], "a90": [1, 0]})
    with (
        pytest.warns(match="constant"),
        pytest.raises(ValueError, match="cosine_spearman is not a number; are all embeddings equal"),
    ):
        evaluate(CachedEncoder(model), local_tasks(tmp_path), progress=False)
