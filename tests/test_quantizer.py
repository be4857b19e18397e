"""from_pretrained and save_pretrained: every way in, every known trap, every bad file."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, BertModel

from hf_ternary import TernaryConfig, TernaryLinear
from hf_ternary.modules import QuantizedEmbedding, TiedLinear
from hf_ternary.quantizer import TernaryHfQuantizer
from tests.conftest import SENTENCES, save_tiny_bert

KEY = "encoder.layer.0.attention.self.key"


@pytest.fixture(scope="module")
def packed_folder(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizer") / "packed"
    config = TernaryConfig(embedding_bits=4)
    BertModel.from_pretrained(tiny_bert, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(packed_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(packed_folder, tmp_path / "packed")


def ids():
    return torch.tensor([[2, 9, 30, 41, 3], [2, 11, 3, 0, 0]])


@torch.inference_mode()
def encode(model):
    """Hidden states of the tokens that count, [8, 32]; those of the padding mean nothing."""
    mask = ids() > 0
    return model(ids(), attention_mask=mask.long()).last_hidden_state[mask]


def edit_config(folder, **options):
    """Change ``quantization_config`` in config.json; a value of None removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in options.items():
        config["quantization_config"][key] = value
    path.write_text(json.dumps(config))


def edit_weights(folder, **tensors):
    """Replace tensors of the checkpoint; ``__`` stands for a dot, None removes the tensor."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        assert name in state
        state.pop(name) if tensor is None else state.update({name: tensor})
    save_file(state, path, {"format": "pt"})


# Ways in


def test_config_says_what_the_model_is(packed_folder):
    saved = json.loads((packed_folder / "config.json").read_text())["quantization_config"]
    assert saved == TernaryConfig(embedding_bits=4).to_dict()


def test_file_holds_the_documented_tensors(packed_folder):
    state = load_file(packed_folder / "model.safetensors")
    assert (state[f"{KEY}.weight"].dtype, state[f"{KEY}.weight"].shape) == (torch.uint8, (32, 8))
    assert (state[f"{KEY}.weight_scale"].dtype, state[f"{KEY}.weight_scale"].shape) == (torch.float32, (32, 1))
    assert state["embeddings.word_embeddings.weight"].shape == (200, 16)
    assert state["pooler.dense.weight"].dtype == torch.float32


def test_config_may_be_a_dict(tiny_bert):
    model = BertModel.from_pretrained(tiny_bert, quantization_config={"quant_method": "ternary", "group_size": 8})
    assert model.get_submodule(KEY).weight_scale.shape == (32, 4)


def test_sharded_checkpoint(packed_folder, tmp_path):
    model = BertModel.from_pretrained(packed_folder)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(encode(BertModel.from_pretrained(tmp_path)), encode(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_argument_casts_everything_but_scales_and_codes(packed_folder, dtype):
    model, reference = BertModel.from_pretrained(packed_folder, dtype=dtype), BertModel.from_pretrained(packed_folder)
    layer, exact = model.get_submodule(KEY), reference.get_submodule(KEY)
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (torch.uint8, torch.float32, dtype)
    assert torch.equal(layer.weight_scale, exact.weight_scale)
    assert model.embeddings.word_embeddings(ids()).dtype == dtype
    hidden = encode(model)
    assert hidden.dtype == dtype
    assert torch.allclose(hidden.float(), encode(reference), atol=0.1)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(packed_folder, tiny_bert, device_map):
    expected = encode(BertModel.from_pretrained(packed_folder))
    assert torch.equal(encode(BertModel.from_pretrained(packed_folder, device_map=device_map)), expected)
    on_the_fly = TernaryConfig(embedding_bits=4)
    model = BertModel.from_pretrained(tiny_bert, device_map=device_map, quantization_config=on_the_fly)
    assert torch.equal(encode(model), expected)


def test_offload_to_disk_is_refused(packed_folder):
    with pytest.raises(ValueError, match="offloads to disk"):
        BertModel.from_pretrained(packed_folder, device_map={"": "disk"})


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"need transformers 5, not 4\.57\.6\. Fix: pip install 'transformers>=5'"):
        TernaryHfQuantizer(TernaryConfig()).validate_environment()


def test_copies_and_pickles(packed_folder):
    model = BertModel.from_pretrained(packed_folder)
    expected = encode(model)
    for twin in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert torch.equal(encode(twin), expected)


def test_half_and_back_keeps_scales(packed_folder):
    model = BertModel.from_pretrained(packed_folder)
    scale = model.get_submodule(KEY).weight_scale.clone()
    model.to(torch.float16)
    nn.Module.half(model)  # as SentenceTransformer.half() does; transformers' own refuses any quantized model
    model.to(torch.float32)
    assert torch.equal(model.get_submodule(KEY).weight_scale, scale)


def test_packed_weights_are_frozen_and_the_rest_trains(packed_folder):
    model = BertModel.from_pretrained(packed_folder).train()
    assert not model.get_submodule(KEY).bias.requires_grad
    model(ids()).last_hidden_state.square().sum().backward()
    assert model.encoder.layer[0].attention.output.LayerNorm.weight.grad.abs().sum() > 0


def test_dequantize_at_load(packed_folder):
    option, packed = TernaryConfig(dequantize=True), BertModel.from_pretrained(packed_folder)
    if not hasattr(transformers.quantizers.auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):  # before 5.4: only its own quantizers'
        with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
            same = BertModel.from_pretrained(packed_folder, quantization_config=option)
        assert torch.equal(encode(same), encode(packed))
        return
    with pytest.warns(UserWarning, match="loading attributes"):
        plain = BertModel.from_pretrained(packed_folder, quantization_config=option)
    assert type(plain.get_submodule(KEY)) is nn.Linear
    assert torch.allclose(plain.get_submodule(KEY).weight, packed.get_submodule(KEY).dequantize(), atol=1e-6)
    assert not hasattr(plain.config, "quantization_config")


def test_dequantize_method(packed_folder):
    model = BertModel.from_pretrained(packed_folder)
    table = model.embeddings.word_embeddings.dequantize()
    model.dequantize()
    assert torch.equal(model.embeddings.word_embeddings.weight, table)
    assert not any(isinstance(m, (TernaryLinear, QuantizedEmbedding)) for m in model.modules())


def test_dequantize_to_another_dtype(packed_folder):
    model = BertModel.from_pretrained(packed_folder).eval()
    model.dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.dtype == torch.bfloat16


def test_dequantize_after_saving(packed_folder, tmp_path):
    model = BertModel.from_pretrained(packed_folder)
    model.save_pretrained(tmp_path)  # leaves the dtype's name in the config
    model.dequantize()
    assert type(model.get_submodule(KEY)) is nn.Linear
    assert model.get_submodule(KEY).weight.dtype == torch.float32


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
def test_position_table_has_bits_of_its_own(bits, tmp_path):
    save_tiny_bert(tmp_path / "float", max_position_embeddings=160)
    config = TernaryConfig(embedding_bits=4, position_bits=bits)
    model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
    assert getattr(model.embeddings.position_embeddings, "bits", None) == bits
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / "packed")), encode(model))


def test_position_table_of_a_folder_from_before_it_had_its_own_bits(tmp_path):
    save_tiny_bert(tmp_path / "float", max_position_embeddings=160)
    config = TernaryConfig(embedding_bits=4, position_bits=4)
    model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())
    del written["quantization_config"]["position_bits"]
    (tmp_path / "packed" / "config.json").write_text(json.dumps(written))
    assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / "packed")), encode(model))


def test_base_and_head_classes_read_each_others_checkpoints(tmp_path):
    """The files decide what is packed, not the model class; names gain or lose the base model's prefix."""
    save_tiny_bert(tmp_path / "mlm", "BertForMaskedLM", max_position_embeddings=160)
    config = TernaryConfig(embedding_bits=8, modules_to_not_convert=["embeddings.position_embeddings"])
    mlm = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm", quantization_config=config)
    mlm.save_pretrained(tmp_path / "packed")
    base = AutoModel.from_pretrained(tmp_path / "packed", add_pooling_layer=False)
    assert torch.equal(encode(base), encode(mlm.bert))
    assert isinstance(mlm.cls.predictions.transform.dense, TernaryLinear)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    assert torch.equal(encode(again), encode(base))


