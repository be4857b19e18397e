"""The C++ kernels behind ``hf_ternary::linear`` on the CPU.

A kernel reads its own memory layout, which :mod:`.layouts` keeps beside the canonical one.
"""

import ctypes
import math
from pathlib import Path
from typing import Any

import torch

from . import backends, reference
from .layouts import LayoutCache


def share_torch_threads(module: Any) -> None:
    """Run on torch's OpenMP threads: after each parallel op of torch's they spin for milliseconds and would starve ours."""
    try:
        # Looks in what torch itself was linked to: another package may have loaded another OpenMP.
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num
    except (OSError, AttributeError):
        return  # a torch with another OpenMP, or with none
    module.share_openmp(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))


class NativeLinear:
    """``hf_ternary::linear`` by the kernel ``backend`` (one of :func:`.backends.usable`)."""

    def __init__(self, backend: str) -> None:
        module = backends.native()
        assert module is not None
        self.backend, self._native = backend, module
        share_torch_threads(module)
        self._packed = LayoutCache(self._pack)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = "int8",
    ) -> torch.Tensor:
        if activation is None:
            return reference.linear(x, weight, weight_scale, bias, activation)
        *batch, in_features = x.shape if x.dim() else (0,)
        packed, out_features = self._packed(weight, weight_scale, in_features), weight.shape[0]
        reference.check_call(x, out_features, bias, activation)
        dense = x.float().contiguous()
        y = dense.new_empty(*batch, out_features)
        if bias is not None:
            bias = bias.float().contiguous()
        self._native.linear(
            packed,
            dense.data_ptr(),
            math.prod(batch),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _pack(self, weight: torch.Tensor, scale: torch.Tensor, in_features: int) -> Any:
        codes, dense_scale = weight.contiguous(), scale.contiguous()
        return self._native.PackedWeight(
            self.backend, codes.data_ptr(), dense_scale.data_ptr(), weight.shape[0], in_features, scale.shape[1]
        )
