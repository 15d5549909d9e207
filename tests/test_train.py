"""A run is a function of its settings, bit for bit; accumulation, compaction and evaluation give
what one batch, masks and single examples give."""
import json
import math
import statistics
from operator import mul

import pytest
import torch
from tiny import (
    evaluations, files, json_lines, lines, newest, result, run, same_runs,
    run_settings, tiny_model)

import data
import train_glue
from dora import METHODS, DoRAError, Pruner, budget, load_adapter, read_safetensors
from train_glue import (
    TrainConfig, adapt, backward, evaluate, evaluate_dev, learning_rate, load_roberta, make_config,
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


def close(a, b):
    """Assert that two lists of metrics.jsonl's lines agree to 1e-9."""
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-9)


# ---- a run and its folder -----------------------------------------------------------------------

def test_runs_repeat(tmp_path):
    """Two runs with one seed are equal bit for bit in every file; another seed differs."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    same_runs(tmp_path / "a", tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's (folder, what train returned)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, run(folder)


def test_files_of_a_run(finished):
    """The folder holds what the README says, and nothing temporary; of checkpoints the newest
    two. TrainConfig made from config.json is the run's own; run.json has its surroundings."""
    folder, returned = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "adapter", "checkpoints", "config.json", "log.txt", "metrics.jsonl",
        "ranks.json", "ranks.jsonl", "result.json", "run.json"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "step-00000016.pt", "step-00000024.pt"]
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"]
    values = json.loads((folder / "config.json").read_text())
    assert TrainConfig(**values) == make_config(**run_settings(folder))
    found = json.loads((folder / "run.json").read_text())
    assert found["steps"] == 24 and found["processes"] == 1 and found["torch"] == torch.__version__
    assert found["device"].startswith("cpu (") and found["command"].startswith("python ")
    assert {"python", "numpy", "platform"} <= found.keys()
    assert 0 < returned["seconds"] <= found["seconds"] < 1000


def test_metrics_of_a_run(finished):
    """One line for each of the 24 steps with eight fields; the learning rate is learning_rate's,
    the budget Eq. 9's, live is the budget of the last pruning, all the rest finite; the penalty is
    0 once pruning has ended. After an epoch's last step stand its dev scores."""
    folder, returned = finished
    config, found = make_config(**run_settings(folder)), lines(folder)
    assert [line["step"] for line in found] == [*range(1, 25)]
    for line in found:
        t = line["step"]
        assert list(line) == ["step", "lr", "loss", "penalty", "grad_norm", "live",
                              "parameters", "budget"]
        assert all(math.isfinite(value) for value in line.values())
        assert line["lr"] == learning_rate(t - 1, 24, config)
        assert line["budget"] == budget(t, 24, config, 12)
        pruned = [s for s in (7, 10, 12) if s <= t]             # first is 4, interval 3, last 12
        assert line["live"] == (budget(pruned[-1], 24, config, 12) if pruned else 36)
        assert (line["penalty"] > 0) == (t <= 12)
    assert evaluations(folder) == returned["epochs"]
    every = json_lines(folder / "metrics.jsonl")
    assert [i for i, line in enumerate(every) if "loss" not in line] == [8, 17, 26]


def test_history_of_the_ranks(finished):
    """ranks.jsonl: the matrices and what a component costs in each (d_in + d_out), then the live
    components, before training and after each pruning that changed them; the last are those of
    ranks.json, and each sum is the line's live."""
    folder, returned = finished
    (first, *rows), metrics = json_lines(folder / "ranks.jsonl"), lines(folder)
    costs = first["parameters per component"]
    assert [*costs] == [*returned["ranks"]] and [*costs.values()] == [64, 64, 64, 64, 96, 96] * 2
    assert [row["step"] for row in rows] in ([0, 7, 10, 12], [0, 7, 10])  # 12 may change nothing
    assert rows[0]["live"] == [3] * 12 and rows[-1]["live"] == [*returned["ranks"].values()]
    for row in rows[1:]:
        assert sum(row["live"]) == metrics[row["step"] - 1]["live"]


