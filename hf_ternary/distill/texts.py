"""Unlabelled texts: reading, passages, tokens."""

import gzip
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.utils.data import Dataset

from ..evaluation import files
from .data import Corpus, identify, load, split_weight
from .student import transformer_of

TEXT_FILES = (".jsonl", ".txt", ".parquet")

# A text is cut to this many characters a token before it is tokenized; no tokenizer needs more.
CHARACTERS_A_TOKEN = 32

# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no blanks between words.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def read_corpus(
    sources: Sequence[str], held_out: int, passage_share: float, passage_words: tuple[int, int], seed: int
) -> Corpus:
    """Read, mix, split and join.

    Args:
        sources: files, folders or Hub ids, each optionally with a weight: ``wiki.jsonl.gz=0.5`` takes a random half,
            ``=2`` takes all of it twice.
        held_out: texts (or passages) kept from training; a few from every source.
        passage_share: share of the texts that are joined with the neighbours that follow them in their source.
        passage_words: shortest and longest passage, in words; the length of each is drawn between them.
        seed: of every draw.

    Raises:
        ValueError: a source cannot be read or holds no text, or fewer texts are left than are held out.
    """
    corpus = Corpus()
    for number, source in enumerate(sources):
        name, weight = split_weight(source)
        rng = np.random.default_rng([seed, number])
        texts = read_texts(name)
        passages = join_passages(texts, passage_share, passage_words, rng)
        corpus.add(passages, weight, -(-held_out // len(sources)), rng)
        corpus.sources.append({**identify(name, texts), "texts": len(texts), "weight": weight})
    unseen = set(corpus.held_out)  # another source may hold the same text
    corpus.train = [text for text in corpus.train if text not in unseen]
    corpus.check("texts", sources, held_out)
    return corpus


def read_texts(source: str) -> list[str]:
    """Texts of one source.

    Args:
        source: ``.jsonl`` (one object a line, with ``text``), ``.txt`` (one text a line), either gzipped or not,
            ``.parquet`` (column ``text``), a folder of such files, or a `datasets` id (split ``train``, column ``text``),
            with ``:CONFIG`` if it has several: ``Salesforce/wikitext:wikitext-2-v1``.

    Returns:
        The distinct texts, blank ones left out.

    Raises:
        ValueError: no such file, a malformed line (named), no column ``text``, or no text in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if _kind(p) in TEXT_FILES)
        if not found:
            raise ValueError(f"{source} holds no text file; allowed: {', '.join(TEXT_FILES)}, gzipped or not")
        return list(dict.fromkeys(text for file in found for text in read_texts(str(file))))
    if _kind(path) not in TEXT_FILES:
        return _read_hub(source)
    if not path.is_file():
        raise ValueError(f"{source} does not exist; give a {', '.join(TEXT_FILES)} file, a folder, or a datasets id")
    try:
        return _read_parquet(path) if _kind(path) == ".parquet" else files.read_texts(path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{source} is damaged or no UTF-8 text: {error}") from error


def join_passages(texts: Sequence[str], share: float, words: tuple[int, int], rng: np.random.Generator) -> list[str]:
    """Leave a text as it is with probability ``1 - share``, else join it with those that follow up to a drawn length."""
    passages = []
    position = 0
    while position < len(texts):
        start = position
        position += 1
        if rng.random() < share:
            target = rng.integers(words[0], words[1], endpoint=True)
            length = _words(texts[start]) - 1
            while length < target and position < len(texts):
                length += _words(texts[position])
                position += 1
        passages.append(" ".join(texts[start:position]))
    return passages


def _words(text: str) -> int:
    """About how many words; in scripts that put no blanks between them, one for two characters."""
    return text.count(" ") + 1 + (0 if text.isascii() else len(UNSPACED.findall(text)) // 2)


class TokenizedTexts(Dataset[dict[str, Any]]):
    """Token ids of many texts in one array, cut to ``max_length`` tokens.

    Raises:
        ValueError: the tokenizer makes ids that ``vocab_size`` rows do not have.
    """

    kind = "texts"

    def __init__(self, texts: Sequence[str], tokenizer: Any, max_length: int, vocab_size: int) -> None:
        self.texts = texts
        cut = max_length * CHARACTERS_A_TOKEN
        parts, lengths = [], []
        for start in range(0, len(texts), 4096):
            chunk = [text[:cut] for text in texts[start : start + 4096]]
            ids = tokenizer(
                chunk, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]
            parts.append(np.concatenate([np.asarray(i, dtype=np.int32) for i in ids]))
            lengths += [len(i) for i in ids]
        self.ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.starts = self.lengths.cumsum() - self.lengths
        if len(self.ids) and self.ids.max() >= vocab_size:
            raise ValueError(
                f"the tokenizer does not fit the teacher: it makes token id {self.ids.max()}, the teacher's token table has "
                f"{vocab_size} rows. Fix: use the tokenizer that the teacher was trained with"
            )

    @classmethod
    def of(cls, texts: Sequence[str], teacher: SentenceTransformer, max_length: int | None = None) -> "TokenizedTexts":
        """As ``teacher`` tokenizes them, cut to its own limit (512 if it has none) unless ``max_length`` says otherwise."""
        rows = cast(nn.Embedding, transformer_of(teacher).get_input_embeddings()).num_embeddings
        own = teacher.max_seq_length
        limit = own if own and own < 2**31 else 512  # a tokenizer that knows no limit says 10 ** 30
        return cls(texts, teacher.tokenizer, max_length or limit, rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.starts[index]
        return {"index": index, "input_ids": self.ids[start : start + self.lengths[index]]}

    def describe(self, index: int) -> str:
        return repr(self.texts[index][:80])


@dataclass
class Collator:
    """Pads to the longest text of the batch."""

    pad_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns ``input_ids`` int64 and ``attention_mask`` int64 ``[B, L]``, and ``index`` int64 ``[B]``."""
        longest = max(len(item["input_ids"]) for item in items)
        ids = np.full((len(items), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = item["input_ids"]
            mask[row, : len(item["input_ids"])] = 1
        index = np.array([item["index"] for item in items])
        return {name: torch.from_numpy(x) for name, x in (("input_ids", ids), ("attention_mask", mask), ("index", index))}


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read_parquet(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f'reading {path} needs pyarrow: pip install "hf_ternary[train]"') from error
    try:
        return _distinct(parquet.read_table(path, columns=["text"])["text"].to_pylist(), path)
    except (ArrowInvalid, KeyError) as error:
        raise ValueError(f'{path} is no parquet file with a column "text": {error}') from error


def _read_hub(source: str) -> list[str]:
    name, _, config = source.partition(":")
    table = load(source, name, *filter(None, [config]))
    if "text" not in table.column_names:
        raise ValueError(f'dataset {source} has no column "text"; it has {", ".join(table.column_names)}')
    return _distinct(table["text"], source)


def _distinct(texts: Iterable[str | None], source: str | Path) -> list[str]:
    distinct = list(dict.fromkeys(text for text in texts if text and text.strip()))
    if not distinct:
        raise ValueError(f"{source} holds no text")
    return distinct
