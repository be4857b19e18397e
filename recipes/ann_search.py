"""Nearest-neighbour search with faiss: a teacher and its ternary student on the same corpus, in one run.

    python recipes/ann_search.py TEACHER STUDENT CORPUS --output recipes/results/ann-scifact.json --plot ann.png

CORPUS is a folder in BEIR's layout or an MTEB retrieval task (labels: nDCG and precision), or any texts that `distill.py`
reads: a file, a folder, a `datasets` id (no labels: some of its texts become the queries). Recall is against exact search of
the same model. Queries are embedded and searched one at a time. One thread is timed by its CPU time, in which other programs
do not count; several threads by the clock on the wall. Last, the student's queries in the teacher's index: an index that is
there already need not be made anew.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from pytrec_eval import RelevanceEvaluator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentence_transformers import SentenceTransformer

from errors import one_line_errors
from hf_ternary.distill.texts import read_texts
from hf_ternary.evaluation.tasks import SEED, local_tasks, mteb_tasks
from hf_ternary.provenance import PACKAGES, provenance, settings, weights, write_json

K = 10
ROUNDS = 3  # of all queries; the fastest counts

# faiss.index_factory strings. {lists}: see _factory(); {half}: half the embedding's width.
INDEXES = (
    "Flat",  # by L2, which ranks vectors of length 1 as the cosine does
    "SQ8",
    "PQ{half}x4fs",
    "IVF{lists},Flat",
    "HNSW32,Flat",
    "LSH",  # without rotation it keeps the sign of every dimension: binary embeddings
    "LSH,Refine(SQ8)",
    "LSH,Refine(PQ{half}x4np)",
    "RaBitQ2",
)
# What is varied at search time where the string has this part.
SWEEPS = {"IVF": ("nprobe", (1, 4, 16, 64)), "HNSW": ("efSearch", (16, 64, 256)), "Refine": ("k_factor_rf", (4, 16, 64))}

Vectors = NDArray[np.float32]  # [texts, dimensions]
Neighbours = NDArray[np.int64]  # [queries, 10], rows of the corpus
Clock = Callable[[], float]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Collection:
    """Texts to search in, texts to search for, and, where there are labels, {query id: {document id: grade}}."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]] | None = None
    ignore_identical_ids: bool = False  # a document with the id of a query is that query, and no answer to it

    def fingerprint(self) -> str:
        """SHA-256 of ids and texts."""
        return hashlib.sha256(json.dumps([self.documents, self.queries]).encode()).hexdigest()

    def own_rows(self) -> Neighbours | None:
        """Row of the document that is the query itself, int64 [queries, 1], or -1; None if such documents may be found."""
        if not self.ignore_identical_ids:
            return None
        row = {document: i for i, document in enumerate(self.documents)}
        return np.array([[row.get(query, -1)] for query in self.queries])


@dataclass
class Embedded:
    """A collection as one model embeds it: vectors of length 1, and what they cost."""

    model: str
    weights: dict[str, Any]
    documents: Vectors
    encode: dict[str, Any]
    queries: Vectors
    query_ms: float


@app.command(help=(__doc__ or "").split("\n\n")[0])
@one_line_errors()
def main(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder of a SentenceTransformer")],
    student: Annotated[str, typer.Argument(help="Hub id or folder of its ternary student")],
    corpus: Annotated[str, typer.Argument(help="BEIR folder, MTEB task, file or folder of texts, or datasets id")],
    split: Annotated[str | None, typer.Option(help="split of the labels (default: test, else dev)")] = None,
    queries: Annotated[int, typer.Option(min=1, help="texts to draw as queries from a corpus without labels")] = 1000,
    documents: Annotated[int | None, typer.Option(min=K, help="texts to draw as the corpus (default: all others)")] = None,
    index: Annotated[list[str] | None, typer.Option(help="faiss.index_factory string; repeatable")] = None,
    threads: Annotated[int, typer.Option(min=1, help="of torch and faiss")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="documents a forward pass")] = 64,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps the corpus' embeddings and what they cost")] = None,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
    plot: Annotated[Path | None, typer.Option(help="picture to draw: quality against queries a second")] = None,
    seed: Annotated[int, typer.Option(help="of the draw of queries and documents")] = SEED,
) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    collection = read_collection(corpus, split, queries, documents, seed)
    both = [embed(model, collection, batch_size, cache, clock) for model in (teacher, student)]
    report = {
        "corpus": collection.name,
        "sha256": collection.fingerprint(),
        "documents": len(collection.documents),
        "queries": len(collection.queries),
        "batch_size": batch_size,
        "clock": "CPU time" if threads == 1 else "wall time",
        "models": [measure(each, each, index or INDEXES, collection, clock) for each in both],
        "student_in_teacher_index": measure(*both, ["Flat"], collection, clock, truth=both[0]),
        **provenance(seed, (*PACKAGES, "faiss-cpu", "pytrec-eval-terrier")),
        "load": _load(),
    }
    Console(width=120).print(table(report))
    if output:
        write_json(output, report)
    if plot:
        draw(report, plot)


