"""The exercises of notebook 08: a right solution passes its check, and a wrong one is refused.

Needs notebooks/requirements.txt; without it this file is skipped.
"""
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dora import IMPORTANCE, PENALTIES, SCHEDULES

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parent.parent / "notebooks"
CELLS = nbformat.read(FOLDER / "08_exercises.ipynb", as_version=4).cells
START = [i for i, cell in enumerate(CELLS) if cell.source.startswith("### Exercise")]

# ---- solutions by exercise: the notebook's own are added below -----------------------------------

ROW = 'IMPORTANCE["gradient"] = gradient_size, "gradients", torch.cat'
FLOOR = """
class FloorPruner(Pruner):
    floor = 0
    def scores(self):
        scores = super().scores().clone()
        for k, part in enumerate(scores.split(self.config.r_prime)):
            best = part.argsort(descending=True, stable=True)[:self.floor]
            {}
        return scores
"""
SKIP = """
def targets_without(model, targets, skip):
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
             and any({match} for target in targets)]
    kept = tuple(name for name in found if not {under})
    if {missing}:
        raise DoRAError("no target begins with it")
    return kept
"""


def score(line, row=ROW):
    return f"def gradient_size(layers):\n    return {line}\n{row}"


def curve(line):
    return f'def straight(p, surplus):\n    return {line}\nSCHEDULES["straight"] = straight'


def floor(line):
    return FLOOR.format(line)


def decay(lines):
    return f'def decay(layers):\n    {lines}\nPENALTIES["decay"] = decay'


def skip(match='f".{name}".endswith(f".{target}")', under='f"{name}.".startswith(f"{skip}.")',
         missing="len(kept) == len(found)"):
    return SKIP.format(match=match, under=under, missing=missing)


N = "sum(len(layer.c) for layer in layers)"
ROWS = "for layer in layers for rows in (layer.A, layer.B.T)"
RAISE = "part[best] += 2 * scores.max()"

RIGHT = {
    1: [score("torch.stack([layer.c.grad.abs() for layer in layers]).flatten()")],
    2: [curve("surplus - __import__('math').floor(p * surplus)")],
    3: [floor("part[best] = part[best] + 1e6 * scores.max()")],
    4: [decay(f"return sum((rows @ rows.T).trace() / rows.shape[1] {ROWS}) / {N}")],
    5: [skip(under='(name == skip or name.startswith(skip + "."))'),
        skip(match='(name == target or name.endswith("." + target))')],
}

WRONG = {
    1: [  # reversed, signed, sorted, per layer, another quantity, in place, at the wrong moment
        score("torch.cat([layer.c.grad for layer in layers])"),
        score("torch.cat([layer.c.grad.abs().sort().values for layer in layers])"),
        score("torch.cat([layer.A.grad.norm(dim=1) for layer in layers])"),
        score("torch.cat([layer.c.grad * layer.mask for layer in layers]).abs()"),
        score("sensitivity(layers) / torch.cat([layer.c for layer in layers]).abs()"),  # 0 / 0
        score("torch.cat([layer.c.grad.abs_() for layer in layers])"),
        score("torch.cat([layer.c.grad for layer in layers]).abs()",
              ROW.replace('"gradients"', '"weights"')),
    ],
    2: [  # a constant surplus, rounding in the other direction, other curves, no whole number
        curve("surplus - round(surplus * p)"),
        curve("surplus - __import__('math').ceil(surplus * p)"),
        curve("int(surplus * (1 - p))"),
        curve("surplus - int(surplus * p**2)"),
        curve("surplus - surplus * p // 1"),
        curve("surplus - int(surplus * min(p * 70 / 69, 1))"),
    ],
    3: [  # too few, the wrong ones, a raise that is too small or none, at some steps only
        floor("part[best[:1]] += 2 * scores.max()"),
        floor("part[part.argsort()[:self.floor]] += 2 * scores.max()"),
        floor("part[best] += 100"),
        floor("part[best] = float('inf')"),
        floor("part[best] += 1 + 2 * scores.max()"),  # no check of scores that are all 0
        floor(RAISE).replace("super().scores().clone()", "super().scores() / self.costs"),
        floor(RAISE).replace("super().scores().clone()", "self.I_bar[0]"),  # changes the averages
    ],
    4: [  # other norms, another n, one side only, the gates, live components, no gradient
        decay("return dem_penalty(layers)"),
        decay(f"return sum(rows.mean(1).square().sum() {ROWS}) / {N}"),
        decay(f"return sum(rows.square().sum() / (rows.shape[1] - 1) {ROWS}) / {N}"),
        decay(f"return sum(layer.A.square().mean(1).sum() for layer in layers) / {N}"),
        decay("return sum((layer.c**2 * (layer.A.square().mean(1) + layer.B.square().mean(0)))"
              f".sum() for layer in layers) / {N}"),
        decay("return sum((layer.mask * (layer.A.square().mean(1) + layer.B.square().mean(0)))"
              ".sum() for layer in layers) / sum(int(layer.mask.sum()) for layer in layers)"),
        decay(f"return sum(rows.detach().square().mean(1).sum() {ROWS}) / {N}"),
        decay("return torch.stack([layer.A.square().mean(1).sum() for layer in layers])"),
    ],
    5: [  # the prefix anywhere or without its dot, targets by any end, no error, no tuple, sorted
        skip(under='f".{skip}." in f".{name}."'),
        skip(under="name.startswith(skip)"),
        skip(match='f".{name}".endswith(f".{targets[0]}")'),
        skip(missing="False"),
        skip(missing="not any(name.startswith(skip) for name in found)"),
        skip().replace("DoRAError", "KeyError"),
        skip().replace("tuple(", "list("),
        skip().replace("return kept", "return tuple(sorted(kept))"),
    ],
}


def own_solution(number):
    """Return the code in the exercise's folded solution."""
    source = CELLS[START[number - 1]].source
    return re.search(r"Solution</summary>\n\n```python\n(.*?)```", source, re.DOTALL)[1]


def outcome(number, solution):
    """Return what the exercise's checks print if its cell holds the solution. None: as it is."""
    end = [*START, len(CELLS)][number]
    first = START[number - 1] + 1
    space, said = {}, []
    space["print"] = lambda *words, **how: said.append(" ".join(map(str, words)))
    for i, cell in enumerate(CELLS[:end]):
        if cell.cell_type == "code" and (i < START[0] or i >= first):
            exec(solution if i == first and solution else cell.source, space)
    return [line for line in said if line.startswith(f"{number}, ")]


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Undo what a notebook changes for all: the path, dora.py's tables, torch's settings."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    monkeypatch.syspath_prepend(str(FOLDER))
    with patch.dict(IMPORTANCE), patch.dict(SCHEDULES), patch.dict(PENALTIES):
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(1, 6))
def test_solutions(number):
    """As it is, the exercise is not solved, and the hint does not name a fault of the check's own.
    The notebook's solution, and others that are right, are done."""
    assert len(START) == 5
    lines = outcome(number, None)
    assert lines and all("not yet (AssertionError" in line for line in lines)
    for solution in (own_solution(number), *RIGHT[number]):
        lines = outcome(number, solution)
        assert lines and all(line.endswith(": done") for line in lines), (solution, lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_wrong(number):
    """Each wrong solution is refused by at least one check of its exercise."""
    for solution in WRONG[number]:
        lines = outcome(number, solution)
        assert any("not yet" in line for line in lines), (solution, lines)
