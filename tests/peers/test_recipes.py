"""notebooks/RECIPES.md: its blocks run as they are, and do what the text beside them says."""
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from small import close
from tiny import ROOT, files

from dora import dora_layers, load_adapter, merge_

PAGE = (ROOT / "notebooks/RECIPES.md").read_text(encoding="utf-8")
SETUP, *REST = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {part.split("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
           for part in REST}
START = re.search(r"```python\n(.*?)```", SETUP, re.DOTALL)[1]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that the page's first block defines, in an empty folder."""
    assert len(RECIPES) == 7  # each of them is run below
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(START, found)
    return found


def run(recipe, names):
    for block in RECIPES[recipe]:
        exec(compile(block, f"RECIPES.md, {recipe}", "exec"), names)
    return names["model"]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def differ(a, b):
    assert (a - b).abs().max() > 1e-2


def check_adapter(names, folder="adapter"):
    """The saved adapter makes a plain model, which differed, give what the trained one gives."""
    plain, ids = names["make_model"](), names["ids"]
    expected = logits(names["model"], ids)
    differ(logits(plain, ids), expected)
    load_adapter(plain, folder)
    close(logits(plain, ids), expected)


def check_pruner(pruner):
    """It took a step per two micro-batches, and pruned."""
    assert pruner.t == pruner.total_steps == 20 and pruner.live < len(pruner.mask)


def test_trainer(names):
    """The Trainer's run prunes, and the adapter holds it. The model saved whole has other outputs
    after from_pretrained, which is why the page says save_strategy="no", and merged the same."""
    model, ids = run("🤗 Trainer", names), names["ids"]
    check_pruner(names["prune"].pruner)
    check_adapter(names)
    expected = logits(model, ids)
    model.save_pretrained("adapted")
    merge_(model).save_pretrained("merged")
    load = transformers.RobertaForSequenceClassification.from_pretrained
    differ(logits(load("adapted"), ids), expected)
    close(logits(load("merged"), ids), expected)


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_trainer_accumulates(names, clip):
    """Two micro-batches of 8 against one batch of 16: the same weights, the penalty included, with
    and without clipping. No dropout, and plain SGD, which does not hide a factor."""
    exec(START.replace("vocab_size", "hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, "
                                     "vocab_size"), names)
    names["config"] = names["DoRAConfig"](rank=1, interval=2, dropout=0.0)
    found = []
    for size, steps in ((8, 2), (16, 1)):
        code = RECIPES["🤗 Trainer"][0].split("compact_(model)")[0]
        for old, new in (("max_grad_norm=0", f"max_grad_norm={clip}, optim='sgd'"),
                         ("learning_rate=5e-3", "learning_rate=0.3"),
                         ("batch_size=8", f"batch_size={size}"),
                         ("accumulation_steps=2", f"accumulation_steps={steps}")):
            assert old in code
            code = code.replace(old, new)
        exec(code, names)
        found.append(names["model"].state_dict())
    start = names["make_model"]().state_dict()["classifier.dense.weight"]
    assert not torch.allclose(found[0]["classifier.dense.weight"], start, atol=1e-3)
    close(found[0], found[1])


def test_accelerate(names):
    """As with the Trainer: one step per two micro-batches, down to the budget."""
    run("accelerate", names)
    check_pruner(names["pruner"])
    check_adapter(names)


class Crash(list):
    """Examples that can be read `left` times."""

    left = 0

    def __getitem__(self, part):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(part)


def test_checkpoints(names):
    """A run that dies at some step and is started again, against one that does not: equal bits."""
    recipe = "Checkpoints in your own loop"
    expected = run(recipe, names).state_dict()
    for crash in (10, 15, 38):
        Path("checkpoint.pt").unlink()
        examples = Crash(names["examples"])
        examples.left = crash
        torch.manual_seed(1)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, names | {"examples": examples})
        torch.manual_seed(99)  # a new process
        found = run(recipe, names).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    check_adapter(names)


def test_continuing(names):
    """The loaded adapter is plain LoRA that trains; merged, inject() freezes it."""
    ids, first = names["ids"], logits(run("Checkpoints in your own loop", names), names["ids"])
    train_on, again = RECIPES["Continuing from an adapter"]
    exec(train_on, names)
    layers = dora_layers(names["model"]).values()
    assert layers and all(not layer.c.requires_grad and layer.mask.all()
                          and layer.config.dropout_on == "input" for layer in layers)
    differ(logits(names["model"], ids), first)
    check_adapter(names, "adapter-2")

    exec(again, names)
    close(logits(names["model"], ids), first)
    merged = transformers.RobertaForSequenceClassification.from_pretrained("merged")
    close(logits(merged, ids), first)


def test_gpt2(names):
    """In PEFT on GPT-2, merged and reloaded, saved by PEFT and loaded: as the trained model."""
    there, peft, back = RECIPES["GPT-2, there and back"]
    exec(there, names)
    ids, expected = names["ids"], logits(names["model"], names["ids"])
    differ(logits(names["make_gpt2"](), ids), expected)
    exec(peft, names)
    close(logits(names["with_adapter"], ids), expected)
    exec(back, names)
    close(logits(transformers.GPT2LMHeadModel.from_pretrained("gpt2-merged"), ids), expected)
    assert len(names["blocks"]) == 8

    names["with_adapter"].save_pretrained("from-peft")
    exec(there.split("config =")[0], names)
    load_adapter(names["model"], "from-peft")
    close(logits(names["model"], ids), expected)


def test_a_task_of_your_own(names):
    """The block adds a task, and settings for it."""
    with patch.dict("data.TASKS"):
        exec(RECIPES["A task of your own"][0], names)
    assert names["config"].task == "mine"


def test_rates():
    """The range of the rates chosen for dora, against the tables of RESULTS.md."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    best, rates = set(), []
    for line in text.split("## Learning rates")[1].split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rates = cells if cells[0].endswith("examples") else rates
        if cells[0].startswith("dora "):
            best |= {float(rate) for rate, cell in zip(rates, cells) if cell.startswith("**")}
    assert (min(best), max(best)) == (5e-4, 2e-3)
    assert "rates chosen for `dora` were 5e-4 to 2e-3" in " ".join(PAGE.split())


def test_the_sweep(tmp_path):
    """The shell block on the toy's files, at one rate, eight steps per run: three medians."""
    data_dir, model_dir = files()
    (tmp_path / "CoLA").symlink_to(data_dir / "toy")
    (code,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for old, new in (("--task mrpc", f"--task cola --data-dir . --model-dir {model_dir}"),
                     ("--seeds", "--max-steps 8 --max-len 48 --seeds"), ("in 5e-4 2e-3", "in 2e-3"),
                     ("python train_glue.py", f"{sys.executable} {ROOT / 'train_glue.py'}")):
        assert old in code
        code = code.replace(old, new)
    found = subprocess.run(["bash", "-ec", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(re.findall("median", found.stdout)) == 3, found.stdout
