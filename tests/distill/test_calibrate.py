import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn import functional as F

from hf_ternary import TernaryConfig
from hf_ternary.distill import calibrate as calibrate_module
from hf_ternary.distill.calibrate import calibrate, compensate, fit_dense
from hf_ternary.distill.student import Encoder, add_dense, load_teacher, make_student
from hf_ternary.modules import FakeTernaryLinear
from hf_ternary.ternarize import dequantize, ternarize
from tests.conftest import tiny_tokenizer
from tests.distill.conftest import make_texts, output_error
from tests.helpers import build


@torch.no_grad()
def test_weights_make_up_for_the_means_where_no_bias_does():
    linear = nn.Linear(64, 32, bias=False)
    x = torch.randn(1000, 8) @ torch.randn(8, 64) + 3 * torch.randn(64)
    layer = FakeTernaryLinear(copy.deepcopy(linear), learned_scale=True)
    moment, zeros = x.t() @ x / len(x), torch.zeros(64, 1)
    statistics = calibrate_module._Statistics(moment, moment, zeros, x.mean(0), x.mean(0), torch.zeros(1))
    calibrate_module._compensate_layer(layer, linear, statistics)
    errors = [
        output_error(linear.weight, dequantize(codes, scale), moment)
        for codes, scale in ((layer.codes(), layer.scale()), ternarize(linear.weight))
    ]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("config", [TernaryConfig(), TernaryConfig(activation=None, group_size=8)], ids=["rows", "groups"])
def test_compensated_student_starts_closer_to_its_teacher(teacher: Path, config: TernaryConfig):
    model = load_teacher(str(teacher))
    encoders = Encoder(make_student(model, config)), Encoder(model)
    texts = make_texts(160)
    batches = [dict(model.tokenize(texts[i : i + 32])) for i in range(0, 160, 32)]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]

    def fidelity() -> float:
        with torch.no_grad():
            student, wanted = (e(**batches[-1])["hidden"][-1].flatten(0, 1) for e in encoders)
        return F.cosine_similarity(student, wanted).mean().item()

    before = fidelity()
    compensate(*encoders, batches[:-1])
    assert 1 - fidelity() < 0.8 * (1 - before)


@pytest.mark.parametrize(
    ("name", "suffixes"),
    {
        "BERT": ["attention.output.dense", "output.dense"],
        "MPNet": ["attention.attn.o", "output.dense"],
        "DistilBERT": ["attention.out_lin", "ffn.lin2"],
        "ModernBERT": ["attn.Wo", "mlp.Wo"],
        "T5 encoder": ["SelfAttention.o"],  # its other one stays in float
        "Qwen3": ["self_attn.o_proj", "mlp.down_proj"],
    }.items(),
)
def test_layers_that_add_to_the_residual_stream_are_found(name: str, suffixes: list[str], tmp_path: Path):
    build(name, tmp_path)
    tiny_tokenizer(tmp_path)
    model = load_teacher(str(tmp_path))
    student = Encoder(make_student(model, TernaryConfig()))
    batch = dict(model.tokenize(make_texts(4)))
    order, into_stream = calibrate_module._in_order(student, {k: batch[k] for k in ("input_ids", "attention_mask")})
    names = [name for group in order for name in group]
    assert into_stream == {name for name in names if name.endswith(tuple(suffixes))}
    assert len(into_stream) == len(suffixes) * student.transformer.config.num_hidden_layers


