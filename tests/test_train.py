"""A run is a function of its settings, bit for bit; accumulation, compaction and evaluation give
what one batch, masks and single examples give."""
import itertools
import math
import statistics
from operator import mul

import pytest
import torch
from small import close, numbers
from tiny import (
    evaluations, files, json_lines, lines, newest, read_json, result, run, run_settings,
    same_runs, tiny_model)

import data
import train_glue
from dora import METHODS, DoRAError, Pruner, budget, load_adapter, read_safetensors
from train_glue import (
    TrainConfig, adapt, evaluate, evaluate_dev, learning_rate, load_roberta, make_config,
    predict, prepare, task_loss)

FLOAT64 = dict(dropout=False, dtype="float64")


@pytest.fixture
def masks(monkeypatch):
    """The masks of every pruning of the runs to come: [(step, mask), ...]."""
    found = []

    class Recorder(Pruner):
        def _prune(self):
            super()._prune()
            found.append((self.t, self.mask.tolist()))

    monkeypatch.setattr(train_glue, "Pruner", Recorder)
    return found


def test_runs_repeat(tmp_path):
    """Two runs with the same settings are equal bit for bit in every file. With another seed (from
    the start, which the first penalty shows), weight decay or clipping the losses differ."""
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    run(tmp_path / "c", seed=2)
    run(tmp_path / "d", weight_decay=0.5)
    run(tmp_path / "e", clip=0.01)
    same_runs(tmp_path / "a", tmp_path / "b")
    for name in "cde":
        assert lines(tmp_path / name) != lines(tmp_path / "a")
    first, other = (lines(tmp_path / name)[0] for name in "ac")
    assert first["penalty"] != other["penalty"]


def test_gradients_are_observed_before_clipping(tmp_path, monkeypatch):
    """What observe() sees, where the limit is far below every gradient."""
    norms, real = [], Pruner.observe

    def observe(pruner):
        for layer in pruner.layers.values():
            norms.append(layer.B.grad.norm())
        real(pruner)

    monkeypatch.setattr(Pruner, "observe", observe)
    run(tmp_path, method="lora", clip=1e-12, max_steps=4)
    assert len(norms) == 4 * 12
    assert min(norms) > 1e-9


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's (folder, what train returned)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run(folder)


COSTS = [64, 64, 64, 64, 96, 96] * 2  # d_in + d_out of query to output.dense, in two layers
FILES = """
.lock adapter adapter/README.md adapter/adapter_config.json adapter/adapter_model.safetensors
checkpoints checkpoints/step-00000016.pt checkpoints/step-00000024.pt config.json log.txt
metrics.jsonl ranks.json ranks.jsonl result.json run.json"""


def test_files_of_a_run(finished):
    """The folder holds what the README says, and nothing temporary; of checkpoints the newest
    two. TrainConfig made from config.json is the run's own; run.json has its surroundings."""
    folder, returned = finished
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == FILES.split()
    own = make_config(**run_settings(folder))
    assert TrainConfig(**read_json(folder / "config.json")) == own
    found = read_json(folder / "run.json")
    assert found["steps"] == 24
    assert found["processes"] == 1
    assert found["torch"] == torch.__version__
    assert found["device"].startswith("cpu (")
    assert found["command"].startswith("python ")
    assert {"python", "numpy", "platform"} <= found.keys()
    assert 0 < returned["seconds"] <= found["seconds"] < 1000


def test_metrics_of_a_run(finished):
    """One line of eight finite fields for each of the 24 steps, with learning_rate's rate, Eq. 9's
    budget and, in live, that of the last pruning; after an epoch's last step its dev scores."""
    folder, returned = finished
    config, found = make_config(**run_settings(folder)), lines(folder)
    assert [line["step"] for line in found] == [*range(1, 25)]
    for t, line in enumerate(found, 1):
        assert " ".join(line) == "step lr loss penalty grad_norm live parameters budget"
        assert all(map(math.isfinite, line.values()))
        assert line["lr"] == learning_rate(t - 1, 24, config)
        assert line["budget"] == budget(t, 24, config, 12)
        last = max(step for step in (0, 7, 10, 12) if step <= t)  # first is 4, interval 3, last 12
        assert line["live"] == budget(last, 24, config, 12)
        assert (line["penalty"] > 0) == (t <= 12)
    assert evaluations(folder) == returned["epochs"]
    steps = [line["step"] for line in json_lines(folder / "metrics.jsonl")]
    assert steps == sorted([*range(1, 25), 8, 16, 24])


