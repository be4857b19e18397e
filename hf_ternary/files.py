"""Reading what lies in a model's folder, without torch."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path, default: Any = None) -> Any:
    """The content of a JSON file; ``default`` (an empty object) if there is no such file or it holds another type.

    Raises:
        ValueError: the file is damaged.
    """
    default = {} if default is None else default
    if not file.is_file():
        return default
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Fix: download it again or save the model again") from error
    return content if isinstance(content, type(default)) else default
