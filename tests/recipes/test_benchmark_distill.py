"""The recipe that times a distillation step: every variant runs, and what it writes is complete."""

import json
from pathlib import Path

import pytest
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


def test_an_unknown_device(app: Typer) -> None:
    done = CliRunner().invoke(app, ["teacher", "--device", "tpu"])
    assert done.exit_code == 2
    assert "use cpu or cuda" in done.output