def test_history_of_the_ranks(finished):
    """ranks.jsonl: the matrices and what a component costs in each (d_in + d_out), then the live
    components, before training and after each pruning; the last are those of ranks.json, and
    each sum is the line's live."""
    folder, returned = finished
    first, before, *rows = json_lines(folder / "ranks.jsonl")
    ranks, metrics = read_json(folder / "ranks.json"), lines(folder)
    assert ranks == returned["ranks"] and sum(ranks.values()) == 24
    assert first["parameters per component"] == dict(zip(ranks, COSTS))
    assert before == {"step": 0, "live": [3] * 12}
    assert [row["step"] for row in rows] == [7, 10, 12]
    assert rows[-1]["live"] == [*ranks.values()]
    for row in rows:
        assert sum(row["live"]) == metrics[row["step"] - 1]["live"]


def test_what_a_run_says(finished, tmp_path, capsys):
    """What a run prints first (what is trained, on what, how long, and the parameters, which add
    up), then scores and result. No line is longer than 80 columns; log.txt has the same text."""
    folder, returned = finished
    run(tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "toy, dora, seed 1: 61 train and 40 dev examples, 24 steps, 8 per epoch"
    text = " ".join(" ".join(said).split())
    log = (tmp_path / "out" / "log.txt").read_text()
    adapter, head = returned["adapter_parameters"], returned["head_parameters"]
    trained, left = adapter + 36 + head, returned["adapter_parameters_after_pruning"]
    for part in (
            f"model {files()[1].resolve()} with its own head, float32 on cpu (",
            f"(threads: {torch.get_num_threads()}",
            "learning rate 0.003, 8 examples per step",
            f"trained parameters: {trained:,} = adapter {adapter:,} + gate 36 + head {head:,}",
            "from step 7 to 12, pruning reduces the adapter to at most 24 components",
            f"files in {tmp_path / 'out'}",
            "step 8, epoch 1: matthews ",
            f"saved adapter: {left:,} parameters"):
        assert part in text and part in log, part
    assert max(len(line) for line in said if "/" not in line) <= 80  # a path has no place to cut


def test_the_adapters_card(finished):
    """The adapter's README names base, task, labels, score. (peers/test_peft.py runs its code.)"""
    folder, returned = finished
    text = (folder / "adapter" / "README.md").read_text()
    assert text.startswith(f'---\nbase_model: "{files()[1].resolve()}"\nlibrary_name: peft\n')
    best = returned["best"]
    for part in ("# toy: ", "--method dora", "Labels: 0, 1.", "Seed 1.", '"a sentence"',
                 f"On dev: matthews {best['matthews']:.4f} after step {best['step']}.",
                 "Components: 24 in 12 matrices, "):
        assert part in text, part


def test_result_of_a_run(finished):
    """result.json is what train returned; epochs, parameter counts and ranks add up."""
    folder, returned = finished
    found = read_json(folder / "result.json")
    assert returned == {**found, "ranks": returned["ranks"], "folder": returned["folder"]}
    first, second, last = found["epochs"]
    assert (first["epoch"], first["step"]) == (1, 8)
    assert (last["epoch"], last["step"]) == (3, 24)
    assert found["last"] == last
    assert found["best"] == max(second, last, key=lambda epoch: epoch["matthews"])
    head = 32 * 32 + 32 + 2 * 32 + 2
    assert found["adapter_parameters"] == 3 * sum(COSTS)  # r' = 3
    assert found["head_parameters"] == head
    assert found["trainable_parameters"] == 3 * sum(COSTS) + head + 36  # and the gates
    left = sum(map(mul, returned["ranks"].values(), COSTS))
    assert found["adapter_parameters_after_pruning"] == left


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tmp_path, method):
    """Eight steps of each: the saved adapter scores as the result says."""
    found = run(tmp_path, method=method, max_steps=8)
    assert len(lines(tmp_path)) == 8 and sum(found["ranks"].values()) == 24
    model = load_roberta(files()[1], 2)
    load_adapter(model, tmp_path / "adapter")
    scores = evaluate(model, dev(), data.TASKS["toy"])
    assert scores["matthews"] == found["best"]["matthews"]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("method", ["bitfit", "full", "head"])
