"""Fine-tune RoBERTa on GLUE with DoRA: the model, the training step, the loop, the command line.

    python train_glue.py                  toy: no download, about a minute
    python train_glue.py --task cola      downloads RoBERTa-base and CoLA, and trains for hours
    python train_glue.py --help           every setting, with its range and default

Read it from the top: RoBERTa, the training loop, evaluation. The rest is plumbing.
"""

from __future__ import annotations

import argparse
import dataclasses
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
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import TASKS, DataError, Example, Task
from dora import (METHODS, PEFT_NAMES, RANGES, DoRAConfig, DoRAError, DoRALinear, NotFiniteError,
                  Pruner, budget, choices, compact_, did_you_mean, inject, load_adapter, mark,
                  rank_map, read_file, read_safetensors, require, save_adapter, write_safetensors)


class Interrupted(Exception):
    """Raised on Ctrl-C, SIGTERM or SIGHUP, with (message, signal), once the state is saved."""


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
        """(B, T, D) -> (B, rows, D): the last layer computes only the first `rows`; None = all."""
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
        self.head, self.origin = "a new head", ""  # set by load_roberta and by prepare
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
    """Return a batch's mean cross entropy or, of logits (B, 1), squared error; labels are (B,)."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Return the rate of step 0..T-1: a linear warm-up, then linear to 0."""
    warm = round(config.warmup * total)
    return config.lr * ((step + 1) / warm if step < warm else (total - step) / (total - warm))


def backward(net: Any, batch: data.Batch, penalty: Tensor, parts: int,
             device: torch.device) -> Tensor:
    """Add up the gradients of the mean loss + the penalty; return this process's loss, a scalar.

    The batch is cut into `parts` that run in turn, each shared by the processes. A piece weighs as
    much as its share of the examples, so the losses of all add up to the batch's mean.
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
    with Run(config) as run:
        task, model, model_dir, load = prepare(config)
        train_set, dev_sets = load("train"), load_dev(task, load)
        layers = adapt(model, config)

        batch_size = config.batch_size * config.accumulate  # examples per optimizer step
        _, total = run_length(config, len(train_set))
        pruner = Pruner(layers, config, total)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay,
                                      fused=True)

        run.start(model, model_dir, optimizer, pruner, train_set, dev_sets)  # or resume it
        net = wrap(model, config)
        stream = data.endless_batches(train_set, batch_size, config.seed, run.step)
        while run.step < total or run.owes_scores():
            if run.owes_scores():  # at the end of an epoch
                run.record(evaluate_dev(net, dev_sets, task))
                continue
            if not model.training:  # at the start, and after an evaluation
                model.train()

            # ---- one optimizer step; DoRA is the three lines that call pruner
            penalty = pruner.penalty()
            loss = backward(net, next(stream), penalty, config.accumulate, run.device)
            pruner.observe()
            norm = nn.utils.clip_grad_norm_(trained, config.clip)
            lr = learning_rate(run.step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
            run.step += 1

            if run.step == pruner.last and layers:  # the mask is final: remove pruned components
                compact_(model, optimizer)
                net = wrap(model, config)
            run.after_step(lr, loss, penalty, norm)  # logs, checkpoints, Ctrl-C
        return run.finish()


# ---- evaluation ----------------------------------------------------------------------------------


COLLAPSED = 0.01  # the spread of outputs below which a model has collapsed (benchmarks/README.md)


@torch.no_grad()
def compute_logits(model: nn.Module, examples: list[Example]) -> Tensor:
    """Return the logits (N, classes), in the order of the examples, in float64 on the CPU."""
    rank, world = process()
    device = next(model.parameters()).device
    rows, logits = [], []
    model.eval()
    batches = data.batches(examples, 64, None, 0, rank=rank, world=world)
    for batch in watched(batches, len(examples), device):
        if len(batch.rows):  # else this process has no example
            rows.append(batch.rows)
            batch = batch.to(device)
            logits.append(model(batch.ids, batch.mask))  # (B, classes)

    found = torch.cat(gathered([part.cpu().double() for part in logits]))  # (N, classes)
    return found[torch.cat(gathered(rows)).argsort()]


def choose(logits: Tensor) -> np.ndarray:
    """Return class ids, or scores in 0..1, (N,), from logits (N, classes)."""
    one = logits.shape[1] == 1
    return (logits[:, 0].clamp(0, 1) if one else logits.argmax(1)).double().numpy()


def predict(model: nn.Module, examples: list[Example]) -> np.ndarray:
    """Return class ids, or scores in 0..1, (N,) in the order of the examples."""
    return choose(compute_logits(model, examples))


def spread(logits: Tensor) -> float:
    """Return the standard deviation over examples (N, classes) of a regression's output, or of the
    difference between two classes' logits, for the pair in which it is largest."""
    if logits.shape[1] > 1:
        logits = (logits[:, :, None] - logits[:, None, :]).flatten(1)  # (N, classes^2)
    return logits.std(0, correction=0).max().item()


def evaluate(model: nn.Module, examples: list[Example], task: Task) -> dict[str, float]:
    """Return the task's metrics on labelled examples, the headline first, and the spread."""
    logits = compute_logits(model, examples)
    scores = data.score(task, choose(logits), [example.label for example in examples])
    return {**scores, "spread": spread(logits)}


def evaluate_dev(model: nn.Module, sets: dict[str, list[Example]], task: Task) -> dict[str, float]:
    """Return the metrics and the spread on dev. If there are several dev files, as for MNLI, each
    number is the mean over the files, followed by that of each, such as accuracy_dev_mm."""
    scores = {split: evaluate(model, examples, task) for split, examples in sets.items()}
    means = {name: statistics.mean(row[name] for row in scores.values())
             for name in (*task.metrics, "spread")}
    if len(scores) == 1:
        return means

    each = {f"{metric}_{split}": value
            for split, row in scores.items() for metric, value in row.items()}
    return {**means, **each}


# ==================================================================================================
# You can stop reading here: what follows is plumbing (files, checks, the toy, the command line).
# ==================================================================================================


# ---- RoBERTa's weights ---------------------------------------------------------------------------


BARE = ("embeddings.", "encoder.", "pooler.")  # names in a saved encoder, without "roberta."
UNUSED = ("pooler.dense.weight", "pooler.dense.bias", "position_ids")  # its parts not needed here
ITS_HEAD = "its own head"


def load_roberta(folder: str | Path, num_labels: int,
                 task: Task | None = None) -> RobertaForSequenceClassification:
    """Load the model in a folder of the Hugging Face layout, in float32.

    The head is the file's, its rows in the order of the task's labels. If the file has no head of
    this size, or one for another task, the head is new and random. Raises DoRAError for a weight
    that is missing, unknown or of another shape.
    """
    folder = data.expanded(folder)
    config, path = read_config(folder / "config.json"), folder / "model.safetensors"
    require(path.exists(), f"{folder}: no model.safetensors; name a folder that save_pretrained "
            f"wrote, or leave --model-dir out to download roberta-base")
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = RobertaForSequenceClassification(config, num_labels)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    weights = read_safetensors(path)
    state = match_weights(weights, shapes, path)

    order: list[int] | None = None  # rows of the file's head; None = it has none for this task
    if state.keys() == shapes.keys():
        order = head_order(folder / "config.json", task) if task else [*range(num_labels)]
    if order is None:
        state = {key: tensor for key, tensor in state.items() if key.startswith("roberta.")}
        model.classifier.to_empty(device="cpu")
        model.reset(model.classifier)
        if any(key.startswith("classifier.") for key in weights):
            model.head += " (the file's is for other labels)"
    else:
        model.head = ITS_HEAD
        for key in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            state[key] = state[key][order]
    model.load_state_dict(state, strict=False, assign=True)  # the mapped file is the weights
    return model


