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

import functools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import report
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dora import METHODS, DoRAConfig, Pruner, inject
from places import SCALE, fit, make_all, place

LOG = report.RESULTS / "surgical.jsonl"
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
BEST = "best matrix"
ROWS = (*FOUND, "its places", "shuffled", "one each", BEST)
PAIRS = (("its places", "shuffled"), ("dora", "its places"), ("dora", "one each"),
         ("dora", "adalora"), ("dora", "Eq. 7"), (BEST, "dora"))
DOTS = {"dora": report.COLORS["dora"], "its places": "#E69F00",
        "shuffled": report.COLORS["head"], "one each": report.COLORS["lora"]}
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


def make(run: dict[str, Any], ranks: list[int] | None = None) -> dict[str, Any]:
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
        ranks = ranks or ranks_of(run)
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
    ranks = report.finished(LOG)[report.key_of(dora)]["ranks"]
    if run["arm"] == "its places":
        return ranks
    return shuffled(ranks, run["seed"])


def shuffled(ranks: list[int], seed: int) -> list[int]:
    """Shuffle numbers of components over the matrices so that at least half of the components move,
    or as many as can where most matrices have the same number."""
    rng = torch.Generator().manual_seed(seed)
    others = [[ranks[i] for i in torch.randperm(len(ranks), generator=rng)] for _ in range(100)]
    stay = [sum(map(min, ranks, other)) for other in others]
    enough = (other for other, n in zip(others, stay) if 2 * n <= sum(ranks))
    return next(enough, others[stay.index(min(stay))])


def rate_of(shift: str, arm: str) -> tuple[float | None, list[dict[str, Any]]]:
    """Return the rate of an arm, None if it is not known yet, and the runs that choose it."""
    done = report.finished(LOG)
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


# ---- report --------------------------------------------------------------------------------------


def lines_of(shift: str, arm: str) -> list[dict[str, Any]]:
    """Return the reported runs of an arm, by rising seed. "best matrix" is the single matrix with
    the lowest mean loss on the seeds that choose."""
    found = [line for line in report.read_log(LOG) if line["shift"] == shift]
    if arm == BEST:
        chosen = {one: rate_of(shift, one)[0] for one in SINGLE}
        arm = min(SINGLE, key=lambda one: statistics.fmean([
            line["loss"] for line in found if line["seed"] in CHOOSE
            and (line["arm"], line["lr"]) == (one, chosen[one])] or [math.inf]))
    return sorted((line for line in found if line["arm"] == arm and line["seed"] in SEEDS),
                  key=lambda line: line["seed"])


def results_table() -> str:
    """Return error and loss of every arm on every shift."""
    body = []
    for arm in (*ROWS, *SINGLE):
        cells = []
        for shift in SHIFTS:
            lines = lines_of(shift, arm)
            if not lines:
                cells.append("not run")
                continue
            error, loss = (statistics.mean(line[name] for line in lines)
                           for name in ("error", "loss"))
            cells.append(f"{100 * error:.1f} / {loss:.3f}"
                         + f" ({lines[0]['arm']})" * (arm == BEST))
        body.append([arm, *cells])
    return report.table(["error in % / loss, means", *SHIFTS], body)


def differences_table() -> str:
    """Return the primary quantity and other pairs of arms: with how many seeds the first has the
    lower loss, the median difference, and p of a sign test."""
    body = []
    for first, second in PAIRS:
        cells = []
        for shift in SHIFTS:
            found = report.by_seed(lines_of(shift, second), lines_of(shift, first), "loss")
            cells.append(f"{report.ahead(found)}, {-statistics.median(found):+.3f}, "
                         f"p {report.coin(found):.2g}" if found else "not run")
        body.append([f"{first} minus {second}", *cells])
    return report.table(["loss: lower in, median, sign test", *SHIFTS], body)


def components_table() -> str:
    """Return the mean number of components in each matrix."""
    body = [[f"{shift}, {arm}", *(f"{mean:.1f}" for mean in means(shift, arm))]
            for shift in SHIFTS for arm in FOUND if lines_of(shift, arm)]
    return report.table(["components kept", *(f"matrix {name}" for name in NAMES)], body)


