"""Fine-tune RoBERTa on GLUE with DoRA: the model, the training step, the loop, the command line.

    python train_glue.py                  toy: no download, under a minute
    python train_glue.py --task cola      downloads RoBERTa-base and CoLA, and trains for hours
    python train_glue.py --help           every setting, with its range and default

Read it from the top: RoBERTa, the training loop, evaluation. The rest is plumbing.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import time
import traceback
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import TASKS, DataError, Example, Task
from dora import (CHOICES, METHODS, DoRAConfig, DoRAError, DoRALinear, NotFiniteError, Pruner,
                  adapter_metadata, atomic_file, budget, compact_, inject,
                  load_adapter, mark, rank_map, read_safetensors, save_adapter, write_safetensors)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: (message, signal). The state has been saved."""


# ---- RoBERTa by hand -----------------------------------------------------------------------------
# The module tree is the checkpoint's key tree: roberta.encoder.layer.0.attention.self.query.weight


@dataclass(frozen=True)
class RobertaConfig:
    """Sizes of a model, named as in its config.json. The defaults are roberta-base's."""

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    pad_token_id: int = 1
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # in the head; None = hidden_dropout_prob
    initializer_range: float = 0.02


class Embeddings(nn.Module):
    """Word + position + type -> LayerNorm."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.pad = config.pad_token_id

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, T, D)."""
        positions = mask.cumsum(1) * mask + self.pad  # tokens count from pad + 1, padding is at pad
        x = self.word_embeddings(ids) + self.position_embeddings(positions)  # (B, T, D)
        x = x + self.token_type_embeddings.weight[0]  # RoBERTa has one token type
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Each head: softmax(q k^T / sqrt(D/H)) v, over the tokens where mask is True."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        D = config.hidden_size
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Attend from the rows h (B, Q, D) to all positions x (B, T, D) with mask (B, T) True."""
        q = self.per_head(self.query(h))  # (B, H, Q, D/H)
        k = self.per_head(self.key(x))  # (B, H, T, D/H)
        v = self.per_head(self.value(x))  # (B, H, T, D/H)

        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)  # (B, H, Q, D/H)
        return out.transpose(1, 2).flatten(2)  # (B, Q, D)

    def per_head(self, t: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Output(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm: the end of either half of a layer."""

    def __init__(self, d_in: int, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(d_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        """(B, Q, d_in), (B, Q, D) -> (B, Q, D)."""
        return self.LayerNorm(self.dropout(self.dense(h)) + residual)


class Layer(nn.Module):
    """A transformer layer: attention, then the feed-forward block."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        D, wide = config.hidden_size, config.intermediate_size
        # dictionaries where the checkpoint's keys have one more name: attention.self.query
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(D, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, wide)})
        self.output = Output(wide, config)

    def forward(self, h: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Return the new states (B, Q, D) of the rows h (B, Q, D), which see all of x (B, T, D)."""
        h = self.attention["output"](self.attention["self"](h, x, mask), h)  # (B, Q, D)
        wide = F.gelu(self.intermediate["dense"](h))  # (B, Q, 4D); gelu in its erf form
        return self.output(wide, h)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """(B, T, D) -> (B, rows, D): the last layer computes only the first rows; None = all."""
        for layer in self.layer[:-1]:
            x = layer(x, x, mask)
        h = x[:, :rows].contiguous()  # copy once here, not in every matrix product
        return self.layer[-1](h, x, mask)


class RobertaModel(nn.Module):
    """Embeddings and encoder, without a head."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """(B, T), (B, T) -> (B, rows, D)."""
        return self.encoder(self.embeddings(ids, mask), mask, rows)


class Classifier(nn.Module):
    """RoBERTa's head, which reads the state of <s>."""

    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        p = config.classifier_dropout
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, state: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        h = self.dropout(state.to(self.dense.weight.dtype))  # float32 even over a bf16 encoder
        return self.out_proj(self.dropout(torch.tanh(self.dense(h))))


class RobertaForSequenceClassification(nn.Module):
    """ids (B, T) int64, mask (B, T) bool, True = token  ->  logits (B, classes)."""

    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config)
        self.classifier = Classifier(config, num_labels)
        self.trained_head, self.origin = False, ""  # set by load_roberta and by prepare
        self.reset(self)

    def reset(self, part: nn.Module) -> None:
        """Start at random: normal weights, zero biases (as BERT)."""
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, classes)."""
        states = self.roberta(ids, mask, rows=1)  # (B, 1, D): the head reads only <s>
        return self.classifier(states[:, 0])


# ---- the training loop ---------------------------------------------------------------------------


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of a batch, a scalar: the cross entropy of logits (B, classes) with
    labels (B,), or for a regression, which has one output, the squared error."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the rate of step 0..T-1: a linear warm-up, then linear to 0."""
    warm = round(config.warmup * total)
    return config.lr * ((step + 1) / warm if step < warm else (total - step) / (total - warm))


