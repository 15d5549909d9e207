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

import base64
import functools
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from torch import nn

import data
import train_glue
from dora import METHODS, DoRAConfig, DoRALinear, Pruner, compact_, inject, keep_mask

LOG = report.RESULTS / "places.jsonl"
SCALE, DROPOUT, BATCH = 8.0, 0.1, 16
STEPS, LONG, EVERY = 300, 1200, 300  # EVERY: steps between scores
LENGTHS = {"stsb": (28, 40), "mrpc": (48, 64)}  # tokens, at most: of the train set, of dev
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
WIDE, PLACES = 0.03, "dora's places"
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
    """Make the runs that are missing in a log, and note with each what made it."""
    commit = subprocess.run(["git", "-C", str(report.ROOT), "describe", "--always", "--dirty"],
                            capture_output=True, text=True).stdout.strip()

    def run(cell: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        found = make(cell)
        return dict(found, seconds=round(time.monotonic() - started, 1), commit=commit,
                    onednn=onednn, machine=report.machine())

    report.make_all(log, to_do, run)


# ---- one run -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def examples(task: str, split: str) -> list[data.Example]:
    """Return examples: "train", "held out" (a tenth of the train set), "the rest" of it, "dev"."""
    bpe = data.BPE.from_folder(report.MINILM)
    found = data.load_task(task, report.GLUE, "dev" if split == "dev" else "train", bpe, 64)
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
        return dict(zip(costs, report.finished(LOG)[source]["ranks"]))
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
    known = report.finished(LOG)
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
    done = report.finished(LOG)
    rates = list(RATES)
    while True:
        runs = {lr: [dict(task=task, split="held out", steps=STEPS, budget=6, seed=seed,
                          arm="random 0", lr=lr, dtype="bf16") for seed in (101, 102, 103)]
                for lr in rates}
        missing = [run for lr in rates for run in runs[lr] if report.key_of(run) not in done]
        if missing:
            return None, missing

        means = {lr: statistics.mean(done[report.key_of(run)]["score"] for run in runs[lr])
                 for lr in rates}
        best = max(rates, key=means.__getitem__)
        if best == min(rates) and len(rates) < 8:
            rates.append(best / 2)
        elif best == max(rates) and len(rates) < 8:
            rates.append(best * 2)
        else:
            return best, []


# ---- report --------------------------------------------------------------------------------------

Group = dict[int, dict[str, dict[str, Any]]]  # the runs of one setting, by seed and arm
TITLES = {"stsb": "STS-B", "mrpc": "MRPC", "cola": "CoLA", "sst2": "SST-2", "rte": "RTE"}


def groups() -> dict[tuple[Any, ...], Group]:
    """Return the runs on dev by (task, steps, rate / the chosen one, dtype, budget)."""
    found: dict[tuple[Any, ...], Group] = {}
    for line in report.read_log(LOG):
        if line["split"] == "dev":
            share = line["lr"] / rate_of(line["task"])[0]
            key = (line["task"], line["steps"], share, line["dtype"], line["budget"])
            found.setdefault(key, {}).setdefault(line["seed"], {})[line["arm"]] = line
    return dict(sorted(found.items(), key=lambda item: [*map(list(TITLES).index, item[0][:1]),
                                                        *item[0][1:]]))


def scores(group: Group, arm: str) -> dict[int, float]:
    """Return the score of an arm by seed."""
    return {seed: arms[arm]["score"] for seed, arms in group.items() if arm in arms}


def randoms(group: Group, seed: int) -> list[float]:
    """Return the scores of the random placements of a seed."""
    return [line["score"] for arm, line in group[seed].items() if arm.startswith("random ")]


def beaten(group: Group, arm: str) -> list[tuple[float, int]]:
    """Return by seed how many random placements an arm beats, a tie counting half, and of how many.

    Seeds with fewer than four are left out.
    """
    found = []
    for seed, score in scores(group, arm).items():
        others = randoms(group, seed)
        if len(others) >= 4:
            found.append((sum((x < score) + (x == score) / 2 for x in others), len(others)))
    return found


def percentile(counts: list[tuple[float, int]]) -> float:
    """Return the mean over the seeds of the share of random placements that are beaten."""
    return statistics.mean(count / of for count, of in counts)


def chance(counts: list[tuple[float, int]]) -> float:
    """Return the probability that random places beat at least as many: with k others each number
    from 0 to k is equally likely."""
    sums = np.ones(1)
    for _, of in counts:
        sums = np.convolve(sums, np.full(of + 1, 1 / (of + 1)))
    return float(sums[int(sum(count for count, _ in counts)):].sum())


def width(group: Group) -> float:
    """Return the median over the seeds of best minus worst random placement."""
    return statistics.median(np.ptp(randoms(group, seed)) for seed in group
                             if len(randoms(group, seed)) >= 4)


def setting(key: tuple[Any, ...]) -> str:
    """Return a setting in words."""
    task, steps, share, dtype, budget = key
    rate = "" if share == 1 else f", {share:g} times the rate"
    return (f"{TITLES[task]}, {budget} components, {steps:,} steps{rate}"
            + ", float32" * (dtype == "float32"))


def places_table() -> str:
    """Return the primary quantity, a row per setting."""
    body = []
    for key, group in groups().items():
        counts = beaten(group, "dora's places")
        if not counts:
            continue
        own = beaten(group, "dora")
        middle = statistics.median(x for seed in group for x in randoms(group, seed))
        wide = width(group)
        body.append([
            setting(key), f"{len(counts)} x {'/'.join(sorted({str(of) for _, of in counts}))}",
            f"{wide:.3f}{' (wide)' if wide >= WIDE else ''}", f"{middle:.3f}",
            f"{statistics.median(scores(group, 'dora').values()):.3f}",
            f"{statistics.median(scores(group, PLACES).values()):.3f}",
            f"{100 * percentile(counts):.0f} %", f"{chance(counts):.3f}",
            f"{100 * percentile(own):.0f} %"])
    return report.table(
        ["setting", "seeds x random placements", "best - worst of them", "their median", "dora",
         "dora's places", "percentile of dora's places", "p", "of dora"], body)


def arms_table(key: tuple[Any, ...]) -> str:
    """Return all other arms of a setting: score, parameters, percentile."""
    group, body = groups()[key], []
    for arm in dict.fromkeys(arm for arms in group.values() for arm in arms):
        if arm.startswith("random "):
            continue
        counts = beaten(group, arm)
        sizes = [arms[arm]["parameters"] for arms in group.values() if arm in arms]
        body.append([arm, report.spread(scores(group, arm).values(), 3), f"{max(sizes):,}",
                     f"{100 * percentile(counts):.0f} %" if counts else ""])
    every = [x for seed in group for x in randoms(group, seed)]
    body.append(["random placements", report.spread(every, 3), "", "50 %"])
    return report.table(["arm", "score", "parameters, at most", "percentile"], body)


def write_report() -> None:
    """Write places.md and places.svg from the log."""
    lines = report.read_log(LOG)
    rates = {task: rate_of(task)[0] for task in TITLES if rate_of(task)[0]}
    hours = sum(line["seconds"] for line in lines) / 3600
    text = f"""# Places on text

Written by `python benchmarks/places.py`, which has the protocol, from {len(lines)} runs
({hours:.1f} hours of one core, commits {", ".join(sorted({line["commit"] for line in lines}))}).
Rates chosen for random placements on a held-out tenth: {
    ", ".join(f"{TITLES[task]} {rate:g}" for task, rate in rates.items())}.
Medians over the seeds; p is one-sided, under chance; wide means {WIDE} or more.

{places_table()}
"""
    for key in groups():
        if key[0] == "stsb" and key[2:4] == (1, "bf16") and key[1] == STEPS and key[4] in (6, 36):
            text += f"\n## All arms: {setting(key)}\n\n{arms_table(key)}\n"
    (report.RESULTS / "places.md").write_text(text, "utf-8")
    plot()


def plot() -> None:
    """Draw the scores over the budget, a panel per task, and one over the steps."""
    main = {key: group for key, group in groups().items()
            if key[2:4] == (1, "bf16") and key[1] == STEPS and beaten(group, PLACES)}
    tasks = list(dict.fromkeys(key[0] for key in main))
    long = groups().get(("stsb", LONG, 1, "bf16", 6))
    budgets = {task: [key[4] for key in main if key[0] == task] for task in tasks}
    ratios = [1 + len(budgets[task]) for task in tasks] + [5] * bool(long)
    figure = report.figure(8, 2.9)
    axes = list(figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])

    for ax, task in zip(axes, tasks):
        strips = {str(budget): main[task, STEPS, 1, "bf16", budget] for budget in budgets[task]}
        draw(ax, [(name, {seed: (randoms(group, seed), scores(group, PLACES).get(seed))
                          for seed in group}) for name, group in strips.items()])
        ax.set_title(f"{TITLES[task]}, {STEPS} steps")
        ax.set_xlabel("components in all")
        ax.set_ylabel({"stsb": "Pearson", "cola": "Matthews"}.get(task, "accuracy") + " on dev")
    if long:
        steps = [step for step, _ in long[min(long)][PLACES]["curve"]]
        draw(axes[-1], [(f"{step:,}", {seed: (
            [dict(line["curve"])[step] for arm, line in arms.items() if arm.startswith("random ")],
            dict(arms[PLACES]["curve"])[step]) for seed, arms in long.items() if PLACES in arms})
            for step in steps])
        axes[-1].set_title(f"STS-B, 6 components, {LONG:,} steps")
        axes[-1].set_xlabel("steps done")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    report.save_figure(figure, report.RESULTS / "places.svg")


