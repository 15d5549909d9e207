"""The methods side by side on GLUE, score against stored parameters.

    python benchmarks/glue.py                 # everything, in the order of the stages
    python benchmarks/glue.py --stages 1 2    # learning rates; STS-B and MRPC
    python benchmarks/glue.py --report        # write the tables from the runs that there are

    stage 1   learning rates on tenths of the train sets of STS-B and MRPC, held out
    stage 2   STS-B and MRPC, three seeds, every row
    stage 3   learning rates on a tenth of CoLA's train set, then CoLA
    stage 4   controls: is it the choice of the components, the pruning, or neither?
    stage 5   the default of dora against other choices, three seeds on STS-B's held-out tenth
    stage 6   from LoRA to dora in steps, MRPC and STS-B, three seeds

A finished run is a line of results/budget_curve.jsonl and is never repeated. A run that was stopped
continues from its checkpoint. Several of these processes may run at once, with one thread each:
they take different runs. Everything is float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import report  # noqa: E402
import train_glue  # noqa: E402
from dora import IMPORTANCE, DoRAConfig, DoRAError, Pruner, compact_, inject  # noqa: E402
from rank_recovery import PerParameter, PerParameterTwice  # noqa: E402

HERE = Path(__file__).resolve().parent
LOG = HERE / "results" / "budget_curve.jsonl"
CODE = 1  # raise it when a change of the program changes what these runs compute
EPOCHS = {"stsb": 4, "mrpc": 6, "cola": 5}
TENTH = {"stsb": 574, "mrpc": 366, "cola": 855}  # examples that held_out() holds out
SEEDS = (1, 2, 3)
STAGES = [1, 2, 3, 4, 5, 6]
BOTH = ("stsb", "mrpc")  # the tasks of stages 1, 2, 4 and 6
QV = ("query", "value")
LARGER_CLASS = {"mrpc": 279 / 408}  # of the dev set. It scores 0 on CoLA, and STS-B has no classes
FIGURE = "\n\n![Score against stored parameters, a panel per task](results/glue.svg)"
FINDINGS = HERE / "results" / "findings.md"  # what the runs say; tests/test_readme.py checks it
EARLIER = HERE / "results" / "first_version.md"

# name: (method, its settings, the row whose learning rate it takes)
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora 0.25": ("dora", dict(rank=0.25), "dora 0.5"),
    "dora 0.5": ("dora", dict(rank=0.5), "dora 0.5"),
    "dora 1": ("dora", dict(rank=1.0), "dora 2"),
    "dora 2": ("dora", dict(rank=2.0), "dora 2"),
    "dora 4": ("dora", dict(rank=4.0), "dora 2"),
    "lora 1": ("lora", dict(rank=1.0), "lora 2"),
    "lora 2": ("lora", dict(rank=2.0), "lora 2"),
    "lora 4": ("lora", dict(rank=4.0), "lora 2"),
    "lora qv 1": ("lora", dict(rank=1.0, targets=QV), "lora qv 1"),
    "lora qv 4": ("lora", dict(rank=4.0, targets=QV), "lora qv 1"),
    "adalora 1": ("adalora", dict(rank=1.0), "adalora 2"),
    "adalora 2": ("adalora", dict(rank=2.0), "adalora 2"),
    "paper 2": ("paper", dict(rank=2.0), "paper 2"),
    "full": ("full", {}, "full"),
    "bitfit": ("bitfit", {}, "bitfit"),
    "head": ("head", {}, "head"),
}
TUNED = tuple(dict.fromkeys(tuned for _, _, tuned in ROWS.values()))
# rows of about the same number of parameters (full fine-tuning apart), whose seeds are compared
PAIRS = (
    ("dora 0.25", "lora qv 1"), ("dora 1", "lora qv 4"),
    *((f"dora {rank}", f"lora {rank}") for rank in (1, 2, 4)),
    *((f"dora {rank}", f"adalora {rank}") for rank in (1, 2)),
    ("dora 2", "paper 2"), ("dora 0.5", "bitfit"), ("dora 2", "full"),
)
ON_COLA = ("dora 0.5", "dora 1", "dora 2", "lora 1", "lora 2", "full")
NOISE = 0.002  # of a score; three seeds of the first version's default lay 0.0046 apart
# the middle of the first three rates on STS-B, near the best of the first version; others 2e-3.
# The other tasks start at half of it: at STS-B's rate LoRA collapses on MRPC
START_LR = {"full": 1e-4, "lora 2": 4e-3, "lora qv 1": 4e-3, "adalora 2": 4e-3, "paper 2": 4e-3}

SAME = "same ranks, fixed from the start"
SHUFFLED = "same ranks, shuffled over matrices of one shape"
# name: (how the components are chosen, the dora row that it belongs to, further settings)
CONTROLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{title}, {rank}": (kind, f"dora {rank}", more)
    for rank in (0.5, 2)
    for title, kind, more in (
        (SAME, "same", {}), (SHUFFLED, "shuffled", {}),
        ("chosen by the measured cost of removal", "measured", dict(interval=50)),
        *((("the default's score, pruned every 50 steps", "dora", dict(interval=50)),
           ("r' = 2", "dora", dict(start_rank=2)), ("r' = 4", "dora", dict(start_rank=4)))
          if rank == 0.5 else ()),
    )
}
CONTROL_PAIRS = (
    *((name, row) for name, (_, row, _) in CONTROLS.items()),
    *((f"{SAME}, {rank}", f"{SHUFFLED}, {rank}") for rank in (0.5, 2)),
    (f"{SAME}, 2", "lora 2"), (f"{SHUFFLED}, 2", "lora 2"),
)
# name: as in CONTROLS. The rate of a scale of 16 is tried at half of what suits a scale of 8, too
CHOICES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "components in order of score / cost": ("per parameter", "dora 0.5", {}),
    "components in order of score / cost^2": ("per parameter twice", "dora 0.5", {}),
    "budget in components": ("dora", "dora 0.5", dict(budget_unit="components")),
    "scale alpha / r = 16": ("dora", "dora 0.5", dict(alpha=16.0)),
}
ORDERS = {"per parameter": PerParameter, "per parameter twice": PerParameterTwice}
# name: as in CONTROLS. With both steps LoRA is dora with nothing pruned
AT_RATE, UNPRUNED = "lora 2 at dora's rate", "dora 2, nothing pruned"
STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    AT_RATE: ("lora", "dora 2", {}),
    f"{AT_RATE}, with gates": ("lora", "dora 2", dict(gate=True)),
    f"{AT_RATE}, dropout on A x": ("lora", "dora 2", dict(dropout_on="components")),
    UNPRUNED: ("lora", "dora 2", dict(gate=True, dropout_on="components")),
}
STEP_PAIRS = (
    (AT_RATE, "lora 2"), *((row, AT_RATE) for row in STEPS if row != AT_RATE),
    ("dora 2", UNPRUNED), (UNPRUNED, "lora 2"),
)
VARIANTS = {**CONTROLS, **CHOICES, **STEPS}


# ---- runs ----------------------------------------------------------------------------------------


def cell(row: str, split: str, task: str, seed: int, lr: float) -> dict[str, Any]:
    """Return what tells a run from others."""
    return dict(code=CODE, row=row, split=split, task=task, seed=seed, lr=lr)


def finished() -> dict[str, dict[str, Any]]:
    """Return the lines of the log by key."""
    return {line["key"]: line for line in report.read_log(LOG)}


def run(c: dict[str, Any], args: argparse.Namespace) -> bool:
    """Make a run and write its line; return False if another process is at it."""
    key = report.key_of(c)
    kind, row, more = VARIANTS.get(c["row"], ("dora", c["row"], {}))
    method, settings, _ = ROWS[row]
    if kind in ("same", "shuffled"):  # plain LoRA, later cut to the ranks that dora found
        top = max(ranks_of(row, c["task"], c["seed"]))
        method, settings = "lora", dict(rank=float(top), alpha=8.0 * top / max(1, settings["rank"]))
    elif kind == "lora":
        method = "lora"
    data_dir = held_out(args.data_dir) if c["split"] == "held out" else args.data_dir
    out = ROOT / "runs" / "budget-curve" / key
    config = train_glue.make_config(
        c["task"], method, seed=c["seed"], lr=c["lr"], epochs=EPOCHS[c["task"]], batch_size=32,
        data_dir=str(data_dir), model_dir=str(args.model_dir), out=str(out), device=args.device,
        save_every=100, resume=any(out.glob("checkpoints/*.pt")), **{**settings, **more})
    config, undo = control(kind, c, config)
    print(f"--- {c['row']}, {c['task']} {c['split']}, lr {c['lr']:g}, seed {c['seed']}", flush=True)
    try:
        result = train_glue.train(config)
    except DoRAError as error:
        if "another run is writing" in str(error):
            return False
        raise
    finally:
        undo()

    metric = train_glue.TASKS[c["task"]].metrics[0]
    line = {
        "key": key, **c, "metric": metric, "best": result["best"][metric],
        "last": result["last"][metric], "epochs": [e[metric] for e in result["epochs"]],
        "collapsed": result.get("collapsed"), "head": result["head_parameters"],
        "adapter": result["adapter_parameters_after_pruning"],
        "trainable": result["trainable_parameters"], "seconds": result["seconds"],
        "ranks": list(result["ranks"].values()), "torch": torch.__version__, "device": args.device,
        "machine": report.machine(args.threads, args.device),
    }
    report.add_to_log(LOG, line)
    write_report()
    return True


def held_out(data_dir: Path) -> Path:
    """Return a data folder whose dev sets are tenths of the train sets of STS-B, MRPC and CoLA."""
    folder = ROOT / "runs" / "held-out"
    for name, head in (("STS-B", 1), ("MRPC", 1), ("CoLA", 0)):  # CoLA has no header line
        lines = (data_dir / name / "train.tsv").read_text("utf-8").rstrip("\n").split("\n")
        rows = np.random.default_rng(0).permutation(len(lines) - head) + head
        tenth = len(rows) // 10
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("dev", rows[:tenth]), ("train", rows[tenth:])):
            text = "\n".join([*lines[:head], *(lines[i] for i in sorted(part))]) + "\n"
            path = folder / name / f"{split}.tsv"
            if not path.exists() or path.read_text("utf-8") != text:
                path.write_text(text, "utf-8")
    return folder


def next_rate(tried: dict[float, float], middle: float = 2e-3) -> float | None:
    """Return the next learning rate to try: three around the middle, then on until the best one and
    the one that best_rate() chooses lie inside of what was tried. None once they do, or after eight
    rates: where none learns, all have the score of the larger class.

    tried: score by rate.
    """
    for rate in (middle, middle / 2, middle * 2):
        if rate not in tried:
            return rate

    if len(tried) == 8:
        return None
    chosen = best_rate(tried)
    if chosen == min(tried):
        return chosen / 2
    best = max(tried, key=lambda rate: (tried[rate], rate))  # of several, the highest
    return best * 2 if best == max(tried) else None


def best_rate(tried: dict[float, float]) -> float:
    """Return the lowest of the rates whose scores are within NOISE of the best one.

    tried: score by rate.
    """
    best = max(tried.values())
    return min(rate for rate, score in tried.items() if score >= best - NOISE)


def rate_of(row: str, task: str) -> float | None:
    """Return the learning rate that was chosen for a row or control; None if the choice is not
    finished."""
    kind, source, _ = VARIANTS.get(row, ("", row, {}))
    source = "lora 2" if kind in ("same", "shuffled") else source
    row = ROWS[source][2]
    tried = tried_rates(row, task)
    return None if rate_to_try(row, task) else best_rate(tried)


def rate_to_try(row: str, task: str) -> float | None:
    """Return the next learning rate to try for a row on a task; None if the choice is finished."""
    middle = START_LR.get(row, 2e-3)
    return next_rate(tried_rates(row, task), middle if task == "stsb" else middle / 2)


def tried_rates(row: str, task: str) -> dict[float, float]:
    """Return the score after the last epoch on a task's held-out tenth, by learning rate. One seed
    chooses; dora 0.5 has further ones there, for stage 5."""
    return {line["lr"]: line["last"] for line in finished().values() if (
        line["row"], line["split"], line["task"], line["seed"]) == (row, "held out", task, 1)}


# ---- controls ------------------------------------------------------------------------------------


def control(kind: str, c: dict[str, Any], config: Any) -> tuple[Any, Callable[[], None]]:
    """Prepare a control or choice. Return its settings and a function that undoes the
    preparation."""
    adapt = train_glue.adapt
    train_glue.Pruner = ORDERS.get(kind, Pruner)  # type: ignore[misc]

    def undo() -> None:
        train_glue.adapt, train_glue.Pruner = adapt, Pruner  # type: ignore[misc]
        IMPORTANCE.pop("measured", None)

    if kind in ("same", "shuffled"):
        train_glue.Pruner = FixedRanks  # type: ignore[misc]
        ranks = ranks_of(CONTROLS[c["row"]][1], c["task"], c["seed"])
        train_glue.adapt = lambda model, cfg: fixed_ranks(
            adapt(model, cfg), model, ranks, c["seed"] if kind == "shuffled" else None)
    elif kind == "measured":
        from measured import Measured  # what closing each gate does to the loss
        config = Measured(config).install()
    return config, undo


def ranks_of(row: str, task: str, seed: int) -> list[int]:
    """Return the components per matrix that a finished run of a row ended with."""
    return next(line["ranks"] for line in finished().values() if (
        line["row"], line["split"], line["task"], line["seed"], line["lr"]) == (
        row, "dev", task, seed, rate_of(row, task)))


def fixed_ranks(layers: dict[str, Any], model: Any, ranks: list[int],
                shuffle: int | None) -> dict[str, Any]:
    """Leave each layer its number of components before training, shuffled over the matrices of
    equal shape if a seed is given."""
    given = dict(zip(layers, ranks, strict=True))
    if shuffle is not None:
        rng = np.random.default_rng(shuffle)
        shapes = {name: tuple(layer.base.weight.shape) for name, layer in layers.items()}
        for shape in sorted(set(shapes.values())):
            names = [name for name in layers if shapes[name] == shape]
            for name, rank in zip(names, rng.permutation([given[name] for name in names])):
                given[name] = int(rank)
    for name, layer in layers.items():
        layer.mask[given[name]:] = False
    compact_(model)
    return layers


class FixedRanks(Pruner):
    """The Pruner of layers that were compacted before training, so that a run can continue."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step; there is no mask to restore."""
        self.t = state["t"]
        self.progress.update(self)


