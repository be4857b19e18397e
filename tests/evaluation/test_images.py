"""Image classification: both layouts, both probes, MTEB's protocol on request; malformed folders are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", minversion="6")

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformer

from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.files import read_labelled_images
from hf_ternary.evaluation.report import add_fidelity, evaluate
from hf_ternary.evaluation.tasks import local_tasks
from tests.conftest import save_tiny_vit

Rows = list[tuple[Image.Image, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return SentenceTransformer(str(save_tiny_vit(tmp_path_factory.mktemp("vit"))), device="cpu")


def pictures(labels: dict[str, Any], count: int, seed: int) -> Rows:
    """Noise of the named colours, of sizes that differ."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    for number in range(count):
        for colour, label in labels.items():
            noise = Image.fromarray(rng.integers(0, 256, (14 + number % 3, 20, 3), dtype=np.uint8))
            rows.append((Image.blend(Image.new("RGB", noise.size, colour), noise, 0.2), label))
    return rows


def write_parquet(folder: Path, split: str, rows: Rows) -> None:
    folder.mkdir(exist_ok=True)
    kind = Value("string" if isinstance(rows[0][1], str) else "int64")
    columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
    Dataset.from_dict(columns, Features({"image": ImageFeature(), "label": kind})).to_parquet(folder / f"{split}.parquet")


def write_folder(folder: Path, split: str, rows: Rows) -> None:
    for number, (image, label) in enumerate(rows):
        path = folder / split / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


TRAIN = pictures({"red": 7, "blue": 10, "green": -1}, 10, seed=0)
# Four red and four blue ones, one of the red called blue.
TEST = [(image, 10 if i == 4 else label) for i, (image, label) in enumerate(pictures({"red": 7, "blue": 10}, 4, seed=1))]


@pytest.mark.parametrize("write", [write_parquet, write_folder])
def test_the_probes_find_what_the_embeddings_know(
    model: SentenceTransformer, tmp_path: Path, write: Callable[[Path, str, Rows], None]
) -> None:
    folder = tmp_path / "colours"
    write(folder, "train", TRAIN)
    write(folder, "test", TEST)
    encoder = CachedEncoder(model)
    records = evaluate(encoder, local_tasks(tmp_path), progress=False)
    assert [(r["task"], r["type"], r["metric"]) for r in records] == [
        ("colours-linear", "ImageClassification", "accuracy"),
        ("colours-knn", "ImageClassification", "accuracy"),
    ]
    assert [r["score"] for r in records] == [7 / 8, 7 / 8]
    assert records[0]["samples_per_label"] == len(TRAIN)
    # Fidelity is on the images that were tested on, and both probes share their embeddings.
    assert [r["fidelity"]["texts"] for r in add_fidelity(records, encoder, encoder, 0)] == [8, 8]


def test_each_image_is_encoded_once(model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a", "train", TRAIN)
    write_parquet(tmp_path / "a", "test", TEST + TEST[:1])
    encoded: list[Any] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images, **options: encoded.extend(images) or encode(images, **options))
    encoder = CachedEncoder(model)
    evaluate(encoder, local_tasks(tmp_path), batch_size=7, progress=False)
    assert len(encoded) == len(TRAIN) + len(TEST)
    wanted = encode([image for image, _ in TEST])
    np.testing.assert_allclose(encoder.embeddings("a-linear"), wanted, atol=1e-5)


def embed(model: SentenceTransformer, images: list[Image.Image]) -> Any:
    task = SimpleNamespace(name="colours", modalities=["image"], eval_splits=["test"])
    options = {"task_metadata": task, "hf_split": "test", "batch_size": 8, "show_progress_bar": False}
    return CachedEncoder(model).encode([{"image": images}], **options)


