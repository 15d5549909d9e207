"""dora.py: what a component is worth (Eq. 7, Eq. 8, sensitivity, "triplet"), and penalties."""
import pytest
import torch
from fixtures import record
from small import (
    EXACT, adapted, close, feed, gates, inputs, net_config, numbers, randomize, refused)
from torch import nn

from dora import IMPORTANCE, METHODS, DoRALinear, Pruner, dem_penalty, norm_score, sensitivity


def one(A, B, c, **changes):
    """(layer, Pruner): rows of A (r', d_in), columns of B (r', d_out) and gates as in `numbers`."""
    A, B, c = map(numbers, (A, B, c))
    base = nn.Linear(A.shape[1], B.shape[1]).double()
    config = net_config(rank=len(c), start_rank=len(c), **changes)
    layer = DoRALinear(base, config)
    layer.A.data = A
    layer.B.data = B.T.contiguous()
    layer.c.data = c
    return layer, Pruner({"m": layer}, config, 100)


def orthogonal(c, **changes):
    """(layer, Pruner): two orthogonal components whose norms at gates of 1 are 3 and 4."""
    return one("1 0; 0 1", "3 0; 0 4", c, importance="norm", **changes)


def random_model(**changes):
    """(model, layers) with random components."""
    model, layers = adapted(net_config(**changes))
    randomize(layers)
    return model, layers


def loss_of(model):
    return model(inputs(20)).sin().square().sum()


def components(layer):
    """c_i b_i a_i^T of one layer, (r', d_out, d_in)."""
    parts = [torch.outer(b, a) for a, b in zip(layer.A, layer.B.T)]
    return layer.c[:, None, None] * torch.stack(parts)


def norms(layer):
    """The Frobenius norm of each component, (r',)."""
    return components(layer).norm(dim=(1, 2))


def naive_eq7(layer):
    """Eq. 7 with the tensor that the closed form avoids."""
    total = components(layer).sum(0)
    return norms(layer) / (total.norm() + layer.config.eps)


def scores_now(importance, layers):
    """The score of each component, (n,), of one step alone."""
    function, _, total = IMPORTANCE[importance]
    I = function(layers)
    return total([I] if isinstance(I, torch.Tensor) else I)


def test_eq7_by_hand():
    """Two orthogonal components of norms 3 and 4: the matrix has norm 5, the scores are 0.6, 0.8.
    Two that partly cancel, 4 and -3 times the same matrix: norm 1, scores 4 and 3."""
    layer, _ = orthogonal("-1 1")
    assert norm_score([layer]).tolist() == pytest.approx([0.6, 0.8])
    layer, _ = one("0 1; 0 1", "1 0 0; 1 0 0", "4 -3")
    assert norm_score([layer]).tolist() == pytest.approx([4, 3])


@pytest.mark.parametrize("d_out, d_in, r", [
    (4, 6, 3), (3, 3, 8), (5, 7, 1)])
def test_eq7_closed_form(d_out, d_in, r):
    """Five random layers at once: the closed form equals the naive one in float64 and float32, and
    `frobenius`, Eq. 7 without its denominator, the naive norms."""
    layers = []
    for seed in range(5):
        base = nn.Linear(d_in, d_out).double()
        layer = DoRALinear(base, net_config(rank=r, start_rank=r, eps=0.5))
        randomize({"": layer}, seed)
        layers.append(layer)
    naive = torch.cat([*map(naive_eq7, layers)])
    close(norm_score(layers), naive, 1e-11)
    naive_norms = torch.cat([*map(norms, layers)])
    close(scores_now("frobenius", layers), naive_norms, 1e-11)
    close(norm_score([layer.float() for layer in layers]), naive.float(), 1e-5)


