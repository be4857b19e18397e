"""DistillTrainer: transformers' Trainer, taught what to compare, what to log and how to stop."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import read_json
from ..provenance import write_json
from . import losses
from .arguments import DistillArguments
from .data import TokenBatches, by_length
from .health import Health, write_log
from .images import ImageCollator, Images
from .student import Encoder, set_strength, ternary_layers
from .texts import Collator, TokenizedTexts

logger = logging.getLogger(__name__)

# A held-out text (or image) of more tokens counts as long.
LONG = 64

# Most losses of a device that are not read yet: reading one waits for the GPU to compute it; a CPU has done so by then.
UNREAD = {"cpu": 0, "cuda": 50}


class DistillTrainer(Trainer):
    """Trains a student :class:`Encoder` to agree with its teacher.

    Args:
        student: fake-quantized; trained in place.
        teacher: the same encoder in full precision.
        args: options; ``args.max_steps`` is set to the length of the plan.
        train, held_out: texts or images.
        collate: makes batches of them.
    """

    args: DistillArguments

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        args: DistillArguments,
        train: TokenizedTexts | Images,
        held_out: TokenizedTexts | Images,
        collate: Collator | ImageCollator,
    ) -> None:
        accumulation = args.gradient_accumulation_steps
        self.batches = TokenBatches(
            train.lengths,
            args.batch_tokens,
            args.num_train_epochs,
            args.max_steps * accumulation,
            args.data_seed,
            args.process_index,
            args.world_size,
        )
        args.max_steps = len(self.batches) // accumulation
        super().__init__(
            model=student,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
        )
        self.model_accepts_loss_kwargs = False
        self.student, self.teacher = student, teacher.to(args.device)
        self.train_data, self.held_out, self.collate = train, held_out, collate
        self.output = Path(args.output_dir or ".")
        self.weights = {name: weight for name, weight in args.loss_weights().items() if weight}
        self.health = Health(student)
        self.add_callback(_Gradual(student, args.gradual))
        self.add_callback(self.health)
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: torch.Tensor | int = 0
        self._batches, self._since = 0, time.perf_counter()
        self._unread: list[tuple[int, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]] = []
        self._teacher_held_out: torch.Tensor | None = None
        self.mean_square = self._mean_square()
        self.layers = list(range(len(self.mean_square))) if args.layers is None else args.layers
        if not set(self.layers) <= set(range(len(self.mean_square))):
            raise ValueError(f"layers={args.layers} is not allowed: the hidden states are 0 to {len(self.mean_square) - 1}")

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_data,
            batch_sampler=self.batches,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Matrices decay, learned scales have their own learning rate, biases and norms neither."""
        if self.optimizer is None:
            args = self.args
            scales: list[nn.Parameter] = []
            matrices: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for name, parameter in self.student.named_parameters():
                if parameter.requires_grad:
                    group = scales if name.endswith("weight_scale") else matrices if parameter.ndim > 1 else others
                    group.append(parameter)
            scale_rate = args.learning_rate if args.scale_learning_rate is None else args.scale_learning_rate
            groups = [
                {"params": matrices, "weight_decay": args.weight_decay},
                {"params": others, "weight_decay": 0.0},
                {"params": scales, "weight_decay": 0.0, "lr": scale_rate},
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(args)
            self.optimizer = cls([group for group in groups if group["params"]], **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The trainer's, or one that halves the learning rate ``lr_halvings`` times, after about equal numbers of steps."""
        if self.args.lr_halvings and self.lr_scheduler is None:
            halvings = self.args.lr_halvings
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(),
                lambda step: 0.5 ** min(halvings, step * (halvings + 1) // num_training_steps),
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _prepare_input(self, data: Any) -> Any:
        """As the trainer's, but what is in pinned memory is copied without waiting for the GPU."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._batches:
            self._since = time.perf_counter()
        index = inputs.pop("index")
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**inputs)
        got = model(**inputs)
        parts = self._parts(got, wanted, inputs["attention_mask"].bool())
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        parts = {name: part.detach() for name, part in parts.items()}
        self._unread.append((self.state.global_step + 1, loss.isfinite(), parts, index))
        if len(self._unread) > UNREAD.get(loss.device.type, 0):
            self._stop_at_nan()
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0) + part
        self._batches += 1
        self._tokens = self._tokens + inputs["attention_mask"].sum()
        return (loss, got) if return_outputs else loss

    def _parts(self, got: dict[str, Any], wanted: dict[str, Any], mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses in use; their gradients, averaged over the processes, are those of the whole batch."""
        parts = {}
        share = self._share_of_tokens(mask)
        student, teacher = got["hidden"], wanted["hidden"]
        if "hidden" in self.weights:
            parts["hidden"] = share * losses.hidden_error(student[-1], teacher[-1], mask) / self.mean_square[-1]
        if "layers" in self.weights:
            errors = [losses.hidden_error(student[i], teacher[i], mask) / self.mean_square[i] for i in self.layers]
            parts["layers"] = share * torch.stack(errors).mean()
        if "embedding" in self.weights:
            parts["embedding"] = losses.embedding_distance(got["embedding"], wanted["embedding"])
        if "gram" in self.weights:
            parts["gram"] = self._of_all(losses.gram_error, got, wanted)
        if "ranking" in self.weights:
            parts["ranking"] = self._of_all(losses.ranking_divergence, got, wanted)
        if "relation" in self.weights:
            heads = self.student.transformer.config.num_attention_heads
            pairs = zip(got["relations"], wanted["relations"], strict=True)
            parts["relation"] = share * torch.stack([losses.relation_divergence(s, t, mask, heads) for s, t in pairs]).mean()
        return parts

    def _share_of_tokens(self, mask: torch.Tensor) -> torch.Tensor | float:
        """This process's tokens over the mean of all processes'."""
        if self.args.world_size == 1:
            return 1.0
        counts = self.accelerator.gather(mask.sum())
        return mask.sum() / counts.float().mean()

    def _of_all(self, loss: Callable[..., torch.Tensor], got: dict[str, Any], wanted: dict[str, Any]) -> torch.Tensor:
        """``loss`` of the embeddings of the whole batch, of which those of this process carry a gradient."""
        student, teacher, processes = got["embedding"], wanted["embedding"], self.args.world_size
        if processes == 1:
            return loss(student, teacher)
        gathered = list(self.accelerator.gather(student.detach()).chunk(processes))
        gathered[self.args.process_index] = student
        value = loss(torch.cat(gathered), self.accelerator.gather(teacher))
        return value + (processes - 1) * (value - value.detach())  # averaging divides the gradient, but not the value

    def _stop_at_nan(self) -> None:
        """Before anything is logged or saved: what a step without a finite loss left is neither.

        Raises:
            FloatingPointError: a loss was NaN or infinite; it names the first such step and its inputs.
        """
        unread, self._unread = self._unread, []
        finite = torch.stack([each for _, each, _, _ in unread]).tolist() if unread else []
        if all(finite):
            return
        step, _, parts, index = unread[finite.index(False)]
        values = ", ".join(f"{name} {part.item():.4g}" for name, part in parts.items())
        raise FloatingPointError(
            f"the loss is not finite at step {step} ({values}); {self.train_data.kind} of the batch: "
            f"{index.tolist()}, the first is {self.train_data.describe(int(index[0]))}. Fix: a smaller learning_rate"
        )

    @torch.no_grad()
    def _mean_square(self) -> list[float]:
        """Mean square of the teacher's hidden states, layer by layer, over the first batch of the plan."""
        batch = self._batch(self.train_data, self.batches.batches[0][:64])
        mask = batch["attention_mask"].bool()
        states = self.teacher(**batch)["hidden"]
        if odd := [tuple(hidden.shape) for hidden in states if hidden.shape[:2] != mask.shape]:
            raise ValueError(
                f"the teacher has hidden states of shape {odd[0]}, but {mask.shape[1]} tokens an input. Fix: use a teacher "
                "whose layers all have the same tokens, such as ViT, DINOv2 or CLIP (not Swin or convolutions)"
            )
        return [hidden[mask].float().square().mean().item() for hidden in states]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's; what cannot be written whole is removed.

        Raises:
            FloatingPointError: see :meth:`_stop_at_nan`.
            OSError: the checkpoint could not be written, as on a full disk; earlier ones are untouched.
        """
        self._stop_at_nan()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # what safetensors and torch.save raise on a full disk
            shutil.rmtree(self.output / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written to {self.output} ({error}); the last "
                f"whole one is {last_checkpoint(self.output)}. Fix: make room and run the same command again"
            ) from error

    def calibration_batches(self, count: int) -> list[dict[str, Any]]:
        """This process's share of ``count`` texts drawn from all, in batches of 32 of about one length."""
        chosen = np.random.default_rng(self.args.data_seed).permutation(len(self.train_data))[:count]
        chosen = chosen[self.train_data.lengths[chosen].argsort()][self.args.process_index :: self.args.world_size]
        return [self._batch(self.train_data, chosen[index]) for index in by_length(self.train_data.lengths[chosen])]

    def _batch(self, data: TokenizedTexts | Images, index: np.ndarray) -> dict[str, Any]:
        """Inputs of an encoder, on its device."""
        batch = self.collate([data[int(i)] for i in index])
        del batch["index"]
        return self._prepare_inputs(batch)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean cosine of the packed student to the teacher on held-out texts: all, short (up to 64 tokens) and long ones."""
        started = time.perf_counter()
        data = self.held_out
        if not len(data):
            return {}
        if self._teacher_held_out is None:
            self._teacher_held_out = self._embed(self.teacher, data)
        strengths = {layer: layer.strength for layer in ternary_layers(self.student).values()}
        set_strength(self.student, 1.0)  # that of the packed model
        cosines = F.cosine_similarity(self._embed(self.student, data), self._teacher_held_out)
        for layer, strength in strengths.items():
            layer.strength = strength
        metrics = {f"{metric_key_prefix}_cosine": cosines.mean().item()}
        long = torch.from_numpy(data.lengths > LONG)
        for name, chosen in (("short", ~long), ("long", long)):
            if chosen.any():
                metrics[f"{metric_key_prefix}_cosine_{name}"] = cosines[chosen].mean().item()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # no training time
        return metrics

    @torch.no_grad()
    def _embed(self, encoder: Encoder, data: TokenizedTexts | Images) -> torch.Tensor:
        """float32 ``[len(data), D]`` on the CPU, in float32 as the packed model: around its own forward is autocast."""
        batches = by_length(data.lengths)
        rows = [Encoder.forward(encoder, **self._batch(data, index))["embedding"].float().cpu() for index in batches]
        return torch.cat(rows)[torch.from_numpy(np.concatenate(batches).argsort())]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds loss parts, tokens a second and the health of the layers; writes ``log.jsonl`` beside the checkpoints."""
        self._stop_at_nan()
        health: dict[str, float] = {}
        if "loss" in logs and self._sums:
            tokens = int(self._tokens) * self.args.world_size  # waits for the GPU, so comes before the clock
            seconds = time.perf_counter() - self._since
            logs |= {f"loss_{name}": (total / self._batches).item() for name, total in self._sums.items()}
            logs["tokens_per_second"] = round(tokens / seconds, 1)
            health = self.health.metrics()
            logs |= {kind: mean for kind, mean in health.items() if "/" not in kind}
            self._sums, self._batches, self._tokens = {}, 0, 0
        super().log(logs, start_time)
        self.state.log_history[-1] |= health  # layer by layer: for the file and the plot, not for the console
        if self.is_world_process_zero():
            write_log(self.state.log_history, self.output / "log.jsonl")


class _Gradual(TrainerCallback):
    """Raises the strength of the ternary weights from 0 to 1 over the first ``share`` of the steps."""

    def __init__(self, student: nn.Module, share: float) -> None:
        self.student, self.share = student, share

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps = self.share * state.max_steps
        set_strength(self.student, min(1.0, (state.global_step + 1) / steps) if steps else 1.0)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a run. The state is written last: a folder without it was cut short and is removed.

    Raises:
        ValueError: the checkpoints are no run's of :func:`claim`.
    """
    found = []
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        if not (folder / "run.json").exists():
            raise ValueError(f"{checkpoint} is of a run that left no run.json. Fix: give another output_dir")
        try:
            found.append((json.loads((checkpoint / "trainer_state.json").read_text())["global_step"], checkpoint))
        except (FileNotFoundError, ValueError, KeyError):
            logger.warning("%s is not whole; it is removed", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(max(found)[1]) if found else None


def claim(folder: Path, checkpoint: str | None, made_from: dict[str, Any], write: bool = True) -> None:
    """Note in ``run.json`` what the run in ``folder`` is made from, and refuse to resume the checkpoint of another run.

    Raises:
        ValueError: something else made ``checkpoint``; the message names the first difference.
    """
    now = json.loads(json.dumps(made_from))
    then = read_json(Path(checkpoint).parent / "run.json") if checkpoint else {}
    differ = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if checkpoint and differ:
        what = differ[0]
        raise ValueError(
            f"{checkpoint} is of a run with another {what}: {then.get(what)}, not {now.get(what)}. Fix: give the same, or "
            "another output_dir"
        )
    if write:
        write_json(folder / "run.json", now)
