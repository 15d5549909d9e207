"""The three files against the rules that they are written by: docstrings, types, sizes, style."""
import ast
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

import dora

ROOT = Path(__file__).parent.parent
LOUD = "# You can stop reading here: what follows is plumbing"
FILES = ("dora", "data", "train_glue")
SOURCE = {name: (ROOT / f"{name}.py").read_text("utf-8") for name in FILES}
LINES = {name: text.splitlines() for name, text in SOURCE.items()}


def public(tree, owner):
    """(dotted name, node) of each function, class and method that a file defines."""
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if named and not node.name.startswith("_"):
            yield f"{owner}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{owner}.{node.name}")


NAMES = {}
for file, text in SOURCE.items():
    NAMES |= public(ast.parse(text), file)


def test_docstrings():
    """Every public name has a docstring, and every function says what it returns."""
    assert {"dora.DoRALinear.forward", "dora.DoRAConfig.r_prime", "dora.Pruner.observe",
            "data.BPE.pieces", "train_glue.main"} <= NAMES.keys()
    for name, node in NAMES.items():
        assert ast.get_docstring(node), name
        assert isinstance(node, ast.ClassDef) or node.returns, name


def test_equations_have_one_function():
    """Each equation's number is in the docstring of the function that README names for it."""
    for equation, value in (("(Eq. 6)", dora.DoRALinear), ("(Eq. 7)", dora.norm_score),
                            ("Eq. 8", dora.Pruner._smooth), ("(Eq. 9)", dora.budget),
                            ("(Eq. 10)", dora.dem_penalty), ("Algorithm 1", dora.Pruner),
                            ("AdaLoRA's Eq. 8", dora.sensitivity)):
        assert equation in value.__doc__


def test_functions_fit_a_screen():
    """A function has at most 60 lines, but for load_adapter, which checks before it changes."""
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in NAMES.items()
               if isinstance(node, ast.FunctionDef)}
    assert {name for name, length in lengths.items() if length > 60} <= {"dora.load_adapter"}
    assert lengths["train_glue.train"] + lengths["train_glue.backward"] <= 120


def test_two_halves():
    """Each file says once where one can stop reading, and both halves have the length of a file
    that a student finishes; RoBERTa stays under 170 lines."""
    sizes = {"dora": (1100, 465), "data": (950, 590), "train_glue": (1610, 380)}
    for name, (whole, half) in sizes.items():
        (found,) = [i for i, line in enumerate(LINES[name]) if line.startswith(LOUD)]
        assert found <= half and len(LINES[name]) <= whole, name
    sections = [i for i, line in enumerate(LINES["train_glue"]) if line.startswith("# ---- ")]
    assert LINES["train_glue"][sections[0]].startswith("# ---- RoBERTa by hand")
    assert sections[1] - sections[0] - 2 < 170


def test_imports():
    """dora.py can be copied alone beside torch, and data.py knows nothing of models."""
    others = {"dora": {"torch"}, "data": {"numpy", "torch", "tqdm", "dora"}}
    for name, expected in others.items():
        found = re.findall(r"^ *(?:import|from) (\w+)", SOURCE[name], re.MULTILINE)
        assert {*found} - {*sys.stdlib_module_names} == expected
    assert "\nfrom dora import atomic_file\n" in SOURCE["data"]
    assert not re.search(r"torch\.nn|\bnn\.", SOURCE["data"])


@pytest.mark.parametrize("folder", ["", "benchmarks", "tests", "tests/fixtures", "tests/peers"])
def test_density(folder):
    """No line is bought by packing: at most 11 tokens on average in the lines that have some, in
    each file, and more than 25 in under 4.5 % of its lines."""
    silent = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for path in (ROOT / folder).glob("*.py"):
        text = path.read_text("utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        lines = Counter(token.start[0] for token in tokens if token.type not in silent).values()
        assert sum(lines) <= 11 * len(lines), path.name
        assert sum(n > 25 for n in lines) < 0.045 * text.count("\n"), path.name


def test_the_map_names_what_exists():
    """tests/README.md against the files: the table names each test file once, and no other."""
    text = (ROOT / "tests/README.md").read_text("utf-8")
    named = re.findall(r"\b(test_\w+\.py)\b", text)
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["ruff", "check", "."], ["mypy", "--ignore-missing-imports", "--disallow-untyped-defs",
                             "dora.py", "data.py", "train_glue.py"]], ids=["ruff", "mypy"])
def test_checkers(words):
    """ruff on the whole repository, mypy on the three files: no complaint."""
    if not importlib.util.find_spec(words[0]):
        pytest.skip("needs tests/requirements.txt")
    found = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
