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
    """Singular values of Delta W*: as many as the true rank, each within the pattern's range."""
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


def test_shapes_and_costs(rr):
    """Blocks against shapes and costs counted by hand, and against the matrices of the network."""
    pattern = rr.Pattern((1, 0, 2, 3), width=12, blocks="sfs")
    assert pattern.shapes == [(12, 12), (48, 12), (12, 48), (12, 12)]
    assert pattern.costs == [24, 60, 60, 24]
    teacher, student = rr.problem(pattern, seed=0)
    found = list(zip(teacher.parameters(), student.parameters(), strict=True))
    assert [tuple(new.shape) for new, _ in found] == pattern.shapes
    assert [int(torch.linalg.matrix_rank(new - old, atol=1e-3)) for new, old in found] == [
        1, 0, 2, 3]


def test_misplaced(rr):
    """Shares counted by hand, in components and where costs differ, and never above 1."""
    pattern = rr.PATTERNS["mixed"]
    assert rr.misplaced(list(pattern.truth), pattern) == 0
    assert rr.misplaced([1, 1, 2, 4, 0, 2], pattern) == pytest.approx(0.1)
    assert rr.misplaced([4, 0, 0, 0, 6, 0], pattern) == 1
    assert rr.misplaced([2, 2, 2, 2, 2, 2], pattern) == pytest.approx(5 / 12)  # LoRA
    mixed = rr.Pattern((1, 0, 2, 3), width=12, blocks="sfs")
    assert rr.misplaced([2, 1, 0, 0], mixed) == pytest.approx((24 + 60) / (48 + 60))


def test_every_row_is_a_config_and_spends_the_true_total(rr):
    """Rows are DoRAConfig values: each one builds, without dropout, at the pattern's budget."""
    for title, rows in rr.tables().items():
        for name, settings in rows.items():
            for pattern in rr.patterns_of(title).values():
                config = rr.make_config(settings, pattern)
                costs = pattern.costs if config.budget_unit == "parameters" else [
                    1] * len(pattern.truth)
                total = round(config.rank * sum(costs))
                true = sum(t * cost for t, cost in zip(pattern.truth, costs)) * pattern.share
                if config.schedule is None:  # LoRA: the same everywhere, at least the true total
                    assert 0 <= total - true < sum(costs), name
                else:
                    assert total == round(true) and config.dropout == 0, name


def test_rows_of_several_shapes_have_one_scale(rr):
    """The unit decides r, and alpha makes up for it: one scale per pattern."""
    for pattern in rr.COSTS.values():
        configs = [rr.make_config(s, pattern) for s in rr.tables()["Budget unit"].values()]
        scales = [config.alpha / max(1, config.rank) for config in configs]
        assert scales == pytest.approx([scales[0]] * len(scales))


def test_recorded_cells_are_found(rr):
    """The keys of today's settings against the records: what meant the same has the same key.

    The mean rank of "one" is below 1, where the scale changed: its rows of `dora` are new.
    """
    known = rr.read(PATH.parent / "results" / "rank_recovery.jsonl")
    first = list(rr.tables().items())[:3]
    for title, rows in first:
        for row, name in ((r, n) for r in rows for n in rr.patterns_of(title)):
            pattern = rr.PATTERNS[name]
            key = rr.cell_key(rr.make_config(rows[row], pattern), pattern, 0)
            if row.startswith("dora") and name == "one":
                assert known.get(key, {"row": row})["row"] in (row, "alpha / max(1, r)")
            else:
                assert known[key]["pattern"] == name, (row, name)
    pattern = rr.PATTERNS["mixed"]
    config = rr.make_config(rr.METHODS["dora"], pattern)
    assert rr.cell_key(config, pattern, 0) == "de183301bff4"  # as recorded before the renaming


def test_orders_divide_by_the_cost(rr):
    """Scores of both orders per parameter against the score divided by the costs."""
    pattern = rr.Pattern((1, 0, 2, 1), width=8, batch=8, steps=20, blocks="sfs")
    config = rr.make_config(rr.METHODS["dora"], pattern)
    layers = rr.inject(rr.problem(pattern, 0)[1], config)
    pruners = [rr.PRUNERS[name](layers, config, 20)
               for name in ("Pruner", "PerParameter", "PerParameterTwice")]
    for pruner in pruners:
        pruner.I_bar, pruner.U_bar = [torch.ones(16)], [torch.full((16,), 40.0)]
    plain, once, twice = (pruner.scores().view(4, 4)[:, 0].tolist() for pruner in pruners)
    assert plain == [40] * 4 and once == [2.5, 1, 1, 2.5]
    assert twice == pytest.approx([40 / 256, 1 / 40, 1 / 40, 40 / 256])


@torch.no_grad()
def test_live_scale_keeps_the_function(rr):
    """Outputs before and after the scale of every matrix is fixed: the same."""
    pattern = rr.Pattern((0, 1, 2), width=8, batch=8, steps=20)
    config = rr.make_config(dict(rr.BASE, interval=1), pattern)
    layers = rr.inject(rr.problem(pattern, 0)[1], config)
    plain, live = rr.Pruner(layers, config, 20), rr.LiveScale(layers, config, 20)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B)
    plain.t = live.t = live.last
    for pruner in (plain, live):
        pruner.I_bar, pruner.U_bar = [torch.arange(1.0, 13)], [torch.ones(12)]
    plain._prune()
    before = [layer.delta_weight() for layer in layers.values()]
    live._prune()
    for layer, old in zip(layers.values(), before, strict=True):
        torch.testing.assert_close(layer.delta_weight(), old)
        assert layer.scale == config.alpha / max(1, layer.rank)


def test_run_keeps_the_true_total_and_repeats(rr):
    """Two runs with one seed: the same figures, and exactly the true total kept."""
    pattern = rr.Pattern((0, 2, 1), width=16, batch=16, steps=100)
    config = rr.make_config(rr.BASE, pattern)
    first, second = (rr.run(config, pattern, seed=1) for _ in range(2))
    assert first["kept"] == second["kept"] and first["loss"] == second["loss"]
    assert sum(first["kept"]) == 3


def test_sweep_never_repeats_a_cell(rr, tmp_path, monkeypatch):
    """A broken file: only the cell whose line was cut off runs again."""
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
    monkeypatch.setattr(rr, "run", lambda *args, **more: calls.append(args) or real(*args, **more))
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
