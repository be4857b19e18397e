import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertModel

from hf_ternary import TernaryConfig, TernaryLinear
from hf_ternary.info import read_info
from hf_ternary.modules import QuantizedEmbedding
from tests.conftest import save_tiny_bert


def packed(source: Path, target: Path, **options: object) -> BertModel:
    model = BertModel.from_pretrained(source, quantization_config=TernaryConfig(**options))
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("group_size", [None, 16])
def test_layers_are_those_of_the_model(bits: int | None, group_size: int | None, tiny_bert: Path, tmp_path: Path) -> None:
    model = packed(tiny_bert, tmp_path, embedding_bits=bits, group_size=group_size)
    layers = {layer.name: layer for layer in read_info(tmp_path).layers}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, (TernaryLinear, QuantizedEmbedding))}
    assert layers.keys() == modules.keys()
    for name, module in modules.items():
        layer = layers[name]
        assert layer.bytes == module.weight.nbytes + module.weight_scale.nbytes
        assert layer.groups == module.weight_scale.shape[1]
        if isinstance(module, TernaryLinear):
            zeros = (module.codes == 0).float().mean().item()
            assert (layer.kind, layer.bits, layer.zeros) == ("linear", 2, zeros)
            assert layer.shape == (module.out_features, module.in_features)
        else:
            assert (layer.kind, layer.bits, layer.zeros) == ("embedding", 8 if "position" in name else bits, None)
            assert layer.shape == (module.num_embeddings, module.embedding_dim)


def test_a_position_table_alone(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "float", max_position_embeddings=160)
    packed(tmp_path / "float", tmp_path / "packed", modules_to_not_convert=["word_embeddings"])
    (table,) = [layer for layer in read_info(tmp_path / "packed").layers if layer.kind == "embedding"]
    assert (table.bits, table.shape) == (8, (160, 32))


def test_sizes_are_those_of_the_files(tiny_bert: Path, tmp_path: Path) -> None:
    packed(tiny_bert, tmp_path, embedding_bits=4)
    info = read_info(tmp_path)
    assert info.bytes == (tmp_path / "model.safetensors").stat().st_size
    with safe_open(tiny_bert / "model.safetensors", "pt") as tensors:
        assert info.float32_bytes == sum(tensors.get_tensor(name).nbytes for name in list(tensors.keys()))


def test_the_share_of_zeros_weighs_layers_by_size(tiny_bert: Path, tmp_path: Path) -> None:
    model = packed(tiny_bert, tmp_path)
    codes = torch.cat([m.codes.flatten() for m in model.modules() if isinstance(m, TernaryLinear)])
    assert read_info(tmp_path).zeros == pytest.approx((codes == 0).double().mean().item(), abs=1e-6)  # float32 means


def test_shards_are_read_together(tiny_bert: Path, tmp_path: Path) -> None:
    model = packed(tiny_bert, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = read_info(tmp_path / "one"), read_info(tmp_path / "many")
    assert sorted(many.layers, key=repr) == sorted(one.layers, key=repr)
    assert many.float_tensors == one.float_tensors


def test_a_float_model_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no ternary model\. Fix: make one with `hf-ternary quantize"):
        read_info(tiny_bert)


def test_a_config_without_packed_weights_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    packed(tiny_bert, tmp_path)
    shutil.copy(tiny_bert / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"holds no packed weights\. Fix"):
        read_info(tmp_path)


def test_a_scale_without_its_weight_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    packed(tiny_bert, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense\.weight is missing in"):
        read_info(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_named(file: str, tiny_bert: Path, tmp_path: Path) -> None:
    packed(tiny_bert, tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{file} is damaged .*Fix: download it again"):
        read_info(tmp_path)
