"""What the documents tell of is there: links, options of commands, extras, configs, defaults, published weights."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.main import get_command

import adapt_lora
import train_vit
from hf_ternary import TernaryConfig, cli
from hf_ternary.distill import DistillArguments
from hf_ternary.provenance import weights
from options import parse
from tests.helpers import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "recipes" / "README.md"]
# Recipes whose options are the fields of a dataclass.
ARGUMENTS: dict[str, Any] = {
    "adapt_lora": adapt_lora.AdaptArguments,
    "distill": DistillArguments,
    "train_vit": train_vit.VitArguments,
}


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def anchors(path: Path) -> set[str]:
    """What the headings of a document are called in links, as by GitHub."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if not link.startswith("http")]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(document: Path) -> Iterator[tuple[str, set[str]]]:
    """The recipes and commands in the document's shell examples, and the options that they are given."""
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"(?:recipes/(\w+)\.py|hf-ternary (\w+))\b(.*)", line.partition(" #")[0]):
                yield found[1] or f"hf-ternary {found[2]}", set(re.findall(r"--[a-z][\w-]*", found[3]))


def options(program: str) -> set[str]:
    """The options that it has."""
    if program in ARGUMENTS:
        return {"--config"} | {f"--{field.name}" for field in fields(ARGUMENTS[program]) if field.init}
    if program.startswith("hf-ternary "):
        command: Any = get_command(cli.app).commands[program.removeprefix("hf-ternary ")]
    else:
        recipe, app = import_module(program), Typer()
        app.command()(recipe.main)
        command = get_command(app)
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_commands_have_the_options_that_they_are_given(document: Path) -> None:
    found = list(commands(document))
    assert found
    for program, given in found:
        assert given <= options(program), program


@pytest.mark.parametrize("recipe", ARGUMENTS)
def test_help_lists_every_option(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(ARGUMENTS[recipe], ["--help"], import_module(recipe).__doc__)
    assert stop.value.code == 0
    listed = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert options(recipe) <= listed


def test_extras_are_those_of_the_package() -> None:
    files = [*DOCUMENTS, *(ROOT / "recipes").glob("*.py"), *(ROOT / "hf_ternary").rglob("*.py")]
    files.append(ROOT / "hf_ternary" / "model_card_template.md")
    named = {extra for file in files for extra in re.findall(r"(?:\"\.|hf_ternary)\[([a-z,]+)\]", file.read_text())}
    assert "train,eval" in named
    assert set(",".join(named).split(",")) <= set(metadata.metadata("hf_ternary").get_all("Provides-Extra") or [])


def test_every_config_is_told() -> None:
    section = DOCUMENTS[1].read_text().split("### Configs\n")[1].split("\n###")[0]
    assert set(re.findall(r"`([\w-]+\.yaml)`", section)) == {path.name for path in (ROOT / "recipes/configs").glob("*.yaml")}


def test_options_have_the_defaults_that_are_told() -> None:
    table = DOCUMENTS[0].read_text().split("| option | default | |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", table, re.MULTILINE)
    told = {name: ast.literal_eval(default) for name, default in rows}
    defaults = {field.name: field.default for field in fields(TernaryConfig)}
    written_by_us = {"dequantize", "format_version", "hf_ternary_version"}
    assert told == {name: default for name, default in defaults.items() if name not in written_by_us}


def test_supported_architectures_are_tested() -> None:
    row = re.search(r"\| text encoders \|.*\n\|[-|]+\n\|(.*)\|\n", DOCUMENTS[0].read_text())
    assert row
    told = {name.strip() for cell in row[1].split("|") for name in cell.split(",")}
    assert len(told) >= 16
    assert told <= ARCHITECTURES.keys()


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda path: path.name)
def test_published_weights_are_those_that_were_measured(folder: Path) -> None:
    found, card = weights(folder), (folder / "README.md").read_text()
    assert found["sha256"] in card
    evaluation, training = (
        json.loads((ROOT / "recipes" / "results" / f"{kind}-{folder.name}.json").read_text()) for kind in ("eval", "distill")
    )
    assert evaluation["weights"] == found
    assert training.get("weights", found) == found  # older results do not tell
    for row in evaluation["scores"]:
        assert f"| {row['task']} | {row['type']} | {row['metric']} | {100 * row['score']:.2f} |" in card
