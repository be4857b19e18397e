"""What the student is asked to agree on with its teacher. Small pure functions; each returns a scalar mean in float32.

Shapes: B texts (or images) of at most L tokens, width D. ``mask`` is bool ``[B, L]``, true for real tokens. ``student``
comes first, ``teacher``, which needs no gradient, second; exchanging them changes the two divergences.
"""

import torch
from torch.nn import functional as F


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error of hidden states ``[B, L, D]`` over real tokens (Chen et al., arXiv 2411.15438)."""
    per_token = (student.float() - teacher.float()).square_().mean(-1)
    return (per_token * mask).sum() / mask.sum()


def embedding_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of ``1 - cosine`` between the sentence embeddings ``[B, D]`` of a text."""
    return (1 - F.cosine_similarity(student.float(), teacher.float())).mean()


def gram_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the cosines between the texts of a batch: embeddings ``[B, D]``, B > 1.

    Relational distillation (Park et al., arXiv 1904.05068): what retrieval needs is how texts compare, not where they lie.
    """
    error = (_cosines(student) - _cosines(teacher)).square()
    pairs = len(error) * (len(error) - 1)
    return error.fill_diagonal_(0).sum() / pairs


def ranking_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """Mean KL divergence from the teacher's to the student's softmax over every text's cosines to the others (B > 1).

    A small ``temperature`` makes it a matter of the nearest texts, that is of the top of a ranking.
    """
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    rows = [(_cosines(x) / temperature).masked_fill(itself, -1e4) for x in (student, teacher)]
    return _divergence(rows[0], rows[1]).mean()


def relation_divergence(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean KL divergence of the relations ``softmax(x x' / sqrt(d))`` of tokens in each head (MiniLMv2, arXiv 2012.15828).

    Args:
        student, teacher: queries, keys or values of a layer, ``[B, L, D]``; ``heads`` divides D.
    """
    relations = []
    for x in (student, teacher):
        x = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
        relations.append(scores.masked_fill(~mask[:, None, None, :], -1e4))
    per_token = _divergence(relations[0], relations[1]).mean(1)
    return (per_token * mask).sum() / mask.sum()


def _cosines(embeddings: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(embeddings.float(), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.t()


def _divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