def test_methods_without_an_adapter(tmp_path, method):
    """What trains has moved, the rest has not, and the saved model scores as the result says."""
    found = run(tmp_path, method=method, max_steps=8)
    assert found["ranks"] == {} and not (tmp_path / "adapter").exists()
    assert (tmp_path / "model" / "vocab.json").exists()
    model = load_roberta(tmp_path / "model", 2)
    scores = evaluate(model, dev(), data.TASKS["toy"])
    assert scores["matthews"] == found["best"]["matthews"]
    before = load_roberta(files()[1], 2).roberta.state_dict()
    moved = [name.split(".")[-1] for name, p in model.roberta.named_parameters()
             if not torch.equal(p, before[name])]
    kinds = {"bitfit": {"bias"}, "full": {"weight", "bias"}, "head": set()}
    assert {*moved} == kinds[method]
    assert len(moved) == dict(bitfit=17, full=37, head=0)[method]


def dev():
    data_dir, model_dir = files()
    return data.load_task("toy", data_dir, "dev", data.BPE(model_dir), 48)


def test_max_steps(tmp_path):
    """max_steps ends a run within an epoch, and the budget's curve is that of the shorter run. With
    log_every, there is a line each fourth step, and one at the end. A long interval prunes once."""
    found = run(tmp_path, max_steps=11, log_every=4, interval=9)
    assert "from step 5 to 5, pruning" in (tmp_path / "log.txt").read_text()
    assert found["steps"] == 11 and found["last"]["epoch"] == 1.375
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 11]
    assert lines(tmp_path)[-1]["live"] == 24


def test_the_learning_rate():
    """By hand: of 50 steps 8 % = 4 warm up, then down to 0; no warm-up in short runs."""
    config = make_config("cola", lr=1.0, warmup=0.08)
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[:4] == [1 / 4, 2 / 4, 3 / 4, 1.0]
    falling = [steps_left / 46 for steps_left in range(46, 0, -1)]
    assert rates[4:] == pytest.approx(falling, rel=1e-12)
    assert learning_rate(0, 5, config) == 1.0


def test_losses():
    """Cross entropy and squared error by hand, on two examples."""
    logits = numbers("1 0; 0 2")
    first = math.log(1 + math.exp(-1))
    second = math.log(1 + math.exp(2))
    loss = task_loss(logits, torch.tensor([0, 0]))
    assert math.isclose(loss, (first + second) / 2, rel_tol=1e-6)
    assert task_loss(logits[:, :1], numbers("0.5 1")) == 0.625  # (0.25 + 1) / 2


@torch.no_grad()
def logits_alone(model, examples):
    """The logits (N, classes) of each example in a batch of its own."""
    batches = [data.collate([example], range(1)) for example in examples]
    return torch.cat([model(batch.ids, batch.mask) for batch in batches])


@pytest.mark.parametrize("classes", [1, 2])
def test_predictions_keep_the_files_order(classes):
    """predict, which sorts by length, against each example alone, in the file's order. Scores are
    clipped to 0..1."""
    examples = dev()
    model = tiny_model(classes).double()
    model.classifier.out_proj.weight.data *= 1e5
    middle = logits_alone(model, examples).median(0).values  # so that both classes occur
    model.classifier.out_proj.bias.data -= middle if classes == 2 else middle - 0.5
    logits = logits_alone(model, examples)
    alone = logits.argmax(1) if classes == 2 else logits[:, 0].clamp(0, 1)
    found = predict(model.train(), examples)  # without its dropout
    assert found == pytest.approx(alone.numpy(), rel=0, abs=1e-6)
    lengths = [len(example.ids) for example in examples]
    assert {0, 1} <= {*found} and len({*lengths}) > 5


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_spread_of_the_outputs(classes):
    """By hand: the standard deviation of a regression's output, or the largest of any difference
    between two logits; a constant added to every logit changes nothing."""
    logits = torch.randn(20, classes, dtype=torch.float64)
    columns = [*logits.T]
    if classes > 1:
        columns = [a - b for a, b in itertools.combinations(columns, 2)]
    expected = max(statistics.pstdev(column.tolist()) for column in columns)
    assert math.isclose(train_glue.spread(logits), expected)
    assert math.isclose(train_glue.spread(logits + 5), expected)


