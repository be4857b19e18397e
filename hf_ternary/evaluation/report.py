"""One evaluation: run the tasks, compare with the baseline, and show it as a table."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import AbsTask
from rich.table import Table

from .encoder import CachedEncoder
from .fidelity import fidelity
from .files import read_object

Score = dict[str, Any]

# Options of tasks that are measured on random draws.
DRAWS = ("samples_per_label", "n_experiments")


def evaluate(encoder: CachedEncoder, tasks: Sequence[AbsTask], batch_size: int = 64, progress: bool = True) -> list[Score]:
    """Scores of a model on tasks, one record a task.

    Args:
        encoder: the model.
        tasks: new task objects, from `local_tasks` or `mteb_tasks`.
        batch_size: texts or images a forward pass.
        progress: show progress bars.

    Returns:
        Records of `task`, `type`, `metric`, `score` (in [0, 1]), `splits`, `revision` of the data and `seconds`; for
        classification, regression and clustering also `std`, over the draws.

    Raises:
        ValueError: an embedding or a score is not finite.
    """
    return [_evaluate_task(encoder, task, batch_size, progress) for task in tasks]


def compare(scores: list[Score], baseline: list[Score]) -> list[Score]:
    """The scores with `baseline` and `retention` (score / baseline) beside each.

    Raises:
        ValueError: a task is missing in the baseline, was run on other data or otherwise, or its score is not positive.
    """
    return [{**record, **_retention(record, _same_task(baseline, record))} for record in scores]


def check_baseline(report: dict[str, Any], tasks: Sequence[AbsTask], **settings: Any) -> None:
    """Raise a ValueError if the tasks, or one of `settings` by name, are others than those of the baseline's report."""
    for name, value in settings.items():
        if report.get(name) != value:
            raise ValueError(
                f"the baseline was measured with {name} {report.get(name)}, not {value}; run it again or give the same"
            )
    for task in tasks:
        _same_task(report["scores"], _protocol(task, list(task.eval_splits)))


def add_fidelity(scores: list[Score], student: CachedEncoder, teacher: CachedEncoder, seed: int) -> list[Score]:
    """The scores with the fidelity to the teacher on each task's distinct texts; both models must have run the tasks."""
    return [
        {**record, "fidelity": fidelity(student.embeddings(record["task"]), teacher.embeddings(record["task"]), seed)}
        for record in scores
    ]


def summarize(scores: list[Score]) -> dict[str, dict[str, float]]:
    """Means of score, baseline and retention by task type, and over all tasks as `all`; each task counts once."""
    groups: dict[str, list[Score]] = defaultdict(list)
    for record in scores:
        groups[record["type"]].append(record)
    groups["all"] = scores
    keys = [key for key in ("score", "baseline", "retention") if key in scores[0]]
    return {name: {"tasks": len(group), **{k: fmean(r[k] for r in group) for k in keys}} for name, group in groups.items()}


def read_baseline(path: str | Path) -> dict[str, Any]:
    """A results JSON of an earlier run of the baseline.

    Raises:
        ValueError: the file holds no scores.
    """
    report = read_object(Path(path).read_text(encoding="utf-8"), str(path))
    if not report.get("scores"):
        raise ValueError(f"{path} holds no scores; pass a results JSON of this recipe, or a model")
    return report


def table(report: dict[str, Any]) -> Table:
    """The report as one table: tasks grouped by type, each group with its mean. Scores in per cent."""
    columns: list[tuple[str, Callable[[Score], float | None], str]] = [
        ("baseline", lambda r: r.get("baseline"), "{:.2%}"),
        ("model", lambda r: r["score"], "{:.2%}"),
        ("retention", lambda r: r.get("retention"), "{:.1%}"),
        ("cosine", lambda r: r.get("fidelity", {}).get("cosine"), "{:.3f}"),
        ("overlap@10", lambda r: r.get("fidelity", {}).get("overlap_at_10"), "{:.3f}"),
    ]
    shown = [c for c in columns if any(c[1](record) is not None for record in report["scores"])]
    against = f" against {report['baseline']}" if "baseline" in report else ""
    result = Table("task", "type", "metric", title=report["model"] + against)
    for header, *_ in shown:
        result.add_column(header, justify="right")

    def add(names: tuple[str, str, str], record: Score, **style: Any) -> None:
        values = ((pick(record), form) for _, pick, form in shown)
        result.add_row(*names, *("" if value is None else form.format(value) for value, form in values), **style)

    for kind, mean in report["summary"].items():
        records = [record for record in report["scores"] if record["type"] == kind]
        for record in records:
            add((record["task"], kind, record["metric"]), record)
        if mean["tasks"] > 1:
            add((f"mean of {mean['tasks']}", kind, ""), mean, style="bold")
        result.add_section()
    return result


def _evaluate_task(encoder: CachedEncoder, task: AbsTask, batch_size: int, progress: bool) -> Score:
    outcome = mteb.evaluate(
        encoder,
        task,
        cache=None,  # mteb's own cache is by model name, and a model in training keeps its name
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": progress},
        show_progress_bar=False,
    )
    if outcome.exceptions:
        raise ValueError(f"task {task.metadata.name}: {outcome.exceptions[0].exception}")
    result: Any = outcome.task_results[0]
    record: Score = {
        **_protocol(task, list(result.scores)),
        "type": task.metadata.type,
        "metric": task.metadata.main_score,
        "score": float(result.get_score()),
        **_std(result, task.metadata.main_score),
        "seconds": round(result.evaluation_time, 1),
    }
    if not np.isfinite(record["score"]):
        raise ValueError(f"task {record['task']}: {record['metric']} is not a number; are all embeddings equal?")
    return record


def _std(result: Any, metric: str) -> dict[str, float]:
    """Standard deviation of ``metric`` over the draws, where mteb reports it and there is one split in one language."""
    (scores, *others), *more = result.scores.values()
    if others or more:
        return {}
    if f"{metric}_std" in scores:
        return {"std": scores[f"{metric}_std"]}
    draws = [draw.get(metric) for draw in scores.get("scores_per_experiment", ())]
    return {"std": float(np.std(draws))} if draws and None not in draws else {}


def _protocol(task: AbsTask, splits: list[str]) -> Score:
    """What two runs of a task must have in common."""
    options = {name: getattr(task, name) for name in DRAWS if hasattr(task, name)}
    return {"task": task.metadata.name, "revision": task.metadata.revision, "splits": sorted(splits), **options}


def _same_task(baseline: list[Score], record: Score) -> Score:
    name = record["task"]
    found = next((r for r in baseline if r["task"] == name), None)
    if found is None:
        raise ValueError(f"the baseline lacks task {name!r}; it has {', '.join(r['task'] for r in baseline)}")
    if found["revision"] != record["revision"]:
        raise ValueError(f"task {name!r}: the baseline was measured on other data; run it again")
    for key in ("splits", *DRAWS):
        if found.get(key) != record.get(key):
            raise ValueError(f"task {name!r}: the baseline has {key} {found.get(key)}, not {record.get(key)}; run it again")
    return found


def _retention(record: Score, baseline: Score) -> dict[str, float]:
    before = baseline["score"]
    if before <= 0:
        raise ValueError(f"task {record['task']!r}: the baseline scores {before:.4f}; retention needs a positive score")
    return {"baseline": before, "retention": record["score"] / before}
