"""An interrupted run, resumed, ends bit for bit as one that nothing stopped, and a failed write
loses nothing that was complete."""
import errno
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from tiny import (GLUE, MINILM, command, contents, evaluations, files, flags, lines, newest,
                  read_json, run, run_settings, same, same_runs, wait_for)

import dora
import train_glue
from dora import DoRAError
from train_glue import Interrupted, main, make_config


def slow(*values):
    """A case that only --slow runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def signals_arrive(monkeypatch):
    """Even where the tests run in the background or under nohup, and signals are ignored."""
    monkeypatch.setattr(signal, "SIG_IGN", "nobody's handler")


def each_loss(monkeypatch, change):
    """change(n, loss) takes the place of the n-th loss."""
    real, calls = train_glue.task_loss, []

    def loss(logits, labels):
        calls.append(1)
        return change(len(calls), real(logits, labels))

    monkeypatch.setattr(train_glue, "task_loss", loss)


def printed(capsys):
    """What was printed, without the breaks of lines at 80 columns."""
    return " ".join(capsys.readouterr().out.split())


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while the given step is under way."""
    def change(n, loss):
        if n == step:
            os.kill(os.getpid(), number)
        return loss

    each_loss(monkeypatch, change)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return folder


@pytest.mark.parametrize("step, number", [
    *(slow(step, signal.SIGTERM) for step in (3, 7, 9, 13, 16, 23)), (1, signal.SIGTERM),
    (8, signal.SIGINT), (11, signal.SIGHUP), (12, signal.SIGTERM), (24, signal.SIGINT)])
def test_interrupted_and_resumed(tmp_path, capsys, monkeypatch, whole, step, number):
    """Ctrl-C, SIGTERM or a closed terminal in a step (epochs end at 8, 16, 24, prunings are at 7,
    10, 12): it is finished and saved, main says how to continue, returns 128 + signal, and gives
    the old handlers back. With --resume the run's end equals the uninterrupted one's."""
    words, before = flags(**run_settings(tmp_path / "out")), signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert main(words) == 128 + number
    text = printed(capsys)
    assert f"stopped at step {step} of 24, saved in {tmp_path / 'out'}; continue with" in text
    assert "--resume" in text and signal.getsignal(number) is before
    assert newest(tmp_path / "out")["step"] == step
    assert not (tmp_path / "out" / "result.json").exists()
    assert main([*words, "--resume"]) == 0
    same_runs(tmp_path / "out", whole)


