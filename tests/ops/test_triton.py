"""The GPU kernels against the reference, bit for bit: on the GPU, or interpreted where there is none.

What is interpreted is not what the compiler makes, so a process of its own compiles the kernels too, which needs no GPU.
"""

import copy
import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_ternary import packing
from hf_ternary.ops import backends, library, reference
from tests.helpers import make_layer, same

pytest.importorskip("triton", reason='pip install "hf_ternary[gpu]"')
kernels = pytest.importorskip("hf_ternary.ops.triton")

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
INTERPRETED = DEVICE == "cpu"
# The smallest tiles keep the interpreter fast; each class of tokens still takes its own way through the kernels.
SMALL_TILES = {16: [(16, 16, 32, 4, 2)], 64: [(16, 32, 32, 4, 2)], 256: [(32, 16, 64, 4, 2)], 2**31: [(64, 64, 32, 4, 2)]}


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED and "every_tile" not in request.fixturenames:
        set_tiles(monkeypatch, SMALL_TILES)
    monkeypatch.setattr(kernels, "TUNE", False)
    yield
    kernels._tuner.cache_clear()


def set_tiles(monkeypatch: pytest.MonkeyPatch, tiles: dict[int, list[tuple[int, ...]]]) -> None:
    monkeypatch.setattr(kernels, "CONFIGS", tiles)
    monkeypatch.setattr(kernels, "_CLASSES", list(tiles))
    monkeypatch.setattr(kernels, "_best", {})
    kernels._tuner.cache_clear()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and buffers start as NaN or nonsense, so that an element that is never written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        tensor = new_empty(*args, **options)  # type: ignore[arg-type]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 99)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def call(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = "int8",
) -> torch.Tensor:
    """The kernels' output for tensors of the CPU."""
    bias = None if bias is None else bias.to(DEVICE)
    return kernels.linear(x.to(DEVICE), weight.to(DEVICE), scale.to(DEVICE), bias, activation).cpu()


