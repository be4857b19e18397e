"""Which modules are swapped, and the swap: float <-> trainable <-> packed, in place, on any ``nn.Module``."""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from .config import TernaryConfig
from .modules import (
    FakeQuantizedEmbedding,
    FakeTernaryLinear,
    QuantizedEmbedding,
    TernaryLinear,
    TiedEmbedding,
    TiedLinear,
    table_multiplier,
)

# A smaller table (token types, relative-position buckets) saves nothing worth its error.
SMALLEST_TABLE = 128

PACKED = (TernaryLinear, QuantizedEmbedding, TiedEmbedding, TiedLinear)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is a glob of the dotted ``name`` or a run of its parts, like ``layer.0`` in ``layer.0.key``."""
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def linears_to_convert(model: nn.Module, config: TernaryConfig, keep: Iterable[str] = ()) -> list[str]:
    """Names of the Linear layers that ``config`` ternarizes.

    Args:
        model: a float model.
        config: its ``modules_to_not_convert`` decides; see :class:`TernaryConfig`.
        keep: patterns that the model class itself keeps in float32; they count when ``modules_to_not_convert`` is None.

    Raises:
        ValueError: nothing is left to convert, or a given pattern names no module.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and not _gives_dtype(model, name)]
    patterns = config.modules_to_not_convert
    if patterns is None:
        chosen = [n for n in names if re.search(r"\.\d+\.", n) and not any(matches(n, p) for p in keep)]
    else:
        everything = [name for name, _ in model.named_modules()]
        for pattern in patterns:
            if not any(matches(name, pattern) for name in everything):
                raise ValueError(
                    f"modules_to_not_convert: {pattern!r} names no module of {type(model).__name__}; its Linear layers are "
                    f"{_some(names)}. Fix the name or remove it"
                )
        chosen = [n for n in names if not any(matches(n, p) for p in patterns)]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no Linear layer to ternarize (Linear layers: {_some(names)}; by default those "
            "inside numbered layers are converted). Fix: pass modules_to_not_convert=[] to convert every Linear, or choose "
            "a transformer model"
        )
    return chosen


def _gives_dtype(model: nn.Module, name: str) -> bool:
    """Whether the layer is T5's or a relative's ``wo``: its block casts activations to the dtype of its weight."""
    block, _, own = name.rpartition(".")
    return own == "wo" and re.search(r"Dense\w*Act\w*Dense", type(model.get_submodule(block)).__name__) is not None


def embeddings_to_convert(model: nn.Module, config: TernaryConfig) -> dict[str, int]:
    """Names of the tables that ``config`` quantizes and their bits: the token table and large ones beside it (positions)."""
    if config.embedding_bits is None:
        return {}
    name_of = {module: name for name, module in model.named_modules()}
    tokens = next(filter(None, map(_token_table, model.modules())), None)
    if tokens is None:
        return {}
    parent = name_of[tokens].rpartition(".")[0]
    siblings = model.get_submodule(parent).children() if parent else []
    tables: dict[str, int | None] = {name_of[tokens]: config.embedding_bits}
    for table in siblings:
        if _is_table(table) and table is not tokens and table.num_embeddings >= SMALLEST_TABLE:
            tables[name_of[table]] = config.position_bits
    keep = config.modules_to_not_convert or []
    return {name: bits for name, bits in tables.items() if bits and not any(matches(name, p) for p in keep)}


def _token_table(module: nn.Module) -> nn.Embedding | None:
    """What ``get_input_embeddings`` of a transformers model returns, if that is a table (a vision model's is not)."""
    try:
        table = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return table if _is_table(table) else None


def _is_table(module: nn.Module | None) -> TypeGuard[nn.Embedding]:
    return isinstance(module, nn.Embedding) and table_multiplier(module) is not None


def ternarize_model(
    model: nn.Module, config: TernaryConfig, ties: Mapping[str, str] | None = None, keep: Iterable[str] = ()
) -> nn.Module:
    """Turn a float model into a packed one, in place.

    Args:
        model: a model with float weights.
        config: what to convert, and how.
        ties: tied weights, as names of parameters: {alias: source}.
        keep: see :func:`linears_to_convert`.

    Raises:
        ValueError: no Linear layer to convert, a NaN or infinite weight, or a group size that does not divide a layer.
    """
    return _convert(
        model,
        config,
        ties or {},
        keep,
        lambda m: TernaryLinear.from_float(m, config.weight_scheme, config.group_size, config.activation),
        lambda m, bits: QuantizedEmbedding.from_float(m, bits, config.embedding_group_size),
    )