def test_nohup(tmp_path, monkeypatch):
    """A run that nohup started, for which SIGHUP is ignored, continues."""
    monkeypatch.setattr(signal, "SIG_IGN", signal.Handlers.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 2, signal.SIGHUP)
        assert run(tmp_path, max_steps=4, interval=1)["steps"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_pipe_that_is_closed(tmp_path, whole):
    """`train_glue.py ... | head -1`: the run goes on, and log.txt has every line."""
    process = command(*flags(**run_settings(tmp_path / "out")), env={"PYTHONUNBUFFERED": "1"})
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(100) == 0 and not process.stderr.read()
    same_runs(tmp_path / "out", whole)
    assert "after the last" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("epoch, number", [slow(1, signal.SIGINT), (2, signal.SIGTERM),
                                           slow(3, signal.SIGINT)])
def test_interrupted_while_it_evaluates(tmp_path, capsys, monkeypatch, epoch, number):
    """A signal in the second of ten batches of an evaluation: no later batch is evaluated, the
    state is saved, and the resumed run evaluates again and ends as the uninterrupted one."""
    real_batches = train_glue.data.batches

    def batches(examples, size, seed, *rest, **more):  # of 4 rather than 64 examples
        return real_batches(examples, 4 if seed is None else size, seed, *rest, **more)

    monkeypatch.setattr(train_glue.data, "batches", batches)
    run(tmp_path / "whole")
    out, step, calls = tmp_path / "out", 8 * epoch, []
    words = flags(**run_settings(out))
    with monkeypatch.context() as patch:
        real = train_glue.RobertaForSequenceClassification.forward

        def forward(model, *args):
            if not model.training:
                calls.append(1)
                if len(calls) == 10 * (epoch - 1) + 2:
                    os.kill(os.getpid(), number)
            return real(model, *args)

        patch.setattr(train_glue.RobertaForSequenceClassification, "forward", forward)
        assert main(words) == 128 + number
    assert len(calls) == 10 * (epoch - 1) + 2
    said = f"stopped at step {step} of 24, saved in {out}"
    assert said in printed(capsys) and said in (out / "log.txt").read_text()
    assert newest(out)["step"] == len(lines(out)) == step
    assert len(evaluations(out)) == epoch - 1
    noted = read_json(out / "run.json")
    noted["seconds"] = 1000.0  # they count for the whole run, too
    (out / "run.json").write_text(json.dumps(noted))
    assert main([*words, "--resume"]) == 0
    same_runs(out, tmp_path / "whole")
    assert 1000 < read_json(out / "result.json")["seconds"] < 2000


@pytest.mark.parametrize("method", ["paper", "full", *map(slow, (
    "adalora", "lora", "bitfit", "head"))])
def test_every_method_resumes(tmp_path, monkeypatch, method):
    """The same for the other methods, with accumulation: final weights, moments, scores."""
    changes = dict(method=method, epochs=2, accumulate=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, **changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 9)
        run(cut, **changes)
    assert newest(cut)["step"] == 5
    run(cut, resume=True, **changes)
    same(newest(cut), newest(whole))
    assert lines(cut) == lines(whole)


def test_a_killed_run_goes_back_to_its_checkpoint(tmp_path, monkeypatch, whole):
    """An exception in step 15 (as good as kill -9: nothing is saved) with checkpoints each third
    step: steps 13 and 14 are done again, their lines of the log are not doubled."""
    def dies(n, loss):
        if n == 15:
            raise KeyError("dies")
        return loss

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        each_loss(patch, dies)
        run(tmp_path, save_every=3)
    assert len(lines(tmp_path)) == 14 and newest(tmp_path)["step"] == 12
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 15, "l')                                   # and a line cut short
    for _ in range(2):  # the second time it has finished, and nothing changes
        run(tmp_path, resume=True, save_every=3)
        same_runs(tmp_path, whole)


def test_checkpoints_hold_tensors_alone(whole):
    """They load with weights_only=True and hold no frozen weight: the base model is not copied."""
    state = newest(whole)
    assert not [key for key in state["weights"] if ".base." in key or "embeddings" in key]
    assert max((whole / "checkpoints").iterdir()).stat().st_size < 200_000


def test_ctrl_c_while_loading(tmp_path, capsys, monkeypatch):
    """Ctrl-C before the first step: one line, exit code 130, no run folder."""
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_glue.data, "load_task", interrupted)
    assert main(flags(**run_settings(tmp_path / "out"))) == 130
    assert "nothing to save" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value, step, log_every", [
    (math.nan, 3, 1), slow(math.inf, 11, 1), (math.nan, 14, 100), slow(math.inf, 16, 100)])
def test_a_loss_that_is_not_finite(tmp_path, capsys, monkeypatch, whole, value, step, log_every):
    """NaN or inf from a step on, seen at a log step, before a checkpoint or an evaluation: exit
    code 2, a line with step and learning rate, finite checkpoints, no adapter. The resumed run ends
    as the one that never broke."""
    words = flags(**run_settings(tmp_path, log_every=log_every, save_every=4))
    seen = step if log_every == 1 else 16
    with monkeypatch.context() as patch:
        each_loss(patch, lambda n, loss: loss * (value if n >= step else 1))
        assert main(words) == 2
    error = capsys.readouterr().err.strip()
    lr = train_glue.learning_rate(seen - 1, 24, make_config(**run_settings(tmp_path)))
    assert f"step {seen}: loss " in error and f"{lr:.3g}" in error and "\n" not in error
    assert f"step {seen}: loss " in (tmp_path / "log.txt").read_text()
    for path in tmp_path.glob("checkpoints/*"):
        weights = torch.load(path, weights_only=True)["weights"]
        assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "adapter").exists()
    if log_every == 1:
        assert main([*words, "--resume"]) == 0
        same_runs(tmp_path, whole)


