"""Distil a ternary model from an encoder, on unlabelled text.

    accelerate launch recipes/distill.py --config recipes/configs/minilm.yaml [--any_field value ...]

A flag overrides the yaml file. Run it again after a stop: it goes on from the last checkpoint in output_dir.
"""

import argparse
import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_ternary.distill import DistillArguments, distill


def parse(arguments: list[str]) -> DistillArguments:
    """The options from a yaml file and flags.

    Raises:
        ValueError: the file cannot be read or holds an unknown option.
    """
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config")
    path, flags = config.parse_known_args(arguments)
    parser = HfArgumentParser(DistillArguments, description=__doc__.split("\n\n")[0], prog="distill.py")
    parser.add_argument("--config", help="yaml file with any of these options")
    if path.config:
        parser.set_defaults(**_read_yaml(Path(path.config)))
    (options,) = parser.parse_args_into_dataclasses(flags)[:1]
    return options


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    known = [field.name for field in fields(DistillArguments)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{path}: {name!r} is no option" + (f"; did you mean {close[0]!r}?" if close else ""))
    return options


def main() -> None:
    try:
        options = parse(sys.argv[1:])
        distill(options)
        print(f"the model is in {options.output_dir}/model")
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