def regression_task(folder, monkeypatch):
    """Settings of a task whose labels are numbers."""
    task = data.Task("mine", "mine", ("text",), "score", ("pearson",), labels=())
    monkeypatch.setitem(data.TASKS, "mine", task)
    (folder / "mine").mkdir()
    text = "text\tscore\n" + "the dog\t1\na cat\t4\nit\t5\n" * 10
    for split in ("train", "dev"):
        (folder / "mine" / f"{split}.tsv").write_text(text)
    return dict(task="mine", data_dir=str(folder))


@pytest.mark.parametrize("noise, collapsed", [(1e-4, True), (1000, False)])
@pytest.mark.parametrize("regression", [False, True])
def test_a_collapsed_run_says_so(tmp_path, monkeypatch, regression, noise, collapsed):
    """Constant or nearly constant outputs on dev, of classes or of a number: each evaluation says
    so with the remedy, result.json has it, and the run ends normally. Others say nothing."""
    changes = regression_task(tmp_path, monkeypatch) if regression else {}
    real = train_glue.Classifier.forward
    monkeypatch.setattr(train_glue.Classifier, "forward", lambda *a: real(*a) * noise + 0.3)
    found = run(tmp_path / "out", epochs=2, lr=0.004, method="head", **changes)
    log = (tmp_path / "out" / "log.txt").read_text().splitlines()
    said = ["collapsed" in line for line in log if "  step " in line]
    assert said == [collapsed] * 2
    assert result(tmp_path / "out")["collapsed"] is collapsed
    assert (found["last"]["spread"] < train_glue.COLLAPSED) == collapsed


def test_the_mean_of_mnlis_two():
    """Two dev files: each accuracy, and their mean as the headline."""
    task = data.TASKS["mnli"]
    first, second = dev(), dev()[:10]
    scores = evaluate_dev(tiny_model(3), {"dev": first, "dev_mm": second}, task)
    assert " ".join(scores) == ("accuracy spread accuracy_dev spread_dev accuracy_dev_mm "
                                "spread_dev_mm")
    matched, mismatched = scores["accuracy_dev"], scores["accuracy_dev_mm"]
    assert scores["accuracy"] == (matched + mismatched) / 2 and matched != mismatched
    assert mismatched == evaluate(tiny_model(3), second, task)["accuracy"]


def test_accumulation(tmp_path, masks):
    """In float64 without dropout, 50 steps of 12 examples against the same in three parts of 4:
    losses to 1e-9, the same masks. The last batch is short, 1 + 0 + 0."""
    changes = dict(max_steps=50, **FLOAT64)
    run(tmp_path / "whole", batch_size=12, **changes)
    run(tmp_path / "parts", batch_size=4, accumulate=3, **changes)
    close(lines(tmp_path / "whole"), lines(tmp_path / "parts"), 1e-9)
    half = len(masks) // 2
    assert half > 5
    assert masks[:half] == masks[half:]


