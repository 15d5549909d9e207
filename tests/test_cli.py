"""Every setting is a flag, every flag has an effect or is refused in one line before anything is
trained; main prints the scores and returns 0, 2 for bad input, 128 + signal if interrupted."""
import dataclasses
import errno
import re
import shutil
import signal
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small import table
from tiny import contents, files, flags, result, run, run_settings, same_runs

import data
import train_glue
from dora import METHODS, DoRAConfig, read_safetensors, write_safetensors
from train_glue import (
    TrainConfig, help_of, load_roberta, main, make_config, make_parser, save_model)


def parsed(*words):
    """The configuration that these words of a command line make."""
    args = vars(make_parser().parse_args(words))
    for name in ("seeds", "eval_only", "adapter", "predict"):
        del args[name]
    return make_config(**args)


def failed(capsys, *words):
    """The one line of error of a command that returns 2."""
    try:
        code = main([*words])
    except SystemExit as stop:              # argparse's way
        code = stop.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if not line.startswith("usage: ")] == lines[-1:]
    assert len(lines) <= 2 and "error: " in lines[-1]
    return lines[-1]


def test_every_setting_is_a_flag():
    """Both dataclasses' fields against the parser's flags; each has help and default in --help."""
    text = " ".join(make_parser(["--task", "rte"]).format_help().split())
    comments = {**help_of(TrainConfig), **help_of(DoRAConfig)}
    settings = dataclasses.asdict(make_config("rte"))
    assert comments.keys() == settings.keys() and text.isascii()
    del settings["seed"]
    for name, default in settings.items():
        comment, flag = comments[name], name.replace("_", "-")
        assert f"--{flag}" in text and comment in text
        if default is None:
            default = "none"
        elif isinstance(default, tuple):
            default = " ".join(default)
        elif isinstance(default, float):
            default = f"{default:g}"
        assert f"default: {default}" in text.split(comment)[1].split("--")[0], name


@pytest.mark.parametrize("words, value", [
    ("--clip 2", "2.0"), ("--batch-size 3", "3"), ("--max-steps none", "None"),
    ("--compile", "True"), ("--no-compile", "False"), ("--out a/b", "'a/b'"),
    ("--targets a,b, c", "('a', 'b', 'c')"), ("--task STS-B", "'stsb'")])
def test_flags(words, value):
    """A flag's text becomes the setting's value, in its type."""
    flag, *_ = words.split()
    name = flag.removeprefix("--no-").lstrip("-").replace("-", "_")
    assert repr(getattr(parsed(*words.split()), name)) == value


BAD_INPUT = """  # words, and a part of the message
    --split test                   argument --split.
    --lr x                         float value: 'x'
    --lr -1e-3                     lr = -0.001
    --epochs 1.5                   int value: '1.5'
    --task ax                      ax has no split 'train'
    --seeds -1                     seed = -1
    --predict dev                  --predict
    --initial-phase 0.9            initial_phase = 0.9
    --max-len 63                   62 positions
    --resume --overwrite           overwrite
    --task toy --predict test      toy has no split 'test'
    --taks cola                    mean --task?
    --seed 3                       mean --seeds?
    --lora-alpha=4                 mean --alpha?
    --device gpu                   mean cuda?
    --task mrcp                    mean mrpc?
    --model-dir roberta-base       roberta-base/config.json
    --targets query out_proj       'out_proj'
    --method bitfit --rank 5       rank = 5.0
    --method lora --interval 3     interval = 3
    --eps 1e-4                     eps = 0.0001
    --penalty none --eta 0.5       eta = 0.5
    --adapter x                    --adapter x
    --eval-only                    --adapter RUN
    --eval-only --adapter x --seeds 2    no seeds
"""


@pytest.mark.parametrize("row", BAD_INPUT.strip().split("\n")[1:])
def test_bad_input(tmp_path, capsys, row):
    """Unknown flags, values of another type, out of range, that do not go together or that this run
    would ignore: exit code 2 and one line that names flag and value; no run folder."""
    words, says = re.split(r"  +", row.strip())
    given = run_settings(tmp_path / "out")
    for name in ("rank", "interval", "budget_unit"):  # which other methods refuse
        del given[name]
    run_flags = [] if "--eval-only" in words else flags(**given)
    line = failed(capsys, *run_flags, *words.split())
    assert says in f"{line}." and not (tmp_path / "out").exists()


