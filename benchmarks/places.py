"""Does it matter where a few components are, and does dora put them into good places? On text.

    python benchmarks/places.py            # all runs that are missing, in the order of to_do()
    python benchmarks/places.py --report   # only the table and the figure, from the runs there are
    python benchmarks/places.py --short    # a minute: what CI runs

The protocol, which was fixed before the runs, is in README.md.
"""

import base64
import functools
import itertools
import math
import statistics
from typing import NamedTuple

import numpy as np
import report
import torch
from torch import nn

import data
import train_glue
from dora import IMPORTANCE, METHODS, DoRAConfig, Pruner, inject, keep_mask, sensitivity

LOG = report.RESULTS / "places.jsonl"
SCALE, DROPOUT, BATCH, STEPS = 8.0, 0.1, 16, 300
RATES, TRIED = (1e-3, 2e-3, 4e-3, 8e-3), (101, 102, 103)
LENGTHS = {"stsb": (28, 40), "mrpc": (48, 64)}  # tokens, at most: of the train set, of dev
TITLES = {"stsb": "STS-B", "mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
WIDE, PLACES = 0.03, "dora's places"
FIRST, MORE = [f"random {i}" for i in range(4)], [f"random {i}" for i in range(4, 8)]
MAIN = ["dora", PLACES, *FIRST]
FRESH = range(4, 9)
LOOK, SEARCH = range(201, 207), 100  # seeds that only compare ways to find places; steps of a search
VARIANTS = {"AdaLoRA's start": dict(init="gaussian"), "AdaLoRA's score": dict(importance="triplet"),
            "score per parameter": dict(importance="per parameter"),
            "r' = 2": dict(start_rank=2), "longer look": dict(initial_phase=0.3)}
OTHERS = ["adalora", "adalora's places", "paper", "paper's places",
          *(f"layer {i}" for i in range(6))]


@functools.cache
def float32_by_onednn():
    """Let oneDNN make products of float32 matrices, which on AMD is faster than MKL. The setting's
    name misleads: this checks that the results are float32."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    x, W = torch.randn(448, 384), torch.randn(384, 1536)
    exact = x.double() @ W.double()
    if torch.dist(x @ W, exact) > 1e-6 * exact.norm():  # bfloat16 has 2e-3
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@functools.lru_cache(maxsize=4)
def examples(task, split):
    """Return examples: "train", "held out" (a tenth of the train set), "the rest" of it, "dev"."""
    bpe = data.BPE(report.MINILM)
    found = data.load_task(task, report.GLUE, "dev" if split == "dev" else "train", bpe, 64)
    rows = np.random.default_rng(0).permutation(len(found))
    tenth = min(len(found) // 10, 1000)
    if split == "held out":
        found = [found[i] for i in rows[:tenth]]
    elif split == "the rest":
        found = [found[i] for i in rows[tenth:]]
    longest = LENGTHS.get(task, (64, 64))[split in ("held out", "dev")]
    return [example for example in found if len(example.ids) <= longest]


def costs_of(model):
    """Return what a component of each matrix of the encoder stores, d_in + d_out, by name."""
    return {name: sum(m.weight.shape) for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".layer." in name}


def source_of(run):
    """Return the run that finds the places of this one, or the run itself."""
    if run["arm"] == "short search":
        return {**run, "arm": "dora", "steps": SEARCH}
    return {**run, "arm": run["arm"].removesuffix("'s places")}


def places(run, costs):
    """Return the number of components of each matrix, for an arm whose places are fixed."""
    source = source_of(run)
    if source != run:
        return dict(zip(costs, report.finished(LOG)[report.key_of(source)]["ranks"]))
    kind, which = run["arm"].split()
    if kind == "layer":
        return {name: 1 for name in costs if f".layer.{which}." in name}

    rng = torch.Generator().manual_seed(1000 * run["seed"] + int(which))
    scores, limit = torch.rand(len(costs), generator=rng), run["budget"] * 1152
    mask = keep_mask(scores, torch.tensor([*costs.values()]), limit)
    return dict(zip(costs, mask.long().tolist()))


def per_parameter(layers):
    """Return the sensitivity of each component, (n,), by what it stores."""
    costs = torch.tensor([sum(layer.base.weight.shape) for layer in layers for _ in layer.c])
    return sensitivity(layers) / costs


IMPORTANCE["per parameter"] = per_parameter, "gradients", torch.cat


def method(run):
    """Return the settings of an arm that finds its places, at the scale that all arms have."""
    settings = {**METHODS.get(run["arm"], {}), **VARIANTS.get(run["arm"], {}),
                "budget_unit": "parameters", "dropout_on": "components",
                "rank": run["budget"] / 36, "dropout": DROPOUT}
    config = DoRAConfig(**settings)
    divisor = max(1.0, config.rank) if config.scale == "rank" else config.r_prime
    return DoRAConfig(**settings, alpha=SCALE * divisor)


def make(run):
    """Train one arm with one seed and return its score, its places and its predictions."""
    float32_by_onednn()
    task, seed = data.TASKS[run["task"]], run["seed"]
    dev = examples(run["task"], run["split"])
    train = examples(run["task"], "train" if run["split"] == "dev" else "the rest")

    torch.manual_seed(seed)
    model = train_glue.load_roberta(report.MINILM, task.num_labels)
    model.roberta.to(torch.bfloat16 if run["dtype"] == "bf16" else torch.float32)
    costs, pruner = costs_of(model), None
    if run["arm"] in {**METHODS, **VARIANTS}:
        config = method(run)
        pruner = Pruner(inject(model, config), config, run["steps"])
    else:
        ranks = places(run, costs)
        report.place(model, ranks, SCALE, DROPOUT)
    model.classifier.requires_grad_(True)

    stream, curve = data.endless_batches(train, BATCH, seed), []

    def loss_of():
        batch = next(stream)
        return train_glue.task_loss(model(batch.ids, batch.mask), batch.labels)

    def after(step):
        if step % STEPS == 0 or step == run["steps"]:
            predictions = train_glue.predict(model, dev)
            scores = data.score(task, predictions, [example.label for example in dev])
            curve.append((step, round(scores[task.metrics[0]], 5), packed(predictions, task)))

    torch.manual_seed(seed)  # of dropout
    report.fit(model, loss_of, run["steps"], run["lr"], pruner, after)
    if pruner:
        ranks = pruner.ranks()
    kept = [ranks.get(name, 0) for name in costs]
    stored = sum(rank * price for rank, price in zip(kept, costs.values()))
    *_, (_, score, predictions) = curve
    return dict(score=score, curve=[point[:2] for point in curve], ranks=kept,
                parameters=stored, dev=predictions)


def packed(predictions, task):
    """Return predictions in base64: 16-bit thousandths of a regression, or a bit for each class."""
    values = (1000 * predictions).round().astype("<u2")
    if task.num_labels > 1:
        values = np.packbits(predictions.astype(bool))
    return base64.b64encode(values.tobytes()).decode()


# ---- the order of the runs -----------------------------------------------------------------------


def to_do():
    """Yield the runs in their order. Those that need the result of another one follow it."""
    yield from block("stsb", (6,), [*MAIN, *MORE])
    yield from block("stsb", (6,), [*MAIN, *MORE], FRESH, factor=0.5)
    yield from block("stsb", (6,), MAIN, factor=0.5, steps=1200)
    yield from block("stsb", (6,), OTHERS)
    # the rate, chosen at 6, makes some runs collapse at 18: so all budgets at half of it, too
    yield from block("stsb", (3, 6, 18, 12, 36), MAIN, factor=0.5)
    yield from block("stsb", (18,), MAIN)
    yield from block("mrpc", (6,), MAIN)
    yield from block("mrpc", (6,), MAIN, factor=0.5)
    yield from ways_to_find()
    for task, factor in itertools.product(("cola", "rte", "sst2"), (1, 0.5)):
        yield from block(task, (6,), MAIN, factor=factor)
    yield from block("stsb", (6,), [*MAIN, *MORE], (4, 5))
    yield from block("stsb", (6,), MORE, factor=0.5)
    yield from block("stsb", (6,), MAIN, (1,), dtype="float32")
    yield from block("stsb", (6,), MAIN, steps=1200)
    for task, budget in itertools.product(TITLES, (6, 18)):
        yield from block(task, (budget,), MAIN)


def ways_to_find():
    """Yield the runs that compare ways to find places, on the held-out tenth of STS-B."""
    shared = dict(budgets=(6,), split="held out")
    for seed in LOOK:
        yield from block("stsb", arms=MAIN, seeds=(seed,), **shared)
        for arm in VARIANTS:
            yield from block("stsb", arms=(arm, f"{arm}'s places"), seeds=(seed,), **shared)
        yield from block("stsb", arms=("dora",), seeds=(seed,), steps=SEARCH, **shared)
        rest = STEPS - SEARCH
        yield from block("stsb", arms=("short search",), seeds=(seed,), steps=rest, **shared)


def block(task, budgets, arms, seeds=(1, 2, 3), factor=1.0, steps=STEPS, dtype="bf16",
          split="dev"):
    """Yield the runs of some arms, and before them those that choose the task's rate."""
    if (rate := rate_of(task)) is None:
        yield from itertools.chain(*trials(task).values())
        return

    known = report.finished(LOG)
    for budget, seed, arm in itertools.product(budgets, seeds, arms):
        run = dict(task=task, split=split, steps=steps, budget=budget, seed=seed, arm=arm,
                   lr=factor * rate, dtype=dtype)
        source = source_of(run)
        if source == run or report.key_of(source) in known:
            yield run


def trials(task):
    """Return by rate the runs that choose a task's rate. Where the best rate is the lowest or the
    highest, the next one is tried, too."""
    cell = dict(task=task, split="held out", steps=STEPS, budget=6, arm=FIRST[0], dtype="bf16")
    rates = list(RATES)
    while True:
        runs = {lr: [{**cell, "seed": seed, "lr": lr} for seed in TRIED] for lr in rates}
        means = report.mean_by_rate(LOG, runs, "score")
        best = max(means, key=means.__getitem__, default=0)
        if best == 0 or min(rates) < best < max(rates) or len(rates) == 8:
            return runs
        rates.append(best / 2 if best == min(rates) else best * 2)


def rate_of(task):
    """Return the rate that was chosen for a task, None until it is known."""
    means = report.mean_by_rate(LOG, trials(task), "score")
    return max(means, key=means.__getitem__, default=None)


# ---- report --------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What the scores that are compared with each other have in common."""

    task: str
    steps: int
    lr: float
    dtype: str
    budget: int
    fresh: bool  # the seeds that were fixed to test what was seen at half the rate
    after: int  # steps, of which a long run is scored several times

    def __str__(self):
        words = f"{TITLES[self.task]}, {self.budget} components, "
        words += f"after {self.after} of " * (self.after < self.steps)
        return (f"{words}{self.steps} steps, rate {self.lr:g}" + ", seeds 4 to 8" * self.fresh
                + f", {self.dtype}" * (self.dtype != "bf16"))


def settings():
    """Return by setting the scores of each seed by arm, {setting: [{arm: score}]}, of the seeds for
    which dora's places and four random ones are there."""
    found = {}
    for line in report.read_log(LOG):
        if line["split"] == "held out":
            continue

        shared = (line[name] for name in ("task", "steps", "lr", "dtype", "budget"))
        fresh = line["seed"] in FRESH and line["lr"] != rate_of(line["task"])
        common = Setting(*shared, fresh, 0)
        for step, score in line["curve"]:
            seeds = found.setdefault(common._replace(after=step), {})
            seeds.setdefault(line["seed"], {})[line["arm"]] = score

    whole = {}
    for setting in sorted(found, key=lambda setting: ([*TITLES].index(setting.task), setting)):
        seeds = [arms for _, arms in sorted(found[setting].items()) if {PLACES, *FIRST} <= {*arms}]
        if seeds:
            whole[setting] = seeds
    return whole


def randoms(arms):
    """Return the scores of the random placements of a seed."""
    return [score for arm, score in arms.items() if arm.startswith("random ")]


def beaten(seeds, arm):
    """Return by seed how many random placements an arm beats, where a tie counts half, and how many
    there are."""
    found = []
    for arms in seeds:
        others, own = randoms(arms), arms[arm]
        count = sum((score < own) + (score == own) / 2 for score in others)
        found.append((count, len(others)))
    return found


def percentile(seeds, arm):
    """Return the mean over the seeds of the share of random placements that an arm beats."""
    return f"{100 * statistics.mean(count / of for count, of in beaten(seeds, arm)):.0f} %"


def chance(counts):
    """Return the probability that random places beat at least as many: with k others each number
    from 0 to k is equally likely."""
    sums = np.ones(1)
    for _, of in counts:
        sums = np.convolve(sums, np.full(of + 1, 1 / (of + 1)))
    return float(sums[int(sum(count for count, _ in counts)):].sum())


def write_report():
    """Write places.md and places.svg from the log."""
    lines, found = report.read_log(LOG), settings()
    hours = sum(line["seconds"] for line in lines) / 3600
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    head = ["setting", "seeds x random places", "best - worst", "their median", "dora", PLACES,
            f"percentile of {PLACES}", "p", "of dora"]
    parts = [
        "# Places on text",
        f"Written by `python benchmarks/places.py` from {len(lines)} runs, whose protocol is in "
        f"[README.md](../README.md): {hours:.1f} hours of one core (commits {commits}; but for "
        "61ffb71 with dora.py of af50a13, which computes the same). Scores are medians over the "
        f"seeds, p is one-sided, wide is {WIDE} or more. Seeds 4 to 8 "
        "at half the rate are a test that was fixed before they were run.",
        report.table(head, [row(setting, seeds) for setting, seeds in found.items()]),
        *(others_table(setting, seeds) for setting, seeds in found.items()
          if any({*arms} & {*OTHERS} for arms in seeds)),
        "The mean score of random places on a held-out tenth chose the rate of a task:",
        report.table(["task", "rate: score"], [
            [TITLES[task], ", ".join(f"{lr:g}: {mean:.3f}" for lr, mean in means.items())]
            for task in TITLES if (means := report.mean_by_rate(LOG, trials(task), "score"))])]
    (report.RESULTS / "places.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    plot(found)


def row(setting, seeds):
    """Return a row of the table."""
    strips = [randoms(arms) for arms in seeds]
    sizes = sorted({len(strip) for strip in strips})
    every = [*itertools.chain(*strips)]
    wide = statistics.median(max(strip) - min(strip) for strip in strips)
    lost = sum(score < 0.5 for score in every)
    return [
        str(setting), f"{len(seeds)} x {' or '.join(map(str, sizes))}",
        f"{wide:.3f}" + ", wide" * (wide >= WIDE) + f", {lost} below .5" * bool(lost),
        f"{statistics.median(every):.3f}",
        f"{statistics.median(arms['dora'] for arms in seeds):.3f}",
        f"{statistics.median(arms[PLACES] for arms in seeds):.3f}",
        percentile(seeds, PLACES), f"{chance(beaten(seeds, PLACES)):.3f}",
        percentile(seeds, "dora")]


def others_table(setting, seeds):
    """Return the other arms of a setting beside dora's and random places."""
    every = [*itertools.chain(*map(randoms, seeds))]
    body = [["random places", report.spread(every, 3), "", ""]]
    for arm in ("dora", PLACES, *OTHERS):
        own = [arms for arms in seeds if arm in arms]
        if own:
            body.append([arm, report.spread([arms[arm] for arms in own], 3), percentile(own, arm),
                         f"{chance(beaten(own, arm)):.3f}"])
    return report.table([f"arms: {setting}", "median (range, number)", "percentile", "p"], body)


def plot(found):
    """Draw random places over the budget, a panel per task and rate, or for long runs over the
    steps, with a line through dora's."""
    panels = {}
    for setting, seeds in found.items():
        title, label = f"{TITLES[setting.task]}, rate {setting.lr:g}", str(setting.budget)
        if setting.steps > STEPS:
            title, label = f"{title}, {label} components", str(setting.after)
        else:
            title += f", {setting.steps} steps"
        label += "\nfresh\nseeds" * setting.fresh + f"\n{setting.dtype}" * (
            setting.dtype != "bf16")
        panels.setdefault(title, {})[label] = seeds

    columns = min(len(panels), 3 if len(panels) % 2 else 2)
    rows = math.ceil(len(panels) / columns)
    figure = report.figure(8, 0.4 + 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (title, strips) in zip(axes, panels.items()):
        draw(ax, strips)
        long = title.endswith("components")
        ax.set(title=title, xlabel="steps of 1,200" if long else "components in all")
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("score on dev")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)
    report.save_figure(figure, report.RESULTS / "places.svg")


def draw(ax, strips):
    """Draw strips, seed beside seed, and above each the percentile of dora's places. Scores that
    are lower than the axis are triangles on its floor."""
    orange, grey = report.COLORS["dora"], "#999999"
    top = max(max(arms[PLACES], *randoms(arms)) for seeds in strips.values() for arms in seeds)
    floor = top - 0.15
    for x, seeds in enumerate(strips.values()):
        for i, arms in enumerate(seeds):
            at = x + 0.14 * (i - (len(seeds) - 1) / 2)
            dots = ((randoms(arms), "o", grey), ([arms[PLACES]], "D", orange))
            for scores, marker, color in dots:
                for score in scores:
                    shown = marker if score >= floor else "v"
                    ax.plot(at, max(score, floor), shown, color=color, ms=4, mew=0)
        ax.text(x, top + 0.012, percentile(seeds, PLACES), color=orange, ha="center")
    middles = [statistics.median(arms[PLACES] for arms in seeds) for seeds in strips.values()]
    ax.plot(range(len(strips)), middles, color=orange, lw=1.2, label="their median")
    for marker, size, color, label in (
            ("D", 4, orange, "dora's places, a dot per seed"), ("o", 4, grey, "random places"),
            ("v", 4, grey, "below the axis"),
            (r"$\%$", 7, orange, "share of the random places that they beat")):
        ax.plot([], [], ls="", marker=marker, color=color, ms=size, mew=0, label=label)
    ax.set_xticks(range(len(strips)), list(strips))
    ax.set(xlim=(-0.6, max(4, len(strips)) - 0.4), ylim=(floor - 0.01, top + 0.03))


def short():
    """Check the test, the random placements, and a few steps of two arms."""
    assert round(1 / chance([(8, 8)] * 3)) == 9**3
    assert round(chance([(0, 8)]), 9) == 1
    others = {f"random {i}": score for i, score in enumerate((0.4, 0.5, 0.6, 0.7))}
    assert beaten([{"dora": 0.5, **others}], "dora") == [(1.5, 4)]
    if not report.GLUE.exists():
        return print(f"places.py: {report.GLUE} does not exist, so no arm was trained")

    costs = costs_of(train_glue.load_roberta(report.MINILM, 1))
    assert len(costs) == 36 and sum(costs.values()) == 36 * 1152
    run = dict(task="stsb", split="dev", steps=40, seed=1, arm="random 3", lr=4e-3,
               dtype="bf16")
    for budget in (3, 6, 18):
        ranks = places({**run, "budget": budget}, costs)
        left = budget * 1152 - sum(costs[name] * rank for name, rank in ranks.items())
        assert 0 <= left < 768, (budget, left)  # nothing else would have fit
    for arm in ("dora", "random 3"):
        found = make({**run, "budget": 6, "arm": arm})
        print(f"{arm}: {found['score']:.3f}, {found['parameters']:,} parameters")
        assert 0 < found["parameters"] <= 6 * 1152


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, make, write_report, short)
