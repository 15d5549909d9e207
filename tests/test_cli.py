"""Every setting is a flag, every flag has an effect or is refused in one line before anything is
trained; main prints the scores and returns 0, 2 for bad input, 128 + signal if interrupted."""
import dataclasses
import functools
import json
import re
import shutil
import statistics

import pytest
from tiny import files, flags, result, run, same_runs, run_settings, tiny_model

import data
import train_glue
from dora import METHODS, DoRAConfig, read_safetensors, write_safetensors
from train_glue import (
    COLUMNS_8, TABLE_8, TrainConfig, help_of, main, make_config, make_parser, save_model)


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
    comments = {**help_of(TrainConfig), **help_of(DoRAConfig)}
    assert comments.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    for f in dataclasses.fields(TrainConfig):
        if f.name != "seed":
            assert f"--{f.name.replace('_', '-')}" in text and comments[f.name] in text, f.name
            default = "the task's, Table 8 of the paper" if f.name in COLUMNS_8 else f.default
            default = {None: "none"}.get(default, default)
            default = " ".join(default) if isinstance(default, tuple) else default
            assert f"default: {default}" in text.split(comments[f.name])[1].split("--")[0], f.name


def test_help_shows_tasks_ranges_and_the_methods_defaults():
    """What a user needs for a choice: the tasks, a range, the choices, other methods' defaults."""
    text = re.sub(r"\s+", " ", make_parser().format_help())
    for part in ("--task {cola,sst2,",
                 "AdamW (> 0; default: the task's, Table 8 of the paper; bitfit: 0.001; full: "
                 "2e-05; dora: 0.25 of it, but for the toy; lora: 0.25 of it, but for the toy)",
                 "(>= 0, < 1; default: 0.06)",
                 "{slow_first,fast_first,none}",
                 "(default: fast_first; paper: slow_first; lora: none)"):
        assert part in text, part


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
    ("--schedule slow_first", "schedule", "slow_first"),
    ("--penalty none", "penalty", None), ("--init kaiming", "init", "kaiming"),
    ("--dropout-on input", "dropout_on", "input"), ("--final-phase 0.2", "final_phase", 0.2)])
def test_flags_of_the_method(flag, field, value):
    """The same for the settings of dora.py."""
    method = "paper" if field == "eps" else "dora"
    found = getattr(parsed("--method", method, *flag.split()), field)
    assert tuple(found) == value if isinstance(value, tuple) else found == value


def test_two_flags_without_pruning():
    """--importance none --schedule none is plain training of all components."""
    config = parsed(*"--importance none --schedule none".split())
    assert config.importance is None and config.schedule is None and config.r_prime == 2


@pytest.mark.parametrize("words, says", [
    ("--nope 1", "--nope"), ("--lr x", "--lr: 'x', expected float"), ("--lr -1", "lr = -1.0"),
    ("--lr nan", "lr = nan"), ("--epochs 0", "epochs = 0"), ("--epochs 1.5", "--epochs: '1.5'"),
    ("--task foo", "task = foo: choose one of cola"), ("--task ax", "task = ax"),
    ("--method foo", "method = foo: choose one of"), ("--seeds a", "--seeds"),
    ("--seeds -1", "seed = -1"), ("--predict dev", "--predict"), ("stray", "stray"),
    ("--rank 3 --start-rank 2", "start_rank = 2 is below rank"), ("--rank 0", "rank = 0"),
    ("--importance none", "both"), ("--no-gate", "gate = False"), ("--ep 3", "--ep"),
    ("--initial-phase 0.9", "leave no step to prune in"), ("--targets qkv", "candidates"),
    ("--max-len 1000", "--max-len"), ("--device tpu", "--device cpu"),
    ("--init foo", "init = 'foo'"),
    ("--eval-only --adapter nowhere", "nowhere"),
    ("--task toy --predict test", "toy has no split 'test'")])
def test_bad_flags(tmp_path, capsys, words, says):
    """Unknown flags, values of another type, out of range or that do not go together: exit code 2
    and one line (argparse adds one of usage) that names the flag or setting; no run folder."""
    given = run_settings(tmp_path / "out")          # of a flag that appears twice, the last counts
    assert says in failed(capsys, *flags(**given), *words.split())
    assert not (tmp_path / "out").exists()