TABLE_8 = """
    task  lr      batch_size  epochs  eta  interval
    mnli  0.003   32          10      0.3  50
    sst2  0.0008  64          60      0.5  10
    cola  0.002   16          45      0.3  10
    qqp   0.001   16          10      0.3  50
    qnli  0.0035  16          12      0.5  50
    rte   0.002   16          80      0.5  10
    mrpc  0.0025  16          30      0.3  50
    stsb  0.003   16          45      0.3  10
"""
TITLES, *TASK_ROWS = table(TABLE_8)


@pytest.mark.parametrize("cells", TASK_ROWS)
def test_table_8(cells):
    """Each task's defaults against the paper's Table 8: --method paper has them as published, dora
    and lora a quarter of the rate. A method's row goes before the task's, a flag before both."""
    row = dict(zip(TITLES, cells))
    task, lr = row.pop("task"), float(row.pop("lr"))
    rates = dict(paper=lr, adalora=lr, dora=lr / 4, lora=lr / 4, full=2e-5, bitfit=1e-3, head=lr)
    for method, rate in rates.items():
        config = parsed("--task", task, "--method", method)
        assert config.lr == rate
        if method in METHODS:
            assert METHODS[method].items() <= dataclasses.asdict(config).items()
        else:
            assert config.schedule is None
    config = parsed("--task", task)
    assert config == parsed("--task", task, "--method", "dora")
    assert {name: str(getattr(config, name)) for name in row} == row
    assert (config.weight_decay, config.clip, config.warmup) == (0.01, 1.0, 0.06)
    asked = parsed("--task", task, "--lr", "0.125", "--eta", "0.125")
    assert asked.lr == asked.eta == 0.125


def test_a_run_from_the_command_line(tmp_path, capsys):
    """main's run equals train()'s bit for bit, returns 0, and prints score, parameter counts
    before and after pruning, and the rank map, whose matrices have short names."""
    assert main(flags(**run_settings(tmp_path / "main"))) == 0
    text = capsys.readouterr().out
    found = run(tmp_path / "train")
    same_runs(tmp_path / "main", tmp_path / "train")
    assert f"matthews {found['best']['matthews']:.4f}" in text
    for name in ("trainable_parameters", "head_parameters", "adapter_parameters",
                 "adapter_parameters_after_pruning"):
        assert f"{found[name]:,}" in text
    titles, first, _, total = text.split("layer by matrix")[1].splitlines()[1:5]
    assert " ".join(titles.split()) == (
        "layer query key value attention.output intermediate output total")
    ranks = [*found["ranks"].values()][:6]
    assert [*map(int, first.split())] == [0, *ranks, sum(ranks)]
    assert total.split()[0] == "total" and total.split()[-1] == "24"


def test_three_seeds(tmp_path, capsys):
    """--seeds 3 1 2: a folder each, equal to single runs; median, mean, standard deviation."""
    root = tmp_path / "all"
    assert main([*flags(**run_settings(root)), "--seeds", "3", "1", "2"]) == 0
    text = capsys.readouterr().out
    folders = sorted(root.iterdir())
    assert [folder.name for folder in folders] == ["seed-1", "seed-2", "seed-3"]
    run(tmp_path / "two", seed=2)
    same_runs(root / "seed-2", tmp_path / "two")
    scores = [result(folder)["best"]["matthews"] for folder in folders]
    median, mean, deviation = (getattr(statistics, name)(scores)
                               for name in ("median", "mean", "stdev"))
    assert (f"matthews over 3 seeds: median {median:.4f}, mean {mean:.4f}, "
            f"standard deviation {deviation:.4f}") in text


def test_overwrite(tmp_path, capsys):
    """A folder with a run is refused; --overwrite removes the run's own files alone."""
    out, new = tmp_path / "out", tmp_path / "new"
    run(out, epochs=4)
    notes = [out / "notes.txt", out / "adapter" / "notes.txt"]
    for note in notes:
        note.write_text("mine")
    words = flags(**run_settings(out))
    line = failed(capsys, *words)
    assert f"{out} already contains a run" in line and "--overwrite" in line
    shutil.rmtree(out / "checkpoints")  # nothing is left to continue from
    line = failed(capsys, *words, "--resume")
    assert "already contains a run" in line and "--resume" not in line

    assert main([*words, "--overwrite"]) == 0
    run(new)
    same_runs(out, new)
    assert [note.read_text() for note in notes] == ["mine"] * 2
    expected = {out / path.relative_to(new) for path in new.rglob("*")}
    assert {*out.rglob("*")} - expected == {*notes}


