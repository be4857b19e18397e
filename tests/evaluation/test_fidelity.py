"""Mean cosine and neighbour overlap on embeddings known by hand."""

import numpy as np
import pytest

from hf_ternary.evaluation.fidelity import fidelity

RNG = np.random.default_rng(0)


def test_a_model_agrees_with_itself_and_with_a_scaled_copy() -> None:
    teacher = RNG.standard_normal((50, 8))
    assert fidelity(2 * teacher, teacher) == {"texts": 50, "cosine": pytest.approx(1), "overlap_at_10": 1}


def test_cosine() -> None:
    result = fidelity(np.array([[1.0, 0], [1, 1]]), np.array([[1.0, 0], [1, 0]]))
    assert result["cosine"] == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert result["overlap_at_10"] is None  # too few texts to have ten neighbours


def test_overlap_leaves_the_text_itself_out() -> None:
    # Two clusters of 11 for the teacher; the student moves one text of each into the other cluster.
    # A text that stayed shares 9 of 10 neighbours, one that moved none.
    groups = np.repeat([0, 1], 11)
    moved = groups.copy()
    moved[[0, 11]] = 1, 0
    result = fidelity(np.eye(2)[moved], np.eye(2)[groups])
    assert result["overlap_at_10"] == pytest.approx(20 * 0.9 / 22)


def test_other_width_compares_neighbours_only() -> None:
    teacher = RNG.standard_normal((40, 8))
    rotation = np.linalg.qr(RNG.standard_normal((16, 16)))[0]
    student = np.hstack([teacher, np.zeros((40, 8))]) @ rotation  # an isometry keeps every cosine
    assert fidelity(student, teacher) == {"texts": 40, "cosine": None, "overlap_at_10": 1}


def test_many_texts_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ternary.evaluation.fidelity.MAX_TEXTS", 20)
    student, teacher = RNG.standard_normal((2, 60, 4))
    first, again, other = (fidelity(student, teacher, seed) for seed in (1, 1, 2))
    assert first == again
    assert first["overlap_at_10"] != other["overlap_at_10"]
    assert first["cosine"] == other["cosine"]
    assert first["texts"] == 60


def test_different_texts() -> None:
    with pytest.raises(ValueError, match="3 student rows and 2 teacher rows"):
        fidelity(np.ones((3, 4)), np.ones((2, 4)))
