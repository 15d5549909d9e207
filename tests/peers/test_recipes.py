"""notebooks/RECIPES.md: its blocks run as they are, and do what the text beside them says."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import data
import train_glue
from dora import dora_layers, load_adapter, merge_

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "notebooks/RECIPES.md").read_text(encoding="utf-8")
SETUP, *REST = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {part.split("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL)
           for part in REST}
START = re.search(r"```python\n(.*?)```", SETUP, re.DOTALL)[1]

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that the page's first block defines, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(START, found)
    return found


def run(recipe, names):
    for block in RECIPES[recipe]:
        exec(compile(block, f"RECIPES.md, {recipe}", "exec"), names)
    return names


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def check_adapter(names, folder="adapter"):
    """The saved adapter on a plain model gives what the trained model gives, and not what the plain
    one does."""
    model, plain = names["model"], names["make_model"]()
    ids, before = names["ids"], logits(plain, names["ids"])
    load_adapter(plain, folder)
    assert torch.allclose(logits(plain, ids), logits(model, ids), atol=1e-5)
    assert not torch.allclose(before, logits(model, ids), atol=1e-2)


def test_every_recipe_is_run():
    """The page's headings, against the tests below."""
    assert list(RECIPES) == ["🤗 Trainer", "accelerate", "Checkpoints in your own loop",
                             "Continuing from an adapter", "GPT-2, there and back",
                             "A task of your own", "Choosing rank and rate"]


def test_trainer(names):
    """The Trainer's run prunes to the budget, and the adapter holds it."""
    run("🤗 Trainer", names)
    pruner = names["prune"].pruner
    assert pruner.t == pruner.total_steps == 20 and pruner.live < len(pruner.mask)
    check_adapter(names)


def test_trainer_checkpoints_do_not_load(names):
    """Why the page says save_strategy="no": from_pretrained on a model saved whole has other
    outputs, and after merge_ the same."""
    run("🤗 Trainer", names)
    model, ids = names["model"], names["ids"]
    expected = logits(model, ids)
    for folder, same in (("adapted", False), ("merged", True)):
        if same:
            merge_(model)
        model.save_pretrained(folder)
        loaded = transformers.RobertaForSequenceClassification.from_pretrained(folder)
        assert torch.allclose(logits(loaded, ids), expected, atol=1e-5 if same else 1e-2) == same


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
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name


def test_accelerate(names):
    """As with the Trainer: one step per two micro-batches, down to the budget."""
    run("accelerate", names)
    pruner = names["pruner"]
    assert pruner.t == pruner.total_steps == 20 and pruner.live < len(pruner.mask)
    check_adapter(names)


@pytest.mark.parametrize("crash", [10, 15, 38])
def test_checkpoints(names, crash):
    """A run that dies at some step and is started again, against one that does not: equal bits."""
    run("Checkpoints in your own loop", names)
    expected = {name: tensor.clone() for name, tensor in names["model"].state_dict().items()}
    Path("checkpoint.pt").unlink()

    class Crash(list):
        left = crash

        def __getitem__(self, part):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().__getitem__(part)

    examples = names["examples"]
    with pytest.raises(KeyboardInterrupt):
        run("Checkpoints in your own loop", names | {"examples": Crash(examples)})
    assert Path("checkpoint.pt").exists()
    torch.manual_seed(99)  # a new process
    run("Checkpoints in your own loop", names)
    found = names["model"].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    check_adapter(names)


def test_going_on(names):
    """The loaded adapter is plain LoRA that trains; merged, inject() freezes it."""
    run("Checkpoints in your own loop", names)
    ids, first = names["ids"], logits(names["model"], names["ids"])
    train_on, again = RECIPES["Continuing from an adapter"]
    exec(train_on, names)
    layers = dora_layers(names["model"])
    assert layers and all(not layer.c.requires_grad and layer.mask.all()
                          and layer.config.dropout_on == "input" for layer in layers.values())
    assert not torch.allclose(logits(names["model"], ids), first, atol=1e-2)
    check_adapter(names, "adapter-2")

    exec(again, names)
    assert torch.allclose(logits(names["model"], ids), first, atol=1e-5)
    merged = transformers.RobertaForSequenceClassification.from_pretrained("merged")
    assert torch.allclose(logits(merged, ids), first, atol=1e-5)


def test_gpt2(names):
    """The adapter in PEFT on the untouched GPT-2, and the merged model after save_pretrained,
    against the trained model."""
    there, peft, back = RECIPES["GPT-2, there and back"]
    exec(there, names)
    ids, expected = names["ids"], logits(names["model"], names["ids"])
    assert not torch.allclose(logits(names["make_gpt2"](), ids), expected, atol=1e-2)
    exec(peft, names)
    assert torch.allclose(logits(names["with_adapter"], ids), expected, atol=1e-5)
    exec(back, names)
    merged = transformers.GPT2LMHeadModel.from_pretrained("gpt2-merged")
    assert torch.allclose(logits(merged, ids), expected, atol=1e-5)
    assert len(names["blocks"]) == 8


def test_rates():
    """The range of dora's best rates, against the tables of RESULTS.md."""
    text = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    best, rates = set(), []
    for line in text.split("## Learning rates")[1].split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rates = cells if cells[0].endswith("examples") else rates
        if cells[0].startswith("dora "):
            best |= {float(rate) for rate, cell in zip(rates, cells) if cell.startswith("**")}
    assert (min(best), max(best)) == (5e-4, 2e-3)
    assert "between 5e-4 and 2e-3 on each task" in " ".join(PAGE.split())


def test_the_sweep(tmp_path):
    """The shell block on small files of the same layout, eight steps per run: six medians."""
    bpe = data.write_toy(tmp_path, tmp_path / "model")
    (tmp_path / "toy").rename(tmp_path / "CoLA")
    tiny = train_glue.RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=16, num_hidden_layers=1,
                                    num_attention_heads=2, intermediate_size=32)
    train_glue.save_model(train_glue.RobertaForSequenceClassification(tiny, 2), tmp_path / "model")
    (code,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    assert "--task mrpc" in code
    code = code.replace("--task mrpc", "--task cola --data-dir . --model-dir model --max-steps 8")
    code = code.replace("python train_glue.py", f"{sys.executable} {ROOT / 'train_glue.py'}")
    found = subprocess.run(["bash", "-ec", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(re.findall("median", found.stdout)) == 6, found.stdout