def test_layers_make_up_for_the_error_of_the_residual_stream(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """Tables of 2 bits make the stream wrong from its start."""
    model, config = load_teacher(str(teacher)), TernaryConfig(embedding_bits=2, position_bits=2)
    texts = make_texts(800)
    batches = [dict(model.tokenize(texts[i : i + 40])) for i in range(0, 800, 40)]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    mask = batches[-1]["attention_mask"].bool()
    in_order = calibrate_module._in_order
    errors = []
    for order in (in_order, lambda *arguments: (in_order(*arguments)[0], set())):
        monkeypatch.setattr(calibrate_module, "_in_order", order)
        student, wanted = Encoder(make_student(model, config)), Encoder(model)
        compensate(student, wanted, batches[:-1])
        with torch.no_grad():
            states = [encoder(**batches[-1])["hidden"][-1][mask] for encoder in (student, wanted)]
        errors.append(F.mse_loss(*states).item())
    assert errors[0] < 0.98 * errors[1]


def encoders_and_batches(
    teacher: Path, texts: int
) -> tuple[tuple[Encoder, Encoder], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A student that is wrong by a linear map and by noise, its teacher, batches of 32 texts, and one more batch."""
    model = load_teacher(str(teacher))
    student = make_student(model, TernaryConfig())
    norm = student[0].auto_model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight *= torch.rand(32) + 0.5
        norm.bias += 0.5 * torch.randn(32)
    rows = make_texts(texts + 32)
    batches = [dict(model.tokenize(rows[i : i + 32])) for i in range(0, len(rows), 32)]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    add_dense(student)
    return (Encoder(student), Encoder(model)), batches[:-1], batches[-1]


@torch.no_grad()
def cosine(encoders: tuple[Encoder, Encoder], batch: dict[str, torch.Tensor]) -> float:
    return F.cosine_similarity(*(encoder(**batch)["embedding"] for encoder in encoders)).mean().item()


@pytest.mark.parametrize(("texts", "least"), [(1024, 0.3), (64, 0.1), (32, 0.0)])
def test_dense_layer_makes_up_for_a_linear_error_and_does_no_harm_on_few_texts(teacher: Path, texts: int, least: float):
    encoders, batches, unseen = encoders_and_batches(teacher, texts)
    before = cosine(encoders, unseen)
    fit_dense(*encoders, batches)
    assert 1 - cosine(encoders, unseen) <= (1 - least) * (1 - before)


def test_dense_layer_of_the_teacher_is_kept_and_fitted(teacher: Path, tmp_path: Path):
    original = SentenceTransformer(str(teacher), device="cpu")
    dense = add_dense(original)
    torch.nn.init.orthogonal_(dense.linear.weight)
    dense.bias, dense.linear.bias = False, None
    original.save_pretrained(str(tmp_path / "dense"))
    encoders, batches, unseen = encoders_and_batches(tmp_path / "dense", 512)
    assert len(encoders[0].model) == len(original)
    before = cosine(encoders, unseen)
    fit_dense(*encoders, batches)
    assert 1 - cosine(encoders, unseen) < 0.9 * (1 - before)
    assert encoders[0].model[2].linear.bias is None


def test_calibrated_without_training(teacher: Path, tmp_path: Path):
    texts = make_texts(200)
    config = TernaryConfig(embedding_bits=8)
    model = calibrate(teacher, texts[:160], config, device="cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(str(tmp_path / "model"))
    original, saved = (SentenceTransformer(str(path), device="cpu") for path in (teacher, tmp_path / "model"))
    options = {"quantization_config": config}
    rounded = SentenceTransformer(str(teacher), device="cpu", model_kwargs=options)
    wanted, got, plain = (each.encode(texts[160:], convert_to_tensor=True) for each in (original, saved, rounded))
    assert 1 - F.cosine_similarity(got, wanted).mean() < 0.8 * (1 - F.cosine_similarity(plain, wanted).mean())
    assert torch.equal(got, model.encode(texts[160:], convert_to_tensor=True))


def test_texts_may_be_an_array_or_an_iterator(teacher: Path):
    texts = make_texts(8)
    expected, *others = [calibrate(teacher, each, device="cpu") for each in (texts, np.array(texts), iter(texts))]
    for other in others:
        assert all(
            torch.equal(a, b) for a, b in zip(expected.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_calibrates_on_the_cpu_where_the_best_device_has_no_float64(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate_module, "get_device_name", lambda: "mps")
    assert calibrate(teacher, make_texts(8)).device.type == "cpu"


def test_calibrating_needs_texts_and_a_float_model(teacher: Path, tmp_path: Path):
    for texts in ([], "one text"):
        with pytest.raises(ValueError, match="is no list of texts"):
            calibrate(str(teacher), texts)
    calibrate(teacher, make_texts(8), device="cpu").save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is ternary already"):
        calibrate(str(tmp_path / "model"), make_texts(8))
    with pytest.raises(ValueError, match="group_size='tensor' leaves no scale"):
        calibrate(teacher, make_texts(8), TernaryConfig(group_size="tensor"))


@torch.no_grad()
def test_hidden_states_are_kept_once(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """What a block returned for a batch goes when the next block is finished for it."""
    model = load_teacher(str(teacher))
    student = Encoder(make_student(model, TernaryConfig()))
    batches = [dict(model.tokenize(make_texts(4, seed=seed))) for seed in range(8)]
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    order, _ = calibrate_module._in_order(student, batches[0])
    first, second = dict.fromkeys(calibrate_module._block(student, names[0]) for names in order)
    assert first is not None
    assert second is not None
    alive = []
    with calibrate_module._Replay(student, batches) as replay:
        replay.finish(first)
        old = [weakref.ref(output if isinstance(output, torch.Tensor) else output[0]) for output in replay._outputs]
        run = replay._run

        def counting(number: int) -> None:
            gc.collect()
            alive.append(sum(state() is not None for state in old))
            run(number)

        monkeypatch.setattr(replay, "_run", counting)
        replay.finish(second)
    assert alive[0] == 8
    assert alive[-1] < 4


@pytest.mark.parametrize("name", ["BERT", "ALBERT", "T5 encoder", "ModernBERT", "Qwen3"])
def test_finished_blocks_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ALBERT's blocks share their weights, T5's hand on more than hidden states."""
    build(name, tmp_path)
    tiny_tokenizer(tmp_path)
    model = load_teacher(str(tmp_path))
    batches = [dict(model.tokenize(texts)) for texts in (make_texts(4), make_texts(8, seed=1))]
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    states = []
    for block in (calibrate_module._block, lambda *arguments: None):
        monkeypatch.setattr(calibrate_module, "_block", block)
        student, teacher = Encoder(make_student(model, TernaryConfig())), Encoder(model)
        compensate(student, teacher, batches)
        states.append(student.state_dict())
        for module in (*student.modules(), *teacher.modules()):
            assert getattr(module.forward, "__func__", None) is type(module).forward  # nothing is left behind
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
