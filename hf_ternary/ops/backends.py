"""Which kernel computes on this machine's CPU, and why. Does not import torch.

The fastest kernel that was compiled and that the CPU can run is chosen at first use. The environment variable
``HF_TERNARY_BACKEND``, read at that moment, forces one; a forced backend that cannot run here is an error, never replaced.
"""

import os
import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from ..version import __version__

VARIABLE = "HF_TERNARY_BACKEND"
KERNELS = ("avx512vnni", "avxvnni", "avx2", "neon", "scalar")
ALLOWED = ("auto", "reference", *KERNELS)

REINSTALL = "pip install --force-reinstall --no-deps --no-binary hf_ternary hf_ternary"


class Choice(NamedTuple):
    """The backend that runs on the CPU (one of :data:`KERNELS`, or ``"reference"``), and why it is that one."""

    backend: str
    forced: bool
    reason: str


@cache
def native() -> ModuleType | None:
    """The C++ extension, or None where it was not built."""
    try:
        return import_module("hf_ternary._native")
    except ImportError:
        return None


def compiled() -> dict[str, str]:
    """Kernels of this build, fastest first: name -> what this CPU lacks to run it (empty: usable)."""
    module = native()
    return module.backends() if module else {}


def usable() -> list[str]:
    """Backends that run on this machine, fastest first."""
    return [*(name for name, missing in compiled().items() if not missing), "reference"]


@cache
def choose() -> Choice:
    """The backend for this process, decided once.

    Raises:
        ValueError: ``HF_TERNARY_BACKEND`` holds an unknown name, or a kernel that this CPU cannot run.
        ImportError: it holds a kernel that is not in this build.
    """
    forced = os.environ.get(VARIABLE, "auto") or "auto"
    if forced == "auto":
        backend = usable()[0]
        if native() is None:
            return Choice(backend, False, "the C++ kernels are not built")
        return Choice(backend, False, "the fastest that this build has and this CPU can run")
    if forced not in ALLOWED:
        raise ValueError(f"{VARIABLE}={forced!r} is unknown: use {', '.join(ALLOWED)}")
    if forced != "reference":
        _check_usable(forced)
    return Choice(forced, True, f"forced by {VARIABLE}")


def _check_usable(backend: str) -> None:
    missing = compiled().get(backend)
    if missing == "":
        return
    available = f"Available here: auto, {', '.join(usable())}"
    if native() is None:
        raise ImportError(f"{VARIABLE}={backend}: the C++ kernels are not built. {available}. Fix: {REINSTALL}")
    if missing is None:
        raise ImportError(f"{VARIABLE}={backend}: this build has no such kernel (other CPU or compiler). {available}")
    raise ValueError(f"{VARIABLE}={backend}: this CPU lacks {missing}. {available}")


def capabilities() -> dict[str, Any]:
    """What computes on this machine's CPU, and what else could.

    Returns:
        ``version``; ``backend``, the one in use, with its ``reason`` and whether it was ``forced``; ``compiled`` and
        ``usable``, backend names, fastest first; ``cpu``, instruction sets that matter; ``threads`` that a call uses.

    Raises:
        ValueError, ImportError: as :func:`choose`.
    """
    choice, module, torch = choose(), native(), sys.modules.get("torch")
    return {
        "version": __version__,
        "backend": choice.backend,
        "forced": choice.forced,
        "reason": choice.reason,
        "compiled": list(compiled()),
        "usable": usable(),
        "cpu": module.cpu_features() if module else [],
        "threads": torch.get_num_threads() if torch else os.cpu_count(),
    }