def rounded(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 to ``dtype``, to bfloat16 towards zero if that is what the interpreter does."""
    if dtype == torch.bfloat16 and INTERPRETED:
        y = (y.view(torch.int32) & -65536).view(torch.float32)
    return y.to(dtype)


@pytest.mark.parametrize("in_features", [1, 3, 16, 63, 64, 385])
def test_equals_the_reference(in_features: int) -> None:
    for out_features, rows in ((1, 0), (33, 1), (17, 16), (33, 17)):
        weight, scale, bias = make_layer(out_features, in_features)
        x = torch.randn(rows, in_features) * torch.randn(rows, 1).exp()
        given = bias if rows % 2 else None
        assert same(call(x, weight, scale, given), reference.linear(x, weight, scale, given)), (out_features, rows)


@pytest.mark.parametrize("rows", [65, 70, 257])
def test_every_class_of_tokens(rows: int) -> None:
    weight, scale, bias = make_layer(20, 33)
    x = torch.randn(rows, 33)
    assert same(call(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


def test_random_shapes() -> None:
    random.seed(0)
    for _ in range(8):
        group, groups = random.randint(1, 90), random.choice([1, 2, 3])
        out_features, rows = random.randint(1, 40), random.choice([1, 9, 18, 33])
        weight, scale, bias = make_layer(out_features, groups * group, groups)
        x = torch.randn(rows, groups * group)
        assert same(call(x, weight, scale, bias), reference.linear(x, weight, scale, bias)), (
            out_features,
            group,
            groups,
            rows,
        )


@pytest.mark.parametrize("group", [1, 5, 24, 64, 128])
@pytest.mark.parametrize("rows", [3, 17])
def test_groups(group: int, rows: int) -> None:
    weight, scale, bias = make_layer(20, 4 * group, 4)
    x = torch.randn(rows, 4 * group)
    assert same(call(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize(
    "every_tile",
    sorted({(size <= kernels.FUSED, tile) for size, tiles in kernels.CONFIGS.items() for tile in tiles}),
    ids=str,
)
def test_tiles(every_tile: tuple[bool, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that may be chosen, on a layer that fills no tile."""
    fused, tile = every_tile
    set_tiles(monkeypatch, {kernels.FUSED: [tile], 2**31: [tile]})
    weight, scale, bias = make_layer(35, 388)
    x = torch.randn(9 if fused else 17, 388)
    try:
        y = call(x, weight, scale, bias)
    except kernels.triton.runtime.errors.OutOfResources as error:
        pytest.skip(f"this GPU has no room for the tile: {error}")  # which tuning leaves out
    assert same(y, reference.linear(x, weight, scale, bias))


@pytest.mark.parametrize("shape", [(0, 30), (30, 0)])
def test_nothing_to_multiply(shape: tuple[int, int]) -> None:
    weight, scale, bias = make_layer(*shape)
    x = torch.randn(3, shape[1])
    assert same(call(x, weight, scale, bias), reference.linear(x, weight, scale, bias))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of the interpreter
@pytest.mark.parametrize("copies", [1, 2])
def test_extreme_rows(copies: int) -> None:
    """Once in one launch, once through the planes."""
    weight, scale, bias = make_layer(20, 40)
    rows = {
        "zero": torch.zeros(40),
        "subnormal": torch.full((40,), 1e-42),
        "below the smallest": torch.full((40,), 2.0**-101),
        "the smallest": torch.full((40,), 2.0**-100),
        "the largest": torch.linspace(-1, 1, 40) * torch.finfo().max,
        "ties": torch.arange(40) - 20 + torch.tensor([0.5]),
        "ties of 127": torch.cat([torch.tensor([127.0]), torch.arange(39) - 19.5]),
    }
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        row = torch.randn(40)
        row[random.randrange(40)] = value
        rows[str(value) + str(len(rows))] = row
    x = torch.stack([*rows.values(), torch.randn(40)]).repeat(copies, 1)
    y = call(x, weight, scale, bias)
    assert same(y, reference.linear(x, weight, scale, bias))
    for name, row in zip(rows, y, strict=False):
        assert row.isnan().all() if "nan" in name or "inf" in name else not row.isnan().any(), name
    assert torch.equal(y[0], bias)
    assert same(call(x, weight, scale), reference.linear(x, weight, scale))  # where a bias does not hide the smallest


@pytest.mark.parametrize("rows", [2, 18])
def test_sums_beyond_int16(rows: int) -> None:
    """All activations and weights at their extremes: narrow accumulators would overflow."""
    x = torch.ones(rows, 600) * torch.tensor([1, -1]).repeat(rows // 2)[:, None]
    for value in (-1, 0, 1):
        weight = packing.pack(torch.full((17, 600), value, dtype=torch.int8))
        assert torch.equal(call(x, weight, torch.ones(17, 1)), 600 * value * x[:, :17])


def test_every_operation_is_rounded() -> None:
    """Sums, scales and biases for which one fused multiply-add would show."""
    weight, scale, _ = make_layer(64, 96, 3)
    x = torch.randn(17, 96)
    bias = -reference.linear(x[:1], weight, scale)[0]  # all but the rounding errors cancels
    y = call(x, weight, scale, bias)
    assert same(y, reference.linear(x, weight, scale, bias))
    assert torch.equal(y[0], torch.zeros(64))


def test_a_row_does_not_depend_on_its_batch() -> None:
    weight, scale, bias = make_layer(40, 100)
    x = torch.randn(40, 100)
    batch = call(x, weight, scale, bias)
    for rows in (slice(0, 1), slice(39, 40), slice(20, 36), slice(3, 23)):
        assert torch.equal(call(x[rows], weight, scale, bias), batch[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [3, 17])
def test_dtypes(dtype: torch.dtype, rows: int) -> None:
    weight, scale, bias = make_layer(33, 65)
    x, bias = torch.randn(1, rows, 65).to(dtype), bias.to(dtype)
    y = call(x, weight, scale, bias)
    assert y.dtype == dtype
    assert same(y, rounded(reference.linear(x.float(), weight, scale, bias.float()), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("groups", [1, 5])
def test_float_activations(dtype: torch.dtype, rows: int, groups: int) -> None:
    """Products are exact, sums are in float32 but in another order: a few roundings apart, then rounded to the dtype."""
    weight, scale, bias = make_layer(33, 65, groups)
    x = torch.randn(rows, 65).to(dtype)
    y = call(x, weight, scale, bias, None)
    expected = reference.linear(x.float(), weight, scale, bias, None)
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps if dtype != torch.float64 else 0
    torch.testing.assert_close(y.float(), expected, rtol=step + 2e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of the interpreter
def test_float_activations_that_are_not_finite() -> None:
    weight, scale, bias = make_layer(33, 64)
    for rows in (2, 17):
        x = torch.randn(rows, 64)
        x[0, 3], x[1, 5] = torch.nan, torch.inf
        y = call(x, weight, scale, bias, None)
        assert y[0].isnan().all()
        assert not y[1].isfinite().any()
        assert y[2:].isfinite().all()


def test_strides() -> None:
    weight, scale, bias = make_layer(33, 64)
    x = torch.randn(5, 64, 7)
    expected = reference.linear(x.mT.contiguous(), weight, scale, bias)
    assert same(call(x.mT, weight, scale, bias), expected)
    assert same(call(x[0].T, weight, scale, bias), expected[0])
    assert same(call(x[:1, :, 0].expand(5, 64), weight, scale, bias), expected[:1, 0].expand(5, 33).contiguous())
    spread = torch.zeros(33, 2 * weight.shape[1], dtype=torch.uint8)[:, ::2].copy_(weight)
    wide_scale, wide_bias = scale.expand(33, 3)[:, ::3], torch.stack([bias, bias], 1)[:, 0]
    assert same(call(x.mT, spread, wide_scale, wide_bias), expected)


def test_one_dimension() -> None:
    weight, scale, bias = make_layer(10, 30)
    x = torch.randn(30)
    assert same(call(x, weight, scale, bias), reference.linear(x[None], weight, scale, bias)[0])


@pytest.mark.skipif(not INTERPRETED, reason="the message needs two devices, of which one is not the GPU's")
def test_tensors_of_two_devices() -> None:
    weight, scale, bias = make_layer(8, 64)
    with pytest.raises(ValueError, match="x is on meta, but the layer on cpu: move one of them"):
        kernels.linear(torch.zeros(2, 64, device="meta"), weight, scale, bias)


def test_errors() -> None:
    weight, scale, bias = make_layer(8, 20)
    with pytest.raises(ValueError, match="activation='int4' is not allowed"):
        call(torch.zeros(2, 20), weight, scale, bias, "int4")
    with pytest.raises(ValueError, match="in_features=16 and needs a weight of 4 bytes a row"):
        call(torch.zeros(2, 16), weight, scale, bias)


class TestPadding:
    """Weights whose groups are not whole 16 bytes are padded once; the others are read as they are stored."""

    @pytest.mark.parametrize(("in_features", "groups", "padded"), [(384, 1, None), (384, 6, None), (62, 1, None)])
    def test_none(self, in_features: int, groups: int, padded: None) -> None:
        weight, scale, _ = make_layer(7, in_features, groups)
        assert kernels.padded(weight, scale, in_features) is padded

    @pytest.mark.parametrize(("in_features", "groups", "row"), [(385, 1, 112), (32, 1, 16), (96, 3, 48), (126, 2, 32)])
    def test_to_whole_sixteen_bytes(self, in_features: int, groups: int, row: int) -> None:
        weight, scale, _ = make_layer(7, in_features, groups)
        padded = kernels.padded(weight, scale, in_features)
        assert padded.shape == (7, row)
        group = in_features // groups
        codes = packing.unpack(padded, 4 * row).unflatten(1, (groups, -1))
        assert torch.equal(codes[..., :group].flatten(1), packing.unpack(weight, in_features))
        assert not codes[..., group:].any()

    def test_follows_the_weight_and_goes_with_it(self) -> None:
        weight, scale, bias = (tensor.to(DEVICE) for tensor in make_layer(10, 30))
        other = make_layer(10, 30, seed=1)[0].to(DEVICE)
        x = torch.randn(2, 30, device=DEVICE)
        kernels._padded_weights.entries.clear()
        kernels.linear(x, weight, scale, bias)
        first = kernels._padded_weights(weight, scale, 30)
        assert kernels._padded_weights(weight, scale, 30) is first
        copied = copy.deepcopy(weight)
        weight.copy_(other)
        assert same(kernels.linear(x, weight, scale, bias), kernels.linear(x, other, scale, bias))
        assert not same(kernels.linear(x, weight, scale, bias), kernels.linear(x, copied, scale, bias))
        del weight, other, copied
        gc.collect()
        assert not kernels._padded_weights.entries

    def test_keeps_no_weight_alive(self) -> None:
        weight, scale, bias = make_layer(10, 64)
        kernels._padded_weights.entries.clear()
        call(torch.randn(2, 64), weight, scale, bias)
        del weight
        gc.collect()
        assert not kernels._padded_weights.entries


def test_a_gpu_that_is_required_is_not_replaced_by_the_interpreter() -> None:
    environment = {**os.environ, "HF_TERNARY_REQUIRE_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::test_one_dimension"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert "1 failed" in done.stdout, done.stdout


COMPILER = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from hf_ternary.ops import triton as kernels

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        return lambda call, quantiles: (call(), [1.0] * 3)[1]

compiled = []

def compile_only(self, *arguments, grid, warmup, **options):
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    assert kernel.metadata.shared <= 99 * 1024, self.__name__  # what the smallest of these GPUs has for a block
    compiled.append((self.__name__, kernel.asm["ptx"]))

driver.set_active(Driver())
run, triton.JITFunction.run = triton.JITFunction.run, compile_only
torch.cuda.is_current_stream_capturing = lambda: False
kernels.CONFIGS.update({size: tiles[:1] for size, tiles in kernels.CONFIGS.items()})
"""

COMPILE = """
def ptx(rows, columns, groups=1, dtype=torch.bfloat16, activation="int8", bias=True, transposed=False):
    compiled.clear()
    x = torch.empty(columns, rows, dtype=dtype).T if transposed else torch.empty(rows, columns, dtype=dtype)
    weight, scale = torch.zeros(256, -(-columns // 4), dtype=torch.uint8), torch.ones(256, groups)
    for _ in range(2):  # once to choose, once as chosen
        kernels.linear(x, weight, scale, torch.zeros(256) if bias else None, activation)
    for name, text in compiled:
        assert "fma.rn" not in text and ".ftz" not in text and "div.full" not in text, name
    return {name: text for name, text in compiled}

for rows in 300, 3000, 9000:
    ptx(rows, 1024, dtype=torch.float32, activation=None)
ptx(7, 384, dtype=torch.float64)
fused, large = ptx(7, 384), ptx(9000, 1024, bias=False)
halves, odd = ptx(40, 384, dtype=torch.float16, activation=None), ptx(40, 385, groups=5, transposed=True)
assert list(fused) == ["_multiply"] and list(large) == list(odd) == list(halves) == ["_to_planes", "_multiply"]
assert "div.rn.f32" in large["_to_planes"] and "st.global.v4" in large["_to_planes"]
assert ".m16n8k32.row.col.satfinite.s32.s8.s8.s32" in fused["_multiply"]
if sys.argv[1] == "90":
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in large["_multiply"]
    assert "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16" in halves["_multiply"]
"""


def compile_for(architecture: str, code: str) -> None:
    """Run ``code`` where kernels are compiled for a compute capability, into the list ``compiled``, and not launched."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILER + code, architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_compiler_makes_what_is_meant(architecture: str) -> None:
    """All but the launch: int8 tensor cores, wide stores, exact divisions, and no fused multiply-add."""
    compile_for(architecture, COMPILE)


THREADS = """
import threading, time
kernels.CONFIGS[16] = [(16, 16, 64, 1, 2), (16, 16, 128, 2, 2)]
Driver.get_benchmarker = lambda self: lambda call, quantiles: (call(), time.sleep(0.1), [1.0] * 3)[2]
failed = []

def first_call(outputs):
    try:
        kernels.linear(torch.zeros(3, 64), torch.zeros(outputs, 16, dtype=torch.uint8), torch.ones(outputs, 1))
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=first_call, args=(outputs,)) for outputs in (32, 64, 96, 128)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
assert len(kernels._best) == 4
"""


def test_first_calls_of_several_threads_are_tuned_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing is known from an earlier run
    compile_for("90", THREADS)


def test_a_padded_weight_cannot_be_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured. Fix: call the model once before"):
        kernels.finish(torch.device("cuda"))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_the_op_runs_on_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = backends.Choice(backend, False, "this test")
    monkeypatch.setattr(backends, "choose_gpu", lambda device: choice)
    library._on_gpu.cache_clear()
    monkeypatch.setattr(library, "_quiet", {"cpu", "cuda"})
    assert library._on_gpu(7) is (kernels.linear if backend == "triton" else library._reference)
    weight, scale, bias = (tensor.to(DEVICE) for tensor in make_layer(33, 64))
    x = torch.randn(3, 64, device=DEVICE)
    y = library._cuda(x, weight, scale, bias, "int8")
    library._on_gpu.cache_clear()
    assert same(y, reference.linear(x, weight, scale, bias))


USE = """
import torch
from hf_ternary.ops import backends, linear
print(backends.capabilities()["gpus"])
"""


def use(backend: str, hidden: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, backends.VARIABLE: backend, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", hidden + USE], env=environment, capture_output=True, text=True, timeout=120)


def test_forced_where_there_is_no_gpu() -> None:
    done = use("triton")
    assert "ValueError: HF_TERNARY_BACKEND=triton: torch sees no CUDA device 0. Fix: unset it" in done.stderr


def test_forced_where_it_is_not_installed() -> None:
    hide = (
        "from importlib import metadata\nversion = metadata.version\n"
        "def hide(name):\n    if name == 'triton': raise metadata.PackageNotFoundError(name)\n    return version(name)\n"
        "metadata.version = hide\n"
    )
    done = use("triton", hide)
    assert "ImportError: HF_TERNARY_BACKEND=triton: Triton is not installed. Fix: pip install" in done.stderr
    assert use("auto", hide).stdout == "[]\n"


class TestChoice:
    """What runs on a GPU, as far as torch tells."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ("new", "old")[device])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (7, 5))[device])
        monkeypatch.delenv(backends.VARIABLE, raising=False)
        backends.choose_gpu.cache_clear()
        yield
        backends.choose_gpu.cache_clear()

    def test_each_gpu_has_its_own(self) -> None:
        new, old = backends.capabilities()["gpus"]
        assert new == {"name": "new", "backend": "triton", "reason": "this GPU can run it"}
        assert (old["name"], old["backend"]) == ("old", "reference")
        assert old["reason"] == "its compute capability is 7.5, and the kernels need 8.0"

    def test_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.VARIABLE, "triton")
        assert backends.choose_gpu(0) == ("triton", True, "forced by HF_TERNARY_BACKEND")
        with pytest.raises(ValueError, match="its compute capability is 7.5"):
            backends.choose_gpu(1)

    def test_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.VARIABLE, "reference")
        assert backends.choose_gpu(0).backend == "reference"

    def test_old_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends.metadata, "version", lambda name: "3.1.0")
        assert backends.choose_gpu(0) == ("reference", False, "Triton 3.1.0 is older than 3.4")
