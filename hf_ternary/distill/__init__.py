"""Distillation: a ternary student learns from its full-precision teacher, on unlabelled texts or images.

- `arguments`: every option, over transformers' `TrainingArguments`
- `data`, `texts`, `images`: what it learns from, and batches of it
- `student`: the teacher's fake-quantized copy, and the packed model it becomes
- `losses`: what student and teacher are compared by
- `calibrate`: compensates rounding errors, before training or instead of it
- `trainer`: transformers' `Trainer`, taught what to compare and log
- `health`: zeros, flips, drift, and the plot
- `run`: all of it in one call
"""

from .arguments import DistillArguments
from .data import Corpus
from .images import read_images
from .run import distill
from .texts import read_corpus

__all__ = ["Corpus", "DistillArguments", "distill", "read_corpus", "read_images"]
