import math

import pytest
import torch

from hf_ternary.distill import losses

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)


def test_hidden_error_is_a_mean_over_real_tokens_only():
    teacher = torch.zeros(2, 3, 4)
    student = torch.zeros(2, 3, 4)
    student[0, 1] = 2  # one of four real tokens is wrong by 2 in every dimension
    student[1, 1:] = torch.inf  # padding, which no loss may look at
    student = student.nan_to_num(posinf=1e6)
    assert losses.hidden_error(student, teacher, MASK).item() == pytest.approx(1.0)


def test_embedding_distance_is_known_for_known_angles():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [2.0, 0.0]])  # 90 degrees and 0; lengths do not count
    assert losses.embedding_distance(a, b).item() == pytest.approx(0.5)


def test_gram_error_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    # Of six ordered pairs four have cosine 0 instead of 1.
    assert losses.gram_error(student, teacher).item() == pytest.approx(4 / 6)


def test_ranking_divergence_by_hand():
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    even = [0.5, 0.5]
    # Rows: the teacher's cosines to the others, then the student's.
    expected = (kl(even, [high, low]) + kl([low, high], [high, low]) + kl([low, high], even)) / 3
    assert losses.ranking_divergence(student, teacher, temperature=1.0).item() == pytest.approx(expected, abs=1e-6)


def test_relation_divergence_does_not_see_padding_and_counts_every_real_token_once():
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = []
    for text, length in ((0, 3), (1, 1)):
        for token in range(length):
            for head in range(2):
                rows = [x[text, :length, head * 4 : head * 4 + 4] for x in (student, teacher)]
                q, p = (torch.softmax(x[token] @ x.t() / 2, -1) for x in rows)
                expected.append((p * (p / q).log()).sum().item() / 2)
    assert losses.relation_divergence(student, teacher, MASK, heads=2).item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_relations_are_compared_in_float32():
    """Mixed precision gives the student's as float32, the teacher's as bfloat16."""
    x = (2 + torch.randn(2, 3, 64) / 2).bfloat16()
    y = x.roll(1, 0)
    assert abs(losses.relation_divergence(x.float(), x, MASK, heads=2).item()) < 1e-6
    wanted = losses.relation_divergence(x, y, MASK, heads=2).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.relation_divergence(x, y, MASK, heads=2).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["embedding_distance", "gram_error", "ranking_divergence"])
def test_equal_embeddings_cost_nothing_and_others_something(name: str):
    loss = getattr(losses, name)
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    assert abs(loss(a, 3 * a).item()) < 1e-5  # a common factor does not matter
    assert loss(a, b).item() > 1e-3


@pytest.mark.parametrize("name", ["embedding_distance", "gram_error", "ranking_divergence"])
def test_losses_of_embeddings_fall_along_their_gradient(name: str):
    loss = getattr(losses, name)
    teacher, student = torch.randn(6, 8), torch.randn(6, 8, requires_grad=True)
    before = loss(student, teacher)
    before.backward()
    assert student.grad is not None
    assert loss(student.detach() - 1e-2 * student.grad / student.grad.norm(), teacher) < before
