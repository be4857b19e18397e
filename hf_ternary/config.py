"""TernaryConfig: how a model was, or is to be, ternarized; what ``config.json`` holds as ``quantization_config``.

It knows nothing of torch or transformers, so that a process which only serves a packed model can read it.
"""

import copy
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from .version import __version__

QUANT_METHOD = "ternary"
FORMAT_VERSION = 1

WEIGHT_SCHEMES = ("optimal", "absmean")
ACTIVATIONS = ("int8", None)
EMBEDDING_BITS = (None, 8, 4, 2)


@dataclass
class TernaryConfig:
    """Options of a ternary model; pass it as ``quantization_config`` to any ``from_pretrained``.

    Args:
        group_size: columns of a weight matrix that share a scale. ``None``: one scale a row. A positive multiple of 4 that
            divides every converted layer's input width: one scale a group. ``"tensor"``: one scale for the whole matrix.
        weight_scheme: ``"optimal"``, the least-squares ternary approximation, or ``"absmean"``, the rule of Chen et al.
            (arXiv 2411.15438). See :mod:`hf_ternary.ternarize`.
        activation: ``"int8"`` quantizes the input of every ternary layer per token; ``None`` keeps it in floating point.
        embedding_bits: bits of a value in the token table: 8, 4 or 2; ``None`` keeps every table in floating point. Models
            without a token table (vision) have nothing to quantize there.
        position_bits: the same for every table of 128 rows or more beside it (positions); ``None`` keeps them in float.
        embedding_group_size: columns of an embedding row that share a scale; ``None`` is the whole row.
        modules_to_not_convert: modules that stay in floating point, as dotted names (``"encoder.layer.0"``), parts of them
            (``"query"``) or patterns (``"*.output.dense"``). ``None``, the default, keeps every Linear outside the
            numbered layers (poolers, heads) and what the model class itself keeps in float32; a list replaces that
            default, so that ``[]`` converts every Linear.
        dequantize: when loading a packed model, turn it back into a plain floating-point model (transformers >= 5.4; before,
            it warns and loads the packed model: call ``model.dequantize()``).
        format_version: version of the on-disk format; written by the library.
        hf_ternary_version: version of the library that made the model; written by the library.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    group_size: int | str | None = None
    weight_scheme: str = "optimal"
    activation: str | None = "int8"
    embedding_bits: int | None = 4
    position_bits: int | None = 8
    embedding_group_size: int | None = None
    modules_to_not_convert: list[str] | None = None
    dequantize: bool = False
    format_version: int = FORMAT_VERSION
    hf_ternary_version: str = __version__

    def __post_init__(self) -> None:
        self.quant_method = QUANT_METHOD
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version!r} cannot be read by hf_ternary {__version__}, which reads "
                f"{FORMAT_VERSION}; the model was made by hf_ternary {self.hf_ternary_version}. "
                f"Fix: pip install 'hf_ternary>={self.hf_ternary_version}'"
            )
        _check_choice("weight_scheme", self.weight_scheme, WEIGHT_SCHEMES)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("embedding_bits", self.embedding_bits, EMBEDDING_BITS)
        _check_choice("position_bits", self.position_bits, EMBEDDING_BITS)
        _check_choice("dequantize", self.dequantize, (True, False))
        if self.group_size != "tensor":
            _check_group_size("group_size", self.group_size, ", or 'tensor' for one scale a matrix")
        _check_group_size("embedding_group_size", self.embedding_group_size)
        names = self.modules_to_not_convert
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) and n for n in names)):
            raise ValueError(
                f"modules_to_not_convert={names!r} is not allowed: give a list of module names or patterns, e.g. "
                "['encoder.layer.0', '*.query'], or None for the default"
            )

    def to_dict(self) -> dict[str, Any]:
        """What is written to ``config.json``: everything but the load option ``dequantize``."""
        options = asdict(self)
        del options["dequantize"]
        return {"quant_method": self.quant_method, **options}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build a config from :meth:`to_dict`'s output; ``kwargs`` override it (transformers' calling convention).

        Raises:
            ValueError: an unknown key (the message names the version to install) or a value that is not allowed.
        """
        known = {field.name for field in fields(cls)}
        options = {key: copy.deepcopy(value) for key, value in config_dict.items() if key != "quant_method"}
        unknown = sorted(options.keys() - known)
        if unknown:
            writer = options.get("hf_ternary_version", "a newer version")
            raise ValueError(
                f"quantization_config holds {unknown[0]!r}, which hf_ternary {__version__} does not know; allowed: "
                f"{', '.join(sorted(known))}. The model was made by hf_ternary {writer}. Fix: "
                + (f"pip install 'hf_ternary>={writer}'" if writer[0].isdigit() else "pip install -U hf_ternary")
            )
        config = cls(**{**options, **{key: value for key, value in kwargs.items() if key in known}})
        unused = {key: value for key, value in kwargs.items() if key not in known}
        return (config, unused) if return_unused_kwargs else config

    # The rest of what transformers calls on a quantization config.

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options that may be given when a packed model is loaded; they override the saved ones."""
        return {"dequantize": self.dequantize}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set known options in place and return the rest."""
        updated, unused = self.from_dict({**self.to_dict(), "dequantize": self.dequantize}, True, **kwargs)
        self.__dict__.update(updated.__dict__)
        return unused


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{name}={value!r} is not allowed: use {choices}")


def _check_group_size(name: str, value: Any, alternative: str = "") -> None:
    if value is not None and (type(value) is not int or value <= 0 or value % 4):
        raise ValueError(
            f"{name}={value!r} is not allowed: use a positive multiple of 4 (64, say), None for one scale a row{alternative}"
        )