# ---- defaults -----------------------------------------------------------------------------------

@pytest.mark.parametrize("task, lr, batch, epochs, eta, interval", [
    ("mnli", 3e-3, 32, 10, 0.3, 50), ("sst2", 8e-4, 64, 60, 0.5, 10),
    ("cola", 2e-3, 16, 45, 0.3, 10), ("qqp", 1e-3, 16, 10, 0.3, 50),
    ("qnli", 3.5e-3, 16, 12, 0.5, 50), ("rte", 2e-3, 16, 80, 0.5, 10),
    ("mrpc", 2.5e-3, 16, 30, 0.3, 50), ("stsb", 3e-3, 16, 45, 0.3, 10)])
def test_table_8(task, lr, batch, epochs, eta, interval):
    """Each task's defaults against the rows of the paper's Table 8, typed in here: --method paper
    has them as published, dora and lora train at a quarter of the rate; what is asked for goes
    first."""
    for method, share in (("paper", 1), ("adalora", 1), ("dora", 0.25), ("lora", 0.25)):
        config = parsed("--task", task, "--method", method)
        assert (config.lr, config.batch_size, config.epochs) == (share * lr, batch, epochs)
    config = parsed("--task", task)
    assert config == parsed("--task", task, "--method", "dora")
    assert (config.eta, config.interval) == (eta, interval)
    assert (config.weight_decay, config.clip, config.warmup) == (0.01, 1.0, 0.06)
    assert parsed("--task", task, "--lr", "0.125").lr == 0.125
    assert parsed("--task", task, "--eta", "0.125").eta == 0.125


def test_every_task_has_defaults():
    """Every GLUE task has a row of defaults. (A task of one's own has TrainConfig's.)"""
    glue = {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    assert {*TABLE_8} == glue | {"toy"} and {*TABLE_8} <= {*data.TASKS}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_rows(method):
    """A method's settings are the row of METHODS on top of the task's and the defaults; a flag
    goes before both."""
    config = parsed("--task", "cola", "--method", method)
    expected = DoRAConfig(**{"eta": 0.3, "interval": 10, **METHODS[method]})
    for f in dataclasses.fields(DoRAConfig):
        assert getattr(config, f.name) == getattr(expected, f.name), f.name
    assert parsed("--method", method, "--alpha", "3").alpha == 3


@pytest.mark.parametrize("method, lr", [("full", 2e-5), ("bitfit", 1e-3), ("head", 2e-3)])
def test_methods_without_adapter(method, lr):
    """Full fine-tuning and biases alone have learning rates of their own, all three no pruning."""
    config = parsed("--task", "cola", "--method", method)
    assert config.lr == lr and config.schedule is None


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
    assert rows[1].split() == ["layer", "query", "key", "value", "attention.output.dense",
                               "intermediate.dense", "output.dense", "total"]
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


@pytest.mark.parametrize("method", ["dora", "paper", "lora", "full"])
def test_eval_only(tmp_path, capsys, monkeypatch, method):
    """--eval-only with the saved adapter (or model) gives the run's best score, exactly, and
    writes nothing."""
    scores = []
    real = train_glue.evaluate_dev
    monkeypatch.setattr(
        train_glue, "evaluate_dev", lambda *a: scores.append(real(*a)) or scores[-1])
    given = run_settings(tmp_path / "out", method=method, epochs=4)
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
    assert scores[n:] == [{name: found["best"][name] for name in ("matthews", "spread")}]
    said = capsys.readouterr().out
    assert f"toy, 40 dev examples: matthews {scores[-1]['matthews']:.4f}\n" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["dora", "paper", "head"])