def means(shift: str, arm: str) -> list[float]:
    """Return the mean number of components of each matrix."""
    return [statistics.mean(kept) for kept in zip(*(
        line["ranks"] for line in lines_of(shift, arm)))]


def write_report() -> None:
    """Write surgical.md and surgical.svg from the log."""
    lines = report.read_log(LOG)
    seeds = sorted({line["seed"] for line in lines} - {*CHOOSE})
    rates = [[arm, *(f"{rate_of(shift, arm)[0] or 0:g}" for shift in SHIFTS)] for arm in ARMS]
    text = f"""# Digits whose right place is known

Written by `python benchmarks/surgical.py`, which has the protocol: {len(lines)} runs
({sum(line["seconds"] for line in lines) / 60:.0f} minutes of one core, commits {
    ", ".join(sorted({line["commit"] for line in lines}))}), {len(seeds)} of {len(SEEDS)} seeds.

{differences_table()}

{results_table()}

{components_table()}

Rates:

{report.table(["arm", *SHIFTS], rates)}
"""
    (report.RESULTS / "surgical.md").write_text(text, "utf-8")
    if seeds:
        plot()


def plot() -> None:
    """Draw where components end, as maps, and under each the errors by seed."""
    shown = ("mirrored", "renamed", "placebo")
    says = ("the first matrix must change", "the last matrix must change", "nothing has to change")
    figure = report.figure(8, 4.2)
    axes = figure.subplots(2, len(shown), height_ratios=[1, 1.7])
    for (top, bottom), shift, text in zip(axes.T, shown, says):
        grid = [means(shift, arm) for arm in FOUND]
        top.imshow(grid, cmap="Oranges", vmin=0, vmax=COMPONENTS, aspect="auto")
        for y, row in enumerate(grid):
            for x, mean in enumerate(row):
                top.text(x, y, f"{mean:.1f}", ha="center", va="center", fontsize=7,
                         color="white" if mean > 4 else "black")
        top.set_xticks(range(len(NAMES)), NAMES)
        top.set_yticks(range(len(FOUND)), FOUND if shift == shown[0] else [""] * len(FOUND))
        top.set_xlabel("matrix")
        top.set_title(f"{shift}: {text}")

        for x, (arm, color) in enumerate(DOTS.items()):
            errors = [100 * line["error"] for line in lines_of(shift, arm)]
            offsets = [x + 0.5 * ((7 * i % 20) / 19 - 0.5) for i in range(len(errors))]
            bottom.plot(offsets, errors, "o", ms=3, mew=0, alpha=0.8, color=color)
            bottom.hlines(statistics.mean(errors), x - 0.35, x + 0.35, color="black", lw=1.2)
        bottom.set_xticks(range(len(DOTS)), [arm.replace(" ", "\n") for arm in DOTS])
        bottom.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("mean of 20 seeds")
    axes[1, 0].set_ylabel("test error, %: seeds, mean")
    report.save_figure(figure, report.RESULTS / "surgical.svg")


def short() -> None:
    """Check that the first matrix can repair a swap, that shuffled components move, and that dora
    finds the first matrix after mirroring, and its places help, with two seeds."""
    x, _ = digits()
    assert torch.linalg.matrix_rank(shifted("swapped", 1)[0] - x) == 3
    for seed in SEEDS:
        other = shuffled([5, 1, 0, 0, 0, 0, 0], seed)
        assert sum(other) == 6 and min(other[0], 5) + min(other[1], 1) <= 3
    for seed in (1, 2):
        kept = make(dict(shift="mirrored", arm="dora", seed=seed, lr=5e-3))["ranks"]
        losses = {}
        for arm, ranks in (("its places", kept), ("shuffled", shuffled(kept, seed))):
            losses[arm] = make(dict(shift="mirrored", arm=arm, seed=seed, lr=5e-3), ranks)["loss"]
        print(f"seed {seed}: kept {kept}, loss {losses}")
        assert sum(kept) == COMPONENTS and kept[0] >= 3
        assert losses["its places"] < losses["shuffled"]


def main() -> None:
    """Run the command line."""
    args = report.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    if args.short:
        return short()
    if not args.report:
        make_all(LOG, to_do, make, onednn=False)  # which is slower with matrices this small
    write_report()


if __name__ == "__main__":
    main()
