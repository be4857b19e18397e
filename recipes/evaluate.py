"""Evaluate a model, and how much of a baseline's quality it keeps.

    python recipes/evaluate.py MODEL --baseline TEACHER --tasks STSBenchmark --tasks SciFact
    python recipes/evaluate.py MODEL --baseline teacher.json --data DIR --output results.json
    python recipes/evaluate.py TEACHER --onnx int8.onnx --baseline teacher.json --data DIR    # an export of the teacher

MODEL and TEACHER are Hub ids or folders of any SentenceTransformer, of texts or images, ternary or not. What DIR must hold
is said in `hf_ternary.evaluation.tasks`. A baseline measured before is given as its results JSON.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers.modeling_outputs import BaseModelOutput

from errors import one_line_errors
from hf_ternary.distill.student import transformer_of
from hf_ternary.evaluation.encoder import CachedEncoder
from hf_ternary.evaluation.fidelity import fidelity
from hf_ternary.evaluation.files import read_texts
from hf_ternary.evaluation.report import add_fidelity, check_baseline, compare, evaluate, read_baseline, summarize, table
from hf_ternary.evaluation.tasks import SEED, local_tasks, mteb_tasks
from hf_ternary.provenance import provenance, weights, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=(__doc__ or "").split("\n\n")[0])
@one_line_errors()
def main(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a SentenceTransformer")],
    baseline: Annotated[str | None, typer.Option(help="teacher to compare with, or the results JSON of its run")] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="ONNX export of MODEL's transformer, to be run in its place", exists=True, dir_okay=False),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="an MTEB task, or one of --data's folders; repeatable")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of local tasks")] = None,
    split: Annotated[str | None, typer.Option(help="split of local tasks (default: test, else dev)")] = None,
    languages: Annotated[list[str] | None, typer.Option(help="ISO 639-3 language of MTEB tasks (default: all)")] = None,
    texts: Annotated[Path | None, typer.Option(help="txt, or jsonl with `text`, for fidelity to the baseline")] = None,
    output: Annotated[Path | None, typer.Option(help="results JSON to write")] = None,
    name: Annotated[str | None, typer.Option(help="model's name in the results (default: id or folder name)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts or images a forward pass")] = 64,
    seed: Annotated[int, typer.Option(help="of the draws of local tasks and of fidelity")] = SEED,
) -> None:
    if data is None and not tasks:
        raise ValueError("nothing to evaluate; pass --data, --tasks or both")
    if texts and (baseline is None or baseline.endswith(".json")):
        raise ValueError("--texts compares embeddings, so it needs --baseline as a model")

    def new_tasks() -> list[Any]:
        return local_tasks(data, tasks, split, seed) if data else mteb_tasks(tasks or [], languages)

    # What can be wrong is found before hours of work, not after.
    checked = new_tasks()
    lines = read_texts(texts) if texts else []
    earlier = read_baseline(baseline) if baseline and baseline.endswith(".json") else None
    if earlier:
        check_baseline(earlier, checked, languages=languages, **({"seed": seed} if data else {}))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)

    student = CachedEncoder(run_by_onnx(SentenceTransformer(model), onnx) if onnx else SentenceTransformer(model))
    teacher = CachedEncoder(SentenceTransformer(baseline)) if baseline and not earlier else None
    baseline_weights = weights(baseline) if baseline and teacher else {}
    report: dict[str, Any] = {
        "model": name or (onnx.name if onnx else _label(model)),
        "max_seq_length": student.max_seq_length,
        "batch_size": batch_size,
        "weights": weights(onnx or model),
        **({"languages": languages} if languages else {}),
    }
    scores = evaluate(student, checked, batch_size)
    if earlier:
        scores = compare(scores, earlier["scores"])
        report |= {"baseline": earlier["model"], "baseline_weights": earlier["weights"]}
    if teacher and baseline:
        scores = compare(scores, evaluate(teacher, new_tasks(), batch_size))
        scores = add_fidelity(scores, student, teacher, seed)
        report |= {"baseline": _label(baseline), "baseline_weights": baseline_weights}
        if texts:
            vectors = [encoder.model.encode(lines, batch_size=batch_size) for encoder in (student, teacher)]
            report["fidelity"] = {"file": texts.name, **fidelity(*vectors, seed)}
    report |= {"scores": scores, "summary": summarize(scores), **provenance(seed)}
    Console().print(table(report))
    if "fidelity" in report:
        Console().print(f"fidelity: {report['fidelity']}")
    if output:
        write_json(output, report)


def run_by_onnx(model: SentenceTransformer, file: Path) -> SentenceTransformer:
    """Let ONNX Runtime compute the last hidden state, on the CPU; sentence-transformers' own way to it needs transformers 4.

    Raises:
        ValueError: not an ONNX file, or it wants inputs that the model's tokenizer does not give.
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('--onnx needs onnxruntime; install it with: pip install "hf_ternary[bench]"') from error
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes of errors are not public, and have no common one
        raise ValueError(f"ONNX Runtime cannot load {file}: {error}") from error
    names = [node.name for node in session.get_inputs()]

    def forward(**inputs: Any) -> BaseModelOutput:
        if missing := [name for name in names if name not in inputs]:
            raise ValueError(f"{file} wants {', '.join(missing)}, which the tokenizer of this model does not give")
        states, *_ = session.run(None, {name: inputs[name].numpy() for name in names})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(states))

    model = model.to("cpu")
    transformer_of(model).forward = forward
    return model


def _label(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


if __name__ == "__main__":
    app()