def backward(net: Any, batch: data.Batch, penalty: Tensor, parts: int,
             device: torch.device) -> Tensor:
    """Add up the gradients of the batch's mean loss + the penalty; return that loss, a scalar.

    The batch is cut into `parts`, one after another, and each part is shared by the processes. A
    piece weighs as much as its share of the examples, so the weights add up to the batch's mean.
    """
    rank, world = process()
    losses = []
    cuts = batch.split(min(parts, len(batch.labels)))
    for i, part in enumerate(cuts):
        piece = part.split(world)[rank].to(device)
        share = len(piece.labels) / len(batch.labels)
        if not share:  # too few examples for all processes, but each has to call backward:
            piece = batch.split(len(batch.labels))[0].to(device)  # run one, with weight 0

        with nullcontext() if world == 1 or part is cuts[-1] else net.no_sync():
            loss = task_loss(net(piece.ids, piece.mask), piece.labels) * share
            # after the last part, DistributedDataParallel averages the processes' gradients
            (loss * world + (0 if i else penalty)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def train(config: TrainConfig) -> dict[str, Any]:
    """Train with one seed. Return what result.json holds, the ranks, and the run's folder.

    Raises DoRAError or DataError for bad input, NotFiniteError if the training diverges, and
    Interrupted after Ctrl-C, SIGTERM or SIGHUP, once the state is saved.
    """
    started, world = time.monotonic(), process()[1]
    seed_torch(config)
    task, model, model_dir, load = prepare(config)
    train_set, dev_sets = load("train"), load_dev(task, load)
    identity = identify(config, model, train_set)
    layers = adapt(model, config)
    counts = parameter_counts(model, layers)
    device = next(model.parameters()).device

    batch_size = config.batch_size * config.accumulate  # examples per optimizer step
    per_epoch, total = run_length(config, len(train_set))
    pruner = Pruner(layers, config, total)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay,
                                  fused=True)

    with Run(config, identity, model, optimizer, pruner) as run:
        run.start(total, introduction(config, run, total, len(train_set), dev_sets, counts,
                                      model_dir))
        net, evaluated = wrap(model, config)
        if run.owes_scores(per_epoch, total):  # it was interrupted while it evaluated
            run.record(run.step / per_epoch, evaluate_dev(evaluated, dev_sets, task, run.watch),
                       model_dir)
            run.save()
        stream = data.endless_batches(train_set, batch_size, config.seed, run.step)
        while run.step < total:
            # ---- one optimizer step; DoRA is the three lines that call pruner
            if not model.training:  # at the start, and after an evaluation
                model.train()
            penalty = pruner.penalty()
            loss = backward(net, next(stream), penalty, config.accumulate, device)
            pruner.observe()
            norm = nn.utils.clip_grad_norm_(trained, config.clip)
            lr = learning_rate(run.step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            run.step += 1

            # ---- the rest is bookkeeping
            if run.step == pruner.last and layers:  # the mask is final: remove pruned components
                compact_(model, optimizer)
                net, evaluated = wrap(model, config)
            run.bar.update()
            run.losses.append(loss)
            run.note_ranks()
            epoch_ends = run.step % per_epoch == 0 or run.step == total
            logging = run.step % config.log_every == 0 or run.step == total
            # several processes have to agree on a signal, which they do only in these steps
            stopping = run.signals.arrived(device) if logging or world == 1 else 0
            saving = epoch_ends or stopping or run.step % config.save_every == 0

            if logging or saving:  # only these steps wait for the device
                line = {"step": run.step, "lr": lr, "loss": float(reduced(loss)),
                        "penalty": float(penalty.detach()), "grad_norm": float(norm),
                        "live": pruner.live, "parameters": live_parameters(pruner),
                        "budget": budget(run.step, total, config, pruner.per_rank)}
                run.check(line["loss"], line["grad_norm"])
            if logging:
                run.log(line)
            if epoch_ends:
                run.record(run.step / per_epoch, evaluate_dev(evaluated, dev_sets, task, run.watch),
                           model_dir)
            if saving:
                run.save()
                run.stop_after_a_signal(total)

        return run.finish({
            "task": config.task, "method": config.method, "seed": config.seed, "best": run.best,
            "last": run.records[-1], "best_above_budget": run.best_above_budget,
            "collapsed": run.records[-1]["spread"] < COLLAPSED,
            "epochs": run.records, "steps": total, **counts,
            "adapter_parameters_after_pruning": adapter_size(layers, pruner.ranks()),
            "seconds": round(run.earlier_seconds() + time.monotonic() - started, 1)})


# ---- evaluation ----------------------------------------------------------------------------------


COLLAPSED = 0.01  # the spread of outputs below which a model has collapsed (benchmarks/README.md)


# wraps the batches of an evaluation of n examples: a progress bar, a check for Ctrl-C
Watch = Callable[[Iterator[data.Batch], int], Iterator[data.Batch]]


def unwatched(batches: Iterator[data.Batch], n: int) -> Iterator[data.Batch]:
    """Return the batches as they are."""
    return batches


@torch.no_grad()
def compute_logits(model: nn.Module, examples: list[Example], watch: Watch = unwatched) -> Tensor:
    """Return the logits (N, classes), in the order of the examples, in float64 on the CPU."""
    rank, world = process()
    device = next(model.parameters()).device
    rows, logits = [], []
    model.eval()
    batches = data.batches(examples, 64, None, 0, rank=rank, world=world)
    for batch in watch(batches, len(examples)):
        if len(batch.rows):
            rows.append(batch.rows)
            batch = batch.to(device)
            logits.append(model(batch.ids, batch.mask))  # (B, classes)

    classes = torch.tensor(logits[0].shape[1] if logits else 0, device=device)
    classes = reduced(classes, "MAX")  # a process may have no example
    found = torch.zeros(len(examples), int(classes), dtype=torch.float64)  # mps has no float64
    if logits:
        found[torch.cat(rows)] = torch.cat(logits).cpu().double()
    if world > 1:  # each row was filled by one process
        found = reduced(found.to(device)).cpu()
    return found


def choose(logits: Tensor) -> np.ndarray:
    """Return class ids, or scores in 0..1, (N,), from logits (N, classes)."""
    one = logits.shape[1] == 1
    return (logits[:, 0].clamp(0, 1) if one else logits.argmax(1)).double().numpy()


def predict(model: nn.Module, examples: list[Example], watch: Watch = unwatched) -> np.ndarray:
    """Return class ids, or scores in 0..1, (N,) in the order of the examples."""
    return choose(compute_logits(model, examples, watch))


def spread(logits: Tensor) -> float:
    """Return how much the outputs (N, classes) differ between examples: the standard deviation of
    a regression's output, or the largest of any difference between two classes' logits."""
    if logits.shape[1] > 1:
        logits = (logits[:, :, None] - logits[:, None, :]).flatten(1)  # (N, classes^2)
    return logits.std(0, correction=0).max().item()


def evaluate(model: nn.Module, examples: list[Example], task: Task,
             watch: Watch = unwatched) -> dict[str, float]:
    """Return the task's metrics on labelled examples, the headline first, and the spread."""
    logits = compute_logits(model, examples, watch)
    scores = data.score(task, choose(logits), [example.label for example in examples])
    return {**scores, "spread": spread(logits)}


def evaluate_dev(model: nn.Module, sets: dict[str, list[Example]], task: Task,
                 watch: Watch = unwatched) -> dict[str, float]:
    """Return the metrics and the spread on dev. If there are several dev files, as for MNLI, each
    number is the mean over the files, followed by that of each: accuracy, accuracy_m, accuracy_mm.
    """
    scores = {split: evaluate(model, examples, task, watch) for split, examples in sets.items()}
    means = {name: statistics.mean(row[name] for row in scores.values())
             for name in (*task.metrics, "spread")}
    if len(scores) == 1:
        return means

    names = {"dev": "m", "dev_mm": "mm"} if scores.keys() == {"dev", "dev_mm"} else {}
    each = {f"{metric}_{names.get(split, split)}": value
            for split, row in scores.items() for metric, value in row.items()}
    return {**means, **each}


# ==================================================================================================
# You can stop reading here: what follows is plumbing (files, checks, downloads, the command line).
# ==================================================================================================


# ---- RoBERTa's weights ---------------------------------------------------------------------------


WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")  # the first that exists is read
BARE = ("embeddings.", "encoder.", "pooler.")  # names in a saved encoder, without "roberta."


def load_roberta(folder: str | Path, num_labels: int,
                 task: Task | None = None) -> RobertaForSequenceClassification:
    """Load the model in a folder of the Hugging Face layout, in float32.

    The head is the file's, its rows in the order of the task's labels. If the file has no head of
    this size, or one for another task, the head is new and random. Raises DoRAError for a weight
    that is missing, unknown or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise DoRAError(f"{folder}: no model.safetensors or pytorch_model.bin; point --model-dir "
                        f"at a model's folder, or leave it out to download roberta-base")
    weights = read_weights(path)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = RobertaForSequenceClassification(config, num_labels)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    state = match_weights(weights, shapes, path)
    has_head = state.keys() == shapes.keys()
    order = head_order(folder / "config.json", task) if has_head else None
    if order is None:  # no head, or one for other labels
        state = {key: tensor for key, tensor in state.items() if key.startswith("roberta.")}
        model.classifier.to_empty(device="cpu")
        model.reset(model.classifier)
    elif order != sorted(order):
        for key in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            state[key] = state[key][order]

    model.trained_head = order is not None  # whether the file has a head for this task
    model.load_state_dict(state, strict=False, assign=True)  # the mapped file is the weights
    return model


def match_weights(weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]],
                  path: Path) -> dict[str, Tensor]:
    """Return a file's weights by their names in our model, in float32: all of the encoder, and what
    fits of the head. shapes[name] is the shape in our model, such as (D, D). Raises DoRAError."""
    state: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = model_name(key)
        if shapes.get(name) == tuple(tensor.shape):
            if not tensor.is_floating_point():
                raise DoRAError(f"{path}: {key!r:.120} is quantized ({tensor.dtype}); take the "
                                f"model's float32 or float16 weights")
            state[name] = tensor.float()
        elif name.startswith("roberta."):  # heads of other tasks are left out
            raise DoRAError(f"{path}: {key!r:.120} is {tuple(tensor.shape)}, expected "
                            f"{shapes.get(name, 'no such weight')} from the config.json beside it; "
                            f"take both files from one RoBERTa model")

    missing = [name for name in shapes if name.startswith("roberta.") and name not in state]
    if missing:
        known = (*BARE, "roberta.", "classifier.", "lm_head.")
        other = next((key for key in weights if not key.startswith(known)), "")
        raise DoRAError(f"{path}: {missing[0]} is missing, {len(missing)} of {len(shapes)} weights"
                        + f" (the file has {other!r:.80})" * bool(other) + "; take a RoBERTa model")
    return state


def model_name(key: str) -> str:
    """Return a weight's name in our model; "" for one that is not needed here.

    A saved encoder has no "roberta." before its names: encoder.layer.0 ... -> roberta.encoder ...
    """
    if key.startswith(BARE):
        key = f"roberta.{key}"
    unused = key.startswith("roberta.pooler.") or key.endswith("position_ids")
    return "" if unused or not key.startswith(("roberta.", "classifier.")) else key


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any shape in a file, or in all files that an index names."""
    if path.name.endswith(".index.json"):
        return read_shards(path)
    refuse_git_lfs(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of any shape that an index like model.safetensors.index.json lists.

    Raises DoRAError for an index that is damaged or names a file or tensor that does not exist.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
            isinstance(file, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file)
            for file in places.values()):
        raise DoRAError(f"{index}: no weight_map that gives each tensor's file beside it; download "
                        f"it again")

    shards = {}
    for file in sorted({*places.values()}):
        if not (index.parent / file).exists():
            raise DoRAError(f"{index.parent / file} not found, but {index.name} lists it; "
                            f"download it")
        shards[file] = read_weights(index.parent / file)
    for key, file in places.items():
        if key not in shards[file]:
            raise DoRAError(f"{index}: {key!r:.120} is not in {file}; take all from one model")
    return {key: shards[file][key] for key, file in places.items()}


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any shape in a pytorch_model.bin. torch's weights_only runs no code
    from the file. Raises DoRAError for anything but a dictionary of tensors."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))
        if isinstance(weights, dict) and all(
                isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()):
            return weights
        reason = "not a dictionary of tensors"
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
    raise DoRAError(f"{path}: not a plain state dict ({reason}); use the model's model.safetensors")


def refuse_git_lfs(path: Path) -> None:
    """Raise DoRAError for a file that git stores elsewhere and has not fetched yet."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise DoRAError(f"{path}: only a git-lfs pointer to the file; run `git lfs pull`")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises DoRAError if it is missing or is something else."""
    if not path.exists():
        inside = path.parent / "model"  # of a run that trained the whole model
        remedy = f"did you mean {inside}?" if (inside / path.name).exists() else (
            "point --model-dir at a folder with config.json, the tokenizer and the weights")
        raise DoRAError(f"{path} not found; {remedy}")

    refuse_git_lfs(path)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DoRAError(f"{path}: not JSON; download it again") from None
    if not isinstance(values, dict):
        raise DoRAError(f"{path}: not a JSON object; download it again")
    return values


def read_config(path: Path) -> RobertaConfig:
    """Return the sizes in a model's config.json. Raises DoRAError for a model that is not RoBERTa
    and for a field that is missing or out of range."""
    values = read_json(path)
    if is_run(values):
        raise DoRAError(f"{path} is a run's, not a model's; to score the run, use --adapter "
                        f"{path.parent}, and to start from it --model-dir {path.parent}/model")
    fixed = {"model_type": "roberta", "is_decoder": False, "add_cross_attention": False,
             "hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": data.PAD}
    for key, value in fixed.items():
        if values.get(key, value) != value:
            raise DoRAError(f"{path}: {key} is {values[key]!r:.60}, expected {value!r}; take a "
                            f"RoBERTa encoder")

    sizes: dict[str, Any] = {f.name: values.get(f.name) for f in dataclasses.fields(RobertaConfig)}
    for f in dataclasses.fields(RobertaConfig):
        size = sizes[f.name]
        if size is None and f.default is None:
            continue
        whole = type(f.default) is int
        types = [int] if whole else [int, float]
        low, high = (1, 2**24) if whole else (0, 0.99)
        if type(size) not in types or not low <= size <= high:
            raise DoRAError(f"{path}: {f.name} is {size!r:.60}, expected a number from {low} to "
                            f"{high} (roberta-base: {f.default})")
    config = RobertaConfig(**sizes)
    if config.num_hidden_layers > 1000:
        raise DoRAError(f"{path}: num_hidden_layers is {config.num_hidden_layers}, expected 1000 "
                        f"or less")
    if config.hidden_size % config.num_attention_heads:
        raise DoRAError(f"{path}: hidden_size {config.hidden_size} is not divisible by "
                        f"{config.num_attention_heads} heads")
    return config


def head_order(path: Path, task: Task | None) -> list[int] | None:
    """Return the row of the file's head for each label of the task; None if it is for other labels.

    RTE's labels are (entailment, not_entailment). A config.json whose id2label is
    {0: not_entailment, 1: entailment} gives [1, 0]. Labels without a name, LABEL_0, LABEL_1, are
    taken to be in the task's order. Raises DoRAError for an id2label that is damaged.
    """
    values = read_json(path)
    if task is None:
        return []
    if plain(str(values.get("finetuning_task") or task.name)) != plain(task.name):
        return None
    if not task.labels:  # only save_model says in which unit a regression's output is
        return [0] if values.get("label_top") == task.top else None
    if values.get("problem_type") not in (None, "single_label_classification"):
        return None

    n = len(task.labels)
    names = values.get("id2label") or {str(i): f"LABEL_{i}" for i in range(n)}
    if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))):
        raise DoRAError(f"{path}: id2label is {names!r:.80}, expected a label for each id from 0")
    words = [plain(str(names[str(i)])) for i in range(len(names))]
    if words == [f"label{i}" for i in range(n)]:
        return [*range(n)]
    labels = [plain(label) for label in task.labels]
    return [words.index(label) for label in labels] if sorted(words) == sorted(labels) else None


