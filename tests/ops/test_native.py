"""Every kernel that this machine can run against the reference, bit for bit."""

import copy
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from hf_ternary import packing
from hf_ternary.ops import backends, native, reference
from tests.helpers import make_layer, same

KERNELS = [name for name in backends.usable() if name != "reference"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> native.NativeLinear:
    return native.NativeLinear(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["threads of torch", "threads of our own"])
def either_threads(request: pytest.FixtureRequest, kernel: native.NativeLinear) -> Iterator[None]:
    """After ``kernel``, which shares torch's."""
    module = backends.native()
    if request.param == "threads of our own":
        module.share_openmp(0, 0)
    yield
    native.share_torch_threads(module)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element that is never written shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(*args: object, **options: object) -> torch.Tensor:
        return new_empty(*args, **options).fill_(torch.nan)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("in_features", [1, 3, 5, 16, 17, 63, 384, 385, 1000])
def test_equals_the_reference(kernel: native.NativeLinear, in_features: int) -> None:
    for out_features in (1, 3, 16, 33, 385):
        weight, scale, bias = make_layer(out_features, in_features)
        for rows in (0, 1, 2, 3, 12, 13, 64, 130):
            x = torch.randn(rows, in_features) * torch.randn(rows, 1).exp()
            given = bias if rows % 2 else None
            assert same(kernel(x, weight, scale, given), reference.linear(x, weight, scale, given)), (out_features, rows)


@pytest.mark.usefixtures("poisoned", "either_threads")
def test_random_shapes_on_several_threads(kernel: native.NativeLinear, threads: Callable[[int], None]) -> None:
    random.seed(0)
    for _ in range(60):
        threads(random.randint(1, 5))
        group_size, groups = random.randint(1, 300), random.choice([1, 1, 2, 3])
        out_features, rows = random.randint(1, 1500), random.choice([1, 2, 7, 50, 300])
        weight, scale, bias = make_layer(out_features, groups * group_size, groups)
        x = torch.randn(rows, groups * group_size)
        where = (out_features, group_size, groups, rows, torch.get_num_threads())
        assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias)), where


