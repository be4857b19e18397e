"""Provenance says what it must, is plain JSON, and costs no heavy import."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import hf_ternary
from hf_ternary.provenance import provenance, weights, write_json


def test_provenance() -> None:
    record = json.loads(json.dumps(provenance(seed=7)))
    assert record["seed"] == 7
    assert record["threads"] >= 1
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["cpu"]
    assert record["versions"]["hf_ternary"] == hf_ternary.__version__
    assert record["versions"]["numpy"] == version("numpy")
    assert provenance(packages=("numpy", "no-such-package"))["versions"].keys() == {"hf_ternary", "python", "numpy"}


def test_threads_are_those_of_torch() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert provenance()["threads"] == 3
    finally:
        torch.set_num_threads(before)


def test_importing_it_is_light() -> None:
    code = "import sys; from hf_ternary.provenance import provenance; provenance(); print(*sys.modules)"
    root = Path(hf_ternary.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"torch", "mteb", "numpy"} & set(run.stdout.split())


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "provenance.py"
    file.write_text("1\n")
    monkeypatch.setattr("hf_ternary.provenance.__file__", str(file))
    assert provenance()["commit"] is None
    git("init", "-q")
    assert provenance()["commit"] is None  # in a checkout, but not of it
    git("add", "provenance.py")
    git("commit", "-q", "-m", "first")
    assert provenance()["commit"] == git("rev-parse", "HEAD")
    file.write_text("2\n")
    assert provenance()["commit"] == git("rev-parse", "HEAD") + "-dirty"


def test_weights(tmp_path: Path) -> None:
    assert weights(tmp_path) == {}
    (tmp_path / "2_Dense").mkdir()
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        save_file({"x": np.zeros(100, np.float32)}, tmp_path / path)
    found = weights(tmp_path)
    assert found["bytes"] == 2 * (tmp_path / "model.safetensors").stat().st_size
    save_file({"x": np.ones(100, np.float32)}, tmp_path / "model.safetensors")
    assert weights(tmp_path)["sha256"] != found["sha256"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"weights")
    assert weights(tmp_path / "old") == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "int8.onnx").write_bytes(b"onnx")
    assert weights(tmp_path / "int8.onnx") == {"bytes": 4, "sha256": hashlib.sha256(b"onnx").hexdigest()}


def test_weights_of_models_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sentence-transformers' short names, and the names without an organisation that old models have."""
    for repository in ("sentence-transformers--short", "old"):
        folder = tmp_path / f"models--{repository}"
        (folder / "snapshots" / "a").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a")
        save_file({"x": np.zeros(len(repository), np.float32)}, folder / "snapshots" / "a" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights("short") == weights("sentence-transformers/short") != weights("old")
    with pytest.raises(OSError, match="cached snapshot"):
        weights("unknown")
    old = weights("old")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    assert weights("old") == old


def test_write_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, {"score": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"score": 0.5}
    assert list(path.parent.iterdir()) == [path]
