import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ternary.distill.health import Health, plot, write_log
from hf_ternary.modules import FakeTernaryLinear


def test_zeros_flips_and_drift_by_hand(tmp_path: Path):
    layer = FakeTernaryLinear(nn.Linear(4, 1), learned_scale=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0, 0.1, 0.1]]))
        layer.weight_scale.copy_(torch.tensor([[1.0]]))
    health = Health(nn.ModuleDict({"a": layer}))
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(global_step=1, logging_steps=2)
    health.on_step_begin(args, state, control)
    with torch.no_grad():
        layer.weight[0, 0] = 0.2  # one of four codes becomes 0
        layer.weight_scale.copy_(torch.tensor([[1.2]]))
    state.global_step = 2
    health.on_step_end(args, state, control)
    assert health.metrics() == pytest.approx(
        {"zeros": 0.75, "flips": 0.25, "drift": 0.2, "zeros/a": 0.75, "flips/a": 0.25, "drift/a": 0.2}
    )


def test_steps_that_are_not_logged_cost_nothing(tmp_path: Path):
    layer = FakeTernaryLinear(nn.Linear(4, 2))
    health = Health(nn.ModuleDict({"a": layer}))
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=0, logging_steps=10)
    health.on_step_begin(args, state, TrainerControl())
    layer.codes = None  # type: ignore[assignment,method-assign]  # calling it would fail
    health.on_step_end(args, state, TrainerControl())


def test_log_is_json_lines(tmp_path: Path):
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "eval_cosine": 0.9}]
    write_log(history, tmp_path / "log.jsonl")
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_plot_is_a_picture_of_whatever_was_logged(tmp_path: Path):
    pytest.importorskip("matplotlib")
    history = [
        {"step": 1, "loss_layers": 0.5, "zeros/a": 0.4, "flips/a": 0.1, "drift/a": 0.0, "tokens_per_second": 100.0},
        {"step": 2, "loss_layers": 0.4, "zeros/a": 0.4, "eval_cosine": 0.9},
    ]
    plot(history, tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
