"""DoRA, Dynamic Low-Rank Adaptation (Mao et al., ACL 2024, arXiv 2405.17357), in plain PyTorch.

LoRA adds one low-rank update to a frozen matrix. DoRA writes that update as a sum of rank-1
*components*, each behind a gate, scores every component of the whole model while it trains, and
closes the gates of the least important ones until a budget is met. Capacity moves to the matrices
that need it. (Not NVIDIA's DoRA, which decomposes weights into magnitude and direction.)

    symbol   in code                 shape           meaning
    W0       base.weight             (d_out, d_in)   frozen pretrained matrix
    a_i      A[i]                    (d_in,)         row of A (r', d_in)
    b_i      B[:, i]                 (d_out,)        column of B (d_out, r')
    c_i      c[i]                    scalar          gate; 0 = pruned
    r', r    config.r_prime, .rank                   mean components per matrix, before / after pruning
    L        len(layers)                             adapted matrices
    b(t)     budget                  int             components kept in the whole model after step t
    T        total_steps             steps           t_i, t_f: length of the initial and final phase
    s, Ī, Ū  I, I_bar, U_bar         (r',)           importance, its moving average, its uncertainty
    R, η     penalty, eta            scalar          regulariser and its weight

The method is three lines of a training step, in this order:

    layers = inject(model, config);  pruner = Pruner(layers, config, total_steps)
    loss = task_loss + pruner.penalty()
    loss.backward()
    pruner.observe()                 # weight and gradient belong together: before clipping and stepping
    optimizer.step()
    pruner.step()

Lines that begin `# differs:` say where this code departs from the paper or its authors' code.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class DoRAError(ValueError):
    """Bad input. The message is one line: the value, what is wrong with it, and the remedy."""


# ------------------------------------------------------------------------------- configuration


def setting(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field that carries its own help text: unit, meaning, source."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class DoRAConfig:
    """Every setting of the method. Methods differ by these values alone (see METHODS)."""

    rank: float = setting(2.0, "r: mean components per matrix after pruning; may be a fraction")
    start_rank: int | None = setting(None, "r': components per matrix at the start; none = ceil(1.5 r) (paper)")
    alpha: float = setting(8.0, "scale of the update is alpha / rank or alpha / start_rank (paper: 8)")
    dropout: float = setting(0.1, "dropout probability on the low-rank path (paper: 0.1)")
    targets: tuple[str, ...] = setting(
        ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
        "dotted suffixes of the names of the matrices to adapt")
    init: str = setting("zero_b", "start: B = 0 and c = 1, or kaiming / Gaussian A and B with c = 0",
                        ("zero_b", "kaiming", "gaussian"))
    gate: bool = setting(True, "train the gates c; false holds them at 1")
    scale: str = setting("rank", "what alpha is divided by, for ever (Eq. 6)", ("rank", "start_rank"))
    importance: str | None = setting("sensitivity", "score of a component; none = never prune",
                                     ("sensitivity", "triplet", "norm", "frobenius", None))
    beta1: float = setting(0.85, "smoothing of the importance (Eq. 8; AdaLoRA Eq. 9)")
    beta2: float | None = setting(0.85, "smoothing of its uncertainty (AdaLoRA Eq. 10); none = score without it")
    eps: float = setting(1e-8, "added to the norm that Eq. 7 divides by")
    schedule: str | None = setting("adalora", "budget curve: dora = slow first (Eq. 9), adalora = fast first",
                                   ("dora", "adalora", None))
    initial_phase: float = setting(0.15, "share of all steps before the first pruning (paper: 0.15)")
    final_phase: float = setting(0.5, "share of all steps with the final mask (paper: 0.5)")
    interval: int = setting(10, "optimizer steps between two prunings (paper: 10 or 50)")
    penalty: str | None = setting("dem", "regulariser while pruning goes on", ("dem", "orthogonal", None))
    eta: float = setting(0.3, "weight of the regulariser (Eq. 10; paper: 0.3 or 0.5)")
    dropout_on: str = setting("components", "dropout on the input x or on the r' numbers a_i . x",
                              ("input", "components"))

    @property
    def r_prime(self) -> int:
        """r': components per matrix at the start."""
        if self.start_rank is not None:
            return self.start_rank
        return math.ceil(self.rank if self.schedule is None else 1.5 * self.rank)

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise DoRAError(f"{name} = {getattr(self, name)}: {remedy}")

        for name, spec in self.__dataclass_fields__.items():
            choices = spec.metadata["choices"]
            check(not choices or getattr(self, name) in choices, name, f"choose one of {choices}")
        check(0 < self.rank < math.inf, "rank", "must be above 0")
        check(self.r_prime >= self.rank, "start_rank", f"is below rank = {self.rank}; pruning only removes")
        check(self.schedule is not None or self.r_prime == self.rank, "schedule",
              f"without pruning start_rank ({self.r_prime}) and rank ({self.rank}) must be equal")
        check((self.schedule is None) == (self.importance is None), "importance",
              f"and schedule = {self.schedule} must both be set (prune) or both be none (never prune)")
        check(self.gate or self.schedule is None, "gate", "pruning closes gates, so it needs gate = True")
        check(0 < self.alpha < math.inf, "alpha", "must be above 0")
        check(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        check(len(self.targets) > 0, "targets", "name at least one matrix to adapt")
        check(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        check(self.beta2 is None or 0 <= self.beta2 < 1, "beta2", "must be none or in [0, 1)")
        check(self.eps > 0, "eps", "must be above 0")
        check(0 <= self.initial_phase < 1, "initial_phase", "must be in [0, 1)")
        check(0 <= self.final_phase < 1, "final_phase", "must be in [0, 1)")
        check(self.interval >= 1, "interval", "must be at least 1 step")
        check(0 <= self.eta < math.inf, "eta", "must be at least 0")


METHODS: dict[str, dict[str, Any]] = {
    "dora": {},  # the defaults above; benchmarks/RESULTS.md has the evidence for each
    "paper": dict(init="kaiming", scale="start_rank", importance="norm", beta1=0.9, beta2=None,
                  schedule="dora", dropout_on="input"),
    "lora": dict(gate=False, importance=None, schedule=None, penalty=None, dropout_on="input"),
    "adalora": dict(init="gaussian", scale="start_rank", importance="triplet", schedule="adalora",
                    penalty="orthogonal", eta=0.5, dropout_on="input"),
}


# -------------------------------------------------------------------------------- the layer (6)


class DoRALinear(nn.Module):
    """A frozen nn.Linear plus r' gated rank-1 components (Eq. 6).

    W = W0 + s * sum_i c_i b_i a_i^T,  s = alpha / r  or  alpha / r'
    """

    def __init__(self, base: nn.Linear, config: DoRAConfig):
        super().__init__()
        d_out, d_in = base.weight.shape
        r = config.r_prime
        self.base, self.config = base.requires_grad_(False), config
        self.scale = config.alpha / (config.rank if config.scale == "rank" else r)
        self.dropout = nn.Dropout(config.dropout)
        # float32 also over a half-precision base: small updates would be rounded away
        like: dict[str, Any] = dict(device=base.weight.device,
                                    dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.A = nn.Parameter(torch.zeros(r, d_in, **like))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        self.c = nn.Parameter(torch.zeros(r, **like), requires_grad=config.gate)
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(r, dtype=torch.bool, device=base.weight.device))
        self.name = ""  # dotted name in the model, for messages
        self.final_budget = r  # components left in the whole model at the end
        self.progress: tuple[int, int, int] | None = None  # the Pruner's (t, last prune, T)
        self.reset()

    def reset(self) -> None:
        """Start A, B and c so that the update is exactly 0: either B = 0 or c = 0."""
        if self.config.init == "zero_b":  # LoRA's start: B = 0, gates open
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
            nn.init.zeros_(self.B)
            nn.init.ones_(self.c)
            return
        if self.config.init == "kaiming":  # the paper's: bounds sqrt(6 / d_in) and sqrt(6 / r')
            nn.init.kaiming_uniform_(self.A)
            nn.init.kaiming_uniform_(self.B)
        else:  # "gaussian", AdaLoRA's
            nn.init.normal_(self.A, std=0.02)
            nn.init.normal_(self.B, std=0.02)
        nn.init.zeros_(self.c)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A.to(x.dtype), (self.scale * self.c * self.B).to(x.dtype)
        if self.config.dropout_on == "input":
            h = self.dropout(x) @ A.T  # (..., r')   a_i . x
        else:
            h = self.dropout(x @ A.T)  # (..., r')
        return self.base(x) + h @ B.T  # (..., d_out)

    def delta_weight(self) -> Tensor:
        """The update s * sum_i c_i b_i a_i^T, (d_out, d_in) (Eq. 6)."""
        return (self.scale * self.c * self.B) @ self.A

    @property
    def rank(self) -> int:
        """Live components: those that the last pruning kept."""
        return int(self.mask.sum())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def inject(model: nn.Module, config: DoRAConfig) -> dict[str, DoRALinear]:
    """Freeze the model, replace every target by a DoRALinear and return these by name.

    A target is a whole dotted suffix of a module's name: "output.dense" matches "layer.0.output.dense",
    "dense" matches that too, "put.dense" does not. Unfreeze the head afterwards.
    Raises DoRAError if a target matches nothing or something that is not an nn.Linear.
    """
    modules = dict(model.named_modules())
    found: dict[str, DoRALinear] = {}
    for target in config.targets:
        names = [n for n in modules if n == target or n.endswith("." + target)]
        if not names:
            linear = sorted({re.sub(r"^.*\.\d+\.", "", n) for n, m in modules.items() if type(m) is nn.Linear})
            raise DoRAError(f"target {target!r} matches no module; candidates: {', '.join(linear) or 'none'}")
        for name in names:
            if type(modules[name]) is not nn.Linear:
                raise DoRAError(
                    f"target {target!r}: {name} is a {type(modules[name]).__name__}, not an nn.Linear, so it has "
                    f"no (d_out, d_in) weight to add b_i a_i^T to; choose other targets or replace it first")
    model.requires_grad_(False)
    for name, module in modules.items():  # in the model's order, whatever the order of the targets
        if any(name == t or name.endswith("." + t) for t in config.targets):
            found[name] = DoRALinear(module, config)  # type: ignore[arg-type]  # checked above
            found[name].name = name
            _replace(model, name, found[name])
    for layer in found.values():
        layer.final_budget = final_budget(config, len(found))
    return found


def dora_layers(model: nn.Module) -> dict[str, DoRALinear]:
    """The model's DoRALinear layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DoRALinear)}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ------------------------------------------------------------------- importance (7), (8), AdaLoRA


def component_norm(layer: DoRALinear) -> Tensor:
    """||c_i b_i a_i^T||_F = |c_i| ||a_i|| ||b_i||, (r',): the numerator of Eq. 7."""
    return layer.c.abs() * layer.A.norm(dim=1) * layer.B.norm(dim=0)


def norm_score(layer: DoRALinear) -> Tensor:
    """s_i = ||c_i b_i a_i^T||_F / ||sum_j c_j b_j a_j^T||_F, (r',) (Eq. 7), without a (d_out, d_in) matrix."""
    A, B, c = layer.A, layer.B, layer.c
    # <b_i a_i^T, b_j a_j^T> = (a_i . a_j)(b_i . b_j); where components cancel, rounding may go below 0
    total = ((A @ A.T) * (B.T @ B) * torch.outer(c, c)).sum().clamp(min=0).sqrt()
    return component_norm(layer) / (total + layer.config.eps)


def sensitivity(layer: DoRALinear) -> Tensor:
    """|c_i dL/dc_i|, (r',): to first order, what removing component i does to the loss.

    Removing it changes W by -Delta W_i, so L by -<dL/dW, Delta W_i> = -c_i dL/dc_i. By Euler's identity
    a_i . dL/da_i and b_i . dL/db_i are the same number. (AdaLoRA Eq. 8 for the group.)
    """
    if layer.c.grad is None:
        raise DoRAError(f"{layer.name or 'layer'}: c has no gradient; call observe() after backward(), "
                        f"before zero_grad()")
    return (layer.c * layer.c.grad).abs()


def _triplet(layer: DoRALinear) -> list[Tensor]:
    """|w dL/dw| of c (r',), A (r', d_in) and B^T (r', d_out), entry by entry (AdaLoRA Eq. 8)."""
    if layer.A.grad is None or layer.B.grad is None:
        sensitivity(layer)
        raise DoRAError(f"{layer.name}: A or B has no gradient; call observe() after backward()")
    return [sensitivity(layer), (layer.A * layer.A.grad).abs(), (layer.B * layer.B.grad).abs().T]


# ------------------------------------------------------------------------- budget (9) and pruning


def phases(total_steps: int, config: DoRAConfig) -> tuple[int, int]:
    """(t_i, T - t_f): the step at which the budget starts to fall and that of the last pruning."""
    if total_steps < 1:
        raise DoRAError(f"total_steps = {total_steps}: a run needs at least one step")
    if config.schedule is None:
        return 0, 0
    first = round(config.initial_phase * total_steps)
    last = total_steps - round(config.final_phase * total_steps)
    if first >= last:
        raise DoRAError(f"initial_phase {config.initial_phase} and final_phase {config.final_phase} of {total_steps} "
                        f"steps leave no step to prune in; make a phase shorter or the run longer")
    return first, last


def final_budget(config: DoRAConfig, n_layers: int) -> int:
    """b(T) = r L components."""
    b_T = round(config.rank * n_layers)
    if b_T < 1:
        raise DoRAError(f"rank = {config.rank} over {n_layers} matrices rounds to no component; raise it")
    return b_T


def budget(step: int, total_steps: int, config: DoRAConfig, n_layers: int) -> int:
    """b(t): components kept in the whole model after optimizer step t = 1..T (Eq. 9).

    # differs: as printed, Eq. 9 divides by t_f - t_i and ends elsewhere; this is what the authors' code computes
    """
    b_0, b_T = config.r_prime * n_layers, final_budget(config, n_layers)
    first, last = phases(total_steps, config)
    if config.schedule is None or step <= first:
        return b_0
    p = min((step - first) / (last - first), 1.0)  # progress through the pruning window
    if config.schedule == "dora":
        return b_0 - int((b_0 - b_T) * p**3)  # slow first
    return b_T + int((b_0 - b_T) * (1 - p) ** 3)  # fast first (AdaLoRA Eq. 12)


def keep_mask(scores: Tensor, k: int) -> Tensor:
    """Bool mask like scores (n,) with exactly k True: the k highest, the first position winning a tie.

    # differs: the authors' `score <= kthvalue` also drops every tie, and one component where none is due
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:k]] = True
    return mask


# --------------------------------------------------------------------------------- penalties (10)


def dem_penalty(layers: Iterable[DoRALinear]) -> Tensor:
    """R = (1/n) sum_i Var(a_i) + Var(b_i), scalar, n = all components (Eq. 10, dimensional equilibrium).

    # differs: the authors' code divides by 2n; like it, the variance is the unbiased one
    """
    groups: dict[int, list[Tensor]] = {}  # rows of one length go together: two or three kernels, not 2 L
    n = 0
    for layer in layers:
        n += len(layer.c)
        for rows in (layer.A, layer.B.T):
            groups.setdefault(rows.shape[1], []).append(rows)
    return torch.stack([torch.cat(g).var(dim=1).sum() for g in groups.values()]).sum() / n


def orthogonal_penalty(layers: Iterable[DoRALinear]) -> Tensor:
    """Mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F, scalar (AdaLoRA, as its code has it)."""
    norms = []
    for layer in layers:
        eye = torch.eye(len(layer.c), device=layer.c.device, dtype=layer.c.dtype)
        norms += [(layer.A @ layer.A.T - eye).norm(), (layer.B.T @ layer.B - eye).norm()]
    return torch.stack(norms).mean()


# -------------------------------------------------------------------------------------- the pruner


class Pruner:
    """The only object with a memory: step count, moving averages, masks. Algorithm 1 of the paper.

    Call once per *optimizer* step, also under gradient accumulation:
    penalty() into the loss, observe() after backward, step() after optimizer.step().
    """

    def __init__(self, layers: dict[str, DoRALinear], config: DoRAConfig, total_steps: int):
        if not layers:
            raise DoRAError("no layers to prune; pass what inject() returned")
        self.layers, self.config, self.total_steps = dict(layers), config, total_steps
        self.first, self.last = phases(total_steps, config)
        self.t = 0  # optimizer steps done
        self.live = config.r_prime * len(layers)  # components kept by the last pruning
        self.I_bar: list[Tensor] = []  # Ī: one tensor (n,), or three a layer for "triplet"
        self.U_bar: list[Tensor] = []  # Ū: likewise
        self.mask = torch.cat([layer.mask for layer in layers.values()])  # (n,), before any compaction
        self._observed = False

    @property
    def done(self) -> bool:
        """True once the final mask is fixed."""
        return self.t >= self.last

    def penalty(self) -> Tensor:
        """eta * R, scalar; 0 once pruning has ended."""
        layers = list(self.layers.values())
        # differs: AdaLoRA keeps its penalty to the end of training
        if self.config.penalty is None or self.done:
            return torch.zeros((), device=layers[0].c.device)
        R = dem_penalty if self.config.penalty == "dem" else orthogonal_penalty
        return self.config.eta * R(layers)

    @torch.no_grad()
    def observe(self) -> None:
        """Score the components from this step's weights and gradients. After backward, before clipping."""
        self._observed = True
        if self.done:
            return
        if self.config.importance == "sensitivity":
            self._smooth([torch.cat([sensitivity(layer) for layer in self.layers.values()])])
        elif self.config.importance == "triplet":
            self._smooth([I for layer in self.layers.values() for I in _triplet(layer)])

    @torch.no_grad()
    def step(self) -> None:
        """After optimizer.step(): prune to b(t) if it is time, hold the final mask ever after."""
        if not self._observed:
            raise DoRAError(f"step {self.t + 1}: pruner.step() without observe(); "
                            f"call observe() after backward(), then optimizer.step(), then step()")
        self._observed = False
        self.t += 1
        for layer in self.layers.values():
            layer.progress = (self.t, self.last, self.total_steps)
        if self.t > self.last:  # AdamW's momentum revives a zeroed gate: hold it
            for layer in self.layers.values():
                layer.c.mul_(layer.mask)
            return
        if self.config.importance in ("norm", "frobenius"):  # a score of the updated weights
            score = norm_score if self.config.importance == "norm" else component_norm
            self._smooth([torch.cat([score(layer) for layer in self.layers.values()])])
        due = self.t > self.first and (self.t - self.first) % self.config.interval == 0
        if due or self.t == self.last:
            self._prune(budget(self.t, self.total_steps, self.config, len(self.layers)))

    def _smooth(self, importance: list[Tensor]) -> None:
        """Ī <- β1 Ī + (1 - β1) I;  Ū <- β2 Ū + (1 - β2) |I - Ī| (Eq. 8; AdaLoRA Eq. 9 and 10)."""
        if not self.I_bar:
            self.I_bar = [torch.zeros_like(I) for I in importance]
            self.U_bar = [torch.zeros_like(I) for I in importance]
        for I, I_bar, U_bar in zip(importance, self.I_bar, self.U_bar, strict=True):
            I_bar.lerp_(I, 1 - self.config.beta1)
            if self.config.beta2 is not None:
                U_bar.lerp_((I - I_bar).abs(), 1 - self.config.beta2)

    def scores(self) -> Tensor:
        """The score of every component, (n,): Ī·Ū, or Ī where beta2 is None."""
        s = [I if self.config.beta2 is None else I * U for I, U in zip(self.I_bar, self.U_bar, strict=True)]
        if self.config.importance == "triplet":  # s(c) + mean s(A) + mean s(B)
            s = [c + A.mean(1) + B.mean(1) for c, A, B in zip(s[::3], s[1::3], s[2::3], strict=True)]
        return torch.cat(s)

    def _prune(self, k: int) -> None:
        """Close all gates but the k best of the whole model. A gate closed earlier may be among these."""
        scores, sizes = self.scores(), [len(layer.c) for layer in self.layers.values()]
        for name, s in zip(self.layers, scores.split(sizes), strict=True):
            if not s.isfinite().all():
                raise DoRAError(f"step {self.t}: the score of {name} is not finite; lower the learning rate")
        self.mask, self.live = keep_mask(scores, k), k
        for layer, mask in zip(self.layers.values(), self.mask.split(sizes), strict=True):
            layer.mask.copy_(mask)
            layer.c.mul_(mask)

    def ranks(self) -> dict[str, int]:
        """Live components of each matrix, by name."""
        sizes = [self.config.r_prime] * len(self.layers)
        return {n: int(m.sum()) for n, m in zip(self.layers, self.mask.split(sizes), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's state."""
        return {"t": self.t, "live": self.live, "mask": self.mask, "I_bar": self.I_bar, "U_bar": self.U_bar}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state up into layers that inject() has just made (before any compact_)."""
        if len(state["mask"]) != len(self.mask):
            raise DoRAError(f"the state has {len(state['mask'])} components, this model {len(self.mask)}; "
                            f"use the same rank, start_rank and targets")
        self.t, self.live, self.mask = state["t"], state["live"], state["mask"].to(self.mask.device)
        self.I_bar, self.U_bar = state["I_bar"], state["U_bar"]
        for layer, mask in zip(self.layers.values(), self.mask.split(self.config.r_prime), strict=True):
            layer.mask.copy_(mask)
            layer.progress = (self.t, self.last, self.total_steps)


def rank_map(ranks: dict[str, int]) -> str:
    """A table, layer by matrix, of the live components."""
    rows: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        parts = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", name)
        layer, matrix = (parts[1], parts[2]) if parts else ("-", name)
        rows.setdefault(layer, {})[matrix.removeprefix("attention.self.")] = rank
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    widths = [max(len(column), 3) for column in columns]
    lines = ["layer  " + "  ".join(f"{c:>{w}}" for c, w in zip(columns, widths)) + "  total"]
    for layer, row in rows.items():
        cells = "  ".join(f"{row.get(c, '.'):>{w}}" for c, w in zip(columns, widths))
        lines.append(f"{layer:>5}  {cells}  {sum(row.values()):>5}")
    totals = "  ".join(f"{sum(row.get(c, 0) for row in rows.values()):>{w}}" for c, w in zip(columns, widths))
    return "\n".join([*lines, f"total  {totals}  {sum(ranks.values()):>5}"])


# --------------------------------------------------------------------- after (and during) training


def _check_budget(layers: dict[str, DoRALinear]) -> None:
    """Raise if the budget has not been reached, and say why."""
    for name, layer in layers.items():
        if bool((layer.c[~layer.mask] != 0).any()):
            raise DoRAError(f"{name}: a pruned gate is not 0; call pruner.step() after every optimizer.step()")
    live = sum(layer.rank for layer in layers.values())
    first = next(iter(layers.values()), None)
    if first is None or first.config.schedule is None or live <= first.final_budget:
        return
    why = "pruner.step() was never called: call observe() and step() in every training step"
    if first.progress is not None:
        t, last, total = first.progress
        why = f"training stopped at step {t} of {total}, before the last pruning at step {last}"
    raise DoRAError(f"{live} components are live, the budget is {first.final_budget}: {why}")


@torch.no_grad()
def compact_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Drop dead components from the layers and from the optimizer's state; outputs stay the same.

    A matrix without any component becomes its plain nn.Linear again. Parameters are new objects:
    the optimizer is updated in place, a DistributedDataParallel wrapper has to be made anew.
    """
    layers = dora_layers(model)
    _check_budget(layers)
    for name, layer in layers.items():
        live = layer.mask.nonzero()[:, 0]  # (rank,)
        for attribute, dim in (("A", 0), ("B", 1), ("c", 0)):
            old = getattr(layer, attribute)
            new = nn.Parameter(old.index_select(dim, live), requires_grad=old.requires_grad)
            setattr(layer, attribute, new)
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                swapped = [new if p is old else p for p in group["params"]]
                group["params"] = [p for p in swapped if p is not new or len(live)]
            state = optimizer.state.pop(old, None)
            if state is not None and len(live):
                optimizer.state[new] = {
                    k: v.index_select(dim, live) if torch.is_tensor(v) and v.shape == old.shape else v
                    for k, v in state.items()}
        layer.mask = layer.mask[live]
        if not len(live):
            _replace(model, name, layer.base)
    return model


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Fold every update into its nn.Linear, so that nothing of DoRA is left: W = W0 + Delta W (Eq. 6)."""
    for name, layer in dora_layers(model).items():
        W0 = layer.base.weight
        layer.base.weight = nn.Parameter((W0 + layer.delta_weight()).to(W0.dtype), requires_grad=False)
        _replace(model, name, layer.base)
    return model


# ------------------------------------------------------------------------------------ safetensors


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, memory-mapped: nothing is read before it is used, writes stay private.

    Layout: 8 bytes little-endian header length, JSON {name: {dtype, shape, data_offsets}}, raw bytes.
    Every number is checked against the file's size; anything off is a DoRAError that names the file.
    """
    path = Path(path)

    def need(ok: bool, problem: str) -> None:
        if not ok:
            raise DoRAError(f"{path}: not a valid safetensors file ({problem}); fetch or save it again")

    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        need(size >= 8, f"{size} bytes")
        n = int.from_bytes(f.read(8), "little")
        need(2 <= n <= min(size - 8, 100_000_000), f"header of {n} bytes in a file of {size}")
        try:
            pairs = json.loads(f.read(n).decode("utf-8"), object_pairs_hook=lambda p: p)
        except (ValueError, RecursionError):
            pairs = None
        need(isinstance(pairs, list) and all(isinstance(p, tuple) for p in pairs), "header is not a JSON object")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    entries = [(name, entry) for name, entry in pairs if name != "__metadata__"]
    need(len({name for name, _ in pairs}) == len(pairs), "a name stands twice")

    tensors: dict[str, Tensor] = {}
    spans = []
    for name, entry in entries:
        need(isinstance(entry, list) and all(isinstance(p, tuple) for p in entry), f"{name!r} is not an object")
        info = dict(entry)
        need(set(info) == {"dtype", "shape", "data_offsets"} and len(entry) == 3, f"{name!r} has fields {list(info)}")
        shape, offsets, dtype = info["shape"], info["data_offsets"], info["dtype"]
        need(isinstance(dtype, str) and dtype in DTYPES, f"{name!r} has unknown type {dtype!r}")
        for numbers in (shape, offsets):
            need(isinstance(numbers, list) and all(type(v) is int and 0 <= v < 2**62 for v in numbers),
                 f"{name!r} has shape {shape}, offsets {offsets}")
        need(len(shape) <= 64 and len(offsets) == 2 and offsets[0] <= offsets[1] <= size - 8 - n,
             f"{name!r} has offsets {offsets} in {size - 8 - n} bytes of data")
        count, begin = math.prod(shape), 8 + n + offsets[0]
        need(count * DTYPES[dtype].itemsize == offsets[1] - offsets[0], f"{name!r}: shape and offsets disagree")
        spans.append(tuple(offsets))
        if count == 0:
            need(max(shape) < 2**31, f"{name!r} has shape {shape}")
            tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
        else:
            tensors[name] = torch.frombuffer(data, dtype=DTYPES[dtype], count=count, offset=begin).view(shape)
    end = 0
    for span in sorted(spans):  # the format wants the data covered exactly: no hole, no overlap
        need(span[0] == end, f"bytes {min(span[0], end)} to {max(span[0], end)} overlap or belong to no tensor")
        end = span[1]
    need(end == size - 8 - n, f"{size - 8 - n - end} bytes at the end belong to no tensor")
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in the safetensors layout, whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, blobs = 0, []
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):  # keeps every start aligned
        tensor = tensors[name].detach().cpu().contiguous()
        blobs.append(tensor.flatten().view(torch.uint8).numpy())
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, [len(text).to_bytes(8, "little"), text, *blobs])


def write_whole(path: str | Path, chunks: Iterable[Any]) -> None:
    """Write bytes so that path holds either its old content or all of the new: temporary, flush, rename."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------ adapters, in PEFT's LoRA format

PREFIX = "base_model.model."


def _head_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules that train whole: the head, which an adapter is useless without."""
    heads: list[str] = []
    for name, module in model.named_modules():
        params = list(module.parameters())
        inside = any(name.startswith(head + ".") for head in heads)
        if name and params and not inside and all(p.requires_grad for p in params):
            heads.append(name)
    return heads


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the live components and the head as a PEFT LoRA adapter (Hugging Face PEFT, peft_type LORA).

    c and the scale are folded into B, so that every scale there is alpha / r = 1. Matrices without
    components are left out, since PEFT has no rank 0.
    """
    layers = dora_layers(model)
    if not layers:
        raise DoRAError("the model has no DoRALinear to save; save before merge_()")
    _check_budget(layers)
    tensors, ranks = {}, {}
    for name, layer in layers.items():
        if layer.rank:
            ranks[name] = layer.rank
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A[layer.mask]  # (rank, d_in)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (layer.scale * layer.c * layer.B)[:, layer.mask]
    heads = _head_modules(model)
    for head in heads:
        for name, tensor in model.get_submodule(head).state_dict().items():
            tensors[f"{PREFIX}{head}.{name}"] = tensor
    r = max(ranks.values())
    pattern = {f"^{re.escape(n)}$": k for n, k in ranks.items() if k != r}  # whole names, never a suffix
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern,
        "lora_dropout": next(iter(layers.values())).config.dropout, "bias": "none", "fan_in_fan_out": False,
        "use_dora": False, "use_rslora": False, "init_lora_weights": True,
        "target_modules": "|".join(re.escape(n) for n in ranks), "modules_to_save": heads or None}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    write_whole(folder / "adapter_config.json", [json.dumps(config, indent=2).encode() + b"\n"])


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, DoRALinear]:
    """Load a LoRA adapter, ours or PEFT's, into a model that has none; returns its layers by name.

    Everything is checked before the model is touched. Raises DoRAError for another base model, wrong
    shapes, and the variants of LoRA that this format names but Eq. 6 does not cover.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise DoRAError(f"{path}: not a JSON object; save the adapter again") from None
    tensors = read_safetensors(Path(folder) / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise DoRAError(f"{path}: {key} is {config[key]!r}; only plain LoRA adapters ({key} = {value!r}) can be loaded")

    modules, parameters = dict(model.named_modules()), model.state_dict()
    names = sorted({k.rsplit(".lora_", 1)[0] for k in tensors if ".lora_" in k})
    layers: dict[str, DoRALinear] = {}
    for name in (n.removeprefix(PREFIX) for n in names):
        base = modules.get(name)
        A, B = (tensors.pop(f"{PREFIX}{name}.lora_{m}.weight", None) for m in "AB")
        if type(base) is not nn.Linear or A is None or B is None:
            raise DoRAError(f"{folder}: {name} has no lora_A and lora_B, or is no nn.Linear of this model; "
                            f"is the adapter for another base model?")
        d_out, d_in = base.weight.shape
        if A.ndim != 2 or A.shape[1] != d_in or tuple(B.shape) != (d_out, len(A)) or not len(A):
            raise DoRAError(f"{folder}: {name} is {tuple(B.shape)} x {tuple(A.shape)}, the model's matrix "
                            f"({d_out}, {d_in}); is the adapter for another base model?")
        alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise DoRAError(f"{path}: lora_alpha of {name} is {alpha!r}; expected a number above 0")
        layers[name] = DoRALinear(base, DoRAConfig(rank=len(A), alpha=alpha, **METHODS["lora"]))
        layers[name].name = name
        layers[name].A.copy_(A)
        layers[name].B.copy_(B)
    if not layers:
        raise DoRAError(f"{folder}: the adapter has no lora_A and lora_B; is it an adapter?")
    for key, tensor in tensors.items():  # what is left is the head
        target = parameters.get(key.removeprefix(PREFIX))
        if target is None or target.shape != tensor.shape:
            found = "does not exist" if target is None else f"is {tuple(target.shape)}"
            raise DoRAError(f"{folder}: {key} {tuple(tensor.shape)} {found} in this model; same task and base model?")
    for key, tensor in tensors.items():
        parameters[key.removeprefix(PREFIX)].copy_(tensor)
    model.requires_grad_(False)
    for head in {key.removeprefix(PREFIX).rpartition(".")[0] for key in tensors}:
        model.get_submodule(head).requires_grad_(True)
    for name, layer in layers.items():
        _replace(model, name, layer)
    return layers


def _pattern(pattern: Any, name: str, default: Any) -> Any:
    """The value of the first regular expression of a PEFT rank_pattern or alpha_pattern that fits name."""
    for key, value in (pattern or {}).items():
        if re.match(key if key.startswith("^") else rf"(.*\.)?({key})$", name):
            return value
    return default
