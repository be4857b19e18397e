"""The maths, against brute force and against what it is defined to be."""

import itertools

import pytest
import torch

from hf_ternary import ternarize as t


def test_optimal_is_the_best_of_all_ternary_vectors():
    weight = torch.randn(6, 8, dtype=torch.float64)
    codes, scale = t.ternarize(weight.float())
    error = (weight - t.dequantize(codes, scale)).square().sum(1)
    candidates = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=8)), dtype=torch.float64)
    candidates = candidates[candidates.any(1)]
    for row, found in zip(weight, error, strict=True):
        fit = (candidates @ row).clamp(min=0) / candidates.square().sum(1)
        best = (row - fit[:, None] * candidates).square().sum(1).min()
        assert found.item() == pytest.approx(best.item(), rel=1e-5)


def test_absmean_is_the_rule_of_the_paper():
    weight = torch.randn(5, 12)
    codes, scale = t.ternarize(weight, "absmean", "tensor")
    mean = weight.abs().mean()
    assert torch.allclose(scale, (2 * mean).expand(5, 1))
    assert torch.equal(codes, ((weight > mean).int() - (weight < -mean).int()).to(torch.int8))


@pytest.mark.parametrize("scheme", ["optimal", "absmean"])
@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), ("tensor", 1), (4, 6), (12, 2)])
def test_shapes_and_dtypes(scheme, group_size, groups):
    codes, scale = t.ternarize(torch.randn(7, 24, dtype=torch.bfloat16), scheme, group_size)
    assert (codes.shape, codes.dtype) == ((7, 24), torch.int8)
    assert (scale.shape, scale.dtype) == ((7, groups), torch.float32)
    assert set(codes.unique().tolist()) <= {-1, 0, 1}


class OnMps(torch.Tensor):
    """A tensor that says that it is where there is no float64."""

    device = torch.device("mps")

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_scales_of_weights_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(5, 12)
    expected = t.ternary_scale(weight, group_size=4)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    assert torch.equal(t.ternary_scale(weight.as_subclass(OnMps), group_size=4), expected)


def test_groups_are_rows_of_their_own():
    weight = torch.randn(3, 16)
    codes, scale = t.ternarize(weight, group_size=8)
    rows, row_scale = t.ternarize(weight.reshape(6, 8))
    assert torch.equal(codes, rows.reshape(3, 16))
    assert torch.equal(scale, row_scale.reshape(3, 2))


def test_ternary_weights_are_a_fixed_point():
    codes, scale = t.ternarize(torch.randn(9, 33))
    again, scale_again = t.ternarize(t.dequantize(codes, scale))
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, scale)


def test_zero_row_has_scale_zero():
    codes, scale = t.ternarize(torch.zeros(2, 5))
    assert not codes.any()
    assert not scale.any()


def test_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="scheme='median' .* 'optimal' or 'absmean'"):
        t.ternarize(torch.randn(2, 4), "median")


def test_activation_codes_and_scale():
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = t.quantize_activation(x)
    assert codes.tolist() == [[127, -64, 32, 0], [0, 0, 0, 0]]  # -63.5 and 31.75: half to even, nearest
    assert torch.equal(scale, torch.tensor([[1 / 127], [0.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activation_with_a_bad_value_poisons_its_token_only(bad):
    x = torch.randn(3, 8)
    x[1, 5] = bad
    codes, scale = t.quantize_activation(x)
    assert scale[1].isnan()
    assert not codes[1].any()
    assert scale[[0, 2]].isfinite().all()


@pytest.mark.parametrize("magnitude", [3e38, 1e-20, 2.0**-100, 2.0**-101, 1e-45])
def test_activation_of_extreme_size_stays_in_range(magnitude):
    codes, scale = t.quantize_activation(torch.tensor([[magnitude, -magnitude, magnitude / 2]]))
    assert scale.isfinite().all()
    expected = 127 if magnitude >= t.SMALLEST_ABSMAX else 0
    assert codes[0, :2].tolist() == [expected, -expected]


def test_activation_of_width_zero():
    codes, scale = t.quantize_activation(torch.randn(2, 0))
    assert (codes.shape, scale.shape) == ((2, 0), (2, 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_are_rounded_to_the_nearest_level(bits, group_size):
    table = torch.randn(20, 48)
    codes, scale = t.quantize_rows(table, bits, group_size)
    assert scale.shape == (20, 48 // (group_size or 48))
    low = -(1 << (bits - 1))
    levels = (torch.arange(low, -low) + 0.5) * scale.unsqueeze(-1)  # [rows, groups, levels]
    groups = table.reshape(*scale.shape, -1)
    nearest = (groups.unsqueeze(-1) - levels.unsqueeze(-2)).abs().amin(-1)
    error = (groups - t.dequantize_rows(codes, scale).reshape(groups.shape)).abs()
    assert torch.allclose(error, nearest, atol=1e-6)


def test_more_bits_and_smaller_groups_lose_less():
    table = torch.randn(50, 64)

    def error(*options):
        return (table - t.dequantize_rows(*t.quantize_rows(table, *options))).square().mean()

    assert error(8) < error(4, 16) < error(4) < error(2, 16) < error(2) < 0.13  # the best 2-bit uniform quantizer: 0.119


def test_row_of_zeros_stays_zero():
    assert not t.dequantize_rows(*t.quantize_rows(torch.zeros(2, 8), 4)).any()
