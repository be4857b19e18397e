"""The commands of ``hf-ternary``. torch and the rest are imported inside them, so that ``--help`` is instant."""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .config import TernaryConfig
from .files import check_writable, is_ternary, library_class, model_folder, read_config, read_json
from .version import __version__

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

app = typer.Typer(
    help="Ternary-weight embedding models: make, look at, use, measure and share them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Texts that `quantize --texts` keeps, at most, to measure on.
SET_ASIDE = 100

out = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width to fold lines at
err = Console(stderr=True)


def _say(line: str) -> None:
    out.print(line, highlight=False, markup=False, soft_wrap=True)


def _show_version(value: bool) -> None:
    if value:
        _say(f"hf-ternary {__version__}")
        raise typer.Exit


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, or Hub id, of a ternary model.")]
Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda. (default: the best there is)")]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]
Input = Annotated[Path | None, typer.Option("--input", "-i", help="File with one text a line; - is standard input.")]


def _examples(*lines: str) -> str:
    # An empty line keeps rich from joining the lines.
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]$ hf-ternary {line}[/cyan]" for line in lines)])


@app.callback()
def _main(
    version: Version = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "quantize sentence-transformers/all-MiniLM-L6-v2 minilm-ternary --texts my_texts.jsonl",
        "quantize ./bge-large bge-large-ternary --group-size 64 --embedding-bits 8",
        "quantize ./vit vit-ternary --modules-to-not-convert '*layer*.0.*' --modules-to-not-convert '*.q*'",
    )
)
def quantize(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, or Hub id, of a full-precision model.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the ternary model; a model there is replaced.")],
    group_size: Annotated[str | None, typer.Option(help="Columns that share a scale, or 'tensor'. (default: a row)")] = None,
    weight_scheme: Annotated[str, typer.Option(help="optimal, the least-squares ternary, or absmean.")] = "optimal",
    activation: Annotated[str, typer.Option(help="int8, or none for floating-point activations.")] = "int8",
    embedding_bits: Annotated[str, typer.Option(help="Bits of the token table: 8, 4, 2, or none for float.")] = "4",
    position_bits: Annotated[str, typer.Option(help="Bits of the position table: 8, 4, 2, or none for float.")] = "8",
    embedding_group_size: Annotated[int | None, typer.Option(help="Columns of the token table that share a scale.")] = None,
    modules_to_not_convert: Annotated[
        list[str] | None,
        typer.Option(help="Module to keep in float; repeatable. none: convert all. (default: poolers, heads)"),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of SRC for the model card, if SRC is a folder.")] = None,
    texts: Annotated[
        str | None, typer.Option(help="Texts (.txt, .jsonl, ...) on which rounding errors are made up for.")
    ] = None,
    max_texts: Annotated[
        int,
        typer.Option(min=1, help="Of more texts, this many are drawn; more take longer and fit better."),
    ] = 1000,
    device: Annotated[
        str | None, typer.Option(help="Device for --texts, such as cpu or cuda. (default: the best there is)")
    ] = None,
) -> None:
    """Turn a model's weights into packed ternary ones, without training.

    SRC is any SentenceTransformer, CrossEncoder, SparseEncoder or transformers encoder; pooling and heads are kept. With
    --texts, for a SentenceTransformer, it takes minutes and the result is far better. A tenth of the texts, at most 100, is
    set aside to say how close it came.
    """
    config = TernaryConfig(
        group_size=_value(group_size),
        weight_scheme=weight_scheme,
        activation=_value(activation),
        embedding_bits=_value(embedding_bits),
        position_bits=_value(position_bits),
        embedding_group_size=embedding_group_size,
        modules_to_not_convert=[] if modules_to_not_convert == ["none"] else modules_to_not_convert or None,
    )
    with err.status(f"Reading {src}"):
        from .hub import check_target, save_pretrained
        from .info import read_info

        folder = model_folder(src, ["*.json"])
        if is_ternary(folder):
            raise ValueError(f"{src} is ternary already. Fix: give a full-precision model")
        _check_device(device)
        if folder.resolve() == dst.expanduser().resolve():
            raise ValueError(f"{dst} is the model to quantize. Fix: give another folder as DST")
        check_target(dst)
        kind = library_class(folder)
        if texts is not None and kind != "SentenceTransformer":
            raise ValueError(f"{src} is no SentenceTransformer ({kind or 'plain transformers'}). Fix: leave out --texts")
    unseen: list[str] = []
    if texts is not None:
        model, unseen = _calibrate(src, texts, max_texts, config, device)
    else:
        with err.status(f"Ternarizing {src}"):
            model = _load(src, config)
    with err.status(f"Saving {dst}"):
        save_pretrained(model, dst, _processor(src, model), base_model)
        info = read_info(dst)
    linears = sum(layer.kind == "linear" for layer in info.layers)
    _say(f"{dst}: {linears} ternary layers, {info.zeros:.1%} zeros, {_size(info)}")
    if unseen:
        with err.status("Comparing"):
            cosine = _agreement(model, src, unseen, device)
        _say(f"Mean cosine to {src} on {len(unseen)} texts that were set aside: {cosine:.3f}")


@app.command(epilog=_examples("info minilm-ternary", "info me/all-MiniLM-L6-v2-ternary"))
def info(model: Model) -> None:
    """Show what a ternary model consists of and what runs it here."""
    with err.status(f"Reading {model}"):
        from .encoder import explain
        from .info import read_info
        from .ops.backends import capabilities

        content = read_info(model_folder(model, ["*.json", "*.safetensors"]))
        machine = capabilities()
        loaded = _load(model, device="cpu")
        paths = explain(loaded)
        gpu_paths = explain(loaded.to("cuda")) if machine["gpus"] else {}
    kernel = {"linear": machine["backend"], "embedding": "torch"}
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    totals = {"zeros": f"{content.zeros:.1%}", "bytes": f"{content.bytes:,}"}
    for name, footer in {"kind": "", "bits": "", "shape": "", **totals}.items():
        table.add_column(name, footer, no_wrap=True, justify="left" if name == "kind" else "right")
    table.add_column("kernel", no_wrap=True)
    for layer in content.layers:
        zeros = "" if layer.zeros is None else f"{layer.zeros:.1%}"
        shape = "x".join(map(str, layer.shape))
        table.add_row(layer.name, layer.kind, str(layer.bits), shape, zeros, f"{layer.bytes:,}", kernel[layer.kind])
    rest = content.bytes - sum(layer.bytes for layer in content.layers)
    table.add_row(f"{len(content.float_tensors)} other tensors, headers", "float", "", "", "", f"{rest:,}", "torch")
    out.print(table)
    options = {key: value for key, value in content.config.to_dict().items() if value is not None}
    _say(", ".join(f"{key} {value}" for key, value in options.items()))
    _say(_size(content))
    _say(f"kernel {machine['backend']}: {machine['reason']}; usable here: {', '.join(machine['usable'])}")
    for where, found in (("", paths), ("on the GPU", gpu_paths)):
        for name, path in found.items():
            subject = f"{name} {where}".strip()
            _say(f"encoder {subject}{': ' if subject else ''}{path}")


@app.command(
    epilog=_examples(
        "encode minilm-ternary 'A sentence.' 'Another one.'",
        "encode minilm-ternary --input corpus.txt --output corpus.npy",
        "encode minilm-ternary --output queries.jsonl < queries.txt",
    )
)
def encode(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXTS", help="Texts. (default: those of --input)")] = None,
    input_file: Input = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help=".npy or .jsonl. (default: JSON lines)")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Name of one of the model's prompts, such as query.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 32,
    device: Device = None,
) -> None:
    """Embed texts, to a file or to standard output."""
    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise ValueError(f"--output {output} is neither .npy nor .jsonl. Fix: name the file so")
    if texts and input_file is not None:
        raise ValueError(f"both texts and --input {input_file} are given. Fix: give one of them")
    lines = texts or _read_texts(input_file or Path("-"))
    if output is not None:
        check_writable(output.parent)
    with err.status(f"Loading {model}"):
        embedder = _load(model, device=device)
        if not hasattr(embedder, "encode"):
            raise ValueError(
                f"{model} is a {type(embedder).__name__}, which embeds no texts. Fix: give a SentenceTransformer"
            )
    embeddings = _encode(embedder, lines, batch_size, prompt_name)
    if output is None:
        sys.stdout.writelines(_json_lines(lines, embeddings))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    try:
        _write(partial, output.suffix, lines, embeddings)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    _say(f"{output}: {len(embeddings)} embeddings of {embeddings.shape[1]} dimensions")


