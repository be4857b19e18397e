"""Unlabelled texts: reading, held-out split, passages, tokens, and batches of a fixed number of tokens.

Everything is drawn from one seed and made anew when a run resumes, so a resumed run sees the same batches in the same order.
"""

import gzip
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..evaluation import files

TEXT_FILES = (".jsonl", ".txt", ".parquet")

# A text is cut to this many characters a token before it is tokenized; no tokenizer needs more.
CHARACTERS_A_TOKEN = 32

# Texts of a pool are sorted by length before batches are cut from it, so that hardly anything is padding.
BATCHES_A_POOL = 64


@dataclass
class Corpus:
    """Texts to train on, texts held out to measure fidelity, and where they come from."""

    train: list[str]
    held_out: list[str]
    sources: list[dict[str, Any]] = field(default_factory=list)


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
    corpus = Corpus([], [])
    for number, source in enumerate(sources):
        name, weight = _split_weight(source)
        rng = np.random.default_rng([seed, number])
        texts = read_texts(name)
        passages = join_passages(texts, passage_share, passage_words, rng)
        passages = [passages[i] for i in rng.permutation(len(passages))]
        kept = min(-(-held_out // len(sources)), len(passages) // 10)
        corpus.held_out += passages[:kept]
        whole, part = divmod(weight, 1)
        corpus.train += passages[kept:] * int(whole)
        corpus.train += passages[kept : kept + round((len(passages) - kept) * part)]
        corpus.sources.append({"source": Path(name).name, "texts": len(texts), "weight": weight, **_fingerprint(name)})
    if not corpus.train:
        raise ValueError(f"no text is left to train on: {list(sources)} hold too few, or their weights are 0")
    if held_out and not corpus.held_out:
        raise ValueError(f"{len(corpus.train)} texts are too few to hold out {held_out}; give more texts or eval_texts: 0")
    return corpus


def read_texts(source: str) -> list[str]:
    """Texts of one source.

    Args:
        source: ``.jsonl`` (one object a line, with ``text``), ``.txt`` (one text a line), either gzipped or not,
            ``.parquet`` (column ``text``), a folder of such files, or a `datasets` id (split ``train``, column ``text``).

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
        return [text for file in found for text in read_texts(str(file))]
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
            length = texts[start].count(" ")
            while length < target and position < len(texts):
                length += texts[position].count(" ") + 1
                position += 1
        passages.append(" ".join(texts[start:position]))
    return passages


class TokenizedTexts(Dataset[dict[str, Any]]):
    """Token ids of many texts in one array, cut to ``max_length`` tokens.

    Raises:
        ValueError: the tokenizer makes ids that ``vocab_size`` rows do not have.
    """

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

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.starts[index]
        return {"index": index, "input_ids": self.ids[start : start + self.lengths[index]]}


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


class TokenBatches(Sampler[list[int]]):
    """Batches of texts of about one length that hold at most ``batch_tokens`` tokens with their padding.

    The plan covers all processes: each takes every ``world_size``-th text of every batch, so that more processes share the
    same batches. The number of texts is a multiple of 4 and of ``world_size``.

    Args:
        lengths: tokens of every text.
        batch_tokens: tokens of a batch, over all processes.
        passes: passes over the texts; ignored if ``steps`` is positive.
        steps: number of batches, from as many passes as they need.
        seed, rank, world_size: of the draw; of this process.

    Raises:
        ValueError: the texts do not fill one batch, or a batch does not hold enough of the longest.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_tokens: int,
        passes: float = 1,
        steps: int = -1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.multiple = math.lcm(4, world_size)
        longest = int(lengths.max(initial=0))
        if longest * self.multiple > batch_tokens:
            raise ValueError(
                f"batch_tokens={batch_tokens} does not hold {self.multiple} texts of {longest} tokens; use at least "
                f"{longest * self.multiple}, or a smaller max_length"
            )
        if int(lengths.sum()) < batch_tokens:
            raise ValueError(
                f"{len(lengths)} texts with {int(lengths.sum())} tokens are fewer than one batch of {batch_tokens} tokens; "
                "give more texts or a smaller batch_tokens"
            )
        self.batches: list[np.ndarray] = []
        number = 0
        while len(self.batches) < steps or (steps <= 0 and number < passes):
            plan = _plan(lengths, batch_tokens, self.multiple, np.random.default_rng([seed, number]))
            if steps <= 0 and passes - number < 1:
                plan = plan[: max(1, round(len(plan) * (passes - number)))]
            self.batches += plan
            number += 1
        if steps > 0:
            del self.batches[steps:]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.rank :: self.world_size].tolist()


def _plan(lengths: np.ndarray, batch_tokens: int, multiple: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One pass over the texts, as batches in random order; what does not fill a batch of a pool is left out."""
    order = rng.permutation(len(lengths))
    pool = max(multiple, int(BATCHES_A_POOL * batch_tokens / lengths.mean()))
    batches = []
    for start in range(0, len(order), pool):
        texts = order[start : start + pool]
        texts = texts[np.argsort(-lengths[texts], kind="stable")]
        while len(texts) >= multiple:
            size = int(batch_tokens // max(1, lengths[texts[0]])) // multiple * multiple
            size = min(size, len(texts) // multiple * multiple)
            batches.append(texts[:size])
            texts = texts[size:]
    return [batches[i] for i in rng.permutation(len(batches))]


def _split_weight(source: str) -> tuple[str, float]:
    name, separator, weight = source.rpartition("=")
    if not separator:
        return source, 1.0
    try:
        value = float(weight)
    except ValueError:
        return source, 1.0  # an equals sign in the file's name
    if not 0 <= value < float("inf"):
        raise ValueError(f"weight {weight} of {name} is not allowed: use a finite number that is not negative")
    return name, value


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
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is no {', '.join(TEXT_FILES)} file or folder; reading it as a datasets id needs datasets: "
            'pip install "hf_ternary[train]"'
        ) from error
    try:
        table = datasets.load_dataset(source, split="train")
    except Exception as error:  # datasets and huggingface_hub raise a dozen types for "not found" and "offline"
        raise ValueError(f"{source} is neither a file, a folder nor a dataset that can be had: {error}") from error
    if "text" not in table.column_names:
        raise ValueError(f'dataset {source} has no column "text"; it has {", ".join(table.column_names)}')
    return _distinct(table["text"], source)


def _distinct(texts: Iterable[str | None], source: str | Path) -> list[str]:
    distinct = list(dict.fromkeys(text for text in texts if text and text.strip()))
    if not distinct:
        raise ValueError(f"{source} holds no text")
    return distinct


def _fingerprint(source: str) -> dict[str, str]:
    path = Path(source).expanduser()
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}