def test_what_a_run_says(finished, tmp_path, capsys):
    """The lines before the first step name task, method, examples, steps, device, dtype, folder,
    what is pruned and the parameters, which add up; then come scores and result. No line is longer
    than 80 columns, and log.txt has the same text."""
    folder, returned = finished
    run(tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("toy, dora, seed 1: 61 train and 40 dev examples, 24 steps, 8 per epoch")
    text, log = " ".join(" ".join(said).split()), (tmp_path / "out" / "log.txt").read_text()
    parts = {name: returned[f"{name}_parameters"] for name in ("adapter", "gate", "head")}
    assert sum(parts.values()) == returned["trainable_parameters"] and parts["gate"] == 36
    for part in (f"model {files()[1].resolve()} with its own head, float32 on cpu (",
                 f"(threads: {torch.get_num_threads()}", "learning rate 0.003, 8 examples per step",
                 f"trained parameters: {returned['trainable_parameters']:,} = adapter "
                 f"{parts['adapter']:,} + gates 36 + head {parts['head']:,}",
                 "from step 7 to 12, pruning reduces the adapter to at most 24 components",
                 f"files in {tmp_path / 'out'}", "step 8, epoch 1: matthews ",
                 f"saved adapter: {returned['adapter_parameters_after_pruning']:,} parameters"):
        assert part in text and part in log, part
    assert max(len(line) for line in said if "/" not in line) <= 80  # a path has no place to cut


def test_the_adapters_card(finished):
    """adapter/README.md names base model, task, labels and score; its front matter is what Hugging
    Face reads. (peers/test_peft.py runs its Python.)"""
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
    found = json.loads((folder / "result.json").read_text())
    assert found == {k: v for k, v in returned.items() if k not in ("ranks", "folder")}
    assert [(e["epoch"], e["step"]) for e in found["epochs"]] == [(1, 8), (2, 16), (3, 24)]
    assert found["last"] == found["epochs"][-1]
    assert found["best"] == max(found["epochs"][1:], key=lambda e: e["matthews"])
    costs = [64, 64, 64, 64, 96, 96] * 2  # d_in + d_out of query to output.dense, in two layers
    assert found["adapter_parameters"] == 3 * sum(costs)  # r' = 3
    assert found["head_parameters"] == 32 * 32 + 32 + 2 * 32 + 2
    assert found["trainable_parameters"] == (            # 36 gates, too
        found["adapter_parameters"] + found["head_parameters"] + 36)
    ranks = json.loads((folder / "ranks.json").read_text())
    assert ranks == returned["ranks"] and len(ranks) == 12 and sum(ranks.values()) == 24
    assert found["adapter_parameters_after_pruning"] == sum(map(mul, ranks.values(), costs))


@pytest.mark.parametrize("method", [*METHODS, "bitfit", "full", "head"])
def test_every_method_runs(tmp_path, method):
    """Eight steps of each: what trains has moved, what is frozen has not, the log is finite, and
    the saved adapter or model scores as the result says."""
    found = run(tmp_path, method=method, max_steps=8)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 9)]
    model, before = load_roberta(files()[1], 2), load_roberta(files()[1], 2)
    if method in METHODS:
        load_adapter(model, tmp_path / "adapter")
        assert sum(found["ranks"].values()) == 24
        assert not (tmp_path / "model").exists()
    else:
        model = load_roberta(tmp_path / "model", 2)
        assert found["ranks"] == {} and not (tmp_path / "adapter").exists()
        assert (tmp_path / "model" / "vocab.json").exists()
        moved = {name for (name, p), q in zip(model.named_parameters(), before.parameters())
                 if not torch.equal(p, q) and name.startswith("roberta.")}
        assert {"head": not moved, "full": len(moved) > 30,
                "bitfit": moved and all(name.endswith("bias") for name in moved)}[method]
    assert evaluate(model, dev(), data.TASKS["toy"])["matthews"] == found["best"]["matthews"]


def dev():
    data_dir, model_dir = files()
    return data.load_task("toy", data_dir, "dev", data.BPE(model_dir), 48)


def test_max_steps(tmp_path):
    """max_steps ends a run within an epoch, and the budget's curve is that of the shorter run. With
    log_every, there is a line each fourth step, and one at the end."""
    found = run(tmp_path, max_steps=11, log_every=4)
    assert found["steps"] == 11 and found["last"]["epoch"] == 1.375
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 11]
    assert lines(tmp_path)[-1]["live"] == 24


def test_the_learning_rate():
    """By hand: 50 steps, 6 % = 3 of warm-up, then straight to 0 after the last step."""
    config = make_config("cola", lr=1.0)
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[:4] == [1 / 3, 2 / 3, 1.0, 1.0] and rates[-1] == 1 / 47
    falls = [a - b for a, b in zip(rates[3:], rates[4:])]
    assert max(falls) - min(falls) < 1e-12
    assert learning_rate(0, 5, config) == 1.0                        # no warm-up in short runs


