"""dora.py: merge_, save_adapter and load_adapter, without PEFT (with it: peers/test_peft.py)."""
import copy
import json
import os

import pytest
import torch
from small import adapted, feed, inputs, plain, randomize, net_config, trained, trainer
from torch import nn

from dora import (
    METHODS,
    DoRAError,
    DoRALinear,
    Pruner,
    compact_,
    fingerprint,
    inject,
    load_adapter,
    merge_,
    read_safetensors,
    save_adapter,
    write_safetensors,
)

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


def change(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps({**config_of(folder), **values}))


def change_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    edit(tensors)
    write_safetensors(path, tensors)


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


def test_merge_in_half_precision():
    """Over a bfloat16 base the sum is made in float32 and rounded once."""
    config = net_config(rank=3, importance=None, schedule=None)
    model, layers = adapted(config, dtype=torch.bfloat16)
    randomize(layers)
    expected = {name: (layer.base.weight.float() + layer.delta_weight()).bfloat16()
                for name, layer in layers.items()}
    merge_(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight)


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


def test_a_new_save_replaces_the_old(tmp_path):
    """Saving into a folder that holds an adapter replaces both files; a missing folder is made."""
    save_adapter(pruned(), tmp_path / "a" / "b")
    model = trained(net_config(rank=2, start_rank=2))[0]
    save_adapter(model, tmp_path / "a" / "b")
    loaded = base_with()
    load_adapter(loaded, tmp_path / "a" / "b")
    torch.testing.assert_close(loaded.eval()(inputs()), model(inputs()))
    assert len(os.listdir(tmp_path / "a" / "b")) == 2


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


def test_saving_before_the_budget(tmp_path):
    """No pruner.step(), a run that ended too early, a merged and a plain model: each is an error
    that says which, and no file is written."""
    config = net_config(rank=1, start_rank=2)
    model, layers = adapted(config)
    with pytest.raises(DoRAError, match=r"no Pruner has run.*observe.*step"):
        save_adapter(model, tmp_path / "x")
    _, step = trainer(model, Pruner(layers, config, 40))
    for _ in range(9):
        step()
    with pytest.raises(DoRAError, match=r"step 9 of 40.*last pruning at step 20"):
        save_adapter(model, tmp_path / "x")
    for plain_model in (merge_(pruned()), plain()):
        with pytest.raises(DoRAError, match=r"no DoRALinear.*before merge_"):
            save_adapter(plain_model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_saving_with_a_gate_that_momentum_opened(tmp_path):
    """Saved between optimizer.step() and pruner.step(): an error that says so."""
    model = pruned()
    model.layer[0].query.c.data[0] = 0.5
    with pytest.raises(DoRAError, match=r"layer\.0\.query.*not 0.*pruner\.step\(\)"):
        save_adapter(model, tmp_path)


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


def test_loading_in_float32(folder):
    """The float64 adapter on a float32 base: outputs to 1e-5."""
    model = base_with(dtype=torch.float32)
    load_adapter(model, folder)
    expected = pruned()(inputs()).float()
    torch.testing.assert_close(model.eval()(inputs(dtype=torch.float32)), expected,
                               rtol=1e-5, atol=1e-5)


def handmade(tmp_path, tensors, **config):
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return tmp_path


@pytest.mark.parametrize("config, scales", [
    (dict(r=2, lora_alpha=6), (3, 3)),
    (dict(r=2, lora_alpha=6.5), (3.25, 3.25)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"up": 8}), (4, 3)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"0.up": 8}), (4, 3)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"0.up": 2, "up": 8}), (1, 3)),   # the first that fits
    (dict(r=2, lora_alpha=6, alpha_pattern={r"^layer\.0\.up$": 8}), (4, 3)),
    (dict(r=2, lora_alpha=6, alpha_pattern={r"layer\.\d\.(up|down)": 8}), (4, 4)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"p": 8, "layer.0": 8, "ayer.0.up": 8}), (3, 3)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"^layer": 8, "^up": 8, r"^layer\.0": 8}), (3, 3)),
    (dict(r=2, lora_alpha=6, alpha_pattern={"^.*up": 8}), (4, 3)),
    (dict(r=7, lora_alpha=6, rank_pattern={"up": 2, "down": 2}), (3, 3)),   # the tensors' rank
    (dict(r=2, lora_alpha=6, rank_pattern=None, alpha_pattern=None), (3, 3)),
])
def test_alpha_of_a_matrix(tmp_path, config, scales):
    """A hand-made adapter of rank 2 on layer.0.up and layer.1.down: the update is alpha / r B A
    with the alpha that PEFT's rule gives, a regular expression for a whole dotted suffix of the
    name."""
    torch.manual_seed(0)
    shapes = {"layer.0.up": (8, 5), "layer.1.down": (5, 8)}
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        tensors[key(name, "A")] = torch.randn(2, d_in).double()
        tensors[key(name, "B")] = torch.randn(d_out, 2).double()
    model = plain()
    layers = load_adapter(model, handmade(tmp_path, tensors, **config))
    for (name, layer), scale in zip(layers.items(), scales, strict=True):
        torch.testing.assert_close(layer.delta_weight(),
                                   scale * tensors[key(name, "B")] @ tensors[key(name, "A")])


