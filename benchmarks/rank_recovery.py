"""Does pruning put the rank where it is needed? A test with a known answer.

A frozen teacher y = net(x; W0 + Delta W*) + noise has a Delta W* whose rank differs from matrix to
matrix. A student starts from W0 with r' components in every matrix, is trained on fresh data in
every step, and prunes itself to exactly the teacher's total. Two figures per run:

    misplaced   sum over matrices of max(0, kept - true) / total: share of components that stand
                in a matrix which already has all it needs
    loss        expected squared error on noisy targets / noise^2: 1 is the floor, the teacher's own

    python benchmarks/rank_recovery.py            # all rows x patterns x 20 seeds; goes on where
                                                  # it was stopped, a finished cell is never repeated
    python benchmarks/rank_recovery.py --short    # about 20 s, with assertions: what CI runs

A row is a set of DoRAConfig values and nothing else, so rows differ by values alone. The seed fixes
teacher, data and start, so rows are compared on the same problems. After a change to dora.py delete
benchmarks/results/rank_recovery.jsonl: cells are told apart by their settings, not by the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dora import METHODS, DoRAConfig, Pruner, inject  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOISE = 0.5  # standard deviation of the noise on each output; one lost component costs 0.2 to 0.6


@dataclass(frozen=True)
class Pattern:
    """One family of problems: the true ranks, and the regime they have to be found in."""

    truth: tuple[int, ...]  # rank of Delta W* in each matrix, first layer first
    width: int = 48
    start: int = 4  # r', components per matrix at the start
    strength: tuple[float, float] = (2.0, 2.0)  # range of the singular values of Delta W*
    gains: tuple[float, ...] = ()  # W x -> (W / gain)(gain x): the same function, other sizes of W
    batch: int = 64  # examples per step
    steps: int = 1500


MIXED = (0, 1, 2, 4, 0, 3)
PATTERNS = {
    "mixed": Pattern(MIXED),
    "early": Pattern((4, 3, 2, 1, 0, 0)),
    "late": Pattern((0, 0, 1, 2, 3, 4)),
    "even": Pattern((2, 2, 2, 2, 2, 2)),
    "one": Pattern((0, 0, 4, 0, 0, 0)),
    "narrow": Pattern(MIXED, width=24),
    "wide": Pattern(MIXED, width=96),
    "shallow": Pattern((0, 3, 1)),
    "deep": Pattern((*MIXED, 1, 0, 4, 0, 2, 3)),
    "start 8": Pattern(MIXED, start=8),
    "uneven": Pattern(MIXED, strength=(1.0, 3.0)),
    "gains": Pattern(MIXED, gains=(1.0, 2.0, 0.5, 1.0, 2.0, 0.5)),
    "batch 8": Pattern(MIXED, batch=8),
    "brief": Pattern(MIXED, steps=400),
}

# Every row spells out its settings, so that the table stays true when a default of dora.py changes.
NORM = dict(importance="norm", beta1=0.9, beta2=None)
FROBENIUS = dict(NORM, importance="frobenius")
IU = dict(importance="sensitivity", beta1=0.85, beta2=0.85)  # I_bar * U_bar
KAIMING = dict(init="kaiming", scale="start_rank")  # c = 0
ZERO_B = dict(init="zero_b", scale="rank")  # c = 1
SLOW, FAST = dict(schedule="dora"), dict(schedule="adalora")
COMMON = dict(penalty=None, initial_phase=0.15, final_phase=0.5, interval=10)
BEST = {**COMMON, **IU, **ZERO_B, **FAST}


def rows() -> dict[str, dict[str, Any]]:
    """Label -> DoRAConfig values. 'm:' whole methods, 't:' score x start x curve, 'v:' BEST but for one value."""
    table: dict[str, dict[str, Any]] = {f"m: {name}": settings for name, settings in METHODS.items()}
    scores = {"norm": NORM, "frobenius": FROBENIUS, "I·U .85": IU, "I·U .98": dict(IU, beta1=0.98, beta2=0.98)}
    for score, s in scores.items():
        for start, i in (("kaiming", KAIMING), ("B=0", ZERO_B)):
            for curve, c in (("slow", SLOW), ("fast", FAST)):
                table[f"t: {score}, {start}, {curve}"] = {**COMMON, **s, **i, **c}
    changes: list[dict[str, Any]] = [
        dict(scale="start_rank"), dict(init="gaussian", scale="start_rank"), dict(importance="triplet"),
        dict(beta2=None), dict(beta1=0.98, beta2=None), dict(beta1=0.95, beta2=0.95), dict(beta2=0.95),
        dict(penalty="dem", eta=0.3), dict(penalty="orthogonal", eta=0.5), dict(interval=1), dict(interval=50),
        dict(initial_phase=0.05), dict(initial_phase=0.3), dict(final_phase=0.2), dict(final_phase=0.7)]
    for change in changes:
        table["v: " + ", ".join(f"{k}={v}" for k, v in change.items())] = {**BEST, **change}
    return table


class Residual(nn.Module):
    """h + tanh((W / gain) (gain h)) = h + tanh(W h), with W / gain as the matrix to adapt."""

    def __init__(self, W: Tensor, gain: float):
        super().__init__()
        self.gain = gain
        self.linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.linear.weight = nn.Parameter(W / gain)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(self.gain * h))


def problem(pattern: Pattern, seed: int) -> tuple[nn.Module, nn.Module]:
    """Teacher W0 + Delta W* and student W0; Delta W* = sum_i s_i u_i v_i^T, u and v orthonormal."""
    g = torch.Generator().manual_seed(seed)
    d, (low, high) = pattern.width, pattern.strength
    W0 = [torch.randn(d, d, generator=g) / d**0.5 for _ in pattern.truth]
    W = []
    for start, rank in zip(W0, pattern.truth):
        U, V = (torch.linalg.qr(torch.randn(d, rank, generator=g))[0] for _ in "UV")  # (d, rank)
        s = low + (high - low) * torch.rand(rank, generator=g)
        W.append(start + (U * s) @ V.T)
    gains = pattern.gains or (1.0,) * len(W0)
    return nn.Sequential(*map(Residual, W, gains)), nn.Sequential(*map(Residual, W0, gains))


def misplaced(kept: list[int], truth: tuple[int, ...]) -> float:
    """Share of the true total that stands in a matrix which already has all it needs."""
    return sum(max(0, k - t) for k, t in zip(kept, truth, strict=True)) / sum(truth)


@torch.no_grad()
def loss_over_floor(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """E (student - (teacher + noise))^2 / noise^2. The noise is integrated out: the teacher gets exactly 1."""
    return 1 + float((student(x) - teacher(x)).square().mean()) / NOISE**2


def make_config(settings: dict[str, Any], pattern: Pattern) -> DoRAConfig:
    """The row's values at the pattern's budget. Without pruning every matrix gets the mean, rounded up."""
    rank: float = sum(pattern.truth) / len(pattern.truth)
    start = pattern.start
    if settings.get("importance", "") is None:
        rank = start = math.ceil(rank)
    return DoRAConfig(**{**settings, "rank": rank, "start_rank": start, "dropout": 0.0, "targets": ("linear",)})


def run(config: DoRAConfig, pattern: Pattern, seed: int, lr: float) -> dict[str, Any]:
    """Train one student; about 1.3 ms a step on one core."""
    teacher, student = problem(pattern, seed)
    torch.manual_seed(seed)  # the start of A and B
    layers = inject(student, config)
    pruner = Pruner(layers, config, pattern.steps)
    params = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    warm = max(1, round(0.06 * pattern.steps))  # up over 6 % of the steps, then linearly to 0 (paper)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, (pattern.steps - t) / (pattern.steps - warm)))
    g = torch.Generator().manual_seed(seed + 1_000_000)
    began = time.perf_counter()
    for _ in range(pattern.steps):
        x = torch.randn(pattern.batch, pattern.width, generator=g)
        with torch.no_grad():
            clean = teacher(x)
            y = clean + NOISE * torch.randn(clean.shape, generator=g)
        loss = (student(x) - y).square().mean() + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        pruner.observe()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        pruner.step()
        rate.step()
    kept = list(pruner.ranks().values())
    over = loss_over_floor(student, teacher, torch.randn(4096, pattern.width, generator=g))
    return dict(kept=kept, misplaced=round(misplaced(kept, pattern.truth), 4), loss=round(over, 4),
                seconds=round(time.perf_counter() - began, 1))


def cell_key(config: DoRAConfig, pattern: Pattern, seed: int, lr: float) -> str:
    """12 hex digits that stand for everything that decides a cell's figures."""
    text = json.dumps([asdict(config), asdict(pattern), seed, lr, NOISE], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished cells by key. A last line that was cut off is dropped: that cell runs again."""
    cells = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
            cells[cell["key"]] = cell
        except (ValueError, KeyError):
            continue
    return cells


def sweep(path: Path, names: list[str], patterns: list[str], seeds: int, lr: float) -> list[dict[str, Any]]:
    """Run every cell that path lacks, append each as it ends, return all of them."""
    table, done, cells = rows(), read(path), []
    plan = [(s, n, p) for s in range(seeds) for n in names for p in patterns]  # whole tables, seed by seed
    for i, (seed, name, p) in enumerate(plan):
        config = make_config(table[name], PATTERNS[p])
        key = cell_key(config, PATTERNS[p], seed, lr)
        if key not in done:
            done[key] = dict(key=key, row=name, pattern=p, seed=seed, **run(config, PATTERNS[p], seed, lr))
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(done[key], ensure_ascii=False) + "\n")
            print(f"{i + 1}/{len(plan)} {name} | {p} | seed {seed}: kept {done[key]['kept']}, "
                  f"loss {done[key]['loss']:.3f}", file=sys.stderr, flush=True)
        cells.append({**done[key], "row": name, "pattern": p})  # two rows may be the same settings
    return cells


def means(cells: list[dict[str, Any]], field: str) -> dict[tuple[str, str], float]:
    """Mean of a figure over the seeds, by (row, pattern)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        groups.setdefault((cell["row"], cell["pattern"]), []).append(cell[field])
    return {k: statistics.mean(v) for k, v in groups.items()}


def markdown(cells: list[dict[str, Any]]) -> str:
    """The table: misplaced % / loss over the floor, mean over seeds; the worst pattern last."""
    wrong, loss = means(cells, "misplaced"), means(cells, "loss")
    names, patterns = (list(dict.fromkeys(k[i] for k in wrong)) for i in (0, 1))
    lines = ["| row | " + " | ".join(patterns) + " | worst |", "|---|" + "---|" * (len(patterns) + 1)]
    for n in names:
        here = [(wrong[n, p], loss[n, p]) for p in patterns]
        worst = (max(w for w, _ in here), max(v for _, v in here))
        lines.append(f"| {n} | " + " | ".join(f"{100 * w:.1f} / {v:.3f}" for w, v in [*here, worst]) + " |")
    return "\n".join(lines) + "\n"


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """Two maps, rows by patterns: share misplaced and loss over the floor."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figures = (("misplaced, % of components", means(cells, "misplaced"), 100, 50, ".0f"),
               ("loss over the noise floor", means(cells, "loss"), 1, 2, ".2f"))
    names, patterns = (list(dict.fromkeys(k[i] for k in figures[0][1])) for i in (0, 1))
    fig, axes = plt.subplots(1, 2, figsize=(16, 0.28 * len(names) + 1.5), sharey=True, layout="constrained")
    for ax, (title, mean, unit, top, form) in zip(axes, figures):
        grid = [[unit * mean[n, p] for p in patterns] for n in names]
        ax.imshow(grid, aspect="auto", cmap="YlOrRd", vmin=0 if unit == 100 else 1, vmax=top)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, format(value, form), ha="center", va="center", fontsize=7)
        ax.set_xticks(range(len(patterns)), patterns, rotation=45, ha="right")
        ax.set_yticks(range(len(names)), names)
        ax.set_title(title)
    fig.savefig(path)