def test_a_damaged_checkpoint(tmp_path, monkeypatch, whole):
    """The newest is cut short, or of another version: it is refused by name. Without it, the run
    continues from the one before, and ends as the uninterrupted run."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 14)
        run(tmp_path, save_every=5)
    path = tmp_path / "checkpoints" / "step-00000014.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DoRAError, match=rf"{path} is damaged"):
        run(tmp_path, resume=True, save_every=5)
    torch.save({"step": 14}, path)
    with pytest.raises(DoRAError, match=rf"{path} is damaged"):
        run(tmp_path, resume=True, save_every=5)
    path.unlink()
    run(tmp_path, resume=True, save_every=5)
    same_runs(tmp_path, whole)


@pytest.mark.parametrize("changes, word", [
    (dict(rank=1.5), "rank = 2.0, not 1.5"), (dict(epochs=4), "epochs = 3, not 4"),
    (dict(targets=("query",)), "targets"), (dict(task="toy-pretrain"), "task = toy, not toy-pre"),
    (dict(method="paper"), "method = dora, not paper"),
    ("model", "model weights"), ("train", "train.tsv = "), ("dev", "dev.tsv = ")])
def test_another_run_is_not_resumed(tmp_path, whole, changes, word):
    """Other settings, data or weights: refused by name and both values; the folder stays."""
    out = shutil.copytree(whole, tmp_path / "out")
    before = contents(out)
    data_dir, model_dir = (shutil.copytree(folder, tmp_path / folder.name) for folder in files())
    path = model_dir / "model.safetensors"
    if changes == "model":
        weights = dora.read_safetensors(path)
        weights["roberta.encoder.layer.1.output.dense.bias"] += 0.5
        dora.write_safetensors(path, weights)
    elif isinstance(changes, str):
        path = data_dir / "toy" / f"{changes}.tsv"
        path.write_text(path.read_text().replace("dog", "cat", 1))
    given = dict(data_dir=str(data_dir), model_dir=str(model_dir), resume=True)
    if isinstance(changes, dict):
        given |= changes
    with pytest.raises(DoRAError, match=word):
        run(out, **given)
    assert contents(out) == before


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    """The second, started while the first is under way, is refused; the first continues. The remedy
    is to wait, before the first checkpoint of the first run (step 2) and after it."""
    seen = []

    def change(n, loss):
        if n in (1, 4):
            for again in (False, True):
                with pytest.raises(DoRAError, match="another run is writing here"):
                    run(tmp_path, max_steps=5, resume=again)
            seen.append(n)
        return loss

    each_loss(monkeypatch, change)
    assert run(tmp_path, max_steps=5, interval=1, save_every=2)["steps"] == 5
    assert seen == [1, 4]


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_died_before_its_first_checkpoint(tmp_path, capsys, whole, again):
    """Nothing to continue from but a line of a log: the same command starts again (with --resume it
    says so), and the run is as any other. A killed process's half file is removed."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000008.pt.abc.part").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "l')
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    run(tmp_path, resume=again)
    assert ("no checkpoint yet, starting from the beginning" in printed(capsys)) == again
    same_runs(tmp_path, whole)
    assert len([*(tmp_path / "checkpoints").iterdir()]) == 2