def test_losses():
    """Cross entropy and squared error by hand, on two examples."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert math.isclose(task_loss(logits, torch.tensor([0, 0])), expected, rel_tol=1e-6)
    assert task_loss(logits[:, :1], torch.tensor([0.5, 1.0])) == (0.25 + 1) / 2


# ---- evaluation ---------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [1, 2])
def test_predictions_keep_the_files_order(classes):
    """predict, which sorts by length, against each example alone in the file's order: its class,
    or the value of the one output, cut to 0..1."""
    model, examples = tiny_model(classes), dev()
    model.classifier.out_proj.weight.data *= 10
    logits = torch.stack([model(torch.tensor([e.ids]), torch.ones(1, len(e.ids), dtype=torch.bool))
                          .detach()[0] for e in examples])
    shift = logits.median(0).values - (0.5 if classes == 1 else 0)  # so that both classes occur
    model.classifier.out_proj.bias.data -= shift
    alone = (logits - shift).argmax(1) if classes == 2 else (logits - shift)[:, 0].clamp(0, 1)
    assert predict(model, examples) == pytest.approx(alone.numpy(), rel=0, abs=1e-6)
    assert len({*alone.tolist()}) > 1 and len({len(e.ids) for e in examples}) > 5


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_spread_of_the_outputs(classes):
    """By hand: the standard deviation of a regression's output, or the largest of any difference
    between two logits; a constant added to every logit changes nothing."""
    logits = torch.randn(20, classes, dtype=torch.float64)
    columns = logits.T.tolist()
    expected = statistics.pstdev(columns[0]) if classes == 1 else max(
        statistics.pstdev([x - y for x, y in zip(a, b)]) for a in columns for b in columns)
    assert math.isclose(train_glue.spread(logits), expected)
    assert math.isclose(train_glue.spread(logits + 5), expected)


@pytest.mark.parametrize("regression, noise, collapsed", [
    (False, 0.0, True), (False, 1000, False), (True, 1e-4, True), (True, 1000, False)])
def test_a_collapsed_run_says_so(tmp_path, monkeypatch, regression, noise, collapsed):
    """Constant or nearly constant outputs on dev, of classes or of a number: each evaluation says
    so with the remedy, result.json has it, and the run ends normally. Others say nothing."""
    changes = {}
    if regression:
        monkeypatch.setitem(data.TASKS, "mine", data.Task(
            "mine", "mine", ("text",), "score", ("pearson",), labels=()))
        (tmp_path / "mine").mkdir()
        rows = [f"the dog number {i}\t{i % 6}" for i in range(30)]
        for split in ("train", "dev"):
            (tmp_path / "mine" / f"{split}.tsv").write_text("\n".join(["text\tscore", *rows]))
        changes = dict(task="mine", data_dir=str(tmp_path))
    real = train_glue.Classifier.forward
    monkeypatch.setattr(train_glue.Classifier, "forward", lambda *a: real(*a) * noise + 0.3)
    found = run(tmp_path / "out", epochs=2, lr=0.004, method="head", **changes)
    said = (tmp_path / "out" / "log.txt").read_text().splitlines()
    said = [line for line in said if "  step " in line]
    assert len(said) == 2 and all(("collapsed" in line) == collapsed for line in said)
    assert result(tmp_path / "out")["collapsed"] is collapsed
    assert (found["last"]["spread"] < train_glue.COLLAPSED) == collapsed


def test_the_mean_of_mnlis_two():
    """T3: two dev files: each accuracy, and their mean as the headline."""
    task = data.TASKS["mnli"]
    first = [e._replace(label=i % 3) for i, e in enumerate(dev())]
    second = [e._replace(label=0) for e in dev()[:10]]
    scores = evaluate_dev(tiny_model(3), {"dev": first, "dev_mm": second}, task)
    assert list(scores) == ["accuracy", "spread", "accuracy_dev", "spread_dev", "accuracy_dev_mm",
                            "spread_dev_mm"]
    assert scores["accuracy"] == (scores["accuracy_dev"] + scores["accuracy_dev_mm"]) / 2
    assert scores["accuracy_dev_mm"] == evaluate(tiny_model(3), second, task)["accuracy"]


# ---- accumulation, compaction, number types -----------------------------------------------------

@pytest.mark.parametrize("whole, parts", [
    pytest.param((16, 1), (8, 2), marks=pytest.mark.slow), ((12, 1), (4, 3))])
def test_accumulation(tmp_path, masks, whole, parts):
    """In float64 without dropout, 50 steps of a batch against the same in parts: losses to 1e-9,
    the same masks. The last batch is short: 13 = 7 + 6 of 8 + 8, and 1 + 0 + 0 of 4 + 4 + 4."""
    for name, (size, accumulate) in (("whole", whole), ("parts", parts)):
        run(tmp_path / name, max_steps=50, batch_size=size, accumulate=accumulate, **FLOAT64)
    close(lines(tmp_path / "whole"), lines(tmp_path / "parts"))
    half = len(masks) // 2
    assert masks[:half] == masks[half:] and len(masks) == 2 * len({t for t, _ in masks}) > 10


@pytest.mark.parametrize("rows, parts, passes", [(5, 100_000, 5), (5, 2, 2), (1, 4, 1)])
def test_never_more_parts_than_examples(rows, parts, passes):
    """T16: forward passes of one step whose batch has fewer examples than --accumulate; their
    gradients are those of the batch's mean loss."""
    model, calls = tiny_model().double(), []
    batch = data.collate(dev(), range(rows))
    model.register_forward_hook(lambda *a: calls.append(1))
    loss = backward(model, batch, torch.zeros(()), parts, torch.device("cpu"))
    grads = [p.grad.clone() for p in model.parameters()]
    assert len(calls) == passes
    model.zero_grad()
    expected = task_loss(model(batch.ids, batch.mask), batch.labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [2.0, 0.5])
