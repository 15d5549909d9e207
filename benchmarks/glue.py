"""The methods side by side on GLUE, score against stored parameters.

    python benchmarks/glue.py                      # all runs that are missing, then the tables
    python benchmarks/glue.py --only mrpc "dora 2" # runs with these values only
    python benchmarks/glue.py --report             # the tables from the runs that there are

In this order: learning rates on tenths of the train sets of STS-B and MRPC, held out. Both tasks,
three seeds, every row. Rates and runs on CoLA. Controls: is it the choice of the components, the
pruning, or neither? From LoRA to dora in steps. Ten seeds of four of these steps on MRPC.

A finished run is a line of results/budget_curve.jsonl, with its predictions on dev, and is never
repeated. A run that was stopped continues from its checkpoint. Several of these processes may run
at once, with one thread each: they take different runs. Everything is float32.
"""

import base64
import functools
import itertools
import math
import re
import statistics
import sys
import textwrap
from typing import Any, NamedTuple
from unittest import mock

import report
import numpy as np
import torch
from torch import nn

import data
import train_glue
from dora import DoRAConfig, Pruner, inject
from report import best_rate, next_rate

LOG = report.RESULTS / "budget_curve.jsonl"
CODE = 1  # raise it when a change of the program changes what these runs compute
EPOCHS = {"stsb": 4, "mrpc": 6, "cola": 5}
DEV = {"stsb": 1500, "mrpc": 408, "cola": 1043}  # examples
TENTH = {"stsb": 574, "mrpc": 366, "cola": 855}  # examples that held_out() holds out
SEEDS, TEN = (1, 2, 3), tuple(range(1, 11))
BOTH = ("stsb", "mrpc")
T_QUANTILE = {3: 4.303, 6: 2.571, 10: 2.262}  # Student's, 97.5 %, by the number of differences
# the middle of the first three rates on STS-B; others 2e-3. The other tasks start at half of it
START_LR = {"full": 1e-4, "lora 2": 4e-3, "lora qv 1": 4e-3, "adalora 2": 4e-3, "paper 2": 4e-3}


class FixedRanks(Pruner):
    """Leaves each layer of plain LoRA a given number of components, from the start: the gates of
    the others stay 0. With a seed the numbers are shuffled over the matrices of equal shape."""

    def __init__(self, layers, config, total_steps, ranks, shuffle=None):
        super().__init__(layers, config, total_steps)
        given = dict(zip(layers, ranks, strict=True))
        if shuffle is not None:
            rng = np.random.default_rng(shuffle)
            shapes = {name: tuple(layer.base.weight.shape) for name, layer in layers.items()}
            for shape in sorted(set(shapes.values())):
                names = [name for name in layers if shapes[name] == shape]
                for name, rank in zip(names, rng.permutation([given[name] for name in names])):
                    given[name] = int(rank)
        place = torch.arange(config.r_prime)
        self._set_mask(torch.cat([place < given[name] for name in layers]))
        with torch.no_grad():
            self._close_gates()


class Row(NamedTuple):
    """A row of a table: how it trains, and where its learning rate and its places come from."""

    method: str
    settings: dict[str, Any]
    rate: str  # the row whose learning rate it takes
    places: str = ""  # the dora row whose ranks it has from the start
    shuffled: bool = False


ROWS = {
    **{f"dora {r:g}": Row("dora", dict(rank=r), "dora 0.5" if r < 1 else "dora 2")
       for r in (0.25, 0.5, 1.0, 2.0, 4.0)},
    **{f"lora {r:g}": Row("lora", dict(rank=r), "lora 2") for r in (1.0, 2.0, 4.0)},
    **{f"lora qv {r:g}": Row("lora", dict(rank=r, targets=("query", "value")), "lora qv 1")
       for r in (1.0, 4.0)},
    **{f"adalora {r:g}": Row("adalora", dict(rank=r), "adalora 2") for r in (1.0, 2.0)},
    "paper 2": Row("paper", dict(rank=2.0), "paper 2"),
    **{method: Row(method, {}, method) for method in ("full", "bitfit", "head")},
}
TUNED = tuple(dict.fromkeys(row.rate for row in ROWS.values()))
# rows of about the same number of parameters (full fine-tuning apart), whose seeds are compared
PAIRS = (
    ("dora 0.25", "lora qv 1"), ("dora 1", "lora qv 4"),
    ("dora 1", "lora 1"), ("dora 2", "lora 2"), ("dora 4", "lora 4"),
    ("dora 1", "adalora 1"), ("dora 2", "adalora 2"),
    ("dora 2", "paper 2"), ("dora 0.5", "bitfit"), ("dora 2", "full"),
)
ON_COLA = ("dora 0.5", "dora 1", "dora 2", "lora 1", "lora 2", "bitfit", "full")

