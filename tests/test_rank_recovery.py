"""benchmarks/rank_recovery.py: its figures and its bookkeeping against answers known by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import rank_recovery as rr  # noqa: E402
import report  # noqa: E402


def test_update_has_the_ranks_it_claims():
    """Singular values of Delta W*: as many as the true rank, each within the pattern's range."""
    pattern = rr.Pattern((0, 1, 3), width=12, strength=(1.0, 3.0), gains=(1.0, 2.0, 0.5))
    teacher, student = rr.problem(pattern, seed=3)
    for new, old, rank, gain in zip(teacher, student, pattern.truth, pattern.gains, strict=True):
        values = gain * torch.linalg.svdvals(new.linear.weight - old.linear.weight).detach()
        assert int((values > 1e-3).sum()) == rank
        assert ((values[:rank] > 0.99) & (values[:rank] < 3.01)).all()


def test_gains_do_not_change_the_function():
    """The same seed with and without gains: same outputs, other matrices."""
    plain = rr.problem(rr.Pattern((1, 2), width=8), seed=0)
    scaled = rr.problem(rr.Pattern((1, 2), width=8, gains=(0.5, 4.0)), seed=0)
    x = torch.randn(5, 8)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a(x), b(x))
        assert not torch.allclose(a[1].linear.weight, b[1].linear.weight)


def test_floor_is_the_noise():
    """The teacher gets exactly 1; another student what sampled noise gives."""
    teacher, student = rr.problem(rr.Pattern((1, 2), width=8), seed=0)
    x = torch.randn(200_000, 8, generator=torch.Generator().manual_seed(0))
    assert rr.loss_over_floor(teacher, teacher, x) == 1
    with torch.no_grad():
        y = teacher(x) + rr.NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        sampled = float((student(x) - y).square().mean()) / rr.NOISE**2
    assert rr.loss_over_floor(student, teacher, x) == pytest.approx(sampled, rel=0.01)


def test_misplaced():
    """Shares counted by hand, in components and where costs differ, and never above 1."""
    pattern = rr.PATTERNS["mixed"]
    assert rr.misplaced(list(pattern.truth), pattern) == 0
    assert rr.misplaced([1, 1, 2, 4, 0, 2], pattern) == pytest.approx(0.1)
    assert rr.misplaced([4, 0, 0, 0, 6, 0], pattern) == 1
    assert rr.misplaced([2, 2, 2, 2, 2, 2], pattern) == pytest.approx(5 / 12)  # LoRA


def test_every_row_is_a_config_and_spends_the_true_total():
    """Rows are DoRAConfig values: each one builds, without dropout, at the teacher's budget."""
    for title, rows in rr.tables().items():
        for name, settings in rows.items():
            for pattern in rr.patterns_of(title).values():
                config, n = rr.make_config(settings, pattern), len(pattern.truth)
                surplus = round(config.rank * n) - sum(pattern.truth)
                if config.schedule is None:  # LoRA: the same everywhere, at least the true total
                    assert 0 <= surplus < n, name
                else:
                    assert surplus == 0 and config.dropout == 0, name


def test_recorded_runs_are_found():
    """The cells of today's tables against the log: each of seed 0 is recorded under its key."""
    done = report.finished(rr.LOG)
    for cell in rr.to_do([*rr.tables()], 1):
        line = done[report.key_of(cell)]
        assert cell.items() <= line.items()
        title = next(title for title, rows in rr.tables().items() if cell["row"] in rows)
        assert len(line["kept"]) == len(rr.patterns_of(title)[cell["pattern"]].truth)


def test_run_keeps_the_true_total_and_repeats():
    """Two runs with one seed: the same figures, and exactly the true total kept."""
    pattern = rr.Pattern((0, 2, 1), width=16, batch=16, steps=100)
    first, second = (rr.run(rr.BASE, pattern, seed=1) for _ in range(2))
    assert first["kept"] == second["kept"] and first["loss"] == second["loss"]
    assert sum(first["kept"]) == 3


def test_a_finished_run_is_never_repeated(tmp_path, monkeypatch):
    """A log whose last line was cut off: only the run of that line is made again."""
    tiny = {"tiny": rr.Pattern((0, 2, 1), width=8, batch=8, steps=20)}
    monkeypatch.setattr(rr, "patterns_of", lambda title: tiny)
    rows = {"a": rr.BASE, "b": {**rr.BASE, "beta2": None}}
    monkeypatch.setattr(rr, "tables", lambda: {"Methods": rows})
    monkeypatch.setattr(report, "RUNS", tmp_path)
    monkeypatch.setattr(rr, "LOG", tmp_path / "rank_recovery.jsonl")
    calls = []

    def sweep():
        report.make_all(rr.LOG, lambda: rr.to_do(["Methods"], 2),
                        lambda cell: calls.append(cell) or rr.run_cell(cell))
        return rr.markdown()

    first = sweep()
    assert [call["seed"] for call in calls] == [0, 0, 1, 1] and "| a | " in first
    text = rr.LOG.read_text("utf-8")
    rr.LOG.write_text(text[:-40], "utf-8")
    assert sweep() == first == sweep() and len(calls) == 5


def test_default_finds_the_ranks_and_eq7_does_not():
    """Three matrices, one of rank 0: Ī·Ū finds the true ranks, Eq. 7 gives that one its share."""
    pattern = rr.Pattern((0, 3, 1), steps=500)
    good, paper = (rr.run(rr.METHODS[name], pattern, seed=0) for name in ("dora", "paper"))
    assert good["kept"] == [0, 3, 1] and good["loss"] < 1.05
    assert rr.misplaced(paper["kept"], pattern) > 0 and paper["loss"] > 1.05
