"""The student: a copy of the teacher whose layers are fake-quantized, and what both of them show to the losses."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from sentence_transformers.util import is_sentence_transformer_model
from torch import nn
from transformers import PreTrainedModel

from .. import convert, encoder, quantizer
from ..config import QUANT_METHOD, TernaryConfig
from ..modules import FakeTernaryLinear, TernaryLinear, TiedEmbedding

# Vision models whose embedding of an image is what their pooler makes of it.
POOLED = ("chinese_clip_vision_model", "clip_vision_model", "mlcd_vision_model", "siglip_vision_model")


def load_teacher(name: str | Path, max_length: int | None = None, modality: str = "text") -> SentenceTransformer:
    """A float32 teacher of texts or images (``modality`` "image") from any sentence-transformers or transformers encoder.

    A transformers model of texts gets mean pooling; one of images its pooler's output (CLIP, SigLIP) or what
    :func:`pooling_mode` says.

    Raises:
        ValueError: it is ternary already, has an adapter or no transformer, does not embed ``modality``, or ``max_length``
            exceeds its own.
        ImportError: sentence-transformers is too old for images.
    """
    version = sentence_transformers.__version__
    if modality == "image" and int(version.partition(".")[0]) < 6:
        raise ImportError(
            f'images need sentence-transformers 6, not {version}: pip install "sentence-transformers[image]>=6"'
        )
    name = str(name)
    teacher = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
    if not isinstance(getattr(teacher[0], "auto_model", None), PreTrainedModel):
        raise ValueError(f"teacher {name} has no transformer (its first module is {type(teacher[0]).__name__})")
    if getattr(transformer_of(teacher), "peft_config", None):
        raise ValueError(f"teacher {name} has an adapter. Fix: merge it (PEFT's merge_and_unload) and save the whole model")
    quantization = getattr(transformer_of(teacher).config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        kind = "ternary already" if method == QUANT_METHOD else f"quantized ({method})"
        raise ValueError(f"teacher {name} is {kind}; distil from the full-precision model that it was made from")
    _check_modality(teacher, name, modality)
    if modality == "image":
        teacher.processor.do_convert_rgb = True  # ViT's own fails on an image that is grey or transparent
        if not is_sentence_transformer_model(name):
            _choose_pooling(teacher)
    own = teacher.max_seq_length
    if max_length is not None and own is not None and max_length > own:
        raise ValueError(f"max_length={max_length} exceeds the {own} tokens that teacher {name} is made for; use less")
    return teacher.eval().requires_grad_(False)


def _check_modality(teacher: SentenceTransformer, name: str, modality: str) -> None:
    methods = {kind: how["method"] for kind, how in getattr(teacher[0], "modality_config", {}).items()}
    if methods and modality not in methods:
        raise ValueError(f"teacher {name} embeds {' and '.join(map(str, methods))}, not {modality}; give it what it embeds")
    if methods and methods[modality] != "forward":
        raise ValueError(
            f"teacher {name} has one encoder for texts and another for images; give the one alone, saved with its "
            "processor (as transformers' CLIPVisionModel, say)"
        )


def _choose_pooling(teacher: SentenceTransformer) -> None:
    """Replace the mean pooling that sentence-transformers gives every transformers model, if a vision model has its own."""
    transformer = transformer_of(teacher)
    module, pooling = cast(tuple[Any, Any], teacher)
    if transformer.config.model_type in POOLED:
        module.modality_config = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
        module.module_output_name = "sentence_embedding"
        transformer.config.projection_dim = transformer.config.hidden_size  # CLIP's projection is no part of this model
        del teacher[1]
    else:
        pooling.pooling_mode = pooling_mode(transformer)


def pooling_mode(transformer: PreTrainedModel) -> str:
    """How a vision model's own head pools: "cls" if it reads a class token (ViT, DINOv2), "mean" if it averages (BEiT) or
    there is no such token (Swin, I-JEPA)."""
    has_token = any(name.endswith("cls_token") for name, _ in transformer.named_parameters())
    return "cls" if has_token and not getattr(transformer.config, "use_mean_pooling", False) else "mean"


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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Texts, int64 ``[B, L]`` each, or images, float ``[B, C, H, W]`` (whose mask is not needed) -> ``hidden`` (tuple of
        ``[B, L, D]``, the embeddings first, the last layer last), ``embedding`` ``[B, D']`` and ``relations`` (list of
        ``[B, L, D]``)."""
        self._captured.clear()
        images = {"pixel_values": pixel_values, "modality": "image"}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        output = self.model(texts if pixel_values is None else images)
        *layers, last = output["all_layer_embeddings"]
        hidden = (*layers, output.get("token_embeddings", last))
        return {"hidden": hidden, "embedding": output["sentence_embedding"], "relations": list(self._captured)}

    def pooled(self, **inputs: Any) -> torch.Tensor:
        """Inputs as of :meth:`forward` -> float ``[B, D]``: the embedding that the pooling makes."""
        seen: list[torch.Tensor] = []

        def hook(module: nn.Module, args: Any, output: dict[str, Any]) -> None:
            seen.append(output["sentence_embedding"])

        handle = self.model[_behind_pooling(self.model) - 1].register_forward_hook(hook)
        self(**inputs)
        handle.remove()
        return seen[0]


