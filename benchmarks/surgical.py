"""Does dora find the matrix that has to change? Digits whose input or labels change.

    python benchmarks/surgical.py    # all runs that are missing, then tables and figure

The protocol, which was fixed before the runs, is in README.md.
"""

import functools
import itertools
import math
import statistics

import report
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from dora import METHODS, DoRAConfig, Pruner, inject

LOG = report.RESULTS / "surgical.jsonl"
STEPS, BATCH, COMPONENTS, START, SCALE = 600, 32, 6, 6, 8.0
SHIFTS = ("mirrored", "renamed", "placebo", "swapped")
NAMES = tuple("1234567")  # of the matrices, and of the modules
SINGLE = tuple(f"matrix {name}" for name in NAMES)
FOUND = {
    "dora": METHODS["dora"],
    "AdaLoRA's start": dict(init="gaussian"),
    "adalora": METHODS["adalora"],
    "Eq. 7": dict(importance="norm", beta1=0.9, beta2=None, schedule="slow_first"),
}
ARMS = (*FOUND, "its places", "shuffled", "one each", *SINGLE)
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
BEST = "best matrix"
ROWS = (*FOUND, "its places", "shuffled", "one each", BEST)
PAIRS = (("its places", "shuffled"), ("dora", "its places"), ("dora", "one each"),
         ("dora", "adalora"), ("dora", "Eq. 7"), (BEST, "dora"))
SHOWN = {"mirrored": "the first must change", "renamed": "the last must change",
         "placebo": "no change is needed"}
DOTS = {"dora": report.COLORS["dora"], "its places": "#E69F00",
        "shuffled": report.COLORS["head"], "one each": report.COLORS["lora"],
        "adalora": report.COLORS["adalora"]}
CHOOSE, SEEDS = range(100, 104), range(1, 21)


class Network(nn.Module):
    """Seven matrices: 64 to 64, five residual ones, 64 to 10."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(64, 64 if name != NAMES[-1] else 10))

    def forward(self, x):
        """Map pixels (B, 64) to logits (B, 10)."""
        first, *middle, last = (self.get_submodule(name) for name in NAMES)
        h = F.relu(first(x))
        for matrix in middle:
            h = h + F.relu(matrix(h))
        return last(h)


def train(net, x, y, lr, seed, pruner=None):
    """Train on random batches of the examples x (n, 64), y (n,)."""
    rng = torch.Generator().manual_seed(seed)

    def loss_of():
        rows = torch.randint(len(x), (BATCH,), generator=rng)
        return F.cross_entropy(net(x[rows]), y[rows])

    report.fit(net, loss_of, STEPS, lr, pruner)


@functools.lru_cache(maxsize=1)
def digits():
    """Return pixels from 0 to 1, (1797, 64), and classes (1797,)."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


@functools.lru_cache(maxsize=len(CHOOSE))
def pretrained(seed):
    """Return the weights after training on 800 digits, and the other digits' rows."""
    rows = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    x, y = digits()
    torch.manual_seed(seed)
    net = Network()
    first, others = rows.split([800, 997])
    train(net, x[first], y[first], 2e-3, seed)
    return net.state_dict(), others


def shifted(shift, seed):
    """Return all digits after a shift."""
    x, y = digits()
    if shift == "mirrored":
        return x.view(-1, 8, 8).flip(2).flatten(1), y
    if shift == "swapped":  # six of the pixels that vary most, so that each swap matters
        rng = torch.Generator().manual_seed(seed)
        lively = x.var(0).topk(24).indices
        six = lively[torch.randperm(24, generator=rng)[:6]]
        x = x.clone()
        x[:, six] = x[:, six.roll(3)]
    return x, (y + 1) % 10 if shift == "renamed" else y


