"""The model as mteb sees it: a SentenceTransformer that encodes each distinct text or image once in a run."""

import hashlib
import math
import warnings
from typing import Any

import numpy as np
from datasets import Dataset
from mteb.models import SentenceTransformerEncoderWrapper
from numpy.typing import NDArray
from rich.progress import track
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from .files import check_depth

Key = tuple[str | None, str | None, str]  # prompt type, prompt name, text or digest of an image


class CachedEncoder(SentenceTransformerEncoderWrapper):
    """mteb's wrapper of a SentenceTransformer with a cache by prompt and input; sentence_transformers sorts by length.

    Args:
        model: any SentenceTransformer, ternary or not.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        with warnings.catch_warnings():
            # mteb 2.26 calls its own deprecated option and a method that sentence-transformers 6 renamed.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(model)
        # mteb takes every SentenceTransformer that it does not know by name for one of texts.
        modalities = list(getattr(model, "modalities", ["text"]))
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"modalities": modalities})
        self._cache: dict[Key, NDArray[np.float32]] = {}
        self._tasks: dict[str, dict[Key, None]] = {}

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text that the model reads; None where it has no limit."""
        length = self.model.max_seq_length
        return None if length is None or math.isinf(length) else int(length)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, prompt_type: Any = None, **kwargs: Any
    ) -> NDArray[np.float32]:
        """Embeddings of the texts or images, float32 [inputs, dimensions].

        Raises:
            ValueError: an embedding has a NaN or an infinity, an image more than 8 bits a channel, or the task inputs of
                several kinds.
        """
        match task_metadata.modalities:
            case ["text"]:
                options = {"task_metadata": task_metadata, "hf_split": hf_split, "prompt_type": prompt_type, **kwargs}
                keys = self._encode_texts(inputs, self.get_prompt_name(task_metadata, prompt_type), options)
            case ["image"]:
                keys = self._encode_images(inputs, kwargs["batch_size"], kwargs["show_progress_bar"])
            case kinds:
                raise ValueError(f"it has {' and '.join(kinds)}; only tasks of texts alone or images alone can be run")
        if hf_split in task_metadata.eval_splits:
            self._tasks.setdefault(task_metadata.name, {}).update(dict.fromkeys(keys))
        return np.stack([self._cache[key] for key in keys])

    def _encode_texts(self, batches: Any, prompt: str | None, options: dict[str, Any]) -> list[Key]:
        keys: list[Key] = [(options["prompt_type"], prompt, text) for batch in batches for text in batch["text"]]
        if missing := [key for key in dict.fromkeys(keys) if key not in self._cache]:
            texts = [text for *_, text in missing]
            loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=len(texts))
            vectors = super().encode(loader, **options)
            self._cache.update(zip(missing, _finite(vectors, texts), strict=True))
        return keys

    def _encode_images(self, batches: Any, batch_size: int, progress: bool) -> list[Key]:
        """Batch after batch, as images would fill the memory."""
        processor = getattr(self.model, "processor", None)
        converts = getattr(getattr(processor, "image_processor", processor), "do_convert_rgb", None)
        keys: list[Key] = []
        for batch in track(batches, "embedding images", disable=not progress, transient=True):
            found = [_image_key(image) for image in batch["image"]]
            images = dict(zip(found, batch["image"], strict=True))
            keys += found
            if missing := [key for key in images if key not in self._cache]:
                # What is transparent is the processor's to fill.
                pictures: Any = [images[key] if converts else images[key].convert("RGB") for key in missing]
                vectors = self.model.encode(pictures, batch_size=batch_size, show_progress_bar=False)
                self._cache.update(zip(missing, _finite(vectors, pictures), strict=True))
        return keys

    def embeddings(self, task: str) -> NDArray[np.float32]:
        """Embeddings of the distinct texts or images that a task tests on, in the order in which it first asked for them."""
        return np.stack([self._cache[key] for key in self._tasks[task]])


def _image_key(image: Any) -> Key:
    check_depth(image)
    # Converted, as the bytes of two images with palettes of their own may be the same.
    return None, None, f"{image.size} {hashlib.sha256(image.convert('RGBA').tobytes()).hexdigest()}"


def _finite(vectors: Any, inputs: list[Any]) -> NDArray[np.float32]:
    array = np.asarray(vectors, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the model gives NaN or infinity for {len(bad)} of {len(inputs)} inputs, first for {inputs[bad[0]]!r:.80}; "
            "no score can be computed from it"
        )
    return array
