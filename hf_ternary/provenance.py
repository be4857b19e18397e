"""On what, with what and by which code a number was measured or a model made: one function for every JSON of the project.

Imports neither torch nor anything else heavy; what torch knows (threads, GPU) is taken from it if it is loaded already.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .threads import cores
from .version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "mteb",
    "scikit-learn",
    "scipy",
    "numpy",
)


def provenance(seed: int | None = None, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Date, commit, hardware, threads, versions and seed of a measurement that is made now, ready for JSON.

    Args:
        seed: the seed that the measurement used, if any.
        packages: distributions whose versions count; those not installed are left out.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "seed": seed,
        "hardware": _hardware(),
        "threads": _threads(),
        "versions": {"hf_ternary": __version__, "python": platform.python_version(), **_versions(packages)},
    }


def weights(model: str | Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a model's safetensors files, or its ``.bin`` files without any; empty where it has none.

    Args:
        model: a folder, one file of any kind, or the Hub id of a model that is in the local cache.
    """
    path = Path(model)
    if not path.exists():
        path = _cached(str(model))
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) or sorted(path.rglob("pytorch_model*.bin"))
    if not files:
        return {}
    digest = hashlib.sha256()
    for file in files:
        hash_file(digest, file)
    return {"bytes": sum(file.stat().st_size for file in files), "sha256": digest.hexdigest()}


def settings(model: Any) -> dict[str, Any]:
    """What decides the embeddings of a SentenceTransformer beside its weights: modules with their options, prompts, cut."""
    prompts = {"prompts": model.prompts, "prompt": model.default_prompt_name}
    return {"modules": str(model), **prompts, "truncate_dim": model.truncate_dim}


def hash_file(digest: Any, file: Path) -> None:
    """Update a hash with a file that may be larger than memory."""
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if "/" not in name:  # sentence-transformers' short name of its own model, or a very old model
        with suppress(LocalEntryNotFoundError):
            return _cached(f"sentence-transformers/{name}")
    options: dict[str, Any] = {"allow_patterns": ["*.safetensors"], "local_files_only": True}
    with suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(name, cache_dir=os.getenv("SENTENCE_TRANSFORMERS_HOME"), **options))
    return Path(snapshot_download(name, **options))


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write strict JSON, whole or not at all; makes the parent folder.

    Raises:
        ValueError: the content has a NaN or an infinity.
    """
    path = Path(path)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of the checkout that this file belongs to, with `-dirty` if it was changed; None outside a checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    # An installed copy may lie in some other project's checkout: only a tracked file tells.
    if _output([*git, "ls-files", "--error-unmatch", here.name]) is None:
        return None
    return _output([*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"])


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if has_gpu and torch is not None else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    """Model name; on Linux with the instruction sets that decide an int8 kernel's speed, as clouds hide the model."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", platform.machine())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    useful = [f for f in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm") if f in flags]
    family = "/".join(fields[k] for k in ("cpu family", "model", "stepping") if k in fields)
    return " ".join([name, f"(family/model/stepping {family})" if family else "", *useful]).replace("  ", " ").strip()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else cores()
