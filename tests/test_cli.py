"""Every setting is a flag, every flag has an effect or is refused in one line before anything is
trained; main prints the scores and returns 0, 2 for bad input, 128 + signal if interrupted."""
import dataclasses
import errno
import json
import re
import shutil
import signal
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import files, flags, result, run, run_settings, same_runs

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


# ---- flags --------------------------------------------------------------------------------------

def test_every_setting_is_a_flag():
    """The names of both dataclasses' fields, as flags, against the parser's; each has its help and
    default in --help."""
    text = re.sub(r"\s+", " ", make_parser([]).format_help())
    comments = {**help_of(TrainConfig), **help_of(DoRAConfig)}
    assert comments.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    for f in dataclasses.fields(TrainConfig):
        if f.name != "seed":
            assert f"--{f.name.replace('_', '-')}" in text and comments[f.name] in text, f.name
            default = getattr(make_config(), f.name)
            default = {None: "none"}.get(default, default)
            default = " ".join(default) if isinstance(default, tuple) else default
            default = f"{default:g}" if isinstance(default, float) else default
            assert f"default: {default}" in text.split(comments[f.name])[1].split("--")[0], f.name


@pytest.mark.parametrize("words, parts", [
    ("--task stsb", ("AdamW (> 0; default: 0.00075)", "(>= 1; default: 16)", "default: 45)",
                     "(>= 0, < 1; default: 0.06)", "{slow_first,fast_first,none}")),
    ("--task SST-2 --method Paper", ("AdamW (> 0; default: 0.0008)", "(>= 1; default: 64)",
                                     "default: slow_first)", "--task sst2 --method paper"))])
def test_help_shows_the_tasks_defaults(words, parts):
    """With --task and --method, --help has the numbers of that task and method."""
    text = re.sub(r"\s+", " ", make_parser(words.split()).format_help())
    for part in ("--task {cola,sst2,", *parts):
        assert part in text, part


@pytest.mark.parametrize("words, value", [
    ("--lr 0.5", 0.5), ("--batch-size 3", 3), ("--max-steps none", None), ("--out a/b", "a/b"),
    ("--compile", True), ("--no-compile", False), ("--clip 2", 2.0), ("--dtype bf16", "bf16"),
    ("--start-rank 6", 6), ("--beta2 none", None), ("--targets a,b c", ("a", "b", "c")),
    ("--task STS-B", "stsb"), ("--method Lora", "lora"), ("--schedule slow_first", "slow_first"),
    ("--penalty none", None)])
