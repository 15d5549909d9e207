"""DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024, arXiv 2405.17357), in plain PyTorch.

LoRA adds one low-rank update to a frozen matrix. DoRA writes that update as a sum of rank-1
*components*, each behind a gate. While the model trains, every component of every matrix gets a
score, and the gates of the least important ones are closed until a budget is met. Capacity moves to
the matrices that need it. (NVIDIA's DoRA, which decomposes weights, is a different method.)

    symbol   in code               shape           meaning
    W0       base.weight           (d_out, d_in)   frozen pretrained matrix
    a_i      A[i]                  (d_in,)         row of A (r', d_in)
    b_i      B[:, i]               (d_out,)        column of B (d_out, r')
    c_i      c[i]                  scalar          gate; 0 = closed
    r', r    config.r_prime, rank  components      per matrix: at the start, and mean after pruning
    L        len(layers)           matrices        adapted
    n        len(mask)             components      of the whole model at the start, r' L
    b(t)     budget                parameters      kept after step t (paper: components)
    T        total_steps           steps           in the run
    t_i, t_f initial_, final_phase share of T      before the first pruning, after the last
    I, Ī, Ū  I, I_bar, U_bar       (n,)            importance, its moving average, its uncertainty
    s        scores()              (n,)            what decides: Ī Ū
    R, η     penalty, eta          scalar          regulariser and its weight

After pruner = Pruner(inject(model, config), config, T), the method is three lines of each
*optimizer* step, even under gradient accumulation:

    loss = task_loss + pruner.penalty()
    loss.backward()
    pruner.observe()      # before clipping and stepping: weight and gradient belong together
    optimizer.step()
    pruner.step()

A line that begins `# differs:` says where this departs from the paper or its authors' code.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel


# ---- settings ------------------------------------------------------------------------------------

ROBERTA = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclass(frozen=True)
class DoRAConfig:
    """Every setting of the method. The methods differ in these values alone (see METHODS)."""

    rank: float = 2.0  # r: components per matrix that stay, on average; may be a fraction
    start_rank: int | None = None  # r': components per matrix at the start; none = ceil(1.5 r)
    alpha: float = 8.0  # the scale of the update is alpha / rank or alpha / start_rank
    dropout: float = 0.1  # dropout rate on the low-rank path (paper: 0.1)
    targets: tuple[str, ...] = ROBERTA  # matrices to adapt: whole dotted ends of their names

    # differs: the paper starts at c = 0 with large random B; from B = 0 scores are useful sooner
    init: Literal["zero_b", "kaiming", "gaussian"] = "zero_b"  # B = 0, c = 1; or random B, c = 0
    gate: bool = True  # train the gates c; otherwise they stay at 1
    # differs: the paper has alpha / r'; with alpha / max(1, r) a run ends at LoRA's scale
    scale: Literal["rank", "start_rank"] = "rank"  # what alpha is divided by (Eq. 6: start_rank)

    # differs: the paper scores by Eq. 7, which keeps components even in matrices that need none
    importance: str | None = "sensitivity"  # score of a component; none = never prune
    beta1: float = 0.85  # smoothing of the importance (Eq. 8)
    beta2: float | None = 0.85  # smoothing of its uncertainty; none = do not use it
    eps: float = 1e-8  # added to the norm that Eq. 7 divides by

    # differs: the paper prunes late, which leaves the remaining components little time to adapt
    schedule: str | None = "fast_first"  # curve of the budget (Eq. 9: slow_first); none = flat
    initial_phase: float = 0.15  # share of the steps before pruning starts (paper: 0.15)
    final_phase: float = 0.5  # share of the steps after the last pruning (paper: 0.5)
    interval: int = 10  # optimizer steps between prunings (paper: 10 or 50)
    # differs: the paper counts components, which can cost more than LoRA of the same rank
    budget_unit: Literal["parameters", "components"] = "parameters"  # what the budget counts

    penalty: str | None = "dem"  # regulariser while pruning
    eta: float = 0.3  # weight of the regulariser (paper: 0.3 or 0.5)
    # differs: the paper applies dropout to x; on the r' values A x it costs almost nothing
    dropout_on: Literal["input", "components"] = "components"  # what dropout applies to: x or A x

    RANGES: ClassVar[dict[str, str]] = {
        "> 0": "rank alpha eps", ">= 1": "start_rank interval", ">= 0": "eta",
        ">= 0, < 1": "dropout beta1 beta2 initial_phase final_phase",
    }

    @property
    def r_prime(self) -> int:
        """r': components per matrix at the start."""
        surplus = 1.0 if self.schedule is None else 1.5
        return self.start_rank or math.ceil(surplus * self.rank)

    def __post_init__(self) -> None:
        check_settings(self)
        check_combinations(self)


METHODS: dict[str, dict[str, Any]] = {
    "dora": {},  # the defaults above; benchmarks/RESULTS.md has the evidence for each
    "paper": dict(
        init="kaiming", scale="start_rank", importance="norm", beta1=0.9, beta2=None,
        schedule="slow_first", budget_unit="components", dropout_on="input"),
    "lora": dict(gate=False, importance=None, schedule=None, penalty=None, dropout_on="input"),
    "adalora": dict(
        init="gaussian", scale="start_rank", importance="triplet", schedule="fast_first",
        budget_unit="components", penalty="orthogonal", eta=0.5, dropout_on="input"),
}


# ---- the layer: Eq. 6 ----------------------------------------------------------------------------


