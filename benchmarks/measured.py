"""A control for glue.py: components scored by what closing each gate really does to the loss.

The sensitivity |c dL/dc| estimates this to first order. Here every live gate is closed once, before
each pruning, on two batches of the train set.

    python benchmarks/measured.py    # what it sees at the first pruning, STS-B, three seeds
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train_glue  # noqa: E402
from dora import IMPORTANCE, phases  # noqa: E402

BATCHES = 2  # of 32 examples


class Measured:
    """A function for a row of dora.IMPORTANCE, which is called after every optimizer step."""

    def __init__(self, config: Any):
        self.config = config

    def install(self) -> Any:
        """Let train_glue score by this. Return the settings of the run."""
        adapt = train_glue.adapt
        IMPORTANCE["measured"] = (self, "weights", torch.cat)
        train_glue.adapt = lambda model, cfg: self.watch(model, adapt(model, cfg))
        return dataclasses.replace(self.config, importance="measured", beta1=0.0, beta2=None)

    def watch(self, model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
        """Take the model and its examples; return its layers."""
        self.model = model
        bpe = data.BPE.from_folder(self.config.model_dir)
        examples = data.load_task(self.config.task, self.config.data_dir, "train", bpe,
                                  self.config.max_len)
        stream = data.batches(examples, self.config.batch_size, self.config.seed, 0)
        self.batches = [batch for batch, _ in zip(stream, range(BATCHES))]
        return layers

    def __call__(self, layers: list[Any]) -> Tensor:
        """Return the rise of the loss for each component, (n,); zeros where no pruning is due."""
        # the step is the Pruner's, which a run that continues from a checkpoint restores
        t, total = layers[0].progress.t, layers[0].progress.total
        first, last = phases(total, self.config)
        n = sum(len(layer.c) for layer in layers)
        if not (t == last or t > first and (t - first) % self.config.interval == 0):
            return torch.zeros(n)

        rise = self.removals(layers)
        # above 0, since only the order counts; closed gates come last, as with the sensitivity
        return torch.where(rise == math.inf, 1e-12, rise - rise.min() + 1e-9)

    def removals(self, layers: list[Any]) -> Tensor:
        """Return what closing each gate adds to the loss, (n,); inf for a gate that is closed."""
        self.model.eval()
        whole, costs = self.loss(), []
        for layer in layers:
            for i in range(len(layer.c)):
                gate = layer.c[i].item()
                layer.c[i] = 0.0
                costs.append(self.loss() - whole if gate else math.inf)
                layer.c[i] = gate
        self.model.train()
        return torch.tensor(costs)

    def loss(self) -> float:
        """Return the mean loss of the batches."""
        losses = [train_glue.task_loss(self.model(b.ids, b.mask), b.labels) for b in self.batches]
        return torch.stack(losses).mean().item()


class Look(Measured):
    """Stops at the first pruning and says what it saw there."""

    def removals(self, layers: list[Any]) -> Tensor:
        rise = super().removals(layers)
        self.model.eval()
        error = torch.cat([self.model(b.ids, b.mask)[:, 0] - b.labels for b in self.batches])
        raise Seen(
            f"loss {error.square().mean():.4f}, of which {error.mean().square():.4f} is the square "
            f"of the mean error; {(rise < 0).sum()} of {len(rise)} removals lower it")


class Seen(Exception):
    """What Look saw."""


def main() -> None:
    """Train to the first pruning and print what the measurement sees there."""
    adapt = train_glue.adapt
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as out:
            config = train_glue.make_config(
                "stsb", "dora", seed=seed, lr=2e-3, epochs=4, batch_size=32, rank=0.5, interval=50,
                data_dir=str(ROOT / "../shared/data/glue"), out=f"{out}/run", device="cpu",
                model_dir=str(ROOT / "../shared/models/minilm-l6-roberta"))
            try:
                with redirect_stdout(StringIO()):
                    train_glue.train(Look(config).install())
            except Seen as seen:
                print(f"seed {seed}: {seen}", flush=True)
            finally:
                train_glue.adapt = adapt


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
