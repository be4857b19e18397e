"""The search recipe: what it measures is what faiss and trec_eval say, for a teacher and its ternary student in one run."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")
pytest.importorskip("mteb")

from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import ann_search
import hf_ternary

WORDS = ["cat", "dog", "day", "green", "red", "run", "sat", "on", "the", "in"]


@pytest.fixture(scope="module")
def student(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"quantization_config": hf_ternary.TernaryConfig()}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    return hf_ternary.save_pretrained(model, tmp_path_factory.mktemp("ann") / "student")


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Eighty documents, and twelve queries that are each the text of one: its own document is relevant."""
    folder = tmp_path / "animals"
    (folder / "qrels").mkdir(parents=True)
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 12)) for i in range(80)]
    corpus = [{"_id": f"d{i}", "title": f"number {i}", "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": f"q{i}", "text": f"number {i} {texts[i]}"} for i in range(12)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    qrels = "".join(f"q{i}\td{i}\t1\n" for i in range(12))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(ann_search.app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_a_labelled_corpus(tiny_sentence_transformer: Path, student: Path, beir: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "ann.json", tmp_path / "plots" / "ann.png"
    assert "LSH,Refine(SQ8)" in run(tiny_sentence_transformer, student, beir, "--output", output, "--plot", plot)
    assert plot.stat().st_size > 10_000
    report = json.loads(output.read_text())
    assert {"commit", "hardware", "versions", "seed", "threads", "load"} <= report.keys()
    assert {"faiss-cpu", "torch"} <= report["versions"].keys()
    assert (report["corpus"], report["documents"], report["queries"]) == ("animals", 80, 12)
    teacher, ternary = report["models"]
    assert ternary["weights"]["bytes"] < teacher["weights"]["bytes"]
    for model in (teacher, ternary):
        assert model["encode"]["seconds"] > 0
        (flat,) = (point for point in model["indexes"] if point["index"] == "Flat")
        # The query is its document, word for word: rank 1, and one of ten is relevant.
        assert (flat["recall_at_10"], flat["ndcg_at_10"], flat["precision_at_10"]) == (1, 1, pytest.approx(0.1))
        for point in model["indexes"]:
            assert 0 <= point["recall_at_10"] <= 1
            assert point["total_ms"] == model["query_ms"] + point["search_ms"]
            assert point["total_bytes"] == model["weights"]["bytes"] + point["index_bytes"]
        probes = [point["recall_at_10"] for point in model["indexes"] if point["index"].startswith("IVF")]
        assert len(probes) == 4
        assert probes == sorted(probes)
        (bits,) = (point for point in model["indexes"] if point["index"] == "LSH")
        assert bits["index_bytes"] < flat["index_bytes"] / 5  # 32 bits instead of 32 floats, and a header
    mixed = report["student_in_teacher_index"]
    assert (mixed["weights"], mixed["encode"]) == (ternary["weights"], teacher["encode"])
    (point,) = mixed["indexes"]
    assert point["index"] == "Flat"
    assert 0.3 < point["recall_at_10"] < 1  # of what the teacher's own queries find
    assert 0.5 < point["ndcg_at_10"] <= 1  # the same texts, but embedded by two models
    assert point["total_bytes"] == ternary["weights"]["bytes"] + point["index_bytes"]


def test_a_query_is_no_answer_to_itself(tiny_sentence_transformer: Path, student: Path, beir: Path, tmp_path: Path) -> None:
    """Queries that are documents too, each with another document of the same words as its answer."""
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    corpus += [{**document, "_id": f"answer to {document['_id']}"} for document in corpus[:12]]
    queries = [{"_id": f"d{i}", "text": f"number {i} {corpus[i]['text']}"} for i in range(12)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (beir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = "".join(f"d{i}\tanswer to d{i}\t1\n" for i in range(12))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    scores = []
    for ignore in (False, True):
        (beir / "task.json").write_text(json.dumps({"ignore_identical_ids": ignore}))
        run(tiny_sentence_transformer, student, beir, "--index", "Flat", "--output", tmp_path / "ann.json")
        report = json.loads((tmp_path / "ann.json").read_text())
        (point,) = report["models"][1]["indexes"]
        assert point["recall_at_10"] == 1
        scores.append(point["ndcg_at_10"])
    assert scores[0] < 0.9  # of two equal documents faiss finds the earlier first: the query
    assert scores[1] == 1


def test_the_cache_keeps_what_embedding_cost(
    tiny_sentence_transformer: Path, student: Path, beir: Path, tmp_path: Path
) -> None:
    reports = []
    for name in ("first", "second"):
        output = tmp_path / f"{name}.json"
        options = ["--cache", tmp_path / "cache", "--index", "Flat", "--output", output]
        run(tiny_sentence_transformer, student, beir, *options)
        reports.append(json.loads(output.read_text()))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for first, second in zip(*(report["models"] for report in reports), strict=True):
        assert first["encode"] == second["encode"]
        assert [p["ndcg_at_10"] for p in first["indexes"]] == [p["ndcg_at_10"] for p in second["indexes"]]


def test_texts_without_labels(tiny_sentence_transformer: Path, student: Path, tmp_path: Path) -> None:
    texts, output = tmp_path / "texts.txt", tmp_path / "ann.json"
    texts.write_text("".join(f"the dog number {i}\n" for i in range(60)))
    options = ["--queries", 5, "--documents", 40, "--index", "HNSW32,Flat", "--output", output]
    run(tiny_sentence_transformer, student, texts, *options)
    report = json.loads(output.read_text())
    assert (report["corpus"], report["documents"], report["queries"]) == ("texts", 40, 5)
    points = report["models"][1]["indexes"]
    assert [point["setting"] for point in points] == ["efSearch=16", "efSearch=64", "efSearch=256"]
    assert points[-1]["recall_at_10"] == 1
    assert "ndcg_at_10" not in points[0]


def test_queries_are_no_documents(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"text {i}\n" for i in range(30)))
    collection = ann_search.read_collection(str(texts), None, 10, None, seed=3)
    assert (len(collection.documents), len(collection.queries)) == (20, 10)
    assert not collection.documents.keys() & collection.queries.keys()
    assert collection.fingerprint() == ann_search.read_collection(str(texts), None, 10, None, seed=3).fingerprint()
    assert collection.fingerprint() != ann_search.read_collection(str(texts), None, 10, None, seed=4).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "IVF9x"], "faiss cannot build index 'IVF9x'"),
        (["--index", "PQ7"], "faiss cannot build index 'PQ7'"),
        (["--split", "dev"], "split dev"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, tiny_sentence_transformer: Path, student: Path, beir: Path
) -> None:
    output = run(tiny_sentence_transformer, student, beir, *options, code=2)
    assert message in output.splitlines()[-1]


def test_too_few_texts(tiny_sentence_transformer: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    assert "holds 2 texts, but 1010 are asked for" in run(tiny_sentence_transformer, student, tmp_path / "texts.txt", code=2)


def test_a_student_of_another_width_cannot_search_the_teachers_index() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = (
        ann_search.Embedded(f"of {n}", {}, rng.random((20, n), np.float32), {}, rng.random((2, n), np.float32), 1.0)
        for n in (8, 4)
    )
    collection = ann_search.Collection("texts", {str(i): "" for i in range(20)}, {"a": "", "b": ""})
    with pytest.raises(ValueError, match="of 8 gives 8 dimensions and of 4 4: it is not its student"):
        ann_search.measure(wide, narrow, ["Flat"], collection, time.perf_counter)


def test_a_model_with_nan_is_refused() -> None:
    vectors: Any = np.full((3, 4), np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        ann_search._check_finite(vectors)
