"""The op as torch sees it: autograd, compile, export, and its errors."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_ternary import packing
from hf_ternary.ops import backends, library, linear, reference
from hf_ternary.ternarize import dequantize
from tests.helpers import make_layer, same

OP = torch.ops.hf_ternary.linear.default


class Layer(nn.Module):
    def __init__(
        self, out_features: int = 33, in_features: int = 64, groups: int = 1, activation: str | None = "int8"
    ) -> None:
        super().__init__()
        weight, scale, bias = make_layer(out_features, in_features, groups)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = nn.Parameter(bias)
        self.activation = activation

    def dense(self) -> torch.Tensor:
        return dequantize(packing.unpack(self.weight, 64), self.weight_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.tanh(), self.weight, self.weight_scale, self.bias, self.activation)


@pytest.mark.parametrize("activation", ["int8", None])
@pytest.mark.parametrize("groups", [1, 4])
def test_opcheck(activation: str | None, groups: int) -> None:
    weight, scale, bias = make_layer(33, 64, groups)
    x = torch.randn(2, 5, 64)
    torch.library.opcheck(OP, (x, weight, scale, bias, activation))
    torch.library.opcheck(OP, (x, weight, scale, None, activation))
    torch.library.opcheck(OP, (x.clone().requires_grad_(), weight, scale, bias.clone().requires_grad_(), activation))


def test_float_activations_use_the_dequantized_weight() -> None:
    layer = Layer(groups=2, activation=None)
    x = torch.randn(3, 64)
    expected = nn.functional.linear(x.tanh(), layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_int8_activations_are_close_to_float_ones() -> None:
    """Half a step of absmax / 127 an activation; the errors of 64 of them add up like a random walk."""
    layer = Layer()
    x = torch.randn(100, 64)
    exact = linear(x, layer.weight, layer.weight_scale, layer.bias, None)
    error = (linear(x, layer.weight, layer.weight_scale, layer.bias) - exact).abs().mean()
    assert 0 < error < 0.02 * exact.abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["int8", None])
def test_gradients(activation: str | None, dtype: torch.dtype) -> None:
    """Those of a float layer with the dequantized weight: the rounding of the activations passes gradients through."""
    layer = Layer(groups=2, activation=activation).to(torch.float32)
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    upstream = torch.randn(2, 3, 33).to(dtype)
    linear(x, layer.weight, layer.weight_scale, layer.bias, activation).backward(upstream)
    (twin.float() @ layer.dense().T + bias).to(dtype).backward(upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, twin.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=tolerance, atol=tolerance)


def test_gradient_of_float_activations_numerically() -> None:
    """The op is linear in x and bias, so a large step loses nothing and outweighs its float32 arithmetic."""
    weight, scale, bias = make_layer(5, 12, 3)
    x, bias = torch.randn(4, 12).double().requires_grad_(), bias.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: linear(x, weight, scale, b, None), (x, bias), eps=0.1, atol=1e-4)


def test_no_graph_without_a_gradient() -> None:
    weight, scale, bias = make_layer(5, 12)
    x = torch.randn(4, 12)
    assert not linear(x, weight, scale, bias).requires_grad
    with torch.no_grad():
        assert linear(x.requires_grad_(), weight, scale, bias).grad_fn is None


def test_autocast_changes_nothing() -> None:
    weight, scale, bias = make_layer(33, 64)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(linear(x, weight, scale, bias), reference.linear(x, weight, scale, bias))
        native = reference.linear(x, weight, scale, bias)
    assert same(native, reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5, 1):
        x, twin = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).requires_grad_() for _ in range(2))
        y, expected = compiled(x), layer(twin)
        assert same(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    layer = Layer()
    x = torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_export() -> None:
    layer = Layer()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(layer, (torch.randn(4, 64),), dynamic_shapes={"x": {0: batch}})
    assert "hf_ternary.linear" in exported.graph_module.code
    x = torch.randn(7, 64)
    assert same(exported.module()(x), layer(x))


def test_meta_device() -> None:
    weight, scale, bias = (tensor.to("meta") for tensor in make_layer(33, 64))
    assert linear(torch.empty(2, 3, 64, device="meta", dtype=torch.float16), weight, scale, bias).shape == (2, 3, 33)


@pytest.fixture
def somewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Makes tensors that say they are on a device which need not be here; the reference gives them back."""
    monkeypatch.setattr(library, "_quiet", {"cpu", "meta"})
    monkeypatch.setattr(reference, "linear", lambda x, *rest: x)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    return lambda device: SimpleNamespace(device=torch.device(device), get_device=lambda: 0)