def test_overwriting_where_a_run_starts(tmp_path, capsys):
    """A run of bitfit is replaced with its model, but not if the new run would start from it. The
    empty folders that are left do not hide a model."""
    out = tmp_path / "bitfit"
    run(out, method="bitfit", max_steps=8)
    model = out / "model"
    own = run_settings(out, model_dir=model)
    assert "would delete" in failed(capsys, *flags(**own), "--overwrite")
    assert (model / "config.json").exists()
    for settings in (run_settings(out), run_settings(out, method="bitfit", max_steps=8)):
        assert main([*flags(**settings), "--overwrite"]) == 0
        assert main(["--eval-only", "--adapter", str(out)]) == 0
        assert (model / "config.json").exists() == ("method" in settings)


@pytest.mark.parametrize("words", [["--overwrite"], ["--seeds", "1", "2"]])
def test_a_folder_that_is_not_a_runs(tmp_path, capsys, words):
    """--out is a model's folder, or has a file of one's own: refused, and each file stays."""
    model = shutil.copytree(files()[1], tmp_path / "model")
    (tmp_path / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    for folder in (model, tmp_path):
        toy = ["--out", str(folder)]
        for settings in (flags(**run_settings(folder)), toy):
            line = failed(capsys, *settings, *words)
            assert str(folder) in line and "is not empty" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["data_dir", "model_dir", "out"])
def test_folders_below_home(tmp_path, monkeypatch, name):
    """~ is the home folder in each flag that names a folder, --adapter too."""
    given = run_settings(tmp_path / "out", max_steps=4, interval=1)
    monkeypatch.setenv("HOME", str(Path(given[name]).parent))
    given[name] = f"~/{Path(given[name]).name}"
    monkeypatch.chdir(tmp_path)
    assert main(flags(**given)) == 0
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--eval-only", "--adapter", "~/out"]) == 0
    assert not (tmp_path / "~").exists() and (tmp_path / "out" / "result.json").exists()
    save_model(load_roberta(files()[1], 2), "~/model")
    assert load_roberta("~/model", 2).head == train_glue.ITS_HEAD


def test_a_file_system_without_locks(tmp_path, capsys, monkeypatch):
    """Where flock is not supported, the run says so and continues."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    run(tmp_path, max_steps=4, interval=1)
    assert f"{tmp_path} cannot be locked" in " ".join(capsys.readouterr().out.split())  # unwrapped


def test_a_run_in_a_thread(tmp_path):
    """Python allows signal handlers in the main thread alone; a run elsewhere has none."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run, tmp_path / "thread", max_steps=4, interval=1).result()
    assert found["steps"] == 4 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("method", ["dora", "full"])
def test_eval_only(tmp_path, capsys, monkeypatch, method):
    """`--eval-only --adapter RUN`, or the folder inside: all settings are those of the run, and
    its best score is repeated exactly. A flag goes first, and nothing is written."""
    out = tmp_path / "out"
    inside = out / ("model" if method == "full" else "adapter")
    dtype = "float32" if method == "full" else "float64"  # a whole model is loaded in float32
    best = run(out, method=method, epochs=2, max_len=20, dtype=dtype)["best"]
    configs, scores, real, prepare = [], [], train_glue.evaluate_dev, train_glue.prepare

    def evaluate_dev(*args):
        scores.append(real(*args))
        return scores[-1]

    def noting(config):
        configs.append(config)
        return prepare(config)

    monkeypatch.setattr(train_glue, "evaluate_dev", evaluate_dev)
    monkeypatch.setattr(train_glue, "prepare", noting)
    before = contents(tmp_path)
    for folder in (out, inside):
        assert main(["--eval-only", "--adapter", str(folder)]) == 0
        assert scores.pop().items() <= best.items()
        config = configs.pop()
        assert (config.task, config.max_len, config.dtype) == ("toy", 20, dtype)
        said = capsys.readouterr().out
        assert f"toy, 40 dev examples: matthews {best['matthews']:.4f}" in said
    monkeypatch.chdir(inside)
    assert main(["--eval-only", "--adapter", ".", "--dtype", "float32"]) == 0
    config = configs.pop()
    assert config.dtype == "float32" and config.max_len == 20
    assert contents(tmp_path) == before


