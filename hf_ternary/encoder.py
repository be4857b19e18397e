"""Binds a transformers encoder with ternary layers to an encoder of our own, which computes all its layers in one call.

How: when a model is loaded, the base model inside it (``BertModel``, ...) gets a subclass of its own class whose ``forward``
asks our encoder, in C++ for weights on the CPU and in Triton for those on a GPU, and its parent class whenever that may not
serve: gradients, hidden states, attentions, adapters, hooks, another device or dtype, a mask with holes. Images are embedded
by torch; the encoder goes on from there. Our side is made at the first call, again after a weight was changed or moved, and
belongs to no module: it is neither saved, copied nor pickled.
Why a subclass and not a replaced method: transformers' classes stay as they are, ``super().forward`` is the fallback, and
everything that looks at the class's name (saving, pipelines, conversion) sees the one it knows.
"""

import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from .architectures import ARCHITECTURES, Architecture, find_layout
from .modules import QuantizedEmbedding, TernaryLinear
from .native_encoder import NativeEncoder
from .ops import backends
from .ops.native import share_torch_threads

if TYPE_CHECKING:
    from .triton_encoder import TritonEncoder

# What runs the encoder of weights on a device, in these dtypes.
_DEVICES = {
    "cpu": ("native", (torch.float32,)),
    "cuda": ("triton", (torch.float32, torch.float16, torch.bfloat16)),
}
# Arguments of forward that the native path reads; any other must be None or False. Of images, also those of the embeddings.
_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "return_dict", "use_cache"}
_IMAGE_INPUTS = {"pixel_values", "return_dict"}


def bind(model: nn.Module) -> None:
    """Give our forward to every supported base model inside ``model``; no-op where only the reference backend runs."""
    if backends.choose().backend == "reference" and not torch.cuda.is_available():
        return
    for module in model.modules():
        if _architecture(module):
            cls: Any = type(module)
            module.__class__ = _native_class(cls)


def explain(model: nn.Module) -> dict[str, str]:
    """Which path the encoders inside ``model`` take at inference, on the device where it is now.

    Returns:
        {name: path}: ``"native"`` (C++, on the CPU), ``"triton"`` (on a GPU) or ``"module by module: <why>"``. The name of
        ``model`` itself is ``""``. A model without a known encoder gives ``{"": "module by module: <why>"}``.
    """
    paths = {}
    for name, module in model.named_modules():
        if hasattr(module, "hf_ternary_base"):
            state = _state(module)
            known = state.obstacle is None
            paths[name] = _DEVICES[state.device.type][0] if known else f"module by module: {state.obstacle}"
        elif _architecture(module):
            choice = backends.choose()
            why = (
                f"the backend is {choice.backend!r}"
                if choice.backend == "reference"
                else "it was not loaded as a packed model"
            )
            paths[name] = f"module by module: {why}"
    names = ", ".join(ARCHITECTURES)
    return paths or {"": f"module by module: {type(model).__name__} holds no known encoder ({names})"}


def _architecture(module: nn.Module) -> str | None:
    """The supported transformers class that ``module`` is exactly an instance of."""
    cls = type(module)
    known = cls.__name__ in ARCHITECTURES and cls.__module__.startswith("transformers.models.")
    wraps = not hasattr(module, "embeddings")  # older transformers keep CLIP's towers inside classes of the newer names
    return cls.__name__ if known and not wraps and not hasattr(cls, "hf_ternary_base") else None


@functools.cache
def _native_class(base: Any) -> Any:
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _forward(self, {**dict(zip(names, args, strict=False)), **kwargs})
        return base.forward(self, *args, **kwargs) if output is None else output

    def reduce(self: Any, protocol: Any) -> Any:
        _, arguments, *state = base.__reduce_ex__(self, protocol)
        return _new, (base, *arguments[1:]), *state

    def train(self: Any, mode: bool = True) -> Any:
        # Looking is quicker than setting, and a list than modules(): sentence-transformers calls eval() in every encode().
        modules = [self]
        for module in modules:
            if module.training != mode:
                return base.train(self, mode)
            modules += [child for child in module._modules.values() if child is not None]
        return self

    def named_modules(self: Any, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        # As torch's, without its generators inside generators: sentence-transformers looks at all tensors in every encode().
        memo = set() if memo is None else memo
        waiting = [(prefix, self)]
        while waiting:
            name, module = waiting.pop()
            if module in memo:
                continue
            if remove_duplicate:
                memo.add(module)
            yield name, module
            if module._modules:
                start = f"{name}." if name else ""
                children = reversed(module._modules.items())
                waiting += [(start + key, child) for key, child in children if child is not None]

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "hf_ternary_base": base,
        "forward": forward,
        "train": train,
        "named_modules": named_modules,
    }
    return type(base)(base.__name__, (base,), members)


