"""The notebooks: each runs from top to bottom, prints again what is stored, and keeps to its form.
It is skipped without notebooks/requirements.txt."""
import ast
import copy
import functools
import math
import re
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?")
SECONDS = 180  # for a busy machine; one that does nothing else needs less than 60: see 00


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(source):
    """A cell's syntax tree; a line for IPython, such as %matplotlib, is not Python."""
    return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))


def sections(notebook):
    """Code cells under each heading of level two; what stands before the first is left out."""
    found, title = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^## (.+)$", cell.source, re.MULTILINE)
            title = headings[-1] if headings else title
        elif cell.cell_type == "code" and title:
            found.setdefault(title, []).append(cell)
    return found


def defined(tree):
    """Names of the functions and classes at the top level of a source."""
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def shown(cell):
    """What a code cell printed or evaluated to, as text."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "")
                   for output in cell.outputs
                   if "image/png" not in output.get("data", {}))


def same_text(stored, fresh):
    """Equal but for numbers, which need to agree to three significant digits only."""
    words, numbers = [], []
    for text in (stored, fresh):
        words.append(NUMBER.sub("#", text).split())
        numbers.append([float(number.replace(",", "")) for number in NUMBER.findall(text)])
    # half a unit of the third digit of each rounding, so 1 in 200 at worst
    near = functools.partial(math.isclose, rel_tol=5e-3, abs_tol=1e-9)
    return words[0] == words[1] and all(map(near, *numbers))


def test_the_folder():
    """At least 12 notebooks, numbered from 00 without a gap, have less than 4 MB together. Their
    first cells name the paper and which DoRA it is, and link to the neighbours."""
    assert [int(name[:2]) for name in NAMES] == [*range(len(NAMES))]
    assert len(NAMES) >= 12
    assert sum((FOLDER / name).stat().st_size for name in NAMES) < 4e6
    neighbours = zip(["", *NAMES], NAMES, [*NAMES[1:], ""])
    for before, name, after in neighbours:
        first = read(name).cells[0].source
        assert "arxiv.org/abs/2405.17357" in first and "NVIDIA" in first
        linked = re.findall(r"\]\((\d\d_\w+\.ipynb)\)", first)
        assert {before, after} - {""} <= {*linked} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """Cells of at most 15 lines, an assert in each section, nothing defined that the modules
    define, outputs stored in order, no error, no stderr and no path of a machine in them."""
    notebook, known = read(name), set()
    for path in ROOT.glob("*.py"):
        known |= defined(ast.parse(path.read_text("utf-8")))
    for count, cell in enumerate(code_cells(notebook), 1):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert not defined(python(cell.source)) & known, cell.source
        assert cell.execution_count == count, "run it from top to bottom, then save"
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output
        text = shown(cell)
        assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users|var)/", text), text
    found = sections(notebook)
    assert found
    for title, cells in found.items():
        nodes = [node for cell in cells for node in ast.walk(python(cell.source))]
        assert any(isinstance(node, ast.Assert) for node in nodes), title


def test_same_text():
    """The comparison sees another word, sign, count or third digit, and nothing finer."""
    assert same_text("W0 and A[1] = 0.1234", "W0  and\nA[1] = 0.1236")
    for fresh in ("W0 and A[1] = 0.1264", "W0 and A[2] = 0.1234", "W0 and A[1] = -0.1234",
                  "W0 and A[1] is 0.1234", "W0 and A[1] = 0.1234 more"):
        assert not same_text("W0 and A[1] = 0.1234", fresh)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    """Executed, no cell fails, each prints what is stored and draws as many figures."""
    stored = read(name)
    fresh = copy.deepcopy(stored)
    started = time.monotonic()
    nbclient.NotebookClient(fresh, timeout=SECONDS, kernel_name="python3",
                            resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert time.monotonic() - started < SECONDS
    for old, new in zip(code_cells(stored), code_cells(fresh), strict=True):
        assert same_text(shown(old), shown(new)), (
            f"stored:\n{shown(old)}\nfresh:\n{shown(new)}\nof:\n{old.source}\n"
            f"if that is meant, run the notebook and save it")
        figures = [sum("image/png" in output.get("data", {}) for output in cell.outputs)
                   for cell in (old, new)]
        assert figures[0] == figures[1]
