import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from hf_ternary.distill import DistillArguments, distill
from hf_ternary.distill.student import Encoder, load_teacher, make_student, set_strength, ternary_layers
from hf_ternary.distill.texts import Collator, TokenizedTexts
from hf_ternary.distill.trainer import UNREAD, DistillTrainer, last_checkpoint
from hf_ternary.packing import unpack
from tests.conftest import SENTENCES, tiny_tokenizer
from tests.distill.conftest import KILL, log, make_texts, weights
from tests.helpers import build
from tests.hub_server import TOKEN, HubServer

Options = Callable[..., dict[str, Any]]


def test_a_run_makes_a_loadable_model_that_is_closer_to_the_teacher(options: Options):
    run = options(
        max_steps=40,
        learning_rate=3e-4,
        eval_steps=40,
        hidden_weight=0.5,
        gram_weight=0.5,
        ranking_weight=0.1,
        relation_weight=0.1,
        relation_modules=["encoder.layer.1.attention.self.value"],
        layers=[1, 2],
        gradual=0.2,
        init="compensated",
        calibration_texts=40,
    )
    distill(DistillArguments(**run))
    cosines = [entry["eval_cosine"] for entry in log(run) if "eval_cosine" in entry]
    assert cosines[-1] > cosines[0]
    losses = [entry for entry in log(run) if "loss" in entry]
    assert {f"loss_{name}" for name in ("hidden", "layers", "embedding", "gram", "ranking", "relation")} <= losses[0].keys()
    assert losses[-1]["tokens_per_second"] > 0
    assert 0 < losses[-1]["zeros"] < 1
    assert {"zeros/model.0.model.encoder.layer.0.output.dense", "flips", "drift"} <= losses[-1].keys()
    model = SentenceTransformer(str(Path(run["output_dir"]) / "model"), device="cpu")
    assert model.encode(["the cat"]).shape == (1, 32)
    summary = json.loads((Path(run["output_dir"]) / "summary.json").read_text())
    assert summary["steps"] == 40
    assert summary["sources"][0]["texts"] == 400
    assert summary["sources"][0]["sha256"] == hashlib.sha256(Path(run["texts"][0]).read_bytes()).hexdigest()
    assert summary["options"]["learning_rate"] == 3e-4
    assert [entry["eval_cosine"] for entry in summary["curve"]] == cosines
    assert {"date", "commit", "seed", "hardware", "threads", "versions"} <= summary.keys()
    assert summary["fidelity"]["eval_cosine"] == pytest.approx(cosines[-1])


def test_another_data_seed_orders_the_same_texts_anew(options: Options):
    args = DistillArguments(**options())
    teacher = load_teacher(args.teacher, args.max_length)
    data = TokenizedTexts.of(make_texts(), teacher, args.max_length)

    def first_batch(**changes: Any) -> list[int]:
        args = DistillArguments(**options(**changes))
        student = Encoder(make_student(teacher, args.ternary_config()))
        trainer = DistillTrainer(student, Encoder(teacher), args, data, data, Collator(0))
        return next(iter(trainer.batches))

    assert first_batch() == first_batch() != first_batch(data_seed=1)


@pytest.mark.parametrize("measured", [False, True])
def test_the_teacher_is_as_mixed_in_precision_as_the_student_and_neither_when_measured(
    measured: bool, options: Options, monkeypatch: pytest.MonkeyPatch
):
    mixed: list[bool] = []
    forward = Encoder.forward

    def watched(self: Encoder, *args: Any, **inputs: Any) -> dict[str, Any]:
        mixed.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(Encoder, "forward", watched)
    changes = {} if measured else {"eval_texts": 0}
    distill(
        DistillArguments(**options(max_steps=2, bf16=True, eval_strategy="no", eval_on_start=False, dense=False, **changes))
    )
    # The teacher alone is looked at before the first step; then teacher and student take turns, also at the end.
    assert mixed == [False, True, True, True, True, *[False, False] * measured]


