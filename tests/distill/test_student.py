from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn import functional as F

from hf_ternary import TernaryConfig, save_pretrained
from hf_ternary.distill.student import Encoder, load_teacher, make_student, pack_student, set_strength, ternary_layers
from hf_ternary.modules import FakeTernaryLinear
from tests.conftest import SENTENCES


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (2, 5, 8), (3, 4, 5, 8)])
def test_integer_product_and_dense_product_agree_with_their_gradients(shape: tuple[int, ...], bias: bool):
    """The fast path (one scale a row) against the dense one (a group as wide as the row)."""
    fast = FakeTernaryLinear(nn.Linear(8, 6, bias), learned_scale=True)
    dense = FakeTernaryLinear(nn.Linear(8, 6, bias), group_size=8, learned_scale=True)
    dense.load_state_dict(fast.state_dict())
    xs = [torch.randn(shape) for _ in range(1)] * 2
    xs = [x.clone().requires_grad_() for x in xs]
    outputs = [layer(x) for layer, x in zip((fast, dense), xs, strict=True)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    weighting = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weighting).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-5, rtol=1e-5)
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, atol=1e-5, rtol=1e-5)


def test_autocast_trains_in_bfloat16_close_to_float32():
    layer = FakeTernaryLinear(nn.Linear(64, 32), learned_scale=True)
    x = torch.randn(10, 64)
    layer(x).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert F.cosine_similarity(parameter.grad.flatten(), wanted[name].flatten(), dim=0) > 0.999


def test_strength_goes_from_the_float_layer_to_the_ternary_one():
    linear = nn.Linear(16, 8)
    layer, x = FakeTernaryLinear(linear, activation=None), torch.randn(5, 16)
    ternary = layer(x)
    set_strength(nn.Sequential(layer), 0.0)
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias))
    set_strength(nn.Sequential(layer), 0.25)
    torch.testing.assert_close(layer(x), torch.lerp(F.linear(x, linear.weight, linear.bias), ternary, 0.25))


@pytest.mark.parametrize(
    "config",
    [
        TernaryConfig(),
        TernaryConfig(embedding_bits=4, modules_to_not_convert=[]),
        TernaryConfig(embedding_bits=2, embedding_group_size=8, group_size=8, activation=None),
        TernaryConfig(group_size="tensor", weight_scheme="absmean"),
    ],
    ids=["default", "everything", "groups", "paper"],
)
@pytest.mark.parametrize("learned_scale", [True, False])
def test_packed_and_reloaded_equals_the_training_forward(
    tiny_sentence_transformer: Path, tmp_path: Path, config: TernaryConfig, learned_scale: bool
):
    student = make_student(load_teacher(str(tiny_sentence_transformer)), config, learned_scale)
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn_like(parameter)
    encoder = Encoder(student)
    batch = student.tokenize(SENTENCES)
    with torch.no_grad():
        wanted = encoder(batch["input_ids"], batch["attention_mask"])["embedding"]
    packed = pack_student(student, config)
    assert not ternary_layers(packed)
    save_pretrained(packed, tmp_path / "model")
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert loaded[0].auto_model.config.quantization_config.to_dict() == config.to_dict()
    assert not loaded[0].auto_model.config.output_hidden_states
    got = loaded.encode(SENTENCES, convert_to_tensor=True, batch_size=len(SENTENCES))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)  # a native encoder has its own softmax and GELU
    with torch.no_grad():
        got = Encoder(loaded)(batch["input_ids"], batch["attention_mask"])["embedding"]  # module by module
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_encoder_returns_hidden_states_relations_and_never_drops_out(tiny_sentence_transformer: Path):
    teacher = load_teacher(str(tiny_sentence_transformer))
    encoder = Encoder(teacher, ["encoder.layer.1.attention.self.value"]).train()
    batch = teacher.tokenize(SENTENCES)
    first, second = (encoder(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
    assert torch.equal(first["embedding"], second["embedding"])
    shape = (*batch["input_ids"].shape, 32)
    assert [h.shape for h in first["hidden"]] == [shape] * 3
    assert [r.shape for r in first["relations"]] == [shape]
    wanted = teacher.encode(SENTENCES, convert_to_tensor=True, batch_size=len(SENTENCES))
    torch.testing.assert_close(first["embedding"], wanted, atol=1e-6, rtol=0)


def test_relation_modules_must_exist(tiny_sentence_transformer: Path):
    with pytest.raises(ValueError, match=r"relation_modules: 'layer\.9' is no module"):
        Encoder(load_teacher(str(tiny_sentence_transformer)), ["layer.9"])


def test_a_ternary_teacher_is_refused(tiny_sentence_transformer: Path, tmp_path: Path):
    config = TernaryConfig()
    save_pretrained(pack_student(make_student(load_teacher(str(tiny_sentence_transformer)), config), config), tmp_path / "m")
    with pytest.raises(ValueError, match="is ternary already; distil from the full-precision model"):
        load_teacher(str(tmp_path / "m"))


def test_a_teacher_with_an_adapter_is_refused(tiny_sentence_transformer: Path, tmp_path: Path):
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    model.transformers_model.save_pretrained(str(tmp_path))
    model.tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has an adapter. Fix: merge it"):
        load_teacher(str(tmp_path))


def test_images_need_a_newer_library(tiny_sentence_transformer: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sentence_transformers.__version__", "5.6.0")
    with pytest.raises(ImportError, match=r"need sentence-transformers 6, not 5\.6\.0"):
        load_teacher(str(tiny_sentence_transformer), modality="image")


def test_longer_than_the_teacher_allows(tiny_sentence_transformer: Path):
    with pytest.raises(ValueError, match="max_length=129 exceeds the 128 tokens"):
        load_teacher(str(tiny_sentence_transformer), 129)