def test_eval_only_needs_no_other_flag(tmp_path, capsys, monkeypatch, method):
    """A9: `--eval-only --adapter RUN`, or RUN/adapter, and nothing else: task, files, length and
    number type are those of the run, so that its score is repeated exactly. A flag goes first."""
    dtype = "float32" if method == "head" else "float64"  # a whole model is loaded in float32
    found = run(tmp_path / "out", method=method, epochs=2, max_len=20, dtype=dtype)
    configs, scores, real = [], [], train_glue.evaluate_dev
    prepare = train_glue.prepare
    monkeypatch.setattr(
        train_glue, "evaluate_dev", lambda *a: scores.append(real(*a)) or scores[-1])
    monkeypatch.setattr(train_glue, "prepare", lambda c: configs.append(c) or prepare(c))
    inside = tmp_path / "out" / ("model" if method == "head" else "adapter")
    for folder in (tmp_path / "out", inside):
        assert main(["--eval-only", "--adapter", str(folder)]) == 0
        assert scores.pop() == {name: found["best"][name] for name in ("matthews", "spread")}
        assert (configs[-1].task, configs[-1].max_len, configs[-1].dtype) == ("toy", 20, dtype)
    monkeypatch.chdir(inside)
    assert main(["--eval-only", "--adapter", ".", "--dtype", "float32"]) == 0
    assert configs[-1].dtype == "float32" and configs[-1].max_len == 20