def test_fidelity_is_that_of_the_packed_model_at_any_strength(options: Options):
    args = DistillArguments(**options(max_steps=1))
    teacher = load_teacher(args.teacher, args.max_length)
    student = Encoder(make_student(teacher, args.ternary_config()))
    data = TokenizedTexts.of(make_texts(40), teacher, args.max_length)
    trainer = DistillTrainer(student, Encoder(teacher), args, data, data, Collator(0))
    fidelity = trainer.evaluate()
    set_strength(student, 0.0)
    assert trainer.evaluate() == pytest.approx(fidelity, abs=1e-6)
    assert {layer.strength for layer in ternary_layers(student).values()} == {0.0}


def test_the_packed_model_is_pushed_at_the_end(options: Options, tmp_path: Path):
    run = tmp_path / "run.json"
    run.write_text(json.dumps(options(max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="tester/distilled")))
    recipe = Path(__file__).parents[2] / "recipes" / "distill.py"
    with HubServer() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, str(recipe), "--config", str(run)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert process.returncode == 0, process.stderr
        assert hub.unhandled == []
        files = hub.files("tester/distilled")
    model = tmp_path / "run" / "model"
    assert {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()} <= files.keys()
    assert files["model.safetensors"].content == (model / "model.safetensors").read_bytes()
    assert not [name for name in files if "checkpoint" in name or name in ("run.json", "training_args.bin")]


def test_kill_and_resume_give_the_bits_of_an_undisturbed_run(options: Options, tmp_path: Path):
    undisturbed, killed = options(save_steps=6), options(save_steps=6, output_dir=str(tmp_path / "killed"))
    distill(DistillArguments(**undisturbed))
    process = subprocess.run([sys.executable, "-c", KILL, json.dumps(killed)], capture_output=True, text=True, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = Path(killed["output_dir"])
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")
    (folder / "checkpoint-8").mkdir()  # as if killed while writing one
    distill(DistillArguments(**killed))
    assert not (folder / "checkpoint-8").exists()
    wanted, got = weights(undisturbed), weights(killed)
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    losses = [[(entry["step"], entry["loss"]) for entry in log(run) if "loss" in entry] for run in (undisturbed, killed)]
    assert losses[0] == losses[1]
    measured = [[entry["step"] for entry in log(run) if "eval_cosine" in entry] for run in (undisturbed, killed)]
    assert measured == [[0, 6, 12]] * 2


def test_a_finished_run_can_be_finished_again_and_an_early_end_is_a_step(options: Options):
    run = options(max_steps=10)
    distill(DistillArguments(**run))
    before = weights(run)
    distill(DistillArguments(**run))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())
    distill(DistillArguments(**{**run, "max_steps": 5, "resume_from_checkpoint": f"{run['output_dir']}/checkpoint-5"}))
    assert json.loads((Path(run["output_dir"]) / "summary.json").read_text())["steps"] == 5
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())


def test_a_finished_run_goes_on_with_more_steps(options: Options):
    run = options(max_steps=5, logging_steps=1)
    distill(DistillArguments(**run))
    distill(DistillArguments(**{**run, "max_steps": 10}))
    rates = {entry["step"]: entry["learning_rate"] for entry in log(run) if "loss" in entry}
    assert list(rates) == list(range(1, 11))
    assert rates[6] == 0  # where the first schedule ended; then the schedule of ten steps, from its middle
    assert rates[7] > rates[5]
    summary = json.loads((Path(run["output_dir"]) / "summary.json").read_text())
    assert (summary["steps"], summary["options"]["max_steps"]) == (10, 10)


