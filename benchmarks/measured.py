"""A control for glue.py: components scored by what closing each gate really does to the loss.

The sensitivity |c dL/dc| estimates this to first order. Here every live gate is closed once, before
each pruning, on two batches of the train set.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train_glue  # noqa: E402
from dora import phases  # noqa: E402

BATCHES = 2  # of 32 examples


class Measured:
    """A function for a row of dora.IMPORTANCE, which is called after every optimizer step."""

    def __init__(self, config: Any):
        self.config = config

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

        self.model.eval()
        whole, costs = self.loss(), []
        for layer in layers:
            for i in range(len(layer.c)):
                gate = layer.c[i].item()
                layer.c[i] = 0.0
                costs.append(self.loss() - whole if gate else math.inf)
                layer.c[i] = gate
        self.model.train()
        rise = torch.tensor(costs)
        # above 0, since only the order counts; closed gates come last, as with the sensitivity
        return torch.where(rise == math.inf, 1e-12, rise - rise.min() + 1e-9)

    def loss(self) -> float:
        """Return the mean loss of the batches."""
        losses = [train_glue.task_loss(self.model(b.ids, b.mask), b.labels) for b in self.batches]
        return torch.stack(losses).mean().item()