def read_collection(corpus: str, split: str | None, queries: int, documents: int | None, seed: int) -> Collection:
    """The texts, and the labels where CORPUS has some.

    Raises:
        ValueError: no such corpus, a task without retrieval's labels, or too few texts.
    """
    path = Path(corpus)
    is_task = any((path / f"corpus.jsonl{end}").exists() for end in ("", ".gz"))
    if not is_task and (path.exists() or "/" in corpus or path.suffix):
        return _draw_collection(path.name.partition(".")[0], read_texts(corpus), queries, documents, seed)
    (task,) = local_tasks(corpus, split=split) if is_task else mteb_tasks([corpus])
    if task.metadata.type != "Retrieval":
        raise ValueError(f"{corpus} is a {task.metadata.type} task; searching needs a Retrieval one")
    if not is_task:
        task.load_data()
    data: Any = task.dataset["default"][split or task.metadata.eval_splits[0]]
    texts = {row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]}
    asked = {row["id"]: row["text"] for row in data["queries"] if row["id"] in data["relevant_docs"]}
    relevant = {query: dict(data["relevant_docs"][query]) for query in asked}
    return Collection(task.metadata.name, texts, asked, relevant, task.ignore_identical_ids)


def _draw_collection(name: str, texts: Sequence[str], queries: int, documents: int | None, seed: int) -> Collection:
    wanted = queries + (documents or K)
    if len(texts) < wanted:
        raise ValueError(f"{name} holds {len(texts)} texts, but {wanted} are asked for; lower --queries or --documents")
    end = len(texts) if documents is None else wanted
    order = np.random.default_rng(seed).permutation(len(texts))[:end]
    drawn = {str(i): texts[i] for i in order}
    ids = list(drawn)
    return Collection(name, {i: drawn[i] for i in ids[queries:]}, {i: drawn[i] for i in ids[:queries]})


def embed(name: str, collection: Collection, batch_size: int, cache: Path | None, clock: Clock) -> Embedded:
    """Documents and queries by one model."""
    model, stored = SentenceTransformer(name, device="cpu"), weights(name)
    if not stored:
        raise ValueError(f"{name} has no safetensors file to weigh; save it with save_pretrained")
    vectors, encode = embed_corpus(model, stored, collection, batch_size, cache, clock)
    asked, query_ms = embed_queries(model, list(collection.queries.values()), clock)
    short = Path(name).absolute().name if Path(name).is_dir() else name
    return Embedded(short, stored, vectors, encode, asked, query_ms)


def measure(
    indexed: Embedded,
    asking: Embedded,
    indexes: Iterable[str],
    collection: Collection,
    clock: Clock,
    truth: Embedded | None = None,
) -> dict[str, Any]:
    """The documents of one model, the queries of the same or another: a record for every index and setting.

    Recall is against exact search with the queries of ``truth`` [those of ``asking``].

    Raises:
        ValueError: embeddings of different lengths, or an index that faiss cannot build.
    """
    vectors, asked = indexed.documents, asking.queries
    if vectors.shape[1] != asked.shape[1]:
        raise ValueError(
            f"{indexed.model} gives {vectors.shape[1]} dimensions and {asking.model} {asked.shape[1]}: it is not its student"
        )
    exact = _exact(vectors, (truth or asking).queries, collection.own_rows())
    points = []
    for factory in track([_factory(i, vectors) for i in indexes], f"Searching {asking.model}"):
        try:
            points += _measure_index(factory, vectors, asked, exact, collection, clock)
        except RuntimeError as error:  # how faiss reports what it cannot do
            raise ValueError(f"faiss cannot build index {factory!r} on {len(vectors)} vectors: {error}") from error
    for point in points:
        point |= {
            "total_ms": asking.query_ms + point["search_ms"],
            "total_bytes": asking.weights["bytes"] + point["index_bytes"],
        }
    return {
        "model": asking.model,
        "weights": asking.weights,
        "dimensions": vectors.shape[1],
        "encode": indexed.encode,
        "query_ms": asking.query_ms,
        "recall_against": (truth or asking).model,
        "indexes": points,
    }


