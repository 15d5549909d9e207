"""Does it matter where a few components are, and does dora put them into good places? On text.

    python benchmarks/places.py            # all runs that are missing, in the order of to_do()
    python benchmarks/places.py --report   # only the tables and the figure, from the runs there are
    python benchmarks/places.py --short    # a minute: what CI runs

The protocol, fixed before the first run that is reported
---------------------------------------------------------
A budget of n components is n/36 of the parameters of LoRA with rank 1: MiniLM has 36 matrices, and
a component costs 768 in attention and 1,920 in the feed-forward block. All arms of a task, budget
and seed share the rate, the scale (8), the dropout (0.1, on A x), the limit of stored parameters,
the start of the head and the order of the data. They differ in the places alone:

    dora           finds its places while it trains, r' = 1 (2 at a budget of 36)
    dora's places  plain LoRA from the start, in the matrices where dora's components ended
    random 0 to 7  plain LoRA in places that a random score chooses by dora's own rule (keep_mask)
    adalora, paper their start, score, curve and penalty; adalora's places, paper's places
    lora qv        plain LoRA on query and value, with the highest rank that fits (from 12 on)
    layer, kind    one component in each matrix of a layer, or in one matrix of each layer (at 6).
                   A feed-forward kind stores more than the limit allows.

300 steps of batch 16, AdamW, warm-up of 6 %, then linear to 0; the frozen encoder is in bfloat16,
which halves the time, components and head are in float32 (some runs are repeated all in float32).
STS-B trains on pairs of at most 28 tokens and is scored on those of the dev set of at most 40; MRPC
trains on pairs of at most 48; no other text is longer than 64. "Long" is the same with 1,200 steps
and a score after every 300. The rate of a task is chosen on a tenth of its train set that is held
out, at a budget of 6, as the one with the best mean score of *random* placements (seeds 101 to
103), so that it favours nobody's places. Later the main arms run at half and twice that rate.

Primary quantity: the percentile of dora's places among the random ones of its seed (the share that
they beat, a tie counts half), for each task and budget, and its mean over the seeds. Chance is
50 %. The test is exact: under chance all ranks among the nine are equally likely. A strip is *wide*
if best and worst random placement are at least .03 apart in the median of the seeds.

What each outcome means:
- The mean percentile is 67 % or more where the strip is wide, after 1,200 steps, too: the
  score works on text, and the largest such budget is the one below which a learned place pays.
- That holds after 300 steps only: learned places buy time, not quality.
- It is between 33 and 67 % where the strip is wide: the score fails on text.
- No strip is wide: places do not matter on this task, and nothing is said about the score.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import data  # noqa: E402
import report  # noqa: E402
import train_glue  # noqa: E402
from dora import METHODS, DoRAConfig, DoRALinear, Pruner, compact_, inject, keep_mask  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LOG = RESULTS / "places.jsonl"
GLUE, MODEL = ROOT / "../shared/data/glue", ROOT / "../shared/models/minilm-l6-roberta"
SCALE, DROPOUT, BATCH = 8.0, 0.1, 16
STEPS, LONG, EVERY = 300, 1200, 300  # EVERY: steps between scores
LENGTHS = {"stsb": (28, 40), "mrpc": (48, 64)}  # tokens, at most: of the train set, of dev
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
KINDS = ("attention.self.query", "attention.self.key", "attention.self.value",
         "attention.output.dense", "intermediate.dense", "output.dense")


# ---- what surgical.py shares ---------------------------------------------------------------------


def float32_by_onednn() -> bool:
    """Let oneDNN make products of float32 matrices, which on AMD is faster than MKL, and return
    whether it does. The setting's name misleads: this checks that the results are float32."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    for m, k, n in ((448, 384, 384), (448, 384, 1536), (448, 1536, 384), (384, 448, 1536)):
        a, b = torch.randn(m, k), torch.randn(n, k)
        exact = a.double() @ b.double().T
        error = ((a @ b.T).double() - exact).abs().max() / exact.abs().max()
        if error > 1e-5:
            torch.backends.mkldnn.matmul.fp32_precision = "none"
            return False
    return True


def place(model: nn.Module, ranks: dict[str, int], dropout: float = DROPOUT) -> None:
    """Freeze a model and give matrices plain LoRA of these ranks, at one scale."""
    model.requires_grad_(False)
    for name, rank in ranks.items():
        if rank:
            config = DoRAConfig(**{**METHODS["lora"], "dropout_on": "components"}, rank=rank,
                                alpha=SCALE * rank, dropout=dropout)
            model.set_submodule(name, DoRALinear(model.get_submodule(name), config))


