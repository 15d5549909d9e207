"""Two processes (gloo, on the CPU) have the losses, masks and scores of one, and end together."""
import json
import os
import signal
import socket
import time

import pytest
from tiny import ROOT, command, evaluations, flags, lines, newest, run, run_settings, same_runs

pytestmark = pytest.mark.slow
FLOAT64 = dict(dropout=False, dtype="float64")

# The program, noting the mask of every pruning in a file for each process. No thread of the process
# group may outlive main: at exit it could abort its process (Linux shows the threads' names).
RECORDING = """
import json, os, pathlib, sys, train_glue
class Recorder(train_glue.Pruner):
    def _prune(self):
        super()._prune()
        with open(os.environ["MASKS"] + "." + os.environ.get("RANK", "0"), "a") as f:
            f.write(json.dumps([self.t, self.mask.tolist()]) + "\\n")
train_glue.Pruner = Recorder
code = train_glue.main(sys.argv[1:])
names = [file.read_text() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in names), names
sys.exit(code)"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(words, masks, world=2, code=RECORDING):
    """The processes that torchrun would start, without its agent."""
    port = str(free_port())
    return [command(*words, code=code, env={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASKS": str(masks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(world)]


def ends(processes, timeout=240):
    """[(exit code, stdout, stderr)] of all."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts)]


@pytest.mark.parametrize("changes", [
    {}, dict(accumulate=2), dict(batch_size=12, method="paper"), dict(batch_size=4, accumulate=3)],
    ids=["plain", "accumulate", "last batch of one", "both"])
def test_two_processes(tmp_path, changes):
    """50 steps of the same global batch, in float64 without dropout, the compaction among them:
    losses and norms to 1e-9, the masks of both processes at every pruning, scores and ranks. 61
    examples are 5 * 12 + 1: of the last batch one process has nothing."""
    changes = {**FLOAT64, "max_steps": 50, **changes}
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    words = flags(**run_settings(alone, **changes))
    found = ends(start(words, alone.with_suffix(".masks"), world=1))
    found += ends(start(flags(**run_settings(pair, **changes)), pair.with_suffix(".masks")))
    assert [code for code, _, _ in found] == [0, 0, 0], found
    a, b = lines(alone), lines(pair)
    assert len(a) == len(b) == 50
    for x, y in zip(a, b):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-9) and x["lr"] == y["lr"]
    masks = [(tmp_path / name).read_text() for name in
             ("alone.masks.0", "pair.masks.0", "pair.masks.1")]
    assert masks[0] == masks[1] == masks[2] and len(masks[0].splitlines()) > 5
    for x, y in zip(evaluations(alone), evaluations(pair), strict=True):
        assert x == pytest.approx(y, rel=1e-9)
    assert (alone / "ranks.json").read_bytes() == (pair / "ranks.json").read_bytes()
    assert found[2][1] == ""                             # the second process prints nothing


def test_only_the_first_process_writes(tmp_path):
    """The second process runs with a write guard: it may open no file of the run for writing."""
    guarded = """
import os, sys
if os.environ["RANK"] == "1":
    def guard(event, args):
        writing = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writing and "guarded-run" in str(args[0]):
            os._exit(99)
        if event in ("os.mkdir", "os.rename", "os.remove") and "guarded-run" in str(args[0]):
            os._exit(98)
    sys.addaudithook(guard)
import train_glue
sys.exit(train_glue.main(sys.argv[1:]))"""
    out = tmp_path / "guarded-run"
    words = flags(**run_settings(out, max_steps=12, save_every=2))
    assert [code for code, _, _ in ends(start(words, tmp_path / "m", code=guarded))] == [0, 0]
    assert (out / "result.json").exists() and newest(out)["step"] == 12


