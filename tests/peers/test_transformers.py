"""train_glue.py's RoBERTa against transformers', live: logits to 1e-5 on padded batches."""
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_model  # noqa: E402

from train_glue import load_roberta, save_model  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
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
def logits_close(ours, theirs, vocab, atol=1e-5):
    """Assert equal logits for padded batches."""
    for seed in range(2):
        ids, mask = batch(vocab, seed=seed)
        expected = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits
        assert expected.abs().max() > 1e-3                         # not all 0
        torch.testing.assert_close(ours.eval()(ids, mask), expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def base():
    """transformers' roberta-base in shape, with random weights and three classes."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
        num_labels=3, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    model = Theirs(config)
    for name, p in model.named_parameters():             # biases and LayerNorms are trivial else
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float("LayerNorm.weight" in name), std=0.05)
    return model


@pytest.mark.parametrize("form, prefix", [("safetensors", True), ("bin", False)])
def test_roberta_base_of_theirs(tmp_path, base, form, prefix):
    """A roberta-base-shaped checkpoint that transformers wrote, then in both formats, with and
    without the prefix."""
    base.save_pretrained(tmp_path)
    weights = {}
    for key, tensor in base.state_dict().items():
        key = key if prefix else key.removeprefix("roberta.")
        weights[key] = tensor
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    logits_close(load_roberta(tmp_path, 3), base, 50265)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_they_load_what_we_save(tmp_path, classes):
    """save_model's folder: config.json and weights are all that transformers asks for, no weight
    is missing or left over, and the logits are ours."""
    model = tiny_model(classes)
    save_model(model, tmp_path)
    theirs, info = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.num_labels == classes
    logits_close(model, theirs, 437)


def test_gradients(tmp_path):
    """Backward through both, without dropout: the gradient of every weight to 1e-5."""
    model = tiny_model(2)
    save_model(model, tmp_path)
    theirs = Theirs.from_pretrained(tmp_path).eval()
    ids, mask = batch(437)
    labels = torch.tensor([0, 1, 1, 0])
    torch.nn.functional.cross_entropy(model(ids, mask), labels).backward()
    theirs(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5)
