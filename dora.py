"""DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024, arXiv 2405.17357), in plain PyTorch.

LoRA adds one low-rank update to a frozen matrix. DoRA writes that update as a sum of rank-1
*components*, each behind a gate, scores every component of the whole model while it trains, and
closes the gates of the least important ones until a budget is met. Capacity moves to the matrices
that need it. (Not NVIDIA's DoRA, which splits a weight into magnitude and direction.)

    symbol   in code               shape           meaning
    W0       base.weight           (d_out, d_in)   frozen pretrained matrix
    a_i      A[i]                  (d_in,)         row of A (r', d_in)
    b_i      B[:, i]               (d_out,)        column of B (d_out, r')
    c_i      c[i]                  scalar          gate; 0 = pruned
    s        scale                 scalar          alpha / r or alpha / r'
    r', r    config.r_prime, rank  components      per matrix at the start; mean after pruning
    L        len(layers)           matrices        adapted
    n        len(mask)             components      of the whole model at the start, r' L
    b(t)     budget                components      of these kept after step t
    T        total_steps           steps           t_i, t_f: lengths of initial and final phase
    I, Ī, Ū  I, I_bar, U_bar       (n,)            importance, its moving average, its uncertainty
    R, η     penalty, eta          scalar          regulariser and its weight

The method is three lines of a training step, in this order:

    layers = inject(model, config); pruner = Pruner(layers, config, total_steps)
    loss = task_loss + pruner.penalty()
    loss.backward()
    pruner.observe()      # before clipping and stepping: weight and gradient belong together
    optimizer.step()
    pruner.step()

A line that begins `# differs:` says where this departs from the paper or its authors' code.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class DoRAError(ValueError):
    """Bad input. The message is one line: the value, what is wrong with it, the remedy."""


class NotFiniteError(DoRAError):
    """Training left the finite numbers."""


# ---- configuration -----------------------------------------------------------------------------


def setting(default: Any, help: str, choices: tuple[Any, ...] = (), above: float = -math.inf,
            least: float = -math.inf, below: float = math.inf) -> Any:
    """A dataclass field with its help text (meaning, unit, source) and what values it may take."""
    rule = {"help": help, "choices": choices, "above": above, "least": least, "below": below}
    return field(default=default, metadata=rule)


def check_settings(config: Any) -> None:
    """Raise DoRAError for the first field that breaks the rule of its setting()."""
    for f in fields(config):
        value, rule = getattr(config, f.name), f.metadata
        if rule.get("choices") and value not in rule["choices"]:
            raise DoRAError(f"{f.name} = {value}: choose one of {rule['choices']}")
        if type(value) in (int, float) and not (
                value > rule["above"] and rule["least"] <= value < rule["below"]):
            limits = {"above": "> ", "least": ">= ", "below": "< "}
            bounds = [s + f"{rule[k]:g}" for k, s in limits.items() if math.isfinite(rule[k])]
            raise DoRAError(f"{f.name} = {value}: must be {' and '.join(bounds) or 'finite'}")


@dataclass(frozen=True)
class DoRAConfig:
    """Every setting of the method. Methods differ by these values alone (see METHODS)."""

    rank: float = setting(2.0, "r: mean components per matrix after pruning; 0.5 works", above=0)
    start_rank: int | None = setting(
        None, "r': components per matrix at the start; none = ceil(1.5 r) (paper)", least=1)
    alpha: float = setting(8.0, "update scale = alpha / rank or alpha / start_rank", above=0)
    dropout: float = setting(0.1, "dropout on the low-rank path (paper: 0.1)", least=0, below=1)
    targets: tuple[str, ...] = setting(
        ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
        "dotted suffixes of the names of the matrices to adapt")
    # differs: the paper starts from c = 0 and large random B; B = 0 is ready to prune sooner
    init: str = setting("zero_b", "start: B = 0 and c = 1, or random A and B and c = 0",
                        ("zero_b", "kaiming", "gaussian"))
    gate: bool = setting(True, "train the gates c; if not, they stay at 1")
    # differs: the paper has alpha / r'; with alpha / r a run ends at LoRA's scale
    scale: str = setting("rank", "what alpha is divided by (Eq. 6: r')", ("rank", "start_rank"))
    # differs: the paper has Eq. 7, which gives rank to each matrix, also to one that needs none
    importance: str | None = setting("sensitivity", "score of a component; none = never prune",
                                     ("sensitivity", "triplet", "norm", "frobenius", None))
    beta1: float = setting(0.85, "smoothing of the importance (Eq. 8)", least=0, below=1)
    beta2: float | None = setting(0.85, "same for its uncertainty; none = unused", least=0, below=1)
    eps: float = setting(1e-8, "added to the norm that Eq. 7 divides by", above=0)
    # differs: the paper prunes slowly first, which leaves the survivors little time to move in
    schedule: str | None = setting(
        "adalora", "budget curve: dora = slow first (Eq. 9), adalora = fast first; none = flat",
        ("dora", "adalora", None))
    initial_phase: float = setting(0.15, "share of steps before pruning (paper)", least=0, below=1)
    final_phase: float = setting(0.5, "share of steps after pruning (paper)", least=0, below=1)
    interval: int = setting(10, "optimizer steps between prunings (paper: 10 or 50)", least=1)
    penalty: str | None = setting("dem", "regulariser while pruning", ("dem", "orthogonal", None))
    eta: float = setting(0.3, "weight of the regulariser (paper: 0.3 or 0.5)", least=0)
    # differs: the paper drops out x, d_in numbers a matrix; dropping out r' costs next to nothing
    dropout_on: str = setting("components", "dropout on the input x or on the r' numbers a_i . x",
                              ("input", "components"))

    @property
    def r_prime(self) -> int:
        """r': components per matrix at the start."""
        spare = 1.0 if self.schedule is None else 1.5
        return self.start_rank or math.ceil(spare * self.rank)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.targets:
            raise DoRAError("targets is empty: name at least one matrix to adapt")
        if self.r_prime < self.rank:
            raise DoRAError(f"start_rank = {self.r_prime} is below rank = {self.rank}; pruning "
                            f"only removes, so raise start_rank")
        if (self.schedule is None) != (self.importance is None):
            raise DoRAError(f"importance = {self.importance} and schedule = {self.schedule}: set "
                            f"both to prune, or both to none to keep every component")
        if self.schedule is None and self.r_prime != self.rank:
            raise DoRAError(f"rank = {self.rank} and start_rank = {self.r_prime} must be equal "
                            f"whole numbers where nothing is pruned (schedule = none)")
        if not self.gate and (self.schedule is not None or self.init != "zero_b"):
            raise DoRAError("gate = False: pruning closes gates, and a random B needs c = 0 at the "
                            "start; train the gates, or set schedule = none and init = zero_b")


