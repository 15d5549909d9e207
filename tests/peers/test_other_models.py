"""dora.py's adapters in PEFT, and PEFT's here, on models with unusual names, tied weights, running
statistics, and on T5. (RoBERTa, BERT, Llama: test_peft.py.)"""
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import X, cfg, chain, close, fit  # noqa: E402
from test_models import IDS, Tied  # noqa: E402

from dora import (  # noqa: E402
    Pruner, inject, load_adapter, merge_, read_safetensors, save_adapter)

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in (
    "FutureWarning", "RuntimeWarning", "UserWarning")]
transformers.utils.logging.set_verbosity_error()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def both_load(model, make, folder, call=lambda model: model(X)):
    """Save; PEFT and load_adapter on new models give the outputs; so does merge_."""
    expected = call(model.eval())
    save_adapter(model, folder)
    assert (call(make().eval()) - expected).abs().max() > 1e-3
    close(call(PeftModel.from_pretrained(make().eval(), folder).eval()), expected)
    ours = make().eval()
    load_adapter(ours, folder)
    close(call(ours.eval()), expected)
    close(call(merge_(model)), expected)


def train(model, config, call, unfreeze=(), steps=10):
    """A short run that prunes, whose loss is the mean square of what call returns."""
    torch.manual_seed(3)
    layers = inject(model, config)
    for name in unfreeze:
        model.get_submodule(name).requires_grad_(True)
    pruner = Pruner(layers, config, steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (call(model).square().mean() + pruner.penalty()).backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
    return layers


# ---- names, ties, statistics ---------------------------------------------------------------------

class Named(nn.Module):
    """A matrix and a head at any names: attributes, made of dotted paths."""

    def __init__(self, matrix, head):
        super().__init__()
        torch.manual_seed(0)
        for name in (matrix, head):
            owner, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.add_module(path[-1], nn.Linear(8, 8))
        self.names = matrix, head

    def forward(self, x):
        matrix, head = map(self.get_submodule, self.names)
        return head(torch.tanh(matrix(x)))


NAMES = [  # a matrix, a head, and how the file names the head
    ("block.out", "out", "base_model.model.out"), ("up", "out", "base_model.model.out"),
    ("block.classifier", "classifier", "base_model.model.classifier"),
    ("pre_classifier", "classifier", "base_model.model.classifier"),
    ("up", "dropout", "base_model.model.dropout"), ("a.t", "t", "base_model.model.t"),
    ("lora_block.up", "head", "head"), ("lora_A.up", "head", "head"), ("x.lora_B", "head", "head"),
    ("up", "lora_head", "lora_head"), ("a+b(c)[d]|e^$*?\\", "head", "head"),
    ("up", "a+b.(c)|d", "a+b"), ("default.up", "head", "head"), ("é日本.up", "ñ", "ñ"),
    ("lora_A", "lora_B", "base_model.model.lora_B"), ("weight.up", "bias", "bias"),
    ("up", "base_layer", "base_model.model.base_layer"),
    ("m" * 3000 + ".up", "h" * 3000, "h" * 3000)]


@pytest.mark.parametrize("matrix, head, name", NAMES)
def test_odd_names(tmp_path, matrix, head, name):
    """Names that are PEFT's own words, end like its modules or like other modules, hold characters
    of regular expressions, are not ASCII or very long: PEFT's outputs equal. A head whose name is
    the end of another one is written with PEFT's prefix."""
    def make():
        return Named(matrix, head)

    model, config = make(), cfg(matrix)
    layers = inject(model, config)
    model.get_submodule(head).requires_grad_(True)
    fit(model, config, layers)
    both_load(model, make, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == [name]


def test_a_tied_weight_of_peft(tmp_path):
    """PEFT's adapter with modules_to_save=["proj"], which is tied to the embedding: our outputs
    equal PEFT's, and the embedding is as it was."""
    reference = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["mid"],
                                                  modules_to_save=["proj"]))
    torch.manual_seed(5)
    for p in reference.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    reference.save_pretrained(tmp_path)
    model = Tied()
    load_adapter(model, tmp_path)
    close(model(IDS), reference(IDS))
    assert torch.equal(model.emb.weight, Tied().emb.weight)


def test_our_tied_weight_in_peft(tmp_path):
    """Both modules that share a trained weight are saved, and PEFT's outputs equal."""
    model = Tied()
    train(model, cfg("mid"), lambda model: model(IDS) - 1, ["proj"])
    both_load(model, Tied, tmp_path, lambda model: model(IDS))


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics(tmp_path, affine):
    """Statistics that moved go into the adapter with their module, and so does a module of which
    only the bias trained; PEFT's outputs equal."""
    def make():
        return chain(nn.Linear, nn.BatchNorm1d(8, affine=affine), nn.Linear, nn.Linear)

    model, config = make(), cfg("2")
    layers = inject(model, config)
    model[3].bias.requires_grad_(True)
    fit(model, config, layers)
    both_load(model, make, tmp_path)


# ---- transformers --------------------------------------------------------------------------------

TOKENS = torch.arange(2, 26).view(2, 12)


def logits(model):
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits


def new_t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        dropout_rate=0.0)).eval()


@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "wi", "wo"), ("wo", "lm_head")])
def test_t5(tmp_path, targets):
    """T5 with all its matrices, whose code reads wo.weight.dtype, and with its head: a run,
    saved; the outputs in PEFT, through load_adapter and merged equal."""
    model = new_t5()
    layers = train(model, cfg(*targets), logits)
    assert len(layers) == (32 if "q" in targets else 5)
    both_load(model, new_t5, tmp_path, logits)


def test_lora_on_the_head_of_peft(tmp_path):
    """PEFT's LoRA on lm_head, beside whose components it stores the frozen base: loaded here
    the outputs equal PEFT's."""
    reference = get_peft_model(new_t5(), LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"]))
    torch.manual_seed(5)
    for name, p in reference.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.5)
    reference.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = read_safetensors(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in keys
    model = new_t5()
    load_adapter(model, tmp_path)
    close(logits(model), logits(reference.eval()))
    both = [name for name in keys if "lora_" not in name]
    assert both and (logits(model) - logits(new_t5())).abs().max() > 1e-2
