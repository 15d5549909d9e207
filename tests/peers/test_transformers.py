"""train_glue.py's RoBERTa against transformers', live: logits to 1e-5 on padded batches."""
import pytest
import torch
import transformers
from tiny import tiny_model

from dora import write_safetensors
from train_glue import load_roberta, save_model

Theirs = transformers.RobertaForSequenceClassification


def batch(vocab, lengths=(37, 3, 20, 1), seed=0):
    """(ids, mask) of rows of these lengths, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (len(lengths), max(lengths)), generator=g)
    ids[:, 0] = 0
    for row, length in zip(ids, lengths):
        row[length:] = 1
    return ids, ids != 1


@torch.no_grad()
def logits_close(ours, theirs, vocab):
    """Assert equal logits for padded batches."""
    for seed in range(2):
        ids, mask = batch(vocab, seed=seed)
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits
        assert expected.abs().max() > 1e-3  # not all 0
        torch.testing.assert_close(ours.eval()(ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", [True, False])
def test_we_load_what_they_save(tmp_path, prefix):
    """A checkpoint by transformers in the base model's widths, with and without "roberta."."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
        num_hidden_layers=2, num_labels=3, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model = Theirs(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:  # biases and LayerNorms are trivial else
            torch.nn.init.normal_(p, mean=float("LayerNorm.weight" in name), std=0.05)
    model.save_pretrained(tmp_path)
    if not prefix:
        write_safetensors(tmp_path / "model.safetensors", {
            key.removeprefix("roberta."): tensor for key, tensor in model.state_dict().items()})
    logits_close(load_roberta(tmp_path, 3), model, 50265)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_they_load_what_we_save(tmp_path, classes):
    """save_model's folder: config.json and weights are all that transformers asks for, no weight
    is missing or left over, and the logits are ours. So is the gradient of every weight."""
    model = tiny_model(classes)
    save_model(model, tmp_path)
    theirs, info = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.num_labels == classes
    logits_close(model, theirs, 437)

    ids, mask = batch(437)
    model(ids, mask).sin().sum().backward()
    output = theirs(input_ids=ids, attention_mask=mask.long())
    output.logits.sin().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5)