METHODS: dict[str, dict[str, Any]] = {
    "dora": {},  # the defaults above; benchmarks/RESULTS.md has the evidence for each
    "paper": dict(init="kaiming", scale="start_rank", importance="norm", beta1=0.9, beta2=None,
                  schedule="dora", dropout_on="input"),
    "lora": dict(gate=False, importance=None, schedule=None, penalty=None, dropout_on="input"),
    "adalora": dict(init="gaussian", scale="start_rank", importance="triplet", schedule="adalora",
                    penalty="orthogonal", eta=0.5, dropout_on="input"),
}


# ---- the layer: Eq. 6 --------------------------------------------------------------------------


class DoRALinear(nn.Module):
    """A frozen nn.Linear plus r' gated rank-1 components, y = W x + bias with

    W = W0 + s * sum_i c_i b_i a_i^T,   s = alpha / r' or alpha / r   (Eq. 6)
    """

    mask: Tensor  # (r',) bool, True = live: kept by the last pruning

    def __init__(self, base: nn.Linear, config: DoRAConfig):
        super().__init__()
        d_out, d_in = base.weight.shape
        r = config.r_prime
        self.base, self.config = base.requires_grad_(False), config
        self.scale = config.alpha / (config.rank if config.scale == "rank" else r)
        self.dropout = nn.Dropout(config.dropout)
        # float32 also over a half-precision base, which would round small updates away
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.A = nn.Parameter(base.weight.new_empty((r, d_in), dtype=dtype))
        self.B = nn.Parameter(base.weight.new_empty((d_out, r), dtype=dtype))
        self.c = nn.Parameter(base.weight.new_empty((r,), dtype=dtype), requires_grad=config.gate)
        self.register_buffer("mask", torch.ones_like(self.c, dtype=torch.bool))
        self.name = ""  # in the model, for messages
        self.final_budget = math.inf  # b(T) of the whole model, set by inject()
        self.progress = (0, 0, 0)  # the Pruner's t, last pruning, T; zeros before its first step
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
        """(..., d_in) -> (..., d_out)."""
        rows, A = x.reshape(-1, x.shape[-1]), self.A.to(x.dtype)  # (N, d_in), (r', d_in)
        if self.config.dropout_on == "input":
            h = self.dropout(rows) @ A.T  # (N, r')   a_i . x
        else:
            h = self.dropout(rows @ A.T)  # (N, r')
        # as contiguous rows: with a skinny (d_out, r') matrix backward takes 4 to 8 times as long
        B = (self.scale * self.c * self.B).T.contiguous()  # (r', d_out)
        y = self.base(rows)  # (N, d_out)
        y.addmm_(h.to(y.dtype), B.to(y.dtype))  # in place: no second (N, d_out) tensor
        return y.view(*x.shape[:-1], y.shape[-1])

    def delta_weight(self) -> Tensor:
        """The update s * sum_i c_i b_i a_i^T, (d_out, d_in) (Eq. 6)."""
        return (self.scale * self.c * self.B) @ self.A

    @property
    def rank(self) -> int:
        """Live components."""
        return int(self.mask.sum())


