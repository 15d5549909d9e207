"""Fine-tune RoBERTa on GLUE with DoRA: the model, its weights, the training loop, the command line.

    python train_glue.py                  toy: no download, no file, under a minute
    python train_glue.py --task cola      RoBERTa-base with the paper's settings for the task
    python train_glue.py --help           every setting, with its unit and default

Read RobertaForSequenceClassification, load_roberta, train, in this order.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import TASKS, DataError, Example, Task
from dora import (METHODS, DoRAConfig, DoRAError, DoRALinear, NotFiniteError, Pruner, budget,
                  check_settings, compact_, fingerprint, inject, load_adapter, rank_map,
                  read_safetensors, save_adapter, setting, write_safetensors, write_whole)

# ---- RoBERTa by hand ---------------------------------------------------------------------------
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
    """Each head: softmax(q k^T / sqrt(D/H)) v, over the tokens that mask has."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        D = config.hidden_size
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """q (B, Q, D) asks, x (B, T, D) answers where mask (B, T) is True -> (B, Q, D)."""

        def split(t: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, D/H)
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(self.query(q)), split(self.key(x)), split(self.value(x)),
            attn_mask=mask[:, None, None, :],
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

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """New states (B, Q, D) of the rows q (B, Q, D), which look at all of x (B, T, D)."""
        h = self.attention["output"](self.attention["self"](q, x, mask), q)  # (B, Q, D)
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
        return self.layer[-1](x[:, :rows].contiguous(), x, mask)  # one copy, not one a product


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
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, state: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        h = self.dropout(state.to(self.dense.weight.dtype))  # float32 also over a bf16 encoder
        return self.out_proj(self.dropout(torch.tanh(self.dense(h))))


class RobertaForSequenceClassification(nn.Module):
    """ids (B, T) int64, mask (B, T) bool, True = token  ->  logits (B, classes)."""

    def __init__(self, config: RobertaConfig, num_labels: int):
        super().__init__()
        self.config = config
        self.roberta = RobertaModel(config)
        self.classifier = Classifier(config, num_labels)
        self.trained_head = False  # True once load_roberta has found one
        self.reset(self)

    def reset(self, part: nn.Module) -> None:
        """Random start: normal weights, zero biases (BERT's)."""
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> (B, classes)."""
        states = self.roberta(ids, mask, rows=1)  # (B, 1, D): the head reads <s> alone
        return self.classifier(states[:, 0])


# ---- its weights -------------------------------------------------------------------------------


def load_roberta(folder: str | Path, num_labels: int) -> RobertaForSequenceClassification:
    """The model in a folder of the Hugging Face layout, in float32.

    It holds config.json and model.safetensors or pytorch_model.bin. The head is new and random
    unless the file has one of this size. DoRAError names a missing, unknown or misshapen weight.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise DoRAError(f"{folder}: no model.safetensors or pytorch_model.bin; point --model-dir "
                        f"at a model's folder, or leave it out to download roberta-base")
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = RobertaForSequenceClassification(config, num_labels)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith(("roberta.", "classifier.", "lm_head.")):
            name = f"roberta.{name}"
        if name.startswith(("lm_head.", "roberta.pooler.")) or name.endswith("position_ids"):
            continue
        if expected.get(name) == tuple(tensor.shape):
            state[name] = tensor.float()
        elif not name.startswith("classifier."):  # the head of another task is left out
            raise DoRAError(f"{path}: {key!r:.120} is {tuple(tensor.shape)}, expected "
                            f"{expected.get(name, 'no such weight')} from {folder}/config.json; "
                            f"take both files from one RoBERTa model")
    missing = [key for key in expected if key not in state]
    lost = [key for key in missing if not key.startswith("classifier.")]
    if lost:
        raise DoRAError(f"{path}: {lost[0]} is missing, {len(lost)} of {len(expected)} weights; "
                        f"take a whole RoBERTa model")
    if missing:
        state = {key: tensor for key, tensor in state.items() if key.startswith("roberta.")}
        model.classifier.to_empty(device="cpu")
        model.reset(model.classifier)
    model.trained_head = not missing
    model.load_state_dict(state, strict=False, assign=True)  # the mapped file is the weights
    return model


