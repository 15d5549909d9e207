"""DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024, arXiv 2405.17357), in plain PyTorch.

LoRA adds one low-rank update to a frozen matrix. DoRA writes that update as a sum of rank-1
*components*, each behind a gate. While the model trains, every component of every matrix gets a
score, and the gates of the least important ones are closed until a budget is met. So training
decides how many components each matrix keeps. (NVIDIA's DoRA, which decomposes weights, is a
different method.)

    symbol   in code               shape           meaning
    W0       base.weight           (d_out, d_in)   frozen pretrained matrix
    a_i      A[i]                  (d_in,)         row of A (r', d_in)
    b_i      B[:, i]               (d_out,)        column of B (d_out, r')
    c_i      c[i]                  scalar          gate; 0 = closed
    r'       config.r_prime        components      per matrix at the start
    r        config.rank           rank            final budget: the cost of rank r in every matrix
    L        len(layers)           matrices        adapted
    n        len(mask)             components      of the whole model at the start, r' L
    b(t)     budget                parameters      allowed after step t (paper: components)
    T        total_steps           steps           in the run
    t_i      initial_phase         share of T      before the first pruning
    t_f      final_phase           share of T      after the last pruning
    I, Ī, Ū  I, I_bar, U_bar       (n,)            importance, its moving average, its uncertainty
    s        scores()              (n,)            the score that decides: Ī Ū
    R, η     PENALTIES, eta        scalar          regulariser and its weight

A component is *live* unless the latest pruning dropped it.

After pruner = Pruner(inject(model, config), config, T), the method takes three lines in each
*optimizer* step, even under gradient accumulation:

    loss = task_loss + pruner.penalty()
    loss.backward()
    pruner.observe()      # before clipping and stepping: weight and gradient belong together
    optimizer.step()
    pruner.step()

A line that begins `# differs:` says where this departs from the paper or its authors' code.
Functions called check_... only refuse what cannot work; skip them.
"""

from __future__ import annotations

import difflib
import json
import math
import mmap
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---- settings ------------------------------------------------------------------------------------

