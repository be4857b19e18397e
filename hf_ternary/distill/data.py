"""Unlabelled texts or images: reading, held-out split, passages, tokens, and batches of a fixed number of tokens.

Everything is drawn from one seed and made anew when a run resumes, so a resumed run sees the same batches in the same order.
"""

import gzip
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..evaluation import files

T = TypeVar("T")

TEXT_FILES = (".jsonl", ".txt", ".parquet")

# A text is cut to this many characters a token before it is tokenized; no tokenizer needs more.
CHARACTERS_A_TOKEN = 32

# Texts of a pool are sorted by length before batches are cut from it, so that hardly anything is padding.
BATCHES_A_POOL = 64


@dataclass
class Corpus:
    """Texts or images to train on, others held out to measure fidelity, and where they come from."""

    train: list[Any]
    held_out: list[Any]
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
        _split(passages, weight, -(-held_out // len(sources)), rng, corpus)
        corpus.sources.append({"source": Path(name).name, "texts": len(texts), "weight": weight, **_fingerprint(name)})
    _check_split(corpus, "texts", sources, held_out)
    return corpus


def read_images(sources: Sequence[str], held_out: int, seed: int) -> Corpus:
    """As :func:`read_corpus`, of images.

    A source is a folder of images, a parquet file, or a folder or `datasets` id whose split ``train`` has images: in the
    first column that is declared to hold them, or else in ``image``.

    Returns:
        A corpus of :class:`Picture`.

    Raises:
        ValueError, ImportError: as :func:`read_corpus`.
    """
    corpus = Corpus([], [])
    for number, source in enumerate(sources):
        name, weight = _split_weight(source)
        table = _read_table(name)
        pictures = [Picture(table, row, name) for row in range(len(table))]
        _split(pictures, weight, -(-held_out // len(sources)), np.random.default_rng([seed, number]), corpus)
        corpus.sources.append({"source": Path(name).name, "images": len(table), "weight": weight, **_fingerprint(name)})
    _check_split(corpus, "images", sources, held_out)
    return corpus


@dataclass(frozen=True, slots=True)
class Picture:
    """One row of a table of images, decoded when it is asked for."""

    table: Any
    row: int
    source: str

    def decode(self) -> Any:
        """A PIL image, in colour.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            image = self.table[self.row]["image"]
        except Exception as error:  # Pillow raises a dozen types for a damaged file
            raise ValueError(f"{self} cannot be decoded: {error}. Fix: leave it out") from error
        if image is None:
            raise ValueError(f"{self} is missing. Fix: leave it out")
        return image

    def __str__(self) -> str:
        import datasets

        stored = self.table.cast_column("image", datasets.Image(decode=False))[self.row]["image"] or {}
        return stored.get("path") or f"image {self.row} of {self.source}"


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

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.starts[index]
        return {"index": index, "input_ids": self.ids[start : start + self.lengths[index]]}

    def describe(self, index: int) -> str:
        return repr(self.texts[index][:80])


class Images(Dataset[dict[str, Any]]):
    """Images that an encoder turns into ``tokens`` tokens each."""

    kind = "images"

    def __init__(self, pictures: Sequence[Picture], tokens: int) -> None:
        self.pictures = pictures
        self.lengths = np.full(len(pictures), tokens, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "image": self.pictures[index].decode()}

    def describe(self, index: int) -> str:
        return str(self.pictures[index])


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


@dataclass
class ImageCollator:
    """Resizes and normalises as the teacher's image ``processor`` does; an image makes ``tokens`` tokens."""

    processor: Any
    tokens: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns ``pixel_values`` float32 ``[B, C, H, W]``, ``attention_mask`` int64 ``[B, tokens]``, all 1, and ``index``
        int64 ``[B]``."""
        pixels = self.processor(images=[item["image"] for item in items], return_tensors="pt")["pixel_values"]
        mask = torch.ones(len(items), self.tokens, dtype=torch.int64)
        return {"pixel_values": pixels, "attention_mask": mask, "index": torch.tensor([item["index"] for item in items])}


class TokenBatches(Sampler[list[int]]):
    """Batches of texts (or images) of about one length that hold at most ``batch_tokens`` tokens with their padding.

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
                f"batch_tokens={batch_tokens} does not hold {self.multiple} inputs of {longest} tokens; use at least "
                f"{longest * self.multiple}, or a smaller max_length or image"
            )
        if int(lengths.sum()) < batch_tokens:
            raise ValueError(
                f"{len(lengths)} inputs with {int(lengths.sum())} tokens are fewer than one batch of {batch_tokens} tokens; "
                "give more of them or a smaller batch_tokens"
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


def _split(items: list[T], weight: float, held_out: int, rng: np.random.Generator, corpus: Corpus) -> None:
    """Shuffle, hold some out (a tenth at most) and take the rest ``weight`` times, into ``corpus``."""
    items = [items[i] for i in rng.permutation(len(items))]
    kept = min(held_out, len(items) // 10)
    corpus.held_out += items[:kept]
    whole, part = divmod(weight, 1)
    corpus.train += items[kept:] * int(whole)
    corpus.train += items[kept : kept + round((len(items) - kept) * part)]


def _check_split(corpus: Corpus, kind: str, sources: Sequence[str], held_out: int) -> None:
    if not corpus.train:
        raise ValueError(f"no {kind} are left to train on: {list(sources)} hold too few, or their weights are 0")
    if held_out and not corpus.held_out:
        raise ValueError(f"{len(corpus.train)} {kind} are too few to hold out {held_out}; give more {kind} or eval_texts: 0")


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


def _read_table(source: str) -> Any:
    """The images of one source: a `datasets.Dataset` with the column ``image``."""
    path = Path(source).expanduser()
    table = _load(source, "parquet", data_files=str(path)) if path.is_file() else _load(source, str(path))
    import datasets

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    name = (declared or ["image"])[0]
    if name not in table.column_names:
        raise ValueError(f'{source} has no column "image"; it has {", ".join(table.column_names)}')
    images = table.select_columns([name]).rename_columns({name: "image"})
    try:
        return images.cast_column("image", datasets.Image(mode="RGB"))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow raises
        raise ValueError(f'{source} holds no images in its column "{name}": {error}') from error


def _read_hub(source: str) -> list[str]:
    table = _load(source, source)
    if "text" not in table.column_names:
        raise ValueError(f'dataset {source} has no column "text"; it has {", ".join(table.column_names)}')
    return _distinct(table["text"], source)


def _load(source: str, *arguments: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is no {', '.join(TEXT_FILES)} file or folder of texts; reading it needs datasets: "
            'pip install "hf_ternary[train]"'
        ) from error
    try:
        return datasets.load_dataset(*arguments, **options, split="train")
    except Exception as error:  # datasets and huggingface_hub raise a dozen types for "not found" and "offline"
        raise ValueError(
            f"{source} is neither a file, a folder nor a dataset that can be had: {error.__cause__ or error}"
        ) from error


def _distinct(texts: Iterable[str | None], source: str | Path) -> list[str]:
    distinct = list(dict.fromkeys(text for text in texts if text and text.strip()))
    if not distinct:
        raise ValueError(f"{source} holds no text")
    return distinct


def _fingerprint(source: str) -> dict[str, str]:
    """SHA-256 of a file, or of the names and contents of a folder's."""
    path = Path(source).expanduser()
    if not path.exists():
        return {}
    digest = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    return {"sha256": digest.hexdigest()}