def test_eq7_where_all_cancels():
    """All components cancel, and the closed form's sum is around 0: finite, positive scores."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer = DoRALinear(nn.Linear(30, 40), net_config(rank=3, start_rank=3))
        layer.A.data[:] = torch.randn(30)
        layer.B.data[:] = torch.randn(40, 1)
        layer.c.data = torch.tensor([1, -0.7, -0.3])
        scores = norm_score([layer])
        assert scores.isfinite().all()
        assert (scores > 0).all()


def test_eq8_by_hand():
    """Scores (.6, .8), (.8, .6), (.6, .8) with beta 0.9 give the three averages worked out by hand;
    without bias correction, as the paper has it."""
    layer, pruner = orthogonal("1 1", beta1=0.9, beta2=None)
    flipped = torch.tensor([4 / 3, 3 / 4])
    for c, averages in ((1, ".06 .08"), (flipped, ".134 .132"), (1, ".1806 .1988")):
        layer.c.data[:] = c
        feed(pruner, [0, 0], open_gates=False)
        close(pruner.scores(), numbers(averages), 1e-6)


def test_norm_scores_are_those_of_the_updated_weights():
    """Weights changed between observe() and step() count: the paper scores after the update."""
    layer, pruner = orthogonal("0 0", **EXACT)
    layer.c.grad = torch.zeros_like(layer.c)
    pruner.observe()
    layer.c.data.fill_(1.0)
    pruner.step()
    assert pruner.scores().tolist() == pytest.approx([0.6, 0.8])


def test_ema_and_uncertainty_by_hand():
    """Sensitivities 1, 3, 2 with beta1 0.5 and beta2 0.8 have I_bar .5, 1.75, 1.875 and U_bar
    .2 * .5 = .1, .8 * .1 + .2 * 1.25 = .33, .8 * .33 + .2 * .125 = .289; a score is I_bar U_bar."""
    _, pruner = one("1 0;", "1 0;", "1", beta1=0.5, beta2=0.8)
    products = (.5 * .1, 1.75 * .33, 1.875 * .289)
    for I, expected in zip((1, 3, 2), products):
        feed(pruner, [I])
        assert pruner.scores().item() == pytest.approx(expected)


def test_sensitivity_is_the_removal_derivative():
    """|c dℓ/dc| equals the central difference of the loss as component i fades, c_i (1 ± h)."""
    model, layers = random_model()
    loss_of(model).backward()
    h = 1e-5
    for layer in layers.values():
        for i, found in enumerate(sensitivity([layer]).tolist()):
            value, losses = layer.c[i].item(), []
            for factor in (1 + h, 1 - h, 1):
                layer.c.data[i] = value * factor
                losses.append(loss_of(model).item())
            derivative = abs(losses[0] - losses[1]) / (2 * h)
            assert found == pytest.approx(derivative, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dropout_on", ["input", "components"])
def test_three_euler_products_agree(dropout_on):
    """a_i . dℓ/da_i = b_i . dℓ/db_i = c_i dℓ/dc_i, even under dropout, as y is linear in each."""
    model, layers = random_model(dropout=0.4, dropout_on=dropout_on)
    loss_of(model.train()).backward()
    for layer in layers.values():
        c = layer.c * layer.c.grad
        assert c.abs().max() > 0
        A, B = layer.A * layer.A.grad, layer.B * layer.B.grad
        close(A.sum(1), c, 1e-11)
        close(B.sum(0), c, 1e-11)
        close(sensitivity([layer]), c.abs(), 1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_is_an_error_that_says_so(method):
    """observe() before backward(), or after zero_grad(), is an error for every method."""
    config = net_config(**METHODS[method])
    model, layers = adapted(config)
    pruner = Pruner(layers, config, 20)
    refused("gradient", pruner.observe)
    loss_of(model).backward()
    pruner.observe()


@pytest.mark.parametrize("importance", ["sensitivity", "triplet"])
def test_a_matrix_without_gradient_has_importance_0(importance):
    """A matrix that took no part in this step scores 0; the others score as they would alone."""
    model, layers = random_model()
    loss_of(model).backward()
    expected = scores_now(importance, [*layers.values()])
    layers["layer.1.down"].zero_grad()
    found = scores_now(importance, [*layers.values()])
    assert torch.equal(found[:-3], expected[:-3])
    assert (expected > 0).all() and not found[-3:].any()


def test_triplet_by_hand():
    """One step, beta 0.85: an entry with |w dℓ/dw| = I has I_bar .15 I, U_bar .15 * .85 I, score
    .019125 I^2. c 2 * 1, A (1 * 3, 2 * 1), B (1 * 4, 0 * 5, -1 * 2):
    .019125 * (4 + (9 + 4) / 2 + (16 + 0 + 4) / 3)."""
    layer, pruner = one("1 2;", "1 0 -1;", "2", **METHODS["adalora"])
    layer.c.grad = numbers("1")
    layer.A.grad = numbers("3 1;")
    layer.B.grad = numbers("4; 5; 2")
    pruner.observe()
    expected = .15 * .15 * .85 * (4 + 13 / 2 + 20 / 3)
    assert pruner.scores().item() == pytest.approx(expected)


def test_adalora_equals_the_recorded_peft():
    """Fed with the same weights and gradients, `adalora` has the scores and masks that PEFT's
    RankAllocator had (fixtures/record.py; live in peers/test_recordings.py)."""
    recorded = record.recorded("peft")["adalora"]
    T = record.T
    config = net_config(
        **METHODS["adalora"], rank=record.R, start_rank=record.R_PRIME, interval=record.INTERVAL,
        initial_phase=record.T_I / T, final_phase=record.T_F / T)
    layers = {}
    for name, (d_out, d_in) in record.SHAPES.items():
        layers[name] = DoRALinear(nn.Linear(d_in, d_out).double(), config)
    pruner = Pruner(layers, config, T)
    everything = [[True] * record.R_PRIME] * 2
    for step, scores in enumerate(recorded["scores"], 1):
        for name, layer in layers.items():
            record.feed(layer.A, step, name, "A")
            record.feed(layer.B, step, name, "B")
            record.feed(layer.c, step, name, "E")
        pruner.observe()
        pruner.step()
        assert pruner.scores().tolist() == pytest.approx(scores, rel=1e-5)
        kept = [layer.c.ne(0).tolist() for layer in layers.values()]
        assert kept == recorded["masks"].get(str(step), everything)
    assert step == T - record.T_F
    assert len(recorded["masks"]) == 4


def test_eq10_by_hand():
    """a = (1, 3): variance 2; b = (0, 0, 6): 12; a second component constant: 0. R = 14 / 2."""
    layer, _ = one("1 3; 5 5", "0 0 6; 1 1 1", "1 0")
    assert dem_penalty([layer]).item() == pytest.approx(7)


def variance(v):
    """The unbiased variance, as the authors' code has it."""
    mean = sum(v) / len(v)
    return sum((x - mean) ** 2 for x in v) / (len(v) - 1)


