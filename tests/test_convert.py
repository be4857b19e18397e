"""Which modules are chosen, and the swaps."""

import pytest
import torch
from torch import nn

from hf_ternary import TernaryConfig, convert
from hf_ternary.modules import FakeTernaryLinear, QuantizedEmbedding, TernaryLinear
from tests.conftest import tiny_bert_config


@pytest.fixture
def bert():
    from transformers import BertModel

    return BertModel(tiny_bert_config(max_position_embeddings=160)).eval()


def ids():
    return torch.tensor([[2, 9, 30, 3], [2, 11, 3, 0]])


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("encoder.layer.0.attention.self.key", "encoder.layer.0", True),
        ("encoder.layer.0.attention.self.key", "key", True),
        ("encoder.layer.0.attention.self.key", "layer.0", True),
        ("encoder.layer.0.attention.self.key", "*.key", True),
        ("encoder.layer.0.attention.self.key", "encoder.layer.[0-1].*", True),
        ("encoder.layer.10.attention.self.key", "encoder.layer.1", False),
        ("encoder.layer.0.attention.self.key", "ke", False),
        ("pooler.dense", "pooler", True),
        ("my_pooler.dense", "pooler", False),
    ],
)
def test_patterns(name, pattern, expected):
    assert convert.matches(name, pattern) is expected


def test_default_is_the_linears_of_the_numbered_layers(bert):
    names = convert.linears_to_convert(bert, TernaryConfig())
    assert len(names) == 12
    assert all(name.startswith("encoder.layer.") for name in names)


def test_a_list_replaces_the_default(bert):
    assert "pooler.dense" in convert.linears_to_convert(bert, TernaryConfig(modules_to_not_convert=[]))
    names = convert.linears_to_convert(bert, TernaryConfig(modules_to_not_convert=["layer.0", "pooler"]))
    assert names
    assert all(name.startswith("encoder.layer.1.") for name in names)


def test_float32_modules_of_the_model_class_stay_by_default(bert):
    names = convert.linears_to_convert(bert, TernaryConfig(), keep=["key"])
    assert len(names) == 10
    assert not any(name.endswith("key") for name in names)


def test_token_and_position_tables_are_quantized_and_small_ones_are_not(bert):
    assert convert.embeddings_to_convert(bert, TernaryConfig(embedding_bits=None)) == {}
    tables = {"embeddings.word_embeddings": 4, "embeddings.position_embeddings": 8}
    assert convert.embeddings_to_convert(bert, TernaryConfig(embedding_bits=4)) == tables
    only_tokens = {"embeddings.word_embeddings": 4}
    assert convert.embeddings_to_convert(bert, TernaryConfig(embedding_bits=4, position_bits=None)) == only_tokens
    config = TernaryConfig(embedding_bits=4, modules_to_not_convert=["position_embeddings"])
    assert convert.embeddings_to_convert(bert, config) == only_tokens


def test_model_without_a_token_table_has_none_to_quantize():
    assert convert.embeddings_to_convert(nn.Sequential(nn.Linear(8, 8)), TernaryConfig(embedding_bits=4)) == {}


def test_any_module_can_be_converted():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4)))
    convert.ternarize_model(model, TernaryConfig(modules_to_not_convert=[]))
    assert [type(m) for m in (model[0], model[1][1])] == [TernaryLinear, TernaryLinear]


def test_dequantize_gives_a_plain_model_with_the_same_weights(bert):
    convert.ternarize_model(bert, TernaryConfig(activation=None, embedding_bits=2))
    key = bert.encoder.layer[0].attention.self.key
    expected, weight = bert(ids()).last_hidden_state, key.dequantize()
    convert.dequantize_model(bert)
    assert not any(isinstance(m, convert.PACKED) for m in bert.modules())
    assert torch.equal(bert.encoder.layer[0].attention.self.key.weight, weight)
    assert torch.allclose(bert(ids()).last_hidden_state, expected, atol=1e-5)


def test_training_forward_equals_the_packed_model(bert):
    config = TernaryConfig(embedding_bits=4, modules_to_not_convert=[])
    convert.fake_ternarize_model(bert, config, learned_scale=True)
    assert isinstance(bert.pooler.dense, FakeTernaryLinear)
    trained = bert(ids())
    convert.pack_model(bert)
    assert isinstance(bert.embeddings.word_embeddings, QuantizedEmbedding)
    for before, after in zip(trained.values(), bert(ids()).values(), strict=True):
        assert torch.allclose(after, before, atol=1e-5)


def test_training_mode_survives_the_swap(bert):
    bert.train()
    convert.ternarize_model(bert, TernaryConfig())
    assert bert.encoder.layer[0].output.dense.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_not_convert": ["poler"]}, r"'poler' names no module of BertModel.*Fix"),
        ({"modules_to_not_convert": ["*"]}, "BertModel has no Linear layer to ternarize"),
        ({"group_size": 12}, r"group_size=12 does not divide encoder.layer.0.attention.self.query's width 32"),
        ({"embedding_bits": 4, "embedding_group_size": 12}, "embedding_group_size=12 does not divide embeddings.word"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_is_changed(bert, options, message):
    with pytest.raises(ValueError, match=message):
        convert.ternarize_model(bert, TernaryConfig(**options))
    assert not any(isinstance(m, convert.PACKED) for m in bert.modules())


def test_model_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match="Sequential has no Linear layer to ternarize .*modules_to_not_convert=\\[\\]"):
        convert.ternarize_model(nn.Sequential(nn.Conv1d(2, 2, 1)), TernaryConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_is_refused_by_name_and_nothing_is_changed(bert, value):
    bert.encoder.layer[1].output.dense.weight.data[3, 2] = value
    with pytest.raises(ValueError, match=r"encoder.layer.1.output.dense.weight holds a NaN or an infinity"):
        convert.ternarize_model(bert, TernaryConfig())
    assert not any(isinstance(m, convert.PACKED) for m in bert.modules())
