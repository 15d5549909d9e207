"""Does dora find the matrix that has to change? Digits whose input or labels change.

    python benchmarks/surgical.py            # all runs that are missing, then tables and figure
    python benchmarks/surgical.py --report   # only tables and figure, from the runs there are
    python benchmarks/surgical.py --short    # half a minute: what CI runs

The protocol, fixed before the first run that is reported
---------------------------------------------------------
A change of the input needs the first matrices of a network, a change of the labels the last one
(Lee et al. 2023, "Surgical fine-tuning", arXiv 2210.11466). So here the right place is known.

scikit-learn has 1,797 digits of 8 x 8 pixels. A network of seven matrices (the first without a
residual connection, five with one, the last to ten classes) learns 800 of them. Then the task
shifts, 500 others train with six components in all, and the remaining 497 test:

    mirrored   left and right change sides: the first matrix must change
    swapped    three pairs of pixels change places: rank 3 in the first matrix repairs it exactly
    renamed    every class gets the next one's name: the last matrix must change
    placebo    new examples, nothing has changed: no place is right

600 steps of batch 32, AdamW with warm-up, then linear to 0, scale 8, no dropout. Arms:

    dora           six components of 42 (r' = 6) remain
    its places     plain LoRA from the start, with as many components in each matrix as dora kept
    shuffled       these numbers shuffled over all matrices, so that at least half of them move
    one each       plain LoRA with one component in each of the seven matrices
    matrix 1 to 7  plain LoRA with six components in one matrix; the best of these is an oracle
    adalora        with the same r'; Eq. 7 is dora with the paper's score, smoothing and curve

Each arm takes, for each shift, the rate with the lowest mean loss on seeds 100 to 103, which train
on 350 of the 500 and are scored on the other 150. The best single matrix is chosen there, too.
Reported are seeds 1 to 20, on the test set; a seed fixes split, start and order of the data.

Primary quantity: test loss of its places minus that of shuffled, seed by seed, with a sign test.
Expected: lower with 15 of 20 seeds or more when mirrored, and with about 10 on the placebo. If it
is lower as often on the placebo, the benefit is not that of the right place. If it is about 10 when
mirrored, the method does not find a known place, and the README must not say that it does.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import report  # noqa: E402
from dora import METHODS, DoRAConfig, Pruner, inject  # noqa: E402
from places import SCALE, fit, make_all, place  # noqa: E402

LOG = ROOT / "benchmarks" / "results" / "surgical.jsonl"
STEPS, BATCH, COMPONENTS, START = 600, 32, 6, 6
SHIFTS = ("mirrored", "renamed", "placebo", "swapped")
NAMES = tuple("1234567")  # of the matrices, and of the modules
SINGLE = tuple(f"matrix {name}" for name in NAMES)
FOUND = {
    "dora": METHODS["dora"],
    "adalora": METHODS["adalora"],
    "Eq. 7": dict(importance="norm", beta1=0.9, beta2=None, schedule="slow_first"),
}
ARMS = (*FOUND, "its places", "shuffled", "one each", *SINGLE)
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
CHOOSE, SEEDS = range(100, 104), range(1, 21)


class Network(nn.Module):
    """Seven matrices: 64 to 64, five residual ones, 64 to 10."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(64, 64 if name != NAMES[-1] else 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, 64) to logits (B, 10)."""
        first, *middle, last = (self.get_submodule(name) for name in NAMES)
        h = F.relu(first(x))
        for matrix in middle:
            h = h + F.relu(matrix(h))
        return last(h)


def train(net: nn.Module, x: Tensor, y: Tensor, lr: float, seed: int,
          pruner: Pruner | None = None) -> None:
    """Train on random batches of the examples x (n, 64), y (n,)."""
    rng = torch.Generator().manual_seed(seed)

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(x), (BATCH,), generator=rng)
        return F.cross_entropy(net(x[rows]), y[rows])

    fit(net, loss_of, STEPS, lr, pruner)


@functools.lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Return pixels from 0 to 1, (1797, 64), and classes (1797,)."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


