"""Break the source in sixteen ways, one at a time, and see whether the tests notice. Run by hand:

    python tests/mutations.py            all of them, a minute or two each on one core at most
    python tests/mutations.py 3 12       these alone

Each row is applied to a copy of the checkout. A text that is not found exactly once is an error:
the source has changed, so change the row. The exit code is 1 if a mutation was missed.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# what the mutated source does; the file; a text that is found in it exactly once, and another in
# its place; the file of tests/ that must fail with it
MUTATIONS = [
    ("forward leaves the scale out (Eq. 6)", "dora.py",
     "B = (self.scale * self.c * self.B).T.contiguous()",
     "B = (self.c * self.B).T.contiguous()", "test_dora.py"),
    ("no last pruning on step T - t_f", "dora.py",
     "if due or self.t == self.last:", "if due:", "test_pruner.py"),
    ("an adapter's B is saved without the scale", "dora.py",
     "B = (layer.scale * layer.c * layer.B)[:, layer.mask]",
     "B = (layer.c * layer.B)[:, layer.mask]", "test_adapter.py"),
    ("the penalty continues after the last pruning", "dora.py",
     "if self.config.penalty is None or self.done:",
     "if self.config.penalty is None:", "test_importance.py"),
    ("a resumed run draws other random numbers", "train_glue.py",
     "RANDOM[kind].set_rng_state(rng[kind])", "pass", "test_resume.py"),
    ("compact_ does not cut the optimizer's moments", "dora.py",
     "state[key] = value.index_select(dim, live)", "pass", "test_pruner.py"),
    ("ties go to the later component", "dora.py",
     "for i in scores.argsort(descending=True, stable=True).tolist():",
     "for i in scores.argsort(stable=True).flip(0).tolist():", "test_budget.py"),
    ("fast_first is a square, not a cube", "dora.py",
     "int(surplus * (1 - p) ** 3)", "int(surplus * (1 - p) ** 2)", "test_budget.py"),
    ("adapter_config.json has no alpha_pattern", "dora.py",
     '"alpha_pattern": others,', '"alpha_pattern": {},', "test_adapter.py"),
    ("the head's rows stay in the checkpoint's order of labels", "train_glue.py",
     'order = head_order(folder / "config.json", task) if task else [*range(num_labels)]',
     "order = [*range(num_labels)]", "test_roberta.py"),
    ("every epoch has the same order of examples", "data.py",
     "np.random.default_rng((seed, epoch))", "np.random.default_rng((seed, 0))", "test_data.py"),
    ("the uncertainty is smoothed with beta1", "dora.py",
     "U_bar), 1 - self.config.beta2)", "U_bar), 1 - self.config.beta1)", "test_importance.py"),
    ("no warm-up", "train_glue.py",
     "warm = round(config.warmup * total)", "warm = 0", "test_train.py"),
    ("the penalty counts once per part of a batch", "train_glue.py",
     "(0 if i else penalty)", "penalty", "test_train.py"),
    ("the odd place of a pair goes to the first text", "data.py",
     "if len(a) > len(b):", "if len(a) >= len(b):", "test_data.py"),
    ("a step without observe() uses the last importance again", "dora.py",
     "        self.observed = False\n        self.t += 1", "        self.t += 1", "test_pruner.py"),
]


def pytest(folder: Path, test: str) -> tuple[int, str]:
    """Run a test file or a test, up to the first that fails; return the exit code and its name."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if found.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)}: exit code {found.returncode}, so the tests did not run")
    failed = re.search(r"^FAILED (\S+::.*?)(?: - .*)?$", found.stdout, re.MULTILINE)
    return found.returncode, failed[1] if failed else ""


def noticed_by(path: Path, old: str, new: str, test: str) -> str:
    """Apply a mutation in a copy of the checkout, undo it, and return the name of the test that
    failed, "" if none did. That test must pass without the mutation."""
    source = path.read_text(encoding="utf-8")
    if source.count(old) != 1:
        sys.exit(f"{path.name} has {old!r} {source.count(old)} times, expected once")
    path.write_text(source.replace(old, new), encoding="utf-8")
    code, name = pytest(path.parent, f"tests/{test}")
    path.write_text(source, encoding="utf-8")
    if code and pytest(path.parent, name)[0]:
        sys.exit(f"{name} fails without the mutation, too: repair it first")
    return name


def main(words: list[str]) -> int:
    """Try the mutations with these numbers, all if there are none; return the exit code."""
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for number in [int(word) for word in words] or range(1, len(MUTATIONS) + 1):
            why, file, old, new, test = MUTATIONS[number - 1]
            name = noticed_by(folder / file, old, new, test)
            missed += not name
            print(f"{number:2} {why}: {f'noticed by {name}' if name else 'MISSED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
