"""The native encoder against the module-wise path of the same model, which runs whenever gradients are on."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_ternary import TernaryConfig, architectures, encoder
from hf_ternary.modules import TernaryLinear
from hf_ternary.ops import backends
from tests.conftest import VOCAB_SIZE, tiny_bert_config
from tests.helpers import EOS, HIDDEN, PAD, PIXELS, VISION, batch, embed, make_model

pytestmark = pytest.mark.skipif(backends.choose().backend == "reference", reason="the C++ kernels are not built")

TEXT = ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "modernbert", "clip_text_model"]
KERNELS = [name for name in backends.usable() if name != "reference"]


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    return make_model(tmp_path / "bert")


def images(count: int) -> dict[str, torch.Tensor]:
    """Random images; the same first ones whatever the number."""
    return {"pixel_values": torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))}


def bound(model: Any) -> Any:
    """The module with the native forward: the model itself or, for CLIP in older transformers, one inside it."""
    return next(module for module in model.modules() if hasattr(module, "hf_ternary_base"))


def native_output(model: Any, inputs: dict[str, Any]) -> Any:
    """The native path's output; fails if another path ran."""
    with torch.inference_mode():
        assert set(encoder.explain(model).values()) == {"native"}
        assert encoder._forward(bound(model), inputs) is not None
        return model(**inputs)