def test_output_layer_tied_to_a_quantized_table(tmp_path):
    save_tiny_bert(tmp_path / "float", "BertForMaskedLM")
    config = TernaryConfig(embedding_bits=8)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "float", quantization_config=config)
    head = model.cls.predictions.decoder
    assert isinstance(head, TiedLinear)
    hidden = torch.randn(3, 32)
    table = model.bert.embeddings.word_embeddings.dequantize()
    assert torch.allclose(head(hidden), hidden @ table.T + head.bias, atol=1e-5)
    model.save_pretrained(tmp_path / "packed")
    assert not any("decoder.weight" in key for key in load_file(tmp_path / "packed" / "model.safetensors"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    again.dequantize()
    assert torch.allclose(again(ids()).logits, model(ids()).logits, atol=0.02)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    again.save_pretrained(tmp_path / "plain")
    assert not any("decoder.weight" in key for key in load_file(tmp_path / "plain" / "model.safetensors"))


def test_on_the_fly_errors_reach_the_user(tiny_bert):
    with pytest.raises(ValueError, match="'poler' names no module"):
        BertModel.from_pretrained(tiny_bert, quantization_config=TernaryConfig(modules_to_not_convert=["poler"]))
    with pytest.raises(ValueError, match="group_size=12 does not divide"):
        BertModel.from_pretrained(tiny_bert, quantization_config=TernaryConfig(group_size=12))


# sentence-transformers


def test_sentence_transformer_round_trip(tiny_sentence_transformer, tmp_path):
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": TernaryConfig(embedding_bits=4)}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    embeddings = model.encode(SENTENCES)
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert isinstance(again[0].auto_model.get_submodule(KEY), TernaryLinear)
    assert (again.encode(SENTENCES) == embeddings).all()


def test_multi_process_pool(tiny_sentence_transformer):
    from sentence_transformers import SentenceTransformer

    options = {"quantization_config": TernaryConfig(embedding_bits=4)}
    model = SentenceTransformer(str(tiny_sentence_transformer), device="cpu", model_kwargs=options)
    model.encode(SENTENCES)  # the pool then moves the weights that our encoder has borrowed
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        embeddings = model.encode(SENTENCES, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    assert embeddings == pytest.approx(model.encode(SENTENCES), abs=1e-6)  # torch's attention depends on the padding


def test_cross_encoder_round_trip(tiny_cross_encoder, tmp_path):
    from sentence_transformers import CrossEncoder

    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[3])]
    model = CrossEncoder(str(tiny_cross_encoder), device="cpu", model_kwargs={"quantization_config": TernaryConfig()})
    scores = model.predict(pairs)
    model.save_pretrained(str(tmp_path))
    again = CrossEncoder(str(tmp_path), device="cpu")
    assert isinstance(again.model.bert.get_submodule(KEY), TernaryLinear)
    assert again.predict(pairs) == pytest.approx(scores, abs=1e-6)


def test_sparse_encoder_round_trip(tiny_sparse_encoder, tmp_path):
    from sentence_transformers import SparseEncoder

    options = {"quantization_config": TernaryConfig(embedding_bits=8)}
    model = SparseEncoder(str(tiny_sparse_encoder), device="cpu", model_kwargs=options)
    embeddings = model.encode(SENTENCES).to_dense()
    assert embeddings.abs().sum() > 0
    model.save_pretrained(str(tmp_path))
    again = SparseEncoder(str(tmp_path), device="cpu")
    assert isinstance(again[0].auto_model.bert.get_submodule(KEY), TernaryLinear)
    assert torch.allclose(again.encode(SENTENCES).to_dense(), embeddings, atol=1e-6)


# PEFT


def test_lora_on_packed_weights_trains_and_saves(packed_folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(BertModel.from_pretrained(packed_folder), LoraConfig(r=4, target_modules=["key", "query"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = encode(model)
    for _ in range(2):  # the second step moves A too: B starts at zero
        model(ids()).last_hidden_state[..., 0].sum().backward()
        optimizer.step()
    trained = encode(model.eval())
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BertModel.from_pretrained(packed_folder), tmp_path)
    assert torch.equal(encode(again), trained)


# Bad files


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged .*download it again"):
        BertModel.from_pretrained(folder)


def test_garbage_file(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match="damaged|safetensors"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{KEY}.weight", torch.full((32, 7), 170, dtype=torch.uint8), r"U8 \[32, 7\] in the file, expected U8 \[32, 8\]"),
        (f"{KEY}.weight", torch.zeros(32, 32), r"F32 \[32, 32\] in the file, expected U8 \[32, 8\]"),
        (f"{KEY}.weight", None, "weight is missing in the file"),
        (f"{KEY}.weight", torch.full((32, 8), 168, dtype=torch.uint8), "code 0, which is no ternary value"),
        (f"{KEY}.weight_scale", torch.ones(31, 1), r"weight_scale is F32 \[31, 1\]"),
        (f"{KEY}.weight_scale", torch.ones(32, 5), r"weight_scale is F32 \[32, 5\]"),
        (f"{KEY}.weight_scale", torch.ones(32, 1, dtype=torch.float16), r"weight_scale is F16 \[32, 1\]"),
        (f"{KEY}.weight_scale", torch.full((32, 1), float("nan")), "weight_scale holds a NaN"),
        (f"{KEY}.weight_scale", torch.full((32, 1), float("inf")), "weight_scale holds a NaN, an infinity"),
        (f"{KEY}.weight_scale", torch.full((32, 1), -1.0), "weight_scale holds .* a negative value"),
        ("embeddings.word_embeddings.weight_scale", torch.full((200, 1), float("nan")), "word_embeddings.weight_scale"),
    ],
)
def test_damaged_tensor_is_named(folder, name, tensor, message):
    edit_weights(folder, **{name.replace(".", "__"): tensor})
    with pytest.raises(ValueError, match=message):
        BertModel.from_pretrained(folder)


def test_scale_missing_for_one_layer(folder):
    edit_weights(folder, **{f"{KEY}.weight_scale".replace(".", "__"): None})
    with pytest.raises(ValueError, match=r"key.weight_scale is missing in the file although .*key.weight is packed"):
        BertModel.from_pretrained(folder)


def test_float_weights_under_a_ternary_config(folder, tiny_bert):
    shutil.copy(tiny_bert / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds no packed ternary weights"):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_version": 2, "hf_ternary_version": "4.0.0"}, "pip install 'hf_ternary>=4.0.0'"),
        ({"rotation": "hadamard", "hf_ternary_version": "4.0.0"}, "'rotation'.*pip install 'hf_ternary>=4.0.0'"),
        ({"embedding_bits": 8}, r"embeddings.weight is U8 \[\d+, 16\] in the file, expected U8 \[\d+, 32\]"),
        ({"embedding_bits": None}, "quantized but config.json has embedding_bits null"),
    ],
)
def test_config_that_does_not_fit_the_file(folder, options, message):
    edit_config(folder, **options)
    with pytest.raises(ValueError, match=message):
        BertModel.from_pretrained(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_offloaded_weights_are_refused(packed, tiny_bert, folder):
    options = {} if packed else {"quantization_config": TernaryConfig()}
    with pytest.raises(ValueError, match=r"weight is not in memory: device_map has offloaded it. Fix: load"):
        BertModel.from_pretrained(folder if packed else tiny_bert, device_map="meta", **options)


def test_pickle_checkpoint_is_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not a safetensors file"):
        BertModel.from_pretrained(folder)


# Cost of loading

MEASURE = """
import gc, re, sys, time, torch
from transformers import BertModel
torch.set_num_threads(1)  # waiting threads would count as processor time
BertModel.from_pretrained(sys.argv[1])  # imports and first-time costs
gc.collect()
def peak():  # not getrusage: its peak is never below that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
seconds = []
for _ in range(3):
    start = time.process_time()
    model = BertModel.from_pretrained(sys.argv[2])
    seconds.append(time.process_time() - start)
    extra = peak() - before
    del model
    gc.collect()
start = time.process_time()
torch.empty(int(sys.argv[3]) // 10).normal_()
print(extra, min(seconds), 10 * (time.process_time() - start))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_makes_no_float_copy(packed_folder, tmp_path):
    """BERT-large shape: peak extra memory below 1.3 x the file, and less time than only to initialise its float weights."""
    from hf_ternary import convert
    from tests.conftest import tiny_bert_config

    options = {"vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        model = BertModel(tiny_bert_config(**options, intermediate_size=4096, max_position_embeddings=512))
    config, count = TernaryConfig(embedding_bits=4), sum(p.numel() for p in model.parameters())
    for name in convert.linears_to_convert(model, config):
        convert.replace(model, name, TernaryLinear.empty_like(model.get_submodule(name), 1, "int8"))
    for name, bits in convert.embeddings_to_convert(model, config).items():
        convert.replace(model, name, QuantizedEmbedding.empty_like(model.get_submodule(name), bits, 1))
    fill = {torch.uint8: 170, torch.float32: 0.01}  # 170: four codes of zero
    state = {name: torch.full(t.shape, fill[t.dtype], dtype=t.dtype) for name, t in model.state_dict().items()}
    model.config.quantization_config = config
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-c", MEASURE, str(packed_folder), str(tmp_path), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    extra, seconds, initialising = map(float, result.stdout.split())
    size = (tmp_path / "model.safetensors").stat().st_size
    assert extra < 1.3 * size
    assert seconds < initialising
