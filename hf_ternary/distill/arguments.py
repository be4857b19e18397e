"""Every option of a distillation: those of transformers' trainer, and ours."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from ..config import TernaryConfig

INITS = ("rounded", "compensated")


@dataclass
class DistillArguments(TrainingArguments):
    """Options of :func:`hf_ternary.distill.distill`; a yaml file or flags set them. Only those of our own are listed here.

    A loss with weight 0 is not computed. Every loss is of order 1 at the start (hidden states are divided by the teacher's
    mean square), so that weights mean the same for every model.
    """

    teacher: str = field(default="", metadata={"help": "full-precision encoder: a Hub id or folder"})
    base_model: str | None = field(
        default=None, metadata={"help": "the teacher's Hub id for the model card [default: teacher, if it is no folder]"}
    )
    texts: list[str] = field(
        default_factory=list, metadata={"help": "files, folders or datasets ids, each optionally with =WEIGHT"}
    )
    images: list[str] = field(
        default_factory=list, metadata={"help": "instead of texts: folders, parquet files or datasets ids of images"}
    )
    eval_texts: int = field(default=512, metadata={"help": "texts or images held out to measure fidelity during training"})
    max_length: int | None = field(default=None, metadata={"help": "longest text in tokens [default: the teacher's]"})
    passage_share: float = field(default=0.5, metadata={"help": "share of texts joined with their neighbours"})
    passage_words: list[int] = field(
        default_factory=lambda: [40, 180], metadata={"help": "shortest and longest passage", "nargs": 2}
    )
    batch_tokens: int = field(default=2048, metadata={"help": "tokens a batch, with padding, over all processes"})

    group_size: str | None = field(default=None, metadata={"help": "see TernaryConfig: a number, 'tensor', or one a row"})
    weight_scheme: str = field(default="optimal", metadata={"help": "see TernaryConfig"})
    activation: str | None = field(default="int8", metadata={"help": "see TernaryConfig"})
    embedding_bits: int | None = field(default=4, metadata={"help": "see TernaryConfig"})
    position_bits: int | None = field(default=8, metadata={"help": "see TernaryConfig"})
    embedding_group_size: int | None = field(default=None, metadata={"help": "see TernaryConfig"})
    modules_to_not_convert: list[str] | None = field(default=None, metadata={"help": "see TernaryConfig"})

    init: str = field(default="rounded", metadata={"help": "start: 'rounded', or 'compensated' for rounding errors (GPTQ)"})
    student: str | None = field(
        default=None, metadata={"help": "instead of `init`: ternary model to go on from, a Hub id or folder"}
    )
    fixed_codes: bool = field(
        default=False, metadata={"help": "keep the codes of the start; train scales, biases, norms and tables alone"}
    )
    dense: bool = field(
        default=True, metadata={"help": "a Dense layer in float behind the pooling makes up for errors of the embedding"}
    )
    calibration_texts: int = field(
        default=256, metadata={"help": "texts or images that a compensated start and the Dense layer are fitted to"}
    )
    dense_texts: int = field(
        default=0, metadata={"help": "texts or images that the Dense layer is fitted to once more after the last step"}
    )
    gradual: float = field(default=0.0, metadata={"help": "share of the steps over which weights become ternary"})
    learned_scale: bool = field(default=True, metadata={"help": "train the scales, else they follow the weights"})
    scale_learning_rate: float | None = field(default=None, metadata={"help": "of learned scales [default: learning_rate]"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "the student's attention in training; 'eager' is the fastest on a CPU"}
    )

    hidden_weight: float = field(default=0.0, metadata={"help": "loss: last hidden state"})
    layers_weight: float = field(default=1.0, metadata={"help": "loss: hidden states of `layers`"})
    layers: list[int] | None = field(default=None, metadata={"help": "hidden states to match, 0 = embeddings [all]"})
    embedding_weight: float = field(default=1.0, metadata={"help": "loss: cosine of text or image embeddings"})
    gram_weight: float = field(default=0.0, metadata={"help": "loss: cosines between the embeddings of a batch"})
    ranking_weight: float = field(default=0.0, metadata={"help": "loss: the teacher's order of the embeddings of a batch"})
    relation_weight: float = field(default=0.0, metadata={"help": "loss: relations of `relation_modules`"})
    relation_modules: list[str] = field(
        default_factory=list, metadata={"help": "queries, keys, values: encoder.layer.5.attention.self.value"}
    )

    lr_halvings: int = field(
        default=0, metadata={"help": "times that the learning rate is halved, evenly spaced [0: lr_scheduler_type]"}
    )

    # Other defaults than the trainer's.
    output_dir: str | None = field(default="runs/distill", metadata={"help": "checkpoints, logs; the model in model/"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "warm-up: steps, or a share of them below 1"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data; max_steps overrides it"})
    logging_steps: float = field(default=20, metadata={"help": "steps between lines of the log"})
    save_steps: float = field(default=200, metadata={"help": "steps between checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    eval_strategy: IntervalStrategy | str = field(default="steps", metadata={"help": "when to measure fidelity"})
    eval_steps: float | None = field(default=200, metadata={"help": "steps between measurements of fidelity"})
    eval_on_start: bool = field(default=True, metadata={"help": "measure fidelity before the first step"})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "optimizer"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "must be False"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a NaN stops the run instead"})
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "a pooler may go unused"})
    push_to_hub: bool = field(default=False, metadata={"help": "upload the packed model to hub_model_id at the end"})
    report_to: str = field(default="none", metadata={"help": "wandb, tensorboard, ..."})
    seed: int = field(default=0, metadata={"help": "of every other draw"})
    data_seed: int = field(default=0, metadata={"help": "of the batches: another one for a run that goes on from `student`"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher is not set; give a Hub id or a folder")
        if bool(self.texts) == bool(self.images):
            state = "both set" if self.texts else "both empty"
            raise ValueError(f"texts and images are {state}; give one of them files, folders or datasets ids")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is not allowed: use {' or '.join(map(repr, INITS))}")
        if self.init == "compensated" and not self.learned_scale:
            raise ValueError("init='compensated' needs learned_scale: the weights' own scales would undo it")
        if self.fixed_codes and not self.learned_scale:
            raise ValueError("fixed_codes needs learned_scale: scales that follow fixed weights are fixed too")
        for name in ("passage_share", "gradual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: use a number from 0 to 1")
        for name in ("texts", "images", "layers", "passage_words", "relation_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}={value!r} is no list: use [{value}]")
        if self.group_size == "tensor" and (self.learned_scale or self.init == "compensated"):
            raise ValueError("group_size='tensor' needs learned_scale: false and init: rounded, which fit no scale to a row")
        if self.calibration_texts < 1:
            raise ValueError(f"calibration_texts={self.calibration_texts} is not allowed: use 1 or more")
        if self.dense_texts < 0 or (self.dense_texts and not self.dense):
            raise ValueError(f"dense_texts={self.dense_texts} is not allowed: use 0 or more, with dense: true")
        if self.lr_halvings < 0:
            raise ValueError(f"lr_halvings={self.lr_halvings} is not allowed: use 0 or more")
        if self.lr_halvings and self.warmup_steps:
            raise ValueError(f"lr_halvings needs warmup_steps: 0, not {self.warmup_steps}: it is a schedule of its own")
        if len(self.passage_words) != 2 or not 0 < self.passage_words[0] <= self.passage_words[1]:
            raise ValueError(f"passage_words={self.passage_words} is not allowed: give the shortest and the longest")
        if not any(self.loss_weights().values()) or min(self.loss_weights().values()) < 0:
            raise ValueError(f"loss weights {self.loss_weights()} are not allowed: one must be positive, none negative")
        if bool(self.relation_weight) != bool(self.relation_modules):
            raise ValueError("relation_weight and relation_modules need each other")
        if self.per_device_train_batch_size != TrainingArguments.per_device_train_batch_size:
            raise ValueError("per_device_train_batch_size is not used; give batch_tokens, over all processes")
        self.ternary_config()

    def loss_weights(self) -> dict[str, float]:
        names = ("hidden", "layers", "embedding", "gram", "ranking", "relation")
        return {name: getattr(self, f"{name}_weight") for name in names}

    def ternary_config(self) -> TernaryConfig:
        """What the packed model will be.

        Raises:
            ValueError: a value that :class:`TernaryConfig` does not allow.
        """
        names = [field.name for field in fields(TernaryConfig) if hasattr(self, field.name)]
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if isinstance(self.group_size, str) and self.group_size.isdigit():
            options["group_size"] = int(self.group_size)
        return TernaryConfig(**options)
