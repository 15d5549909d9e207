"""The encoder by hand computes what RoBERTa computes, and its loader gives the file's weights in
float32 or refuses the file in one line. (peers/test_transformers.py compares with transformers.)
"""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny import MINILM, tiny_model

import data
from dora import DoRAError, read_safetensors, write_safetensors
from train_glue import (
    ITS_HEAD, RobertaConfig, RobertaForSequenceClassification, load_roberta, save_model)

HERE = Path(__file__).parent


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
    """Save the folder's weights again after edit(weights)."""
    weights = {k: t.clone() for k, t in read_safetensors(folder / "model.safetensors").items()}
    write_safetensors(folder / "model.safetensors", edit(weights) or weights)


# ---- the model ----------------------------------------------------------------------------------

def test_defaults_are_roberta_bases():
    """The number of parameters of RobertaConfig()'s encoder equals roberta-base's: 124,055,040
    without pooler, as its model card's 125 M says; built without memory."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(), 2)
    assert sum(p.numel() for p in model.roberta.parameters()) == 124_055_040


@pytest.mark.parametrize("extra", [1, 5, 30])
def test_padding_changes_nothing(extra):
    """Logits of a batch against the same with more padding, and against each row alone without
    any."""
    model, (ids, mask) = tiny_model().double(), sentences()
    pad = torch.ones(len(ids), extra, dtype=torch.long)
    with torch.no_grad():
        wide = model(torch.cat([ids, pad], 1), torch.cat([mask, pad == 0], 1))
        torch.testing.assert_close(wide, model(ids, mask), rtol=0, atol=1e-12)
        for row, row_mask, expected in zip(ids, mask, wide):
            alone = model(row[row_mask][None], row_mask[row_mask][None])[0]
            torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


def test_positions_start_after_pad():
    """Rows of the position table that get a gradient: pad + 1 = 2 to the longest length + 1 for
    tokens, and pad itself only for padding."""
    model, (ids, mask) = tiny_model(), sentences(rows=2, length=5)          # 5 and 3 tokens
    embeddings = model.roberta.embeddings
    embeddings(ids, mask)[mask].square().sum().backward()
    rows = embeddings.position_embeddings.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert rows.tolist() == [2, 3, 4, 5, 6]
    embeddings(ids, mask).square().sum().backward()
    rows = embeddings.position_embeddings.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert rows.tolist() == [1, 2, 3, 4, 5, 6]


def test_the_last_layers_shortcut():
    """rows = 1, which computes only the state of <s> in the last layer, against all of it: values
    and gradients."""
    model, (ids, mask) = tiny_model().double(), sentences()
    found = []
    for rows in (1, None):
        model.zero_grad()
        state = model.roberta(ids, mask, rows=rows)[:, 0]
        state.sin().sum().backward()
        found.append([state, *(p.grad.clone() for p in model.roberta.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_attention_by_hand():
    """SelfAttention against softmax(q k / sqrt(d)) v written as loops over batch, head and row."""
    model, (_, mask) = tiny_model().double(), sentences()
    part = model.roberta.encoder.layer[0].attention.self
    x = torch.randn(3, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = part(x, x, mask)
    for b in range(3):
        n = int(mask[b].sum())
        for h in range(4):
            q, k, v = (matrix(x[b])[:, 8 * h:8 * h + 8]
                       for matrix in (part.query, part.key, part.value))
            for i in range(9):
                weights = torch.stack([q[i] @ k[j] / 8 ** 0.5 for j in range(n)]).softmax(0)
                expected = sum(weights[j] * v[j] for j in range(n))
                torch.testing.assert_close(found[b, i, 8 * h:8 * h + 8], expected)


def test_dropout_only_in_training():
    """Two passes differ in training, with dropout in every place on, and are equal in
    evaluation."""
    model, batch = tiny_model(), sentences()
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))
    quiet = tiny_model(hidden_dropout_prob=0.0).train()     # what is left is attention's
    assert not torch.equal(quiet(*batch), quiet(*batch))


# ---- the loader ---------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", [True, False])
def test_forms_of_a_checkpoint(folder, prefix):
    """Logits of a loaded checkpoint against those of the model that was saved: with and without
    `roberta.`, with keys that are ignored."""
    def edit(weights):
        found = {"lm_head.bias": torch.ones(3), "lm_head.dense.weight": torch.ones(2, 2)}
        for key, tensor in weights.items():
            found[key if prefix else key.removeprefix("roberta.")] = tensor
        start = "roberta." if prefix else ""
        found[f"{start}pooler.dense.weight"] = torch.ones(32, 32)
        found[f"{start}embeddings.position_ids"] = torch.arange(64)[None]
        return found

    rewrite(folder, edit)
    assert torch.equal(logits(load_roberta(folder, 2)), logits(tiny_model()))


def test_half_precision_is_widened(folder, tmp_path):
    """save_model, load_roberta, save_model: the same bytes. A float16 file gives float32 weights,
    equal to the rounded ones."""
    save_model(load_roberta(folder, 2), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    rewrite(folder, lambda weights: {k: t.half() for k, t in weights.items()})
    for a, b in zip(load_roberta(folder, 2).parameters(), tiny_model().parameters()):
        assert a.dtype == torch.float32 and torch.equal(a, b.half().float())


@pytest.mark.parametrize("head", [
    {}, {"classifier.dense.weight": (32, 32)},                                       # none, or half
    {"classifier.out_proj.weight": (5, 32), "classifier.out_proj.bias": (5,)},          # other size
    {"qa_outputs.weight": (2, 32), "qa_outputs.bias": (2,)},                    # question answering
    {"classifier.weight": (9, 32), "classifier.bias": (9,)}], ids=lambda h: ", ".join(h) or "none")
@pytest.mark.parametrize("prefix", [True, False])
def test_a_new_head(folder, head, prefix):
    """T8: without a whole head of this kind and size the encoder is the file's, and the head is as
    a fresh model's: normal of the config's deviation with zero biases, the same for a seed."""
    rewrite(folder, lambda w: {
        **{k if prefix else k.removeprefix("roberta."): t for k, t in w.items()
           if k.startswith("roberta.")}, **{k: torch.ones(shape) for k, shape in head.items()}})
    torch.manual_seed(5)
    model = load_roberta(folder, 2)
    for a, b in zip(model.roberta.parameters(), tiny_model().roberta.parameters()):
        assert torch.equal(a, b)
    found = model.classifier
    assert model.head != ITS_HEAD and not found.dense.bias.any() and not found.out_proj.bias.any()
    assert abs(found.dense.weight.std().item() - 0.1) < 0.01
    torch.manual_seed(5)
    assert torch.equal(load_roberta(folder, 2).classifier.dense.weight, found.dense.weight)


KEY = "roberta.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("edit, words", [
    (lambda w: {k: t for k, t in w.items() if k != KEY}, f"1 of 41 weights are missing, .* {KEY}"),
    (lambda w: {k.replace("roberta.", "bert."): t for k, t in w.items()}, "37 of 41 .* missing"),
    (lambda w: w.update({KEY: torch.ones(32, 63)}), rf"{KEY}' is \(32, 63\) .* \(32, 64\)"),
    (lambda w: w.update({KEY: torch.ones(32, 64, dtype=torch.int8)}), rf"{KEY}' .* torch.int8"),
    (lambda w: w.update({KEY.replace("1", "2"): torch.ones(32)}), "layer.2.* no such weight"),
    # as the first BERT files have them
    (lambda w: {k.replace("Norm.weight", "Norm.gamma"): t for k, t in w.items()}, "Norm.gamma")],
    ids=["missing", "bert", "shape", "quantized", "unknown", "another time"])
def test_wrong_weights_are_named(folder, edit, words):
    """A missing, misshapen or unknown weight: one line with file, key and shapes."""
    rewrite(folder, edit)
    with pytest.raises(DoRAError, match=words) as caught:
        load_roberta(folder, 2)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_there(folder):
    """A folder without weights or without anything, and files that git-lfs has not fetched."""
    with pytest.raises(data.DataError, match="nowhere/config.json"):
        load_roberta(folder / "nowhere", 2)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises((DoRAError, data.DataError), match=f"{name}.*git lfs pull"):
            load_roberta(folder, 2)
        if name == "model.safetensors":
            (folder / name).unlink()
            with pytest.raises(DoRAError, match=f"{folder}: no {name}"):
                load_roberta(folder, 2)
            save_model(tiny_model(), folder)


# ---- the labels of a checkpoint's head ----------------------------------------------------------

def with_config(folder, **fields):
    """Change fields of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


