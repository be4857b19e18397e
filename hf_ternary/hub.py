"""Saving and sharing packed models: a folder is replaced whole or not at all; a push carries a model card.

``model.save_pretrained`` and ``model.push_to_hub`` of transformers and sentence-transformers work on packed models too.
The functions here add the safe replacement, a check of what was written, and the card.
"""

import glob
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from . import model_card
from .files import check_writable, read_json
from .info import read_info
from .modules import FakeQuantizedEmbedding, FakeTernaryLinear, QuantizedEmbedding, TernaryLinear

logger = logging.getLogger(__name__)

# What libraries write into a model folder (1_Pooling, query_0_Dense); anything else is the user's and is never deleted.
_MODEL_ENTRY = re.compile(
    r".*(config\w*|vocab|tokens|tokens_map|merges|modules|tokenizer|template|\.index)\.(json|txt|jinja)"
    r"|.+\.(safetensors|bin|model)|(configuration|modeling|tokenization|processing|custom)_\w+\.py"
    r"|(\w+_)?\d{1,2}_[A-Z]\w+|(README|LICENSE)(\.\w+)?|\.gitattributes|assets"
)

# Weights of an earlier push that the new ones replace.
_STALE_WEIGHTS = [f"{folder}{name}*" for folder in ("", "*/") for name in ("model*.safetensors", "pytorch_model*.bin")]

# Modules that sentence_transformers.models held; files that say so are read by every version.
_LASTING_NAMES = ("Transformer", "Pooling", "Normalize", "Dense")


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    tokenizer: Any = None,
    base_model: str | None = None,
    results: str | Path | None = None,
    training: str | Path | dict[str, Any] | None = None,
    token: str | bool | None = None,
) -> Path:
    """Save a packed model with a card. An interrupted or failed save leaves what was at ``path`` before.

    Args:
        model: a packed ``PreTrainedModel``, ``SentenceTransformer``, ``CrossEncoder`` or ``SparseEncoder``.
        path: folder to make, or a model folder to replace.
        tokenizer: tokenizer or processor to save beside a ``PreTrainedModel``; the others save theirs.
        base_model: Hub id of the full-precision model; by default where ``model`` was loaded from.
        results: results JSON of ``recipes/evaluate.py`` measured on these weights, for the card.
        training: ``summary.json`` of the distillation that made these weights, for the card, or its content.
        token: Hub token with which the card looks ``base_model`` up; default: the one that is logged in.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not packed, or ``path`` cannot or must not be replaced.
        OSError: writing failed, as on a full disk.
    """
    _check_model(model)
    target = check_target(path)
    with _replacing(target) as folder:
        try:
            _write(model, folder, tokenizer)
            _verify(model, folder)
        except SafetensorError as error:
            raise OSError(f"{target} could not be written: {error}. What was there before is unchanged") from error
        config = getattr(model, "config", None)  # a SentenceTransformer's is that of its transformers model
        source = getattr(config, "_name_or_path", None) or None
        card = model_card.create(folder, target.name, base_model, source, results, training, token)
        card.save(folder / "README.md")
    return target


@contextmanager
def _reaching_the_hub() -> Iterator[None]:
    """Errors of the network become OSErrors, as those are that the Hub itself gives."""
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"the Hub cannot be reached ({error!r}). Fix: check the connection and the proxy") from error


