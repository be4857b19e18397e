"""The layers: shapes, dtypes, copies, gradients, and the fake-quantized twins."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from hf_ternary.modules import (
    FakeQuantizedEmbedding,
    FakeTernaryLinear,
    QuantizedEmbedding,
    TernaryLinear,
    _float_product,
)

SHAPES = [(1, 1), (3, 5), (16, 8), (63, 17), (384, 40)]


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_float_activations_give_the_dequantized_product(in_features, out_features, bias):
    layer = TernaryLinear.from_float(nn.Linear(in_features, out_features, bias), activation=None)
    x = torch.randn(2, 3, in_features)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_int8_activations_stay_close_to_float_ones(in_features, out_features):
    layer = TernaryLinear.from_float(nn.Linear(in_features, out_features))
    x = torch.randn(4, in_features)
    exact = nn.functional.linear(x, layer.dequantize(), layer.bias)
    step = x.abs().amax(1, keepdim=True) / 127  # each input is off by half a step at most
    bound = step / 2 * layer.dequantize().abs().sum(1) + 1e-5
    assert ((layer(x) - exact).abs() <= bound).all()


def test_no_dense_weight_is_ever_allocated():
    layer = TernaryLinear(10**6, 10**6, device="meta")
    assert layer.weight.shape == (10**6, 250_000)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert isinstance(layer, nn.Linear)


def make(kind):
    if kind == "linear":
        return TernaryLinear.from_float(nn.Linear(24, 12), group_size=8), torch.randn(5, 24)
    return QuantizedEmbedding.from_float(nn.Embedding(30, 24, padding_idx=0), 4, 8), torch.tensor([[0, 3], [29, 3]])


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_model_keeps_scales_and_codes(kind, cast):
    layer, x = make(kind)
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    layer.to(cast)
    assert torch.equal(layer.weight, weight)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale)
    assert layer(x.to(cast) if kind == "linear" else x).dtype == cast
    layer.float()
    assert torch.equal(layer.weight_scale, scale)


def test_moves_by_several_threads_leave_the_scale_alone():
    """As in sentence-transformers before 6.2, whose encode() calls to()."""
    layer, _ = make("linear")
    scale, under_way, go_on = layer.weight_scale, threading.Event(), threading.Event()

    def first(tensor):
        if tensor.data_ptr() == scale.data_ptr():
            thread.start()
            assert under_way.wait(10)
        return tensor

    def second(tensor):
        under_way.set()
        assert go_on.wait(10)
        return tensor

    thread = threading.Thread(target=lambda: layer._apply(second))
    layer._apply(first)
    go_on.set()
    thread.join()
    assert layer.weight_scale is scale


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_half_and_device_moves_round_trip(kind):
    layer, x = make(kind)
    if kind == "linear":
        layer.bias.data = layer.bias.half().float()  # which half precision can hold
    expected = layer(x)
    assert torch.equal(layer.half().float()(x), expected)
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.is_meta
    assert meta.weight_scale.is_meta
    assert meta.weight_scale.dtype == torch.float32
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_copies_compute_the_same(kind):
    layer, x = make(kind)
    expected = layer(x)  # a first use: kernel layouts made by it must not travel
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False):
        assert torch.equal(twin(x), expected)
        assert twin.state_dict().keys() == layer.state_dict().keys()


def test_state_dict_holds_what_is_on_disk():
    layer, _ = make("linear")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in layer.state_dict().items()} == {
        "weight": (torch.uint8, (12, 6)),
        "weight_scale": (torch.float32, (12, 3)),
        "bias": (torch.float32, (12,)),
    }


def test_new_weights_are_used_after_load_state_dict():
    layer, x = make("linear")
    layer(x)
    other = TernaryLinear.from_float(nn.Linear(24, 12), group_size=8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [1, 7, 24])
def test_embedding_rows_are_the_dequantized_table(bits, dim):
    table = nn.Embedding(11, dim)
    layer = QuantizedEmbedding.from_float(table, bits)
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])
    assert layer(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, dim)
    if bits == 8:
        step = table.weight.detach().abs().amax(1, keepdim=True) / 128
        assert ((layer.dequantize() - table.weight).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("group_size", [None, 8, "tensor"])
@pytest.mark.parametrize("activation", ["int8", None])
@pytest.mark.parametrize("learned_scale", [True, False])
def test_packed_twin_computes_the_training_forward(group_size, activation, learned_scale):
    fake = FakeTernaryLinear(nn.Linear(24, 12), "optimal", group_size, activation, learned_scale)
    x = torch.randn(7, 24)
    assert torch.allclose(fake.pack()(x), fake(x), atol=1e-5)


def test_straight_through_gradients():
    linear = nn.Linear(24, 12)
    fake = FakeTernaryLinear(linear, learned_scale=True)
    x = torch.randn(7, 24, requires_grad=True)
    weight, scale = fake.ternary_weight().detach(), fake.scale().detach()
    upstream = torch.randn(7, 12)
    fake(x).backward(upstream)
    assert torch.allclose(x.grad, upstream @ weight, atol=1e-5)  # as if the activation were not rounded
    dense = upstream.T @ (fake_quantized(x))
    assert torch.allclose(fake.weight.grad, dense, atol=1e-4)  # as if the weight were not rounded
    assert torch.allclose(fake.weight_scale.grad, (dense * (weight / scale)).sum(1, keepdim=True), atol=1e-3)


def fake_quantized(x):
    from hf_ternary.ternarize import quantize_activation

    codes, scale = quantize_activation(x.detach())
    return codes * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_integers_fit_every_dtype(dtype):
    x, codes = torch.full((2, 600), 127, dtype=torch.int8), torch.ones(3, 600, dtype=torch.int8)
    wanted = torch.full((2, 3), 127 * 600.0)  # above 65504, where float16 ends
    torch.testing.assert_close(_float_product(x, codes, dtype).float(), wanted, rtol=0.01, atol=0)


def test_strength_zero_is_the_float_weight():
    linear = nn.Linear(24, 12)
    fake = FakeTernaryLinear(linear, activation=None)
    fake.strength = 0.0
    x = torch.randn(3, 24)
    assert torch.allclose(fake(x), linear(x), atol=1e-6)


def test_fake_embedding_matches_its_packed_twin_and_trains_only_looked_up_rows():
    fake = FakeQuantizedEmbedding(nn.Embedding(30, 24), 4, 8)
    ids = torch.tensor([[1, 5, 5], [29, 1, 0]])
    assert torch.equal(fake(ids), fake.pack()(ids))
    fake(ids).sum().backward()
    assert fake.weight.grad.sum(1).nonzero().flatten().tolist() == [0, 1, 5, 29]
    assert fake.weight.grad[5].eq(2).all()