SAME = "same ranks, fixed from the start"
SHUFFLED = "same ranks, shuffled over matrices of one shape"
CONTROLS = {
    **{f"{name}, {rank:g}": Row("lora", dict(rank=rank), "lora 2", places=f"dora {rank:g}",
                                shuffled=name == SHUFFLED)
       for rank in (0.5, 2.0) for name in (SAME, SHUFFLED)},
    **{f"r' = {r}, 0.5": Row("dora", dict(rank=0.5, start_rank=r), "dora 0.5") for r in (2, 4)},
}
MEASURED = "chosen by the measured cost of removal"
EVERY_50 = "the default's score, pruned every 50 steps"
RECORDED = {  # made at commit af50a13, which has their code: they are reported, not made again
    f"{MEASURED}, 0.5": Row("dora", {}, "dora 0.5"),
    f"{EVERY_50}, 0.5": Row("dora", {}, "dora 0.5"),
    f"{MEASURED}, 2": Row("dora", {}, "dora 2"),
}
CONTROL_PAIRS = (
    *((name, f"dora {name.rsplit(', ')[-1]}") for name in (*CONTROLS, *RECORDED)),
    (f"{SAME}, 0.5", f"{SHUFFLED}, 0.5"), (f"{SAME}, 2", f"{SHUFFLED}, 2"),
    (f"{SAME}, 2", "lora 2"), (f"{SHUFFLED}, 2", "lora 2"),
)
AT_RATE, UNPRUNED = "lora 2 at dora's rate", "dora 2, nothing pruned"
NO_DROPOUT, ON_AX = f"{AT_RATE}, no dropout", f"{AT_RATE}, dropout on A x"
STEPS = {name: Row("lora", dict(rank=2.0, **more), "dora 2") for name, more in (
    (AT_RATE, {}), (f"{AT_RATE}, with gates", dict(gate=True)), (NO_DROPOUT, dict(dropout=0.0)),
    (ON_AX, dict(dropout_on="components")),
    (UNPRUNED, dict(gate=True, dropout_on="components")))}  # dora with nothing pruned
STEP_PAIRS = (
    (AT_RATE, "lora 2"), *((row, AT_RATE) for row in STEPS if row != AT_RATE),
    (ON_AX, NO_DROPOUT), ("dora 2", ON_AX), ("dora 2", UNPRUNED), (UNPRUNED, "lora 2"),
)
FOUR = (AT_RATE, NO_DROPOUT, ON_AX, "dora 2")  # ten seeds each on MRPC
ALL = {**ROWS, **CONTROLS, **RECORDED, **STEPS}


