"""What the benchmarks share: a log of runs, a part of README.md each, the machine in words,
colours, and how a figure is saved."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
HEAD = """# Benchmarks

Tables between two marks were written by the script that the marks name. GLUE is in RESULTS.md.

    pip install -r requirements.txt -r benchmarks/requirements.txt
"""

# One colour per method in every figure: Okabe and Ito's set, which the colour-blind can tell apart.
COLORS = {"dora": "#D55E00", "paper": "#CC79A7", "adalora": "#009E73", "lora": "#0072B2",
          "lora qv": "#56B4E9", "full": "#000000", "bitfit": "#E69F00", "head": "#999999"}


def key_of(run: dict[str, Any]) -> str:
    """Return a short name of what tells a run from others."""
    return hashlib.sha1(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a log, a line each."""
    return parse(path.read_text("utf-8")) if path.exists() else []


@functools.lru_cache(maxsize=1)  # a report asks for the same log in every cell of its tables
def parse(text: str) -> list[dict[str, Any]]:
    """Return the lines of a log, parsed. They are shared: do not change them."""
    return [json.loads(line) for line in text.splitlines()]


def add_to_log(path: Path, line: dict[str, Any]) -> None:
    """Append a finished run to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def make_all(log: Path, to_do: Callable[[], Iterable[dict[str, Any]]],
             run: Callable[[dict[str, Any]], bool], rows: Iterable[str] | None = None) -> None:
    """Make one run after another, of some rows or of all, until none is left that no other process
    is at.

    to_do() yields the runs that can be made now, in their order. run() appends the line of one to
    the log, or returns False if another process is at it.
    """
    busy: set[str] = set()
    while True:
        known = busy.union(line["key"] for line in read_log(log))
        following = next((cell for cell in to_do() if key_of(cell) not in known
                          and (rows is None or cell["row"] in rows)), None)
        if following is None:
            return
        if run(following):
            busy.clear()
        else:
            busy.add(key_of(following))


def machine(threads: int, device: str = "cpu") -> str:
    """Return the machine and the versions in one line."""
    import torch
    if device != "cpu":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"{found[1] if found else platform.processor()} ({os.cpu_count()} cores, " \
               f"{torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{name}; {platform.system()}; {', '.join(versions)}"


def machines(lines: Iterable[dict[str, Any]]) -> str:
    """Return the machine that the runs of a log were made on, or how many on each of several. The
    oldest runs did not note theirs."""
    counts = Counter(line.get("machine") or f"a machine that was not noted, torch {line['torch']}"
                     for line in lines)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{n} on {name}" for name, n in counts.items()) or "no run yet"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table. The first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as SVG. The same figure is the same file, byte for byte."""
    from matplotlib import rc_context
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def write_part(name: str, text: str) -> None:
    """Replace the part `name` of README.md, or append it."""
    old = README.read_text(encoding="utf-8") if README.exists() else HEAD
    first, last = f"<!-- {name}: written by {name}.py -->", f"<!-- end of {name} -->"
    part = f"{first}\n{text.strip()}\n{last}"
    if first in old:
        before, rest = old.split(first, 1)
        new = before + part + rest.split(last, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{part}\n"
    README.write_text(new, encoding="utf-8")
