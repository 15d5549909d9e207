"""What runs when: the default is fast and needs only requirements.txt; --slow adds the rest."""
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("", "benchmarks", "notebooks")]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also whole runs, fuzzing, notebooks")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer test, left out unless --slow is given")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("--slow"):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_ignore_collect(collection_path, config):
    """Leave out what needs more than requirements.txt: tests/peers unless it is asked for by path,
    notebooks and fuzzing where nbclient or hypothesis is not installed."""
    asked = any("peers" in str(arg) for arg in config.args)
    if collection_path.name == "peers" and not asked:
        return True
    needs = {"test_notebooks.py": "nbclient", "test_fuzz.py": "hypothesis"}
    library = needs.get(collection_path.name)
    return True if library and not importlib.util.find_spec(library) else None