def test_eval_only_without_a_head(tmp_path, capsys):
    """--eval-only on an encoder whose file has no head, without an adapter: refused, a random head
    would be scored."""
    given = run_settings(tmp_path / "out")
    shutil.copytree(given["model_dir"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    write_safetensors(path, {key: tensor.clone() for key, tensor in read_safetensors(path).items()
                             if not key.startswith("classifier.")})
    given["model_dir"] = tmp_path / "model"
    line = failed(capsys, *flags(**given), "--eval-only")
    assert "have no head for toy" in line and "--adapter" in line


def test_an_adapter_for_another_task(tmp_path, capsys, monkeypatch):
    """T2: an adapter names its task and labels: with another task, or the same labels in another
    order, it is refused. A file without metadata, as PEFT writes it, is accepted."""
    run(tmp_path / "out", max_steps=8, interval=1)
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    words = ["--eval-only", "--adapter", str(tmp_path / "out" / "adapter")]
    given = run_settings(tmp_path / "out", max_steps=8, interval=1)
    line = failed(capsys, *flags(**{**given, "task": "toy-pretrain"}), *words)
    assert "was trained with task = toy, not toy-pretrain" in line

    with monkeypatch.context() as patch:
        swapped = dataclasses.replace(data.TASKS["toy"], labels=("1", "0"))
        patch.setitem(data.TASKS, "toy", swapped)
        line = failed(capsys, *flags(**given), *words)
        assert "was trained with labels = 0, 1, not 1, 0" in line

    write_safetensors(path, {k: t.clone() for k, t in read_safetensors(path).items()})
    assert main([*flags(**given), *words]) == 0


def test_eval_only_of_a_runs_folder(tmp_path, capsys):
    """A9: --adapter RUN finds RUN/adapter; another --max-len than in training is mentioned."""
    run(tmp_path / "out", max_steps=8, interval=1)
    words = ["--eval-only", "--adapter", str(tmp_path / "out")]
    given = run_settings(tmp_path / "other", max_steps=8, interval=1)
    assert main([*flags(**given), *words]) == 0
    first = capsys.readouterr().out.splitlines()
    assert main([*flags(**{**given, "max_len": 8}), *words]) == 0
    second = capsys.readouterr().out
    assert "note: " not in first[0] and "was trained with --max-len 48" in second


def test_eval_only_of_another_model(tmp_path, capsys):
    """T21: an adapter on a model with other sizes that need no other shapes, with another
    tokenizer, or with other weights outside of the adapted matrices, where it has another score:
    refused."""
    run(tmp_path / "out", max_steps=8, interval=1)
    words = ["--eval-only", "--adapter", str(tmp_path / "out"), "--model-dir"]
    vocab = json.loads((files()[1] / "vocab.json").read_text())
    a, b = list(vocab)[300:302]
    weights = read_safetensors(files()[1] / "model.safetensors")
    weights["roberta.embeddings.word_embeddings.weight"] *= -1
    sizes = json.loads((files()[1] / "config.json").read_text())
    for name, change in (
            ("config.json", json.dumps({**sizes, "num_attention_heads": 2})),
            ("vocab.json", json.dumps({**vocab, a: vocab[b], b: vocab[a]})),
            ("model.safetensors", weights)):
        folder = tmp_path / name
        shutil.copytree(files()[1], folder)
        if name == "model.safetensors":
            write_safetensors(folder / name, change)
        else:
            (folder / name).write_text(change)
        line = failed(capsys, *words, str(folder))
        assert f"was trained on another model than {folder}: weights, config.json or tok" in line
    shutil.copytree(files()[1], tmp_path / "moved")
    assert main([*words, str(tmp_path / "moved")]) == 0


def test_eval_only_refuses_what_it_would_ignore(tmp_path, capsys):
    """T27: --model-dir where the run holds a whole model, --seeds, a run that has no adapter yet, a
    run's folder in place of a model's, and a wrong value in config.json: one line each."""
    words = ["--eval-only", "--adapter", str(tmp_path / "out")]
    run(tmp_path / "out", method="head", max_steps=8)
    line = failed(capsys, *words, "--model-dir", str(files()[1]))
    assert "out/model holds a whole model; leave --model-dir out" in line
    assert "--seeds has no effect with --eval-only" in failed(capsys, *words, "--seeds", "2", "3")
    given = {**run_settings(tmp_path / "new"), "model_dir": tmp_path / "out"}
    line = failed(capsys, *flags(**given))
    assert f"to score the run, use --adapter {tmp_path / 'out'}, and to start from it" in line

    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": "x"'))
    assert f"{path}: lr = 'x': must be of type float" in failed(capsys, *words)
    shutil.rmtree(tmp_path / "out" / "model")
    assert "out has no adapter yet" in failed(capsys, *words)


def test_an_adapter_in_its_models_folder(tmp_path, capsys):
    """The model's config.json beside an adapter is not a run's: the flags say what to score. The
    submission file goes into the adapter's folder, which no run surrounds."""
    fake_task(tmp_path, "cola")
    given = run_settings(tmp_path / "out", task="cola", data_dir=tmp_path, max_steps=8, interval=1)
    run(**{**given, "data_dir": str(tmp_path)})
    shutil.copytree(files()[1], tmp_path / "model")
    adapter = shutil.copytree(tmp_path / "out" / "adapter", tmp_path / "model" / "adapter")
    words = ["--task", "cola", "--data-dir", tmp_path, "--model-dir", tmp_path / "model"]
    assert main([*map(str, words), "--eval-only", "--max-len", "48", "--adapter", str(adapter),
                 "--predict", "test"]) == 0
    assert (adapter / "submission" / "CoLA.tsv").exists()


def test_eval_only_of_nothing(capsys):
    """--eval-only alone says what it needs; it does not download a model."""
    assert "--adapter RUN or --model-dir FOLDER" in failed(capsys, "--eval-only")
    assert "--adapter RUN" in failed(capsys, "--eval-only", "--task", "cola")


def test_training_flags_with_eval_only(tmp_path, capsys):
    """A9: a flag that changes nothing in an evaluation is refused if it differs from the run's own
    setting, as a tuple of names too, and accepted if it repeats it."""
    run(tmp_path / "out", max_steps=8, interval=1)
    words = ["--eval-only", "--adapter", str(tmp_path / "out")]
    for flag in ("--lr 0.5", "--rank 7", "--targets query", "--max-steps 9"):
        line = failed(capsys, *words, *flag.split())
        assert f"{flag.split()[0][2:].replace('-', '_')} = " in line and "has no effect" in line

    own = train_glue.TrainConfig()
    assert main([*words, "--max-steps", "8", "--interval", "1", "--alpha", str(own.alpha),
                 "--targets", *own.targets]) == 0


def test_an_adapter_without_eval_only(tmp_path, capsys):
    """A9: --adapter alone would train from scratch without a word: refused."""
    words = flags(**run_settings(tmp_path / "out"))
    assert "only for --eval-only" in failed(capsys, *words, "--adapter", "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, says", [
    ("--method bitfit --rank 5", "rank = 5.0 has no effect with method = bitfit"),
    ("--method full --targets query", "targets = ('query',) has no effect with method = full"),
    ("--method head --eta 0.1", "eta = 0.1 has no effect with method = head"),
    ("--method lora --interval 3", "interval = 3 has no effect with schedule = none"),
    ("--method lora --eta 0.1", "eta = 0.1 has no effect with schedule = none"),
    ("--penalty none --eta 0.1", "eta = 0.1 has no effect with penalty = none"),
    ("--eps 1e-4", "eps = 0.0001 has no effect with importance = sensitivity"),
    ("--seeds 5 5", "name each seed once"), ("--seeds 18446744073709551616", "seed = 18446"),
    ("--rank 500", "has at most rank 32"), ("--start-rank 40", "start_rank = 40: "),
    ("--device meta", "--device cpu"), ("--dtype float64 --device mps", "mps has no float64")])
def test_flags_without_effect(tmp_path, capsys, words, says):
    """A9: a flag that this run would ignore, or a rank that no matrix can have, is refused."""
    given = run_settings(tmp_path / "out")
    del given["interval"], given["budget_unit"]
    assert says in failed(capsys, *flags(**given), *words.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target, name", [
    ("out_proj", "classifier.out_proj"), ("classifier.dense", "classifier.dense"),
    ("dense", "classifier.dense"), ("classifier", "classifier"), ("nothing", "")])
def test_targets_in_the_head(tmp_path, capsys, target, name):
    """A1: the head trains as a whole, so that no target may be in it; none is offered either."""
    words = [*flags(**run_settings(tmp_path / "out")), "--targets", "query", target]
    line = failed(capsys, *words)
    assert f"{target!r} matches {name or 'no module'}" in line
    assert "candidates: attention.output.dense, attention.self.key" in line
    assert "classifier" not in line.split("candidates")[1] and not (tmp_path / "out").exists()


def test_the_seeds_continue(tmp_path, capsys, monkeypatch):
    """A11: the same command with --seeds trains those that are not finished: seed 1, which is, is
    left out with one line, and counts in the summary; seed 2 was interrupted, 3 never started."""
    words = [*flags(**run_settings(tmp_path / "all", epochs=2)), "--seeds", "1", "2", "3"]
    run(tmp_path / "all" / "seed-1", epochs=2)
    before = {p: p.read_bytes() for p in (tmp_path / "all" / "seed-1").rglob("*") if p.is_file()}
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train_glue.Run, "finish", lambda *a: {}["stop"])
        run(tmp_path / "all" / "seed-2", epochs=2, seed=2)
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    scores = [result(tmp_path / "all" / f"seed-{i}")["best"]["matthews"] for i in (1, 2, 3)]
    assert said.startswith(f"seed 1 is finished: matthews {scores[0]:.4f}, {tmp_path}/all/seed-1\n")
    assert "continuing after step 16" in said
    assert f"median {statistics.median(scores):.4f}" in said
    assert {p: p.read_bytes() for p in before} == before

    again = failed(capsys, *words, "--lr", "0.5")
    assert "seed-1 contains a run with lr = 0.003, not 0.5; replace it with --overwrite" in again
    assert main([*words, "--lr", "0.5", "--overwrite"]) == 0
    assert json.loads((tmp_path / "all" / "seed-1" / "config.json").read_text())["lr"] == 0.5


