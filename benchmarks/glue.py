"""The methods side by side on GLUE, at one final budget and with one tuning effort.

    python benchmarks/glue.py --stage 1    # STS-B and RTE: lora, adalora, dora, paper, full
    python benchmarks/glue.py --stage 2    # adds MRPC, CoLA, bitfit, the paper's ablations, choices
    python benchmarks/glue.py --stage 3 --device cuda    # adds SST-2, 5 seeds, the paper's epochs
    python benchmarks/glue.py --report     # only write RESULTS.md from the runs that are there

The learning rate of each method is the best of three on a tenth of STS-B's *train* set, held out,
for STS-B and RTE; of five on a tenth of CoLA's for CoLA, MRPC and SST-2. A finished run is a line
of results/glue.jsonl and never repeated; a broken one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_glue  # noqa: E402
from dora import DoRAError  # noqa: E402

HERE = Path(__file__).resolve().parent
LOG = HERE / "results" / "glue.jsonl"
EPOCHS = {"stsb": 4, "rte": 6, "mrpc": 6, "cola": 5}
BASE_LR = {"full": 1e-4}  # others 2e-3; each tries these factors of it
FACTORS = {"stsb": (0.5, 1.0, 2.0), "cola": (0.125, 0.25, 0.5, 1.0, 2.0)}
CHOSEN_ON = {"stsb": "stsb", "rte": "stsb", "mrpc": "cola", "cola": "cola", "sst2": "cola"}
MATRICES = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
METHODS = ("dora", "lora", "adalora", "paper", "full")
ALL = (*METHODS, "bitfit")
SEEDS = (1, 2, 3)
ABLATIONS: dict[str, dict[str, Any]] = {  # of dora on STS-B, the paper's Tables 4 and 5
    "dora, no DEM": dict(penalty=None),
    "dora, r' = 2, nothing pruned": dict(start_rank=2, schedule=None, importance=None,
                                         penalty=None),
    "dora, r' = 4": dict(start_rank=4),
    "dora, r' = 8": dict(start_rank=8),
}
CHOICES: tuple[dict[str, Any], ...] = (  # of dora on the held-out tenth: one setting, another value
    dict(schedule="dora"), dict(scale="start_rank"), dict(init="kaiming"),
    dict(dropout_on="input"), dict(beta1=0.98, beta2=0.98), dict(beta2=None),
    dict(importance="frobenius"), dict(importance="norm"),
    dict(initial_phase=0.3, final_phase=0.3), dict(penalty=None),
    ABLATIONS["dora, r' = 2, nothing pruned"])
PAPER = """| method | parameters | RTE | MRPC | STS-B | CoLA | SST-2 | QNLI | QQP | MNLI | mean |
|---|---|---|---|---|---|---|---|---|---|---|
| full | 124.65M | 78.63 | 88.33 | 90.31 | 60.26 | 94.73 | 92.58 | 90.75 | 87.68 | 85.41 |
| BitFit | 0.10M | 79.57 | 89.07 | 90.55 | 61.16 | 94.38 | 90.99 | 88.08 | 85.50 | 84.91 |
| LoRA | 0.33M | 78.63 | 88.68 | 91.24 | 62.40 | 93.25 | 92.75 | 90.12 | 87.01 | 85.50 |
| AdaLoRA | 0.32M | 79.04 | 88.81 | 91.06 | 63.17 | 94.79 | 92.87 | 90.07 | 87.64 | 85.93 |
| DoRA | 0.34M | 79.15 | 89.72 | 91.28 | 64.90 | 94.98 | 92.93 | 90.64 | 87.45 | 86.38 |"""


def held_out(data_dir: Path) -> Path:
    """A data folder whose dev sets are a tenth of the train sets of STS-B and CoLA (seed 0)."""
    folder = ROOT / "runs" / "bench" / "held-out"
    for name, head in (("STS-B", 1), ("CoLA", 0)):  # CoLA has no header line
        text = (data_dir / name / "train.tsv").read_text(encoding="utf-8")
        lines = text.rstrip("\n").split("\n")
        rows = np.random.default_rng(0).permutation(len(lines) - head) + head
        tenth = len(rows) // 10
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("dev", rows[:tenth]), ("train", rows[tenth:])):
            text = "\n".join([*lines[:head], *(lines[i] for i in sorted(part))]) + "\n"
            (folder / name / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def cell(name: str, split: str, task: str, method: str, seed: int, lr: float | None,
         **more: Any) -> dict[str, Any]:
    return dict(name=name, split=split, task=task, method=method, seed=seed, lr=lr, more=more)


def key_of(c: dict[str, Any]) -> str:
    return hashlib.sha1(json.dumps(c, sort_keys=True).encode()).hexdigest()[:12]


def finished() -> dict[str, dict[str, Any]]:
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def run(c: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The finished line of a cell, from the log or from a run made now."""
    key = key_of(c)
    done = finished()
    if key in done:
        return done[key]
    out = ROOT / "runs" / "bench" / key
    data_dir = held_out(args.data_dir) if c["split"] == "held out" else args.data_dir
    print(f"--- {c['name']}, {c['task']} {c['split']}, lr {c['lr']:g}, seed {c['seed']}",
          flush=True)
    config = train_glue.make_config(
        c["task"], c["method"], seed=c["seed"], lr=c["lr"], data_dir=str(data_dir), batch_size=32,
        model_dir=str(args.model_dir), out=str(out), dtype=args.dtype, device=args.device,
        save_every=100, resume=any(out.glob("checkpoints/*.pt")),
        **{"epochs": EPOCHS.get(c["task"]), **c["more"]})
    r = train_glue.train(config)
    metric = train_glue.TASKS[c["task"]].metrics[0]
    line = {"key": key, **c, "dtype": args.dtype, "device": args.device, "metric": metric,
            "best": r["best"][metric], "last": r["last"][metric],
            "epochs": [e[metric] for e in r["epochs"]],
            "adapter": r["adapter_parameters_after_pruning"], "start": r["adapter_parameters"],
            "trainable": r["trainable_parameters"], "head": r["head_parameters"],
            "seconds": r["seconds"], "ranks": list(r["ranks"].values()),
            "torch": torch.__version__, "threads": torch.get_num_threads()}
    LOG.parent.mkdir(exist_ok=True)
    with open(LOG, "a") as f:
        f.write(json.dumps(line) + "\n")
    return line


