"""dora.py: what a component is worth (Eq. 7, Eq. 8, sensitivity, AdaLoRA's triplet), the
penalties."""
import json
from pathlib import Path

import pytest
import torch
from fixtures.record_peft import INTERVAL, R_PRIME, SHAPES, T_F, T_I, R, T, fed
from small import adapted, feed, gates, inputs, randomize, net_config
from torch import nn

from dora import (
    IMPORTANCE, METHODS, DoRAError, DoRALinear, Pruner, dem_penalty, norm_score,
    sensitivity)

RECORDED = Path(__file__).parent / "fixtures/peft.json"


def one(A, B, c, **changes):
    """A layer with these rows of A (r', d_in), columns of B (r', d_out) and gates."""
    A, B, c = (torch.as_tensor(v, dtype=torch.float64) for v in (A, B, c))
    layer = DoRALinear(nn.Linear(A.shape[1], B.shape[1]).double(),
                       net_config(rank=len(c), start_rank=len(c), **changes))
    layer.A.data, layer.B.data, layer.c.data = A, B.T.contiguous(), c
    return layer


def naive_eq7(layer):
    """Eq. 7 with the (r', d_out, d_in) tensor that the closed form avoids."""
    outer = torch.stack([layer.c[i] * torch.outer(layer.B[:, i], layer.A[i])
                         for i in range(len(layer.c))])
    return outer.flatten(1).norm(dim=1) / (outer.sum(0).norm() + 1e-8)


# ---- Eq. 7 --------------------------------------------------------------------------------------

def test_eq7_by_hand():
    """Two orthogonal components of norms 3 and 4: the matrix has norm 5, the scores are 0.6, 0.8.
    Two that partly cancel, 4 and -3 times the same matrix: norm 1, scores 4 and 3."""
    layer = one([[1, 0], [0, 1]], [[0, 3, 0], [2, 0, 0]], [-1, 2])
    assert norm_score([layer]).tolist() == pytest.approx([0.6, 0.8])
    layer = one([[0, 1], [0, 1]], [[1, 0, 0], [1, 0, 0]], [4, -3])
    assert norm_score([layer]).tolist() == pytest.approx([4, 3])


@pytest.mark.parametrize("d_out, d_in, r", [(4, 6, 3), (6, 4, 3), (3, 3, 8), (5, 7, 1)])
def test_eq7_closed_form(d_out, d_in, r):
    """Five random layers each: the closed form equals the naive one in float64 and float32."""
    for seed in range(5):
        layer = DoRALinear(nn.Linear(d_in, d_out).double(), net_config(rank=r, start_rank=r))
        randomize({"": layer}, seed)
        torch.testing.assert_close(norm_score([layer]), naive_eq7(layer), rtol=1e-10, atol=0)
        torch.testing.assert_close(norm_score([layer.float()]), naive_eq7(layer), rtol=1e-4, atol=0)


def test_eq7_where_all_cancels():
    """All components cancel: rounding leaves the closed form's sum around 0, on either side; the
    scores are finite, positive numbers all the same."""
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = torch.randn(1, 30), torch.randn(1, 40)
        layer = one(a.repeat(3, 1), b.repeat(3, 1), [1, -0.7, -0.3]).float()
        assert norm_score([layer]).isfinite().all() and (norm_score([layer]) > 0).all()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "zero_b"])
def test_eq7_of_a_matrix_without_an_update(init):
    """All c = 0 or B = 0 would be 0 / 0: every start's score is 0, in the naive form, too."""
    _, layers = adapted(net_config(init=init))
    for layer in layers.values():
        assert norm_score([layer]).tolist() == naive_eq7(layer).tolist() == [0] * len(layer.c)


