"""TernaryConfig: round trip and every refusal."""

import json

import pytest

from hf_ternary import TernaryConfig, __version__


def test_round_trip_through_json():
    config = TernaryConfig(group_size=64, embedding_bits=4, modules_to_not_convert=["pooler"], weight_scheme="absmean")
    assert TernaryConfig.from_dict(json.loads(config.to_json_string())) == config


def test_load_option_is_not_saved():
    assert "dequantize" not in TernaryConfig(dequantize=True).to_dict()
    assert TernaryConfig(dequantize=True).get_loading_attributes() == {"dequantize": True}


def test_to_dict_names_the_method_and_the_writer():
    saved = TernaryConfig().to_dict()
    assert (saved["quant_method"], saved["format_version"], saved["hf_ternary_version"]) == ("ternary", 1, __version__)


def test_from_dict_returns_unused_arguments():
    config, unused = TernaryConfig.from_dict({"group_size": 8}, return_unused_kwargs=True, embedding_bits=2, device="cpu")
    assert (config.group_size, config.embedding_bits, unused) == (8, 2, {"device": "cpu"})


def test_update_sets_known_options_and_checks_them():
    config = TernaryConfig()
    assert config.update(embedding_bits=8, other=1) == {"other": 1}
    assert config.embedding_bits == 8
    with pytest.raises(ValueError, match="embedding_bits=5"):
        config.update(embedding_bits=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 3}, r"group_size=3 .* multiple of 4"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": True}, "group_size=True"),
        ({"group_size": "row"}, "group_size='row'"),
        ({"embedding_group_size": "tensor"}, "embedding_group_size='tensor'"),
        ({"weight_scheme": "nearest"}, "weight_scheme='nearest' .* use 'optimal' or 'absmean'"),
        ({"activation": "int4"}, "activation='int4' .* use 'int8' or None"),
        ({"embedding_bits": 3}, "embedding_bits=3 .* use None or 8 or 4 or 2"),
        ({"embedding_bits": 4.0}, "embedding_bits=4.0"),
        ({"position_bits": 16}, "position_bits=16 .* use None or 8 or 4 or 2"),
        ({"dequantize": 1}, "dequantize=1"),
        ({"modules_to_not_convert": "pooler"}, "modules_to_not_convert='pooler' .* list"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert=\[1\]"),
    ],
)
def test_invalid_option_is_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        TernaryConfig(**options)


def test_newer_format_names_the_version_to_install():
    with pytest.raises(ValueError, match=r"format_version=2 .* pip install 'hf_ternary>=3\.1\.0'"):
        TernaryConfig.from_dict({"format_version": 2, "hf_ternary_version": "3.1.0"})


def test_unknown_key_names_the_version_to_install():
    with pytest.raises(ValueError, match=r"'rotation'.*pip install 'hf_ternary>=0\.9\.0'"):
        TernaryConfig.from_dict({"rotation": "hadamard", "hf_ternary_version": "0.9.0"})
    with pytest.raises(ValueError, match="pip install -U hf_ternary"):
        TernaryConfig.from_dict({"rotation": "hadamard"})