# ---- what is refused ----------------------------------------------------------------------------

def snapshot(model):
    """All that a refused load must leave alone."""
    return ({k: v.clone() for k, v in model.state_dict().items()},
            [(n, type(m)) for n, m in model.named_modules()],
            [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()])


def refuses(model, folder, says):
    """load_adapter raises a one-line DoRAError that matches, and the model is as it was."""
    weights, modules, params = snapshot(model)
    with pytest.raises(DoRAError, match=says) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    after = snapshot(model)
    assert (modules, params) == after[1:]
    assert all(torch.equal(weights[k], after[0][k]) for k in weights)


@pytest.mark.parametrize("values, says", [
    (dict(use_dora=True), "use_dora"), (dict(use_rslora=True), "use_rslora"),
    (dict(bias="all"), "bias.*'all'"), (dict(bias="lora_only"), "bias.*lora_only"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"),
    (dict(peft_type="ADALORA"), "peft_type.*ADALORA"), (dict(peft_type=None), "peft_type"),
    (dict(init_lora_weights="pissa_niter_16"), "init_lora_weights.*pissa"),   # starts that changed
    (dict(init_lora_weights="olora"), "init_lora_weights.*olora"),            # the base's weights
    (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    (dict(lora_alpha=None), "lora_alpha"), (dict(lora_alpha="8"), "lora_alpha"),
    (dict(lora_alpha=0), "lora_alpha"), (dict(lora_alpha=-1), "lora_alpha"),
    (dict(lora_alpha=float("nan")), "lora_alpha"), (dict(lora_alpha=float("inf")), "lora_alpha"),
    (dict(lora_alpha=True), "lora_alpha"), (dict(lora_alpha=10**400), "lora_alpha"),
    (dict(alpha_pattern={"up": None}), "alpha"), (dict(alpha_pattern={"up": [8]}), "alpha"),
    (dict(alpha_pattern=[1]), "alpha_pattern|JSON"),
    (dict(alpha_pattern="up"), "alpha_pattern|JSON"),
    (dict(alpha_pattern={"(": 3}), "alpha_pattern|JSON"),
    (dict(alpha_pattern={"(?i)up": 3}), "alpha_pattern|JSON"),
    (dict(alpha_pattern={"a{9999999999}": 3}), "alpha_pattern|JSON"),     # OverflowError of re
    (dict(bias="x" * 10**6), "bias is 'xxx.{0,99}only plain LoRA"),
])
def test_refused_configs(folder, values, says):
    """A variant of LoRA that Eq. 6 does not cover, or an absurd value, is refused by its name."""
    change(folder, **values)
    refuses(base_with(), folder, says)


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"7", b'"LORA"', b"\xff\xfe", b"[" * 100_000, b"{}{}",
    b'{"lora_alpha": ' + b"9" * 10_000 + b"}"])
