"""Finding and reading what lies in a model's folder, without torch."""

import json
import os
from pathlib import Path
from typing import Any

from .config import QUANT_METHOD, TernaryConfig

# The end of what is said of a damaged file.
RESAVE = "Fix: download it again or save the model again"


def model_folder(model: str, patterns: list[str], revision: str | None = None, **options: Any) -> Path:
    """The model's folder; of a model on the Hub, a local copy of the files that match ``patterns``.

    ``options`` (``token``, ``cache_dir``, ``local_files_only``) go to ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: neither a folder nor a model that can be reached on the Hub, or it has no such revision.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"{model} is no folder. Fix: give the folder of a model or a Hub id such as user/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, **options))
    except RevisionNotFoundError as error:
        raise ValueError(f"{model} has no revision {revision!r}. Fix: give one of its branches, tags or commits") from error
    except (OSError, ValueError, HTTPError) as error:
        if partial := getattr(error, "snapshot_path", None):  # the Hub is not reached; what is not here need not matter
            return Path(partial)
        wanted = "model" if revision is None else f"revision {revision!r} of a model"
        raise ValueError(
            f"{model} is no folder, and no {wanted} by that name can be reached on the Hub ({type(error).__name__}). "
            "Fix: check the name, the connection, and for a private model `hf auth login`"
        ) from error


def check_writable(folder: Path) -> None:
    """See, before hours of work, that ``folder`` is there or can be made, and takes files.

    Raises:
        ValueError: it does not.
    """
    folder = folder.expanduser().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"no folder can be made in {there}, which is a file. Fix: choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {there}. Fix: choose a folder that you may write to")


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
        raise ValueError(f"{file} is damaged ({error}). {RESAVE}") from error
    return content if isinstance(content, type(default)) else default


def read_config(folder: Path) -> TernaryConfig:
    """The ternary ``quantization_config`` of a model folder.

    Raises:
        ValueError: the folder holds no ternary model, or one of another format version.
    """
    options = _options(folder)
    if options is None:
        raise ValueError(f"{folder} holds no ternary model. Fix: make one with `hf-ternary quantize {folder} DST`")
    return TernaryConfig.from_dict(options)


def is_ternary(folder: Path) -> bool:
    """Whether the model in ``folder`` is packed."""
    return _options(folder) is not None


def library_class(folder: Path) -> str | None:
    """``"SentenceTransformer"``, ``"CrossEncoder"``, ... of sentence-transformers; None for a plain transformers model."""
    if (folder / "modules.json").exists():
        return read_json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    # How sentence-transformers before version 6 marked a cross-encoder.
    return "CrossEncoder" if "sentence_transformers" in read_json(folder / "config.json") else None


def _options(folder: Path) -> dict[str, Any] | None:
    """``quantization_config`` in ``config.json``, which sentence-transformers may keep in a module's folder."""
    for file in [folder / "config.json", *sorted(folder.glob("*/config.json"))]:
        options = read_json(file).get("quantization_config") or {}
        if options.get("quant_method") == QUANT_METHOD:
            return options
    return None