def match_weights(weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]],
                  path: Path) -> dict[str, Tensor]:
    """Return a file's weights by their names in our model, in float32: all of the encoder, and what
    fits of the head. shapes[name] is the shape in our model, such as (D, D). Raises DoRAError."""
    state: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name, shape = f"roberta.{key}" if key.startswith(BARE) else key, tuple(tensor.shape)
        if shapes.get(name) == shape and tensor.is_floating_point():
            state[name] = tensor.float()
        elif name.startswith("roberta.") and not name.endswith(UNUSED):  # other heads are left out
            raise DoRAError(f"{path}: {key!r:.120} is {shape} of {tensor.dtype}, expected "
                            f"{shapes.get(name, 'no such weight')} of floating-point numbers from "
                            f"the config.json beside it; take both files from one RoBERTa model")

    missing = [name for name in shapes if name.startswith("roberta.") and name not in state]
    require(not missing, f"{path}: {len(missing)} of {len(shapes)} weights are missing, such as "
            f"{''.join(missing[:1])}; take a RoBERTa model")
    return state


def read_config(path: Path) -> RobertaConfig:
    """Return the sizes in a model's config.json. DoRAError if it is not RoBERTa's or lacks one."""
    values = data.read_json(path)
    require(not settings_of_run(path.parent), f"{path} is a run's, not a model's; to score the "
            f"run, use --eval-only --adapter {path.parent}")
    fixed = {"model_type": "roberta", "is_decoder": False, "add_cross_attention": False,
             "hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": data.PAD}
    for key, value in fixed.items():
        require(values.get(key, value) == value, f"{path}: {key} is {values.get(key)!r:.60}, "
                f"expected {value!r}; take a RoBERTa encoder")

    sizes: dict[str, Any] = {f.name: values.get(f.name) for f in dataclasses.fields(RobertaConfig)}
    for name, size in sizes.items():
        require(size is not None or name == "classifier_dropout",
                f"{path}: {name} is missing; take the model's own config.json")
    return RobertaConfig(**sizes)


def head_order(path: Path, task: Task) -> list[int] | None:
    """Return the row of the file's head for each label of the task; None if it is for other labels.

    RTE's labels are (entailment, not_entailment). A config.json whose id2label is
    {0: not_entailment, 1: entailment} gives [1, 0]. Labels without a name, LABEL_0, LABEL_1, are
    taken to be in the task's order.
    """
    values = data.read_json(path)
    if data.plain(str(values.get("finetuning_task") or task.name)) != data.plain(task.name):
        return None
    if not task.labels:  # only save_model says in which unit a regression's output is
        return [0] if values.get("label_top") == task.top else None

    unnamed = [f"LABEL_{i}" for i in range(len(task.labels))]
    names = values.get("id2label") or dict(enumerate(unnamed))
    words = [data.plain(str(names[i])) for i in sorted(names, key=int)]  # JSON's keys are texts
    for labels in (task.labels, task.words, unnamed):
        known = [data.plain(label) for label in labels]
        if sorted(words) == sorted(known) and (labels is not unnamed or words == known):
            return [words.index(label) for label in known]
    return None


def save_model(model: RobertaForSequenceClassification, folder: str | Path,
               task: Task | None = None) -> None:
    """Save a model without adapter layers in the layout that load_roberta and transformers read.

    With a task, config.json names it and its labels, so that load_roberta knows the head's.
    """
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
    folder = data.expanded(folder)
    write_safetensors(folder / "model.safetensors", model.state_dict())
    data.write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DoRAConfig):
    """The settings of the method and of a run. Each is also a flag, whose help is the comment."""

    task: str = "toy"  # a row of TASKS
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
    compile: bool = False  # torch.compile, for GPUs; slower on a CPU
    deterministic: bool = False  # only deterministic kernels, no TF32, no oneDNN; slower
    resume: bool = False  # continue from the run folder's newest checkpoint
    overwrite: bool = False  # delete the files of the run in the folder, and start again

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):  # from JSON, or from the command line: a b or a,b
            object.__setattr__(self, "targets", tuple(re.findall("[^, ]+", ",".join(self.targets))))
        super().__post_init__()
        for name, table in (("task", TASKS), ("method", METHOD_ROWS)):
            value = data.known_name(getattr(self, name), table)
            require(value in table, f"{name} = {value}: choose one of {', '.join(table)}"
                    f"{did_you_mean(value, table)}")
            object.__setattr__(self, name, value)
        for name in ("data_dir", "model_dir", "out"):
            folder = getattr(self, name)
            object.__setattr__(self, name, folder and str(data.expanded(folder)))
        require(not (self.resume and self.overwrite),
                "resume continues a run, overwrite deletes it; choose one")


RANGES.update({
    "lr": "> 0", "clip": "> 0", "weight_decay": ">= 0", "seed": ">= 0, < 1e18",
    "warmup": ">= 0, < 1", "max_len": ">= 8",
    **dict.fromkeys(("batch_size", "accumulate", "epochs", "max_steps"), ">= 1"),
    **dict.fromkeys(("log_every", "save_every"), ">= 1")})
PEFT_NAMES.update({  # also transformers' names and others, for did_you_mean
    "learning_rate": "lr", "num_train_epochs": "epochs", "output_dir": "out", "seed": "seeds",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
    "max_seq_length": "max_len", "model_name_or_path": "model_dir", "task_name": "task",
    "gpu": "cuda"})

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
    "toy": (6e-3, 16, 10, 0.3, 10),
}
TOY_RANK = 1 / 6  # where components are pruned: three of eighteen matrices get one
# differs: the learning rates of the paper's Table 8 suit its form; dora and lora use a quarter
LR_FACTOR = {"dora": 0.25, "lora": 0.25}  # at the whole rate some runs collapse (benchmarks)
METHOD_ROWS: dict[str, dict[str, Any]] = {
    **METHODS,
    # these three have no adapter, so there is nothing to prune
    "bitfit": {**METHODS["lora"], "lr": 1e-3},
    "full": {**METHODS["lora"], "lr": 2e-5},
    "head": METHODS["lora"],
}


