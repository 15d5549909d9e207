"""Draw a run, or compare several, from what train_glue.py left in their folders.

    python notebooks/plot_run.py runs/stsb-dora-1                    # runs/stsb-dora-1/run.png
    python notebooks/plot_run.py runs/stsb-dora-1 runs/stsb-lora-1   # runs/stsb-dora-1/compare.png

The picture shows the training loss and the penalty, the score on dev, the live components and their
parameters beside the budget, and when each matrix lost its components. It needs matplotlib
(notebooks/requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import TASKS  # noqa: E402
from dora import DoRAConfig, budget, phases  # noqa: E402

COLORS = ("#1f5fa8", "#c8501e", "#3a8a3a", "#7d3f98", "#946b2d", "#444444")
SHARE = 20  # the running mean of the loss is over a twentieth of the lines of metrics.jsonl


class Saved(NamedTuple):
    """What a run left."""

    name: str
    config: dict[str, Any]
    steps: list[dict[str, Any]]  # lines of metrics.jsonl about steps
    dev: list[dict[str, Any]]  # and about evaluations
    costs: dict[str, int]  # of ranks.jsonl: matrix -> parameters per component; {} = no adapter
    history: list[dict[str, Any]]  # its lines: step, live components per matrix
    total: int  # steps of the whole run

    def settings(self) -> DoRAConfig:
        """Return the settings of the method."""
        names = DoRAConfig.__dataclass_fields__
        return DoRAConfig(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in self.config.items() if name in names})


class NotARun(Exception):
    """A folder that train_glue.py has not filled."""


def read_run(folder: Path) -> Saved:
    """Return what a run left. Raises NotARun."""
    if not (folder / "config.json").exists() and (folder / "adapted").is_dir():
        folder = folder / "adapted"  # the toy's run on its adaptation task
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = read_lines(folder / "metrics.jsonl")
        history = read_lines(folder / "ranks.jsonl")
        total = json.loads((folder / "run.json").read_text())["steps"]
        steps = [line for line in lines if "loss" in line]
        if not steps:
            raise NotARun(f"{folder} has no step in its metrics.jsonl yet")
        costs = history.pop(0)["parameters per component"] if history else {}
        name = f"{config['task']}, {config['method']}, seed {config['seed']}"
        return Saved(name, config, steps, [line for line in lines if "loss" not in line],
                     costs, history, total)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotARun(f"{folder} is not the folder of a run of train_glue.py ({error})")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines; [] for a ranks.jsonl that a run does not have.
    A last line that is being written is left out."""
    if path.name == "ranks.jsonl" and not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to window - 1 before it."""
    return [statistics.fmean(values[max(0, i + 1 - window):i + 1]) for i in range(len(values))]


def draw_loss(axis: Any, runs: list[Saved]) -> None:
    """Draw the loss of each line of metrics.jsonl, its running mean, and the penalty."""
    penalty = axis.twinx()
    for run, color in zip(runs, COLORS):
        x, y = [line["step"] for line in run.steps], [line["loss"] for line in run.steps]
        axis.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(x, running_mean(y, max(1, len(y) // SHARE)), color=color, label=run.name)
        penalties = [line["penalty"] for line in run.steps]
        if any(penalties):
            penalty.plot(x, penalties, color=color, linestyle=":", linewidth=1.2)
    axis.set(title="training loss (line: mean over a twentieth of the run)",
             xlabel="optimizer step", ylabel="loss")
    penalty.set_ylabel("penalty (dotted)")
    penalty.set_ylim(bottom=0)


def draw_dev(axis: Any, runs: list[Saved]) -> None:
    """Draw the headline score of each evaluation."""
    for run, color in zip(runs, COLORS):
        name = headline(run) if run.dev else ""
        if name:  # an empty line that is not clipped would break the layout
            axis.plot([line["step"] for line in run.dev], [line[name] for line in run.dev],
                      marker="o", markersize=4, color=color, label=run.name, clip_on=False)
    names = sorted({headline(run) for run in runs if run.dev})
    axis.set(title="score on dev" if names else "score on dev (not evaluated yet)",
             xlabel="optimizer step", ylabel=" or ".join(names))


def headline(run: Saved) -> str:
    """Return the name of a run's first metric."""
    if run.config["task"] in TASKS:
        return TASKS[run.config["task"]].metrics[0]
    return next(name for name in run.dev[0] if name not in ("epoch", "step"))


