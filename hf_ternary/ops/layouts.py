"""A backend's own memory layout of a packed weight, made when the weight is first used and kept beside it.

It lies outside the tensor: it is not saved, copied or pickled with a module, it is made anew when the weight or its scale
is replaced or written to, and it goes when the weight goes. Writes that torch itself does not count (through ``.data`` or
numpy, or into tensors made in inference mode) are not noticed.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import reference


class _Entry(NamedTuple):
    weight: Any  # weakref.ref
    scale: Any  # weakref.ref
    state: tuple[int, ...]
    layout: Any


class LayoutCache:
    """``make(weight, weight_scale, in_features)``, remembered for every weight; raises what the weight's check raises."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor, int], Any]) -> None:
        self._make = make
        self.entries: dict[int, _Entry] = {}

    def __call__(self, weight: torch.Tensor, scale: torch.Tensor, in_features: int) -> Any:
        """The layout, from the cache if nothing has changed since."""
        state = (weight.data_ptr(), _version(weight), scale.data_ptr(), _version(scale), in_features)
        entry = self.entries.get(id(weight))
        if entry is not None and entry.state == state and entry.weight() is weight and entry.scale() is scale:
            return entry.layout
        reference.check_weight(weight, scale, in_features)
        layout = self._make(weight, scale, in_features)
        entries, key = self.entries, id(weight)
        entries[key] = _Entry(weakref.ref(weight, lambda _: entries.pop(key, None)), weakref.ref(scale), state, layout)
        return layout


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
