"""Unlabelled images: reading, and pixels as the teacher's processor makes them."""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..evaluation.files import check_depth
from .data import Corpus, call_datasets, identify, load, split_weight


def read_images(sources: Sequence[str], held_out: int, seed: int) -> Corpus:
    """As :func:`read_corpus`, of images.

    A source is a folder of images, a parquet file, or a folder or `datasets` id whose split ``train`` has images: in the
    first column that is declared to hold them, or else in ``image``. Of a folder of images with several splits, such as
    ``train/`` and ``test/``, ``train`` is read.

    Returns:
        A corpus of :class:`Picture`.

    Raises:
        ValueError, ImportError: as :func:`read_corpus`.
    """
    corpus = Corpus()
    for number, source in enumerate(sources):
        name, weight = split_weight(source)
        table = _read_table(name)
        pictures = [Picture(table, row, name) for row in range(len(table))]
        corpus.add(pictures, weight, -(-held_out // len(sources)), np.random.default_rng([seed, number]))
        corpus.sources.append({**identify(name), "images": len(table), "weight": weight})
    if unseen := {picture.digest() for picture in corpus.held_out}:  # the same picture may lie in several places
        corpus.train = [picture for picture in corpus.train if picture.digest() not in unseen]
    corpus.check("images", sources, held_out)
    return corpus


@dataclass(frozen=True, slots=True)
class Picture:
    """One row of a table of images as they are stored, decoded when it is asked for."""

    table: Any
    row: int
    source: str

    def decode(self) -> Any:
        """A PIL image, upright, in the mode in which it is stored: the processor converts it, as it does at inference.

        Raises:
            ValueError: it is missing, damaged, or of more than 8 bits a channel.
        """
        import datasets

        stored = self.table[self.row]["image"]
        if stored is None:
            raise ValueError(f"{self} is missing. Fix: leave it out")
        try:
            image = datasets.Image().decode_example(stored)
        except Exception as error:  # Pillow raises a dozen types for a damaged file
            raise ValueError(f"{self} cannot be decoded: {error}. Fix: leave it out") from error
        check_depth(image, str(self))
        return image

    def digest(self) -> bytes:
        """SHA-256 of its file; of where it lies, if that is no file of its own."""
        stored = self.table[self.row]["image"] or {}
        path = Path(stored.get("path") or "")
        content = stored.get("bytes")
        if content is None:
            content = path.read_bytes() if path.is_file() else str(path).encode()
        return hashlib.sha256(content).digest()

    def __str__(self) -> str:
        stored = self.table[self.row]["image"] or {}
        return stored.get("path") or f"image {self.row} of {self.source}"


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


def _read_table(source: str) -> Any:
    """The images of one source: a `datasets.Dataset` with the column ``image``."""
    path = Path(source).expanduser()
    if path.is_dir():
        table = _read_folder(source, path)
    else:
        table = load(source, "parquet", data_files=str(path)) if path.is_file() else load(source, str(path))
    import datasets

    declared = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    name = (declared or ["image"])[0]
    if name not in table.column_names:
        raise ValueError(f'{source} has no column "image"; it has {", ".join(table.column_names)}')
    images = table.select_columns([name]).rename_columns({name: "image"})
    try:
        return images.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # what pyarrow raises
        raise ValueError(f'{source} holds no images in its column "{name}": {error}') from error


def _read_folder(source: str, path: Path) -> Any:
    """All images of a folder; the split ``train`` of one with several splits, or with data of another kind.

    Raises:
        ValueError: there are several splits, and images in none of them.
    """
    builder = call_datasets(source, "load_dataset_builder", str(path))
    splits = builder.config.data_files
    if builder.name != "imagefolder":
        return load(source, str(path))
    if len(splits) == 1:  # `datasets` takes any name with train, val, test, dev or eval for a split, and drops the rest
        return load(source, "imagefolder", data_files=f"{glob.escape(str(path))}/**")
    root, taken = path.resolve(), {str(file) for files in splits.values() for file in files}
    images = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in builder.EXTENSIONS]
    left = [file.relative_to(root) for file in images if file.as_posix() not in taken]
    left = [file for file in left if not any(part.startswith((".", "__")) for part in file.parts)]  # `datasets` hides these
    if left:
        raise ValueError(
            f"{source} has the splits {', '.join(map(str, splits))} by its names, and {len(left)} images in none of them, "
            f"first {left[0]}. Fix: give the folders to read, each as a source"
        )
    return load(source, str(path))
