"""One distillation from start to end: teacher and texts or images in, packed model out."""

import copy
import ctypes
import logging
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments, set_seed

from ..files import read_json
from ..hub import check_target, make_repository, push_to_hub, save_pretrained
from ..provenance import provenance, weights, write_json
from .arguments import DistillArguments
from .calibrate import compensate, fit_dense
from .data import Corpus
from .health import plot
from .images import ImageCollator, Images, read_images
from .student import Encoder, add_dense, continue_from, fix_codes, load_teacher, make_student, pack_student, transformer_of
from .texts import Collator, TokenizedTexts, read_corpus
from .trainer import DistillTrainer, claim, last_checkpoint

logger = logging.getLogger(__name__)

# Options that the summary records; models and data are told by name and hash, as paths mean nothing elsewhere.
OWN_OPTIONS = {field.name for field in fields(DistillArguments)} - {field.name for field in fields(TrainingArguments)}
OWN_OPTIONS -= {"teacher", "student", "base_model", "texts", "images"}
TRAINER_OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "optim",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
    "data_seed",
)

# What may change when a run goes on: its length, and how it is computed.
CHANGEABLE = ("max_steps", "num_train_epochs", "attn_implementation", "calibration_texts", "dense_texts")


def distill(args: DistillArguments, corpus: Corpus | None = None) -> SentenceTransformer:
    """Distil a ternary model, resuming from the last whole checkpoint of ``args.output_dir`` if there is one.

    Args:
        args: every option.
        corpus: what was read already, instead of ``args.texts`` or ``args.images``.

    Returns:
        The packed model. ``output_dir`` holds it in ``model/``, and beside it the log, a plot and ``summary.json``.

    Raises:
        ValueError: options, data, teacher or tokenizer that do not fit; the message names the fix.
        FloatingPointError: the loss became NaN or infinite; the message names the step and the inputs.
        OSError: a checkpoint or the model could not be written; the last whole checkpoint is intact. Or the Hub refused.
    """
    args = copy.copy(args)  # some are set below
    keep_freed_memory()
    set_seed(args.seed)
    started = time.perf_counter()
    output = Path(args.output_dir or "runs/distill")
    check_target(output / "model")
    repository, args.push_to_hub = _repository(args), False  # the trainer would push its checkpoints
    checkpoint = args.resume_from_checkpoint or last_checkpoint(output)
    args.eval_on_start &= checkpoint is None
    teacher = load_teacher(args.teacher, args.max_length, "image" if args.images else "text")
    config = args.ternary_config()
    student = make_student(teacher, config, args.learned_scale, args.attn_implementation)
    if args.dense:
        add_dense(student)
    complete = continue_from(student, args.student, config) if args.student else False

    corpus = corpus or _read(args)
    claim(output, checkpoint, _made_from(args, corpus), args.process_index == 0)
    train, held_out, collate = _images(teacher, corpus) if args.images else _texts(teacher, corpus, args.max_length)
    trainer = DistillTrainer(
        Encoder(student, args.relation_modules),
        Encoder(teacher, args.relation_modules),
        args,
        train,
        held_out,
        collate,
    )
    encoders = trainer.student, trainer.teacher
    if checkpoint is None:
        batches = trainer.calibration_batches(args.calibration_texts)
        if args.init == "compensated" and not args.student:
            compensate(*encoders, batches)
        if args.dense and not complete:
            with trainer.accelerator.autocast():  # as the training computes
                fit_dense(*encoders, batches)
    if args.fixed_codes:
        fix_codes(student)
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.dense_texts:
        with trainer.accelerator.autocast():
            fit_dense(*encoders, trainer.calibration_batches(args.dense_texts))

    fidelity = trainer.evaluate() if args.dense_texts else _fidelity(trainer)
    if trainer.is_world_process_zero():
        try:
            plot(trainer.state.log_history, output / "health.png")
        except ImportError:
            logger.warning('no plot of the run: it needs matplotlib (pip install "hf_ternary[train]")')
    packed = pack_student(student, config)
    if trainer.is_world_process_zero():
        base_model = args.base_model or (None if Path(args.teacher).is_dir() else args.teacher)
        summary = _summary(args, corpus, train, trainer, fidelity, time.perf_counter() - started)
        save_pretrained(packed.cpu(), output / "model", base_model=base_model, training=summary)
        write_json(output / "summary.json", {"weights": weights(output / "model"), **summary})
        if repository:
            push_to_hub(output / "model", repository, private=args.hub_private_repo, token=args.hub_token)
    return packed


