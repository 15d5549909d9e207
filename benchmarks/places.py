"""Does it matter where a few components are, and does dora put them into good places? On text.

    python benchmarks/places.py    # all runs that are missing, in the order of to_do()

The protocol, which was fixed before the runs, is in README.md.
"""

import base64
import collections
import functools
import itertools
import re
import statistics
from typing import NamedTuple

import numpy as np
import report
import torch
from torch import nn

import data
import train_glue
from dora import METHODS, DoRAConfig, Pruner, inject

LOG = report.RESULTS / "places.jsonl"
SCALE, DROPOUT = 8.0, 0.1
BATCH, STEPS = 16, 300
RATES, TRIED = (1e-3, 2e-3, 4e-3, 8e-3), (101, 102, 103)
BUDGETS = (3, 6, 12, 18, 36)  # components of STS-B
SPLITS = {  # what runs train on, and what they are scored on
    "dev": ("train", "dev"),
    "held out": ("the rest", "held out"),
    "shuffled": ("shuffled", "dev"),
    "all lengths": ("every train", "every dev"),
}
LENGTHS = {"stsb": (28, 40), "mrpc": (48, 64)}  # tokens, at most: of the train set, of dev
TITLES = {"stsb": "STS-B", "mrpc": "MRPC", "sst2": "SST-2", "cola": "CoLA", "rte": "RTE"}
WIDE = 0.03
PLACES = "dora's places"
RANDOM = [f"random {i}" for i in range(8)]
FIRST = RANDOM[:4]
MAIN = ["dora", PLACES, *FIRST]
ALL = ["dora", PLACES, *RANDOM]
FRESH = range(4, 9)
# arms that are confined to one layer or to one kind of matrix
PARTS = [f"layer {i}" for i in range(6)]
PARTS += "query", "key", "value", "attention output", "intermediate", "output"
RIVALS = ["adalora", "adalora's places", "paper", "paper's places", "query|value"]