def make(run, ranks=None):
    """Train one arm and return its loss, its error and the components of each matrix."""
    arm, seed = run["arm"], run["seed"]
    weights, others = pretrained(seed)
    trained, scored = others.split([500, 497])
    if seed in CHOOSE:
        trained, scored = trained.split([350, 150])
    x, y = shifted(run["shift"], seed)
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
        report.place(net, dict(zip(NAMES, ranks)), SCALE, dropout=0.0)
    train(net, x[trained], y[trained], run["lr"], seed, pruner)

    net.eval()
    with torch.no_grad():
        logits = net(x[scored])
    loss = F.cross_entropy(logits, y[scored]).item()
    missed = logits.argmax(1) != y[scored]
    wrong = missed.nonzero()[:, 0].tolist()
    if pruner:
        ranks = [*pruner.ranks().values()]
    error = round(len(wrong) / len(scored), 5)
    return dict(loss=round(loss, 5), wrong=wrong, error=error, ranks=ranks)


def ranks_of(run):
    """Return the components of each matrix of an arm whose places are fixed."""
    if run["arm"] == "one each":
        return [1] * len(NAMES)
    if run["arm"] in SINGLE:
        return [COMPONENTS * (name == run["arm"][-1]) for name in NAMES]
    dora = {**run, "arm": "dora", "lr": rate_of("dora", run["shift"])}
    ranks = report.finished(LOG)[report.key_of(dora)]["ranks"]
    if run["arm"] == "its places":
        return ranks
    return shuffled(ranks, run["seed"])


def shuffled(ranks, seed):
    """Shuffle numbers of components over the matrices so that at least half of the components move,
    or as many as can where most matrices have the same number."""
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(ranks), generator=rng) for _ in range(100)]
    others = [[ranks[i] for i in order] for order in orders]
    stay = [sum(map(min, ranks, other)) for other in others]
    enough = (other for other, n in zip(others, stay) if 2 * n <= sum(ranks))
    return next(enough, others[stay.index(min(stay))])


def losses(arm, shift):
    """Return the mean loss of an arm by rate, on the seeds that choose its rate."""
    return report.mean_by_rate(LOG, trials(arm, shift), "loss")


def trials(arm, shift):
    """Return by rate the runs that choose an arm's rate."""
    return report.by_rate(dict(shift=shift, arm=arm), CHOOSE, RATES)


def rate_of(arm, shift):
    """Return the rate that was chosen for an arm, None until it is known."""
    tried = losses(arm, shift)
    return min(tried, key=tried.__getitem__, default=None)


def to_do():
    """Yield the runs in their order: the rates, dora's first, then the reported seeds."""
    rates = {}
    for shift, arm in itertools.product(SHIFTS, ARMS):
        rates[shift, arm] = rate_of(arm, shift)
        if rates[shift, arm] is None:
            yield from itertools.chain(*trials(arm, shift).values())
            return
    for seed in SEEDS:
        for (shift, arm), lr in rates.items():
            yield dict(shift=shift, arm=arm, seed=seed, lr=lr)


# ---- report --------------------------------------------------------------------------------------


def lines_of(arm, shift):
    """Return the reported runs of an arm, by rising seed. The best matrix is the one with the
    lowest mean loss on the seeds that choose the rates."""
    if arm == BEST:
        arm = min(SINGLE, key=lambda arm: min(losses(arm, shift).values(), default=math.inf))
    lines = report.lines_of(LOG, shift=shift, arm=arm)
    return [line for line in lines if line["seed"] in SEEDS]


def write_report():
    """Write surgical.md and surgical.svg from the log."""
    lines = report.read_log(LOG)
    seeds = {line["seed"] for line in lines} - {*CHOOSE}
    kept = [[f"{shift}, {arm}", *(f"{mean:.1f}" for mean in means(arm, shift))]
            for shift in SHIFTS for arm in FOUND]
    report.write_page("surgical", "Digits whose right place is known", lines, [
        f"The tables have {len(seeds)} of {len(SEEDS)} seeds. The commits before 50eb69d ran with "
        "dora.py of af50a13, which computes the same.",
        report.differences_table("loss: lower in, median, sign test", SHIFTS, PAIRS, lines_of,
                                 "loss", compared),
        report.grid("error in % / loss, medians", SHIFTS, (*ROWS, *SINGLE), medians),
        report.table(["components kept", *(f"matrix {name}" for name in NAMES)], kept),
        "Rates:",
        report.grid("arm", SHIFTS, ARMS, lambda arm, shift: str(rate_of(arm, shift)))])
    plot()


