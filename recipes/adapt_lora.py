"""Adapt a packed ternary model to a domain: LoRA adapters on its frozen weights, trained on pairs of texts.

    python recipes/adapt_lora.py --config recipes/configs/lora/cranfield.yaml [--any_field value ...]

A flag overrides the yaml file. Run it again after a stop: it goes on from the last checkpoint in output_dir. In the end
`output_dir/adapter` holds the adapter alone, a few hundred kB that every copy of the model can load:

    model = SentenceTransformer("all-MiniLM-L6-v2-ternary")
    model.load_adapter("output_dir/adapter")  # or a Hub id

and `output_dir/summary.json` the scores before and after on the tasks of `eval_data`.
"""

import hashlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy, SchedulerType

from hf_ternary.distill.trainer import claim, last_checkpoint
from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.files import read_jsonl
from hf_ternary.evaluation.report import compare, evaluate
from hf_ternary.evaluation.tasks import local_tasks
from hf_ternary.provenance import PACKAGES, provenance, weights, write_json
from options import parse

try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before sentence-transformers 6
    from sentence_transformers.losses import MultipleNegativesRankingLoss

# Options that decide the outcome: a stopped run goes on only with the same.
SETTING = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "max_length", "scale", "seed")


@dataclass
class AdaptArguments(SentenceTransformerTrainingArguments):
    """Options of the recipe; a yaml file or flags set them, as those of sentence-transformers' trainer."""

    model: str = field(default="", metadata={"help": "packed ternary model: a Hub id or folder"})
    base_model: str | None = field(default=None, metadata={"help": "its Hub id, for the adapter's config [default: model]"})
    pairs: str = field(default="", metadata={"help": "jsonl file, gzipped or not, or datasets id"})
    anchor: str = field(default="title", metadata={"help": "column of the text that asks"})
    positive: str = field(default="text", metadata={"help": "column of the text to be found; the batch's others are not"})
    max_length: int | None = field(default=None, metadata={"help": "longest text in training, in tokens [the model's]"})

    rank: int = field(default=8, metadata={"help": "of the adapters"})
    alpha: int = field(default=16, metadata={"help": "adapters are scaled by alpha / rank"})
    dropout: float = field(default=0.05, metadata={"help": "of the adapters' input"})
    target_modules: list[str] = field(
        default_factory=lambda: ["query", "key", "value"], metadata={"help": "ends of the names of the layers to adapt"}
    )
    scale: float = field(default=20.0, metadata={"help": "of the cosines in the loss, an inverse temperature"})

    eval_data: str | None = field(default=None, metadata={"help": "folder of tasks to measure before and after"})
    eval_tasks: list[str] | None = field(default=None, metadata={"help": "only these of them"})

    # Other defaults than the trainer's.
    output_dir: str | None = field(default="runs/lora", metadata={"help": "checkpoints; the adapter in adapter/"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up: steps, or a share of them below 1"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the pairs; max_steps overrides it"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "pairs a batch, each other's negatives"})
    logging_steps: float = field(default=5, metadata={"help": "steps between lines of the log"})
    save_strategy: SaveStrategy | str = field(default="epoch", metadata={"help": "when to write a checkpoint"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "packed weights never change"})
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, ..."})


def read_pairs(source: str, anchor: str, positive: str) -> Dataset:
    """Pairs, those with an empty side left out.

    Raises:
        ValueError: no such file or column, or no pair is left.
    """
    if ".jsonl" in Path(source).suffixes:
        if not Path(source).exists():
            raise ValueError(f"{source} does not exist; give a jsonl file, gzipped or not, or a datasets id")
        rows: Any = read_jsonl(Path(source), (anchor, positive))
    else:
        rows = load_dataset(source, split="train").select_columns([anchor, positive])
    pairs = [{"anchor": row[anchor], "positive": row[positive]} for row in rows if row[anchor] and row[positive]]
    if not pairs:
        raise ValueError(f"{source} holds no pair of a {anchor!r} and a {positive!r} that are not empty")
    return Dataset.from_list(pairs)


def adapt(options: AdaptArguments) -> dict[str, Any]:
    """Train the adapter, save it, and measure what it changes; returns the summary."""
    set_seed(options.seed)
    output = Path(options.output_dir or "")
    pairs = read_pairs(options.pairs, options.anchor, options.positive)
    measure(options, None)  # a task that cannot be read is found before the training
    model = SentenceTransformer(options.model, device=str(options.device))
    base = weights(options.model)
    before = measure(options, model)
    model.add_adapter(
        LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
        )
    )
    longest, model.max_seq_length = model.max_seq_length, options.max_length or model.max_seq_length
    loss = MultipleNegativesRankingLoss(model, scale=options.scale)
    trainer = SentenceTransformerTrainer(model, options, train_dataset=pairs, loss=loss)
    adapter = {name: getattr(options, name) for name in ("rank", "alpha", "dropout", "target_modules")}
    told = {
        "source": "/".join(Path(options.pairs).parts[-2:]),
        "columns": [options.anchor, options.positive],
        "count": len(pairs),
        "sha256": hashlib.sha256(repr(pairs[:]).encode()).hexdigest(),
    }
    setting = {name: getattr(options, name) for name in SETTING} | {"batch": options.train_batch_size * options.world_size}
    checkpoint = last_checkpoint(output)
    claim(output, checkpoint, {"model": base, "adapter": adapter, "pairs": told, **setting}, options.process_index == 0)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    model.max_seq_length = longest
    model.eval()
    summary = {
        "model": options.base_model or Path(options.model).name,
        "weights": base,
        "adapter": {**adapter, "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)},
        "pairs": told,
        "training": {
            "steps": outcome.global_step,
            "epochs": options.num_train_epochs,
            **setting,
            "seconds_of_last_session": outcome.metrics["train_runtime"],
        },
    }
    if trainer.is_world_process_zero():
        summary["adapter"]["bytes"] = save_adapter(model, options.base_model, output / "adapter")
        summary["scores"] = compare(measure(options, model), before) if before else []
        summary |= provenance(options.seed, (*PACKAGES, "peft"))
        write_json(output / "summary.json", summary)
    return summary


def measure(options: AdaptArguments, model: SentenceTransformer | None) -> list[dict[str, Any]]:
    """Scores on the tasks of ``eval_data``; without a model the tasks are only read."""
    if options.eval_data is None:
        return []
    tasks = local_tasks(options.eval_data, options.eval_tasks)
    return evaluate(CachedEncoder(model), tasks, options.per_device_eval_batch_size) if model else []


def save_adapter(model: SentenceTransformer, base_model: str | None, folder: Path) -> int:
    """Save the adapter alone; returns the bytes of its weights."""
    transformer: Any = model.transformers_model
    transformer.save_pretrained(folder)
    if base_model:  # named only now: PEFT looks into the model of this name while it saves
        config = transformer.peft_config["default"]
        config.base_model_name_or_path = base_model
        config.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def main() -> None:
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        options = parse(AdaptArguments, sys.argv[1:], __doc__, needed=("model", "pairs"))
        summary = adapt(options)
        for score in summary.get("scores", []):
            print(f"{score['task']}: {score['metric']} {score['baseline']:.4f} -> {score['score']:.4f}")
        print(f"the adapter is in {options.output_dir}/adapter")
    except (ValueError, ImportError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