@functools.lru_cache(maxsize=4)
def examples(task, split):
    """Return examples: "train", "held out" (a tenth of the train set), "the rest" of it, "dev", the
    train set with its labels "shuffled", or those of "every train" or "every dev" length."""
    bpe = data.BPE(report.MINILM)
    file = "dev" if split.endswith("dev") else "train"
    longest = LENGTHS.get(task, (64, 64))[split in ("held out", "dev")]
    if split.startswith("every"):
        longest = 128
    found = data.load_task(task, report.GLUE, file, bpe, max(64, longest))
    rows = np.random.default_rng(0).permutation(len(found))
    if split == "shuffled":
        labels = [found[i].label for i in rows]
        found = [here._replace(label=label) for here, label in zip(found, labels)]
    tenth = min(len(found) // 10, 1000)
    parts = {"held out": rows[:tenth], "the rest": rows[tenth:]}
    chosen = [found[i] for i in parts.get(split, range(len(found)))]
    return [example for example in chosen if len(example.ids) <= longest]


def costs_of(model):
    """Return what a component of each matrix of the encoder stores, d_in + d_out, by name."""
    return {name: sum(m.weight.shape) for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and ".layer." in name}


def source_of(run):
    """Return the run that finds the places of this one, or the run itself."""
    if found := re.fullmatch(r"places of dora at (.*)", run["arm"]):
        return dict(run, arm="dora", lr=float(found[1]))
    return dict(run, arm=run["arm"].removesuffix("'s places"))


def places(run, costs):
    """Return the number of components of each matrix, for an arm whose places are fixed."""
    source = source_of(run)
    if source != run:
        found = report.finished(LOG)[report.key_of(source)]
        return dict(zip(costs, found["ranks"]))
    seed = 1000 * run["seed"]
    part = run["arm"].replace(" ", ".")
    if run["arm"] in RANDOM:  # in the whole encoder
        seed += RANDOM.index(run["arm"])
        part = ""
    pattern = rf"(encoder|self|\d)\.({part})"
    inside = {name: cost for name, cost in costs.items() if re.search(pattern, name)}
    starts = DoRAConfig(rank=run["budget"] / 36).r_prime  # as dora
    return report.random_ranks(inside, run["budget"] * 1152, seed, starts)


def method(run):
    """Return the settings of an arm that finds its places, at the scale that all arms have."""
    settings = METHODS[run["arm"]] | dict(budget_unit="parameters", dropout_on="components",
                                          rank=run["budget"] / 36, dropout=DROPOUT)
    config = DoRAConfig(**settings)
    divisor = max(1.0, config.rank) if config.scale == "rank" else config.r_prime
    return DoRAConfig(**settings, alpha=SCALE * divisor)


def make(run):
    """Train one arm with one seed and return its score, its places and its predictions."""
    if train_glue.onednn_is_faster(1):
        train_glue.ONEDNN.matmul.fp32_precision = "bf16"
    task, seed = data.TASKS[run["task"]], run["seed"]
    train, dev = (examples(run["task"], part) for part in SPLITS[run["split"]])

    torch.manual_seed(seed)
    model = train_glue.load_roberta(report.MINILM, task.num_labels)
    if run["dtype"] == "bf16":
        model.roberta.to(torch.bfloat16)
    costs, pruner = costs_of(model), None
    if run["arm"] in METHODS:
        config = method(run)
        pruner = Pruner(inject(model, config), config, run["steps"])
    else:
        ranks = places(run, costs)
        report.place(model, ranks, SCALE, DROPOUT)
    model.classifier.requires_grad_(True)

    stream, found = data.endless_batches(train, BATCH, seed), dict(curve=[])

    def loss_of():
        batch = next(stream)
        return train_glue.task_loss(model(batch.ids, batch.mask), batch.labels)

    def after(step):
        if step % STEPS == 0 or step == run["steps"]:
            predictions = train_glue.predict(model, dev)
            scores = data.score(task, predictions, [example.label for example in dev])
            found.update(score=round(scores[task.metrics[0]], 5), dev=packed(predictions, task))
            found["curve"].append((step, found["score"]))

    torch.manual_seed(seed)  # of dropout
    report.fit(model, loss_of, run["steps"], run["lr"], pruner, after)
    if pruner:
        ranks = pruner.ranks()
    kept = [ranks.get(name, 0) for name in costs]
    stored = sum(rank * price for rank, price in zip(kept, costs.values()))
    return dict(found, ranks=kept, parameters=stored)


def packed(predictions, task):
    """Return predictions in base64: 16-bit thousandths of a regression, or a bit for each class."""
    values = (1000 * predictions).round().astype("<u2")
    if task.num_labels > 1:
        values = np.packbits(predictions.astype(bool))
    return base64.b64encode(values.tobytes()).decode()


# ---- the order of the runs -----------------------------------------------------------------------


def to_do():
    """Yield the runs in their order. Those that need the result of another one follow it."""
    yield from block("stsb", (6,), [*ALL, *RIVALS, *PARTS])
    yield from block("stsb", (6,), ALL, FRESH, factor=0.5)
    yield from block("stsb", (3,), MAIN, FRESH, factor=0.5)
    yield from block("stsb", (6,), ["dora"], range(1, 9), factor=0.5, split="shuffled")
    yield from block("stsb", (6, 3), MAIN, factor=0.5, steps=1200)
    whole = dict(factor=0.5, steps=1440, split="all lengths")  # four epochs
    yield from block("stsb", (6, 3, 18), MAIN, **whole)
    yield from block("stsb", (6,), ["layer 0", "layer 2", "layer 5"], **whole)
    # the rate, chosen at 6, makes some runs collapse at 18: so half of it, too
    for factor in (0.5, 1.0):
        yield from block("stsb", BUDGETS, MAIN, factor=factor)
    yield from block("stsb", (6, 3), ALL, (4, 5))
    yield from block("stsb", (6,), MAIN, factor=2.0)
    for budget in BUDGETS:
        yield from itertools.chain(*trials("stsb", budget, "float32").values())
    as_planned = dict(seeds=range(1, 6), dtype="float32")
    yield from block("stsb", BUDGETS, [*ALL, *RIVALS], factor=0.5, **as_planned)
    yield from block("stsb", BUDGETS, ALL, **as_planned)
    # where does the rate matter: while dora looks for places, or while LoRA trains in them?
    for factor, arm in (1.0, "places of dora at 0.002"), (0.5, "places of dora at 0.004"):
        yield from block("stsb", BUDGETS, [arm], factor=factor, **as_planned)
    for task in ("sst2", "mrpc", "cola", "rte"):  # 300 steps teach nothing on the last two
        for factor, arms in (1.0, ALL), (0.5, MAIN):
            yield from block(task, (6,), arms, factor=factor)
            yield from block(task, (18,), arms, factor=factor, rated=(18, "float32"))


def block(task, budgets, arms, seeds=(1, 2, 3), *,
          factor=1.0, rated=(6, "bf16"), **changes):
    """Yield the runs of some arms, and before them those that choose the rate: rated says where."""
    if (rate := rate_of(task, *rated)) is None:
        yield from itertools.chain(*trials(task, *rated).values())
        return

    known = report.finished(LOG)
    shared = dict(task=task, split="dev", steps=STEPS, lr=factor * rate, dtype=rated[1])
    for budget, seed, arm in itertools.product(budgets, seeds, arms):
        run = dict(shared | changes, budget=budget, seed=seed, arm=arm)
        source = source_of(run)
        if source == run or report.key_of(source) in known:
            yield run


def trials(task, budget=6, dtype="bf16"):
    """Return by rate the runs that choose a task's rate. Where the best rate is the lowest or the
    highest, the next one is tried, too."""
    cell = dict(task=task, budget=budget, arm=FIRST[0],
                split="held out", steps=STEPS, dtype=dtype)
    rates = list(RATES)
    while True:
        runs = report.by_rate(cell, TRIED, rates)
        means = report.mean_by_rate(LOG, runs, "score")
        best = max(means, key=means.__getitem__, default=0)
        if best == 0 or min(rates) < best < max(rates) or len(rates) == 8:
            return runs
        rates.append(best / 2 if best == min(rates) else best * 2)


def means_of(*of):
    """Return the mean score of random places by rate, {} until all runs that choose are made."""
    return report.mean_by_rate(LOG, trials(*of), "score")


def rate_of(*of):
    """Return the rate that trials(*of) chose, None until it is known."""
    means = means_of(*of)
    return max(means, key=means.__getitem__, default=None)


# ---- report --------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What the scores that are compared with each other have in common."""

    task: str
    steps: int
    split: str
    lr: float
    budget: int
    dtype: str
    fresh: bool  # the seeds that were fixed to test what was seen at half the rate
    after: int  # steps, of which a long run is scored several times

    def __str__(self):
        after = f"after {self.after} of " * (self.after < self.steps)
        words = [
            TITLES[self.task],
            f"{self.budget} components",
            f"{after}{self.steps} steps",
            self.split, f"rate {self.lr:g}", self.dtype,
            "seeds 4 to 8" * self.fresh,
        ]
        return ", ".join(word for word in words if word not in ("", "dev", "bf16"))


def settings():
    """Return by setting the scores of each seed by arm, {setting: [{arm: score}]}, where three
    seeds or more have dora's places and four random ones."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for line in report.lines_of(LOG):
        shared = [line[name] for name in Setting._fields[:6]]
        fresh = line["seed"] in FRESH and line["dtype"] == "bf16"
        fresh = fresh and line["lr"] != rate_of(line["task"])  # asked seldom: it takes long
        for step, score in line["curve"]:
            seeds = found[Setting(*shared, fresh, step)]
            seeds[line["seed"]][line["arm"]] = score

    chosen = {}
    for setting in sorted(found, key=lambda setting: ([*TITLES].index(setting.task), setting)):
        seeds = [arms for arms in found[setting].values() if {PLACES, *FIRST} <= arms.keys()]
        if len(seeds) >= 3:
            chosen[setting] = seeds
    return chosen


def randoms(arms):
    """Return the scores of the random placements of a seed."""
    return [score for arm, score in arms.items() if arm in RANDOM]


def middle(seeds, arm):
    """Return the median score of an arm."""
    return statistics.median(arms[arm] for arms in seeds)


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
    won = int(sum(count for count, _ in counts))
    return float(sums[won:].sum())


def write_report():
    """Write places.md and places.svg from the log."""
    found = settings()
    head = ["setting", "seeds x random places", "spread", "median random",
            "dora", PLACES, "lead", f"percentile of {PLACES}", "p", "of dora"]
    rates = []
    for task, n, dtype in itertools.product(TITLES, BUDGETS, ("bf16", "float32")):
        means = means_of(task, n, dtype)
        scores = ", ".join(f"{lr:g}: {means[lr]:.3f}" for lr in sorted(means))
        if scores:
            rates.append([f"{TITLES[task]}, {n} components, {dtype}", scores])
    report.write_page("places", "Places on text", report.read_log(LOG), [
        "Scores, spread (best minus worst random placement) and lead (of dora's places over the "
        f"median one) are medians over the seeds. Wide is {WIDE} or more, and p is one-sided. "
        "Seeds 4 to 8 at half the rate are a test that was fixed before they were run. Those that "
        "are scored on the held-out tenth compare ways to find places and are no evidence. "
        "The frozen encoder is in bfloat16 unless a row says float32.",
        report.table(head, [*itertools.starmap(row, found.items())]),
        *(arms_table(f"arms: {setting}", seeds) for setting, seeds in found.items()
          if others_in(seeds) and setting.after == setting.steps),
        "The mean score of random places on a held-out tenth chose the rate of a task:",
        report.table(["setting", "rate: score"], rates)])
    plot({setting: seeds for setting, seeds in found.items() if drawn(setting)})


def row(setting, seeds):
    """Return a row of the table."""
    strips = [randoms(arms) for arms in seeds]
    sizes = sorted({len(strip) for strip in strips})
    wide = statistics.median(max(strip) - min(strip) for strip in strips)
    lead = statistics.median(arms[PLACES] - statistics.median(randoms(arms)) for arms in seeds)
    return [
        str(setting), f"{len(seeds)} x {' or '.join(map(str, sizes))}",
        f"{wide:.3f}" + ", wide" * (wide >= WIDE),
        f"{statistics.median(itertools.chain(*strips)):.3f}",
        f"{middle(seeds, 'dora'):.3f}",
        f"{middle(seeds, PLACES):.3f}",
        f"{lead:+.3f}",
        percentile(seeds, PLACES), f"{chance(beaten(seeds, PLACES)):.3f}",
        percentile(seeds, "dora"),
    ]


def others_in(seeds):
    """Return the arms besides dora, its places and random ones."""
    return [arm for arm in dict.fromkeys(itertools.chain(*seeds)) if arm not in ALL]


def arms_table(title, seeds):
    """Return other arms beside dora's and random places, and with how many seeds they are ahead of
    dora's places."""
    body = [["random places", report.spread(itertools.chain(*map(randoms, seeds)), 3), "", ""]]
    for arm in ("dora", PLACES, *others_in(seeds)):
        if own := [arms for arms in seeds if arm in arms]:
            ahead = sum(arms[arm] > arms[PLACES] for arms in own)
            scores = report.spread((arms[arm] for arms in own), 3)
            body.append([arm, scores, percentile(own, arm), f"{ahead} of {len(own)}"])
    head = [title, "median (range, number)", "percentile", f"ahead of {PLACES}"]
    return report.table(head, body)


def drawn(setting):
    """Return whether the figure has a setting. It leaves out those that only guess."""
    learns = setting.task != "rte" and setting.lr < 0.008
    if setting.split == "all lengths":
        return setting.budget < 18 and setting.after % 600 > 0  # every other point
    return learns and setting.split == "dev" and setting.steps == STEPS


def panel_of(setting):
    """Return the title of a setting's panel, what its strips differ in, and its own value."""
    task, rate = TITLES[setting.task], f"rate {setting.lr:g}"
    if setting.steps > STEPS:
        pairs = f"pairs of {setting.split}, {rate};\nsteps of {setting.steps:,}"
        return f"{task}, {setting.budget} components", pairs, str(setting.after)
    if setting.task == "stsb":
        value = str(setting.budget) + "\nfresh\nseeds" * setting.fresh
        return f"{task}, {rate}", f"components in all, {STEPS} steps", value
    return task, f"components, rate;\n{STEPS} steps", f"{setting.budget}\n{setting.lr:g}"


def plot(found):
    """Draw strips of random places with dora's in them: on STS-B over the budget, a panel per rate,
    and below it for long runs over the steps, and for other tasks over budget and rate."""
    rows = {}
    for setting, seeds in found.items():
        title, differ, value = panel_of(setting)
        panels = rows.setdefault("in all" in differ, {})
        panels.setdefault((setting.task, title, differ), {})[value] = seeds

    figure = report.figure(8, 0.6 + 2.7 * len(rows))
    parts = figure.subfigures(len(rows), squeeze=False).flat
    for part, panels in zip(parts, rows.values()):
        widths = [*map(len, panels.values())]
        axes = part.subplots(1, len(panels), width_ratios=widths, squeeze=False).flat
        for ax, words in zip(axes, panels):
            task, title, differ = words
            draw(ax, panels[words], "none" if "rate;" in differ else "-")
            metric = data.TASKS[task].metrics[0].title()
            ax.set(title=title, xlabel=differ, ylabel=f"{metric} on dev")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)
    report.save_figure(figure, report.RESULTS / "places.svg")


