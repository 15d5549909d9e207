"""The exercises of notebook 08: a right solution passes its check, and a wrong one is refused.

Needs notebooks/requirements.txt; without it this file is skipped.
"""
import re
import sys
from pathlib import Path

import pytest

import dora

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parent.parent / "notebooks"
CELLS = nbformat.read(FOLDER / "08_exercises.ipynb", as_version=4).cells
START = [i for i, cell in enumerate(CELLS) if cell.source.startswith("### Exercise")]

# ---- solutions by exercise: the notebook's own are added below -----------------------------------

IMPORTANCE = '\nIMPORTANCE["gradient"] = gradient_size, "gradients", torch.cat'
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
MATCH, UNDER = 'f".{name}".endswith(f".{target}")', 'f"{name}.".startswith(f"{skip}.")'
MISSING = "len(kept) == len(found)"


def score(line, row=IMPORTANCE):
    return f"def gradient_size(layers):\n    return {line}{row}"


def curve(line):
    return f'def straight(p, surplus):\n    return {line}\nSCHEDULES["straight"] = straight'


def decay(lines):
    return f'def decay(layers):\n    {lines}\nPENALTIES["decay"] = decay'


def skip(match=MATCH, under=UNDER, missing=MISSING):
    return SKIP.format(match=match, under=under, missing=missing)


N = "sum(len(layer.c) for layer in layers)"
ROWS = "for layer in layers for rows in (layer.A, layer.B.T)"

RIGHT = [
    (1, score("torch.stack([layer.c.grad.abs() for layer in layers]).flatten()")),
    (1, score("torch.cat([torch.maximum(layer.c.grad, -layer.c.grad) for layer in layers])")),
    (2, curve("surplus - __import__('math').floor(p * surplus)")),
    (2, curve("next(left for left in range(surplus + 1) if surplus - left <= surplus * p)")),
    (3, FLOOR.format("part[best] = part[best] + 1e6 * scores.max()")),
    (3, """
from dora import keep_mask
class FloorPruner(Pruner):
    floor = 0
    def _prune(self):
        scores = self.scores()
        if not scores.any():
            raise DoRAError("every score is 0")
        b = budget(self.t, self.total_steps, self.config, self.per_rank)
        rows = scores.view(-1, self.config.r_prime)
        first = torch.zeros(rows.shape, dtype=torch.bool)
        first.scatter_(1, rows.argsort(1, descending=True)[:, :self.floor], True)
        first = first.flatten()
        left = b - int(self.costs[first].sum())
        rest = torch.where(first, left + 1, self.costs)
        self._set_mask(first | keep_mask(scores, rest, left))
        self._close_gates()
"""),
    (4, decay(f"""n = {N}
    total = 0
    for layer in layers:
        for i in range(len(layer.c)):
            a, b = layer.A[i], layer.B[:, i]
            total = total + (a @ a) / len(a) + (b @ b) / len(b)
    return total / n""")),
    (5, skip(under='(name == skip or name.startswith(skip + "."))')),
    (5, skip(match='(name == target or name.endswith("." + target))')),
]

