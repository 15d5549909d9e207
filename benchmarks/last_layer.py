"""The last layer's dense matrices lose their rank in every pruned run: is that right?

A first-order score multiplies a gate by its gradient, and gradients differ from layer to layer. So
the scores are compared with what they estimate, and the allocation with what it is good for:

    removal   at the first and at the last pruning of a default run on STS-B, for each of the 36
              matrices: the loss on 512 training examples without the live components of the
              matrix, minus the loss with them, beside the sum of their scores (float32)
    left out  LoRA, rank 2, without the dense matrices of the last layer, or of the first, against
              all 36 matrices: Pearson on the held-out tenth of the train set

    python benchmarks/last_layer.py            # continues where it was stopped; about 30 minutes
    python benchmarks/last_layer.py --short    # two removals of a tiny run: what CI runs

Writes results/last_layer.md. No dev set is looked at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import data  # noqa: E402
import train_glue  # noqa: E402
from dora import ROBERTA as MATRICES  # noqa: E402
from dora import DoRALinear, Pruner  # noqa: E402

FOLDER = ROOT / "benchmarks" / "results"
RESULTS, LOG = FOLDER / "last_layer.json", FOLDER / "glue.jsonl"
DENSE = MATRICES[3:]
SAMPLE = 512  # training examples that a removal is measured on


def without(layer: int, layers: int = 6) -> tuple[str, ...]:
    """Return the targets: all matrices except the dense ones of one layer."""
    return MATRICES[:3] + tuple(f"{i}.{name}" for i in range(layers) if i != layer
                                for name in DENSE)


ROWS: dict[str, dict[str, Any]] = {
    "lora": {}, "lora, last layer's dense left out": dict(targets=without(5)),
    "lora, first layer's dense left out": dict(targets=without(0))}


class Measured(Exception):
    """The last pruning has been measured. The rest of the run is not needed here."""


@torch.no_grad()
def losses(model: nn.Module, examples: list[data.Example]) -> tuple[float, float]:
    """Return the squared error without dropout, and what is left of it after the best line through
    the outputs: a removal shifts all outputs a little, which the head corrects in a few steps."""
    model.eval()
    x, y = torch.zeros(len(examples)), torch.tensor([float(e.label or 0) for e in examples])
    for batch in data.batches(examples, 64, None, 0):
        x[batch.rows] = model(batch.ids, batch.mask)[:, 0].float()
    left = y.var(correction=0) * (1 - torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2)
    return float((x - y).square().mean()), float(left)


@torch.no_grad()
def removals(model: nn.Module, layers: dict[str, DoRALinear], scores: torch.Tensor,
             averages: torch.Tensor, examples: list[data.Example]) -> list[dict[str, Any]]:
    """Return for each matrix what it costs to close its gates, beside the sum of its scores."""
    whole, found = losses(model, examples), []
    r = len(scores) // len(layers)
    for (name, layer), s, average in zip(layers.items(), scores.split(r), averages.split(r),
                                         strict=True):
        gates = layer.c.clone()
        layer.c.zero_()
        raw, left = losses(model, examples)
        found.append({"name": name, "raw": raw - whole[0], "cost": left - whole[1],
                      "score": float((s * layer.mask).sum()), "live": layer.rank,
                      "I_bar": float((average * layer.mask).sum())})
        layer.c.copy_(gates)
    return found


def watched(config: train_glue.TrainConfig, sample: int) -> dict[str, list[dict[str, Any]]]:
    """Train, and measure removals just before the first pruning and at the last."""
    assert config.data_dir and config.model_dir
    bpe = data.BPE(f"{config.model_dir}/vocab.json", f"{config.model_dir}/merges.txt")
    examples = data.load_task(config.task, config.data_dir, "train", bpe, config.max_len)[:sample]
    found: dict[str, list[dict[str, Any]]] = {}
    models: list[nn.Module] = []
    adapt = train_glue.adapt

    class Watching(Pruner):
        def _prune(self) -> None:
            if self.t - self.config.interval <= self.first:  # all components are still live
                self.measure("first pruning")
            super()._prune()
            if self.t == self.last:
                self.measure("last pruning")
                raise Measured

        def measure(self, when: str) -> None:
            state = torch.get_rng_state()
            found[when] = removals(models[0], self.layers, self.scores(), self.I_bar[0], examples)
            models[0].train()
            torch.set_rng_state(state)

    def adapting(model: Any, settings: Any) -> Any:
        models.append(model)
        return adapt(model, settings)

    train_glue.adapt, train_glue.Pruner = adapting, Watching  # type: ignore
    try:
        train_glue.train(config)
    except Measured:
        pass
    finally:
        train_glue.adapt, train_glue.Pruner = adapt, Pruner  # type: ignore
    return found


def left_out() -> list[dict[str, Any]]:
    """Return the recorded runs of ROWS; glue.py writes them."""
    lines = map(json.loads, LOG.read_text(encoding="utf-8").splitlines()) if LOG.exists() else []
    return [line for line in lines
            if (line["name"] in ROWS, line["split"], line["task"], line["lr"]) ==
            (True, "held out", "stsb", 2e-3) and line["dtype"] == "bf16"]


def report(found: dict[str, Any]) -> str:
    """Return the tables of last_layer.md."""
    out = ["# The last layer's dense matrices", "", "Written by `python benchmarks/last_layer.py`; "
           "MiniLM on STS-B, batch 32, 4 epochs, lr 2e-3, one thread.", ""]
    for when, rows in found["removals"].items():
        cost, raw, score, first = (
            [row[k] for row in rows] for k in ("cost", "raw", "score", "I_bar"))
        size = [abs(v) for v in raw]
        out += [f"**{when}**. Spearman's correlation over {len(rows)} matrices of the score Ī·Ū "
                f"(of Ī alone) with the loss that a removal costs after the best line through the "
                f"outputs: {data.spearman(score, cost):.2f} ({data.spearman(first, cost):.2f}); "
                f"with the change of the loss as it is: {data.spearman(score, raw):.2f} "
                f"({data.spearman(first, raw):.2f}), with the size of that change: "
                f"{data.spearman(score, size):.2f} ({data.spearman(first, size):.2f}). The cost "
                f"x 1e4 and, in brackets, the place by score (1 = most important):", "",
                "| layer | " + " | ".join(MATRICES) + " |", "|---|" + "---|" * len(MATRICES)]
        order = sorted(range(len(rows)), key=lambda i: -score[i])
        place = {i: order.index(i) + 1 for i in range(len(rows))}
        for layer in range(len(rows) // 6):
            cells = [f"{1e4 * cost[i]:.2f} ({place[i]})" for i in range(6 * layer, 6 * layer + 6)]
            out.append(f"| {layer} | " + " | ".join(cells) + " |")
        out.append("")
    lines = left_out()
    if lines:
        out += ["**Left out**: Pearson after the last epoch on the held-out tenth, bf16.", "",
                "| | components | seeds | median | each |", "|---|---|---|---|---|"]
        for name in ROWS:
            scores = [c["last"] for c in lines if c["name"] == name]
            if scores:
                components = sum(next(c for c in lines if c["name"] == name)["ranks"])
                out.append(f"| {name} | {components} | {len(scores)} | "
                           f"{statistics.median(scores):.4f} | "
                           f"{', '.join(f'{s:.4f}' for s in scores)} |")
    return "\n".join([*out, ""])


def short() -> None:
    """Measure removals in a tiny run on toy data, and check that none is NaN."""
    root = Path(tempfile.mkdtemp())
    bpe = data.write_toy(root, root / "model")
    tiny = train_glue.RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=16, num_hidden_layers=2,
                                    num_attention_heads=2, intermediate_size=32)
    train_glue.save_model(train_glue.RobertaForSequenceClassification(tiny, 2), root / "model")
    found = watched(train_glue.make_config(
        "toy", data_dir=str(root), model_dir=str(root / "model"), out=str(root / "run"), max_len=48,
        device="cpu", max_steps=60), 32)
    assert [len(rows) for rows in found.values()] == [12, 12]
    assert all(abs(row["cost"]) < 1 for rows in found.values() for row in rows)
    print("removals of 12 matrices at the first and the last pruning measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "../shared/data/glue")
    parser.add_argument("--model-dir", type=Path,
                        default=ROOT / "../shared/models/minilm-l6-roberta")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    args.dtype, args.device = "bf16", "cpu"
    torch.set_num_threads(1)
    if args.short:
        return short()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "removals" not in found:
        import glue
        with tempfile.TemporaryDirectory() as out:  # a measurement that was cut off starts again
            found["removals"] = watched(train_glue.make_config(
                "stsb", lr=2e-3, data_dir=str(glue.held_out(args.data_dir)), batch_size=32,
                epochs=4, model_dir=str(args.model_dir), device="cpu", out=out), SAMPLE)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for seed in range(1, args.seeds + 1):
        for name, more in ROWS.items():
            if not any((line["name"], line["seed"]) == (name, seed) for line in left_out()):
                import glue
                glue.run(glue.cell(name, "held out", "stsb", "lora", seed, 2e-3, **more), args)
    text = report(found)
    (FOLDER / "last_layer.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
