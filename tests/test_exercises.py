"""The exercises of notebooks 04 and 08: a right solution passes its check, a wrong one is refused.
It is skipped without notebooks/requirements.txt."""
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

GRAD, RAISE = "layer.c.grad for", "part[best] += 2 * top"
SQUARE = "rows.square().mean(1)"
MATCH, UNDER = 'f".{name}".endswith(f".{target}")', 'f"{name}.".startswith(f"{skip}.")'
RIGHT = {  # by exercise: a part of the notebook's solution, and what may stand in its place
    1: ("torch.cat([layer.c.grad for layer in layers]).abs()",
        "torch.stack([layer.c.grad.abs() for layer in layers]).flatten()"),
    2: ("int(surplus * p)", "__import__('math').floor(p * surplus)"),
    3: (RAISE, "part[best] = part[best] + 1e6 * top"),
    4: (f"{SQUARE}.sum()", "(rows @ rows.T).trace() / rows.shape[1]"),
    5: (UNDER, '(name == skip or name.startswith(skip + "."))')}
WRONG = {  # by exercise: the same, and what is wrong
    1: [("in layers", "in layers[::-1]"), (".abs()", ""),
        (GRAD, "layer.c.grad.flip(0) for"), (GRAD, "layer.A.grad.norm(dim=1) for"),
        ('"gradients"', '"weights"'), (GRAD, "layer.c.grad.abs_() for")],  # changes the gradients
    2: [("int(surplus * p)", "round(surplus * p)"),
        ("surplus - int(surplus * p)", "10 - int(10 * p)"), ("surplus * p)", "surplus * p**2)"),
        ("int(surplus * p)", "surplus * p // 1")],  # not a whole number
    3: [("[:self.floor]", "[:1]"), ("descending=True, ", ""),
        (RAISE, "part[best] += scores.mean()"), (RAISE, "part[best] = float('inf')"),
        (RAISE, "part[best] += 1 + 2 * top"),  # no check of scores that are all 0
        (RAISE, "part[best] += 2 * top * (self.t == self.last)"),
        ("super().scores().clone()", "self.I_bar[0]")],  # changes the averages
    4: [(SQUARE, "rows.var(1)"), (SQUARE, "rows.square().sum(1)"),
        (SQUARE, "rows.detach().square().mean(1)"), (SQUARE, f"layer.c.abs() * {SQUARE}"),
        ("(layer.A, layer.B.T)", "(layer.A, layer.B)"), ("len(layer.c)", "int(layer.mask.sum())")],
    5: [(UNDER, "name.startswith(skip)"), (UNDER, 'name.startswith(skip + ".")'),
        (MATCH, "name.endswith(target)"), ("len(kept) == len(found)", "False"),
        ("DoRAError", "KeyError"), ("return kept", "return tuple(targets)")]}


def solution(cell, right="", other=""):
    """Return the code in the exercise's folded solution, with one part replaced by another."""
    code = re.search(r"Solution</summary>\n\n```python\n(.*?)```", cell.source, re.DOTALL)[1]
    assert right in code
    return code.replace(right, other) if right else code


def outcome(number, solution):
    """Return what the exercise's checks print if its cell holds the solution. None: as it is."""
    first, end = START[number - 1] + 1, [*START, len(CELLS)][number]
    space, said = {}, []
    space["print"] = lambda *words, **how: said.append(" ".join(map(str, words)))
    for i, cell in enumerate(CELLS[:end]):
        if cell.cell_type == "code" and (i < START[0] or i >= first):
            exec(solution if i == first and solution else cell.source, space)
    return [line for line in said if line.startswith(f"{number}, ")]


@pytest.fixture(autouse=True)
def untouched():
    """Undo what a notebook changes for all: dora.py's tables and torch's settings."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with patch.dict(IMPORTANCE), patch.dict(SCHEDULES), patch.dict(PENALTIES):
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", range(1, 6))
def test_right(number):
    """As it is, the exercise is not solved, and the hint does not name a fault of the check's own.
    The notebook's solution, and another that is right, are done."""
    assert len(START) == 5
    lines = outcome(number, None)
    assert lines and all("not yet (AssertionError" in line for line in lines)
    cell = CELLS[START[number - 1]]
    for code in (solution(cell), solution(cell, *RIGHT[number])):
        lines = outcome(number, code)
        assert lines and all(line.endswith(": done") for line in lines), (code, lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_wrong(number):
    """A solution that is wrong in one place is refused by at least one check of its exercise."""
    for right, wrong in WRONG[number]:
        lines = outcome(number, solution(CELLS[START[number - 1]], right, wrong))
        assert any("not yet" in line for line in lines), (right, wrong)


YOURS = nbformat.read(FOLDER / "04_budget_and_pruning.ipynb", as_version=4).cells
WRONG_PRUNERS = [
    ("self.I_bar * self.U_bar", "self.I_bar"),  # no uncertainty
    (" or after == window)", ")"),  # the last pruning depends on the interval
    ("sum(layer.base.weight.shape) for", "1 for"),  # components in place of parameters
    ("left -= self.costs[i] * int(self.mask[i])", "left -= self.costs[i]"),  # pays for the pruned
    ("elif after <= window:", "else:"),  # the mask is not held after the last pruning
    ("(1 - after / window) ** 3", "(1 - (after / window) ** 3)")]  # slow first


def first_differences(code):
    """Yield what the exercise's check finds for a solution: a step for each case, None if equal."""
    from toy import race

    layer, cases = (next(cell.source for cell in YOURS if cell.source.startswith(start))
                    for start in ("class Components", "cases ="))
    names = {"torch": torch, "nn": torch.nn}
    for source in (layer, code, cases.split("for case")[0]):
        exec(source, names)
    for case in names["cases"]:
        yield race(names["Components"], names["MyPruner"], **case)


@pytest.mark.slow
def test_your_turn():
    """The folded solution equals dora.py's Pruner bit for bit in every step of every case. One that
    is wrong in one place differs in at least one case."""
    torch.set_default_dtype(torch.float64)
    cell = next(cell for cell in YOURS if "```python\nclass MyPruner" in cell.source)
    assert [*first_differences(solution(cell))] == [None] * 5
    for right, wrong in WRONG_PRUNERS:
        assert any(first_differences(solution(cell, right, wrong))), wrong
