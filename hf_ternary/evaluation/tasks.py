"""Evaluation tasks: local folders or MTEB names, both as mteb task objects, so that protocol and metric are MTEB's own.

A local task is a folder with .jsonl or .tsv files, plain or gzipped (.gz). SPLIT is `test`, or `dev` where there is no test:

| type | files | main score |
|---|---|---|
| STS | SPLIT.tsv with columns score, sentence1, sentence2 | Spearman of cosine |
| Retrieval | corpus.jsonl {_id, title, text}, queries.jsonl {_id, text}, qrels.tsv or qrels/SPLIT.tsv | nDCG@10 |
| Reranking | SPLIT.jsonl {query, positive: [...], negative: [...]} | MAP |
| PairClassification | SPLIT.jsonl {sentence1, sentence2, label: 0 or 1} | average precision of cosine |
| Classification | train.jsonl and SPLIT.jsonl {text, label} | accuracy of logistic regression on a few examples a label |
| Clustering | SPLIT.jsonl or one other jsonl of {text, label}, no train.jsonl | v-measure of mini-batch k-means |
| ImageClassification | train and SPLIT, each a .parquet {image, label} or a folder CLASS/*.png | accuracy of two probes |

The type is recognised by the files. An optional `task.json` sets what files cannot tell: `samples_per_label` and
`n_experiments` of a classification task, and for retrieval `ignore_identical_ids`: whether a document with the id of a query
is that query and no answer to it (true for BEIR's ArguAna and Quora). A folder of images is two tasks, FOLDER-linear and
FOLDER-knn: logistic regression on the embeddings of all training images, and a vote of the nearest of them.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

try:
    from mteb import TaskMetadata, get_task
    from mteb.abstasks import (
        AbsTask,
        AbsTaskClassification,
        AbsTaskClustering,
        AbsTaskPairClassification,
        AbsTaskRetrieval,
        AbsTaskSTS,
    )
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskType
    from mteb.types import Modalities
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError('evaluation needs mteb; install it with: pip install "hf_ternary[eval]"') from error

from datasets import Dataset

from ..provenance import hash_file
from .files import find_images, read_jsonl, read_labelled_images, read_number, read_object, read_tsv

SEED = 42  # MTEB's own
SPLITS = ("test", "dev")
NEIGHBOURS = 20  # DINO's, arXiv 2104.14294

LAYOUTS = "the layouts are listed in hf_ternary/evaluation/tasks.py"


class LocalTask(AbsTask):
    """An mteb task whose data comes from a folder. Subclasses name their mteb type and read their layout.

    Args:
        folder: the task's folder; the task is named after it.
        split: the split to evaluate.
        seed: of the draws that classification and clustering make.

    Raises:
        ValueError: a file lacks a column, a value is not allowed, or nothing is left to score.
    """

    kind: ClassVar[TaskType]
    main_score: ClassVar[str]
    modality: ClassVar[Modalities] = "text"
    suffix: ClassVar[str] = ""  # of the name, where a folder is several tasks
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, folder: Path, split: str, seed: int = SEED) -> None:
        self.metadata = TaskMetadata(
            name=folder.name + self.suffix,
            description=f"{self.kind} task in a local folder",
            dataset={"path": folder.name, "revision": _fingerprint(folder)},
            type=self.kind,
            category="t2t" if self.modality == "text" else "i2t",
            modalities=[self.modality],
            eval_splits=[split],
            eval_langs=["eng-Latn"],  # mteb wants one; nothing here depends on it
            main_score=self.main_score,
        )
        super().__init__(seed=seed)
        self._set_options(folder)
        self.dataset = self.read(folder, split)
        self.data_loaded = True

    def read(self, folder: Path, split: str) -> Any:
        """The dataset in the form that the mteb base class documents."""
        raise NotImplementedError

    def _set_options(self, folder: Path) -> None:
        path = folder / "task.json"
        if not path.exists():
            return
        for name, value in read_object(path.read_text(encoding="utf-8"), f"{path}").items():
            if name not in self.options:
                allowed = ", ".join(sorted(self.options)) or "no option"
                raise ValueError(f"{path}: {name!r} is not an option of a {self.kind} task; allowed: {allowed}")
            kind = type(getattr(self, name))
            if type(value) is not kind or (kind is int and value < 1):
                allowed = "true and false" if kind is bool else "a positive integer"
                raise ValueError(f"{path}: {name}={value!r}; allowed: {allowed}")
            setattr(self, name, value)


class LocalSTS(LocalTask, AbsTaskSTS):
    """Semantic textual similarity: Spearman correlation of the cosine with the gold score."""

    kind, main_score = "STS", "cosine_spearman"

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        path = _find(folder, f"{split}.tsv")
        rows = list(read_tsv(path, ("score", "sentence1", "sentence2")))
        for row in rows:
            row["score"] = read_number(path, row["score"])
        if len({row["score"] for row in rows}) < 2:
            raise ValueError(f"{path}: all scores are equal; a correlation needs at least two different ones")
        return {split: _columns(rows, "sentence1", "sentence2", "score")}


class LocalPairClassification(LocalTask, AbsTaskPairClassification):
    """Pair classification: average precision of the cosine."""

    kind, main_score = "PairClassification", "cosine_ap"
    label_column_name = "label"

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        path = _find(folder, f"{split}.jsonl")
        rows = list(read_jsonl(path, ("sentence1", "sentence2", "label")))
        if {row["label"] for row in rows} != {0, 1}:
            raise ValueError(f"{path}: labels must be 0 and 1, both present; got {_some(row['label'] for row in rows)}")
        return {split: _columns(rows, "sentence1", "sentence2", "label")}


class LocalClassification(LocalTask, AbsTaskClassification):
    """Classification: accuracy of logistic regression trained on a few examples a label, mean of ten draws.

    Eight examples a label as MTEB has by default, but 32 where there are at most three labels: MTEB's own tasks with so few
    labels use more as well (TweetSentimentExtraction: 32).
    """

    kind, main_score = "Classification", "accuracy"
    options = frozenset({"samples_per_label", "n_experiments"})

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        train, test = (list(read_jsonl(_find(folder, f"{s}.jsonl"), ("text", "label"))) for s in ("train", split))
        labels = {row["label"] for row in train}
        if len(labels) < 2:
            raise ValueError(f"{folder}: train.jsonl has one label only; classification needs at least two")
        if unseen := {row["label"] for row in test} - labels:
            raise ValueError(f"{folder}: {split}.jsonl has labels that train.jsonl lacks: {_some(unseen)}")
        if len(labels) <= 3 and "samples_per_label" not in vars(self):
            self.samples_per_label = 32
        # Numbers, because mteb's scores of two labels want 0 and 1.
        number = {label: i for i, label in enumerate(sorted(labels, key=str))}
        for row in (*train, *test):
            row["label"] = number[row["label"]]
        return {"train": _columns(train, "text", "label"), split: _columns(test, "text", "label")}


class LocalLinearProbe(LocalTask, AbsTaskClassification):
    """Accuracy of logistic regression on the standardized embeddings of all training images, or of a few a label."""

    kind, main_score, modality, suffix = "ImageClassification", "accuracy", "image", "-linear"
    input_column_name, label_column_name = "image", "label"
    options = frozenset({"samples_per_label", "n_experiments"})
    evaluator_model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    n_experiments = 1

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        images = read_labelled_images(folder, ("train", split))
        if len(images["train"].features["label"].names) < 2:
            raise ValueError(f"{folder}: the training images have one label only; classification needs at least two")
        if "samples_per_label" not in vars(self):
            self.samples_per_label = len(images["train"])
        return images


class LocalNeighbours(LocalLinearProbe):
    """Accuracy of the nearest training images by cosine, weighted by exp(cosine / 0.07): Caron et al., arXiv 2104.14294."""

    suffix = "-knn"
    evaluator_model = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=lambda apart: np.exp((1 - apart) / 0.07))

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        images = super().read(folder, split)
        if len(images["train"]) < NEIGHBOURS:
            raise ValueError(f"{folder}: {len(images['train'])} training images; their vote needs at least {NEIGHBOURS}")
        return images


class LocalClustering(LocalTask, AbsTaskClustering):
    """Clustering: v-measure of mini-batch k-means, mean of ten draws of 16,384 texts with replacement."""

    kind, main_score = "Clustering", "v_measure"
    input_column_name, label_column_name = "text", "label"
    max_fraction_of_documents_to_embed = None  # mteb embeds 4 % of its large corpora; a local folder is used whole

    def read(self, folder: Path, split: str) -> dict[str, Dataset]:
        path = _clustering_file(folder, split) or _find(folder, f"{split}.jsonl")
        # Strings, because mteb takes the label -1 for "no label at this level".
        rows = [{**row, "label": str(row["label"])} for row in read_jsonl(path, ("text", "label"))]
        if len({row["label"] for row in rows}) < 2:
            raise ValueError(f"{path}: one label only; clustering needs at least two")
        return {split: _columns(rows, "text", "label")}


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    """Retrieval in BEIR's layout: nDCG@10 as trec_eval computes it; a document is its title, a blank, its text."""

    kind, main_score = "Retrieval", "ndcg_at_10"
    options = frozenset({"ignore_identical_ids"})

    def read(self, folder: Path, split: str) -> dict[str, dict[str, RetrievalSplitData]]:
        qrels_path = _qrels(folder, split) or _find(folder, "qrels.tsv")
        relevant: dict[str, dict[str, int]] = defaultdict(dict)
        for row in read_tsv(qrels_path, ("query-id", "corpus-id", "score")):
            grade = read_number(qrels_path, row["score"])
            if not grade.is_integer():
                raise ValueError(f"{qrels_path}: score {row['score']!r} is not a whole number, as grades are")
            relevant[row["query-id"]][row["corpus-id"]] = int(grade)
        documents, questions = (read_jsonl(_find(folder, f"{n}.jsonl"), ("_id", "text")) for n in ("corpus", "queries"))
        corpus = [{"id": str(d["_id"]), "title": d.get("title") or "", "text": d["text"]} for d in documents]
        queries = [{"id": str(q["_id"]), "text": q["text"]} for q in questions]
        if not any(query["id"] in relevant for query in queries):
            raise ValueError(f"{qrels_path}: names no query of queries.jsonl; is it of another collection?")
        return {"default": {split: _retrieval_split(corpus, queries, dict(relevant))}}


