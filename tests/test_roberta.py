"""The encoder by hand computes what RoBERTa computes, and its loader gives the file's weights in
float32 or refuses the file in one line. (peers/test_transformers.py compares with transformers.)
"""
import dataclasses
import functools
import json
import math

import pytest
import torch
from fixtures.record import recorded
from tiny import MINILM, read_json, tiny_model

import data
from dora import DoRAError, read_safetensors, write_safetensors
from train_glue import (
    ITS_HEAD, RobertaConfig, RobertaForSequenceClassification, load_roberta, save_model)

close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def sentences(rows=3, length=9, seed=1, vocab=437):
    """(ids, mask) of rows of falling length, padded on the right; no token is <pad>."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (rows, length), generator=g)
    ids[:, 0] = 0
    for i in range(rows):
        ids[i, length - 2 * i:] = 1
    return ids, ids != 1


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model."""
    save_model(tiny_model(), tmp_path / "m")
    return tmp_path / "m"


def logits(model):
    with torch.no_grad():
        return model.eval()(*sentences())


def rewrite(folder, edit):
    """Save the folder's weights again after edit(weights), a dict."""
    weights = {}
    for name, tensor in read_safetensors(folder / "model.safetensors").items():
        weights[name] = tensor.clone()
    edit(weights)
    write_safetensors(folder / "model.safetensors", weights)


def without_prefix(weights):
    """Rename the weights as a file without `roberta.` has them."""
    for name in [*weights]:
        weights[name.removeprefix("roberta.")] = weights.pop(name)