def native(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return native_output(model, inputs).last_hidden_state


def module_wise(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.enable_grad():
        return model(**inputs).last_hidden_state.detach()


def assert_same_embeddings(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    output = native_output(model, inputs)
    reference = model(**inputs)
    assert type(output) is type(reference)
    assert output.keys() == reference.keys()
    ours, theirs = output.last_hidden_state, reference.last_hidden_state.detach()
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if model.config.model_type == "clip_text_model":
        # Its random embeddings are far smaller than what its layers add: a moved int8 code shows more.
        tolerance, cosine = 1e-2, 0.999
    else:
        tolerance, cosine = 2e-3, 0.9999
    mask = inputs.get("attention_mask")
    if output.get("pooler_output") is not None and (mask is None or mask[:, 0].all()):  # of padding there is no state
        assert F.cosine_similarity(output.pooler_output, reference.pooler_output.detach()).min() > 0.998  # of one token
    ours, theirs = embed(ours, mask), embed(theirs, mask)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    assert F.cosine_similarity(ours, theirs).min() > cosine


@pytest.mark.parametrize("model_type", TEXT)
def test_equals_the_module_wise_path(model_type: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    for lengths in [[1], [7], [128], [1, 2, 15, 16, 17, 33, 100]]:
        assert_same_embeddings(model, batch(lengths))
    assert_same_embeddings(model, batch([3, 20], width=24, left=True))


@pytest.mark.parametrize("model_type", VISION)
def test_images_equal_the_module_wise_path(model_type: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    for inputs in images(1), images(5):
        assert_same_embeddings(model, inputs)


@pytest.mark.parametrize(
    ("model_type", "name"), [("bert", "norms"), ("vit", "norms"), ("dinov2", "norms"), ("dinov2", "scales")]
)
def test_vectors_in_each_others_place_would_show(
    model_type: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_model(tmp_path, model_type)
    inputs = images(2) if model_type in VISION else batch([3, 20])
    family = bound(model).hf_ternary_base.__name__
    swapped = tuple(replace(way, **{name: getattr(way, name)[::-1]}) for way in architectures.ARCHITECTURES[family])
    monkeypatch.setitem(architectures.ARCHITECTURES, family, swapped)
    native(model, inputs)
    with pytest.raises(AssertionError):
        assert_same_embeddings(model, inputs)


def test_images_of_another_size(tmp_path: Path):
    model = make_model(tmp_path, "vit")
    pixels = {"pixel_values": torch.randn(2, 3, 24, 56)}
    assert_same_embeddings(model, {**pixels, "interpolate_pos_encoding": True})
    with pytest.raises(ValueError, match="doesn't match"), torch.inference_mode():
        model(**pixels)
    assert_same_embeddings(model, images(2))  # what is kept of another size does not show


@pytest.mark.parametrize("model_type", VISION)
def test_changed_positions_of_images_are_noticed(model_type: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    before = native(model, images(2))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "position_embedding" in name).normal_()
    assert not torch.allclose(native(model, images(2)), before, atol=0.1)
    assert_same_embeddings(model, images(2))


def test_masked_patches_equal_the_module_wise_path(tmp_path: Path):
    from transformers import ViTModel

    make_model(tmp_path, "vit")
    model = ViTModel.from_pretrained(tmp_path, quantization_config=TernaryConfig(), use_mask_token=True).eval()
    masked = torch.zeros(2, (PIXELS // 8) ** 2, dtype=torch.bool)
    masked[0, :3] = True
    assert_same_embeddings(model, {**images(2), "bool_masked_pos": masked})


def test_differs_from_the_module_wise_path_by_rounding_noise_only(minilm: Path):
    """A float that moves by a millionth flips int8 codes of activations here and there, and the flips spread from layer to
    layer until there are as many as any other cause would make: on real weights no path can stay closer than that."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm, quantization_config=TernaryConfig())
    lines = [line for line in (Path(torch.__file__).parent / "functional.py").read_text().splitlines() if len(line) > 40]
    inputs = AutoTokenizer.from_pretrained(minilm)(lines[:64], padding=True, truncation=True, return_tensors="pt")
    ours, theirs = (embed(path(model, inputs), inputs["attention_mask"]) for path in (native, module_wise))

    def jitter(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0] * (1 + 1e-6 * torch.randn_like(args[0])),)

    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.register_forward_pre_hook(jitter)
    jittered = embed(module_wise(model, inputs), inputs["attention_mask"])
    distance, noise = (1 - F.cosine_similarity(theirs, other) for other in (ours, jittered))
    assert 0 < distance.mean() < 1.5 * noise.mean()


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"num_attention_heads": 1},
        {"num_attention_heads": 32},  # heads of one column
        {"hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 100},  # no multiple of a vector
        {"hidden_size": 192, "num_attention_heads": 1, "intermediate_size": 64},  # a wide head: fewer bits
        {"layer_norm_eps": 1e-3},
        {"num_hidden_layers": 1},
        {"type_vocab_size": 1},
    ],
    ids=str,
)
def test_options_of_bert(options: dict[str, Any], tmp_path: Path):
    assert_same_embeddings(make_model(tmp_path, "bert", **options), batch([1, 5, 31, 64]))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
        ("modernbert", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("modernbert", {"hidden_size": 60, "num_attention_heads": 5, "intermediate_size": 50}),  # no multiple of a vector
        ("clip_text_model", {"hidden_act": "gelu"}),
        ("clip_text_model", {"eos_token_id": 7}),  # pooled at the first of these, not at the largest id
        ("vit", {"qkv_bias": False, "num_hidden_layers": 1}),
        ("dinov2", {"use_swiglu_ffn": True}),
        ("dinov2", {"layerscale_value": 0.1}),
    ],
    ids=str,
)
def test_options_of_pre_norm_encoders(model_type: str, options: dict[str, Any], tmp_path: Path):
    model = make_model(tmp_path, model_type, **options)
    inputs = images(3) if model_type in VISION else batch([1, 5, 31, 64])
    if model_type == "clip_text_model":
        inputs["input_ids"][:, 0] = options.get("eos_token_id", EOS)
    assert_same_embeddings(model, inputs)


# Random weights of the usual size hardly attend: larger ones, and more columns to average out what rounding to int8 moves.
SHARP = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}


def force(kernel: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Encoders run on this kernel from now on; returns the set of those that they were really made for."""
    used, make_encoder = set(), backends.native().Encoder

    def watched(**options: Any) -> Any:
        used.add(options["backend"])
        return make_encoder(**options)

    monkeypatch.setattr(backends, "choose", lambda: backends.Choice(kernel, True, ""))
    monkeypatch.setattr(backends.native(), "Encoder", watched)
    return used


@pytest.mark.parametrize("kernel", KERNELS)
def test_rotation_and_windows(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    used = force(kernel, monkeypatch)
    inputs = batch([5, 40, 130])
    ropes = {"full_attention": {"rope_type": "default", "rope_theta": 10.0}}
    ropes["sliding_attention"] = ropes["full_attention"]
    changes: list[dict[str, Any]] = [{}, {"local_attention": 12}, {"rope_parameters": ropes}]
    found = []
    for number, change in enumerate(changes):
        model = make_model(tmp_path / str(number), "modernbert", **SHARP, **change)
        assert_same_embeddings(model, inputs)
        found.append(embed(native(model, inputs), inputs["attention_mask"]))
    for other in found[1:]:
        assert (other - found[0]).abs().max() > 4e-3  # twice the tolerance
    assert used == {kernel}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_query_of_zeros_sees_what_it_may_and_no_more(
    model_type: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used = force(kernel, monkeypatch)
    window = {"local_attention": 12} if model_type == "modernbert" else {}
    model = make_model(tmp_path, model_type, initializer_range=0.1, **window)
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear) and name.endswith(("query", "Wqkv")):
            rows = len(module.weight) // (3 if name.endswith("Wqkv") else 1)
            module.weight_scale[:rows] = 0
            if module.bias is not None:
                module.bias.data[:rows] = 0
    inputs = batch([3, 20, 45])
    ours, theirs = (embed(states(model, inputs), inputs["attention_mask"]) for states in (native, module_wise))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # what is hidden would move them by 0.05 and more
    assert used == {kernel}


def test_a_long_text(tmp_path: Path):
    options = {"max_position_embeddings": 8192, "local_attention": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = make_model(tmp_path, "modernbert", **options)
    inputs = batch([8192])
    with torch.inference_mode():
        theirs = model.hf_ternary_base.forward(model, **inputs).last_hidden_state  # gradients would take a gigabyte
    ours = native(model, inputs)
    torch.testing.assert_close(embed(ours, None), embed(theirs, None), atol=2e-3, rtol=0)
    assert F.cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert torch.equal(native(model, batch([5, 8192]))[1], ours[0])
    with torch.inference_mode():
        assert encoder._forward(model, batch([8193])) is None


def test_causal_tokens_see_nothing_later(tmp_path: Path):
    model = make_model(tmp_path, "clip_text_model")
    inputs = batch([100])
    states = native(model, inputs)
    inputs["input_ids"][:, 37:] += 1
    again = native(model, inputs)
    assert torch.equal(again[:, :37], states[:, :37])
    assert not torch.equal(again[:, 37], states[:, 37])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model_type", [*TEXT, *VISION])
def test_every_kernel(model_type: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    used = force(kernel, monkeypatch)
    model = make_model(tmp_path, model_type)
    if model_type in VISION:
        assert_same_embeddings(model, images(2))
        assert torch.equal(native(model, images(1)), native(model, images(3))[:1])
    else:
        assert_same_embeddings(model, batch([3, 20, 45]))
        assert torch.equal(native(model, batch([20]))[0], native(model, batch([3, 20, 45]))[1, :20])
    assert used == {kernel}


@pytest.mark.parametrize(
    "ternary",
    [
        TernaryConfig(group_size=16),
        TernaryConfig(group_size="tensor"),
        TernaryConfig(embedding_bits=8),
        TernaryConfig(embedding_bits=2),
        TernaryConfig(embedding_bits=4, embedding_group_size=8),
        TernaryConfig(embedding_bits=None),
    ],
    ids=lambda c: f"{c.group_size}-{c.embedding_bits}-{c.embedding_group_size}",
)
def test_ternary_options(ternary: TernaryConfig, tmp_path: Path):
    assert_same_embeddings(make_model(tmp_path, "bert", ternary), batch([1, 5, 31, 64]))


def test_token_types(bert: Any):
    inputs = batch([4, 9])
    inputs["token_type_ids"] = (torch.arange(9) > 3).long().expand(2, 9)
    assert_same_embeddings(bert, inputs)
    assert not torch.equal(native(bert, inputs), native(bert, batch([4, 9])))


@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
def test_ids_of_padding_inside_a_text(model_type: str, tmp_path: Path):
    """Of which these families count no position."""
    model, inputs = make_model(tmp_path, model_type), batch([4, 9])
    before = native(model, inputs)
    inputs["input_ids"][1, 2:5] = PAD
    assert_same_embeddings(model, inputs)
    assert torch.equal(native(model, inputs)[0], before[0])


def test_no_mask_and_a_boolean_mask(bert: Any):
    inputs = batch([9])
    whole = native(bert, inputs)
    assert torch.equal(whole, native(bert, {"input_ids": inputs["input_ids"]}))
    assert torch.equal(whole, native(bert, {**inputs, "attention_mask": inputs["attention_mask"].bool()}))


def test_padding_gives_zeros(bert: Any):
    inputs = batch([3, 9])
    states = native(bert, inputs)
    assert not states[0, 3:].any()
    assert states[0, :3].any(-1).all()


@pytest.mark.parametrize("model_type", TEXT)
def test_same_bits_in_any_batch_with_any_padding_on_any_threads(model_type: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    lengths = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128] * 3
    alone = {n: native(model, batch([n]))[0] for n in set(lengths)}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for size in (1, 2, 5, len(lengths)):
                for first in range(0, len(lengths), size):
                    part = lengths[first : first + size]
                    states = native(model, batch(part, width=140))
                    for row, n in enumerate(part):
                        assert torch.equal(states[row, :n], alone[n]), (threads, size, n)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", VISION)
def test_same_bits_for_an_image_in_any_batch_on_any_threads(model_type: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        vision = bound(model)
        states = encoder._embed(vision, images(7), encoder._state(vision))  # torch's convolution depends on the batch
        monkey = pytest.MonkeyPatch()
        alone = []
        for i in range(7):
            monkey.setattr(encoder, "_embed", lambda *_, i=i: states[i : i + 1])
            alone.append(native(model, images(1)))
        monkey.setattr(encoder, "_embed", lambda *_: states)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert torch.equal(native(model, images(7)), torch.cat(alone)), threads
    finally:
        monkey.undo()
        torch.set_num_threads(before)


def test_concurrent_calls_give_the_same_bits(bert: Any):
    inputs = [batch([n, 2 * n, 50]) for n in range(1, 9)]
    expected = [native(bert, i) for i in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(native(bert, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_first_calls_at_once_pack_the_weights_once(bert: Any, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    start = threading.Barrier(4)

    class Slow(encoder._State):
        def __init__(self, module: Any) -> None:
            made.append(module)
            time.sleep(0.2)
            super().__init__(module)

    def work() -> None:
        start.wait()
        encoder._state(bert)

    monkeypatch.setattr(encoder, "_State", Slow)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_another_default_device_is_none_of_its_business(bert: Any):
    inputs = batch([3, 9])
    expected = native(bert, inputs)
    with torch.device("meta"):
        assert torch.equal(native(bert, inputs), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_runs_on_the_threads_of_torch(tmp_path: Path):
    """Others of our own would starve: torch's spin for a while after each parallel op, as after embedding an image."""
    make_model(tmp_path / "float", "vit").save_pretrained(tmp_path / "packed")
    script = f"""
import os, torch, transformers
model = transformers.AutoModel.from_pretrained({str(tmp_path / "packed")!r}).eval()
torch.set_num_threads(2)
torch.ones(1000, 1000).sin()  # starts torch's threads
before = len(os.listdir("/proc/self/task"))
with torch.inference_mode():
    model(pixel_values=torch.ones(64, 3, {PIXELS}, {PIXELS}))
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True])
def test_works_in_a_forked_child(again: bool, bert: Any):
    """Binding (``again``) shares torch's OpenMP threads with the native code, which a child does not have."""
    bert.pooler = None  # torch's own Linear hangs in a child of a process that used its threads
    inputs = batch([5, 60])
    expected = native(bert, inputs)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's
        signal.alarm(30)
        try:
            if again:
                encoder._states.clear()
                encoder.bind(bert)
            os._exit(0 if torch.equal(native(bert, inputs), expected) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# Fallbacks: the result is the module-wise one, bit for bit.


def falls_back(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.inference_mode():
        assert encoder._forward(bound(model), inputs) is None
        return model(**inputs)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_hidden_states_and_attentions_come_from_the_modules(asked: str, tmp_path: Path):
    model = make_model(tmp_path)
    model.set_attn_implementation("eager")
    output = falls_back(model, {**batch([5]), asked: True})
    assert getattr(output, asked.removeprefix("output_"))
    assert_same_embeddings(model, batch([5]))  # and the native path is back


@pytest.mark.parametrize(
    "change",
    [
        lambda i: {**i, "position_ids": torch.arange(9).expand(2, 9)},
        lambda i: {**i, "attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)},
        lambda i: {**i, "attention_mask": i["attention_mask"].index_fill(1, torch.tensor([1]), 0)},  # a hole
        lambda i: {**i, "attention_mask": i["attention_mask"].float()},
        lambda i: {"attention_mask": i["attention_mask"], "inputs_embeds": torch.randn(2, 9, HIDDEN)},
    ],
    ids=["position_ids", "4-D mask", "hole", "float mask", "inputs_embeds"],
)
def test_unusual_inputs_fall_back(bert: Any, change: Any):
    falls_back(bert, change(batch([4, 9])))


def test_return_dict_false_falls_back(bert: Any):
    assert isinstance(falls_back(bert, {**batch([4]), "return_dict": False}), tuple)


def test_an_id_out_of_range_is_torchs_error(bert: Any):
    with pytest.raises(IndexError), torch.inference_mode():
        bert(torch.tensor([[VOCAB_SIZE]]))


def test_gradients_come_from_the_modules(bert: Any):
    bert(**batch([5])).last_hidden_state[..., 0].sum().backward()  # of a whole normalized row the sum is constant
    assert bert.embeddings.LayerNorm.weight.grad.abs().sum() > 0


def test_training_mode_falls_back(bert: Any):
    falls_back(bert.train(), batch([5]))


def test_autocast_falls_back(bert: Any):
    with torch.autocast("cpu"):
        falls_back(bert, batch([5]))


def test_other_dtypes_fall_back(bert: Any):
    falls_back(bert.bfloat16(), batch([5]))
    assert "bfloat16" in encoder.explain(bert)[""]


def test_a_hook_on_a_submodule_runs(bert: Any):
    native(bert, batch([5]))
    seen = []
    hook = bert.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    falls_back(bert, batch([5]))
    assert seen
    hook.remove()
    native(bert, batch([5]))


def test_a_submodule_in_training_falls_back(bert: Any):
    """As in Monte Carlo dropout: the dropouts alone are in training mode."""
    native(bert, batch([5]))
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    with torch.inference_mode():
        assert encoder._forward(bound(bert), batch([5])) is None
        assert not torch.equal(bert(**batch([5])).last_hidden_state, bert(**batch([5])).last_hidden_state)
    native(bert.eval(), batch([5]))


@pytest.mark.parametrize(
    ("model_type", "damage", "why"),
    [
        ("modernbert", lambda m: setattr(m.config, "local_attention", -4), "local_attention=-4"),
        ("mpnet", lambda m: setattr(m.config, "num_attention_heads", 8), r"relative_attention_bias.weight has shape"),
        ("bert", lambda m: m.embeddings.word_embeddings.register_buffer("weight_scale", torch.empty(200, 0)), "do not fit"),
    ],
)
def test_numbers_that_do_not_fit_are_told(model_type: str, damage: Any, why: str, tmp_path: Path):
    model = make_model(tmp_path, model_type)
    damage(model)
    assert why in encoder.explain(model)[""]


def test_a_dict_of_masks_falls_back(tmp_path: Path):
    model = make_model(tmp_path, "modernbert")
    masks = {"full_attention": None, "sliding_attention": None}
    with torch.inference_mode():
        assert encoder._forward(bound(model), {**batch([5]), "attention_mask": masks}) is None


def test_an_adapter_falls_back(bert: Any):
    from peft import LoraConfig, get_peft_model

    native(bert, batch([5]))
    adapted = get_peft_model(bert, LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    falls_back(bert, batch([5]))
    assert "peft" in next(iter(encoder.explain(adapted).values()))


def test_a_changed_weight_is_noticed(bert: Any):
    before = native(bert, batch([5]))
    with torch.no_grad():
        bert.encoder.layer[1].output.LayerNorm.bias.add_(1.0)
    assert not torch.equal(native(bert, batch([5])), before)
    assert_same_embeddings(bert, batch([5]))
    bert.encoder.layer[0].output.dense = TernaryLinear.from_float(torch.nn.Linear(64, HIDDEN))
    assert_same_embeddings(bert, batch([5]))


def test_weights_in_other_memory_are_noticed(bert: Any):
    """share_memory(), which pools of processes call, and half() free what the encoder has borrowed."""
    before, made = native(bert, batch([5])), encoder._state(bert)
    bert.share_memory()
    assert encoder._state(bert) is not made
    assert torch.equal(native(bert, batch([5])), before)
    falls_back(torch.nn.Module.half(bert), batch([5]))
    native(torch.nn.Module.float(bert), batch([5]))


def test_a_move_to_where_it_is_keeps_the_encoder(bert: Any):
    """sentence-transformers before 6 calls to() in every encode()."""
    native(bert, batch([5]))
    made = encoder._state(bert)
    for move in (lambda: bert.to("cpu"), lambda: bert.to(torch.float32), bert.cpu):
        move()
        assert encoder._state(bert) is made
    assert all(m.weight_scale.dtype == torch.float32 for m in bert.modules() if isinstance(m, TernaryLinear))


def test_eval_reaches_every_module(bert: Any):
    bert.encoder.layer[0].train()
    assert not bert.eval().encoder.layer[0].training
    assert all(m.training for m in bert.train().modules())


@pytest.mark.parametrize("once", [True, False])
def test_modules_are_named_as_by_torch(bert: Any, once: bool):
    bert.encoder.again, bert.encoder.nothing = bert.encoder.layer[0], None
    wanted = list(torch.nn.Module.named_modules(bert, prefix="a", remove_duplicate=once))
    assert list(bert.named_modules(prefix="a", remove_duplicate=once)) == wanted
    assert [name for name, _ in bert.named_modules()][:2] == ["", "embeddings"]


def test_a_model_no_longer_used_is_freed(bert: Any):
    twin = copy.deepcopy(bert)
    native(twin, batch([5]))
    alive = weakref.ref(twin)
    del twin
    gc.collect()
    assert alive() is None


def test_a_dequantized_model_falls_back(bert: Any):
    falls_back(bert.dequantize(), batch([5]))


def test_float_activations_fall_back(tmp_path: Path):
    falls_back(make_model(tmp_path, "bert", TernaryConfig(activation=None)), batch([5]))


def test_a_float_layer_falls_back(tmp_path: Path):
    model = make_model(tmp_path, "bert", TernaryConfig(modules_to_not_convert=["pooler", "layer.0"]))
    falls_back(model, batch([5]))
    assert "not ternary" in encoder.explain(model)[""]


def test_decoders_fall_back(tmp_path: Path):
    falls_back(make_model(tmp_path, is_decoder=True), batch([5]))


def test_an_activation_function_that_is_not_known_falls_back(tmp_path: Path):
    model = make_model(tmp_path, hidden_act="mish")
    falls_back(model, batch([5]))
    assert "mish" in encoder.explain(model)[""]


def test_rotations_by_another_rule_fall_back(tmp_path: Path):
    rope = {"rope_type": "default", "rope_theta": 10.0}
    ropes = {"full_attention": {**rope, "rope_type": "linear", "factor": 2.0}, "sliding_attention": rope}
    model = make_model(tmp_path, "modernbert", rope_parameters=ropes)
    falls_back(model, batch([5]))
    assert "'rope_type': 'linear'" in encoder.explain(model)[""]


def test_unknown_names_of_modules_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(tmp_path, "vit")
    monkeypatch.setitem(architectures.ARCHITECTURES, "ViTModel", architectures.ARCHITECTURES["CLIPVisionModel"])
    falls_back(model, images(1))
    assert "other names" in encoder.explain(model)[""]


@pytest.mark.parametrize(
    "change",
    [
        lambda i: {"pixel_values": i["pixel_values"].double()},
        lambda i: {**i, "return_dict": False},
        lambda i: {**i, "output_hidden_states": True},
    ],
    ids=["double", "tuple", "hidden states"],
)
def test_unusual_images_fall_back(change: Any, tmp_path: Path):
    falls_back(make_model(tmp_path, "vit"), change(images(2)))


def test_a_masked_end_of_text_falls_back(tmp_path: Path):
    model = make_model(tmp_path, "clip_text_model", eos_token_id=7)
    inputs = batch([4, 9])
    inputs["input_ids"][:, 4] = 7
    falls_back(model, inputs)


def test_torch_compile_falls_back_without_a_graph_break(bert: Any):
    torch._dynamo.reset()
    inputs = batch([5])
    expected = module_wise(bert, inputs)
    with torch.no_grad():
        compiled = torch.compile(bert, backend="eager", fullgraph=True)(**inputs).last_hidden_state
    torch.testing.assert_close(compiled, expected)


def test_torch_export_falls_back(bert: Any):
    inputs = batch([5])
    expected = module_wise(bert, inputs)
    with torch.no_grad():
        exported = torch.export.export(bert, (), inputs)
        assert "hf_ternary.linear" in exported.graph_module.code
        torch.testing.assert_close(exported.module()(**inputs).last_hidden_state, expected)


# Saving and copying


def test_saving_knows_nothing_of_the_native_class(bert: Any, tmp_path: Path):
    from transformers import AutoModel

    expected = native(bert, batch([5]))
    bert.save_pretrained(tmp_path / "again")
    assert '"BertModel"' in (tmp_path / "again" / "config.json").read_text()
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(native(again, batch([5])), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_native_and_independent(bert: Any, copied: Any):
    expected = native(bert, batch([5]))
    twin = copied(bert)
    assert type(twin) is type(bert)
    assert torch.equal(native(twin, batch([5])), expected)
    with torch.no_grad():
        twin.embeddings.LayerNorm.bias.add_(1.0)
    assert torch.equal(native(bert, batch([5])), expected)
    assert not torch.equal(native(twin, batch([5])), expected)


def test_an_unpickled_model_runs_on_the_threads_of_torch(bert: Any, monkeypatch: pytest.MonkeyPatch):
    shared: list[Any] = []
    pickled = pickle.dumps(bert)
    monkeypatch.setattr(encoder, "share_torch_threads", shared.append)
    native(pickle.loads(pickled), batch([5]))
    assert backends.native() in shared


def test_the_class_looks_like_its_parent(bert: Any):
    import inspect

    from transformers import BertModel

    assert isinstance(bert, BertModel)
    assert type(bert).__name__ == "BertModel"
    assert inspect.signature(bert.forward) == inspect.signature(BertModel.forward.__get__(bert))


def test_heads_use_the_native_encoder(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

    BertForSequenceClassification(tiny_bert_config(num_labels=3)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=TernaryConfig())
    assert encoder.explain(model) == {"bert": "native"}
    inputs = batch([3, 20])
    with torch.inference_mode():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, model(**inputs).logits.detach(), atol=5e-3, rtol=0)


def test_explain_names_what_is_missing(tmp_path: Path):
    from transformers import BertModel, GPT2Config, GPT2Model

    assert "holds no known encoder" in encoder.explain(GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2)))[""]
    assert "not loaded as a packed model" in encoder.explain(BertModel(tiny_bert_config()))[""]
