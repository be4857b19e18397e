"""The profile recipe: every length is measured, and functions are told where perf can sample."""

import json
import shutil
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from typer import Typer
from typer.testing import CliRunner

import hf_ternary
import profile_encoder


def test_a_profile(tiny_sentence_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf_ternary.TernaryConfig(embedding_bits=4, modules_to_not_convert=[])
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs={"quantization_config": config})
    folder = hf_ternary.save_pretrained(model, tmp_path / "packed")
    monkeypatch.setattr(profile_encoder, "LENGTHS", (1, 7))
    monkeypatch.setattr(profile_encoder, "SAMPLED", (7,))
    app = Typer()
    app.command()(profile_encoder.main)
    options = ["--threads", "1", "--rounds", "2", "--seconds", "0.01", "--output", str(tmp_path / "profile.json")]
    done = CliRunner().invoke(app, [str(folder), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (run,) = json.loads((tmp_path / "profile.json").read_text())["runs"]
    assert [row["tokens"] for row in run["lengths"]] == [1, 7]
    assert all(row["microseconds"] > 0 and row["gmacs"] >= 0 for row in run["lengths"])
    assert (run["functions"] is None) == (shutil.which("perf") is None)
    assert min(run["sentence_transformers"].values()) > 0


def test_functions_are_told_by_share() -> None:
    if shutil.which("perf") is None:
        pytest.skip("no perf here")

    def work() -> None:
        sum(i * i for i in range(1000))

    shares = profile_encoder.functions(work, 0.5)
    if not shares:
        pytest.skip("perf may not sample here")
    assert all(profile_encoder.LEAST <= share <= 1 for share in shares.values())
    assert 0.5 < sum(shares.values()) <= 1.01


def test_repeat_tells_the_seconds_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 0.02

    monkeypatch.setattr(profile_encoder.time, "perf_counter", lambda: clock[0])
    assert profile_encoder.repeat(call, 0.05) == pytest.approx(0.02)
    assert profile_encoder.repeat(call, 0) == pytest.approx(0.02)  # at least one call