def draw(ax, strips, line):
    """Draw strips, seed beside seed, and above each the percentile of dora's places. Scores that
    are lower than the axis are triangles on its floor."""
    orange, grey = report.COLORS["dora"], "#999999"
    every = itertools.chain(*strips.values())
    top = max(max(arms[PLACES], *randoms(arms)) for arms in every)
    floor, dots = top - 0.15, collections.defaultdict(list)
    for x, seeds in enumerate(strips.values()):
        for i, arms in enumerate(seeds):
            at = x + 0.14 * (i - (len(seeds) - 1) / 2)
            for arm, score in arms.items():
                if arm in (PLACES, *RANDOM):
                    marker, color = ("D", orange) if arm == PLACES else ("o", grey)
                    shown = marker if score >= floor else "v"
                    dots[shown, color].append((at, max(score, floor)))
        ax.text(x, top + 0.012, percentile(seeds, PLACES), color=orange, ha="center")

    for (marker, color), points in sorted(dots.items(), reverse=True):  # dora's are on top
        ax.scatter(*zip(*points), 16, color, marker=marker, lw=0)
    middles = {x: middle(seeds, PLACES) for x, (value, seeds) in enumerate(strips.items())
               if "fresh" not in value}  # other seeds are no point of the line
    ax.plot(*zip(*middles.items()), color=orange, lw=1.2, ls=line, label="median of dora's places")
    for marker, size, color, label in (
            ("D", 4, orange, "dora's places, a dot per seed"),
            ("o", 4, grey, "random places"),
            ("v", 4, "black", "below the axis"),
            (r"$\%$", 7, orange, "share of the random places that they beat")):
        ax.scatter([], [], size**2, color, marker=marker, lw=0, label=label)
    ax.set_xticks(range(len(strips)), strips)
    ax.set_xlim(-0.6, len(strips) - 0.4)
    ax.set_ylim(floor - 0.01, top + 0.03)


