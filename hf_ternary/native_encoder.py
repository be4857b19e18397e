"""The encoder in C++, built from a config and named arrays. Imports no torch.

The C++ side (csrc/encoder.h) sees only numbers and addresses; :mod:`.triton_encoder` is its twin for GPUs. Both users give
the same arrays: :mod:`.encoder` those of a loaded transformers model, :mod:`.serving` those of a file.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from .architectures import ACTIVATION_FUNCTIONS, BUCKETS, Architecture, UnsupportedError, check, distance_buckets, divides
from .ops import backends

LONGEST, UNLIMITED = 2**17, 2**40  # tokens: of a table of rotations, and of anything
Arrays = Mapping[str, np.ndarray]


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
        check(config, architecture, self.hidden, self.heads)
        count = int(get(architecture.layers))
        self._array(f"{architecture.layer.format(count - 1)}.{architecture.down}.weight", np.uint8)  # before many others
        layers = [architecture.layer.format(i) for i in range(count)]
        intermediate = self._intermediate(architecture, layers[0])
        self.positions = self._positions(architecture, config)
        # RoBERTa's kin, which know padding by its id, count positions from the one after it.
        position_offset = 0 if architecture.padding is None else 1 + int(get(architecture.padding))
        self.longest = self.positions - position_offset
        self._norm_bias = get("norm_bias") is not False
        norms: list[str | None] = [f"{layer}.{name}" for layer in layers for name in architecture.norms]
        first_norm = None
        if architecture.pre_norm:  # the norm after a layer is the first one of the next
            first_norm, *norms = *norms, architecture.final_norm
        module = backends.native()
        assert module is not None
        self._native = module.Encoder(
            backend=backends.choose().backend,
            hidden=self.hidden,
            heads=self.heads,
            intermediate=intermediate,
            activation=ACTIVATION_FUNCTIONS[get(architecture.activation)],
            gated=architecture.gated,
            pre_norm=architecture.pre_norm,
            epsilon=float(get(architecture.epsilon)),
            padding_id=-1 if architecture.padding is None else int(get(architecture.padding)),
            tokens=self._table(architecture.tokens),
            positions=self._table(architecture.positions),
            types=self._table(architecture.types),
            norm=self._norm(architecture.norm),
            first_norm=self._norm(first_norm if architecture.first_norm else None),
            bias=self._bias(architecture.bias),
            reach=self.positions,
        )
        qkv, up = len(architecture.qkv), len(architecture.up)
        out_scale, down_scale = architecture.scales or (None, None)
        attention = self._attention(architecture, config, len(layers))
        for i, layer in enumerate(layers):
            before, after, rotation = attention[i]
            self._native.add_layer(
                qkv=self._linear(layer, architecture.qkv, 3 * self.hidden // qkv, self.hidden),
                out=self._linear(layer, (architecture.out,), self.hidden, self.hidden, out_scale),
                up=self._linear(layer, architecture.up, (1 + architecture.gated) * intermediate // up, self.hidden),
                down=self._linear(layer, (architecture.down,), self.hidden, intermediate, down_scale),
                attention_norm=self._norm(norms[2 * i]),
                output_norm=self._norm(norms[2 * i + 1]),
                before=before,
                after=after,
                rotation=rotation,
            )
        del self._arrays, self._read

    def hidden_states(
        self, ids: int, types: int, states: int, mask: int, rows: int, columns: int, y: int, threads: int
    ) -> bool:
        """Fill ``y`` float32 ``[rows, columns, hidden]``; arguments are addresses.

        From int64 ids, types and mask ``[rows, columns]``, or from embedded tokens, float32 ``[rows, columns, hidden]``.
        False, with ``y`` unwritten: an id out of range, an empty row, or a mask that is no run of ones in each row.
        """
        return self._native.hidden_states(ids, types, states, mask, rows, columns, y, threads)

    def embeddings(self, ids: list[list[int]], pooling: str, normalize: bool, threads: int) -> np.ndarray:
        """Pooled embeddings, float32 ``[len(ids), hidden]``, of the token ids of several sequences.

        Raises:
            ValueError: a sequence without ids, an id without a row in the token table, or a sequence that is too long.
        """
        y = np.empty((len(ids), self.hidden), np.float32)
        if not all(ids):
            raise ValueError("a text has no token: the tokenizer adds none of its own. Fix: leave empty texts out")
        if not self._native.embeddings(ids, pooling, normalize, y.ctypes.data, threads):
            raise ValueError(
                f"a text has a token id outside the table, or more than the {self.longest} tokens that the model takes. "
                "Fix: use the tokenizer that belongs to the model, or a smaller max_seq_length"
            )
        return y

    def _array(self, name: str, dtype: type = np.float32, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = self._arrays.get(name)
        if array is None:
            raise ValueError(f"{name} is missing. Fix: download the model again or save it again")
        if array.dtype != dtype:
            raise UnsupportedError(
                f"{name} is {array.dtype}, the native encoder reads {np.dtype(dtype)}: load the float model with "
                "dtype='float32' and save it again"
            )
        if shape is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}. Fix: save the model again")
        array = np.ascontiguousarray(array)
        self._read.append(array)
        return array

    def _table(self, name: str | None) -> tuple[int, int, int, int, int]:
        if name is None:
            return 0, 0, 0, 1, 32
        if f"{name}.weight_scale" not in self._arrays:
            table = self._array(f"{name}.weight")
            if table.ndim != 2 or table.shape[1] != self.hidden:
                raise ValueError(f"{name}.weight has shape {table.shape}, expected (..., {self.hidden})")
            self._tables.append(table)
            return table.ctypes.data, 0, len(table), 1, 32
        codes, scale = self._array(f"{name}.weight", np.uint8), self._array(f"{name}.weight_scale")
        bits = next((b for b in (2, 4, 8) if codes.ndim == 2 and codes.shape[1] == -(-self.hidden * b // 8)), None)
        if bits is None or scale.ndim != 2 or len(scale) != len(codes) or not divides(scale.shape[1], self.hidden):
            raise ValueError(
                f"{name} has codes {codes.shape} and scales {scale.shape}, which do not fit {self.hidden} columns"
            )
        self._tables += [codes, scale]
        return codes.ctypes.data, scale.ctypes.data, len(codes), scale.shape[1], bits

    def _intermediate(self, architecture: Architecture, layer: str) -> int:
        """Columns that ``down`` reads."""
        scales = [self._arrays.get(f"{layer}.{name}.weight_scale", np.empty(0)) for name in architecture.up]
        return sum(map(len, scales)) // (1 + architecture.gated)

    def _positions(self, architecture: Architecture, config: Mapping[str, Any]) -> int:
        """Tokens of the longest sequence."""
        if architecture.rotary:
            return min(int(architecture.get(config, "max_position_embeddings")), LONGEST)
        if architecture.positions is None:
            return UNLIMITED
        return len(self._arrays.get(f"{architecture.positions}.weight", ()))

    def _attention(self, architecture: Architecture, config: Mapping[str, Any], layers: int) -> list[tuple[int, int, int]]:
        """Of every layer: the tokens that one sees before and after it, and the address of the rotations or 0."""
        if not architecture.rotary:
            return [(UNLIMITED, 0 if architecture.causal else UNLIMITED, 0)] * layers
        local = int(architecture.get(config, "local_attention"))
        if local < 0:
            raise ValueError(f"local_attention={local} in config.json is not allowed: use 0 or more")
        window = {"full_attention": UNLIMITED, "sliding_attention": local // 2}
        kinds, rope = config.get("layer_types") or [], config.get("rope_parameters") or {}
        width, tables = self.hidden // self.heads, {}
        for kind in set(kinds):
            how = rope.get(kind) or {}
            if kind not in window or how.get("rope_type") != "default" or width % 2:
                raise UnsupportedError(
                    f"its {kind} rotates {width} columns by {how}, not an even number by the default rule"
                )
            tables[kind] = _rotations(float(how["rope_theta"]), self.positions, width)
        if len(kinds) != layers:
            raise UnsupportedError(f"its config has layer_types for {len(kinds)} of {layers} layers")
        self._tables += tables.values()
        return [(window[kind], window[kind], tables[kind].ctypes.data) for kind in kinds]

    def _linear(
        self, layer: str, modules: tuple[str, ...], outputs: int, inputs: int, factor: str | None = None
    ) -> tuple[int, int, int, int, int, int]:
        """One linear layer, or several stacked into one, times the layer scale ``factor``."""
        names = [f"{layer}.{module}" for module in modules]
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
        if factor is not None:
            factors = self._array(f"{layer}.{factor}", shape=(outputs,))
            scale, bias = scale * factors[:, None], None if bias is None else bias * factors
        self._read += [a for a in (codes, scale, bias) if a is not None]
        return (
            codes.ctypes.data,
            scale.ctypes.data,
            0 if bias is None else bias.ctypes.data,
            len(names) * outputs,
            inputs,
            groups,
        )

    def _norm(self, name: str | None) -> tuple[int, int]:
        if name is None:
            return 0, 0
        shape = (self.hidden,)
        weight = self._array(f"{name}.weight", shape=shape).ctypes.data
        return weight, self._array(f"{name}.bias", shape=shape).ctypes.data if self._norm_bias else 0

    def _bias(self, name: str | None) -> int:
        """T5's relative-position biases as MPNet uses them, by distance: address of ``[heads, 2 * positions + 1]``."""
        if name is None:
            return 0
        table, reach = self._array(f"{name}.weight", shape=(BUCKETS, self.heads)), self.positions
        bias = np.ascontiguousarray(table[distance_buckets(reach)].T)
        self._read.append(bias)
        return bias.ctypes.data


def _rotations(theta: float, positions: int, width: int) -> np.ndarray:
    """RoPE's cosines and sines of every position, float32 ``[positions, width]``, rounded where transformers rounds."""
    frequencies = 1 / (theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
