import numpy as np
import pytest

from hf_ternary.distill.data import TokenBatches

LENGTHS = np.random.default_rng(1).integers(3, 60, 2000)


def test_batches_hold_every_text_at_most_once_and_hardly_any_padding():
    batches = TokenBatches(LENGTHS, 512)
    texts = np.concatenate(batches.batches)
    assert len(np.unique(texts)) == len(texts) > 0.98 * len(LENGTHS)
    padded = [len(b) * LENGTHS[b].max() for b in batches.batches]
    assert max(padded) <= 512
    assert LENGTHS[texts].sum() / sum(padded) > 0.95
    assert all(len(b) % 4 == 0 for b in batches.batches)


def test_processes_share_the_batches_of_one():
    alone = list(TokenBatches(LENGTHS, 512, steps=300, seed=5))
    ranks = [list(TokenBatches(LENGTHS, 512, steps=300, seed=5, rank=r, world_size=2)) for r in (0, 1)]
    assert len(alone) == 300
    for batch, first, second in zip(alone, *ranks, strict=True):
        assert len(first) == len(second)
        assert sorted(first + second) == sorted(batch)


def test_steps_run_over_passes_in_another_order():
    one = len(TokenBatches(LENGTHS, 512))
    two = TokenBatches(LENGTHS, 512, steps=2 * one - 1)
    assert len(two) == 2 * one - 1
    assert sorted(np.concatenate(two.batches[:one])) == sorted(np.concatenate(TokenBatches(LENGTHS, 512).batches))
    assert two.batches[0].tolist() != two.batches[one].tolist()
    assert len(TokenBatches(LENGTHS, 512, passes=2.5)) == pytest.approx(2.5 * one, abs=3)


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "message"),
    [
        ([100] * 50, 300, r"batch_tokens=300 does not hold 4 inputs of 100 tokens; use at least 400"),
        ([10] * 5, 512, r"5 inputs with 50 tokens are fewer than one batch of 512"),
        ([], 512, r"0 inputs"),
    ],
)
def test_texts_that_do_not_fit_a_batch(lengths: list[int], batch_tokens: int, message: str):
    with pytest.raises(ValueError, match=message):
        TokenBatches(np.array(lengths, dtype=np.int64), batch_tokens)