def test_defaults_are_roberta_bases():
    """The number of parameters of RobertaConfig()'s encoder equals roberta-base's: 124,055,040
    without pooler, as its model card's 125 M says; built without memory."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(), 2)
    sizes = [p.numel() for p in model.roberta.parameters()]
    assert sum(sizes) == 124_055_040


@pytest.mark.parametrize("extra", [1, 30])
@torch.no_grad()
def test_padding_changes_nothing(extra):
    """Logits of a batch against the same with more padding, and with none, row by row."""
    model, (ids, mask) = tiny_model().double(), sentences()
    wide_ids = torch.nn.functional.pad(ids, (0, extra), value=1)
    found = model(wide_ids, wide_ids != 1)
    close(found, model(ids, mask))
    for row, expected in zip(ids, found):
        alone = row[row != 1][None]
        close(model(alone, alone != 1)[0], expected)


def test_positions_start_after_pad():
    """Rows of the position table that get a gradient: pad + 1 = 2 to the longest length + 1 for
    tokens, and pad itself only for padding."""
    ids, mask = sentences(rows=2, length=5)  # 5 and 3 tokens
    embeddings = tiny_model().roberta.embeddings
    found = embeddings(ids, mask)
    for output, first in ((found[mask], 2), (found, 1)):
        (grad,) = torch.autograd.grad(output.square().sum(), embeddings.position_embeddings.weight,
                                      retain_graph=True)
        assert grad.any(1).nonzero().flatten().tolist() == [*range(first, 7)]


def test_the_last_layers_shortcut():
    """rows = 1, the last layer for <s> alone, against all rows: values and gradients."""
    model, (ids, mask) = tiny_model().double(), sentences()
    parameters = [*model.roberta.parameters()]
    found = []
    for rows in (1, None):
        state = model.roberta(ids, mask, rows=rows)[:, 0]
        gradients = torch.autograd.grad(state.sin().sum(), parameters)
        found.append([state, *gradients])
    close(*found)


def test_attention_by_hand():
    """SelfAttention against softmax(q k / sqrt(d)) v written as loops over batch, head and row."""
    model, (_, mask) = tiny_model().double(), sentences()
    part = model.roberta.encoder.layer[0].attention.self
    torch.manual_seed(0)
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    found = part(x, x, mask)
    for b, n in enumerate(mask.sum(1)):
        queries, keys, values = part.query(x[b]), part.key(x[b]), part.value(x[b])
        for h in range(4):
            head = slice(8 * h, 8 * h + 8)
            for i in range(9):
                scores = [queries[i, head] @ k for k in keys[:n, head]]
                weights = torch.stack(scores).div(math.sqrt(8)).softmax(0)
                expected = sum(w * v for w, v in zip(weights, values[:n, head]))
                torch.testing.assert_close(found[b, i, head], expected)


@pytest.mark.parametrize("prefix", [True, False])
def test_forms_of_a_checkpoint(folder, prefix):
    """Logits with and without `roberta.`, with ignored keys, against those of the saved model."""
    def edit(weights):
        weights["roberta.pooler.dense.weight"] = torch.ones(32, 32)
        weights["roberta.embeddings.position_ids"] = torch.arange(64)[None]
        weights["lm_head.bias"] = torch.ones(3)
        weights["lm_head.dense.weight"] = torch.ones(2, 2)
        if not prefix:
            without_prefix(weights)

    rewrite(folder, edit)
    assert logits(load_roberta(folder, 2)).equal(logits(tiny_model()))


def test_half_precision_is_widened(folder, tmp_path):
    """Saved again: the same bytes. A float16 file gives the rounded weights in float32."""
    again = tmp_path / "again"
    save_model(load_roberta(folder, 2), again)
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()

    def halve(weights):
        for name, tensor in weights.items():
            weights[name] = tensor.half()

    rewrite(folder, halve)
    rounded = tiny_model().half().float().state_dict()
    for name, p in load_roberta(folder, 2).named_parameters():
        assert p.dtype == torch.float32 and p.equal(rounded[name])


@pytest.mark.parametrize("head", [
    {},
    {"classifier.dense.weight": (32, 32)},  # half of one
    {"classifier.out_proj.weight": (5, 32), "classifier.out_proj.bias": (5,)},  # another size
    {"qa_outputs.weight": (2, 32), "qa_outputs.bias": (2,)},  # question answering
    {"classifier.weight": (9, 32), "classifier.bias": (9,)}])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_new_head(folder, head, prefix):
    """Without a whole head of this kind and size the encoder is the file's, and the head is as
    a fresh model's: normal of the config's deviation with zero biases, the same for a seed."""
    def edit(weights):
        for name in [*weights]:
            if name.startswith("classifier."):
                del weights[name]
        if not prefix:
            without_prefix(weights)
        weights |= {name: torch.ones(shape) for name, shape in head.items()}

    rewrite(folder, edit)
    torch.manual_seed(5)
    model = load_roberta(folder, 2)
    expected = tiny_model().roberta.state_dict()
    for name, p in model.roberta.named_parameters():
        assert p.equal(expected[name])
    found = model.classifier
    assert model.head != ITS_HEAD
    assert not found.dense.bias.any() and not found.out_proj.bias.any()
    assert abs(found.dense.weight.std() - 0.1) < 0.01
    torch.manual_seed(5)
    again = load_roberta(folder, 2).classifier
    assert again.dense.weight.equal(found.dense.weight)


KEY = "roberta.encoder.layer.1.output.dense.weight"
WRONG = {  # what the message says, and how the weights become what it says
    f"1 of 41 weights are missing, .* {KEY}": lambda w: w.pop(KEY),
    rf"{KEY}' is \(32, 63\) .* \(32, 64\)": lambda w: w.update({KEY: w[KEY][:, 1:]}),
    rf"{KEY}' .* torch.int8": lambda w: w.update({KEY: w[KEY].to(torch.int8)}),
    "layer.2.* no such weight": lambda w: w.update({KEY.replace("1", "2"): w[KEY]}),
    "37 of 41 .* missing": lambda w: renamed(w, "roberta.", "bert."),
    "Norm.gamma": lambda w: renamed(w, "Norm.weight", "Norm.gamma")}  # as the first BERT files


def renamed(weights, old, new):
    for name in [*weights]:
        weights[name.replace(old, new)] = weights.pop(name)


@pytest.mark.parametrize("says", WRONG)
def test_wrong_weights_are_named(folder, says):
    """A missing, misshapen or unknown weight: one line with file, key and shapes."""
    rewrite(folder, WRONG[says])
    with pytest.raises(DoRAError, match=says) as caught:
        load_roberta(folder, 2)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message


def test_files_that_are_not_there(folder):
    """A folder without weights or without anything, and files that git-lfs has not fetched."""
    with pytest.raises(data.DataError, match="nowhere/config.json"):
        load_roberta(folder / "nowhere", 2)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises((DoRAError, data.DataError), match=f"{name}.*git lfs pull"):
            load_roberta(folder, 2)
        save_model(tiny_model(), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DoRAError, match=f"{folder}: no model.safetensors"):
        load_roberta(folder, 2)


def with_config(folder, **fields):
    """Change fields of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**read_json(path), **fields}))
    return folder


def id2label(names):
    return {str(i): name for i, name in enumerate(names.split(", "))}


