"""What the benchmarks share: their command line, runs that are logged and divided among processes,
the choice of a learning rate, a training loop, the machine in words, tables, figures.

A finished run is a line of a log in results/ and is never repeated. Several processes may make the
runs of a script at once, with one thread each: they take different runs.

Importing this puts the project's root on the path, so that a script can import dora.py next.
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README, RESULTS, RUNS = HERE / "README.md", HERE / "results", ROOT / "runs"
GLUE, MINILM = ROOT / "../shared/data/glue", ROOT / "../shared/models/minilm-l6-roberta"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dora import METHODS, DoRAConfig, DoRAError, DoRALinear, compact_, keep_mask  # noqa: E402

# One colour per method in every figure: Okabe and Ito's set, which the colour-blind can tell apart.
COLORS = {"dora": "#D55E00", "paper": "#CC79A7", "adalora": "#009E73", "lora": "#0072B2",
          "lora qv": "#56B4E9", "full": "#000000", "bitfit": "#E69F00", "head": "#999999"}
NOISE = 0.002  # of a score on held-out data: rates whose scores are as close are alike


def parser(text):
    """Return a command line with what all scripts have in common."""
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(description=text, formatter_class=raw)
    found.add_argument("--short", action="store_true", help="check the machinery only, for CI")
    found.add_argument("--report", action="store_true", help="only write the tables")
    return found


def command_line(text, log, to_do, run, write_report, short):
    """Make the runs that are missing and write the report, or do what the flags say."""
    arguments = parser(text)
    arguments.add_argument("--only", nargs="+", default=[], metavar="VALUE",
                           help='only runs with all of these values, such as mrpc "dora 2"')
    args = arguments.parse_args()
    torch.set_num_threads(1)

    def wanted():
        for cell in to_do():
            if {*args.only} <= {*map(str, cell.values())}:
                yield cell

    try:
        if args.short:
            short()
        elif not args.report:
            make_all(log, wanted, run)
    except DoRAError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if not args.short:
        write_report()


# ---- runs and their logs -------------------------------------------------------------------------


def key_of(cell):
    """Return a short name of what tells a run from others."""
    return hashlib.sha1(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def read_log(path):
    """Return the finished runs of a log, a dict each: what tells it from others, and what was
    found. They are shared: do not change them."""
    return parse(path.read_text("utf-8")) if path.exists() else []


@functools.lru_cache(maxsize=4)  # a report asks for the same log in every cell of its tables
def parse(text):
    """Return the lines of a log; one that was cut off is left out, so that its run is repeated."""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def lines_of(path, **values):
    """Return the finished runs of a log with these values, by rising seed."""
    found = [line for line in read_log(path) if values.items() <= line.items()]
    return sorted(found, key=lambda line: line["seed"])


def finished(path):
    """Return the lines of a log by key."""
    return {line["key"]: line for line in read_log(path)}


def add_to_log(path, line):
    """Append a finished run to a log."""
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(line, ensure_ascii=False) + "\n")


def make_all(log, to_do, run):
    """Make one run after another until the only ones left are those that other processes are at.

    to_do() yields the runs that can be made now, in their order. It is asked again after each run,
    since some runs can be made only when others are finished. run() makes one and returns what the
    log is to hold besides what tells the run from others, what made it, and its seconds.
    """
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()

    def next_one():
        done = finished(log)
        for cell in (cell for cell in to_do() if key_of(cell) not in done):
            key = key_of(cell)
            with claimed(key) as mine:
                if mine and key not in finished(log):  # another process may just have made it
                    print("---", *cell.values(), flush=True)
                    started = time.monotonic()
                    found = run(cell)
                    seconds = round(time.monotonic() - started, 1)
                    add_to_log(log, {"key": key, **cell, "seconds": seconds, "commit": commit,
                                     "machine": machine(), **found})
                    return True
        return False

    while next_one():
        pass


@contextmanager
def claimed(key):
    """Claim a run, so that no other process makes it. Give False if one is at it."""
    (RUNS / "claims").mkdir(parents=True, exist_ok=True)
    with open(RUNS / "claims" / key, "w") as file:  # the system lets go when the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


# ---- learning rates and training -----------------------------------------------------------------


def by_rate(cell, seeds, rates):
    """Return by learning rate the runs that try it, one per seed."""
    return {lr: [{**cell, "seed": seed, "lr": lr} for seed in seeds] for lr in rates}


def mean_by_rate(log, trials, name):
    """Return the mean of a figure by learning rate; {} until all runs of the trials are made."""
    done = finished(log)
    found = {lr: [done.get(key_of(run)) for run in runs] for lr, runs in trials.items()}
    if not all(map(all, found.values())):
        return {}
    return {lr: statistics.mean(line[name] for line in lines) for lr, lines in found.items()}


def next_rate(tried):
    """Return the next learning rate to try, given the score by rate: three to begin with, then on
    until the best one and the one that best_rate() chooses lie inside of what was tried. None once
    they do, or after eight rates: where none learns, all score alike."""
    for rate in (2e-3, 1e-3, 4e-3):
        if rate not in tried and len(tried) < 3:
            return rate

    if len(tried) == 8:
        return None
    chosen = best_rate(tried)
    if chosen == min(tried):
        return chosen / 2
    best = max(tried, key=lambda rate: (tried[rate], rate))  # of several, the highest
    return best * 2 if best == max(tried) else None


def best_rate(tried):
    """Return the lowest of the rates whose scores are within NOISE of the best one."""
    best = max(tried.values())
    return min(rate for rate, score in tried.items() if score >= best - NOISE)


def chosen_rate(tried):
    """Return the learning rate that a search chose, None while it is not finished."""
    return None if next_rate(tried) else best_rate(tried)


def random_ranks(costs, limit, seed, starts=1):
    """Return random numbers of components by matrix, chosen by dora's own rule: of `starts` in each
    matrix the highest scores that fit into the limit. costs has what one stores."""
    prices = torch.tensor([*costs.values()]).repeat(starts)
    scores = torch.rand(len(prices), generator=torch.Generator().manual_seed(seed))
    return dict(zip(costs, keep_mask(scores, prices, limit).view(starts, -1).sum(0).tolist()))


def place(model, ranks, scale, dropout):
    """Freeze a model and give matrices plain LoRA of these ranks, at one scale."""
    model.requires_grad_(False)
    for name, rank in ranks.items():
        if rank:
            config = DoRAConfig(**{**METHODS["lora"], "dropout_on": "components"}, rank=rank,
                                alpha=scale * rank, dropout=dropout)
            model.set_submodule(name, DoRALinear(model.get_submodule(name), config))


def fit(model, loss_of, steps, lr, pruner, after=lambda step: None, *, warm=0.06, compacts=True):
    """Train for some steps with AdamW, whose rate rises for a share of them, then falls to 0.
    loss_of() returns the loss of the next batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    rising = round(warm * steps)
    for step in range(steps):
        model.train()
        loss = loss_of() + (pruner.penalty() if pruner else 0)
        loss.backward()
        if pruner:
            pruner.observe()
        nn.utils.clip_grad_norm_(trained, 1.0)
        share = (step + 1) / rising if step < rising else (steps - step) / (steps - rising)
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.step()
        optimizer.zero_grad()
        if pruner:
            pruner.step()
            if compacts and pruner.t == pruner.last:
                compact_(model, optimizer)
        after(step + 1)