def plain(name: str) -> str:
    """Return a name without what checkpoints write differently: STS-B -> stsb."""
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", "", name.strip().lower())


def save_model(model: RobertaForSequenceClassification, folder: str | Path,
               task: Task | None = None) -> None:
    """Save a model without adapter layers in the layout that load_roberta and transformers read.

    With a task, config.json names it and its labels, so that load_roberta knows the head's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = [f"LABEL_{i}" for i in range(model.classifier.out_proj.out_features)]
    about: dict[str, Any] = {}
    if task:
        labels = list(task.labels) or labels
        about = {"finetuning_task": task.name, **({} if task.labels else {"label_top": task.top})}
    config = {"architectures": ["RobertaForSequenceClassification"], "model_type": "roberta",
              "hidden_act": "gelu", **dataclasses.asdict(model.config),
              "bos_token_id": data.BOS, "eos_token_id": data.EOS, **about,
              "id2label": dict(enumerate(labels)),
              "label2id": {label: i for i, label in enumerate(labels)}}
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", config)


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DoRAConfig):
    """All that a run depends on: the method's settings, and these. Each field is also a flag of
    the command line, and the comment beside it is the flag's help text."""

    task: str = "toy"  # a row of TASKS that has a train file
    method: str = "dora"  # trains an adapter (dora, ...), all biases, everything, or the head
    data_dir: str | None = None  # folder with CoLA/, STS-B/, ...; none = download
    model_dir: str | None = None  # model folder; none = download FacebookAI/roberta-base
    out: str | None = None  # run folder; none = runs/TASK-METHOD-SEED
    seed: int = 1  # of head, adapter, order and dropout
    lr: float = 2e-3  # peak learning rate of AdamW
    batch_size: int = 16  # examples per forward pass, over all processes
    accumulate: int = 1  # forward passes per optimizer step
    epochs: int = 45  # passes over the train set
    max_steps: int | None = None  # optimizer steps, instead of epochs
    weight_decay: float = 0.01  # decoupled weight decay of AdamW
    clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.06  # share of steps with a rising learning rate
    max_len: int = 128  # tokens per example; longer texts are cut
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl
    save_every: int = 500  # optimizer steps between checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps; auto = cuda or mps if there is one
    dtype: Literal["float32", "bf16", "float64"] = "float32"  # of the encoder; adapters: >= float32
    compile: bool = False  # torch.compile the model
    deterministic: bool = False  # only deterministic kernels, and no TF32; slower on a GPU
    resume: bool = False  # continue from the run folder's newest checkpoint
    overwrite: bool = False  # delete the files of the run in the folder, and start again

    RANGES: ClassVar[dict[str, str]] = {
        "> 0": "lr clip",
        ">= 0, < 1e18": "seed",
        ">= 0": "weight_decay",
        ">= 0, < 1": "warmup",
        ">= 1": "batch_size accumulate epochs max_steps log_every save_every",
        ">= 8": "max_len"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("task", trainable_tasks()), ("method", METHOD_ROWS)):
            if getattr(self, name) not in choices:
                raise DoRAError(f"{name} = {getattr(self, name)}: choose one of "
                                f"{', '.join(choices)}")
        for name in ("data_dir", "model_dir", "out"):
            if getattr(self, name) == "":
                raise DoRAError(f"{name} is empty; name a folder, or leave the flag out")
        if self.resume and self.overwrite:
            raise DoRAError("resume continues a run, overwrite deletes it; choose one")
        if self.dtype == "float64" and self.device.startswith("mps"):
            raise DoRAError("dtype = float64: mps has no float64; use float32 or --device cpu")


# The paper's Table 8. WNLI, which is not in it, has RTE's row.
COLUMNS_8 = ("lr", "batch_size", "epochs", "eta", "interval")
TABLE_8 = {
    "rte": (2e-3, 16, 80, 0.5, 10),
    "mrpc": (2.5e-3, 16, 30, 0.3, 50),
    "stsb": (3e-3, 16, 45, 0.3, 10),
    "cola": (2e-3, 16, 45, 0.3, 10),
    "sst2": (8e-4, 64, 60, 0.5, 10),
    "qnli": (3.5e-3, 16, 12, 0.5, 50),
    "qqp": (1e-3, 16, 10, 0.3, 50),
    "mnli": (3e-3, 32, 10, 0.3, 50),
    "wnli": (2e-3, 16, 80, 0.5, 10),
    "toy": (3e-3, 32, 10, 0.3, 10),
}
# differs: the learning rates of the paper's Table 8 suit its form; dora and lora use a quarter
LR_FACTOR = {"dora": 0.25, "lora": 0.25}  # at the whole rate some runs collapse (benchmarks)
METHOD_ROWS: dict[str, dict[str, Any]] = {
    **METHODS,
    # these three have no adapter, so there is nothing to prune
    "bitfit": {**METHODS["lora"], "lr": 1e-3},
    "full": {**METHODS["lora"], "lr": 2e-5},
    "head": METHODS["lora"],
}


def trainable_tasks() -> list[str]:
    """Return the names of the tasks that have a train file."""
    return [name for name, task in TASKS.items() if "train" in task.files]


def make_config(task: str = "toy", method: str = "dora", **flags: Any) -> TrainConfig:
    """Return the task's defaults (Table 8), overridden by the method's row, then by flags.

    Raises DoRAError for a flag that would have no effect.
    """
    row = dict(zip(COLUMNS_8, TABLE_8.get(task, ())))
    if task != "toy":  # whose rate was tried
        row["lr"] = row.get("lr", TrainConfig.lr) * LR_FACTOR.get(method, 1.0)
    flags = with_tuples(flags)
    try:
        config = TrainConfig(task=task, method=method,
                             **{**row, **METHOD_ROWS.get(method, {}), **flags})
    except TypeError as error:  # an unknown name
        raise DoRAError(f"{error}".replace("TrainConfig.__init__() got an ", "")) from None

    for name, reason in unused_settings(config).items():
        if flags.get(name) is not None:
            raise DoRAError(f"{name} = {flags[name]} has no effect with {reason}; leave it out")
    return config


def unused_settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings that have no effect in a run, and the setting that is the reason."""
    if config.method not in METHODS:
        return dict.fromkeys(help_of(DoRAConfig), f"method = {config.method}")

    unused = {}
    if config.importance != "norm":
        unused["eps"] = f"importance = {config.importance or 'none'}"
    if config.penalty is None:
        unused["eta"] = "penalty = none"
    if config.schedule is None:
        names = ("initial_phase", "final_phase", "interval", "beta1", "beta2", "budget_unit",
                 "penalty", "eta")
        unused.update(dict.fromkeys(names, "schedule = none"))
    return unused


@functools.cache  # inspect.getsource parses the file
def help_of(config: type) -> dict[str, str]:
    """Return the comment beside each field that a class adds to its parent's fields."""
    source = inspect.getsource(config)
    return dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", source, re.MULTILINE))


# ---- what a run starts from ----------------------------------------------------------------------


def seed_torch(config: TrainConfig) -> None:
    """Set torch's global state for a run: the seed, the kind of kernels, an empty compiler."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(config.deterministic)
    # float32 products on CUDA in TF32, which has 10 bits of mantissa and is several times faster
    torch.backends.cuda.matmul.allow_tf32 = not config.deterministic
    if config.compile:
        torch.compiler.reset()  # torch gives up after 8 versions of a model: forget earlier runs
    torch.manual_seed(config.seed)


Loader = Callable[..., list[Example]]


def prepare(config: TrainConfig) -> tuple[Task, RobertaForSequenceClassification, Path, Loader]:
    """Return (task, pretrained model on its device, model folder, load): load(split) reads a file.

    Raises DoRAError or DataError for files that are missing, damaged or of different models.
    """
    task = data.find_task(config.task)
    device = find_device(config.device, config.dtype)
    model_dir = Path(config.model_dir) if config.model_dir else data.download_model()
    sizes = read_config(model_dir / "config.json")  # first: a BERT folder is refused as BERT
    bpe = data.BPE.from_folder(model_dir)
    positions = sizes.max_position_embeddings - sizes.pad_token_id - 1
    if config.max_len > positions:
        raise DoRAError(f"max_len = {config.max_len}: {model_dir} has {positions} positions; "
                        f"lower --max-len")
    if len(bpe.vocab) > sizes.vocab_size:
        raise DoRAError(f"{model_dir}: the tokenizer has {len(bpe.vocab)} tokens, the model "
                        f"{sizes.vocab_size}; take all files from one model")

    def load(split: str, name: str = config.task) -> list[Example]:
        return data.load_task(name, find_data(config, name), split, bpe, config.max_len)

    model = load_roberta(model_dir, task.num_labels, task)
    # what a run's scores depend on: the encoder's weights, its sizes, the tokenizer
    tables = json.dumps([dataclasses.asdict(sizes), bpe.vocab, [*bpe.ranks]])
    marks = json.dumps([mark(p) for p in model.roberta.parameters()])
    model.origin = f"{zlib.crc32(marks.encode()):08x}-{zlib.crc32(tables.encode()):08x}"
    set_dtype(model, config, device)
    return task, model.to(device), model_dir, load


def find_data(config: TrainConfig, name: str) -> Path:
    """Return the folder that holds the task's folder. DataError if the download fails."""
    return Path(config.data_dir or data.download_task(name))


def load_dev(task: Task, load: Loader) -> dict[str, list[Example]]:
    """Return the examples of each dev file. Raises DoRAError if the task has none."""
    splits = [split for split in task.files if split.startswith("dev")]
    if not splits:
        raise DoRAError(f"task {task.name} has no dev file; add one to its row of TASKS")
    return {split: load(split) for split in splits}