def read_config(path: Path) -> RobertaConfig:
    """config.json of a RoBERTa model; DoRAError names a field that is missing or absurd."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DoRAError(f"{path} not found; point --model-dir at a folder with config.json, "
                        f"vocab.json, merges.txt and the weights") from None
    except (ValueError, RecursionError):
        raise DoRAError(f"{path}: not JSON; get the file anew") from None
    fixed = {"model_type": "roberta", "hidden_act": "gelu", "position_embedding_type": "absolute",
             "pad_token_id": data.PAD}
    for key, value in fixed.items():
        if not isinstance(values, dict) or values.get(key, value) != value:
            raise DoRAError(f"{path}: {key} is not {value!r}; take a RoBERTa model")
    found = {}
    for f in dataclasses.fields(RobertaConfig):
        value = found[f.name] = values.get(f.name)
        low, high = (1, 2**24) if isinstance(f.default, int) else (0.0, 0.99)
        if type(value) not in (int, type(f.default)) or not low <= value <= high:
            raise DoRAError(f"{path}: {f.name} is {value!r}, expected a number like roberta-base's "
                            f"{f.default}; get the file anew")
    config = RobertaConfig(**found)
    if config.num_hidden_layers > 1000 or config.hidden_size % config.num_attention_heads:
        raise DoRAError(f"{path}: {config.num_hidden_layers} layers of {config.hidden_size} with "
                        f"{config.num_attention_heads} heads make no model; get the file anew")
    return config


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of any shape by name from a pytorch_model.bin. weights_only takes nothing else, so no
    code in it is run. Raises DoRAError for another file."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))
        if isinstance(weights, dict) and all(
                isinstance(k, str) and isinstance(w, Tensor) for k, w in weights.items()):
            return weights
        reason = "not a dictionary of tensors"
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
    raise DoRAError(f"{path}: no plain state dict ({reason}); use the model's model.safetensors")


def save_model(model: RobertaForSequenceClassification, folder: str | Path) -> None:
    """Save a plain model (after merge_) in the layout that load_roberta and transformers read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {i: f"LABEL_{i}" for i in range(model.classifier.out_proj.out_features)}
    config = {"architectures": ["RobertaForSequenceClassification"], "model_type": "roberta",
              "hidden_act": "gelu", **dataclasses.asdict(model.config), "bos_token_id": 0,
              "eos_token_id": 2, "id2label": labels, "label2id": {w: i for i, w in labels.items()}}
    write_safetensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", config)


