"""train_glue.py: flags, defaults, what main prints and returns, --eval-only, --predict, --seeds."""
import dataclasses
import json
import re
import shutil
import statistics

import pytest
from tiny import files, flags, result, run, same_runs, settings, tiny_model

import data
import train_glue
from dora import METHODS, DoRAConfig, read_safetensors, write_safetensors
from train_glue import COLUMNS_8, TABLE_8, TrainConfig, main, make_config, make_parser, save_model


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
    text = re.sub(r"\s+", " ", make_parser().format_help())
    for config in (TrainConfig, DoRAConfig):
        for f in dataclasses.fields(config):
            if f.name not in ("seed", "dora"):
                assert f"--{f.name.replace('_', '-')}" in text
                default = "the task's, paper's Table 8" if f.name in COLUMNS_8 else f.default
                assert f"{f.metadata['help']} (default: {default})" in text, f.name


@pytest.mark.parametrize("flag, field, value", [
    ("--lr 0.5", "lr", 0.5), ("--batch-size 3", "batch_size", 3),
    ("--accumulate 4", "accumulate", 4), ("--epochs 7", "epochs", 7),
    ("--max-steps 9", "max_steps", 9), ("--out a/b", "out", "a/b"),
    ("--max-steps none", "max_steps", None), ("--device cpu", "device", "cpu"),
    ("--compile", "compile", True), ("--no-compile", "compile", False), ("--clip 2", "clip", 2.0),
    ("--dtype bf16", "dtype", "bf16"), ("--save-every 5", "save_every", 5)])
