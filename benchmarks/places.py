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
trains on pairs of at most 48; no other text is longer than 64. "Long" is the same with 600 steps
and a score after every 300. The rate of a task is chosen on a tenth of its train set that is held
out, at a budget of 6, as the one with the best mean score of *random* placements (seeds 101 to
103), so that it favours nobody's places. Later the main arms run at half and twice that rate.

Primary quantity: the percentile of dora's places among the random ones of its seed (the share that
they beat, a tie counts half), for each task and budget, and its mean over the seeds. Chance is
50 %. The test is exact: under chance all ranks among the nine are equally likely. A strip is *wide*
if best and worst random placement are at least .03 apart in the median of the seeds.

What each outcome means:
- The mean percentile is 67 % or more where the strip is wide, after 600 steps, too: the
  score works on text, and the largest such budget is the one below which a learned place pays.
- That holds after 300 steps only: learned places buy time, not quality.
- It is between 33 and 67 % where the strip is wide: the score fails on text.
- No strip is wide: places do not matter on this task, and nothing is said about the score.
"""

from __future__ import annotations

import base64
import functools
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
import torch
from report import Line
from torch import nn

import data
import train_glue
from dora import METHODS, DoRAConfig, DoRALinear, Pruner, compact_, inject, keep_mask

LOG = report.RESULTS / "places.jsonl"
SCALE, DROPOUT, BATCH = 8.0, 0.1, 16
STEPS, LONG, EVERY = 300, 600, 300  # EVERY: steps between scores
LENGTHS = {"stsb": (28, 40), "mrpc": (48, 64)}  # tokens, at most: of the train set, of dev
RATES, TRIED = (1e-3, 2e-3, 4e-3, 8e-3), (101, 102, 103)
WIDE, PLACES, QV = 0.03, "dora's places", "lora qv"
TITLES = {"stsb": "STS-B", "mrpc": "MRPC", "cola": "CoLA", "sst2": "SST-2", "rte": "RTE"}
KINDS = ("attention.self.query", "attention.self.key", "attention.self.value",
         "attention.output.dense", "intermediate.dense", "output.dense")


# ---- what surgical.py shares ---------------------------------------------------------------------


def float32_by_onednn() -> bool:
    """Let oneDNN make products of float32 matrices, which on AMD is faster than MKL, and return
    whether it does. The setting's name misleads: this checks that the results are float32."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    for d_in, d_out in ((384, 384), (384, 1536), (1536, 384)):
        x, W = torch.randn(448, d_in), torch.randn(d_in, d_out)
        exact = x.double() @ W.double()
        error = torch.dist(x @ W, exact) / exact.norm()
        if error > 1e-6:  # bfloat16 has 2e-3
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