def short():
    """Check the test, the random placements, and a few steps of two arms."""
    assert round(1 / chance([(8, 8)] * 3)) == 9**3
    others = dict(zip(FIRST, (0.4, 0.5, 0.6, 0.7)))
    assert beaten([{"dora": 0.5, **others}], "dora") == [(1.5, 4)]
    if not report.GLUE.exists():
        return print(f"places.py: {report.GLUE} does not exist, so no arm was trained")

    costs = costs_of(train_glue.load_roberta(report.MINILM, 1))
    assert len(costs) == 36 and sum(costs.values()) == 36 * 1152
    run = dict(task="stsb", split="dev", steps=40, budget=6, seed=1, lr=4e-3)
    for budget in BUDGETS:
        ranks = places(dict(run, budget=budget, arm=FIRST[3]), costs)
        spent = sum(costs[name] * rank for name, rank in ranks.items())
        assert 0 <= budget * 1152 - spent < 768, budget  # nothing else would have fit
    for arm, dtype in ("dora", "bf16"), ("random 3", "float32"):
        found = make(dict(run, arm=arm, dtype=dtype))
        print(f"{arm}: {found['score']:.3f}, {found['parameters']:,} parameters")
        assert 0 < found["parameters"] <= 6 * 1152


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, make, write_report, short)
