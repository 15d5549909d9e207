"""The methods side by side on GLUE, score against stored parameters.

    python benchmarks/glue.py    # all runs that are missing, then the tables

The log, results/budget_curve.jsonl, has the predictions on dev of all but the first runs. A run
that was stopped continues from its checkpoint. Everything is float32.
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

import data
import train_glue
from dora import Pruner

LOG = report.RESULTS / "budget_curve.jsonl"
CODE = 1  # raise it when a change of the program changes what these runs compute
EPOCHS = {"stsb": 4, "mrpc": 6, "cola": 5}
DEV = {"stsb": 1500, "mrpc": 408, "cola": 1043}  # examples
TENTH = {"stsb": 574, "mrpc": 366, "cola": 855}  # examples that held_out() holds out
SEEDS, TEN = (1, 2, 3), tuple(range(1, 11))
BOTH = ("stsb", "mrpc")


class Row(NamedTuple):
    """A row of a table: how it trains, and where its learning rate and its places come from."""

    method: str
    settings: dict[str, Any]
    rate: str  # the row whose learning rate it takes
    places: str = ""  # the dora row whose ranks it has from the start
    shuffled: bool = False


QV = dict(targets=("query", "value"))
ROWS = {
    **{f"dora {r:g}": Row("dora", dict(rank=r), "dora 0.5" if r < 1 else "dora 2")
       for r in (0.25, 0.5, 1.0, 2.0, 4.0)},
    **{f"lora {r:g}": Row("lora", dict(rank=r), "lora 2")
       for r in (1.0, 2.0, 4.0)},
    "lora qv 1": Row("lora", dict(QV, rank=1.0), "lora qv 1"),
    "lora qv 4": Row("lora", dict(QV, rank=4.0), "lora qv 1"),
    "adalora 1": Row("adalora", dict(rank=1.0), "adalora 2"),
    "adalora 2": Row("adalora", dict(rank=2.0), "adalora 2"),
    "paper 2": Row("paper", dict(rank=2.0), "paper 2"),
    "full": Row("full", {}, "full"),
    "bitfit": Row("bitfit", {}, "bitfit"),
    "head": Row("head", {}, "head"),
}
TUNED = tuple(dict.fromkeys(row.rate for row in ROWS.values()))
# rows of about the same number of parameters (full fine-tuning apart), whose seeds are compared
PAIRS = (
    ("dora 1", "lora 1"), ("dora 2", "lora 2"), ("dora 4", "lora 4"),
    ("dora 1", "adalora 1"), ("dora 2", "adalora 2"),
    ("dora 2", "paper 2"), ("dora 0.5", "bitfit"), ("dora 2", "full"),
)
ON_COLA = ("dora 0.5", "dora 1", "dora 2", "lora 1", "lora 2", "bitfit", "full")

SAME = "same ranks, fixed from the start"
SHUFFLED = "same ranks, shuffled over matrices of one shape"
CONTROLS = {
    f"{name}, {rank}": Row("lora", {}, "lora 2", f"dora {rank}", name == SHUFFLED)
    for rank in ("0.5", "2") for name in (SAME, SHUFFLED)}
CONTROL_PAIRS = (
    *((name, f"dora {name.split(', ')[-1]}") for name in CONTROLS),
    *((f"{SAME}, {rank}", f"{SHUFFLED}, {rank}") for rank in ("0.5", "2")),
)
AT_RATE, UNPRUNED = "lora 2 at dora's rate", "dora 2, nothing pruned"
NO_DROPOUT, ON_AX = f"{AT_RATE}, no dropout", f"{AT_RATE}, dropout on A x"
STEPS = {  # what they change; with both changes LoRA is dora with nothing pruned
    AT_RATE: {},
    f"{AT_RATE}, with gates": dict(gate=True),
    NO_DROPOUT: dict(dropout=0.0),
    ON_AX: dict(dropout_on="components"),
    UNPRUNED: dict(gate=True, dropout_on="components"),
}
STEP_PAIRS = (
    (AT_RATE, "lora 2"), *((row, AT_RATE) for row in STEPS if row != AT_RATE),
    (ON_AX, NO_DROPOUT), ("dora 2", AT_RATE), ("dora 2", ON_AX), ("dora 2", UNPRUNED),
)
FOUR = (AT_RATE, NO_DROPOUT, ON_AX, "dora 2")  # ten seeds each on MRPC
ALL = ROWS | CONTROLS | {
    name: Row("lora", dict(change, rank=2.0), "dora 2") for name, change in STEPS.items()}


class FixedRanks(Pruner):
    """Leaves each layer of plain LoRA its number of components: the gates of the others stay 0.
    With a seed the numbers are shuffled over the matrices of one shape."""

    def __init__(self, layers, config, total_steps, ranks, seed=None):
        super().__init__(layers, config, total_steps)
        if seed is not None:
            rng, ranks = np.random.default_rng(seed), np.array(ranks)
            shapes = [tuple(layer.base.weight.shape) for layer in layers.values()]
            for shape in sorted({*shapes}):
                same = [shape == other for other in shapes]
                ranks[same] = rng.permutation(ranks[same])
        mask = torch.arange(config.r_prime) < torch.as_tensor(ranks)[:, None]  # (layers, r')
        self._set_mask(mask.flatten())
        with torch.no_grad():
            self._close_gates()


def run(c):
    """Make a run. Return its line of the log."""
    row, out = ALL[c["row"]], report.RUNS / "budget-curve" / report.key_of(c)
    settings, pruner = row.settings, Pruner
    if row.places:  # LoRA of the highest rank, at dora's scale, of which FixedRanks leaves a part
        (dora,) = on(row.places, c["task"], seed=c["seed"])
        top, rank = float(max(dora["ranks"])), ROWS[row.places].settings["rank"]
        settings = dict(rank=top, alpha=8.0 * top / max(1, rank))
        seed = c["seed"] if row.shuffled else None
        pruner = functools.partial(FixedRanks, ranks=dora["ranks"], seed=seed)
    config = train_glue.make_config(
        c["task"], row.method, seed=c["seed"], lr=c["lr"],
        epochs=EPOCHS[c["task"]], batch_size=32,
        data_dir=str(held_out() if c["split"] == "held out" else report.GLUE),
        model_dir=str(report.MINILM), out=str(out), save_every=100,
        resume=any(out.glob("checkpoints/*.pt")), **settings)
    with mock.patch.multiple(train_glue, Pruner=pruner, **watching(out)):
        try:
            result = train_glue.train(config)
        except train_glue.Interrupted as stop:
            sys.exit(f"glue.py: {stop.args[0]}; the same command continues")

    metric = data.TASKS[c["task"]].metrics[0]
    best = result["best"][metric]
    predictions = [line["predictions"] for line in report.read_log(out / "predictions.jsonl")
                   if line["score"] == best]
    return {
        "best": best,
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
    return base64.b64encode((predictions * 65535).round().astype("<u2").tobytes()).decode()


def lines_of(name):
    """Return the lines of a file of GLUE. In a text itself, only \\n ends a line."""
    return (report.GLUE / name).read_text("utf-8").rstrip("\n").split("\n")


def held_out():
    """Return a data folder whose dev sets are tenths of the train sets of STS-B, MRPC and CoLA."""
    folder = report.RUNS / "held-out"
    for name, head in (("STS-B", 1), ("MRPC", 1), ("CoLA", 0)):  # CoLA has no header line
        lines = lines_of(f"{name}/train.tsv")
        rows = np.random.default_rng(0).permutation(len(lines) - head) + head
        tenth = len(rows) // 10
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("dev", rows[:tenth]), ("train", rows[tenth:])):
            chosen = [*lines[:head], *(lines[i] for i in sorted(part))]
            with data.atomic_file(folder / name / f"{split}.tsv") as file:
                file.write("".join(f"{line}\n" for line in chosen).encode())
    return folder


def tried_rates(row, task):
    """Return the score on a task's held-out tenth by learning rate: that of the best epoch, which
    is also what the tables report. One seed chooses."""
    lines = report.lines_of(LOG, row=row, split="held out", task=task, seed=1)
    return {line["lr"]: line["best"] for line in lines}


def rate_of(row, task):
    """Return the learning rate that was chosen for a row; None if the choice is not finished."""
    return report.chosen_rate(tried_rates(ALL[row].rate, task))


def on(row, task, **more):
    """Return the finished runs of a row on a task's dev set at its learning rate, by seed."""
    return report.lines_of(LOG, row=row, split="dev", task=task, lr=rate_of(row, task), **more)


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
        if rate := report.next_rate(tried_rates(row, task)):
            yield dict(code=CODE, row=row, split="held out", task=task, seed=1, lr=rate)