def run(c):
    """Make a run. Return its line of the log."""
    row, out = ALL[c["row"]], report.RUNS / "budget-curve" / report.key_of(c)
    settings, ranks = row.settings, []
    if row.places:  # plain LoRA of the highest rank, of which FixedRanks leaves a part
        ranks = next(line["ranks"] for line in on(row.places, c["task"])
                     if line["seed"] == c["seed"])
        top = float(max(ranks))
        settings = dict(rank=top, alpha=8.0 * top / max(1, settings["rank"]))
    config = train_glue.make_config(
        c["task"], row.method, seed=c["seed"], lr=c["lr"], epochs=EPOCHS[c["task"]], batch_size=32,
        data_dir=str(held_out() if c["split"] == "held out" else report.GLUE),
        model_dir=str(report.MINILM), out=str(out), save_every=100,
        resume=any(out.glob("checkpoints/*.pt")), **settings)

    pruner = functools.partial(FixedRanks, ranks=ranks, shuffle=c["seed"] if row.shuffled else None)
    with mock.patch.multiple(train_glue, Pruner=pruner if ranks else Pruner, **watching(out)):
        try:
            result = train_glue.train(config)
        except train_glue.Interrupted as stop:
            sys.exit(f"glue.py: {stop.args[0]}; the same command continues")

    metric = data.TASKS[c["task"]].metrics[0]
    best = result["best"][metric]
    predictions = [line["predictions"] for line in report.read_log(out / "predictions.jsonl")
                   if line["score"] == best]
    return {
        "metric": metric, "best": best, "last": result["last"][metric],
        "epochs": [epoch[metric] for epoch in result["epochs"]],
        "collapsed": result.get("collapsed"), "head": result["head_parameters"],
        "adapter": result["adapter_parameters_after_pruning"],
        "trainable": result["trainable_parameters"], "seconds": result["seconds"],
        "ranks": list(result["ranks"].values()), "predictions": predictions[-1]}


def watching(out):
    """Return two functions of train_glue that write the predictions of each evaluation of a run
    into its folder, beside the score that they have."""
    choose, evaluate = train_glue.choose, train_glue.evaluate
    latest = []

    def choosing(logits):
        latest[:] = [choose(logits)]
        return latest[0]

    def evaluating(model, examples, task, *more):
        scores = evaluate(model, examples, task, *more)
        report.add_to_log(out / "predictions.jsonl", {
            "score": scores[task.metrics[0]], "predictions": packed(latest[0])})
        return scores

    return dict(choose=choosing, evaluate=evaluating)


def packed(predictions):
    """Return classes as digits, or scores in 0..1 as base64 of 16 bits each."""
    if (predictions == predictions.astype(int)).all():
        return "".join(map(str, predictions.astype(int)))
    numbers = (predictions * 65535).round().astype("<u2")
    return base64.b64encode(numbers.tobytes()).decode()


def held_out():
    """Return a data folder whose dev sets are tenths of the train sets of STS-B, MRPC and CoLA."""
    folder = report.RUNS / "held-out"
    for name, head in (("STS-B", 1), ("MRPC", 1), ("CoLA", 0)):  # CoLA has no header line
        lines = (report.GLUE / name / "train.tsv").read_text("utf-8").rstrip("\n").split("\n")
        rows = np.random.default_rng(0).permutation(len(lines) - head) + head
        tenth = len(rows) // 10
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("dev", rows[:tenth]), ("train", rows[tenth:])):
            chosen = [*lines[:head], *(lines[i] for i in sorted(part))]
            with data.atomic_file(folder / name / f"{split}.tsv") as file:
                file.write("".join(f"{line}\n" for line in chosen).encode())
    return folder


def tried_rates(row, task, score="best"):
    """Return the score on a task's held-out tenth by learning rate: that of the best epoch, which
    is also what the tables report. One seed chooses."""
    lines = report.lines_of(LOG, row=row, split="held out", task=task, seed=1)
    return {line["lr"]: line[score] for line in lines}


def middle_of(row, task):
    """Return the learning rate around which the search of a row on a task begins."""
    return START_LR.get(row, 2e-3) * (1.0 if task == "stsb" else 0.5)


def rate_of(row, task):
    """Return the learning rate that was chosen for a row; None if the choice is not finished."""
    source = ALL[row].rate
    return report.chosen_rate(tried_rates(source, task), middle_of(source, task))


def on(row, task):
    """Return the finished runs of a row on a task's dev set at its learning rate, by seed. Until
    every seed has been run there, these are the runs at the rate that an earlier rule chose, by the
    score of the last epoch."""
    found = report.lines_of(LOG, row=row, split="dev", task=task, lr=rate_of(row, task))
    tried = tried_rates(ALL[row].rate, task, "last")
    if len(found) < len(SEEDS) and tried:
        earlier = report.lines_of(LOG, row=row, split="dev", task=task, lr=best_rate(tried))
        found = max(found, earlier, key=len)
    return found


