"""Which encoders the native forward knows: where a family keeps its weights, and which config entries describe it.

:mod:`.native_encoder` and :mod:`.triton_encoder` build an encoder for a CPU or a GPU by an :class:`Architecture`. Imports no
torch.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

# transformers' names of activation functions -> the native one's
ACTIVATION_FUNCTIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
WIDEST_HEAD = 1024  # kWidestHead in csrc/kernel.h
BUCKETS, FARTHEST = 32, 128  # of the distances in MPNet, and from where on all are in one


class UnsupportedError(ValueError):
    """The native encoder cannot run this model; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """One family of encoders: how it computes, and what transformers calls its modules and config entries.

    A new family is a new instance in :data:`ARCHITECTURES`. Module names are relative to the base model, those of a layer to
    the layer; None: the family has no such module.

    Attributes:
        layer: name of a layer, with ``{}`` for its number.
        qkv: modules that make queries, keys and values: three, or one that makes them side by side.
        out: linear module after the attention.
        up: first modules of the MLP; the outputs of several are put side by side.
        down: last module of the MLP.
        norms: a layer's two LayerNorms, in the order in which they run.
        pre_norm: LayerNorms stand before attention and MLP; otherwise each follows a residual sum.
        final_norm: LayerNorm after the last layer (pre-norm only).
        first_norm: whether layer 0 has its first LayerNorm (pre-norm only; ModernBERT's has none).
        scales: parameters that multiply the outputs of ``out`` and ``down`` (layer scale).
        gated: ``up`` makes two halves; ``down`` reads activation(first half) * second half.
        causal: a token sees only itself and earlier ones.
        rotary: queries and keys are rotated by position (RoPE); ``layer_types`` in the config says which see a window.
        tokens, positions, types: embedding tables, added up; ``tokens`` None: the input is embedded already (images).
        norm: LayerNorm of the embeddings.
        bias: table of relative-position biases.
        hidden, heads, layers, activation, epsilon: names of config entries.
        padding: config entry of the padding id, if positions are numbered from the id after it; None: by column.
        defaults: values of config entries that config.json may leave out.
    """

    layer: str
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    norms: tuple[str, str]
    pre_norm: bool = False
    final_norm: str | None = None
    first_norm: bool = True
    scales: tuple[str, str] | None = None
    gated: bool = False
    causal: bool = False
    rotary: bool = False
    tokens: str | None = "embeddings.word_embeddings"
    positions: str | None = "embeddings.position_embeddings"
    types: str | None = None
    norm: str | None = "embeddings.LayerNorm"
    bias: str | None = None
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    layers: str = "num_hidden_layers"
    activation: str = "hidden_act"
    epsilon: str = "layer_norm_eps"
    padding: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def get(self, config: Mapping[str, Any], name: str) -> Any:
        """A config entry, or the family's default."""
        value = config.get(name)
        return self.defaults.get(name) if value is None else value