def embed_corpus(
    model: SentenceTransformer,
    stored: dict[str, Any],
    collection: Collection,
    batch_size: int,
    cache: Path | None,
    clock: Clock,
) -> tuple[Vectors, dict[str, Any]]:
    """Embeddings of length 1 [documents, dimensions] and what they cost, from the cache where it has them."""
    key = hashlib.sha256(f"{stored['sha256']} {settings(model)} {collection.fingerprint()}".encode()).hexdigest()[:16]
    kept = cache and cache / f"{collection.name}-{key}.npz"
    if kept and kept.exists():
        with np.load(kept) as file:
            return file["vectors"], json.loads(str(file["cost"]))
    start = clock()
    vectors = model.encode_document(
        list(collection.documents.values()), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=True
    )
    seconds = clock() - start
    cost = {
        "seconds": seconds,
        "texts_per_second": len(vectors) / seconds,
        "threads": torch.get_num_threads(),
        "load": _load(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _check_finite(vectors)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial.npz")
        np.savez(partial, vectors=vectors, cost=json.dumps(cost))
        partial.replace(kept)
    return vectors, cost


def embed_queries(model: SentenceTransformer, texts: list[str], clock: Clock) -> tuple[Vectors, float]:
    """Embeddings of length 1 [queries, dimensions], made one at a time, and the median milliseconds of one."""
    encode: Any = model.encode_query
    vectors, seconds = [], []
    for number, text in enumerate(track([texts[0], *texts], "Embedding queries")):
        start = clock()
        vector = encode(text, normalize_embeddings=True, show_progress_bar=False)
        if number:  # the first one pays for what is made at first use
            seconds.append(clock() - start)
            vectors.append(vector)
    asked = np.stack(vectors)
    _check_finite(asked)
    return asked, 1e3 * statistics.median(seconds)


def _check_finite(vectors: Vectors) -> None:
    if not np.isfinite(vectors).all():
        raise ValueError("the model gives NaN or infinity for some text; no neighbour can be found for it")


def _exact(vectors: Vectors, asked: Vectors, own: Neighbours | None) -> Neighbours:
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    return _answers(index, asked, own)


def _answers(index: Any, asked: Vectors, own: Neighbours | None) -> Neighbours:
    """The nearest rows [queries, 10], without a query's own."""
    if own is None:
        return index.search(asked, K)[1]
    found = index.search(asked, K + 1)[1]
    own_last = np.argsort(found == own, axis=1, kind="stable")
    return np.take_along_axis(found, own_last, axis=1)[:, :K]


def _factory(template: str, vectors: Vectors) -> str:
    """faiss' advice for IVF, 4 sqrt(n) lists, but never fewer than 39 vectors a list to train on; a power of two."""
    lists = 2 ** int(math.log2(max(1, min(4 * math.sqrt(len(vectors)), len(vectors) / 39))))
    return template.format(lists=lists, half=vectors.shape[1] // 2)


def _settings(factory: str) -> list[str]:
    """Every combination of what can be varied at search time, in the form of faiss.ParameterSpace; [""] if nothing can."""
    sweeps = [[f"{name}={value}" for value in values] for part, (name, values) in SWEEPS.items() if part in factory]
    return [",".join(chosen) for chosen in product(*sweeps)]


def _measure_index(
    factory: str,
    vectors: Vectors,
    asked: Vectors,
    exact: Neighbours,
    collection: Collection,
    clock: Clock,
) -> list[dict[str, Any]]:
    """Build one index; search with every setting."""
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
    start = clock()
    index.train(vectors)
    index.add(vectors)
    build = clock() - start
    size = len(faiss.serialize_index(index))
    points = []
    for setting in _settings(factory):
        faiss.ParameterSpace().set_index_parameters(index, setting)
        found, seconds = _search(index, asked, collection.own_rows(), clock)
        points.append(
            {
                "index": factory,
                "setting": setting,
                "recall_at_10": float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])),
                **_quality(found, collection),
                "build_seconds": build,
                "search_ms": 1e3 * seconds,
                "queries_per_second": 1 / seconds,
                "index_bytes": size,
            }
        )
    return points


