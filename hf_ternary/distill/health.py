"""Is the run healthy? Share of zeros, flips a step and drift of the scales by layer, and the plot of a finished run."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .student import ternary_layers


class Health(TrainerCallback):
    """Watches the ternary layers at every logging step; :meth:`metrics` is what was seen last.

    * ``zeros``: share of the codes that are 0. A third to a half is usual; near 1 the layer is dying.
    * ``flips``: share of the codes that the step changed. It should fall with the learning rate.
    * ``drift``: mean of ``|scale / first scale - 1|``; the first is that of plain rounding, or of ``student``.
    """

    def __init__(self, student: nn.Module) -> None:
        self.layers = ternary_layers(student)
        self.first = {name: layer.scale().detach().clone() for name, layer in self.layers.items()}
        self._before: dict[str, torch.Tensor] = {}
        self._flips: dict[str, float] = {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (state.global_step + 1) % state.logging_steps == 0:
            self._before = {name: layer.codes() for name, layer in self.layers.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._before:
            self._flips = {
                name: (layer.codes() != self._before[name]).float().mean().item() for name, layer in self.layers.items()
            }
            self._before = {}

    def metrics(self) -> dict[str, float]:
        """``zeros/LAYER``, ``flips/LAYER``, ``drift/LAYER`` and their means over the layers, ``zeros`` and so on."""
        values: dict[str, dict[str, float]] = {
            "zeros": {name: (layer.codes() == 0).float().mean().item() for name, layer in self.layers.items()},
            "flips": self._flips,
            "drift": {
                name: (layer.scale().detach() / self.first[name].to(layer.weight.device).clamp_min(1e-12) - 1)
                .abs()
                .mean()
                .item()
                for name, layer in self.layers.items()
            },
        }
        means = {kind: sum(by_layer.values()) / len(by_layer) for kind, by_layer in values.items() if by_layer}
        return means | {f"{kind}/{name}": v for kind, by_layer in values.items() for name, v in by_layer.items()}


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    """The trainer's log as JSON lines, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    partial.replace(path)


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Fidelity, loss parts, zeros, flips, drift and speed over the steps, as a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = (
        ("fidelity", [k for k in _keys(history) if k.startswith("eval_cosine")]),
        ("loss parts", [k for k in _keys(history) if k.startswith("loss_")]),
        ("share of zeros by layer", [k for k in _keys(history) if k.startswith("zeros/")]),
        ("flips a step by layer", [k for k in _keys(history) if k.startswith("flips/")]),
        ("scale drift by layer", [k for k in _keys(history) if k.startswith("drift/")]),
        ("tokens a second", ["tokens_per_second"]),
    )
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            axes.plot(*zip(*points, strict=True), label=key, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("step")
        if 1 < len(keys) <= 8:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def _keys(history: list[dict[str, Any]]) -> list[str]:
    return sorted({key for entry in history for key in entry})