def make_config(task: str = "toy", method: str = "dora", **flags: Any) -> TrainConfig:
    """Return the task's defaults (Table 8), overridden by the method's row, then by flags.

    Raises DoRAError for a setting of the method that would have no effect.
    """
    task, method = data.known_name(task, TASKS), data.known_name(method, METHOD_ROWS)
    row = dict(zip(COLUMNS_8, TABLE_8.get(task, ())))
    if task != "toy":  # whose rate was tried
        row["lr"] = row.get("lr", TrainConfig.lr) * LR_FACTOR.get(method, 1.0)
    settings = {**row, **METHOD_ROWS.get(method, {}), **flags}
    if task == "toy" and settings.get("schedule", DoRAConfig.schedule):
        settings = {"rank": TOY_RANK, **settings}
    config = TrainConfig(task=task, method=method, **settings)
    for name, cause in unused_settings(config).items():
        cause = cause if cause in flags else "method"
        require(flags.get(name) is None, f"{name} = {flags.get(name)} has no effect with {cause} = "
                f"{shown(getattr(config, cause))}; leave it out")
    return config


def unused_settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings that have no effect in a run, and the setting that is the cause."""
    if config.method not in METHODS:
        return dict.fromkeys(help_of(DoRAConfig), "method")

    unused = {} if config.importance == "norm" else {"eps": "importance"}
    if config.penalty is None:
        unused["eta"] = "penalty"
    if config.schedule is None:
        unused |= dict.fromkeys(("initial_phase", "final_phase", "interval", "beta1", "beta2",
                                 "budget_unit", "penalty", "eta"), "schedule")
    return unused


@functools.cache  # inspect.getsource parses the file
def help_of(config: type) -> dict[str, str]:
    """Return the comment beside each field that a class adds to its parent's fields."""
    source = inspect.getsource(config)
    return dict(re.findall(r"^    (\w+): [^#\n]*?  # (.*)$", source, re.MULTILINE))


# ---- what a run starts from ----------------------------------------------------------------------

Loader = Callable[..., list[Example]]
ONEDNN: Any = torch.backends.mkldnn  # its name in torch