def test_evaluation_counts_each_example_once(tmp_path):
    """Predictions of two processes for 40 examples, gathered, against one process's; and of 1
    example, of which the second process has none."""
    code = """
import sys; sys.path.insert(0, "tests")
import torch, data, train_glue
from tiny import tiny_model
train_glue.connect()
data_dir, model_dir = sys.argv[1:]
examples = data.load_task("toy", data_dir, "dev", data.BPE(model_dir), 48)
model = tiny_model(1).double()
model.classifier.out_proj.bias.data.fill_(0.5)
for part in (examples, examples[:1], examples[:3]):
    print(train_glue.predict(model, part).tolist())
if train_glue.process()[1] > 1:
    torch.distributed.destroy_process_group()"""
    words = [run_settings(tmp_path)[name] for name in ("data_dir", "model_dir")]
    found = ends(start(words, "", 1, code)) + ends(start(words, "", 2, code))
    assert [code for code, _, _ in found] == [0, 0, 0], found
    expected, *others = [[json.loads(line) for line in text.splitlines()] for _, text, _ in found]
    assert [len(row) for row in expected] == [40, 1, 3] and len({*expected[0]}) > 30
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(tmp_path, victim):
    """kill -9 for one of two: the other ends within a minute with exit code 1 and a last line that
    names the run folder and --resume; the newest checkpoint is whole, and two processes resume from
    it to the same end as two that nothing disturbed."""
    given = run_settings(tmp_path / "out", epochs=200, save_every=1)
    processes = start(flags(**given), tmp_path / "m")
    while len([*(tmp_path / "out").glob("checkpoints/step-*.pt")]) < 2:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[victim].kill()
    found = ends(processes, timeout=60)
    assert found[victim][0] == -signal.SIGKILL
    code, _, error = found[1 - victim]
    last = error.strip().splitlines()[-1]
    assert code == 1 and str(tmp_path / "out") in last and "--resume" in last
    assert newest(tmp_path / "out")["step"] > 1


def test_an_error_of_one_process(tmp_path):
    """D6: one of two runs out of memory: it shows its traceback. Both end with exit code 1 and the
    same last line."""
    failing = """
import os, sys, train_glue
real, steps = train_glue.task_loss, []
def task_loss(*args):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 5:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return real(*args)
train_glue.task_loss = task_loss
sys.exit(train_glue.main(sys.argv[1:]))"""
    words = flags(**run_settings(tmp_path / "out"))
    (code, _, other), (failed_code, _, error) = ends(start(words, "m", code=failing), timeout=60)
    assert (code, failed_code) == (1, 1)
    assert "Traceback" in error and "can't allocate memory" in error.strip().splitlines()[-2]
    assert error.splitlines()[-1] == other.splitlines()[-1] and "--resume" in other


def test_two_processes_resume(tmp_path):
    """SIGTERM for the second alone: both stop after the same step, the first saves, both return
    143; resumed, losses, masks, scores and weights are those of an undisturbed pair."""
    changes = dict(epochs=12, **FLOAT64)
    for name in ("whole", "cut"):
        words = flags(**run_settings(tmp_path / name, **changes))
        processes = start(words, tmp_path / f"{name}-masks")
        if name == "whole":
            assert [code for code, _, _ in ends(processes)] == [0, 0]
            continue
        while not (tmp_path / name / "metrics.jsonl").exists() or not lines(tmp_path / name):
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        found = ends(processes)
        assert [code for code, _, _ in found] == [143, 143], found
        assert newest(tmp_path / name)["step"] < 96
    words = [*flags(**run_settings(tmp_path / "cut", **changes)), "--resume"]
    assert [code for code, _, _ in ends(start(words, tmp_path / "cut-masks"))] == [0, 0]
    for a, b in zip(lines(tmp_path / "cut"), lines(tmp_path / "whole")):
        assert a == b
    same_runs(tmp_path / "cut", tmp_path / "whole")


def test_bad_input_ends_both(tmp_path):
    """A folder that holds a run: the first process refuses, and the second does not wait for it
    for ever. The toy: both refuse, in one line that says what to name instead."""
    run(tmp_path / "out", max_steps=5, interval=1)
    found = ends(start(flags(**run_settings(tmp_path / "out")), tmp_path / "m"), timeout=60)
    assert found[0][0] == 2 and "already contains a run" in found[0][2]
    assert found[1][0] in (1, 2) and "Traceback" not in found[1][2]
    for code, _, error in ends(start(["--out", tmp_path / "toy"], tmp_path / "m"), timeout=60):
        assert code == 2 and "the toy runs in one process" in error and "Traceback" not in error


def test_torchrun_itself(tmp_path):
    """`torchrun --nproc_per_node=2 train_glue.py ...`, as the README prints it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\ntorchrun --nproc_per_node=2 train_glue.py" in readme
    code = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    process = command("--nproc_per_node=2", f"--master_port={free_port()}", "train_glue.py",
                      *flags(**run_settings(tmp_path / "out", max_steps=12)), code=code)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert out.count("layer by matrix") == 1 and os.path.exists(tmp_path / "out" / "result.json")