def inject(model: nn.Module, config: DoRAConfig) -> dict[str, DoRALinear]:
    """Freeze the model, replace each target by a DoRALinear, return these by name.

    A target is a whole dotted suffix: "output.dense" matches "0.output.dense" and also
    "0.attention.output.dense", "put.dense" matches neither. Unfreeze the head afterwards. Raises
    DoRAError, before anything is changed, for a target that matches nothing or no nn.Linear.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Linear] = {}
    for target in config.targets:
        matches = {name: m for name, m in modules.items() if f".{name}".endswith(f".{target}")}
        for name, module in matches.items():
            if type(module) is not nn.Linear:
                raise DoRAError(f"target {target!r}: {name} is a {type(module).__name__}, not an "
                                f"nn.Linear with a (d_out, d_in) weight; choose other targets")
            found[name] = module
        if not matches:
            linear = {re.sub(r"^.*\.\d+\.", "", name) for name, module in modules.items()
                      if type(module) is nn.Linear}
            raise DoRAError(f"target {target!r} matches no module; candidates: "
                            f"{', '.join(sorted(linear)) or 'none'}")
    b_T = final_budget(config, len(found))
    model.requires_grad_(False)
    layers = {name: DoRALinear(found[name], config) for name in modules if name in found}
    for name, layer in layers.items():
        layer.name, layer.final_budget = name, b_T
        model.set_submodule(name, layer)
    return layers


def dora_layers(model: nn.Module) -> dict[str, DoRALinear]:
    """The model's DoRALinear layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DoRALinear)}


# ---- importance: Eq. 7 and AdaLoRA's Eq. 8 -----------------------------------------------------


def component_norm(layer: DoRALinear) -> Tensor:
    """||c_i b_i a_i^T||_F = |c_i| ||a_i|| ||b_i||, (r',): the numerator of Eq. 7."""
    return layer.c.abs() * layer.A.norm(dim=1) * layer.B.norm(dim=0)


def norm_score(layer: DoRALinear) -> Tensor:
    """s_i = ||c_i b_i a_i^T||_F / ||sum_j c_j b_j a_j^T||_F, (r',) (Eq. 7).

    No (d_out, d_in) matrix is built: <b_i a_i^T, b_j a_j^T> = (a_i . a_j)(b_i . b_j).
    """
    A, B, c = layer.A, layer.B, layer.c
    squared = ((A @ A.T) * (B.T @ B) * torch.outer(c, c)).sum()
    norm = squared.clamp(min=0).sqrt()  # where components cancel, rounding may go below 0
    return component_norm(layer) / (norm + layer.config.eps)


def sensitivity(layer: DoRALinear) -> Tensor:
    """|c_i dL/dc_i|, (r',): what removing component i does to the loss, to first order.

    That is <dL/dW, Delta W_i>; by Euler's identity a_i . dL/da_i and b_i . dL/db_i are the same
    number. AdaLoRA's Eq. 8 for the whole component. Raises DoRAError without a gradient.
    """
    if layer.c.grad is None:
        raise DoRAError(f"{layer.name or 'layer'}: no gradient; call observe() after backward() "
                        f"and before zero_grad()")
    return (layer.c * layer.c.grad).abs()


