import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hf_ternary.distill.texts import Collator, TokenizedTexts, join_passages, read_corpus, read_texts
from tests.conftest import tiny_tokenizer


def write_jsonl(path: Path, texts: list[str]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str):
    texts = ["the cat", "the dog \u00fc", "in a day"]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [*texts, None, " "]}), path)
    elif ".txt" in path.suffixes:
        content = "\n".join([*texts, "", "  "]).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    else:
        write_jsonl(path, [*texts, " "])
    assert read_texts(str(path)) == texts
    assert read_texts(str(tmp_path)) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("blank.txt", " \n\t\n", "holds no text"),
        ("broken.jsonl", '{"text": "a"}\n{"tex', "line 2"),
        ("other.jsonl", '{"sentence": "a"}\n', "'text'"),
        ("damaged.jsonl.gz", "not gzip", "damaged"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: str | None, message: str):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_texts(str(tmp_path / name))
    assert name in str(error.value)


def test_a_weight_is_a_number_of_passes(tmp_path: Path):
    path = write_jsonl(tmp_path / "a=b.jsonl", [f"text {i}" for i in range(100)])
    other = write_jsonl(tmp_path / "other.jsonl", [f"other text {i}" for i in range(100)])
    counts = {}
    for weight in ("", "=0.5", "=2", "=0"):
        corpus = read_corpus([f"{path}{weight}", f"{other}=1"], 20, 0.0, (5, 10), seed=0)
        counts[weight] = len(corpus.train) - 90
        assert len(corpus.held_out) == 20
    assert counts == {"": 90, "=0.5": 45, "=2": 180, "=0": 0}
    with pytest.raises(ValueError, match="weight -1"):
        read_corpus([f"{path}=-1"], 0, 0.0, (5, 10), seed=0)


def test_held_out_texts_are_not_trained_on(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(200)])
    corpus = read_corpus([str(path)], 16, 0.7, (4, 12), seed=0)
    words = [set(" ".join(texts).split()) - {"text"} for texts in (corpus.train, corpus.held_out)]
    assert words[0] | words[1] == {str(i) for i in range(200)}
    assert not words[0] & words[1]


def test_a_text_of_two_sources_is_held_out_of_both(tmp_path: Path):
    texts = [f"text {i}" for i in range(200)]
    files = [str(write_jsonl(tmp_path / name, texts)) for name in ("a.jsonl", "b.jsonl")]
    for sources in (files, [str(tmp_path)]):
        corpus = read_corpus(sources, 16, 0.0, (4, 12), seed=0)
        assert len(corpus.held_out) == 16
        assert not set(corpus.train) & set(corpus.held_out)
    assert len(corpus.train) == 184  # a folder's texts are distinct


def test_too_few_texts_to_hold_out(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(ValueError, match="too few to hold out 4"):
        read_corpus([str(path)], 4, 0.0, (5, 10), seed=0)


def test_passages_keep_every_text_in_order():
    texts = [f"w{i} x y" for i in range(500)]
    passages = join_passages(texts, 0.5, (10, 20), np.random.default_rng(0))
    assert " ".join(passages) == " ".join(texts)
    lengths = [len(p.split()) for p in passages]
    assert 0.3 < np.mean(np.array(lengths) == 3) < 0.8  # texts alone
    assert all(n == 3 or 10 <= n <= 23 for n in lengths[:-1])  # a passage ends with the text that fills it
    assert join_passages(texts, 0.0, (10, 20), np.random.default_rng(0)) == texts


def test_passages_of_a_script_without_blanks_are_no_longer():
    texts = ["\u5929\u5730\u7384\u9ec4" * 5] * 500  # 20 characters
    lengths = [len(p.replace(" ", "")) for p in join_passages(texts, 0.5, (40, 180), np.random.default_rng(0))]
    assert np.mean(np.array(lengths) == 20) > 0.3  # texts alone
    assert all(n == 20 or 60 <= n <= 380 for n in lengths[:-1])


def test_a_dataset_is_told_by_its_id_and_its_texts(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked, texts = [], [f"text {i}" for i in range(40)]

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = [read_corpus([name], 4, 0.0, (5, 10), seed=0).sources[0] for name in ("me/news", "me/wiki:de=0.5")]
    texts[0] = "another"
    sources += read_corpus(["me/news"], 4, 0.0, (5, 10), seed=0).sources
    assert asked == [("me/news", "train"), ("me/wiki", "de", "train"), ("me/news", "train")]
    assert [source["source"] for source in sources] == ["me/news", "me/wiki:de", "me/news"]
    assert sources[0]["sha256"] == sources[1]["sha256"] != sources[2]["sha256"]


def test_tokens_are_those_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    texts = ["the cat sat", "a", "green " * 40]
    tokenized = TokenizedTexts(texts, tokenizer, 16, 200)
    for i, text in enumerate(texts):
        assert tokenized[i]["input_ids"].tolist() == tokenizer(text, truncation=True, max_length=16)["input_ids"]
    batch = Collator(pad_id=0)([tokenized[0], tokenized[2]])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [5, 16]
    assert batch["index"].tolist() == [0, 2]


def test_a_text_of_a_megabyte_is_cut():
    tokenized = TokenizedTexts(["the cat " * 130_000, "a"], tiny_tokenizer(), 128, 200)
    assert tokenized.lengths.tolist() == [128, 3]


def test_a_tokenizer_without_a_limit_cuts_at_512(tiny_sentence_transformer: Path):
    teacher = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    teacher.max_seq_length = 10**30  # what the tokenizer of a T5 may say
    assert TokenizedTexts.of(["cat " * 2000], teacher).lengths.tolist() == [512]


def test_a_tokenizer_with_more_tokens_than_the_teacher_is_refused():
    with pytest.raises(ValueError, match="does not fit the teacher.*20 rows"):
        TokenizedTexts(["the cat sat on the red dog"], tiny_tokenizer(), 16, 20)
