"""Texts from txt and jsonl, plain or gzipped. What the strict readers refuse is tested through the tasks that use them."""

import gzip
import json
from pathlib import Path

import pytest

from hf_ternary.evaluation.files import read_texts, read_tsv

TEXTS = ["one", "two\u2028still two", ' "three"']


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_texts_are_distinct_and_not_blank(tmp_path: Path, kind: str, packed: bool) -> None:
    lines = [*TEXTS, "", "  ", "one"]
    if kind == "jsonl":
        lines = [json.dumps({"text": line}) for line in lines]
    content = "\n".join(lines).encode()
    path = tmp_path / (f"texts.{kind}.gz" if packed else f"texts.{kind}")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_texts(path) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", " \n\n", "holds no text"),
        ("x.jsonl", "", "is empty"),
        ("x.jsonl", '{"title": "t"}', "line 1: 'text' must be str"),
    ],
)
def test_no_text(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_a_quotation_mark_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('a\tb\n"one\ttwo"\n"\t\n')
    assert list(read_tsv(path, ("a", "b"))) == [{"a": '"one', "b": 'two"'}, {"a": '"', "b": ""}]