NLI3 = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}     # roberta-large-mnli's


@pytest.mark.parametrize("task, names, order", [
    ("rte", {"0": "entailment", "1": "not_entailment"}, [0, 1]),
    ("rte", {"0": "not_entailment", "1": "entailment"}, [1, 0]),
    ("rte", {"0": "Not Entailment", "1": "Entailment"}, [1, 0]),
    ("rte", {"0": "LABEL_0", "1": "LABEL_1"}, [0, 1]), ("rte", None, [0, 1]),
    ("cola", {"0": "1", "1": "0"}, [1, 0]), ("mnli", NLI3, [2, 1, 0]),
    # N6: the words of the Hub's data sets, as run_glue.py saves them
    ("mrpc", {"0": "not_equivalent", "1": "equivalent"}, [0, 1]),
    ("cola", {"0": "acceptable", "1": "unacceptable"}, [1, 0]),
    ("qqp", {"0": "not_duplicate", "1": "duplicate"}, [0, 1]),
    ("sst2", {"0": "NEGATIVE", "1": "POSITIVE"}, [0, 1]),
    ("wnli", {"0": "not_entailment", "1": "entailment"}, [0, 1])])
def test_the_order_of_labels(tmp_path, task, names, order):
    """T1: logits of a checkpoint are in the order of the task's labels, whatever its id2label's."""
    model = tiny_model(len(order))
    save_model(model, tmp_path)
    with_config(tmp_path, id2label=names)
    loaded = load_roberta(tmp_path, len(order), data.TASKS[task])
    assert torch.equal(logits(loaded), logits(model)[:, order]) and loaded.head == ITS_HEAD
    assert torch.equal(logits(load_roberta(tmp_path, len(order))), logits(model))