def test_a_checkpoint_of_another_run_is_refused(options: Options, teacher: Path, corpus_file: Path, tmp_path: Path):
    run = options(max_steps=5)
    distill(DistillArguments(**run))
    other = SentenceTransformer(str(teacher), device="cpu")
    other[0].auto_model.embeddings.LayerNorm.weight.data += 1
    other.save_pretrained(str(tmp_path / "other"))
    texts = tmp_path / "other.jsonl"
    texts.write_text(corpus_file.read_text().replace("cat", "dog"))
    for changes, told in (
        ({"teacher": str(tmp_path / "other")}, "teacher"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.0005, not 0.001"),
        ({"texts": [str(texts)]}, "source 1"),
    ):
        with pytest.raises(ValueError, match=rf"checkpoint-5 is of a run with another {told}.*Fix: .*another output_dir"):
            distill(DistillArguments(**{**run, "max_steps": 10, **changes}))
    distill(DistillArguments(**{**run, "max_steps": 10, "logging_steps": 2}))


def test_the_dense_layer_is_fitted_once_more_to_more_texts(options: Options):
    """And a run that had ended without that gets it when the same command is given with it."""
    run = options(learning_rate=0.0, max_steps=2, eval_steps=1, save_steps=2, calibration_texts=8)
    distill(DistillArguments(**run))
    before = [entry["eval_cosine"] for entry in log(run) if "eval_cosine" in entry][-1]
    packed = distill(DistillArguments(**run, dense_texts=360))
    summary = json.loads((Path(run["output_dir"]) / "summary.json").read_text())
    assert 1 - summary["fidelity"]["eval_cosine"] < 0.95 * (1 - before)
    assert summary["curve"][-1]["eval_cosine"] == summary["fidelity"]["eval_cosine"]
    held_out = packed.encode(SENTENCES, convert_to_tensor=True)
    saved = SentenceTransformer(str(Path(run["output_dir"]) / "model"), device="cpu")
    assert torch.allclose(saved.encode(SENTENCES, convert_to_tensor=True), held_out, atol=1e-5)


def test_checkpoints_of_another_program_are_left_alone(options: Options):
    run = options(max_steps=2)
    kept = [Path(run["output_dir"]) / name / "model.safetensors" for name in ("checkpoint-best", "checkpoint-500")]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"checkpoint-500 is of a run that left no run.json. Fix: give another output_dir"):
        distill(DistillArguments(**run))
    assert all(file.read_bytes() == b"precious" for file in kept)
    shutil.rmtree(kept[1].parent)
    distill(DistillArguments(**run))
    assert kept[0].exists()


def test_arguments_stay_as_they_were_given(options: Options):
    args = DistillArguments(**options(max_steps=-1, num_train_epochs=0.1))
    before = args.to_dict()
    distill(args)
    assert args.to_dict() == before


def test_tokens_count_every_batch_of_a_step(options: Options):
    run = options(max_steps=2, gradient_accumulation_steps=2, logging_steps=1)
    distill(DistillArguments(**run))
    one = options(max_steps=4, output_dir=f"{run['output_dir']}-4")
    distill(DistillArguments(**one))
    tokens = [json.loads((Path(r["output_dir"]) / "summary.json").read_text())["tokens"] for r in (run, one)]
    assert tokens[0] == tokens[1]


def test_two_processes_equal_one_with_the_same_whole_batch(options: Options, tmp_path: Path):
    """To 1e-5 of a weight: sums are added in another order. Plain SGD, as Adam would blow up rounding in tiny gradients."""
    changes = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 3,
        "save_steps": 3,
        "gram_weight": 1.0,
        "ranking_weight": 0.1,
        "hidden_weight": 1.0,
    }
    alone, together = options(**changes), options(**changes, output_dir=str(tmp_path / "two"), ddp_backend="gloo")
    distill(DistillArguments(**alone))
    launch_two_processes(together)
    states = [load_file(Path(run["output_dir"]) / "checkpoint-3" / "model.safetensors") for run in (alone, together)]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_start_from_what_all_their_texts_say(options: Options, tmp_path: Path):
    """As the first layers tell: in later ones, int8 codes that depend on the last bit move some weights over a threshold."""
    changes = {"init": "compensated", "calibration_texts": 100, "learning_rate": 0.0, "eval_texts": 0, "max_steps": 12}
    runs = [options(**changes, output_dir=str(tmp_path / name)) for name in ("one", "two", "half")]
    distill(DistillArguments(**runs[0]))
    launch_two_processes({**runs[1], "ddp_backend": "gloo"})
    distill(DistillArguments(**{**runs[2], "calibration_texts": 50}))
    one, two, half = map(weights, runs)
    names = [f"encoder.layer.0.attention.self.{name}.weight" for name in ("query", "key", "value")]

    def same(other: dict[str, torch.Tensor]) -> float:
        pairs = ((unpack(state[name], 4 * state[name].shape[1]) for state in (one, other)) for name in names)
        return torch.cat([(a == b).flatten() for a, b in pairs]).float().mean().item()

    assert same(two) > 0.999 > 0.95 > same(half)