def _new(base: Any) -> Any:
    """What unpickling starts from: the class is made anew, it has no place to be imported from."""
    return object.__new__(_native_class(base))


def _forward(module: Any, inputs: dict[str, Any]) -> Any:
    """Our forward's output, or None if it may not serve these inputs."""
    if not _may_serve(module, inputs):
        return None
    state = _state(module)
    ids: Any
    ids, types, mask = (inputs.get(name) for name in ("input_ids", "token_type_ids", "attention_mask"))
    device = (inputs["pixel_values"] if ids is None else ids).device
    if state.encoder is None or state.device != device or not _pools_a_token(module, ids, mask):
        return None
    if isinstance(state.encoder, NativeEncoder):
        y = _in_cpp(state.encoder, ids, types, mask, _embed(module, inputs, state) if ids is None else None)
    else:
        y = state.encoder.hidden_states(ids, types, mask)
    return None if y is None else _output(module, y, ids)


def _in_cpp(
    native: NativeEncoder,
    ids: torch.Tensor | None,
    types: torch.Tensor | None,
    mask: torch.Tensor | None,
    states: torch.Tensor | None,
) -> torch.Tensor | None:
    """Hidden states, or None; of ids or of ``states``, embedded tokens."""
    mask = None if mask is None else mask.long()
    given = [None if t is None else t.contiguous() for t in (ids, types, states, mask)]
    source: Any = states if ids is None else ids
    rows, columns = source.shape[:2]
    y = torch.empty((rows, columns, native.hidden), dtype=torch.float32, device="cpu")
    at_ids, at_types, at_states, at_mask = (0 if t is None else t.data_ptr() for t in given)
    at_y, threads = y.data_ptr(), torch.get_num_threads()
    return y if native.hidden_states(at_ids, at_types, at_states, at_mask, rows, columns, at_y, threads) else None


def _embed(module: Any, inputs: dict[str, Any], state: "_State") -> torch.Tensor:
    """What the first layer of a vision encoder reads, float32 ``[images, tokens, hidden]``.

    Patches go through the convolution; class token, positions and biases are what the module makes of a black image. They
    depend on nothing but the size, so they are kept for the last one: no table of positions is resized in every call.
    """
    names = _arguments(type(module.embeddings).forward)
    inputs = {name: value for name, value in inputs.items() if name in names}
    if inputs.get("bool_masked_pos") is not None:
        return module.embeddings(**inputs)
    pixels = inputs["pixel_values"]
    key = *pixels.shape[1:], bool(inputs.get("interpolate_pos_encoding"))
    known, black = state.black
    if known != key:
        black = module.embeddings(**{**inputs, "pixel_values": torch.zeros_like(pixels[:1])})
        state.black = key, black
    convolution = next(m for m in module.embeddings.modules() if isinstance(m, nn.Conv2d))
    patches = F.conv2d(pixels, convolution.weight, stride=convolution.stride).flatten(2).transpose(1, 2)
    return torch.cat([black[:, :1].expand(len(pixels), -1, -1), black[:, 1:] + patches], dim=1)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _may_serve(module: Any, inputs: dict[str, Any]) -> bool:
    if torch.is_grad_enabled() or module.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    vision = ARCHITECTURES[module.hf_ternary_base.__name__][0].tokens is None
    known = _IMAGE_INPUTS | _arguments(type(module.embeddings).forward) if vision else _INPUTS
    for name, value in inputs.items():
        if value is not None and value is not False and name not in known:
            return False
    config = module.config
    if inputs.get("return_dict") is False or not getattr(config, "return_dict", True):
        return False
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return False
    source: Any = inputs.get("pixel_values" if vision else "input_ids")
    if type(source) is not torch.Tensor:
        return False
    device = source.device
    if device.type not in _DEVICES or torch.is_autocast_enabled(device.type):
        return False
    if vision:
        return _is_plain(source, device, torch.float32, 4)
    types, mask = inputs.get("token_type_ids"), inputs.get("attention_mask")
    if not _is_plain(source, device, torch.int64, 2):
        return False
    if types is not None and not (_is_plain(types, device, torch.int64, 2) and types.shape == source.shape):
        return False
    if mask is None:
        return True
    if type(mask) is not torch.Tensor:  # ModernBERT takes a dict of masks
        return False
    return _is_plain(mask, device, mask.dtype, 2) and not mask.is_floating_point() and mask.shape == source.shape


