"""Ternary-weight embedding models for the Hugging Face ecosystem.

    model = SentenceTransformer("all-MiniLM-L6-v2", model_kwargs={"quantization_config": hf_ternary.TernaryConfig()})

Importing this package registers the quantizer with transformers; torch and transformers are imported when first needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import autoload
from .version import __version__

if TYPE_CHECKING:
    from .config import TernaryConfig
    from .distill.calibrate import calibrate
    from .encoder import explain
    from .hub import push_to_hub, save_pretrained
    from .modules import QuantizedEmbedding, TernaryLinear
    from .ops.backends import capabilities
    from .serving import load

__all__ = [
    "QuantizedEmbedding",
    "TernaryConfig",
    "TernaryLinear",
    "__version__",
    "calibrate",
    "capabilities",
    "explain",
    "load",
    "push_to_hub",
    "save_pretrained",
]

_HOME = {
    "TernaryConfig": ".config",
    "TernaryLinear": ".modules",
    "QuantizedEmbedding": ".modules",
    "calibrate": ".distill.calibrate",
    "capabilities": ".ops.backends",
    "explain": ".encoder",
    "load": ".serving",
    "push_to_hub": ".hub",
    "save_pretrained": ".hub",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


autoload.install()
