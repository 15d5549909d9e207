"""Does pruning put the rank where it is needed? A test with a known answer (issue 4, item 2).

A frozen teacher y = net(x; W0 + Delta W*) + noise has a Delta W* whose rank differs from matrix to
matrix. A student starts from W0 with r' components in every matrix and prunes itself to exactly the
true total. Two figures per run:

    misplaced   sum over matrices of max(0, kept - true) / total: share of components in a wrong matrix
    loss        (mean squared error on clean targets + noise^2) / noise^2: 1.00 is the noise floor

    python benchmarks/rank_recovery.py            # all rows x patterns x 20 seeds, resumable
    python benchmarks/rank_recovery.py --short    # about 20 s, with assertions, for CI
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dora import METHODS, DoRAConfig, Pruner, inject  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOISE = 0.5  # standard deviation of the noise on every output

# name: (width, start rank r', true rank of each matrix)
PATTERNS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "mixed": (48, 4, (0, 1, 2, 4, 0, 3)),
    "early": (48, 4, (4, 3, 2, 1, 0, 0)),
    "late": (48, 4, (0, 0, 1, 2, 3, 4)),
    "even": (48, 4, (2, 2, 2, 2, 2, 2)),
    "one": (48, 4, (0, 0, 4, 0, 0, 0)),
    "narrow": (24, 4, (0, 1, 2, 4, 0, 3)),
    "wide": (96, 4, (0, 1, 2, 4, 0, 3)),
    "shallow": (48, 4, (0, 3, 1)),
    "deep": (48, 4, (0, 1, 2, 4, 0, 3, 1, 0, 4, 0, 2, 3)),
}


class Residual(nn.Module):
    """h + tanh(W h)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight.clone())

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


def network(weights: list[Tensor]) -> nn.Sequential:
    return nn.Sequential(*(Residual(W) for W in weights))


def problem(width: int, truth: tuple[int, ...], strength: float, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """W0 and Delta W* of every matrix: Delta W* = strength * sum_i u_i v_i^T, u and v orthonormal."""
    g = torch.Generator().manual_seed(seed)
    W0 = [torch.randn(width, width, generator=g) / width**0.5 for _ in truth]
    delta = []
    for rank in truth:
        U, V = (torch.linalg.qr(torch.randn(width, width, generator=g))[0][:, :rank] for _ in "UV")
        delta.append(strength * U @ V.T)
    return W0, delta


def misplaced(kept: list[int], truth: tuple[int, ...]) -> float:
    """Share of the components that stand in a matrix which already has all it needs."""
    return sum(max(0, k - t) for k, t in zip(kept, truth, strict=True)) / sum(truth)


@torch.no_grad()
def loss_over_floor(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """Expected squared error on noisy targets over noise^2; exact in the noise, so 1 for the teacher."""
    return 1 + float((student(x) - teacher(x)).square().mean()) / NOISE**2


def run(config: DoRAConfig, pattern: str, seed: int, steps: int = 1500, lr: float = 5e-3,
        batch: int = 64, strength: float = 2.0) -> dict:
    """Train one student; returns its figures."""
    width, start, truth = PATTERNS[pattern]
    W0, delta = problem(width, truth, strength, seed)
    teacher, student = network([w + d for w, d in zip(W0, delta)]), network(W0)
    torch.manual_seed(seed)
    layers = inject(student, config)
    pruner = Pruner(layers, config, steps)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    warm = max(1, round(0.06 * steps))  # the paper's schedule: up for 6 %, then linearly to 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, (steps - t) / (steps - warm)))
    g = torch.Generator().manual_seed(seed + 1_000_000)
    began = time.perf_counter()
    for _ in range(steps):
        x = torch.randn(batch, width, generator=g)
        with torch.no_grad():
            y = teacher(x) + NOISE * torch.randn(batch, width, generator=g)
        loss = (student(x) - y).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        pruner.observe()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        pruner.step()
        schedule.step()
    kept = list(pruner.ranks().values())
    x = torch.randn(4096, width, generator=g)
    return dict(kept=kept, misplaced=misplaced(kept, truth), loss=loss_over_floor(student, teacher, x),
                seconds=round(time.perf_counter() - began, 2))