def _is_plain(tensor: Any, device: torch.device, dtype: torch.dtype, dimensions: int) -> bool:
    if type(tensor) is not torch.Tensor or tensor.device != device:
        return False
    return tensor.dtype == dtype and tensor.dim() == dimensions and tensor.numel() > 0


def _pools_a_token(module: Any, ids: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    """Whether the end of every text, where CLIP pools, is no padding."""
    if ids is None or mask is None or not module.hf_ternary_base.__name__.startswith("CLIP"):
        return True
    return bool(mask.gather(1, _eos(module, ids)).all())


def _eos(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Where CLIP pools a text, int64 column ``[rows, 1]``: the first end of text, which has the largest id in old models."""
    ends = ids if module.eos_token_id == 2 else (ids == module.eos_token_id).int()
    return ends.argmax(dim=-1, keepdim=True)


def _output(module: Any, hidden_states: torch.Tensor, ids: torch.Tensor | None) -> Any:
    from transformers import modeling_outputs as outputs

    kind: Any = outputs.BaseModelOutputWithPooling
    pooled: torch.Tensor | None
    match module.hf_ternary_base.__name__:
        case "DistilBertModel" | "ModernBertModel":
            return outputs.BaseModelOutput(last_hidden_state=hidden_states)
        case "CLIPTextModel" | "CLIPTextTransformer":
            assert ids is not None
            pooled = hidden_states.take_along_dim(_eos(module, ids).unsqueeze(-1), dim=1).squeeze(1)
        case "CLIPVisionModel" | "CLIPVisionTransformer":
            pooled = module.post_layernorm(hidden_states[:, 0])
        case "Dinov2Model":
            pooled = hidden_states[:, 0]
        case name:
            pooled = None if module.pooler is None else module.pooler(hidden_states)
            if name not in ("MPNetModel", "ViTModel"):
                kind = outputs.BaseModelOutputWithPoolingAndCrossAttentions
    return kind(last_hidden_state=hidden_states, pooler_output=pooled)


class _State:
    """The encoder of a module and its device, or the obstacle, as long as ``holds()``."""

    def __init__(self, module: Any) -> None:
        modules = [module, *(m for part in _parts(module) for m in part.modules())]
        inner = modules[1:]  # the encoder's own hooks run around its forward
        self._attributes = [vars(m) for m in inner]
        tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        tables += [table for m in inner for table in (m._forward_hooks, m._forward_pre_hooks)]
        tables += [nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks]
        self._tables = [table for table in tables if table]
        self._empty = [table for table in tables if not table]  # most of them; they need no list in every call
        self._contents = self._read()
        self._tensors = [v for v in self._contents if type(v) in (torch.Tensor, nn.Parameter)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        devices = (value.device for value in self._contents if isinstance(value, torch.Tensor))
        self.device = next(devices, torch.device("cpu"))
        self.encoder: NativeEncoder | TritonEncoder | None = None
        self.black: tuple[Any, Any] = None, None  # size of an image, embeddings of a black one
        self.obstacle = _obstacle(modules, self.device)
        if self.obstacle is not None:
            return
        config = module.config.to_dict()
        config["quantization_config"] = {"activation": _activation(modules)}
        config["padding_idx"] = getattr(module.embeddings, "padding_idx", None)
        tensors = {
            f"{name}.{key}": tensor.detach()
            for name, part in module.named_modules()
            if not name.startswith("pooler")
            for key, tensor in (*part._parameters.items(), *part._buffers.items())
            if tensor is not None
        }
        try:
            layout = find_layout(ARCHITECTURES[module.hf_ternary_base.__name__], tensors)
            self.encoder = _make(self.device, layout, config, tensors)
        except ValueError as error:
            self.obstacle = str(error)

    def holds(self) -> bool:
        """Whether no weight was changed, moved or replaced, no module, and no hook, since.

        Of inference tensors a change in place does not tell.
        """
        if any(self._empty):
            return False
        contents = self._read()
        same = len(contents) == len(self._contents) and all(map(operator.is_, contents, self._contents))
        # share_memory() and half() put other memory under the same parameter, and free what the encoder has borrowed.
        same = same and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
        return same and [tensor._version for tensor in self._counted] == self._versions

    def _read(self) -> list[Any]:
        """Parameters, buffers, submodules, hooks, replaced forwards, and who trains."""
        forwards = map(dict.get, self._attributes, repeat("forward"))
        training = map(dict.get, self._attributes, repeat("training"))
        return [*chain.from_iterable(map(dict.values, self._tables)), *forwards, *training]


def _make(
    device: torch.device, layout: Architecture, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> "NativeEncoder | TritonEncoder":
    if device.type == "cpu":
        share_torch_threads(backends.native())  # here, as an unpickled model was never bound in its process
        return NativeEncoder(layout, config, {name: tensor.numpy() for name, tensor in tensors.items()})
    from .triton_encoder import TritonEncoder

    return TritonEncoder(layout, config, tensors)


_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _state(module: nn.Module) -> _State:
    state = _states.get(module)
    if state is None or not state.holds():
        with _lock:
            state = _states.get(module)  # another thread may have made it meanwhile
            if state is None or not state.holds():
                state = _states[module] = _State(module)
    return state


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children that the native encoder replaces."""
    return (child for name, child in module.named_children() if name != "pooler")


def _hooked(modules: list[nn.Module]) -> bool:
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    for m in modules:
        own = m.__dict__.get("forward")  # older transformers put a module's own forward there when they have borrowed it
        # The quantizer's own hook only warns.
        hooks = {getattr(h, "__module__", "") for h in m._forward_pre_hooks.values()} - {"hf_ternary.quantizer"}
        if hooks or (own is not None and getattr(own, "__func__", None) is not type(m).forward):
            return True
        # transformers leaves its own behind, which do nothing unless hidden states or attentions are asked for.
        if m._forward_hooks and not all(h.__module__.startswith("transformers.") for h in m._forward_hooks.values()):
            return True
    return False


def _activation(modules: list[nn.Module]) -> str | None:
    kinds = {m.activation for m in modules if isinstance(m, TernaryLinear)}
    return kinds.pop() if len(kinds) == 1 else None


def _obstacle(modules: list[nn.Module], device: torch.device) -> str | None:
    """Why these modules cannot be replaced, beyond what the encoder itself finds."""
    if device.type not in _DEVICES:
        return f"its weights are on {device}"
    choice = backends.choose() if device.type == "cpu" else backends.choose_gpu(device.index)
    if choice.backend == "reference":
        return f"the backend is 'reference': {choice.reason}"
    if _hooked(modules[1:]):  # the encoder's own hooks run around its forward
        return "a submodule has a forward hook or a replaced forward"
    if any(m.training for m in modules[1:] if not isinstance(m, (TernaryLinear, QuantizedEmbedding))):
        return "a submodule is in training mode"
    dtypes = _DEVICES[device.type][1]
    dtype = getattr(modules[0], "dtype", None)  # of the first parameter
    dtype = dtype if dtype in dtypes else dtypes[0]
    for m in modules:
        if isinstance(m, QuantizedEmbedding) and (m.multiplier != 1 or m.dtype != dtype):
            return f"its token table gives {m.dtype}, not {_name(dtype)}"
        if type(m) is not TernaryLinear and isinstance(m, nn.Linear):
            return "it holds a Linear layer that is not ternary"
        if type(m).__module__.split(".")[0] not in ("torch", "transformers", "hf_ternary"):
            return f"it holds a {type(m).__name__} of {type(m).__module__} (an adapter?)"
        for key, tensor in (*m._parameters.items(), *m._buffers.items()):
            if tensor is not None and tensor.device != device:
                return f"{key} is on {tensor.device}, not on {device}"
            if tensor is None or key == "weight_scale" or not tensor.is_floating_point():
                continue
            if tensor.dtype != dtype:
                return f"{key} is {tensor.dtype}, not {_name(dtype)}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
