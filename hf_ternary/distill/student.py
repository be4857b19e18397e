"""The student: a copy of the teacher whose layers are fake-quantized, and what both of them show to the losses."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

from .. import convert, encoder, quantizer
from ..config import QUANT_METHOD, TernaryConfig
from ..modules import FakeTernaryLinear


def load_teacher(name: str, max_length: int | None = None) -> SentenceTransformer:
    """A float32 teacher from any sentence-transformers or transformers encoder (the latter gets mean pooling).

    Raises:
        ValueError: it is ternary already, has no transformer, or ``max_length`` exceeds its own.
    """
    teacher = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
    if not isinstance(getattr(teacher[0], "auto_model", None), PreTrainedModel):
        raise ValueError(f"teacher {name} has no transformer (its first module is {type(teacher[0]).__name__})")
    quantization = getattr(transformer_of(teacher).config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        kind = "ternary already" if method == QUANT_METHOD else f"quantized ({method})"
        raise ValueError(f"teacher {name} is {kind}; distil from the full-precision model that it was made from")
    own = teacher.max_seq_length
    if max_length is not None and own is not None and max_length > own:
        raise ValueError(f"max_length={max_length} exceeds the {own} tokens that teacher {name} is made for; use less")
    return teacher.eval().requires_grad_(False)


def transformer_of(model: SentenceTransformer) -> PreTrainedModel:
    """The transformers model inside."""
    return cast(PreTrainedModel, model[0].auto_model)


class Encoder(nn.Module):
    """A SentenceTransformer that returns what the losses compare. It never leaves evaluation mode: no dropout.

    Args:
        model: its first module holds the transformer.
        relations: names of modules of the transformer whose outputs (queries, keys, values) are returned too.
    """

    def __init__(self, model: SentenceTransformer, relations: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.transformer.config.output_hidden_states = True
        self._captured: list[torch.Tensor] = []
        modules = dict(self.transformer.named_modules())
        for name in relations:
            if name not in modules:
                raise ValueError(f"relation_modules: {name!r} is no module of {type(self.transformer).__name__}")
            modules[name].register_forward_hook(lambda module, args, output: self._captured.append(output))
        self.eval()

    @property
    def transformer(self) -> PreTrainedModel:
        return transformer_of(self.model)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
        """int64 ``[B, L]`` each -> ``hidden`` (tuple of ``[B, L, D]``, the embeddings first, the last layer last),
        ``embedding`` ``[B, D']`` and ``relations`` (list of ``[B, L, D]``)."""
        self._captured.clear()
        output = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
        hidden = (*output["all_layer_embeddings"][:-1], output["token_embeddings"])
        return {"hidden": hidden, "embedding": output["sentence_embedding"], "relations": list(self._captured)}


def make_student(
    teacher: SentenceTransformer, config: TernaryConfig, learned_scale: bool = True, attn_implementation: str | None = None
) -> SentenceTransformer:
    """A trainable, fake-quantized copy of ``teacher``; arguments as in :func:`hf_ternary.convert.fake_ternarize_model`."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    transformer = transformer_of(student)
    ties = dict(transformer.all_tied_weights_keys)
    convert.fake_ternarize_model(transformer, config, ties, transformer._keep_in_fp32_modules or (), learned_scale)
    if attn_implementation is not None:
        transformer.set_attn_implementation(attn_implementation)
    return student


def pack_student(student: SentenceTransformer, config: TernaryConfig) -> SentenceTransformer:
    """Turn a trained student into the packed model that ``SentenceTransformer(path)`` will load, in place."""
    transformer = transformer_of(student)
    for module in transformer.modules():
        module._forward_hooks.clear()
    convert.pack_model(transformer)
    transformer.config.output_hidden_states = False
    quantizer.mark_quantized(transformer, config)
    encoder.bind(transformer)
    return student.eval().requires_grad_(False)


def ternary_layers(model: nn.Module) -> dict[str, FakeTernaryLinear]:
    """The trainable ternary layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeTernaryLinear)}


def set_strength(model: nn.Module, strength: float) -> None:
    """Gradual quantization: the share of the ternary weight in the forward pass, 0 (float) to 1 (ternary)."""
    for layer in ternary_layers(model).values():
        layer.strength = strength
