"""Options of a recipe: the fields of a dataclass, set by a yaml file (--config) and by flags, which win."""

import argparse
import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: list[str], doc: str | None = None, needed: tuple[str, ...] = ()) -> Options:
    """Read the command line ``arguments`` of a recipe.

    Args:
        kind: dataclass whose fields are the options.
        doc: docstring of the recipe; its first paragraph is told by --help.
        needed: options that must not stay empty.

    Raises:
        ValueError: the file cannot be read, holds an unknown option, or something needed is missing.
    """
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, help="yaml file with any of these options")
    file, flags = config.parse_known_args(arguments)
    parser = HfArgumentParser(kind, parents=[config], description=(doc or "").split("\n\n")[0])
    if file.config:
        parser.set_defaults(**_read_yaml(file.config, [field.name for field in fields(kind)]))
    (options,) = parser.parse_args_into_dataclasses(flags)[:1]
    if missing := [name for name in needed if not getattr(options, name)]:
        raise ValueError(f"--{missing[0]} is missing")
    return options


def _read_yaml(path: Path, known: list[str]) -> dict[str, Any]:
    try:
        chosen = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    for name in chosen:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{path}: {name!r} is no option" + (f"; did you mean {close[0]!r}?" if close else ""))
    return chosen