@app.command(epilog=_examples("bench minilm-ternary", "bench minilm-ternary --no-baseline --threads 1 --input corpus.txt"))
def bench(
    model: Model,
    baseline: Annotated[bool, typer.Option(help="Measure the same model in dequantized float32 beside it.")] = True,
    input_file: Input = None,
    rounds: Annotated[int, typer.Option(min=5, help="Alternating rounds; the median counts.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in a forward pass.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. (default: torch's)")] = None,
    device: Device = None,
) -> None:
    """Measure the latency of one text and the throughput of many, tokenizer included."""
    import torch

    lines = _read_texts(input_file) if input_file else _sample_texts()
    if threads:
        torch.set_num_threads(threads)
    with err.status(f"Loading {model}"):
        read_config(model_folder(model, ["*.json"]))  # a float model has nothing to compare
        models = {"ternary": _load(model, device=device)}
        if baseline:
            models["float32, dequantized"] = _dequantized(_load(model, device=device))
        embed = {name: _embedder(loaded, batch_size) for name, loaded in models.items()}
        tokens = _count_tokens(models["ternary"], lines)
        for run in embed.values():
            run(lines[:batch_size])
    latency: dict[str, list[float]] = {name: [] for name in embed}
    total: dict[str, list[float]] = {name: [] for name in embed}
    for _ in track(range(rounds), "Measuring", console=err, transient=True, disable=not err.is_terminal):
        for name, run in embed.items():
            latency[name] += [_seconds(run, [line]) for line in lines[:20]]
            total[name].append(_seconds(run, lines))
    table = Table("model", "one text, ms", "texts/s", "tokens/s", "speed-up")
    reference = statistics.median(list(total.values())[-1])
    for name in embed:
        seconds = statistics.median(total[name])
        table.add_row(
            name,
            f"{1000 * statistics.median(latency[name]):.2f}",
            f"{len(lines) / seconds:,.0f}",
            f"{tokens / seconds:,.0f}",
            f"{reference / seconds:.2f}x" if baseline else "",
        )
    out.print(table)
    setting = f"batches of {batch_size}, {torch.get_num_threads()} threads, median of {rounds} rounds"
    _say(f"{len(lines)} texts, {tokens} tokens, {setting}")