def tuning(method: str, task: str) -> list[dict[str, Any]]:
    """The cells that choose a method's learning rate on the held-out tenth of a task."""
    base = BASE_LR.get(method, 2e-3)
    return [cell(method, "held out", task, method, 1, base * f) for f in FACTORS[task]]


def best_lr(tried: list[dict[str, Any]]) -> float | None:
    """The learning rate of the highest score after the last epoch; None of no run."""
    return max(tried, key=lambda line: line["last"])["lr"] if tried else None


def choice_name(more: dict[str, Any]) -> str:
    """dict(beta2=None) -> "dora, beta2 none"."""
    return "dora, " + ", ".join(f"{key} {str(value).lower()}" for key, value in more.items())


def spread(scores: list[float]) -> str:
    """Median (smallest to largest, number of seeds)."""
    return (f"{statistics.median(scores):.4f} ({min(scores):.4f} to {max(scores):.4f}, "
            f"{len(scores)} seed{'s' * (len(scores) > 1)})") if scores else "not run"


def report() -> None:
    """RESULTS.md from the log: only what was run is in it."""
    done = finished()
    lines = list(done.values())
    devices = " and ".join(sorted({c.get("device", "cpu").upper() for c in lines}))
    out = ["# GLUE, methods side by side", "",
           "Written by `python benchmarks/glue.py` from benchmarks/results/glue.jsonl. The encoder "
           "is MiniLM-L6 in RoBERTa's layout (6 layers, width 384), not RoBERTa-base: compare "
           "rows, not these numbers with the paper's. Final budget r = 2 over 36 matrices, batch "
           "32, "
           f"epochs {EPOCHS}, frozen weights in bf16 (full and bitfit: bf16 products, float32 "
           "weights). Score: best dev epoch after the last pruning, median of the seeds "
           "(smallest to largest).", "",
           f"torch {torch.__version__}, Python {platform.python_version()}, {devices}, one thread "
           "a run.",
           "", "## Learning rate: score after the last epoch on a held-out tenth of the train set",
           "", "Pearson on STS-B, for STS-B and RTE; Matthews on CoLA, for CoLA and MRPC. The "
           "second choice was made after one run of dora at its rate of STS-B had come down to one "
           "class on CoLA's dev set; all methods got it alike."]
    chosen = {}
    for task, factors in FACTORS.items():
        out += ["", f"| method, {task} | " + " | ".join(f"{f:g} x base" for f in factors) +
                " | base |", "|---|" + "---|" * (len(factors) + 1)]
        for method in ALL:
            tried = [done.get(key_of(c)) for c in tuning(method, task)]
            chosen[method, task] = best_lr([line for line in tried if line])
            out.append(f"| {method} | " + " | ".join(
                f"{line['last']:.4f}" if line else "not run" for line in tried) +
                f" | {BASE_LR.get(method, 2e-3):g} |")
    dev = [c for c in lines if c["split"] == "dev" and
           c["lr"] == chosen[c["method"], CHOSEN_ON[c["task"]]]]
    tasks = [t for t in EPOCHS if any(c["task"] == t for c in dev)]
    out += ["", "## Dev", "", "| method | lr | adapter parameters | " + " | ".join(tasks) +
            " | mean of medians | seconds a run |", "|---|---|---|" + "---|" * (len(tasks) + 2)]
    for name in ALL:
        mine = [c for c in dev if c["name"] == name]
        if not mine:
            continue
        scores = [[c["best"] for c in mine if c["task"] == task] for task in tasks]
        cells, medians = map(spread, scores), [statistics.median(s) for s in scores if s]
        mean = f"{statistics.mean(medians):.4f}" if len(medians) == len(tasks) else "incomplete"
        sizes = sorted({c["adapter"] or c["trainable"] - c["head"] for c in mine})
        size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        seconds = " / ".join(f"{statistics.median(times):.0f}" for task in tasks if (
            times := [c["seconds"] for c in mine if c["task"] == task]))
        rates = " / ".join(f"{lr:g}" for lr in dict.fromkeys(c["lr"] for c in mine))
        out.append(f"| {name} | {rates} | {size} | " + " | ".join(cells) +
                   f" | {mean} | {seconds} |")
    out += ["", "## Ablations: STS-B dev", "",
            "| | Pearson | components at the start | in the end |", "|---|---|---|---|"]
    for name in ("dora", *ABLATIONS):
        mine = [c for c in dev if c["name"] == name and c["task"] == "stsb"]
        start = ABLATIONS.get(name, {}).get("start_rank", 3)
        out.append(f"| {name} | {spread([c['best'] for c in mine])} | {36 * start} | 72 |")
    out += ["", "## Choices: the default with one setting changed, held-out tenth of STS-B's train "
            "set", "", "Pearson after the last epoch, at the learning rate chosen for dora.", "",
            "| | Pearson |", "|---|---|"]
    for name in ("dora", *map(choice_name, CHOICES)):
        mine = [c for c in lines if (c["name"], c["split"], c["task"], c["lr"]) ==
                (name, "held out", "stsb", chosen["dora", "stsb"])]
        out.append(f"| {name} | {spread([c['last'] for c in mine])} |")
    out += ["", "## Dev, the paper's epochs", ""]
    long = {task: [c for c in lines if c["task"] == task and "epochs" in c["more"]]
            for task in CHOSEN_ON}
    if any(long.values()):
        out += ["| method | " + " | ".join(long) + " |", "|---|" + "---|" * len(long)]
        for name in ALL:
            out.append(f"| {name} | " + " | ".join(spread(
                [c["best"] for c in cells if c["method"] == name]) for cells in long.values()) +
                " |")
    else:
        out.append("Not run: stage 3 (5 seeds, the paper's epochs, SST-2) needs an accelerator.")
    spent = sum(c["seconds"] for c in lines) / 3600
    out += ["", f"{len(lines)} runs, {spent:.1f} hours of one core in all. Seconds are medians, "
            "evaluation included, on a machine that was shared, and of a run that was stopped only "
            "those after its stop: README.md here measures speed.", "",
            "Not run: whatever is marked so above.", "",
            "## The paper's Table 2, r = 2 (RoBERTa-base, not run here)", "", PAPER, ""]
    (HERE / "RESULTS.md").write_text("\n".join(out))
    try:
        plot(dev, tasks)
    except ModuleNotFoundError:
        print("no figure: pip install -r benchmarks/requirements.txt, then --report",
              file=sys.stderr)


