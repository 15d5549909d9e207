"""benchmarks/rank_recovery.py: its figures and its bookkeeping against answers known by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "rank_recovery.py"


@pytest.fixture(scope="module")
def rr():
    spec = importlib.util.spec_from_file_location("rank_recovery", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_recovery"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rank_recovery"]


def test_update_has_the_ranks_it_claims(rr):
    """Delta W* against its singular values: the true rank many, each within the pattern's range."""
    pattern = rr.Pattern((0, 1, 3), width=12, strength=(1.0, 3.0), gains=(1.0, 2.0, 0.5))
    teacher, student = rr.problem(pattern, seed=3)
    for new, old, rank, gain in zip(teacher, student, pattern.truth, pattern.gains, strict=True):
        values = gain * torch.linalg.svdvals(new.linear.weight - old.linear.weight).detach()
        assert int((values > 1e-3).sum()) == rank
        assert ((values[:rank] > 0.99) & (values[:rank] < 3.01)).all()


def test_gains_do_not_change_the_function(rr):
    """The same seed with and without gains: same outputs, other matrices."""
    plain = rr.problem(rr.Pattern((1, 2), width=8), seed=0)
    scaled = rr.problem(rr.Pattern((1, 2), width=8, gains=(0.5, 4.0)), seed=0)
    x = torch.randn(5, 8)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a(x), b(x))
        assert not torch.allclose(a[1].linear.weight, b[1].linear.weight)


def test_floor_is_the_noise(rr):
    """The teacher gets exactly 1; another student what sampled noise gives."""
    teacher, student = rr.problem(rr.Pattern((1, 2), width=8), seed=0)
    x = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))
    assert rr.loss_over_floor(teacher, teacher, x) == 1
    with torch.no_grad():
        y = teacher(x) + rr.NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        sampled = float((student(x) - y).square().mean()) / rr.NOISE**2
    assert rr.loss_over_floor(student, teacher, x) == pytest.approx(sampled, rel=0.01)


def test_misplaced(rr):
    """Counted by hand: 0 for the truth, one of ten, everything."""
    truth = (0, 1, 2, 4, 0, 3)
    assert rr.misplaced(list(truth), truth) == 0
    assert rr.misplaced([1, 1, 2, 4, 0, 2], truth) == pytest.approx(0.1)
    assert rr.misplaced([4, 0, 0, 0, 6, 0], truth) == 1


def test_every_row_is_a_config_and_spends_the_true_total(rr):
    """Rows are DoRAConfig values: each one builds, without dropout, at the pattern's budget."""
    for rows in rr.tables().values():
        for name, settings in rows.items():
            for pattern in rr.PATTERNS.values():
                config = rr.make_config(settings, pattern)
                total = round(config.rank * len(pattern.truth))
                if config.schedule is None:  # LoRA: the same everywhere, at least the true total
                    assert 0 <= total - sum(pattern.truth) < len(pattern.truth), name
                else:
                    assert total == sum(pattern.truth) and config.dropout == 0, name


def test_run_keeps_the_true_total_and_repeats(rr):
    """The same seed twice: the same figures, and exactly the true total kept."""
    pattern = rr.Pattern((0, 2, 1), width=16, batch=16, steps=100)
    config = rr.make_config(rr.BASE, pattern)
    first, second = (rr.run(config, pattern, seed=1) for _ in range(2))
    assert first["kept"] == second["kept"] and first["loss"] == second["loss"]
    assert sum(first["kept"]) == 3


def test_sweep_never_repeats_a_cell(rr, tmp_path, monkeypatch):
    """A broken file: whole lines stay, the one that was cut off runs again, nothing else does."""
    monkeypatch.setattr(rr, "PATTERNS", {"tiny": rr.Pattern((0, 2, 1), width=8, batch=8, steps=20)})
    rows = {"a": rr.BASE, "b": {**rr.BASE, "beta2": None}}
    monkeypatch.setattr(rr, "tables", lambda: {"Methods": rows})
    path = tmp_path / "rank_recovery.jsonl"
    result = rr.sweep(path, seeds=2)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and [json.loads(line)["seed"] for line in lines] == [0, 0, 1, 1]

    path.write_text("\n".join([*lines[:3], lines[3][:40]]), encoding="utf-8")
    calls = []
    real = rr.run
    monkeypatch.setattr(rr, "run", lambda *args: calls.append(args) or real(*args))
    again = rr.sweep(path, seeds=2)
    assert len(calls) == 1
    for old, new in zip(result["Methods"], again["Methods"], strict=True):
        assert old["kept"] == new["kept"] and old["loss"] == new["loss"]
    rr.sweep(path, seeds=2)
    assert len(calls) == 1, "the line after the broken one must be readable"
    assert "| a | " in rr.markdown(again, seeds=2)


def test_default_finds_the_ranks_and_eq7_does_not(rr):
    """Three matrices, one of rank 0: Ī·Ū finds the true ranks, Eq. 7 gives that one its share."""
    pattern = rr.Pattern((0, 3, 1), steps=500)
    good = rr.run(rr.make_config(rr.METHODS["dora"], pattern), pattern, seed=0)
    assert good["misplaced"] == 0 and good["loss"] < 1.05
    paper = rr.run(rr.make_config(rr.METHODS["paper"], pattern), pattern, seed=0)
    assert paper["misplaced"] > 0 and paper["loss"] > 1.05


def test_errors_are_one_line(rr, capsys):
    """Bad arguments end in argparse's one line that names the value."""
    for argv, text in ((["--seeds", "0"], "--seeds 0"), (["--out", "/nowhere"], "--out /nowhere")):
        with pytest.raises(SystemExit):
            rr.main(argv)
        assert text in capsys.readouterr().err