# ---- the order of the runs -----------------------------------------------------------------------


def to_do():
    """Yield the runs that can be made now, in their order; those that depend on others follow as
    soon as these are finished."""
    for task in BOTH:
        yield from rates(TUNED, task)
    yield from on_dev(ROWS, BOTH)
    yield from rates(dict.fromkeys(ROWS[row].rate for row in ON_COLA), "cola")
    yield from on_dev(ON_COLA, ("cola",))
    yield from on_dev(CONTROLS, BOTH)
    yield from on_dev(STEPS, BOTH[::-1])  # MRPC first: there dora leads by more
    yield from on_dev(FOUR, ("mrpc",), TEN)


def rates(rows, task):
    """Yield the next run of each row that looks for its learning rate."""
    for row in rows:
        if rate := next_rate(tried_rates(row, task), middle_of(row, task)):
            yield dict(code=CODE, row=row, split="held out", task=task, seed=1, lr=rate)


def on_dev(rows, tasks, seeds=SEEDS):
    """Yield the runs of the rows whose learning rate and places are known, seed by seed."""
    for task in tasks:
        for seed in seeds:
            for row in rows:
                places, rate = ALL[row].places, rate_of(row, task)
                known = not places or any(line["seed"] == seed for line in on(places, task))
                if rate is not None and known:
                    yield dict(code=CODE, row=row, split="dev", task=task, seed=seed, lr=rate)


def size(line):
    """Return the stored parameters of a run, without its head."""
    return line["adapter"] or line["trainable"] - line["head"]


def standard_error(task):
    """Return how uncertain one score is, since the dev set has so few examples: at the median of
    dora at rank 2, by the formula for a share or for a correlation (Matthews' is one of classes).
    """
    score = statistics.median(line["best"] for line in on("dora 2", task))
    if data.TASKS[task].metrics[0] == "accuracy":
        return math.sqrt(score * (1 - score) / DEV[task])
    return (1 - score**2) / math.sqrt(DEV[task])


def fact(kind, rows, tasks):
    """Return a number of results/findings.md, which asks for it as {kind: a > b; c > d on tasks}:
    in how many runs the first row of a pair is ahead, the p of a sign test on that, the mean
    difference with its interval or in examples; or {median: row on task}."""
    if kind == "median":
        return f"{statistics.median(line['best'] for line in on(rows, tasks)):.4f}"
    found = []
    for pair, task in itertools.product(rows.split("; "), tasks.split()):
        found += report.by_seed(*(on(row, task) for row in pair.split(" > ")), "best")
    mean, error = statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))
    half = T_QUANTILE.get(len(found), 2.0) * error
    return {"ahead": f"{sum(difference > 0 for difference in found)} of {len(found)}",
            "p": f"{report.coin(found):.3f}",
            "examples": ", ".join(f"{408 * difference:+.0f}" for difference in found),
            "mean": f"{mean:+.4f} (95 % interval {mean - half:+.3f} to {mean + half:+.3f})"}[kind]


# ---- report --------------------------------------------------------------------------------------