def fake_ternarize_model(
    model: nn.Module,
    config: TernaryConfig,
    ties: Mapping[str, str] | None = None,
    keep: Iterable[str] = (),
    learned_scale: bool = False,
) -> nn.Module:
    """Turn a float model into a trainable fake-quantized one, in place; arguments and errors of :func:`ternarize_model`."""
    return _convert(
        model,
        config,
        ties or {},
        keep,
        lambda m: FakeTernaryLinear(m, config.weight_scheme, config.group_size, config.activation, learned_scale),
        lambda m, bits: FakeQuantizedEmbedding(m, bits, config.embedding_group_size),
    )


def pack_model(model: nn.Module) -> nn.Module:
    """Replace every fake-quantized layer by its packed twin, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (FakeTernaryLinear, FakeQuantizedEmbedding)):
            replace(model, name, module.pack())
    return model


def dequantize_model(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every packed layer by a plain floating-point one, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PACKED):
            replace(model, name, module.to_float(dtype))
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name``, in the old one's training mode, and keep transformers from initialising it."""
    module.train(model.get_submodule(name).training)
    vars(module)["_is_hf_initialized"] = True  # else it calls normal_() on packed bytes
    model.set_submodule(name, module)


def tie(model: Any) -> None:
    """Point a transformers model's tied weights at the quantized tables that they are tied to, in place.

    They own no tensor then, so they leave ``all_tied_weights_keys``; ties of float weights stay.
    """
    for alias, source in list(model.all_tied_weights_keys.items()):
        table = model.get_submodule(source.rpartition(".")[0])
        if not alias.endswith(".weight") or not isinstance(table, QuantizedEmbedding):
            continue
        name = alias.removesuffix(".weight")
        old = model.get_submodule(name)
        replace(model, name, TiedLinear(table, old.bias) if isinstance(old, nn.Linear) else TiedEmbedding(table))
        del model.all_tied_weights_keys[alias]


def aliases(model: nn.Module) -> dict[str, str]:
    """What :func:`tie` pointed at quantized tables, as names of parameters: {alias: source}."""
    name_of = {module: name for name, module in model.named_modules()}
    tied = ((name, module) for module, name in name_of.items() if isinstance(module, (TiedEmbedding, TiedLinear)))
    return {f"{name}.weight": f"{name_of[module._source[0]]}.weight" for name, module in tied}


def _convert(
    model: nn.Module,
    config: TernaryConfig,
    ties: Mapping[str, str],
    keep: Iterable[str],
    convert_linear: Callable[[nn.Linear], nn.Module],
    convert_embedding: Callable[[nn.Embedding, int], nn.Module],
) -> nn.Module:
    tied = {name.removesuffix(".weight") for name in (*ties.keys(), *ties.values())}
    linears = [name for name in linears_to_convert(model, config, keep) if name not in tied]
    tables = embeddings_to_convert(model, config)
    for name in (*linears, *tables):
        _check_convertible(name, model.get_submodule(name), config)
    for name in linears:
        replace(model, name, convert_linear(cast(nn.Linear, model.get_submodule(name))))
    for name, bits in tables.items():
        replace(model, name, convert_embedding(cast(nn.Embedding, model.get_submodule(name)), bits))
    return model


def _check_convertible(name: str, module: nn.Module, config: TernaryConfig) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    check_present(name, weight)
    if not weight.isfinite().all():
        raise ValueError(f"{name}.weight holds a NaN or an infinity and cannot be quantized; fix: use an intact checkpoint")
    is_table = isinstance(module, nn.Embedding)
    option = "embedding_group_size" if is_table else "group_size"
    size, width = getattr(config, option), weight.shape[1]
    if isinstance(size, int) and width % size:
        raise ValueError(
            f"{option}={size} does not divide {name}'s width {width}; use a divisor of {width}, None for one scale a row, "
            f"or add {name!r} to modules_to_not_convert"
        )


def check_present(name: str, weight: torch.Tensor) -> None:
    """Raises ValueError if the weight of the module ``name`` was left on disk or on the meta device."""
    if weight.is_meta:
        raise ValueError(
            f"{name}.weight is not in memory: device_map has offloaded it. Fix: load the model on one device, save it, and "
            "load the packed one"
        )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "") or "none"