def make_all(log: Path, to_do: Callable[[], Iterable[Line]], make: Callable[[Line], Line],
             onednn: bool) -> None:
    """Make the runs that are missing in a log, and note with each what made it."""
    git = ["git", "-C", str(report.ROOT), "log", "-1", "--format=%h"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    noted = dict(commit=commit, onednn=onednn, machine=report.machine())

    def run(cell: Line) -> Line:
        started = time.monotonic()
        found = make(cell)
        return {**found, "seconds": round(time.monotonic() - started, 1), **noted}

    report.make_all(log, to_do, run)


def choose(log: Path, trials: dict[float, list[Line]], figure: str) -> dict[float, float]:
    """Return the mean of a figure by learning rate; {} until all runs of the trials are made."""
    done = report.finished(log)
    found = {lr: [done.get(report.key_of(run)) for run in runs] for lr, runs in trials.items()}
    if not all(all(lines) for lines in found.values()):
        return {}
    return {lr: statistics.mean(line[figure] for line in lines if line)
            for lr, lines in found.items()}


# ---- one run -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def examples(task: str, split: str) -> list[data.Example]:
    """Return examples: "train", "held out" (a tenth of the train set), "the rest" of it, "dev"."""
    bpe = data.BPE.from_folder(report.MINILM)
    found = data.load_task(task, report.GLUE, "dev" if split == "dev" else "train", bpe, 64)
    rows = np.random.default_rng(0).permutation(len(found))
    tenth = min(len(found) // 10, 1000)
    if split == "held out":
        found = [found[i] for i in rows[:tenth]]
    elif split == "the rest":
        found = [found[i] for i in rows[tenth:]]
    longest = LENGTHS.get(task, (64, 64))[split in ("held out", "dev")]
    return [example for example in found if len(example.ids) <= longest]


def costs_of(model: nn.Module) -> dict[str, int]:
    """Return what a component of each matrix of the encoder stores, d_in + d_out, by name."""
    return {name: sum(m.weight.shape) for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".layer." in name}


def places(run: Line, costs: dict[str, int]) -> dict[str, int]:
    """Return the number of components of each matrix, for an arm whose places are fixed."""
    limit = run["budget"] * sum(costs.values()) // len(costs)
    kind, _, rest = run["arm"].partition(" ")
    if kind == "random":
        r_prime = method({**run, "arm": "dora"}).r_prime
        rng = torch.Generator().manual_seed(1000 * run["seed"] + int(rest))
        prices = torch.tensor([*costs.values()]).repeat_interleave(r_prime)
        mask = keep_mask(torch.rand(len(prices), generator=rng), prices, limit)
        ranks = mask.view(-1, r_prime).sum(1)  # (matrices,)
        return dict(zip(costs, ranks.tolist()))
    if kind.endswith("'s"):  # the places that a method found
        source = {**run, "arm": kind.removesuffix("'s")}
        return dict(zip(costs, report.finished(LOG)[report.key_of(source)]["ranks"]))
    if kind == "lora":
        chosen = [name for name in costs if name.endswith((".query", ".value"))]
        return dict.fromkeys(chosen, limit // sum(costs[name] for name in chosen))
    if kind == "layer":
        return {name: 1 for name in costs if f".layer.{rest}." in name}
    return {name: 1 for name in costs if name.split(".", 4)[4] == rest}  # roberta.encoder.layer.0.


def method(run: Line) -> DoRAConfig:
    """Return the settings of an arm that finds its places."""
    settings = {**METHODS[run["arm"]], "budget_unit": "parameters", "dropout_on": "components",
                "rank": run["budget"] / 36, "dropout": DROPOUT}
    config = DoRAConfig(**settings)
    divisor = max(1.0, config.rank) if config.scale == "rank" else config.r_prime
    return DoRAConfig(**settings, alpha=SCALE * divisor)


def make(run: Line) -> Line:
    """Train one arm with one seed and return its score, its places and its predictions."""
    task, seed, steps = data.TASKS[run["task"]], run["seed"], run["steps"]
    dev = examples(run["task"], run["split"])
    train = examples(run["task"], "train" if run["split"] == "dev" else "the rest")

    torch.manual_seed(seed)
    model = train_glue.load_roberta(report.MINILM, task.num_labels)
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

    stream = data.endless_batches(train, BATCH, seed)
    labels = [example.label for example in dev]
    curve, predictions = [], np.zeros(0)

    def loss_of(step: int) -> torch.Tensor:
        batch = next(stream)
        return train_glue.task_loss(model(batch.ids, batch.mask), batch.labels)

    def after(step: int) -> None:
        nonlocal predictions
        if step % EVERY == 0:
            predictions = train_glue.predict(model, dev)
            score = data.score(task, predictions, labels)[task.metrics[0]]
            curve.append((step, round(score, 5)))

    torch.manual_seed(seed)  # of dropout
    fit(model, loss_of, steps, run["lr"], pruner, after)
    if pruner:
        ranks = pruner.ranks()
    kept = [ranks.get(name, 0) for name in costs]
    stored = sum(rank * price for rank, price in zip(kept, costs.values()))
    return dict(score=curve[-1][1], curve=curve, ranks=kept, parameters=stored,
                dev=packed(predictions, task))


def packed(predictions: np.ndarray, task: data.Task) -> str:
    """Return predictions in base64: 16-bit thousandths of a regression, or a bit for each class."""
    if task.num_labels == 1:
        values = (1000 * predictions).round().astype("<u2")
    else:
        values = np.packbits(predictions.astype(bool))
    return base64.b64encode(values.tobytes()).decode()


# ---- the order of the runs -----------------------------------------------------------------------


def to_do() -> Iterator[Line]:
    """Yield the runs in their order. Those that need the result of another one follow it."""
    first = [f"random {i}" for i in range(4)]
    more = [f"random {i}" for i in range(4, 8)]
    main = ["dora", PLACES, *first]
    found = ["adalora", "paper", "adalora's places", "paper's places"]
    single = [f"layer {i}" for i in range(6)] + [f"kind {kind}" for kind in KINDS]

    seeds = (1, 2, 3)
    yield from block("stsb", (6,), seeds, [*main, *more])
    yield from block("stsb", (18,), seeds, main)
    # the rate, chosen at 6, makes some runs collapse at 18: so all budgets at half of it, too
    yield from block("stsb", (6, 3), seeds, main, factor=0.5)
    yield from block("stsb", (6,), seeds, main, LONG, factor=0.5)
    yield from block("stsb", (18,), seeds, main, factor=0.5)
    yield from block("stsb", (3,), seeds, main)
    yield from block("stsb", (6,), (4, 5), main)
    yield from block("mrpc", (6,), seeds, main)
    yield from block("stsb", (6,), seeds, [*found, *single])
    yield from block("stsb", (6,), (1,), main, dtype="float32")
    yield from block("stsb", (36, 12), seeds, [*main, QV])
    yield from block("stsb", (18, 3), seeds, more)
    yield from block("stsb", (18,), seeds, [QV])
    yield from block("stsb", (6,), seeds, main, factor=2)
    for task in ("sst2", "cola", "rte"):
        yield from block(task, (6,), seeds, main)
    for task in ("mrpc", "sst2", "cola", "rte"):
        yield from block(task, (18,), seeds, main)
    yield from block("stsb", (18, 3), seeds, main, LONG)
    yield from block("stsb", (18, 3, 36, 12), (4, 5), main)


def block(task: str, budgets: tuple[int, ...], seeds: tuple[int, ...], arms: list[str],
          steps: int = STEPS, factor: float = 1.0, dtype: str = "bf16") -> Iterator[Line]:
    """Yield the runs of some arms, and before them those that choose the task's rate."""
    if rate_of(task) is None:
        yield from itertools.chain(*trials(task).values())
        return

    known, lr = report.finished(LOG), factor * rate_of(task)
    for budget, seed, arm in itertools.product(budgets, seeds, arms):
        run = dict(task=task, split="dev", steps=steps, budget=budget, seed=seed, arm=arm, lr=lr,
                   dtype=dtype)
        source = {**run, "arm": arm.removesuffix("'s places")}
        if source == run or report.key_of(source) in known:
            yield run


def trials(task: str) -> dict[float, list[Line]]:
    """Return by rate the runs that choose a task's rate. Where the best rate is the lowest or the
    highest, the next one is tried, too."""
    cell = dict(task=task, split="held out", steps=STEPS, budget=6, arm="random 0", dtype="bf16")
    rates = list(RATES)
    while True:
        runs = {lr: [{**cell, "seed": seed, "lr": lr} for seed in TRIED] for lr in rates}
        means = choose(LOG, runs, "score")
        best = max(means, key=means.__getitem__, default=0)
        if best == 0 or min(rates) < best < max(rates) or len(rates) == 8:
            return runs
        rates.append(best / 2 if best == min(rates) else best * 2)


def rate_of(task: str) -> float | None:
    """Return the rate that was chosen for a task, None until it is known."""
    means = choose(LOG, trials(task), "score")
    return max(means, key=means.__getitem__, default=None)


# ---- report --------------------------------------------------------------------------------------

Seeds = dict[int, dict[str, Any]]  # by seed and arm: the line of the log


class Setting(NamedTuple):
    """What the arms that are compared with each other have in common."""

    task: str
    steps: int
    rate: float
    dtype: str
    budget: int

    def words(self) -> str:
        """Return the setting in words."""
        text = f"{TITLES[self.task]}, {self.budget} components, {self.steps:,} steps"
        if self.rate != rate_of(self.task):
            text += f", rate {self.rate:g}"
        return text + ", float32" * (self.dtype == "float32")


def settings() -> dict[Setting, Seeds]:
    """Return the runs on dev, sorted."""
    found: dict[Setting, Seeds] = {}
    for line in report.read_log(LOG):
        if line["split"] == "dev":
            names = ("task", "steps", "lr", "dtype", "budget")
            seeds = found.setdefault(Setting(*(line[name] for name in names)), {})
            seeds.setdefault(line["seed"], {})[line["arm"]] = line
    tasks = [*TITLES]
    order = sorted(found, key=lambda setting: (tasks.index(setting.task), setting))
    return {setting: found[setting] for setting in order}


def scores(seeds: Seeds, arm: str) -> list[float]:
    """Return the scores of an arm."""
    return [arms[arm]["score"] for arms in seeds.values() if arm in arms]


def randoms(arms: dict[str, Any]) -> list[float]:
    """Return the scores of the random placements of a seed."""
    return [line["score"] for arm, line in arms.items() if arm.startswith("random ")]


def beaten(seeds: Seeds, arm: str) -> list[tuple[float, int]]:
    """Return by seed how many random placements an arm beats, where a tie counts half, and how many
    there are. Seeds with fewer than four are left out."""
    found = []
    for arms in seeds.values():
        others = randoms(arms)
        if arm in arms and len(others) >= 4:
            below = sum(score < arms[arm]["score"] for score in others)
            ties = sum(score == arms[arm]["score"] for score in others)
            found.append((below + ties / 2, len(others)))
    return found


def percentile(counts: list[tuple[float, int]]) -> str:
    """Return the mean over the seeds of the share of random placements that are beaten."""
    if not counts:
        return ""
    return f"{100 * statistics.mean(count / of for count, of in counts):.0f} %"


def chance(counts: list[tuple[float, int]]) -> float:
    """Return the probability that random places beat at least as many: with k others each number
    from 0 to k is equally likely."""
    sums = np.ones(1)
    for _, of in counts:
        sums = np.convolve(sums, np.full(of + 1, 1 / (of + 1)))
    return float(sums[int(sum(count for count, _ in counts)):].sum())


def places_table() -> str:
    """Return the primary quantity, a row per setting."""
    body = []
    for setting, seeds in settings().items():
        counts = beaten(seeds, PLACES)
        if not counts:
            continue
        strips = [randoms(arms) for arms in seeds.values() if len(randoms(arms)) >= 4]
        wide = statistics.median(max(strip) - min(strip) for strip in strips)
        each = sorted({len(strip) for strip in strips})
        body.append([
            setting.words(),
            f"{len(counts)} x {' or '.join(map(str, each))}",
            f"{wide:.3f}" + (", wide" if wide >= WIDE else ""),
            f"{statistics.median(itertools.chain(*strips)):.3f}",
            f"{statistics.median(scores(seeds, 'dora')):.3f}",
            f"{statistics.median(scores(seeds, PLACES)):.3f}",
            percentile(counts),
            f"{chance(counts):.3f}",
            percentile(beaten(seeds, "dora"))])
    return report.table(
        ["setting", "seeds x random places", "best - worst", "their median", "dora", PLACES,
         f"percentile of {PLACES}", "p", "of dora"], body)


def arms_table(seeds: Seeds) -> str:
    """Return score, parameters and percentile of all arms of a setting."""
    body = []
    for arm in dict.fromkeys(arm for arms in seeds.values() for arm in arms):
        if not arm.startswith("random "):
            sizes = [arms[arm]["parameters"] for arms in seeds.values() if arm in arms]
            body.append([arm, report.spread(scores(seeds, arm), 3), f"{max(sizes):,}",
                         percentile(beaten(seeds, arm))])
    every = [score for arms in seeds.values() for score in randoms(arms)]
    body.append(["random places", report.spread(every, 3), "", "50 %"])
    return report.table(["arm", "score", "parameters, at most", "percentile"], body)


def write_report() -> None:
    """Write places.md and places.svg from the log."""
    lines = report.read_log(LOG)
    hours = sum(line["seconds"] for line in lines) / 3600
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    rates = [f"{title} {rate_of(task):g}" for task, title in TITLES.items() if rate_of(task)]
    parts = [
        "# Places on text",
        f"Written by `python benchmarks/places.py`, which has the protocol, from {len(lines)} "
        f"runs: {hours:.1f} hours of one core, commits {commits}, with dora.py as at af50a13. "
        f"Rates, chosen for random places on a held-out tenth: {', '.join(rates)}. Scores are "
        f"medians over the seeds, p is one-sided, wide is {WIDE} or more.",
        places_table()]
    for setting, seeds in settings().items():
        if len(dict.fromkeys(itertools.chain(*seeds.values()))) > 10:  # more than the main arms
            parts += [f"## All arms: {setting.words()}", arms_table(seeds)]
    (report.RESULTS / "places.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    plot()


Strips = dict[str, list[tuple[list[float], float]]]  # by label and seed: random places, dora's


def plot() -> None:
    """Draw the scores over the budget, a panel per task, and in the last panel over the steps."""
    panels: dict[str, Strips] = {}
    for setting, seeds in settings().items():
        whole = [arms for arms in seeds.values() if PLACES in arms and len(randoms(arms)) >= 4]
        if len(whole) < 3 or setting.dtype != "bf16":
            continue
        title = f"{TITLES[setting.task]}, rate {setting.rate:g}"
        if setting.steps == STEPS:
            panels.setdefault(title, {})[str(setting.budget)] = [
                (randoms(arms), arms[PLACES]["score"]) for arms in whole]
        else:
            panels[f"{title}, {setting.budget} components"] = over_steps(whole)

    figure = report.figure(8, 3)
    ratios = [1 + len(strips) for strips in panels.values()]
    axes = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]
    for ax, (title, strips) in zip(axes, panels.items()):
        draw(ax, strips)
        ax.set_title(title)
        ax.set_xlabel(f"steps of {LONG}" if title.endswith("s") else "components in all")
    axes[0].set_ylabel("score on dev")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)
    report.save_figure(figure, report.RESULTS / "places.svg")


def over_steps(seeds: list[dict[str, Any]]) -> Strips:
    """Return the scores in the course of training."""
    strips: Strips = {}
    for arms in seeds:
        curves = {arm: dict(line["curve"]) for arm, line in arms.items()}
        for step, own in curves[PLACES].items():
            others = [curve[step] for arm, curve in curves.items() if arm.startswith("random ")]
            strips.setdefault(f"{step:,}", []).append((others, own))
    return strips


def draw(ax: Any, strips: Strips) -> None:
    """Draw random places and dora's, seed beside seed, and a line through the medians of dora's.
    Runs that collapse are triangles at the lower edge."""
    orange = report.COLORS["dora"]
    top = max(max(others) for seeds in strips.values() for others, _ in seeds)
    floor = top - 0.25
    for x, seeds in enumerate(strips.values()):
        for i, (others, own) in enumerate(seeds):
            first = x == i == 0  # which names the dots in the legend
            at = x + 0.22 * (i - (len(seeds) - 1) / 2)
            grey, = ax.plot([at] * len(others), others, "o", color="#999999", ms=3, mew=0)
            dot, = ax.plot(at, own, "D", color=orange, ms=4, mew=0)
            lost = sum(score < floor for score in others)
            ax.plot([at] * lost, [floor] * lost, "v", color="#999999", ms=4, mew=0)
            ax.plot([at] * (own < floor), [floor] * (own < floor), "v", color=orange, ms=4, mew=0)
            if first:
                grey.set_label("random places")
                dot.set_label("dora's places, a dot per seed")
    middles = [statistics.median(own for _, own in seeds) for seeds in strips.values()]
    ax.plot(range(len(strips)), middles, color=orange, lw=1.2, label="their median")
    ax.set_ylim(floor - 0.01, top + 0.01)
    ax.set_xticks(range(len(strips)), list(strips))
    ax.set_xlim(-0.6, len(strips) - 0.4)


def short() -> None:
    """Check the test, the random placements, and a few steps of two arms."""
    assert round(1 / chance([(8, 8)] * 3)) == 9**3
    assert round(chance([(0, 8)]), 9) == 1
    others = {f"random {i}": {"score": score} for i, score in enumerate((0.4, 0.5, 0.6, 0.7))}
    assert beaten({1: {"dora": {"score": 0.5}, **others}}, "dora") == [(1.5, 4)]
    if not report.GLUE.exists():
        return print(f"places.py: {report.GLUE} does not exist, so no arm was trained")

    costs = costs_of(train_glue.load_roberta(report.MINILM, 1))
    assert len(costs) == 36 and sum(costs.values()) == 41_472
    run = dict(task="stsb", split="dev", steps=40, seed=1, arm="random 3", lr=4e-3, dtype="bf16")
    for budget in (3, 6, 18, 36):
        ranks = places({**run, "budget": budget}, costs)
        left = budget * 1152 - sum(costs[name] * rank for name, rank in ranks.items())
        assert 0 <= left < 768, (budget, left)  # nothing else would have fit
    global EVERY
    EVERY = 40
    for arm in ("dora", "random 3"):
        found = make({**run, "budget": 6, "arm": arm})
        print(f"{arm}: {found['score']:.3f}, {found['parameters']:,} parameters")
        assert 0 < found["parameters"] <= 6 * 1152


def main() -> None:
    """Run the command line."""
    args = report.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    if args.short:
        return short()
    if not args.report:
        make_all(LOG, to_do, make, float32_by_onednn())
    write_report()


if __name__ == "__main__":
    main()