def triplet(layer: DoRALinear) -> list[Tensor]:
    """|w dL/dw| of each entry of c (r',), A (r', d_in) and B^T (r', d_out) (AdaLoRA Eq. 8)."""
    s = sensitivity(layer)
    assert layer.A.grad is not None and layer.B.grad is not None  # they share c's backward
    return [s, (layer.A * layer.A.grad).abs(), (layer.B * layer.B.grad).abs().T]


# ---- budget: Eq. 9 -----------------------------------------------------------------------------


def phases(total_steps: int, config: DoRAConfig) -> tuple[int, int]:
    """(t_i, T - t_f): the step after which the budget falls, and that of the last pruning.

    Raises DoRAError where no step is left to prune in.
    """
    if total_steps < 1:
        raise DoRAError(f"total_steps = {total_steps}: a run needs at least one step")
    if config.schedule is None:
        return 0, 0
    first = round(config.initial_phase * total_steps)
    last = total_steps - round(config.final_phase * total_steps)
    if first >= last:
        raise DoRAError(f"initial_phase = {config.initial_phase} and final_phase = "
                        f"{config.final_phase} of {total_steps} steps leave no step to prune in; "
                        f"shorten a phase or lengthen the run")
    return first, last


def final_budget(config: DoRAConfig, n_layers: int) -> int:
    """b(T) = r L, in components of the whole model. Raises DoRAError for less than one."""
    b_T = round(config.rank * n_layers)
    if b_T < 1:
        raise DoRAError(f"rank = {config.rank} in {n_layers} matrices is no component; raise rank")
    return b_T


def budget(step: int, total_steps: int, config: DoRAConfig, n_layers: int) -> int:
    """b(t): components kept in the whole model after optimizer step t = 1..T (Eq. 9)."""
    b_0, b_T = config.r_prime * n_layers, final_budget(config, n_layers)
    first, last = phases(total_steps, config)
    if config.schedule is None or step <= first:
        return b_0
    # differs: printed, Eq. 9 divides by t_f - t_i and misses b(T); the authors' code is as here
    p = min((step - first) / (last - first), 1.0)  # progress through the pruning window
    if config.schedule == "dora":
        return b_0 - int((b_0 - b_T) * p**3)  # slow first
    return b_T + int((b_0 - b_T) * (1 - p) ** 3)  # fast first


def keep_mask(scores: Tensor, k: int) -> Tensor:
    """(n,) bool with exactly k True: the k highest scores, the first position winning a tie."""
    # differs: the authors prune `score <= kthvalue`, which drops all ties and at least one gate
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:k]] = True
    return mask


# ---- penalties: Eq. 10 and AdaLoRA's -----------------------------------------------------------


def dem_penalty(layers: Iterable[DoRALinear]) -> Tensor:
    """R = (1/n) sum_i Var(a_i) + Var(b_i) over all n components, scalar (Eq. 10)."""
    # differs: the authors' code divides by 2n; like theirs, the variance is the unbiased one
    vectors: dict[int, list[Tensor]] = {}  # by length, so that few kernels do all the work
    n = 0
    for layer in layers:
        n += len(layer.c)
        for rows in (layer.A, layer.B.T):  # (r', d_in), (r', d_out)
            if rows.shape[1] > 1:  # a single number does not vary
                vectors.setdefault(rows.shape[1], []).append(rows)
    return torch.stack([torch.cat(rows).var(dim=1).sum() for rows in vectors.values()]).sum() / n


def orthogonal_penalty(layers: Iterable[DoRALinear]) -> Tensor:
    """Mean of ||A A^T - I||_F and ||B^T B - I||_F over all layers, scalar (AdaLoRA's code)."""
    norms = []
    for layer in layers:
        eye = torch.eye(len(layer.c), device=layer.c.device, dtype=layer.c.dtype)
        norms += [(layer.A @ layer.A.T - eye).norm(), (layer.B.T @ layer.B - eye).norm()]
    return torch.stack(norms).mean()


# ---- the pruner: Eq. 8 and Algorithm 1 ---------------------------------------------------------


