"""The recipe as a command: options from yaml and flags, one-line errors, a clean stop."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import distill
from hf_ternary.distill import DistillArguments
from hf_ternary.distill.health import Health
from options import parse
from tests.conftest import save_tiny_vit
from tests.distill.conftest import corpus_file, options, teacher, weights  # noqa: F401 - three are fixtures

RECIPES = Path(__file__).parents[2] / "recipes"

Options = Callable[..., dict[str, Any]]


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the command prints when it stops with an error."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *flags])
    with pytest.raises(SystemExit) as stop:
        distill.main()
    capsys.readouterr()
    return str(stop.value)


def test_flags_override_the_yaml_file(options: Options, tmp_path: Path):  # noqa: F811
    config = write(tmp_path / "a.yaml", options(learning_rate=2e-3))
    flags = ["--max_steps", "7", "--texts", "a.txt", "b.txt=2", "--group_size", "64", "--save_strategy", "no"]
    parsed = parse(DistillArguments, ["--config", config, *flags])
    assert isinstance(parsed, DistillArguments)
    assert (parsed.learning_rate, parsed.max_steps, parsed.texts) == (2e-3, 7, ["a.txt", "b.txt=2"])
    assert parsed.ternary_config().group_size == 64


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path: Path):
    parsed = parse(DistillArguments, ["--config", str(path), "--bf16", "false", "--use_cpu", "true"])
    assert parsed.max_steps > 0 or parsed.num_train_epochs > 0


def test_the_paper_config_is_the_paper():
    """Chen et al., arXiv 2411.15438: one scale 2 * mean|W|, last hidden state, Adam 2e-5, two epochs, decay 0.2."""
    paper = parse(DistillArguments, ["--config", str(RECIPES / "configs" / "minilm-paper.yaml"), "--texts", "a.txt"])
    config = paper.ternary_config()
    assert (config.group_size, config.weight_scheme) == ("tensor", "absmean")
    assert {name for name, weight in paper.loss_weights().items() if weight} == {"hidden"}
    assert (paper.learning_rate, paper.num_train_epochs, paper.weight_decay) == (2e-5, 2, 0.2)
    assert not paper.learned_scale


def test_the_paper_config_of_images_is_the_paper():
    """Chen et al., arXiv 2411.15438: as for text, but Adam 1e-3, halved every two of ten epochs."""
    paper = parse(DistillArguments, ["--config", str(RECIPES / "configs" / "dinov2-small-paper.yaml")])
    config = paper.ternary_config()
    assert (config.group_size, config.weight_scheme) == ("tensor", "absmean")
    assert {name for name, weight in paper.loss_weights().items() if weight} == {"hidden"}
    assert (paper.learning_rate, paper.num_train_epochs, paper.lr_halvings, paper.weight_decay) == (1e-3, 10, 4, 0)
    assert not paper.learned_scale


def test_the_smoke_config_runs(
    teacher: Path,  # noqa: F811
    corpus_file: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    flags = ["--teacher", str(teacher), "--texts", str(corpus_file), "--output_dir", str(tmp_path / "run")]
    flags += ["--relation_weight", "0.1", "--relation_modules", "encoder.layer.1.attention.self.value"]
    monkeypatch.setattr(sys, "argv", ["distill.py", "--config", str(RECIPES / "configs" / "smoke.yaml"), *flags])
    distill.main()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model", "log.jsonl", "summary.json", "health.png"}


def test_the_smoke_config_of_images_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sentence_transformers", minversion="6", reason="images need sentence-transformers 6")
    Image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    datasets = pytest.importorskip("datasets", reason="reading images needs datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(200):
        Image.new("RGB", (20, 20), (i, 255 - i, 3 * i % 256)).save(tmp_path / "images" / f"{i}.png")
    flags = ["--teacher", str(save_tiny_vit(tmp_path / "vit")), "--images", str(tmp_path / "images")]
    config = str(RECIPES / "configs" / "smoke-images.yaml")
    monkeypatch.setattr(sys, "argv", ["distill.py", "--config", config, *flags, "--output_dir", str(tmp_path / "run")])
    distill.main()
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model", "log.jsonl", "summary.json", "health.png"}


@pytest.mark.parametrize(
    ("changes", "content", "message"),
    [
        ({}, "", "is empty"),
        ({}, '{"text": "  "}\n{"text": "\\t"}\n', "holds no text"),
        ({}, '{"text": "the cat"}\n', "too few to hold out 20"),
        ({"eval_texts": 0}, '{"text": "the cat"}\n', "1 inputs with 4 tokens are fewer than one batch of 256"),
        ({"texts": ["nothing.jsonl"]}, "", "nothing.jsonl does not exist"),
        ({"max_length": 500}, '{"text": "the cat"}\n', "max_length=500 exceeds the 128 tokens"),
        ({"learning_rat": 1}, "", "'learning_rat' is no option; did you mean 'learning_rate'?"),
        ({"group_size": 48}, '{"text": "the cat"}\n' + "".join(f'{{"text": "a cat {i}"}}\n' for i in range(300)), "48"),
    ],
)
def test_bad_input_is_one_line(
    options: Options,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    content: str,
    message: str,
):
    (tmp_path / "texts.jsonl").write_text(content)
    config = write(tmp_path / "a.yaml", {**options(texts=[str(tmp_path / "texts.jsonl")]), **changes})
    error = run(monkeypatch, capsys, "--config", config)
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(
    options: Options,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """To the bits of a run that was never stopped. Before that, a copy of the folder is ended at its last checkpoint."""
    undisturbed, stopped = (options(max_steps=6, save_steps=4, output_dir=str(tmp_path / name)) for name in ("a", "b"))
    distill.distill(DistillArguments(**undisturbed))
    on_step_end = Health.on_step_end

    def press(self: Health, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["distill.py", "--config", write(tmp_path / "b.yaml", stopped)])
    with monkeypatch.context() as patch:
        patch.setattr(Health, "on_step_end", press)
        with pytest.raises(SystemExit) as stop:
            distill.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; run the same command again")
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "b" / "model").exists()

    early = shutil.copytree(tmp_path / "b", tmp_path / "early")
    distill.distill(DistillArguments(**{**stopped, "output_dir": str(early), "max_steps": 4}))
    assert json.loads((early / "summary.json").read_text())["steps"] == 4

    distill.main()
    assert f"the model is in {tmp_path / 'b'}/model" in capsys.readouterr().out
    wanted, got = weights(undisturbed), weights(stopped)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