def test_eval_only_of_something_else(tmp_path, capsys, monkeypatch):
    """Another task, order of labels, length, other sizes, another tokenizer and other
    weights than the adapter's are refused; the same model elsewhere is accepted."""
    run(tmp_path / "out", max_steps=8, interval=1)
    words = ["--eval-only", "--adapter", str(tmp_path / "out")]
    assert "task = toy, not toy-pretrain" in failed(capsys, *words, "--task", "Toy-Pretrain")
    assert "max_len = 48, not 20" in failed(capsys, *words, "--max-len", "20")
    with monkeypatch.context() as patch:
        other = dataclasses.replace(data.TASKS["toy"], labels=("1", "0"))
        patch.setitem(data.TASKS, "toy", other)
        assert "labels = 0, 1, not 1, 0" in failed(capsys, *words)
    moved = shutil.copytree(files()[1], tmp_path / "moved")
    words += ["--model-dir", str(moved)]
    assert main(words) == 0
    for name, old, new in (("config.json", b'attention_heads": 4', b'attention_heads": 2'),
                           ("vocab.json", b'"!": 4, "\\"": 5', b'"!": 5, "\\"": 4'),
                           ("model.safetensors", b"\x3d", b"\xbd")):  # another sign
        path = moved / name
        before = path.read_bytes()
        at = before.rindex(old)
        path.write_bytes(before[:at] + new + before[at + len(old):])
        assert "model = " in failed(capsys, *words)
        path.write_bytes(before)


def test_eval_only_without_a_head_or_an_adapter(tmp_path, capsys):
    """No head, no adapter yet, a run in place of a model: each is refused by its name."""
    folder = shutil.copytree(files()[1], tmp_path / "model")
    weights = read_safetensors(folder / "model.safetensors")
    write_safetensors(folder / "model.safetensors", {
        key: tensor.clone() for key, tensor in weights.items() if "classifier" not in key})
    words = ["--data-dir", str(files()[0]), "--max-len", "48", "--eval-only", "--adapter"]
    line = failed(capsys, *words, str(folder))
    assert str(folder) in line and "no head for toy" in line

    run(tmp_path / "out", method="head", max_steps=8)
    given = {**run_settings(tmp_path / "new"), "model_dir": tmp_path / "out"}
    assert f"{tmp_path / 'out'}" in failed(capsys, *flags(**given))
    shutil.rmtree(tmp_path / "out" / "model")
    line = failed(capsys, "--eval-only", "--adapter", str(tmp_path / "out"))
    assert f"{tmp_path / 'out'} has no adapter yet" in line


TEST_ROWS = {"test": 7, "test_mm": 5}


def fake_task(root, name):
    """Small files of a task, in the columns of the public ones: 12 rows, test files of 7 or 5."""
    task = data.TASKS[name]
    labels = task.labels or ("0.0", "2.5", "5.0")
    (root / task.folder).mkdir()
    for split, file in task.files.items():
        is_test = split in TEST_ROWS
        columns = task.columns or (*task.texts, task.label)
        if is_test:
            columns = ("index", *task.texts)
        rows = [] if task.columns and not is_test else [columns]
        for i in range(TEST_ROWS.get(split, 12)):
            cells = dict.fromkeys(task.texts, f"the dog number {i}" + " again" * (i % 5))
            cells |= {"index": f"{i}", task.label: labels[i % len(labels)]}
            rows.append([cells.get(column, "") for column in columns])
        data.write_tsv(root / task.folder / file, rows)


@pytest.mark.parametrize("name, method, expected", [
    ("cola", "dora", {"CoLA": 7}), ("sst2", "full", {"SST-2": 7}),
    ("stsb", "dora", {"STS-B": 7}), ("rte", "head", {"RTE": 7}),
    ("mnli", "dora", {"MNLI-m": 7, "MNLI-mm": 5, "AX": 7})])
def test_predict(tmp_path, capsys, name, method, expected):
    """--predict test after a run, and again with --eval-only: the same files, with GLUE's names,
    header, row count, index and label words (MNLI's two and AX from one run)."""
    out, labels = tmp_path / "out", data.TASKS[name].labels
    for part in (name, "ax") if name == "mnli" else (name,):
        fake_task(tmp_path, part)
    given = run_settings(out, task=name, data_dir=str(tmp_path), method=method, max_steps=8)
    assert main([*flags(**given), "--predict", "test"]) == 0
    said = capsys.readouterr().out
    first = contents(out / "submission")
    assert {path.stem for path in first} == {*expected}
    for file, rows in expected.items():
        text = (out / "submission" / f"{file}.tsv").read_text()
        assert f"{file}.tsv" in said
        header, *lines = text.splitlines()
        assert header == "index\tprediction"
        index, predictions = zip(*(line.split("\t") for line in lines))
        assert index == tuple(map(str, range(rows)))
        for word in predictions:
            assert word in labels if labels else 0 <= float(word) <= 5
    shutil.rmtree(out / "submission")
    assert main(["--eval-only", "--adapter", str(out), "--predict", "test"]) == 0
    assert contents(out / "submission") == first
