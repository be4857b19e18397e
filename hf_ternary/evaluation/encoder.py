"""The model as mteb sees it: a SentenceTransformer that encodes each distinct text once in a run."""

import math
import warnings
from typing import Any

import numpy as np
from datasets import Dataset
from mteb.models import SentenceTransformerEncoderWrapper
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

Key = tuple[str | None, str | None, str]  # prompt type, prompt name, text


class CachedEncoder(SentenceTransformerEncoderWrapper):
    """mteb's wrapper of a SentenceTransformer with a cache by prompt and text; sentence_transformers sorts by length.

    Args:
        model: any SentenceTransformer, ternary or not.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        with warnings.catch_warnings():
            # mteb 2.26 calls its own deprecated option and a method that sentence-transformers 6 renamed.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(model)
        self._cache: dict[Key, NDArray[np.float32]] = {}
        self._tasks: dict[str, dict[Key, None]] = {}

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text that the model reads; None where it has no limit."""
        length = self.model.max_seq_length
        return None if length is None or math.isinf(length) else int(length)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> NDArray[np.float32]:
        """Embeddings of the texts, float32 [texts, dimensions].

        Raises:
            ValueError: an embedding has a NaN or an infinity.
        """
        prompt = self.get_prompt_name(task_metadata, prompt_type)
        keys: list[Key] = [(prompt_type, prompt, text) for batch in inputs for text in batch["text"]]
        self._tasks.setdefault(task_metadata.name, {}).update(dict.fromkeys(keys))
        if missing := [key for key in dict.fromkeys(keys) if key not in self._cache]:
            texts = [text for *_, text in missing]
            loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=len(texts))
            vectors = super().encode(loader, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
            self._cache.update(zip(missing, _finite(vectors, texts), strict=True))
        return np.stack([self._cache[key] for key in keys])

    def embeddings(self, task: str) -> NDArray[np.float32]:
        """Embeddings of a task's distinct texts, in the order in which the task first asked for them."""
        return np.stack([self._cache[key] for key in self._tasks[task]])


def _finite(vectors: Any, texts: list[str]) -> NDArray[np.float32]:
    array = np.asarray(vectors, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the model gives NaN or infinity for {len(bad)} of {len(texts)} texts, first for {texts[bad[0]][:80]!r}; "
            "no score can be computed from it"
        )
    return array
