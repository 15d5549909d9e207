"""Runs on a simulated accelerator (simulated.py) against the same runs on the CPU; the
waits and the operations of a step.

The simulated device computes with the CPU's kernels, so its runs equal the CPU's bit for bit.
"""
import contextlib
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from simulated import Device
from tiny import lines, result, run

import train_glue
from dora import DoRAError
from train_glue import find_device

KINDS = ("cuda", "mps")
OTHERS = ("adalora", "paper", "lora", "bitfit", "full", "head")
SHORT = dict(max_steps=9)  # evaluated after steps 8 and 9; dora prunes until step 5
ROOT = functools.cache(lambda: tempfile.TemporaryDirectory(prefix="dora-devices-"))


def settings(method, **changes):
    more = dict(interval=1) if method in ("dora", "paper", "adalora") else {}
    return {**SHORT, "method": method, **more, **changes}


def start(kind, out, **given):
    """A run on cpu, cuda or mps."""
    with contextlib.nullcontext() if kind == "cpu" else Device(kind):
        return run(out, device=kind, **given)


@functools.cache
def folder(kind, method, **changes):
    """The folder of a run on a device."""
    out = Path(ROOT().name) / f"{kind}-{method}-{'-'.join(map(str, changes.values()))}"
    start(kind, out, **settings(method, **changes))
    return out


def same_files(a, b):
    """Losses, norms, scores and ranks, and of an adapter the saved file, are equal bit for bit."""
    assert lines(a) == lines(b) and len(lines(a)) == 9
    assert result(a) == result(b)
    ours, theirs = ([path.read_bytes() for path in folder.glob("adapter/*.safetensors")]
                    for folder in (a, b))
    assert ours == theirs


SLOW_RUNS = [*((method, {}) for method in OTHERS), ("dora", dict(accumulate=2)),
             ("dora", dict(dtype="bf16")), ("full", dict(dtype="bf16"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method, changes", [("dora", {}), *(
    pytest.param(*run, marks=pytest.mark.slow) for run in SLOW_RUNS)])
def test_whole_runs(kind, method, changes):
    """A run of each method on the device equals the run on the CPU."""
    same_files(folder(kind, method, **changes), folder("cpu", method, **changes))


@pytest.mark.parametrize("first, then, last", [
    ("cuda", "cuda", 3), ("cpu", "mps", 7),
    pytest.param("cuda", "cpu", 3, marks=pytest.mark.slow),
    pytest.param("mps", "mps", 7, marks=pytest.mark.slow)])
def test_resume(tmp_path, monkeypatch, first, then, last):
    """A run that ends after step 3 (7), before (after) the compaction, and that another device
    resumes, equals the run on the CPU that nothing interrupted."""
    class Cut(Exception):
        pass

    def after_step(self, *numbers):
        real(self, *numbers)
        if self.step > last:
            raise Cut

    real = train_glue.Run.after_step
    given = settings("dora", save_every=last)
    with monkeypatch.context() as patch:
        patch.setattr(train_glue.Run, "after_step", after_step)
        with pytest.raises(Cut):
            start(first, tmp_path, **given)
    start(then, tmp_path, resume=True, **given)
    same_files(tmp_path, folder("cpu", "dora", save_every=last))


def steps(monkeypatch, kind, **given):
    """Waits, operations and blocking copies of every optimizer step, a list each."""
    found, real = [], train_glue.learning_rate
    with Device(kind) as device, tempfile.TemporaryDirectory() as out:
        def learning_rate(*args):
            waits, operations = device.waits.values(), device.operations.values()
            found.append((sum(waits), sum(operations), device.blocking))
            return real(*args)

        monkeypatch.setattr(train_glue, "learning_rate", learning_rate)
        run(out, device=kind, log_every=1000, save_every=1000, **given)
    return [[after - before for before, after in zip(counts, counts[1:])]
            for counts in zip(*found)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [
    "dora", *(pytest.param(method, marks=pytest.mark.slow) for method in ("adalora", "paper"))])
def test_waits(monkeypatch, kind, method):
    """A plain step waits for the device 0 times, and on CUDA no copy to it blocks. A step that
    prunes waits twice: for the scores, and for the gates, which have to be finite as well."""
    # it prunes in steps 3 and 4, of which 4 is the last pruning, and compacts
    waits, _, blocking = steps(monkeypatch, kind, method=method, max_steps=8, interval=2)
    assert waits[:3] == [0, 0, 2]
    assert waits[4:7] == [0, 0, 0]
    assert kind != "cuda" or blocking[:3] == [0, 0, 0]


def test_operations(monkeypatch):
    """Operations of a plain step of 12 matrices: paper needs at most 1.15 times as many as dora;
    adalora, which smooths three tensors per matrix one by one, 1.45 times; compacted dora fewer."""
    found = {}
    for method in ("dora", "paper", "adalora"):
        _, found[method], _ = steps(monkeypatch, "cuda", method=method, max_steps=8, interval=2)
    plain, *later = found["dora"]
    assert later[4] < plain
    assert found["paper"][0] <= 1.15 * plain
    assert found["adalora"][0] <= 1.45 * plain


def test_auto(monkeypatch):
    """--device auto takes CUDA, else MPS, else the CPU. A device that is not there is refused."""
    for module in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    for kind, other in (KINDS, KINDS[::-1]):
        with Device(kind):
            assert find_device("auto") == torch.device(kind, 0)
            with pytest.raises(DoRAError, match=f"{other} is not available"):
                find_device(other)


@pytest.mark.slow
def test_graphs(tmp_path, monkeypatch, capsys):
    """--compile: batches of all widths share one graph for training and one for evaluation, before
    the compaction and after it. Losses and scores equal the run's that is not compiled, in float64.
    (The backend of this test calls the graph's operations as they are.)"""
    real, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = functools.partial(real, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    given = settings("dora", dtype="float64")
    run(tmp_path / "compiled", compile=True, **given)
    assert capsys.readouterr().out.count("compiling the model") == 2
    assert len(graphs) == 3                             # the first evaluation is after step 8
    run(tmp_path / "plain", **given)
    same_files(tmp_path / "compiled", tmp_path / "plain")