def test_frobenius_is_eq7_without_its_denominator():
    """The pruner's `frobenius` score equals ||c_i b_i a_i^T||_F of the naive outer products."""
    config = net_config(importance="frobenius", beta1=0.0, beta2=None)
    _, layers = adapted(config)
    randomize(layers)
    pruner = Pruner(layers, config, 100)
    feed(pruner, torch.zeros(len(gates(layers))), open_gates=False)
    naive = [(layer.c[i] * torch.outer(layer.B[:, i], layer.A[i])).norm()
             for layer in layers.values() for i in range(len(layer.c))]
    torch.testing.assert_close(pruner.scores(), torch.stack(naive))


# ---- Eq. 8 --------------------------------------------------------------------------------------

def test_eq8_by_hand():
    """Scores (.6, .8), (.8, .6), (.6, .8) with beta 0.9 give the three averages worked out by hand;
    without bias correction, as the paper has it."""
    layer = one([[1, 0], [0, 1]], [[3, 0], [0, 4]], [1, 1],
                importance="norm", beta1=0.9, beta2=None)
    pruner = Pruner({"m": layer}, layer.config, 100)
    averages = []
    for gate in ([1, 1], [4 / 3, 3 / 4], [1, 1]):
        layer.c.data = torch.tensor(gate, dtype=torch.float64)
        feed(pruner, [0, 0], open_gates=False)
        averages.append(pruner.scores().tolist())
    for average, expected in zip(averages, ([.06, .08], [.134, .132], [.1806, .1988]), strict=True):
        assert average == pytest.approx(expected)


def test_norm_scores_are_those_of_the_updated_weights():
    """The paper scores after the optimizer's step: weights changed between observe() and step()
    count, those before do not."""
    layer = one([[1, 0], [0, 1]], [[3, 0], [0, 4]], [0, 0],
                importance="norm", beta1=0.0, beta2=None)
    pruner = Pruner({"m": layer}, layer.config, 100)
    layer.c.grad = torch.zeros_like(layer.c)
    pruner.observe()
    layer.c.data.fill_(1.0)
    pruner.step()
    assert pruner.scores().tolist() == pytest.approx([0.6, 0.8])


def test_ema_and_uncertainty_by_hand():
    """Sensitivities 1, 3, 2 of one component with beta1 0.5 and beta2 0.8: I_bar .5, 1.75, 1.875;
    U_bar .2 * .5 = .1, .8 * .1 + .2 * 1.25 = .33, .8 * .33 + .2 * .125 = .289; the score is their
    product."""
    layer = one([[1, 0]], [[1, 0]], [1], beta1=0.5, beta2=0.8)
    pruner = Pruner({"m": layer}, layer.config, 100)
    for number, expected in ((1, .5 * .1), (3, 1.75 * .33), (2, 1.875 * .289)):
        feed(pruner, [number])
        assert pruner.scores().tolist() == pytest.approx([expected])


# ---- sensitivity --------------------------------------------------------------------------------

def loss_of(model):
    return model(inputs(20)).sin().square().sum()


def random_model(seed=0):
    model, layers = adapted(net_config(), seed)
    randomize(layers, seed + 1)
    loss_of(model).backward()
    return model, layers