def plot(dev: list[dict[str, Any]], tasks: list[str]) -> None:
    """results/glue.svg: where dora's components went, and score against parameters."""
    from matplotlib.figure import Figure

    mine = [c["ranks"] for c in dev if (c["name"], c["task"]) == ("dora", "stsb")]
    if not mine:
        return
    half = math.ceil(len(tasks) / 2)  # the map, and beside it two rows of tasks
    figure = Figure(figsize=(4.2 + 3.4 * half, 6.4), layout="constrained")
    places = [["map", *tasks[:half]], ["map", *(tasks[half:] + ["."])[:half]]]
    mosaic = figure.subplot_mosaic(places, width_ratios=[1.15] + [1] * half)
    axes = [mosaic["map"], *(mosaic[task] for task in tasks)]
    live = np.mean(mine, axis=0).reshape(-1, len(MATRICES)).T  # (matrices, layers)
    axes[0].imshow(live, cmap="YlGnBu", vmin=0, vmax=3.6, aspect="auto")
    for (y, x), value in np.ndenumerate(live):
        axes[0].text(x, y, f"{value:.1f}".removesuffix(".0"), ha="center", va="center",
                     color="white" if value > 2.2 else "black")
    axes[0].set_yticks(range(len(MATRICES)), MATRICES)
    axes[0].set_xticks(range(live.shape[1]))
    axes[0].set_xlabel("layer")
    axes[0].set_title(f"live components of dora, STS-B\nstart 3, mean of {len(mine)} seeds",
                      fontsize=10)
    for ax, task in zip(axes[1:], tasks, strict=True):
        for i, name in enumerate(name for name in ALL if any(
                (c["name"], c["task"]) == (name, task) for c in dev)):
            cells = [c for c in dev if (c["name"], c["task"]) == (name, task)]
            scores = sorted(c["best"] for c in cells)
            size = statistics.median(c["adapter"] or c["trainable"] - c["head"] for c in cells)
            middle = statistics.median(scores)
            if name not in ("full", "bitfit"):
                size *= 1.35 ** (i - 1.5)  # about one size, side by side
            ax.errorbar(size, middle, [[middle - scores[0]], [scores[-1] - middle]], fmt="o",
                        capsize=4, color=f"C{i}", label=name)
        ax.set_xscale("log")
        ax.set_xlim(1.5e4, 6e7)
        ax.set_xlabel("parameters", fontsize=9)
        ax.set_title(f"{task}: {cells[0]['metric']} on dev\nmedian, smallest, largest",
                     fontsize=10)
        ax.grid(alpha=0.3)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(HERE / "results" / "glue.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "../shared/data/glue")
    parser.add_argument("--model-dir", type=Path,
                        default=ROOT / "../shared/models/minilm-l6-roberta")
    parser.add_argument("--dtype", default="bf16", help="of the frozen weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--short", action="store_true", help="check the machinery only, for CI")
    args = parser.parse_args()
    if args.stage == 3 and args.device == "cpu":
        parser.error("--stage 3 is for an accelerator; name it, as --device cuda")
    torch.set_num_threads(args.threads)
    if args.short:
        folder = held_out(args.data_dir)
        for name, head, size in (("STS-B", 1, 5749), ("CoLA", 0, 8551)):
            rows = sum((folder / name / f"{s}.tsv").read_text().count("\n") - head
                       for s in ("train", "dev"))
            assert rows == size, rows
        assert all(len(line["epochs"]) for line in finished().values())
        print(f"{len(finished())} finished runs on record")
        return
    if not args.report:
        methods, tasks, rates = ((METHODS, ("stsb", "rte"), ("stsb",)) if args.stage == 1 else
                                 (ALL, tuple(EPOCHS), tuple(FACTORS)))
        lrs = {(method, task): best_lr([run(c, args) for c in tuning(method, task)])
               for method in methods for task in rates}
        cells = [cell(method, "dev", task, method, seed, lrs[method, CHOSEN_ON[task]])
                 for task in tasks for seed in SEEDS for method in methods]
        if args.stage >= 2:
            lr = lrs["dora", "stsb"]
            cells += [cell(name, "dev", "stsb", "dora", seed, lr, **more)
                      for name, more in ABLATIONS.items() for seed in SEEDS]
            changed = {"dora": {}, **{choice_name(more): more for more in CHOICES}}
            cells += [cell(name, "held out", "stsb", "dora", seed, lr, **more)
                      for seed in SEEDS for name, more in changed.items()]
        if args.stage == 3:
            cells += [cell(f"{method}, the paper's epochs", "dev", task, method, seed,
                           lrs[method, rate], epochs=train_glue.make_config(task).epochs)
                      for task, rate in CHOSEN_ON.items() for seed in (*SEEDS, 4, 5)
                      for method in methods]
        done = finished()
        for c in cells:
            if key_of(c) not in done:
                run(c, args)
                report()
    report()
    print(f"wrote {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    try:
        main()
    except DoRAError as error:
        sys.exit(f"glue.py: error: {error}")