class Pruner:
    """The one object with a memory: step count, moving averages, mask (Algorithm 1).

    In each *optimizer* step, also under gradient accumulation: penalty() goes into the loss,
    observe() follows backward, step() follows optimizer.step().
    """

    def __init__(self, layers: dict[str, DoRALinear], config: DoRAConfig, total_steps: int):
        self.layers, self.config, self.total_steps = dict(layers), config, total_steps
        self.first, self.last = phases(total_steps, config)
        self.t = 0  # optimizer steps done
        self.live = config.r_prime * len(layers)  # components that the last pruning kept
        self.mask = torch.ones(self.live, dtype=torch.bool)  # (n,), whole also after compact_
        self.I_bar: list[Tensor] = []  # Ī: one tensor (n,), or three a layer for "triplet"
        self.U_bar: list[Tensor] = []  # Ū: likewise
        self.observed = False

    @property
    def done(self) -> bool:
        """True once the final mask is fixed."""
        return self.t >= self.last

    def penalty(self) -> Tensor:
        """eta * R, scalar; 0 once pruning has ended."""
        # differs: AdaLoRA keeps its penalty until the end of training
        if self.config.penalty is None or self.done:
            return torch.zeros(())
        R = dem_penalty if self.config.penalty == "dem" else orthogonal_penalty
        return self.config.eta * R(self.layers.values())

    @torch.no_grad()
    def observe(self) -> None:
        """Take up the importance of this step's weights with this step's gradients."""
        self.observed = True
        if self.config.importance == "sensitivity" and not self.done:
            self._smooth([torch.cat([sensitivity(layer) for layer in self.layers.values()])])
        elif self.config.importance == "triplet" and not self.done:
            self._smooth([I for layer in self.layers.values() for I in triplet(layer)])

    @torch.no_grad()
    def step(self) -> None:
        """Prune to b(t) when it is time; after the last pruning, hold the mask.

        Raises DoRAError without observe(), NotFiniteError for a score that is not finite.
        """
        if not self.observed:
            raise DoRAError(f"step {self.t + 1}: pruner.step() without pruner.observe(); "
                            f"call observe() after backward() in every step")
        self.observed = False
        self.t += 1
        for layer in self.layers.values():
            layer.progress = (self.t, self.last, self.total_steps)
        if self.t > self.last:  # AdamW's momentum would revive a closed gate
            for layer in self.layers.values():
                layer.c.mul_(layer.mask)
            return
        if self.config.importance in ("norm", "frobenius"):  # of the updated weights
            score = norm_score if self.config.importance == "norm" else component_norm
            self._smooth([torch.cat([score(layer) for layer in self.layers.values()])])
        due = self.t > self.first and (self.t - self.first) % self.config.interval == 0
        if due or self.t == self.last:
            self._prune(budget(self.t, self.total_steps, self.config, len(self.layers)))

    def _smooth(self, importance: list[Tensor]) -> None:
        """Ī <- β1 Ī + (1 - β1) I,  Ū <- β2 Ū + (1 - β2) |I - Ī|  (Eq. 8; AdaLoRA Eq. 9-10)."""
        if not self.I_bar:
            self.I_bar = [torch.zeros_like(I) for I in importance]
            self.U_bar = [torch.zeros_like(I) for I in importance]
        for I, I_bar, U_bar in zip(importance, self.I_bar, self.U_bar, strict=True):
            I_bar.lerp_(I, 1 - self.config.beta1)
            if self.config.beta2 is not None:
                U_bar.lerp_((I - I_bar).abs(), 1 - self.config.beta2)

    def scores(self) -> Tensor:
        """The score of every component, (n,): Ī Ū, or Ī where beta2 is None."""
        s = self.I_bar
        if self.config.beta2 is not None:
            s = [I * U for I, U in zip(self.I_bar, self.U_bar, strict=True)]
        if self.config.importance == "triplet":  # s(c) + mean s(A) + mean s(B)
            s = [c + A.mean(1) + B.mean(1) for c, A, B in zip(s[::3], s[1::3], s[2::3])]
        return torch.cat(s)

    def _prune(self, k: int) -> None:
        """Close all gates but the k best of the whole model; one closed earlier may come back."""
        scores = self.scores()
        if not scores.isfinite().all():  # the one place in which a step waits for the device
            i = int(scores.isfinite().int().argmin()) // self.config.r_prime
            raise NotFiniteError(f"step {self.t}: a score of {list(self.layers)[i]} is not finite; "
                                 f"lower the learning rate")
        self.mask, self.live = keep_mask(scores, k), k
        for layer, mask in zip(self.layers.values(), self.mask.split(self.config.r_prime)):
            layer.mask.copy_(mask)
            layer.c.mul_(layer.mask)

    def ranks(self) -> dict[str, int]:
        """Live components of each matrix, by name."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's state."""
        return {k: getattr(self, k) for k in ("t", "live", "mask", "I_bar", "U_bar")}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with the layers of a fresh inject(), before any compact_().

        Raises DoRAError for a state of another size.
        """
        if state["mask"].shape != self.mask.shape:
            raise DoRAError(f"the state has {len(state['mask'])} components, the model "
                            f"{len(self.mask)}; use the same rank, start_rank and targets")
        self.t, self.live, self.mask = state["t"], state["live"], state["mask"]
        device = next((layer.c.device for layer in self.layers.values()), self.mask.device)
        self.I_bar, self.U_bar = ([v.to(device, copy=True) for v in state[k]]
                                  for k in ("I_bar", "U_bar"))
        for layer, mask in zip(self.layers.values(), self.mask.split(self.config.r_prime)):
            layer.progress = (self.t, self.last, self.total_steps)
            layer.mask.copy_(mask)
            if self.done:  # until then a closed gate may have moved, and goes on from there
                layer.c.mul_(layer.mask)


def rank_map(ranks: dict[str, int]) -> str:
    """A table of live components, layer by matrix."""
    rows: dict[str, Counter[str]] = {}
    for name, rank in ranks.items():
        match = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", name)
        layer, matrix = match.groups() if match else ("-", name)
        rows.setdefault(layer, Counter())[matrix.removeprefix("attention.self.")] += rank
    columns = list(dict.fromkeys(matrix for row in rows.values() for matrix in row))
    rows["total"] = Counter({c: sum(row[c] for row in rows.values()) for c in columns})
    lines = ["layer  " + "  ".join(f"{c:>3}" for c in (*columns, "total"))]
    for layer, row in rows.items():
        cells = [f"{row.get(c, '.'):>{max(3, len(c))}}" for c in columns]
        lines.append(f"{layer:>5}  " + "  ".join([*cells, f"{sum(row.values()):>5}"]))
    return "\n".join(lines)


# ---- after the last pruning --------------------------------------------------------------------


def _check_budget(layers: dict[str, DoRALinear]) -> None:
    """Raise unless the last pruning is done and its mask is held, and say what is missing."""
    live = sum(layer.rank for layer in layers.values())
    for name, layer in layers.items():
        short = f"{live} components are live, the budget is {layer.final_budget}"
        t, last, total = layer.progress
        if t < last:
            raise DoRAError(f"{short}: training stopped at step {t} of {total}, before the last "
                            f"pruning at step {last}")
        if live > layer.final_budget:
            raise DoRAError(f"{short}: pruner.step() was never called; call observe() and step() "
                            f"in every step")
        if layer.c[~layer.mask].any():
            raise DoRAError(f"{name}: a pruned gate is not 0; call pruner.step() after every "
                            f"optimizer.step()")


@torch.no_grad()
def compact_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Drop dead components from the layers and the optimizer's state; outputs stay the same.

    A matrix without components is its plain nn.Linear again. The parameters are new objects, so
    wrap the model in DistributedDataParallel anew.
    """
    layers = dora_layers(model)
    _check_budget(layers)
    for name, layer in layers.items():
        live = layer.mask.nonzero()[:, 0]  # (rank,)
        for symbol, dim in (("A", 0), ("B", 1), ("c", 0)):
            old = getattr(layer, symbol)
            new = nn.Parameter(old.index_select(dim, live), requires_grad=old.requires_grad)
            setattr(layer, symbol, new)
            if optimizer is not None:
                _swap(optimizer, old, new, dim, live)
        layer.mask = layer.mask[live]
        if not len(live):
            model.set_submodule(name, layer.base)
    return model


