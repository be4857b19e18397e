"""Which encoders the native forward knows, and how one is built from a config and named arrays. Imports no torch.

An :class:`Architecture` says where a family keeps its weights and which config entries describe it; the C++ side
(csrc/encoder.h) sees only numbers and addresses. Both users give the same arrays: :mod:`.encoder` those of a loaded
transformers model, :mod:`.serving` those of a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .ops import backends

# transformers' names of activation functions -> the native one's
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
WIDEST_HEAD = 1024
Arrays = Mapping[str, np.ndarray]


class UnsupportedError(ValueError):
    """The native encoder cannot run this model; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """A family of post-norm encoders. Names of modules are relative to the base model, those of a layer to the layer.

    Attributes:
        layer: pattern of a layer's name.
        qkv, out, attention_norm, up, down, output_norm: modules of a layer.
        types, bias: tables of token types and of relative-position biases; None if the family has none.
        hidden, heads, layers, intermediate, activation: names of config entries.
        epsilon: of the layer norms, where the config does not say it.
        padding: config entry that holds the id from which positions count; None if positions are columns.
        defaults: config entries that a config.json may leave out.
    """

    layer: str
    qkv: tuple[str, str, str]
    out: str
    attention_norm: str
    up: str
    down: str
    output_norm: str
    types: str | None = "embeddings.token_type_embeddings"
    bias: str | None = None
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    layers: str = "num_hidden_layers"
    intermediate: str = "intermediate_size"
    activation: str = "hidden_act"
    padding: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def get(self, config: Mapping[str, Any], name: str) -> Any:
        """A config entry, or the family's default."""
        value = config.get(name)
        return self.defaults.get(name) if value is None else value


_SIZES = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
_BERT = partial(
    Architecture,
    layer="encoder.layer.{}",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
    defaults={**_SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 1},
)

# By the base model's class in transformers, and the prefix that its heads give its weights.
ARCHITECTURES: dict[str, tuple[str, Architecture]] = {
    "BertModel": ("bert", _BERT()),
    "RobertaModel": ("roberta", _BERT(padding="pad_token_id")),
    "XLMRobertaModel": ("roberta", _BERT(padding="pad_token_id")),
    "CamembertModel": ("roberta", _BERT(padding="pad_token_id")),
    "MPNetModel": (
        "mpnet",
        _BERT(
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            out="attention.attn.o",
            attention_norm="attention.LayerNorm",
            types=None,
            bias="encoder.relative_attention_bias",
            padding="padding_idx",
            defaults={**_SIZES, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "padding_idx": 1},
        ),
    ),
    "DistilBertModel": (
        "distilbert",
        Architecture(
            layer="transformer.layer.{}",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            output_norm="output_layer_norm",
            types=None,
            hidden="dim",
            heads="n_heads",
            layers="n_layers",
            intermediate="hidden_dim",
            activation="activation",
            defaults={"dim": 768, "n_heads": 12, "n_layers": 6, "hidden_dim": 3072, "activation": "gelu"},
        ),
    ),
}

MODEL_TYPES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "mpnet": "MPNetModel",
    "distilbert": "DistilBertModel",
}