# ---- machines ------------------------------------------------------------------------------------


def machine(device="cpu"):
    """Return the machine and the versions in one line."""
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"{found[1] if found else platform.processor()} ({os.cpu_count()} cores, " \
               f"{torch.backends.cpu.get_cpu_capability()}), 1 thread"
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # means so only with AMX
            name += ", products by oneDNN"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(package):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return f"{name}; {platform.system()}; {', '.join(versions)}"


def machines(lines):
    """Return the machine of a log's runs, or how many ran on each. The oldest did not note it."""
    counts = Counter(line.get("machine", "a machine that was not noted") for line in lines)
    if len(counts) == 1:
        return next(iter(counts))
    short = (f"{n} on {name.split(', 1 thread')[0]}" for name, n in counts.items())
    return ", ".join(short) or "no run yet"


def resident(key):
    """Return the process's memory in MB (Linux): VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


# ---- tables and figures --------------------------------------------------------------------------


def table(head, rows):
    """Return a Markdown table. The first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def grid(title, columns, rows, cell):
    """Return a table of rows by columns, whose cells are cell(row, column)."""
    return table([title, *columns], [
        [row, *(cell(row, column) for column in columns)] for row in rows])


def write_page(name, title, lines, parts):
    """Write results/NAME.md: what the script of this name made it from, and its parts."""
    hours = sum(line["seconds"] for line in lines) / 3600
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    origin = (f"Written by `python benchmarks/{name}.py` from {len(lines)} runs, whose protocol is "
              f"in [README.md](../README.md): {hours:.1f} hours of one core, commits {commits}.")
    page = "\n\n".join([f"# {title}", origin, *parts])
    (RESULTS / f"{name}.md").write_text(f"{page}\n", "utf-8")


