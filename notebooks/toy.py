"""What the notebooks share: the look of the figures, and a network whose true ranks are known."""
import copy
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.animation import FuncAnimation
from matplotlib.colors import ListedColormap
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dora import (  # noqa: E402
    IMPORTANCE, METHODS, DoRAConfig, Pruner, budget, inject, sensitivity)
from report import COLORS as METHOD  # noqa: E402, F401  one color per method, as in the README

# ---- the look ------------------------------------------------------------------------------------

# One color means one thing in all notebooks. Methods have Okabe and Ito's colors (see report.py:
# orange-red, pink, green, blues, yellow, black), and nothing below comes near one of these.
MATRIX = {"first": "#222255", "second": "#999933", "third": "#882255"}  # matrices and components
SCORE = {"sensitivity": "#4B3B2A", "size": "#A07B4F", "Eq. 7": "#D8BF9A", "random": "#DDDDDD"}
LIVE, DRIFT, ZERO, BUDGET = "#3B4A6B", "#B9C3D6", "#FFFFFF", "#000000"  # states of a gate; b(t)
GRAY, PAIR = "#777777", ("#7B4FB5", "#C3A9E0")  # context; two things that are compared

plt.rcParams.update({
    "figure.figsize": (7, 4.2), "figure.dpi": 100, "font.size": 13, "axes.titlesize": 13,
    "figure.titlesize": 14, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True})


# without the darkest blues, so that a color bar ends at the largest value and numbers stay legible
BLUES = ListedColormap(plt.get_cmap("Blues")(range(220)))


def draw_ranks(ax, ranks, columns, top=None):
    """Draw live components as a table of colored numbers: ranks (rows, columns)."""
    top = top or float(ranks.max())
    image = ax.imshow(ranks, cmap=BLUES, vmin=0, vmax=top, aspect="auto")
    for row, line in enumerate(ranks.tolist()):
        for k, rank in enumerate(line):
            ax.text(k, row, f"{rank:g}", ha="center", va="center",
                    color="white" if rank > 0.75 * top else "black")
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    ax.set_yticks(range(len(ranks)))
    return image