class LocalReranking(LocalTask, AbsTaskRetrieval):
    """Reranking: mean average precision over each query's own candidates."""

    kind, main_score = "Reranking", "map_at_1000"

    def read(self, folder: Path, split: str) -> dict[str, dict[str, RetrievalSplitData]]:
        path = _find(folder, f"{split}.jsonl")
        corpus, queries = [], []
        relevant: dict[str, dict[str, int]] = {}
        for number, row in enumerate(read_jsonl(path, ("query", "positive", "negative"))):
            if not row["positive"] or not row["negative"]:
                raise ValueError(f"{path}: query {row['query']!r} needs at least one positive and one negative")
            query = f"q{number}"
            queries.append({"id": query, "text": row["query"]})
            relevant[query] = {}
            # On a tie trec_eval ranks the greater id first; a tie counts against the model, as in MTEB.
            for grade, field, prefix in ((1, "positive", "a"), (0, "negative", "b")):
                for place, text in enumerate(row[field]):
                    document = f"{prefix}-{query}-{place:05}"
                    corpus.append({"id": document, "title": "", "text": text})
                    relevant[query][document] = grade
        candidates = {query: list(documents) for query, documents in relevant.items()}
        return {"default": {split: _retrieval_split(corpus, queries, relevant, candidates)}}