def test_eq10_against_the_double_loop():
    """R and its gradients equal a loop over all matrices and components; a gate plays no part."""
    _, layers = random_model()
    layers["layer.0.up"].c.data.zero_()
    vectors, params = [], []
    for layer in layers.values():
        vectors += [*layer.A, *layer.B.T]
        params += [layer.A, layer.B]
    R = sum(map(variance, vectors)) / len(gates(layers))
    ours = dem_penalty([*layers.values()])
    assert ours.item() == pytest.approx(R.item())
    expected = torch.autograd.grad(R, params)
    close(torch.autograd.grad(ours, params), expected, 1e-11)


@pytest.mark.parametrize("penalty", ["dem", "orthogonal", None])
def test_the_pruners_penalty_is_eta_times_r(penalty):
    """penalty() is eta * R for Eq. 10, eta times the mean of ||A A^T - I||_F and ||B^T B - I||_F
    over all A and B for AdaLoRA's, and 0 for none; it has a gradient."""
    _, layers = random_model(penalty=penalty, eta=0.25)
    distances, eye = [], torch.eye(3)
    for layer in layers.values():
        for rows in (layer.A, layer.B.T):
            distances.append((rows @ rows.T - eye).norm().item())
    expected = {None: 0.0, "dem": dem_penalty([*layers.values()]).item(),
                "orthogonal": sum(distances) / 12}
    value = Pruner(layers, layer.config, 50).penalty()
    assert value.item() == pytest.approx(0.25 * expected[penalty])
    assert value.requires_grad == (penalty is not None)


@pytest.mark.parametrize("penalty", ["dem", "orthogonal"])
def test_no_penalty_once_pruning_has_ended(penalty):
    """penalty() is above 0 in every step up to the last pruning and 0 in every one after it."""
    config = net_config(penalty=penalty, rank=1, start_rank=2)
    _, layers = adapted(config)
    pruner = Pruner(layers, config, 20)  # the last pruning ends step 10
    positive = []
    for _ in range(20):
        positive.append(pruner.penalty().item() > 0)
        feed(pruner, torch.ones(12))
    assert positive == [True] * 10 + [False] * 10
