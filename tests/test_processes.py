"""Two processes (gloo, on the CPU) have the losses, masks and scores of one, and end together."""
import json
import os
import signal
import socket

import pytest
from small import close
from tiny import (ROOT, command, evaluations, files, flags, lines, newest, read_json, run,
                  run_settings, same_runs, wait_for)

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
    processes = []
    env = {"WORLD_SIZE": world, "MASKS": masks,
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for rank in range(world):
        env |= {"RANK": rank, "LOCAL_RANK": rank}
        strings = {name: str(value) for name, value in env.items()}
        processes.append(command(*words, code=code, env=strings))
    return processes


def ends(processes, timeout=240):
    """The exit codes, and what each wrote to stdout and to stderr."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    codes = [process.returncode for process in processes]
    return (codes, *zip(*texts))


@pytest.mark.parametrize("changes", [
    {}, dict(accumulate=2), dict(batch_size=12, method="paper"), dict(batch_size=4, accumulate=3)],
    ids=["plain", "accumulate", "last batch of one", "both"])
def test_two_processes(tmp_path, changes):
    """50 steps of the same global batch in float64 without dropout: losses and norms to 1e-9, masks
    of both processes, scores, ranks. 61 = 5 * 12 + 1: of the last batch one process has nothing."""
    changes = {**FLOAT64, "max_steps": 50, **changes}
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    words = flags(**run_settings(alone, **changes))
    codes, _, errors = ends(start(words, tmp_path / "masks-alone", world=1))
    assert codes == [0], errors
    words = flags(**run_settings(pair, **changes))
    codes, said, errors = ends(start(words, tmp_path / "masks-pair"))
    assert codes == [0, 0], errors
    assert said[1] == ""  # the second process prints nothing
    a, b = lines(alone), lines(pair)
    assert len(a) == 50
    close(a, b, 1e-9)
    assert [line["lr"] for line in a] == [line["lr"] for line in b]
    close(evaluations(alone), evaluations(pair), 1e-9)
    masks = [path.read_text() for path in tmp_path.glob("masks-*")]
    assert len(masks) == 3 and len({*masks}) == 1 and masks[0].count("\n") > 5
    assert read_json(alone / "ranks.json") == read_json(pair / "ranks.json")


def test_only_the_first_process_writes(tmp_path):
    """The second process may open no file of the run for writing, and waits for a slow disk until
    the first has written all that --predict reads."""
    guarded = """
import os, sys, time
if os.environ["RANK"] == "1":
    def guard(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        writes = writes or event in ("os.mkdir", "os.rename", "os.remove")
        if writes and "guarded-run" in str(args[0]):
            os._exit(99)
    sys.addaudithook(guard)
sync, os.fsync = os.fsync, lambda file: time.sleep(0.2) or sync(file)
import train_glue
assert train_glue.main(sys.argv[1:]) == 0
assert os.path.exists("RESULT")""".replace("RESULT", str(tmp_path / "guarded-run/result.json"))
    out = tmp_path / "guarded-run"
    words = flags(**run_settings(out, max_steps=12, save_every=2))
    codes, _, errors = ends(start(words, tmp_path / "m", code=guarded))
    assert codes == [0, 0], errors
    assert newest(out)["step"] == 12


def test_evaluation_counts_each_example_once(tmp_path):
    """Predictions of two processes for 40, 1 and 3 examples against one process's."""
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
    found = []
    for world in (1, 2):
        codes, said, errors = ends(start(files(), "", world, code))
        assert codes == [0] * world, errors
        found += [[*map(json.loads, text.splitlines())] for text in said]
    expected, *others = found
    assert [len(row) for row in expected] == [40, 1, 3] and len({*expected[0]}) > 30
    for other in others:
        for a, b in zip(expected, other, strict=True):
            assert a == pytest.approx(b, abs=1e-12)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(tmp_path, victim):
    """kill -9 for one of two: the other ends within a minute with exit code 1 and a last line that
    names the run folder and --resume; the newest checkpoint is whole."""
    out = tmp_path / "out"
    given = run_settings(out, epochs=200, save_every=1)
    processes = start(flags(**given), tmp_path / "m")
    wait_for(out, processes[0], "checkpoints/step-*.pt", count=2)
    processes[victim].kill()
    codes, _, errors = ends(processes, timeout=60)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    last = errors[1 - victim].strip().splitlines()[-1]
    assert str(out) in last and "--resume" in last
    assert newest(out)["step"] > 1


def test_an_error_of_one_process(tmp_path):
    """One of two runs out of memory and shows it. Both end with exit code 1 and one line."""
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
    codes, _, (other, error) = ends(start(words, "m", code=failing), timeout=60)
    assert codes == [1, 1]
    assert "Traceback" in error and "can't allocate memory" in error.strip().splitlines()[-2]
    assert error.splitlines()[-1] == other.splitlines()[-1] and "--resume" in other


def test_two_processes_resume(tmp_path):
    """SIGTERM for the second alone: both stop after the same step, the first saves, both return
    143; resumed, losses, masks, scores and weights are those of an undisturbed pair."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = dict(epochs=12, **FLOAT64)
    words = flags(**run_settings(whole, **changes))
    codes, _, errors = ends(start(words, tmp_path / "m"))
    assert codes == [0, 0], errors
    words = flags(**run_settings(cut, **changes))
    processes = start(words, tmp_path / "m")
    wait_for(cut, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = ends(processes)
    assert codes == [143, 143], errors
    assert newest(cut)["step"] < 96
    codes, _, errors = ends(start([*words, "--resume"], tmp_path / "m"))
    assert codes == [0, 0], errors
    same_runs(cut, whole)


def test_bad_input_ends_both(tmp_path):
    """A folder that holds a run: the first process refuses, and the second does not wait for it
    for ever. The toy: both refuse, in one line that says what to name instead."""
    run(tmp_path / "out", max_steps=5, interval=1)
    words = flags(**run_settings(tmp_path / "out"))
    codes, _, errors = ends(start(words, tmp_path / "m"), timeout=60)
    assert codes[0] == 2 and "already contains a run" in errors[0]
    assert codes[1] in (1, 2) and "Traceback" not in errors[1]
    codes, _, errors = ends(start(["--out", tmp_path / "toy"], tmp_path / "m"), timeout=60)
    assert codes == [2, 2]
    for error in errors:
        assert "the toy runs in one process" in error and "Traceback" not in error


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