def test_flags_of_the_run(flag, field, value):
    """A flag's text becomes the setting's value, in its type."""
    found = getattr(parsed(*flag.split()), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("flag, field, value", [
    ("--rank 0.5", "rank", 0.5), ("--start-rank 6", "start_rank", 6),
    ("--start-rank none", "start_rank", None), ("--eta 0", "eta", 0.0),
    ("--beta2 none", "beta2", None), ("--targets query value", "targets", ("query", "value")),
    ("--interval 3", "interval", 3), ("--importance norm", "importance", "norm"),
    ("--schedule dora", "schedule", "dora"),
    ("--penalty none", "penalty", None), ("--init kaiming", "init", "kaiming"),
    ("--dropout-on input", "dropout_on", "input"), ("--final-phase 0.2", "final_phase", 0.2)])
def test_flags_of_the_method(flag, field, value):
    """The same for the settings of dora.py."""
    found = getattr(parsed(*flag.split()).dora, field)
    assert tuple(found) == value if isinstance(value, tuple) else found == value


def test_two_flags_without_pruning():
    """--importance none --schedule none is plain training of all components."""
    dora = parsed(*"--importance none --schedule none".split()).dora
    assert dora.importance is None and dora.schedule is None and dora.r_prime == 2


@pytest.mark.parametrize("words, says", [
    ("--nope 1", "--nope"), ("--lr x", "--lr: 'x', expected float"), ("--lr -1", "lr = -1.0"),
    ("--lr nan", "lr = nan"), ("--epochs 0", "epochs = 0"), ("--epochs 1.5", "--epochs: '1.5'"),
    ("--task foo", "task = foo: choose one of cola"), ("--task ax", "task = ax"),
    ("--method foo", "method = foo: choose one of"), ("--seeds a", "--seeds"),
    ("--seeds -1", "seed = -1"), ("--predict dev", "--predict"), ("stray", "stray"),
    ("--rank 3 --start-rank 2", "start_rank = 2 is below rank"), ("--rank 0", "rank = 0"),
    ("--importance none", "both"), ("--no-gate", "gate = False"), ("--ep 3", "--ep"),
    ("--initial-phase 0.9", "leave no step to prune in"), ("--targets qkv", "candidates"),
    ("--max-len 1000", "--max-len"), ("--device tpu", "--device cpu"), ("--init foo", "init = foo"),
    ("--eval-only --adapter nowhere", "nowhere"),
    ("--task toy --predict test", "toy has no split 'test'")])
def test_bad_flags(tmp_path, capsys, words, says):
    """Unknown flags, values of another type, out of range or that do not go together: exit code 2
    and one line (argparse adds one of usage) that names the flag or setting; no run folder."""
    given = settings(tmp_path / "out")              # of a flag that stands twice, the last counts
    assert says in failed(capsys, *flags(**given), *words.split())
    assert not (tmp_path / "out").exists()


# ---- defaults -----------------------------------------------------------------------------------

@pytest.mark.parametrize("task, lr, batch, epochs, eta, interval", [
    ("mnli", 3e-3, 32, 10, 0.3, 50), ("sst2", 8e-4, 64, 60, 0.5, 10),
    ("cola", 2e-3, 16, 45, 0.3, 10), ("qqp", 1e-3, 16, 10, 0.3, 50),
    ("qnli", 3.5e-3, 16, 12, 0.5, 50), ("rte", 2e-3, 16, 80, 0.5, 10),
    ("mrpc", 2.5e-3, 16, 30, 0.3, 50), ("stsb", 3e-3, 16, 45, 0.3, 10)])
def test_table_8(task, lr, batch, epochs, eta, interval):
    """Each task's defaults against the rows of the paper's Table 8, typed in here; what is asked
    for goes first."""
    config = parsed("--task", task)
    assert (config.lr, config.batch_size, config.epochs) == (lr, batch, epochs)
    assert (config.dora.eta, config.dora.interval) == (eta, interval)
    assert (config.weight_decay, config.clip, config.warmup) == (0.01, 1.0, 0.06)
    assert parsed("--task", task, "--lr", "0.125").lr == 0.125
    assert parsed("--task", task, "--eta", "0.125").dora.eta == 0.125


def test_every_task_has_defaults():
    """Each row of TASKS that can be trained has a row of defaults, but for the pretraining of the
    toy, which sets its own."""
    assert {n for n, t in data.TASKS.items() if "train" in t.files} - {"toy-pretrain"} == {*TABLE_8}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_rows(method):
    """A method's settings are the row of METHODS on top of the task's and the defaults; a flag
    goes before both."""
    config = parsed("--task", "cola", "--method", method)
    task = {"eta": 0.3, "interval": 10}
    assert config.dora == DoRAConfig(**{**task, **METHODS[method]})
    assert parsed("--method", method, "--alpha", "3").dora.alpha == 3


@pytest.mark.parametrize("method, lr", [("full", 2e-5), ("bitfit", 1e-3), ("head", 2e-3)])
def test_methods_without_adapter(method, lr):
    """Full fine-tuning and biases alone have learning rates of their own, all three no pruning."""
    config = parsed("--task", "cola", "--method", method)
    assert config.lr == lr and config.dora.schedule is None


# ---- main ---------------------------------------------------------------------------------------

def test_a_run_from_the_command_line(tmp_path, capsys):
    """main's run equals train()'s bit for bit, returns 0, and prints score, parameter counts
    before and after pruning, and the rank map."""
    assert main(flags(**settings(tmp_path / "main"))) == 0
    text = capsys.readouterr().out
    found = run(tmp_path / "train")
    same_runs(tmp_path / "main", tmp_path / "train")
    assert f"matthews {found['best']['matthews']:.4f}" in text
    for name in ("trainable_parameters", "head_parameters", "adapter_parameters",
                 "adapter_parameters_after_pruning"):
        assert f"{found[name]:,}" in text
    rows = text[text.index("layer by matrix"):].splitlines()
    assert rows[1].split() == ["layer", "query", "key", "value", "attention.output.dense",
                               "intermediate.dense", "output.dense", "total"]
    assert [row.split()[0] for row in rows[2:5]] == ["0", "1", "total"]
    assert rows[4].split()[-1] == "24"
    assert [*map(int, rows[2].split()[1:7])] == [*found["ranks"].values()][:6]


def test_three_seeds(tmp_path, capsys):
    """--seeds 3 1 2: a folder each, equal to single runs, then median, mean and standard
    deviation."""
    assert main([*flags(**settings(tmp_path / "all")), "--seeds", "3", "1", "2"]) == 0
    text = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["seed-1", "seed-2", "seed-3"]
    run(tmp_path / "two", seed=2)
    same_runs(tmp_path / "all" / "seed-2", tmp_path / "two")
    scores = [result(tmp_path / "all" / f"seed-{i}")["best"]["matthews"] for i in (1, 2, 3)]
    assert (f"matthews over 3 seeds: median {statistics.median(scores):.4f}, mean "
            f"{statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}"
            ) in text


@pytest.mark.parametrize("method", ["dora", "paper", "lora", "full"])
def test_eval_only(tmp_path, capsys, monkeypatch, method):
    """--eval-only with the saved adapter (or model) gives the run's best score, exactly, and
    writes nothing."""
    scores = []
    real = train_glue.evaluate_dev
    monkeypatch.setattr(
        train_glue, "evaluate_dev", lambda *a: scores.append(real(*a)) or scores[-1])
    given = settings(tmp_path / "out", method=method, epochs=4)
    found = run(**given)
    n = len(scores)
    capsys.readouterr()
    if method == "full":
        given["model_dir"] = str(tmp_path / "out" / "model")
        words = []
    else:
        words = ["--adapter", str(tmp_path / "out" / "adapter")]
    before = sorted(tmp_path.rglob("*"))
    assert main([*flags(**given), "--eval-only", *words]) == 0
    assert scores[n:] == [{"matthews": found["best"]["matthews"]}]
    assert capsys.readouterr().out.splitlines()[-1] == f"matthews {scores[-1]['matthews']:.4f}"
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_only_without_a_head(tmp_path, capsys):
    """--eval-only on an encoder whose file has no head, without an adapter: refused, a random head
    would be scored."""
    given = settings(tmp_path / "out")
    shutil.copytree(given["model_dir"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    write_safetensors(path, {key: tensor.clone() for key, tensor in read_safetensors(path).items()
                             if not key.startswith("classifier.")})
    given["model_dir"] = tmp_path / "model"
    line = failed(capsys, *flags(**given), "--eval-only")
    assert "have no head for toy" in line and "--adapter" in line


def test_an_adapter_for_another_task(tmp_path, capsys):
    """An adapter with a head for two classes on a task with four: refused by name."""
    run(tmp_path / "out", max_steps=5, interval=1)
    words = flags(**settings(tmp_path / "out", task="toy-pretrain"))
    line = failed(capsys, *words, "--eval-only", "--adapter", str(tmp_path / "out" / "adapter"))
    assert "classifier.out_proj" in line and "another task or base model" in line


def test_your_own_task(tmp_path, monkeypatch):
    """One more row in TASKS is a task that trains, with RobertaConfig's and TrainConfig's
    defaults."""
    monkeypatch.setitem(data.TASKS, "mine", data.Task(
        "mine", "my_folder", ("review",), "stars", ("accuracy",), ("bad", "good")))
    rows = [f"{'bad' if i % 2 else 'good'}\tthe dog number {i}" for i in range(12)]
    folder = tmp_path / "my_folder"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join(["stars\treview", *rows]) + "\n")
    found = run(tmp_path / "out", task="mine", data_dir=str(tmp_path), max_steps=5, interval=1)
    assert 0 <= found["best"]["accuracy"] <= 1


# ---- the submission files -----------------------------------------------------------------------

COLUMNS = {"cola": None, "sst2": ("sentence", "label"), "stsb": ("sentence1", "sentence2", "score"),
           "mnli": ("sentence1", "sentence2", "gold_label"),
           "rte": ("sentence1", "sentence2", "label")}
LABELS = {"stsb": ("0.0", "2.5", "5.0"), "mnli": ("entailment", "neutral", "contradiction"),
          "rte": ("entailment", "not_entailment"), "cola": ("0", "1"), "sst2": ("0", "1")}
TEST_ROWS = {"test": 7, "test_mm": 5, "ax": 3}


def fake_task(root, name):
    """Small files of a task, in the columns of the public ones: 12 rows, test files of 7 (5, 3)."""
    task = data.TASKS[name]
    texts = [f"the dog number {i} sees a cat" + " again" * (i % 5) for i in range(12)]
    (root / task.folder).mkdir()
    for split, file in task.files.items():
        if split.startswith("test"):
            header, n = ("index", *task.texts), TEST_ROWS[split]
            rows = [header, *((str(i), *[texts[i]] * len(task.texts)) for i in range(n))]
        else:
            labels = [LABELS[name][i % len(LABELS[name])] for i in range(12)]
            rows = [("gj", y, "", x) for x, y in zip(texts, labels)] if name == "cola" else [
                COLUMNS[name], *((*[x] * len(task.texts), y) for x, y in zip(texts, labels))]
        (root / task.folder / file).write_text("".join("\t".join(row) + "\n" for row in rows))
    if name == "mnli":
        (root / "AX").mkdir()
        rows = ["index\tsentence1\tsentence2", *(f"{i}\t{texts[i]}\t{texts[0]}" for i in range(3))]
        (root / "AX" / "test.tsv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("name, method, expected", [
    ("cola", "dora", {"CoLA": 7}), ("sst2", "full", {"SST-2": 7}), ("stsb", "dora", {"STS-B": 7}),
    ("rte", "head", {"RTE": 7}), ("mnli", "dora", {"MNLI-m": 7, "MNLI-mm": 5, "AX": 3})])
def test_predict(tmp_path, capsys, name, method, expected):
    """--predict test after a run, and again with --eval-only: the same files, with GLUE's names,
    header, row count, index and label words (MNLI's two and AX from one run)."""
    fake_task(tmp_path, name)
    given = settings(tmp_path / "out", task=name, data_dir=str(tmp_path), method=method,
                     max_steps=6, interval=1)
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
            assert {cell for _, cell in cells} <= {*LABELS[name]}
        assert f"{file}.tsv" in capsys.readouterr().out or file != next(iter(expected))
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    words = ["--adapter", str(tmp_path / "out" / "adapter")]
    if method in ("full", "head"):
        words, given["model_dir"] = [], str(tmp_path / "out" / "model")
    assert main([*flags(**given), "--eval-only", *words, "--predict", "test"]) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first


def test_the_toy_takes_no_model(tmp_path, capsys):
    """--model-dir without --data-dir, which the toy would ignore, is refused."""
    words = "--model-dir", "m", "--out", str(tmp_path / "out")
    assert "--model-dir name a --task and --data-dir" in failed(capsys, *words)
    assert not (tmp_path / "out").exists()


# ---- the toy ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_toy(tmp_path, capsys):
    """`python train_glue.py`, all of it: DoRA on the pretrained encoder is clearly better than a
    head alone and than DoRA without pretraining; the files are those of a GLUE run."""
    assert main(["--out", str(tmp_path / "toy"), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    scores = [float(x) for x in re.findall(r"^ +(-?\d\.\d+)  \w", text, re.MULTILINE)]
    assert len(scores) == 3 and scores[0] > 0.6
    assert scores[0] > max(scores[1:]) + 0.2
    for name in ("pretrain", "adapted", "head", "blind"):
        assert (tmp_path / "toy" / name / "result.json").exists()
    best = json.loads((tmp_path / "toy" / "adapted" / "result.json").read_text())["best"]
    assert abs(best["matthews"] - scores[0]) < 5e-4


def test_a_model_that_does_not_fit_its_tokenizer(tmp_path, capsys):
    """A model with fewer tokens than vocab.json, as of another folder: refused, with both
    numbers."""
    shutil.copytree(files()[1], tmp_path / "m")
    save_model(tiny_model(vocab_size=400), tmp_path / "m")
    line = failed(capsys, *flags(**settings(tmp_path / "out", model_dir=str(tmp_path / "m"))))
    assert "400 tokens" in line and "437" in line