@pytest.mark.parametrize("rank", [2.0, 0.5])
def test_compaction_in_training(tmp_path, masks, monkeypatch, rank):
    """A run that drops dead components after the last pruning against one that masks them: losses,
    scores and adapter to 1e-9. The gradient's norm, which counts closed gates, is not clipped."""
    changes = dict(max_steps=40, rank=rank, start_rank=3, clip=1e9, **FLOAT64)
    compacted = run(tmp_path / "compacted", **changes)
    monkeypatch.setattr(train_glue, "compact_", lambda model, optimizer=None: model)
    masked = run(tmp_path / "masked", **changes)
    ours, theirs = lines(tmp_path / "compacted"), lines(tmp_path / "masked")
    for line in ours + theirs:
        del line["grad_norm"]
    close(ours, theirs, 1e-9)
    close(compacted["epochs"], masked["epochs"], 1e-9)
    assert compacted["ranks"] == masked["ranks"]
    half = len(masks) // 2
    assert masks[:half] == masks[half:]
    name = "adapter/adapter_model.safetensors"
    files = [read_safetensors(tmp_path / folder / name) for folder in ("compacted", "masked")]
    close(*files, 1e-9)


@pytest.mark.parametrize("method", ["dora", "full", "bitfit", "head"])
def test_bf16(tmp_path, method):
    """--dtype bf16: what trains is float32, in the checkpoint too, and so are the logits;
    products in the encoder are bfloat16, and so is what is frozen, unless the encoder trains."""
    given = run_settings(tmp_path, dtype="bf16", method=method, max_steps=8)
    config, low = make_config(**given), torch.bfloat16
    _, model, _, _ = prepare(config)
    adapt(model, config)
    frozen = torch.float32 if method in ("full", "bitfit") else low
    for name, p in model.named_parameters():
        wide = p.requires_grad or "classifier" in name
        assert p.dtype == (torch.float32 if wide else frozen)

    dtypes, query = [], model.roberta.encoder.layer[0].attention["self"].query
    query.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    batch = data.collate(dev(), range(4))
    logits = model(batch.ids, batch.mask)
    assert logits.dtype == torch.float32 and dtypes == [low]
    assert not torch.equal(logits, logits.to(low).float())
    train_glue.train(config)
    for weight in newest(tmp_path)["weights"].values():
        assert weight.dtype == torch.float32 and weight.isfinite().all()


def torch_state():
    """What a run sets in torch and gives back."""
    return (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("faster", [True, False])
def test_torch_in_a_run(tmp_path, monkeypatch, deterministic, faster):
    """In a run, --deterministic means deterministic kernels, and without it TF32 and, where it is
    faster, oneDNN; a resumed run, what it began with. Afterwards torch is as before, even if the
    run failed."""
    monkeypatch.setattr(train_glue, "onednn_is_faster", lambda threads: faster)
    before, seen, real = torch_state(), [], train_glue.adapt

    def adapt(*args):
        seen.append(torch_state())
        return real(*args)

    monkeypatch.setattr(train_glue, "adapt", adapt)
    given = dict(deterministic=deterministic, max_steps=4, interval=1)
    run(tmp_path / "out", **given)
    product = "bf16" if faster and not deterministic else before[3]
    assert seen == [(before[0], deterministic, "ieee" if deterministic else "tf32", product)]
    assert torch_state() == before
    monkeypatch.setattr(train_glue, "onednn_is_faster", lambda threads: not faster)
    run(tmp_path / "out", resume=True, **given)
    device = read_json(tmp_path / "out" / "run.json")["device"]
    assert ("oneDNN" in device) == (product == "bf16")
    with pytest.raises(DoRAError):
        run(tmp_path / "out", **given)
    assert torch_state() == before


@pytest.mark.parametrize("error, share, faster", [
    (1e-6, 0.4, True), (1e-3, 0.4, False), (1e-6, 0.9, False)])
def test_onednn_is_measured(monkeypatch, error, share, faster):
    """oneDNN is used if its product is exact (a CPU with AMX rounds) and clearly faster: with a
    clock that only products move, and a product with an error, in its mode."""
    switch, now, real = torch.backends.mkldnn.matmul, [0.0], torch.Tensor.__matmul__

    def product(x, y):
        fast = switch.fp32_precision == "bf16"
        now[0] += share if fast else 1.0
        return real(x, y) * (1 + error * (fast and x.dtype == torch.float32))

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(train_glue.time, "thread_time", lambda: now[0])
    before = switch.fp32_precision
    assert train_glue.onednn_is_faster.__wrapped__(1) is faster
    assert switch.fp32_precision == before

