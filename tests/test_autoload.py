"""The entry point: a packed model loads with no import of ours, and without the plugin loading raises."""

import os
import subprocess
import sys

import pytest
import torch

import hf_ternary
from tests.conftest import SENTENCES

# Makes Python behave as if this package were not installed, entry point included.
HIDE = """
import importlib.metadata, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ternary": raise ImportError(name)
sys.meta_path.insert(0, Missing())
entry_points = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **k: () if k.get("group") == "torch.backends" else entry_points(**k)
"""
LOAD = """
import sys, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
torch.save(torch.from_numpy(model.encode(sys.argv[3:])), sys.argv[2])
"""


@pytest.fixture(scope="module")
def packed(tiny_sentence_transformer, tmp_path_factory):
    """A packed SentenceTransformer and its embeddings. 8-bit tables have the shape of float ones: the hardest case."""
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": hf_ternary.TernaryConfig(embedding_bits=8)}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    folder = tmp_path_factory.mktemp("autoload") / "packed"
    model.save_pretrained(str(folder))
    return folder, torch.from_numpy(model.encode(SENTENCES))


def load(folder, output, prelude="", **environment):
    command = [sys.executable, "-c", prelude + LOAD, str(folder), str(output), *SENTENCES]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240)


def test_loads_without_importing_hf_ternary(packed, tmp_path):
    folder, expected = packed
    result = load(folder, tmp_path / "embeddings.pt")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "embeddings.pt"), expected)


@pytest.mark.parametrize(
    ("prelude", "environment"), [(HIDE, {}), ("", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})], ids=["missing", "switched off"]
)
def test_without_the_plugin_loading_raises(packed, tmp_path, prelude, environment):
    folder, _ = packed
    result = load(folder, tmp_path / "embeddings.pt", prelude, **environment)
    assert result.returncode != 0
    assert "size mismatch" in result.stderr or "mismatch" in result.stderr
    assert not (tmp_path / "embeddings.pt").exists()


def test_installing_twice_adds_one_finder(monkeypatch):
    from hf_ternary import autoload

    monkeypatch.delitem(sys.modules, autoload._TARGET, raising=False)  # as before transformers is imported
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload._Finder)])
    autoload.install()
    autoload.install()
    assert sum(isinstance(f, autoload._Finder) for f in sys.meta_path) == 1