def test_palettes_and_transparency_tell_images_apart_as_at_inference(model: SentenceTransformer) -> None:
    indices = np.random.default_rng(0).integers(0, 4, (16, 16), dtype=np.uint8)
    one, other = Image.fromarray(indices).convert("P"), Image.fromarray(indices).convert("P")
    one.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    other.putpalette([0, 0, 0, 0, 0, 255, 255, 255, 0, 90, 90, 90])
    half = one.convert("RGB")
    half.putalpha(128)
    images = [one, other, half, half.convert("RGB")]
    got = embed(model, images)
    np.testing.assert_allclose(got, np.concatenate([model.encode([image]) for image in images]), atol=1e-5)
    assert not np.allclose(got[0], got[1], atol=1e-3)


def test_what_a_processor_does_not_convert_is_converted(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.new("L", (16, 16), 99)
    wanted = model.encode([grey.convert("RGB")])
    monkeypatch.setattr(model.processor, "do_convert_rgb", None)
    np.testing.assert_array_equal(embed(model, [grey]), wanted)


def test_an_image_of_more_than_8_bits_is_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match=r"more than 8 bits a channel \(mode I;16\)\. Fix"):
        embed(model, [Image.fromarray(np.ones((16, 16), np.uint16))])


def test_a_model_of_texts_is_refused(angles: SentenceTransformer, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a", "train", TRAIN)
    write_parquet(tmp_path / "a", "test", TEST)
    with pytest.raises(ValueError, match=r"supports \['text'\], but none overlap"):
        evaluate(CachedEncoder(angles), local_tasks(tmp_path), progress=False)


def test_names_of_splits_are_names_like_any_other(tmp_path: Path) -> None:
    for number, (image, _) in enumerate(TRAIN[:8]):
        path = tmp_path / "a[1]" / ("train", "test")[number % 2] / ("bus", "train")[number // 4] / f"val-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    tables = read_labelled_images(tmp_path / "a[1]", ("train", "test"))
    assert {split: table["label"][:] for split, table in tables.items()} == {"train": [0, 0, 1, 1], "test": [0, 0, 1, 1]}


def test_mtebs_protocol(model: SentenceTransformer, tmp_path: Path) -> None:
    """16 images a label and 5 draws for CIFAR-10; here 3 and 2."""
    write_parquet(tmp_path / "a", "train", TRAIN)
    write_parquet(tmp_path / "a", "dev", TEST)
    (tmp_path / "a" / "task.json").write_text(json.dumps({"samples_per_label": 3, "n_experiments": 2}))
    linear = evaluate(CachedEncoder(model), local_tasks(tmp_path)[:1], progress=False)[0]
    assert (linear["samples_per_label"], linear["n_experiments"], linear["splits"]) == (3, 2, ["dev"])
    assert linear["score"] == 7 / 8


def test_the_revision_is_the_images_and_their_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "train", TRAIN)
    write_folder(tmp_path / "a", "test", TEST)
    before, again = (local_tasks(tmp_path)[0].metadata.revision for _ in range(2))
    assert before == again
    path = next((tmp_path / "a" / "test" / "7").iterdir())
    path.rename(tmp_path / "a" / "test" / "10" / path.name)
    assert local_tasks(tmp_path)[0].metadata.revision != before


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (TRAIN[:10], TEST, "10 training images; their vote needs at least 20"),
        ([(image, 7) for image, _ in TRAIN], TEST[:1], "one label only"),
        (TRAIN, [(image, 8) for image, _ in TEST], "test has the label '8', which no training image has"),
        (None, TEST, "lacks train.parquet or train/CLASS/ with images"),
    ],
)
def test_malformed_folders(tmp_path: Path, train: Rows | None, test: Rows, message: str) -> None:
    if train:
        write_parquet(tmp_path / "a", "train", train)
    write_parquet(tmp_path / "a", "test", test)
    with pytest.raises(ValueError, match=message):
        local_tasks(tmp_path)


def test_a_parquet_file_without_labels_or_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        Dataset.from_dict({"image": [b"x"] * 30}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="lacks the column 'label'; it has image"):
        local_tasks(tmp_path)
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="test.parquet is no parquet file"):
        local_tasks(tmp_path)
    Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="holds no task with a split test or dev"):
        local_tasks(tmp_path)
