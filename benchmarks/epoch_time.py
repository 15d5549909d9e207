"""How long does a whole epoch take, ours and that of transformers with PEFT LoRA?

    python benchmarks/epoch_time.py            # CoLA and STS-B, MiniLM; 10 to 30 minutes
    python benchmarks/epoch_time.py --short    # made-up sentences, 20 s, an assertion: for CI

Ours is a run of one epoch with the default method: batches of 16 sentences of similar length,
pruning from 15 % to 50 % of the steps, then compaction. Theirs is transformers' model with PEFT
LoRA of the final rank, the same loss, clipping and fused AdamW, and batches of 16 in random order,
padded to their longest sentence. The two take turns, one step each. A time is the sum over the
epoch. It includes batching but not loading. With one thread it is the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import data  # noqa: E402
import report  # noqa: E402
from dora import DoRAConfig, Pruner, compact_, inject  # noqa: E402
from step_time import LORA, MINILM, Row, build, clock, keep_memory, load, step  # noqa: E402
from train_glue import predict, task_loss  # noqa: E402

RESULTS = report.HERE / "results" / "epoch_time.json"


def random_batches(examples: list[data.Example], size: int) -> Iterator[data.Batch]:
    """Yield batches in random order, each padded to its longest sentence (dynamic padding)."""
    order = np.random.default_rng(1).permutation(len(examples))
    for start in range(0, len(order), size):
        yield data.collate(examples, order[start:start + size])


def sentences(number: int) -> list[data.Example]:
    """Return made-up ids with CoLA's lengths."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(2.3, 0.4, number)).astype(int) + 4
    return [data.Example(rng.integers(4, 50_000, n).tolist(), int(rng.integers(2)))
            for n in lengths]


def rows(steps: int, labels: int) -> tuple[Row, Row]:
    """Return our row and PEFT LoRA's."""
    model, config = load("minilm", False, "cpu"), DoRAConfig()
    if labels == 1:
        model.classifier.out_proj = torch.nn.Linear(384, 1)
    layers = inject(model, config)
    model.classifier.requires_grad_(True)
    ours = Row(model, lambda b: task_loss(model(b[0], b[1]), b[2]), Pruner(layers, config, steps))
    peer = load("minilm", True, "cpu")
    if labels == 1:
        peer.classifier.out_proj, peer.num_labels = torch.nn.Linear(384, 1), 1
        peer.config.problem_type = "regression"
    return ours, build(LORA, peer)


@torch.no_grad()
def evaluate_peer(row: Row, examples: list[data.Example]) -> None:
    """Do what train_glue.predict does, with transformers' model."""
    row.model.eval()
    for start in range(0, len(examples), 64):
        part = np.arange(start, min(start + 64, len(examples)))
        row.loss(data.collate(examples, part)[:3])


def measure(train: list[data.Example], dev: list[data.Example], labels: int) -> dict[str, float]:
    """Return the seconds of an epoch and of an evaluation of dev, ours and theirs."""
    steps = math.ceil(len(train) / 16)
    ours, theirs = rows(steps, labels)
    spent = {"ours": 0.0, "theirs": 0.0}

    def add(name: str, run: Callable[[], Any]) -> None:
        start = clock("cpu")
        run()
        spent[name] += clock("cpu") - start

    def our_step() -> None:
        step(ours, next(our_batches)[:3])
        if ours.pruner.t == ours.pruner.last:
            compact_(ours.model, ours.optimizer)

    our_batches, their_batches = data.batches(train, 16, 1, 0), random_batches(train, 16)
    for i in range(steps):
        add("ours", our_step)
        add("theirs", lambda: step(theirs, next(their_batches)[:3]))
        if (i + 1) % 50 == 0:
            print(f"step {i + 1} of {steps}: ours {spent['ours']:.1f} s, theirs "
                  f"{spent['theirs']:.1f} s, {spent['ours'] / spent['theirs']:.3f}", flush=True)
    epoch = dict(spent)
    spent.update(ours=0.0, theirs=0.0)
    add("ours", lambda: predict(ours.model, dev))
    add("theirs", lambda: evaluate_peer(theirs, dev))
    return {"steps": steps, "ours": epoch["ours"], "theirs": epoch["theirs"],
            "our_dev": spent["ours"], "their_dev": spent["theirs"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=["cola", "stsb"])
    parser.add_argument("--data-dir", default=str(ROOT.parent / "shared" / "data" / "glue"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    if args.short:
        made = sentences(400)
        found = measure(made, made[:64], 2)
        print({key: round(value, 2) for key, value in found.items()})
        assert found["ours"] < 0.95 * found["theirs"], found
        return
    bpe = data.BPE(MINILM / "vocab.json", MINILM / "merges.txt")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for task in args.tasks:
        train, dev = (data.load_task(task, args.data_dir, split, bpe, 128)
                      for split in ("train", "dev"))
        results[task] = {**measure(train, dev, data.TASKS[task].num_labels),
                         "machine": report.machine(args.threads)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        cells = [[name, f"{r['steps']}", f"{r['ours']:.0f} s", f"{r['theirs']:.0f} s",
                  f"{r['ours'] / r['theirs']:.2f}", f"{r['our_dev']:.1f} s",
                  f"{r['their_dev']:.1f} s"] for name, r in results.items()]
        report.write_part("epoch_time", "\n".join([
            "## epoch_time.py: a whole epoch", "", __doc__.split("\n\n")[2].strip(), "",
            report.table(["task", "steps", "ours", "PEFT LoRA", "ratio", "dev, ours",
                          "dev, PEFT LoRA"], cells), "",
            f"The ratio's target is at most 0.45. `python benchmarks/epoch_time.py`, "
            f"{report.machines(results.values())}."]))


if __name__ == "__main__":
    main()