def test_overwrite(tmp_path, capsys):
    """A11: a folder with a run is refused, with the setting that differs and --overwrite named;
    with --overwrite the run's own files are gone, and no other, and the new run is as any other."""
    run(tmp_path / "out", epochs=4)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "adapter" / "notes.txt").write_text("mine")
    run(tmp_path / "bitfit", method="bitfit", max_steps=8)
    given = run_settings(tmp_path / "out", epochs=3)
    line = failed(capsys, *flags(**given))
    assert line.endswith(f"{tmp_path / 'out'} already contains a run with epochs = 4, not 3; "
                         "replace it with --overwrite, or use another --out")
    line = failed(capsys, *flags(**{**given, "epochs": 4}))
    assert "already contains a run; continue it with --resume, replace it with" in line
    assert "choose one" in failed(capsys, *flags(**given), "--overwrite", "--resume")

    assert main([*flags(**given), "--overwrite"]) == 0
    run(tmp_path / "new")
    same_runs(tmp_path / "out", tmp_path / "new")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "adapter" / "notes.txt").read_text() == "mine"
    other = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")}
    new = {p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*")}
    assert {str(p) for p in other - new} == {"notes.txt", "adapter/notes.txt"}
    assert main([*flags(**{**given, "out": tmp_path / "bitfit"}), "--overwrite"]) == 0
    assert not (tmp_path / "bitfit" / "model").exists()


@pytest.mark.parametrize("words", [[], ["--overwrite"], ["--resume"]])
def test_files_of_a_runs_names_that_are_not_a_runs(tmp_path, capsys, words):
    """T19: --out is a model's folder, or one with a model/ and an adapter/ of somebody's own:
    refused, and each file stays."""
    shutil.copytree(files()[1], tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for folder in (tmp_path / "model", tmp_path):
        line = failed(capsys, *flags(**run_settings(folder)), *words)
        assert "would be overwritten, and " in line and "is not a run's folder" in line
    assert {p: p.read_bytes() for p in tmp_path.rglob("*")
            if p.is_file() and p.name != ".lock"} == before


def test_overwrite_keeps_what_the_run_starts_from(tmp_path, capsys):
    """--overwrite is refused where it would delete --model-dir."""
    run(tmp_path / "out", method="full", max_steps=8)
    given = run_settings(tmp_path / "out", model_dir=tmp_path / "out" / "model")
    assert "would delete" in failed(capsys, *flags(**given), "--overwrite")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_predict_looks_for_the_test_file_first(tmp_path, capsys):
    """A11: --predict test without test.tsv is refused before anything is trained."""
    fake_task(tmp_path, "cola")
    (tmp_path / "CoLA" / "test.tsv").unlink()
    words = flags(**run_settings(tmp_path / "out", task="cola", data_dir=str(tmp_path)))
    line = failed(capsys, *words, "--predict", "test")
    assert "CoLA/test.tsv not found" in line and not (tmp_path / "out").exists()


def test_three_dev_files(tmp_path, monkeypatch):
    """T3: a row of one's own with three dev files and two metrics: each metric is averaged over
    the files on its own, and each file keeps its name."""
    files = {"train": "train.tsv", "dev": "a.tsv", "dev_b": "b.tsv", "dev_c": "c.tsv"}
    monkeypatch.setitem(data.TASKS, "mine", data.Task(
        "mine", "mine", ("review",), "stars", ("f1", "accuracy"), ("bad", "good"), files=files))
    (tmp_path / "mine").mkdir()
    for n, name in enumerate(files.values()):
        rows = [f"{'bad' if i % (n + 2) else 'good'}\tthe dog number {i}" for i in range(12)]
        (tmp_path / "mine" / name).write_text("\n".join(["stars\treview", *rows]) + "\n")
    best = run(tmp_path / "out", task="mine", data_dir=str(tmp_path), max_steps=8)["best"]
    for metric in ("f1", "accuracy"):
        each = [best[f"{metric}_{split}"] for split in ("dev", "dev_b", "dev_c")]
        assert best[metric] == statistics.mean(each)
    assert list(best)[2:5] == ["f1", "accuracy", "spread"] and len(best) == 2 + 3 * 4


def test_a_task_without_a_dev_file(tmp_path, capsys, monkeypatch):
    """T3: a row with a train file alone is refused before training."""
    toy = dataclasses.replace(data.TASKS["toy"], files={"train": "train.tsv"})
    monkeypatch.setitem(data.TASKS, "toy", toy)
    line = failed(capsys, *flags(**run_settings(tmp_path / "out")))
    assert "toy" in line and "dev" in line and not (tmp_path / "out").exists()


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
    assert "--model-dir, choose a --task and --data-dir" in failed(capsys, *words)
    assert not (tmp_path / "out").exists()


# ---- the toy ------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_toy(tmp_path, capsys, monkeypatch):
    """`python train_glue.py`, all of it: DoRA on the pretrained encoder is clearly better than a
    head alone and than DoRA without pretraining; the files are those of a GLUE run, in
    runs/toy-dora-1. A second time it is refused, like any other run."""
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu"]) == 0
    text = capsys.readouterr().out
    scores = [float(x) for x in re.findall(r"^ +(-?\d\.\d+)  \w", text, re.MULTILINE)]
    assert len(scores) == 3 and scores[0] > 0.6
    assert scores[0] > max(scores[1:]) + 0.2
    folder = tmp_path / "runs" / "toy-dora-1"
    for name in ("pretrain", "adapted", "head", "blind"):
        assert (folder / name / "result.json").exists()
    best = json.loads((folder / "adapted" / "result.json").read_text())["best"]
    assert abs(best["matthews"] - scores[0]) < 5e-4
    line = failed(capsys, "--device", "cpu")
    assert "runs/toy-dora-1 already contains a run; continue it with --resume, replace" in line
    assert main(["--eval-only", "--adapter", "runs/toy-dora-1"]) == 0
    assert f"dev examples: matthews {best['matthews']:.4f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("words, says", [
    ("--targets querry", "target 'querry' matches no module"), ("--rank 65", "has at most rank 64"),
    ("--max-steps 3", "the first pruning is at step 1")])
