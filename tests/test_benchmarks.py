"""benchmarks/: parts of the scripts, against answers known by hand and against the logs."""
import dataclasses
import math

import glue
import numpy as np
import pytest
import rank_recovery as rr
import report
import step_time
import torch

import train_glue


def test_update_has_the_ranks_it_claims():
    """Singular values of Delta W*: as many as the true rank, each within the pattern's range. The
    same seed with other gains: the same outputs from other matrices."""
    ranks, gains = (0, 1, 3), (1.0, 2.0, 0.5)
    pattern = rr.Pattern(ranks, width=12, strength=(1.0, 3.0))
    scaled = dataclasses.replace(pattern, gains=gains)
    teacher, student = rr.problem(scaled, seed=3)
    for new, old, rank, gain in zip(teacher, student, ranks, gains, strict=True):
        update = new.linear.weight - old.linear.weight
        values = gain * torch.linalg.svdvals(update)
        present = values[:rank]
        assert (values > 1e-3).sum() == rank
        assert (present > 0.99).all() and (present < 3.01).all()

    x = torch.randn(5, 12)
    for found, same in zip((teacher, student), rr.problem(pattern, seed=3)):
        torch.testing.assert_close(found(x), same(x))
        assert not found[1].linear.weight.allclose(same[1].linear.weight)


def test_floor_is_the_noise():
    """The teacher gets exactly 1; another student what sampled noise gives."""
    pattern = rr.Pattern((1, 2), width=8)
    teacher, student = rr.problem(pattern, seed=0)
    torch.manual_seed(0)
    x = torch.randn(200_000, 8)
    assert rr.loss_over_floor(teacher, teacher, x) == 1
    with torch.no_grad():
        y = teacher(x) + rr.NOISE * torch.randn(x.shape)
        sampled = (student(x) - y).square().mean().item()
    found = rr.loss_over_floor(student, teacher, x)
    assert found == pytest.approx(sampled / rr.NOISE**2, rel=0.01)


def test_misplaced():
    """Shares counted by hand, in components and where costs differ, and never above 1."""
    pattern = rr.PATTERNS["mixed"]
    truth = "".join(map(str, pattern.truth))
    shares = {truth: 0, "112402": 0.1, "400060": 1, "222222": 5 / 12}  # the last: LoRA
    for ranks, share in shares.items():
        found = rr.misplaced([*map(int, ranks)], pattern)
        assert found == pytest.approx(share)


def test_every_row_is_a_config_and_spends_the_true_total():
    """Rows are DoRAConfig values: each one builds, without dropout, at the teacher's budget."""
    for title, rows in rr.TABLES.items():
        for name, settings in rows.items():
            for pattern in rr.patterns_of(title).values():
                config, n = rr.make_config(settings, pattern), len(pattern.truth)
                surplus = round(config.rank * n) - sum(pattern.truth)
                if config.schedule is None:  # LoRA: the same everywhere, at least the true total
                    assert 0 <= surplus < n, name
                else:
                    assert surplus == config.dropout == 0, name


def test_recorded_runs_are_found():
    """The cells of today's tables against the log: each is recorded under its key."""
    done = report.finished(rr.LOG)
    for cell in rr.to_do():
        line = done[report.key_of(cell)]
        assert cell.items() <= line.items()
        assert len(line["kept"]) == len(rr.PATTERNS[cell["pattern"]].truth)


def test_a_finished_run_is_never_repeated(tmp_path, monkeypatch):
    """A log whose last line was cut off: only that run is made again, and it ends as before."""
    tiny = rr.Pattern((0, 2, 1), width=8, batch=8, steps=20)
    monkeypatch.setattr(rr, "PATTERNS", {"tiny": tiny})
    rows = {"a": rr.BASE, "b": {**rr.BASE, "beta2": None}}
    monkeypatch.setattr(rr, "TABLES", {"Methods": rows})
    monkeypatch.setattr(rr, "SEEDS", 2)
    monkeypatch.setattr(report, "RUNS", tmp_path)
    monkeypatch.setattr(rr, "LOG", tmp_path / "rank_recovery.jsonl")
    seeds = []

    def run_cell(cell):
        seeds.append(cell["seed"])
        return rr.run_cell(cell)

    def sweep():
        report.make_all(rr.LOG, rr.to_do, run_cell)
        return rr.markdown()

    first = sweep()
    assert seeds == [0, 0, 1, 1] and "| a | " in first
    text = rr.LOG.read_text("utf-8")
    rr.LOG.write_text(text[:-40], "utf-8")
    assert sweep() == first == sweep() and len(seeds) == 5