def write_report():
    """Write RESULTS.md, its figure and the README's table from the log: only what was run."""
    lines = report.read_log(LOG)
    hours = sum(line["seconds"] for line in lines) / 3600
    words = (report.RESULTS / "findings.md").read_text("utf-8").strip()
    asked = re.compile(r"\{(\w+): ([^}]*) on ([^}]*)\}")
    words = asked.sub(lambda found: fact(*found.groups()), words).format(
        runs=f"{len(lines)} runs, {hours:.1f} hours of one core: {report.machines(lines)}",
        errors=", ".join(f"{standard_error(task):.3f} on {task}" for task in EPOCHS))
    minus = functools.partial(report.differences_table, "by rising seed", runs=on, name="best")
    tables = {
        "SCORES": scores_table(ROWS, EPOCHS), "PAIRS": minus(EPOCHS, PAIRS),
        "CONTROLS": scores_table((*CONTROLS, *RECORDED), BOTH),
        "CONTROL_PAIRS": minus(BOTH, CONTROL_PAIRS),
        "STEPS": scores_table(("lora 2", *STEPS, "dora 2"), BOTH),
        "STEP_PAIRS": minus(BOTH, STEP_PAIRS),
        "BY_EXAMPLE": by_example(),
        "RATES": "\n\n".join(
            report.rates_table(f"{task}, {TENTH[task]} examples", {
                row: tried for row in TUNED if (tried := tried_rates(row, task))},
                functools.partial(middle_of, task=task)) for task in EPOCHS)}
    parts = [tables.get(part) or textwrap.fill(part, 120, break_on_hyphens=False,
                                               break_long_words=False)
             for part in words.split("\n\n")]
    (report.HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (report.RESULTS / "readme_table.md").write_text(readme_table(), "utf-8")
    plot()


def scores_table(rows, tasks):
    """Return a table of rows by tasks, with parameters, learning rates and collapses. A star marks
    a rate that the earlier rule chose."""
    body = []
    for row in rows:
        cells = []
        for task in tasks:
            found = on(row, task)
            text = report.spread(line["best"] for line in found)
            if found:
                sizes = sorted({size(line) for line in found})
                lost = sum(bool(line["collapsed"]) for line in found)
                text += f"; {sizes[0]:,}" + f" to {sizes[-1]:,}" * (len(sizes) > 1)
                text += f"; lr {found[0]['lr']:g}"
                text += r"\*" * (found[0]["lr"] != rate_of(row, task))
                text += f"; {lost} collapsed" * bool(lost)
            cells.append(text)
        body.append([row, *cells])
    return report.table(["row", *(f"{task}: score; parameters; rate" for task in tasks)], body)


def by_example():
    """Return the comparisons on MRPC by example, of the runs whose predictions are stored."""
    _, *rows = (report.GLUE / "MRPC/dev.tsv").read_text("utf-8").rstrip("\n").split("\n")
    labels = np.array([int(row.split("\t")[0]) for row in rows])
    body = []
    for pair in STEP_PAIRS:
        first, second = ({line["seed"]: np.array([*line["predictions"]], int) == labels
                          for line in on(row, "mrpc") if line.get("predictions")} for row in pair)
        seeds = sorted(first.keys() & second.keys())
        if seeds:
            values = np.array([1.0 * first[seed] - second[seed] for seed in seeds])  # (seeds, 408)
            low, high = report.bootstrap(values)
            by_seed = [f"+{(row > 0).sum()} -{(row < 0).sum()} ({report.coin(row):.2f})"
                       for row in values]
            body.append([" minus ".join(pair), str(len(seeds)),
                         f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})", ", ".join(by_seed)])
    head = ["rows", "seeds", "mean difference", "by seed"]
    return report.table(head, body) if body else "No such run is stored yet."


# what README's table and figure show: (words, row, colour)
SHOWN = (("LoRA, rank 2", "lora 2", "lora"),
         ("… in the places that `dora` chose", f"{SAME}, 2", "lora"),
         ("… those shuffled", f"{SHUFFLED}, 2", "lora"),
         ("… with `dora`'s dropout", ON_AX, "lora"), ("`dora`, rank 2", "dora 2", "dora"),
         ("biases only", "bitfit", "bitfit"), ("all weights", "full", "full"))


def readme_table():
    """Return the README's table: median (smallest–largest) of each row and task."""
    body = []
    for words, row, _ in SHOWN:
        cells, most = [], 0
        for task in EPOCHS:
            scores = [line["best"] for line in on(row, task)]
            if not scores:
                cells.append("")
                continue
            most = max(most, *map(size, on(row, task)))
            digits = 2 if task == "cola" else 3
            middle, low, high = (f"{number:.{digits}f}".lstrip("0") for number in (
                statistics.median(scores), min(scores), max(scores)))
            cells.append(f"{middle} ({low}–{high})")
        body.append([words, f"{most:,}", *cells])
    return report.table(["", "parameters, at most", "STS-B", "MRPC", "CoLA"], body) + "\n"


def plot():
    """Write results/glue.svg: the README's rows, a dot for each seed and a bar for the median, a
    panel per task. Each axis is as wide as twelve standard errors of a score."""
    figure = report.figure(8, 2.9)
    axes = figure.subplots(1, len(EPOCHS), sharey=True)
    for ax, task in zip(axes, EPOCHS):
        scores = [[line["best"] for line in on(row, task)] for _, row, _ in SHOWN]
        every = [score for found in scores for score in found]
        middle = (min(every) + max(every)) / 2
        for y, (found, (_, _, method)) in enumerate(zip(scores, SHOWN)):
            color = report.COLORS[method]
            if not found:
                ax.text(middle, y, "not run", ha="center", va="center", color="#777777")
                continue
            ax.plot(found, [y] * len(found), "o", ms=4, alpha=0.6, color=color)
            ax.vlines(statistics.median(found), y - 0.35, y + 0.35, lw=2, color=color)
        error = standard_error(task)
        ax.set_xlim(middle - 6 * error, middle + 6 * error)
        ax.errorbar(middle - 4 * error, len(SHOWN), xerr=error, capsize=3, color="#777777")
        ax.text(middle - 2.7 * error, len(SHOWN), "± standard error",
                fontsize=7, color="#555555", va="center")
        ax.set_title(f"{data.TASKS[task].folder}: {data.TASKS[task].metrics[0].title()}")
        ax.grid(axis="x", alpha=0.3)
    names = [words.replace("`", "") for words, _, _ in SHOWN]
    axes[0].set_yticks(range(len(SHOWN)), names)
    axes[0].invert_yaxis()
    report.save_figure(figure, report.RESULTS / "glue.svg")


def short():
    """Check the held-out tenths, the search for a rate, predictions and fixed ranks."""
    folder = held_out()
    for task, total in (("stsb", 5751), ("mrpc", 3669), ("cola", 8551)):  # with header lines
        train, dev = ((folder / data.TASKS[task].folder / f"{split}.tsv").read_text().count("\n")
                      for split in ("train", "dev"))
        assert (train + dev, dev) == (total, TENTH[task] + (task != "cola")), task

    scores = {}  # of a method whose best rate is 1.6e-2
    while (rate := next_rate(scores)) is not None:
        scores[rate] = -abs(np.log(rate / 1.6e-2))
    assert max(scores, key=lambda rate: scores[rate]) == 1.6e-2 < max(scores)
    assert best_rate({1e-3: 0.8085, 2e-3: 0.8173, 4e-3: 0.8178, 8e-3: 0.0}) == 2e-3
    assert next_rate({5e-3: 0.8175, 1e-2: 0.8178, 2e-2: 0.8}, 1e-2) == 2.5e-3
    assert packed(np.array([0, 2, 1])) == "021"
    assert report.coin([1] * 9 + [-1]) == 22 / 1024
    assert report.coin([1, 1, -2, -2, 0]) == 1
    assert report.bootstrap(np.ones((2, 5))) == (1, 1)

    config = DoRAConfig(rank=2, targets=("0", "1", "2"), **train_glue.METHODS["lora"])
    for shuffle in (None, 1):  # the ranks of a control that continues, against the given ones
        model = nn.Sequential(*(nn.Linear(4, n) for n in (4, 4, 5)))
        layers = inject(model, config)
        pruner = FixedRanks(layers, config, 20, [2, 0, 1], shuffle)
        pruner.load_state_dict(pruner.state_dict())
        model(torch.ones(1, 4)).sum().backward()
        pruner.observe()
        pruner.step()
        *shared, last = [*pruner.ranks().values()]
        assert last == 1 and sorted(shared) == [0, 2]
        assert shuffle or shared == [2, 0]
        assert [int(layer.c.sum()) for layer in layers.values()] == [*shared, last]
    left = {report.key_of(cell) for cell in to_do()} - report.finished(LOG).keys()
    print(f"{len(left)} runs can start")


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, run, write_report, short)
