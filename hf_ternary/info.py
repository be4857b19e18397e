"""What a packed model folder holds, read from its files: no model is built and no model code runs."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from . import packing
from .config import TernaryConfig
from .files import RESAVE, read_config, read_json


@dataclass(frozen=True)
class Layer:
    """One packed layer on disk.

    Attributes:
        name: as in the file, after the folder of its module if it has one.
        kind: ``"linear"`` or ``"embedding"``.
        bits: bits a weight.
        shape: of the float weight. A width that does not fill its last byte counts as if it did: files do not state it.
        groups: scales a row.
        zeros: share of zeros among the weights of a linear layer; None for an embedding, whose levels have no zero.
        bytes: weight and scales.
    """

    name: str
    kind: str
    bits: int
    shape: tuple[int, int]
    groups: int
    zeros: float | None
    bytes: int

    @property
    def float32_bytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelInfo:
    """A packed model on disk; ``float_tensors`` is {name: number of values} of all that is not packed."""

    config: TernaryConfig
    layers: tuple[Layer, ...]
    float_tensors: dict[str, int]
    bytes: int

    @property
    def float32_bytes(self) -> int:
        """Bytes that the same tensors take in float32."""
        return sum(layer.float32_bytes for layer in self.layers) + 4 * sum(self.float_tensors.values())

    @property
    def zeros(self) -> float:
        """Share of zeros among all ternary weights."""
        sizes = [(layer.zeros, layer.float32_bytes) for layer in self.layers if layer.zeros is not None]
        return sum(zeros * size for zeros, size in sizes) / sum(size for _, size in sizes)


def read_info(folder: str | Path) -> ModelInfo:
    """Read a model folder.

    Raises:
        ValueError: no packed ternary model, or a damaged file.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = sorted(folder.rglob("*.safetensors"))
    with ExitStack() as stack:
        # Modules of sentence-transformers lie in folders of their own, and may call their tensors alike.
        opened = [(path.parent.relative_to(folder), _open(path, stack)) for path in files]
        home = {(where / name).as_posix(): (file, name) for where, file in opened for name in list(file.keys())}
        packed = sorted(name.removesuffix("_scale") for name in home if name.endswith(".weight_scale"))
        if not packed:
            raise ValueError(f"{folder} holds no packed weights. Fix: make them with `hf-ternary quantize {folder} DST`")
        missing = [name for name in packed if name not in home]
        if missing:
            raise ValueError(f"{missing[0]} is missing in {folder}. {RESAVE}")
        # The two tensors of a layer may lie in different shards.
        pairs = {name: (_tensor(home[name]), _tensor(home[f"{name}_scale"])) for name in packed}
        bits = _table_bits([weight for weight, _ in pairs.values()], config, _widths(folder))
        layers = tuple(_layer(name, weight, scale, bits) for name, (weight, scale) in pairs.items())
        rest = sorted(home.keys() - pairs.keys() - {f"{name}_scale" for name in pairs})
        float_tensors = {path: math.prod(file.get_slice(name).get_shape()) for path in rest for file, name in [home[path]]}
    return ModelInfo(config, layers, float_tensors, sum(file.stat().st_size for file in files))


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). {RESAVE}") from error


def _tensor(home: tuple[Any, str]) -> Any:
    file, name = home
    return file.get_tensor(name)


def _is_table(weight: Any) -> bool:
    return packing.has_invalid_ternary(weight)  # a ternary weight never holds a field of 0; a table uses all its levels


def _widths(folder: Path) -> set[int]:
    """How wide a row of a token table may be, by config.json."""
    configs = [read_json(file) for file in (folder / "config.json", *sorted(folder.glob("*/config.json")))]
    levels = [level for config in configs for level in (config, *config.values()) if isinstance(level, dict)]
    return {level[key] for level in levels for key in ("embedding_size", "hidden_size", "d_model", "dim") if key in level}


def _table_bits(weights: list[Any], config: TernaryConfig, widths: set[int]) -> dict[int, int]:
    """Bits of the tables by the bytes of their rows, which are all equally wide."""
    if config.embedding_bits is None:
        return {}
    sizes = sorted({weight.shape[1] for weight in weights if _is_table(weight)})
    bits = sorted({config.embedding_bits, config.position_bits or config.embedding_bits})
    if len(sizes) == len(bits):
        return dict(zip(sizes, bits, strict=True))
    fitting = {size: [b for b in bits if any(packing.packed_size(w, b) == size for w in widths)] for size in sizes}
    return {size: fits[0] if len(fits) == 1 else config.embedding_bits for size, fits in fitting.items()}


def _layer(name: str, weight: Any, scale: Any, table_bits: dict[int, int]) -> Layer:
    rows, size = weight.shape
    bits = table_bits.get(size) if _is_table(weight) else None
    width = size * 8 // (bits or 2)
    return Layer(
        name=name.removesuffix(".weight"),
        kind="embedding" if bits else "linear",
        bits=bits or 2,
        shape=(rows, width),
        groups=scale.shape[1],
        zeros=None if bits else (packing.unpack(weight, width) == 0).float().mean().item(),
        bytes=weight.nbytes + scale.nbytes,
    )
