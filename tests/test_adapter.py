"""dora.py: merge_, save_adapter and load_adapter, without PEFT (with it: peers/test_peft.py)."""
import copy
import json
import os
import re

import pytest
import torch
from small import (
    EXACT, adapted, close, inputs, net_config, numbers, plain, prune, trained, untouched)
from torch import nn

from dora import (
    METHODS, compact_, load_adapter, merge_, read_safetensors, save_adapter, write_safetensors)

SCORES = numbers("0 0 9 8 7 1 0 0 6 5 4 1")  # of two components per matrix; six are kept
RANKS = {"layer.0.query": 0, "layer.0.up": 2, "layer.0.down": 1,
         "layer.1.query": 0, "layer.1.up": 2, "layer.1.down": 1}
LIVE = {name: rank for name, rank in RANKS.items() if rank}


def pruned():
    """A model whose six matrices kept 0, 2, 1, 0, 2 and 1 random components."""
    config = net_config(rank=1, start_rank=2, interval=2, dropout=0.25, **EXACT)
    model, layers = adapted(config)
    assert prune(layers, config, SCORES).ranks() == RANKS
    return model


@pytest.fixture
def folder(tmp_path):
    """A saved adapter of `pruned()`."""
    save_adapter(pruned(), tmp_path)
    return tmp_path


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return read_safetensors(folder / "adapter_model.safetensors")


def key(name, matrix):
    return f"base_model.model.{name}.lora_{matrix}.weight"


@pytest.mark.parametrize("method", METHODS)
def test_masked_compacted_merged_reloaded(method, tmp_path):
    """After a run of each method the masked model, the compacted, the merged, and the saved and
    reloaded one (saved from either form) give the same outputs to 1e-12."""
    masked = trained(net_config(**METHODS[method], rank=1)).model
    x = inputs()
    expected = masked.eval()(x)
    assert (expected - plain()(x)).abs().max() > 1e-3
    compacted, models = compact_(copy.deepcopy(masked)), []
    for source in (masked, compacted):
        save_adapter(source, tmp_path)
        loaded = plain()
        load_adapter(loaded, tmp_path)
        merged = merge_(copy.deepcopy(source))
        assert merged.state_dict().keys() == plain().state_dict().keys()
        models += [source, merged, loaded, merge_(copy.deepcopy(loaded))]
    for other in models:
        torch.testing.assert_close(other.eval()(x), expected, rtol=0, atol=1e-12)


def test_merge_by_hand():
    """A merged weight equals W0 + s sum c b a^T; the bias stays; nothing of it trains."""
    model = pruned()
    layers = {name: model.get_submodule(name) for name in RANKS}
    assert merge_(model) is model
    for name, layer in layers.items():
        parts = zip(layer.A, layer.B.T, layer.c)
        update = sum(c * torch.outer(b, a) for a, b, c in parts)
        merged = model.get_submodule(name)
        assert type(merged) is nn.Linear and not merged.weight.requires_grad
        close(merged.weight, layer.base.weight + layer.scale * update, 1e-12)
        assert merged.bias.equal(plain().get_submodule(name).bias)


def test_saved_files_by_hand(folder):
    """The two files hold live rows of A, columns of B with c and scale in them, and the head."""
    model = pruned()
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = tensors_of(folder)
    assert len(tensors) == 2 * len(LIVE) + 2
    for leaf, p in model.head.named_parameters():
        assert tensors[f"base_model.model.head.{leaf}"].equal(p)
    for name in LIVE:
        layer, B = model.get_submodule(name), tensors[key(name, "B")]
        kept = [i for i in range(2) if layer.mask[i]]
        assert tensors[key(name, "A")].equal(layer.A[kept])
        for column, i in zip(B.T, kept, strict=True):
            close(column, layer.scale * layer.c[i] * layer.B[:, i], 1e-12)

    pattern = {r"^layer\.0\.down$": 1, r"^layer\.1\.down$": 1}
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "use_dora": False,
                "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": ["head"],
                "lora_dropout": 0.25,
                "rank_pattern": pattern, "alpha_pattern": pattern}
    assert config_of(folder).items() >= expected.items()