def rates_table(title, tried):
    """Return the scores of each row by learning rate, the chosen ones in bold."""
    def cell(row, rate):
        score = f"{tried[row][float(rate)]:.4f}" if float(rate) in tried[row] else ""
        return f"**{score}**" if float(rate) == chosen_rate(tried[row]) else score

    rates = sorted(set().union(*tried.values()))
    return grid(title, [f"{rate:g}" for rate in rates], tried, cell)


def spread(values, digits=4):
    """Return "median (smallest to largest, number)"."""
    found = sorted(values)
    ends = statistics.median(found), found[0], found[-1]
    middle, low, high = (f"{value:.{digits}f}" for value in ends)
    return f"{middle} ({low} to {high}, {len(found)})"


def coin(differences):
    """Return the two-sided p of a sign test."""
    signs = [d > 0 for d in differences if d]
    n, fewer = len(signs), min(signs.count(True), signs.count(False))
    ways = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / 2**n)


def bootstrap(values):
    """Return a 95 % interval of the mean of values (seeds, examples): both are drawn again."""
    rng, (seeds, n) = np.random.default_rng(0), values.shape
    means = []
    for _ in range(2000):
        drawn = values[rng.integers(seeds, size=seeds)]
        means.append(drawn[:, rng.integers(n, size=n)].mean())
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def by_seed(first, second, name):
    """Return the differences of a figure between two rows, by rising seed, where both have it."""
    a, b = ({line["seed"]: line[name] for line in lines} for lines in (first, second))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def differences_table(title, columns, pairs, runs, name="", say=None):
    """Return a table of the differences between two rows, seed by seed. runs(row, column) gives
    their lines, name (or the column) is the figure, and say() puts a cell's list into words."""
    def cell(names, column):
        first, second = (runs(row, column) for row in names.split(" minus "))
        found = by_seed(first, second, name or column)
        if say and found:
            return say(found)
        return ", ".join(f"{d:+.4f}" for d in found) or "not run"

    return grid(title, columns, map(" minus ".join, pairs), cell)


def figure(width, height):
    """Return an empty figure of matplotlib, at most 8 inches wide: 800 pixels on a page."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False})
    return Figure(figsize=(min(width, 8), height), layout="constrained")


def dots(ax, values, y, color):
    """Draw a row of dots, one per seed, and a bar for their median."""
    ax.plot(values, [y] * len(values), "o", ms=4, alpha=0.6, color=color)
    ax.vlines(statistics.median(values), y - 0.35, y + 0.35, lw=2, color=color)


def heat_map(ax, grid, rows, columns, low, high, digits=".1f"):
    """Draw a table of coloured numbers."""
    ax.imshow(grid, aspect="auto", cmap="Oranges", vmin=low, vmax=high)
    for (y, x), value in np.ndenumerate(grid):
        color = "white" if value > low + 0.6 * (high - low) else "black"
        ax.text(x, y, f"{value:{digits}}", ha="center", va="center", fontsize=7, color=color)
    ax.set_yticks(range(len(grid)), rows)
    ax.set_xticks(range(len(grid[0])), columns)


def save_figure(drawn, path):
    """Write a figure of matplotlib as SVG. The same figure is the same file, byte for byte."""
    from matplotlib import rc_context
    with rc_context({"svg.hashsalt": path.stem}):
        drawn.savefig(path, metadata={"Date": None})


def write_part(name, text):
    """Replace the part `name` of README.md, or append it."""
    old = README.read_text("utf-8") if README.exists() else ""
    first, last = f"<!-- {name}: written by {name}.py -->", f"<!-- end of {name} -->"
    before, _, rest = old.partition(first)
    _, _, after = rest.partition(last)
    part = f"{first}\n{text.strip()}\n{last}"
    README.write_text(f"{before.rstrip()}\n\n{part}{after}" if rest else
                      f"{old.rstrip()}\n\n{part}\n".lstrip(), "utf-8")
