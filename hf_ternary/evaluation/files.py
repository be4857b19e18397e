"""Data files, plain or gzipped, read strictly: what is malformed is refused with its file and line."""

import csv
import glob
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

# Of the fields of a jsonl record; any other is an id or a label.
FIELD_TYPES = {"text": str, "query": str, "sentence1": str, "sentence2": str, "positive": list, "negative": list}


def read_jsonl(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The records of a jsonl file.

    Raises:
        ValueError: the file is empty, or a line is no JSON object with these fields and their types.
    """
    count = 0
    for count, line in enumerate(read_lines(path), start=1):
        row = read_object(line, f"{path}: line {count}")
        for field in fields:
            wanted = FIELD_TYPES.get(field, str | int)
            if not isinstance(row.get(field), wanted):
                name = getattr(wanted, "__name__", wanted)
                raise ValueError(f"{path}: line {count}: {field!r} must be {name}, got {row.get(field)!r:.40}")
        yield row
    if not count:
        raise ValueError(f"{path} is empty")


def read_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; `where` names the text in the ValueError for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object")
    return value


def read_tsv(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a tab-separated file with a header; a quotation mark is a character like any other.

    Raises:
        ValueError: the header lacks one of these fields, a row is short, or there is none.
    """
    reader = csv.DictReader(read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [f for f in fields if f not in (reader.fieldnames or ())]:
        raise ValueError(f"{path}: the header lacks {', '.join(missing)}; it must have {', '.join(fields)}")
    count = 0
    for count, row in enumerate(reader, start=1):
        if any(row[f] is None for f in fields):
            raise ValueError(f"{path}: row {count} has fewer columns than the header")
        yield row
    if not count:
        raise ValueError(f"{path} has a header and no row")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; only a newline ends a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from (line.rstrip("\r\n") for line in file)


def read_number(path: Path, text: str) -> float:
    """A finite number from a score column; `path` names the file in the ValueError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}: score {text!r} is not a number")
    return value


def read_texts(path: Path) -> list[str]:
    """The distinct texts of a .txt file (one a line) or a .jsonl file (field `text`), blank ones left out.

    Raises:
        ValueError: no text is left, or a record has none.
    """
    records = (row["text"] for row in read_jsonl(path, ("text",))) if ".jsonl" in path.suffixes else read_lines(path)
    texts = list(dict.fromkeys(text for text in records if text.strip()))
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def find_images(folder: Path, split: str) -> Path | None:
    """``SPLIT.parquet``, if it has a column of images, or ``SPLIT/``, if it holds a folder a class."""
    path = folder / f"{split}.parquet"
    if path.is_file():
        from pyarrow import ArrowInvalid, parquet

        try:
            return path if "image" in parquet.read_schema(path).names else None
        except ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet file: {error}") from error
    classes = (folder / split).iterdir() if (folder / split).is_dir() else ()
    return folder / split if any(path.is_dir() for path in classes) else None


def check_depth(image: Any, name: str = "") -> None:
    """Raises ValueError for a PIL image of more than 8 bits a channel, which in colour would be black and white; the error
    calls it ``name``."""
    if image.mode.startswith(("I", "F")):
        name = name or getattr(image, "filename", "") or repr(image)
        raise ValueError(f"{name} has more than 8 bits a channel (mode {image.mode}). Fix: convert it to 8 bits first")


def read_labelled_images(source: str | Path, splits: Sequence[str]) -> "dict[str, Dataset]":
    """Labelled images: for each split the columns `image` (when it is read, a PIL image of any mode) and `label` (a class).

    Args:
        source: a folder as :func:`find_images` knows it (labels of a parquet file are in `label`), or a `datasets` id with
            the columns `image` and `label`.
        splits: their names; the labels of the first are the classes of all.

    Raises:
        ValueError: no such data, split, column or label.
    """
    tables = {split: _read_split(Path(source), split) for split in splits}
    classes = _classes(next(iter(tables.values())))
    return {split: _with_classes(table, classes, f"{source}: {split}") for split, table in tables.items()}


def _read_split(source: Path, split: str) -> "Dataset":
    import datasets

    path = find_images(source, split)
    if path is None and source.is_dir():
        raise ValueError(f"{source} lacks {split}.parquet or {split}/CLASS/ with images")
    try:
        if path is None:
            table = datasets.load_dataset(str(source), split=split)
        elif path.is_file():
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            # Files, not the folder: there `datasets` takes names with train, val, test, dev or eval for splits.
            table = datasets.load_dataset("imagefolder", data_files=f"{glob.escape(str(path))}/**", split="train")
    except Exception as error:  # datasets and huggingface_hub raise a dozen types for "not found" and "offline"
        raise ValueError(f"{path or source} cannot be read as images: {error}") from error
    if missing := {"image", "label"} - set(table.column_names):
        raise ValueError(f"{path or source} lacks the column {min(missing)!r}; it has {', '.join(table.column_names)}")
    return table.select_columns(["image", "label"]).cast_column("image", datasets.Image())


def _classes(table: "Dataset") -> list[str]:
    label = table.features["label"]
    return label.names if hasattr(label, "names") else [str(value) for value in sorted(table.unique("label"))]


def _with_classes(table: "Dataset", classes: list[str], where: str) -> "Dataset":
    """The table with labels that are numbers of ``classes``, whatever they were: numbers of its own classes, or values."""
    import datasets

    label = table.features["label"]
    names = [label.int2str(value) if hasattr(label, "names") else str(value) for value in table["label"]]
    if unknown := set(names) - set(classes):
        raise ValueError(f"{where} has the label {min(unknown)!r}, which no training image has")
    numbers = [classes.index(name) for name in names]
    return table.remove_columns("label").add_column("label", numbers, feature=datasets.ClassLabel(names=classes))