def on_dev(rows, tasks, seeds=SEEDS):
    """Yield the runs of the rows whose learning rate and places are known, seed by seed."""
    for task, seed, row in itertools.product(tasks, seeds, rows):
        rate, places = rate_of(row, task), ALL[row].places
        if rate and (not places or on(places, task, seed=seed)):
            yield dict(code=CODE, row=row, split="dev", task=task, seed=seed, lr=rate)


def scores(row, task):
    """Return the scores of a row on a task, by seed."""
    return [line["best"] for line in on(row, task)]


def size(line):
    """Return the stored parameters of a run, without its head."""
    return line["adapter"] or line["trainable"] - line["head"]


def standard_error(task):
    """Return how uncertain one score is, since the dev set has so few examples: at the median of
    dora at rank 2, by the formula for a share or a correlation (Matthews' is one of classes)."""
    score = statistics.median(scores("dora 2", task))
    if data.TASKS[task].metrics[0] == "accuracy":
        return math.sqrt(score * (1 - score) / DEV[task])
    return (1 - score**2) / math.sqrt(DEV[task])


def fact(kind, rows, tasks):
    """Return a number of results/findings.md, which asks for it as {kind: a > b; c > d on tasks}:
    in how many runs the first row of a pair is ahead, the p of a sign test on that, or the mean
    difference with its interval."""
    from scipy import stats

    found = []
    for pair, task in itertools.product(rows.split("; "), tasks.split()):
        first, second = pair.split(" > ")
        found += report.by_seed(on(first, task), on(second, task), "best")
    if len(found) < 2:
        return "not run"
    mean, half = statistics.mean(found), stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    return {"ahead": ahead(found), "p": f"{report.coin(found):.3f}",
            "mean": f"{mean:+.4f} (95 % interval {mean - half:+.3f} to {mean + half:+.3f})"}[kind]