def test_default_finds_the_ranks_and_eq7_does_not():
    """Three matrices, one of rank 0: Ī·Ū finds the true ranks, Eq. 7 gives that one its share."""
    pattern = rr.Pattern((0, 3, 1), steps=300)
    good = rr.run(rr.METHODS["dora"], pattern, seed=0)
    paper = rr.run(rr.METHODS["paper"], pattern, seed=0)
    assert good["kept"] == [0, 3, 1] and good["loss"] < 1.05
    assert rr.misplaced(paper["kept"], pattern) > 0 and paper["loss"] > 1.05


def test_operations_are_counted_without_views():
    """A matrix product, a sum and three views, forward and backward, against a count by hand."""
    x = torch.ones(2, 3)
    W = torch.ones(3, 4, requires_grad=True)
    with step_time.Operations() as found:
        y = (x @ W).view(8).view(2, 4).t()
        loss = y.sum()
    assert found.count == 2  # mm, sum
    with step_time.Operations() as found:
        loss.backward()
    assert found.count == 2  # ones_like for the loss, mm; the rest are views


def test_controls_of_glue(monkeypatch):
    """The same ranks, in the same places or shuffled: each run on record is among those to do, and
    would start with the gates open that the log has as its ranks."""
    tiny = train_glue.RobertaConfig(vocab_size=9, hidden_size=4, num_hidden_layers=6,
                                    num_attention_heads=1, intermediate_size=16)
    cells = [cell for cell in glue.to_do() if cell["row"] in glue.CONTROLS]

    class Stop(Exception):
        """Carries the open gates of each matrix."""

    def train(config):
        layers = train_glue.adapt(train_glue.RobertaForSequenceClassification(tiny, 2), config)
        train_glue.Pruner(layers, config, 10)
        raise Stop([int(layer.c.sum()) for layer in layers.values()])

    monkeypatch.setattr(train_glue, "train", train)
    done = report.finished(glue.LOG)
    for cell in cells:
        with pytest.raises(Stop) as stop:
            glue.run(cell)
        assert stop.value.args[0] == done[report.key_of(cell)]["ranks"], cell
    recorded = [line for line in done.values() if line["row"] in glue.CONTROLS]
    assert len(cells) == len(recorded) == 24


def test_the_search_for_a_rate():
    """A method whose best rate is known: found, with rates on both sides. Of alike scores the
    lowest rate is taken, and none that is the lowest tried."""
    tried = {}
    while (rate := report.next_rate(tried)) is not None:
        tried[rate] = -abs(math.log(rate / 1.6e-2))
    assert report.chosen_rate(tried) == 1.6e-2 < max(tried)
    alike = {1e-3: 0.8085, 2e-3: 0.8173, 4e-3: 0.8178, 8e-3: 0.0}
    assert report.best_rate(alike) == 2e-3
    lowest = {5e-3: 0.8175, 1e-2: 0.8178, 2e-2: 0.8}
    assert report.next_rate(lowest) == 2.5e-3


def test_tests():
    """A sign test against binomial coefficients; the bootstrap where nothing varies, where only the
    examples do (a normal interval), and where only the seeds do (its ends are the seeds)."""
    nine_of_ten = [1] * 9 + [-1]
    assert report.coin(nine_of_ten) == 22 / 1024
    assert report.coin([1, 1, -2, -2, 0]) == 1
    assert report.bootstrap(np.ones((2, 5))) == (1, 1)
    signs = np.ones((3, 400))
    signs[:, ::2] = -1
    assert report.bootstrap(signs) == pytest.approx((-0.098, 0.098), abs=0.01)
    assert report.bootstrap(np.outer([0, 1], np.ones(400))) == (0, 1)
