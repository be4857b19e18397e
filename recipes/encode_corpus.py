"""Embed a corpus of any size on any number of processes and machines, then build a faiss IVF-PQ index of it on disk.

    accelerate launch --num_processes 2 recipes/encode_corpus.py MODEL CORPUS OUTPUT    # on GPUs
    torchrun --nproc-per-node 2 recipes/encode_corpus.py MODEL CORPUS OUTPUT            # on CPUs

OUTPUT, on a file system that all machines see, holds in the end

    corpus.json        what is encoded; a run with another model, corpus or shard size is refused
    shards/*.parquet   row (its number in the corpus) and embedding (float32, length 1); a shard is whole or not there
    index/             lists.ivfdata, read from disk while searching, and index.faiss, the rest:
                       faiss.read_index("OUTPUT/index/index.faiss", faiss.IO_FLAG_ONDISK_SAME_DIR)
    summary.json       the last run: texts, shards found done, processes, seconds, hardware

Stop it any way you like: the same command, on as many processes as you like, goes on with the shards that are missing.
Memory holds one shard a process and, while the index is trained, 64 vectors for every list of it.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import torch
import typer
from accelerate import PartialState
from datasets import Dataset, load_dataset
from faiss.contrib.ondisk import merge_ondisk
from numpy.typing import NDArray
from pyarrow import parquet
from rich.progress import track
from sentence_transformers import SentenceTransformer

from errors import one_line_errors
from hf_ternary.provenance import PACKAGES, provenance, settings, weights, write_json

BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
TRAINING_VECTORS = 64  # for every list of the index
BLOCK_VECTORS = 1_000_000  # quantized into one file, before the files are merged

Vectors = NDArray[np.float32]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
def main(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a SentenceTransformer")],
    corpus: Annotated[str, typer.Argument(help="jsonl, txt, csv or parquet file (or .gz), folder of them, or datasets id")],
    output: Annotated[Path, typer.Argument(help="folder for shards and index")],
    split: Annotated[str, typer.Option(help="split of a datasets id")] = "train",
    column: Annotated[list[str] | None, typer.Option(help="column of the text; repeatable (default: title, text)")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="texts a shard")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="texts a forward pass")] = 64,
    index: Annotated[str | None, typer.Option(help="faiss.index_factory string of an IVF index")] = None,
) -> None:
    with _processes() as state, one_line_errors():
        with state.local_main_process_first():  # the others find what it has converted in datasets' cache
            texts = read_corpus(corpus, split)
        columns = _columns(texts, column)
        shards = math.ceil(len(texts) / shard_size)
        encoder = SentenceTransformer(model, device=str(state.device))
        if state.is_main_process:
            _claim(output, {**_describe_model(model, encoder), **_describe(texts, columns), "shard_size": shard_size})
        found = sum(_shard(output, number).exists() for number in range(shards))
        state.wait_for_everyone()

        start = time.perf_counter()
        mine = range(state.process_index, shards, state.num_processes)
        for number in track(mine, "Encoding shards", disable=not state.is_main_process):
            rows = range(number * shard_size, min(len(texts), (number + 1) * shard_size))
            if not _shard(output, number).exists():
                write_shard(_shard(output, number), rows, encode(encoder, texts.select(rows), columns, batch_size))
        state.wait_for_everyone()
        seconds = time.perf_counter() - start

        if state.is_main_process:
            for leftover in (output / "shards").glob("*.partial"):
                leftover.unlink()
            build_index([_shard(output, number) for number in range(shards)], index, output / "index", len(texts))
            run = {"texts": len(texts), "found_shards": found, "processes": state.num_processes, "encode_seconds": seconds}
            write_json(output / "summary.json", {**run, **provenance(None, (*PACKAGES, "faiss-cpu", "pyarrow"))})
            typer.echo(f"{len(texts):,} texts in {shards} shards and {output / 'index'}")


@contextmanager
def _processes() -> Iterator[PartialState]:
    """All processes of this run, until it ends or fails."""
    # One waits for the slowest, however long that takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=365))
    try:
        yield state
    finally:
        state.destroy_process_group()


def read_corpus(corpus: str, split: str) -> Dataset:
    """The corpus, memory-mapped. A folder in BEIR's layout is its corpus.jsonl.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    path = Path(corpus)
    if path.is_dir():
        beir = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz") if (path / name).exists()]
        files = beir or [file for file in sorted(path.iterdir()) if _builder(file)]
    else:
        files = [path] if path.exists() or _builder(path) else []
    if not files and path.is_dir():
        raise ValueError(f"{corpus} holds no text file; allowed: {', '.join(BUILDERS)}, gzipped or not")
    if not files:
        return load_dataset(corpus, split=split)
    if missing := [file for file in files if not (file.exists() and _builder(file))]:
        raise ValueError(f"{missing[0]} does not exist or is no text file; allowed: {', '.join(BUILDERS)}, gzipped or not")
    if others := [file for file in files if _builder(file) != _builder(files[0])]:
        raise ValueError(f"{corpus} holds {files[0].name} and {others[0].name}, of different kinds. Fix: give files of one")
    texts = load_dataset(_builder(files[0]), data_files=[str(file) for file in files], split="train")
    if not len(texts):
        raise ValueError(f"{corpus} holds no text")
    return texts


def _builder(file: Path) -> str | None:
    """The `datasets` builder that reads this kind of file."""
    return BUILDERS.get(Path(file.name.removesuffix(".gz")).suffix)