def test_several_seeds_resume(tmp_path, monkeypatch, whole):
    """Stopped in the second of two seeds: --resume finishes it and leaves the first as it is."""
    words = [*flags(**run_settings(tmp_path / "out")), "--seeds", "2", "1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 30)
        assert main(words) == 143
    assert main([*words, "--resume"]) == 0
    same_runs(tmp_path / "out" / "seed-1", whole)
    assert len(lines(tmp_path / "out" / "seed-2")) == 24


@pytest.mark.parametrize("path", [
    "checkpoints/step-00000011.pt", "adapter/adapter_model.safetensors", "result.json"])
def test_a_full_disk(tmp_path, capsys, monkeypatch, whole, path):
    """The disk is full when a file is written: one line, exit code 2, no half file, the files
    before it are whole, and with room again the run continues to the same end."""
    words, real = flags(**run_settings(tmp_path, save_every=1)), dora.os.replace

    def replace(source, target):
        if str(target).endswith(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(dora.os, "replace", replace)
        assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert f"No space left on device: '{tmp_path / path}'" in error and "\n" not in error
    assert not (tmp_path / path).exists() and not [*tmp_path.rglob("*.part")]
    assert main([*words, "--resume"]) == 0
    same_runs(tmp_path, whole)


def killed(words, seconds, folder):
    """Start the command and kill it after its folder is there; False if it ended before that."""
    process = command(*words)
    wait_for(folder, process, "config.json")
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finish(words):
    """Go on until the end, from the newest checkpoint or, where there is none yet, from step 0."""
    process = command(*words, "--resume")
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error


TINY = dict(epochs=6, save_every=1)
RTE = dict(task="rte", data_dir=GLUE, model_dir=MINILM, device="cpu", batch_size=4, max_steps=12,
           max_len=32, interval=2, save_every=1, log_every=1, deterministic=True)


@pytest.mark.slow
@pytest.mark.parametrize("given", [TINY, pytest.param(RTE, marks=pytest.mark.skipif(
    not MINILM.exists(), reason="needs ../shared"))], ids=["tiny", "the real encoder on RTE"])
def test_kill_at_random_moments(tmp_path, given):
    """kill -9 at 20 random moments of a run that saves at every step: resumed, each ends as the
    one that was left alone. Half-written temporary files do no harm."""
    def words(folder):
        settings = run_settings(folder, **given) if given is TINY else {**given, "out": folder}
        return flags(**settings)

    whole = tmp_path / "whole"
    process = command(*words(whole))
    wait_for(whole, process, "config.json")
    started = time.monotonic()
    assert process.wait() == 0, process.communicate()
    duration = time.monotonic() - started  # without loading, as killed() counts
    rng, kills = random.Random(0), 0
    for i in range(20):
        folder = tmp_path / f"{i}"
        kills += killed(words(folder), rng.uniform(0, 0.8 * duration), folder)
        finish(words(folder))
        same_runs(folder, whole)
        shutil.rmtree(folder)
    assert kills >= 10


@pytest.mark.slow
def test_kill_inside_a_write(tmp_path, whole):
    """A process dies half-way through the checkpoint of step 14: that of step 13 is the newest."""
    words = flags(**run_settings(tmp_path / "out", save_every=1))
    dying = """
import contextlib, os, signal, sys, data, dora, train_glue
@contextlib.contextmanager
def atomic_file(path, real=dora.atomic_file):
    with real(path) as file:
        if path.name == "step-00000014.pt":
            class Half:
                def write(self, raw):
                    file.write(raw[:len(raw) // 2])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield Half()
        yield file
data.atomic_file = atomic_file
sys.exit(train_glue.main(sys.argv[1:]))"""
    process = command(*words, code=dying)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert [name for name in names if not name.startswith(".")] == [
        "step-00000012.pt", "step-00000013.pt"]
    assert any(name.startswith(".step-00000014.pt") for name in names)      # the half file
    finish(words)
    same_runs(tmp_path / "out", whole)