def draw_budget(axis: Any, runs: list[Saved], unit: str) -> None:
    """Draw the live components, or their parameters, after each pruning, and the budget of these
    prunings where it is counted in the same unit."""
    for run, color in zip(runs, COLORS):
        costs = [cost if unit == "parameters" else 1 for cost in run.costs.values()]
        steps = [line["step"] for line in run.history]
        live = [sum(n * cost for n, cost in zip(line["live"], costs)) for line in run.history]
        if run.costs:
            axis.step([*steps, run.total], [*live, live[-1]], where="post", color=color)
        if run.costs and run.config["budget_unit"] == unit and run.config["schedule"]:
            config = run.settings()
            x = sorted({*steps, phases(run.total, config)[1]}) + [run.total]
            axis.step(x, [budget(step, run.total, config, sum(costs)) for step in x], where="post",
                      color=color, linestyle="--", linewidth=1, label="budget b(t) at prunings")
    what = "live components" if unit == "components" else "parameters of the live components"
    axis.set(title=what, xlabel="optimizer step", ylabel=unit)
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles[:1], labels[:1], loc="center right", frameon=False)


def shade_phases(axis: Any, run: Saved, words: bool) -> None:
    """Shade the steps before and after those in which a run prunes."""
    if not run.config["schedule"]:
        return
    first, last = phases(run.total, run.settings())
    axis.axvspan(0, first, color="0.93", zorder=0)
    axis.axvspan(last, run.total, color="0.93", zorder=0)
    for left, right, text in [(0, first, "all live"), (first, last, "pruning"),
                              (last, run.total, "fixed ranks")] if words else []:
        axis.text((left + right) / 2, 0.98, text, transform=axis.get_xaxis_transform(),
                  ha="center", va="top", fontsize=8, color="0.35")


def draw_ranks(figure: Any, axis: Any, run: Saved) -> None:
    """Draw the live components of each matrix, a row, over the steps."""
    from matplotlib.colors import BoundaryNorm
    edges = [*(line["step"] for line in run.history), max(run.total, run.steps[-1]["step"])]
    rows = [list(row) for row in zip(*(line["live"] for line in run.history))]
    top = max(map(max, rows))
    colors = figure.colorbar(axis.pcolormesh(
        edges, range(len(rows) + 1), rows, cmap="viridis",
        norm=BoundaryNorm([i - 0.5 for i in range(top + 2)], 256)), ax=axis, pad=0.01,
        ticks=range(0, top + 1, 1 + top // 8))
    colors.set_label("live components")

    labels = [short(name) for name in run.costs]
    chosen = range(0, len(labels), 1 + len(labels) // 60)
    axis.set_yticks([i + 0.5 for i in chosen], [labels[i] for i in chosen], fontsize=8)
    axis.invert_yaxis()
    axis.set(title=f"rank of each matrix: {run.name}", xlabel="optimizer step",
             xlim=(0, run.total))


def short(name: str) -> str:
    """roberta.encoder.layer.0.attention.self.query -> 0 query"""
    numbers = [i for i, part in enumerate(name.split(".")) if part.isdecimal()]
    rest = name.split(".")[numbers[-1]:] if numbers else name.split(".")
    return " ".join([rest[0], ".".join(rest[1:]).removeprefix("attention.self.")])


def draw(runs: list[Saved]) -> Any:
    """Return the figure of the runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    mapped = [run for run in runs if len(run.history) > 1]  # those whose ranks changed
    heights = [3.0, 3.0, *(max(2.5, 0.6 + 0.15 * min(60, len(run.costs))) for run in mapped)]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)

    axes = [figure.add_subplot(grid[i // 2, i % 2]) for i in range(4)]
    draw_loss(axes[0], runs)
    draw_dev(axes[1], runs)
    draw_budget(axes[2], runs, "components")
    draw_budget(axes[3], runs, "parameters")
    end = max(run.total for run in runs)
    for axis in axes:
        shade_phases(axis, runs[0], words=axis in axes[2:])
        axis.set_xlim(0, end)
        axis.spines[["top", "right"]].set_visible(False)
    for i, run in enumerate(mapped):
        draw_ranks(figure, figure.add_subplot(grid[2 + i, :]), run)
    if len(runs) > 1 and runs[0].config["schedule"]:
        axes[2].set_title("live components (shaded: the phases of the first run)")
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    else:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Return the exit code: 2 for a folder that is not a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="folder of a run; the picture is written into the first")
    folders = parser.parse_args(argv).runs
    os.environ["MPLBACKEND"] = "agg"  # notebooks export a backend that this Python may not have
    try:
        if len(folders) > len(COLORS):
            raise NotARun(f"{len(folders)} runs are too many for one picture; name at most "
                          f"{len(COLORS)}")
        figure = draw([read_run(folder) for folder in folders])
    except NotARun as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"plot_run.py: error: {error}; pip install -r notebooks/requirements.txt",
              file=sys.stderr)
        return 2
    path = folders[0] / ("run.png" if len(folders) == 1 else "compare.png")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