@contextmanager
def torch_set_up(config: TrainConfig) -> Iterator[None]:
    """Set torch's kernels and seed for a run, then restore the caller's kernels and threads."""
    cuda, cpu = torch.backends.cuda.matmul, ONEDNN.matmul
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    tf32, precision = cuda.fp32_precision, cpu.fp32_precision
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(config.deterministic)
    # float32 products on CUDA in TF32, which has 10 bits of mantissa and is several times faster
    cuda.allow_tf32 = not config.deterministic
    if not config.deterministic and onednn_is_faster(threads):
        cpu.fp32_precision = "bf16"
    if config.compile:
        torch.compiler.reset()  # torch gives up after 8 versions of a model: forget earlier runs
    torch.manual_seed(config.seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        cuda.allow_tf32, cuda.fp32_precision, cpu.fp32_precision = tf32 == "tf32", tf32, precision


@functools.cache  # measured once, so that all runs of a process compute alike
def onednn_is_faster(threads: int) -> bool:
    """Return whether oneDNN takes under 0.6 of MKL's time for a float32 product, and is as exact.

    It does on AMD CPUs with full AVX-512, where MKL uses AVX2. torch's name for the switch, "bf16",
    misleads: there oneDNN computes in float32. With AMX it would round, which the error shows.
    """
    x, w = torch.randn(256, 384, device="cpu"), torch.randn(1536, 384, device="cpu")
    before, times = ONEDNN.matmul.fp32_precision, []
    for precision in (before, "bf16") * 15:  # by turns, since other programs come and go
        ONEDNN.matmul.fp32_precision = precision
        start = time.thread_time()
        product = x @ w.T  # (256, 1536)
        times.append(time.thread_time() - start)
    ONEDNN.matmul.fp32_precision = before

    exact = x.double() @ w.double().T
    error = (product - exact).norm() / exact.norm()
    mkl, onednn = map(statistics.median, (times[::2], times[1::2]))
    return bool(error < 1e-5) and onednn < 0.6 * mkl


def prepare(config: TrainConfig) -> tuple[Task, RobertaForSequenceClassification, Path, Loader]:
    """Return (task, pretrained model on its device, model folder, load): load(split) reads a file.
    Raises DoRAError or DataError for files that are missing, damaged or of different models."""
    task, device = data.find_task(config.task), find_device(config.device)
    model_dir = Path(config.model_dir) if config.model_dir else data.download_model()
    sizes = read_config(model_dir / "config.json")  # first: a BERT folder is refused as BERT
    bpe = data.BPE(model_dir)
    positions = sizes.max_position_embeddings - sizes.pad_token_id - 1
    require(config.max_len <= positions, f"max_len = {config.max_len}: {model_dir} has {positions} "
            f"positions; lower --max-len")
    require(len(bpe.vocab) <= sizes.vocab_size, f"{model_dir}: the tokenizer has {len(bpe.vocab)} "
            f"tokens, the model {sizes.vocab_size}; take all files from one model")

    def load(split: str, name: str = config.task) -> list[Example]:
        folder = config.data_dir or data.download_task(name)
        return data.load_task(name, folder, split, bpe, config.max_len)

    model = load_roberta(model_dir, task.num_labels, task)
    # what a run's scores depend on: the encoder's weights, its sizes, the tokenizer
    tables = json.dumps([dataclasses.asdict(sizes), bpe.vocab, [*bpe.ranks]])
    marks = json.dumps([mark(p) for p in model.roberta.parameters()])
    model.origin = f"{zlib.crc32(marks.encode()):08x}-{zlib.crc32(tables.encode()):08x}"
    if config.dtype == "float64":
        model.double()
    elif config.dtype == "bf16" and config.method in ("full", "bitfit"):
        # the encoder trains: its weights stay float32, only products are in bfloat16
        autocast = torch.autocast(device.type, torch.bfloat16)
        model.roberta.forward = autocast(model.roberta.forward)  # type: ignore[method-assign]
    elif config.dtype == "bf16":
        model.roberta.to(torch.bfloat16)  # the head stays float32, so logits are, too
    return task, model.to(device), model_dir, load


def load_dev(task: Task, load: Loader) -> dict[str, list[Example]]:
    """Return the examples of each dev file."""
    return {split: load(split) for split in task.files if split.startswith("dev")}


def find_device(name: str) -> torch.device:
    """Return the device of this process. Raises DoRAError if it is not available."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and process()[1] > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # or other libraries would put their share on cuda:0
        return device
    except (RuntimeError, AssertionError):
        hint = did_you_mean(name, {"cpu", "cuda", "mps"} - {name})
        raise DoRAError(f"device = {name} is not available here; use --device cpu{hint}") from None


def adapt(model: RobertaForSequenceClassification, config: TrainConfig) -> dict[str, DoRALinear]:
    """Choose what trains besides the head. Return the adapted layers by name, if there are any."""
    if config.method in METHODS:
        layers = inject(model.roberta, config)
        return {f"roberta.{name}": layer for name, layer in layers.items()}
    for name, parameter in model.roberta.named_parameters():
        is_bias = config.method == "bitfit" and name.endswith("bias")
        parameter.requires_grad_(config.method == "full" or is_bias)
    return {}


def run_length(config: TrainConfig, examples: int) -> tuple[int, int]:
    """Return (optimizer steps per epoch, steps of the whole run) on this many examples."""
    per_epoch = math.ceil(examples / (config.batch_size * config.accumulate))
    return per_epoch, config.max_steps or config.epochs * per_epoch


def parameter_counts(model: RobertaForSequenceClassification) -> dict[str, int]:
    """Return how many parameters train in the adapter (A and B), its gates, head and encoder."""
    counts = {"adapter": 0, "gate": 0, "head": 0, "encoder": 0}
    parts = {"A": "adapter", "B": "adapter", "c": "gate"}
    for name, p in model.named_parameters():
        part = "head" if name.startswith("classifier.") else parts.get(name.split(".")[-1])
        counts[part or "encoder"] += p.numel() * p.requires_grad
    return counts


def live_parameters(pruner: Pruner) -> int:
    """Return the parameters of the components that the last pruning kept: d_in + d_out of each."""
    return sum(n * (layer.in_features + layer.out_features)
               for n, layer in zip(pruner.ranks().values(), pruner.layers.values()))


# ---- what a run says about itself ----------------------------------------------------------------


def introduction(run: Run) -> str:
    """Return the lines that a run prints before it starts."""
    config, pruner = run.config, run.pruner
    parts = " + ".join(f"{name} {count:,}" for name, count in run.counts.items() if count)
    lines = [f"{config.task}, {config.method}, seed {config.seed}: {run.examples['train']:,} train "
             f"and {run.examples['dev']:,} dev examples, {run.total:,} steps, {run.per_epoch:,} "
             f"per epoch",
             f"model {run.base} with {run.model.head}, {config.dtype} on {device_name(run.device)}"
             + f", {process()[1]} processes" * (process()[1] > 1),
             f"learning rate {config.lr:g}, {config.batch_size * config.accumulate} examples per "
             f"step", f"trained parameters: {sum(run.counts.values()):,} = {parts}"]
    if config.schedule:
        first = min(pruner.first + config.interval, pruner.last)
        rest = budget(run.total, run.total, config, pruner.per_rank)
        lines += [f"from step {first:,} to {pruner.last:,}, pruning reduces the adapter to at most "
                  f"{rest:,} {config.budget_unit}; a component is live if the last pruning kept it"]
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """Return a run's score, its parameters, and the map of ranks as text."""
    best, metric = result["best"], TASKS[result["task"]].metrics[0]
    lines = [f"{result['task']}, {result['method']}, seed {result['seed']}: {metric} "
             f"{best[metric]:.4f} after step {best['step']:,}, {result['last'][metric]:.4f} "
             f"after the last, {result['seconds']:.0f} s"]
    if result["ranks"]:
        lines += [f"saved adapter: {result['adapter_parameters_after_pruning']:,} parameters",
                  f"live components, layer by matrix:\n{rank_map(result['ranks'])}"]
    return "\n".join([*lines, f"files in {result['folder']}"])


def device_name(device: torch.device) -> str:
    """Return a device and what it is, such as cpu (threads: 2) or cuda:0 (NVIDIA H100)."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    onednn = ", oneDNN" * (ONEDNN.matmul.fp32_precision == "bf16")
    return f"{device} (threads: {torch.get_num_threads()}{onednn})"


def in_words(scores: dict[str, float]) -> str:
    """Return metrics as text, and a warning if the outputs hardly differ."""
    text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items()
                     if not name.startswith("spread"))
    constant = ("; the outputs on dev are nearly constant: the model has collapsed, so start again "
                "with a lower --lr")
    return text + constant * (scores["spread"] < COLLAPSED)


CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags: [lora, dora]
---

# {task}: a LoRA adapter

The adapter and its classification head, trained by train_glue.py --method {method} and saved in
PEFT's LoRA format. Labels: {labels}. On dev: {scores}. Components: {live}. Seed {seed}.

Score a text with PEFT and transformers, in this folder:

```python
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(
    ".", num_labels={num_labels}, ignore_mismatched_sizes=True, dtype=torch.float32).eval()
inputs = AutoTokenizer.from_pretrained({base})(
    {texts}, truncation=True, max_length={max_len}, return_tensors="pt")
logits = model(**inputs).logits
print({answer})
```

Its score on dev again: `python train_glue.py --eval-only --adapter RUN`
"""


def about(config: TrainConfig, model: RobertaForSequenceClassification) -> dict[str, str]:
    """Return what an adapter's file says about how it was trained."""
    task = TASKS[config.task]
    labels = ", ".join(task.labels) or f"a number from 0 to {task.top:g}"
    return {"task": task.name, "labels": labels, "max_len": str(config.max_len),
            "model": model.origin}


def model_card(run: Run) -> str:
    """Return the README.md of an adapter's folder: what it is, and how to load it."""
    task, scores, ranks = TASKS[run.config.task], run.records[-1], run.pruner.ranks().values()
    metrics = ", ".join(f"{name} {scores[name]:.4f}" for name in task.metrics)
    return CARD.format(
        **about(run.config, run.model), base=json.dumps(run.base), method=run.config.method,
        seed=run.config.seed, num_labels=task.num_labels,
        scores=f"{metrics} after step {scores['step']}",
        live=f"{sum(ranks)} in {len(ranks)} matrices, {min(ranks)} to {max(ranks)} each",
        texts=", ".join(json.dumps(f"a {name}") for name in task.texts),
        answer=f"{[*task.labels]}[logits.argmax()]" if task.labels
        else f"{task.top:g} * logits.item()")


# ---- the run's folder ----------------------------------------------------------------------------


class Run:
    """A run's progress and its folder, which holds

        config.json     the settings
        run.json        the latest command line, versions, device and seconds
        log.txt         what was printed, with the time
        metrics.jsonl   losses every log_every steps, and the dev scores of each evaluation
        ranks.jsonl     the live components per matrix, after each pruning
        checkpoints/    step-N.pt, the newest two
        adapter/        of the best epoch after the last pruning; model/ if there is no adapter
        result.json     the scores
        ranks.json      the live components per matrix at the end

    Only the first process writes. All files except log.txt and *.jsonl are written atomically.
    """

    # settings that may change when a run is resumed
    FREE = ("out", "resume", "overwrite", "device", "save_every", "data_dir", "model_dir",
            "compile")
    FILES = ("config.json", "run.json", "log.txt", "metrics.jsonl", "ranks.jsonl", "ranks.json",
             "result.json", "run.png", "compare.png", "checkpoints/step-*.pt",
             "checkpoints/.*.part", "adapter/README.md", "adapter/adapter_config.json",
             "adapter/adapter_model.safetensors", "model/config.json", "model/model.safetensors",
             "model/vocab.json", "model/merges.txt", "model/tokenizer.json", "submission/*.tsv")

    def __init__(self, config: TrainConfig):
        self.config, self.folder, self.started = config, run_folder(config), time.monotonic()
        self.writes = process()[0] == 0
        self.open = ExitStack()  # what __exit__ closes
        self.bar: Any = None  # of the steps; shown by start()
        self.step = 0  # optimizer steps done
        self.records: list[dict[str, Any]] = []  # the metrics after each epoch
        self.best: dict[str, Any] | None = None  # the best of them since the last pruning

    # ---- it begins and ends

    def __enter__(self) -> Run:
        self.open.enter_context(torch_set_up(self.config))
        return self

    def start(self, model: RobertaForSequenceClassification, model_dir: Path,
              optimizer: torch.optim.Optimizer, pruner: Pruner, train_set: list[Example],
              dev_sets: dict[str, list[Example]]) -> None:
        """Take the folder, restore the newest checkpoint if there is one, and say what will happen.
        From here on, signals wait until the state can be saved."""
        self.model, self.model_dir = model, model_dir
        self.optimizer, self.pruner = optimizer, pruner
        self.device = next(model.parameters()).device
        self.base = str(model_dir.resolve()) if self.config.model_dir else "FacebookAI/roberta-base"
        self.examples = {"train": len(train_set), "dev": sum(map(len, dev_sets.values()))}
        self.counts = parameter_counts(model)
        self.per_epoch, self.total = run_length(self.config, len(train_set))
        files = TASKS[self.config.task].files
        self.identity = {  # what a resumed run has in common with the one that it continues
            "task": self.config.task, "method": self.config.method,  # first: they change others
            **{k: v for k, v in dataclasses.asdict(self.config).items() if k not in self.FREE},
            "model weights, config.json and tokenizer": model.origin,
            **{files[split]: f"{zlib.crc32(repr(examples).encode()):08x}"
               for split, examples in {"train": train_set, **dev_sets}.items()}}

        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.open.enter_context(locked(self.folder))
        checkpoints = self.claim_folder()
        if checkpoints:
            self.restore(checkpoints[-1])
        if process()[0]:
            torch.manual_seed(self.config.seed + process()[0] + self.step)  # its own dropout
        self.begin_logs()
        self.say(introduction(self))
        if self.config.resume:
            self.say(f"continuing after step {self.step:,}" if checkpoints else
                     "no checkpoint yet, starting from the beginning")
        self.bar = self.open.enter_context(tqdm(  # disable=None: no bar where stderr is a file
            total=self.total, unit="step", initial=self.step, disable=process()[0] or None))
        self.open.enter_context(signals_wait())

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self.open:
            if self.bar is None or isinstance(error, OSError):  # such as a full disk
                return
            if isinstance(error, Interrupted):
                self.save()
                error.args = (f"stopped at step {self.step} of {self.total}, saved in "
                              f"{self.folder}", *error.args)
            if isinstance(error, Exception):
                self.note(str(error.args[0] if error.args else error))

    def claim_folder(self) -> list[Path]:
        """Return the checkpoints to continue from; with --overwrite, delete the run that is there.
        Raises DoRAError for files that no run wrote, and for a run without one of these flags."""
        folder, saved = self.folder, sorted(self.folder.glob("checkpoints/step-*.pt"))
        if self.writes:
            refuse_foreign(folder, settings_of_run(folder))
        if self.config.overwrite:
            require(self.model_dir.resolve() != (folder / "model").resolve(), f"--overwrite would "
                    f"delete {self.model_dir}, from which this run starts; use another --out")
            for file in (f for name in self.FILES for f in folder.glob(name) if self.writes):
                file.unlink()
            return []

        finished = (folder / "result.json").exists()
        resume = "continue it with --resume, " * bool(saved)
        require(saved and self.config.resume or not (saved or finished), f"{folder} already "
                f"contains a run; {resume}replace it with --overwrite, or use another --out")
        return saved

    def finish(self) -> dict[str, Any]:
        """Write ranks.json and result.json; return the result with the ranks and the folder."""
        ranks, last = self.pruner.ranks(), self.records[-1]
        result = {"task": self.config.task, "method": self.config.method, "seed": self.config.seed,
                  "best": self.best, "last": last, "collapsed": last["spread"] < COLLAPSED,
                  "epochs": self.records, "steps": self.total, "seconds": self.note_seconds(),
                  **{f"{part}_parameters": count for part, count in self.counts.items()},
                  "trainable_parameters": sum(self.counts.values()),
                  "adapter_parameters_after_pruning": live_parameters(self.pruner)}
        self.write("ranks.json", ranks)
        self.write("result.json", result)
        gathered([])  # wait until the first process has written what --predict reads
        result = {**result, "ranks": ranks, "folder": str(self.folder)}
        self.bar.close()
        self.say("\n" + summary(result))
        return result

    # ---- its logs

    def begin_logs(self) -> None:
        """Write config.json and run.json. Remove the lines of logs that will be written again."""
        if self.step:
            self.started -= data.read_json(self.folder / "run.json")["seconds"]
        self.note_seconds()
        self.mask = self.pruner.mask  # as last logged
        settings = {**dataclasses.asdict(self.config), "resume": False, "overwrite": False}
        self.write("config.json", settings)
        if self.writes:
            for part in self.folder.glob("checkpoints/.*.part"):  # left by a killed process
                part.unlink()
            for name in ("metrics.jsonl", "ranks.jsonl"):
                log = self.folder / name
                lines = log.read_text().splitlines() if log.exists() and self.step else []
                self.write(name, "".join(f"{line}\n" for line in lines if not self.repeats(line)))
        if not self.step and self.pruner.layers:
            costs = {name: layer.in_features + layer.out_features
                     for name, layer in self.pruner.layers.items()}
            self.append("ranks.jsonl", json.dumps({"parameters per component": costs}))
            live = [self.config.r_prime] * len(costs)
            self.append("ranks.jsonl", json.dumps({"step": 0, "live": live}))

    def repeats(self, text: str) -> bool:
        """Return True for a log's line that was cut short, or is about something still to come."""
        line = json.loads(text) if text.endswith("}") else {"step": math.inf}
        return line.get("step", 0) > self.step or "epoch" in line and line not in self.records

    def write(self, name: str, content: Any) -> None:
        """Write a file of the folder atomically: text, bytes, or else JSON."""
        if not isinstance(content, (str, bytes, memoryview)):
            content = json.dumps(content, indent=2) + "\n"
        if self.writes:
            data.write_file(self.folder / name, content)

    def append(self, name: str, line: str) -> None:
        """Add a line to a file in the folder."""
        if self.writes:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def note(self, text: str) -> None:
        """Write a text to log.txt."""
        self.append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def say(self, text: str) -> None:
        """Print a text and write it to log.txt."""
        say(text)
        self.note(text)

    def note_seconds(self) -> float:
        """Write run.json: what speed and last digits depend on. Return the seconds of all calls."""
        seconds = round(time.monotonic() - self.started, 3)
        self.write("run.json", {
            "steps": self.total, "command": shlex.join(["python", *sys.argv]),
            "device": device_name(self.device), "processes": process()[1],
            "platform": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "seconds": seconds})
        return seconds

    # ---- after a step, and after an epoch

    def after_step(self, lr: float, loss: Tensor, penalty: Tensor, norm: Tensor) -> None:
        """Log, check and save when it is time. Raises Interrupted after a signal."""
        step = self.step
        self.bar.update()
        if self.pruner.mask is not self.mask:  # each pruning makes a new one
            self.mask, live = self.pruner.mask, [*self.pruner.ranks().values()]
            self.append("ranks.jsonl", json.dumps({"step": step, "live": live}))

        logging = step % self.config.log_every == 0 or step == self.total
        saving = step % self.config.save_every == 0
        if logging or saving or self.owes_scores():  # only these steps wait for the device
            line = {"step": step, "lr": lr, "loss": float(reduced(loss)),
                    "penalty": float(penalty.detach()), "grad_norm": float(norm),
                    "live": self.pruner.live, "parameters": live_parameters(self.pruner),
                    "budget": budget(step, self.total, self.config, self.pruner.per_rank)}
            if not math.isfinite(line["loss"] + line["grad_norm"]):
                raise NotFiniteError(
                    f"step {step}: loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}; "
                    f"lower the learning rate (--lr), which was {lr:.3g}")
        if logging:
            left = f", live {self.pruner.live:,}" * bool(self.pruner.layers)
            self.bar.set_postfix_str(f"loss {line['loss']:.3g}{left}")
            self.append("metrics.jsonl", json.dumps(line))
        if saving:
            self.save()
        if logging or process()[1] == 1:  # several processes have to agree on a signal
            stop_if_signalled(self.device)

    def owes_scores(self) -> bool:
        """Return True if the last step ended an epoch that has not been evaluated."""
        scored = self.records[-1]["step"] if self.records else 0
        ended = self.step % self.per_epoch == 0 or self.step == self.total
        return ended and self.step > scored

    def record(self, scores: dict[str, float]) -> None:
        """Keep an epoch's scores, and the weights if it is the best since the last pruning."""
        headline, epoch = next(iter(scores)), self.step / self.per_epoch
        self.records.append({"epoch": round(epoch, 3), "step": self.step, **scores})
        self.append("metrics.jsonl", json.dumps(self.records[-1]))
        if self.pruner.done and (not self.best or scores[headline] > self.best[headline]):
            self.best = self.records[-1]
            self.save_best()
        self.say(f"step {self.step:,}, epoch {epoch:.3g}: {in_words(scores)}")
        self.save()

    def save_best(self) -> None:
        """Save the adapter with its head and its card, or the whole model if there is none."""
        if self.writes and self.pruner.layers:
            save_adapter(self.model, self.folder / "adapter", peft={
                "task_type": "SEQ_CLS", "base_model_name_or_path": self.base},
                metadata=about(self.config, self.model))
            self.write("adapter/README.md", model_card(self))
        elif self.writes:
            save_model(self.model, self.folder / "model", TASKS[self.config.task])
            for name in ("vocab.json", "merges.txt", "tokenizer.json"):
                if (self.model_dir / name).exists():
                    self.write(f"model/{name}", (self.model_dir / name).read_bytes())

    # ---- its checkpoints

    def save(self) -> None:
        """Write checkpoints/step-N.pt. One process resumes exactly; several redraw dropout."""
        if not self.writes:
            return
        state = {"identity": self.identity, "step": self.step, "records": self.records,
                 "best": self.best, "optimizer": self.optimizer.state_dict(),
                 "weights": {k: p for k, p in self.model.named_parameters() if p.requires_grad},
                 "pruner": self.pruner.state_dict(), "products": ONEDNN.matmul.fp32_precision,
                 "rng": {kind: RANDOM[kind].get_rng_state() for kind in {"cpu", self.device.type}}}
        buffer = io.BytesIO()  # torch.save into a file would hide why a write failed
        torch.save(state, buffer)
        self.write(f"checkpoints/step-{self.step:08d}.pt", buffer.getbuffer())
        for old in sorted(self.folder.glob("checkpoints/step-*.pt"))[:-2]:
            old.unlink()
        self.note_seconds()

    def restore(self, path: Path) -> None:
        """Load a checkpoint. Raises DoRAError if it is damaged, or if its settings differ."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity, rng = state["identity"], state["rng"]
            self.step, self.records, self.best = state["step"], state["records"], state["best"]
        except Exception:  # a damaged pickle raises nearly anything
            raise DoRAError(f"{path} is damaged, or of another version of train_glue.py; delete it "
                            f"to go back to the one before, or start again with --overwrite"
                            ) from None
        for key, value in self.identity.items():
            require(identity.get(key) == value, f"{path} was made with {key} = "
                    f"{identity.get(key)}, not {value}; resume with the same {key}, or use another "
                    f"--out")

        self.pruner.load_state_dict(state["pruner"])
        if self.pruner.done and self.pruner.layers:
            compact_(self.model, self.optimizer)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, tensor in state["weights"].items():
                parameters[key].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        for kind in rng.keys() & {"cpu", self.device.type}:
            RANDOM[kind].set_rng_state(rng[kind])
        ONEDNN.matmul.fp32_precision = state["products"]  # other kernels change the last digits


RANDOM: dict[str, Any] = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}  # get_rng_state()


def run_folder(config: TrainConfig) -> Path:
    """Return --out, or runs/TASK-METHOD-SEED."""
    return Path(config.out or f"runs/{config.task}-{config.method}-{config.seed}")


def settings_of_run(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder; {} if there is none."""
    path = folder / "config.json"
    values = data.read_json(path) if path.exists() else {}
    return values if {"task", "method", "rank"} <= values.keys() else {}  # else a model's


def refuse_foreign(folder: Path, is_ours: Any) -> None:
    """Raise DoRAError for a folder with files that no run wrote."""
    names = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    require(is_ours or not names, f"{folder} is not empty (it has {', '.join(names):.60}); use "
            f"another --out")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder. DoRAError if another process that still runs holds it."""
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DoRAError(f"{folder}: another run is writing here; use another --out or wait "
                            f"until it ends") from None
        except (ImportError, OSError):  # such as a network's file system
            say(f"{folder} cannot be locked here, so make sure that no other run writes to it")
        yield


# ---- signals, several processes ------------------------------------------------------------------


ARRIVED: list[int] = []  # the signals that wait


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait for stop_if_signalled, when the state can be saved."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows
    if threading.current_thread() is not threading.main_thread():
        numbers = set()  # Python allows no handlers there: signals arrive in the main thread only
    handlers = {number: signal.signal(number, lambda number, frame: ARRIVED.append(number))
                for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}  # nohup
    try:
        yield
    finally:
        ARRIVED.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_if_signalled(device: torch.device) -> None:
    """Raise Interrupted if a signal arrived at any of the processes."""
    number = ARRIVED[-1] if ARRIVED else 0
    if process()[1] > 1:
        number = int(reduced(torch.tensor(number, device=device), "MAX"))
    if number:
        raise Interrupted(number)


def watched(batches: Iterator[data.Batch], n: int, device: torch.device) -> Iterator[data.Batch]:
    """Show the progress of an evaluation of n examples. Raises Interrupted after a signal."""
    with tqdm(total=n, unit="example", desc="evaluation", leave=False,
              disable=process()[0] or None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.rows) * process()[1])
            stop_if_signalled(device)


def say(text: str) -> None:
    """Print from the first process. A closed terminal or pipe does not stop the run."""
    lines = [textwrap.fill(line, 80, subsequent_indent="  ", break_long_words=False,
                           break_on_hyphens=False) for line in text.split("\n")]
    try:
        if process()[0] == 0:
            tqdm.write("\n".join(lines))  # which moves a bar out of the way
    except OSError:  # what is buffered, and what follows, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Return the sum, or with "MAX" the maximum, over all processes of a tensor of any shape."""
    if process()[1] > 1:
        value = value.clone()
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
    return value


def gathered(items: list[Tensor]) -> list[Tensor]:
    """Return the items of all processes, one process after another."""
    everyone = [items] * process()[1]
    if len(everyone) > 1:
        torch.distributed.all_gather_object(everyone, items)
    return [item for part in everyone for item in part]


def wrap(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Return the model as the loop calls it: compiled if asked for, shared between processes."""
    net: Any = model
    if config.compile:
        say("compiling the model; the next step and the next evaluation may take minutes")
        net = torch.compile(model, dynamic=True)  # batches differ in width: one graph for all
    if process()[1] > 1:
        # all processes prune alike, so the masks need not be sent before each step
        net = nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False)
    return net


# ---- the toy -------------------------------------------------------------------------------------


TOY_EXPLAINED = """\
Now adapters learn to notice errors like "these dogs near the king sees a bird".
An adapter is a sum of components, small changes to one matrix each. DoRA starts
with components in every matrix and drops the least important ones in training.
LoRA keeps its components in the matrices that it is given. A score of 1 is
perfect, 0 is guessing.

  score  (Matthews correlation on dev)         adapter parameters"""
TOY_NEXT = """
What to try next (files are in {root}):
  python train_glue.py --method paper              # the settings of the paper
  python train_glue.py --rank 2 --out runs/rank-2  # random places work, too
  python notebooks/plot_run.py {root}     # a picture of the run"""
PLAIN_LORA = dataclasses.asdict(DoRAConfig(**METHODS["lora"]))  # replaces a method's settings


def toy(config: TrainConfig) -> dict[str, Any]:
    """Show in a minute what the method does, where it puts its components and when that helps.

    A tiny RoBERTa is pretrained on toy-pretrain, frozen, and adapted to toy (data.write_toy says
    what these tasks ask). The budget is so small that it matters which matrices get it. Tokenizer,
    loader and loop are those of GLUE. Returns the result of config.method.
    """
    torch.set_num_threads(1)  # matrices this small are slower when threads share them
    layers = begin_toy(config)
    say(TOY_EXPLAINED)

    def show(what: str, *results: dict[str, Any]) -> float:
        middle = sorted(results, key=lambda result: result["best"]["matthews"])[len(results) // 2]
        score, size = middle["best"]["matthews"], middle["adapter_parameters_after_pruning"]
        say(f"{score:7.3f}  {what:<46}{size:>10,}")
        return float(score)

    found = toy_run(config, "adapted")
    own = show(config.method + ", which finds its places itself" * bool(config.schedule), found)
    if config.schedule:
        size = found["adapter_parameters_after_pruning"]
        for what, runs in other_places(config, layers, size).items():
            other = show(what, *(toy_run(config, name, **runs[name]) for name in runs))
    show("only the head", toy_run(config, "head", **PLAIN_LORA, method="head"))
    show(f"{config.method} without pretraining", toy_run(config, "blind", "untrained"))

    if config.schedule:
        say(f"\nWhere {config.method} kept its components, layer by matrix:\n"
            f"{rank_map(found['ranks'])}\n{places_in_words(found['ranks'])}\n"
            f"These places score {own:.3f}, and random ones {other:.3f}.")
    say(TOY_NEXT.format(root=run_folder(config)))
    return found


def begin_toy(config: TrainConfig) -> dict[str, DoRALinear]:
    """Write the toy's data and pretrain its model. Return the layers that will be adapted.

    Raises DoRAError for settings that cannot work: now, and not after the pretraining.
    """
    require(process()[1] == 1 and not config.model_dir, "the toy runs in one process and makes its "
            "own model; for torchrun or --model-dir, choose a --task and --data-dir")
    root = run_folder(config)
    refuse_foreign(root, (root / "untrained").exists())
    bpe = data.write_toy(root, root / "untrained")
    torch.manual_seed(config.seed)
    tiny = RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=64, num_hidden_layers=3,
                         num_attention_heads=4, intermediate_size=256, max_position_embeddings=64,
                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                         initializer_range=0.1)
    save_model(RobertaForSequenceClassification(tiny, 4), root / "untrained")
    layers = adapt(RobertaForSequenceClassification(tiny, 2), config)
    Pruner(layers, config, run_length(config, data.TOY_SIZES["toy", "train"])[1])

    say("A tiny RoBERTa learns singular and plural from short sentences, and is frozen.")
    toy_run(config, "pretrain", "untrained", task="toy-pretrain", **PLAIN_LORA, method="full",
            lr=1e-3, batch_size=32, epochs=3, max_steps=None)
    return layers


def toy_run(config: TrainConfig, name: str, start: str = "pretrain/model",
            **changes: Any) -> dict[str, Any]:
    """Train in the folder `name` from the model in the folder `start`. Return the result."""
    root = run_folder(config)
    changed = dataclasses.replace(
        config, data_dir=str(root), model_dir=str(root / start), out=str(root / name),
        max_len=min(config.max_len, 48), **changes)  # no text is longer
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return train(changed)  # what it says is in its log.txt


def other_places(config: TrainConfig, layers: dict[str, DoRALinear],
                 size: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Return runs to compare with, row -> folder -> settings: LoRA on query and value with at least
    `size` parameters, and three draws of LoRA on random matrices with at most as many."""
    lora = {**PLAIN_LORA, "method": "lora", "alpha": config.alpha, "dropout": config.dropout}
    rank = math.ceil(size / 768)  # of 3 queries and 3 values, 128 parameters per component
    usual = {**lora, "rank": rank, "targets": ("query", "value")}

    draws, r = {}, min(config.r_prime, math.ceil(1.5 * config.rank))  # not a high --start-rank
    for i in range(3):
        left, targets = size // r, []
        for name in np.random.default_rng((config.seed, i)).permutation([*layers]):
            cost = layers[name].in_features + layers[name].out_features
            if cost <= left:
                left -= cost
                targets.append(name.removeprefix("roberta."))
        draws[f"random-{i + 1}"] = {**lora, "rank": r, "targets": tuple(targets)}
    return {f"LoRA on query and value, rank {rank}": {"query-value": usual},
            "LoRA in random places, median of three draws": draws}


ROLES = {  # the ends of the names of a layer's matrices
    "decide what a word looks at (query, key)": r"self\.(query|key)",
    "pass on what it sees (value, attention.output)": r"self\.value|attention\.output\.dense",
    "work on each word alone (intermediate, output)": r"\d\.(intermediate|output)\.dense"}


def places_in_words(ranks: dict[str, int]) -> str:
    """Return a sentence on which kinds of matrices kept components."""
    kept = {role: sum(rank for name, rank in ranks.items() if re.search(f"({end})$", name))
            for role, end in ROLES.items()}
    parts = [f"{n} in matrices that {role}" for role, n in kept.items() if n]
    return textwrap.fill(f"It kept {', '.join(parts)}.", 80)


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Return the exit code: 2 for bad input, 128 + signal if interrupted."""
    parser = make_parser(argv)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [action.dest for action in parser._actions if unknown[0].startswith("-")]
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        hint = did_you_mean(name, known).replace("mean ", "mean --").replace("_", "-")
        parser.error(f"unrecognized argument {unknown[0]}{hint}")
    try:
        connect()
        run_command(**vars(parsed))
        return 0
    except Interrupted as error:
        say(f"{error.args[0]}; continue with the same command and --resume")
        return 128 + error.args[1]
    except KeyboardInterrupt:
        say("interrupted outside of training; nothing to save")
        return 128 + signal.SIGINT
    except (DoRAError, DataError, OSError) as error:
        print(f"train_glue.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError:
        if process()[1] == 1:
            raise
        traceback.print_exc()
        print(f"train_glue.py: error: a process stopped, see above; continue from the newest "
              f"checkpoint in {getattr(parsed, 'out', None) or 'runs/'} with --resume",
              file=sys.stderr, flush=True)
        os._exit(1)  # at a normal exit, threads of the broken process group may abort
    finally:
        if process()[1] > 1:
            torch.distributed.destroy_process_group()


def run_command(seeds: list[int], eval_only: bool, adapter: str, predict: str,
                **settings: Any) -> None:
    """Do what the flags of a command line ask for. Raises DoRAError or DataError for bad ones."""
    if eval_only:
        require(adapter and seeds == [1], "--eval-only: name one run, --adapter RUN, and no seeds")
        return evaluate_only(adapter, settings, predict)

    require(not adapter, f"--adapter {adapter} is only for --eval-only; a run makes a new one")
    configs = [make_config(**settings, seed=seed) for seed in dict.fromkeys(seeds)]
    for part in ("train", predict):  # AX has no train set, the toy no test set
        data.find_task(configs[0].task, part)
    if len(configs) > 1 and configs[0].out:
        refuse_foreign(run_folder(configs[0]), [*run_folder(configs[0]).glob("seed-*")])
        configs = [dataclasses.replace(config, out=f"{config.out}/seed-{config.seed}")
                   for config in configs]

    results = []
    for config in configs:
        is_toy = config.task == "toy" and not config.data_dir
        with torch_set_up(config):
            results.append(toy(config) if is_toy else train(config))
    if len(results) > 1:
        metric = TASKS[configs[0].task].metrics[0]
        scores = [result["best"][metric] for result in results]
        say(f"\n{metric} over {len(scores)} seeds: median {statistics.median(scores):.4f}, mean "
            f"{statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}")
    for result in results if predict else []:
        evaluate_only(result["folder"], {}, predict)


def saved_run(place: str, flags: dict[str, Any]) -> tuple[TrainConfig, Path | None]:
    """Return (settings, adapter folder or None) of what --eval-only is to score: the settings of
    the run's config.json, where there is one, overridden by flags. Raises DoRAError."""
    given = data.expanded(place).absolute()
    subs = ("adapter", "model", "adapted/adapter", "adapted/model")  # "adapted" is the toy's
    folder = next((given / sub for sub in subs if any(given.glob(f"{sub}/*config.json"))), given)
    require(any(folder.glob("*config.json")),
            f"{folder} is not the folder of a run, an adapter or a model; name one of these")
    require(not settings_of_run(folder), f"{folder} has no adapter yet, since a run saves it after "
            f"its last pruning; continue the run with --resume")
    run, is_adapter = settings_of_run(folder.parent), (folder / "adapter_config.json").exists()
    settings = {**run, "out": str(folder.parent if run else folder), **flags}
    if not is_adapter:
        settings["model_dir"] = str(folder)
    return TrainConfig(**settings), folder if is_adapter else None


def evaluate_only(place: str, flags: dict[str, Any], split: str) -> None:
    """Score an adapter or a whole model on dev; write the submission files of a split, if named."""
    config, adapter = saved_run(place, flags)
    data.find_task(config.task, split or "dev")
    with torch_set_up(config):
        task, model, model_dir, load = prepare(config)
        if adapter:
            saved = read_file(adapter / "adapter_model.safetensors")[1]
            for key, value in about(config, model).items():
                require(saved.get(key, value) == value, f"{adapter} was trained with {key} = "
                        f"{saved.get(key)}, not {value}; use the same {key}")
            load_adapter(model, adapter)
        else:
            require(model.head == ITS_HEAD, f"{model_dir}: its weights and config.json have no "
                    f"head for {task.name}; name a trained adapter with --adapter RUN")

        sets = load_dev(task, load)
        scores = evaluate_dev(model, sets, task)
        say(f"{task.name}, {sum(map(len, sets.values())):,} dev examples: {in_words(scores)}")
        files = [(task.name, name) for name in task.files if split and name.startswith(split)]
        if files and task.name == "mnli":  # whose model does GLUE's diagnostic set, too
            files.append(("ax", "test"))
        for name, part in files:
            predictions = predict(model, load(part, name))
            if process()[0] == 0:
                folder = run_folder(config) / "submission"
                say(f"wrote {data.write_submission(TASKS[name], part, predictions, folder)}")


def make_parser(argv: list[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser. Its help shows the defaults of the --task and --method that argv names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default="toy")
    first.add_argument("--method", default="dora")
    try:
        chosen = make_config(**vars(first.parse_known_args(argv)[0]))
    except DoRAError:  # which the command itself will raise
        chosen = make_config()

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--task TASK] [--SETTING VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # so that -1e-3 is a value, too
    hints = get_type_hints(TrainConfig)
    for config, title in ((TrainConfig, "the run"), (DoRAConfig, "the method")):
        group = parser.add_argument_group(
            f"{title}, with the defaults of --task {chosen.task} --method {chosen.method}")
        for name, text in help_of(config).items():
            rule = f"{RANGES[name]}; " if name in RANGES else ""
            text += f" ({rule}default: {shown(getattr(chosen, name))})"
            if name != "seed":
                group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                                   help=text, **flag_options(name, hints[name]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1],
                        help="one run per seed (default: 1)")
    parser.add_argument("--eval-only", action="store_true",
                        help="score --adapter, with the settings of its run; do not train")
    parser.add_argument("--adapter", metavar="RUN", default="", help="to score: RUN or RUN/adapter")
    parser.add_argument("--predict", default="", choices=("test",),
                        help="write the test set's submission file")
    return parser


def flag_options(name: str, hint: Any) -> dict[str, Any]:
    """Return argparse's options for a setting, from its type hint: float, int | None, ..."""
    kind, *more = get_args(hint) or (hint,)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    tables: dict[str, Any] = {"task": TASKS, "method": METHOD_ROWS}
    known = [shown(choice) for choice in tables.get(name, choices(name, hint))]
    kind = str if known else kind

    def parse(text: str) -> Any:
        return None if type(None) in more and text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # for argparse's message
    return {"type": parse, "nargs": "+" if get_origin(hint) is tuple else None,
            "metavar": f"{{{','.join(known)}}}" if known else kind.__name__.upper()}


def shown(value: Any) -> str:
    """Return a setting's value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(value)
    return "none" if value is None else f"{value:g}" if type(value) is float else str(value)


if __name__ == "__main__":
    sys.exit(main())
