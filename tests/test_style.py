"""The three files against the rules they are written by: docstrings, names, types, style."""
import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import dora
import train_glue

ROOT = Path(__file__).parent.parent
MODULES = (dora, data, train_glue)
SHAPE = re.compile(r"scalar|any shape|\([\w' /.]+,[^)]*\)")        # (N,)  (B, T, D)  (d_out, r')


def raised(function):
    """What a function raises itself: names of classes."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    return {ast.unparse(node.exc).split("(")[0] for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and node.exc}


def public(module):
    """(name, function or class) of all that a module defines, methods and properties too."""
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        value = inspect.unwrap(value) if callable(value) else value
        if inspect.isclass(value) or inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for part, method in vars(value).items():
                method = method.fget if isinstance(method, property) else getattr(
                    method, "__func__", method)
                method = inspect.unwrap(method) if callable(method) else method
                if inspect.isfunction(method) and not part.startswith("_") and \
                        method.__module__ == module.__name__:
                    yield f"{module.__name__}.{name}.{part}", method


NAMES = [pair for module in MODULES for pair in public(module)]


def test_that_names_are_found():
    """The list that the next test walks against names of each kind."""
    names = {name for name, _ in NAMES}
    assert {"dora.DoRALinear", "dora.DoRALinear.forward", "dora.DoRAConfig.r_prime", "dora.budget",
            "dora.Pruner.observe", "data.BPE.pieces", "data.ascii_like", "data.pearson",
            "train_glue.Run.check", "train_glue.main", "train_glue.predict"} <= names
    assert len(names) > 120


@pytest.mark.parametrize("name, value", NAMES, ids=[name for name, _ in NAMES])
def test_docstrings(name, value):
    """Every public name has a docstring of its own; a function of tensors or arrays gives their
    shapes in it, one that raises an error names the kind."""
    doc = value.__doc__ or ""
    assert doc and not doc.startswith(f"{value.__name__}(")         # a dataclass's made-up one
    if inspect.isfunction(value):
        types = " ".join(map(str, value.__annotations__.values()))
        assert "return" in value.__annotations__, "no type hints"
        assert not re.search("Tensor|ndarray", types) or SHAPE.search(doc), "no shape"
        assert not raised(value) or re.search("Error|error|raises", doc), "no error"


def test_equations_have_one_function():
    """Each equation's number stands in the docstring of the function that README names for it."""
    for equation, value in (("(Eq. 6)", dora.DoRALinear), ("(Eq. 7)", dora.norm_score),
                            ("Eq. 8", dora.Pruner._smooth), ("(Eq. 9)", dora.budget),
                            ("(Eq. 10)", dora.dem_penalty), ("Algorithm 1", dora.Pruner),
                            ("AdaLoRA's Eq. 8", dora.sensitivity)):
        assert equation in value.__doc__


def test_functions_fit_a_screen():
    """A function has at most 70 lines; train alone, whose loop stands in the open, and
    load_adapter, which checks all before it changes anything, have more."""
    long = {name for name, value in NAMES if inspect.isfunction(value)
            and len(inspect.getsource(value).splitlines()) > 70}
    assert long <= {"train_glue.train", "dora.load_adapter"}


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