def local_tasks(
    data: str | Path, names: Sequence[str] | None = None, split: str | None = None, seed: int = SEED
) -> list[AbsTask]:
    """The tasks in a folder: the folder itself, if it has data files, or else each of its subfolders that has some.

    Make new ones for each model: a clustering task draws on from where its last run stopped.

    Args:
        data: the folder.
        names: only these tasks, in this order.
        split: evaluate this split; by default `test`, or `dev` where there is no test.
        seed: of the draws that classification and clustering make.

    Raises:
        ValueError: no task in the folder, an unknown name, a split that a task lacks, or a malformed file.
    """
    data = Path(data)
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder; pass a folder of tasks, or one task's folder")
    found = [data] if _data_files(data) else sorted(data.iterdir())
    folders = {folder.name: folder for folder in found if folder.is_dir() and _data_files(folder)}
    if not folders:
        raise ValueError(f"{data} holds no task; {LAYOUTS}")
    if unknown := [name for name in names or () if name not in folders]:
        raise ValueError(f"{data} holds no task {_some(unknown)}; it has {', '.join(folders)}")
    return [task for name in names or folders for task in _open_tasks(folders[name], split, seed)]


def mteb_tasks(names: Sequence[str], languages: Sequence[str] | None = None) -> list[AbsTask]:
    """MTEB's tasks of these names; their data is downloaded when they run, and their seed is MTEB's own.

    Args:
        names: MTEB task names, such as `STSBenchmark`.
        languages: only these ISO 639-3 languages (`eng`) of multilingual tasks; by default all.

    Raises:
        ValueError: a name that MTEB does not have.
    """
    return [_mteb_task(name, languages) for name in names]


