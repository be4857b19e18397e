"""What several files of tests share: random layers and models of every architecture, and what a card is made of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_ternary import TernaryConfig, packing
from hf_ternary.provenance import provenance, weights
from tests.conftest import VOCAB_SIZE, tiny_bert_config

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
VISION = ["vit", "dinov2", "clip_vision_model"]
HIDDEN, PAD, EOS, PIXELS = 32, 1, 2, 40

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 200}
_ENCODER = {**_TEXT, "max_position_embeddings": 160, "pad_token_id": 0}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_TOWERS = {
    "text_config": {**_TEXT, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": {**_VISION, "intermediate_size": 64},
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_T5 = {"vocab_size": 200, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
# name: (model class, config class, options, ternary layers, quantized tables)
ARCHITECTURES = {
    "BERT": ("BertModel", "BertConfig", _ENCODER, 12, 2),
    "BERT, masked language model": ("BertForMaskedLM", "BertConfig", _ENCODER, 12, 2),
    "BERT, classifier": ("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 1}, 12, 2),
    "RoBERTa": ("RobertaModel", "RobertaConfig", _ENCODER, 12, 2),
    "XLM-RoBERTa": ("XLMRobertaModel", "XLMRobertaConfig", _ENCODER, 12, 2),
    "MPNet": ("MPNetModel", "MPNetConfig", _ENCODER, 12, 2),
    "DistilBERT": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 200, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 160},
        12,
        2,
    ),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", {**_ENCODER, **_SPECIAL}, 8, 1),
    "ALBERT": ("AlbertModel", "AlbertConfig", {**_ENCODER, "embedding_size": 16}, 6, 2),
    "ELECTRA": ("ElectraModel", "ElectraConfig", {**_ENCODER, "embedding_size": 16}, 12, 2),
    "T5 encoder": ("T5EncoderModel", "T5Config", _T5, 10, 1),  # wo stays float: T5 keeps it in float32
    "LongT5 encoder": ("LongT5EncoderModel", "LongT5Config", _T5, 10, 1),  # wo stays float: its dtype is looked at
    "NomicBERT": ("NomicBertModel", "NomicBertConfig", _ENCODER, 14, 1),
    "Qwen3": ("Qwen3Model", "Qwen3Config", _DECODER, 14, 1),
    "Gemma 3": ("Gemma3TextModel", "Gemma3TextConfig", _DECODER, 14, 1),
    "ViT": ("ViTModel", "ViTConfig", {**_VISION, "intermediate_size": 64}, 12, 0),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, 12, 0),
    "CLIP": ("CLIPModel", "CLIPConfig", {**_TOWERS, "projection_dim": 16}, 24, 1),
    "SigLIP": ("SiglipModel", "SiglipConfig", _TOWERS, 24, 1),
}


def make_layer(out_features: int, in_features: int, groups: int = 1, seed: int = 0) -> Layer:
    """Weight, scale and bias of a random layer."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8, generator=generator)
    scale = torch.rand(out_features, groups, generator=generator)
    return packing.pack(codes), scale, torch.randn(out_features, generator=generator)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and bits, any NaN being as good as another."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def tiny_config(model_type: str, **options: Any) -> Any:
    from transformers import AutoConfig

    if model_type == "bert":
        return tiny_bert_config(**options)
    if model_type == "distilbert":
        sizes = {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if model_type in VISION:
        sizes |= {"image_size": PIXELS, "patch_size": 8}
    else:
        sizes |= {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 160}
    if model_type in ("modernbert", "clip_text_model"):
        sizes |= {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": EOS}
    if model_type == "modernbert":
        sizes |= {"local_attention": 16, "cls_token_id": 0, "sep_token_id": EOS}
    return AutoConfig.for_model(model_type, **{**sizes, **options})


def make_model(folder: Path, model_type: str = "bert", ternary: TernaryConfig | None = None, **options: Any) -> Any:
    """A packed model of random weights, in evaluation mode."""
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(model_type, **options))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases are all 0, and norms all alike: one left out, or in another's place, would not show
            spread = torch.rand_like(parameter) + 0.5
            parameter.data = parameter.data * spread if parameter.any() else 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder, quantization_config=ternary or TernaryConfig()).eval()


def batch(lengths: list[int], width: int | None = None, left: bool = False) -> dict[str, torch.Tensor]:
    """Random ids, padded to ``width``; the same row for the same length whatever the batch."""
    width = width or max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if left else slice(0, length)
        ids[row, columns] = torch.randint(5, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length))
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def embed(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones(states.shape[:2]).unsqueeze(-1) if mask is None else mask.unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def build(name: str, path: Path) -> type:
    """Save a random float model of architecture ``name``; returns its class."""
    import transformers

    model_class, config_class, options = ARCHITECTURES[name][:3]
    if not hasattr(transformers, config_class):
        pytest.skip(f"transformers {transformers.__version__} has no {config_class}")
    getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).save_pretrained(path)
    return getattr(transformers, model_class)


def write_results(path: Path, folder: Path, **changes: Any) -> Path:
    """A results JSON as recipes/evaluate.py writes it."""
    score = {"task": "STSBenchmark", "type": "STS", "metric": "cosine_spearman", "splits": ["test"]}
    report = {
        "model": "packed",
        "weights": weights(folder),
        "baseline": "tester/teacher",
        "scores": [{**score, "score": 0.81234, "baseline": 0.82, "retention": 0.81234 / 0.82}],
        "fidelity": {"file": "texts.txt", "cosine": 0.9512, "overlap_at_10": 0.8},
        **provenance(seed=7),
        **changes,
    }
    path.write_text(json.dumps(report))
    return path


def write_summary(path: Path, folder: Path, **changes: Any) -> Path:
    """What a distillation writes beside its model: a second run, which went on from the first one's."""
    run = {
        "options": {"init": "compensated", "learning_rate": 4e-4, "fixed_codes": False},
        "sources": [{"source": "wiki.jsonl", "texts": 1200, "weight": 0.5, "sha256": "ab" * 32}],
        "texts": {"train": 185_907, "held_out": 420},
        "steps": 5500,
        "tokens": 20_415_428,
        "fidelity": {"eval_cosine": 0.92475},
    }
    more = {"source": "me/news", "texts": 30, "weight": 1.0}
    last = {
        **run,
        "weights": weights(folder),
        "student": {"bytes": 9, "sha256": "cd" * 32},
        "earlier": [run],
        "options": {**run["options"], "fixed_codes": True, "dense_texts": 60_000},
        "sources": [{**run["sources"][0], "weight": 1.0}, more],
        "fidelity": {},
        **changes,
    }
    path.write_text(json.dumps(last))
    return path