@_reaching_the_hub()
def make_repository(repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """The full id of a model repository, which is made if it does not exist.

    Raises:
        ValueError: it is public and was to be ``private``, or a malformed ``repo_id``.
        OSError: the Hub refused or cannot be reached.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:  # exist_ok leaves one that exists as it is
        raise ValueError(f"{repo_id} exists and is public. Fix: make it private on the Hub, or choose another name")
    return repo_id


@_reaching_the_hub()
def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    results: str | Path | None = None,
    training: str | Path | dict[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a packed model and its card; the repository, and the branch ``revision``, are made if they do not exist.

    Args:
        model: a model as in :func:`save_pretrained`, or the folder of a saved one, which goes up as it is.
        repo_id: ``"user/name"``, or ``"name"`` for the token's user.
        tokenizer, base_model, results, training: see :func:`save_pretrained`; for a model, not for a folder.
        private, revision, create_pr, commit_message, token: as in ``huggingface_hub.HfApi.upload_folder``.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        ValueError: no packed model, a malformed ``repo_id``, or ``private`` and the repository is public.
        OSError: the Hub refused or cannot be reached.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        if isinstance(model, nn.Module):
            save_pretrained(model, folder, tokenizer, base_model, results, training, token)
        else:
            source = Path(model).expanduser().resolve()
            read_info(source)
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git", ".cache"))
        repo_id = make_repository(repo_id, private, token)
        if revision is not None and not revision.startswith("refs/"):  # a pull request's
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        model_card.set_repo_id(folder / "README.md", repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload a ternary model with hf_ternary",
            delete_patterns=_STALE_WEIGHTS,
        )
    return commit.pr_url or commit.commit_url


def _check_model(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"{type(model).__name__} cannot be saved. Fix: give a PreTrainedModel, SentenceTransformer, CrossEncoder or "
            "SparseEncoder"
        )
    kinds = {type(module) for module in model.modules()}
    if kinds & {FakeTernaryLinear, FakeQuantizedEmbedding}:
        raise ValueError(
            f"{type(model).__name__} holds layers in training, not packed ones. Fix: call "
            "hf_ternary.convert.pack_model(model) first"
        )
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} holds an adapter and would be saved without its own weights. Fix: save the adapter by "
            "the model's own save_pretrained, or call dequantize() and merge it"
        )
    if TernaryLinear not in kinds:
        raise ValueError(
            f"{type(model).__name__} has no ternary layer. Fix: load it with "
            "quantization_config=hf_ternary.TernaryConfig(), or save it with its own save_pretrained"
        )


def check_target(path: str | Path) -> Path:
    """The absolute ``path``, if a model can be saved there; call it before hours of work that end in saving.

    Raises:
        ValueError: a file, a folder above the working directory, one that holds something that is no model, or no folder can
            be made there.
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file. Fix: give a folder")
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target} is, or holds, the working directory. Fix: give a folder inside it")
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if entries and not {"config.json", "modules.json"} & set(entries):
        raise ValueError(f"{target} is not empty and holds no model. Fix: choose another folder or empty this one")
    foreign = [entry for entry in entries if not _MODEL_ENTRY.fullmatch(entry)]
    if foreign:
        raise ValueError(
            f"{target} also holds {foreign[0]!r}, which replacing the model would delete. Fix: move it, or choose "
            "another folder"
        )
    check_writable(target.parent)
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when the block ends, and is removed if it raises."""
    new, old = _beside(target, "new"), _beside(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _handle_leftovers(target)
        new.mkdir()
    except OSError as error:
        raise ValueError(
            f"no folder can be made in {target.parent} ({error.strerror}). Fix: choose a folder that you may write to"
        ) from error
    try:
        yield new
        _flush(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, role: str) -> Path:
    # A name of its own for every save: two processes that save at once never write into one folder.
    return target.with_name(f".{target.name}.{role}-{uuid.uuid4().hex[:8]}")


def _handle_leftovers(target: Path) -> None:
    """After a kill: bring a model back that had been moved aside, and name what was half written."""
    name = glob.escape(target.name)
    aside = sorted(target.parent.glob(f".{name}.old-*"))
    if aside and not target.exists():
        aside.pop().rename(target)
        logger.warning("An interrupted save had moved %s aside; it was brought back.", target)
    for leftover in [*aside, *sorted(target.parent.glob(f".{name}.new-*"))]:
        logger.warning("An interrupted save left %s; delete it unless another process is saving there now.", leftover)


def _flush(folder: Path) -> None:
    """Force everything to disk; some file systems report that they are full only now."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _write(model: Any, folder: Path, tokenizer: Any) -> None:
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    else:
        model.save_pretrained(str(folder), create_model_card=False)
        _name_modules(folder / "modules.json")
        for file in folder.glob("*_Dense/model.safetensors"):
            _store_as_half(file)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _name_modules(file: Path) -> None:
    """Call sentence-transformers' modules by names that every version reads: they moved in 5.4 and in 6.0."""
    modules = read_json(file, [])
    for module in modules:
        package, _, name = module["type"].rpartition(".")
        if package.startswith("sentence_transformers.") and name in _LASTING_NAMES:
            module["type"] = f"sentence_transformers.models.{name}"
    if modules:
        file.write_text(json.dumps(modules, indent=2), encoding="utf-8")


def _store_as_half(file: Path) -> None:
    """Store tensors in float16 if that loses nothing, as of a Dense module that was distilled; they load as float32."""
    tensors = load_file(file)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    if all(torch.equal(halves[name].to(tensor.dtype), tensor) for name, tensor in tensors.items()):
        save_file(halves, file, {"format": "pt"})


def _verify(model: nn.Module, folder: Path) -> None:
    """Compare the headers of the files with the model's packed layers."""
    # By bytes a row: transformers stacks the layers of a model whose checkpoints hold a fused Wqkv.
    expected: Counter[int] = Counter()
    for m in model.modules():
        if isinstance(m, (TernaryLinear, QuantizedEmbedding)):
            expected[m.weight.shape[1] + 4 * m.weight_scale.shape[1]] += len(m.weight)
    written: Counter[int] = Counter()
    for layer in read_info(folder).layers:
        written[layer.bytes // layer.shape[0]] += layer.shape[0]
    if written != expected:
        raise ValueError(
            f"{type(model).__name__} was not saved whole: {written.total():,} of its {expected.total():,} packed rows are "
            "in the files. Fix: save a model that from_pretrained loaded, without adapters"
        )