_SIZES = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
_BERT = Architecture(
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    types="embeddings.token_type_embeddings",
    defaults={**_SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
)
_ROBERTA = replace(_BERT, padding="pad_token_id", defaults={**_BERT.defaults, "pad_token_id": 1})
_MPNET = replace(
    _BERT,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    norms=("attention.LayerNorm", "output.LayerNorm"),
    types=None,
    bias="encoder.relative_attention_bias",
    padding="padding_idx",
    defaults={**_BERT.defaults, "padding_idx": 1},
)
_DISTILBERT = Architecture(
    layer="transformer.layer.{}",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    up=("ffn.lin1",),
    down="ffn.lin2",
    norms=("sa_layer_norm", "output_layer_norm"),
    hidden="dim",
    heads="n_heads",
    layers="n_layers",
    activation="activation",
    defaults={"dim": 768, "n_heads": 12, "n_layers": 6, "activation": "gelu", "layer_norm_eps": 1e-12},
)
_MODERNBERT = Architecture(
    layer="layers.{}",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    up=("mlp.Wi",),
    down="mlp.Wo",
    norms=("attn_norm", "mlp_norm"),
    pre_norm=True,
    final_norm="final_norm",
    first_norm=False,
    gated=True,
    rotary=True,
    tokens="embeddings.tok_embeddings",
    positions=None,
    norm="embeddings.norm",
    activation="hidden_activation",
    epsilon="norm_eps",
    defaults={
        **_SIZES,
        "num_hidden_layers": 22,
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "norm_bias": False,
        "max_position_embeddings": 8192,
        "local_attention": 128,
    },
)
_CLIP_TEXT = Architecture(
    layer="encoder.layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    up=("mlp.fc1",),
    down="mlp.fc2",
    norms=("layer_norm1", "layer_norm2"),
    pre_norm=True,
    final_norm="final_layer_norm",
    causal=True,
    tokens="embeddings.token_embedding",
    positions="embeddings.position_embedding",
    norm=None,
)
_CLIP_VISION = replace(_CLIP_TEXT, final_norm=None, causal=False, tokens=None, positions=None, norm="pre_layrnorm")
_VIT = Architecture(
    layer="layers.{}",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    up=("mlp.fc1",),
    down="mlp.fc2",
    norms=("layernorm_before", "layernorm_after"),
    pre_norm=True,
    final_norm="layernorm",
    tokens=None,
    positions=None,
    norm=None,
)
# Module names of ViT, and of attention in DINOv2, in older transformers.
_OLDER_ATTENTION: dict[str, Any] = {
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "out": "attention.output.dense",
}
_OLDER_VIT = replace(_VIT, **_OLDER_ATTENTION, layer="encoder.layer.{}", up=("intermediate.dense",), down="output.dense")
_DINOV2 = replace(
    _VIT,
    layer="encoder.layer.{}",
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
# DINOv2's giant: its config names another activation function than the one that its MLP uses, so read none from there.
_SWIGLU: dict[str, Any] = {"gated": True, "activation": "swiglu", "defaults": {"swiglu": "silu"}}
_DINOV2_SWIGLU = replace(_DINOV2, **_SWIGLU, up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj")
_OLDER_SWIGLU = replace(_DINOV2, **_OLDER_ATTENTION, **_SWIGLU, up=("mlp.weights_in",), down="mlp.weights_out")

# The layouts of a base model, by its class in transformers.
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    "BertModel": (_BERT,),
    "RobertaModel": (_ROBERTA,),
    "XLMRobertaModel": (_ROBERTA,),
    "CamembertModel": (_ROBERTA,),
    "MPNetModel": (_MPNET,),
    "DistilBertModel": (_DISTILBERT,),
    "ModernBertModel": (_MODERNBERT,),
    "ViTModel": (_VIT, _OLDER_VIT),
    "Dinov2Model": (_DINOV2, replace(_DINOV2, **_OLDER_ATTENTION), _DINOV2_SWIGLU, _OLDER_SWIGLU),
    "CLIPTextModel": (_CLIP_TEXT,),
    "CLIPTextTransformer": (_CLIP_TEXT,),  # inside CLIPTextModel in older transformers
    "CLIPVisionModel": (_CLIP_VISION,),
    "CLIPVisionTransformer": (_CLIP_VISION,),
}

# By model_type: the base model's class, and the prefix that heads give its weights.
MODEL_TYPES = {
    "bert": ("BertModel", "bert"),
    "roberta": ("RobertaModel", "roberta"),
    "xlm-roberta": ("XLMRobertaModel", "roberta"),
    "camembert": ("CamembertModel", "roberta"),
    "mpnet": ("MPNetModel", "mpnet"),
    "distilbert": ("DistilBertModel", "distilbert"),
    "modernbert": ("ModernBertModel", "model"),
}


def find_layout(layouts: tuple[Architecture, ...], arrays: Container[str]) -> Architecture:
    """The layout whose names these arrays have.

    Raises:
        UnsupportedError: none of them.
    """
    for layout in layouts:
        if all(f"{layout.layer.format(0)}.{name}.weight" in arrays for name in (*layout.qkv, *layout.up)):
            return layout
    raise UnsupportedError("the modules of its layers have other names than in the versions that are known")


def divides(parts: int, whole: int) -> bool:
    """Whether ``whole`` splits into that many equal parts."""
    return 0 < parts <= whole and whole % parts == 0


def check(config: Mapping[str, Any], architecture: Architecture, hidden: int, heads: int) -> None:
    """Raise ValueError if no encoder can run a model of this config, UnsupportedError where transformers can."""
    activation = architecture.get(config, architecture.activation)
    if activation not in ACTIVATION_FUNCTIONS:
        raise UnsupportedError(f"its activation function is {activation!r}, not one of {', '.join(ACTIVATION_FUNCTIONS)}")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedError("it is a decoder")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise UnsupportedError(f"position_embedding_type is {kind!r}, not 'absolute'")
    if not divides(heads, hidden) or hidden // heads > WIDEST_HEAD:
        raise UnsupportedError(f"{heads} heads do not divide {hidden} columns into heads of at most {WIDEST_HEAD}")
    epsilon = architecture.get(config, architecture.epsilon)
    if not 0 <= epsilon < 1:
        raise ValueError(
            f"{architecture.epsilon}={epsilon} in config.json is not allowed: use a number from 0 to 1, often 1e-12"
        )
    if (config.get("quantization_config") or {}).get("activation") != "int8":
        raise UnsupportedError("its activations are not quantized to int8")


def distance_buckets(reach: int) -> np.ndarray:
    """T5's buckets of the distances key - query from ``-reach`` to ``reach``: small ones exactly, then logarithmically."""
    distance = np.arange(-reach, reach + 1)
    half = BUCKETS // 2
    exact = half // 2
    n = np.abs(distance)
    with np.errstate(divide="ignore"):
        large = np.log(n.astype(np.float32) / exact) / math.log(FARTHEST / exact) * (half - exact)
    bucket = np.where(n < exact, n, np.minimum(exact + np.maximum(large, 0).astype(np.int64), half - 1))
    return bucket + half * (distance > 0)
