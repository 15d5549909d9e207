"""Fine-tune RoBERTa on GLUE with DoRA: the model, its weights, the training loop, the command line.

    python train_glue.py                    toy: no download, no file, under a minute
    python train_glue.py --task cola        RoBERTa-base with the paper's settings for the task
    python train_glue.py --help             every setting, with unit and default

Read it in this order: RobertaForSequenceClassification, load_roberta, train.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import BPE, TASKS, DataError, Example, Task
from dora import (
    METHODS, DoRAConfig, DoRAError, DoRALinear, Pruner, budget, compact_, inject, load_adapter, merge_, rank_map,
    read_safetensors, save_adapter, setting, write_safetensors, write_whole)

# ------------------------------------------------------------------------------ RoBERTa by hand
# The module tree is the checkpoint's key tree: roberta.encoder.layer.0.attention.self.query.weight


@dataclass(frozen=True)
class RobertaConfig:
    """The sizes of a model, named as in its config.json; the defaults are roberta-base's."""

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
    initializer_range: float = 0.02


class Embeddings(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.pad = config.pad_token_id

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = mask.cumsum(1) * mask + self.pad  # tokens count from pad + 1, padding stays at pad
        x = self.word_embeddings(ids) + self.position_embeddings(positions)  # (B, T, D)
        x = x + self.token_type_embeddings.weight[0]  # RoBERTa has one token type
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        D = config.hidden_size
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, D/H)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(self.query(q)), split(self.key(x)), split(self.value(x)), attn_mask=mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0)  # (B, H, Q, D/H)
        return out.transpose(1, 2).flatten(2)  # (B, Q, D)


