"""Models whose embeddings are known by hand, and folders of every layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mteb")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace


def word_model(vectors: dict[str, Any]) -> SentenceTransformer:
    """A model that gives each word its vector and a text the mean of its words."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vectors)}, unk_token=next(iter(vectors))))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.array(list(vectors.values()), dtype=np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


@pytest.fixture(scope="session")
def angles() -> SentenceTransformer:
    """`a0` ... `a180`: unit vectors at that many degrees, so that cosines fall with the difference of the numbers."""
    return word_model({f"a{d}": [np.cos(np.radians(d)), np.sin(np.radians(d))] for d in range(181)})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """Writes files into a task folder: a list as jsonl, a string as it is."""

    def writer(folder: str, files: dict[str, Any]) -> Path:
        target = tmp_path / folder
        for name, content in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
            path.write_text(text, encoding="utf-8")
        return target

    return writer