def draw_states(ax, gates, masks, last, start=30, end=200):
    """Draw, for each step, which components are live, pruned but not 0, or 0: both (steps, n)."""
    state = torch.where(masks, 2, (gates != 0).int())[start - 1:end].T  # (n, steps)
    n = len(state)
    ax.imshow(state, aspect="auto", interpolation="nearest", vmin=0, vmax=2,
              extent=(start - 0.5, end + 0.5, n - 0.5, -0.5),
              cmap=ListedColormap([ZERO, DRIFT, LIVE]))
    for color, name in ((LIVE, "live"), (DRIFT, "pruned, gate not 0"), (ZERO, "pruned, gate 0")):
        ax.bar(0, 0, color=color, ec="black", label=name)
    ax.axvline(last + 0.5, color="black", ls=":", lw=2, label="last pruning")
    ax.set(xlabel="step", xlim=(start - 0.5, end + 0.5), ylim=(n - 0.5, -0.5), yticks=range(n),
           yticklabels=[f"{name} {i}" for name in TRUE for i in range(n // len(TRUE))])


def draw_picture(ax, matrix, title, top=1.2):
    """Draw a matrix as a picture in gray; 0 is the gray in the middle."""
    ax.imshow(matrix.detach(), cmap="gray", vmin=-top, vmax=top)
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ---- a picture as a matrix -----------------------------------------------------------------------

CORNER = slice(0, 10), slice(21, 32)  # rows and columns of the moon


def picture():
    """Return two (32, 32) matrices: a frozen night sky, and an update with a house and a moon."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    update = torch.zeros(32, 32)
    update[18:30, 3:19] = 0.7  # walls
    update[(y >= 10) & (y < 18) & ((x - 10.5).abs() <= 1.25 * (y - 9))] = 1.3  # roof
    update[20:24, 5:8] = update[20:24, 14:17] = update[23:30, 9:13] = -0.3  # windows and door
    update[torch.hypot(y - 4.5, x - 26.5) <= 4.2] = 1.1  # the moon
    for row, columns in ((3, [25, 28]), (5, [24, 29]), (6, [25, 26, 27, 28])):
        update[row, columns] = -0.3  # its face
    return 0.3 * y / 31 - 0.7, update


# ---- the network ---------------------------------------------------------------------------------

TRUE = {"first": 3, "second": 0, "third": 1}  # the rank of the teacher's change of each matrix

# The default method, but for these: 4 components per matrix at the start, 4 in all at the end. As
# the matrices have one size, components or parameters count alike. No dropout, no penalty.
SETTINGS = dict(targets=tuple(TRUE), rank=4 / 3, start_rank=4, alpha=4, scale="start_rank",
                dropout=0, interval=5, penalty=None, budget_unit="components")
PAPER = {**METHODS["paper"], "penalty": "dem"}  # the paper's own method, on this network
EVEN, UNEVEN = (1, 1, 1), (3, 1 / 3, 1)  # what the inputs of each matrix are multiplied by


class Times(nn.Module):
    """Multiply by a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def networks(seed, gains=EVEN):
    """Return (student, teacher): the teacher has a matrix of known rank added to each.

    A gain multiplies the inputs of a matrix and divides the matrix and its change. So networks of
    different gains compute the same. They differ in the size that a matrix must have.
    """
    torch.manual_seed(seed)
    student = nn.Sequential()
    for (name, follower), gain in zip((("first", "tanh"), ("second", "tanh_2"), ("third", None)),
                                      gains):
        if gain != 1:
            student.add_module(f"gain_{name}", Times(gain))
        student.add_module(name, nn.Linear(16, 16))
        if follower:
            student.add_module(follower, nn.Tanh())
    for name, gain in zip(TRUE, gains):
        nn.init.normal_(student.get_submodule(name).weight, std=1 / 4 / gain)

    teacher = copy.deepcopy(student)
    for (name, rank), gain in zip(TRUE.items(), gains):
        b, a = (torch.linalg.qr(torch.randn(16, 16))[0][:, :rank] for _ in range(2))
        teacher.get_submodule(name).weight.data += 1.5 / gain * b @ a.T  # of exactly this rank
    return student, teacher.requires_grad_(False)


def batch_loss(run, size=32, noise=0.1):
    """Return the loss on a new batch: the teacher's outputs plus noise are the labels."""
    x = torch.randn(size, 16)
    return F.mse_loss(run.student(x), run.teacher(x) + noise * torch.randn(size, 16))


def true_loss(run, n=2000):
    """Return the loss on fixed inputs, without noise."""
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    return F.mse_loss(run.student(x), run.teacher(x))


def fit(seed, observed=None, moved=None, pruned=None, until=300, extra=None, size=32, noise=0.1,
        lr=0.02, gains=EVEN, **settings):
    """Train the student of a seed for `until` of 300 steps.

    Return the run: student, teacher, layers, pruner. Three functions may look at it in each step:
    observed(run) after pruner.observe(), moved(run) after optimizer.step(), and pruned(run) after
    pruner.step(). extra(layers) is added to the loss. A batch has `size` examples, noisy.
    """
    student, teacher = networks(seed, gains)
    config = DoRAConfig(**{**SETTINGS, **settings})
    layers = inject(student, config)
    run = SimpleNamespace(student=student, teacher=teacher, layers=layers,
                          pruner=Pruner(layers, config, 300))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr)
    for _ in range(until):
        loss = batch_loss(run, size, noise) + run.pruner.penalty()
        if extra:
            loss = loss + extra(list(layers.values()))

        optimizer.zero_grad()
        loss.backward()
        run.pruner.observe()
        if observed:
            observed(run)

        optimizer.step()
        if moved:
            moved(run)

        run.pruner.step()
        if pruned:
            pruned(run)
    return run


# ---- what to measure on a run --------------------------------------------------------------------


def gates(run):
    """Return the gates of all components, (n,)."""
    return torch.cat([layer.c.detach() for layer in run.layers.values()])


def misplaced(run):
    """Return how many live components are in the wrong matrix."""
    found = run.pruner.ranks()
    return sum(abs(found[name] - rank) for name, rank in TRUE.items()) // 2


def slopes(run):
    """Return -c_i dL/dc_i on all data, (n,): what removing component i does, to first order."""
    run.student.zero_grad()
    true_loss(run).backward()
    return torch.cat([-layer.c.detach() * layer.c.grad for layer in run.layers.values()])


@torch.no_grad()
def loss_with(run, k, share):
    """Return the loss with only a share of the gate of component k = 0..n-1 left."""
    layer, i = list(run.layers.values())[k // 4], k % 4
    kept = layer.c[i].item()
    layer.c[i] *= share
    loss = true_loss(run).item()
    layer.c[i] = kept
    return loss


def removals(run):
    """Return what removing each component really does to the loss, (n,)."""
    loss = true_loss(run).item()
    return torch.tensor([loss_with(run, k, 0) - loss for k in range(len(gates(run)))])


def still(run, size, n=300):
    """Hold the weights still and let a new Pruner observe n batches; size None is all data.

    Returns I of each batch (n, 12), and the averages Ī and Ū after it (n, 12).
    """
    frozen, seen = Pruner(run.layers, run.pruner.config, 300), []
    for _ in range(n):
        run.student.zero_grad()
        (batch_loss(run, size) if size else true_loss(run)).backward()
        frozen.observe()
        frozen.observed = False  # no step follows
        I = sensitivity(list(run.layers.values())).detach()
        seen.append(torch.stack([I, frozen.I_bar[0], frozen.U_bar[0]]))
    return torch.stack(seen, 1)


# ---- runs that are watched -----------------------------------------------------------------------


def watched(seed, **settings):
    """Train, and note after each step the gates, masks and scores, (steps, 12) each, and b(t)."""
    gates_, masks, scores = [], [], []

    def pruned(run):
        gates_.append(gates(run).clone())
        masks.append(run.pruner.mask.clone())
        scores.append(run.pruner.scores())

    run = fit(seed, pruned=pruned, **settings)
    run.gates, run.masks, run.scores = map(torch.stack, (gates_, masks, scores))
    run.b = [budget(t, 300, run.pruner.config, per_rank=3) for t in range(1, 301)]
    return run


def recorded(seed, until, **settings):
    """Train, and note of each step what Algorithm 1 reads, and what the Pruner makes of it."""
    record = []

    def observed(run):  # after backward() and observe()
        grad = torch.cat([layer.c.grad for layer in run.layers.values()])
        record.append({"c": gates(run).clone(), "grad": grad.clone()})

    def moved(run):  # after the optimizer
        record[-1]["moved"] = gates(run).clone()

    def pruned(run):  # after pruner.step()
        pruner = run.pruner
        record[-1]["pruner"] = [value.clone() for value in (
            pruner.I_bar[0], pruner.U_bar[0], pruner.mask, gates(run))]

    run = fit(seed, observed, moved, pruned, until=until, **settings)
    run.record = record
    return run


HEAD = "step b component       c  dL/dc      I      Ī      Ū   score place  mask   c moved   c new"


def step_line(t, i, row):
    """Return the values of component i in step t as a line under HEAD."""
    small = "".join(f"{1000 * row[key][i]:7.2f}" for key in ("I", "I_bar", "U_bar"))
    return (f"{t} {row['b']:4} {list(TRUE)[i // 4]:>8} {i % 4} {row['c'][i]:7.3f} "
            f"{row['grad'][i]:6.3f}{small} {1e6 * row['score'][i]:7.2f} {row['place'][i]:5}  "
            f"{'live' if row['mask'][i] else '-':>4} {row['moved'][i]:9.3f} {row['new'][i]:7.3f}")


def water_line(path, run):
    """Write a film of a watched run's prunings: sorted scores, and the budget as a water line."""
    fig, ax = plt.subplots(figsize=(6.4, 3.8), dpi=100)

    def frame(t):
        values, order = run.scores[t - 1].clamp(min=2e-13).sort(descending=True, stable=True)
        ax.clear()
        ax.bar(range(12), values, color=[list(MATRIX.values())[i // 4] for i in order.tolist()])
        ax.axvspan(run.b[t - 1] - 0.5, 11.5, color="#CFE8F7", zorder=0)
        ax.axvline(run.b[t - 1] - 0.5, color=BUDGET, lw=2)
        for color, name, live in zip(MATRIX.values(), TRUE, run.masks[t - 1].split(4)):
            ax.bar(0, 0, color=color, label=f"{name} matrix: {live.sum()} live")
        ax.legend(loc="upper right")
        ax.set(yscale="log", ylim=(1e-13, 1e-2), xlim=(-0.5, 11.5), xticks=[], ylabel="score",
               xlabel="components, sorted (3, 0 and 1 are needed)",
               title=f"step {t}: a budget of {run.b[t - 1]} components")

    times = [45] * 4 + list(range(50, 151, 5)) + [150] * 8
    FuncAnimation(fig, frame, frames=times).save(path, writer="pillow", fps=4)
    plt.close(fig)


# ---- to judge a score ----------------------------------------------------------------------------


def random_score(layers):
    """Return one random number for each component, (n,), the same in each step of a run."""
    n = sum(len(layer.c) for layer in layers)
    return torch.rand(n, generator=torch.Generator().manual_seed(torch.initial_seed()))


IMPORTANCE["random"] = random_score, "weights", torch.cat


def judged(settings, seeds, gains):
    """Return two tensors (seeds,): components in the wrong matrix, and the loss at the end.

    Batches have 8 examples, and the noise is five times that of the other runs. A run stops after
    step 200, which is 50 steps after the last pruning.
    """
    runs = [fit(seed, until=200, size=8, noise=0.5, gains=gains, **settings)
            for seed in range(seeds)]
    return (torch.tensor([float(misplaced(run)) for run in runs]),
            torch.tensor([true_loss(run).item() for run in runs]))


@functools.cache
def yardsticks(seeds, gains):
    """Return what the default does, and what a random score does."""
    return {"default": judged({}, seeds, gains),
            "random": judged(dict(importance="random", beta2=None), seeds, gains)}


def compare(seeds=10, **settings):
    """Judge settings: print a row for the default, for these settings and for a random score.

    There are two networks. In the uneven one the same effect takes matrices of different sizes.
    "wrong" is how many of the four components end in the wrong matrix: the mean and its standard
    error. The loss (x 1000, no noise) is the median with both quartiles; "lower" says with how many
    seeds it is below the default's. Returns these values by network and row, before averaging.
    """
    found = {}
    for network, gains in (("even", EVEN), ("uneven", UNEVEN)):
        rows = dict(yardsticks(seeds, gains))
        if settings:
            rows = {"default": rows["default"], "yours": judged(settings, seeds, gains), **rows}
        found[network] = rows
        print(f"{network:8} wrong of 4        loss x 1000         lower than the default's")
        for name, (wrong, loss) in rows.items():
            low, middle, high = (1000 * loss).quantile(torch.tensor([0.25, 0.5, 0.75]).to(loss))
            lower = int((loss < rows["default"][1]).sum())
            print(f"{name:8} {wrong.mean():.1f} ± {wrong.std() / seeds**0.5:.1f} {middle:14.1f} "
                  f"({low:.1f} to {high:.1f}) {lower:14} of {seeds}")
    return found


# ---- your turn: a Pruner against dora.py's -------------------------------------------------------


def race(components, pruner, seed=0, interval=5, rank=4 / 3, twins=False, steps=200):
    """Train two networks side by side and return the first step at which they differ, or None.

    One has dora.py's layers and Pruner. The other has components(base, n, scale) for its layers and
    pruner(layers, rank, steps, interval), with observe(), step() and mask. They start alike and see
    the same batches. After each step all A, B, c and the masks must be equal bit for bit. Matrices
    have three sizes. With twins, two components of each matrix start alike, so that scores tie.
    """
    torch.manual_seed(seed)
    theirs = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(),
                           nn.Linear(16, 8))
    teacher = copy.deepcopy(theirs)
    for module, change in zip(teacher[::2], (3, 0, 1)):
        d_out, d_in = module.weight.shape
        module.weight.data += torch.randn(d_out, change) @ torch.randn(change, d_in) / 8
    config = DoRAConfig(targets=("0", "2", "4"), rank=rank, start_rank=4, alpha=4, dropout=0,
                        scale="start_rank", penalty=None, interval=interval)
    injected = inject(theirs, config)
    layers, copies = list(injected.values()), []
    for layer in layers:
        if twins:
            layer.A.data[1] = layer.A.data[0]
        copies.append(components(copy.deepcopy(layer.base), 4, layer.scale))
        copies[-1].load_state_dict({k: layer.state_dict()[k] for k in copies[-1].state_dict()})
    mine = nn.Sequential(copies[0], nn.Tanh(), copies[1], nn.Tanh(), copies[2])

    pruners = Pruner(injected, config, steps), pruner(copies, rank, steps, interval)
    models = theirs, mine
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
                  for model in models]
    for t in range(1, steps + 1):
        x = torch.randn(32, 16)
        y = teacher(x).detach() + 0.1 * torch.randn(32, 8)
        for model, steering, optimizer in zip(models, pruners, optimizers):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            steering.observe()
            optimizer.step()
            steering.step()
        same = [torch.equal(getattr(a, name), getattr(b, name))
                for a, b in zip(layers, copies) for name in "ABc"]
        if not all(same) or not torch.equal(pruners[0].mask, pruners[1].mask):
            return t
    return None