# ---- stages --------------------------------------------------------------------------------------


def to_do(stages: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the runs that can be made now, in their order; those that depend on others follow as
    soon as these are finished."""
    if 1 in stages:
        for task in BOTH:
            yield from rates(TUNED, task)
    if 2 in stages:
        yield from on_dev(ROWS, BOTH)
    if 3 in stages:
        yield from rates(dict.fromkeys(ROWS[row][2] for row in ON_COLA), "cola")
        yield from on_dev(ON_COLA, ("cola",))
    if 4 in stages:
        yield from controls()
    if 5 in stages:
        yield from choices()
    if 6 in stages:
        yield from on_dev(STEPS, BOTH[::-1])  # MRPC first: there dora leads by more


def rates(rows: Any, task: str) -> Iterator[dict[str, Any]]:
    """Yield the next run of each row that looks for its learning rate."""
    for row in rows:
        if rate := rate_to_try(row, task):
            yield cell(row, "held out", task, 1, rate)


def on_dev(rows: Any, tasks: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the runs of the rows whose learning rate is known, seed by seed."""
    for task in tasks:
        for seed in SEEDS:
            for row in rows:
                if (rate := rate_of(row, task)) is not None:
                    yield cell(row, "dev", task, seed, rate)


def repeats(name: str, task: str) -> bool:
    """Whether a control sets only what its dora row has on this task anyway."""
    kind, _, more = CONTROLS[name]
    own = vars(train_glue.make_config(task))
    return kind == "dora" and all(own[key] == value for key, value in more.items())


def controls() -> Iterator[dict[str, Any]]:
    """Yield the controls whose dora run is finished."""
    done = finished()
    for task in BOTH:
        for seed in SEEDS:
            for name, (kind, row, _) in CONTROLS.items():
                if repeats(name, task):
                    continue
                rate, own = rate_of(name, task), rate_of(row, task)
                if rate and own and report.key_of(cell(row, "dev", task, seed, own)) in done:
                    yield cell(name, "dev", task, seed, rate)


def choices() -> Iterator[dict[str, Any]]:
    """Yield the default and the other choices on STS-B's held-out tenth, seed by seed."""
    for seed in SEEDS:
        for row in ("dora 0.5", *CHOICES):
            if (rate := rate_of(row, "stsb")) is not None:
                yield cell(row, "held out", "stsb", seed, rate)
                if row == "scale alpha / r = 16":
                    yield cell(row, "held out", "stsb", seed, rate / 2)


# ---- report --------------------------------------------------------------------------------------


def spread(scores: list[float]) -> str:
    """Return "median (smallest to largest, seeds)"."""
    if not scores:
        return "not run"
    return (f"{statistics.median(scores):.4f} ({min(scores):.4f} to {max(scores):.4f}, "
            f"{len(scores)})")


def on(row: str, task: str) -> list[dict[str, Any]]:
    """Return the finished runs of a row or control on a task's dev set, at its learning rate."""
    rate = rate_of(row, task)
    return [line for line in finished().values()
            if (line["row"], line["split"], line["task"], line["lr"]) == (row, "dev", task, rate)]


def size(line: dict[str, Any]) -> int:
    """Return the stored parameters of a run, without its head."""
    return line["adapter"] or line["trainable"] - line["head"]


def write_report() -> None:
    """Write RESULTS.md from the log: it holds only what was run."""
    lines = list(finished().values())
    hours = sum(line["seconds"] for line in lines) / 3600
    parts = [
        "# Results",
        "Written by `python benchmarks/glue.py` from results/budget_curve.jsonl. The encoder is "
        "MiniLM-L6 in RoBERTa's layout (6 layers, width 384), not RoBERTa-base: compare the rows "
        "with each other, not these numbers with the paper's. Batch 32, epochs "
        f"{', '.join(f'{task} {n}' for task, n in EPOCHS.items())}, float32, one thread per run. A "
        "score is that of the best dev epoch after the last pruning: median (smallest to largest, "
        "number of seeds). Parameters are what the adapter file stores, the head left out.",
        f"{len(lines)} runs, {hours:.1f} hours of one core: {report.machines(lines)}.",
        FINDINGS.read_text("utf-8"),
    ]
    tuned = [task for task in EPOCHS if any(tried_rates(row, task) for row in TUNED)]
    sections = {
        **{f"## Learning rates: a tenth of {task}'s train set, held out": rates_table(task)
           for task in tuned},
        "## Choices of the default": choices_table(),
        "## Score against parameters": scores_table(ROWS, tuple(EPOCHS)) + FIGURE,
        "## Seed by seed, at about the same number of parameters": differences_table(
            PAIRS, tuple(EPOCHS)),
        "## Controls": controls_table(),
        "## Controls, seed by seed": differences_table(
            CONTROL_PAIRS, BOTH),
        "## From LoRA to dora in steps": steps_table(),
        "## From LoRA to dora in steps, seed by seed": differences_table(STEP_PAIRS, BOTH)}
    for title, text in sections.items():
        parts += [title, text] if text else [f"{title}\n\nNot run yet."]
    others = [f"{line['row']}, {line['task']}, seed {line['seed']}, rate {line['lr']:g}: "
              + ("collapsed" if line["collapsed"] else f"{line['best']:.4f}") for line in lines
              if line["split"] == "dev" and line["lr"] != rate_of(line["row"], line["task"])]
    if others:
        parts.append("Runs on dev at rates of two earlier rules, and so not in the tables: the "
                     "best one of the held-out tenth, until dora 2 collapsed with it, and for MRPC "
                     f"that of STS-B, until LoRA collapsed with it: {'; '.join(others)}.")
    parts.append(EARLIER.read_text("utf-8"))
    (HERE / "RESULTS.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", "utf-8")
    plot()


def rates_table(task: str) -> str:
    """Return the scores on a held-out tenth by learning rate, the chosen ones in bold."""
    tried = {row: found for row in TUNED if (found := tried_rates(row, task))}
    grid = sorted({rate for found in tried.values() for rate in found})
    body = []
    for row in tried:
        best = rate_of(row, task)
        cells = [f"{tried[row][rate]:.4f}" if rate in tried[row] else "" for rate in grid]
        body.append([row, *(f"**{text}**" if rate == best else text
                            for rate, text in zip(grid, cells))])
    title = (f"Score after the last epoch on {TENTH[task]} examples, one seed: a rough choice. The "
             "grid grows until a row's best rate lies inside it, up to eight rates. Chosen, in "
             f"bold, is the lowest rate within {NOISE} of the best: the next rate up often "
             "collapses.\n\n")
    return title + report.table(["row", *(f"{rate:g}" for rate in grid)], body)


def choices_table() -> str:
    """Return the scores of the default and of the other choices; "" if none of these was run."""
    found = [line for line in finished().values()
             if (line["split"], line["task"]) == ("held out", "stsb")]
    if not any(line["row"] in CHOICES for line in found):
        return ""

    body = []
    for c in dict.fromkeys((c["row"], c["lr"]) for c in choices()):
        lines = {line["seed"]: line for line in found if (line["row"], line["lr"]) == c}
        scores = [lines[seed]["last"] if seed in lines else None for seed in SEEDS]
        known = [score for score in scores if score is not None]
        body.append([f"{c[0]}, lr {c[1]:g}", *("" if s is None else f"{s:.4f}" for s in scores),
                     f"{statistics.median(known):.4f}" if known else "not run",
                     f"{statistics.median(map(size, lines.values())):,.0f}" if known else ""])
    return ("The default at rank 0.5 and one setting changed, on the tenth of STS-B's train set "
            "that is held out. Score after the last epoch, by seed; parameters are a median.\n\n"
            ) + report.table(["row", *(f"seed {seed}" for seed in SEEDS), "median", "parameters"],
                             body)


def scores_table(rows: Any, tasks: tuple[str, ...]) -> str:
    """Return a table of rows by tasks, with parameters, learning rates and collapses; "" if none
    was run."""
    body = []
    for row in rows:
        cells = []
        for task in tasks:
            found = on(row, task)
            sizes = sorted({size(line) for line in found})
            text = spread([line["best"] for line in found])
            if found:
                lost = sum(bool(line["collapsed"]) for line in found)
                text += f"; {sizes[0]:,}" + f" to {sizes[-1]:,}" * (len(sizes) > 1)
                text += f"; lr {found[0]['lr']:g}" + f"; {lost} collapsed" * bool(lost)
            cells.append(text)
        body.append([row, *cells])
    if not any(on(row, task) for row in rows for task in tasks):
        return ""
    return report.table(["row", *(f"{task}: score; parameters; rate" for task in tasks)], body)


def controls_table() -> str:
    """Return the scores of the controls and what each of them is; "" if none was run."""
    table = scores_table(CONTROLS, BOTH)
    return table and (
        "Is it the choice of the components, the pruning, or neither? *Same ranks* is plain LoRA "
        "that has from the start, in each matrix, as many components as dora kept. *Shuffled* has "
        "the same numbers in other matrices. Both take LoRA's learning rate, the others dora's. "
        "*Measured cost*: before each pruning, which is then every 50 steps, each gate is closed "
        "once on a few training batches, and the score is what this adds to the loss. *r'* is the "
        "number of components per matrix at the start, 1 for dora 0.5. On MRPC dora prunes every "
        "50 steps anyway (Table 8).\n\n") + table


def steps_table() -> str:
    """Return the scores of the steps from LoRA to dora; "" if none was run."""
    table = scores_table(("lora 2", *STEPS, "dora 2"), BOTH)
    return table and (
        "What of dora helps, if the choice of the matrices does not? LoRA takes dora's learning "
        "rate, then its gates or its dropout, which applies to A x and not to x. With all three it "
        "is dora with two components in every matrix, no penalty and nothing pruned. The last step "
        "to dora starts with three per matrix and prunes one in three.\n\n") + table


def differences_table(pairs: Any, tasks: tuple[str, ...]) -> str:
    """Return a table of the differences between two rows or controls with the same seed; "" if no
    seed has both."""
    body = []
    for a, b in pairs:
        cells = []
        for task in tasks:
            first, second = ({line["seed"]: line for line in on(row, task)} for row in (a, b))
            seeds = [seed for seed in SEEDS if seed in first and seed in second]
            cells.append(", ".join(f"{first[seed]['best'] - second[seed]['best']:+.4f}"
                                   for seed in seeds) or "not run")
        body.append([f"{a} minus {b}", *cells])
    if all(cell == "not run" for line in body for cell in line[1:]):
        return ""
    return "The differences of the scores, by rising seed.\n\n" + report.table(
        ["rows", *tasks], body)


def plot() -> None:
    """Write results/glue.svg: score against parameters of the rows with all seeds, a panel per
    task."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no figure: pip install -r benchmarks/requirements.txt, then --report",
              file=sys.stderr)
        return
    whole = {task: {row: lines for row in ROWS if len(lines := on(row, task)) == len(SEEDS)}
             for task in EPOCHS}
    tasks = [task for task, rows in whole.items() if rows]
    if not tasks:
        return

    figure = Figure(figsize=(4.6 * len(tasks) + 1.4, 4.2), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharex=True)[0]
    for ax, task in zip(axes, tasks):
        for family, color in report.COLORS.items():
            found = [lines for row, lines in whole[task].items()
                     if row.rstrip("0123456789. ") == family]
            points = sorted((statistics.median(map(size, lines)),
                             sorted(line["best"] for line in lines)) for lines in found)
            if not points:
                continue
            if not points[0][0]:  # no place on a logarithmic axis, and often far below the others
                ax.text(0.98, 0.06, f"head alone: {statistics.median(points[0][1]):.3f}",
                        ha="right", transform=ax.transAxes)
                continue
            x = [place for place, _ in points]
            if x[0] > 1e6:  # on the axis it would squeeze the others into a corner
                scores = points[0][1]
                ax.axhspan(scores[0], scores[-1], color=color, alpha=0.08)
                ax.axhline(statistics.median(scores), color=color, ls="--",
                           label=f"{family} ({x[0] / 1e6:.0f} million)")
                continue
            y = [statistics.median(scores) for _, scores in points]
            low = [middle - scores[0] for middle, (_, scores) in zip(y, points)]
            high = [scores[-1] - middle for middle, (_, scores) in zip(y, points)]
            ax.errorbar(x, y, [low, high], fmt="o-", capsize=3, color=color, label=family)
        if task in LARGER_CLASS:
            ax.axhline(LARGER_CLASS[task], color="#999999", ls=":", label="larger class")
        ax.set_xscale("log")
        ax.set_xlabel("stored parameters, head left out")
        ax.set_ylabel(train_glue.TASKS[task].metrics[0] + " on dev")
        ax.set_title(f"{task}: median, smallest and largest of {len(SEEDS)} seeds", fontsize=10)
        ax.grid(alpha=0.3)
    handles = {label: handle for ax in figure.axes
               for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right center")
    report.save_figure(figure, HERE / "results" / "glue.svg")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *VARIANTS], metavar="ROW",
                        help='only these rows of the table, such as "dora 2"')
    parser.add_argument("--data-dir", type=Path, default=ROOT / "../shared/data/glue")
    parser.add_argument("--model-dir", type=Path,
                        default=ROOT / "../shared/models/minilm-l6-roberta")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="only write the tables")
    parser.add_argument("--short", action="store_true", help="check the machinery only, for CI")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.short:
        short(args)
    elif not args.report:
        report.make_all(LOG, lambda: to_do(args.stages), lambda c: run(c, args), args.rows)
    if not args.short:
        write_report()


def short(args: argparse.Namespace) -> None:
    """Check the held-out tenths, the search for a rate and the list of runs; train nothing."""
    folder = held_out(args.data_dir)
    for task, name, head, total in (
            ("stsb", "STS-B", 1, 5749), ("mrpc", "MRPC", 1, 3667), ("cola", "CoLA", 0, 8551)):
        train, dev = ((folder / name / f"{split}.tsv").read_text("utf-8").count("\n") - head
                      for split in ("train", "dev"))
        assert (train + dev, dev) == (total, TENTH[task]), name

    scores: dict[float, float] = {}  # of a method whose best rate is 1.6e-2
    while (rate := next_rate(scores)) is not None:
        scores[rate] = -abs(np.log(rate / 1.6e-2))
    assert max(scores, key=lambda rate: scores[rate]) == 1.6e-2 < max(scores)
    flat: dict[float, float] = {}  # of a method that learns at no rate
    while (rate := next_rate(flat)) is not None:
        flat[rate] = LARGER_CLASS["mrpc"]
    assert len(flat) == 8 and max(flat) == 4e-3
    assert best_rate({1e-3: 0.8085, 2e-3: 0.8173, 4e-3: 0.8178, 8e-3: 0.0}) == 2e-3
    assert next_rate({5e-3: 0.8175, 1e-2: 0.8178, 2e-2: 0.8}, 1e-2) == 2.5e-3
    assert next_rate({1e-3: 0.7377, 5e-4: 0.7268, 2e-3: 0.7623, 4e-3: 0.7623}, 1e-3) == 8e-3
    assert all(tuned in ROWS for tuned in TUNED)
    assert [(name, task) for name in CONTROLS for task in BOTH if repeats(name, task)
            ] == [("the default's score, pruned every 50 steps, 0.5", "mrpc")]
    for kind, order in ORDERS.items():
        _, undo = control(kind, {}, None)
        assert train_glue.Pruner is order
        undo()
        assert train_glue.Pruner is Pruner
    unpruned = dict(importance=None, schedule=None, penalty=None)  # the settings that prune nothing
    assert {**train_glue.METHODS["lora"], **STEPS[UNPRUNED][2]} == {
        **unpruned, "gate": DoRAConfig().gate, "dropout_on": DoRAConfig().dropout_on}
    assert report.machines([{"machine": "A"}, {"machine": "A"}]) == "A"
    assert report.machines([{"machine": "A"}, {"torch": "2"}]) == (
        "1 on A; 1 on a machine that was not noted, torch 2")
    check_measured()
    check_fixed_ranks()
    done = finished()
    left = sum(report.key_of(c) not in done for c in to_do(STAGES))
    print(f"{len(done)} finished runs on record, {left} can start")


def check_measured() -> None:
    """Compare what the measured control keeps with the component whose removal costs most, in a run
    without a stop and in one that continues from a checkpoint."""
    from measured import Measured
    worth = torch.tensor([1.0, 2.0, 4.0, 3.0])  # the rise of the loss per gate that is closed

    class Known(Measured):
        def loss(self) -> float:
            return -(self.model[0].c @ worth).item()

    known = Known(DoRAConfig(rank=1, start_rank=4, targets=("0",), beta1=0.0, beta2=None,
                             interval=3, budget_unit="components"))
    IMPORTANCE["measured"] = (known, "weights", torch.cat)
    config = dataclasses.replace(known.config, importance="measured")
    middle: dict[str, Any] = {}  # the state after five steps of the first run
    for _ in range(2):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        pruner = Pruner(inject(model, config), config, total_steps=20)
        known.model = model
        if middle:
            pruner.load_state_dict(middle)
        while not pruner.done:
            model(torch.ones(1, 4)).sum().backward()
            pruner.observe()
            pruner.step()
            if pruner.t == 5:
                middle = pruner.state_dict()
        assert pruner.mask.tolist() == [False, False, True, False], pruner.mask
    del IMPORTANCE["measured"]


def check_fixed_ranks() -> None:
    """Compare the ranks of a control that continues from a checkpoint with the given ones, which
    are shuffled over the matrices of equal shape only."""
    config = DoRAConfig(rank=2, targets=("0", "1", "2"), **train_glue.METHODS["lora"])
    for shuffle in (None, 1):
        first, second = (torch.nn.Sequential(*(torch.nn.Linear(4, n) for n in (4, 4, 5)))
                         for _ in range(2))
        state = None
        for model in (first, second):
            layers = fixed_ranks(inject(model, config), model, [2, 0, 1], shuffle)
            pruner = FixedRanks(layers, config, total_steps=20)
            if state:
                pruner.load_state_dict(state)
                compact_(model)  # as a run that continues does
            model(torch.ones(1, 4)).sum().backward()
            pruner.observe()
            pruner.step()
            state = pruner.state_dict()
            *shared, last = (getattr(layer, "rank", 0) for layer in model)
            assert last == 1 and sorted(shared) == [0, 2], shared
            assert shuffle or shared == [2, 0]
        assert pruner.t == 2, pruner.t


if __name__ == "__main__":
    try:
        main()
    except DoRAError as error:
        sys.exit(f"glue.py: error: {error}")
    except train_glue.Interrupted as stop:
        sys.exit(f"glue.py: {stop.args[0]}; the same command continues")
