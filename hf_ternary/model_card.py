"""The card (README.md) of a ternary model on the Hub: what it is, how small, how to use it, how good, and where from.

Every number comes from the model's own files or from a results JSON that was measured on just these files.
"""

import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from .files import library_class, read_json
from .info import read_info
from .provenance import weights

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
TAGS = ["ternary", "1.58-bit"]
PLACEHOLDER = "path/to/model"  # what the usage example calls a model that is in no repository yet
PATIENCE = 5.0  # seconds to wait for the Hub to answer

# class of sentence-transformers -> (the Hub's task, what to do with `model`)
_SENTENCE_TRANSFORMERS = {
    "SentenceTransformer": ("sentence-similarity", 'embeddings = model.encode(["A sentence.", "Another one."])'),
    "CrossEncoder": ("text-ranking", 'scores = model.predict([("A question?", "An answer.")])'),
    "SparseEncoder": ("feature-extraction", 'embeddings = model.encode(["A sentence.", "Another one."])'),
}
_IMAGES = 'embeddings = model.encode(["one.jpg", "another.jpg"])'  # paths: of these a photograph is turned upright
_TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


def set_repo_id(readme: Path, repo_id: str) -> None:
    """Name the repository in the usage example of a card that :func:`create` made."""
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        readme.write_text(text.replace(f'"{PLACEHOLDER}"', f'"{repo_id}"'), encoding="utf-8")


def create(
    folder: Path,
    name: str,
    base_model: str | None = None,
    source: str | None = None,
    results: str | Path | None = None,
    training: str | Path | dict[str, Any] | None = None,
    token: str | bool | None = None,
) -> ModelCard:
    """The card of the packed model in ``folder``; nothing is written.

    Args:
        folder: a saved ternary model.
        name: its name, the heading of the card.
        base_model: Hub id of the full-precision model; by default what the card of ``source`` names, if that is ternary, or
            ``source`` itself, if it is on the Hub.
        source: folder or Hub id that the weights were loaded from; its card, or else the base model's, gives license and
            language. If it holds these very ternary weights its card stays as it is.
        results: JSON written by ``recipes/evaluate.py`` for this model; without it the card claims no quality.
        training: ``summary.json`` of the distillation that made this model, or its content.
        token: with which the cards of ``source`` and ``base_model`` are looked up on the Hub.

    Raises:
        ValueError: no ternary model, a malformed ``base_model``, or results or a training of other weights.
    """
    if base_model is not None:
        validate_repo_id(base_model)
    info, sha256 = read_info(folder), weights(folder)["sha256"]
    parent = next((card for origin in (source, base_model) if origin and (card := load_card(origin, token))), None)
    inherited = parent.data.to_dict() if parent else {}
    if parent and set(TAGS) <= set(inherited.get("tags") or []):
        if results is None and training is None and sha256 in parent.text:
            return parent
        base_model = base_model or inherited.get("base_model")
    else:
        base_model = base_model or _hub_id(source)
    report = None if results is None else _read_results(Path(results), sha256)
    runs = [] if training is None else _training_runs(training, sha256)
    sentence_class = library_class(folder)
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    of_images = "image_size" in config and "vocab_size" not in config
    data = ModelCardData(
        model_name=name if report else None,
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="sentence-transformers" if sentence_class else "transformers",
        pipeline_tag=_task(sentence_class, architecture, of_images),
        tags=TAGS,
        eval_results=_eval_results(report) if report else None,
        **{key: inherited[key] for key in ("language", "license", "license_name", "license_link") if key in inherited},
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        info=info,
        config=info.config,
        of_images=of_images,
        snippet=_snippet(sentence_class, architecture, of_images),
        results=report,
        runs=runs,
        sources={(source["source"], source.get("sha256")): source for run in runs for source in run["sources"]}.values(),
        sha256=sha256,
        dense=_dense(folder),
    )


def load_card(model: str, token: str | bool | None = None) -> ModelCard | None:
    """The card of a model folder or of a model on the Hub; None if it has none or cannot be reached or read."""
    try:
        return ModelCard.load(Path(model) / "README.md" if Path(model).is_dir() else _download_card(model, token))
    except Exception as error:  # best effort, whatever it is: a card must not cost the model that is being saved
        logger.info("The card of %s is not read: %r", model, error)
        return None


def _download_card(model: str, token: str | bool | None) -> str:
    try:  # hf_hub_download alone tries for half a minute where there is no network
        get_hf_file_metadata(hf_hub_url(model, constants.REPOCARD_NAME), token=token, timeout=PATIENCE)
        only_cached = False
    except Exception as error:
        logger.info("The Hub gives no card of %s: %r", model, error)
        only_cached = True
    return hf_hub_download(model, constants.REPOCARD_NAME, token=token, local_files_only=only_cached)


def _hub_id(source: str | None) -> str | None:
    """``source`` if it is a model on the Hub, which was downloaded then, in any revision, and not a path."""
    if source is None:
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "snapshots"
    return source if any(snapshots.glob("*/config.json")) else None


def _dense(folder: Path) -> str | None:
    """The shapes of the Dense modules behind a sentence-transformers model's pooling."""
    modules = read_json(folder / "modules.json", [])
    found = [read_json(folder / m["path"] / "config.json") for m in modules if m["type"].endswith(".Dense")]
    return ", ".join(f"{dense['in_features']} x {dense['out_features']}" for dense in found) or None


def _task(sentence_class: str | None, architecture: str, of_images: bool) -> str:
    default = "image-feature-extraction" if of_images else "feature-extraction"
    if sentence_class and not of_images:
        return _SENTENCE_TRANSFORMERS.get(sentence_class, (default, ""))[0]
    return next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), default)


def _snippet(name: str | None, architecture: str, of_images: bool) -> str:
    if name:
        use = _IMAGES if of_images else _SENTENCE_TRANSFORMERS.get(name, ("", ""))[1]
        return f'from sentence_transformers import {name}\n\nmodel = {name}("{PLACEHOLDER}")\n{use}'.rstrip()
    return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{PLACEHOLDER}")'


def _read_results(path: Path, sha256: str) -> dict[str, Any]:
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not report.get("scores"):
        raise ValueError(f"{path} holds no scores. Fix: give a results JSON written by recipes/evaluate.py")
    if (report.get("weights") or {}).get("sha256") != sha256:
        raise ValueError(
            f"{path} was measured on other weights than these (SHA-256 {sha256}). Fix: evaluate the saved model with "
            "recipes/evaluate.py, or leave the results out"
        )
    return report


def _training_runs(training: str | Path | dict[str, Any], sha256: str) -> list[dict[str, Any]]:
    """Summaries of the runs that made the weights, the first one first."""
    if isinstance(training, dict):
        last = training
    else:
        last = read_json(Path(training))
        if not last.get("sources"):
            raise ValueError(f"{training} tells of no training. Fix: give the summary.json that recipes/distill.py wrote")
        if (last.get("weights") or {}).get("sha256") != sha256:
            raise ValueError(
                f"{training} tells of the training of other weights than these (SHA-256 {sha256}). Fix: give the one beside "
                "the model, or leave it out"
            )
    return [*last.get("earlier", []), last]


def _eval_results(report: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=row["type"],
            dataset_type=row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"],
            metric_value=row["score"],
        )
        for row in report["scores"]
    ]
