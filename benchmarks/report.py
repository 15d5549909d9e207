"""What the benchmarks share: a part of README.md each, the machine in words, and colours."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
HEAD = """# Benchmarks

Tables between two marks were written by the script that the marks name. GLUE is in RESULTS.md.

    pip install -r requirements.txt -r benchmarks/requirements.txt
"""

# One colour per method in every figure: Okabe and Ito's set, which the colour-blind can tell apart.
COLORS = {"dora": "#D55E00", "paper": "#CC79A7", "adalora": "#009E73", "lora": "#0072B2",
          "lora qv": "#56B4E9", "full": "#000000", "bitfit": "#E69F00", "head": "#999999"}


def machine(threads: int, device: str = "cpu") -> str:
    """Return the machine and the versions in one line."""
    if device != "cpu":
        import torch
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"{found[1] if found else platform.processor()} ({os.cpu_count()} cores), " \
               f"{threads} thread{'s' * (threads > 1)}"
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"{name}; {platform.system()}; {', '.join(versions)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table. The first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
