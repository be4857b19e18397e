"""What texts and images have in common: a corpus from weighted sources, and batches of a fixed number of tokens.

Everything is drawn from seeds and made anew when a run resumes, so a resumed run sees the same batches in the same order.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..provenance import hash_file

# Inputs of a pool are sorted by length before batches are cut from it, so that hardly anything is padding.
BATCHES_A_POOL = 64


@dataclass
class Corpus:
    """Texts or images to train on, others held out to measure fidelity, and where they come from."""

    train: list[Any] = field(default_factory=list)
    held_out: list[Any] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def add(self, items: list[Any], weight: float, held_out: int, rng: np.random.Generator) -> None:
        """Shuffle the items of a source, hold some out (a tenth at most) and take the rest ``weight`` times."""
        items = [items[i] for i in rng.permutation(len(items))]
        kept = min(held_out, len(items) // 10)
        self.held_out += items[:kept]
        whole, part = divmod(weight, 1)
        self.train += items[kept:] * int(whole)
        self.train += items[kept : kept + round((len(items) - kept) * part)]

    def check(self, kind: str, sources: Sequence[str], held_out: int) -> None:
        """Raises ValueError if there is nothing to train on, or nothing to hold out."""
        if not self.train:
            raise ValueError(f"no {kind} are left to train on: {list(sources)} hold too few, or their weights are 0")
        if held_out and not self.held_out:
            raise ValueError(
                f"{len(self.train)} {kind} are too few to hold out {held_out}; give more {kind} or eval_texts: 0"
            )


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


def by_length(lengths: np.ndarray, size: int = 32) -> list[np.ndarray]:
    """Indices of all inputs, those of about one length together, the shortest first: ``size`` a batch."""
    order = lengths.argsort(kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def split_weight(source: str) -> tuple[str, float]:
    """``NAME=WEIGHT`` -> name and weight; 1 without one."""
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


def load(source: str, *arguments: str, **options: Any) -> Any:
    """The split ``train`` as `datasets.load_dataset` reads it; ``source`` names it in errors."""
    return call_datasets(source, "load_dataset", *arguments, **options, split="train")


def call_datasets(source: str, function: str, *arguments: str, **options: Any) -> Any:
    """What a function of `datasets` returns; ``source`` names in errors what it was to read."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{source} is no file or folder of texts; reading it needs datasets: pip install "hf_ternary[train]"'
        ) from error
    try:
        return getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # datasets and huggingface_hub raise a dozen types for "not found" and "offline"
        raise ValueError(
            f"{source} is neither a file, a folder nor a dataset that can be had: {error.__cause__ or error}"
        ) from error


def identify(source: str, texts: Iterable[str] = ()) -> dict[str, str]:
    """Name and SHA-256 of a source: of a file, of the names and contents of a folder's, or of the texts of a dataset."""
    path, digest = Path(source).expanduser(), hashlib.sha256()
    if path.is_file():
        hash_file(digest, path)
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(file.relative_to(path).as_posix().encode())
        hash_file(digest, file)
    if path.exists():
        return {"source": path.name, "sha256": digest.hexdigest()}
    for text in texts:
        digest.update(text.encode() + b"\0")
    return {"source": source, **({"sha256": digest.hexdigest()} if texts else {})}
