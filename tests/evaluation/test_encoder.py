"""Each distinct text is encoded once; embeddings that are not finite are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.report import evaluate
from hf_ternary.evaluation.tasks import local_tasks
from tests.evaluation.conftest import word_model

ROWS = "score\tsentence1\tsentence2\n1\ta0\ta90\n2\ta0\ta10\n3\ta10\ta10\n"


def test_each_text_is_encoded_once(angles: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.tsv").write_text(ROWS)
    encoded: list[str] = []
    encode = angles.encode

    def spy(texts: list[str], **kwargs: Any) -> Any:
        encoded.extend(texts)
        return encode(texts, **kwargs)

    monkeypatch.setattr(angles, "encode", spy)
    encoder = CachedEncoder(angles)
    one, two = evaluate(encoder, local_tasks(tmp_path), progress=False)
    assert sorted(encoded) == ["a0", "a10", "a90"]
    assert one["score"] == two["score"]
    np.testing.assert_array_equal(encoder.embeddings("two"), encode(["a0", "a10", "a90"]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    model = word_model({"a0": [1, 0], "a10": [0, 1], "a90": [bad, 1]})
    (tmp_path / "test.tsv").write_text(ROWS)
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 1 inputs, first for 'a90'"):
        evaluate(CachedEncoder(model), local_tasks(tmp_path), progress=False)