def _repository(args: DistillArguments) -> str | None:
    """Where the model is to be pushed; made now, as hours of work are to end there."""
    if not args.push_to_hub or args.process_index:
        return None
    name = args.hub_model_id or Path(args.output_dir or "").name
    return make_repository(name, args.hub_private_repo, args.hub_token)


def _fidelity(trainer: DistillTrainer) -> dict[str, float]:
    """Of the last step; measured now unless that was done during training."""
    for entry in reversed(trainer.state.log_history):
        if "eval_cosine" in entry and entry["step"] == trainer.state.global_step:
            return {name: value for name, value in entry.items() if name.startswith("eval_cosine")}
    return trainer.evaluate()


def _made_from(args: DistillArguments, corpus: Corpus) -> dict[str, Any]:
    """What decides the outcome of a run but its length."""
    options = {name: value for name, value in _options(args).items() if name not in CHANGEABLE}
    sources = {f"source {number}": source for number, source in enumerate(corpus.sources, 1)}
    student = {"student": weights(args.student)} if args.student else {}
    return {**options, **sources, "teacher": weights(args.teacher), **student}


def _options(args: DistillArguments) -> dict[str, Any]:
    return {name: value for name, value in args.to_dict().items() if name in OWN_OPTIONS or name in TRAINER_OPTIONS}


def _read(args: DistillArguments) -> Corpus:
    if args.images:
        return read_images(args.images, args.eval_texts, args.seed)
    words = (args.passage_words[0], args.passage_words[1])
    return read_corpus(args.texts, args.eval_texts, args.passage_share, words, args.seed)


def _texts(
    teacher: SentenceTransformer, corpus: Corpus, max_length: int | None
) -> tuple[TokenizedTexts, TokenizedTexts, Collator]:
    train, held_out = (TokenizedTexts.of(texts, teacher, max_length) for texts in (corpus.train, corpus.held_out))
    return train, held_out, Collator(teacher.tokenizer.pad_token_id or 0)


@torch.no_grad()
def _images(teacher: SentenceTransformer, corpus: Corpus) -> tuple[Images, Images, ImageCollator]:
    first = teacher.processor(images=[corpus.train[0].decode()], return_tensors="pt")
    tokens = transformer_of(teacher)(first["pixel_values"]).last_hidden_state.shape[1]
    return Images(corpus.train, tokens), Images(corpus.held_out, tokens), ImageCollator(teacher.processor, tokens)


def keep_freed_memory() -> None:
    """Tell glibc not to give large freed blocks back to the system: the next step would fault their pages in again.

    No-op with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _summary(
    args: DistillArguments,
    corpus: Corpus,
    train: TokenizedTexts | Images,
    trainer: DistillTrainer,
    fidelity: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What the model was made from and how: enough to make it again."""
    done = trainer.batches.batches[: trainer.state.global_step * args.gradient_accumulation_steps]
    tokens = sum(int(train.lengths[batch].sum()) for batch in done)
    return {
        "teacher": args.base_model or Path(args.teacher).name,
        **({"student": weights(args.student), "earlier": _earlier_runs(args.student)} if args.student else {}),
        "options": _options(args),
        "sources": corpus.sources,
        train.kind: {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "seconds_of_last_session": round(seconds, 1),
        "fidelity": fidelity,
        "curve": [entry for entry in trainer.state.log_history if "eval_cosine" in entry],
        **provenance(args.seed),
    }


def _earlier_runs(student: str) -> list[dict[str, Any]]:
    """Summaries of the runs that made ``student``, the first one first, as far as they lie beside it."""
    last = read_json(Path(student).parent / "summary.json")
    return [*last.pop("earlier", []), last] if last.get("weights") == weights(student) else []
