"""dora.py: merge_, save_adapter and load_adapter, without PEFT (with it: peers/test_peft.py)."""
import copy
import json
import os
import re

import pytest
import torch
from small import adapted, feed, inputs, net_config, plain, randomize, trained, untouched
from torch import nn

from dora import (
    METHODS, DoRALinear, Pruner, compact_, inject, load_adapter, merge_,
    read_safetensors, save_adapter, write_safetensors)

EXACT = dict(beta1=0.0, beta2=None)
SCORES = [0., 0, 9, 8, 7, 1, 0, 0, 6, 5, 4, 1]        # of two components a matrix; six are kept
RANKS = {"layer.0.query": 0, "layer.0.up": 2, "layer.0.down": 1,
         "layer.1.query": 0, "layer.1.up": 2, "layer.1.down": 1}


def pruned(dtype=torch.float64, **changes):
    """A model whose six matrices kept 0, 2, 1, 0, 2 and 1 random components."""
    config = net_config(rank=1, start_rank=2, interval=2, **EXACT, **changes)
    model, layers = adapted(config, dtype=dtype)
    pruner = Pruner(layers, config, 20)
    for _ in range(20):
        feed(pruner, SCORES)
    randomize(layers)
    for layer in layers.values():
        layer.c.data.mul_(layer.mask)
    assert pruner.ranks() == RANKS
    return model


def base_with(seed=0, dtype=torch.float64):
    """The base model with another, random head, as it is before an adapter is loaded."""
    model = plain(seed, dtype)
    torch.manual_seed(99)
    nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def folder(tmp_path):
    """A saved adapter of `pruned()`."""
    save_adapter(pruned(), tmp_path)
    return tmp_path


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def key(name, matrix):
    return f"base_model.model.{name}.lora_{matrix}.weight"


# ---- one function, four forms -------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_masked_compacted_merged_reloaded(method, tmp_path):
    """After a run of each method the masked model, the compacted, the merged, and the saved and
    reloaded one (saved from either form) give the same outputs to 1e-12."""
    rank = dict(rank=2) if method == "lora" else dict(rank=1, start_rank=2)
    model, _layers, _ = trained(net_config(**METHODS[method] | dict(rank, dropout=0.1)))
    x, expected = inputs(), model.eval()(inputs())
    assert (expected - plain()(x)).abs().max() > 1e-3
    compacted, merged = compact_(copy.deepcopy(model)), merge_(copy.deepcopy(model))
    save_adapter(model, tmp_path / "masked")
    save_adapter(compacted, tmp_path / "compacted")
    for other in (compacted, merged, merge_(copy.deepcopy(compacted))):
        torch.testing.assert_close(other.eval()(x), expected, rtol=0, atol=1e-12)
    for source in ("masked", "compacted"):
        loaded = base_with()
        load_adapter(loaded, tmp_path / source)
        torch.testing.assert_close(loaded.eval()(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(merge_(loaded)(x), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(m, DoRALinear) for m in merged.modules())
    assert merged.state_dict().keys() == plain().state_dict().keys()


def test_merge_by_hand():
    """A merged weight equals W0 + s sum c b a^T; the bias and the head stay; nothing of it
    trains."""
    model = pruned()
    layers = {name: model.get_submodule(name) for name in RANKS}
    expected = {name: layer.base.weight + layer.scale * sum(
        layer.c[i] * torch.outer(layer.B[:, i], layer.A[i]) for i in range(2))
        for name, layer in layers.items()}
    assert merge_(model) is model
    for name, weight in expected.items():
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear and not linear.weight.requires_grad
        torch.testing.assert_close(linear.weight, weight)
        assert torch.equal(linear.bias, plain().get_submodule(name).bias)


# ---- what is saved ------------------------------------------------------------------------------

def test_saved_files_by_hand(folder):
    """The two files hold what PEFT's format asks for: live rows of A, columns of B with c and the
    scale folded in, the head; and nothing else."""
    model = pruned()
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    live = [name for name, rank in RANKS.items() if rank]
    assert tensors.keys() == {key(name, m) for name in live for m in "AB"} | {
        "base_model.model.head.weight", "base_model.model.head.bias"}
    assert torch.equal(tensors["base_model.model.head.weight"], model.head.weight)
    for name in live:
        layer = model.get_submodule(name)
        kept = [i for i in range(2) if layer.mask[i]]
        for row, i in enumerate(kept):
            assert torch.equal(tensors[key(name, "A")][row], layer.A[i])
            torch.testing.assert_close(tensors[key(name, "B")][:, row],
                                       layer.scale * layer.c[i] * layer.B[:, i])
    config = config_of(folder)
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "use_dora": False,
                "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": ["head"]}
    assert {k: config[k] for k in expected} == expected
    pattern = {r"^layer\.0\.down$": 1, r"^layer\.1\.down$": 1}
    assert config["rank_pattern"] == config["alpha_pattern"] == pattern


def test_head_is_what_trains(tmp_path):
    """modules_to_save are the outermost modules all of whose parameters train; without a trained
    head it is null."""
    model = pruned()
    model.head.requires_grad_(False)
    save_adapter(model, tmp_path / "none")
    assert config_of(tmp_path / "none")["modules_to_save"] is None
    model.head = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).double()
    save_adapter(model, tmp_path / "two")
    assert config_of(tmp_path / "two")["modules_to_save"] == ["head"]
    model.head[0].requires_grad_(False)
    save_adapter(model, tmp_path / "part")
    assert config_of(tmp_path / "part")["modules_to_save"] == ["head.1"]