def _swap(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, dim: int,
          live: Tensor) -> None:
    """In the optimizer, put new, the live part of old, in its place, with that of its moments."""
    for group in optimizer.param_groups:
        params = [new if p is old else p for p in group["params"]]
        group["params"] = [p for p in params if p is not new or len(live)]
    state = optimizer.state.pop(old, None)
    if state and len(live):
        moments = {k: v for k, v in state.items() if getattr(v, "shape", None) == old.shape}
        moments = {k: v.index_select(dim, live) for k, v in moments.items()}
        optimizer.state[new] = {**state, **moments}


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Fold every update into its nn.Linear, W = W0 + Delta W; nothing of DoRA is left."""
    for name, layer in dora_layers(model).items():
        W = layer.base.weight + layer.delta_weight()
        layer.base.weight = nn.Parameter(W.to(layer.base.weight.dtype), requires_grad=False)
        model.set_submodule(name, layer.base)
    return model


# ---- safetensors -------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of any shape by name, memory-mapped: read when used; changes never reach the file.

    Layout: 8 bytes little-endian header length n, JSON {name: {dtype, shape, data_offsets}} of n
    bytes, then the data. All numbers are checked; DoRAError names the file and what is wrong.
    """
    return _read_safetensors(path)[0]


def _read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata): the header may hold {"__metadata__": {name: text}}, too."""

    def bad(problem: str) -> DoRAError:
        return DoRAError(f"{path}: not a safetensors file ({problem:.200}); get or save it anew")

    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        n = int.from_bytes(f.read(8), "little")
        if n > min(size - 8, 100_000_000):
            raise bad(f"a header of {n} bytes in a file of {size}")
        try:
            header = json.loads(f.read(n), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise bad(f"header: {error}") from None
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise bad("its header or metadata is no JSON object")
    begin, room = 8 + n, size - 8 - n  # of the data, in bytes
    tensors: dict[str, Tensor] = {}
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"{name!r:.80} is not dtype, shape and data_offsets")
        shape, span = entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(str(entry["dtype"]))
        whole = all(isinstance(v, list) and len(v) < 64 and
                    all(type(i) is int and 0 <= i < 2**48 for i in v) for v in (shape, span))
        if dtype is None or not whole or len(span) != 2:
            raise bad(f"{name!r:.80} has type {entry['dtype']!r:.40}, shape {shape!r:.80}")
        count = math.prod(shape)
        if span[1] - span[0] != count * dtype.itemsize or span[1] > room:
            raise bad(f"{name!r:.80}: {entry['dtype']} {shape} at {span} of {room} bytes")
        flat = torch.empty(0, dtype=dtype) if count == 0 else torch.frombuffer(
            data, dtype=dtype, count=count, offset=begin + span[0])
        tensors[name] = flat.view(shape)
        spans.append(span)
    spans.sort()  # without a hole or an overlap each begins where the one before ends
    if [start for start, _ in spans] + [room] != [0] + [stop for _, stop in spans]:
        raise bad("some bytes of its data belong to two tensors or to none")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors of any shape as a file, whole or not at all; OSError if that fails."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end, chunks = 0, []
    for name in sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)):  # aligned starts
        tensor = tensors[name].detach().cpu().contiguous()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
        chunks.append(tensor.flatten().view(torch.uint8).numpy())
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, [len(text).to_bytes(8, "little"), text, *chunks])


def write_whole(path: str | Path, chunks: Iterable[Any]) -> None:
    """Write bytes so that path has its old content or all of the new: temporary, flush, rename."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb") as f:
            f.writelines(chunks)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- adapters, in PEFT's LoRA format -----------------------------------------------------------

PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the live components and the head as adapter_model.safetensors and adapter_config.json.

    Hugging Face PEFT's LoRA format: s and c are folded into B, so that alpha / r is 1 in every
    matrix. Matrices without components are left out, since PEFT has no rank 0. Raises DoRAError
    before the last pruning and after merge_().
    """
    layers = dora_layers(model)
    if not layers:
        raise DoRAError("the model has no DoRALinear; save the adapter before merge_()")
    _check_budget(layers)
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank}
    tensors = {}
    for name in ranks:
        layer = layers[name]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A[layer.mask]  # (rank, d_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (layer.scale * layer.c * layer.B)[:, layer.mask]
    heads = _trained_modules(model)  # an adapter without its head is noise
    for head in heads:
        tensors.update(model.get_submodule(head).state_dict(prefix=f"{PREFIX}{head}."))
    r = max(ranks.values())
    others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
              "r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others,
              "target_modules": "|".join(re.escape(name) for name in ranks),  # whole names
              "modules_to_save": heads or None, "lora_dropout": layers[name].config.dropout,
              "bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
              "init_lora_weights": True, "inference_mode": True}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = fingerprint(layers[name].base.weight for name in sorted(ranks))
    write_safetensors(folder / "adapter_model.safetensors", tensors, base=base)
    write_whole(folder / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])


def fingerprint(weights: Iterable[Tensor]) -> str:
    """8 hex digits that tell models apart, in any dtype: the signs of each one's first 256 numbers.

    Weights of any shape; rounding to another dtype keeps the sign bit.
    """
    crc = 0
    for weight in weights:
        crc = zlib.crc32(weight.detach().flatten()[:256].signbit().cpu().numpy().tobytes(), crc)
    return f"{crc:08x}"


def _trained_modules(model: nn.Module) -> list[str]:
    """The outermost modules all of whose parameters train: the head."""
    found: list[str] = []
    for name, module in model.named_modules():
        params = list(module.parameters())
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and params and not inside and all(p.requires_grad for p in params):
            found.append(name)
    return found


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, DoRALinear]:
    """Put a LoRA adapter, ours or PEFT's, on a plain model; return its layers by name.

    All is checked before the model is touched. Raises DoRAError for another base model, another
    head, and the kinds of LoRA that Eq. 6 does not cover.
    """
    path, file = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=_unique)
        alphas = {re.compile(rf"(.*\.)?({key})$"): value  # PEFT's rule for a pattern
                  for key, value in (config.get("alpha_pattern") or {}).items()}
    except (ValueError, RecursionError, OverflowError, AttributeError, re.error):
        raise DoRAError(f"{path}: not an adapter's JSON; save the adapter anew") from None
    plain: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "use_dora": (False,), "use_rslora": (False,), "bias": ("none",),
        "fan_in_fan_out": (False,), "alora_invocation_tokens": (None,),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva")}  # W0 unchanged
    for key, allowed in plain.items():
        if config.get(key, allowed[0]) not in allowed:
            raise DoRAError(f"{path}: {key} is {config[key]!r:.40}; only plain LoRA can be loaded "
                            f"({key} = {allowed[0]!r})")
    dropout = config.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DoRAError(f"{path}: lora_dropout is {dropout!r:.40}, not a number in [0, 1)")
    saved, metadata = _read_safetensors(file)
    if foreign := [key for key in saved if not key.startswith(PREFIX)]:
        raise DoRAError(f"{file}: {foreign[0]!r:.120} is no name of PEFT's, which begin with "
                        f"{PREFIX}; save the adapter anew")
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in saved.items()}
    modules, weights = dict(model.named_modules()), model.state_dict(keep_vars=True)
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name in sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key}):
        A, B = (tensors.pop(f"{name}.lora_{m}.weight", torch.empty(0)) for m in "AB")
        base = modules.get(name)
        shape = tuple(base.weight.shape) if type(base) is nn.Linear else None
        if not A.numel() or shape != (*B.shape[:1], *A.shape[1:]) or B.shape[1:] != A.shape[:1]:
            raise DoRAError(f"{folder}: {name!r:.120} has lora_B {tuple(B.shape)} and lora_A "
                            f"{tuple(A.shape)}, the model's matrix is {shape}; is the adapter for "
                            f"another base model?")
        alpha = next((value for pattern, value in alphas.items() if pattern.match(name)),
                     config.get("lora_alpha"))
        if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
            raise DoRAError(f"{path}: lora_alpha of {name} is {alpha!r:.40}, not a number above 0")
        found[name] = A, B, alpha
    for key, tensor in tensors.items():  # what is left is the head
        shape = tuple(weights[key].shape) if key in weights else None
        if tensor.shape != shape:
            raise DoRAError(f"{folder}: {key!r:.120} is {tuple(tensor.shape)}, in the model "
                            f"{shape}; is the adapter for another task or base model?")
    if not found:
        raise DoRAError(f"{file}: no lora_A and lora_B in it; save the adapter anew")
    base_mark = fingerprint(modules[name].weight for name in found)  # type: ignore[misc]
    if metadata.get("base", base_mark) != base_mark:
        raise DoRAError(f"{file}: was trained on other weights of the same shapes; use it with the "
                        f"base model that it was trained on")
    model.requires_grad_(False)
    layers: dict[str, DoRALinear] = {}
    for name, (A, B, alpha) in found.items():
        settings = DoRAConfig(**METHODS["lora"], rank=len(A), alpha=alpha, dropout=dropout)
        layer = layers[name] = DoRALinear(modules[name], settings)  # type: ignore[arg-type]
        layer.name = name
        layer.A.copy_(A)
        layer.B.copy_(B)
        model.set_submodule(name, layer)
    for key, tensor in tensors.items():
        weights[key].copy_(tensor)
        weights[key].requires_grad_(isinstance(weights[key], nn.Parameter))
    return layers
