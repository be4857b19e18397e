"""The one op of the project, ``hf_ternary::linear``: defined once, one reference, one file a backend.

* :mod:`.backends` chooses what runs and says why (:func:`.backends.capabilities`); it does not import torch;
* :mod:`.library` defines the op and everything torch asks of one: fake tensors, autograd, device implementations;
* :mod:`.reference` is the meaning of the op in plain torch, on every device;
* :mod:`.native` runs the C++ kernels, :mod:`.triton` has those for NVIDIA GPUs;
* :mod:`.layouts` keeps a backend's own layout of a weight.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import linear

__all__ = ["linear"]


def __getattr__(name: str) -> Any:
    """Import torch, and define the op, when it is first asked for."""
    if name != "linear":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .library import linear

    globals()["linear"] = linear
    return linear
