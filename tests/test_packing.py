"""The bit layout, exactly."""

import pytest
import torch

from hf_ternary.packing import has_invalid_ternary, pack, packed_size, unpack


def test_first_code_is_in_the_lowest_bits():
    packed = pack(torch.tensor([[-1, 0, 1, -1, 1]], dtype=torch.int8))
    assert packed.tolist() == [[0b01_11_10_01, 0b10_10_10_11]]  # stored value + 2; the padding is the code of zero


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 385])
def test_round_trip_of_every_value(bits, n):
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (3, 5, n), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, packed_size(n, bits))
    assert torch.equal(unpack(packed, n, bits), codes)


def test_agrees_with_the_two_bit_layout_of_transformers():
    gemma = pytest.importorskip("transformers.integrations.gemma_quant", reason="transformers before 5.13")
    codes = torch.randint(-1, 2, (6, 15), dtype=torch.int8)
    assert torch.equal(gemma._unpack_int2(pack(codes), 15).to(torch.int8), codes)


def test_invalid_code_is_found_in_any_of_the_four_fields():
    good = pack(torch.randint(-1, 2, (4, 12), dtype=torch.int8))
    assert not has_invalid_ternary(good)
    for field in range(4):
        bad = good.clone()
        bad[2, 1] &= 0xFF ^ (3 << 2 * field)
        assert has_invalid_ternary(bad)