def test_flags(words, value):
    """A flag's text becomes the setting's value, in its type."""
    name = words.split()[0].removeprefix("--no-").lstrip("-").replace("-", "_")
    found = getattr(parsed(*words.split()), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("words, says", [
    ("--nope 1", "--nope"), ("--lr x", "float value: 'x'"), ("--lr -1e-3", "lr = -0.001"),
    ("--lr nan", "lr = nan"), ("--epochs 1.5", "int value: '1.5'"), ("--ep 3", "--ep"),
    ("--task ax", "ax has no split 'train'"), ("--seeds a", "--seeds"), ("--seeds -1", "seed = -1"),
    ("--seeds 5 5", "--seeds 5 5"), ("--predict dev", "--predict"), ("stray", "stray"),
    ("--init foo", "'foo'"), ("--rank 3 --start-rank 2", "start_rank = 2"),
    ("--importance none", "importance = None"), ("--no-gate", "gate = False"),
    ("--initial-phase 0.9", "initial_phase = 0.9"), ("--max-len 63", "62 positions"),
    ("--resume --overwrite", "overwrite"), ("--task toy --predict test", "toy has no split 'test'"),
    # names that are nearly right, or another program's
    ("--taks cola", "mean --task?"), ("--data_dir x", "mean --data-dir?"),
    ("--seed 3", "mean --seeds?"), ("--lora-alpha 4", "mean --alpha?"),
    ("--learning-rate 3", "mean --lr?"), ("--device gpu", "mean cuda?"),
    ("--task mrcp", "mean mrpc?"), ("--method lroa", "mean lora?"),
    ("--model-dir roberta-base", "roberta-base/config.json"),
    # a target must be in the encoder: the head trains as a whole
    ("--targets query out_proj", "'out_proj'"), ("--targets classifier.dense", "classifier.dense"),
    # what this run would ignore
    ("--method bitfit --rank 5", "rank = 5.0"), ("--method full --targets query", "targets = "),
    ("--method lora --interval 3", "interval = 3"), ("--penalty none --eta 0.1", "eta = 0.1"),
    ("--eps 1e-4", "eps = 0.0001"), ("--adapter x", "--adapter x"),
    ("--eval-only", "--adapter RUN"), ("--eval-only --adapter nowhere", "nowhere")])
def test_bad_input(tmp_path, capsys, words, says):
    """Unknown flags, values of another type, out of range, without effect or that do not go
    together: exit code 2 and one line that names flag and value; no run folder."""
    given = run_settings(tmp_path / "out")
    for name in ("rank", "interval", "budget_unit"):  # which other methods refuse
        del given[name]
    line = failed(capsys, *([] if "--eval-only" in words else flags(**given)), *words.split())
    assert says in line and not (tmp_path / "out").exists()


# ---- defaults -----------------------------------------------------------------------------------

@pytest.mark.parametrize("task, lr, batch, epochs, eta, interval", [
    ("mnli", 3e-3, 32, 10, 0.3, 50), ("sst2", 8e-4, 64, 60, 0.5, 10),
    ("cola", 2e-3, 16, 45, 0.3, 10), ("qqp", 1e-3, 16, 10, 0.3, 50),
    ("qnli", 3.5e-3, 16, 12, 0.5, 50), ("rte", 2e-3, 16, 80, 0.5, 10),
    ("mrpc", 2.5e-3, 16, 30, 0.3, 50), ("stsb", 3e-3, 16, 45, 0.3, 10)])
def test_table_8(task, lr, batch, epochs, eta, interval):
    """Each task's defaults against the rows of the paper's Table 8, typed in here: --method paper
    has them as published, dora and lora train at a quarter of the rate. A method's row goes before
    the task's, and what is asked for before both."""
    for method, share in (("paper", 1), ("adalora", 1), ("dora", 0.25), ("lora", 0.25)):
        config = parsed("--task", task, "--method", method)
        assert (config.lr, config.batch_size, config.epochs) == (share * lr, batch, epochs)
        assert METHODS[method].items() <= dataclasses.asdict(config).items()
    for method, rate in (("full", 2e-5), ("bitfit", 1e-3), ("head", lr)):
        config = parsed("--task", task, "--method", method)
        assert config.lr == rate and config.schedule is None
    config = parsed("--task", task)
    assert config == parsed("--task", task, "--method", "dora")
    assert (config.eta, config.interval) == (eta, interval)
    assert (config.weight_decay, config.clip, config.warmup) == (0.01, 1.0, 0.06)
    assert parsed("--task", task, "--lr", "0.125").lr == 0.125
    assert parsed("--task", task, "--eta", "0.125").eta == 0.125


# ---- main ---------------------------------------------------------------------------------------

def test_a_run_from_the_command_line(tmp_path, capsys):
    """main's run equals train()'s bit for bit, returns 0, and prints score, parameter counts
    before and after pruning, and the rank map."""
    assert main(flags(**run_settings(tmp_path / "main"))) == 0
    text = capsys.readouterr().out
    found = run(tmp_path / "train")
    same_runs(tmp_path / "main", tmp_path / "train")
    assert f"matthews {found['best']['matthews']:.4f}" in text
    for name in ("trainable_parameters", "head_parameters", "adapter_parameters",
                 "adapter_parameters_after_pruning"):
        assert f"{found[name]:,}" in text
    rows = text[text.index("layer by matrix"):].splitlines()
    assert rows[1].split() == ["layer", "query", "key", "value", "attention.output",
                               "intermediate", "output", "total"]
    assert [row.split()[0] for row in rows[2:5]] == ["0", "1", "total"]
    assert rows[4].split()[-1] == "24"
    assert [*map(int, rows[2].split()[1:7])] == [*found["ranks"].values()][:6]


def test_three_seeds(tmp_path, capsys):
    """--seeds 3 1 2: a folder each, equal to single runs, then median, mean and standard
    deviation."""
    assert main([*flags(**run_settings(tmp_path / "all")), "--seeds", "3", "1", "2"]) == 0
    text = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["seed-1", "seed-2", "seed-3"]
    run(tmp_path / "two", seed=2)
    same_runs(tmp_path / "all" / "seed-2", tmp_path / "two")
    scores = [result(tmp_path / "all" / f"seed-{i}")["best"]["matthews"] for i in (1, 2, 3)]
    assert (f"matthews over 3 seeds: median {statistics.median(scores):.4f}, mean "
            f"{statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}"
            ) in text


def test_overwrite(tmp_path, capsys):
    """A11: a folder with a run is refused; with --overwrite the run's own files are gone, and no
    other, and the new run is as any other."""
    run(tmp_path / "out", epochs=4)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "adapter" / "notes.txt").write_text("mine")
    run(tmp_path / "bitfit", method="bitfit", max_steps=8)
    given = run_settings(tmp_path / "out", epochs=3)
    line = failed(capsys, *flags(**given))
    assert f"{tmp_path / 'out'} already contains a run" in line and "--overwrite" in line
    shutil.rmtree(tmp_path / "out" / "checkpoints")  # nothing is left to continue from
    line = failed(capsys, *flags(**given), "--resume")
    assert "already contains a run" in line and "--resume" not in line

    assert main([*flags(**given), "--overwrite"]) == 0
    run(tmp_path / "new")
    same_runs(tmp_path / "out", tmp_path / "new")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "adapter" / "notes.txt").read_text() == "mine"
    other = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")}
    new = {p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*")}
    assert {str(p) for p in other - new} == {"notes.txt", "adapter/notes.txt"}

    given |= {"out": tmp_path / "bitfit"}
    start = {**given, "model_dir": tmp_path / "bitfit" / "model"}  # the run's own start would go
    assert "would delete" in failed(capsys, *flags(**start), "--overwrite")
    assert (tmp_path / "bitfit" / "model" / "config.json").exists()
    assert main([*flags(**given), "--overwrite"]) == 0
    assert not (tmp_path / "bitfit" / "model" / "config.json").exists()


# ---- folders ------------------------------------------------------------------------------------

def contents(folder):
    """{path: bytes} of the files in a folder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("words", [["--overwrite"], ["--seeds", "1", "2"]])
def test_a_folder_that_is_not_a_runs(tmp_path, capsys, words):
    """N15: --out is a model's folder, or has a file of one's own: refused, and each file stays."""
    shutil.copytree(files()[1], tmp_path / "model")
    (tmp_path / "thesis.tex").write_text("mine")
    before = contents(tmp_path)
    for folder in (tmp_path / "model", tmp_path):
        for settings in (flags(**run_settings(folder)), ["--out", str(folder)]):  # and the toy
            line = failed(capsys, *settings, *words)
            assert str(folder) in line and "neither empty nor a run's" in line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["data_dir", "model_dir", "out"])
def test_folders_below_home(tmp_path, monkeypatch, name):
    """N11: ~ is the home folder in each flag that names a folder, --adapter too."""
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
    """N10: where flock is not supported, the run says so and continues."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    run(tmp_path, max_steps=4, interval=1)
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().out


def test_a_run_in_a_thread(tmp_path):
    """N9: Python allows signal handlers in the main thread alone; a run elsewhere has none."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run, tmp_path / "thread", max_steps=4, interval=1).result()
    assert found["steps"] == 4 and signal.getsignal(signal.SIGINT) is before


# ---- --eval-only --------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["dora", "full"])
def test_eval_only(tmp_path, capsys, monkeypatch, method):
    """A9: `--eval-only --adapter RUN`, or the folder inside, and nothing else: task, files, length
    and number type are those of the run, and its best score is repeated exactly. A flag goes first,
    and nothing is written."""
    dtype = "float32" if method == "full" else "float64"  # a whole model is loaded in float32
    found = run(tmp_path / "out", method=method, epochs=2, max_len=20, dtype=dtype)
    configs, scores, real = [], [], train_glue.evaluate_dev
    prepare = train_glue.prepare
    monkeypatch.setattr(
        train_glue, "evaluate_dev", lambda *a: scores.append(real(*a)) or scores[-1])
    monkeypatch.setattr(train_glue, "prepare", lambda c: configs.append(c) or prepare(c))
    before = contents(tmp_path)
    inside = tmp_path / "out" / ("model" if method == "full" else "adapter")
    for folder in (tmp_path / "out", inside):
        assert main(["--eval-only", "--adapter", str(folder)]) == 0
        assert scores.pop() == {name: found["best"][name] for name in ("matthews", "spread")}
        assert (configs[-1].task, configs[-1].max_len, configs[-1].dtype) == ("toy", 20, dtype)
        line = f"toy, 40 dev examples: matthews {found['best']['matthews']:.4f}"
        assert line in capsys.readouterr().out
    monkeypatch.chdir(inside)
    assert main(["--eval-only", "--adapter", ".", "--dtype", "float32"]) == 0
    assert configs[-1].dtype == "float32" and configs[-1].max_len == 20
    assert contents(tmp_path) == before


def test_eval_only_of_something_else(tmp_path, capsys, monkeypatch):
    """T2, T21: an adapter with another task, labels in another order, another length, another
    tokenizer, other sizes or other weights is refused; the same model elsewhere is accepted."""
    run(tmp_path / "out", max_steps=8, interval=1)
    words = ["--eval-only", "--adapter", str(tmp_path / "out")]
    assert "task = toy, not toy-pretrain" in failed(capsys, *words, "--task", "Toy-Pretrain")
    assert "max_len = 48, not 20" in failed(capsys, *words, "--max-len", "20")
    with monkeypatch.context() as patch:
        patch.setitem(data.TASKS, "toy", dataclasses.replace(data.TASKS["toy"], labels=("1", "0")))
        assert "labels = 0, 1, not 1, 0" in failed(capsys, *words)

    vocab = json.loads((files()[1] / "vocab.json").read_text())
    a, b = list(vocab)[300:302]
    weights = read_safetensors(files()[1] / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"] *= -1
    sizes = json.loads((files()[1] / "config.json").read_text())
    for name, change in (
            ("config.json", json.dumps({**sizes, "num_attention_heads": 2})),
            ("vocab.json", json.dumps({**vocab, a: vocab[b], b: vocab[a]})),
            ("model.safetensors", weights)):
        folder = shutil.copytree(files()[1], tmp_path / name)
        if name == "model.safetensors":
            write_safetensors(folder / name, change)
        else:
            (folder / name).write_text(change)
        assert "model = " in failed(capsys, *words, "--model-dir", str(folder))
    shutil.copytree(files()[1], tmp_path / "moved")
    assert main([*words, "--model-dir", str(tmp_path / "moved")]) == 0


def test_eval_only_without_a_head_or_an_adapter(tmp_path, capsys):
    """An encoder whose file has no head, a run that has saved no adapter yet, and a run's folder in
    place of a model's: refused, each by its name."""
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


# ---- the submission files -----------------------------------------------------------------------

TEST_ROWS = {"test": 7, "test_mm": 5}


def fake_task(root, name):
    """Small files of a task, in the columns of the public ones: 12 rows, test files of 7 or 5."""
    task = data.TASKS[name]
    words = task.labels or ("0.0", "2.5", "5.0")
    (root / task.folder).mkdir()
    for split, file in task.files.items():
        is_test = split in TEST_ROWS
        columns = ("index", *task.texts) if is_test else task.columns or (*task.texts, task.label)
        rows = [] if task.columns and not is_test else [columns]
        for i in range(TEST_ROWS.get(split, 12)):
            cells = {name: f"the dog number {i} sees a cat" + " again" * (i % 5)
                     for name in task.texts} | {"index": f"{i}", task.label: words[i % len(words)]}
            rows.append([cells.get(column, "") for column in columns])
        (root / task.folder / file).write_text("".join("\t".join(row) + "\n" for row in rows))


@pytest.mark.parametrize("name, method, expected", [
    ("cola", "dora", {"CoLA": 7}), ("sst2", "full", {"SST-2": 7}), ("stsb", "dora", {"STS-B": 7}),
    ("rte", "head", {"RTE": 7}), ("mnli", "dora", {"MNLI-m": 7, "MNLI-mm": 5, "AX": 7})])
def test_predict(tmp_path, capsys, name, method, expected):
    """--predict test after a run, and again with --eval-only: the same files, with GLUE's names,
    header, row count, index and label words (MNLI's two and AX from one run)."""
    for part in (name, "ax") if name == "mnli" else (name,):
        fake_task(tmp_path, part)
    given = run_settings(tmp_path / "out", task=name, data_dir=str(tmp_path), method=method,
                     max_steps=8)
    assert main([*flags(**given), "--predict", "test"]) == 0
    folder = tmp_path / "out" / "submission"
    assert {p.stem for p in folder.iterdir()} == {*expected}
    for file, rows in expected.items():
        header, *cells = [line.split("\t") for line in
                          (folder / f"{file}.tsv").read_text().splitlines()]
        assert header == ["index", "prediction"]
        assert [index for index, _ in cells] == [str(i) for i in range(rows)]
        if name == "stsb":
            assert all(0 <= float(cell) <= 5 for _, cell in cells)
        else:
            assert {cell for _, cell in cells} <= {*data.TASKS[name].labels}
        assert f"{file}.tsv" in capsys.readouterr().out or file != next(iter(expected))
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    words = ["--eval-only", "--adapter", str(tmp_path / "out"), "--predict", "test"]
    assert main(words) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