@pytest.mark.parametrize("task, names, order", [
    ("rte", "entailment, not_entailment", [0, 1]),
    ("rte", "not_entailment, entailment", [1, 0]),
    ("rte", "Not Entailment, Entailment", [1, 0]),
    ("rte", "LABEL_0, LABEL_1", [0, 1]),
    ("cola", "1, 0", [1, 0]),
    ("mnli", "CONTRADICTION, NEUTRAL, ENTAILMENT", [2, 1, 0]),  # roberta-large-mnli's
    ("twelve", ", ".join("abcdefghijkl"), [*range(12)]),  # as text, "10" comes before "2"
    # the words of the Hub's data sets, as run_glue.py saves them
    ("mrpc", "not_equivalent, equivalent", [0, 1]),
    ("cola", "acceptable, unacceptable", [1, 0]),
    ("qqp", "not_duplicate, duplicate", [0, 1]), ("sst2", "NEGATIVE, POSITIVE", [0, 1])])
def test_the_order_of_labels(tmp_path, task, names, order):
    """Logits of a checkpoint are in the order of the task's labels, whatever its id2label's."""
    twelve = dataclasses.replace(data.TASKS["rte"], name="twelve", labels=tuple("abcdefghijkl"))
    model = tiny_model(len(order))
    save_model(model, tmp_path)
    with_config(tmp_path, id2label=id2label(names))
    loaded = load_roberta(tmp_path, len(order), data.TASKS.get(task, twelve))
    assert loaded.head == ITS_HEAD
    assert logits(loaded).equal(logits(model)[:, order])
    without_task = load_roberta(tmp_path, len(order))
    assert logits(without_task).equal(logits(model))


@pytest.mark.parametrize("task, classes, fields", [
    ("rte", 2, {"id2label": id2label("negative, positive")}),
    ("sst2", 2, {"id2label": id2label("bad, good")}),
    ("rte", 2, {"id2label": id2label("entailment, neutral, contradiction")}),
    ("rte", 2, {"id2label": id2label("LABEL_1, LABEL_0")}),
    ("rte", 2, {"finetuning_task": "qnli"}), ("stsb", 1, {}), ("stsb", 1, {"label_top": 4.0})])
def test_a_head_for_other_labels(tmp_path, task, classes, fields):
    """A head for other labels, another task or unit is not used, and the model says so."""
    save_model(tiny_model(classes), tmp_path)
    with_config(tmp_path, **fields)
    model = load_roberta(tmp_path, classes, data.TASKS[task])
    assert "the file's is for other labels" in model.head
    assert not model.classifier.out_proj.bias.any()


@pytest.mark.parametrize("task", ["cola", "rte", "mnli", "stsb"])
def test_a_saved_model_knows_its_task(tmp_path, task):
    """save_model names task and labels: its head is loaded for that task, for no other."""
    task = data.TASKS[task]
    model = tiny_model(task.num_labels)
    save_model(model, tmp_path, task)
    loaded = load_roberta(tmp_path, task.num_labels, task)
    assert loaded.head == ITS_HEAD
    assert logits(loaded).equal(logits(model))
    other = dataclasses.replace(task, name="mine")
    assert load_roberta(tmp_path, task.num_labels, other).head != ITS_HEAD


def test_the_dropout_of_the_head(folder):
    """classifier_dropout is the head's dropout; without it the encoder's is."""
    assert load_roberta(folder, 2).classifier.dropout.p == 0.1
    for value in (0.5, 0):
        model = load_roberta(with_config(folder, classifier_dropout=value), 2)
        assert model.classifier.dropout.p == value
        assert model.roberta.embeddings.dropout.p == 0.1


@pytest.mark.parametrize("field, value", [
    ("hidden_size", None), ("layer_norm_eps", None),
    ("model_type", "bert"), ("hidden_act", "relu"), ("position_embedding_type", "relative_key"),
    ("is_decoder", True), ("add_cross_attention", True)])
def test_fields_that_are_not_robertas(folder, field, value):
    """A missing size (never roberta-base's instead) and other architectures: file and field."""
    with_config(folder, **{field: value})
    with pytest.raises(DoRAError) as caught:
        load_roberta(folder, 2)
    message = str(caught.value)
    assert str(folder / "config.json") in message and "\n" not in message
    assert field in message


@pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared/models")
def test_recorded_hidden_states():
    """The shared encoder's states of padded sentences against transformers', to 1e-5."""
    theirs = recorded("transformers")
    ids = torch.tensor(theirs["ids"])
    model = load_roberta(MINILM, 2).eval()
    with torch.no_grad():
        states = model.roberta(ids, ids != 1)
    for name, position in theirs["positions"].items():
        expected = torch.tensor(theirs["states"][name])  # (B, D) of one position
        close(states[:, position], expected, atol=1e-5)