WRONG = [
    # the first layer's gradient repeated, layers or components reversed, no size, sorted
    (1, score("layers[0].c.grad.abs().repeat(len(layers))")),
    (1, score("torch.cat([layer.c.grad for layer in layers[::-1]]).abs()")),
    (1, score("torch.cat([layer.c.grad for layer in layers]).abs().flip(0)")),
    (1, score("torch.cat([layer.c.grad.flip(0) for layer in layers]).abs()")),
    (1, score("torch.cat([layer.c.grad for layer in layers])")),
    (1, score("-torch.cat([layer.c.grad for layer in layers])")),
    (1, score("torch.cat([layer.c.grad.abs().sort().values for layer in layers])")),
    # another quantity: squared, per layer, of A, of the weights, with the gate
    (1, score("torch.cat([layer.c.grad for layer in layers]).square()")),
    (1, score("torch.cat([layer.c.grad.abs() / layer.c.grad.norm() for layer in layers])")),
    (1, score("torch.cat([layer.c.grad.abs().mean().expand(3) for layer in layers])")),
    (1, score("torch.cat([layer.A.grad.norm(dim=1) for layer in layers])")),
    (1, score("torch.cat([layer.c.data.abs() for layer in layers])")),
    (1, score("sensitivity(layers)")),
    (1, score("torch.cat([layer.c.grad * layer.mask for layer in layers]).abs()")),
    (1, score("torch.cat([layer.c.grad * (layer.c != 0) for layer in layers]).abs()")),
    (1, score("sensitivity(layers) / torch.cat([layer.c for layer in layers]).abs()")),  # 0 / 0
    # in place, so that the optimizer gets other gradients
    (1, score("torch.cat([layer.c.grad.abs_() for layer in layers])")),
    (1, score("torch.cat([layer.c.grad for layer in layers]).abs()",
              IMPORTANCE.replace('"gradients"', '"weights"'))),
    # a constant surplus, rounding in the other direction, other curves, no whole number
    (2, curve("10 - int(10 * p)")),
    (2, curve("surplus - round(surplus * p)")),
    (2, curve("surplus - __import__('math').ceil(surplus * p)")),
    (2, curve("int(surplus * (1 - p))")),
    (2, curve("round(surplus * (1 - p))")),
    (2, curve("surplus - int(surplus * p**2)")),
    (2, curve("surplus - int(surplus * p) // 10 * 10")),
    (2, curve("surplus - int(surplus * p) - (surplus > 100)")),
    (2, curve("surplus * (1 - p)")),
    (2, curve("surplus - float(int(surplus * p))")),
    (2, curve("surplus - surplus * p // 1")),
    (2, curve("surplus - int(surplus * min(p * 70 / 69, 1))")),
    (2, curve("0 if p == 1 else surplus")),
    # a floor of 0 or 1, one in the first or last matrix only, the worst, by position
    (3, FLOOR.format("part[best[:1]] += 2 * scores.max()")),
    (3, FLOOR.format("part[best] += 2 * scores.max() * (k == 0)")),
    (3, FLOOR.format("part[best] += 2 * scores.max() * (k < 2)")),
    (3, FLOOR.format("part[part.argsort()[:self.floor]] += 2 * scores.max()")),
    (3, FLOOR.format("part[:self.floor] += 2 * scores.max()")),
    # a raise that is too small for some scores, or none for a score of 0
    (3, FLOOR.format("part[best] += 100")),
    (3, FLOOR.format("part[best] += 1")),
    (3, FLOOR.format("part[best] *= 1e9")),
    (3, FLOOR.format("part[best] += 2 * part.max()")),
    (3, FLOOR.format("part[best] += scores.mean()")),
    (3, FLOOR.format("part[best] = float('inf')")),
    # all of a matrix raised, scores per parameter or ranks in place of scores, late or early only
    (3, FLOOR.format("part += 2 * scores.max() * (self.floor > 0)")),
    (3, FLOOR.replace("super().scores().clone()", "super().scores() / self.costs").format(
        "part[best] += 2 * scores.max()")),
    (3, FLOOR.format("part[best] += 2 * scores.max() * (self.t == self.last)")),
    (3, FLOOR.format("part[best] += 2 * scores.max() * (self.t != self.last)")),
    (3, FLOOR.format("part[best] += 2 * scores.max() * (self.t > 10)")),
    (3, FLOOR.format("part[best] += 1 + 2 * scores.max()")),  # no check of scores that are all 0
    (3, FLOOR.format("part[best] += 2 * scores.max()").replace("self.floor", "FloorPruner.floor")),
    (3, FLOOR.replace("super().scores().clone()", "self.I_bar[0]").format(
        "part[best] += 2 * scores.max()")),  # changes the averages
    # half of the budget, or none, until the last pruning
    (3, FLOOR.format("part[best] += 2 * scores.max()") + """
    def _prune(self):
        if self.t == self.last or self.t % 2:
            super()._prune()
"""),
    # the floor is not paid from the budget
    (3, """
class FloorPruner(Pruner):
    floor = 0
    def _prune(self):
        super()._prune()
        rows = self.scores().view(-1, self.config.r_prime)
        first = torch.zeros(rows.shape, dtype=torch.bool)
        first.scatter_(1, rows.argsort(1, descending=True)[:, :self.floor], True)
        self._set_mask(self.mask | first.flatten())
"""),
    (4, decay("return dem_penalty(layers)")),
    # square of the mean, sums in place of means, the largest, the first entry
    (4, decay(f"return sum(rows.mean(1).square().sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.square().sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.square().sum(1).sqrt().sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.abs().mean(1).sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.square().amax(1).sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows[:, 0].square().sum() {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.square().sum() / (rows.shape[1] - 1) {ROWS}) / {N}")),
    (4, decay(f"return sum(rows.var(1).sum() {ROWS}) / {N}")),
    # a mean of means, another n, only A, one side transposed
    (4, decay(f"return sum(rows.square().mean() {ROWS}) / len(layers)")),
    (4, decay(f"return sum(rows.square().mean(1).sum() {ROWS})")),
    (4, decay(f"return sum(rows.square().mean(1).sum() {ROWS}) / len(layers)")),
    (4, decay(f"return sum(rows.square().mean(1).sum() {ROWS}) / {N} / 2")),
    (4, decay(f"return sum(layer.A.square().mean(1).sum() for layer in layers) / {N}")),
    (4, decay("return sum(m.square().mean(1).sum() for layer in layers for m in (layer.A, layer.B))"
              f" / {N}")),
    (4, decay("return sum(layer.A.square().mean(1).sum() + layer.B.square().mean() * 3 "
              f"for layer in layers) / {N}")),
    # with the gates, live components only, without a gradient, one per layer
    (4, decay("return sum((layer.c**2 * (layer.A.square().mean(1) + layer.B.square().mean(0)))"
              f".sum() for layer in layers) / {N}")),
    (4, decay("return sum((layer.mask * (layer.A.square().mean(1) + layer.B.square().mean(0)))"
              ".sum() for layer in layers) / sum(int(layer.mask.sum()) for layer in layers)")),
    (4, decay(f"return sum(rows.detach().square().mean(1).sum() {ROWS}) / {N}")),
    (4, decay("return sum(layer.A.square().mean(1).sum() + layer.B.detach().square().mean(0).sum()"
              f" for layer in layers) / {N}")),
    (4, decay("with torch.no_grad():\n"
              f"        return sum(rows.square().mean(1).sum() {ROWS}) / {N}")),
    (4, decay("return torch.stack([layer.A.square().mean(1).sum() for layer in layers])")),
    (4, decay(f"return 0.5 * sum(rows.square().mean(1).sum() {ROWS}) / {N}")),
    (5, "def targets_without(model, targets, skip):\n    return targets"),
    # the prefix anywhere, without its dot, by its last word
    (5, skip(under='f".{skip}." in f".{name}."')),
    (5, skip(under="skip in name")),
    (5, skip(under="name.startswith(skip)")),
    (5, skip(under='f"{name}.".startswith(skip)')),
    (5, skip(under='skip.split(".")[-1] in name.split(".")')),
    (5, skip(under='name.startswith(skip + ".")')),
    (5, skip(under='name.rpartition(".")[0] == skip')),
    (5, skip(under='__import__("re").match(skip, name)')),
    (5, skip(under='__import__("re").match(skip + "[.]", name)')),
    (5, skip(under='__import__("re").match(skip + "(?![0-9])", name)')),
    # targets by any end, by their last word, or only the first of them
    (5, skip(match="name.endswith(target)")),
    (5, skip(match="target in name")),
    (5, skip(match='name.split(".")[-1] == target.split(".")[-1]')),
    (5, skip(match='name.split(".")[-1] == target')),
    (5, skip(match='f".{name}".endswith(f".{targets[0]}")')),
    # no error, or one only for what is not a module
    (5, skip(missing="False")),
    (5, skip(missing="not dict(model.named_modules()).keys() & {skip}")),
    (5, skip(missing="not any(name.startswith(skip) for name, _ in model.named_modules())")),
    (5, skip(missing="not any(name.startswith(skip) for name in found)")),
    (5, skip(missing="not kept")),
    (5, skip().replace("DoRAError", "KeyError")),
    # no tuple, sorted, short names, a name twice
    (5, skip().replace("tuple(", "list(")),
    (5, skip().replace("return kept", "return tuple(sorted(kept))")),
    (5, skip().replace("return kept", "return kept[::-1]")),
    (5, skip().replace("return kept", "return tuple(targets)")),
    (5, skip().replace("return kept", "return kept + kept[:1]")),
]


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
    """Undo what a notebook changes for all: dora.py's tables, torch's default dtype, the path."""
    import torch
    dtype, threads, path = torch.get_default_dtype(), torch.get_num_threads(), sys.path[:]
    tables = dora.IMPORTANCE, dora.SCHEDULES, dora.PENALTIES
    before = [dict(table) for table in tables]
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for table, rows in zip(tables, before):
        table.clear()
        table.update(rows)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    sys.path[:] = path


def test_there_are_five():
    assert len(START) == 5


@pytest.mark.parametrize("number", range(1, 6))
def test_as_it_is(number):
    """The exercise is not solved yet, and the hint does not name a fault of the check's own."""
    lines = outcome(number, None)
    assert lines and all("not yet (AssertionError" in line for line in lines)


@pytest.mark.parametrize("number", range(1, 6))
def test_right(number):
    """The notebook's solution, and others that are right, are done."""
    others = [solution for other, solution in RIGHT if other == number]
    for solution in (own_solution(number), *others):
        lines = outcome(number, solution)
        assert lines and all(line.endswith(": done") for line in lines), (solution, lines)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_wrong(number):
    """Each wrong solution is refused by at least one check of its exercise."""
    wrong = [solution for other, solution in WRONG if other == number]
    assert len(wrong) > 10
    for solution in wrong:
        lines = outcome(number, solution)
        assert any("not yet" in line for line in lines), (solution, lines)