# ---- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """All that a run depends on. The command line's flags are made from these fields."""

    task: str = setting("toy", "a row of TASKS that has a train file: cola, stsb, ...")
    method: str = setting("dora", "what trains", (*METHODS, "bitfit", "full", "head"))
    data_dir: str | None = setting(None, "folder with CoLA/, STS-B/ ...; none = download")
    model_dir: str | None = setting(None, "model folder; none = download FacebookAI/roberta-base")
    out: str | None = setting(None, "run folder; none = runs/TASK-METHOD-SEED")
    seed: int = setting(1, "of head, adapter, order and dropout", least=0)
    lr: float = setting(2e-3, "peak learning rate of AdamW", above=0)
    batch_size: int = setting(16, "examples of a forward pass, over all processes", least=1)
    accumulate: int = setting(1, "forward passes of an optimizer step", least=1)
    epochs: int = setting(45, "passes over the train set", least=1)
    max_steps: int | None = setting(None, "optimizer steps, instead of epochs", least=1)
    weight_decay: float = setting(0.01, "decoupled weight decay of AdamW", least=0)
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    warmup: float = setting(0.06, "share of steps with rising learning rate", least=0, below=1)
    max_len: int = setting(128, "tokens of an example; more are cut off", least=8)
    log_every: int = setting(10, "optimizer steps between lines of metrics.jsonl", least=1)
    save_every: int = setting(500, "optimizer steps between checkpoints", least=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("float32", "of frozen weights; bf16 leaves A, B, c and the head float32",
                         ("float32", "bf16", "float64"))
    compile: bool = setting(False, "torch.compile the model")
    deterministic: bool = setting(False, "only deterministic kernels, slower on a GPU")
    resume: bool = setting(False, "go on from the run folder's newest checkpoint")
    dora: DoRAConfig = DoRAConfig()

    def __post_init__(self) -> None:
        check_settings(self)
        tasks = [name for name, task in TASKS.items() if "train" in task.files]
        if self.task not in tasks:
            raise DoRAError(f"task = {self.task}: choose one of {', '.join(tasks)}")


# The paper's Table 8. WNLI, not in it, has RTE's row.
COLUMNS_8 = ("lr", "batch_size", "epochs", "eta", "interval")
TABLE_8 = {"rte": (2e-3, 16, 80, 0.5, 10), "mrpc": (2.5e-3, 16, 30, 0.3, 50),
           "stsb": (3e-3, 16, 45, 0.3, 10), "cola": (2e-3, 16, 45, 0.3, 10),
           "sst2": (8e-4, 64, 60, 0.5, 10), "qnli": (3.5e-3, 16, 12, 0.5, 50),
           "qqp": (1e-3, 16, 10, 0.3, 50), "mnli": (3e-3, 32, 10, 0.3, 50),
           "wnli": (2e-3, 16, 80, 0.5, 10), "toy": (3e-3, 32, 10, 0.3, 10)}
METHOD_ROWS: dict[str, dict[str, Any]] = {
    **METHODS, "head": METHODS["lora"],  # these three have no adapter, so nothing to prune
    "full": {**METHODS["lora"], "lr": 2e-5}, "bitfit": {**METHODS["lora"], "lr": 1e-3}}


def make_config(task: str = "toy", method: str = "dora", **flags: Any) -> TrainConfig:
    """The task's row of Table 8, overruled by the method's row, overruled by what is asked for."""
    row = dict(zip(COLUMNS_8, TABLE_8.get(task, ())))
    values = {**row, **METHOD_ROWS.get(method, {}), **flags}
    names = {f.name for f in dataclasses.fields(DoRAConfig)}
    dora = {key: values.pop(key) for key in names & values.keys()}
    return TrainConfig(task, method, dora=DoRAConfig(**dora), **values)


def adapt(model: RobertaForSequenceClassification, config: TrainConfig) -> dict[str, DoRALinear]:
    """Choose what trains; return the adapted layers, none for full, bitfit and head."""
    layers = inject(model, config.dora) if config.method in METHODS else {}
    if not layers:
        for name, parameter in model.named_parameters():
            bias = config.method == "bitfit" and name.endswith("bias")
            parameter.requires_grad_(config.method == "full" or bias)
    model.classifier.requires_grad_(True)
    return layers


def prepare(config: TrainConfig) -> tuple[Task, RobertaForSequenceClassification, Path,
                                          Callable[..., list[Example]]]:
    """(task, pretrained model on its device, model folder, load): load(split) reads a file.

    Raises DoRAError or DataError for files that are missing, damaged or of different models.
    """

    def load(split: str, name: str = config.task) -> list[Example]:
        data_dir = config.data_dir or data.download_task(name)
        return data.load_task(name, data_dir, split, bpe, config.max_len)

    model_dir = Path(config.model_dir) if config.model_dir else data.download_model()
    task = TASKS[config.task]
    bpe = data.BPE(model_dir / "vocab.json", model_dir / "merges.txt")
    model = load_roberta(model_dir, task.num_labels)
    room = model.config.max_position_embeddings - model.config.pad_token_id - 1
    if config.max_len > room or len(bpe.vocab) > model.config.vocab_size:
        raise DoRAError(f"{model_dir}: has {room} positions and {model.config.vocab_size} tokens, "
                        f"max_len is {config.max_len}, vocab.json has {len(bpe.vocab)}; lower "
                        f"--max-len or take all files from one model")
    device = find_device(config.device)
    if config.dtype == "float64":
        model.double()
    elif config.dtype == "bf16" and config.method in ("full", "bitfit"):  # float32 weights train
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore
    elif config.dtype == "bf16":
        model.roberta.to(torch.bfloat16)
    return task, model.to(device), model_dir, load


def find_device(name: str) -> torch.device:
    """The device of this process; DoRAError if the machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda" and process()[1] > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise DoRAError(f"device = {name}: not to be had here; use --device cpu") from None


# ---- a run's folder ----------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: (message, signal). The state has been saved."""


class Run:
    """How far a run is, and its folder: config.json, metrics.jsonl, checkpoints/step-N.pt (the
    newest two), adapter/ or model/ (of the best epoch after the last pruning), result.json,
    ranks.json. Only the first process writes; files but metrics.jsonl are whole or not there.
    """

    # a resumed run may differ in these settings from the one it goes on with
    FREE = ("out", "resume", "device", "save_every", "data_dir", "model_dir", "compile")

    def __init__(self, config: TrainConfig, identity: dict[str, Any], model: nn.Module,
                 optimizer: torch.optim.Optimizer, pruner: Pruner):
        self.model, self.optimizer, self.pruner = model, optimizer, pruner
        self.step = 0  # optimizer steps done
        self.records: list[dict[str, Any]] = []  # the metrics after each epoch
        self.best: dict[str, Any] | None = None  # the best of them since the last pruning
        self.config, self.folder = config, run_folder(config)
        self.metrics = self.folder / "metrics.jsonl"
        self.writes = process()[0] == 0
        self.saved = sorted(self.folder.glob("checkpoints/step-*.pt"))  # by an earlier call
        self.signal = 0  # the one that arrived; acted upon between two steps, where all is whole
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in self.FREE}
        self.identity = json.loads(json.dumps({**settings.pop("dora"), **settings, **identity}))

    def __enter__(self) -> Run:
        ended = (self.folder / "result.json").exists()
        if self.saved and not self.config.resume or ended and not self.saved:
            remedy = "use another --out" + ", or go on with it by --resume" * bool(self.saved)
            raise DoRAError(f"{self.folder} holds a run already; {remedy}")
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            try:
                import fcntl  # not on Windows; the system drops the lock with its process
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                pass
            except OSError:
                raise DoRAError(f"{self.folder}: another run is writing here; use another --out "
                                f"or wait for its end") from None
            for half in self.folder.glob("checkpoints/.*.part"):  # of a killed process
                half.unlink()
            if not self.saved:
                write_json(self.folder / "config.json", dataclasses.asdict(self.config))
                self.metrics.write_bytes(b"")

        def handle(number: int, frame: Any) -> None:
            self.signal = number

        self.handlers = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        try:
            if isinstance(error, NotFiniteError):
                self.save("not-finite")  # to be looked into; --resume passes it over
                good = [path.stem for path in sorted(self.folder.glob("checkpoints/step-*.pt"))]
                raise NotFiniteError(
                    f"{error}, it was {self.optimizer.param_groups[0]['lr']:.3g} (--lr); saved as "
                    f"not-finite.pt in {self.folder}/checkpoints, the last good one there is "
                    f"{good[-1] if good else 'none yet'}") from None
        finally:
            if self.writes:
                self.lock.close()

    def stop(self, device: torch.device) -> int:
        """The signal that arrived at any of the processes, 0 if none did."""
        if process()[1] == 1:
            return self.signal
        return int(reduced(torch.tensor(self.signal, device=device), "MAX"))

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.writes:
            with open(self.metrics, "a") as f:
                f.write(json.dumps(line) + "\n")

    def check(self, loss: float, norm: float) -> None:
        """NotFiniteError where loss, gradient or a weight is not finite; DoRAError where the
        processes' masks differ."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        good = torch.stack([p.isfinite().all() for p in trained.values()]).tolist()  # one wait
        if not (all(good) and math.isfinite(loss + norm)):
            bad = [name for name, whole in zip(trained, good) if not whole] or ["none"]
            raise NotFiniteError(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}, "
                                 f"first bad weight {bad[0]}; lower the learning rate")
        device = next(self.model.parameters()).device
        mask = self.pruner.mask.to(device).float()
        if not torch.equal(reduced(mask, "MIN"), reduced(mask, "MAX")):
            raise DoRAError(f"step {self.step}: the processes pruned different components; start "
                            f"them with the same settings and data")

    def save(self, name: str = "") -> None:
        """Write checkpoints/step-N.pt or NAME.pt: all that one process needs to go on bit for bit;
        several draw new dropout."""
        if not self.writes:
            return
        with open(self.metrics, "ab") as f:
            os.fsync(f.fileno())
            metrics_size = f.tell()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        weights = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        state = {"identity": self.identity, "step": self.step, "records": self.records,
                 "best": self.best, "weights": weights, "optimizer": self.optimizer.state_dict(),
                 "pruner": self.pruner.state_dict(), "rng": [torch.get_rng_state(), *cuda],
                 "metrics_size": metrics_size}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        folder = self.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{name or f'step-{self.step:08d}'}.pt", [buffer.getbuffer()])
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def load(self) -> None:
        """Take up the newest checkpoint that is whole; DoRAError if it is of other settings."""
        for path in reversed(self.saved):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                identity = state["identity"]
                with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                    if archive.testzip() is None:
                        break
            except Exception:  # a damaged pickle raises nearly anything
                pass
            say(f"{path} is damaged, going back to the one before")
        else:
            raise DoRAError(f"{self.folder}: no checkpoint is whole; start with another --out")
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise DoRAError(f"{path} was made with {key} = {identity.get(key)}, not "
                                f"{value}; resume with the same, or start anew with another --out")
        self.pruner.load_state_dict(state["pruner"])
        if self.pruner.done:
            compact_(self.model, self.optimizer)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for key, tensor in state["weights"].items():
                parameters[key].copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][0])
        torch.cuda.set_rng_state_all(state["rng"][1:])  # none of a run without a GPU
        if self.writes:
            os.truncate(self.metrics, state["metrics_size"])  # steps that will be done again
        self.step, self.records, self.best = state["step"], state["records"], state["best"]

    def save_best(self, model_dir: Path) -> None:
        """The adapter with its head; the whole model where there is no adapter."""
        if self.writes and self.pruner.layers:
            save_adapter(self.model, self.folder / "adapter")
        elif self.writes:
            save_model(self.model, self.folder / "model")  # type: ignore[arg-type]
            for name in ("vocab.json", "merges.txt"):
                write_whole(self.folder / "model" / name, [(model_dir / name).read_bytes()])


def run_folder(config: TrainConfig) -> Path:
    """--out, or runs/TASK-METHOD-SEED."""
    return Path(config.out or f"runs/{config.task}-{config.method}-{config.seed}")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_whole(path, [json.dumps(value, indent=2).encode() + b"\n"])


# ---- several processes -------------------------------------------------------------------------


def say(text: str) -> None:
    """To the terminal, from the first process, without tearing the bar."""
    if process()[0] == 0:
        tqdm.write(text)


def connect() -> None:
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and process()[1] == 1:
        # Imported later, its default arguments would hold the group, whose threads then outlive
        # destroy_process_group and can abort the process as it exits.
        import torch.distributed.nn
        torch.distributed.init_process_group()


def process() -> tuple[int, int]:
    """(rank, number) of the processes that train together; (0, 1) without torchrun."""
    group = torch.distributed
    on = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if on else (0, 1)


def reduced(value: Tensor, operation: str = "SUM") -> Tensor:
    """The sum (MIN, MAX) of a tensor over all processes."""
    if process()[1] > 1:
        value = value.clone()
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
    return value


def wrap(model: nn.Module, config: TrainConfig) -> Any:
    """What the loop calls: the model, shared between processes or compiled if asked for."""
    net = nn.parallel.DistributedDataParallel(model) if process()[1] > 1 else model
    return torch.compile(net) if config.compile else net


# ---- evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, examples: list[Example]) -> np.ndarray:
    """Class ids, or scores in 0..1, (N,) in the order of the examples."""
    rank, world = process()
    device = next(model.parameters()).device
    found = torch.zeros(len(examples), dtype=torch.float64, device=device)
    model.eval()
    for batch in data.batches(examples, 64, None, 0, rank=rank, world=world):
        if len(batch.rows):
            logits = model(batch.ids.to(device), batch.mask.to(device)).double()  # (B, classes)
            outputs = logits[:, 0].clamp(0, 1) if logits.shape[1] == 1 else logits.argmax(1)
            found[batch.rows.to(device)] = outputs.double()  # each row is filled by one process
    return reduced(found).cpu().numpy()


def evaluate(model: nn.Module, examples: list[Example], task: Task) -> dict[str, float]:
    """The task's metrics on labelled examples, the headline first."""
    predictions = predict(model, examples)
    if task.labels and (predictions == predictions[0]).all():
        say(f"all {len(examples)} predictions are {task.labels[int(predictions[0])]!r}: the model "
            f"collapsed to one class")
    return data.score(task, predictions, [example.label for example in examples])