class Output(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm: the end of either half of a layer."""

    def __init__(self, d_in: int, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(d_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, h: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(h)) + residual)


class Attention(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(q, x, mask), q)


class Intermediate(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # (B, Q, 4D), the erf form


class Layer(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """New states (B, Q, D) of the rows q (B, Q, D), which look at all of x (B, T, D)."""
        h = self.attention(q, x, mask)
        return self.output(self.intermediate(h), h)


class Encoder(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        """(B, T, D) -> (B, rows, D): the last layer computes only the first rows; none = all of them."""
        for layer in self.layer[:-1]:
            x = layer(x, x, mask)
        return self.layer[-1](x[:, :rows], x, mask)


class RobertaModel(nn.Module):
    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, mask: Tensor, rows: int | None = None) -> Tensor:
        return self.encoder(self.embeddings(ids, mask), mask, rows)


class Classifier(nn.Module):
    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, state: Tensor) -> Tensor:
        h = self.dropout(state.to(self.dense.weight.dtype))  # (B, D); the head stays float32 over bf16
        return self.out_proj(self.dropout(torch.tanh(self.dense(h))))  # (B, classes)


class RobertaForSequenceClassification(nn.Module):
    """ids (B, T) int64, mask (B, T) bool, True = token  ->  logits (B, classes)."""

    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config)
        self.classifier = Classifier(config, num_labels)
        self.reset(self)

    def reset(self, part: nn.Module) -> None:
        """Random start: normal weights, zero biases (BERT's)."""
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.roberta(ids, mask, rows=1)  # (B, 1, D): the head reads <s> alone
        return self.classifier(states[:, 0])


# ----------------------------------------------------------------------------------- its weights


def load_roberta(folder: str | Path, num_labels: int) -> RobertaForSequenceClassification:
    """A model from a folder in the Hugging Face layout; float16 weights become float32.

    config.json and model.safetensors or pytorch_model.bin. The head is new and random unless the file
    has one of this size. Raises DoRAError naming the key for a missing, unknown or misshapen weight.
    """
    folder = Path(folder)
    config = _read_config(folder / "config.json")
    path = folder / "model.safetensors"
    if path.exists():
        weights = read_safetensors(path)
    elif (path := folder / "pytorch_model.bin").exists():
        weights = _read_pickle(path)
    else:
        raise DoRAError(f"{folder}: no model.safetensors or pytorch_model.bin; "
                        f"point --model-dir at a model folder, or leave it out to download roberta-base")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = RobertaForSequenceClassification(config, num_labels)
    expected = {key: parameter.shape for key, parameter in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if key.startswith("lm_head.") or ".pooler." in f".{key}" or key.endswith("position_ids"):
            continue
        name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("roberta.", "classifier.")):
            name = "roberta." + name
        if name.startswith("classifier.") and tensor.shape != expected.get(name):
            continue  # the head of another task
        if name not in expected or tensor.shape != expected[name]:
            shape = tuple(expected[name]) if name in expected else "no such weight"
            raise DoRAError(f"{path}: {key} has shape {tuple(tensor.shape)}, {folder / 'config.json'} says {shape}; "
                            f"the two files must be of one RoBERTa model")
        state[name] = tensor.float()
    missing = [key for key in expected if key.startswith("roberta.") and key not in state]
    if missing:
        raise DoRAError(f"{path}: {missing[0]} is missing ({len(missing)} in all); is it a RoBERTa model?")
    whole_head = sum(key.startswith("classifier.") for key in state) == 4
    state = {key: tensor for key, tensor in state.items() if whole_head or key.startswith("roberta.")}
    model.load_state_dict(state, strict=False, assign=True)  # the mapped file becomes the frozen weights
    if not whole_head:
        model.classifier.to_empty(device="cpu")
        model.reset(model.classifier)
    return model.requires_grad_(True)


def _read_config(path: Path) -> RobertaConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DoRAError(f"{path} not found; point --model-dir at a folder with config.json, vocab.json, "
                        f"merges.txt and the weights") from None
    except (ValueError, RecursionError):
        raise DoRAError(f"{path}: not JSON; fetch it again") from None
    if not isinstance(values, dict) or values.get("model_type", "roberta") != "roberta":
        raise DoRAError(f"{path}: not the config of a RoBERTa model (model_type)")
    if values.get("hidden_act", "gelu") != "gelu":
        raise DoRAError(f"{path}: hidden_act {values['hidden_act']!r}; RoBERTa has gelu")
    chosen = {}
    for f in dataclasses.fields(RobertaConfig):
        default = f.default
        value = values.get(f.name, None if f.name.endswith(("size", "layers", "heads", "embeddings")) else default)
        whole = isinstance(default, int)
        limits = (0 if f.name == "pad_token_id" else 1, 2**24) if whole else (0.0, 1.0)
        if type(value) not in ((int,) if whole else (int, float)) or not limits[0] <= value <= limits[1]:
            raise DoRAError(f"{path}: {f.name} is {value!r}; expected {'an integer' if whole else 'a number'} "
                            f"from {limits[0]} to {limits[1]}, as in roberta-base ({default})")
        chosen[f.name] = value
    config = RobertaConfig(**chosen)
    if config.hidden_size % config.num_attention_heads:
        raise DoRAError(f"{path}: hidden_size {config.hidden_size} is no multiple of num_attention_heads "
                        f"{config.num_attention_heads}")
    return config


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A pytorch_model.bin without running what is in it: weights_only refuses all but tensors."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values()):
            return weights
        reason = "not a dictionary of tensors"
    except Exception as error:  # the unpickler raises nearly anything on a damaged file
        reason = str(error).split("\n")[0][:100]
    raise DoRAError(f"{path}: not a plain state dict ({reason}); use the model's model.safetensors")


def save_model(model: RobertaForSequenceClassification, folder: str | Path) -> None:
    """Save a plain model (after merge_) in the Hugging Face layout, for transformers to load."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = model.classifier.out_proj.out_features
    config = {"architectures": ["RobertaForSequenceClassification"], "model_type": "roberta", "hidden_act": "gelu",
              **dataclasses.asdict(model.config), "bos_token_id": 0, "eos_token_id": 2,
              "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
              "label2id": {f"LABEL_{i}": i for i in range(labels)}}
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_whole(folder / "config.json", [json.dumps(config, indent=2).encode()])


# -------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. The same fields are the command line's flags."""

    task: str = setting("toy", "GLUE task", ("toy", *(t for t in TASKS if t != "ax")))
    method: str = setting("dora", "what is trained", (*METHODS, "bitfit", "full", "head"))
    data_dir: str | None = setting(None, "folder with CoLA/, STS-B/, ...; none = download")
    model_dir: str | None = setting(None, "model folder; none = download FacebookAI/roberta-base")
    out: str | None = setting(None, "run folder; none = runs/TASK-METHOD/seed-SEED")
    seed: int = setting(1, "seed of head, adapter, order and dropout")
    lr: float = setting(2e-3, "peak learning rate of AdamW")
    batch_size: int = setting(16, "examples in a forward pass, over all processes")
    accumulate: int = setting(1, "forward passes in an optimizer step")
    epochs: int = setting(45, "passes over the train set")
    max_steps: int | None = setting(None, "optimizer steps, instead of epochs")
    weight_decay: float = setting(0.01, "decoupled weight decay of AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    warmup: float = setting(0.06, "share of all steps in which the learning rate rises; then it falls linearly")
    max_len: int = setting(128, "tokens of an example; longer ones are cut")
    log_every: int = setting(10, "optimizer steps between two lines of metrics.jsonl")
    save_every: int = setting(500, "optimizer steps between two checkpoints, besides each epoch's end")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("float32", "of the frozen weights; A, B, c, head and scores stay float32 over bf16",
                         ("float32", "bf16", "float64"))
    compile: bool = setting(False, "torch.compile the model")
    deterministic: bool = setting(False, "only deterministic kernels, slower on GPUs")
    resume: bool = setting(False, "go on from the run folder's newest checkpoint")
    dora: DoRAConfig = DoRAConfig()

    def __post_init__(self) -> None:
        for name, spec in self.__dataclass_fields__.items():
            choices, value = spec.metadata.get("choices"), getattr(self, name)
            if choices and value not in choices and value not in TASKS:
                raise DoRAError(f"{name} = {value}: choose one of {', '.join(map(str, choices))}")
        for name in ("lr", "batch_size", "accumulate", "epochs", "max_steps", "clip", "log_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DoRAError(f"{name} = {value}: must be above 0")
        if not 0 <= self.warmup < 1 or not 0 <= self.weight_decay < math.inf or self.max_len < 8:
            raise DoRAError("warmup must be in [0, 1), weight_decay at least 0, max_len at least 8")


# The paper's Table 8; WNLI, which it leaves out, gets RTE's row.
_TABLE_8 = {name: dict(zip(("lr", "batch_size", "epochs", "eta", "interval"), row)) for name, row in {
    "rte": (2e-3, 16, 80, 0.5, 10), "mrpc": (2.5e-3, 16, 30, 0.3, 50), "stsb": (3e-3, 16, 45, 0.3, 10),
    "cola": (2e-3, 16, 45, 0.3, 10), "sst2": (8e-4, 64, 60, 0.5, 10), "qnli": (3.5e-3, 16, 12, 0.5, 50),
    "qqp": (1e-3, 16, 10, 0.3, 50), "mnli": (3e-3, 32, 10, 0.3, 50), "wnli": (2e-3, 16, 80, 0.5, 10)}.items()}
_METHOD_ROWS: dict[str, dict[str, Any]] = {
    **METHODS, "full": dict(METHODS["lora"], lr=2e-5), "bitfit": dict(METHODS["lora"], lr=1e-3), "head": METHODS["lora"]}


def make_config(task: str = "toy", method: str = "dora", **flags: Any) -> TrainConfig:
    """The task's row of the paper's Table 8, then the method's row, then what was asked for."""
    values = {**_TABLE_8.get(task, {}), **_METHOD_ROWS.get(method, {}), **flags}
    names = {f.name for f in dataclasses.fields(DoRAConfig)}
    dora = DoRAConfig(**{k: v for k, v in values.items() if k in names})
    return TrainConfig(task, method, dora=dora, **{k: v for k, v in values.items() if k not in names})


# ---------------------------------------------------------------------------------- a run's folder


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the state is saved."""


class Run:
    """A run's folder: its lock, metrics, checkpoints and results. Only process 0 writes.

    config.json, metrics.jsonl, checkpoints/step-N.pt (the newest two), adapter/ or model/ (best epoch
    after pruning ended), result.json, ranks.json. Every file is written whole or not at all.
    """

    def __init__(self, config: TrainConfig, fingerprint: dict[str, Any], layers: dict[str, DoRALinear]):
        self.folder = Path(config.out or f"runs/{config.task}-{config.method}/seed-{config.seed}")
        self.config, self.layers, self.stop = config, layers, 0
        # what a resumed run must have in common with the one it goes on with
        free = ("out", "resume", "device", "save_every", "data_dir", "model_dir")
        self.identity = {**{k: v for k, v in dataclasses.asdict(config).items() if k not in free}, **fingerprint}
        self.identity = json.loads(json.dumps(self.identity))  # tuples become lists, as in the file
        self.writes = process()[0] == 0
        self.metrics = self.folder / "metrics.jsonl"

    def __enter__(self) -> Run:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            try:
                import fcntl  # not on Windows; the kernel drops the lock when its process dies, however it dies
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass
            except OSError:
                raise DoRAError(f"{self.folder}: another run is writing here; choose another --out") from None
            if not self.config.resume:
                if self.metrics.exists() or (self.folder / "result.json").exists():
                    raise DoRAError(f"{self.folder} already holds a run; choose another --out, or --resume it")
                write_json(self.folder / "config.json", dataclasses.asdict(self.config))
                self.metrics.touch()
        self.old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        if self.writes:
            self.lock.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop = number  # acted upon between two steps, where the state is whole

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; stop the run if its numbers are not finite."""
        if self.writes:
            with open(self.metrics, "a") as f:
                f.write(json.dumps(line) + "\n")
        if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
            bad = [n for n, m in self.layers.items() if not (m.c.isfinite().all() and m.A.isfinite().all())]
            raise DoRAError(f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']} at learning "
                            f"rate {line['lr']:.3g}, first bad layer: {bad[0] if bad else 'none'}; the last checkpoint "
                            f"in {self.folder} is good; lower --lr")

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner,
             records: list[Any], best: Any) -> None:
        """Write checkpoints/step-N.pt and keep the newest two."""
        if not self.writes:
            return
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        with open(self.metrics, "a") as f:
            os.fsync(f.fileno())
            size = f.tell()
        state = {
            "identity": self.identity, "step": step, "records": records, "best": best, "metrics_size": size,
            "weights": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad},
            "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict(), "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(folder / f"step-{step:07d}.pt", [buffer.getbuffer()])
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> tuple[int, list[Any], Any]:
        """Take up the newest checkpoint that can be read: (step, records, best)."""
        for path in sorted((self.folder / "checkpoints").glob("step-*.pt"), reverse=True):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                break
            except Exception as error:  # the unpickler raises nearly anything on a damaged file
                say(f"{path}: damaged ({str(error).splitlines()[0][:80]}); trying the one before")
        else:
            raise DoRAError(f"{self.folder}: no checkpoint to resume; leave out --resume to start anew")
        ours, theirs = self.identity, state["identity"]
        for key in ours:
            if ours[key] != theirs.get(key):
                a, b = theirs.get(key), ours[key]
                if isinstance(a, dict) and isinstance(b, dict):
                    key, a, b = next((k, a.get(k), b[k]) for k in b if a.get(k) != b[k])
                raise DoRAError(f"{path}: was made with {key} = {a}, this run has {b}; "
                                f"use the same settings to resume, or another --out")
        pruner.load_state_dict(state["pruner"])
        if pruner.done and self.layers:
            compact_(model, optimizer)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                parameters[name].copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        if process()[0] == 0:
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state["cuda_rng"])
        if self.writes:
            os.truncate(self.metrics, state["metrics_size"])  # lines of steps that will be done again
        return state["step"], state["records"], state["best"]

    def save_best(self, model: nn.Module, model_dir: Path) -> None:
        """The adapter of the best epoch so far, or the whole model where there is no adapter."""
        if self.writes and self.layers:
            save_adapter(model, self.folder / "adapter")
        elif self.writes:
            save_model(model, self.folder / "model")
            for name in ("vocab.json", "merges.txt"):
                write_whole(self.folder / "model" / name, [(model_dir / name).read_bytes()])

    def finish(self, result: dict[str, Any], ranks: dict[str, int]) -> None:
        if self.writes:
            write_json(self.folder / "ranks.json", ranks)
            write_json(self.folder / "result.json", result)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, [json.dumps(value, indent=2).encode() + b"\n"])


def say(text: str) -> None:
    """To the terminal, once, without tearing the bar."""
    if process()[0] == 0:
        tqdm.write(text)


def process() -> tuple[int, int]:
    """(rank, number) of the processes that train together; (0, 1) without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def predict(model: nn.Module, examples: list[Example], batch_size: int = 64) -> np.ndarray:
    """Class ids, or scores in 0..1, (N,) in the order of the examples, each counted once."""
    rank, world = process()
    device = next(model.parameters()).device
    model.eval()
    rows, outputs = [], []
    for batch in data.batches(examples, batch_size, None, 0, rank=rank, world=world):
        if len(batch.rows):
            logits = model(batch.ids.to(device), batch.mask.to(device)).float()  # (B, classes)
            outputs.append(logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0].clamp(0, 1))
            rows.append(batch.rows)
    parts = [(torch.cat(rows).numpy(), torch.cat(outputs).cpu().numpy()) if rows else None]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(
            parts, (torch.cat(rows).numpy(), torch.cat(outputs).cpu().numpy()) if rows else None)
    found = [part for part in parts if part is not None]
    predictions = np.empty(len(examples), dtype=found[0][1].dtype)
    for where, values in found:
        predictions[where] = values
    return predictions


def evaluate(model: nn.Module, examples: list[Example], task: Task) -> dict[str, float]:
    """The task's metrics on labelled examples, the headline first."""
    return data.score(task, predict(model, examples), [example.label for example in examples])


# ---------------------------------------------------------------------------------- the training


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, or squared error for the one output of a regression; mean over the batch."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Of step 0..T-1: linear warm-up, then linear to 0."""
    warm = round(config.warmup * total)
    return config.lr * ((step + 1) / warm if step < warm else (total - step) / (total - warm))


def adapt(model: RobertaForSequenceClassification, config: TrainConfig) -> dict[str, DoRALinear]:
    """Choose what trains. Only the adapters are layers; the head trains always."""
    layers: dict[str, DoRALinear] = {}
    if config.method in METHODS:
        layers = inject(model, config.dora)
    else:
        for name, parameter in model.named_parameters():
            bias = name.endswith(".bias")
            parameter.requires_grad_(config.method == "full" or config.method == "bitfit" and bias)
    model.classifier.requires_grad_(True)
    return layers


def train(config: TrainConfig) -> dict[str, Any]:
    """One run with one seed: what the command line calls. Returns what result.json holds."""
    started = time.monotonic()
    rank, world = process()
    device = find_device(config)
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)

    task, bpe, model_dir, data_dir = find_files(config)
    train_set = data.load_task(config.task, data_dir, "train", bpe, config.max_len)
    dev_sets = {split: data.load_task(config.task, data_dir, split, bpe, config.max_len)
                for split in task.files if split.startswith("dev")}
    model = load_model(config, task, model_dir)
    fingerprint = {"weights": checksum(model.parameters()), "train_examples": len(train_set)}
    layers = adapt(model.to(device), config)
    counts = {"adapter_parameters": sum(p.numel() for m in layers.values() for p in (m.A, m.B)),
              "head_parameters": sum(p.numel() for p in model.classifier.parameters()),
              "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}

    per_epoch = math.ceil(len(train_set) / (config.batch_size * config.accumulate))
    total = config.max_steps or config.epochs * per_epoch
    pruner = Pruner(layers, config.dora, total)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr,
                                  weight_decay=config.weight_decay, fused=True)
    step, records, best = 0, [], None  # records: the metrics after each epoch
    with Run(config, fingerprint, layers) as run:
        if config.resume:
            step, records, best = run.load(model, optimizer, pruner)
        if rank:
            torch.manual_seed(config.seed + rank + step)  # every process drops out other numbers
        net = wrap(model, config)
        bar = tqdm(total=total, initial=step, unit="step", disable=True if rank else None)
        while step < total:
            epoch, done = divmod(step, per_epoch)
            for batch in data.batches(train_set, config.batch_size * config.accumulate, config.seed, epoch, done):
                # ---- one optimizer step; DoRA is three lines of it
                model.train()
                lr, penalty, loss = learning_rate(step, total, config), pruner.penalty(), 0.0
                for i, micro in enumerate(batch.split(config.accumulate)):
                    part = micro.split(world)[rank].to(device)
                    share = len(part.labels) / len(batch.labels)  # a mean over the whole batch, however it is cut
                    if not share:  # nothing left for this pass of a short last batch: any example, counted 0 times
                        part = batch.split(len(batch.labels))[0].to(device)
                    part_loss = task_loss(net(part.ids, part.mask), part.labels) * share
                    loss += part_loss.detach()
                    (part_loss * world + (penalty if i == 0 else 0)).backward()  # processes average gradients
                pruner.observe()
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
                pruner.step()
                step += 1
                # ---- the rest is bookkeeping
                if step == pruner.last and layers:
                    compact_(model, optimizer)  # the mask is final: dead components leave for good
                    net = wrap(model, config)
                bar.update()
                if step % config.log_every == 0 or step == total:
                    line = {"step": step, "lr": lr, "loss": mean_over_processes(loss) * world,
                            "penalty": float(penalty.detach()), "grad_norm": float(norm), "live": pruner.live,
                            "budget": budget(step, total, config.dora, len(layers)) if layers else 0}
                    run.log(line)
                    bar.set_postfix(loss=f"{line['loss']:.4f}", live=line["live"], budget=line["budget"])
                if run.stop or step % config.save_every == 0 and step % per_epoch and step < total:
                    run.save(step, model, optimizer, pruner, records, best)
                if run.stop:
                    bar.close()
                    raise Interrupted(f"stopped at step {step} of {total}, saved in {run.folder}", run.stop)
                if step == total:
                    break
            scores = evaluate_all(model, dev_sets, task)
            records.append({"epoch": round(step / per_epoch, 3), "step": step, **scores})
            if pruner.done and (best is None or scores[task.metrics[0]] > best[task.metrics[0]]):
                best = records[-1]
                run.save_best(model, model_dir)
            run.save(step, model, optimizer, pruner, records, best)
            if not rank:
                bar.write(f"epoch {records[-1]['epoch']:g}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        bar.close()
        ranks = pruner.ranks()
        result = {"task": config.task, "method": config.method, "seed": config.seed, "best": best,
                  "last": records[-1], "steps": total, **counts,
                  "adapter_parameters_after_pruning": sum(
                      k * sum(layers[name].base.weight.shape) for name, k in ranks.items()),
                  "epochs": records, "seconds": round(time.monotonic() - started, 1)}
        run.finish(result, ranks)
    return {**result, "ranks": ranks}


def find_device(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise DoRAError(f"device = {name}: not available here; use --device cpu") from None
    if device.type == "cuda" and process()[1] > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def find_files(config: TrainConfig) -> tuple[Task, BPE, Path, Path]:
    """(task, tokenizer, model folder, data folder), downloaded where no folder is given."""
    data_dir = Path(config.data_dir) if config.data_dir else data.download_task(config.task)
    model_dir = Path(config.model_dir) if config.model_dir else data.download_model()
    return TASKS[config.task], BPE(model_dir / "vocab.json", model_dir / "merges.txt"), model_dir, data_dir


def load_model(config: TrainConfig, task: Task, model_dir: Path) -> RobertaForSequenceClassification:
    """The pretrained model in the run's precision, with room for max_len tokens."""
    model = load_roberta(model_dir, task.num_labels)
    longest = model.config.max_position_embeddings - model.config.pad_token_id - 1
    if config.max_len > longest:
        raise DoRAError(f"max_len = {config.max_len}: {model_dir} has positions for {longest} tokens; lower it")
    if config.dtype == "float64":
        model.double()
    elif config.dtype == "bf16" and config.method in ("full", "bitfit"):  # trained weights stay float32
        model.forward = torch.autocast(config.device.split(":")[0], torch.bfloat16)(model.forward)  # type: ignore
    elif config.dtype == "bf16":
        model.roberta.to(torch.bfloat16)
    return model


def wrap(model: nn.Module, config: TrainConfig) -> nn.Module:
    """What the loop calls: the model, compiled or shared between processes where that was asked for."""
    net: nn.Module = model
    if process()[1] > 1:
        net = nn.parallel.DistributedDataParallel(model)
    return torch.compile(net) if config.compile else net  # type: ignore[return-value]


def mean_over_processes(value: Tensor | float) -> float:
    _, world = process()
    if world > 1:
        value = torch.as_tensor(value).clone()
        torch.distributed.all_reduce(value)
    return float(value) / world


def checksum(tensors: Iterator[Tensor]) -> str:
    """Tells two models apart: a CRC of the first kilobyte or so of each weight, in float32."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().flatten()[:256].float().numpy().tobytes(), crc)
    return f"{crc:08x}"


def evaluate_all(model: nn.Module, sets: dict[str, list[Example]], task: Task) -> dict[str, float]:
    """Metrics on dev; for MNLI the mean of matched and mismatched first, then both."""
    scores = {split: evaluate(model, examples, task) for split, examples in sets.items()}
    if len(scores) == 1:
        return scores["dev"]
    both = {f"{name}_{split.replace('dev', 'm').replace('m_', '')}": value
            for split, found in scores.items() for name, value in found.items()}
    return {task.metrics[0]: statistics.mean(both.values()), **both}


# ------------------------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = vars(parser().parse_args(argv))
    seeds = args.pop("seeds", [1])
    try:
        for seed in seeds:
            config = make_config(seed=seed, **args)
            result = train(config)
            print(rank_map(result["ranks"]))
            print(result["best"])
    except Interrupted as error:
        print(f"{error.args[0]}; go on with the same command and --resume")
        return 128 + error.args[1]
    except (DoRAError, DataError) as error:
        print(f"train_glue.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train_glue.py: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Flags made from the fields of TrainConfig and DoRAConfig."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for config, title in ((TrainConfig, "the run"), (DoRAConfig, "DoRA")):
        group, hints = p.add_argument_group(title), get_type_hints(config)
        for f in dataclasses.fields(config):
            if f.name in ("dora", "seed"):
                continue
            kinds = [k for k in get_args(hints[f.name]) or (hints[f.name],) if k is not Ellipsis]
            options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
            if kinds[0] is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = value_parser(kinds[0], type(None) in kinds)
                options["metavar"] = kinds[0].__name__.upper()
            if f.metadata["choices"]:
                options["metavar"] = "{" + ",".join("none" if c is None else c for c in f.metadata["choices"]) + "}"
            if get_origin(hints[f.name]) is tuple:
                options["nargs"] = "+"
            group.add_argument("--" + f.name.replace("_", "-"), **options)
    p.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each")
    return p


def value_parser(kind: type, optional: bool) -> Any:
    def parse(text: str) -> Any:
        return None if optional and text.lower() == "none" else kind(text)
    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    sys.exit(main())