def test_a_short_run_starts_from_as_many_texts(options: Options, tmp_path: Path):
    """More than the one batch of its plan holds."""
    changes = {"init": "compensated", "learning_rate": 0.0, "eval_texts": 0, "max_steps": 1}
    runs = [options(**changes, calibration_texts=n, output_dir=str(tmp_path / f"{n}")) for n in (50, 100)]
    for run in runs:
        distill(DistillArguments(**run))
    few, more = map(weights, runs)
    assert any(not torch.equal(few[name], more[name]) for name in few)


def launch_two_processes(run: dict[str, Any]) -> None:
    config = Path(f"{run['output_dir']}.json")
    config.write_text(json.dumps(run))  # json is yaml
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    recipe = Path(__file__).parents[2] / "recipes" / "distill.py"
    process = subprocess.run([*command, str(recipe), "--config", str(config)], capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr


def test_the_learning_rate_is_halved_at_equal_intervals(options: Options):
    run = options(lr_halvings=3, learning_rate=0.8, warmup_steps=0, logging_steps=1, max_steps=9)
    distill(DistillArguments(**run))
    rates = [entry["learning_rate"] for entry in log(run) if "learning_rate" in entry]
    assert rates == [0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


@pytest.mark.parametrize("learned_scale", [True, False])
def test_a_finished_model_is_trained_further(options: Options, tmp_path: Path, learned_scale: bool):
    first = options(output_dir=str(tmp_path / "first"), embedding_bits=None, learned_scale=learned_scale)
    distill(DistillArguments(**first))
    fidelity = json.loads((tmp_path / "first" / "summary.json").read_text())["fidelity"]["eval_cosine"]
    second = {
        **first,
        "output_dir": str(tmp_path / "second"),
        "student": str(tmp_path / "first" / "model"),
        "learning_rate": 0.1,
    }
    distill(DistillArguments(**second))
    assert log(second)[0]["eval_cosine"] == pytest.approx(fidelity, abs=1e-4)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second")]
    assert summaries[1]["student"] == summaries[0]["weights"]
    assert summaries[1]["earlier"] == summaries[:1]
    card = (tmp_path / "second" / "model" / "README.md").read_text()
    assert "| 1 | the full-precision weights, rounded | 12 |" in card
    assert "| 2 | run 1 | 12 |" in card
    assert "A Dense layer in floating point behind the pooling, 32 x 32, is part of the model" in card
    assert any(not torch.equal(before, weights(second)[name]) for name, before in weights(first).items() if is_codes(before))


def test_what_stands_behind_the_transformer_is_trained_further(options: Options, teacher: Path, tmp_path: Path):
    try:
        from sentence_transformers.sentence_transformer.modules import Dense
    except ImportError:  # before sentence-transformers 6
        from sentence_transformers.models import Dense

    modules = [*SentenceTransformer(str(teacher), device="cpu"), Dense(32, 16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "dense"))
    first = options(
        teacher=str(tmp_path / "dense"), output_dir=str(tmp_path / "first"), learning_rate=0.01, embedding_bits=None
    )
    distill(DistillArguments(**first))
    second = {**first, "output_dir": str(tmp_path / "second"), "student": str(tmp_path / "first" / "model")}
    distill(DistillArguments(**second))
    ends = [entry["eval_cosine"] for entry in log(first) if "eval_cosine" in entry]
    assert log(second)[0]["eval_cosine"] == pytest.approx(ends[-1], abs=1e-5)
    assert abs(ends[-1] - ends[0]) > 1e-3


@pytest.mark.parametrize("bits", [4, None])
def test_a_table_under_two_names(bits: int | None, options: Options, tmp_path: Path):
    build("T5 encoder", tmp_path / "t5")
    tiny_tokenizer(tmp_path / "t5")
    run = options(teacher=str(tmp_path / "t5"), embedding_bits=bits)
    model = distill(DistillArguments(**run))
    tables = sorted(name for name in weights(run) if "shared" in name or "embed_tokens" in name)
    assert tables == (["shared.weight"] if bits is None else ["shared.weight", "shared.weight_scale"])
    loaded = SentenceTransformer(f"{run['output_dir']}/model", device="cpu")
    assert torch.allclose(torch.tensor(loaded.encode(SENTENCES)), torch.tensor(model.encode(SENTENCES)), atol=1e-6)
    further = {**run, "student": f"{run['output_dir']}/model", "output_dir": str(tmp_path / "further"), "max_steps": 2}
    distill(DistillArguments(**further))
    end = json.loads((Path(run["output_dir"]) / "summary.json").read_text())["fidelity"]["eval_cosine"]
    assert log(further)[0]["eval_cosine"] == pytest.approx(end, abs=0.02 if bits else 1e-5)  # the table is rounded anew


def test_fixed_codes_stay_as_they_are(options: Options, tmp_path: Path):
    first = options(output_dir=str(tmp_path / "first"), dense=False)
    distill(DistillArguments(**first))
    second = options(student=f"{first['output_dir']}/model", fixed_codes=True, learning_rate=5e-3, max_steps=40, dense=False)
    distill(DistillArguments(**second))
    cosines = [entry["eval_cosine"] for entry in log(second) if "eval_cosine" in entry]
    assert cosines[-1] > cosines[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    start = tmp_path / "first" / "model" / "model.safetensors"
    assert summary["student"] == {"bytes": start.stat().st_size, "sha256": hashlib.sha256(start.read_bytes()).hexdigest()}
    before, after = weights(first), weights(second)
    linears = [name for name in before if name.endswith(".weight") and "encoder" in name and is_codes(before[name])]
    assert len(linears) == 12
    for name in linears:
        assert torch.equal(before[name], after[name])
        assert not torch.equal(before[f"{name}_scale"], after[f"{name}_scale"])
    assert max(entry.get("flips", 0) for entry in log(second)) == 0


def is_codes(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.uint8


def test_what_cannot_be_trained_further(options: Options, teacher: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="student .* is not ternary"):
        distill(DistillArguments(**options(student=str(teacher), texts=["missing.jsonl"])))  # before the texts are read
    smaller = SentenceTransformer(str(teacher), device="cpu")
    smaller[0].auto_model.encoder.layer = smaller[0].auto_model.encoder.layer[:1]
    smaller[0].auto_model.config.num_hidden_layers = 1
    smaller.save_pretrained(str(tmp_path / "smaller"))
    distill(DistillArguments(**options(teacher=str(tmp_path / "smaller"))))
    with pytest.raises(ValueError, match=r"does not fit the teacher: .*encoder\.layer\.1\..* is missing"):
        distill(DistillArguments(**options(student=str(tmp_path / "run" / "model"), output_dir=str(tmp_path / "other"))))
    first = options(output_dir=str(tmp_path / "first"), group_size="8")
    distill(DistillArguments(**first))
    with pytest.raises(ValueError, match="was made with group_size=8; give the same options"):
        distill(DistillArguments(**options(student=str(tmp_path / "first" / "model"))))


@pytest.mark.parametrize(("unread", "steps"), [(0, 3), (1, 4), (50, 5)])
def test_a_nan_stops_the_run_and_names_step_and_texts(
    unread: int, steps: int, options: Options, monkeypatch: pytest.MonkeyPatch
):
    """At once on a CPU; on a GPU some steps later, but before anything is saved."""
    parts, calls = DistillTrainer._parts, []

    def third_is_nan(self: DistillTrainer, *args: Any) -> dict[str, torch.Tensor]:
        calls.append(args)
        found = parts(self, *args)
        return {name: loss * torch.nan for name, loss in found.items()} if len(calls) == 3 else found

    monkeypatch.setattr(DistillTrainer, "_parts", third_is_nan)
    monkeypatch.setitem(UNREAD, "cpu", unread)
    run = options(save_steps=5, logging_steps=100, eval_strategy="no")
    with pytest.raises(FloatingPointError, match=r"not finite at step 3 \(.*texts of the batch: \[\d+"):
        distill(DistillArguments(**run))
    assert len(calls) == steps
    assert not list(Path(run["output_dir"]).glob("checkpoint-*"))


def test_a_full_disk_leaves_the_last_checkpoint_whole(options: Options):
    run = options(max_steps=5)
    distill(DistillArguments(**run))
    before = (Path(run["output_dir"]) / "checkpoint-5" / "trainer_state.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files fail as on a full disk
    try:
        with pytest.raises(OSError, match=r"step 10 could not be written.*last whole one is .*checkpoint-5"):
            distill(DistillArguments(**{**run, "max_steps": 12}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in Path(run["output_dir"]).glob("checkpoint-*")] == ["checkpoint-5"]
    assert (Path(run["output_dir"]) / "checkpoint-5" / "trainer_state.json").read_bytes() == before
    distill(DistillArguments(**{**run, "max_steps": 12}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ""}, "teacher is not set"),
        ({"texts": []}, "texts and images are both empty"),
        ({"images": ["a"]}, "texts and images are both set"),
        ({"lr_halvings": -1}, "lr_halvings=-1"),
        ({"init": "random"}, "init='random' is not allowed: use 'rounded' or 'compensated'"),
        ({"gradual": 1.5}, "gradual=1.5"),
        ({"passage_words": [20, 10]}, "passage_words"),
        ({"layers_weight": 0.0, "embedding_weight": 0.0}, "one must be positive"),
        ({"gram_weight": -1.0}, "none negative"),
        ({"relation_weight": 1.0}, "relation_modules need each other"),
        ({"init": "compensated", "learned_scale": False}, "needs learned_scale"),
        ({"fixed_codes": True, "learned_scale": False}, "fixed_codes needs learned_scale"),
        ({"group_size": "row"}, "group_size='row'"),
        ({"group_size": "tensor"}, "group_size='tensor' needs learned_scale: false"),
        ({"lr_halvings": 2}, r"lr_halvings needs warmup_steps: 0, not 0\.05"),
        ({"texts": "corpus.jsonl"}, r"texts='corpus\.jsonl' is no list"),
        ({"layers": 3}, "layers=3 is no list"),
        ({"passage_words": 40}, "passage_words=40 is no list"),
        ({"calibration_texts": 0}, "calibration_texts=0"),
        ({"dense_texts": -1}, "dense_texts=-1"),
        ({"dense_texts": 9, "dense": False}, "dense_texts=9 is not allowed: use 0 or more, with dense: true"),
        ({"embedding_bits": 3}, "embedding_bits=3"),
        ({"layers": [7]}, "layers"),
        ({"per_device_train_batch_size": 16}, "give batch_tokens"),
    ],
)
def test_options_that_are_not_allowed(options: Options, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        distill(DistillArguments(**options(**changes)))


def test_a_place_that_the_model_cannot_be_saved_to_costs_no_training(options: Options):
    run = options()
    (Path(run["output_dir"]) / "model").mkdir(parents=True)
    (Path(run["output_dir"]) / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model is not empty and holds no model\. Fix"):
        distill(DistillArguments(**run))
    assert not list(Path(run["output_dir"]).glob("checkpoint-*"))
    assert not (Path(run["output_dir"]) / "log.jsonl").exists()
