"""Damaged model folders: whatever was done to a file, ``hf_ternary.load`` raises ValueError or gives finite embeddings.

A few hundred damages a run, always the same; `make fuzz` tries new ones.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hf_ternary
from hf_ternary.ops import backends

pytestmark = pytest.mark.skipif(backends.choose().backend == "reference", reason="the C++ kernels are not built")

FILES = ["model.safetensors", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
HEADER = 4096  # where most of what a loader believes stands


@pytest.fixture(scope="module")
def folder(tiny_sentence_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentence_transformers import SentenceTransformer

    path = tmp_path_factory.mktemp("fuzz") / "model"
    options = {"quantization_config": hf_ternary.TernaryConfig()}
    SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options).save_pretrained(str(path))
    return path


@st.composite
def damages(draw: st.DrawFn, size: int) -> tuple[int, int, bytes]:
    """Replace ``[start, stop)`` of a file of ``size`` bytes: overwrite, cut out or insert, mostly near its start."""
    start = draw(st.integers(0, min(size, HEADER)) | st.integers(0, size))
    new = draw(
        st.binary(max_size=8) | st.sampled_from([b"0", b"-1", b"99999999999", b"null", b'"', b"{", b"[]", b"\xff" * 4])
    )
    return start, min(size, start + draw(st.just(len(new)) | st.integers(0, 8) | st.just(size))), new


@given(data=st.data())
def test_a_damaged_folder_is_an_error_or_harmless(folder: Path, data: st.DataObject) -> None:
    broken = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(folder, broken)
    file = broken / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    start, stop, new = data.draw(damages(len(content)))
    file.write_bytes(content[:start] + new + content[stop:])
    try:
        embeddings = hf_ternary.load(broken, threads=1).encode(["the cat sat on 12 mats", "", "a " * 300])
    except ValueError:
        pass
    else:
        assert embeddings.shape[0] == 3
        assert np.isfinite(embeddings).all()
    finally:
        shutil.rmtree(broken.parent)