def ahead(differences):
    """Return in how many runs the first row of a pair is ahead."""
    return f"{sum(d > 0 for d in differences)} of {len(differences)}"


# ---- report --------------------------------------------------------------------------------------


def write_report():
    """Write RESULTS.md, its figure and the README's table from the log: only what was run."""
    lines = report.read_log(LOG)
    hours = sum(line["seconds"] for line in lines) / 3600
    words = (report.RESULTS / "findings.md").read_text("utf-8").strip()
    asked = re.compile(r"\{(\w+): ([^}]*) on ([^}]*)\}")
    words = asked.sub(lambda found: fact(*found.groups()), words).format(
        runs=f"{len(lines)} runs ({report.machines(lines)}), {hours:.1f} hours of one core",
        errors=", ".join(f"{standard_error(task):.3f} on {task}" for task in EPOCHS))

    table = functools.partial(report.grid, "score; parameters; rate", cell=in_words)
    minus = functools.partial(
        report.differences_table, "ahead, mean difference", runs=on, name="best",
        say=lambda found: f"{ahead(found)}, {statistics.mean(found):+.4f}")
    tables = {
        "SCORES": table(EPOCHS, ROWS),
        "PAIRS": minus(EPOCHS, PAIRS),
        "CONTROLS": table(BOTH, CONTROLS),
        "CONTROL_PAIRS": minus(BOTH, CONTROL_PAIRS),
        "STEPS": table(BOTH, ("lora 2", *STEPS, "dora 2")),
        "STEP_PAIRS": minus(BOTH, STEP_PAIRS),
        "BY_EXAMPLE": by_example(),
        "RATES": "\n\n".join(map(rates_table, EPOCHS)),
    }
    wrap = textwrap.TextWrapper(120, break_on_hyphens=False, break_long_words=False).fill
    parts = [part if part.startswith("|") else tables.get(part) or wrap(part)
             for part in words.split("\n\n")]
    (report.HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (report.RESULTS / "readme_table.md").write_text(readme_table(), "utf-8")
    plot()


def in_words(row, task):
    """Return the scores of a row on a task, its parameters, its learning rate and collapses."""
    found = on(row, task)
    if not found:
        return "not run"
    lost = sum(bool(line["collapsed"]) for line in found)
    return (f"{report.spread(scores(row, task), 3)}; {max(map(size, found)):,}; "
            f"{found[0]['lr']:g}" + f"; {lost} collapsed" * bool(lost))


def rates_table(task):
    """Return the scores on a task's held-out tenth by rate."""
    tried = {row: found for row in TUNED if (found := tried_rates(row, task))}
    return report.rates_table(f"{task}, {TENTH[task]} examples", tried)


def by_example():
    """Return the differences on MRPC by example, of the runs whose predictions are stored."""
    _, *rows = lines_of("MRPC/dev.tsv")
    labels = np.array([int(row[0]) for row in rows])

    def right(row):
        return {line["seed"]: labels == [*map(int, line["predictions"])]
                for line in on(row, "mrpc") if line.get("predictions")}

    body = []
    for pair in STEP_PAIRS:
        first, second = map(right, pair)
        if seeds := sorted(first.keys() & second.keys()):
            values = np.array([1.0 * first[seed] - second[seed] for seed in seeds])  # (seeds, 408)
            low, high = report.bootstrap(values)
            body.append([" minus ".join(pair), str(len(seeds)),
                         f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})"])
    return report.table(["mrpc", "seeds", "mean difference, 95 % interval"], body)


# what README's table and figure show: (words, row, colour)
SHOWN = (("LoRA, rank 2", "lora 2", "lora"),
         ("… in the places that `dora` chose", f"{SAME}, 2", "lora"),
         ("… those shuffled", f"{SHUFFLED}, 2", "lora"),
         ("… with `dora`'s rate and dropout", ON_AX, "lora"),
         ("`dora`, rank 2", "dora 2", "dora"),
         ("biases only", "bitfit", "bitfit"),
         ("all weights", "full", "full"))


def readme_table():
    """Return the README's table: median (smallest–largest) of each row and task."""
    body = []
    for words, row, _ in SHOWN:
        most = max(size(line) for task in EPOCHS for line in on(row, task))
        body.append([words, f"{most:,}", *(in_short(row, task) for task in EPOCHS)])
    return report.table(["", "parameters, at most", "STS-B", "MRPC", "CoLA"], body) + "\n"


def in_short(row, task):
    """Return the scores of a row on a task in few digits."""
    found = scores(row, task)
    if not found:
        return ""
    numbers = statistics.median(found), min(found), max(found)
    digits = 2 if task == "cola" else 3
    middle, low, high = (f"{number:.{digits}f}".lstrip("0") for number in numbers)
    return f"{middle} ({low}–{high})"


def plot():
    """Write results/glue.svg: the README's rows, a dot for each seed and a bar for the median, a
    panel per task. Each axis is as wide as twelve standard errors of a score."""
    figure, grey = report.figure(8, 2.9), "#777777"
    axes = figure.subplots(1, len(EPOCHS), sharey=True)
    for ax, task in zip(axes, EPOCHS):
        every = [score for _, row, _ in SHOWN for score in scores(row, task)]
        middle = (min(every) + max(every)) / 2
        for y, (_, row, method) in enumerate(SHOWN):
            if found := scores(row, task):
                report.dots(ax, found, y, report.COLORS[method])
            else:
                ax.text(middle, y, "not run", ha="center", va="center", color=grey)
        error = standard_error(task)
        ax.set_xlim(middle - 6 * error, middle + 6 * error)
        ax.errorbar(middle - 4 * error, len(SHOWN), xerr=error, capsize=3, color=grey)
        ax.text(middle - 2.7 * error, len(SHOWN), "± standard error",
                fontsize=7, color="#555555", va="center")
        ax.set_title(f"{data.TASKS[task].folder}: {data.TASKS[task].metrics[0].title()}")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(SHOWN)), [words.replace("`", "") for words, _, _ in SHOWN])
    axes[0].invert_yaxis()
    report.save_figure(figure, report.RESULTS / "glue.svg")


def short():
    """Check the held-out tenths and how predictions are stored."""
    folder = held_out()
    for name, *expected in (("STS-B", 5176, 575), ("MRPC", 3302, 367), ("CoLA", 7696, 855)):
        files = (folder / name / f"{split}.tsv" for split in ("train", "dev"))
        assert [file.read_text("utf-8").count("\n") for file in files] == expected, name

    assert packed(np.array([0, 2, 1])) == "021"
    left = {*map(report.key_of, to_do())} - report.finished(LOG).keys()
    print(f"{len(left)} runs can start")


if __name__ == "__main__":
    report.command_line(str(__doc__), LOG, to_do, run, write_report, short)
