"""notebooks/plot_run.py draws what the files of a run say; it needs matplotlib, else it is skipped.
"""
import importlib.util
import operator
import os
import shutil
import subprocess
import sys
from bisect import bisect

import pytest
from tiny import ROOT, evaluations, json_lines, lines, run

pytest.importorskip("matplotlib")
spec = importlib.util.spec_from_file_location("plot_run", ROOT / "notebooks/plot_run.py")
plot_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot_run)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of three runs: dora with a budget of parameters, paper of components, the head."""
    root = tmp_path_factory.mktemp("runs")
    run(root / "dora", budget_unit="parameters")
    run(root / "paper", method="paper")
    run(root / "head", method="head")
    run(root / "lora", method="lora")
    return root


def points(axis):
    """The points of each line that an axis shows: [([x], [y]), ...]."""
    return [([*line.get_xdata()], [*line.get_ydata()]) for line in axis.lines]


def test_the_picture_of_a_run(folders, monkeypatch):
    """Lines, titles and labels of each axis against metrics.jsonl and ranks.jsonl, which is the one
    source of live components; their parameters, counted by hand, are never above the line of the
    budget. The shaded phases end and begin at the steps of `phases`: 4 and 12 of 24."""
    monkeypatch.setattr(plot_run, "SHARE", 8)                                # a mean of three lines
    steps, dev = lines(folders / "dora"), evaluations(folders / "dora")
    head, *history = json_lines(folders / "dora" / "ranks.jsonl")
    costs = head["parameters per component"]
    assert {name.split(".")[-1]: cost for name, cost in costs.items()} == {
        "query": 64, "key": 64, "value": 64, "dense": 96} and len(costs) == 12
    figure = plot_run.draw([plot_run.read_run(folders / "dora")])
    loss, score, live, parameters, penalty, ranks, bar = figure.axes
    x = [line["step"] for line in steps]

    each, mean = points(loss)
    assert each == (x, [line["loss"] for line in steps])
    assert mean[1][2] == pytest.approx(sum(line["loss"] for line in steps[:3]) / 3)
    assert points(penalty) == [(x, [line["penalty"] for line in steps])]
    assert points(score) == [([8, 16, 24], [line["matthews"] for line in dev])]
    changes = [*(line["step"] for line in history), 24]
    counts = [sum(line["live"]) for line in history]
    sizes = [sum(map(operator.mul, line["live"], costs.values())) for line in history]
    assert points(live) == [(changes, [*counts, counts[-1]])]
    assert counts[-1] == steps[-1]["live"] and sizes[-1] == steps[-1]["parameters"]
    (found, size), (x, allowed) = points(parameters)
    assert (found, size) == (changes, [*sizes, sizes[-1]]) and allowed[-1] == steps[-1]["budget"]
    for step in range(25):
        assert size[bisect(found, step) - 1] <= allowed[bisect(x, step) - 1]
    assert ranks.collections[0].get_array().T.tolist() == [line["live"] for line in history]
    names = [label.get_text() for label in ranks.get_yticklabels()]
    assert names[0] == "0 query" and names[9] == "1 attention.output.dense" and len(names) == 12

    for axis in (loss, score, live, parameters):
        assert axis.get_title() and axis.get_ylabel() and axis.get_xlim() == (0, 24)
        shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]
        assert shaded == [(0, 4), (12, 24)]
    for axis in (loss, score, live, parameters, ranks):
        assert axis.get_xlabel() == "optimizer step"
    assert (score.get_ylabel(), penalty.get_ylabel(), bar.get_ylabel()) == (
        "matthews", "penalty (dotted)", "live components")
    assert [text.get_text() for text in live.texts] == ["all live", "pruning", "fixed ranks"]


def test_several_runs(folders):
    """Four runs in the same axes, each named once; a run without an adapter has no components, a
    budget is drawn where its unit is, and ranks that never change have no map."""
    runs = [plot_run.read_run(folders / name) for name in ("dora", "paper", "head", "lora")]
    figure = plot_run.draw(runs)
    loss, score, live, parameters = figure.axes[:4]
    assert (len(loss.lines), len(score.lines)) == (8, 4)
    assert (len(live.lines), len(parameters.lines)) == (3 + 1, 3 + 1)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["toy, dora, seed 1", "toy, paper, seed 1", "toy, head, seed 1",
                     "toy, lora, seed 1"]
    assert [axis.get_title() for axis in figure.axes if axis.get_title().startswith("rank")] == [
        "rank of each matrix: toy, dora, seed 1", "rank of each matrix: toy, paper, seed 1"]


def test_the_command(folders, tmp_path, capsys):
    """`python notebooks/plot_run.py RUN RUN` writes compare.png into the first folder alone, and
    one RUN run.png; N12: whatever backend a notebook exports."""
    words = [folders / "paper", folders / "dora"]
    subprocess.run([sys.executable, "notebooks/plot_run.py", *words], cwd=ROOT, check=True,
                   env={**os.environ, "MPLBACKEND": "module://nowhere.backend_inline"})
    assert (folders / "paper" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not (folders / "dora" / "compare.png").exists()
    assert not (folders / "paper" / "run.png").exists()
    assert plot_run.main([str(folders / "paper")]) == 0
    assert (folders / "paper" / "run.png").read_bytes().startswith(b"\x89PNG")


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
        assert f"{tmp_path / name} is not the folder of a run" in error and error.count("\n") == 1
        assert not (tmp_path / name / "run.png").exists()
    assert plot_run.main([str(folders / "dora")] * 7) == 2
    assert "at most 6" in capsys.readouterr().err


def test_a_run_under_way(folders, tmp_path):
    """A run that was stopped before its first evaluation, its last line half written."""
    shutil.copytree(folders / "dora", tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(text[:6]) + text[6][:20])
    (tmp_path / "run" / "result.json").unlink()
    assert plot_run.main([str(tmp_path / "run")]) == 0
    figure = plot_run.draw([plot_run.read_run(tmp_path / "run")])
    assert figure.axes[1].get_title() == "score on dev (not evaluated yet)"
    assert points(figure.axes[0])[0][0] == [1, 2, 3, 4, 5, 6]
