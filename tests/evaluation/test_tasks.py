"""Every layout gives MTEB's metric on embeddings known by hand; malformed folders are refused by name."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.metrics import average_precision_score

from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.report import evaluate
from hf_ternary.evaluation.tasks import local_tasks, mteb_tasks

Write = Callable[[str, dict[str, Any]], Path]

STS = "score\tsentence1\tsentence2\n5\ta0\ta10\n3\ta0\ta20\n4\ta0\ta30\n1\ta0\ta40\n"
PAIRS = [{"sentence1": "a0", "sentence2": f"a{d}", "label": label} for d, label in ((10, 1), (20, 0), (30, 1), (40, 0))]
CORPUS = [
    {"_id": 1, "title": "a10", "text": "a10"},
    {"_id": 2, "title": "a10", "text": "a30"},  # 20 degrees: only if the title counts does it come second
    {"_id": 3, "text": "a25"},
]
QUERIES = [{"_id": "x", "text": "a0"}, {"_id": "unjudged", "text": "a180"}]
QRELS = "query-id\tcorpus-id\tscore\nx\t1\t0\nx\t2\t2\nx\t3\t1\n"


def score(model: SentenceTransformer, folder: Path, **options: Any) -> dict[str, Any]:
    (record,) = evaluate(CachedEncoder(model), local_tasks(folder, **options), progress=False)
    return record


def test_sts_is_spearman_of_cosine(angles: SentenceTransformer, write: Write) -> None:
    record = score(angles, write("sts", {"test.tsv": STS}))
    assert (record["task"], record["type"], record["metric"]) == ("sts", "STS", "cosine_spearman")
    # Ranks 4 3 2 1 against 4 2 3 1: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert record["score"] == pytest.approx(0.8, abs=1e-12)
    assert record["score"] == pytest.approx(spearmanr([-10, -20, -30, -40], [5, 3, 4, 1])[0])


def test_pair_classification_is_average_precision(angles: SentenceTransformer, write: Write) -> None:
    record = score(angles, write("pairs", {"test.jsonl": PAIRS}))
    assert record["type"] == "PairClassification"
    assert record["score"] == pytest.approx((1 / 1 + 2 / 3) / 2, abs=1e-12)
    assert record["score"] == pytest.approx(average_precision_score([1, 0, 1, 0], [-10, -20, -30, -40]))


@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
def test_retrieval_is_ndcg_of_title_and_text(angles: SentenceTransformer, write: Write, qrels: str) -> None:
    record = score(angles, write("search", {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, qrels: QRELS}))
    assert record["type"] == "Retrieval"
    # Gains 0 2 1 at ranks 1 2 3, ideally 2 1 0; discounts log2(rank + 1). mteb rounds to five digits.
    assert record["score"] == pytest.approx((2 / 1.5849625 + 1 / 2) / (2 + 1 / 1.5849625), abs=1e-5)


def test_a_query_can_be_a_document_of_its_collection(angles: SentenceTransformer, write: Write) -> None:
    corpus = [{"_id": "x", "text": "a0"}, {"_id": 1, "text": "a10"}, {"_id": 2, "text": "a20"}]
    folder = write("search", {"corpus.jsonl": corpus, "queries.jsonl": QUERIES, "qrels.tsv": QRELS.replace("3", "4")})
    # Of the documents with gains 0, 0 and 2, the first is the query itself.
    assert score(angles, folder)["score"] == pytest.approx(1 / (2 + 1 / 1.5849625), abs=1e-5)
    write("search", {"task.json": '{"ignore_identical_ids": true}'})
    assert score(angles, folder)["score"] == pytest.approx(2 / 1.5849625 / (2 + 1 / 1.5849625), abs=1e-5)


def test_reranking_is_mean_average_precision(angles: SentenceTransformer, write: Write) -> None:
    rows = [
        {"query": "a0", "positive": ["a10", "a30"], "negative": ["a20"]},
        {"query": "a90", "positive": ["a80"], "negative": ["a10", "a180"]},
    ]
    record = score(angles, write("rerank", {"test.jsonl": rows}))
    assert record["type"] == "Reranking"
    assert record["score"] == pytest.approx(((1 / 1 + 2 / 3) / 2 + 1) / 2, abs=1e-5)


def test_reranking_counts_a_tie_against_the_model(angles: SentenceTransformer, write: Write) -> None:
    rows = [{"query": "a0", "positive": ["a10"], "negative": ["a10"]}]
    assert score(angles, write("tie", {"test.jsonl": rows}))["score"] == 0.5


def test_classification_is_accuracy(angles: SentenceTransformer, write: Write) -> None:
    train = [{"text": f"a{d}", "label": "low" if d < 90 else "high"} for d in (*range(10), *range(170, 180))]
    test = [{"text": f"a{d}", "label": label} for d, label in ((20, "low"), (30, "low"), (160, "high"), (40, "high"))]
    record = score(angles, write("intents", {"train.jsonl": train, "test.jsonl": test}))
    assert record["type"] == "Classification"
    assert (record["score"], record["std"]) == (0.75, 0)
    assert (record["samples_per_label"], record["n_experiments"]) == (32, 10)


def test_classification_options(angles: SentenceTransformer, write: Write) -> None:
    rows = [{"text": f"a{d}", "label": d // 20} for d in range(80)]
    folder = write("intents", {"train.jsonl": rows, "test.jsonl": rows})
    assert score(angles, folder)["samples_per_label"] == 8
    write("intents", {"task.json": '{"samples_per_label": 3, "n_experiments": 2}'})
    record = score(angles, folder)
    assert (record["samples_per_label"], record["n_experiments"]) == (3, 2)


@pytest.mark.parametrize(("labels", "expected"), [([-1, 7], 1.0), (["x", "y"], 1.0)])
def test_clustering_is_v_measure(angles: SentenceTransformer, write: Write, labels: list[Any], expected: float) -> None:
    rows = [{"text": f"a{d}", "label": labels[d >= 90]} for d in (*range(10), *range(170, 180))]
    record = score(angles, write("tags", {"titles.jsonl": rows}))
    assert (record["type"], record["metric"]) == ("Clustering", "v_measure")
    assert record["score"] == pytest.approx(expected)


def test_clustering_of_labels_without_structure(angles: SentenceTransformer, write: Write) -> None:
    rows = [{"text": f"a{d}", "label": d % 2} for d in (*range(10), *range(170, 180))]
    assert score(angles, write("tags", {"test.jsonl": rows}))["score"] < 0.01


def test_gzip_and_split(angles: SentenceTransformer, write: Write) -> None:
    folder = write("sts", {"dev.tsv": STS})
    assert score(angles, folder)["splits"] == ["dev"]
    (folder / "test.tsv.gz").write_bytes(gzip.compress(b'score\tsentence1\tsentence2\n1\t"a0"\ta90\n2\ta0\ta10\n'))
    assert score(angles, folder)["splits"] == ["test"]
    assert score(angles, folder, split="dev")["splits"] == ["dev"]


def test_a_folder_of_tasks(write: Write, tmp_path: Path) -> None:
    write("b", {"test.tsv": STS})
    write("a", {"test.jsonl": PAIRS})
    write("docs", {"README": "no task"})
    assert [task.metadata.name for task in local_tasks(tmp_path)] == ["a", "b"]
    assert [task.metadata.name for task in local_tasks(tmp_path, ["b"])] == ["b"]
    with pytest.raises(ValueError, match="holds no task c; it has a, b"):
        local_tasks(tmp_path, ["b", "c"])


def test_the_revision_is_the_data(write: Write) -> None:
    def revision() -> str:
        return str(local_tasks(folder)[0].metadata.revision)

    folder = write("sts", {"test.tsv": STS})
    before = revision()
    assert revision() == before
    write("sts", {"test.tsv": STS.replace("5\t", "4.5\t")})
    assert revision() != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README": "nothing"}, "holds no task"),
        ({"notes.jsonl": [{"title": "x"}]}, "holds no task with a split test or dev"),
        ({"test.tsv": ""}, "the header lacks score, sentence1, sentence2"),
        ({"test.tsv": "score\tsentence1\tsentence2\n"}, "has a header and no row"),
        ({"test.tsv": "score\tsentence1\tsentence2\n1\ta\n"}, "row 1 has fewer columns"),
        ({"test.tsv": "score\tsentence1\tsentence2\nnan\ta\tb\n"}, "score 'nan' is not a number"),
        ({"test.tsv": "score\tsentence1\tsentence2\n1\ta\tb\n1\ta\tc\n"}, "all scores are equal"),
        ({"test.jsonl": ""}, "is empty"),
        ({"test.jsonl": "{]\n"}, "line 1 is not JSON"),
        ({"test.jsonl": "[1]\n"}, "line 1 is not a JSON object"),
        ({"test.jsonl": [*PAIRS, {"sentence1": "a"}]}, "line 5: 'sentence2' must be str, got None"),
        ({"test.jsonl": [{**PAIRS[0], "label": 2}]}, "labels must be 0 and 1, both present; got 2"),
        ({"test.jsonl": [{"query": "q", "positive": [], "negative": ["n"]}]}, "at least one positive and one negative"),
        ({"test.jsonl": [{"query": "q", "positive": "p", "negative": ["n"]}]}, "'positive' must be list"),
        ({"x.jsonl": [{"text": "t", "label": 1}]}, "one label only"),
        ({"train.jsonl": [{"text": "t", "label": 1}], "test.jsonl": [{"text": "t", "label": 1}]}, "one label only"),
        (
            {
                "train.jsonl": [{"text": "t", "label": 1}, {"text": "t", "label": 2}],
                "test.jsonl": [{"text": "t", "label": 3}],
            },
            "labels that train.jsonl lacks: 3",
        ),
        ({"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES}, "holds no task with a split test or dev"),
        ({"corpus.jsonl": CORPUS, "qrels.tsv": QRELS}, "lacks queries.jsonl"),
        ({"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS.splitlines()[0] + "\n"}, "no row"),
        (
            {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS.replace("2\t2", "2\t0.5")},
            r"qrels\.tsv: score '0\.5' is not a whole number",
        ),
        ({"corpus.jsonl": CORPUS, "queries.jsonl": [{"_id": "y", "text": "t"}], "qrels.tsv": QRELS}, "names no query"),
        ({"test.tsv": STS, "task.json": '{"samples_per_label": 8}'}, "not an option of a STS task; allowed: no option"),
    ],
)
def test_malformed_folders(write: Write, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_tasks(write("task", files))


def test_malformed_options(write: Write) -> None:
    rows = [{"text": "t", "label": 1}, {"text": "u", "label": 2}]
    folder = write("task", {"train.jsonl": rows, "test.jsonl": rows, "task.json": '{"n_experiments": 0}'})
    with pytest.raises(ValueError, match="n_experiments=0; allowed: a positive integer"):
        local_tasks(folder)
    folder = write("search", {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS})
    write("search", {"task.json": '{"ignore_identical_ids": 1}'})
    with pytest.raises(ValueError, match="ignore_identical_ids=1; allowed: true and false"):
        local_tasks(folder)


def test_a_split_that_is_not_there(write: Write) -> None:
    folder = write("search", {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels.tsv": QRELS})
    with pytest.raises(ValueError, match="holds no task with a split dev"):
        local_tasks(folder, split="dev")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        local_tasks(tmp_path / "missing")


def test_mteb_names() -> None:
    (task,) = mteb_tasks(["STSBenchmark"])
    assert (task.metadata.type, task.metadata.main_score) == ("STS", "cosine_spearman")
    with pytest.raises(ValueError, match=r"'STSBenchmrk' not found.* 'STSBenchmark'"):
        mteb_tasks(["STSBenchmrk"])
