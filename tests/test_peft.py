"""PEFT on packed weights: what trains, what merges after dequantize(), and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from hf_ternary import TernaryConfig, quantizer
from hf_ternary.modules import TernaryLinear

TARGETS = ["query", "output.dense"]


@pytest.fixture(scope="module")
def folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft") / "packed"
    BertModel.from_pretrained(tiny_bert, quantization_config=TernaryConfig()).save_pretrained(path)
    return path


def adapted(folder: Path, **options: Any) -> Any:
    """The packed model with random adapters: LoRA's own start is the identity."""
    config = LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **options})
    return get_peft_model(BertModel.from_pretrained(folder), config)


def ids() -> torch.Tensor:
    return torch.arange(5, 32).reshape(3, 9)


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).last_hidden_state


def packed_weights(model: Any) -> list[bytes]:
    return [m.weight.numpy().tobytes() for m in model.modules() if isinstance(m, TernaryLinear)]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of one loss, for every adapter's parameter; every one is finite and not zero."""
    model.zero_grad()
    model(ids()).last_hidden_state[..., 0].square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_train_and_reload(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, **options)
    before, frozen = states(model), packed_weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model.train())
    optimizer.step()
    trained = states(model)
    assert not torch.equal(trained, before)
    assert packed_weights(model) == frozen
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BertModel.from_pretrained(folder), tmp_path)
    assert torch.equal(states(again), trained)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gradients_are_those_of_the_dense_weights(options: dict[str, Any], tiny_bert: Path) -> None:
    """With float activations the packed layer is linear in its input, so autograd on dense weights is the exact answer."""
    config = TernaryConfig(activation=None)
    model = get_peft_model(
        BertModel.from_pretrained(tiny_bert, quantization_config=config),
        LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options),
    )
    packed = gradients(model)
    model.get_base_model().dequantize()
    dense = gradients(model)
    assert packed.keys() == dense.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], dense[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_dequantize_then_merge(options: dict[str, Any], folder: Path) -> None:
    model = adapted(folder, **options)
    model.get_base_model().dequantize()
    expected = states(model)
    merged = model.merge_and_unload()
    assert type(merged.encoder.layer[0].attention.self.query) is torch.nn.Linear
    torch.testing.assert_close(states(merged), expected, atol=1e-5, rtol=0)


def test_unload_gives_the_packed_model_back(folder: Path) -> None:
    base = BertModel.from_pretrained(folder)
    before = states(base)
    model = get_peft_model(base, LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    assert not torch.equal(states(model), before)
    assert torch.equal(states(model.unload()), before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_packed_weights_raises_and_changes_nothing(safe_merge: bool, folder: Path) -> None:
    model = adapted(folder)
    before, frozen = states(model), packed_weights(model)
    with pytest.raises(RuntimeError):
        model.merge_and_unload(safe_merge=safe_merge)
    assert packed_weights(model) == frozen
    assert torch.equal(states(model), before)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_rewrite_the_base_weight_raise(start: str, folder: Path) -> None:
    with pytest.raises(TypeError, match="float32|data type"):
        adapted(folder, init_lora_weights=start)


def train(model: Any) -> None:
    model.train()(ids()).last_hidden_state.sum().backward()


def test_training_without_adapters_warns_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantizer.logger.warning_once.cache_clear()
    model = BertModel.from_pretrained(folder)
    train(model)
    train(model)
    (record,) = caplog.records
    # Packed: two tables and 2 x 6 Linears. Float: the segment table, the pooler, and 5 LayerNorms, of two parameters each.
    assert "training changes its 13 float parameters (embeddings.token_type_embeddings.weight, ...)" in record.message
    assert "never its 14 packed layers" in record.message


def test_adapters_inference_and_dequantized_models_warn_of_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantizer.logger.warning_once.cache_clear()
    states(BertModel.from_pretrained(folder))
    train(adapted(folder))
    model = BertModel.from_pretrained(folder)
    model.add_adapter(LoraConfig(target_modules=TARGETS))
    train(model)
    train(BertModel.from_pretrained(folder).dequantize())
    frozen = BertModel.from_pretrained(folder).requires_grad_(False)
    frozen.train()(ids())
    assert caplog.records == []
