"""notebooks/plot_run.py draws what the files of a run say; it needs matplotlib, else it is skipped.
"""
import operator
import os
import shutil
import subprocess
import sys
from bisect import bisect

import plot_run
import pytest
from tiny import ROOT, evaluations, json_lines, lines, run

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of four runs: dora with a budget of parameters, paper of components, two without."""
    root = tmp_path_factory.mktemp("runs")
    run(root / "dora", budget_unit="parameters")
    for method in ("paper", "head", "lora"):
        run(root / method, method=method)
    return root


def points(axis):
    """The points of each line that an axis shows: [([x], [y]), ...]."""
    return [tuple([*values] for values in line.get_data()) for line in axis.lines]


def values(found, *names):
    """Columns of the lines of a log."""
    return tuple([line[name] for line in found] for name in names)


def test_the_curves_of_a_run(folders, monkeypatch):
    """Loss, penalty and score against metrics.jsonl; the phases are shaded at both ends."""
    monkeypatch.setattr(plot_run, "SHARE", 8)  # a mean of three lines
    steps, dev = lines(folders / "dora"), evaluations(folders / "dora")
    figure = plot_run.draw([plot_run.read_run(folders / "dora")])
    loss, score, live, parameters, penalty = figure.axes[:5]
    each, smooth = points(loss)
    assert each == values(steps, "step", "loss")
    losses, means = each[1], smooth[1]
    assert means[2] == pytest.approx(sum(losses[:3]) / 3)
    assert points(penalty) == [values(steps, "step", "penalty")]
    assert points(score) == [values(dev, "step", "matthews")]
    for axis in (loss, score, live, parameters):
        assert axis.get_title()
        assert axis.get_ylabel()
        assert axis.get_xlim() == (0, 24)
        initial, final = [(patch.get_x(), patch.get_width()) for patch in axis.patches]
        assert initial == (0, 4)
        assert final == (12, 12)


def test_the_ranks_of_a_run(folders):
    """Live components, parameters and map against ranks.jsonl, all below the line of the budget."""
    head, *history = json_lines(folders / "dora" / "ranks.jsonl")
    figure = plot_run.draw([plot_run.read_run(folders / "dora")])
    _, _, live, parameters, _, ranks, _ = figure.axes
    costs = head["parameters per component"].values()
    steps, rows = values(history, "step", "live")
    assert ranks.collections[0].get_array().T.tolist() == rows
    names = [label.get_text() for label in ranks.get_yticklabels()]
    assert len(names) == 12
    assert names[0] == "0 query"
    assert names[9] == "1 attention.output.dense"

    steps.append(24)  # the lines go on to the last step
    rows.append(rows[-1])
    sizes = [sum(map(operator.mul, row, costs)) for row in rows]
    assert points(live) == [(steps, [*map(sum, rows)])]
    spent, budget = points(parameters)
    x, allowed = budget
    last = lines(folders / "dora")[-1]
    assert spent == (steps, sizes)
    assert sizes[-1] == last["parameters"]
    assert allowed[-1] == last["budget"]
    for step in range(25):
        size = sizes[bisect(steps, step) - 1]
        assert size <= allowed[bisect(x, step) - 1]


def test_the_command(folders):
    """Four runs write compare.png into the first folder, one run.png, with any MPLBACKEND."""
    dora, paper = folders / "dora", folders / "paper"
    others = [folders / "head", folders / "lora"]  # no component, no budget
    subprocess.run([sys.executable, "notebooks/plot_run.py", paper, dora, *others], cwd=ROOT,
                   check=True, env={**os.environ, "MPLBACKEND": "module://nowhere.inline"})
    assert (paper / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not [*dora.glob("*.png")] and not (paper / "run.png").exists()
    assert plot_run.main([str(paper)]) == 0
    assert (paper / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_a_run(folders, tmp_path, capsys):
    """One line with the folder's name, exit code 2, no picture: an empty folder, a missing one, one
    with a damaged file, more runs than colours. The toy's folder stands for the run inside."""
    shutil.copytree(folders / "dora", tmp_path / "toy" / "adapted")
    assert plot_run.read_run(tmp_path / "toy") == plot_run.read_run(folders / "dora")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders / "dora", tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.jsonl").write_text("{\n")
    for name in ("nowhere", "empty", "damaged"):
        assert plot_run.main([str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert str(tmp_path / name) in error and error.count("\n") == 1
        assert not (tmp_path / name / "run.png").exists()
    assert plot_run.main([str(folders / "dora")] * 7) == 2
    assert "at most 6" in capsys.readouterr().err


def test_a_run_under_way(folders, tmp_path):
    """A run that was stopped before its first evaluation, its last line half written."""
    shutil.copytree(folders / "dora", tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    text = log.read_text().splitlines(keepends=True)
    log.write_text("".join(text[:6]) + text[6][:20])
    (tmp_path / "run" / "result.json").unlink()
    figure = plot_run.draw([plot_run.read_run(tmp_path / "run")])
    assert "not evaluated" in figure.axes[1].get_title()
    steps, _ = points(figure.axes[0])[0]
    assert steps == [1, 2, 3, 4, 5, 6]
