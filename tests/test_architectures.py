"""Every architecture of the README's table: float -> packed -> saved -> loaded -> saved, bit for bit."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from hf_ternary import TernaryConfig, TernaryLinear
from hf_ternary.modules import QuantizedEmbedding
from tests.helpers import ARCHITECTURES, build

BART = {"vocab_size": 200, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}


def expected(name: str) -> tuple[int, int]:
    """Ternary layers and quantized tables."""
    if name == "CLIP" and hasattr(hf.models.clip.modeling_clip, "CLIPTextTransformer"):
        return 24, 0  # older transformers: CLIP's text model does not tell its token table
    return ARCHITECTURES[name][3:]


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Padded token ids, pixels, or both: what the model takes."""
    generator = torch.Generator().manual_seed(1)
    names = model.main_input_name, *(("pixel_values",) if hasattr(model, "vision_model") else ())
    ids = torch.randint(3, 200, (2, 11), generator=generator)
    ids[:, -1] = 2  # CLIP pools at the end-of-text token
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    mask = torch.ones_like(ids)
    if "pixel_values" not in names:
        mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {k: v for k, v in batch.items() if k in names or (k == "attention_mask" and "input_ids" in names)}


@torch.inference_mode()
def outputs(model: nn.Module) -> list[torch.Tensor]:
    found = [value for value in model(**inputs(model)).values() if isinstance(value, torch.Tensor)]
    assert found
    assert all(value.isfinite().all() for value in found)
    return found


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip_is_exact(name, tmp_path):
    model_class, (layers, tables) = build(name, tmp_path / "float"), expected(name)
    packed = model_class.from_pretrained(tmp_path / "float", quantization_config=TernaryConfig())
    assert (count(packed, TernaryLinear), count(packed, QuantizedEmbedding)) == (layers, tables)
    packed.save_pretrained(tmp_path / "packed")

    loaded, report = model_class.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(report.values())
    assert (count(loaded, TernaryLinear), count(loaded, QuantizedEmbedding)) == (layers, tables)
    saved, restored = packed.state_dict(), loaded.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[key], restored[key]) for key in saved)
    for before, after in zip(outputs(packed), outputs(loaded), strict=True):
        assert torch.allclose(before, after, atol=1e-6)  # torch's own float layers depend on how memory is aligned

    loaded.save_pretrained(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "packed")


def test_no_list_of_modules_ternarizes_what_t5_casts_by(tmp_path):
    model_class = build("T5 encoder", tmp_path)
    packed = model_class.from_pretrained(tmp_path, quantization_config=TernaryConfig(modules_to_not_convert=[]))
    assert count(packed, TernaryLinear) == 10
    assert outputs(packed)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_table_that_scales_its_rows(scaled, tmp_path):
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    M2M100Encoder(hf.M2M100Config(**BART, scale_embedding=scaled)).save_pretrained(tmp_path / "float")
    plain = M2M100Encoder.from_pretrained(tmp_path / "float")
    packed = M2M100Encoder.from_pretrained(tmp_path / "float", quantization_config=TernaryConfig(embedding_bits=8))
    assert isinstance(packed.embed_tokens, QuantizedEmbedding)
    ids = torch.arange(3, 90)[None]
    assert torch.allclose(packed.embed_tokens(ids), plain.embed_tokens(ids), atol=0.05)
    packed.save_pretrained(tmp_path / "packed")
    again = M2M100Encoder.from_pretrained(tmp_path / "packed")
    assert torch.equal(again.embed_tokens(ids), packed.embed_tokens(ids))
    again.dequantize()
    assert torch.allclose(again.embed_tokens(ids), packed.embed_tokens(ids), atol=1e-6)


def test_a_table_of_another_kind_stays_float(tmp_path):
    options = {"vocab_size": 200, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4}
    hf.OPTModel(hf.OPTConfig(**options, num_hidden_layers=2)).save_pretrained(tmp_path)
    packed = hf.OPTModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())
    assert count(packed, QuantizedEmbedding) == 1  # not the positions, which are counted from the mask
    assert packed(torch.arange(3, 9)[None]).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"OPTLearnedPositionalEmbedding does more than look up rows\. Fix"):
        QuantizedEmbedding.from_float(packed.decoder.embed_positions, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dequantized_model_is_the_same_model(name, tmp_path):
    model_class = build(name, tmp_path / "float")
    config = TernaryConfig(activation=None)
    packed = model_class.from_pretrained(tmp_path / "float", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    plain = model_class.from_pretrained(tmp_path / "packed")
    plain.dequantize()
    assert count(plain, (TernaryLinear, QuantizedEmbedding)) == 0
    for before, after in zip(outputs(packed), outputs(plain), strict=True):
        assert torch.allclose(before, after, atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    reloaded = model_class.from_pretrained(tmp_path / "plain")
    assert getattr(reloaded.config, "quantization_config", None) is None
    for before, after in zip(outputs(plain), outputs(reloaded), strict=True):
        assert torch.equal(before, after)
