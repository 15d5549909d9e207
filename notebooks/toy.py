"""What the notebooks share: the look of the figures, and a network whose true ranks are known."""
import copy
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dora import METHODS, DoRAConfig, Pruner, inject  # noqa: E402
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
                    color="white" if rank > 0.6 * top else "black")
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

TRUE = {"first": 3, "second": 0, "third": 1}  # the rank of what the teacher has more

# The default method, but for these: 4 components per matrix at the start, 4 in all at the end. As
# the matrices have one size, components or parameters count alike. No dropout, no penalty.
SETTINGS = dict(targets=tuple(TRUE), rank=4 / 3, start_rank=4, alpha=4, scale="start_rank",
                dropout=0, interval=5, penalty=None, budget_unit="components")
PAPER = {**METHODS["paper"], "penalty": "dem"}  # the paper's own method, on this network


def networks(seed):
    """Return (student, teacher): the teacher has a matrix of known rank added to each."""
    torch.manual_seed(seed)
    student = nn.Sequential(OrderedDict(
        first=nn.Linear(16, 16), tanh=nn.Tanh(), second=nn.Linear(16, 16),
        tanh_2=nn.Tanh(), third=nn.Linear(16, 16)))
    for name in TRUE:
        nn.init.normal_(student.get_submodule(name).weight, std=1 / 4)

    teacher = copy.deepcopy(student)
    for name, rank in TRUE.items():
        b, a = (torch.linalg.qr(torch.randn(16, 16))[0][:, :rank] for _ in range(2))
        teacher.get_submodule(name).weight.data += 1.5 * b @ a.T  # of exactly this rank
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
        lr=0.02, **settings):
    """Train the student of a seed for `until` of 300 steps.

    Return the run: student, teacher, layers, pruner. Three functions may look at it in each step:
    observed(run) after pruner.observe(), moved(run) after optimizer.step(), and pruned(run) after
    pruner.step(). extra(layers) is added to the loss. A batch has `size` examples, noisy.
    """
    student, teacher = networks(seed)
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


def gates(run):
    """Return the gates of all components, (n,)."""
    return torch.cat([layer.c.detach() for layer in run.layers.values()])