ROBERTA = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclass(frozen=True)
class DoRAConfig:
    """Every setting of the method. The methods differ in these values alone (see METHODS)."""

    rank: float = 2.0  # r: the final budget is what rank r in every matrix costs; may be a fraction
    start_rank: int | None = None  # r': initial rank; none = ceil(1.5 r), or r if nothing is pruned
    alpha: float = 8.0  # the update is scaled by alpha / max(1, rank) or alpha / start_rank
    dropout: float = 0.1  # dropout rate on the low-rank path (paper: 0.1)
    targets: tuple[str, ...] = ROBERTA  # matrices to adapt: whole dotted ends of their names

    # differs: the paper starts at c = 0 with large random B; from B = 0 scores are useful sooner
    init: Literal["zero_b", "kaiming", "gaussian"] = "zero_b"  # B = 0, c = 1; or random B, c = 0
    gate: bool = True  # train the gates c; if not, they stay 1
    # differs: the paper has alpha / r'; with alpha / max(1, r) a run ends at LoRA's scale
    scale: Literal["rank", "start_rank"] = "rank"  # what alpha is divided by (Eq. 6: start_rank)

    # differs: the paper scores by Eq. 7, which keeps components even in matrices that need none
    importance: str | None = "sensitivity"  # score of a component; none = never prune
    beta1: float = 0.85  # smoothing of the importance (Eq. 8; paper: 0.9)
    # differs: the paper scores by the average alone; AdaLoRA multiplies by its uncertainty
    beta2: float | None = 0.85  # smoothing of its uncertainty; none = score by the average alone
    eps: float = 1e-8  # added to the norm that Eq. 7 divides by

    # differs: the paper prunes late, which leaves the remaining components little time to adapt
    schedule: str | None = "fast_first"  # curve of the budget (Eq. 9: slow_first); none = flat
    initial_phase: float = 0.15  # share of the steps before pruning starts (paper: 0.15)
    final_phase: float = 0.5  # share of the steps after the last pruning (paper: 0.5)
    interval: int = 10  # optimizer steps between prunings (paper: 10 or 50)
    # differs: the paper counts components, which can cost more than LoRA of the same rank
    budget_unit: Literal["parameters", "components"] = "parameters"  # what the budget counts

    penalty: str | None = "dem"  # regulariser until the last pruning
    eta: float = 0.3  # weight of the regulariser (paper: 0.3 or 0.5)
    # differs: the paper applies dropout to x; on the r' values A x it costs almost nothing
    dropout_on: Literal["input", "components"] = "components"  # what dropout applies to: x or A x

    @property
    def r_prime(self) -> int:
        """r': components per matrix at the start."""
        factor = 1.0 if self.schedule is None else 1.5
        return self.start_rank or math.ceil(factor * self.rank)

    def __new__(cls, *args: Any, **settings: Any) -> DoRAConfig:
        check_names(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_settings(self)


METHODS: dict[str, dict[str, Any]] = {
    "dora": {},  # the defaults above; benchmarks/README.md compares most of them with others
    "paper": dict(
        init="kaiming", scale="start_rank", importance="norm", beta1=0.9, beta2=None,
        schedule="slow_first", budget_unit="components", dropout_on="input"),
    "lora": dict(gate=False, importance=None, schedule=None, penalty=None, dropout_on="input"),
}  # "adalora" is added in the second half, beside its importance and its penalty


# ---- the layer: Eq. 6 ----------------------------------------------------------------------------


class DoRALinear(nn.Module):
    """A frozen nn.Linear plus r' gated rank-1 components: y = W x + bias, where

    W = W0 + scale * sum_i c_i b_i a_i^T,   scale = alpha / r' or alpha / max(1, r)   (Eq. 6)
    """

    mask: Tensor  # (r',) bool, True = live
    final: Tensor  # scalar bool, True = the mask is that of the last pruning
    L: int | None = None  # how many matrices inject() adapted together

    def __init__(self, base: nn.Linear, config: DoRAConfig):
        super().__init__()
        (d_out, d_in), r_prime = base.weight.shape, config.r_prime
        # float32 even over a half-precision base, which would round small updates away
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        like = base.weight.new_empty(0, dtype=dtype)
        A = like.new_empty(r_prime, d_in)
        B = like.new_zeros(d_out, r_prime)
        c = like.new_zeros(r_prime)

        # the update starts at exactly 0: from B = 0 with open gates, or from c = 0
        if config.init == "zero_b":  # as LoRA
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            c.fill_(1.0)
        elif config.init == "kaiming":  # the paper: bounds sqrt(6 / d_in) and sqrt(6 / r')
            nn.init.kaiming_uniform_(A)
            nn.init.kaiming_uniform_(B)
        else:  # as AdaLoRA
            A.normal_(std=0.02)
            B.normal_(std=0.02)

        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.c = nn.Parameter(c, requires_grad=config.gate)
        self.register_buffer("mask", torch.ones_like(c, dtype=torch.bool))
        self.register_buffer("final", self.mask.new_tensor(config.schedule is None))
        self.scale = config.alpha / (max(1, config.rank) if config.scale == "rank" else r_prime)
        self.dropout = nn.Dropout(config.dropout)
        self.base, self.config = base.requires_grad_(False), config
        self.in_features, self.out_features = d_in, d_out
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        # y = W0 x + bias + scale * B (c * (A x)), without a second (N, d_out) tensor
        rows, A = x.reshape(-1, x.shape[-1]), self.A.to(x.dtype)  # (N, d_in), (r', d_in)
        if self.config.dropout_on == "input":
            h = self.dropout(rows) @ A.T  # (N, r')
        else:
            h = self.dropout(rows @ A.T)  # (N, r')

        # B^T is made contiguous: backward through a (d_out, r') layout is 4 to 8 times slower
        B = (self.scale * self.c * self.B).T.contiguous()  # (r', d_out)
        y = F.linear(rows, self.base.weight, self.base.bias)  # (N, d_out)
        y.addmm_(h.to(y.dtype), B.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def delta_weight(self) -> Tensor:
        """Return the update scale * sum_i c_i b_i a_i^T, (d_out, d_in) (Eq. 6)."""
        return (self.scale * self.c * self.B) @ self.A

    @property
    def weight(self) -> Tensor:
        """W, the matrix in effect, (d_out, d_in): for code that reads layer.weight."""
        return (self.base.weight + self.delta_weight()).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (d_out,)."""
        return self.base.bias

    @property
    def rank(self) -> int:
        """The number of live components."""
        return int(self.mask.sum())


def inject(model: nn.Module, config: DoRAConfig) -> dict[str, DoRALinear]:
    """Freeze the model, replace each target by a DoRALinear, and return these layers by name.

    A target is a whole dotted end of a name: "output.dense" matches "0.output.dense" and
    "0.attention.output.dense", but "put.dense" matches neither. Unfreeze the head afterwards.
    """
    bases = find_targets(model, config)
    model.requires_grad_(False)
    layers = LayersByName({name: DoRALinear(base, config) for name, base in bases.items()})
    for name, layer in layers.items():
        layer.L = len(layers)  # they share one budget
        replace(model, name, layer)
    return layers


# ---- importance: Eq. 7 and AdaLoRA's Eq. 8 -------------------------------------------------------


def sensitivity(layers: list[DoRALinear]) -> Tensor:
    """I_i = |c_i dℓ/dc_i|, (n,): how much removing component i changes the loss ℓ, to first order.

    This is AdaLoRA's Eq. 8 for a whole component. Without the penalty, a_i . dℓ/da_i and
    b_i . dℓ/db_i equal c_i dℓ/dc_i (Euler's identity). Without dropout, so does <dℓ/dW, Delta W_i>.
    """
    c = torch.cat([layer.c for layer in layers])
    grad = torch.cat([gradient(layer.c) for layer in layers])
    return (c * grad).abs()


def norm_score(layers: list[DoRALinear]) -> Tensor:
    """s_i = ||c_i b_i a_i^T||_F / ||sum_j c_j b_j a_j^T||_F, within each matrix, (n,) (Eq. 7)."""
    s: dict[DoRALinear, Tensor] = {}
    for group in alike(layers, lambda layer: (layer.A.shape, layer.B.shape)):  # m layers at once
        A = torch.stack([layer.A for layer in group])  # (m, r', d_in)
        B = torch.stack([layer.B.T for layer in group])  # (m, r', d_out)
        c = torch.stack([layer.c for layer in group])  # (m, r')
        part = c.abs() * (A.norm(dim=2) * B.norm(dim=2))  # (m, r')

        # no (d_out, d_in) matrix is built: <b_i a_i^T, b_j a_j^T> = (a_i . a_j)(b_i . b_j)
        products = (A @ A.mT) * (B @ B.mT) * c[:, :, None] * c[:, None, :]  # (m, r', r')
        whole = products.sum((1, 2)).clamp(min=0).sqrt()  # (m,); rounding may go below 0
        s.update(zip(group, part / (whole[:, None] + group[0].config.eps)))
    return torch.cat([s[layer] for layer in layers])


# To add an importance, write its function and its row: function, when it is measured ("gradients",
# before optimizer.step(), or "weights", after it), and what turns averages into scores (n,).
IMPORTANCE: dict[str, tuple[Callable[..., Any], str, Callable[..., Tensor]]] = {
    "sensitivity": (sensitivity, "gradients", torch.cat),
    "norm": (norm_score, "weights", torch.cat),
}


# ---- budget: Eq. 9 -------------------------------------------------------------------------------


def slow_first(p: float, surplus: int) -> int:
    """Return what is left of the surplus b_0 - b_T at progress p: little goes early (Eq. 9)."""
    return surplus - int(surplus * p**3)


def fast_first(p: float, surplus: int) -> int:
    """Return what is left of the surplus if most of it goes early (AdaLoRA)."""
    return int(surplus * (1 - p) ** 3)


SCHEDULES = {"slow_first": slow_first, "fast_first": fast_first}


def phases(total_steps: int, config: DoRAConfig) -> tuple[int, int]:
    """Return t_i T and T - t_f T: the last step of the full budget and that of the last pruning."""
    if config.schedule is None:
        return 0, 0
    first = round(config.initial_phase * total_steps)
    return first, total_steps - round(config.final_phase * total_steps)


def cost(layer: DoRALinear | nn.Linear, config: DoRAConfig) -> int:
    """Return what a component of this matrix costs: its d_in + d_out parameters, or 1."""
    return layer.in_features + layer.out_features if config.budget_unit == "parameters" else 1


def budget(step: int, total_steps: int, config: DoRAConfig, per_rank: int) -> int:
    """Return b(t) after optimizer step t = 1..T; per_rank is the cost of r = 1 (Eq. 9)."""
    b_0, b_T = config.r_prime * per_rank, round(config.rank * per_rank)
    first, last = phases(total_steps, config)
    if config.schedule is None or step <= first:
        return b_0

    # differs: as printed, Eq. 9 divides by t_f - t_i and misses b(T); the authors' code is as here
    p = min((step - first) / (last - first), 1.0)  # progress through the pruning window
    return b_T + SCHEDULES[config.schedule](p, b_0 - b_T)


def keep_mask(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Return a mask (n,). From the best score down, each component that fits is kept; of equal
    scores, the earlier comes first."""
    # differs: the authors prune `score <= kthvalue`, which drops all ties and at least one gate
    kept, prices = [], costs.tolist()
    for i in scores.argsort(descending=True, stable=True).tolist():
        if prices[i] <= budget:
            kept.append(i)
            budget -= prices[i]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[kept] = True
    return mask


# ---- penalty: Eq. 10 -----------------------------------------------------------------------------


def dem_penalty(layers: list[DoRALinear]) -> Tensor:
    """R = (1/n) sum_i (Var(a_i) + Var(b_i)) over all n components, scalar (Eq. 10)."""
    # differs: the authors' code divides by 2n; like theirs, the variance is the unbiased one
    vectors = [rows for layer in layers for rows in (layer.A, layer.B.T)]  # (r', d)
    groups = alike(vectors, lambda rows: rows.shape[1])  # a few kernels then do all the work
    sums = [torch.cat(rows).var(dim=1).sum() for rows in groups if rows[0].shape[1] > 1]
    return torch.stack(sums).sum() / sum(len(layer.c) for layer in layers)


PENALTIES: dict[str, Callable[[list[DoRALinear]], Tensor]] = {"dem": dem_penalty}


# ---- the pruner: Eq. 8 and Algorithm 1 -----------------------------------------------------------


class Pruner:
    """The only stateful object: step count, moving averages, mask (Algorithm 1)."""

    def __init__(self, layers: dict[str, DoRALinear], config: DoRAConfig, total_steps: int):
        check_pruner(layers, config, total_steps)
        self.layers, self.config, self.total_steps = dict(layers), config, total_steps
        self.first, self.last = phases(total_steps, config)

        costs = [cost(layer, config) for layer in layers.values()]
        self.per_rank = sum(costs)  # the cost of one component in every matrix
        # (n,), on the CPU, where pruning is decided: only a pruning step then waits for the device
        self.costs = torch.tensor(costs, device="cpu").repeat_interleave(config.r_prime)
        self.mask = torch.ones_like(self.costs, dtype=torch.bool)  # (n,), even after compact_
        self.t = 0  # optimizer steps done
        self.I_bar: list[Tensor] = []  # Ī: one tensor (n,), or three per layer for "triplet"
        self.U_bar: list[Tensor] = []  # Ū: likewise
        self.observed = False  # whether observe() ran since the last step()

    @property
    def done(self) -> bool:
        """True once the final mask is fixed."""
        return self.t >= self.last

    @property
    def live(self) -> int:
        """The number of live components in the whole model."""
        return int(self.mask.sum())

    def penalty(self) -> Tensor:
        """Return eta * R, scalar; 0 once pruning has ended."""
        if self.config.penalty is None or self.done:
            return torch.zeros((), device="cpu")
        return self.config.eta * PENALTIES[self.config.penalty](list(self.layers.values()))

    @torch.no_grad()
    def observe(self) -> None:
        """Update the averages with the importance of the current weights and gradients.

        Call this after backward() and before clipping; with a GradScaler, after its unscale_().
        """
        check_gradients(self)
        self.observed = True
        if not self.done:
            self._measure("gradients")

    @torch.no_grad()
    def step(self) -> None:
        """Prune to b(t) when it is time; after the last pruning, hold the mask."""
        check_observed(self)
        self.observed = False
        self.t += 1
        if self.t > self.last:
            self._close_gates()  # AdamW's momentum would reopen them
            return

        self._measure("weights")
        due = self.t > self.first and (self.t - self.first) % self.config.interval == 0
        if due or self.t == self.last:
            self._prune()

    def _measure(self, moment: str) -> None:
        """Measure I and smooth it, if this is the moment for it."""
        function, its_moment, _ = IMPORTANCE[str(self.config.importance)]
        if moment != its_moment:
            return

        I = function(list(self.layers.values()))
        I = [I] if isinstance(I, Tensor) else I
        self.I_bar = self.I_bar or [torch.zeros_like(part) for part in I]
        self.U_bar = self.U_bar or [torch.zeros_like(part) for part in I]
        smoothed = map(self._smooth, I, self.I_bar, self.U_bar)
        self.I_bar, self.U_bar = map(list, zip(*smoothed))

    def _smooth(self, I: Tensor, I_bar: Tensor, U_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Ī <- β1 Ī + (1 - β1) I,  Ū <- β2 Ū + (1 - β2) |I - Ī|  (Eq. 8; AdaLoRA Eq. 9-10)."""
        finite = I.abs() < math.inf  # skip a gradient that overflowed (GradScaler)
        I_bar = I_bar.lerp(torch.where(finite, I, I_bar), 1 - self.config.beta1)
        if self.config.beta2 is not None:
            U_bar = U_bar.lerp(torch.where(finite, (I - I_bar).abs(), U_bar), 1 - self.config.beta2)
        return I_bar, U_bar

    def scores(self) -> Tensor:
        """Return the score of every component, (n,): Ī Ū, or Ī if beta2 is None."""
        s = self.I_bar
        if self.config.beta2 is not None:
            s = [I * U for I, U in zip(self.I_bar, self.U_bar, strict=True)]
        return IMPORTANCE[str(self.config.importance)][2](s)

    def _prune(self) -> None:
        """Keep the best components of the whole model; a gate closed earlier may reopen."""
        scores = self.scores().cpu()
        check_scores(self, scores)
        b_t = budget(self.t, self.total_steps, self.config, self.per_rank)
        self._set_mask(keep_mask(scores, self.costs, b_t))
        self._close_gates()

    def _set_mask(self, mask: Tensor) -> None:
        """Store a mask (n,) and give each layer its part (r',)."""
        self.mask = mask
        for layer, part in zip(self.layers.values(), mask.split(self.config.r_prime)):
            layer.mask.copy_(part)
            layer.final.fill_(self.done)

    def _close_gates(self) -> None:
        """Set the gates of pruned components to 0."""
        if not self.mask.all():
            for layer in self.layers.values():
                layer.c.mul_(layer.mask)

    def ranks(self) -> dict[str, int]:
        """Return the number of live components of each matrix, by name."""
        parts = self.mask.split(self.config.r_prime)
        return {name: int(part.sum()) for name, part in zip(self.layers, parts)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model's and the optimizer's state."""
        settings = {f.name: getattr(self.config, f.name) for f in fields(DoRAConfig)}
        settings |= {"total_steps": self.total_steps, "components": len(self.mask)}
        return {"settings": settings, "t": self.t, "mask": self.mask,
                "I_bar": self.I_bar, "U_bar": self.U_bar}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state. Call this on freshly injected layers, before compact_()."""
        check_state(self, state)
        device = next((layer.c.device for layer in self.layers.values()), None)
        self.I_bar = [part.to(device, copy=True) for part in state["I_bar"]]
        self.U_bar = [part.to(device, copy=True) for part in state["U_bar"]]
        self.t, self.observed = state["t"], False
        self._set_mask(state["mask"].cpu())
        if self.done:  # before the last pruning a closed gate may be nonzero again; keep its value
            self._close_gates()


# ==================================================================================================
# You can stop reading here: what follows is plumbing (compaction, AdaLoRA, checks, files).
# ==================================================================================================


# ---- after training ------------------------------------------------------------------------------


@torch.no_grad()
def compact_(model: nn.Module, *optimizers: torch.optim.Optimizer) -> nn.Module:
    """Remove pruned components from the layers and the optimizers' state; outputs stay the same.

    The Parameter objects stay and their data shrink. A matrix left without components becomes a
    plain nn.Linear again. To train on in DistributedDataParallel, wrap the model again: the old
    wrapper no longer averages gradients. With Adafactor, call this after training.
    """
    layers = finished_layers(model)
    trained = {p for m in layers.values() for p in (m.A, m.B, m.c) if p.requires_grad}
    held = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    require(not optimizers or trained <= held, "a component is in none of the optimizers; pass all "
            "that train them, compact_(model, first, second)")

    for name, layer in layers.items():
        live = layer.mask.nonzero()[:, 0]  # (rank,)
        for p, dim in ((layer.A, 0), (layer.B, 1), (layer.c, 0)):
            shrink_(p, dim, live, optimizers)
        layer.mask = layer.mask[live]
        if not len(live):
            replace(model, name, layer.base)
    return model


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Replace every DoRALinear by a new nn.Linear with the weight W0 + Delta W."""
    for name, layer in finished_layers(model).items():
        merged = nn.Linear(layer.in_features, layer.out_features, device="meta")
        merged.weight = nn.Parameter(layer.weight, requires_grad=False)
        merged.register_parameter("bias", layer.base.bias)
        replace(model, name, merged.train(layer.training))
    return model


def rank_map(ranks: dict[str, int]) -> str:
    """Return a table of live components, at most 80 columns wide: a row per layer of the model and
    a column per matrix. Columns that do not fit follow below.

    A name is cut after its first number: "encoder.layer.3.output.dense" is in the row "3", or
    "encoder.layer.3" if the rows begin differently, and in the column "output".
    """
    cells = {("total", "total"): 0}
    for name, rank in ranks.items():
        match = re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name)
        row, matrix = match.groups() if match else (name, "live")
        matrix = re.sub(r"^attention\.self\.|\.dense$", "", matrix)  # RoBERTa's
        for cell in (row, matrix), (row, "total"), ("total", matrix), ("total", "total"):
            cells[cell] = cells.get(cell, 0) + rank

    rows = [*dict.fromkeys(row for row, _ in cells if row != "total"), "total"]
    matrices = [*dict.fromkeys(m for _, m in cells if m != "total"), "total"]
    starts = {row.rpartition(".")[0] for row in rows[:-1]}
    labels = [row.rpartition(".")[2] if len(starts) == 1 else row for row in rows]

    columns = [["layer", *labels]]
    columns += [[m, *(str(cells.get((row, m), ".")) for row in rows)] for m in matrices]
    first, *others = ([word.rjust(max(map(len, c))) for word in c] for c in columns)
    parts = [first]
    for column in others:
        if len(parts[-1][0]) + 2 + len(column[0]) > 80:
            parts.append(first)
        parts[-1] = [f"{line}  {cell}" for line, cell in zip(parts[-1], column)]
    return "\n\n".join(map("\n".join, parts))


# ---- for comparison: AdaLoRA, and a plain norm ---------------------------------------------------


def triplet(layers: list[DoRALinear]) -> list[Tensor]:
    """|w dℓ/dw| of every entry of c, A and B of each layer (AdaLoRA's Eq. 8)."""
    weights: list[Any] = [w for layer in layers for w in (layer.c, layer.A, layer.B)]
    products = torch._foreach_mul(weights, [gradient(w) for w in weights])
    return list(torch._foreach_abs(products))  # one kernel for all tensors, as the product


def triplet_total(s: list[Tensor]) -> Tensor:
    """s(c_i) + mean s(a_i) + mean s(b_i), (n,), from tensors in the order of `triplet`."""
    layers = zip(s[::3], s[1::3], s[2::3])  # c (r',), A (r', d_in), B (d_out, r')
    return torch.cat([c + A.mean(1) + B.mean(0) for c, A, B in layers])


def orthogonal_penalty(layers: list[DoRALinear]) -> Tensor:
    """Mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers, scalar (AdaLoRA's code)."""
    vectors = [*(layer.A for layer in layers), *(layer.B.T for layer in layers)]
    norms = []
    for X in map(torch.stack, alike(vectors, lambda rows: rows.shape)):  # (matrices, r', d)
        eye = torch.eye(X.shape[1], device=X.device, dtype=X.dtype)
        norms.append(torch.linalg.vector_norm(X @ X.mT - eye, dim=(1, 2)))
    return torch.cat(norms).mean()


def frobenius(layers: list[DoRALinear]) -> Tensor:
    """||c_i b_i a_i^T||_F = |c_i| ||a_i|| ||b_i||, (n,): Eq. 7 without its denominator."""
    norms = [m.c.abs() * m.A.norm(dim=1) * m.B.norm(dim=0) for m in layers]  # (r',) each
    return torch.cat(norms)


IMPORTANCE["triplet"] = (triplet, "gradients", triplet_total)
IMPORTANCE["frobenius"] = (frobenius, "weights", torch.cat)
PENALTIES["orthogonal"] = orthogonal_penalty
METHODS["adalora"] = dict(
    init="gaussian", scale="start_rank", importance="triplet", schedule="fast_first",
    budget_unit="components", penalty="orthogonal", eta=0.5,
    dropout_on="input")  # AdaLoRA's own code keeps the penalty until the end of training


# ---- tensors, modules, checks --------------------------------------------------------------------


def dora_layers(model: nn.Module) -> dict[str, DoRALinear]:
    """Return the model's DoRALinear layers by name. Refuse a wrapped model: its names are not the
    plain one's, and DistributedDataParallel would not average the gradients of new parameters."""
    for module in model.modules():
        wraps = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        require(not wraps and not hasattr(module, "_orig_mod"),
                f"the {type(model).__name__} is, or contains, a model wrapped in torch.compile "
                f"or (Distributed)DataParallel; pass the plain model, and wrap it after inject()")
    return {name: m for name, m in model.named_modules() if isinstance(m, DoRALinear)}


def finished_layers(model: nn.Module) -> dict[str, DoRALinear]:
    """Return the model's layers. Raises DoRAError if there are none, or one is not final."""
    layers = dora_layers(model)
    require(layers, "the model has no DoRALinear (was dora.py reloaded?); call inject() first")
    for name, layer in layers.items():
        if not all(p.isfinite().all() for p in layer.parameters(recurse=False)):
            raise NotFiniteError(f"{name}: a component is NaN or infinite; lower the learning rate")
        require(layer.final, f"{name}: these weights are from before the last pruning; run all "
                f"total_steps steps, with a pruner.step() in each, or restore later weights")
        require(not layer.c[~layer.mask].any(), f"{name}: a pruned gate is not 0; call "
                f"pruner.step() after optimizer.step(), and average weights only after pruning")
    return layers


def alike(items: Iterable[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    """Put items with the same key together, so that one operation can take a whole group."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def gradient(p: nn.Parameter) -> Tensor:
    """Return the gradient, of p's shape; 0 if p took no part in this step."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one with this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def shrink_(p: nn.Parameter, dim: int, live: Tensor, optimizers: Iterable[Any]) -> None:
    """Keep the indices `live` (rank,) of one dimension of p and its moments; drop the gradient."""
    shape, kept = p.shape, p.index_select(dim, live)
    p.grad = None

    # A graph of an earlier step may still hold p's gradient node, which checks the old shape.
    # torch makes a new node when the dtype changes.
    p.data = p.data.to(torch.float16 if p.dtype != torch.float16 else torch.float32)
    p.data = kept
    for state in (optimizer.state[p] for optimizer in optimizers if p in optimizer.state):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = value.index_select(dim, live)


class DoRAError(ValueError):
    """Bad input. The message is one line: the value, what is wrong with it, and the remedy."""


class NotFiniteError(DoRAError):
    """A loss, gradient, weight or score is NaN or infinite."""


def require(condition: Any, message: str) -> None:
    """Raise DoRAError unless the condition holds."""
    if not condition:
        raise DoRAError(message)


CHOICES: dict[str, dict[str, Any]] = {
    "importance": IMPORTANCE, "schedule": SCHEDULES, "penalty": PENALTIES}
RANGES = {
    **dict.fromkeys(("rank", "alpha", "eps"), "> 0"), "eta": ">= 0",
    **dict.fromkeys(("start_rank", "interval"), ">= 1"),
    **dict.fromkeys(("dropout", "beta1", "beta2", "initial_phase", "final_phase"), ">= 0, < 1")}
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt}
PEFT_NAMES = {"r": "rank", "target_r": "rank", "init_r": "start_rank", "lora_alpha": "alpha",
              "lora_dropout": "dropout", "target_modules": "targets", "deltaT": "interval"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known word that is closest, or nothing."""
    found = difflib.get_close_matches(PEFT_NAMES.get(word, word), known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def check_names(config: type, settings: dict[str, Any]) -> None:
    """Refuse a setting that the class does not have."""
    known = [f.name for f in fields(config)]
    for name in settings:
        require(name in known, f"{config.__name__} has no {name}{did_you_mean(name, known)}")


def choices(name: str, hint: Any) -> list[Any]:
    """Return the values that a setting may have; empty for a number or a name."""
    if name in CHOICES:
        return [*CHOICES[name], None]
    return [*get_args(hint)] if get_origin(hint) is Literal else []


def check_settings(config: Any) -> None:
    """Refuse an unknown choice, a number out of range, and a combination that cannot work."""
    for name, hint in get_type_hints(type(config)).items():
        value, known = getattr(config, name), choices(name, hint)
        require(not known or value in known,
                f"{name} = {value!r}: choose one of {', '.join(map(str, known))}")
        if value is None and type(None) in get_args(hint):
            continue
        for sign, limit in re.findall(r"([<>]=?) ([^,]+)", RANGES.get(name, "")):
            require(isinstance(value, (int, float)) and COMPARE[sign](value, float(limit)),
                    f"{name} = {value!r}: must be {RANGES[name]}")

    rank, r, flat = config.rank, config.r_prime, config.schedule is None
    require(config.targets and not isinstance(config.targets, str) and "" not in config.targets,
            f"targets = {config.targets!r}: give a tuple of names, at least one")
    require(r >= rank, f"start_rank = {r} is below rank = {rank}; raise start_rank")
    require(flat == (config.importance is None), f"importance = {config.importance} with schedule "
            f"= {config.schedule}: set both to prune, or neither")
    require(not flat or r == rank, f"rank = {rank} and start_rank = {r} must be equal whole "
            f"numbers if nothing is pruned (schedule = none)")
    require(config.gate or flat and config.init == "zero_b", "gate = False: pruning and a random B "
            "need gates; train them, or set schedule = none and init = zero_b")


def find_targets(model: nn.Module, config: DoRAConfig) -> dict[str, nn.Linear]:
    """Return the matrices to adapt by name, in the model's order."""
    require(isinstance(config, DoRAConfig), f"config is a {type(config).__name__}, not DoRAConfig")
    require(not dora_layers(model), "the model is adapted already; inject() all targets at once")
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    linear = [name for name in modules if type(modules[name]) is nn.Linear]
    ends = {re.sub(r"^.*\.\d+\.", "", name) for name in linear}
    chosen = set()
    for target in config.targets:
        matches = [name for name in modules if f".{name}".endswith(f".{target}")]
        require(matches, f"target {target!r} matches no module; candidates: "
                f"{', '.join(sorted(ends - {''})) or 'none'}")
        for name in matches:
            check_target(f"target {target!r}", name, modules)
        chosen.update(matches)

    found = {name: modules[name] for name in modules if name in chosen}
    costs = [cost(module, config) for module in found.values()]
    require(round(config.rank * sum(costs)) >= min(costs), f"rank = {config.rank} over "
            f"{len(found)} matrices leaves no component; raise rank")
    return found


class LayersByName(dict[str, DoRALinear]):
    """What inject() returns: a dictionary that says so if it is taken for the model."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"these are the layers that inject() returned, which have no {name}; "
                             f"it changes the model in place: layers = inject(model, config)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def check_target(what: str, name: str, modules: dict[str, Any]) -> None:
    """Refuse a module that a DoRALinear cannot replace."""
    module, kind = modules[name], type(modules[name])
    names = [other for other in modules if modules[other] is module]
    require(kind is nn.Linear, f"{what}: {name} is a {kind.__module__}.{kind.__name__}; choose "
            f"an nn.Linear, or make it one as notebooks/RECIPES.md does for GPT-2's Conv1D")
    require(not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks),
            f"{what}: {name} has hooks; add them after inject(), or remove_weight_norm first")
    require(len(names) == 1, f"{what}: {' and '.join(names)} are one module with two names, "
            f"which an adapter file cannot hold; choose other targets")


def check_pruner(layers: Any, config: DoRAConfig, total_steps: int) -> None:
    """Refuse layers that a Pruner cannot train."""
    require(isinstance(layers, dict), f"layers is a {type(layers).__name__}, not inject()'s result")
    require(type(total_steps) is int and total_steps > 0,
            f"total_steps = {total_steps!r}: must be an int above 0")
    first, last = phases(total_steps, config)
    require(first < last or config.schedule is None, f"initial_phase = {config.initial_phase} and "
            f"final_phase = {config.final_phase}: none of {total_steps} steps can prune; lower one")
    for name, layer in layers.items():
        require(layer.config == config and len(layer.c) == config.r_prime, f"{name}: pass the "
                f"Pruner the config that inject() got, before compact_()")
        require(layer.L in (None, len(layers)), f"{name}: is one of {layer.L} layers that share a "
                f"budget; pass all that inject() returned, not {len(layers)}")
        check_frozen(name, layer)


def check_frozen(name: str, layer: DoRALinear) -> None:
    """Refuse a base that trains: an adapter file has no place for it."""
    require(not any(p.requires_grad for p in layer.base.parameters()), f"{name}: its frozen weight "
            f"or bias was set to train; unfreeze only modules without targets inside")


def check_gradients(pruner: Pruner) -> None:
    """Refuse a second observe() in one step, and an observe() without gradients."""
    require(not pruner.observed, f"step {pruner.t + 1}: a second observe() before "
            f"pruner.step(); when accumulating gradients, call it once, after the last backward()")
    # gates, where they train: A and B also have the gradient of the penalty
    parameters = [layer.c if pruner.config.gate else layer.B for layer in pruner.layers.values()]
    require(not parameters or any(p.grad is not None for p in parameters), "no component has a "
            "gradient; call observe() between backward() and zero_grad(), and use "
            "use_reentrant=False in gradient checkpointing")


def check_observed(pruner: Pruner) -> None:
    """Refuse a step without an importance."""
    require(pruner.observed, f"step {pruner.t + 1}: step() without observe(); call observe() "
            f"after backward() in every step")


def check_scores(pruner: Pruner, scores: Tensor) -> None:
    """Refuse scores that cannot decide what stays: of a wrong shape, not finite, or all 0."""
    require(scores.shape == pruner.mask.shape, f"importance = {pruner.config.importance}: expected "
            f"scores of shape {tuple(pruner.mask.shape)}, got {tuple(scores.shape)}")
    gates = torch.cat([layer.c for layer in pruner.layers.values()])
    if not (scores.isfinite().all() and gates.isfinite().all()):
        raise NotFiniteError(f"step {pruner.t}: a score is not finite; lower the learning rate")
    require(scores.any(), f"step {pruner.t}: every score is 0; take more steps, start to prune "
            f"later, set beta2 = none if beta1 = 0, or make the optimizer after inject()")


def check_state(pruner: Pruner, state: dict[str, Any]) -> None:
    """Refuse the state of another model or another run."""
    for name, value in pruner.state_dict()["settings"].items():
        before = state["settings"].get(name)
        require(before == value, f"the state is from a run with {name} = {before}, not {value}")


# ---- safetensors ---------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` when it is complete: a crash leaves the
    old content or the new, and two processes never mix their content."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        part.unlink(missing_ok=True)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped: a change never reaches the file."""
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file. Raises DoRAError for anything else.

    Layout: 8 bytes, the length n of the header, little-endian; n bytes of JSON, {name: {dtype,
    shape, data_offsets}}; then the data, in which each tensor begins where the one before ends.
    """
    tensors, end = {}, 0
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            begin = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:begin])
            metadata = header.pop("__metadata__", {})
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, span = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                count = math.prod(shape)
                start, end = end, end + count * dtype.itemsize
                require(span == [start, end], f"{name!r:.80} is at {span}, not {[start, end]}")
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start) if (
                    count) else torch.empty(0, dtype=dtype, device="cpu")
                tensors[name] = flat.view(shape)
            require(begin + end == len(data), f"{len(data)} bytes, expected {begin + end}")
        except Exception as error:  # of any kind: the header may hold anything
            raise DoRAError(f"{path}: not a safetensors file ({error!r:.200}); download or save it "
                            f"again (if it is a git-lfs pointer, run git lfs pull)") from None
    return tensors, metadata


def write_safetensors(path: str | Path, tensors: dict[str, Tensor],
                      metadata: dict[str, Any] | None = None) -> None:
    """Write a safetensors file atomically."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    notes = {key: str(value) for key, value in (metadata or {}).items()}  # the format has text only
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    data = bytearray(sum(tensor.nbytes for tensor in tensors.values()))
    end = 0
    for name in sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)):  # aligned starts
        tensor = tensors[name].detach()
        require(tensor.dtype in codes, f"{path}: cannot hold {name!r} of {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
        if tensor.numel():
            place = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            place.copy_(tensor.flatten())

    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_file(path) as file:
        file.writelines([len(head).to_bytes(8, "little"), head, data])


# ---- adapters, in PEFT's LoRA format -------------------------------------------------------------

PREFIX = "base_model.model."
PEFT_MODULES = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A",
                "lora_embedding_B", "lora_magnitude_vector", "default")


@torch.no_grad()
def save_adapter(model: nn.Module, folder: str | Path, metadata: dict[str, Any] | None = None,
                 peft: dict[str, Any] | None = None) -> None:
    """Save the live components and the head as adapter_model.safetensors and adapter_config.json.

    metadata is noted beside the tensors. peft fills fields of adapter_config.json, such as
    {"task_type": "SEQ_CLS", "base_model_name_or_path": ...} for PEFT's Auto classes.

    The format is Hugging Face PEFT's LoRA: scale and c are folded into B, so that alpha / r is 1 in
    every matrix. Matrices without components are left out, since PEFT has no rank 0. Raises
    DoRAError before the last pruning, and if something trained that the file cannot hold.
    """
    layers, folder = finished_layers(model), Path(folder)
    check_trained(layers)
    heads = modules_to_save(model, layers)
    tensors, marks = {}, {}
    for key, tensor in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if name in layers:  # A, B, c, mask or final
            continue
        if name.removesuffix(".base") in layers:  # named as in the plain model
            key = f"{name.removesuffix('.base')}.{leaf}"
        if any(key.startswith(f"{head}.") for head in heads):
            tensors[PREFIX + key] = tensor  # with a random head the adapter would be noise
        elif isinstance(tensor, Tensor) and tensor.is_floating_point():
            marks[key] = mark(tensor)

    live = {name: layer for name, layer in layers.items() if layer.rank}
    for name, layer in live.items():
        B = (layer.scale * layer.c * layer.B)[:, layer.mask]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A[layer.mask]  # (rank, d_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B  # (d_out, rank)

    config = peft_config({name: layer.rank for name, layer in live.items()},
                         peft_names(model, heads), next(iter(live.values())).config.dropout)
    write_safetensors(folder / "adapter_model.safetensors", tensors,
                      {**(metadata or {}), "base_marks": json.dumps(marks)})
    text = json.dumps({**config, **(peft or {})}, indent=2) + "\n"
    with atomic_file(folder / "adapter_config.json") as file:
        file.write(text.encode())


def peft_config(ranks: dict[str, int], heads: list[str], dropout: float) -> dict[str, Any]:
    """Return adapter_config.json for matrices of these ranks."""
    r = max(ranks.values())
    others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
        "r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": "|".join(re.escape(name) for name in ranks),  # whole names
        "modules_to_save": heads or None, "lora_dropout": dropout,
        "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
        "init_lora_weights": True, "inference_mode": True,
    }


def peft_names(model: nn.Module, heads: list[str]) -> list[str]:
    """Return the heads by names that PEFT, which compares the ends of names, cannot confuse."""
    others = [f".{name}" for name in PEFT_MODULES]  # somewhere in a matrix
    others += [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [PREFIX + head if any(name.endswith(head) and name != head for name in others) else head
            for head in heads]


def mark(tensor: Tensor) -> list[float]:
    """Return a rough mark of a tensor: the norm of a sample, and its products with three waves."""
    step = tensor.numel() // 4096 | 1  # odd; the sample has 8192 entries at most
    x = tensor.flatten()[::step].cpu().double()
    x = torch.where(x.abs() < 1e4, x, 0.0)  # -inf and the like of attention masks
    waves = torch.outer(x.new_tensor([1, 2, 3]), torch.ones_like(x).cumsum(0)).cos()
    return [float(f"{number:.4g}") for number in (x.norm(), *(waves @ x))]


def check_base(folder: Path, marks: dict[str, list[float]], base: dict[str, Tensor]) -> None:
    """Refuse a base that differs by more than 1 %, five times what rounding to bfloat16 does."""
    for name, before in marks.items():
        now = mark(base[name]) if name in base else [math.inf]
        tolerance = 0.01 * before[0] + 1e-5
        require(all(abs(x - y) <= tolerance for x, y in zip(before, now)),
                f"{folder}: was trained on other weights: {name} differs in this model; load "
                f"it onto the base it was trained on (a new head must be unfrozen in training)")


def check_trained(layers: dict[str, DoRALinear]) -> None:
    """Refuse components that did not train, and a model that was frozen before saving."""
    require(any(layer.c.any() and layer.B.any() for layer in layers.values()),
            "every update is exactly 0, so nothing trained; make the optimizer after inject()")
    gates = [layer.c[layer.mask] for layer in layers.values() if layer.config.gate]
    require(not gates or any((c != 1).any() for c in gates), "no gate c has moved from 1; give "
            "the optimizer all parameters that require a gradient, in float32, or merge_ the model")
    require(any(layer.A.requires_grad for layer in layers.values()),
            "everything is frozen, so nothing tells which head trained; save before freezing")


def modules_to_save(model: nn.Module, layers: dict[str, DoRALinear]) -> list[str]:
    """Return the names of the modules outside the layers that trained, or that have running
    statistics. If everything in a parent module trains, the parent is named instead."""
    for name, layer in layers.items():
        check_frozen(name, layer)
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        inside = [p.requires_grad for p in module.parameters()]
        whole = inside and all(inside) and type(module) not in (nn.ModuleDict, nn.ModuleList)
        statistics = getattr(module, "running_mean", None) is not None
        if name not in layers and (own or statistics or whole):
            require(not dora_layers(module), f"{', '.join(own)} in {name or 'the model'} trains; "
                    f"an adapter holds whole modules without adapted matrices; freeze it or merge_")
            found.append(name)
    return sorted(name for name in found if not any(name.startswith(f"{o}.") for o in found))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, DoRALinear]:
    """Put a LoRA adapter, ours or PEFT's, on a plain model; return its layers by name.

    Everything is checked before the model is changed. Raises DoRAError for another base model,
    another head, and any kind of LoRA that Eq. 6 does not cover.
    """
    folder = Path(folder)
    require(not dora_layers(model), f"{folder}: the model is adapted already")
    config = read_adapter_config(folder / "adapter_config.json")
    saved, metadata = read_file(folder / "adapter_model.safetensors")

    # match the tensors with the model
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    base = model.state_dict()
    head = {key.removeprefix(PREFIX): tensor for key, tensor in saved.items()}
    pairs = {}
    end = ".lora_A.weight"
    for name in sorted(key.removesuffix(end) for key in head if key.endswith(end)):
        require(name in modules, f"{folder}: the model has no {name!r:.120}; is the adapter for "
                f"another base model?")
        check_target(str(folder), name, modules)
        A, B = (head.pop(f"{name}.lora_{m}.weight", torch.empty(0, 0)) for m in "AB")
        (d_out, d_in), r = modules[name].weight.shape, len(A)
        require(A.shape == (r, d_in) and B.shape == (d_out, r),
                f"{folder}: {name!r:.120} has lora_B {tuple(B.shape)} and lora_A {tuple(A.shape)}, "
                f"the model's matrix is {(d_out, d_in)}; is the adapter for another base model?")
        rank = by_pattern(config, "rank_pattern", "r", name)
        require(rank in (None, r), f"{folder}: the rank of {name} is {rank!r:.40} in "
                f"adapter_config.json and {r} beside it; the files are from two saves, save again")
        pairs[name] = A, B, DoRAConfig(
            **METHODS["lora"], rank=r, dropout=config.get("lora_dropout", 0.0),
            alpha=by_pattern(config, "alpha_pattern", "lora_alpha", name))
    require(pairs, f"{folder}: it has no lora_A and lora_B; save the adapter again")

    marks = json.loads(metadata.get("base_marks", "{}"))
    for key in [key for key in head if ".base_layer." in key]:  # PEFT adds that of an lm_head
        marks[key.replace(".base_layer.", ".")] = mark(head.pop(key))
    check_base(folder, marks, base)
    for key, tensor in head.items():
        expected = tuple(base[key].shape) if key in base else None
        require(tensor.shape == expected, f"{folder}: {key!r:.120} is {tuple(tensor.shape)}, in "
                f"the model {expected}; is the adapter for another task or base model?")

    # change the model; a head replaces its tensors, which other modules may share
    head = {key: tensor.to(base[key], copy=True) for key, tensor in head.items()}
    model.load_state_dict(head, strict=False, assign=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in head)
    layers = {}
    for name, (A, B, settings) in pairs.items():
        layer = layers[name] = DoRALinear(modules[name], settings)
        layer.A.copy_(A)
        layer.B.copy_(B)
        replace(model, name, layer)
    return layers


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises DoRAError for anything but plain LoRA."""
    try:
        config = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise DoRAError(f"{path}: not the JSON of an adapter; save the adapter again") from None

    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "use_dora": (False,), "use_rslora": (False,), "bias": ("none",),
        "alora_invocation_tokens": (None,),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # W0 unchanged
    }
    for key, values in allowed.items():
        require(config.get(key, values[0]) in values, f"{path}: {key} is {config.get(key)!r:.40}; "
                f"only plain LoRA can be loaded ({key} = {values[0]!r})")
    return config


def by_pattern(config: dict[str, Any], patterns: str, default: str, name: str) -> Any:
    """Return a matrix's rank or alpha: by the first pattern that matches (PEFT), or the default."""
    found = config.get(patterns) or {}
    return next((found[pattern] for pattern in found
                 if re.match(rf"(.*\.)?({pattern})$", name)), config.get(default))
