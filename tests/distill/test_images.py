"""Image encoders distil by the code for text: what differs is read, pooled, saved and refused as it should be."""

import hashlib
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sentence_transformers", minversion="6", reason="images need sentence-transformers 6")
pytest.importorskip("PIL", reason="images need Pillow")
pytest.importorskip("datasets", reason='reading images needs datasets: pip install "hf_ternary[train]"')

import datasets
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, SwinConfig

from hf_ternary import TernaryConfig, save_pretrained
from hf_ternary.distill import DistillArguments, distill, read_images
from hf_ternary.distill.calibrate import compensate
from hf_ternary.distill.images import ImageCollator, Images
from hf_ternary.distill.student import Encoder, load_teacher, make_student, pack_student, ternary_layers, transformer_of
from tests.distill.conftest import KILL, log, weights

Options = Callable[..., dict[str, Any]]

PROCESSORS = {
    "vit": "ViTImageProcessor",
    "dinov2": "BitImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
}
MODELS = list(PROCESSORS)
MODES = ["RGB", "L", "RGBA", "CMYK", "P"]


def make_image(seed: int, mode: str = "RGB") -> Image.Image:
    """A square of random colour with a band of another."""
    low, high = np.random.default_rng(seed).integers(0, 256, (2, 3))
    pixels = np.broadcast_to(low, (20, 20, 3)).astype(np.uint8).copy()
    pixels[:, seed % 16 : seed % 16 + 4] = high
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `datasets` keeps what it has read, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of every mode, in a folder for each of two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(120):
        mode = MODES[i % len(MODES)]
        path = root / f"class{i % 2}" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        path.parent.mkdir(exist_ok=True)
        make_image(i, mode).save(path)
    return root


def save_processor(path: Path, name: str) -> None:
    """An image processor that makes images of 16 pixels."""
    size = {"height": 16, "width": 16}
    processor = {"image_processor_type": name, "size": size, "crop_size": size}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny random model of a type, for images of 16 pixels (17 tokens at most), with its processor."""
    root = tmp_path_factory.mktemp("teachers")

    def make(model_type: str) -> str:
        path = root / model_type
        if path.exists():
            return str(path)
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = AutoConfig.for_model(model_type, image_size=16, patch_size=4, **sizes)
        model = AutoModel.from_config(config)
        for parameter in model.parameters():  # as they are, the layers hardly change the embeddings; but SigLIP's are large
            if parameter.ndim == 2 and model_type != "siglip_vision_model":
                parameter.data *= 10
        model.save_pretrained(path)
        save_processor(path, PROCESSORS.get(model_type, "ViTImageProcessor"))
        return str(path)

    return make


@pytest.fixture
def options(teachers: Callable[[str], str], folder: Path, tmp_path: Path) -> Options:
    """Options of a run of 12 steps; ``options(learning_rate=1e-3)`` changes some."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "teacher": teachers("dinov2"),
            "images": [str(folder)],
            "output_dir": str(tmp_path / "run"),
            "batch_tokens": 17 * 16,
            "max_steps": 12,
            "eval_texts": 12,
            "eval_steps": 6,
            "save_steps": 6,
            "logging_steps": 3,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }

    return make


def pixels(model: SentenceTransformer, count: int = 5) -> dict[str, torch.Tensor]:
    images = [make_image(i) for i in range(count)]
    values = model.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens = transformer_of(model)(values).last_hidden_state.shape[1]
    return {"pixel_values": values, "attention_mask": torch.ones(count, tokens, dtype=torch.int64)}


