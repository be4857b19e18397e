"""The classifier recipe: it learns, goes on after a stop to the same bits, and leaves an encoder that can be distilled."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", minversion="6")
pytest.importorskip("mteb")

import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    CLIPConfig,
    ResNetConfig,
    SiglipConfig,
    SwinConfig,
    pipeline,
)

import train_vit
from hf_ternary.evaluation.files import read_labelled_images
from tests.conftest import save_tiny_vit

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "vit" / "cifar10.yaml"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_vit(tmp_path_factory.mktemp("vit"))
    processor = json.loads((path / "preprocessor_config.json").read_text())
    del processor["do_convert_rgb"]  # as most ViTs have it
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 training and 8 test images, dark ones and bright ones, some grey, one with an alpha channel."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(40):
        name, low = (("bright", 150), ("dark", 0))[number % 2]
        shape = (17, 20, 3) if number % 3 else (17, 20)
        path = folder / ("train" if number < 32 else "test") / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(low, low + 100, shape, dtype=np.uint8))
        if number == 1:
            image.putalpha(255)
        image.save(path)
    return folder


@pytest.fixture
def run(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def train(*flags: object) -> dict[str, Any]:
        where = ["--model", model, "--images", images, "--output_dir", tmp_path / "run", "--bf16", "false"]
        small = ["--per_device_train_batch_size", 8, "--num_train_epochs", 4, "--learning_rate", 0.003]
        monkeypatch.setattr(sys, "argv", ["train_vit.py", "--config", str(CONFIG), *map(str, (*where, *small, *flags))])
        train_vit.main()
        return json.loads((tmp_path / "run" / "summary.json").read_text())

    return train


def test_it_learns_and_leaves_an_encoder(run: Run, tmp_path: Path, images: Path) -> None:
    summary = run()
    assert summary["accuracy"] == 1
    assert summary["classes"] == ["bright", "dark"]
    assert summary["images"] == {"source": images.name, "train": 32, "test": 8}
    assert {"commit", "hardware", "versions", "seed", "weights"} <= summary.keys()
    assert summary["training"]["steps"] == 16

    image = str(next((images / "test" / "dark").iterdir()))
    classify = pipeline("image-classification", str(tmp_path / "run"))
    assert classify(image)[0]["label"] == "dark"
    encoder = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert encoder[1].pooling_mode == "cls"
    transparent = Image.open(image).convert("RGBA")
    transparent.putalpha(128)
    assert encoder.encode([Image.open(image), transparent]).shape == (2, 32)


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2), "mean"),
        (BeitConfig(image_size=16, patch_size=4, **SIZES, use_mean_pooling=True), "mean"),
        (BeitConfig(image_size=16, patch_size=4, **SIZES, use_mean_pooling=False), "cls"),
    ],
    ids=["swin", "beit", "beit of a class token"],
)
def test_the_encoder_pools_as_the_classifier(config: Any, mode: str, model: Path, tmp_path: Path) -> None:
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    shutil.copy(model / "preprocessor_config.json", tmp_path)
    encoder = train_vit.as_encoder(tmp_path)
    assert encoder[1].pooling_mode == mode
    assert encoder.encode([Image.new("RGB", (16, 16))]).shape == (1, config.hidden_size)


@pytest.mark.parametrize("config", [CLIPConfig(), SiglipConfig(), ResNetConfig()], ids=["clip", "siglip", "resnet"])
def test_what_is_no_encoder_of_one_width_is_refused_before_training(
    config: Any, run: Run, model: Path, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "model")
    shutil.copy(model / "preprocessor_config.json", tmp_path / "model")
    with pytest.raises(SystemExit, match=f"error: model .* is a {config.model_type}, .* Fix: give one encoder of images"):
        run("--model", tmp_path / "model")


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path) -> None:
    run("--num_train_epochs", 2)
    first, last = (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors" for step in (4, 8))
    last.parent.rename(tmp_path / "gone")  # as if killed after the first epoch
    last.parent.mkdir()  # and while writing the second one's checkpoint
    before = first.stat().st_mtime_ns
    assert run("--num_train_epochs", 2)["training"]["steps"] == 8
    assert first.stat().st_mtime_ns == before
    assert last.read_bytes() == (tmp_path / "gone" / "model.safetensors").read_bytes()


def test_what_is_transparent_is_filled_as_at_inference(model: Path, tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 128))
    for path in (tmp_path / split / name / "1.png" for split in ("train", "test") for name in "ab"):
        path.parent.mkdir(parents=True)
        image.save(path)
    processor = AutoImageProcessor.from_pretrained(model, do_convert_rgb=True)
    images = train_vit.prepared(read_labelled_images(tmp_path, ("train",))["train"], processor)
    assert torch.equal(images[0]["pixel_values"], processor(image, return_tensors="pt")["pixel_values"][0])


def test_an_image_of_more_than_8_bits_is_refused() -> None:
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    deep = Image.fromarray(np.ones((4, 4), np.uint16))
    images = train_vit.prepared(Dataset.from_dict({"image": [deep], "label": [0]}, features), None)
    with pytest.raises(ValueError, match=r"more than 8 bits a channel \(mode I;16\)\. Fix: convert it"):
        images[0]


def test_crops_keep_most_of_the_image() -> None:
    image = Image.fromarray(np.arange(40 * 60, dtype=np.uint16).reshape(40, 60).astype(np.uint8))
    sizes = {train_vit.augment(image, 0.5).size for _ in range(50)}
    assert len(sizes) > 10
    assert all(30 <= width <= 60 and 20 <= height <= 40 for width, height in sizes)
    assert np.array_equal(np.sort(train_vit.augment(image, 1), None), np.sort(image, None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", ""], "--model is missing"),
        (["--images", "nowhere"], "nowhere cannot be read as images"),
        (["--images", "{folder}"], "lacks train.parquet or train/CLASS/"),
        (["--test_split", "dev"], "lacks dev.parquet or dev/CLASS/"),
        (["--smallest_crop", "0"], "smallest_crop=0.0 is not allowed"),
        (["--model", "{folder}"], "preprocessor_config.json"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*(flag.format(folder=tmp_path) for flag in flags))
    assert message in str(stop.value)
    assert str(stop.value).startswith("error: ")
    assert "\n" not in str(stop.value)