@app.command(epilog=_examples("push minilm-ternary me/all-MiniLM-L6-v2-ternary", "push minilm-ternary me/minilm --private"))
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a ternary model.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, user/name; made if there is none.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
) -> None:
    """Upload a ternary model to the Hub. The token is that of `hf auth login`, or HF_TOKEN."""
    with err.status(f"Uploading {folder} to {repo}"):
        from .hub import push_to_hub

        url = push_to_hub(folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    _say(url)


def _value(text: str | None) -> Any:
    """An option's value as TernaryConfig wants it, which also checks it: a whole number, None for none, or the text."""
    if text is None or text == "none":
        return None
    return int(text) if text.removeprefix("-").isdigit() else text


def _dequantized(model: "nn.Module") -> "nn.Module":
    for module in list(model.modules()):
        if getattr(module, "hf_quantizer", None) is not None:
            module.dequantize()  # type: ignore[operator]
    return model


def _load(model: str, config: TernaryConfig | None = None, device: str | None = None) -> "nn.Module":
    """The model, of the class that its files name."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = model_folder(model, ["*.json"])
    _check_device(device)
    # float32: what the CPU's kernels read, whatever the checkpoint was saved in
    options: dict[str, Any] = {"quantization_config": config, "dtype": "float32"} if config else {}
    name = library_class(folder)
    if name is None and config:  # to be saved again: keep the model's own class and head
        import transformers

        architecture = (read_json(folder / "config.json").get("architectures") or ["AutoModel"])[0]
        return getattr(transformers, architecture, transformers.AutoModel).from_pretrained(model, **options)
    import sentence_transformers

    return getattr(sentence_transformers, name or "SentenceTransformer")(model, device=device, model_kwargs=options)


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name; not built in, or none here
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {device} cannot be used here. Fix: use one of {', '.join(known)}") from error


def _calibrate(src: str, source: str, most: int, config: TernaryConfig, device: str | None) -> tuple[Any, list[str]]:
    """The model, and texts that it has not seen."""
    from .distill.calibrate import calibrate
    from .distill.texts import read_texts

    texts = read_texts(source)
    random.Random(0).shuffle(texts)
    aside = min(len(texts) // 10, SET_ASIDE)
    return calibrate(src, texts[aside:][:most], config, device), texts[:aside]


def _agreement(model: Any, src: str, texts: list[str], device: str | None) -> float | None:
    from .evaluation.fidelity import fidelity

    original: Any = _load(src, device=device)
    return fidelity(model.encode(texts), original.encode(texts))["cosine"]


def _processor(src: str, model: "nn.Module") -> Any:
    """Tokenizer or image processor to save with a plain transformers model; None if it has none or saves its own."""
    from transformers import AutoProcessor, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return AutoProcessor.from_pretrained(src)
    except (OSError, ValueError):
        return None


def _read_stdin() -> str:
    return "" if sys.stdin.isatty() else sys.stdin.read()


def _read_texts(path: Path) -> list[str]:
    content = _read_stdin() if str(path) == "-" else path.read_text(encoding="utf-8")
    content = content.removeprefix("\ufeff")  # a byte order mark
    lines = content.removesuffix("\n").split("\n") if content else []  # splitlines() also splits at U+2028 and others
    if not lines:
        raise ValueError("there is no text. Fix: give texts as arguments, in the file of --input or on standard input")
    return lines


def _encode(model: Any, texts: Sequence[str], batch_size: int, prompt_name: str | None) -> "np.ndarray":
    """float32 ``[texts, dimensions]``."""
    import numpy as np

    options = {"convert_to_sparse_tensor": False} if type(model).__name__ == "SparseEncoder" else {}
    step = 16 * batch_size
    parts = []
    for start in track(range(0, len(texts), step), "Encoding", console=err, transient=True, disable=not err.is_terminal):
        chunk = list(texts[start : start + step])
        part = model.encode(
            chunk, batch_size=batch_size, prompt_name=prompt_name, convert_to_tensor=True, show_progress_bar=False, **options
        )
        parts.append(part.float().cpu().numpy())
    embeddings = np.concatenate(parts)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise ValueError(
            f"the embedding of text {bad[0] + 1} is not finite: the model is damaged. Fix: save or download it again"
        )
    return embeddings


def _json_lines(texts: Sequence[str], embeddings: "np.ndarray") -> list[str]:
    rows = zip(texts, embeddings.tolist(), strict=True)
    return [json.dumps({"text": text, "embedding": row}, ensure_ascii=False) + "\n" for text, row in rows]


def _write(path: Path, suffix: str, texts: Sequence[str], embeddings: "np.ndarray") -> None:
    import numpy as np

    with path.open("wb") as file:
        if suffix == ".npy":
            np.save(file, embeddings)
        else:
            file.writelines(line.encode() for line in _json_lines(texts, embeddings))


def _embedder(model: Any, batch_size: int) -> Callable[[list[str]], Any]:
    options = {"batch_size": batch_size, "show_progress_bar": False}
    if hasattr(model, "encode"):
        return lambda texts: model.encode(texts, **options)
    return lambda texts: model.predict([(text, text) for text in texts], **options)


def _count_tokens(model: Any, texts: list[str]) -> int:
    if model.tokenizer is None:
        raise ValueError("the model embeds no texts. Fix: give one that does")
    pairs = {} if hasattr(model, "encode") else {"text_pair": texts}
    limit = model.max_seq_length if hasattr(model, "max_seq_length") else model.max_length  # CrossEncoder before version 6
    ids = model.tokenizer(texts, **pairs, truncation=True, max_length=min(limit, 2**31))["input_ids"]
    return sum(map(len, ids))


def _sample_texts(count: int = 256) -> list[str]:
    """Nonsense sentences of 5 to 30 words, always the same."""
    words = ["a", "small", "river", "old", "light", "runs", "over", "the", "city", "with", "green", "trees", "and", "people"]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(5, 30))) + "." for _ in range(count)]


def _seconds(run: Callable[[list[str]], Any], texts: list[str]) -> float:
    start = time.perf_counter()
    run(texts)
    return time.perf_counter() - start


def _size(info: Any) -> str:
    return f"{info.bytes / 1e6:.2f} MB, {info.bytes / info.float32_bytes:.3f} of float32's {info.float32_bytes / 1e6:.2f} MB"
