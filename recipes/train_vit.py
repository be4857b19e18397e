"""Fine-tune an image encoder to classify images: a teacher for recipes/distill.py that knows your classes.

    python recipes/train_vit.py --config recipes/configs/vit/cifar10.yaml [--any_field value ...]

A flag overrides the yaml file. Run it again after a stop: it goes on from the last checkpoint in output_dir. In the end
`output_dir` holds the classifier, `output_dir/model` its encoder as a SentenceTransformer (an image's embedding is what the
classifier reads: its class token, or the mean of all), and `output_dir/summary.json` the accuracy on the test images.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DefaultDataCollator,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy, SchedulerType

from hf_ternary.distill.run import keep_freed_memory
from hf_ternary.distill.student import pooling_mode
from hf_ternary.distill.trainer import claim, last_checkpoint
from hf_ternary.evaluation.files import check_depth, read_labelled_images
from hf_ternary.provenance import PACKAGES, provenance, weights, write_json
from options import parse

# Options that decide the outcome: a stopped run goes on only with the same.
SETTING = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "smallest_crop", "seed")


@dataclass
class VitArguments(TrainingArguments):
    """Options of the recipe; a yaml file or flags set them, as those of transformers' trainer."""

    model: str = field(default="", metadata={"help": "image encoder: a Hub id or folder"})
    images: str = field(default="", metadata={"help": "folder of an image classification task, or a datasets id"})
    test_split: str = field(default="test", metadata={"help": "split to measure accuracy on; `train` is trained on"})
    smallest_crop: float = field(default=0.8, metadata={"help": "shortest side of a random crop, as a share of the image's"})
    attn_implementation: str | None = field(default=None, metadata={"help": "'eager' is the fastest on a CPU"})

    # Other defaults than the trainer's.
    output_dir: str | None = field(default="runs/vit", metadata={"help": "checkpoints, classifier; the encoder in model/"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: SchedulerType | str = field(default="linear", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up: steps, or a share of them below 1"})
    weight_decay: float = field(default=0.05, metadata={"help": "of AdamW"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "images a batch"})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "images a batch"})
    logging_steps: float = field(default=20, metadata={"help": "steps between lines of the log"})
    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "when to write a checkpoint"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False"})
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, ..."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop={self.smallest_crop} is not allowed: use a share above 0, up to 1")


def train(options: VitArguments) -> dict[str, Any]:
    """Train the classifier, save it and its encoder, and measure it; returns the summary."""
    keep_freed_memory()
    set_seed(options.seed)
    output = Path(options.output_dir or "")
    data = read_labelled_images(options.images, ("train", options.test_split))
    names = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(options.model)
    processor.do_convert_rgb = True  # ViT's own fails on an image that is grey or transparent
    check_encoder(options.model)
    checkpoint = last_checkpoint(output)
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint or options.model,  # the trainer itself reads only weights whose names the model class has not changed
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a classifier of other classes is replaced
        attn_implementation=options.attn_implementation,
    )
    trainer = Trainer(
        model,
        options,
        DefaultDataCollator(),
        prepared(data["train"], processor, lambda image: augment(image, options.smallest_crop)),
        prepared(data[options.test_split], processor),
        compute_metrics=accuracy,
        processing_class=processor,
    )
    source = {"source": Path(options.images).name, **{split: len(images) for split, images in data.items()}}
    setting = {name: getattr(options, name) for name in SETTING} | {"batch": options.train_batch_size * options.world_size}
    made_from = {"model": weights(options.model), "images": source, "classes": names, **setting}
    claim(output, checkpoint, made_from, options.process_index == 0)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    summary = {
        "model": Path(options.model).name,
        "images": source,
        "classes": names,
        "accuracy": metrics["eval_accuracy"],
        "training": {
            "steps": outcome.global_step,
            "epochs": options.num_train_epochs,
            **setting,
            "seconds_of_last_session": outcome.metrics["train_runtime"],
        },
    }
    if trainer.is_world_process_zero():
        encoder = as_encoder(output)
        encoder.save_pretrained(str(output / "model"))
        summary |= {"weights": weights(output / "model"), **provenance(options.seed, (*PACKAGES, "pillow"))}
        write_json(output / "summary.json", summary)
    return summary


def check_encoder(model: str) -> None:
    """Raises ValueError for a model of which no encoder of one width can be kept."""
    config = AutoConfig.from_pretrained(model)
    if not hasattr(config, "hidden_size"):
        raise ValueError(
            f"model {model} is a {config.model_type}, which has no one hidden_size: CLIP and SigLIP are two encoders, and "
            "convolutions have many widths. Fix: give one encoder of images, such as a ViT, DINOv2, BEiT or Swin"
        )


def prepared(images: Dataset, processor: Any, change: Callable[[Image.Image], Image.Image] = lambda image: image) -> Dataset:
    """The images as the model reads them, ``pixel_values`` float32 [3, height, width], made anew each time one is read."""

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        for image in rows["image"]:
            check_depth(image)
        pixels = processor([change(image) for image in rows["image"]], return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"], "labels": rows["label"]}

    return images.with_transform(transform)


def augment(image: Image.Image, smallest: float) -> Image.Image:
    """A random crop, mirrored half of the time. Drawn by torch, whose random state a checkpoint holds."""
    share, left, top, mirror = torch.rand(4).tolist()
    width, height = (round(side * (smallest + (1 - smallest) * share)) for side in image.size)
    left, top = round(left * (image.width - width)), round(top * (image.height - height))
    crop = image.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else crop


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def as_encoder(classifier: Path) -> SentenceTransformer:
    """The classifier without its head; an image's embedding is the class token of the last layer, or the mean of all."""
    transformer = Transformer(str(classifier))
    pooling = Pooling(transformer.model.config.hidden_size, pooling_mode(transformer.model))
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def main() -> None:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        options = parse(VitArguments, sys.argv[1:], __doc__, needed=("model", "images"))
        print(f"accuracy {train(options)['accuracy']:.4f}; the encoder is in {options.output_dir}/model")
    except (ValueError, ImportError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