def evaluate_dev(model: nn.Module, sets: dict[str, list[Example]], task: Task) -> dict[str, float]:
    """Metrics on dev; for MNLI the mean of matched (m) and mismatched (mm), then both."""
    scores = {split: evaluate(model, examples, task) for split, examples in sets.items()}
    if len(scores) == 1:
        return scores["dev"]
    both = {f"{name}_{'m' if split == 'dev' else 'mm'}": value
            for split, row in scores.items() for name, value in row.items()}
    return {task.metrics[0]: statistics.mean(both.values()), **both}


# ---- the training ------------------------------------------------------------------------------


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits (B, classes) with labels (B,), or the squared error of a regression's
    one output; mean over the batch, a scalar."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Of step 0..T-1: linear warm-up, then linear to 0."""
    warm = round(config.warmup * total)
    return config.lr * ((step + 1) / warm if step < warm else (total - step) / (total - warm))


def train(config: TrainConfig) -> dict[str, Any]:
    """One run with one seed: what the command line calls. Returns result.json's content.

    Raises DoRAError or DataError for bad input, NotFiniteError, Interrupted (the state is saved).
    """
    started, (rank, world) = time.monotonic(), process()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)
    task, model, model_dir, load = prepare(config)
    train_set = load("train")
    dev_sets = {split: load(split) for split in task.files if split.startswith("dev")}
    identity = {"model weights": fingerprint(model.roberta.parameters()),
                "train examples": len(train_set)}
    layers = adapt(model, config)
    device = next(model.parameters()).device
    counts = {"adapter_parameters": sum(m.A.numel() + m.B.numel() for m in layers.values()),
              "head_parameters": sum(p.numel() for p in model.classifier.parameters()),
              "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}

    batch_size = config.batch_size * config.accumulate  # examples of an optimizer step
    per_epoch = math.ceil(len(train_set) / batch_size)
    total = config.max_steps or config.epochs * per_epoch
    pruner = Pruner(layers, config.dora, total)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr,
                                  weight_decay=config.weight_decay, fused=True)
    with Run(config, identity, model, optimizer, pruner) as run:
        if run.saved:
            run.load()
        elif config.resume:
            say(f"{run.folder}: no checkpoint yet, starting from the beginning")
        if rank:
            torch.manual_seed(config.seed + rank + run.step)  # other dropout in every process
        net = wrap(model, config)
        bar = tqdm(total=total, initial=run.step, unit="step", disable=True if rank else None)
        while run.step < total:
            epoch, done = divmod(run.step, per_epoch)
            for batch in data.batches(train_set, batch_size, config.seed, epoch, skip=done):
                # ---- one optimizer step; DoRA is three lines of it
                model.train()
                lr, penalty = learning_rate(run.step, total, config), pruner.penalty()
                loss = torch.zeros((), device=device)
                for i, micro in enumerate(batch.split(config.accumulate)):
                    part = micro.split(world)[rank].to(device)
                    share = len(part.labels) / len(batch.labels)  # one mean, however it is cut up
                    if not share:  # too short a last batch: some example, counted 0 times
                        part = batch.split(len(batch.labels))[0].to(device)
                    part_loss = task_loss(net(part.ids, part.mask), part.labels) * share
                    loss = loss + part_loss.detach()  # += would round float64 to float32
                    # DistributedDataParallel takes the mean of the processes' gradients
                    (part_loss * world + (0 if i else penalty)).backward()
                pruner.observe()
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
                pruner.step()
                run.step += 1
                # ---- the rest is bookkeeping
                if run.step == pruner.last and layers:  # the mask is final: the dead leave for good
                    compact_(model, optimizer)
                    net = wrap(model, config)
                bar.update()
                ended = run.step % per_epoch == 0 or run.step == total
                logging = run.step % config.log_every == 0 or run.step == total
                stopped = run.stop(device) if logging or world == 1 else 0
                saving = ended or stopped or run.step % config.save_every == 0
                if logging or saving:  # only here does the device have to be waited for
                    b_t = budget(run.step, total, config.dora, len(layers)) if layers else 0
                    line = {"step": run.step, "lr": lr, "loss": float(reduced(loss)),
                            "penalty": float(penalty.detach()), "grad_norm": float(norm),
                            "live": pruner.live, "budget": b_t}
                    run.check(line["loss"], line["grad_norm"])
                    if logging:
                        run.log(line)
                        bar.set_postfix({k: line[k] for k in ("loss", "live", "budget")})
                if ended:
                    scores = evaluate_dev(model, dev_sets, task)
                    epoch_done = round(run.step / per_epoch, 3)
                    run.records.append({"epoch": epoch_done, "step": run.step, **scores})
                    headline = task.metrics[0]
                    if pruner.done and (run.best is None or scores[headline] > run.best[headline]):
                        run.best = run.records[-1]
                        run.save_best(model_dir)
                    say(f"epoch {epoch_done:g}  " +
                        "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
                if saving:
                    run.save()
                    if number := run.stop(device):
                        bar.close()
                        raise Interrupted(f"stopped at step {run.step} of {total}, saved in "
                                          f"{run.folder}", number)
                if run.step == total:  # max_steps may lie within an epoch
                    break
        bar.close()
        ranks = pruner.ranks()
        after = sum(k * sum(layers[name].base.weight.shape) for name, k in ranks.items())
        result = {"task": config.task, "method": config.method, "seed": config.seed,
                  "best": run.best, "last": run.records[-1], "epochs": run.records, "steps": total,
                  **counts, "adapter_parameters_after_pruning": after,
                  "seconds": round(time.monotonic() - started, 1)}
        if run.writes:
            write_json(run.folder / "ranks.json", ranks)
            write_json(run.folder / "result.json", result)
    return {**result, "ranks": ranks, "folder": str(run.folder)}


# ---- the toy -----------------------------------------------------------------------------------


def toy(config: TrainConfig) -> dict[str, Any]:
    """The whole story in under a minute: pretrain a tiny RoBERTa, freeze it, adapt it with DoRA.

    Pretraining is full fine-tuning on short sentences: are subject and verb of "these dogs see a
    king" singular or plural? The adaptation task asks if a sentence is right, and puts phrases
    between the two in which the nearest noun misleads: "these dogs near the king sees a bird".
    Files, tokenizer, loader and loop are those of GLUE. DoRAError in several processes and for a
    model_dir.
    """
    if process()[1] > 1 or config.model_dir:
        raise DoRAError("the toy is for one process and makes its own model; for torchrun or "
                        "--model-dir name a --task and --data-dir")
    torch.set_num_threads(1)  # matrices this small are slower when threads share them
    root = Path(config.out or tempfile.mkdtemp(prefix="dora-toy-"))
    untrained, pretrained = root / "untrained", root / "pretrain" / "model"
    bpe = data.write_toy(root, untrained)
    torch.manual_seed(config.seed)
    tiny = RobertaConfig(vocab_size=len(bpe.vocab), hidden_size=64, num_hidden_layers=3,
                         num_attention_heads=4, intermediate_size=256, max_position_embeddings=64,
                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                         initializer_range=0.1)
    save_model(RobertaForSequenceClassification(tiny, 4), untrained)
    none = DoRAConfig(**METHODS["lora"])  # no adapter

    def run(name: str, model_dir: Path, what: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        say(f"--- {what}")
        return what, train(dataclasses.replace(config, data_dir=str(root), model_dir=str(model_dir),
                                               out=str(root / name), max_len=48, **changes))

    run("pretrain", untrained, "pretraining on short sentences, all weights", task="toy-pretrain",
        method="full", lr=1e-3, batch_size=32, epochs=3, max_steps=None, dora=none)
    rows = [run("adapted", pretrained, f"{config.method} on the pretrained encoder"),
            run("head", pretrained, "its head alone", method="head", dora=none),
            run("blind", untrained, f"{config.method} without pretraining")]
    print(f"\nMatthews correlation on the adaptation task (files in {root})")
    for what, result in rows:
        print(f"{result['best']['matthews']:8.3f}  {what}")
    return rows[0][1]


# ---- the command line --------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for bad input, 128 + signal when interrupted."""
    args = vars(make_parser().parse_args(argv))
    seeds, eval_only, adapter, split = (
        args.pop(name) for name in ("seeds", "eval_only", "adapter", "predict"))
    try:
        if args.get("task", "toy") == "toy" and not (eval_only or {"data_dir", "out"} & {*args}):
            args["out"] = tempfile.mkdtemp(prefix="dora-toy-")
        connect()
        results = []
        for seed in seeds:
            config = make_config(**args, seed=seed)
            if split:
                data.find_task(config.task, split)  # DataError if it has no such file
            if len(seeds) > 1 and config.out:
                config = dataclasses.replace(config, out=f"{config.out}/seed-{seed}")
            if eval_only:
                evaluate_only(config, adapter, split)
                continue
            result = (toy if config.task == "toy" and not config.data_dir else train)(config)
            results.append(result)
            show(result)
            if split:
                folder = Path(result["folder"])
                adapter = folder / "adapter" if result["ranks"] else None
                model_dir = config.model_dir if adapter else str(folder / "model")
                evaluate_only(dataclasses.replace(config, out=str(folder), model_dir=model_dir),
                              adapter, split)
        if len(results) > 1:
            summarize(results)
    except Interrupted as error:
        out = f", --out {args['out']}" if args.get("out") else ""
        say(f"{error.args[0]}; go on with the same command{out} and --resume")
        return 128 + error.args[1]
    except KeyboardInterrupt:
        say("stopped outside of training, there was nothing to save; start the command anew")
        return 128 + signal.SIGINT
    except (DoRAError, DataError) as error:
        print(f"train_glue.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if process()[1] == 1:
            raise
        print(f"train_glue.py: error: a process is gone ({str(error).splitlines()[0]:.100}); go on "
              f"from the last checkpoint in {run_folder(config)} with the same command and "
              f"--resume", file=sys.stderr, flush=True)
        os._exit(1)  # at a normal exit, threads of the broken process group may abort
    except OSError as error:
        print(f"train_glue.py: error: {error.filename or 'a file'}: {error.strerror or error}; "
              f"what was complete is intact", file=sys.stderr)
        return 2
    finally:
        if process()[1] > 1:
            torch.distributed.destroy_process_group()
    return 0


def show(result: dict[str, Any]) -> None:
    """Score, parameters, and where the ranks went."""
    best, metric = result["best"], TASKS[result["task"]].metrics[0]
    say(f"\n{result['task']}, {result['method']}, seed {result['seed']}: {metric} "
        f"{best[metric]:.4f} after epoch {best['epoch']:g}, {result['last'][metric]:.4f} after "
        f"the last, {result['seconds']:.0f} s\n"
        f"trained {result['trainable_parameters']:,} parameters, {result['head_parameters']:,} of "
        f"them in the head; adapter {result['adapter_parameters']:,}, after pruning "
        f"{result['adapter_parameters_after_pruning']:,}\nfiles in {result['folder']}")
    if result["ranks"]:
        say(f"live components, layer by matrix:\n{rank_map(result['ranks'])}")


def summarize(results: list[dict[str, Any]]) -> None:
    """Median, mean and standard deviation over the seeds."""
    metric = TASKS[results[0]["task"]].metrics[0]
    scores = [result["best"][metric] for result in results]
    say(f"\n{metric} over {len(scores)} seeds: median {statistics.median(scores):.4f}, mean "
        f"{statistics.mean(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}")


def evaluate_only(config: TrainConfig, adapter: str | Path | None, split: str | None) -> None:
    """Score on dev what was trained, an adapter or the whole model in model_dir, and write the
    submission files of a split. DoRAError if neither was trained."""
    task, model, model_dir, load = prepare(config)
    if adapter:
        load_adapter(model, adapter)
    elif not model.trained_head:
        raise DoRAError(f"{model_dir}: its weights have no head for {config.task}, scores would be "
                        f"chance; name a run's adapter with --adapter RUN/adapter")
    scores = evaluate_dev(model, {s: load(s) for s in task.files if s.startswith("dev")}, task)
    say("  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    if not split:
        return
    folder = Path(config.out or Path(adapter or model_dir).parent) / "submission"
    files = [(config.task, s) for s in task.files if s.startswith(split)]
    for name, part in files + ([("ax", "test")] if config.task == "mnli" else []):
        predictions = predict(model, load(part, name))
        if process()[0] == 0:
            say(f"wrote {data.write_submission(TASKS[name], part, predictions, folder)}")


def make_parser() -> argparse.ArgumentParser:
    """Flags made from the fields of TrainConfig and DoRAConfig."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s [--task TASK] [--SETTING VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for config, title in ((TrainConfig, "the run"), (DoRAConfig, "the method")):
        group, hints = parser.add_argument_group(title), get_type_hints(config)
        for f in dataclasses.fields(config):
            if f.name in ("seed", "dora"):
                continue
            hint = hints[f.name]  # as float, int | None, tuple[str, ...]
            kind, *more = get_args(hint) or (hint,)
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if kind is not bool:
                choices = ",".join(choice or "none" for choice in f.metadata["choices"])
                options = {"type": partial(parse_value, kind, type(None) in more),
                           "metavar": f"{{{choices}}}" if choices else kind.__name__.upper(),
                           "nargs": "+" if get_origin(hint) is tuple else None}
            default = "the task's, paper's Table 8" if f.name in COLUMNS_8 else f.default
            text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
            group.add_argument("--" + f.name.replace("_", "-"), help=text,
                               default=argparse.SUPPRESS, **options)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="a run each (default: 1)")
    parser.add_argument("--eval-only", action="store_true", help="score --adapter, do not train")
    parser.add_argument("--adapter", metavar="FOLDER", help="for --eval-only: RUN/adapter")
    parser.add_argument("--predict", choices=("test",), help="write the test set's submission file")
    return parser


def parse_value(kind: type, optional: bool, text: str) -> Any:
    """A flag's text as a setting's value; "none" where that is one. Raises argparse's error."""
    if optional and text.lower() == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {kind.__name__}") from None


if __name__ == "__main__":
    sys.exit(main())