def compared(differences):
    """Return with how many seeds a loss is lower, the median difference, and p of a sign test."""
    lower = sum(difference < 0 for difference in differences)
    return (f"{lower} of {len(differences)}, {statistics.median(differences):+.3f}, "
            f"p {report.coin(differences):.2g}")


def medians(arm, shift):
    """Return error and loss of an arm."""
    lines = lines_of(arm, shift)
    error, loss = (statistics.median(line[name] for line in lines) for name in ("error", "loss"))
    return f"{100 * error:.1f} / {loss:.3f}" + f" ({lines[0]['arm']})" * (arm == BEST)


def means(arm, shift):
    """Return the mean number of components of each matrix."""
    kept = [line["ranks"] for line in lines_of(arm, shift)]
    return [*map(statistics.mean, zip(*kept))]


def plot():
    """Draw where components end, as maps, and under each the errors by seed."""
    figure = report.figure(8, 4.2)
    axes = figure.subplots(2, len(SHOWN), height_ratios=[1, 1.7], sharey="row")
    for (top, bottom), (shift, text) in zip(axes.T, SHOWN.items()):
        grid = [means(arm, shift) for arm in FOUND]
        report.heat_map(top, grid, FOUND, NAMES, 0, COMPONENTS)
        top.set(xlabel="matrix", title=f"{shift}: {text}")

        for x, (arm, color) in enumerate(DOTS.items()):
            errors = [100 * line["error"] for line in lines_of(arm, shift)]
            places = [x - 0.25 + 0.5 * (7 * i % 20) / 19 for i in range(len(errors))]
            bottom.plot(places, errors, "o", ms=3, mew=0, alpha=0.8, color=color)
            middle = statistics.median(errors)
            bottom.hlines(middle, x - 0.35, x + 0.35, color="black", lw=1.2)
        names = [arm.replace(" ", "\n") for arm in DOTS]
        bottom.set_xticks(range(len(DOTS)), names)
    seeds, ticks = len(lines_of("dora", "mirrored")), (2, 5, 10, 20, 50)
    axes[0, 0].set_ylabel("components kept\n"f"(mean of {seeds} seeds)")
    axes[1, 0].set(ylabel="test error in %: seeds, median", yscale="log")
    axes[1, 0].set_yticks(ticks, ticks)
    axes[1, 0].minorticks_off()
    report.save_figure(figure, report.RESULTS / "surgical.svg")


def short():
    """Check that the first matrix can repair a swap, that shuffled components move, and that dora
    finds the first matrix after mirroring, and its places help, with two seeds."""
    x, _ = digits()
    assert torch.linalg.matrix_rank(shifted("swapped", 1)[0] - x) == 3
    for seed in SEEDS:
        kept = shuffled([5, 1, 0, 0, 0, 0, 0], seed)
        assert sum(kept) == 6 and min(kept[0], 5) + min(kept[1], 1) <= 3
    for seed in (1, 2):
        run = dict(shift="mirrored", seed=seed, lr=5e-3)
        kept = make({**run, "arm": "dora"})["ranks"]
        own = make({**run, "arm": "its places"}, kept)["loss"]
        other = make({**run, "arm": "shuffled"}, shuffled(kept, seed))["loss"]
        print(f"seed {seed}: kept {kept}, loss in its places {own:.3f}, shuffled {other:.3f}")
        assert sum(kept) == COMPONENTS and kept[0] >= 3
        assert own < other


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, make, write_report, short)
