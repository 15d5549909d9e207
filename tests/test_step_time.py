"""benchmarks/step_time.py: its count of operations by hand, and its error without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "step_time.py"


def test_operations_are_counted_without_views(monkeypatch):
    """A matrix product, a sum and three views, forward and backward, against a count by hand."""
    monkeypatch.syspath_prepend(PATH.parent)
    import step_time
    x, W = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
    with step_time.Operations() as found:
        loss = (x @ W).view(8).view(2, 4).t().sum()
    assert found.count == 2  # mm, sum
    with step_time.Operations() as found:
        loss.backward()
    assert found.count == 2  # ones_like for the loss, mm; the rest are views


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_one_line():
    """--device cuda where there is none: one line that names the flag, and an exit status."""
    found = subprocess.run([sys.executable, str(PATH), "--device", "cuda"], capture_output=True,
                           text=True)
    assert found.returncode == 1 and not found.stdout
    assert len(found.stderr.splitlines()) == 1 and "--device cuda" in found.stderr