def _mteb_task(name: str, languages: Sequence[str] | None) -> AbsTask:
    try:
        return get_task(name, languages=languages)
    except KeyError as error:
        raise ValueError(f"unknown MTEB task: {str(error.args[0]).removeprefix('KeyError: ')}") from None


def _open_tasks(folder: Path, split: str | None, seed: int) -> list[AbsTask]:
    for candidate in (split,) if split else SPLITS:
        if find_images(folder, candidate):
            return [probe(folder, candidate, seed) for probe in (LocalLinearProbe, LocalNeighbours)]
        if kind := _kind(folder, candidate):
            return [kind(folder, candidate, seed)]
    raise ValueError(f"{folder} holds no task with a split {split or ' or '.join(SPLITS)}; {LAYOUTS}")


def _kind(folder: Path, split: str) -> type[LocalTask] | None:
    """The type of task that the folder's texts make for this split, or None."""
    if _has(folder, "corpus.jsonl"):
        return LocalRetrieval if _qrels(folder, split) else None
    if _has(folder, f"{split}.tsv"):
        return LocalSTS
    path = _has(folder, f"{split}.jsonl") or _clustering_file(folder, split)
    if path is None:
        return None
    fields = next(read_jsonl(path, ())).keys()
    if fields >= {"query", "positive", "negative"}:
        return LocalReranking
    if fields >= {"sentence1", "sentence2", "label"}:
        return LocalPairClassification
    if fields >= {"text", "label"}:
        return LocalClassification if _has(folder, "train.jsonl") else LocalClustering
    return None


def _clustering_file(folder: Path, split: str) -> Path | None:
    """The split's file; a single jsonl of any other name counts as test."""
    if path := _has(folder, f"{split}.jsonl"):
        return path
    tables = [path for path in _data_files(folder) if _stem(path).endswith(".jsonl")]
    reserved = {f"{name}.jsonl" for name in ("train", *SPLITS)}
    return tables[0] if split == "test" and len(tables) == 1 and _stem(tables[0]) not in reserved else None


def _qrels(folder: Path, split: str) -> Path | None:
    """The split's judgements; a plain qrels.tsv counts as test."""
    return _has(folder / "qrels", f"{split}.tsv") or (_has(folder, "qrels.tsv") if split == "test" else None)


def _retrieval_split(
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None = None,
) -> RetrievalSplitData:
    return RetrievalSplitData(
        corpus=_columns(corpus, "id", "title", "text"),
        queries=_columns(queries, "id", "text"),
        relevant_docs=relevant,
        top_ranked=candidates,
    )


def _columns(rows: list[dict[str, Any]], *names: str) -> Dataset:
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names})


def _data_files(folder: Path) -> list[Path]:
    files = [path for path in folder.glob("*") if _stem(path).endswith((".jsonl", ".tsv", ".parquet")) and path.is_file()]
    for images in (find_images(folder, split) for split in ("train", *SPLITS)):
        if images and images.is_dir():
            files += [path for path in images.glob("*/*") if path.is_file()]
    return sorted(files)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _has(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _find(folder: Path, name: str) -> Path:
    path = _has(folder, name)
    if path is None:
        raise ValueError(f"{folder} lacks {name} (or {name}.gz)")
    return path


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the folder's files, so that scores of different data are never compared."""
    digest = hashlib.sha256()
    for path in (*_data_files(folder), *_data_files(folder / "qrels"), folder / "task.json"):
        if path.is_file():
            name = path.relative_to(folder).as_posix().removeprefix("qrels/")
            digest.update(name.encode())
            hash_file(digest, path)
    return digest.hexdigest()


def _some(values: Iterable[Any], limit: int = 5) -> str:
    names = sorted({str(v) for v in values})
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