def find_device(name: str, dtype: str = "float32") -> torch.device:
    """Return the device of this process. Raises DoRAError if it is not available."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available() and dtype != "float64"
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        if name == "cuda" and process()[1] > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # or other libraries would put their share on cuda:0
        if device.type in ("cpu", "cuda", "mps"):
            return device
    except (RuntimeError, AssertionError):
        pass
    raise DoRAError(f"device = {name} is not available here; use --device cpu")


def set_dtype(model: RobertaForSequenceClassification, config: TrainConfig,
              device: torch.device) -> None:
    """Give the model the dtype of --dtype. With bf16 the head stays float32, so logits are, too."""
    if config.dtype == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        say("warning: this CPU has no bfloat16 instructions, so --dtype bf16 is slower than "
            "float32 here")
    if config.dtype == "float64":
        model.double()
    elif config.dtype == "bf16" and config.method in ("full", "bitfit"):
        # the encoder trains: its weights stay float32, only products are in bfloat16
        autocast = torch.autocast(device.type, torch.bfloat16)
        model.roberta.forward = autocast(model.roberta.forward)  # type: ignore[method-assign]
    elif config.dtype == "bf16":
        model.roberta.to(torch.bfloat16)


def cpu_has_bf16() -> bool:
    """Return True if the CPU multiplies bfloat16 matrices itself (x86: AVX-512 BF16 or AMX)."""
    return any(on for name, on in torch.cpu.get_capabilities().items() if "bf16" in name)


def adapt(model: RobertaForSequenceClassification, config: TrainConfig) -> dict[str, DoRALinear]:
    """Choose what to train. Return the adapted layers, none for full, bitfit and head."""
    if config.method in METHODS:
        check_targets(model, config)
        layers = inject(model, config)
    else:
        layers = {}
        for name, parameter in model.named_parameters():
            is_bias = config.method == "bitfit" and name.endswith("bias")
            parameter.requires_grad_(config.method == "full" or is_bias)
    model.classifier.requires_grad_(True)
    return layers


def check_targets(model: RobertaForSequenceClassification, config: TrainConfig) -> None:
    """Raise DoRAError for a target in the head, which trains as a whole, for one that matches
    nothing, and for more components than the rank that a matrix can have."""
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    suffixes = {re.sub(r"^.*\.\d+\.", "", name) for name in matrices if "encoder" in name}
    candidates = f"candidates: {', '.join(sorted(suffixes))}"
    for target in config.targets:
        matches = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")]
        in_head = [name for name in matches if name.startswith("classifier")]
        if in_head:
            raise DoRAError(f"target {target!r} matches {in_head[0]}, part of the head, which "
                            f"trains as a whole; {candidates}")
        if not matches:
            raise DoRAError(f"target {target!r} matches no module; {candidates}")
        for name in matches:
            full_rank = min(matrices[name].weight.shape) if name in matrices else math.inf
            if config.r_prime > full_rank:
                raise DoRAError(f"start_rank = {config.r_prime}: {name} has at most rank "
                                f"{full_rank}; lower rank or start_rank")


def parameter_counts(model: RobertaForSequenceClassification,
                     layers: dict[str, DoRALinear]) -> dict[str, int]:
    """Return how many parameters train. Those of the adapter (A and B), its gates, the head and the
    encoder itself add up to them."""
    counts = {"adapter": sum(m.A.numel() + m.B.numel() for m in layers.values()),
              "gate": sum(m.c.numel() for m in layers.values() if m.c.requires_grad),
              "head": sum(p.numel() for p in model.classifier.parameters())}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts["encoder"] = trainable - sum(counts.values())
    counts["trainable"] = trainable
    return {f"{name}_parameters": count for name, count in counts.items()}


def sum_in_words(counts: dict[str, int]) -> str:
    """Return the sum of a run's trained parameters in words, such as "9 = adapter 6 + head 3"."""
    terms = [f"{name} {counts[f'{name}_parameters']:,}"
             for name in ("adapter", "gate", "head", "encoder") if counts[f"{name}_parameters"]]
    return f"{counts['trainable_parameters']:,} = {' + '.join(terms)}".replace("gate ", "gates ")


def live_parameters(pruner: Pruner) -> int:
    """Return the parameters of the components that the last pruning kept."""
    parts = pruner.mask.split(pruner.config.r_prime)
    return sum(int(part.sum()) * (layer.in_features + layer.out_features)
               for layer, part in zip(pruner.layers.values(), parts))


def adapter_size(layers: dict[str, DoRALinear], ranks: dict[str, int]) -> int:
    """Return the parameters of an adapter with these ranks: d_in + d_out per component."""
    return sum(rank * sum(layers[name].base.weight.shape) for name, rank in ranks.items())


def run_length(config: TrainConfig, examples: int) -> tuple[int, int]:
    """Return (optimizer steps per epoch, steps of the whole run) on this many examples."""
    per_epoch = math.ceil(examples / (config.batch_size * config.accumulate))
    return per_epoch, config.max_steps or config.epochs * per_epoch


def identify(config: TrainConfig, model: RobertaForSequenceClassification,
             train_set: list[Example]) -> dict[str, Any]:
    """Return what a resumed run must have in common with the one it continues, beside settings."""
    task = TASKS[config.task]
    folder = find_data(config, task.name) / task.folder
    return {"model weights, config.json and tokenizer": model.origin,
            "train examples": len(train_set),
            **{file: data.checksum(folder / file) for split, file in task.files.items()
               if split.startswith(("train", "dev"))}}


# ---- what a run says about itself ----------------------------------------------------------------


def introduction(config: TrainConfig, run: Run, total: int, examples: int,
                 dev_sets: dict[str, list[Example]], counts: dict[str, int],
                 model_dir: Path) -> str:
    """Return the lines that a run prints before it starts."""
    dev = sum(map(len, dev_sets.values()))
    per_epoch, _ = run_length(config, examples)
    return (f"{config.task}, {config.method}, seed {config.seed}: {examples:,} train and {dev:,} "
            f"dev examples, {total:,} steps, {per_epoch:,} per epoch\n"
            f"model {base_name(config, model_dir)}, {config.dtype} on {device_name(run.device)}\n"
            f"learning rate {config.lr:g}, {config.batch_size * config.accumulate} examples per "
            f"step{rank_in_words(config)}\n"
            f"trained parameters: {sum_in_words(counts)}{after_pruning(config, run.pruner)}\n"
            f"files in {run.folder}")


def rank_in_words(config: TrainConfig) -> str:
    """Return the components per matrix in words, such as ", rank 2 on average, from 3"."""
    if config.method not in METHODS:
        return ""
    return f", rank {config.rank:g}" + f" on average, from {config.r_prime}" * bool(config.schedule)


def after_pruning(config: TrainConfig, pruner: Pruner) -> str:
    """Return what pruning will leave of the adapter, in words; "" without pruning."""
    if config.schedule is None:
        return ""
    rest = budget(pruner.total_steps, pruner.total_steps, config, pruner.per_rank)
    if config.budget_unit == "components":
        return f"; pruning leaves {rest:,} of the adapter's {len(pruner.mask):,} components"
    return f"; pruning leaves the adapter at most {rest:,}"


def device_name(device: torch.device) -> str:
    """Return a device and what it is: cpu (2 threads), cuda:0 (NVIDIA H100)."""
    more = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.type == "cuda":
        more = torch.cuda.get_device_name(device)
        more += ", products in TF32" * torch.backends.cuda.matmul.allow_tf32
    return f"{device} ({more})".replace("(1 threads)", "(1 thread)")


def base_name(config: TrainConfig, model_dir: Path) -> str:
    """Return the base model's absolute path, or its name on Hugging Face if it was downloaded."""
    return str(model_dir.resolve()) if config.model_dir else "FacebookAI/roberta-base"


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a run's speed and its last digits depend on, beside the settings."""
    return {"device": device_name(device), "processes": process()[1],
            "platform": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__}


def peak_memory(device: torch.device) -> float | None:
    """Return the most memory in MB that the process has held: the GPU's tensors, or all on a CPU;
    None where the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, elsewhere kB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


BUILT_IN = tuple(TASKS.values())  # the tasks that the command line knows

CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags: [lora, dora]
---

# {task}: a LoRA adapter{found}

The adapter and its classification head, trained by train_glue.py and saved in PEFT's LoRA format.

| | |
|---|---|
| base model | {name} |
| task | {task} |
| labels | {labels} |
| dev score | {scores} |
| components | {live} |
| seed, longest text | {seed}, {max_len} tokens |

Load it with PEFT and transformers (a base with another head is accepted):

```python
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained(
    {folder}, num_labels={num_labels}, ignore_mismatched_sizes=True).eval()
```

Load it here, and give it a new text:

```python
import torch
import data
from dora import load_adapter
from train_glue import load_roberta

base = {base_here}
model = load_roberta(base, num_labels={num_labels}).eval()
load_adapter(model, {folder})
ids = torch.tensor([data.encode_row(data.BPE(base), {texts}, {max_len})])
print(model(ids, torch.ones_like(ids, dtype=torch.bool)))  # mask: False where ids are padding
```
"""

AGAIN = """
Score it again:

```sh
python train_glue.py --eval-only --adapter {}
```
"""


def model_card(config: TrainConfig, base: str, folder: Path, ranks: dict[str, int],
               scores: dict[str, Any]) -> str:
    """Return the README.md of an adapter's folder: what it is, and how to load it."""
    task = TASKS[config.task]
    labels = ", ".join(f"{i} = {label}" for i, label in enumerate(task.labels))
    metrics = in_words({name: scores[name] for name in task.metrics})
    text = CARD.format(
        base=json.dumps(base), name=base, folder=json.dumps(str(folder)), task=task.name,
        found=f" whose ranks were found by {config.method}" if config.schedule else "",
        labels=labels or f"a number; the output times {task.top:g} is the score",
        scores=f"{metrics} (after step {scores['step']}, epoch {scores['epoch']:g})",
        live=f"{sum(ranks.values())} in {len(ranks)} matrices, {min(ranks.values())} to "
             f"{max(ranks.values())} each",
        seed=config.seed, max_len=config.max_len, num_labels=task.num_labels,
        base_here=json.dumps(base) if config.model_dir else "data.download_model()",
        texts=json.dumps([f"a {name}" for name in task.texts]))
    return text + AGAIN.format(shlex.quote(str(folder))) * (task in BUILT_IN)


