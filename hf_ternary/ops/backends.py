"""Which kernel computes on this machine's CPU and GPUs, and why. Does not import torch.

The fastest kernel that was compiled and that the CPU can run is chosen at first use; a GPU runs the Triton kernels if it
can, else the reference. The environment variable ``HF_TERNARY_BACKEND``, read at that moment, forces one: a CPU kernel,
``triton`` for GPUs, or ``reference`` for both. A forced backend that cannot run here is an error, never replaced.
"""

import os
import sys
from functools import cache
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple

from ..threads import cores
from ..version import __version__

VARIABLE = "HF_TERNARY_BACKEND"
KERNELS = ("avx512vnni", "avxvnni", "avx2", "neon", "scalar")
GPU_KERNELS = "triton"
ALLOWED = ("auto", "reference", *KERNELS, GPU_KERNELS)
OLDEST_GPU = (8, 0)  # compute capability: int8 and bfloat16 tensor cores
OLDEST_TRITON = (3, 4)

INSTALL_TRITON = 'pip install "hf_ternary[gpu]"'
REINSTALL = "pip install --force-reinstall --no-deps --no-binary hf_ternary hf_ternary"


class Choice(NamedTuple):
    """What runs on a device (one of :data:`KERNELS`, ``"triton"`` or ``"reference"``), and why it is that one."""

    backend: str
    forced: bool
    reason: str


def native() -> ModuleType | None:
    """The C++ extension, or None where it cannot be used."""
    return _find_native()[0]


@cache
def _find_native() -> tuple[ModuleType | None, str]:
    """The C++ extension, or None and why there is none."""
    try:
        return import_module("hf_ternary._native"), ""
    except ModuleNotFoundError:
        return None, "the C++ kernels are not built"
    except ImportError as error:  # built for another system, or a shared library is missing or too old
        return None, f"the C++ kernels cannot be loaded ({error})"


def compiled() -> dict[str, str]:
    """Kernels of this build, fastest first: name -> what this CPU lacks to run it (empty: usable)."""
    module = native()
    return module.backends() if module else {}


def usable() -> list[str]:
    """Backends that run on this machine, fastest first."""
    return [*(name for name, missing in compiled().items() if not missing), "reference"]


def requested() -> str:
    """What ``HF_TERNARY_BACKEND`` asks for, one of :data:`ALLOWED`.

    Raises:
        ValueError: an unknown name.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name not in ALLOWED:
        raise ValueError(f"{VARIABLE}={name!r} is unknown: use {', '.join(ALLOWED)}")
    return name


@cache
def choose() -> Choice:
    """The backend for this process's CPU tensors, decided once.

    Raises:
        ValueError: ``HF_TERNARY_BACKEND`` holds an unknown name, or a kernel that this CPU cannot run.
        ImportError: it holds a kernel that is not in this build.
    """
    forced = requested()
    if forced in ("auto", GPU_KERNELS):
        backend = usable()[0]
        return Choice(backend, False, _find_native()[1] or "the fastest that this build has and this CPU can run")
    if forced != "reference":
        _check_usable(forced)
    return Choice(forced, True, f"forced by {VARIABLE}")


def _check_usable(backend: str) -> None:
    missing = compiled().get(backend)
    if missing == "":
        return
    available = f"Available here: auto, {', '.join(usable())}"
    if native() is None:
        raise ImportError(f"{VARIABLE}={backend}: {_find_native()[1]}. {available}. Fix: {REINSTALL}")
    if missing is None:
        raise ImportError(f"{VARIABLE}={backend}: this build has no such kernel (other CPU or compiler). {available}")
    raise ValueError(f"{VARIABLE}={backend}: this CPU lacks {missing}. {available}")


@cache
def choose_gpu(device: int) -> Choice:
    """The backend for tensors on a CUDA device, decided once. torch is imported already.

    Raises:
        ValueError: ``HF_TERNARY_BACKEND`` forces Triton, which cannot run on this device.
        ImportError: it forces Triton, which is not installed or too old.
    """
    forced = requested()
    if forced == "reference":
        return Choice("reference", True, f"forced by {VARIABLE}")
    missing = _missing_triton()
    obstacle = missing or _unfit(device)
    if forced != GPU_KERNELS:
        return Choice("reference", False, obstacle) if obstacle else Choice(GPU_KERNELS, False, "this GPU can run it")
    if missing:
        raise ImportError(f"{VARIABLE}={GPU_KERNELS}: {missing}. Fix: {INSTALL_TRITON}")
    if obstacle:
        raise ValueError(f"{VARIABLE}={GPU_KERNELS}: {obstacle}. Fix: unset it")
    return Choice(GPU_KERNELS, True, f"forced by {VARIABLE}")


def _missing_triton() -> str:
    """Why Triton cannot be used, or an empty string."""
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    old = tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON
    return f"Triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}" if old else ""


def _unfit(device: int) -> str:
    """Why the device cannot run the kernels, or an empty string."""
    torch = sys.modules["torch"]
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs"
    if not 0 <= device < torch.cuda.device_count():
        return f"torch sees no CUDA device {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"its compute capability is {'{}.{}'.format(*capability)}, and the kernels need {'{}.{}'.format(*OLDEST_GPU)}"
    return ""


def capabilities() -> dict[str, Any]:
    """What computes on this machine, and what else could.

    Returns:
        Of the CPU: ``version``; ``backend``, the one in use, with its ``reason`` and whether it was ``forced``; ``compiled``
        and ``usable``, backend names, fastest first; ``cpu``, instruction sets that matter; ``threads`` that a call uses.
        ``gpus``: ``name``, ``backend`` and ``reason`` of every CUDA device, if torch is imported.

    Raises:
        ValueError, ImportError: as :func:`choose` and :func:`~hf_ternary.threads.cores`.
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
        "threads": torch.get_num_threads() if torch else cores(),
        "gpus": [_gpu(torch, device) for device in range(torch.cuda.device_count())] if torch else [],
    }


def _gpu(torch: ModuleType, device: int) -> dict[str, str]:
    choice = choose_gpu(device)
    return {"name": torch.cuda.get_device_name(device), "backend": choice.backend, "reason": choice.reason}