def draw(ax: Any, strips: list[tuple[str, dict[int, tuple[list[float], float | None]]]]) -> None:
    """Draw random placements and dora's places of each seed, and a line through the latter."""
    means = []
    for x, (_, seeds) in enumerate(strips):
        for i, (others, own) in enumerate(seeds.values()):
            place = x + 0.22 * (i - (len(seeds) - 1) / 2)
            ax.plot([place] * len(others), others, "o", color="#999999", ms=3, alpha=0.7, mew=0,
                    label="random places" if x == i == 0 else None)
            if own is not None:
                ax.plot(place, own, "D", color=report.COLORS["dora"], ms=4, mew=0,
                        label="dora's places, one dot per seed" if x == i == 0 else None)
        means.append(statistics.mean(own for _, own in seeds.values() if own is not None))
    ax.plot(range(len(strips)), means, color=report.COLORS["dora"], lw=1.2, label="their mean")
    ax.set_xticks(range(len(strips)), [name for name, _ in strips])
    ax.set_xlim(-0.6, len(strips) - 0.4)


def short() -> None:
    """Check the random placements, the test, and a few steps of two arms."""
    assert abs(chance([(8, 8)] * 3) * 9**3 - 1) < 1e-9 and abs(chance([(0, 8)]) - 1) < 1e-9
    group = {1: {"dora": {"score": 0.5}, **{f"random {i}": {"score": s} for i, s in enumerate(
        (0.4, 0.5, 0.6, 0.7))}}}
    assert percentile(beaten(group, "dora")) == 1.5 / 4
    if not report.GLUE.exists():
        return print(f"places.py: no {report.GLUE.name} data beside the project, so nothing ran")
    global STEPS, EVERY
    STEPS = EVERY = 40
    run = dict(task="stsb", split="dev", steps=STEPS, budget=6, seed=1, arm="random 3", lr=4e-3,
               dtype="bf16")
    model = train_glue.load_roberta(report.MINILM, 1)
    costs = costs_of(model)
    assert len(costs) == 36 and sum(costs.values()) == 41_472
    for budget, seed in itertools.product((3, 6, 18, 36), (1, 2)):
        chosen = places(dict(run, budget=budget, seed=seed), costs)
        stored = sum(costs[name] * rank for name, rank in chosen.items())
        assert 0 <= budget * 1152 - stored < 768, (budget, stored)  # nothing else would have fit
    for arm in ("dora", "random 3"):
        found = make(dict(run, arm=arm))
        assert found["parameters"] <= 6 * 1152 and sum(found["ranks"]) > 0
        assert len(base64.b64decode(found["dev"])) == 2 * len(examples("stsb", "dev"))
        print(f"{arm}: {found['score']:.3f}, {found['parameters']:,} parameters")


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