# ---- the run's folder ----------------------------------------------------------------------------


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP: kept until a step is done, when the state can be saved."""

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

    def __init__(self) -> None:
        self.number = 0  # of the signal that arrived

    def __enter__(self) -> Signals:
        def handle(number: int, frame: Any) -> None:
            self.number = number

        numbers = [getattr(signal, name) for name in self.NAMES if hasattr(signal, name)]
        self.handlers = {number: signal.signal(number, handle) for number in numbers
                         if not is_ignored_hangup(number)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def arrived(self, device: torch.device) -> int:
        """Return the signal that arrived at any of the processes, 0 if none did."""
        if process()[1] == 1:
            return self.number
        return int(reduced(torch.tensor(self.number, device=device), "MAX"))


def is_ignored_hangup(number: int) -> bool:
    """Return True for the SIGHUP of a run that nohup started, which is to survive it."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. Raises DoRAError if another process holds it.

    The system releases the lock when the process ends, however it ends.
    """
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise DoRAError(f"{folder}: another run is writing here; use another --out or wait "
                            f"until it ends") from None
        yield


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a path in an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def newest_undamaged(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint that is intact, and its content. Raises DoRAError if none is."""
    for path in reversed(paths):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            with zipfile.ZipFile(path) as archive:  # torch.load ignores the checksums
                if archive.testzip() is None and "identity" in state.keys():
                    return path, state
        except Exception:  # a damaged pickle raises nearly anything
            pass
        say(f"{path} is damaged, going back to the one before")
    raise DoRAError(f"{paths[0].parent}: all checkpoints are damaged; start with another --out")


def refuse_other_settings(folder: Path, config: TrainConfig) -> None:
    """Raise DoRAError if the run in a folder was made with other settings, data or model."""
    if other := changed_setting(folder, config, but=("data_dir", "model_dir")):
        raise DoRAError(f"{folder} contains a run with {other}; replace it with --overwrite, or "
                        f"use another --out")


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    return sorted(folder.glob("checkpoints/step-*.pt"))


def is_run(values: dict[str, Any]) -> bool:
    """Return whether a config.json with these values is a run's, and not a model's."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    return {"task", "method"} <= values.keys() <= names


def settings_of_run(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.json; {} if it is missing, damaged or a model's."""
    try:
        values = read_json(path)
    except DoRAError:
        return {}
    return values if is_run(values) else {}


def refuse_overwriting(folder: Path, config: TrainConfig | None = None) -> None:
    """Raise DoRAError if a folder has a run that this one neither resumes nor overwrites, or files
    of the same names that are not a run's."""
    saved = checkpoints_in(folder)
    found = [file for pattern in Run.FILES for file in folder.glob(pattern)]
    known = settings_of_run(folder / "config.json") or saved and not (config and config.overwrite)
    # only the first process looks: it may be deleting these files while the others come here
    if found and not known and process()[0] == 0:
        raise DoRAError(f"{found[0]} would be overwritten, and {folder} is not a run's folder (it "
                        f"has no config.json of a run); use another --out")
    finished = any((folder / name).exists() for name in (
        "result.json", "adapter/adapter_config.json", "model/config.json"))
    if not (saved or finished) or config and (config.overwrite or config.resume and saved):
        return
    other = changed_setting(folder, config) if config else ""
    resume = "" if other or not saved else "continue it with --resume, "
    raise DoRAError(f"{folder} already contains a run{f' with {other}' if other else ''}; {resume}"
                    f"replace it with --overwrite, or use another --out")


def changed_setting(folder: Path, config: TrainConfig, but: tuple[str, ...] = ()) -> str:
    """Return the first setting that differs from that of the run in a folder, as "lr = 0.1, not
    0.2"; "" if none does, or if the folder does not tell. Of the settings that a resumed run may
    change, only those in `but` count."""
    before = settings_of_run(folder / "config.json")
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():
        was = before.get(name, value)
        same_place = name in but and was and value and Path(was).resolve() == Path(value).resolve()
        if was != value and not same_place and (name not in Run.FREE or name in but):
            return f"{name} = {was}, not {value}"
    return ""


def delete_run(folder: Path, config: TrainConfig) -> None:
    """Delete the files that a run writes, and no other. Raises DoRAError if the run that is to
    replace it starts from one of them."""
    if config.model_dir and Path(config.model_dir).resolve() == (folder / "model").resolve():
        raise DoRAError(f"--overwrite would delete {config.model_dir}, from which this run starts; "
                        f"use another --out")
    for pattern in Run.FILES:
        for path in folder.glob(pattern):
            path.unlink()
    for name in {pattern.split("/")[0] for pattern in Run.FILES if "/" in pattern}:
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