class DoRALinear(nn.Module):
    """A frozen nn.Linear plus r' gated rank-1 components: y = W x + bias, where

    W = W0 + scale * sum_i c_i b_i a_i^T,   scale = alpha / r' or alpha / r   (Eq. 6)
    """

    def __init__(self, base: nn.Linear, config: DoRAConfig, name: str = "layer",
                 progress: Progress | None = None):
        super().__init__()
        (d_out, d_in), r = base.weight.shape, config.r_prime
        # float32 even over a half-precision base, which would round small updates away
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.A = nn.Parameter(base.weight.new_empty((r, d_in), dtype=dtype))
        self.B = nn.Parameter(base.weight.new_empty((d_out, r), dtype=dtype))
        self.c = nn.Parameter(base.weight.new_empty((r,), dtype=dtype), requires_grad=config.gate)
        self.mask: Tensor  # (r',) bool, True = live: kept by the last pruning
        self.register_buffer("mask", torch.ones_like(self.c, dtype=torch.bool))
        self.scale = config.alpha / (max(1, config.rank) if config.scale == "rank" else r)
        self.dropout = nn.Dropout(config.dropout)

        self.base, self.config = base.requires_grad_(False), config
        self.in_features, self.out_features = d_in, d_out
        self.name, self.progress = name, progress or Progress()
        self.reset()
        self.train(base.training)

    @torch.no_grad()
    def reset(self) -> None:
        """Start so that the update is exactly 0: B = 0 with open gates, or c = 0."""
        if self.config.init == "zero_b":  # as LoRA
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            self.B.zero_()
        elif self.config.init == "kaiming":  # the paper: bounds sqrt(6 / d_in) and sqrt(6 / r')
            nn.init.kaiming_uniform_(self.A)
            nn.init.kaiming_uniform_(self.B)
        else:  # as AdaLoRA
            self.A.normal_(std=0.02)
            self.B.normal_(std=0.02)
        self.c.fill_(1.0 if self.config.init == "zero_b" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        # y = base(x) + scale * B (c * (A x)), ordered so that no second (N, d_out) tensor is made
        rows, A = x.reshape(-1, x.shape[-1]), self.A.to(x.dtype)  # (N, d_in), (r', d_in)
        if self.config.dropout_on == "input":
            h = self.dropout(rows) @ A.T  # (N, r')
        else:
            h = self.dropout(rows @ A.T)  # (N, r')

        # B^T is made contiguous: backward through a (d_out, r') layout is 4 to 8 times slower
        B = (self.scale * self.c * self.B).T.contiguous()  # (r', d_out)
        y = self.base(rows)  # (N, d_out)
        h, B = h.to(y.dtype), B.to(y.dtype)
        y = y.addmm(h, B) if is_watched(self.base) else y.addmm_(h, B)
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

    def extra_repr(self) -> str:
        """What print(model) shows of this layer."""
        return f"live={self.rank} of {len(self.mask)}, scale={self.scale:g}"


def inject(model: nn.Module, config: DoRAConfig) -> dict[str, DoRALinear]:
    """Freeze the model, replace each target by a DoRALinear, and return these by name.

    A target is a whole dotted end of a name: "output.dense" matches "0.output.dense" and also
    "0.attention.output.dense", "put.dense" matches neither. Unfreeze the head afterwards.
    """
    model = not_shared(model)
    bases = find_targets(model, config)
    progress = Progress(sum(cost(base, config) for base in bases.values()), samples(model))
    model.requires_grad_(False)
    layers = {}
    for name, base in bases.items():
        layers[name] = DoRALinear(base, config, name, progress)
        replace(model, name, layers[name])
    return layers


# ---- importance: Eq. 7 and AdaLoRA's Eq. 8 -------------------------------------------------------

Layers = Sequence[DoRALinear]


def sensitivity(layers: Layers) -> Tensor:
    """I_i = |c_i dℓ/dc_i|, (n,): how much removing component i changes the loss ℓ, to first order.

    This is AdaLoRA's Eq. 8 for a whole component. Without the penalty a_i . dℓ/da_i and
    b_i . dℓ/db_i are the same number (Euler's identity); without dropout <dℓ/dW, Delta W_i> is too.
    """
    c = concatenate(layer.c for layer in layers)
    grad = concatenate(gradient(layer.c) for layer in layers)
    return (c * grad).abs()


def norm_score(layers: Layers) -> Tensor:
    """s_i = ||c_i b_i a_i^T||_F / ||sum_j c_j b_j a_j^T||_F, within each matrix, (n,) (Eq. 7)."""
    shares: dict[DoRALinear, Tensor] = {}
    for group in alike(layers, lambda layer: (layer.A, layer.B)):
        A = torch.stack([layer.A for layer in group])  # (matrices, r', d_in)
        B = torch.stack([layer.B.T for layer in group])  # (matrices, r', d_out)
        c = torch.stack([layer.c for layer in group])  # (matrices, r')
        # no (d_out, d_in) matrix is built: <b_i a_i^T, b_j a_j^T> = (a_i . a_j)(b_i . b_j)
        products = (A @ A.mT) * (B @ B.mT)  # (matrices, r', r')
        squared = (products * c[:, :, None] * c[:, None, :]).sum((1, 2))
        norm = squared.clamp(min=0).sqrt()  # where components cancel, rounding may go below 0
        lengths = torch.linalg.vector_norm(A, dim=2) * torch.linalg.vector_norm(B, dim=2)
        share = c.abs() * lengths / (norm[:, None] + group[0].config.eps)
        shares.update(zip(group, share))
    return concatenate(shares[layer] for layer in layers)


# To add an importance, write its function and its row: function, moment ("gradients", before
# optimizer.step(), or "weights", after it), and what joins the smoothed tensors to scores (n,).
IMPORTANCE: dict[str, tuple[Callable[..., Any], str, Callable[..., Tensor]]] = {
    "sensitivity": (sensitivity, "gradients", torch.cat),
    "norm": (norm_score, "weights", torch.cat),
}


# ---- budget: Eq. 9 -------------------------------------------------------------------------------


def slow_first(p: float, surplus: int) -> int:
    """Return what is left of the surplus at progress p in [0, 1]: little goes early (Eq. 9)."""
    return surplus - int(surplus * p**3)


def fast_first(p: float, surplus: int) -> int:
    """The same, but most of it goes early (AdaLoRA)."""
    return int(surplus * (1 - p) ** 3)


# To add a curve, write its function and its row.
SCHEDULES = {"slow_first": slow_first, "fast_first": fast_first}


def phases(total_steps: int, config: DoRAConfig) -> tuple[int, int]:
    """Return (t_i, T - t_f): the step after which b(t) falls, and that of the last pruning."""
    if config.schedule is None:
        return 0, 0
    first = round(config.initial_phase * total_steps)
    last = total_steps - round(config.final_phase * total_steps)
    check_window(first, last, total_steps, config)
    return first, last


def cost(layer: DoRALinear | nn.Linear, config: DoRAConfig) -> int:
    """Return what a component of this matrix costs: its d_in + d_out parameters, or 1."""
    return layer.in_features + layer.out_features if config.budget_unit == "parameters" else 1


def budget(step: int, total_steps: int, config: DoRAConfig, per_rank: int) -> int:
    """Return b(t) after optimizer step t = 1..T; per_rank is the cost of r = 1 (Eq. 9)."""
    b_0, b_T = config.r_prime * per_rank, final_budget(config, per_rank)
    first, last = phases(total_steps, config)
    if config.schedule is None or step <= first:
        return b_0

    # differs: as printed, Eq. 9 divides by t_f - t_i and misses b(T); the authors' code is as here
    p = min((step - first) / (last - first), 1.0)  # progress through the pruning window
    return b_T + SCHEDULES[config.schedule](p, b_0 - b_T)


def keep_mask(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Return a mask (n,): by falling score, keep each one that fits; ties go to the earlier."""
    # differs: the authors prune `score <= kthvalue`, which drops all ties and at least one gate
    kept, prices = [], costs.tolist()
    for i in scores.argsort(descending=True, stable=True).tolist():
        if prices[i] <= budget:
            kept.append(i)
            budget -= prices[i]
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[kept] = True
    return mask


# ---- penalty: Eq. 10 -----------------------------------------------------------------------------


def dem_penalty(layers: Layers) -> Tensor:
    """R = (1/n) sum_i Var(a_i) + Var(b_i) over all n components, scalar (Eq. 10)."""
    # differs: the authors' code divides by 2n; like theirs, the variance is the unbiased one
    vectors: dict[Any, list[Tensor]] = {}  # by length, so that a few kernels do all the work
    n = 0
    for layer in layers:
        n += len(layer.c)
        for rows in (layer.A, layer.B.T):  # (r', d_in), (r', d_out)
            if rows.shape[1] > 1:  # a single number does not vary
                vectors.setdefault((rows.shape[1], rows.device), []).append(rows)

    sums = [torch.cat(rows).var(dim=1).sum() for rows in vectors.values()]
    return stack(sums).sum() / n if sums else torch.zeros(())


PENALTIES: dict[str, Callable[[Layers], Tensor]] = {"dem": dem_penalty}


# ---- the pruner: Eq. 8 and Algorithm 1 -----------------------------------------------------------


class Pruner:
    """The only stateful object: step count, moving averages, mask (Algorithm 1)."""

    def __init__(self, layers: dict[str, DoRALinear], config: DoRAConfig, total_steps: int):
        self.layers, self.config, self.total_steps = dict(layers), config, total_steps
        self.first, self.last = phases(total_steps, config)
        self.function, self.moment, self.total = IMPORTANCE.get(str(config.importance), NO_SCORE)

        costs = [cost(layer, config) for layer in layers.values()]
        self.per_rank = sum(costs)  # the cost of one component in every matrix
        self.costs = torch.tensor(costs, dtype=torch.long).repeat_interleave(config.r_prime)  # (n,)
        self.t = 0  # optimizer steps done
        self.live = len(self.costs)  # components that the last pruning kept
        self.mask = torch.ones(self.live, dtype=torch.bool)  # (n,), keeps its size in compact_
        self.I_bar: list[Tensor] = []  # Ī: one tensor (n,), or three per layer for "triplet"
        self.U_bar: list[Tensor] = []  # Ū: likewise
        self.observed = False  # since the last step()

        check_pruner(self)
        self.progress = progress_of(layers)  # tells the layers, and so save_adapter, of t
        self.progress.update(self)

    @property
    def done(self) -> bool:
        """True once the final mask is fixed."""
        return self.t >= self.last

    def penalty(self) -> Tensor:
        """Return eta * R, scalar; 0 once pruning has ended."""
        # differs: AdaLoRA keeps its penalty until the end of training
        if self.config.penalty is None or self.done:
            return torch.zeros(())
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
        self.progress.update(self)
        if self.t > self.last:
            self._close_gates()  # AdamW's momentum would reopen them
            return

        self._measure("weights")
        due = self.t > self.first and (self.t - self.first) % self.config.interval == 0
        if due or self.t == self.last:
            self._prune()

    def _measure(self, moment: str) -> None:
        """Measure I, if this is the moment for it, and smooth it."""
        if moment != self.moment:
            return

        I = as_list(self.function(list(self.layers.values())))
        if not self.I_bar:
            check_shape(self, self.total(I))
            self.I_bar, self.U_bar = ([torch.zeros_like(part) for part in I] for _ in range(2))
        averages = self._smooth(*(join(v, I) for v in (I, self.I_bar, self.U_bar)))
        self.I_bar, self.U_bar = (cut(average, I) for average in averages)

    def _smooth(self, I: Tensor, I_bar: Tensor, U_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Ī <- β1 Ī + (1 - β1) I,  Ū <- β2 Ū + (1 - β2) |I - Ī|  (Eq. 8; AdaLoRA Eq. 9-10)."""
        seen = I.abs() < math.inf  # a gradient that overflowed (GradScaler) is not observed
        I_bar = I_bar.lerp(torch.where(seen, I, I_bar), 1 - self.config.beta1)
        if self.config.beta2 is not None:
            U_bar = U_bar.lerp(torch.where(seen, (I - I_bar).abs(), U_bar), 1 - self.config.beta2)
        return I_bar, U_bar

    def scores(self) -> Tensor:
        """Return the score of every component, (n,): Ī Ū, or Ī if beta2 is None."""
        s = self.I_bar
        if self.config.beta2 is not None:
            s = [I * U for I, U in zip(self.I_bar, self.U_bar, strict=True)]
        return self.total(s)

    def _prune(self) -> None:
        """Keep the best components of the whole model; a gate closed earlier may reopen."""
        scores = self.scores().cpu()  # only a pruning step waits for the device
        b_t = budget(self.t, self.total_steps, self.config, self.per_rank)
        mask = keep_mask(scores, self.costs, b_t)
        check_decision(self, scores, mask)
        self._set_mask(mask)
        self._close_gates()

    def _set_mask(self, mask: Tensor) -> None:
        """Note a mask (n,) and give each layer its part (r',)."""
        self.mask, self.live = mask, int(mask.sum())
        for layer, part in zip(self.layers.values(), mask.split(self.config.r_prime)):
            layer.mask.copy_(part)

    def _close_gates(self) -> None:
        """Set the gates of pruned components to 0; a compacted model has none."""
        if self.live < len(self.mask) and not self.progress.compacted:
            for layer in self.layers.values():
                layer.c.mul_(layer.mask)

    def ranks(self) -> dict[str, int]:
        """Return the number of live components of each matrix, by name."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model's and the optimizer's state."""
        names = ("t", "total_steps", "mask", "I_bar", "U_bar")
        return {"settings": method_settings(self.config), **{k: getattr(self, k) for k in names}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state. Call this on freshly injected layers, before compact_()."""
        check_state(self, state)
        self.I_bar, self.U_bar = ([*map(torch.clone, state[k])] for k in ("I_bar", "U_bar"))
        self.t, self.observed = state["t"], False
        self.progress.update(self)
        self._set_mask(state["mask"].cpu())
        if self.done:  # before the last pruning a closed gate may be nonzero again; keep its value
            self._close_gates()


# ---- after training ------------------------------------------------------------------------------


def rank_map(ranks: dict[str, int]) -> str:
    """Return a table of live components: a row per layer of the model, a column per matrix."""
    return table({row_and_column(name): rank for name, rank in ranks.items()})


@torch.no_grad()
def compact_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Remove pruned components from the layers and the optimizer's state; outputs stay the same.

    The Parameter objects stay and their data shrink. A matrix left without components becomes a
    plain nn.Linear again. Re-wrap the model in DistributedDataParallel.
    """
    model, state = unwrapped(model), optimizer.state if optimizer is not None else {}
    layers = dora_layers(model)
    check_budget(layers)
    check_optimizer_state(layers, state)

    for name, layer in layers.items():
        live = layer.mask.nonzero()[:, 0]  # (rank,)
        for p, dim in ((layer.A, 0), (layer.B, 1), (layer.c, 0)):
            shrink_(p, dim, live, state.get(p, {}))
        layer.mask, layer.progress.compacted = layer.mask[live], True
        if not len(live):
            replace(model, name, layer.base)
    return model


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Replace every DoRALinear by a new nn.Linear with the weight W0 + Delta W."""
    model = unwrapped(model)
    layers = dora_layers(model)
    check_budget(layers)
    check_forward(layers)
    for name, layer in layers.items():
        merged = own_copy(layer.base)  # others may hold the old module
        merged.weight = nn.Parameter(layer.weight, requires_grad=False)
        replace(model, name, merged)
    return model


# ==================================================================================================
# You can stop reading here: what follows is plumbing (files, checks, downloads, the command line).
# ==================================================================================================


# ---- errors --------------------------------------------------------------------------------------


class DoRAError(ValueError):
    """Bad input. The message is one line: the value, what is wrong with it, and the remedy."""


class NotFiniteError(DoRAError):
    """A loss, gradient, weight or score is NaN or infinite."""


# ---- other importances and penalties, for comparison ---------------------------------------------


def frobenius(layers: Layers) -> Tensor:
    """||c_i b_i a_i^T||_F = |c_i| ||a_i|| ||b_i||, (n,): Eq. 7 without its denominator."""
    norm = torch.linalg.vector_norm
    return concatenate(m.c.abs() * norm(m.A, dim=1) * norm(m.B, dim=0) for m in layers)


def triplet(layers: Layers) -> list[Tensor]:
    """|w dℓ/dw| of every entry of c (r',), A (r', d_in) and B^T (r', d_out), per layer: AdaLoRA's
    Eq. 8."""
    weights: list[Any] = [w for layer in layers for w in (layer.c, layer.A, layer.B)]
    products = torch._foreach_mul(weights, [gradient(w) for w in weights])
    I = list(torch._foreach_abs(products))  # one operation for all, as the product
    I[2::3] = [B.T for B in I[2::3]]
    return I


def triplet_total(s: list[Tensor]) -> Tensor:
    """s(c_i) + mean s(a_i) + mean s(b_i), (n,), from tensors in the order of `triplet`."""
    groups = zip(s[::3], s[1::3], s[2::3])  # c (r',), A (r', d_in), B^T (r', d_out)
    return concatenate(c + A.mean(1) + B.mean(1) for c, A, B in groups)


IMPORTANCE["frobenius"] = (frobenius, "weights", torch.cat)
IMPORTANCE["triplet"] = (triplet, "gradients", triplet_total)


def orthogonal_penalty(layers: Layers) -> Tensor:
    """Mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers, scalar (AdaLoRA's code)."""
    norms = []
    vectors = [*(layer.A for layer in layers), *(layer.B.T for layer in layers)]
    for rows in alike(vectors, lambda rows: (rows,)):
        X = torch.stack(rows)  # (matrices, r', d_in) or (matrices, r', d_out)
        eye = torch.eye(X.shape[1], device=X.device, dtype=X.dtype)
        norms.append(torch.linalg.vector_norm(X @ X.mT - eye, dim=(1, 2)))
    return concatenate(norms).mean()


PENALTIES["orthogonal"] = orthogonal_penalty


# ---- tensors and modules -------------------------------------------------------------------------


def dora_layers(model: nn.Module) -> dict[str, DoRALinear]:
    """Return the model's DoRALinear layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DoRALinear)}


def concatenate(tensors: Iterable[Tensor]) -> Tensor:
    """Join vectors end to end, on the device of the first (layers may be on several)."""
    found = list(tensors)
    return torch.cat([tensor.to(found[0].device) for tensor in found]) if found[1:] else found[0]


def alike(items: Iterable[Any], tensors: Callable[[Any], tuple[Tensor, ...]]) -> list[list[Any]]:
    """Put items together whose tensors have the same shapes, so that torch.stack can join them."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        key = tuple((tensor.shape, tensor.device, tensor.dtype) for tensor in tensors(item))
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def as_list(I: Tensor | list[Tensor]) -> list[Tensor]:
    """Return what an importance returned, as a list."""
    return [I] if isinstance(I, Tensor) else I


def join(parts: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Make one vector of tensors, on the device of the first of `like`."""
    return concatenate([part.flatten().to(like[0].device) for part in parts])


def cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut what `join` made into views of the shapes of `like`."""
    parts = vector.split([part.numel() for part in like])
    return [part.view(other.shape) for part, other in zip(parts, like)]


def stack(numbers: Sequence[Tensor]) -> Tensor:
    """Make a vector of scalars, on the device of the first."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def own_copy(base: nn.Linear) -> nn.Linear:
    """Return a copy of a module with a table of parameters of its own."""
    new = copy.copy(base)
    new._parameters = dict(base._parameters)
    vars(new).pop("forward", None)  # left by removed hooks, and bound to the old module
    return new


def gradient(p: nn.Parameter) -> Tensor:
    """Return the gradient, of p's shape; 0 if p took no part in this step."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def is_watched(module: nn.Module) -> bool:
    """Whether somebody may hold the module's output, which must not change in place then.

    That is a hook on it or on every module, selective activation checkpointing, or torch.func.
    """
    if (module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
            or nn.modules.module._has_any_global_hook()):
        return True
    return not torch.compiler.is_compiling() and bool(
        torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack())


HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
         "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
         "_backward_pre_hooks", "_is_full_backward_hook")


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, whose hooks then see the inputs and outputs of `new`.

    Their handles stay valid, since the dictionaries change hands and not their entries.
    """
    old = model.get_submodule(name)
    for key in HOOKS:
        hooks = getattr(old, key)
        setattr(old, key, getattr(new, key))
        setattr(new, key, hooks)
    model.set_submodule(name, new)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile, data parallelism and averaging."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore
    return model


def not_shared(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers. Raises DoRAError for DistributedDataParallel, which
    would not average the gradients of parameters that are new to it."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise DoRAError("the model is in DistributedDataParallel already, which would not average "
                        "the gradients of new components; adapt the model before wrapping it")
    return unwrapped(model)


WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain(name: str) -> str:
    """Return a name as it is in the model without torch.compile and checkpoint_wrapper."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts)


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names of each module: several if it is used several times."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def samples(model: nn.Module) -> dict[str, Tensor]:
    """Return up to 4096 entries, (k,), of everything in the state dict, by name."""
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or value.is_quantized:
            continue
        if value.layout is torch.strided:
            stride = max(1, -(-value.numel() // 4096))
            found[plain(name)] = value.detach().flatten()[::stride].cpu().clone()
    return found


def differs(old: Tensor, new: Tensor) -> bool:
    """Whether samples (k,) differ by more than a change of dtype explains."""
    tolerance = 0.0 if old.dtype == new.dtype else 0.01
    wide = torch.complex128 if old.is_complex() else torch.float64
    return old.shape != new.shape or not torch.allclose(
        old.to(wide), new.to(wide), rtol=tolerance, atol=1e-6 * tolerance, equal_nan=True)


def as_bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, as an array."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def shrink_(p: nn.Parameter, dim: int, live: Tensor, state: dict[str, Any]) -> None:
    """Keep the indices `live` (rank,) of one dimension of p, of its gradient and its moments."""
    shape, kept = p.shape, p.index_select(dim, live)
    grad = None if p.grad is None else p.grad.index_select(dim, live)
    p.grad = None

    # A graph of an earlier step may still hold p's gradient node, which checks the old shape.
    # torch makes a new node when the dtype changes.
    p.data = p.data.to(torch.float16 if p.dtype != torch.float16 else torch.float32)
    p.data = kept
    p.grad = grad if len(live) else None
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = value.index_select(dim, live)


def row_and_column(name: str) -> tuple[str, str]:
    """Cut a name after its first number, so that no two matrices share a cell.

    "encoder.layer.3.output.dense" -> ("encoder.layer.3", "output.dense")
    """
    match = re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name)
    return (match[1], match[2]) if match else (name, "live")


def table(cells: dict[tuple[str, str], int]) -> str:
    """Lay out numbers by (row, column) with totals; "." where there is no number."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    titles = [column.removeprefix("attention.self.") for column in columns]  # RoBERTa's

    lines = [["layer", *titles, "total"]]
    for row, label in [*zip(rows, without_common_prefix(rows)), (None, "total")]:
        chosen = {key: number for key, number in cells.items() if row in (None, key[0])}
        line = [label]
        for column in columns:
            numbers = [number for key, number in chosen.items() if key[1] == column]
            line.append(str(sum(numbers)) if numbers else ".")
        lines.append([*line, str(sum(chosen.values()))])

    widths = [max(3, *map(len, words)) for words in zip(*lines)]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths))
                     for line in lines)


def without_common_prefix(names: list[str]) -> list[str]:
    """Leave out the dotted parts with which all names begin: encoder.0, encoder.1 -> 0, 1."""
    parts = [name.split(".") for name in names]
    common = min([len(os.path.commonprefix(parts)), *(len(part) - 1 for part in parts)])
    return [".".join(part[common:]) for part in parts]


@dataclass
class Progress:
    """What the layers of one inject() share."""

    per_rank: int = 0  # what one component in every matrix costs
    samples: dict[str, Tensor] = field(default_factory=dict)  # of the model before training
    t: int = 0  # optimizer steps that the Pruner has done
    last: int = 0  # the step of its last pruning
    total: int = 0  # T; 0 = no Pruner yet
    compacted: bool = False

    def update(self, pruner: Pruner) -> None:
        """Note how far a Pruner is."""
        self.t, self.last, self.total = pruner.t, pruner.last, pruner.total_steps


def progress_of(layers: dict[str, DoRALinear]) -> Progress:
    """Return the Progress that the layers share."""
    return next((layer.progress for layer in layers.values()), Progress())


# ---- checks --------------------------------------------------------------------------------------

NO_SCORE = (list, "never", torch.cat)  # the row of importance = none
CHOICES: dict[str, dict[str, Any]] = {
    "importance": IMPORTANCE,
    "schedule": SCHEDULES,
    "penalty": PENALTIES,
}
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": lambda x, limit: x > limit,
    ">=": lambda x, limit: x >= limit,
    "<": lambda x, limit: x < limit,
}


def check_settings(config: Any) -> None:
    """Raise DoRAError for the first field with a wrong type, an unknown choice or out of range."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in CHOICES:
            check_choice(f.name, value, (*CHOICES[f.name], None))
        elif get_origin(hints[f.name]) is Literal:
            check_choice(f.name, value, get_args(hints[f.name]))
        else:
            check_type(f.name, value, hints[f.name])

    for rule, name in rules(type(config)):
        value = getattr(config, name)
        bounds = [bound.split() for bound in rule.split(", ")]  # [[">=", "0"], ["<", "1"]]
        if value is not None and not all(COMPARE[op](value, float(x)) for op, x in bounds):
            raise DoRAError(f"{name} = {value}: must be {rule.replace(', ', ' and ')}")


def rules(config: type) -> list[tuple[str, str]]:
    """Return (rule, field) of every range that a settings class and its parents state."""
    tables = [vars(cls).get("RANGES", {}) for cls in reversed(config.__mro__)]
    return [(rule, name) for table in tables for rule in table for name in table[rule].split()]


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise DoRAError for a value that is not one of the choices."""
    if not any(value is choice or value == choice for choice in choices):
        words = ", ".join("none" if choice is None else choice for choice in choices)
        raise DoRAError(f"{name} = {value!r}: choose one of {words}")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise DoRAError for a value of another type than the annotation; an int is a float, too."""
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise DoRAError(f'{name} = {value!r}: must be a tuple of names, such as ("query",)')
        return

    kinds = get_args(hint) or (hint,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or isinstance(value, bool) and bool not in kinds:
        words = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        raise DoRAError(f"{name} = {value!r}: must be of type {words}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DoRAError(f"{name} = {value}: must be finite")


def check_combinations(config: DoRAConfig) -> None:
    """Raise DoRAError for settings that are fine alone but not together."""
    if not config.targets or "" in config.targets:
        raise DoRAError(f"targets = {config.targets}: name at least one matrix to adapt")
    if config.r_prime < config.rank:
        raise DoRAError(f"start_rank = {config.r_prime} is below rank = {config.rank}; pruning "
                        f"only removes, so raise start_rank")
    if (config.schedule is None) != (config.importance is None):
        raise DoRAError(f"importance = {config.importance} and schedule = {config.schedule}: set "
                        f"both to prune, or both to none to keep every component")
    if config.schedule is None and config.r_prime != config.rank:
        raise DoRAError(f"rank = {config.rank} and start_rank = {config.r_prime} must be equal "
                        f"whole numbers if nothing is pruned (schedule = none)")
    if config.importance is not None and config.beta1 == 0 and config.beta2 is not None:
        raise DoRAError("beta1 = 0: the uncertainty |I - Ī|, and with it every score, is then 0; "
                        "set beta2 = none or raise beta1")
    if not config.gate and (config.schedule is not None or config.init != "zero_b"):
        raise DoRAError("gate = False: pruning closes gates, and a random B needs c = 0 at the "
                        "start; train the gates, or set schedule = none and init = zero_b")


def check_window(first: int, last: int, total_steps: int, config: DoRAConfig) -> None:
    """Raise DoRAError if no step is left to prune in."""
    if first >= last:
        raise DoRAError(f"initial_phase = {config.initial_phase} and final_phase = "
                        f"{config.final_phase} of {total_steps} steps leave no step to prune in; "
                        f"shorten a phase or lengthen the run")


def final_budget(config: DoRAConfig, per_rank: int) -> int:
    """Return b(T): r times the cost of one component in every matrix."""
    return round(config.rank * per_rank)


def find_targets(model: nn.Module, config: DoRAConfig) -> dict[str, nn.Linear]:
    """Return the matrices to adapt by name, in the model's order; DoRAError if one cannot be."""
    if dora_layers(model):
        raise DoRAError("the model is adapted already; name all targets in one inject(), on a "
                        "model without components")
    check_initialised(model)

    names = names_of(model)
    chosen: dict[nn.Module, str] = {}
    for target in config.targets:
        matches = [(module, name) for module in names for name in names[module]
                   if f".{plain(name)}".endswith(f".{target}")]
        if not matches:
            linear = {re.sub(r"^.*\.\d+\.", "", name[0]) for module, name in names.items()
                      if type(module) is nn.Linear and name[0]}
            raise DoRAError(f"target {target!r} matches no module; candidates: "
                            f"{', '.join(sorted(linear)) or 'none'}")
        for module, name in matches:
            check_target(target, name, module, names[module])
            chosen[module] = name

    found: dict[str, Any] = {name: m for m, (name, *_) in names.items() if m in chosen}
    sizes = [min(module.weight.shape) for module in found.values()]
    if config.rank * len(found) > sum(sizes):
        raise DoRAError(f"rank = {config.rank}: the matrices' own ranks are {max(sizes)} or less; "
                        f"lower rank")
    costs = [cost(module, config) for module in found.values()]
    if final_budget(config, sum(costs)) < min(costs):
        raise DoRAError(f"rank = {config.rank} over {len(found)} matrices leaves no component; "
                        f"raise rank")
    return found


def check_initialised(model: nn.Module) -> None:
    """Raise DoRAError if a lazy module has no weights yet."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise DoRAError(f"{name} is not initialised; run the model once on an example first")


def check_target(target: str, name: str, module: nn.Module, names: list[str]) -> None:
    """Raise DoRAError for a module that a DoRALinear cannot replace."""
    if type(module) is not nn.Linear:
        remedy = "choose other targets"
        if type(module).__name__ == "Conv1D":
            remedy = "turn it into an nn.Linear first, as the README shows for GPT-2"
        kind = type(module).__name__
        if kind == "Linear":  # of another library
            kind = f"{type(module).__module__}.{kind}"
        raise DoRAError(f"target {target!r}: {name} is a {kind}, and only an nn.Linear can be "
                        f"adapted; {remedy}")
    if "weight" not in module._parameters or not module.weight.is_floating_point():
        raise DoRAError(f"target {target!r}: the weight of {name} is computed from other tensors "
                        f"(weight_norm, spectral_norm, pruning) or holds no real numbers; remove "
                        f"that first, or choose other targets")
    check_used_once(f"target {target!r}", names)


def check_used_once(what: str, names: list[str]) -> None:
    """Raise DoRAError for a module with several names."""
    if len(names) > 1:
        raise DoRAError(f"{what}: {' and '.join(names)} are one module, used several times, and a "
                        f"saved adapter cannot say so; choose other targets")


def check_pruner(pruner: Pruner) -> None:
    """Raise DoRAError for layers that this Pruner cannot train."""
    check_type("total_steps", pruner.total_steps, int)
    if pruner.total_steps < 1:
        raise DoRAError(f"total_steps = {pruner.total_steps}: a run needs at least one step")

    config = pruner.config
    for name, layer in pruner.layers.items():
        if layer.config != config:
            raise DoRAError(f"{name}: its settings differ from the Pruner's; pass the config that "
                            f"inject() got")
        if config.schedule and len(layer.c) != config.r_prime:
            raise DoRAError(f"{name}: has {len(layer.c)} components, expected {config.r_prime}; a "
                            f"compacted model cannot be pruned again, inject() into a fresh one")
        check_frozen(name, layer)
    check_one_model(pruner)
    check_rows(config)

    earliest = min(pruner.first + config.interval, pruner.last)
    if pruner.layers and pruner.moment == "gradients" and earliest < 2:
        raise DoRAError(f"total_steps = {pruner.total_steps}, initial_phase = "
                        f"{config.initial_phase}, interval = {config.interval}: the first pruning "
                        f"is at step {earliest}, when every score is still 0; lengthen the run or "
                        f"the initial phase")


def check_one_model(pruner: Pruner) -> None:
    """Raise DoRAError unless these are all the layers of one inject()."""
    progress = progress_of(pruner.layers)
    others = [name for name, layer in pruner.layers.items() if layer.progress is not progress]
    if progress.per_rank and (others or pruner.per_rank != progress.per_rank):
        raise DoRAError(f"these {len(pruner.layers)} layers are not those that one inject() made: "
                        f"the budget is the whole model's; pass all that inject() returned")


def check_rows(config: DoRAConfig) -> None:
    """Raise DoRAError for a row of IMPORTANCE or SCHEDULES that cannot work."""
    moment = IMPORTANCE[config.importance][1] if config.importance else "weights"
    if moment not in ("gradients", "weights"):
        raise DoRAError(f"importance = {config.importance}: its moment is {moment!r}, expected "
                        f"'gradients' or 'weights'")
    for i in range(101 if config.schedule else 0):
        left = SCHEDULES[config.schedule or ""](i / 100, 1000)
        if type(left) is not int or not 0 <= left <= (0 if i == 100 else 1000):
            raise DoRAError(f"schedule = {config.schedule}: of a surplus of 1000 it leaves {left} "
                            f"at progress {i / 100}; expected a whole number from 0 to the "
                            f"surplus, and 0 at progress 1")


def check_frozen(name: str, layer: DoRALinear) -> None:
    """Raise DoRAError if the base of a layer trains: an adapter file has no place for it."""
    for symbol, p in layer.base._parameters.items():  # in every step: named_parameters() is slow
        if p is not None and p.requires_grad:
            raise DoRAError(f"{name}: its frozen {symbol} was set to train, and an adapter cannot "
                            f"hold it; unfreeze only modules without targets inside")


def check_observed(pruner: Pruner) -> None:
    """Raise DoRAError if this step has no importance."""
    if not pruner.observed:
        raise DoRAError(f"step {pruner.t + 1}: pruner.step() without pruner.observe(); call "
                        f"observe() after backward() in every step")


def check_gradients(pruner: Pruner) -> None:
    """Raise DoRAError if this step was observed already, if a base trains, or if no component has a
    gradient."""
    if pruner.observed:
        raise DoRAError(f"step {pruner.t + 1}: a second pruner.observe() before pruner.step(); "
                        f"when accumulating gradients, call it once, after the last backward()")
    for name, layer in pruner.layers.items():
        check_frozen(name, layer)
    # where gates train, only theirs count: A and B also have the gradient of the penalty
    parameters = [p for layer in pruner.layers.values()
                  for p in ((layer.c,) if pruner.config.gate else (layer.A, layer.B))]
    if parameters and all(p.grad is None for p in parameters):
        raise DoRAError("no component has a gradient; call observe() after backward() and before "
                        "zero_grad(), and use_reentrant=False in gradient checkpointing")


def check_shape(pruner: Pruner, scores: Tensor) -> None:
    """Raise DoRAError unless there is one score per component, (n,)."""
    if scores.shape != pruner.mask.shape:
        raise DoRAError(f"importance = {pruner.config.importance}: its scores have the shape "
                        f"{tuple(scores.shape)}, expected one number per component, "
                        f"{tuple(pruner.mask.shape)}")


def check_decision(pruner: Pruner, scores: Tensor, mask: Tensor) -> None:
    """Raise if a mask (n,) is decided by scores (n,) that are not finite or by ties of zeros."""
    gates = concatenate(layer.c for layer in pruner.layers.values()).cpu()
    bad = ~(scores.isfinite() & gates.isfinite())
    if bad.any():
        name = list(pruner.layers)[int(bad.int().argmax()) // pruner.config.r_prime]
        raise NotFiniteError(f"step {pruner.t}: a score of {name} is not finite; lower the "
                             f"learning rate")

    zero = scores <= 0
    if zero.all() and len(scores):
        raise DoRAError(f"step {pruner.t}: every score is 0, so no component has moved; make the "
                        f"optimizer after inject(), and check the learning rate")
    if pruner.t == pruner.last and (zero & mask).any() and (zero & ~mask).any():
        raise DoRAError(f"step {pruner.t}: {int((~zero).sum())} components have a score above 0 "
                        f"and the budget keeps {int(mask.sum())}: position would decide between "
                        f"the others; lengthen the run, lower rank, or leave out targets that get "
                        f"no gradient")


def check_state(pruner: Pruner, state: dict[str, Any]) -> None:
    """Raise DoRAError for a state of another model or another run."""
    needed = pruner.state_dict().keys() - {"settings"}  # which older states do not have
    if not isinstance(state, dict) or not state.keys() >= needed:
        raise DoRAError("not a Pruner's state; pass what its state_dict() returned")
    if pruner.progress.compacted:
        raise DoRAError("the model is compacted already; restore the state before compact_()")
    if state["mask"].shape != pruner.mask.shape:
        raise DoRAError(f"the state has {len(state['mask'])} components, the model "
                        f"{len(pruner.mask)}; use the same rank, start_rank and targets")
    if state["total_steps"] != pruner.total_steps:
        raise DoRAError(f"the state is of a run of {state['total_steps']} steps, this Pruner has "
                        f"total_steps = {pruner.total_steps}; use the same number")

    importance = pruner.config.importance
    I = IMPORTANCE[importance][0](list(pruner.layers.values())) if importance else []
    shapes = [part.shape for part in as_list(I)]
    if state["I_bar"] and [part.shape for part in state["I_bar"]] != shapes:
        raise DoRAError(f"the state holds other scores than those of importance = {importance}; "
                        f"use the settings that it was saved with")
    for name, value in method_settings(pruner.config).items():
        before = state.get("settings", {}).get(name, value)
        if before != value:
            raise DoRAError(f"the state is of a run with {name} = {before}, this Pruner has "
                            f"{value}; use the same settings")


def method_settings(config: DoRAConfig) -> dict[str, Any]:
    """Return the settings of the method, without those that a class of one's own adds; targets are
    left out, since a state is compared with the layers themselves."""
    return {f.name: getattr(config, f.name) for f in fields(DoRAConfig) if f.name != "targets"}


def check_budget(layers: dict[str, DoRALinear]) -> None:
    """Raise DoRAError unless the last pruning is done, its mask is held and no component is NaN."""
    spent: dict[int, int] = {}  # by inject(): a model may have several adapters
    for layer in layers.values():
        key = id(layer.progress)
        spent[key] = spent.get(key, 0) + layer.rank * cost(layer, layer.config)
    for name, layer in layers.items():
        progress = layer.progress
        if not all(p.isfinite().all() for p in (layer.A, layer.B, layer.c)):
            raise NotFiniteError(f"{name}: a component is NaN or infinite; lower the learning rate")
        if layer.config.schedule is None:
            continue
        if not progress.per_rank:
            raise DoRAError("these layers were not made by inject(), which notes the budget of the "
                            "whole model; make them with inject()")
        if not progress.total:
            raise DoRAError("no Pruner has run on these layers; make one, and call observe() and "
                            "step() in every step, or restore the state of the one that has")
        if progress.t < progress.last:
            raise DoRAError(f"the Pruner is at step {progress.t} of {progress.total}, before its "
                            f"last pruning at step {progress.last}; finish the run, calling "
                            f"pruner.step() in every step, or restore the Pruner's state")
        b_T = final_budget(layer.config, progress.per_rank)
        live = spent[id(progress)]
        if live > b_T:
            raise DoRAError(f"{live} {layer.config.budget_unit} are live, the budget is {b_T}; "
                            f"leave the masks to the Pruner")
        if layer.c[~layer.mask].any():
            raise DoRAError(f"{name}: a pruned gate is not 0; call pruner.step() after every "
                            f"optimizer.step()")


def check_forward(layers: dict[str, DoRALinear]) -> None:
    """Raise DoRAError for a base whose forward was replaced: it goes on using the frozen weight."""
    for name, layer in layers.items():
        if getattr(layer.base.forward, "__func__", None) is not nn.Linear.forward:
            raise DoRAError(f"{name}: its forward was replaced, as accelerate's hooks do, and "
                            f"would go on using the frozen weight; remove the hooks "
                            f"(remove_hook_from_submodules) before merge_(), or save the adapter")


def check_optimizer_state(layers: dict[str, DoRALinear], state: dict[Any, Any]) -> None:
    """Raise DoRAError for state that compact_ does not know how to cut."""
    shrinks = {p for layer in layers.values() for p in (layer.A, layer.B, layer.c)}
    for p, values in state.items():
        for key, value in values.items():
            known = value is None or isinstance(value, (int, float, bool))
            if isinstance(value, Tensor):  # of p's shape, or a number; elsewhere, not too large
                known = (value.shape == p.shape or value.numel() == 1
                         or p not in shrinks and value.numel() <= p.numel())
            if not known:
                raise DoRAError(f"the optimizer's {key!r} is not of the shape of its parameter, so "
                                f"compact_ cannot cut it; use AdamW, or call compact_(model) after "
                                f"training, without the optimizer")


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing that replaces `path` only when it is complete.

    The content goes to a temporary file in the same folder, is flushed to disk and then renamed,
    so that a crash leaves the old content or the new, and two processes never mix theirs.
    """
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
        if error.filename is None:  # such as that of a full disk
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


# ---- safetensors ---------------------------------------------------------------------------------

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64, "BOOL": torch.bool,
}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped: a change never reaches the file.

    Layout: 8 bytes, the length n of the header, little-endian; n bytes of JSON, {name: {dtype,
    shape, data_offsets}}; then the data. Raises DoRAError for anything else.
    """
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a safetensors file; the header may hold "__metadata__", too."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        n = int.from_bytes(start, "little")
        if start == b"version ":
            raise DoRAError(f"{path}: this is a git-lfs pointer, not the file itself; run "
                            f"`git lfs pull`")
        try:
            if n > min(size - 8, 100_000_000):
                raise ValueError(f"a header of {n} bytes in a file of {size}")
            header = parse_header(file.read(n))
            metadata = header.pop("__metadata__", {})
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return tensors_of(header, data, 8 + n), metadata
        except Exception as error:  # of any kind: the header may hold anything
            raise DoRAError(f"{path}: not a safetensors file ({error!s:.200}); download or save "
                            f"it again") from None


def parse_header(text: bytes) -> dict[str, Any]:
    """Return a header's JSON, UTF-8 that begins with a brace; ValueError for another."""

    def number(digits: str) -> int:
        if digits == "-0":
            raise ValueError("an offset is -0")
        return int(digits)

    if not text.startswith(b"{"):
        raise ValueError("a header that does not begin with a brace")
    # most headers need neither of the two slow checks
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique,
                        parse_int=number if b"-0" in text else None)
    if b"\\u" in text:
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair

    metadata = header.get("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not strings")
    return header


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of a JSON object; ValueError for a duplicate name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate name")
    return found


def tensors_of(header: dict[str, Any], data: mmap.mmap, begin: int) -> dict[str, Tensor]:
    """Return the tensors that a header describes, as views of the data; ValueError for a bad one.

    Each begins where the one before ends, so no byte is read twice and none is left out.
    """
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, span = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if len(shape) > 63 or not all(type(i) is int and 0 <= i < 2**48 for i in shape + span):
            raise ValueError(f"{name!r:.80}: shape {shape!r:.80}")
        if math.prod(max(i, 1) for i in shape) >= 2**63:
            raise ValueError(f"{name!r:.80}: shape {shape!r:.80} overflows")

        count = math.prod(shape)
        start, end = end, end + count * dtype.itemsize
        if span != [start, end] or len(entry) > 3:
            raise ValueError(f"{name!r:.80}: {entry!r:.80}, but its place is {start} to {end}")
        flat = torch.empty(0, dtype=dtype) if count == 0 else torch.frombuffer(
            data, dtype=dtype, count=count, offset=begin + start)
        tensors[name] = flat.view(shape)

    if begin + end != len(data):
        raise ValueError(f"{len(data) - begin} bytes of data, {end} of them in tensors")
    return tensors


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can hold, without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor],
                      metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises DoRAError for what the format cannot hold."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    metadata = {"format": "pt", **(metadata or {})}
    for key, text in metadata.items():
        if not is_text(key) or not is_text(text):
            raise DoRAError(f"{path}: metadata {key!r:.80} = {text!r:.80} is not valid text")
    for name, tensor in tensors.items():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        if not is_text(name) or name == "__metadata__" or kind not in names:
            raise DoRAError(f"{path}: cannot hold a tensor named {name!r:.80} of {kind}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise DoRAError(f"{path}: {name!r:.80} has no plain data (layout {tensor.layout}, "
                            f"device {tensor.device})")

    header: dict[str, Any] = {"__metadata__": metadata}
    end, chunks = 0, []
    for name in sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)):  # aligned starts
        tensor = tensors[name]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
        chunks.append(as_bytes(tensor))

    start = json.dumps(header).encode()
    start += b" " * (-len(start) % 8)
    with atomic_file(path) as file:
        file.writelines([len(start).to_bytes(8, "little"), start, *chunks])


# ---- adapters, in PEFT's LoRA format -------------------------------------------------------------

PREFIX = "base_model.model."
PEFT_MODULES = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A",
                "lora_embedding_B", "lora_magnitude_vector", "default")


def save_adapter(model: nn.Module, folder: str | Path, metadata: dict[str, str] | None = None,
                 peft: dict[str, Any] | None = None) -> None:
    """Save the live components and the head as adapter_model.safetensors and adapter_config.json.

    metadata is noted beside the tensors. peft fills fields of adapter_config.json, such as
    {"task_type": "SEQ_CLS", "base_model_name_or_path": ...} for PEFT's Auto classes.

    The format is Hugging Face PEFT's LoRA: scale and c are folded into B, so that alpha / r is 1 in
    every matrix. Matrices without components are left out, since PEFT has no rank 0. Raises
    DoRAError before the last pruning, after merge_(), and for anything that trained and that the
    file could not hold.
    """
    model = unwrapped(model)
    layers = dora_layers(model)
    if not layers:
        raise DoRAError("the model has no DoRALinear; save the adapter before merge_()")
    check_budget(layers)
    check_same_model(layers)
    check_moved(layers)
    heads = modules_to_save(model, layers)

    # the trained head belongs to the adapter: with a random one it is noise
    tensors = {PREFIX + key: tensor for key, tensor in head_tensors(model, heads).items()}
    live = {plain(name): layer for name, layer in layers.items() if layer.rank}
    for name, layer in live.items():
        B = (layer.scale * layer.c * layer.B)[:, layer.mask]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A[layer.mask]  # (rank, d_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B  # (d_out, rank)

    base = fingerprint(live[name].base.weight for name in sorted(live))
    config = peft_config({name: layer.rank for name, layer in live.items()},
                         peft_names(model, heads),
                         next(iter(live.values())).config.dropout)
    config.update(peft or {})
    folder = Path(folder)
    check_names(folder, tensors, live)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {**(metadata or {}),
                                                                      "base": base})
    with atomic_file(folder / "adapter_config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")


def check_names(folder: Path, tensors: dict[str, Tensor], live: dict[str, DoRALinear]) -> None:
    """Raise DoRAError if a reader would take tensors of a head for components."""
    for name in split_adapter(folder, tensors)[0]:
        if name not in live:
            raise DoRAError(f"{name}.lora_A or .lora_B has the name of an adapter's part, so that "
                            f"the file could not be read; rename the module")


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


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Return a checksum of base weights: CRC-32 of the signs of the first 256 entries of each.

    The signs survive rounding to another dtype.
    """
    crc = 0
    for weight in weights:
        crc = zlib.crc32(weight.detach().flatten()[:256].signbit().cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


def check_same_model(layers: dict[str, DoRALinear]) -> None:
    """Raise DoRAError unless the matrices have the names that they had in inject(), by which it
    noted everything that training may change."""
    for name, layer in layers.items():
        if layer.progress.samples and plain(name) != plain(layer.name):
            raise DoRAError(f"{name} was {layer.name} in inject(); save the model that inject() "
                            f"was given")


def check_moved(layers: dict[str, DoRALinear]) -> None:
    """Raise DoRAError if every update is exactly 0, or every open gate 1, as before training."""
    if not any(layer.c.any() and layer.A.any() and layer.B.any() for layer in layers.values()):
        raise DoRAError("every update is exactly 0, so no component was trained; make the "
                        "optimizer after inject(), and give it all parameters that require a "
                        "gradient")
    gates = [layer.c for layer in layers.values() if layer.config.gate]
    if gates and all((c[c != 0] == 1).all() for c in gates):
        raise DoRAError(f"no gate c has moved from 1; give the optimizer all parameters that "
                        f"require a gradient, and convert a model to {gates[0].dtype} before "
                        f"inject(), which then keeps the components in float32")


def modules_to_save(model: nn.Module, layers: dict[str, DoRALinear]) -> list[str]:
    """Return the names of the modules, outside the layers, that training changed.

    These have a parameter that requires a gradient, or something else that changed since inject(),
    such as running statistics. Where everything in the module around one trains, that module takes
    its place. Raises DoRAError for a change that whole modules, as PEFT saves them, cannot hold.
    """
    start, now = progress_of(layers).samples, samples(model)
    trains = {plain(name): p.requires_grad
              for name, p in model.named_parameters(remove_duplicate=False)}
    moved = [name for name in now if name in start and differs(start[name], now[name])]
    inside = {f"{plain(name)}.": name for name in layers}

    found: dict[str, None] = {}
    for changed in dict.fromkeys([*(name for name in trains if trains[name]), *moved]):
        layer = next((inside[start] for start in inside if changed.startswith(start)), None)
        if layer is not None:
            check_frozen(layer, layers[layer])
            continue

        owner = changed.rpartition(".")[0]
        around = owner.rpartition(".")[0]
        while around and all(trains[name] for name in trains if name.startswith(f"{around}.")):
            owner, around = around, around.rpartition(".")[0]
        if not owner or any(name.startswith(f"{owner}.") for name in inside):
            raise DoRAError(f"{changed} changed since inject(), but an adapter holds whole "
                            f"modules, and {owner or 'the model'} contains adapted matrices; "
                            f"freeze it")
        found[owner] = None
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def head_tensors(model: nn.Module, heads: list[str]) -> dict[str, Tensor]:
    """Return the tensors of these modules by name. Raises DoRAError for a module with other
    state."""
    modules = {plain(name): m for name, m in model.named_modules(remove_duplicate=False)}
    found = {}
    for head in heads:
        state = modules[head].state_dict(prefix=f"{head}.")
        for key, tensor in zip(map(plain, state), state.values()):
            owner, _, leaf = key.rpartition(".")
            module = modules.get(owner, model)
            if leaf not in module._parameters and leaf not in module._buffers:
                raise DoRAError(f"{key} changed since inject(), and is neither a parameter nor a "
                                f"buffer, which is all that an adapter can hold; freeze {head}")
            found[key] = tensor
    return found


def peft_names(model: nn.Module, heads: list[str]) -> list[str]:
    """Return the heads by names that PEFT, which compares the ends of names, cannot confuse."""
    others = [f".{name}" for name in PEFT_MODULES]  # somewhere in a matrix
    others += [plain(name) for name, _ in model.named_modules(remove_duplicate=False)]
    return [PREFIX + head if any(name.endswith(head) and name != head for name in others) else head
            for head in heads]


def adapter_metadata(folder: str | Path) -> dict[str, str]:
    """Return what save_adapter noted beside the tensors."""
    return read_file(Path(folder) / "adapter_model.safetensors")[1]


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, DoRALinear]:
    """Put a LoRA adapter, ours or PEFT's, on a plain model; return its layers by name.

    Everything is checked before the model is changed. Raises DoRAError for another base model,
    another head, and the kinds of LoRA that Eq. 6 does not cover.
    """
    model = not_shared(model)
    if dora_layers(model):
        raise DoRAError(f"{folder}: the model is adapted already; load into a plain model")
    check_initialised(model)

    # 1. read the config
    path = Path(folder) / "adapter_config.json"
    alpha_of, rank_of, dropout = read_adapter_config(path)

    # 2. match the tensors with the model
    file = Path(folder) / "adapter_model.safetensors"
    saved, metadata = read_file(file)
    pairs, head = split_adapter(file, saved)
    names = {module: [plain(name) for name in found] for module, found in names_of(model).items()}
    modules: dict[str, Any] = {name: module for module in names for name in names[module]}
    for name, (A, B) in pairs.items():
        check_pair(folder, name, A, B, modules.get(name))
        check_used_once(f"{folder}: {name!r:.120}", names[modules[name]])
    state = {plain(key): value for key, value in model.state_dict(keep_vars=True).items()}
    head = {key: tensor for key, tensor in head.items() if not is_base(file, key, tensor, state)}
    for key, tensor in head.items():
        shape = tuple(state[key].shape) if key in state else None
        if tensor.shape != shape:
            raise DoRAError(f"{folder}: {key!r:.120} is {tuple(tensor.shape)}, in the model "
                            f"{shape}; is the adapter for another task or base model?")
        check_twins(file, key, head, names[modules[key.rpartition(".")[0]]])
    mark = fingerprint(modules[name].weight for name in sorted(pairs))
    if metadata.get("base", mark) != mark:
        raise DoRAError(f"{file}: was trained on other weights of the same shapes; use it with the "
                        f"base model that it was trained on")
    for name, (A, _) in pairs.items():
        if rank_of(name) not in (None, len(A)):
            raise DoRAError(f"{path}: the rank of {name} is {rank_of(name)!r:.40}, but {len(A)} in "
                            f"{file.name}; the files are of two saves, save the adapter again")
    configs = {name: DoRAConfig(**METHODS["lora"], rank=len(A), alpha=alpha_of(name),
                                dropout=dropout) for name, (A, _) in pairs.items()}

    # 3. change the model
    progress = Progress(samples=samples(model))
    model.requires_grad_(False)
    layers: dict[str, DoRALinear] = {}
    for name, (A, B) in pairs.items():
        layer = layers[name] = DoRALinear(modules[name], configs[name], name, progress)
        layer.A.copy_(A)
        layer.B.copy_(B)
        replace(modules[name.rpartition(".")[0]], name.rpartition(".")[2], layer)
    for key, tensor in head.items():
        set_copy(modules[key.rpartition(".")[0]], key.rpartition(".")[2], tensor)
    return layers


def read_adapter_config(path: Path) -> tuple[Callable[[str], float], Callable[[str], Any], float]:
    """Return (alpha of a matrix by its name, rank of a matrix by its name, or None if the file does
    not tell, dropout). Raises DoRAError for anything but plain LoRA."""
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=unique)
        alphas, ranks = ({re.compile(rf"(.*\.)?({key})$"): value  # PEFT's rule for a pattern
                          for key, value in (config.get(f"{what}_pattern") or {}).items()}
                         for what in ("alpha", "rank"))
    except (ValueError, RecursionError, OverflowError, AttributeError, re.error):
        raise DoRAError(f"{path}: not the JSON of an adapter; save the adapter again") from None

    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "use_dora": (False,), "use_rslora": (False,), "bias": ("none",),
        "fan_in_fan_out": (False,), "alora_invocation_tokens": (None,),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # W0 unchanged
    }
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise DoRAError(f"{path}: {key} is {config[key]!r:.40}; only plain LoRA can be loaded "
                            f"({key} = {values[0]!r})")

    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DoRAError(f"{path}: lora_dropout is {dropout!r:.40}, not a number in [0, 1)")

    def of(name: str, patterns: dict[Any, Any], default: Any) -> Any:
        return next((value for pattern, value in patterns.items() if pattern.match(name)), default)

    def alpha_of(name: str) -> float:
        alpha = of(name, alphas, config.get("lora_alpha"))
        if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
            raise DoRAError(f"{path}: lora_alpha of {name} is {alpha!r:.40}, not a number above 0")
        return alpha

    return alpha_of, lambda name: of(name, ranks, config.get("r")), dropout


Pairs = dict[str, tuple[Tensor, Tensor]]


def split_adapter(file: Path, saved: dict[str, Tensor]) -> tuple[Pairs, dict[str, Tensor]]:
    """Return ({matrix: (A (r, d_in), B (d_out, r))}, the other tensors) of an adapter file."""
    for key in saved:
        if not key.startswith(PREFIX):
            raise DoRAError(f"{file}: unexpected tensor {key!r:.120}: names in a PEFT adapter "
                            f"start with {PREFIX}")
        if ".lora_embedding_" in key:
            raise DoRAError(f"{file}: {key!r:.120} adapts an embedding; only LoRA on nn.Linear can "
                            f"be loaded")

    others = {key.removeprefix(PREFIX): tensor for key, tensor in saved.items()}
    halves = [re.fullmatch(r"(.+)\.lora_[AB]\.weight", key) for key in others]
    pairs = {}
    for name in sorted({match[1] for match in halves if match}):
        A, B = (others.pop(f"{name}.lora_{m}.weight", torch.empty(0)) for m in "AB")
        pairs[name] = A, B
    if not pairs:
        raise DoRAError(f"{file}: no lora_A and lora_B in it; save the adapter again")
    return pairs, others


def check_pair(folder: str | Path, name: str, A: Tensor, B: Tensor, base: Any) -> None:
    """Raise DoRAError unless A (r, d_in) and B (d_out, r) fit the matrix of the model."""
    shape = tuple(base.weight.shape) if type(base) is nn.Linear else None
    if not A.numel() or shape != (*B.shape[:1], *A.shape[1:]) or B.shape[1:] != A.shape[:1]:
        raise DoRAError(f"{folder}: {name!r:.120} has lora_B {tuple(B.shape)} and lora_A "
                        f"{tuple(A.shape)}, the model's matrix is {shape}; is the adapter for "
                        f"another base model?")


def is_base(file: Path, key: str, tensor: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether a tensor is a copy of a frozen weight, which PEFT adds for lm_head. Raises DoRAError
    if it differs from the model's weight."""
    name, found, leaf = key.rpartition(".base_layer.")
    if not found:
        return False
    base = state.get(f"{name}.{leaf}")
    base = None if base is None else base.to(tensor.device)
    if base is None or base.shape != tensor.shape or not (
            torch.equal(base, tensor.to(base.dtype)) or torch.equal(base.to(tensor.dtype), tensor)):
        raise DoRAError(f"{file}: {key!r:.120} differs from the model's {name}.{leaf}; use it with "
                        f"the base model that it was trained on")
    return True


def check_twins(file: Path, key: str, head: dict[str, Tensor], names: list[str]) -> None:
    """Raise DoRAError if a module has several names, and the file has other values under one.

    PEFT gives each name a module of its own.
    """
    leaf = key.rpartition(".")[2]
    for name in names:
        twin = head.get(f"{name}.{leaf}".removeprefix("."))
        if twin is None or not torch.equal(twin, head[key]):
            raise DoRAError(f"{file}: {key!r:.120} belongs to a module that is used as "
                            f"{' and '.join(names)}, and not all of these have the same values in "
                            f"it; load it into a model that has a module for each")


def set_copy(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module its own copy of a trained tensor: others may share the one that it has."""
    old = getattr(module, name)
    new = tensor.to(old, copy=True)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=new.is_floating_point() or new.is_complex())
    setattr(module, name, new)
