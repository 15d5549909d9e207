"""A tiny RoBERTa, its tokenizer, a small task and runs on them; no test of its own."""
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

import data
from train_glue import (
    RobertaConfig, RobertaForSequenceClassification, make_config, save_model, train)

ROOT = Path(__file__).parents[1]
MINILM = ROOT / "../shared/models/minilm-l6-roberta"
GLUE = ROOT / "../shared/data/glue"
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ROWS = {"train": 61, "dev": 40}         # 61 is not a multiple of a batch: the last one is short
PRUNING = ("dora", "paper", "adalora")  # the methods that use `interval`
EXAMPLES = functools.cache(lambda: tempfile.TemporaryDirectory(prefix="dora-test-"))
torch.set_num_threads(1)  # as in the processes of command(): sums then have one order


def tiny_model(num_labels=2, seed=0, **changes):
    """Two layers of width 32 with seeded random weights, biases too, in evaluation mode."""
    config = RobertaConfig(**{**dict(
        vocab_size=437, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.1), **changes})
    torch.manual_seed(seed)
    model = RobertaForSequenceClassification(config, num_labels).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def files(dropout=True):
    """(data_dir, model_dir): the toy's first rows and a tiny model, written once a session."""
    root = Path(EXAMPLES().name) / str(dropout)
    model_dir = root / "model"
    bpe = data.write_toy(root, model_dir)
    for split, rows in ROWS.items():
        path = root / "toy" / f"{split}.tsv"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:rows]))
    changes = {} if dropout else NO_DROPOUT
    save_model(tiny_model(vocab_size=len(bpe.vocab), **changes), model_dir)
    return root, model_dir


def run_settings(out, dropout=True, **changes):
    """make_config's arguments for a run of 24 steps, 8 per epoch. It prunes at 7, 10 and 12. All
    runs choose kernels alike, so that they can be compared bit for bit."""
    data_dir, model_dir = files(dropout)
    given = dict(task="toy", data_dir=str(data_dir), model_dir=str(model_dir), out=str(out),
                 device="cpu", batch_size=8, epochs=3, max_len=48, log_every=1, deterministic=True)
    if changes.get("method", "dora") in PRUNING:
        given.update(rank=2.0, interval=3, budget_unit="components")  # 12 matrices end with 24
    if changes.get("method") not in ("full", "bitfit"):  # whose rates are lower
        given["lr"] = 3e-3
    if not dropout:
        given["dropout"] = 0.0
    return {**given, **changes}


def run(out, dropout=True, **changes):
    """The result of one such run."""
    return train(make_config(**run_settings(out, dropout, **changes)))


def flags(**given):
    """The same settings as flags of the command line."""
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def refused(*says, use):
    """Assert that use() raises a DataError of one line that has all of these parts; return it."""
    with pytest.raises(data.DataError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert [part for part in says if part not in message] == [], message
    return message


def read_json(path):
    return json.loads(Path(path).read_text())


def contents(folder):
    """{path: bytes} of the files in a folder, but for the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in paths}


def json_lines(path):
    """The objects in a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def lines(folder):
    """The lines of metrics.jsonl about training steps."""
    return [line for line in json_lines(Path(folder) / "metrics.jsonl") if "loss" in line]


def evaluations(folder):
    """The lines of metrics.jsonl about dev."""
    return [line for line in json_lines(Path(folder) / "metrics.jsonl") if "loss" not in line]


def result(folder):
    """result.json, seconds apart."""
    found = read_json(Path(folder) / "result.json")
    del found["seconds"]
    return found


def newest(folder):
    """The newest checkpoint's content."""
    path = max((Path(folder) / "checkpoints").glob("step-*.pt"))
    return torch.load(path, weights_only=True)


def same(a, b):
    """Assert that two trees of dicts, lists, tensors and numbers are equal bit for bit."""
    (ours, spec), (theirs, other) = map(tree_flatten_with_path, (a, b))
    assert spec == other
    for (path, x), (_, y) in zip(ours, theirs):
        assert type(x) is type(y), path
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), path
        else:
            assert x == y, path


def same_runs(a, b):
    """Assert that two run folders hold the same, times apart: metrics.jsonl and ranks.jsonl byte
    for byte, scores, ranks, adapter, final weights, optimizer, masks and random states."""
    for name in ("metrics.jsonl", "ranks.jsonl", "ranks.json", "adapter/adapter_model.safetensors",
                 "adapter/adapter_config.json"):
        first, second = (Path(folder) / name for folder in (a, b))
        assert first.read_bytes() == second.read_bytes(), name
    assert result(a) == result(b)
    same(newest(a), newest(b))


def command(*words, code=None, env=()):
    """Start `python train_glue.py WORDS`, or other code with these words, in its own process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    program = ["-c", code] if code else ["train_glue.py"]
    return subprocess.Popen([sys.executable, *program, *map(str, words)], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(folder, process, pattern="metrics.jsonl", count=1):
    """Wait until so many such files are in the folder and not empty, or the process has ended."""
    while process.poll() is None:
        files = [path for path in folder.glob(pattern) if path.stat().st_size]
        if len(files) >= count:
            break
        time.sleep(0.01)