class Run:
    """A run's progress and its folder, which holds

        config.json     the settings
        run.json        the command lines, versions, device, seconds and peak memory
        log.txt         what was printed, with the time
        metrics.jsonl   losses every log_every steps, and the dev scores of each evaluation
        ranks.jsonl     the live components per matrix, after each pruning that changed them
        checkpoints/    step-N.pt, the newest two
        adapter/        of the best epoch after the last pruning; model/ if there is no adapter
        result.json     the scores
        ranks.json      the live components per matrix at the end

    Only the first process writes. All files except log.txt and *.jsonl are written atomically.
    """

    # what a checkpoint holds of this object, beside tensors
    STATE = ("step", "records", "best", "best_above_budget", "lowest_loss", "first_loss", "warned")
    # settings that may change when a run is resumed
    FREE = ("out", "resume", "overwrite", "device", "save_every", "data_dir", "model_dir",
            "compile")
    FILES = ("config.json", "run.json", "log.txt", "metrics.jsonl", "ranks.jsonl", "ranks.json",
             "result.json", "run.png", "compare.png", "checkpoints/step-*.pt",
             "checkpoints/not-finite.pt", "checkpoints/.*.part",
             "checkpoints/*.damaged", "adapter/README.md",
             "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
             "model/config.json", "model/model.safetensors", "model/vocab.json",
             "model/merges.txt", "model/tokenizer.json", "submission/*.tsv")

    def __init__(self, config: TrainConfig, identity: dict[str, Any],
                 model: RobertaForSequenceClassification, optimizer: torch.optim.Optimizer,
                 pruner: Pruner):
        self.config, self.folder = config, run_folder(config)
        self.model, self.optimizer, self.pruner = model, optimizer, pruner
        self.device = next(model.parameters()).device
        self.started = time.monotonic()
        self.total = 0  # steps of the whole run
        self.calls: list[dict[str, Any]] = []  # what run.json says of each call
        self.step = 0  # optimizer steps done
        self.records: list[dict[str, Any]] = []  # the metrics after each epoch
        self.best: dict[str, Any] | None = None  # the best of them since the last pruning
        self.best_above_budget: dict[str, Any] | None = None  # and before it
        self.losses: deque[Tensor] = deque(maxlen=50)  # of the last steps
        self.lowest_loss = math.inf  # of the means of 50 so far
        self.first_loss: float | None = None  # the first of these means
        self.warned = False  # that the loss rises

        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in self.FREE}
        self.identity = json.loads(json.dumps({**settings, **identity}))
        self.metrics, self.history = self.folder / "metrics.jsonl", self.folder / "ranks.jsonl"
        self.checkpoints: list[Path] = []  # of the run that this one continues
        self.writes = process()[0] == 0
        self.signals = Signals()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.enter_context(naming(self.folder))
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))
            refuse_overwriting(self.folder, self.config)  # behind the lock, nobody adds to it
            if not self.config.overwrite:
                self.checkpoints = checkpoints_in(self.folder)
            if self.writes:
                if self.config.overwrite:
                    delete_run(self.folder, self.config)
                for part in self.folder.glob("checkpoints/.*.part"):  # left by a killed process
                    part.unlink()
                if not self.checkpoints:
                    self.write_settings()
                    self.metrics.write_bytes(b"")
            stack.enter_context(self.signals)
            self.open = stack.pop_all()  # closed by __exit__
        return self

    def write_settings(self) -> None:
        """Write config.json."""
        settings = {**dataclasses.asdict(self.config), "resume": False, "overwrite": False}
        write_json(self.folder / "config.json", settings)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, NotFiniteError):
                self.save("not-finite")  # for inspection; --resume ignores it
                folder = self.folder / "checkpoints"
                good = [path.stem for path in checkpoints_in(self.folder)] or ["none yet"]
                raise NotFiniteError(
                    f"{error} (--lr), which was {self.optimizer.param_groups[0]['lr']:.3g}. The "
                    f"state is in {folder}/not-finite.pt, the last good checkpoint there is "
                    f"{good[-1]}") from None
        finally:
            if not isinstance(error, OSError):  # such as a full disk
                if isinstance(error, Exception) and self.calls:
                    self.note(str(error.args[0] if error.args else error))
                self.note_call(seconds=round(time.monotonic() - self.started, 1),
                               last_step=self.step, peak_memory_mb=peak_memory(self.device))
            self.open.__exit__(kind, error, trace)

    def start(self, total: int, introduction: str) -> None:
        """Resume from the newest checkpoint if there is one; say what the run does, and show the
        progress bar."""
        rank = process()[0]
        if self.checkpoints:
            self.restore()
            if self.writes:
                self.write_settings()  # data and model may have moved
        self.say(introduction)
        if self.checkpoints:
            self.say(f"continuing after step {self.step:,}")
        elif self.config.resume:
            self.say(f"{self.folder}: no checkpoint yet, starting from the beginning")
        if rank:
            torch.manual_seed(self.config.seed + rank + self.step)  # each draws its own dropout
        if not self.checkpoints and self.pruner.layers:
            if self.writes:
                self.history.unlink(missing_ok=True)
            self.write_line(self.history, {"matrices": [*self.pruner.layers]})
            self.write_line(self.history, {"step": 0, "live": self.live_components()})
        self.mask = self.pruner.mask  # that of the last line in ranks.jsonl
        self.live = self.live_components()

        if self.checkpoints:
            self.calls = earlier_calls(self.folder / "run.json")
        self.calls.append({"command": shlex.join(["python", *sys.argv]),
                           "started": time.strftime("%Y-%m-%d %H:%M:%S"), "first_step": self.step,
                           **environment(self.device)})
        self.total = total
        self.note_call()
        self.bar = self.open.enter_context(progress_bar(
            total, "step", initial=self.step, leave=True))

    def earlier_seconds(self) -> float:
        """Return how long the calls took that were interrupted and that this one continues."""
        return sum(call.get("seconds", 0.0) for call in self.calls[:-1])

    def note_call(self, **found: Any) -> None:
        """Write run.json, with what has been found about this call."""
        if self.writes and self.calls:
            self.calls[-1].update(found)
            write_json(self.folder / "run.json", {"steps": self.total, "calls": self.calls})

    def say(self, text: str) -> None:
        """Print a text and write it to log.txt."""
        say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a text to log.txt."""
        if self.writes:
            path = self.folder / "log.txt"
            with naming(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def write_line(self, path: Path, line: dict[str, Any]) -> None:
        """Append a line to a file of JSON lines."""
        if self.writes:
            with naming(path), open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self.bar.set_postfix({key: line[key] for key in ("loss", "live", "parameters")})
        self.warn_of_a_rising_loss(line["lr"])
        self.write_line(self.metrics, line)

    def live_components(self) -> list[int]:
        """Return the live components of each matrix, after the last pruning."""
        return [int(part.sum()) for part in self.pruner.mask.split(self.config.r_prime)]

    def note_ranks(self) -> None:
        """Append a line to ranks.jsonl if a pruning has changed the live components."""
        if self.pruner.mask is self.mask:  # each pruning makes a new one
            return
        self.mask, before, self.live = self.pruner.mask, self.live, self.live_components()
        if self.live != before:
            self.write_line(self.history, {"step": self.step, "live": self.live})

    def watch(self, batches: Iterator[data.Batch], n: int) -> Iterator[data.Batch]:
        """Show the progress of an evaluation of n examples, which counts no time in the bar of the
        steps. After Ctrl-C, save the state as it was before the evaluation, and stop."""
        started = time.time()
        with progress_bar(n, "example", desc="evaluation") as bar:
            for batch in batches:
                yield batch
                bar.update(min(len(batch.rows) * process()[1], n - bar.n))
                if self.signals.arrived(self.device):
                    self.save()
                    self.stop_after_a_signal(self.total)
        if not self.bar.disable:
            took = time.time() - started
            self.bar.start_t += took
            self.bar.last_print_t += took

    def owes_scores(self, per_epoch: int, total: int) -> bool:
        """Return True if the last step ended an epoch whose evaluation was interrupted."""
        ended = self.step and (self.step % per_epoch == 0 or self.step == total)
        return bool(ended and self.step not in [record["step"] for record in self.records])

    def warn_of_a_rising_loss(self, lr: float) -> None:
        """Say once that the mean of the last 50 losses is 1.5 times the lowest that it has been,
        and over half of the first: near 0, such a rise means nothing (benchmarks/README.md)."""
        if len(self.losses) < 50 or self.warned:
            return
        mean = torch.stack(list(self.losses)).mean().item()
        self.first_loss = mean if self.first_loss is None else self.first_loss
        self.lowest_loss = min(self.lowest_loss, mean)
        if mean > 1.5 * self.lowest_loss and mean > 0.5 * self.first_loss:
            self.warned = True
            self.say(f"step {self.step}: the training loss has risen from {self.lowest_loss:.3g} "
                     f"to {mean:.3g} (means of 50 steps), at learning rate {lr:.3g}; if it does "
                     f"not fall again, start with a lower --lr")

    def check(self, loss: float, norm: float) -> None:
        """Raise NotFiniteError if the loss, the gradient or a weight is not finite, and DoRAError
        if the processes' masks differ."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        finite = torch.stack([p.isfinite().all() for p in trained.values()]).tolist()  # one wait
        if not (all(finite) and math.isfinite(loss + norm)):
            bad = [name for name, good in zip(trained, finite) if not good] or ["none"]
            raise NotFiniteError(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}, "
                                 f"first bad weight {bad[0]}; lower the learning rate")

        mask = self.pruner.mask.to(self.device).float()
        if not torch.equal(reduced(mask, "MIN"), reduced(mask, "MAX")):
            raise DoRAError(f"step {self.step}: the processes pruned different components; start "
                            f"them with the same settings and data")

    def record(self, epoch: float, scores: dict[str, float], model_dir: Path) -> None:
        """Keep an epoch's scores, and the weights if it is the best since the last pruning."""
        headline = next(iter(scores))
        best = self.best if self.pruner.done else self.best_above_budget
        self.records.append({"epoch": round(epoch, 3), "step": self.step, **scores})
        self.write_line(self.metrics, self.records[-1])
        if best is None or scores[headline] > best[headline]:
            if self.pruner.done:
                self.best = self.records[-1]
                self.save_best(model_dir)
            else:
                self.best_above_budget = self.records[-1]

        self.say(f"step {self.step:,}, epoch {epoch:.3g}: {in_words(scores)}")
        before = self.records[-2]["spread"] if len(self.records) > 1 else math.inf
        if scores["spread"] < COLLAPSED <= before:  # say it once
            lr = self.optimizer.param_groups[0]["lr"]
            self.say(f"step {self.step}: {collapse(scores['spread'])}, at learning rate {lr:.3g}; "
                     f"start again with a lower --lr, such as {self.config.lr / 4:.2g}")

    def save_best(self, model_dir: Path) -> None:
        """Save the adapter with its head and its card, or the whole model if there is no adapter.
        """
        task = TASKS[self.config.task]
        if self.writes and self.pruner.layers:
            folder, base = self.folder / "adapter", base_name(self.config, model_dir)
            about = {**adapter_labels(task), "max_len": str(self.config.max_len),
                     "model": self.model.origin}
            save_adapter(self.model, folder, metadata=about, peft={
                "task_type": "SEQ_CLS", "base_model_name_or_path": base})
            card = model_card(self.config, base, folder, self.pruner.ranks(), self.records[-1])
            with atomic_file(folder / "README.md") as file:
                file.write(card.encode(errors="backslashreplace"))  # folders' names may be bytes
        elif self.writes:
            save_model(self.model, self.folder / "model", task)
            for name in ("vocab.json", "merges.txt", "tokenizer.json"):
                if (model_dir / name).exists():
                    with atomic_file(self.folder / "model" / name) as file:
                        file.write((model_dir / name).read_bytes())

    def save(self, name: str = "") -> None:
        """Write checkpoints/step-N.pt or NAME.pt: everything needed to resume. One process then
        continues exactly; several processes redraw dropout."""
        if not self.writes:
            return
        sizes = {}
        for path in (self.metrics, self.history):
            if path.exists():
                with naming(path), open(path, "ab") as f:
                    os.fsync(f.fileno())
                    sizes[path.name] = f.tell()
        state = {"identity": self.identity,
                 **{name: getattr(self, name) for name in self.STATE},
                 "losses": list(self.losses),
                 "weights": {k: p for k, p in self.model.named_parameters() if p.requires_grad},
                 "optimizer": self.optimizer.state_dict(),
                 "pruner": self.pruner.state_dict(),
                 "rng": random_states(self.device),
                 "sizes": sizes}
        buffer = io.BytesIO()  # torch.save into a file would hide why a write failed
        torch.save(state, buffer)

        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{name or f'step-{self.step:08d}'}.pt") as file:
            file.write(buffer.getbuffer())
        for old in checkpoints_in(self.folder)[:-2]:
            old.unlink()

    def restore(self) -> None:
        """Load the newest undamaged checkpoint. Raises DoRAError if its settings differ."""
        path, state = newest_undamaged(self.checkpoints)
        for key, value in self.identity.items():
            before = state["identity"].get(key)
            if before != value:
                raise DoRAError(f"{path} was made with {key} = {before}, not {value}; resume with "
                                f"the same {key}, or use another --out")

        if missing := [name for name in self.STATE if name not in state]:
            raise DoRAError(f"{path} is of another version of train_glue.py and lacks "
                            f"{missing[0]}; resume with that version, or start again with "
                            f"--overwrite")

        self.pruner.load_state_dict(state["pruner"])
        if self.pruner.done and self.pruner.layers:
            compact_(self.model, self.optimizer)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, tensor in state["weights"].items():
                parameters[key].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        set_random_states(state["rng"], self.device)
        for name, size in state["sizes"].items() if self.writes else []:
            file = self.folder / name
            if file.exists() and file.stat().st_size > size:
                os.truncate(file, size)  # later steps will be repeated
        for later in self.checkpoints[self.checkpoints.index(path) + 1:] if self.writes else []:
            later.replace(later.with_suffix(".damaged"))  # it would pass for one of the newest two
        for name in self.STATE:
            setattr(self, name, state[name])
        kept = self.folder / ("adapter/adapter_model.safetensors" if self.pruner.layers
                              else "model/model.safetensors")
        if self.best and not kept.exists():
            self.say(f"{kept} is missing; the best epoch from here on will be saved")
            self.best = None
            if self.records[-1]["step"] == self.step:
                self.records.pop()  # so that this epoch is evaluated again
        self.losses.extend(loss.to(self.device) for loss in state["losses"])

    def stop_after_a_signal(self, total: int) -> None:
        """Stop if a signal arrived: raises Interrupted. Call this when the state is saved."""
        if number := self.signals.arrived(self.device):
            text = f"stopped at step {self.step} of {total}, saved in {self.folder}"
            raise Interrupted(text, number)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write ranks.json and result.json; return the result with the ranks and the folder."""
        ranks = self.pruner.ranks()
        if self.writes:
            write_json(self.folder / "ranks.json", ranks)
            write_json(self.folder / "result.json", result)
        result = {**result, "ranks": ranks, "folder": str(self.folder)}
        self.note(summary(result))
        return result


def earlier_calls(path: Path) -> list[dict[str, Any]]:
    """Return the calls that run.json lists; none if it is missing or damaged, since a run can go on
    without."""
    try:
        return [*read_json(path)["calls"]]
    except (DoRAError, KeyError, TypeError):
        return []


def finished_result(folder: Path) -> dict[str, Any] | None:
    """Return what train returned for the run in a folder; None if it is not finished."""
    if not (folder / "result.json").exists():
        return None
    return {**read_json(folder / "result.json"), "ranks": read_json(folder / "ranks.json"),
            "folder": str(folder)}


def in_words(scores: dict[str, float]) -> str:
    """Return metrics as text, without the spread."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items()
                     if not name.startswith("spread"))