def test_loaded_layers(folder, tmp_path):
    """The layers returned are those in the model, with their ranks and dropout; A, B and the head
    train, the base and c do not. Saved again, they have the same tensors, bit for bit."""
    model = plain()
    layers = load_adapter(model, folder)
    assert {name: layer.rank for name, layer in layers.items()} == LIVE
    assert layers["layer.0.up"].dropout.p == 0.25
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert type(model.layer[0].query) is nn.Linear
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{m}" for name in layers for m in "AB"} | {"head.weight", "head.bias"}

    save_adapter(model, tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.equal(after[name])


ALPHA_PATTERNS = [  # and alpha / 2 of layer.0.up and layer.1.down, where lora_alpha is 6
    ({}, 3, 3),
    ({"up": 8}, 4, 3),
    ({"0.up": 2, "up": 8}, 1, 3),  # the first that fits
    ({r"^layer\.0\.up$": 8}, 4, 3),
    ({r"layer\.\d\.(up|down)": 8}, 4, 4),
    ({"p": 8, "layer.0": 8, "ayer.0.up": 8, "^up": 8}, 3, 3),
    ({"^.*up": 8}, 4, 3),
]


def test_alpha_of_a_matrix(tmp_path):
    """A hand-made adapter of rank 2 on layer.0.up and layer.1.down: the update is alpha / r B A
    with the alpha of PEFT's rule, a regular expression for a whole dotted suffix of the name."""
    up = torch.randn(2, 5).double()
    down = torch.randn(2, 8).double()
    tensors = {key("layer.0.up", "A"): up, key("layer.0.up", "B"): down.T,
               key("layer.1.down", "A"): down, key("layer.1.down", "B"): up.T}
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    for pattern, first, second in ALPHA_PATTERNS:
        config = {"peft_type": "LORA", "r": 7, "lora_alpha": 6, "alpha_pattern": pattern,
                  "rank_pattern": {"up": 2, "down": 2}, "fan_in_fan_out": True}  # see test_gpt2
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        layers = load_adapter(plain(), tmp_path)
        close(layers["layer.0.up"].delta_weight(), first * down.T @ up, 1e-12)
        close(layers["layer.1.down"].delta_weight(), second * up.T @ down, 1e-12)


VARIANTS = dict(  # kinds of LoRA that Eq. 6 does not cover
    use_dora=True, use_rslora=True, bias="lora_only", peft_type="ADALORA",
    alora_invocation_tokens=[1, 2], init_lora_weights="pissa_niter_16")  # another base


def test_refused_configs(folder):
    """Another kind of LoRA is refused by field and value. So is a file without an alpha."""
    original = config_of(folder)
    for name, value in VARIANTS.items():
        config = {**original, name: value}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        untouched(f"{name} .*{re.escape(repr(value))}", load_adapter, plain(), folder)
    config = {name: original[name] for name in original if "alpha" not in name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    untouched("alpha = None", load_adapter, plain(), folder)


UP = "layer.1.up"
MISFITS = [  # half a pair, and tensors of another model, another task or another method
    (key(UP, "B"), None, UP),
    (key(UP, "A"), (2, 6), UP + r".*\(8, 5\)"),
    (key(UP, "A"), (3, 5), UP),
    (key("layer.7.up", "A"), (2, 5), "layer.7.up"),
    ("base_model.model.head.weight", (3, 5), r"head\.weight.*\(3, 5\)"),
    ("base_model.model.head.out", (3,), "head.out"),
    ("base_model.model.layer.0.up.lora_B.bias", (8,), "lora_B.bias"),
]


def test_refused_tensors(folder):
    """One tensor is left out (None) or has another shape: refused by its name and shapes. So is a
    file that has no component at all, and a model of another size or with an adapter."""
    untouched(r"layer\.0\.", load_adapter, plain(d=6), folder)
    untouched(r"layer\.1\.", load_adapter, plain(blocks=1), folder)
    untouched("already", load_adapter, pruned(), folder)
    path = folder / "adapter_model.safetensors"
    good = {name: tensor.clone() for name, tensor in tensors_of(folder).items()}
    for name, shape, says in MISFITS:
        tensors = {**good, name: torch.ones(shape or ())}
        if shape is None:
            del tensors[name]
        write_safetensors(path, tensors)
        untouched(says, load_adapter, plain(), folder)
    write_safetensors(path, {name: t for name, t in good.items() if "lora" not in name})
    untouched("lora_A", load_adapter, plain(), folder)


def test_the_files_of_two_saves(tmp_path):
    """A save that broke off leaves one adapter's tensors beside another's ranks: refused."""
    for rank in (1, 2):
        model = trained(net_config(rank=rank, start_rank=3)).model
        save_adapter(model, tmp_path / str(rank))
    path = tmp_path / "1" / "adapter_model.safetensors"
    path.write_bytes((tmp_path / "2" / "adapter_model.safetensors").read_bytes())
    untouched(r"layer\.\d\.", load_adapter, plain(), tmp_path / "1")