@pytest.mark.parametrize("group_size", [1, 4, 24, 32, 64, 128, 384])
def test_groups(kernel: native.NativeLinear, group_size: int) -> None:
    weight, scale, bias = make_layer(70, 384, 384 // group_size)
    x = torch.randn(9, 384)
    assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("shape", [(0, 384), (384, 0), (0, 0)])
def test_nothing_to_multiply(kernel: native.NativeLinear, shape: tuple[int, int]) -> None:
    weight, scale, bias = make_layer(*shape)
    x = torch.randn(3, shape[1])
    assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


def test_output_larger_than_the_caches(kernel: native.NativeLinear, threads: Callable[[int], None]) -> None:
    threads(2)
    for out_features in (1024, 1001):  # rows that start on a cache line, and rows that do not
        weight, scale, bias = make_layer(out_features, 20)
        x = torch.randn(1200, 20)
        assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("in_features", [40, 385])
def test_extreme_rows(kernel: native.NativeLinear, in_features: int) -> None:
    weight, scale, bias = make_layer(50, in_features)
    rows = {
        "zero": torch.zeros(in_features),
        "subnormal": torch.full((in_features,), 1e-42),
        "below the smallest": torch.full((in_features,), 2.0**-101),
        "the smallest": torch.full((in_features,), 2.0**-100),
        "the largest": torch.linspace(-1, 1, in_features) * torch.finfo().max,
        "ties": torch.arange(in_features).remainder(255) - 127 + torch.tensor([0.5]),
    }
    for position in (0, in_features // 2, in_features - 1):
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            row = torch.randn(in_features)
            row[position] = value
            rows[f"{value} at {position}"] = row
    x = torch.stack([*rows.values(), torch.randn(in_features)])
    y = kernel(x, weight, scale, bias)
    assert same(y, reference.linear(x, weight, scale, bias))
    for name, row in zip(rows, y, strict=False):
        bad = "nan" in name or "inf" in name
        assert row.isnan().all() if bad else not row.isnan().any(), name
    assert torch.equal(y[0], bias)
    assert y[-1].isfinite().all()


def test_codes_sum_beyond_int16(kernel: native.NativeLinear) -> None:
    """All activations and weights at their extremes: narrow accumulators would overflow."""
    x = torch.cat([torch.ones(1, 4000), -torch.ones(1, 4000)])
    for value in (-1, 0, 1):
        weight = packing.pack(torch.full((40, 4000), value, dtype=torch.int8))
        y = kernel(x, weight, torch.ones(40, 1))
        assert torch.equal(y, torch.tensor([[4000.0 * value], [-4000.0 * value]]).expand(2, 40))


def test_a_row_does_not_depend_on_its_batch(kernel: native.NativeLinear, threads: Callable[[int], None]) -> None:
    weight, scale, bias = make_layer(400, 384)
    x = torch.randn(150, 384)
    threads(1)
    batch = kernel(x, weight, scale, bias)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(kernel(x, weight, scale, bias), batch)
        for row in (0, 77, 149):
            assert torch.equal(kernel(x[row], weight, scale, bias), batch[row])
            assert torch.equal(kernel(x[row:], weight, scale, bias), batch[row:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(kernel: native.NativeLinear, dtype: torch.dtype) -> None:
    weight, scale, bias = make_layer(33, 65)
    x = torch.randn(2, 3, 65).to(dtype)
    y = kernel(x, weight, scale, bias.to(dtype))
    assert y.dtype == dtype
    assert same(y, reference.linear(x, weight, scale, bias.to(dtype)))
    assert same(y, kernel(x.float(), weight, scale, bias.to(dtype).float()).to(dtype))


def test_strides(kernel: native.NativeLinear) -> None:
    weight, scale, bias = make_layer(33, 64)
    x = torch.randn(5, 64, 7)
    expected = reference.linear(x.mT.contiguous(), weight, scale, bias)
    assert same(kernel(x.mT, weight, scale, bias), expected)
    assert same(kernel(x[:1, :, 0].expand(5, 64), weight, scale, bias), expected[:1, 0].expand(5, 33).contiguous())
    spread = torch.zeros(33, 2 * weight.shape[1], dtype=torch.uint8)[:, ::2].copy_(weight)
    wide_scale, wide_bias = scale.expand(33, 3)[:, ::3], torch.stack([bias, bias], 1)[:, 0]
    assert not spread.is_contiguous()
    assert not wide_bias.is_contiguous()
    assert same(kernel(x.mT, spread, wide_scale, wide_bias), expected)


def test_one_dimension(kernel: native.NativeLinear) -> None:
    weight, scale, bias = make_layer(10, 30)
    x = torch.randn(30)
    assert same(kernel(x, weight, scale, bias), reference.linear(x[None], weight, scale, bias)[0])


class TestLayoutCache:
    """The kernel's layout follows the weight: made once, made anew after a change, gone with the weight."""

    def test_made_once(self, kernel: native.NativeLinear) -> None:
        weight, scale, bias = make_layer(10, 30)
        x = torch.randn(2, 30)
        kernel(x, weight, scale, bias)
        first = kernel._packed(weight, scale, 30)
        kernel(x.bfloat16(), weight, scale, None)
        assert kernel._packed(weight, scale, 30) is first

    @pytest.mark.parametrize("inference", [False, True])
    def test_follows_changes(self, kernel: native.NativeLinear, inference: bool) -> None:
        with torch.inference_mode(inference):
            weight, scale, bias = make_layer(10, 30)
        other, other_scale, _ = make_layer(10, 30, seed=1)
        x = torch.randn(2, 30)
        kernel(x, weight, scale, bias)
        assert same(kernel(x, other, scale, bias), reference.linear(x, other, scale, bias))
        assert same(kernel(x, weight, other_scale, bias), reference.linear(x, weight, other_scale, bias))
        if not inference:
            weight.copy_(other)
            assert same(kernel(x, weight, scale, bias), reference.linear(x, other, scale, bias))
            scale.mul_(2)
            assert same(kernel(x, weight, scale, bias), reference.linear(x, other, scale, bias))
            weight.data = make_layer(10, 30, seed=2)[0]
            assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias))

    def test_one_byte_row_serves_any_width_that_fits(self, kernel: native.NativeLinear) -> None:
        weight, scale, bias = make_layer(10, 32)
        for width in (29, 30, 31, 32):
            x = torch.randn(2, width)
            assert same(kernel(x, weight, scale, bias), reference.linear(x, weight, scale, bias))

    def test_goes_with_the_weight(self, kernel: native.NativeLinear) -> None:
        weight, scale, bias = make_layer(10, 30)
        kernel(torch.randn(2, 30), weight, scale, bias)
        assert len(kernel._packed.entries) == 1
        del weight
        gc.collect()
        assert not kernel._packed.entries

    def test_is_no_part_of_the_tensor(self, kernel: native.NativeLinear) -> None:
        weight, scale, bias = make_layer(10, 30)
        x = torch.randn(2, 30)
        saved = io.BytesIO(), io.BytesIO()
        torch.save(weight, saved[0])
        expected, size = kernel(x, weight, scale, bias), len(pickle.dumps(weight))
        torch.save(weight, saved[1])
        assert saved[0].getvalue() == saved[1].getvalue()
        assert len(pickle.dumps(weight)) == size
        copied = copy.deepcopy(weight)
        weight.fill_(0b10101010)
        assert same(kernel(x, copied, scale, bias), expected)


@pytest.mark.usefixtures("either_threads")
def test_concurrent_calls(kernel: native.NativeLinear, threads: Callable[[int], None]) -> None:
    threads(2)
    layers = [make_layer(300, 384, seed=seed) for seed in range(4)]
    xs = [torch.randn(rows, 384) for rows in (1, 5, 40, 200)]
    expected = [[reference.linear(x, *layer) for x in xs] for layer in layers]
    wrong: list[object] = []

    def call(index: int) -> None:
        for turn in range(30):
            which = (index + turn) % 4
            y = kernel(xs[which], *layers[index])
            if not same(y, expected[index][which]):
                wrong.append((index, which))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_use() -> None:
    """A child of a process whose worker threads have run has none of them, and must start its own."""
    script = """
import os, torch
from hf_ternary import packing
from hf_ternary.ops import linear
torch.set_num_threads(2)
weight, scale = packing.pack(torch.ones(512, 512, dtype=torch.int8)), torch.ones(512, 1)
x = torch.ones(300, 512)
assert linear(x, weight, scale).eq(512).all()
child = os.fork()
ok = (linear(x, weight, scale).numpy() == 512).all()  # numpy, since torch's own threads do not survive a fork
if child == 0:
    os._exit(0 if ok else 1)
assert ok and os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], check=True, timeout=60)
