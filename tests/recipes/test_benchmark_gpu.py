"""The GPU recipe, tried out on the CPU: everything but graphs and compilation."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from typer.testing import CliRunner

PATH = Path(__file__).parents[2] / "recipes" / "benchmark_gpu.py"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gpu", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCHES", ((2, 5),))
    monkeypatch.setattr(module, "ROWS", (1, 3))
    return module


def run(recipe: ModuleType, *options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(recipe.main)
    done = CliRunner().invoke(app, ["--device", "cpu", "--model", "tiny", "--repeats", "2", *options])
    return done.exit_code, done.output


def test_measures_and_goes_on(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    assert run(recipe, "--output", str(output), "--no-check")[0] == 0
    result = json.loads(output.read_text())
    assert {"hardware", "versions", "capabilities", "limits", "commit"} <= result.keys()
    assert set(result["limits"]) == {"int8", "bfloat16", "bandwidth"}
    layers = [cell for cell in result["cells"] if "layer" in cell["what"]]
    assert sorted((*cell["what"]["layer"], cell["what"]["rows"]) for cell in layers) == [
        (*shape, rows) for shape in ((32, 32), (32, 64), (64, 32)) for rows in (1, 3)
    ]
    (encoder,) = (cell for cell in result["cells"] if "model" in cell["what"])
    assert encoder["what"] == {"model": "tiny", "batch": 2, "tokens": 5}
    assert set(encoder["milliseconds"]) == {"float32", "tf32", "bfloat16", "ternary"}
    assert encoder["share_of_limits"]["ternary"].keys() == {"int8", "bandwidth"}
    assert encoder["weight_bytes"]["ternary"] < encoder["weight_bytes"]["bfloat16"] < encoder["weight_bytes"]["float32"]
    assert not any(cell["errors"] for cell in result["cells"])

    def no_more(*args: object) -> None:
        raise AssertionError(f"measured again: {args}")

    monkeypatch.setattr(recipe, "measure", no_more)
    assert run(recipe, "--output", str(output), "--no-check")[0] == 0
    assert json.loads(output.read_text())["cells"] == result["cells"]


def test_stops_when_the_time_is_over(recipe: ModuleType, tmp_path: Path) -> None:
    code, printed = run(recipe, "--minutes", "0", "--no-check", "--output", str(tmp_path / "gpu.json"))
    assert code == 0
    assert "the time is over; run it again to go on" in printed
    assert not (tmp_path / "gpu.json").exists()


def test_a_failing_contender_is_told_and_costs_the_others_nothing(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such product here")

    monkeypatch.setattr(torch, "_int_mm", broken)
    monkeypatch.setattr(recipe, "limits", lambda device: {"int8": 1.0, "bandwidth": 1.0})
    monkeypatch.setattr(recipe, "BATCHES", ())
    output = tmp_path / "gpu.json"
    code, printed = run(recipe, "--no-check", "--output", str(output))
    assert code == 1
    assert "no such product here" in printed
    assert all("ternary" in cell["milliseconds"] for cell in json.loads(output.read_text())["cells"])


def test_check(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "CHECKED_ROWS", (1, 3))
    recipe.check_kernels([(64, 32)], "cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(recipe, "linear", lambda x, *rest: recipe.reference.linear(x, *rest) * 1.01)
    with pytest.raises(AssertionError, match="64 x 32, 1 groups, 1 rows, torch.bfloat16, activation int8"):
        recipe.check_kernels([(64, 32)], "cpu")


def test_shapes_are_the_models(recipe: ModuleType) -> None:
    assert recipe.linear_shapes("all-MiniLM-L6-v2") == {(384, 384), (384, 1536), (1536, 384)}
    assert dict(recipe._layers("bge-large")) == {(1024, 1024): 96, (1024, 4096): 24, (4096, 1024): 24}
    assert (2048, 1024) in recipe.linear_shapes("Qwen3-0.6B")
