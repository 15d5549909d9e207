"""dora.py's adapters in PEFT, and PEFT's here, on models with unusual names, tied weights, running
statistics, and on transformers' RoBERTa, BERT, Llama and T5. (Our RoBERTa: test_peft.py.)"""
import functools

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from small import IDS, X, Tied, cfg, chain, close, fit, randomize_trainable, refused, reloads
from tiny import read_json
from torch import nn

from dora import METHODS, DoRAConfig, inject, load_adapter, read_safetensors


def both_load(model, make, folder, call=lambda model: model(X)):
    """Save; PEFT and load_adapter on new models give the outputs; so does merge_."""
    expected = call(model.eval())
    reloads(model, make, folder, call)
    close(call(PeftModel.from_pretrained(make().eval(), folder).eval()), expected)


class Named(nn.Module):
    """A matrix and a head at any names: attributes, made of dotted paths."""

    def __init__(self, matrix, head):
        super().__init__()
        torch.manual_seed(0)
        for name in (matrix, head):
            owner, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in owner._modules:
                    owner.add_module(part, nn.ModuleDict() if part == "heads" else nn.Module())
                owner = getattr(owner, part)
            owner.add_module(path[-1], nn.Linear(8, 8))
        self.names = matrix, head

    def forward(self, x):
        matrix, head = map(self.get_submodule, self.names)
        return head(torch.tanh(matrix(x)))


NAMES = [  # a matrix, a head, and how the file names the head
    ("block.out", "out", "base_model.model.out"),
    ("pre_classifier", "classifier", "base_model.model.classifier"),
    ("lora_A.up", "heads.a", "heads.a"),
    ("lora_A", "lora_B", "base_model.model.lora_B"),
    ("up", "base_layer", "base_model.model.base_layer"),
    ("weight.up", "bias", "bias"),
    ("a+b(c)[d]|e^$*?\\", "head", "head"),
    ("up", "a+b.(c)|d", "a+b"),
    ("é日本.up", "ñ", "ñ")]


@pytest.mark.parametrize("matrix, head, name", NAMES)
def test_odd_names(tmp_path, matrix, head, name):
    """Names that PEFT could confuse, or that are not ASCII: the outputs are PEFT's."""
    model = Named(matrix, head)
    layers = inject(model, cfg(matrix))
    model.get_submodule(head).requires_grad_(True)
    fit(model, layers)
    both_load(model, lambda: Named(matrix, head), tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["modules_to_save"] == [name]


def test_a_tied_weight_of_peft(tmp_path):
    """PEFT's adapter of a head that is tied to the embedding: its outputs, its embedding."""
    config = LoraConfig(r=2, target_modules=["mid"], modules_to_save=["proj"])
    reference = get_peft_model(Tied(), config)
    randomize_trainable(reference, 0.5)
    reference.save_pretrained(tmp_path)
    model = Tied()
    load_adapter(model, tmp_path)
    close(model(IDS), reference(IDS))
    assert torch.equal(model.emb.weight, Tied().emb.weight)


def test_our_tied_weight_in_peft(tmp_path):
    """Both modules that share a trained weight are saved, and PEFT's outputs equal."""
    model = Tied()
    layers = inject(model, cfg("mid"))
    model.proj.requires_grad_(True)
    fit(model, layers, loss=lambda model: (model(IDS) - 1).square().mean())
    both_load(model, Tied, tmp_path, lambda model: model(IDS))


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics(tmp_path, affine):
    """Statistics that moved go into the adapter with their module; the outputs are PEFT's."""
    def make():
        return chain(nn.Linear, nn.BatchNorm1d(8, affine=affine), nn.Linear, nn.Linear)

    model = make()
    layers = inject(model, cfg("2"))
    model[3].bias.requires_grad_(True)
    fit(model, layers)
    both_load(model, make, tmp_path)


SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24)
TOKENS = torch.arange(2, 26).view(2, 12)


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **SIZES))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0))


def seeded(new):
    torch.manual_seed(0)
    return new().eval()


def logits(model):
    decoder = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **decoder).logits


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = [  # method, targets, the head if it is new, and how many matrices that are
    (roberta, "paper", DoRAConfig().targets, "classifier", 12),
    (bert, "adalora", DoRAConfig().targets, "classifier", 12),
    (llama, "dora", LLAMA, None, 14),
    (t5, "dora", ("q", "k", "v", "o", "wi", "wo"), None, 32),  # its code reads wo.weight.dtype
    (t5, "dora", ("wo", "lm_head"), None, 5)]


@pytest.mark.parametrize("new, method, targets, head, number", MODELS)
def test_models_of_transformers(tmp_path, new, method, targets, head, number):
    """A run that prunes, saved: the outputs in PEFT, through load_adapter and merged equal."""
    make = functools.partial(seeded, new)
    model = make()
    layers = inject(model, cfg(*targets, **METHODS[method]))
    if head:
        model.get_submodule(head).requires_grad_(True)
    pruner, _ = fit(model, layers, loss=lambda model: logits(model).square().mean())
    assert len(layers) == number and pruner.live < len(pruner.mask)
    both_load(model, make, tmp_path, logits)
    assert model.state_dict().keys() == make().state_dict().keys()  # merged


def test_lora_on_the_head_of_peft(tmp_path):
    """PEFT's LoRA on lm_head, beside whose components it stores the frozen base: loaded here
    the outputs equal PEFT's. A model with another lm_head is refused by its name."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"])
    reference = get_peft_model(seeded(t5), config)
    randomize_trainable(reference, 0.5)
    reference.save_pretrained(tmp_path, save_embedding_layers=True)
    keys = read_safetensors(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in keys
    model = seeded(t5)
    load_adapter(model, tmp_path)
    close(logits(model), logits(reference.eval()))
    assert (logits(model) - logits(seeded(t5))).abs().max() > 1e-2
    refused(r"lm_head\.weight", load_adapter, t5(), tmp_path)
