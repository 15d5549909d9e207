"""How often does a run collapse? Ten seeds of the first epoch at the default learning rates.

    python benchmarks/collapse.py                     # dora at its defaults, one thread
    python benchmarks/collapse.py --threads 2
    python benchmarks/collapse.py --method paper --seeds 1 2 3
    python benchmarks/collapse.py --lr 3e-3 --tasks stsb
    python benchmarks/collapse.py --report            # only write the table

A run has the schedule of four epochs, so that its learning rate is near its peak, and is stopped
after the first one. It collapsed if its outputs on dev hardly differ from each other (the limit is
train_glue.COLLAPSED); the table also shows the scores, in which a run that is about to collapse
stands out. A finished run is a line of results/collapse.jsonl and is never repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import report  # noqa: E402
import train_glue  # noqa: E402

LOG = Path(__file__).resolve().parent / "results" / "collapse.jsonl"
TASKS = ("stsb", "cola", "mrpc", "rte")
KEYS = ("task", "method", "lr", "seed", "threads", "epochs", "stop")


class Enough(Exception):
    """The epochs that were asked for are done."""


def run(cell: dict[str, Any], args: argparse.Namespace) -> None:
    """Train until the end of epoch cell["stop"] and write a line."""
    record = train_glue.Run.record
    found: dict[str, Any] = {}

    def stop(self: Any, *values: Any, **named: Any) -> None:
        record(self, *values, **named)
        if len(self.records) == cell["stop"]:
            found.update(self.records[-1])
            raise Enough

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = train_glue.make_config(
            cell["task"], cell["method"], seed=cell["seed"], lr=cell["lr"], epochs=cell["epochs"],
            data_dir=str(args.data_dir), model_dir=str(args.model_dir), out=f"{folder}/run",
            device="cpu", save_every=10**6)
        train_glue.Run.record = stop  # type: ignore[method-assign]
        try:
            train_glue.train(config)
        except Enough:
            pass
        finally:
            train_glue.Run.record = record  # type: ignore[method-assign]
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()

    losses = [line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    metric = train_glue.TASKS[cell["task"]].metrics[0]
    line = {**cell, "metric": metric, "score": found[metric], "spread": found["spread"],
            "loss": statistics.mean(losses[-10:]), "seconds": round(time.monotonic() - started),
            "torch": torch.__version__, "machine": report.machine(args.threads)}
    report.add_to_log(LOG, line)
    print(line, flush=True)


def write_table() -> None:
    """Put the table into benchmarks/README.md."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in report.read_log(LOG):
        key = tuple(line[name] for name in ("method", "task", "lr", "threads", "stop"))
        groups.setdefault(key, []).append(line)

    rows = []
    for (method, task, lr, threads, _), lines in sorted(groups.items()):
        scores = sorted(line["score"] for line in lines)
        lost = sum(line["spread"] < train_glue.COLLAPSED for line in lines)
        least = min(line["spread"] for line in lines)
        rows.append([method, task, f"{lr:g}", str(threads), f"{lost} of {len(lines)}",
                     f"{statistics.median(scores):.3f}", f"{scores[0]:.3f}", f"{least:.3f}"])
    head = ["method", "task", "learning rate", "threads", "collapsed", "median score",
            "lowest score", "least spread of outputs"]
    report.write_part("collapse", "## collapse.py: how often a run collapses\n\n" + "\n".join(
        __doc__.strip().splitlines()[8:]) + "\n\n" + report.table(head, rows) + "\n\n" +
        f"`python benchmarks/collapse.py`, MiniLM-L6, batch of the task's row of Table 8; "
        f"{report.machines(report.read_log(LOG))}.")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--method", default="dora")
    parser.add_argument("--lr", type=float, help="default: the method's own for each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 11))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4, help="of the schedule")
    parser.add_argument("--stop", type=int, default=1, help="epochs that are trained")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "../shared/data/glue")
    parser.add_argument("--model-dir", type=Path,
                        default=ROOT / "../shared/models/minilm-l6-roberta")
    parser.add_argument("--report", action="store_true", help="only write the table")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    done = [{name: line[name] for name in KEYS} for line in report.read_log(LOG)]
    for seed in [] if args.report else args.seeds:
        for task in args.tasks:
            lr = args.lr or train_glue.make_config(task, args.method).lr
            cell = dict(task=task, method=args.method, lr=lr, seed=seed, threads=args.threads,
                        epochs=args.epochs, stop=args.stop)
            if cell not in done:
                run(cell, args)
    write_table()


if __name__ == "__main__":
    main()
