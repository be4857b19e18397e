"""The GPU's encoder against the modules' own forward, its kernels against torch: on the GPU, or interpreted without one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_ternary import TernaryConfig, encoder
from hf_ternary.architectures import ACTIVATION_FUNCTIONS
from hf_ternary.ops import backends, reference
from hf_ternary.ternarize import quantize_activation
from tests.helpers import PAD, batch, embed, make_layer, make_model, same

pytest.importorskip("triton", reason='pip install "hf_ternary[gpu]"')
triton_encoder = pytest.importorskip("hf_ternary.triton_encoder")
from tests.ops.test_triton import DEVICE, INTERPRETED, SMALL_TILES, compile_for, kernels, poison, set_tiles  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        INTERPRETED and backends.choose().backend == "reference", reason="without C++ kernels no encoder is bound"
    ),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered"),  # numpy's, of the interpreter
]


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU the CPU's encoders are the GPU's; tiles are small, and what is never written is NaN or nonsense."""
    monkeypatch.setattr(kernels, "TUNE", False)
    if INTERPRETED:
        set_tiles(monkeypatch, SMALL_TILES)
        monkeypatch.setattr(encoder, "_make", lambda device, *rest: triton_encoder.TritonEncoder(*rest))
        monkeypatch.setitem(encoder._DEVICES, "cpu", encoder._DEVICES["cuda"])
    poison(monkeypatch)
    yield
    kernels._tuner.cache_clear()


def both(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """Outputs of the encoder and of the modules."""
    model, inputs = model.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    with torch.inference_mode():
        assert set(encoder.explain(model).values()) == {"triton"}
        return encoder._forward(model, inputs), model.hf_ternary_base.forward(model, **inputs)


def assert_same_embeddings(model: Any, inputs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """A float that moves by a rounding flips an int8 code here and there: on these models too few to reach the tolerance."""
    ours, theirs = both(model, inputs)
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    mask = inputs["attention_mask"].to(DEVICE)
    y, expected = ours.last_hidden_state, theirs.last_hidden_state
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert not y[mask == 0].any()
    torch.testing.assert_close(embed(y.float(), mask), embed(expected.float(), mask), atol=tolerance, rtol=0)
    if ours.get("pooler_output") is not None and mask[:, 0].all():
        torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "mpnet", "distilbert"])
def test_equals_the_modules(model_type: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, model_type)
    assert_same_embeddings(model, batch([1, 2, 15]))
    if model_type in ("bert", "roberta"):  # the others count positions as one of these two
        assert_same_embeddings(model, batch([3, 5], width=9, left=True))


