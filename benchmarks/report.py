"""What the speed benchmarks share: one part of README.md each, and the machine in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
HEAD = """# Benchmarks

Each part below was written by the script that it names. Quality is in RESULTS.md.

    pip install -r requirements.txt -r benchmarks/requirements.txt
"""


def machine(threads: int, device: str = "cpu") -> str:
    """The machine and the versions, in one line."""
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
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_part(name: str, text: str) -> None:
    """Put text into README.md in the place of the part `name`, or at its end."""
    old = README.read_text(encoding="utf-8") if README.exists() else HEAD
    first, last = f"<!-- {name}: written by {name}.py -->", f"<!-- end of {name} -->"
    part = f"{first}\n{text.strip()}\n{last}"
    if first in old:
        before, rest = old.split(first, 1)
        new = before + part + rest.split(last, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{part}\n"
    README.write_text(new, encoding="utf-8")