def test_a_broken_config(folder, text):
    """adapter_config.json that is no JSON object: one line that names the file."""
    (folder / "adapter_config.json").write_bytes(text)
    refuses(base_with(), folder, "adapter_config.json")


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize("edit, says", [
    (drop(key("layer.0.up", "B")), r"layer\.0\.up"),
    (drop(key("layer.1.down", "A")), r"layer\.1\.down"),
    (replace(key("layer.1.up", "A"), torch.ones(2, 6)), r"layer\.1\.up.*\(8, 5\)"),
    (replace(key("layer.1.up", "A"), torch.ones(3, 5)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "A"), torch.ones(2, 5, 1)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "A"), torch.ones(5)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "A"), torch.tensor(1.0)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "A"), torch.ones(0, 5)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "B"), torch.ones(7, 2)), r"layer\.1\.up"),
    (replace(key("layer.1.up", "B"), torch.ones(2, 8)), r"layer\.1\.up"),
    (replace(key("layer.7.up", "B"), torch.ones(8, 2)), r"layer\.7\.up.*another base"),
    (replace(key("layer.1", "A"), torch.ones(2, 5)), r"layer\.1"),
    (replace("base_model.model.head.weight", torch.ones(3, 5)), r"head\.weight.*\(3, 5\)"),
    (replace("base_model.model.head.out", torch.ones(3)), r"head\.out"),
    (replace("base_model.model.layer.0.up.lora_B.bias", torch.ones(8)), r"lora_B\.bias"),
    (replace("base_model.model.layer.0.up.lora_magnitude_vector", torch.ones(8)), "lora_magnitude"),
    (replace("base_model.model.layer.0.up.lora_embedding_A", torch.ones(2, 8)), "lora_embedding"),
    (replace("head.weight", torch.ones(2, 5)), "'head.weight'.*names in a PEFT adapter start with"),
    (replace("base_model.model.a\nb", torch.ones(2)), r"a\\nb"),           # the message: one line
    (replace("base_model.model.a\nb.lora_A.weight", torch.ones(2)), r"a\\nb"),
    (replace(f"base_model.model.{'x' * 10**6}", torch.ones(2)), "^.{1,400}$"),
])
def test_refused_tensors(folder, edit, says):
    """Tensors of another model or another task, half a pair, odd shapes: refused by their name."""
    change_tensors(folder, edit)
    refuses(base_with(), folder, says)


def test_a_parameter_of_the_root(tmp_path):
    """A parameter that belongs to the model itself is loaded and trains, and nothing else does."""
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gain = nn.Linear(5, 8), nn.Parameter(torch.ones(8))

    tensors = {key("up", "A"): torch.ones(2, 5), key("up", "B"): torch.ones(8, 2),
               "base_model.model.gain": torch.full((8,), 2.0)}
    model = Root()
    load_adapter(model, handmade(tmp_path, tensors, r=2, lora_alpha=2))
    assert model.gain.eq(2).all()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["gain", "up.A", "up.B"]


def test_a_matrix_of_rank_0(folder):
    """lora_A (0, d_in) and lora_B (d_out, 0) fit together, and are refused all the same."""
    change_tensors(folder, lambda tensors: tensors.update({
        key("layer.1.up", "A"): torch.ones(0, 5), key("layer.1.up", "B"): torch.ones(8, 0)}))
    refuses(base_with(), folder, r"layer\.1\.up")


def test_no_components_in_the_file(folder):
    """A file with the head alone is refused."""
    change_tensors(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if "lora" in k])
    refuses(base_with(), folder, "no lora_A and lora_B")


def test_broken_tensors(folder):
    """A truncated adapter_model.safetensors is refused by name."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    refuses(base_with(), folder, "adapter_model.safetensors")


def test_missing_files(folder):
    """A missing file is an OSError that names it."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        with pytest.raises(OSError) as error:
            load_adapter(base_with(), folder)
        assert str(error.value.filename).endswith(name)


def test_another_base_model(folder):
    """A base of another width, with fewer layers, and a model that has an adapter already."""
    refuses(plain(d=6), folder, r"another base model")
    refuses(plain(blocks=1), folder, r"layer\.1\.")
    loaded = base_with()
    load_adapter(loaded, folder)
    refuses(loaded, folder, r"adapted already")
    with pytest.raises(DoRAError, match="adapted already"):
        inject(loaded, net_config())


def test_another_base_model_of_the_same_shapes(folder):
    """Other weights in the same shapes are refused and left alone, also where only one matrix is
    another; the same weights rounded to half precision are the same base, and a file without our
    mark (PEFT's own) goes on any."""
    refuses(plain(seed=1), folder, r"other weights of the same shapes.*base model")
    other = base_with()
    other.layer[1].up.weight.data.neg_()
    refuses(other, folder, r"adapter_model\.safetensors: was trained on other weights")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert len(load_adapter(base_with(dtype=dtype), folder)) == 4
    tiny = torch.tensor([1e-9, -1e-9, 1.0])             # float16 has 0 and -0 for the first two
    assert fingerprint([tiny]) == fingerprint([tiny.half()]) != fingerprint([-tiny])
    path = folder / "adapter_model.safetensors"
    write_safetensors(path, {k: t.clone() for k, t in read_safetensors(path).items()})
    assert len(load_adapter(plain(seed=1), folder)) == 4