@pytest.mark.parametrize(
    ("options", "ternary"),
    [
        ({"hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 100, "hidden_act": "relu"}, TernaryConfig()),
        ({"num_attention_heads": 32, "hidden_act": "gelu_new"}, TernaryConfig(embedding_bits=2)),  # heads of one column
        ({"num_attention_heads": 1, "layer_norm_eps": 1e-3}, TernaryConfig(group_size=16, embedding_bits=None)),
        ({"type_vocab_size": 1}, TernaryConfig(group_size=8, embedding_bits=4, embedding_group_size=8)),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], ternary: TernaryConfig, tmp_path: Path) -> None:
    assert_same_embeddings(make_model(tmp_path, "bert", ternary, num_hidden_layers=1, **options), batch([1, 5, 12]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """The modules round every intermediate result to the dtype; the encoder only what it stores."""
    assert_same_embeddings(make_model(tmp_path, num_hidden_layers=1).to(dtype), batch([2, 15]), tolerance)


def test_token_types_and_ids_of_padding_inside_a_text(tmp_path: Path) -> None:
    inputs = batch([4, 9])
    inputs["token_type_ids"] = (torch.arange(9) > 3).long().expand(2, 9)
    assert_same_embeddings(make_model(tmp_path / "bert", num_hidden_layers=1), inputs)
    inputs = batch([4, 9])
    inputs["input_ids"][1, 2:5] = PAD
    assert_same_embeddings(make_model(tmp_path / "roberta", "roberta", num_hidden_layers=1), inputs)


def test_same_bits_in_any_batch_with_any_padding_and_any_mask(tmp_path: Path) -> None:
    model = make_model(tmp_path, num_hidden_layers=1).to(DEVICE)

    def states(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return encoder._forward(model, {name: tensor.to(DEVICE) for name, tensor in inputs.items()}).last_hidden_state

    lengths = [1, 17, 2]
    together = states(batch(lengths, width=20))
    for row, length in enumerate(lengths):
        assert torch.equal(states(batch([length]))[0], together[row, :length]), length
    inputs = batch([2])
    for given in ({"input_ids": inputs["input_ids"]}, {**inputs, "attention_mask": inputs["attention_mask"].bool()}):
        assert torch.equal(states(given)[0], together[2, :2])


@pytest.mark.parametrize(
    "change",
    [
        {"position_ids": torch.arange(9).expand(2, 9)},
        {"attention_mask": torch.ones(2, 9)},
        {"attention_mask": torch.ones(2, 9, dtype=torch.int64).index_fill(1, torch.tensor([1]), 0)},
        {"attention_mask": torch.tensor([[1] * 9, [0] * 9])},
        {"output_attentions": True},
    ],
    ids=["position_ids", "float mask", "hole", "empty text", "attentions"],
)
def test_unusual_inputs_fall_back(change: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.set_attn_implementation("eager")
    model = model.to(DEVICE)
    inputs = {**batch([4, 9]), **change}
    inputs = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.inference_mode():
        assert encoder._forward(model, inputs) is None
    assert encoder._forward(model, batch([4])) is None  # gradients


def test_a_text_longer_than_the_positions_falls_back(tmp_path: Path) -> None:
    model = make_model(tmp_path, max_position_embeddings=8).to(DEVICE)
    with torch.inference_mode():
        assert encoder._forward(model, {"input_ids": torch.zeros(1, 9, dtype=torch.int64, device=DEVICE)}) is None


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [
        ("modernbert", {}, "a norm after every residual sum only"),
        ("bert", {"hidden_size": 160, "num_attention_heads": 1}, "heads are wider than 128"),
        ("bert", {"hidden_act": "mish"}, "mish"),
    ],
    ids=str,
)
def test_models_that_fall_back(model_type: str, options: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, model_type, num_hidden_layers=1, **options).to(DEVICE)
    assert why in encoder.explain(model)[""]
    with torch.inference_mode():
        assert encoder._forward(model, {name: tensor.to(DEVICE) for name, tensor in batch([4]).items()}) is None


def test_ids_on_another_device_than_the_weights_fall_back(tmp_path: Path) -> None:
    model = make_model(tmp_path).to(DEVICE)
    encoder._state(model).device = torch.device("cuda:7")
    with torch.inference_mode():
        assert encoder._forward(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64, device=DEVICE)}) is None


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU")
def test_explains_a_gpu_without_the_kernels(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    obstacle = encoder._obstacle([model], torch.device("cuda:0"))
    assert obstacle == f"the backend is 'reference': {backends.choose_gpu(0).reason}"
    assert encoder.explain(model.to("meta")) == {"": "module by module: its weights are on meta"}


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_graph_is_captured_without_a_mask(tmp_path: Path) -> None:
    model, (ids, mask) = make_model(tmp_path).to(DEVICE), (tensor.to(DEVICE) for tensor in batch([20]).values())
    with torch.inference_mode():
        expected = [model(i).last_hidden_state for i in (ids, ids + 1)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = encoder._forward(model, {"input_ids": ids}).last_hidden_state
            assert encoder._forward(model, {"input_ids": ids, "attention_mask": mask}) is None
        for states in expected:
            graph.replay()
            assert torch.equal(y, states)
            ids += 1


def test_sentence_transformers_gets_it_with_no_flag(tiny_sentence_transformer: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import batch_to_device

    options = {"quantization_config": TernaryConfig()}
    model = SentenceTransformer(str(tiny_sentence_transformer), device=DEVICE, model_kwargs=options)
    assert list(encoder.explain(model).values()) == ["triton"]
    texts = ["the cat sat", "a dog"]
    ours = model.encode(texts, convert_to_tensor=True)
    with torch.enable_grad():
        theirs = model(batch_to_device(model.tokenize(texts), model.device))["sentence_embedding"].detach()
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=1e-4, rtol=0)


# The kernels, one by one


def spans_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return torch.stack([torch.zeros_like(lengths), lengths], 1), lengths.cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "biased"), [(33, False), (128, True)])
def test_attention(dim: int, biased: bool, dtype: torch.dtype) -> None:
    """Sequences of one tile, of several, and of one token, whose neighbours are NaN: nothing else is read."""
    heads, reach, lengths = 2, 80, [1, 70, 33]
    self: Any = triton_encoder.TritonEncoder.__new__(triton_encoder.TritonEncoder)
    self.hidden, self.heads, self.positions = heads * dim, heads, reach
    self._bias = torch.randn(heads, 2 * reach + 1, device=DEVICE) if biased else None
    qkv = torch.randn(sum(lengths), 3, heads, dim, device=DEVICE).to(dtype)
    spans, ends = spans_of(lengths)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for number in range(len(lengths)):
        end = int(ends[number])
        inside = slice(end - lengths[number], end)
        poisoned = torch.full_like(qkv, torch.nan)
        poisoned[inside] = qkv[inside]
        one = slice(number, number + 1)
        y = self._attend(poisoned.flatten(1), spans[one], ends[one], max(lengths)).unflatten(1, (heads, dim))[inside]
        q, k, v = qkv[inside].float().permute(1, 2, 0, 3)
        bias = None
        if biased:
            at = torch.arange(lengths[number], device=DEVICE)
            bias = self._bias[:, at[None, :] - at[:, None] + reach]
        expected = F.scaled_dot_product_attention(q, k, v, bias).transpose(0, 1)
        torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("width", "groups"), [(33, 1), (96, 4), (40, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm_and_product(width: int, groups: int, dtype: torch.dtype) -> None:
    """The sum is normalized as torch does it; what comes after has the reference's bits."""
    tokens, group = 4, width // groups
    weight, scale, bias = (tensor.to(DEVICE) for tensor in make_layer(20, width, groups))
    other = kernels.padded(weight, scale, width)
    weight_in_memory = weight if other is None else other
    shape = group, weight_in_memory.shape[1] // groups, groups
    self: Any = triton_encoder.TritonEncoder.__new__(triton_encoder.TritonEncoder)
    self.hidden, self._epsilon = width, 1e-5
    norm = triton_encoder._Norm(*torch.randn(2, width, device=DEVICE).to(dtype))
    x, y = (3 * torch.randn(2, tokens, width, device=DEVICE) + 1).to(dtype)
    x[2, 1] = torch.nan
    expected = F.layer_norm(x.float() + y.float(), (width,), norm.weight.float(), norm.bias.float(), 1e-5)
    planes, scales = self._add_norm(x, y, norm, shape)
    torch.testing.assert_close(x.float(), expected, atol=2e-6, rtol=torch.finfo(dtype).eps, equal_nan=True)
    codes, expected_scales = quantize_activation(x)
    assert same(scales, expected_scales.squeeze(1))
    found = planes.transpose(1, 2).reshape(tokens, groups, -1)[..., :group].flatten(1)
    assert torch.equal(found, codes)
    out = triton_encoder._product(x, planes, scales, triton_encoder._Linear(weight_in_memory, scale, bias, shape))
    assert same(out.cpu(), reference.linear(x.cpu(), weight.cpu(), scale.cpu(), bias.cpu()))


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_activation_functions(name: str) -> None:
    from transformers.activations import ACT2FN

    weight, scale, bias = (tensor.to(DEVICE) for tensor in make_layer(20, 16))
    x = torch.randn(3, 16, device=DEVICE) * torch.tensor([1.0, 10.0, torch.nan], device=DEVICE)[:, None]
    linear = triton_encoder._Linear(kernels.padded(weight, scale, 16), scale, bias, (16, 16, 1))
    y = triton_encoder._product(x, x, None, linear, ACTIVATION_FUNCTIONS[name])
    expected = ACT2FN[name](reference.linear(x, weight, scale, bias))
    torch.testing.assert_close(y, expected, atol=5e-6, rtol=5e-6, equal_nan=True)


COMPILE = """
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel
from hf_ternary import TernaryConfig, encoder, triton_encoder
from hf_ternary.convert import ternarize_model

encoder._make = lambda device, *rest: triton_encoder.TritonEncoder(*rest)
encoder._DEVICES["cpu"] = encoder._DEVICES["cuda"]

def ptx(tokens, dtype, config=MPNetConfig, model=MPNetModel):
    compiled.clear()
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    model = ternarize_model(model(config(num_hidden_layers=1, vocab_size=99, **sizes)), TernaryConfig())
    encoder.bind(model)
    with torch.inference_mode():
        native = encoder._state(model.eval().to(dtype)).encoder
        native.hidden_states(torch.zeros(1, tokens, dtype=torch.int64), None, None)
    return list(compiled)

def names(kernels):
    return [name for i, (name, _) in enumerate(kernels) if i == 0 or name != kernels[i - 1][0]]

few, many = ptx(3, torch.float32), ptx(40, torch.bfloat16)
start, product, norm = ["_span", "_embed", "_multiply", "_attend"], ["_to_planes", "_multiply"], ["_add_norm", "_multiply"]
assert names(few) == [*start, "_multiply", *norm, "_add_norm"]
assert names(many) == [*start, *product, *norm, *product, "_add_norm"]
with_types = ptx(40, torch.bfloat16, BertConfig, BertModel)
assert names(with_types) == names(many)
for kernels in few, many, with_types:
    text = dict(kernels)
    assert "__assertfail" in text["_embed"] and "fma.rn" not in text["_embed"] + text["_add_norm"]
    assert "st.global.b32" in text["_add_norm"]  # a plane's bytes, four at once
attend = dict(many)["_attend"]
if sys.argv[1] == "90":
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in attend
else:
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in attend
"""


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_compiler_makes_what_is_meant(architecture: str) -> None:
    """Every kernel fits into shared memory; tensor cores attend, and an id out of range fails an assertion."""
    compile_for(architecture, COMPILE)