def _columns(texts: Dataset, wanted: list[str] | None) -> list[str]:
    chosen = wanted or [name for name in ("title", "text") if name in texts.column_names]
    if unknown := [name for name in chosen if name not in texts.column_names]:
        raise ValueError(f"the corpus has no column {unknown[0]!r}; it has {', '.join(texts.column_names)}")
    if not chosen:
        raise ValueError(f"the corpus has no column 'text'; pass --column, one of {', '.join(texts.column_names)}")
    return chosen


def _join(rows: dict[str, list[str | None]], columns: list[str]) -> list[str]:
    """A text is its columns, joined by a blank, as MTEB joins title and text."""
    return [" ".join(filter(None, parts)).strip() for parts in zip(*(rows[name] for name in columns), strict=True)]


def _describe_model(name: str, encoder: SentenceTransformer) -> dict[str, Any]:
    """What decides the embeddings of a text."""
    if not (stored := weights(name)):
        raise ValueError(f"{name} has no weights that are known by a hash. Fix: save it with its save_pretrained")
    return {"weights": stored, **settings(encoder)}


def _describe(texts: Dataset, columns: list[str]) -> dict[str, Any]:
    """Number of texts, and a hash of a thousand of them all over the corpus."""
    some = texts.select(range(0, len(texts), math.ceil(len(texts) / 1000)))
    digest = hashlib.sha256(json.dumps(_join(some[:], columns)).encode()).hexdigest()
    return {"texts": len(texts), "columns": columns, "sample_sha256": digest}


def _claim(output: Path, wanted: dict[str, Any]) -> None:
    """Make the folder this corpus', or see that it is."""
    manifest = output / "corpus.json"
    if not manifest.exists():
        return write_json(manifest, wanted)
    found = json.loads(manifest.read_text(encoding="utf-8"))
    if changed := [name for name, value in wanted.items() if found.get(name) != value]:
        raise ValueError(f"{output} holds other shards ({', '.join(changed)} differ); give another folder or delete it")


def _shard(output: Path, number: int) -> Path:
    return output / "shards" / f"{number:06}.parquet"


def encode(encoder: SentenceTransformer, texts: Dataset, columns: list[str], batch_size: int) -> Vectors:
    """Embeddings of length 1, float32 [texts, dimensions].

    Raises:
        ValueError: an embedding has a NaN or an infinity.
    """
    vectors = encoder.encode_document(
        _join(texts[:], columns), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    )
    if not np.isfinite(vectors).all():
        raise ValueError("the model gives NaN or infinity for some text; nothing can be found by it")
    return vectors.astype(np.float32)


def write_shard(path: Path, rows: range, vectors: Vectors) -> None:
    """Write a shard, whole or not at all, even if a process that outlived its launcher writes the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{platform.node()}-{os.getpid()}.partial")
    embeddings = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    with partial.open("wb") as file:
        parquet.write_table(pa.table({"row": pa.array(rows, pa.int64()), "embedding": embeddings}), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_shard(path: Path) -> tuple[NDArray[np.int64], Vectors]:
    """Row numbers [texts] and embeddings [texts, dimensions]."""
    table = parquet.read_table(path)
    embeddings = table["embedding"].combine_chunks()
    return table["row"].to_numpy(), embeddings.flatten().to_numpy().reshape(len(table), -1)


def build_index(shards: list[Path], factory: str | None, folder: Path, texts: int) -> None:
    """Train an index on some vectors of every shard, quantize shard after shard, and merge the inverted lists on disk.

    Raises:
        ValueError: a shard is missing, or faiss cannot make such an index of so few vectors.
    """
    if folder.exists():
        return typer.echo(f"{folder} is there already; delete it to build another")
    if missing := [path.name for path in shards if not path.exists()]:
        raise ValueError(f"{len(missing)} shards are missing, first {missing[0]}; do all machines share {folder.parent}?")
    partial = folder.with_name("index.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _, first = read_shard(shards[0])
    # faiss' advice: 4 sqrt(n) lists; codes of 8 dimensions a byte
    lists = 2 ** int(math.log2(max(1, min(4 * math.sqrt(texts), texts / TRAINING_VECTORS))))
    factory = factory or f"IVF{lists},PQ{max(1, first.shape[1] // 8)}np"
    try:
        index = faiss.index_factory(first.shape[1], factory)
        every = max(1, texts // (TRAINING_VECTORS * faiss.extract_index_ivf(index).nlist))
        some = [read_shard(path)[1][::every].copy() for path in track(shards, "Reading training vectors")]
        index.train(np.concatenate(some))
        trained = partial / "trained.faiss"
        faiss.write_index(index, str(trained))
        size = max(1, BLOCK_VECTORS // len(first))  # each block repeats the index's centroids
        blocks = [partial / f"block-{start:06}.faiss" for start in range(0, len(shards), size)]
        for number, block in enumerate(track(blocks, "Quantizing shards")):
            part = faiss.read_index(str(trained), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
            for path in shards[number * size : (number + 1) * size]:
                rows, vectors = read_shard(path)
                part.add_with_ids(vectors, rows)
            faiss.write_index(part, str(block))
        merge_ondisk(index, [str(block) for block in blocks], str(partial / "lists.ivfdata"))
        faiss.write_index(index, str(partial / "index.faiss"))
    except RuntimeError as error:  # how faiss reports what it cannot do
        raise ValueError(f"faiss cannot build index {factory!r} on {texts} vectors: {error}") from error
    if index.ntotal != texts:
        raise ValueError(f"the index holds {index.ntotal} vectors, not {texts}; delete {folder.parent} and start again")
    for file in (trained, *blocks):
        file.unlink()
    partial.rename(folder)


if __name__ == "__main__":
    app()