def test_compaction_in_training(tmp_path, masks, monkeypatch, rank):
    """A run that drops dead components after the last pruning against one that only masks them:
    losses, scores and the adapter, in float64 to 1e-9. The norm of the gradient differs and is
    not clipped: it counts the closed gates, too, where they are still there."""
    changes = dict(max_steps=40, rank=rank, start_rank=3, clip=1e9, **FLOAT64)
    compacted = run(tmp_path / "compacted", **changes)
    monkeypatch.setattr(train_glue, "compact_", lambda model, optimizer=None: model)
    masked = run(tmp_path / "masked", **changes)
    close(*([{**line, "grad_norm": 0} for line in lines(tmp_path / name)]
            for name in ("compacted", "masked")))
    assert compacted["epochs"] == [pytest.approx(row, rel=1e-9) for row in masked["epochs"]]
    assert compacted["ranks"] == masked["ranks"]
    half = len(masks) // 2
    assert masks[:half] == masks[half:]
    files = [read_safetensors(tmp_path / name / "adapter" / "adapter_model.safetensors")
             for name in ("compacted", "masked")]
    assert files[0].keys() == files[1].keys()
    for key in files[0]:
        torch.testing.assert_close(files[0][key], files[1][key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["dora", "full", "bitfit", "head"])
def test_bf16(tmp_path, method):
    """--dtype bf16: what trains is float32, in the checkpoint too, and so are the logits (D4);
    products in the encoder are bfloat16, and so is what is frozen, unless the encoder trains."""
    config = make_config(**run_settings(tmp_path, dtype="bf16", method=method, max_steps=8))
    _, model, _, _ = prepare(config)
    adapt(model, config)
    frozen = torch.float32 if method in ("full", "bitfit") else torch.bfloat16
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad or "classifier" in name else frozen)

    dtypes, query = [], model.roberta.encoder.layer[0].attention["self"].query
    query.register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    batch = data.collate(dev(), range(4))
    logits = model(batch.ids, batch.mask)
    assert logits.dtype == torch.float32 and dtypes == [torch.bfloat16]
    assert not torch.equal(logits, logits.bfloat16().float())
    train_glue.train(config)
    assert {w.dtype for w in newest(tmp_path)["weights"].values()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


def torch_state():
    """What a run sets in torch and gives back."""
    return (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("deterministic, faster", [(True, True), (False, True), (False, False)])
def test_torch_in_a_run(tmp_path, monkeypatch, deterministic, faster):
    """In a run, --deterministic means deterministic kernels, and without it TF32 and, where it is
    faster, oneDNN. Afterwards torch is as before, even if the run failed."""
    monkeypatch.setattr(train_glue, "onednn_is_faster", lambda threads: faster)
    before, seen, real = torch_state(), [], train_glue.adapt
    monkeypatch.setattr(train_glue, "adapt", lambda *a: seen.append(torch_state()) or real(*a))
    run(tmp_path / "out", deterministic=deterministic, max_steps=4, interval=1)
    product = "bf16" if faster and not deterministic else before[3]
    assert seen == [(before[0], deterministic, not deterministic, product)]
    assert torch_state() == before
    with pytest.raises(DoRAError):
        run(tmp_path / "out", deterministic=deterministic, max_steps=4, interval=1)
    assert torch_state() == before


@pytest.mark.parametrize("error, share, faster", [(1e-6, 0.4, True), (1e-3, 0.4, False),
                                                  (1e-6, 0.9, False)])
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