# ---- what is loaded -----------------------------------------------------------------------------

def test_load_returns_trainable_layers(folder):
    """The layers returned are those in the model, with their ranks; A, B and the head train, the
    base and c do not."""
    model = base_with()
    layers = load_adapter(model, folder)
    assert {n: layer.rank for n, layer in layers.items()} == {n: r for n, r in RANKS.items() if r}
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert type(model.layer[0].query) is nn.Linear
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{m}" for name in layers for m in "AB"} | {"head.weight", "head.bias"}


def test_save_load_save(folder, tmp_path):
    """A loaded adapter saved again has the same tensors, bit for bit."""
    model = base_with()
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "again")
    a, b = (read_safetensors(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


ALPHA_OF = [  # adapter_config.json of rank 2, and alpha / r of layer.0.up and layer.1.down
    (dict(r=2), (3, 3)), (dict(r=2, lora_alpha=6.5), (3.25, 3.25)),
    (dict(r=2, alpha_pattern={"up": 8}), (4, 3)), (dict(r=2, alpha_pattern={"0.up": 8}), (4, 3)),
    (dict(r=2, alpha_pattern={"0.up": 2, "up": 8}), (1, 3)),  # the first that fits
    (dict(r=2, alpha_pattern={r"^layer\.0\.up$": 8}), (4, 3)),
    (dict(r=2, alpha_pattern={r"layer\.\d\.(up|down)": 8}), (4, 4)),
    (dict(r=2, alpha_pattern={"p": 8, "layer.0": 8, "ayer.0.up": 8}), (3, 3)),
    (dict(r=2, alpha_pattern={"^layer": 8, "^up": 8, r"^layer\.0": 8}), (3, 3)),
    (dict(r=2, alpha_pattern={"^.*up": 8}), (4, 3)),
    (dict(r=7, rank_pattern={"up": 2, "down": 2}), (3, 3)),  # the rank of the tensors
    (dict(r=2, rank_pattern=None, alpha_pattern=None), (3, 3))]


def test_alpha_of_a_matrix(tmp_path):
    """A hand-made adapter of rank 2 on layer.0.up and layer.1.down: the update is alpha / r B A
    with the alpha that PEFT's rule gives, a regular expression for a whole dotted suffix of the
    name."""
    torch.manual_seed(0)
    shapes = {"layer.0.up": (8, 5), "layer.1.down": (5, 8)}
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        tensors[key(name, "A")] = torch.randn(2, d_in).double()
        tensors[key(name, "B")] = torch.randn(d_out, 2).double()
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    for config, scales in ALPHA_OF:
        (tmp_path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "lora_alpha": 6, **config}))
        for (name, layer), scale in zip(load_adapter(plain(), tmp_path).items(), scales):
            torch.testing.assert_close(layer.delta_weight(),
                                       scale * tensors[key(name, "B")] @ tensors[key(name, "A")])


