"""The GPU recipe, tried out on the CPU: everything but graphs and compilation."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import typer
from transformers.utils import import_utils
from typer.testing import CliRunner

import benchmark_gpu
from hf_ternary.ops import backends


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu, "BATCHES", ((2, 5),))
    monkeypatch.setattr(benchmark_gpu, "ROWS", (1, 3))


def run(*options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(benchmark_gpu.main)
    done = CliRunner().invoke(app, ["--device", "cpu", "--model", "tiny", "--repeats", "2", *options])
    return done.exit_code, done.output


def test_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    assert run("--output", str(output), "--no-check")[0] == 0
    result = json.loads(output.read_text())
    assert {"hardware", "versions", "capabilities", "limits", "commit"} <= result.keys()
    assert set(result["limits"]) == {"int8", "bfloat16", "bandwidth"}
    layers = [cell for cell in result["cells"] if "layer" in cell["what"]]
    assert sorted((*cell["what"]["layer"], cell["what"]["rows"]) for cell in layers) == [
        (*shape, rows) for shape in ((32, 32), (32, 64), (64, 32)) for rows in (1, 3)
    ]
    (encoder,) = (cell for cell in result["cells"] if "model" in cell["what"])
    assert encoder["what"] == {"model": "tiny", "batch": 2, "tokens": 5}
    assert set(encoder["milliseconds"]) == {"float32", "tf32", "bfloat16", "ternary"}  # bfloat16: no encoder on a CPU
    assert encoder["share_of_limits"]["ternary"].keys() == {"int8", "bandwidth"}
    assert encoder["weight_bytes"]["ternary"] < encoder["weight_bytes"]["bfloat16"] < encoder["weight_bytes"]["float32"]
    assert not any(cell["errors"] for cell in result["cells"])

    def no_more(*args: object) -> None:
        raise AssertionError(f"measured again: {args}")

    monkeypatch.setattr(benchmark_gpu, "measure", no_more)
    assert run("--output", str(output), "--no-check")[0] == 0
    assert json.loads(output.read_text())["cells"] == result["cells"]


def test_stops_when_the_time_is_over(tmp_path: Path) -> None:
    code, printed = run("--minutes", "0", "--no-check", "--output", str(tmp_path / "gpu.json"))
    assert code == 0
    assert "the time is over; run it again to go on" in printed
    assert not (tmp_path / "gpu.json").exists()


def test_a_failing_contender_is_told_and_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such product here")

    monkeypatch.setattr(torch, "_int_mm", broken)
    monkeypatch.setattr(benchmark_gpu, "limits", lambda device: {"int8": 1.0, "bandwidth": 1.0})
    monkeypatch.setattr(benchmark_gpu, "BATCHES", ())
    output = tmp_path / "gpu.json"
    code, printed = run("--no-check", "--output", str(output))
    assert code == 1
    assert "no such product here" in printed
    assert all("ternary" in cell["milliseconds"] for cell in json.loads(output.read_text())["cells"])


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu, "CHECKED_ROWS", (1, 3))
    benchmark_gpu.check_kernels([(64, 32)], "cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(benchmark_gpu, "linear", lambda x, *rest: benchmark_gpu.reference.linear(x, *rest) * 1.01)
    with pytest.raises(AssertionError, match="64 x 32, 1 groups, 1 rows, torch.bfloat16, activation int8"):
        benchmark_gpu.check_kernels([(64, 32)], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_another_order_are_close_and_wrong_ones_are_not(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(64, 4096) * torch.randn(64, 1).exp(), torch.randn(256, 4096), torch.randn(256)
    x[0, 5], x[1, 0] = torch.nan, -torch.inf
    y = ((x.to(dtype).float() @ weight.T) + bias).to(dtype)
    assert benchmark_gpu._is_close(y, x.to(dtype), weight, bias)
    assert not benchmark_gpu._is_close(y * 1.02, x.to(dtype), weight, bias)
    y[0] = 0
    assert not benchmark_gpu._is_close(y, x.to(dtype), weight, bias)


def test_check_of_the_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if backends.choose().backend == "reference":
        pytest.skip("the C++ kernels are not built")
    benchmark_gpu.check_encoder("tiny", "cpu")
    assert "checked the encoder of tiny" in capsys.readouterr().out
    monkeypatch.setattr(benchmark_gpu, "by_modules", lambda model, ids, mask: torch.randn(*ids.shape, 32))
    with pytest.raises(AssertionError, match="tiny, torch.float32: cosine with transformers' forward"):
        benchmark_gpu.check_encoder("tiny", "cpu")


def test_nothing_is_tuned_for_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("hf_ternary.ops.triton")
    tuned = []
    for name in ("check_kernels", "check_encoder"):
        monkeypatch.setattr(benchmark_gpu, name, lambda *args: tuned.append(kernels.TUNE))
    monkeypatch.setattr(benchmark_gpu, "provenance", lambda *args: {"hardware": {}, "versions": {}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run("--minutes", "0", "--device", "cuda")[0] == 0
    assert tuned == [False, False]
    assert kernels.TUNE


def test_what_is_captured_is_what_runs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True, raising=False)
    with benchmark_gpu.capturable("meta"):
        assert not import_utils.is_cuda_stream_capturing()
        assert torch.arange(2).is_meta
    assert import_utils.is_cuda_stream_capturing()
    assert not torch.arange(2).is_meta


def test_qwen3_reads_nothing_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    options = {**sizes, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(benchmark_gpu.MODELS, "tiny Qwen3", ("Qwen3Config", options))
    model = transformers.AutoModel.from_config(benchmark_gpu.config_of("tiny Qwen3")).to("meta")
    model.config.use_cache = False
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert benchmark_gpu.by_modules(model, ids).shape == (2, 5, 32)  # a value of the meta device cannot be read
    monkeypatch.setattr(benchmark_gpu, "no_mask", lambda model: None)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        benchmark_gpu.by_modules(model, ids)


def test_shapes_are_the_models() -> None:
    assert benchmark_gpu.linear_shapes("all-MiniLM-L6-v2") == {(384, 384), (384, 1536), (1536, 384)}
    assert dict(benchmark_gpu._layers("bge-large")) == {(1024, 1024): 96, (1024, 4096): 24, (4096, 1024): 24}
    assert (2048, 1024) in benchmark_gpu.linear_shapes("Qwen3-0.6B")