def collapse(spread: float) -> str:
    """Return what a small spread of the outputs means."""
    return (f"the outputs on dev are nearly constant (standard deviation {spread:.1g}): the model "
            f"has collapsed")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states, (n,), of the random generators of the CPU and of a run's device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore states, (n,), of random generators, as far as this run uses them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def run_folder(config: TrainConfig) -> Path:
    """Return --out, or runs/TASK-METHOD-SEED."""
    return Path(config.out or f"runs/{config.task}-{config.method}-{config.seed}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


# ---- several processes ---------------------------------------------------------------------------


def say(text: str) -> None:
    """Print from the first process, without breaking the progress bar. A terminal or pipe that is
    gone, or that lacks a character, stops no run."""
    if process()[0]:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding))
    except OSError:  # what is buffered, and what follows, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress_bar(total: int, unit: str, **options: Any) -> Any:
    """Return a progress bar, which only the first process shows, and only on a terminal."""
    return tqdm(total=total, unit=unit, disable=True if process()[0] else None,
                **{"leave": False, **options})


def connect() -> None:
    """Initialise the process group if started by torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and process()[1] == 1:
        # Imported later, its default arguments would hold the group, whose threads then outlive
        # destroy_process_group and can abort the process as it exits.
        import torch.distributed.nn
        torch.distributed.init_process_group()


def process() -> tuple[int, int]:
    """Return (rank, number) of the processes that train together; (0, 1) without torchrun."""
    group = torch.distributed
    on = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if on else (0, 1)


def reduced(value: Tensor, operation: str = "SUM") -> Tensor:
    """Return the sum (MIN, MAX) over all processes of a tensor of any shape."""
    if process()[1] > 1:
        value = value.clone()
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
    return value


def connection_lost(error: RuntimeError) -> bool:
    """Return True if an error is about the connection to another process, not about this one."""
    signs = r"connection (was )?(closed|reset|refused|lost)|closed by peer|broken pipe|" \
            r"socket closed|timed out|timeout|remote process|failed to recv"
    return re.search(signs, str(error), re.IGNORECASE) is not None


def wrap(model: nn.Module, config: TrainConfig) -> tuple[Any, Any]:
    """Return what the loop calls and what evaluation calls: the model, compiled if asked for, and
    for the loop shared between processes."""
    if config.compile:
        say("compiling the model; the next step and the next evaluation may take minutes")
    # batches differ in width: one graph for all
    compiled: Any = torch.compile(model, dynamic=True) if config.compile else model
    if process()[1] == 1:
        return compiled, compiled
    # all processes prune alike, so the masks need not be sent before each step
    return nn.parallel.DistributedDataParallel(compiled, broadcast_buffers=False), compiled


# ---- the toy -------------------------------------------------------------------------------------


def toy(config: TrainConfig) -> dict[str, Any]:
    """Show the whole story in under a minute: pretrain a tiny RoBERTa, freeze it, adapt it.

    Pretraining is full fine-tuning on short sentences: are subject and verb of "these dogs see a
    king" singular or plural? The adaptation task asks whether a sentence is right, and puts phrases
    between the two in which the nearest noun misleads: "these dogs near the king sees a bird".
    Files, tokenizer, loader and loop are those of GLUE. Raises DoRAError in several processes and
    for a model_dir.
    """
    if process()[1] > 1 or config.model_dir:
        raise DoRAError("the toy runs in one process and makes its own model; for torchrun or "
                        "--model-dir, choose a --task and --data-dir")
    torch.set_num_threads(1)  # matrices this small are slower when threads share them
    root = run_folder(config)
    if not (config.resume or config.overwrite) and checkpoints_in(root / "pretrain"):
        raise DoRAError(f"{root} already contains a run; continue it with --resume, replace it "
                        f"with --overwrite, or use another --out")
    untrained = root / "untrained"
    bpe = data.write_toy(root, untrained)
    torch.manual_seed(config.seed)
    tiny = RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=64, num_hidden_layers=3,
                         num_attention_heads=4, intermediate_size=256, max_position_embeddings=64,
                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                         initializer_range=0.1)
    save_model(RobertaForSequenceClassification(tiny, 4), untrained)
    # settings that cannot work are refused now, and not after the pretraining
    rows = {name: n for name, split, n in data.TOY_SIZES if split == "train"}["toy"]
    _, total = run_length(config, rows)
    Pruner(adapt(RobertaForSequenceClassification(tiny, 2), config), config, total)

    def run(name: str, what: str, pretrained: bool = True,
            **changes: Any) -> tuple[str, dict[str, Any]]:
        say(f"--- {what}")
        return what, train(dataclasses.replace(toy_config(config, name, pretrained), **changes))

    no_adapter = dataclasses.asdict(DoRAConfig(**METHODS["lora"]))
    run("pretrain", "pretraining on short sentences, all weights", pretrained=False,
        **{**no_adapter, "task": "toy-pretrain", "method": "full", "lr": 1e-3, "batch_size": 32,
           "epochs": 3, "max_steps": None})
    runs = [run("adapted", f"{config.method} on the pretrained encoder"),
            run("head", "only the head", **{**no_adapter, "method": "head"}),
            run("blind", f"{config.method} without pretraining", pretrained=False)]
    say(f"\nMatthews correlation on the adaptation task, best epoch after the last pruning "
        f"(files in {root})")
    for what, result in runs:
        say(f"{result['best']['matthews']:8.3f}  {what}")
    return runs[0][1]


def toy_config(config: TrainConfig, name: str, pretrained: bool = True) -> TrainConfig:
    """Return the settings of one of the toy's runs."""
    root = run_folder(config)
    model_dir = root / "pretrain" / "model" if pretrained else root / "untrained"
    return dataclasses.replace(config, data_dir=str(root), model_dir=str(model_dir),
                               out=str(root / name),
                               max_len=min(config.max_len, 48))  # no text is longer


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Return the exit code: 2 for bad input, 128 + signal if interrupted."""
    flags = vars(make_parser().parse_args(argv))
    try:
        connect()
        run_command(flags)
        return 0
    except Interrupted as error:
        instead = " in place of --overwrite" * bool(flags.get("overwrite"))
        say(f"{error.args[0]}; continue with the same command and --resume{instead}")
        return 128 + error.args[1]
    except KeyboardInterrupt:
        say("interrupted outside of training; nothing to save")
        return 128 + signal.SIGINT
    except (DoRAError, DataError) as error:
        return failed(f"{error}")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return failed(f"{error.filename or 'a file'}: {error.strerror or error}"
                      + "; finished files are intact" * full)
    except RuntimeError as error:
        if process()[1] == 1:
            raise
        if connection_lost(error):
            failed(f"another process died ({str(error).splitlines()[0]:.100}); continue from the "
                   f"newest checkpoint in {flags.get('out') or 'runs/'} with the same command and "
                   f"--resume")
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at a normal exit, threads of the broken process group may abort
    finally:
        if process()[1] > 1:
            torch.distributed.destroy_process_group()


def failed(message: str) -> int:
    """Print an error and return its exit code."""
    print(f"train_glue.py: error: {message}", file=sys.stderr)
    return 2


def run_command(flags: dict[str, Any]) -> None:
    """Do what the flags of a command line ask for. Raises DoRAError or DataError for bad ones."""
    settings = dict(flags)
    seeds, eval_only, adapter, split = (
        settings.pop(name) for name in ("seeds", "eval_only", "adapter", "predict"))
    if adapter and not eval_only:
        raise DoRAError(f"--adapter {adapter} is only for --eval-only; training starts from "
                        f"a new adapter")
    if eval_only and seeds != [1]:
        raise DoRAError("--seeds has no effect with --eval-only; leave it out")
    if len({*seeds}) < len(seeds):
        raise DoRAError(f"--seeds {' '.join(map(str, seeds))}: name each seed once")
    if eval_only:
        evaluate_only(*saved_run(adapter, settings), split)
        return
    configs = [make_config(**settings, seed=seed) for seed in seeds]
    if split:
        check_test_files(configs[0], split)
    if len(seeds) > 1 and flags.get("out"):
        configs = [dataclasses.replace(config, out=f"{config.out}/seed-{config.seed}")
                   for config in configs]

    results = [run_seed(config, several=len(seeds) > 1) for config in configs]
    for config, result in zip(configs, results) if split else []:
        folder = Path(result["folder"])
        adapter_dir = folder / "adapter" if result["ranks"] else None
        model_dir = config.model_dir if adapter_dir else str(folder / "model")
        config = dataclasses.replace(config, out=str(folder), model_dir=model_dir)
        evaluate_only(config, adapter_dir, split)
    if len(results) > 1:
        summarize(results)


def run_seed(config: TrainConfig, several: bool) -> dict[str, Any]:
    """Train with one seed, and print its result. One of several seeds that has finished before is
    not trained again, and one that was interrupted is continued."""
    is_toy = config.task == "toy" and not config.data_dir
    root = run_folder(config)
    folder, last = (root / "adapted", root / "blind") if is_toy else (root, root)
    if several and not config.overwrite:
        done = finished_result(folder) if (last / "result.json").exists() else None
        if done:
            refuse_other_settings(folder, toy_config(config, "adapted") if is_toy else config)
            metric = TASKS[config.task].metrics[0]
            say(f"seed {config.seed} is finished: {metric} {done['best'][metric]:.4f}, {folder}")
            return done
        started = checkpoints_in(root / "pretrain" if is_toy else root)
        config = dataclasses.replace(config, resume=bool(config.resume or started))

    result = toy(config) if is_toy else train(config)
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a run's score, its parameters, and the map of ranks."""
    say("\n" + summary(result))