def _search(index: Any, asked: Vectors, own: Neighbours | None, clock: Clock) -> tuple[Neighbours, float]:
    """Neighbours [queries, 10] of every query, searched one at a time, and the seconds of one."""
    rounds = []
    for _ in range(ROUNDS):
        start = clock()
        rows = (slice(i, i + 1) for i in range(len(asked)))
        found = np.concatenate([_answers(index, asked[row], None if own is None else own[row]) for row in rows])
        rounds.append(clock() - start)
    return found, min(rounds) / len(asked)


def _quality(found: Neighbours, collection: Collection) -> dict[str, float]:
    """nDCG@10 and precision@10 as trec_eval computes them; nothing where there are no labels."""
    if collection.relevant is None:
        return {}
    ids = list(collection.documents)
    run = {
        query: {ids[row]: float(-rank) for rank, row in enumerate(rows) if row >= 0}
        for query, rows in zip(collection.queries, found, strict=True)
    }
    scores = RelevanceEvaluator(collection.relevant, {f"ndcg_cut.{K}", f"P.{K}"}).evaluate(run).values()
    # A query for which nothing was found is not in the scores, and counts as 0.
    return {
        "ndcg_at_10": sum(s[f"ndcg_cut_{K}"] for s in scores) / len(run),
        "precision_at_10": sum(s[f"P_{K}"] for s in scores) / len(run),
    }


def _load() -> float:
    """Programs that ran or waited in the last minute: 1 means that this one had the machine for itself."""
    return round(os.getloadavg()[0], 2)


def table(report: dict[str, Any]) -> Table:
    """Every index of both models, and the student's queries in the teacher's."""
    labelled = "ndcg_at_10" in report["models"][0]["indexes"][0]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "recall@10": lambda p: f"{p['recall_at_10']:.3f}",
        **({"nDCG@10": lambda p: f"{100 * p['ndcg_at_10']:.2f}"} if labelled else {}),
        **({"P@10": lambda p: f"{100 * p['precision_at_10']:.2f}"} if labelled else {}),
        "build s": lambda p: f"{p['build_seconds']:.2f}",
        "search ms": lambda p: f"{p['search_ms']:.3f}",
        "with query ms": lambda p: f"{p['total_ms']:.2f}",
        "index MB": lambda p: f"{p['index_bytes'] / 1e6:.2f}",
        "with model MB": lambda p: f"{p['total_bytes'] / 1e6:.1f}",
    }
    shown = Table(title=f"{report['corpus']}: {report['documents']:,} documents, {report['queries']:,} queries")
    shown.add_column("index")
    for column in columns:
        shown.add_column(column, justify="right")
    mixed = report["student_in_teacher_index"]
    titles = [
        f"[bold]{model['model']}[/], {model['encode']['texts_per_second']:.0f} texts/s, query {model['query_ms']:.2f} ms"
        for model in report["models"]
    ]
    titles.append(f"[bold]{mixed['model']}[/]'s queries, {report['models'][0]['model']}'s index")
    for title, model in zip(titles, [*report["models"], mixed], strict=True):
        shown.add_section()
        shown.add_row(title)
        for point in model["indexes"]:
            shown.add_row(f"{point['index']} {point['setting']}", *(show(point) for show in columns.values()))
    return shown


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall against searches a second, and quality against whole queries a second (embed, then search)."""
    from matplotlib import pyplot as plt

    quality = "ndcg_at_10" if "ndcg_at_10" in report["models"][0]["indexes"][0] else "recall_at_10"
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for model, line in zip(report["models"], ("--", "-"), strict=True):
        factories = dict.fromkeys(point["index"] for point in model["indexes"])
        for colour, factory in enumerate(factories):
            points = [point for point in model["indexes"] if point["index"] == factory]
            style: dict[str, Any] = {"color": f"C{colour}", "linestyle": line, "marker": "o" if line == "-" else "x"}
            speed = [point["queries_per_second"] for point in points]
            left.plot(speed, [p["recall_at_10"] for p in points], label=f"{model['model']} {factory}", **style)
            right.plot([1e3 / p["total_ms"] for p in points], [p[quality] for p in points], **style)
    left.set(xscale="log", xlabel="searches a second", ylabel="recall@10 against exact search of the same model")
    right.set(xscale="log", xlabel="queries a second, embedding included", ylabel=quality.replace("_at_", "@"))
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.suptitle(f"{report['corpus']}: {report['documents']:,} documents, {report['threads']} thread(s)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    app()
