"""TernaryHfQuantizer: transformers' hooks, nothing else.

``from_pretrained`` calls :meth:`_process_model_before_weight_loading` on a model whose weights are still on the meta device
and :meth:`_process_model_after_weight_loading` once they are loaded. A float checkpoint is ternarized in the second; for a
packed one the first puts empty packed layers where the files hold packed weights, and transformers fills them.
Only hooks with one meaning in all of transformers 5 are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from . import convert, encoder, packing
from .config import QUANT_METHOD, TernaryConfig
from .files import RESAVE
from .modules import QuantizedEmbedding, TernaryLinear

if TYPE_CHECKING:  # autoload imports this file while transformers.modeling_utils is still being imported
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

# One entry of a safetensors header: (dtype, shape).
Entry = tuple[str, tuple[int, ...]]


class TernaryHfQuantizer(HfQuantizer):
    """Loads, makes, saves and dequantizes ternary models inside ``from_pretrained``; see the module's docstring."""

    requires_calibration = False
    quantization_config: TernaryConfig  # type: ignore[assignment]  # no mixin: see register()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        from transformers import __version__ as version

        if int(version.partition(".")[0]) < 5:
            raise ImportError(f"ternary models need transformers 5, not {version}. Fix: pip install 'transformers>=5'")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise ValueError(
                f"device_map={device_map!r} offloads to disk, which packed ternary weights do not support; they are small: "
                "fix: use device_map='cpu' or 'auto' without offload_folder"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        header = _read_header(checkpoint_files or ())
        packed = {name.removesuffix(".weight_scale") for name in header if name.endswith(".weight_scale")}
        if not packed:
            raise ValueError(
                f"{_where(checkpoint_files)} holds no packed ternary weights although config.json says quant_method "
                f"{QUANT_METHOD!r}. Fix: save the model again, or delete quantization_config from config.json"
            )
        for name, (dtype, _) in header.items():
            if dtype == "U8" and name.endswith(".weight") and name.removesuffix(".weight") not in packed:
                raise ValueError(f"{name}_scale is missing in the file although {name} is packed. {_DAMAGED}")
        for name, modules in _module_names(model, packed).items():
            layers = self._empty([model.get_submodule(module) for module in modules], name, header)
            for module, layer in zip(modules, layers, strict=True):
                convert.replace(model, module, layer)
        convert.tie(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            ties, keep = model.all_tied_weights_keys, model._keep_in_fp32_modules or ()
            convert.ternarize_model(model, self.quantization_config, ties, keep)
            convert.tie(model)
        for name, module in model.named_modules():
            if isinstance(module, (TernaryLinear, QuantizedEmbedding)):
                _check_loaded(name, module)
        if self.pre_quantized and self.quantization_config.dequantize:
            return self._dequantize(model)
        encoder.bind(model)
        model.register_forward_pre_hook(_warn_of_training)
        model.add_model_tags(["ternary", "1.58-bit"])  # for the card that transformers' own push_to_hub writes
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        wanted: Any = dtype or model.dtype
        wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted  # save_pretrained leaves a name in the config
        ties = convert.aliases(model)
        if model.dtype != wanted:
            model.to(wanted)
        convert.dequantize_model(model, wanted)
        model.all_tied_weights_keys.update(ties)
        model.tie_weights(recompute_mapping=False)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters and the float parameters; the packed weights are frozen

    @property
    def is_compileable(self) -> bool:
        return True

    def _empty(self, modules: list[Any], name: str, header: dict[str, Entry]) -> list[nn.Module]:
        """Empty packed layers for ``modules``, which ``name`` in the file holds stacked, after a check that they fit."""
        if not modules:  # a head that this model class does not have
            return []
        weight, scale = header.get(f"{name}.weight"), header[f"{name}.weight_scale"]
        is_table = isinstance(modules[0], nn.Embedding)
        config = self.quantization_config
        choices = [config.embedding_bits, config.position_bits] if is_table else [2]
        if choices[0] is None:
            raise ValueError(f"{name}.weight is quantized but config.json has embedding_bits null. {_DAMAGED}")
        rows, columns, groups = sum(m.weight.shape[0] for m in modules), modules[0].weight.shape[1], scale[1][-1]
        size = weight[1][-1] if weight else None
        bits = next((bits for bits in choices if bits and size == packing.packed_size(columns, bits)), choices[0])
        expected = ("U8", (rows, packing.packed_size(columns, bits)))
        if weight != expected:
            raise ValueError(f"{name}.weight is {_describe(weight)} in the file, expected {_describe(expected)}. {_DAMAGED}")
        if scale != ("F32", (rows, groups)) or columns % groups:
            raise ValueError(
                f"{name}.weight_scale is {_describe(scale)} in the file, expected F32 [{rows}, 1] or [{rows}, {columns} / "
                f"group size]. {_DAMAGED}"
            )
        if is_table:
            return [QuantizedEmbedding.empty_like(m, bits, groups) for m in modules]
        return [TernaryLinear.empty_like(m, groups, self.quantization_config.activation) for m in modules]


_DAMAGED = f"The file is damaged or was not written by hf_ternary. {RESAVE}"


def _module_names(model: PreTrainedModel, packed: set[str]) -> dict[str, list[str]]:
    """The modules of ``model`` that on-disk names stand for.

    A name may differ from its module's (the model class renames it while loading, or adds or drops the base model's
    prefix), or stand for several modules stacked in one tensor (a fused Wqkv); none if ``model`` lacks that head.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = {p: entry for entry in mapping if isinstance(entry, WeightConverter) for p in entry.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    convertible = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}

    def modules(name: str) -> list[str]:
        key, pattern = rename_source_key(f"{name}.weight", renamings, list(converters.values()), prefix, state)
        targets = converters[pattern].target_patterns if pattern else [""]
        candidates = [
            [key.removesuffix(".weight").replace(targets[0], target, 1) for target in targets],
            [name],
            [name.removeprefix(f"{prefix}.")],
            [f"{prefix}.{name}"],
        ]
        return next((names for names in candidates if convertible.issuperset(names)), [])

    return {name: modules(name) for name in sorted(packed)}


def _read_header(files: Sequence[str]) -> dict[str, Entry]:
    """dtype and shape of every tensor in safetensors ``files``.

    Raises:
        ValueError: another file type or a damaged file.
    """
    header: dict[str, Entry] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; packed ternary weights are only read from safetensors")
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    tensor = opened.get_slice(name)
                    header[name] = tensor.get_dtype(), tuple(tensor.get_shape())
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}). {RESAVE}") from error
    return header


def _check_loaded(name: str, module: TernaryLinear | QuantizedEmbedding) -> None:
    convert.check_present(name, module.weight)
    scale = module.weight_scale
    if not bool(((scale >= 0) & scale.isfinite()).all()):
        raise ValueError(f"{name}.weight_scale holds a NaN, an infinity or a negative value. {_DAMAGED}")
    if isinstance(module, TernaryLinear) and packing.has_invalid_ternary(module.weight):
        raise ValueError(f"{name}.weight holds the code 0, which is no ternary value (1, 2, 3 are -1, 0, +1). {_DAMAGED}")
    if isinstance(module, TernaryLinear) and module.bias is not None:
        module.bias.requires_grad_(False)  # loading made it trainable


def _warn_of_training(model: PreTrainedModel, inputs: Any) -> None:
    """Forward pre-hook: say once what training without adapters changes; sentence-transformers' trainer does not."""
    if not (model.training and torch.is_grad_enabled()) or hasattr(model, "peft_config") or torch.compiler.is_compiling():
        return
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    packed = sum(isinstance(module, convert.PACKED) for module in model.modules())
    if trained and packed:
        logger.warning_once(
            f"{type(model).__name__} is packed: training changes its {len(trained)} float parameters ({trained[0]}, ...), "
            f"never its {packed} packed layers. Fix: add a LoRA adapter, or distil from float weights to train all of it"
        )


def _describe(entry: Entry | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {list(entry[1])}"


def _where(files: Sequence[str] | None) -> str:
    return re.sub(r"[^/\\]+$", "", files[0]) if files else "the checkpoint"


def mark_quantized(model: Any, config: TernaryConfig) -> None:
    """Let transformers save and dequantize ``model``, whose layers are packed already, as if it had quantized them."""
    model.hf_quantizer = TernaryHfQuantizer(config, pre_quantized=True)  # type: ignore[arg-type]
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.is_quantized = model.config._is_quantized = True


def register() -> None:
    """Make transformers know quant_method "ternary". Doing it twice is harmless."""
    # register_quantization_config() demands a base class whose import costs transformers; the config must load without it.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TernaryConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TernaryHfQuantizer
    loadable = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)  # before transformers 5.4 load options are built in
    if loadable is not None and TernaryConfig not in loadable:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*loadable, TernaryConfig)