@pytest.mark.parametrize("task, classes, fields", [
    ("rte", 2, {"id2label": {"0": "negative", "1": "positive"}}),
    ("sst2", 2, {"id2label": {"0": "bad", "1": "good"}}),
    ("rte", 2, {"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}}),
    ("rte", 2, {"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}),
    ("rte", 2, {"finetuning_task": "qnli"}), ("stsb", 1, {}), ("stsb", 1, {"label_top": 4.0})])
def test_a_head_for_other_labels(tmp_path, task, classes, fields):
    """T1: a head of the right size for other labels, another task or another unit is not used, and
    the model says so (N6)."""
    save_model(tiny_model(classes), tmp_path)
    model = load_roberta(with_config(tmp_path, **fields), classes, data.TASKS[task])
    assert "the file's is for other labels" in model.head
    assert not model.classifier.out_proj.bias.any()


@pytest.mark.parametrize("task", ["cola", "rte", "mnli", "stsb"])
def test_a_saved_model_knows_its_task(tmp_path, task):
    """T1: save_model names task and labels: its head is loaded for that task, for no other."""
    task = data.TASKS[task]
    model = tiny_model(task.num_labels)
    save_model(model, tmp_path, task)
    loaded = load_roberta(tmp_path, task.num_labels, task)
    assert loaded.head == ITS_HEAD
    assert torch.equal(loaded.classifier.out_proj.weight, model.classifier.out_proj.weight)
    other = dataclasses.replace(task, name="mine")
    assert load_roberta(tmp_path, task.num_labels, other).head != ITS_HEAD


def test_the_dropout_of_the_head(folder):
    """T1: classifier_dropout is the head's dropout; without it the encoder's is."""
    assert load_roberta(folder, 2).classifier.dropout.p == 0.1
    assert load_roberta(with_config(folder, classifier_dropout=0.5), 2).classifier.dropout.p == 0.5
    assert load_roberta(with_config(folder, classifier_dropout=0), 2).classifier.dropout.p == 0
    assert load_roberta(folder, 2).roberta.embeddings.dropout.p == 0.1


# ---- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value", [
    ("hidden_size", None), ("layer_norm_eps", None),
    ("model_type", "bert"), ("hidden_act", "relu"), ("position_embedding_type", "relative_key"),
    ("is_decoder", True), ("add_cross_attention", True)])
def test_fields_that_are_not_robertas(folder, field, value):
    """A size that is not there (never roberta-base's instead) and another architecture: an error
    with file and field."""
    with_config(folder, **{field: value})
    with pytest.raises(DoRAError) as caught:
        load_roberta(folder, 2)
    assert str(folder / "config.json") in str(caught.value) and "\n" not in str(caught.value)
    assert field in str(caught.value)


# ---- numbers of the reference -------------------------------------------------------------------

@pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared/models")
def test_recorded_hidden_states():
    """The shared encoder's states of padded sentences against those that transformers computed
    (fixtures/record.py), to 1e-5."""
    recorded = json.loads((HERE / "fixtures" / "transformers.json").read_text())
    ids = torch.tensor(recorded["ids"])
    with torch.no_grad():
        states = load_roberta(MINILM, 2).eval().roberta(ids, ids != 1)
    for name, position in recorded["positions"].items():
        expected = torch.tensor(recorded["states"][name])           # (B, D) of one position
        torch.testing.assert_close(states[:, position], expected, rtol=0, atol=1e-5)