def fit(model: nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, lr: float,
        pruner: Pruner | None, after: Callable[[int], None] = lambda step: None) -> None:
    """Train for some steps; loss_of(step) returns the loss of a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    warm = round(0.06 * steps)
    for step in range(steps):
        model.train()
        loss = loss_of(step) + (pruner.penalty() if pruner else 0)
        loss.backward()
        if pruner:
            pruner.observe()
        nn.utils.clip_grad_norm_(trained, 1.0)
        share = (step + 1) / warm if step < warm else (steps - step) / (steps - warm)
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.step()
        optimizer.zero_grad()
        if pruner:
            pruner.step()
            if pruner.t == pruner.last:
                compact_(model, optimizer)
        after(step + 1)


def make_all(log: Path, to_do: Callable[[], Iterable[dict[str, Any]]],
             make: Callable[[dict[str, Any]], dict[str, Any]], onednn: bool) -> None:
    """Make the runs that are missing in a log, in their order, and append a line for each.

    Several processes may do this at once: a lock, which ends with the process, marks a run.
    """
    locks = ROOT / "runs" / log.stem
    locks.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()
    noted = dict(commit=commit, onednn=onednn, machine=report.machine(1))
    busy: set[str] = set()
    while True:
        known = busy | {line["key"] for line in report.read_log(log)}
        run = next((run for run in to_do() if report.key_of(run) not in known), None)
        if run is None:
            return
        key = report.key_of(run)
        with open(locks / key, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                busy.add(key)
                continue
            if key in {line["key"] for line in report.read_log(log)}:
                continue
            started = time.monotonic()
            found = make(run)
            line = dict(key=key, **run, **found, seconds=round(time.monotonic() - started, 1),
                        **noted)
            report.add_to_log(log, line)
            busy.clear()
        print({k: v for k, v in line.items() if k not in ("dev", "machine")}, flush=True)


# ---- one run -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def examples(task: str, split: str) -> list[data.Example]:
    """Return examples: "train", "held out" (a tenth of the train set), "the rest" of it, "dev"."""
    bpe = data.BPE.from_folder(MODEL)
    found = data.load_task(task, GLUE, "dev" if split == "dev" else "train", bpe, 64)
    if split in ("held out", "the rest"):
        rows = np.random.default_rng(0).permutation(len(found))
        tenth = min(len(found) // 10, 1000)
        found = [found[i] for i in (rows[:tenth] if split == "held out" else rows[tenth:])]
    longest = LENGTHS.get(task, (64, 64))[split in ("held out", "dev")]
    return [example for example in found if len(example.ids) <= longest]


def costs_of(model: nn.Module) -> dict[str, int]:
    """Return what a component of each matrix of the encoder stores, d_in + d_out, by name."""
    return {name: sum(m.weight.shape) for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".layer." in name}


def places(run: dict[str, Any], costs: dict[str, int]) -> dict[str, int]:
    """Return the number of components of each matrix, for an arm whose places are fixed."""
    arm, seed, n = run["arm"], run["seed"], len(costs)
    limit = run["budget"] * sum(costs.values()) // n
    kind, _, rest = arm.partition(" ")
    if kind == "random":
        r_prime = method(dict(run, arm="dora")).r_prime
        rng = torch.Generator().manual_seed(1000 * seed + int(rest))
        prices = torch.tensor([*costs.values()]).repeat_interleave(r_prime)
        mask = keep_mask(torch.rand(len(prices), generator=rng), prices, limit)
        return dict(zip(costs, mask.view(n, r_prime).sum(1).tolist()))
    if kind.endswith("'s"):  # the places that a method found
        source = report.key_of(dict(run, arm=kind.removesuffix("'s")))
        ranks = next(line["ranks"] for line in report.read_log(LOG) if line["key"] == source)
        return dict(zip(costs, ranks))
    if kind == "lora":
        chosen = [name for name in costs if name.endswith((".query", ".value"))]
        return dict.fromkeys(chosen, limit // sum(costs[name] for name in chosen))
    part = {"layer": f".layer.{rest}.", "kind": f"{rest}"}[kind]
    return {name: 1 for name in costs
            if part in name and (kind == "layer" or name.split(".", 4)[4] == rest)}


def method(run: dict[str, Any]) -> DoRAConfig:
    """Return the settings of an arm that finds its places."""
    settings = {**METHODS[run["arm"]], "budget_unit": "parameters", "dropout_on": "components",
                "rank": run["budget"] / 36, "dropout": DROPOUT}
    config = DoRAConfig(**settings)
    divisor = max(1.0, config.rank) if config.scale == "rank" else config.r_prime
    return DoRAConfig(**settings, alpha=SCALE * divisor)


def make(run: dict[str, Any]) -> dict[str, Any]:
    """Train one arm with one seed and return its score, its places and its predictions."""
    task, seed, steps = data.TASKS[run["task"]], run["seed"], run["steps"]
    dev = examples(run["task"], run["split"])
    train = examples(run["task"], "train" if run["split"] == "dev" else "the rest")

    torch.manual_seed(seed)
    model = train_glue.load_roberta(MODEL, task.num_labels)
    if run["dtype"] == "bf16":
        model.roberta.to(torch.bfloat16)
    costs, pruner = costs_of(model), None
    if run["arm"] in METHODS:
        config = method(run)
        pruner = Pruner(inject(model, config), config, steps)
    else:
        ranks = places(run, costs)
        place(model, ranks)
    model.classifier.requires_grad_(True)

    curve, stream = [], data.endless_batches(train, BATCH, seed)

    def loss_of(step: int) -> torch.Tensor:
        batch = next(stream)
        return train_glue.task_loss(model(batch.ids, batch.mask), batch.labels)

    def after(step: int) -> None:
        if step % EVERY == 0:
            predictions = train_glue.predict(model, dev)
            labels = [example.label for example in dev]
            score = data.score(task, predictions, labels)[task.metrics[0]]
            curve.append([step, round(score, 5), predictions])

    torch.manual_seed(seed)  # of dropout
    fit(model, loss_of, steps, run["lr"], pruner, after)
    if pruner:
        ranks = pruner.ranks()
    kept = [ranks.get(name, 0) for name in costs]
    return dict(score=curve[-1][1], curve=[point[:2] for point in curve], ranks=kept,
                parameters=sum(r * c for r, c in zip(kept, costs.values())),
                dev=packed(curve[-1][2], task))


def packed(predictions: np.ndarray, task: data.Task) -> str:
    """Return predictions in base64: 16-bit thousandths of a regression, or a bit for each class."""
    if task.num_labels == 1:
        return base64.b64encode((1000 * predictions).round().astype("<u2").tobytes()).decode()
    return base64.b64encode(np.packbits(predictions.astype(np.uint8)).tobytes()).decode()


# ---- the order of the runs -----------------------------------------------------------------------


def to_do() -> Iterator[dict[str, Any]]:
    """Yield the runs in their order. Those that need the result of another one follow it."""
    first = [f"random {i}" for i in range(4)]
    more = [f"random {i}" for i in range(4, 8)]
    main = ["dora", "dora's places", *first]
    found = ["adalora", "paper", "adalora's places", "paper's places"]
    single = [f"layer {i}" for i in range(6)] + [f"kind {kind}" for kind in KINDS]

    seeds = (1, 2, 3)
    yield from block("stsb", (6,), seeds, [*main, *more])
    yield from block("stsb", (18, 3), seeds, main)
    yield from block("stsb", (6,), seeds, main, LONG)
    yield from block("mrpc", (6,), seeds, main)
    yield from block("stsb", (6,), (1,), main, dtype="float32")
    yield from block("stsb", (6,), seeds, [*found, *single])
    yield from block("sst2", (6,), seeds, main)
    yield from block("stsb", (36, 12), seeds, [*main, "lora qv"])
    yield from block("stsb", (18, 3), seeds, more)
    yield from block("stsb", (18,), seeds, ["lora qv"])
    yield from block("mrpc", (6,), seeds, more)
    for factor in (0.5, 2):
        yield from block("stsb", (6,), seeds, main, factor=factor)
    for task in ("cola", "rte"):
        yield from block(task, (6,), seeds, [*main, *more])
    for task in ("mrpc", "sst2", "cola", "rte"):
        yield from block(task, (18,), seeds, [*main, *more])
    yield from block("stsb", (18, 3), seeds, main, LONG)
    yield from block("stsb", (6, 18, 3, 36, 12), (4, 5), [*main, *more])


def block(task: str, budgets: Iterable[int], seeds: Iterable[int], arms: Iterable[str],
          steps: int = STEPS, factor: float = 1.0, dtype: str = "bf16") -> Iterator[dict[str, Any]]:
    """Yield the runs of some arms, and before them those that choose the task's rate."""
    known = {line["key"] for line in report.read_log(LOG)}
    lr, missing = rate_of(task)
    yield from missing
    if lr is None:
        return
    for budget, seed, arm in itertools.product(budgets, seeds, arms):
        run = dict(task=task, split="dev", steps=steps, budget=budget, seed=seed, arm=arm,
                   lr=lr * factor, dtype=dtype)
        source = dict(run, arm=arm.removesuffix("'s places"))
        fits = arm != "lora qv" or budget >= 12
        if fits and (source == run or report.key_of(source) in known):
            yield run


def rate_of(task: str) -> tuple[float | None, list[dict[str, Any]]]:
    """Return the task's rate, None if it is not known yet, and the runs that choose it.

    Where the best rate is the lowest or highest one, the next one beyond is tried, too.
    """
    done = {line["key"]: line["score"] for line in report.read_log(LOG)}
    rates = list(RATES)
    while True:
        runs = {lr: [dict(task=task, split="held out", steps=STEPS, budget=6, seed=seed,
                          arm="random 0", lr=lr, dtype="bf16") for seed in (101, 102, 103)]
                for lr in rates}
        missing = [run for lr in rates for run in runs[lr] if report.key_of(run) not in done]
        if missing:
            return None, missing

        means = {lr: statistics.mean(done[report.key_of(run)] for run in runs[lr]) for lr in rates}
        best = max(rates, key=means.__getitem__)
        if best == min(rates) and len(rates) < 8:
            rates.append(best / 2)
        elif best == max(rates) and len(rates) < 8:
            rates.append(best * 2)
        else:
            return best, []


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", action="store_true", help="only write table and figure")
    parser.add_argument("--short", action="store_true", help="check the machinery only, for CI")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.report:
        make_all(LOG, to_do, make, float32_by_onednn())


if __name__ == "__main__":
    main()
