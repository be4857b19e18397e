import pytest
import torch

from hf_ternary.distill.gptq import coordinate_descent, gptq_round
from hf_ternary.ternarize import dequantize, ternarize, ternary_codes, ternary_scale
from tests.distill.conftest import output_error


@pytest.mark.parametrize("group_size", [None, 8])
def test_compensation_lowers_the_output_error_of_correlated_inputs(group_size: int | None):
    x = torch.randn(500, 8) @ torch.randn(8, 40) + 0.3 * torch.randn(500, 40)
    hessian = x.t() @ x / len(x)
    weight = torch.randn(24, 40)
    scale = ternary_scale(weight, group_size=group_size)
    master, refitted = gptq_round(weight, scale, hessian)
    compensated = dequantize(ternary_codes(master, refitted), refitted)
    plain = dequantize(*ternarize(weight, group_size=group_size))
    assert output_error(weight, compensated, hessian) < 0.7 * output_error(weight, plain, hessian)


@pytest.mark.parametrize("group_size", [None, 8])
def test_rounding_again_lowers_the_error_further(group_size: int | None):
    x = torch.randn(500, 8) @ torch.randn(8, 200) + 0.3 * torch.randn(500, 200)
    hessian = x.t() @ x / len(x) + 0.01 * torch.eye(200)
    weight = torch.randn(24, 200)
    start = gptq_round(weight, ternary_scale(weight, group_size=group_size), hessian)
    again = coordinate_descent(weight, *start, hessian)
    errors = [
        output_error(weight, dequantize(ternary_codes(*rounding), rounding[1]), hessian) for rounding in (start, again)
    ]
    assert errors[1] < 0.9 * errors[0]
    # No single weight could have a better code.
    codes, scale = ternary_codes(*again).float(), again[1]
    for row, column in ((0, 0), (5, 127), (23, 199)):
        for code in (-1, 0, 1):
            other = codes.clone()
            other[row, column] = code
            assert output_error(weight, dequantize(other, scale), hessian) > 0.999 * errors[1]


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight = torch.randn(16, 12)
    scale = ternary_scale(weight)
    master, refitted = gptq_round(weight, scale, torch.eye(12))
    assert torch.equal(ternary_codes(master, refitted), ternary_codes(weight, scale))
    torch.testing.assert_close(refitted, scale)  # the least-squares scale is its own refit


def test_more_columns_than_a_block_and_a_row_of_zeros():
    weight = torch.randn(4, 300)
    weight[1] = 0
    x = torch.randn(1000, 300)
    master, scale = gptq_round(weight, ternary_scale(weight), x.t() @ x / 1000)
    assert master.isfinite().all()
    assert scale.isfinite().all()
    assert not ternary_codes(master, scale)[1].any()