@functools.lru_cache(maxsize=len(CHOOSE))
def pretrained(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights after training on 800 digits, and the other digits' rows."""
    rows = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    x, y = digits()
    torch.manual_seed(seed)
    net = Network()
    train(net, x[rows[:800]], y[rows[:800]], 2e-3, seed)
    return net.state_dict(), rows[800:]


def shifted(shift: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return all digits after a shift."""
    x, y = digits()
    if shift == "mirrored":
        return x.view(-1, 8, 8).flip(2).flatten(1), y
    if shift == "swapped":  # six of the pixels that vary most, so that each swap matters
        rng = torch.Generator().manual_seed(seed)
        six = x.var(0).topk(24).indices[torch.randperm(24, generator=rng)[:6]]
        x = x.clone()
        x[:, six] = x[:, six.roll(3)]
    return x, (y + 1) % 10 if shift == "renamed" else y


# ---- one run -------------------------------------------------------------------------------------


def make(run: dict[str, Any]) -> dict[str, Any]:
    """Train one arm and return its loss, its error and the components of each matrix."""
    arm, seed = run["arm"], run["seed"]
    weights, rows = pretrained(seed)
    x, y = shifted(run["shift"], seed)
    cut, end = (350, 500) if seed in CHOOSE else (500, len(rows))
    torch.manual_seed(seed)
    net, pruner = Network(), None
    net.load_state_dict(weights)

    if arm in FOUND:
        config = DoRAConfig(**{
            **FOUND[arm], "targets": NAMES, "rank": COMPONENTS / len(NAMES), "start_rank": START,
            "alpha": SCALE * (START if arm == "adalora" else 1), "dropout": 0.0,
            "budget_unit": "components"})
        pruner = Pruner(inject(net, config), config, STEPS)
    else:
        ranks = ranks_of(run)
        place(net, dict(zip(NAMES, ranks)), dropout=0.0)
    train(net, x[rows[:cut]], y[rows[:cut]], run["lr"], seed, pruner)

    net.eval()
    with torch.no_grad():
        logits = net(x[rows[cut:end]])
    truth = y[rows[cut:end]]
    wrong = (logits.argmax(1) != truth).nonzero()[:, 0].tolist()  # the predictions that differ
    return dict(loss=round(F.cross_entropy(logits, truth).item(), 5), wrong=wrong,
                error=round(len(wrong) / len(truth), 5),
                ranks=[*pruner.ranks().values()] if pruner else ranks)


def ranks_of(run: dict[str, Any]) -> list[int]:
    """Return the components of each matrix of an arm whose places are fixed."""
    if run["arm"] == "one each":
        return [1] * len(NAMES)
    if run["arm"] in SINGLE:
        return [COMPONENTS * (name == run["arm"][-1]) for name in NAMES]
    dora = dict(run, arm="dora", lr=rate_of(run["shift"], "dora")[0])
    ranks = finished()[report.key_of(dora)]["ranks"]
    if run["arm"] == "its places":
        return ranks
    rng = torch.Generator().manual_seed(run["seed"])
    while True:  # until at least half of the components are in another matrix
        other = [ranks[i] for i in torch.randperm(len(ranks), generator=rng)]
        if 2 * sum(map(min, ranks, other)) <= sum(ranks):
            return other


def finished() -> dict[str, dict[str, Any]]:
    """Return the lines of the log by key."""
    return {line["key"]: line for line in report.read_log(LOG)}


def rate_of(shift: str, arm: str) -> tuple[float | None, list[dict[str, Any]]]:
    """Return the rate of an arm, None if it is not known yet, and the runs that choose it."""
    done = finished()
    runs = {lr: [dict(shift=shift, arm=arm, seed=seed, lr=lr) for seed in CHOOSE] for lr in RATES}
    missing = [run for lr in RATES for run in runs[lr] if report.key_of(run) not in done]
    if missing:
        return None, missing
    losses = {lr: sum(done[report.key_of(run)]["loss"] for run in runs[lr]) for lr in RATES}
    return min(RATES, key=losses.__getitem__), []


def to_do() -> Iterator[dict[str, Any]]:
    """Yield the runs in their order: the rates, dora's first, then the reported seeds."""
    rates = {}
    for shift in SHIFTS:
        for arm in ARMS:
            rates[shift, arm], missing = rate_of(shift, arm)
            yield from missing
            if missing:
                return
    for seed in SEEDS:
        for shift, arm in rates:
            yield dict(shift=shift, arm=arm, seed=seed, lr=rates[shift, arm])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", action="store_true", help="only write tables and figure")
    parser.add_argument("--short", action="store_true", help="check the machinery only, for CI")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.report:
        make_all(LOG, to_do, make, onednn=False)  # slower with matrices this small


if __name__ == "__main__":
    main()