def test_sensitivity_is_the_removal_derivative():
    """|c dℓ/dc| equals the central difference of the loss as component i fades, c_i (1 ± h)."""
    model, layers = random_model()
    h = 1e-5
    for layer in layers.values():
        for i in range(len(layer.c)):
            value, losses = layer.c[i].item(), []
            for sign in (1, -1):
                layer.c.data[i] = value * (1 + sign * h)
                losses.append(loss_of(model).item())
            layer.c.data[i] = value
            derivative = abs(losses[0] - losses[1]) / (2 * h)
            assert sensitivity([layer])[i].item() == pytest.approx(derivative, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_three_euler_products_agree(dropout_on):
    """a_i . dℓ/da_i = b_i . dℓ/db_i = c_i dℓ/dc_i, under dropout too: the output is linear in
    each."""
    model, layers = adapted(net_config(dropout=0.4, dropout_on=dropout_on))
    randomize(layers)
    loss_of(model.train()).backward()
    for layer in layers.values():
        c = layer.c * layer.c.grad
        assert c.abs().max() > 0
        torch.testing.assert_close((layer.A * layer.A.grad).sum(1), c, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((layer.B * layer.B.grad).sum(0), c, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sensitivity([layer]), c.abs())


def test_euler_product_is_the_gradient_along_the_component():
    """With dropout off it also equals <dℓ/dW, Delta W_i>, with dℓ/dW from a model in which W0 + the
    update is one plain matrix."""
    model, layers = random_model()
    merged, twins = adapted(net_config())                # zero update: its base becomes W
    for layer, twin in zip(layers.values(), twins.values(), strict=True):
        twin.base.weight.data = layer.base.weight + layer.delta_weight().detach()
        twin.base.weight.requires_grad_(True)
    merged.head.load_state_dict(model.head.state_dict())
    loss_of(merged).backward()
    for layer, twin in zip(layers.values(), twins.values(), strict=True):
        for i, s in enumerate(sensitivity([layer])):
            update = layer.scale * layer.c[i] * torch.outer(layer.B[:, i], layer.A[i])
            inner = (twin.base.weight.grad * update).sum().abs()
            assert s.item() == pytest.approx(inner.item(), rel=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_is_an_error_that_says_so(method):
    """observe() before backward(), or after zero_grad(), is an error for every method."""
    config = net_config(**METHODS[method])
    model, layers = adapted(config)
    with pytest.raises(DoRAError, match=r"observe\(\).*backward\(\)"):
        Pruner(layers, config, 20).observe()
    loss_of(model).backward()
    Pruner(layers, config, 20).observe()


def scores_now(importance, layers):
    """The score of each component, (n,), of one step alone."""
    function, _, total = IMPORTANCE[importance]
    I = function(list(layers.values()))
    return total([I] if isinstance(I, torch.Tensor) else I)


@pytest.mark.parametrize("importance", ["sensitivity", "triplet"])
def test_a_matrix_without_gradient_has_importance_0(importance):
    """A matrix that took no part in this step scores 0; the others score as they would alone."""
    model, layers = adapted(net_config(importance=importance))
    randomize(layers)
    loss_of(model).backward()
    expected = scores_now(importance, layers)
    for p in (layers["layer.1.down"].c, layers["layer.1.down"].A, layers["layer.1.down"].B):
        p.grad = None
    found = scores_now(importance, layers)
    assert torch.equal(found[:-3], expected[:-3]) and (expected > 0).all()
    assert found[-3:].tolist() == [0, 0, 0]


# ---- AdaLoRA's triplet --------------------------------------------------------------------------

def test_triplet_by_hand():
    """One step, beta 0.85: an entry with |w dℓ/dw| = I has I_bar .15 I, U_bar .15 * .85 I, score
    .019125 I^2. c 2 * 1, A (1 * 3, 2 * 1), B (1 * 4, 0 * 5, -1 * 2):
    .019125 * (4 + (9 + 4) / 2 + (16 + 0 + 4) / 3)."""
    layer = one([[1, 2]], [[1, 0, -1]], [2], **METHODS["adalora"])
    layer.c.grad = torch.tensor([1.0]).double()
    layer.A.grad = torch.tensor([[3.0, 1.0]]).double()
    layer.B.grad = torch.tensor([[4.0], [5.0], [2.0]]).double()
    pruner = Pruner({"m": layer}, layer.config, 100)
    pruner.observe()
    assert pruner.scores().tolist() == pytest.approx([0.15 * 0.15 * 0.85 * (4 + 13 / 2 + 20 / 3)])


def test_adalora_equals_the_recorded_peft():
    """Fed with the same weights and gradients, `adalora` has the scores and masks that PEFT's
    RankAllocator had (fixtures/record_peft.py; live in peers/test_peft.py)."""
    recorded = json.loads(RECORDED.read_text())["adalora"]
    config = net_config(**METHODS["adalora"] | dict(
        rank=R, start_rank=R_PRIME, interval=INTERVAL, initial_phase=T_I / T, final_phase=T_F / T))
    layers = {name: DoRALinear(nn.Linear(d_in, d_out).double(), config)
              for name, (d_out, d_in) in SHAPES.items()}
    pruner = Pruner(layers, config, T)
    for step in range(1, T - T_F + 1):
        for name, layer in layers.items():
            for tensor, p in (("A", layer.A), ("B", layer.B), ("E", layer.c)):
                p.data.copy_(torch.tensor(fed(step, name, tensor, "weight")).view(p.shape))
                p.grad = torch.tensor(fed(step, name, tensor, "grad")).view(p.shape).double()
        pruner.observe()
        pruner.step()
        assert pruner.scores().tolist() == pytest.approx(recorded["scores"][step - 1], rel=1e-5)
        if str(step) in recorded["masks"]:
            ours = [layer.c.ne(0).tolist() for layer in layers.values()]
            assert ours == recorded["masks"][str(step)]
        else:
            assert gates(layers).ne(0).all()
    assert len(recorded["masks"]) == 4


# ---- Eq. 10 and AdaLoRA's penalty ---------------------------------------------------------------

def test_eq10_by_hand():
    """a = (1, 3): variance 2; b = (0, 0, 6): 12; a second component constant: 0. R = 14 / 2."""
    layer = one([[1, 3], [5, 5]], [[0, 0, 6], [1, 1, 1]], [1, 0])
    assert dem_penalty([layer]).item() == pytest.approx(7)


def test_eq10_against_the_double_loop():
    """R and its gradients equal a loop over matrices and components, of differing shapes; gates and
    masks play no part in it."""
    _model, layers = adapted(net_config())
    randomize(layers)
    layers["layer.0.up"].c.data.zero_()

    def variance(v):                                     # unbiased, as in the authors' code
        return sum((x - sum(v) / len(v)) ** 2 for x in v) / (len(v) - 1)

    R, n = 0.0, 0
    for layer in layers.values():
        for i in range(len(layer.c)):
            R, n = R + variance(layer.A[i]) + variance(layer.B[:, i]), n + 1
    R = R / n
    ours = dem_penalty(list(layers.values()))
    assert ours.item() == pytest.approx(R.item())
    params = [p for layer in layers.values() for p in (layer.A, layer.B)]
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(R, params), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("penalty", ["dem", "orthogonal", None])
def test_the_pruners_penalty_is_eta_times_r(penalty):
    """penalty() is eta * R for Eq. 10, eta times the mean of ||A A^T - I||_F and ||B^T B - I||_F
    over all A and B for AdaLoRA's, entry by entry, and 0 for none; it has a gradient."""
    config = net_config(penalty=penalty, eta=0.25)
    _, layers = adapted(config)
    randomize(layers)
    value = Pruner(layers, config, 50).penalty()
    total = 0.0
    for layer in layers.values():
        for rows in (layer.A.tolist(), layer.B.T.tolist()):
            squares = 0.0
            for i, u in enumerate(rows):
                for j, v in enumerate(rows):
                    squares += (sum(x * y for x, y in zip(u, v)) - (i == j)) ** 2
            total += squares ** 0.5
    expected = {"dem": 0.25 * dem_penalty(list(layers.values())).item(),
                "orthogonal": 0.25 * total / (2 * len(layers)), None: 0.0}[penalty]
    assert value.item() == pytest.approx(expected)
    assert value.requires_grad == (penalty is not None)


@pytest.mark.parametrize("penalty", ["dem", "orthogonal"])
def test_no_penalty_once_pruning_has_ended(penalty):
    """penalty() is above 0 in every step up to the last pruning and 0 in every one after it."""
    config = net_config(penalty=penalty, rank=1, start_rank=2)
    _, layers = adapted(config)
    pruner = Pruner(layers, config, 20)                  # the last pruning ends step 10
    positive = []
    for _ in range(20):
        positive.append(pruner.penalty().item() > 0)
        feed(pruner, torch.ones(12))
    assert positive == [True] * 10 + [False] * 10