# ---- what is refused ----------------------------------------------------------------------------

VARIANTS = [  # kinds of LoRA that Eq. 6 does not cover
    dict(use_dora=True), dict(use_rslora=True), dict(bias="lora_only"), dict(fan_in_fan_out=True),
    dict(peft_type="ADALORA"), dict(alora_invocation_tokens=[1, 2]),
    dict(init_lora_weights="pissa_niter_16"), dict(init_lora_weights="olora")]  # another base


def test_refused_configs(folder):
    """Another kind of LoRA is refused by field and value."""
    original = config_of(folder)
    for values in VARIANTS:
        (folder / "adapter_config.json").write_text(json.dumps({**original, **values}))
        (name, value), = values.items()
        says = f"adapter_config.json: {name} .*{re.escape(repr(value))}"
        untouched(says, load_adapter, base_with(), folder)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    return lambda tensors: tensors.update({name: value})


UP = "layer.1.up"
MISFITS = [  # tensors of another model, another task or another method, and half a pair
    (drop(key(UP, "B")), UP), (drop(key(UP, "A")), UP),
    (replace(key(UP, "A"), torch.ones(2, 6)), UP + r".*\(8, 5\)"),
    (replace(key(UP, "A"), torch.ones(3, 5)), UP), (replace(key(UP, "A"), torch.ones(0, 5)), UP),
    (replace(key(UP, "B"), torch.ones(7, 2)), UP), (replace(key(UP, "B"), torch.ones(2, 8)), UP),
    (replace(key("layer.7.up", "A"), torch.ones(2, 5)), "layer.7.up"),
    (replace("base_model.model.head.weight", torch.ones(3, 5)), r"head\.weight.*\(3, 5\)"),
    (replace("base_model.model.head.out", torch.ones(3)), "head.out"),
    (replace("base_model.model.layer.0.up.lora_B.bias", torch.ones(8)), "lora_B.bias"),
    (replace("base_model.model.layer.0.up.lora_embedding_A", torch.ones(2, 8)), "lora_embedding"),
    (lambda tensors: [tensors.pop(k) for k in [*tensors] if "lora" in k], "lora_A")]


def test_refused_tensors(folder):
    """Each is refused by the tensor's name and shapes."""
    path = folder / "adapter_model.safetensors"
    good = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    for edit, names in MISFITS:
        tensors = dict(good)
        edit(tensors)
        write_safetensors(path, tensors)
        untouched(names, load_adapter, base_with(), folder)


def test_the_files_of_two_saves(tmp_path):
    """A save that broke off between its two files leaves the tensors of one adapter beside the
    ranks and scales of another: refused."""
    for rank in (1, 2):
        save_adapter(trained(net_config(rank=rank, start_rank=3))[0], tmp_path / str(rank))
    path = tmp_path / "1" / "adapter_model.safetensors"
    path.write_bytes((tmp_path / "2" / "adapter_model.safetensors").read_bytes())
    untouched(r"layer\.\d\.", load_adapter, base_with(), tmp_path / "1")


def test_a_model_that_the_adapter_does_not_fit(folder):
    """A base of another width, with fewer layers, and a model that has an adapter already."""
    untouched(r"layer\.0\.", load_adapter, plain(d=6), folder)
    untouched(r"layer\.1\.", load_adapter, plain(blocks=1), folder)
    loaded = base_with()
    load_adapter(loaded, folder)
    untouched("already", load_adapter, loaded, folder)
    untouched("already", inject, loaded, net_config())
