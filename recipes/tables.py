"""Writes the tables of the documentation from recipes/results/*.json: no published number is typed by hand.

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
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "recipes" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], note: str) -> str:
    """A table whose first column is text and whose others are numbers, and the line below it."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note}\n"


def setting(result: dict[str, Any]) -> str:
    """Where a result was measured."""
    hardware, versions = result["hardware"], result["versions"]
    return f"{hardware['cpu']}, torch {versions['torch']}, hf_ternary {versions['hf_ternary']}, {result['date'][:10]}"


def summary() -> str:
    """Size and quality of the published model beside its teacher."""
    student = results("eval-all-MiniLM-L6-v2-ternary")
    sizes = results("eval-all-MiniLM-L6-v2")["weights"]["bytes"], student["weights"]["bytes"]
    kinds = student["summary"]
    rows = [
        ["all-MiniLM-L6-v2, float32", f"{sizes[0] / 1e6:.1f} MB", *(f"{100 * k['baseline']:.1f}" for k in kinds.values())],
        ["ternary, distilled", f"{sizes[1] / 1e6:.1f} MB", *(f"{100 * k['score']:.1f}" for k in kinds.values())],
        ["kept", f"{sizes[1] / sizes[0]:.3f}x", *(f"{100 * k['retention']:.1f} %" for k in kinds.values())],
    ]
    note = f"Mean score of {kinds['all']['tasks']} tasks by MTEB's protocols, {setting(student)}."
    return markdown(["", "weights", *(f"{name} ({k['tasks']})" for name, k in kinds.items())], rows, note)


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


def ablation() -> str:
    """One row a change to the recipe, same budget and seed."""
    runs = {path.stem: results(path.stem) for path in sorted((ROOT / "recipes" / "results").glob("ablation-*.json"))}
    rows = [
        [
            run["ablation"],
            f"{run['curve'][0]['eval_cosine']:.3f}",
            f"{run['fidelity']['eval_cosine']:.3f}",
            f"[json](results/{name}.json)",
        ]
        for name, run in sorted(runs.items(), key=lambda item: item[1]["fidelity"]["eval_cosine"])
    ]
    run = next(iter(runs.values()))
    note = f"{run['steps']} steps, {run['tokens']:,} tokens, seed {run['seed']}, {setting(run)}."
    return markdown(["run", "cosine at the start", "cosine at the end", ""], rows, note)


def distill_step() -> str:
    """Tokens a second of one training step, each row with one more change."""
    result = results("distill-step")
    rows = [[name, f"{speed:,.0f}"] for name, speed in result["tokens_per_second"].items()]
    note = f"{result['texts']} texts of {result['tokens']} tokens, {result['threads']} thread, {setting(result)}."
    return markdown(["step", "tokens a second"], rows, note)


TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (summary, kernels, ablation, distill_step)}


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