class NativeEncoder:
    """A whole encoder in C++ (csrc/encoder.h). It borrows the memory of its tables and keeps their arrays alive.

    Args:
        architecture: the family.
        config: the entries of config.json.
        arrays: tensors of the base model by name, as saved: float32, packed weights uint8.

    Raises:
        UnsupportedError: the model is of a kind that the native encoder does not know, or not ternary throughout.
        ValueError: an array is missing or has another shape or dtype than the config says.
    """

    def __init__(self, architecture: Architecture, config: Mapping[str, Any], arrays: Arrays) -> None:
        get = partial(architecture.get, config)
        self.hidden, self.heads = int(get(architecture.hidden)), int(get(architecture.heads))
        self._arrays = arrays
        self._tables: list[np.ndarray] = []
        self._read: list[np.ndarray] = []  # what C++ copies before the end of this function
        _check(config, architecture, self.hidden, self.heads)
        self.positions = len(arrays.get("embeddings.position_embeddings.weight", ()))
        bias, reach = self._bias(architecture)
        module = backends.native()
        assert module is not None
        self._native = module.Encoder(
            backends.choose().backend,
            self.hidden,
            self.heads,
            int(get(architecture.intermediate)),
            ACTIVATIONS[get(architecture.activation)],
            float(get("layer_norm_eps") or 1e-12),
            -1 if architecture.padding is None else int(get(architecture.padding)),
            self._table("embeddings.word_embeddings"),
            self._table("embeddings.position_embeddings"),
            self._table(architecture.types) if architecture.types else (0, 0, 0, 1, 32, 1.0),
            self._norm("embeddings.LayerNorm"),
            0 if bias is None else bias.ctypes.data,
            reach,
        )
        intermediate = int(get(architecture.intermediate))
        for i in range(int(get(architecture.layers))):
            layer = architecture.layer.format(i)
            self._native.add_layer(
                self._linear([f"{layer}.{name}" for name in architecture.qkv], self.hidden, self.hidden),
                self._linear([f"{layer}.{architecture.out}"], self.hidden, self.hidden),
                self._linear([f"{layer}.{architecture.up}"], intermediate, self.hidden),
                self._linear([f"{layer}.{architecture.down}"], self.hidden, intermediate),
                self._norm(f"{layer}.{architecture.attention_norm}"),
                self._norm(f"{layer}.{architecture.output_norm}"),
            )
        del self._arrays, self._read

    def hidden_states(self, ids: int, types: int, mask: int, rows: int, columns: int, y: int, threads: int) -> bool:
        """Fill ``y`` float32 ``[rows, columns, hidden]`` from int64 ids, types and mask of that shape (addresses).

        False, with ``y`` unwritten: an id out of range, an empty row, or a mask that is no run of ones in each row.
        """
        return self._native.hidden_states(ids, types, mask, rows, columns, y, threads)

    def embeddings(self, ids: np.ndarray, offsets: np.ndarray, pooling: str, normalize: bool, threads: int) -> np.ndarray:
        """Pooled embeddings, float32 ``[sequences, hidden]``, of ids int64 from ``offsets[i]`` to ``offsets[i + 1]``.

        Raises:
            ValueError: an id without a row in the token table, or a sequence longer than the positions.
        """
        y = np.empty((len(offsets) - 1, self.hidden), np.float32)
        addresses = ids.ctypes.data, 0, offsets.ctypes.data
        if not self._native.embeddings(*addresses, len(y), pooling, normalize, y.ctypes.data, threads):
            raise ValueError(
                f"a text has a token id outside the table, or more tokens than the model's {self.positions} positions. "
                "Fix: use the tokenizer that belongs to the model, or a smaller max_seq_length"
            )
        return y

    def _array(self, name: str, dtype: type = np.float32, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None:
            raise ValueError(f"{name} is missing. Fix: download the model again or save it again")
        if array.dtype != dtype:
            raise UnsupportedError(f"{name} is {array.dtype}, the native encoder reads {np.dtype(dtype)}")
        if shape is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}. Fix: save the model again")
        array = np.ascontiguousarray(array)
        self._read.append(array)
        return array

    def _table(self, name: str) -> tuple[int, int, int, int, int, float]:
        if f"{name}.weight_scale" not in self._arrays:
            table = self._array(f"{name}.weight")
            if table.ndim != 2 or table.shape[1] != self.hidden:
                raise ValueError(f"{name}.weight has shape {table.shape}, expected (..., {self.hidden})")
            self._tables.append(table)
            return table.ctypes.data, 0, len(table), 1, 32, 1.0
        codes, scale = self._array(f"{name}.weight", np.uint8), self._array(f"{name}.weight_scale")
        bits = next((b for b in (2, 4, 8) if codes.ndim == 2 and codes.shape[1] == -(-self.hidden * b // 8)), None)
        if bits is None or scale.ndim != 2 or len(scale) != len(codes) or self.hidden % max(scale.shape[1], 1):
            raise ValueError(
                f"{name} has codes {codes.shape} and scales {scale.shape}, which do not fit {self.hidden} columns"
            )
        self._tables += [codes, scale]
        return codes.ctypes.data, scale.ctypes.data, len(codes), scale.shape[1], bits, 1.0

    def _linear(self, names: list[str], outputs: int, inputs: int) -> tuple[int, int, int, int, int, int]:
        """One layer, or several stacked into one."""
        for name in names:
            if f"{name}.weight_scale" not in self._arrays:
                raise UnsupportedError(f"{name} is not ternary")
        codes = _stack([self._array(f"{name}.weight", np.uint8, (outputs, -(-inputs // 4))) for name in names])
        scales = [self._array(f"{name}.weight_scale") for name in names]
        groups = scales[0].shape[-1]
        if groups == 0 or inputs % groups or any(scale.shape != (outputs, groups) for scale in scales):
            raise ValueError(f"{names[0]}.weight_scale has shape {scales[0].shape}, which does not fit {outputs} x {inputs}")
        biases = [self._arrays.get(f"{name}.bias") for name in names]
        bias = None
        if any(b is not None for b in biases):
            bias = _stack([self._array(f"{name}.bias", shape=(outputs,)) for name in names])
        scale = _stack(scales)
        self._read += [a for a in (codes, scale, bias) if a is not None]
        return (
            codes.ctypes.data,
            scale.ctypes.data,
            0 if bias is None else bias.ctypes.data,
            len(names) * outputs,
            inputs,
            groups,
        )

    def _norm(self, name: str) -> tuple[int, int]:
        shape = (self.hidden,)
        return self._array(f"{name}.weight", shape=shape).ctypes.data, self._array(f"{name}.bias", shape=shape).ctypes.data

    def _bias(self, architecture: Architecture) -> tuple[np.ndarray | None, int]:
        """T5's relative-position biases as MPNet uses them, by distance: float32 ``[heads, 2 * reach + 1]``, and reach."""
        if architecture.bias is None:
            return None, 0
        table = self._array(f"{architecture.bias}.weight")
        reach = self.positions
        bias = np.ascontiguousarray(table[_buckets(np.arange(-reach, reach + 1), 32, 128)].T)
        self._read.append(bias)
        return bias, reach


def _check(config: Mapping[str, Any], architecture: Architecture, hidden: int, heads: int) -> None:
    activation = architecture.get(config, architecture.activation)
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"its activation function is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedError("it is a decoder")
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise UnsupportedError(f"position_embedding_type is {kind!r}, not 'absolute'")
    if hidden % heads or hidden // heads > WIDEST_HEAD:
        raise UnsupportedError(f"{heads} heads do not divide {hidden} columns into heads of at most {WIDEST_HEAD}")
    epsilon = architecture.get(config, "layer_norm_eps")
    if epsilon is not None and not 0 <= epsilon < 1:
        raise ValueError(f"layer_norm_eps={epsilon} in config.json is not allowed: use a number from 0 to 1, often 1e-12")
    if (config.get("quantization_config") or {}).get("activation") != "int8":
        raise UnsupportedError("its activations are not quantized to int8")


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _buckets(distance: np.ndarray, count: int, farthest: int) -> np.ndarray:
    """T5's buckets of relative positions (key - query), both directions: small distances exactly, then logarithmically."""
    half = count // 2
    exact = half // 2
    n = np.abs(distance)
    with np.errstate(divide="ignore"):
        large = np.log(n.astype(np.float32) / exact) / math.log(farthest / exact) * (half - exact)
    bucket = np.where(n < exact, n, np.minimum(exact + np.maximum(large, 0).astype(np.int64), half - 1))
    return bucket + half * (distance > 0)