def test_a_device_without_kernels_is_named_once(somewhere: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    choice = backends.Choice("reference", False, "Triton is not installed")
    monkeypatch.setattr(backends, "choose_gpu", lambda device: choice)
    for device, why in {"mps": "there are no kernels for it", "xpu": "there are no", "cuda": "Triton is not inst"}.items():
        with pytest.warns(RuntimeWarning, match=rf"reference runs on {device} \({why}.*\)\. Fix: model\.to\('cpu'\)"):
            library._reference(somewhere(device))
        library._reference(somewhere(device))  # a second warning would be an error here
    for device in ("cpu", "meta"):
        library._reference(somewhere(device))


def test_nothing_is_said_of_a_device_while_compiling_or_where_it_was_asked_for(
    somewhere: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    library._reference(somewhere("mps"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    with pytest.warns(RuntimeWarning, match="runs on mps"):
        library._reference(somewhere("mps"))
    monkeypatch.setenv(backends.VARIABLE, "reference")
    library._reference(somewhere("xpu"))


def test_copies_of_a_used_module() -> None:
    layer = Layer()
    x = torch.randn(3, 64)
    y = layer(x)
    copied = copy.deepcopy(layer)
    layer.weight.fill_(0b10101010)
    assert same(copied(x), y)
    assert not same(layer(x), y)


WEIGHT, SCALE, BIAS = make_layer(8, 20)
X = torch.zeros(2, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, WEIGHT, SCALE, BIAS, "int4"), "activation='int4' is not allowed: use 'int8' or None"),
        ((X.int(), WEIGHT, SCALE, BIAS), r"x is int32 \[2, 20\]: use a floating-point tensor"),
        ((X.sum(), WEIGHT, SCALE, BIAS), "floating-point|in_features"),
        ((X[:, :16], WEIGHT, SCALE, BIAS), r"in_features=16 and needs a weight of 4 bytes a row, .* uint8 \[8, 5\]"),
        ((X, WEIGHT.int(), SCALE, BIAS), r"weight is int32 \[8, 5\]: use uint8"),
        ((X, WEIGHT[0], SCALE, BIAS), r"weight is uint8 \[5\]: use uint8"),
        ((X, WEIGHT, SCALE.half(), BIAS), r"weight_scale is float16 \[8, 1\]: use float32 \[8, groups\]"),
        ((X, WEIGHT, SCALE[:7], BIAS), r"weight_scale is float32 \[7, 1\]: use float32 \[8, groups\]"),
        ((X, WEIGHT, SCALE[:, 0], BIAS), r"weight_scale is float32 \[8\]"),
        ((X, WEIGHT, SCALE.expand(8, 3), BIAS), "weight_scale has 3 groups: their number must divide in_features=20"),
        ((X, WEIGHT, SCALE[:, :0], BIAS), "weight_scale has 0 groups"),
        ((X, WEIGHT, SCALE, BIAS[:3]), r"bias is float32 \[3\]: use a floating-point tensor \[8\]"),
        ((X, WEIGHT, SCALE, BIAS.int()), r"bias is int32 \[8\]"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(*arguments)
    with pytest.raises(ValueError, match=message):
        reference.linear(*arguments)
