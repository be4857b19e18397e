"""Options of a recipe: flags win over the yaml file, and what is wrong in either is named."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from options import parse


@dataclass
class Arguments:
    model: str = ""
    steps: int = 3
    rate: float = 0.5


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text("model: x\nsteps: 4\n")
    return path


def test_flags_win_over_the_file_and_the_file_over_the_defaults(config: Path) -> None:
    assert parse(Arguments, ["--config", str(config), "--steps", "5"]) == Arguments("x", 5, 0.5)
    assert parse(Arguments, ["--steps", "5", f"--config={config}"]) == Arguments("x", 5, 0.5)
    assert parse(Arguments, []) == Arguments()


def test_an_empty_file_changes_nothing(config: Path) -> None:
    config.write_text("# nothing\n")
    assert parse(Arguments, ["--config", str(config)]) == Arguments()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stps: 4", "'stps' is no option; did you mean 'steps'?"),
        ("zzz: 1", "'zzz' is no option$"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(config: Path, content: str, message: str) -> None:
    config.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse(Arguments, ["--config", str(config)])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--model is missing"):
        parse(Arguments, [], needed=("steps", "model"))
    with pytest.raises(ValueError, match=r"--config .*nowhere\.yaml cannot be read"):
        parse(Arguments, ["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ValueError, match="--bogus"):
        parse(Arguments, ["--bogus", "1"])


def test_help_is_the_recipes_first_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Arguments, ["--help"], "What it does.\n\nHow.")
    printed = capsys.readouterr().out
    assert "What it does." in printed
    assert "How." not in printed
    assert "--config" in printed
