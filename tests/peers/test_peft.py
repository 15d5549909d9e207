"""dora.py's adapters of our RoBERTa in Hugging Face PEFT, and PEFT's adapters in ours."""
import re
import shutil

import peft
import pytest
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from small import EXACT, close, prune, randomize_trainable, refused
from tiny import files, run, tiny_model

import data
import train_glue
from dora import (DoRAConfig, DoRALinear, compact_, inject, load_adapter, merge_, read_safetensors,
                  save_adapter, write_safetensors)

LABELS = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a small RoBERTa with random weights, biases and LayerNorms, too."""
    folder = tmp_path_factory.mktemp("tiny")
    train_glue.save_model(tiny_model(LABELS), folder)
    return folder


def ours(folder):
    return train_glue.load_roberta(folder, LABELS).eval()


def theirs(folder):
    return transformers.RobertaForSequenceClassification.from_pretrained(
        folder, num_labels=LABELS, dtype=torch.float32).eval()


def logits(model):
    """Of any of the three kinds, ours, transformers', PEFT's, on padded ids."""
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(7))
    mask = torch.arange(12) < torch.tensor([12, 5, 9, 2])[:, None]
    ids = ids.masked_fill(~mask, 1)
    with torch.no_grad():
        if isinstance(model, train_glue.RobertaForSequenceClassification):
            return model.eval()(ids, mask)
        return model.eval()(input_ids=ids, attention_mask=mask.long()).logits


def pruned(folder):
    """Our RoBERTa, whose matrices kept 0 to 3 random components, and these ranks by name."""
    model = ours(folder)
    config = DoRAConfig(rank=1.5, start_rank=3, interval=1, budget_unit="components", **EXACT)
    layers = inject(model, config)
    model.classifier.requires_grad_(True)
    ranks = dict(zip(layers, [0, 1, 2, 3, 1, 2] * 2))
    scores = []
    for rank in ranks.values():
        scores += [2] * rank + [1] * (3 - rank)
    assert prune(layers, config, scores).ranks() == ranks
    return model, ranks


@pytest.mark.parametrize("compact", [False, True])
def test_peft_loads_our_adapter(tiny, tmp_path, compact):
    """PEFT on transformers' RoBERTa loads what we saved, with ranks 0 to 3 and with `output.dense`
    unlike `attention.output.dense`, and gives our logits to 1e-5; every matrix has its own rank."""
    model, ranks = pruned(tiny)
    expected = logits(model)
    if compact:
        compact_(model)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(theirs(tiny), tmp_path)
    close(logits(loaded), expected)
    assert (expected - logits(ours(tiny))).abs().max() > 1e-2  # the adapter does something
    found = {name.removeprefix("base_model.model."): module.r["default"]
             for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert found == {name: rank for name, rank in ranks.items() if rank}


def test_pefts_auto_class_loads_a_run(tmp_path, monkeypatch):
    """AutoPeftModelForSequenceClassification.from_pretrained(RUN/adapter) finds the base model by
    itself and gives the logits of the run's model; so does the Python that the card prints."""
    base = tmp_path / "base"  # an encoder without a head, as those that are published
    shutil.copytree(files()[1], base)
    weights = read_safetensors(base / "model.safetensors")
    write_safetensors(base / "model.safetensors", {
        name: weight.clone() for name, weight in weights.items() if "classifier" not in name})
    run(tmp_path / "out", model_dir=str(base))
    folder = tmp_path / "out" / "adapter"

    model = train_glue.load_roberta(base, 2).eval()
    load_adapter(model, folder)
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert loaded.peft_config["default"].base_model_name_or_path == str(base.resolve())
    close(logits(loaded), logits(model))
    names, card = {}, (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, names)  # scores the text "a sentence"
    ids = torch.tensor([data.encode_row(data.BPE(base), ["a sentence"], 48)])
    close(names["logits"], model(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert names["logits"].dtype == torch.float32


def test_our_merged_model_loads_in_transformers(tiny, tmp_path):
    """merge_ and train_glue.save_model, loaded by transformers: the same logits, no key missing.
    PEFT's merge_and_unload of the adapter gives the same weights."""
    model, _ = pruned(tiny)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", metadata={"epoch": 3})
    theirs_merged = PeftModel.from_pretrained(theirs(tiny), tmp_path / "adapter").merge_and_unload()
    train_glue.save_model(merge_(model), tmp_path)
    loaded, info = transformers.RobertaForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(logits(loaded), expected)
    close(logits(ours(tmp_path)), expected)
    for name, weight in theirs_merged.state_dict().items():
        if "classifier" not in name:
            torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]


def save_lora(folder, tmp_path, **config):
    """Save an adapter that PEFT made, with random components and a random head."""
    model = get_peft_model(theirs(folder), LoraConfig(modules_to_save=["classifier"], **config))
    randomize_trainable(model, 0.2)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("config", [
    dict(r=4, target_modules=["query", "value"]),
    dict(r=3, lora_alpha=7, target_modules=ALL, lora_dropout=0.2),
    dict(r=4, lora_alpha=6, target_modules=ALL,
         rank_pattern={"query": 2, "attention.output.dense": 1},
         alpha_pattern={"query": 3, "intermediate.dense": 9}),
    dict(r=4, lora_alpha=6, target_modules=ALL,
         rank_pattern={r"^roberta\.encoder\.layer\.0\..*": 2},
         alpha_pattern={r"layer\.1\.output\.dense": 3, "output.dense": 5, "^roberta": 9,
                        "dense": 7}),
    dict(r=2, target_modules=r".*layer\.1\..*(query|dense)", task_type="SEQ_CLS"),
    dict(r=2, target_modules=["query"], layers_to_transform=[1]),
    dict(r=2, target_modules="all-linear", exclude_modules=["key"])])
def test_we_load_pefts_adapters(tiny, tmp_path, config):
    """What PEFT's LoRA saved, patterns included, gives the logits that it gives in PEFT, to 1e-5
    (loaded: PEFT sorts the patterns when it saves them, and the first that fits counts)."""
    save_lora(tiny, tmp_path, **config)
    expected = logits(PeftModel.from_pretrained(theirs(tiny), tmp_path))
    model = ours(tiny)
    load_adapter(model, tmp_path)
    close(logits(model), expected)
    assert (expected - logits(ours(tiny))).abs().max() > 1e-2


REFUSED = [  # what PEFT saved, and what the message names
    (dict(use_dora=True), "use_dora"), (dict(use_rslora=True), "use_rslora"),
    (dict(bias="all"), "bias"), (dict(bias="lora_only"), "bias"),
    (dict(lora_bias=True), "lora_B.bias|lora_bias"),
    (dict(target_modules=["query", "word_embeddings"]), "word_embeddings"),
    (dict(trainable_token_indices=[3, 4]), "token"),
    # a start out of the base's weights, which the file does not hold: PEFT's own logits differ
    (dict(init_lora_weights="pissa"), "init_lora_weights"),
    (dict(init_lora_weights="olora"), "init_lora_weights")]


def test_refused_variants(tiny, tmp_path):
    """What PEFT saved with settings that Eq. 6 does not cover, and its AdaLoRA: refused by name."""
    model = ours(tiny)
    for i, (config, names) in enumerate(REFUSED):
        save_lora(tiny, tmp_path / str(i), **{"r": 2, "target_modules": ["query"], **config})
        refused(names, load_adapter, model, tmp_path / str(i))
    config = AdaLoraConfig(target_modules=["query"], total_step=10, tinit=1, tfinal=1)
    get_peft_model(theirs(tiny), config).save_pretrained(tmp_path / "adalora")
    refused("peft_type.*ADALORA", load_adapter, model, tmp_path / "adalora")
    assert not any(isinstance(m, DoRALinear) for m in model.modules())
