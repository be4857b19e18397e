"""The only bit layout of the project: small integer codes <-> uint8.

A code of ``bits`` bits is stored as ``value + 2**(bits - 1)``, least significant bits first, row-major; a row that does
not fill its last byte is padded with the code of zero. For ternary weights (2 bits, values -1, 0, 1) one byte holds four
neighbours of a row::

    bit      7 6 | 5 4 | 3 2 | 1 0
    column   4i+3| 4i+2| 4i+1| 4i        stored 1, 2, 3 = value -1, 0, +1;  0 is not a ternary code

These are the bits of transformers' own 2-bit linear (``quant_method`` "gemma"), so no third layout exists.
"""

import torch

BITS = (2, 4, 8)


def packed_size(n: int, bits: int = 2) -> int:
    """Bytes that ``n`` codes of ``bits`` bits take."""
    return -(-n * bits // 8)


def pack(codes: torch.Tensor, bits: int = 2) -> torch.Tensor:
    """Pack integer codes along the last dimension.

    Args:
        codes: int8 ``[..., n]``, values in ``[-2**(bits-1), 2**(bits-1) - 1]``.
        bits: 2, 4 or 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``.
    """
    per_byte, zero = 8 // bits, 1 << (bits - 1)
    stored = (codes.to(torch.int16) + zero).to(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[-1] % per_byte), value=zero)
    stored = stored.unflatten(-1, (-1, per_byte))
    packed = stored[..., 0].clone()
    for i in range(1, per_byte):
        packed |= stored[..., i] << (i * bits)
    return packed


def unpack(packed: torch.Tensor, n: int, bits: int = 2) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., ceil(n * bits / 8)]`` -> int8 ``[..., n]``."""
    mask, zero = (1 << bits) - 1, 1 << (bits - 1)
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    stored = torch.stack(parts, dim=-1).flatten(-2)[..., :n]
    return (stored.to(torch.int16) - zero).to(torch.int8)


def has_invalid_ternary(packed: torch.Tensor) -> bool:
    """Whether any of the four 2-bit fields of any byte is 0, which no ternary value is stored as."""
    fields = packed >> 1
    fields |= packed
    fields &= 0x55
    return packed.numel() > 0 and int(fields.min()) != 0x55