@pytest.mark.parametrize("model_type", MODELS)
def test_packed_and_reloaded_equals_the_training_forward(teachers: Callable[[str], str], tmp_path: Path, model_type: str):
    config = TernaryConfig(modules_to_not_convert=[])
    student = make_student(load_teacher(teachers(model_type), modality="image"), config)
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn_like(parameter)
    batch = pixels(student)
    with torch.no_grad():
        wanted = Encoder(student)(**batch)
    save_pretrained(pack_student(student, config), tmp_path / "model")
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    images = [make_image(i) for i in range(5)]
    got = loaded.encode(images, convert_to_tensor=True)
    assert F.cosine_similarity(got, wanted["embedding"]).min() > 0.998  # a native encoder has its own softmax and GELU
    plain = AutoModel.from_pretrained(tmp_path / "model")
    output = plain(batch["pixel_values"], output_hidden_states=True)  # module by module, as gradients are on
    # SigLIP's last hidden state is normalised; the losses compare what its last layer returns, as CLIP's.
    states = output.hidden_states[-1] if model_type == "siglip_vision_model" else output.last_hidden_state
    torch.testing.assert_close(states.detach(), wanted["hidden"][-1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        got = Encoder(loaded)(**batch)["embedding"]
    torch.testing.assert_close(got, wanted["embedding"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", [*MODELS, "chinese_clip_vision_model", "mlcd_vision_model", "ijepa", "beit"])
def test_a_plain_model_is_pooled_as_it_was_made_to_be(teachers: Callable[[str], str], model_type: str):
    teacher = load_teacher(teachers(model_type), modality="image")
    batch = pixels(teacher)
    with torch.no_grad():
        got = Encoder(teacher)(**batch)["embedding"]
        output = teacher[0].auto_model(batch["pixel_values"])
    states = output.last_hidden_state
    mean = dict.fromkeys(["ijepa", "beit"], states.mean(1))
    wanted = output.pooler_output if model_type.endswith("vision_model") else mean.get(model_type, states[:, 0])
    torch.testing.assert_close(got, wanted)
    assert teacher.get_embedding_dimension() == got.shape[1]


def test_a_sentence_transformer_keeps_its_pooling(teachers: Callable[[str], str], tmp_path: Path):
    SentenceTransformer(teachers("vit"), device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    assert load_teacher(str(tmp_path), modality="image")[1].pooling_mode == "mean"


@pytest.mark.parametrize("model_type", MODELS)
def test_a_run_makes_a_loadable_model_that_is_closer_to_the_teacher(
    options: Options, teachers: Callable[[str], str], folder: Path, model_type: str
):
    run = options(
        teacher=teachers(model_type),
        max_steps=30,
        eval_steps=30,
        learning_rate=1e-3,
        hidden_weight=0.5,
        gram_weight=0.5,
        ranking_weight=0.1,
        gradual=0.2,
        bf16=True,
        attn_implementation="eager",
        dataloader_num_workers=1,
    )
    distill(DistillArguments(**run))
    cosines = [entry["eval_cosine"] for entry in log(run) if "eval_cosine" in entry]
    assert cosines[-1] > cosines[0]
    assert any(entry.get("tokens_per_second", 0) > 0 for entry in log(run))
    path = Path(run["output_dir"]) / "model"
    model = SentenceTransformer(str(path), device="cpu")
    assert model.encode([make_image(0, mode) for mode in MODES]).shape == (len(MODES), 32)
    summary = json.loads((path.parent / "summary.json").read_text())
    (source,) = summary["sources"]
    assert (source["source"], source["images"], len(source["sha256"])) == (folder.name, 120, 64)
    assert summary["images"] == {"train": 108, "held_out": 12}
    card = (path / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert 'model.encode(["one.jpg", "another.jpg"])' in card
    assert "entence." not in card


def test_kill_and_resume_give_the_bits_of_an_undisturbed_run(options: Options, tmp_path: Path):
    undisturbed, killed = options(), options(output_dir=str(tmp_path / "killed"))
    distill(DistillArguments(**undisturbed))
    process = subprocess.run([sys.executable, "-c", KILL, json.dumps(killed)], capture_output=True, text=True, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr
    distill(DistillArguments(**killed))
    wanted, got = weights(undisturbed), weights(killed)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_compensated_student_starts_closer_to_its_teacher(teachers: Callable[[str], str]):
    teacher = load_teacher(teachers("dinov2"), modality="image")
    encoders = Encoder(make_student(teacher, TernaryConfig())), Encoder(teacher)
    batch = pixels(teacher, 160)
    batches = [{name: value[i : i + 32] for name, value in batch.items()} for i in range(0, 160, 32)]

    def fidelity() -> float:
        with torch.no_grad():
            student, wanted = (e(**batches[-1])["hidden"][-1].flatten(0, 1) for e in encoders)
        return F.cosine_similarity(student, wanted).mean().item()

    before = fidelity()
    compensate(*encoders, batches[:-1])
    assert 1 - fidelity() < 0.8 * (1 - before)


def test_a_layer_that_sees_another_token_is_not_compensated(teachers: Callable[[str], str]):
    teacher = load_teacher(teachers("siglip_vision_model"), modality="image")
    student = Encoder(make_student(teacher, TernaryConfig(modules_to_not_convert=[])))
    before = {name: layer.weight.clone() for name, layer in ternary_layers(student).items()}
    compensate(student, Encoder(teacher), [pixels(teacher, 32)])
    same = {name for name, layer in ternary_layers(student).items() if torch.equal(layer.weight, before[name])}
    assert same == {name for name in before if ".head." in name}
    assert 0 < len(same) < len(before)


def test_layers_of_other_tokens_are_refused(options: Options, tmp_path: Path):
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    AutoModel.from_config(config).save_pretrained(tmp_path / "swin")
    save_processor(tmp_path / "swin", "ViTImageProcessor")
    with pytest.raises(ValueError, match=r"hidden states of shape \(\d+, 64, 8\), but 16 tokens .* Fix: use a teacher"):
        distill(DistillArguments(**options(teacher=str(tmp_path / "swin"), batch_tokens=16 * 16)))


def to_parquet(path: Path, column: str, values: list[Any], declared: bool = False) -> str:
    table = datasets.Dataset.from_dict({"label": range(len(values)), column: values})
    if declared:
        table = table.cast_column(column, datasets.Image())
    table.to_parquet(path)
    return str(path)


def encoded(image: Image.Image, path: Path) -> bytes:
    image.save(path)
    return path.read_bytes()


def test_sources_give_images_a_weight_is_a_number_of_passes(folder: Path, tmp_path: Path):
    stored = [encoded(make_image(200 + i, MODES[i % 3]), tmp_path / "a.png") for i in range(80)]
    plain = to_parquet(tmp_path / "plain.parquet", "image", stored[:40])
    declared = to_parquet(tmp_path / "declared.parquet", "picture", stored[40:], declared=True)
    corpus = read_images([f"{folder}=0.5", f"{plain}=2", declared], 9, seed=0)
    assert [(source["images"], source["weight"]) for source in corpus.sources] == [(120, 0.5), (40, 2), (40, 1)]
    assert (len(corpus.train), len(corpus.held_out)) == (round(117 * 0.5) + 2 * 37 + 37, 9)
    assert {picture.decode().mode for picture in corpus.train} == set(MODES)
    assert not {str(picture) for picture in corpus.train} & {str(picture) for picture in corpus.held_out}
    assert [str(p) for p in read_images([plain], 4, seed=0).train] == [str(p) for p in read_images([plain], 4, seed=0).train]


def test_what_is_held_out_is_not_trained_on_whatever_its_name(tmp_path: Path):
    images = save_images(tmp_path / "images", [f"{i}.png" for i in range(20)])
    stored = [Path(images, f"{i}.png").read_bytes() for i in range(20)]
    again = to_parquet(tmp_path / "again.parquet", "image", stored * 2)
    corpus = read_images([images, f"{again}=2"], 4, seed=0)
    unseen = {picture.digest() for picture in corpus.held_out}
    assert 2 < len(unseen) <= 4
    counts = Counter(picture.digest() for picture in corpus.train)
    assert not counts.keys() & unseen
    assert counts == dict.fromkeys({hashlib.sha256(image).digest() for image in stored} - unseen, 5)


def save_images(root: Path, names: list[str]) -> str:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(number).save(root / name)
    return str(root)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["bus/1.png", "car/2.png", "train/3.png"], "123"),
        (["steam-train.png", "photo1.png", ".hidden2.png"], "n1"),
        (["ILSVRC2012_val_1.png", "ILSVRC2012_val_2.png"], "12"),
        (["train/cats/1.png", "train/dogs/2.png", "test/cats/3.png", ".hidden4.png"], "12"),
    ],
)
def test_only_a_folder_of_several_splits_is_read_in_part(names: list[str], read: str, tmp_path: Path):
    corpus = read_images([save_images(tmp_path, names)], 0, seed=0)
    assert {Path(str(picture)).stem[-1] for picture in corpus.train} == set(read)


def test_images_beside_the_splits_are_refused(tmp_path: Path):
    save_images(tmp_path, ["train/1.png", "test/2.png", "bus/3.png"])
    with pytest.raises(ValueError, match=r"splits train, test by its names, and 1 images in none .* first bus/3\.png\. Fix"):
        read_images([str(tmp_path)], 0, seed=0)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_one_pixel(teachers: Callable[[str], str], model_type: str, mode: str):
    teacher = load_teacher(teachers(model_type), modality="image")
    assert teacher.encode([Image.new(mode, (1, 1)), make_image(0)]).shape == (2, 32)


def test_what_is_transparent_is_filled_as_at_inference(teachers: Callable[[str], str], tmp_path: Path):
    image = make_image(0)
    image.putalpha(128)
    image.save(tmp_path / "half.png")
    teacher = load_teacher(teachers("vit"), modality="image")
    read = Images(read_images([str(tmp_path)], 0, seed=0).train, 17)
    got = ImageCollator(teacher.processor, 17)([read[0]])["pixel_values"]
    assert torch.equal(got, teacher[0].preprocess([Image.open(tmp_path / "half.png")])["pixel_values"])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_8_bits_is_named(dtype: Any, tmp_path: Path):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "deep.tiff")
    (picture,) = read_images([str(tmp_path)], 0, seed=0).train
    with pytest.raises(ValueError, match=r"deep\.tiff has more than 8 bits .* Fix: convert it to 8 bits first"):
        picture.decode()


def test_a_damaged_image_is_named(options: Options, tmp_path: Path):
    for i in range(8):
        make_image(i).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"5\.png cannot be decoded"):
        distill(DistillArguments(**options(images=[str(tmp_path)], batch_tokens=17 * 8, eval_texts=0)))
    stored = [encoded(make_image(0), tmp_path / "0.png")] * 3
    path = to_parquet(tmp_path / "a.parquet", "image", [stored[0], stored[0][:60], None])
    pictures = sorted(read_images([path], 0, seed=0).train, key=lambda picture: picture.row)
    pictures[0].decode()
    with pytest.raises(ValueError, match=r"image 1 of .*a\.parquet cannot be decoded"):
        pictures[1].decode()
    with pytest.raises(ValueError, match=r"image 2 of .*a\.parquet is missing"):
        pictures[2].decode()


def test_a_nan_names_the_image(options: Options):
    with pytest.raises(FloatingPointError, match=r"images of the batch: \[\d+.*the first is .*\d+\.(png|jpg)"):
        distill(DistillArguments(**options(learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0)))


def test_bad_sources_are_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nothing"):
        with pytest.raises(ValueError, match=rf"{source} is neither .*a dataset that can be had"):
            read_images([str(tmp_path / source)], 0, seed=0)
    for column, values, message in (("text", ["a"], 'no column "image"; it has label, text'), ("image", [1.5], "no images")):
        path = to_parquet(tmp_path / f"{column}.parquet", column, values)
        with pytest.raises(ValueError, match=rf"{column}\.parquet.* {message}"):
            read_images([path], 0, seed=0)
    with pytest.raises(ValueError, match="1 images are too few to hold out 4"):
        read_images([to_parquet(tmp_path / "one.parquet", "image", [b"a"])], 4, seed=0)


def test_teachers_of_something_else(
    options: Options, teachers: Callable[[str], str], tiny_sentence_transformer: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="embeds text, not image"):
        distill(DistillArguments(**options(teacher=str(tiny_sentence_transformer))))
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="embeds image, not text"):
        distill(DistillArguments(**options(images=[], texts=[str(tmp_path / "a.txt")])))
