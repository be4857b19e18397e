"""Registers the quantizer as soon as transformers' own quantizers are imported.

``import torch`` calls :func:`install` through the entry point ``torch.backends`` (off: TORCH_DEVICE_BACKEND_AUTOLOAD=0), so
a packed model loads without an ``import hf_ternary`` anywhere. Nothing heavy is imported here.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _Finder:
    """Waits for one import of ``transformers.quantizers.auto`` and registers right after it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from .quantizer import register

    register()


def install() -> None:
    """Register now if transformers' quantizers are imported, else when they will be."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
