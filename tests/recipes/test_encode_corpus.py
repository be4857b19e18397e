"""Encoding by two processes, a kill -9 in the middle, and an index on disk that holds every text once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")

import faiss
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import encode_corpus
import hf_ternary

PATH = Path(encode_corpus.__file__)
TEXTS, SHARD = 1000, 10


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    """accelerate's state is global: leave none to other tests."""
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def model(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model: its embeddings are the same bits in any batch."""
    options = {"quantization_config": hf_ternary.TernaryConfig()}
    packed = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    return hf_ternary.save_pretrained(packed, tmp_path_factory.mktemp("encode") / "model")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = tmp_path / "corpus.jsonl"
    rows = [{"_id": str(i), "title": f"number {i}", "text": "the cat sat on it " * (i % 7)} for i in range(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(encode_corpus.app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def shards(output: Path) -> dict[str, tuple[int, int]]:
    """The finished shards, and what changes when a file is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted((output / "shards").glob("*.parquet"))}


# The recipe, but process 1 dies as by kill -9 when its eleventh shard is written and not yet in its place.
DYING = """
import os, pathlib, runpy, signal, sys
replace, done = pathlib.Path.replace, []
def replace_or_die(self, target):
    if os.environ["RANK"] == "1" and len(done) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(target)
    return replace(self, target)
pathlib.Path.replace = replace_or_die
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_kill_in_the_middle_costs_no_shard_and_repeats_none(model: Path, corpus: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", ["--shard-size", str(SHARD), "--index", "IVF4,Flat"]
    (tmp_path / "dying.py").write_text(DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "dying.py"]
    process = subprocess.run(
        [*launch, PATH, model, corpus, output, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert "Signal 9 (SIGKILL)" in process.stderr
    before = shards(output)
    odd = [name for name in before if int(name.removesuffix(".parquet")) % 2]
    assert odd == [f"{n:06}.parquet" for n in range(1, 21, 2)]  # what process 1 did
    assert len(before) > len(odd)
    assert len(list((output / "shards").glob("000021.*.partial"))) == 1
    assert not (output / "index").exists()

    run(model, corpus, output, *options)  # on one process now

    after = shards(output)
    assert len(after) == TEXTS // SHARD
    assert {name: after[name] for name in before} == before
    assert {path.suffix for path in (output / "shards").iterdir()} == {".parquet"}
    parts = [encode_corpus.read_shard(output / "shards" / name) for name in after]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in parts]), np.arange(TEXTS))
    vectors = np.concatenate([part for _, part in parts])
    texts = [" ".join(filter(None, (f"number {i}", "the cat sat on it " * (i % 7)))).strip() for i in range(TEXTS)]
    expected = SentenceTransformer(str(model), device="cpu").encode(texts, normalize_embeddings=True, batch_size=7)
    np.testing.assert_array_equal(vectors, expected)

    moved = shutil.move(output, tmp_path / "moved")  # the index finds its lists in its own folder
    index = faiss.read_index(str(Path(moved) / "index" / "index.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR)
    faiss.extract_index_ivf(index).nprobe = 4
    distances, rows = index.search(vectors, 1)
    assert index.ntotal == TEXTS
    np.testing.assert_array_equal(vectors[rows[:, 0]], vectors)  # itself, or a text with the same embedding
    assert not distances.any()


def test_the_index_by_default_is_ivf_pq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_corpus, "BLOCK_VECTORS", 1500)  # three shards, then one
    vectors = np.random.default_rng(0).standard_normal((2000, 32), dtype=np.float32)
    paths = [tmp_path / f"{n}.parquet" for n in range(4)]
    for n, path in enumerate(paths):
        rows = range(n * 500, (n + 1) * 500)
        encode_corpus.write_shard(path, rows, vectors[rows])
    encode_corpus.build_index(paths, None, tmp_path / "index", 2000)
    assert {path.name for path in (tmp_path / "index").iterdir()} == {"index.faiss", "lists.ivfdata"}
    index = faiss.read_index(str(tmp_path / "index" / "index.faiss"), faiss.IO_FLAG_ONDISK_SAME_DIR)
    assert (index.nlist, index.pq.M, index.ntotal) == (16, 4, 2000)
    index.nprobe = 16
    found = index.search(vectors[::10], 10)[1]
    assert np.mean([row in near for row, near in zip(range(0, 2000, 10), found, strict=True)]) > 0.9


def test_a_missing_shard_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 shards are missing, first 000000.parquet"):
        encode_corpus.build_index([tmp_path / "000000.parquet"], None, tmp_path / "index", 10)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing.jsonl", [], "does not exist"),
        ("folder", [], "holds no text file"),
        ("mixed", [], "holds LICENSE.txt and part.jsonl, of different kinds"),
        ("corpus.jsonl", ["--column", "body"], "no column 'body'; it has _id, title, text"),
        ("corpus.jsonl", ["--index", "IVF4,PQ5"], "faiss cannot build index 'IVF4,PQ5'"),
    ],
)
def test_errors_are_one_line(
    source: str, options: list[str], message: str, model: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "LICENSE.txt").write_text("CC0\n")
    (tmp_path / "mixed" / "part.jsonl").write_text('{"text": "a"}\n')
    output = run(model, tmp_path / source, tmp_path / "out", "--shard-size", 500, *options, code=2)
    assert message in output.splitlines()[-1]


def test_another_corpus_is_refused(model: Path, corpus: Path, tmp_path: Path) -> None:
    options = ["--shard-size", 500, "--index", "IVF2,Flat"]
    run(model, corpus, tmp_path / "out", *options)
    assert "is there already" in run(model, corpus, tmp_path / "out", *options)
    options[1] = 400
    assert "shard_size differ" in run(model, corpus, tmp_path / "out", *options, code=2)


def test_another_prompt_or_pooling_is_refused(model: Path, corpus: Path, tmp_path: Path) -> None:
    options = ["--shard-size", 500, "--index", "IVF2,Flat"]
    run(model, corpus, tmp_path / "out", *options)
    for change, told in (("prompts", "prompts differ"), ("pooling", "modules differ")):
        other = SentenceTransformer(str(model), device="cpu")
        if change == "prompts":
            other.prompts = {"document": "passage: "}
        else:
            other[1].pooling_mode = "cls"
        other.save_pretrained(str(tmp_path / change))
        assert told in run(tmp_path / change, corpus, tmp_path / "out", *options, code=2)


def test_a_model_without_a_hash_is_refused(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_corpus, "weights", lambda name: {})
    assert "no weights that are known by a hash" in run(model, corpus, tmp_path / "out", code=2)