def summary(result: dict[str, Any]) -> str:
    """Return a run's score, its parameters, and the map of ranks as text."""
    best, metric = result["best"], TASKS[result["task"]].metrics[0]
    lines = [f"{result['task']}, {result['method']}, seed {result['seed']}: {metric} "
             f"{best[metric]:.4f} after step {best['step']:,} (epoch {best['epoch']:.3g}), "
             f"{result['last'][metric]:.4f} after the last, {result['seconds']:.0f} s",
             f"trained parameters: {sum_in_words(result)}"]
    if result["ranks"]:
        size = result["adapter_parameters_after_pruning"]
        lines += [f"saved adapter: {size:,} parameters" + (
            ", into which the gates are multiplied" if result["gate_parameters"] else "")]
    lines += [f"files in {result['folder']}"]
    if above := result["best_above_budget"]:
        lines += [f"before the last pruning, and so above the budget: {metric} "
                  f"{above[metric]:.4f} after step {above['step']:,} (not saved)"]
    if result["collapsed"]:
        lines += ["the model has collapsed, so neither the score nor the ranks mean anything"]
    if result["ranks"]:
        lines += [f"live components, layer by matrix:\n{rank_map(result['ranks'])}"]
    return "\n".join(lines)


def summarize(results: list[dict[str, Any]]) -> None:
    """Print median, mean and standard deviation over the seeds."""
    metric = TASKS[results[0]["task"]].metrics[0]
    scores = [result["best"][metric] for result in results]
    say(f"\n{metric} over {len(scores)} seeds: median {statistics.median(scores):.4f}, mean "
        f"{statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}")


def saved_run(adapter: str | None, flags: dict[str, Any]) -> tuple[TrainConfig, Path | None]:
    """Return (settings, adapter folder or None) of what --eval-only is to score: the settings of
    the run's config.json, where there is one, overridden by flags. Raises DoRAError."""
    if not adapter and not flags.get("model_dir"):
        raise DoRAError("--eval-only: name what to score, --adapter RUN or --model-dir FOLDER")
    folder = find_adapter(adapter) if adapter else None
    home = folder.absolute().parent if folder else Path()
    if folder and settings_of_run(folder / "config.json"):
        raise DoRAError(f"{adapter} has no adapter yet, since a run saves it after its last "
                        f"pruning; continue the run with --resume")
    if folder is None or not (home / "config.json").exists():
        return make_config(**flags), folder

    values = read_json(home / "config.json")
    if "model_type" in values:  # the adapter stands in its model's folder
        return make_config(**flags), folder
    if not is_run(values):
        raise DoRAError(f"{home / 'config.json'} is not a run's config.json")
    refuse_training_flags(flags, values)
    is_model = (folder / "model.safetensors").exists()
    if is_model and "model_dir" in flags:
        raise DoRAError(f"--model-dir {flags['model_dir']}: {folder} holds a whole model; leave "
                        f"--model-dir out")
    given = {"out": None, **({"model_dir": str(folder)} if is_model else {}), **flags}
    try:
        config = TrainConfig(**with_tuples(values))
    except DoRAError as error:
        raise DoRAError(f"{home / 'config.json'}: {error}") from None
    return dataclasses.replace(config, **with_tuples(given)), None if is_model else folder


def with_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings from JSON or a command line with tuples in place of lists."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()}


EVALUATED = ("task", "method", "data_dir", "model_dir", "out", "max_len", "device", "dtype",
             "compile", "deterministic")  # the settings that an evaluation depends on


def refuse_training_flags(flags: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise DoRAError for a flag that an evaluation ignores and that differs from the run's own."""
    for name, value in flags.items():
        if name not in EVALUATED and run.get(name) != value:
            raise DoRAError(f"{name} = {value} has no effect on the score of a run with {name} = "
                            f"{run.get(name)}; leave it out")


def evaluate_only(config: TrainConfig, adapter: str | Path | None, split: str | None) -> None:
    """Score a trained adapter, or the whole model in model_dir, on dev; write the submission files
    of a split. Raises DoRAError if neither was trained for the task."""
    task = data.find_task(config.task, split or "dev")
    if adapter:
        check_adapter(Path(adapter), task, config)
    _, model, model_dir, load = prepare(config)
    if adapter:
        load_adapter(model, adapter)
        if adapter_metadata(adapter).get("model", model.origin) != model.origin:
            raise DoRAError(f"{adapter} was trained on another model than {model_dir}: weights, "
                            f"config.json or tokenizer differ; use that model")
    elif not model.trained_head:
        raise DoRAError(f"{model_dir}: its weights and config.json have no head for {task.name} "
                        f"({label_text(task)}); name a trained adapter with --adapter RUN/adapter")
    sets = load_dev(task, load)
    scores = evaluate_dev(model, sets, task, watch_without_a_run)
    say(f"{task.name}, {sum(map(len, sets.values())):,} dev examples: {in_words(scores)}")
    if scores["spread"] < COLLAPSED:
        say(collapse(scores["spread"]))

    folder = Path(config.out or home_of(Path(adapter or model_dir))) / "submission"
    for name, part in submission_files(task, split):
        predictions = predict(model, load(part, name), watch_without_a_run)
        if process()[0] == 0:
            with naming(folder):
                path = data.write_submission(TASKS[name], part, predictions, folder)
            say(f"wrote {path}")


def home_of(folder: Path) -> Path:
    """Return the run's folder around an adapter or model; without a run, the folder itself."""
    home = folder.absolute().parent
    return home if settings_of_run(home / "config.json") else folder


def watch_without_a_run(batches: Iterator[data.Batch], n: int) -> Iterator[data.Batch]:
    """Show the progress of an evaluation of n examples."""
    with progress_bar(n, "example", desc="evaluation") as bar:
        for batch in batches:
            yield batch
            bar.update(min(len(batch.rows) * process()[1], n - bar.n))


def submission_files(task: Task, split: str | None) -> list[tuple[str, str]]:
    """Return the (task, split) of each file that --predict writes. MNLI's model does AX, too."""
    if not split:
        return []
    files = [(task.name, name) for name in task.files if name.startswith(split)]
    return files + ([("ax", "test")] if task.name == "mnli" else [])


def check_test_files(config: TrainConfig, split: str) -> None:
    """Raise DataError if a file that --predict reads is missing, before anything is trained."""
    task = data.find_task(config.task, split)
    for name, part in submission_files(task, split) if config.data_dir else []:
        path = find_data(config, name) / TASKS[name].folder / TASKS[name].files[part]
        if not path.exists():
            raise DataError(f"{path} not found, but --predict {split} needs it")


def find_adapter(folder: str | Path) -> Path:
    """Return the folder of an adapter or, after a run without one, of the whole model: for a run's
    folder the one inside, for the toy's that of its adaptation task, else the folder itself."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        return folder
    inside = [folder / name for name in ("adapter", "model", "adapted/adapter", "adapted/model")]
    return next((path for path in inside if path.is_dir()), folder)


def label_text(task: Task) -> str:
    """Return a task's labels in words."""
    return ", ".join(task.labels) or f"a number from 0 to {task.top:g}"


def adapter_labels(task: Task) -> dict[str, str]:
    """Return what an adapter's file says about the task it was trained for."""
    return {"task": task.name, "labels": label_text(task)}


def check_adapter(folder: Path, task: Task, config: TrainConfig) -> None:
    """Raise DoRAError for an adapter that was trained for another task, if its file names one."""
    metadata = adapter_metadata(folder)
    for key, value in adapter_labels(task).items():
        if metadata.get(key, value) != value:
            raise DoRAError(f"{folder} was trained with {key} = {metadata[key]}, not {value}; "
                            f"choose the same --task")
    if metadata.get("max_len", str(config.max_len)) != str(config.max_len):
        say(f"note: {folder} was trained with --max-len {metadata['max_len']}, which may change "
            f"the score")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser, whose flags are the fields of TrainConfig and DoRAConfig."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--task TASK] [--SETTING VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(TrainConfig)
    for config, title in ((TrainConfig, "the run"), (DoRAConfig, "the method")):
        group = parser.add_argument_group(title)
        for name, text in help_of(config).items():
            if name != "seed":
                group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                                   help=help_text(name, text), **flag_options(name, hints[name]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1],
                        help="one run per seed (default: 1)")
    parser.add_argument("--eval-only", action="store_true",
                        help="score --adapter, with the settings of its run; do not train")
    parser.add_argument("--adapter", metavar="RUN", help="for --eval-only: RUN or RUN/adapter")
    parser.add_argument("--predict", choices=("test",), help="write the test set's submission file")
    return parser


def flag_options(name: str, hint: Any) -> dict[str, Any]:
    """Return argparse's options for a setting, from its type hint: float, int | None, ..."""
    kind, *more = get_args(hint) or (hint,)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    tables = {"task": trainable_tasks(), "method": METHOD_ROWS, **CHOICES}
    choices = get_args(hint) if get_origin(hint) is Literal else [
        *tables.get(name, ()), *["none"] * (name in CHOICES)]
    kind = str if choices else kind
    return {"type": functools.partial(parse_value, kind, type(None) in more),
            "metavar": f"{{{','.join(choices)}}}" if choices else kind.__name__.upper(),
            "nargs": "+" if get_origin(hint) is tuple else None}


def help_text(name: str, text: str) -> str:
    """Return a flag's help: the setting's comment, its range, its default, and the methods that
    have another default."""
    ranges = {field: rule for config in (DoRAConfig, TrainConfig)
              for rule, fields in config.RANGES.items() for field in fields.split()}
    default = getattr(TrainConfig, name)
    rows = METHODS if name in help_of(DoRAConfig) else METHOD_ROWS
    others = "".join(f"; {method}: {shown(row[name])}" for method, row in rows.items()
                     if row.get(name, default) != default)
    default = "the task's, Table 8 of the paper" if name in COLUMNS_8 else shown(default)
    if name == "lr":
        others += "".join(f"; {method}: {x:g} of it, but for the toy" for method, x in
                          LR_FACTOR.items())
    bounds = f"{ranges[name]}; " if name in ranges else ""
    return f"{text} ({bounds}default: {default}{others})".replace("%", "%%")


def shown(value: Any) -> str:
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def parse_value(kind: type, optional: bool, text: str) -> Any:
    """Return a flag's text as a setting's value, None for "none" if the setting can be None.
    Raises argparse's error."""
    if optional and text.lower() == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {kind.__name__}") from None


if __name__ == "__main__":
    sys.exit(main())