def test_the_toy_refuses_before_it_pretrains(tmp_path, capsys, words, says):
    """T26: a setting that cannot work is refused at once, and leaves nothing that would be in the
    way of the right one."""
    assert says in failed(capsys, "--out", str(tmp_path / "out"), "--device", "cpu", *words.split())
    assert not (tmp_path / "out" / "pretrain").exists()
    assert "pretraining" not in capsys.readouterr().out


def few_merges(train_bpe, texts, n, *paths):
    """Learn ten merges, whatever was asked for."""
    train_bpe(texts, 10, *paths)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_toy_fills_its_folder(tmp_path, capsys, monkeypatch, again):
    """The same in short, two steps of each training: runs/toy-METHOD-SEED, and one line for a
    folder that has a run; then --resume, --overwrite and --seeds, which leaves out the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_SIZES", [
        (name, split, 40) for name, split, _ in data.TOY_SIZES])
    monkeypatch.setattr(data, "train_bpe", functools.partial(few_merges, data.train_bpe))
    real = train_glue.train
    monkeypatch.setattr(train_glue, "train", lambda config: real(
        dataclasses.replace(config, max_steps=2)))
    words = ["--method", "lora", "--device", "cpu", "--max-steps", "2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "(files in runs/toy-lora-1)" in said and "files in runs/toy-lora-1/adapted\n" in said
    assert sorted(p.name for p in (tmp_path / "runs" / "toy-lora-1").iterdir()) == [
        "adapted", "blind", "head", "pretrain", "toy", "toy-pretrain", "untrained"]
    assert "already contains a run; continue it with --resume" in failed(capsys, *words)
    if not again:
        return
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--overwrite"]) == 0
    assert main([*words, "--seeds", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert "seed 1 is finished: matthews " in said
    line = failed(capsys, *words, "--seeds", "1", "2", "--lr", "0.1")  # not the score of 3e-3
    assert "toy-lora-1/adapted contains a run with lr = 0.003, not 0.1" in line
    assert (tmp_path / "runs" / "toy-lora-2" / "blind" / "result.json").exists()


def test_a_model_that_does_not_fit_its_tokenizer(tmp_path, capsys):
    """A model with fewer tokens than its tokenizer, or fewer positions than max_len: each refused
    with both numbers, in a message of its own."""
    shutil.copytree(files()[1], tmp_path / "m")
    save_model(tiny_model(vocab_size=400), tmp_path / "m")
    line = failed(capsys, *flags(**run_settings(tmp_path / "out", model_dir=str(tmp_path / "m"))))
    assert "437 tokens" in line and "400" in line and "max_len" not in line
    line = failed(capsys, *flags(**run_settings(tmp_path / "out", max_len=63)))
    assert "max_len = 63" in line and "has 62 positions" in line and "tokens" not in line
