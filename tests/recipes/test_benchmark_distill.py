"""The recipe that times a distillation step: every variant runs, and what it writes is complete."""

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import benchmark_distill


@pytest.fixture
def app() -> Typer:
    app = Typer()
    app.command()(benchmark_distill.main)
    return app


def test_every_variant_of_a_cpu(app: Typer, tiny_sentence_transformer: Path, tmp_path: Path) -> None:
    options = ["--texts", "2", "--tokens", "5", "--rounds", "1", "--output", str(tmp_path / "step.json")]
    done = CliRunner().invoke(app, [str(tiny_sentence_transformer), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "step.json").read_text())
    assert list(written["tokens_per_second"]) == [variant.name for variant in benchmark_distill.VARIANTS["cpu"]]
    assert all(speed > 0 for speed in written["tokens_per_second"].values())
    assert written["peak_flops"] is None
    assert written["threads"] == 1


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about what it does itself
def test_the_compiled_step(app: Typer, tiny_sentence_transformer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def with_eager(module: torch.nn.Module) -> torch.nn.Module:
        compiled.append(module)
        return compile_module(module, backend="eager")

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", with_eager)
    monkeypatch.setitem(benchmark_distill.VARIANTS, "cpu", (benchmark_distill.Variant("compiled", compiled=True),))
    options = ["--texts", "2", "--tokens", "5", "--rounds", "1"]
    done = CliRunner().invoke(app, [str(tiny_sentence_transformer), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(compiled) == 1


def test_a_variant_that_fails_costs_the_others_nothing(
    app: Typer, tiny_sentence_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: torch.nn.Module) -> None:
        raise RuntimeError("cannot be compiled here")

    monkeypatch.setattr(torch, "compile", broken)
    variants = benchmark_distill.Variant("compiled", compiled=True), benchmark_distill.Variant("plain")
    monkeypatch.setitem(benchmark_distill.VARIANTS, "cpu", variants)
    options = ["--texts", "2", "--tokens", "5", "--rounds", "1", "--output", str(tmp_path / "step.json")]
    done = CliRunner().invoke(app, [str(tiny_sentence_transformer), *options])
    assert done.exit_code == 1
    assert "compiled: RuntimeError: cannot be compiled here" in done.output
    written = json.loads((tmp_path / "step.json").read_text())
    assert list(written["errors"]) == ["compiled"]
    assert list(written["tokens_per_second"]) == ["plain"]


def test_an_unknown_device(app: Typer) -> None:
    done = CliRunner().invoke(app, ["teacher", "--device", "tpu"])
    assert done.exit_code == 2
    assert "use cpu or cuda" in done.output