def make_student(
    teacher: SentenceTransformer, config: TernaryConfig, learned_scale: bool = True, attn_implementation: str | None = None
) -> SentenceTransformer:
    """A trainable, fake-quantized copy of ``teacher``; arguments as in :func:`hf_ternary.convert.fake_ternarize_model`.

    Only Linear layers and token tables are quantized: the patch embedding of a vision model, a convolution, its position
    table, norms and layer scales stay in float.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    transformer = transformer_of(student)
    ties, keep = transformer.all_tied_weights_keys, transformer._keep_in_fp32_modules or ()
    convert.fake_ternarize_model(transformer, config, ties, keep, learned_scale)
    for name, table in _aliases(transformer).items():  # a table under two names is trained, and saved, as one
        convert.replace(transformer, name, TiedEmbedding(table))
    if attn_implementation is not None:
        transformer.set_attn_implementation(attn_implementation)
    return student


def _behind_pooling(model: SentenceTransformer) -> int:
    """Index of the module behind the pooling, which some vision models do inside the transformer."""
    return 1 + (len(model) > 1 and isinstance(model[1], Pooling))


def dense_of(model: SentenceTransformer) -> Any:
    """The Dense module behind the pooling of ``model``, or None."""
    index = _behind_pooling(model)
    return model[index] if len(model) > index and isinstance(model[index], Dense) else None


def add_dense(model: SentenceTransformer) -> Any:
    """The Dense module behind the pooling of ``model``; if there is none, one that changes nothing is put there."""
    index = _behind_pooling(model)
    if dense_of(model) is None:
        width = cast(Any, model[index - 1]).get_embedding_dimension()
        dense = Dense(
            width, width, activation_function=nn.Identity(), init_weight=torch.eye(width), init_bias=torch.zeros(width)
        )
        model.insert(index, dense)
    return model[index]


def _aliases(transformer: PreTrainedModel) -> dict[str, Any]:
    """{name of a table: the table that it is tied to}, as of T5's ``encoder.embed_tokens`` to ``shared``."""
    ties = {a.rpartition(".")[0]: s.rpartition(".")[0] for a, s in transformer.all_tied_weights_keys.items()}
    modules = dict(transformer.named_modules())
    return {a: modules[s] for a, s in ties.items() if isinstance(modules.get(a), (nn.Embedding, TiedEmbedding))}


@torch.no_grad()
def continue_from(student: SentenceTransformer, name: str, config: TernaryConfig) -> bool:
    """Give ``student`` the weights of a finished ternary model of the same teacher, in place.

    Its master weights are on the levels of their codes, so a code changes only where gradients agree for many steps. A table
    is rounded anew while it trains.

    Returns:
        Whether all of it was trained: False if only ``student`` has a Dense module behind its pooling.

    Raises:
        ValueError: it is not ternary, was made with other options, or of a model of another shape.
    """
    whole = SentenceTransformer(name, device="cpu")
    finished = transformer_of(whole)
    made = getattr(finished.config, "quantization_config", None)
    if not isinstance(made, TernaryConfig):
        raise ValueError(f"student {name} is not ternary; leave `student` out to start from the teacher")
    options, others = config.to_dict(), made.to_dict()
    differ = [f"{key}={others[key]!r}" for key in options if options[key] != others[key] and key != "hf_ternary_version"]
    if differ:
        raise ValueError(f"student {name} was made with {', '.join(differ)}; give the same options")
    complete = len(whole) >= len(student)
    if not complete:
        add_dense(whole)
    # What trains further beside the float weights, if scales are learned.
    scales = {f"{key}.weight_scale": m.weight_scale for key, m in whole.named_modules() if isinstance(m, TernaryLinear)}
    aliases = {f"{key}.weight" for key, m in student.named_modules() if isinstance(m, TiedEmbedding)}
    convert.dequantize_model(finished)
    wanted = student.state_dict()
    loaded = {key: tensor for key, tensor in whole.state_dict().items() if key not in aliases}
    loaded |= {key: scale for key, scale in scales.items() if key in wanted}
    shapes, expected = ({key: tensor.shape for key, tensor in state.items()} for state in (loaded, wanted))
    if odd := shapes.items() ^ expected.items():
        raise ValueError(f"student {name} does not fit the teacher: {min(odd)[0]} is missing in one or has another shape")
    student.load_state_dict(loaded)
    return complete


@torch.no_grad()
def fix_codes(model: nn.Module) -> None:
    """Stop training the master weights of ternary layers, and put them on their levels: a code outlives any change of its
    scale short of doubling."""
    for layer in ternary_layers(model).values():
        layer.weight.copy_(layer.ternary_weight())
        layer.weight.requires_grad_(False)


def pack_student(student: SentenceTransformer, config: TernaryConfig) -> SentenceTransformer:
    """Turn a trained student into the packed model that ``SentenceTransformer(path)`` will load, in place.

    A Dense module behind the pooling stays float, rounded to float16's values.
    """
    transformer = transformer_of(student)
    for module in transformer.modules():
        module._forward_hooks.clear()
    convert.pack_model(transformer)
    convert.tie(transformer)
    for name, table in _aliases(transformer).items():  # what stayed float is an ordinary table again
        convert.replace(transformer, name, table)
    transformer.config.output_hidden_states = False
    quantizer.mark_quantized(transformer, config)
    encoder.bind(transformer)
    student.eval().requires_grad_(False)
    for module in student.children():
        if isinstance(module, Dense):
            for parameter in module.parameters():
                parameter.copy_(parameter.half())
    return student


def ternary_layers(model: nn.Module) -> dict[str, FakeTernaryLinear]:
    """The trainable ternary layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeTernaryLinear)}


def set_strength(model: nn.Module, strength: float) -> None:
    """Gradual quantization: the share of the ternary weight in the forward pass, 0 (float) to 1 (ternary)."""
    for layer in ternary_layers(model).values():
        layer.strength = strength
