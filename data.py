"""Turn GLUE's text files into batches of token ids, and predictions into scores.

    TASKS, load_task          a row per task; the rows of its TSV file -> Example(ids, label)
    BPE                       RoBERTa's byte-level byte-pair encoding: text -> token ids
    batches, endless_batches  examples of similar length together, shuffled by (seed, epoch)
    METRICS, score            the task's metrics
    write_submission          the file that gluebenchmark.com takes

The second half has the generated toy task, the checks of files, and the downloads. This file knows
nothing of models.
"""
import functools
import heapq
import http.client
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib import error, request

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from dora import atomic_file

AnyPath = str | os.PathLike[str]


class DataError(ValueError):
    """Raised for input that cannot be used, with one line: file, what was found, and the remedy."""


def require(condition: object, message: str) -> None:
    """Raise DataError unless the condition holds."""
    if not condition:
        raise DataError(message)


# ---- tasks and TSV files -------------------------------------------------------------------------

SPLITS = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}


@dataclass(frozen=True)
class Task:
    """A row of TASKS. Its files are tab-separated; columns are found by the names in the header.

    Raises DataError for fields that cannot work.
    """

    name: str
    folder: str  # below the data folder; also the name of the submission file
    texts: tuple[str, ...]  # one or two text columns
    label: str  # the label column, which test files do not have
    metrics: tuple[str, ...]  # names in METRICS; the first is the headline
    labels: tuple[str, ...] = ("0", "1")  # as in the files, in the order of ids; () = regression
    words: tuple[str, ...] = ()  # what other people's checkpoints call these labels
    top: float = 5.0  # regression: labels y run from 0 to top, and y/top is what is trained
    columns: tuple[str, ...] = ()  # names for train and dev files that have no header line
    bad_rows: int = 0  # malformed train and dev rows that may be left out
    source: str = ""  # what download_task fetches, below glue/data/
    files: Mapping[str, str] = field(default_factory=lambda: SPLITS)
    submissions: Mapping[str, str] = field(default_factory=dict)  # by split; default: folder

    def __post_init__(self) -> None:
        def check(condition: object, problem: str) -> None:
            require(condition, f"task {self.name!r}: {problem}")

        for name in ("texts", "metrics", "labels", "columns"):
            value = getattr(self, name)
            check(isinstance(value, (tuple, list)) and all(isinstance(cell, str) for cell in value),
                  f"{name} = {value!r}, expected a tuple of strings, such as ('a',)")

        check(len(self.texts) in (1, 2), f"texts = {self.texts!r}, expected one or two columns")
        check(not self.columns or {*self.texts, self.label} <= {*self.columns},
              f"columns = {self.columns!r}, expected {self.label!r} and {self.texts!r} among them")
        check(len({*self.labels}) == len(self.labels) != 1,
              f"labels = {self.labels!r}, expected two or more, each once, or () for a regression")
        check("dev" in self.files or "train" not in self.files,
              f"files = {self.files!r} has no 'dev', on which a run is scored")
        if "dev" in self.files:  # AX is not scored here
            check(len(self.labels) == 2 or not {"matthews", "f1"} & {*self.metrics},
                  f"metrics = {self.metrics!r}, but matthews and f1 are for two labels")
            check(self.labels or "accuracy" not in self.metrics,
                  f"metrics = {self.metrics!r}, but labels = () means a regression")

    @property
    def num_labels(self) -> int:
        """Return the width of the model's output: the number of classes, or 1 for regression."""
        return len(self.labels) or 1

    def parse_label(self, cell: str) -> int | float:
        """Return the label as it is trained on: a class id, or y/top. ValueError if invalid."""
        if cell in self.labels:
            return self.labels.index(cell)

        if not self.labels:
            try:
                share = float(cell) / self.top
            except ValueError:
                share = math.nan
            if 0 <= share <= 1:  # False for NaN
                return share

        choices = " or ".join(map(repr, self.labels)) or f"a number from 0 to {self.top:g}"
        raise ValueError(f"{self.label} is {cell!r:.60}, expected {choices:.300}; fix it")

    def submission(self, split: str) -> str:
        """Return the name of a test file's submission file, without ".tsv"."""
        default = self.folder if split == "test" else f"{self.folder}-{split.removeprefix('test_')}"
        return self.submissions.get(split, default)


PAIR = ("sentence1", "sentence2")
NLI2 = ("entailment", "not_entailment")
NLI3 = ("entailment", "neutral", "contradiction")
COLA = ("source", "label", "mark", "sentence")  # train and dev of CoLA and the toy have no header
TOY_FILES = {"train": "train.tsv", "dev": "dev.tsv"}  # made by write_toy
MNLI_FILES = {
    "train": "train.tsv",
    "dev": "dev_matched.tsv",
    "dev_mm": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test_mm": "test_mismatched.tsv",
}

# A task of your own is one more row, in a script that imports this file:
#   TASKS["mine"] = Task("mine", "my_folder", ("review",), "stars", ("accuracy",), ("bad", "good"))
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence",), "label", ("matthews",),
         words=("unacceptable", "acceptable"), columns=COLA, source="CoLA.zip"),
    Task("sst2", "SST-2", ("sentence",), "label", ("accuracy",), words=("negative", "positive"),
         source="SST-2.zip"),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1"),
         words=("not_equivalent", "equivalent"), source="MRPC"),
    Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ("accuracy", "f1"),
         words=("not_duplicate", "duplicate"), bad_rows=100, source="QQP-clean.zip"),
    Task("stsb", "STS-B", PAIR, "score", ("pearson", "spearman"), (), source="STS-B.zip"),
    Task("mnli", "MNLI", PAIR, "gold_label", ("accuracy",), NLI3, source="MNLI.zip",
         files=MNLI_FILES, submissions={"test": "MNLI-m"}),
    Task("qnli", "QNLI", ("question", "sentence"), "label", ("accuracy",), NLI2,
         source="QNLIv2.zip"),
    Task("rte", "RTE", PAIR, "label", ("accuracy",), NLI2, source="RTE.zip"),
    Task("wnli", "WNLI", PAIR, "label", ("accuracy",), words=("not_entailment", "entailment"),
         source="WNLI.zip"),
    # GLUE's diagnostic set, for a model trained on MNLI
    Task("ax", "AX", PAIR, "label", ("matthews",), NLI3, source="AX.tsv",
         files={"test": "test.tsv"}),
    Task("toy", "toy", ("sentence",), "label", ("matthews",), columns=COLA, files=TOY_FILES),
    Task("toy-pretrain", "toy-pretrain", ("sentence",), "label", ("accuracy",),
         ("0", "1", "2", "3"), columns=COLA, files=TOY_FILES),
)}


class Example(NamedTuple):
    """A row of a task's file, as the model gets it."""

    ids: list[int]  # <s> a </s>  or  <s> a </s></s> b </s>
    label: int | float | None  # class id; y/top, in 0..1; None in a test file


def find_task(name: str, split: str = "") -> Task:
    """Return a row of TASKS, whose name may be written like SST-2 or sst2.

    Raises DataError if there is no such row, metric or split.
    """
    known = known_name(name, TASKS)
    require(known in TASKS, f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    task = TASKS[known]
    for metric_name in task.metrics:
        require(metric_name in METRICS, f"task {task.name!r}: unknown metric {metric_name!r}, "
                f"expected one of {', '.join(METRICS)}")
    require(split in task.files or not split,
            f"{name} has no split {split!r}; it has {', '.join(task.files)}")
    return task


def known_name(word: str, names: Iterable[str]) -> str:
    """Return the known name that a word spells (MRPC, sst-2, Lora), or else the word itself."""
    return next((name for name in names if plain(name) == plain(word)), word)


def plain(name: str) -> str:
    """Return a name in the form in which names are compared: STS-B -> stsb."""
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", "", name.strip().lower())


def load_task(name: str, data_dir: AnyPath, split: str, bpe: "BPE", max_len: int) -> list[Example]:
    """Load the examples of one file, in its order. DataError if a row is malformed.

    Up to task.bad_rows malformed rows of a train or dev file are left out, and stderr reports them.
    """
    task = find_task(name, split)
    labelled = not split.startswith("test")
    path = expanded(data_dir) / task.folder / task.files[split]
    rows = read_tsv(path, f"check --data-dir, the folder that holds {task.folder}/")

    has_header = not (labelled and task.columns)
    columns = rows.pop(0) if has_header else [*task.columns]
    check_header(path, columns, (*task.texts, task.label) if labelled else task.texts)
    while rows and rows[-1] == [""] and len(columns) > 1:  # blank lines at the end
        rows.pop()

    examples: list[Example] = []
    malformed: list[str] = []
    allowed = task.bad_rows if labelled else 0  # in a test file each row must keep its place
    for place, cells in enumerate(rows):
        try:
            texts, label = parse_row(task, columns, cells, labelled, place)
        except ValueError as problem:
            malformed.append(f"{path} line {place + (2 if has_header else 1)}: {problem}")
            require(len(malformed) <= allowed, malformed[0])
        else:
            examples.append(Example(encode_row(bpe, texts, max_len), label))

    require(examples, f"{path}: no rows, expected {', '.join(columns):.200}; download it again")
    if malformed:
        count = len(malformed)
        print(f"left out {count} malformed rows, the first: {malformed[0]}", file=sys.stderr)
    return examples


def parse_row(task: Task, columns: Sequence[str], cells: Sequence[str], labelled: bool,
              place: int) -> tuple[list[str], int | float | None]:
    """Return the texts and the label (None in a test file) of a row. ValueError if malformed."""
    if len(cells) != len(columns):
        raise ValueError(f"{len(cells)} columns, expected {len(columns)}: {', '.join(columns):.200}"
                         f"; fix the row (tabs end columns, even inside quotes)")

    row = dict(zip(columns, cells))
    texts = [row[text] for text in task.texts]
    if labelled:
        return texts, task.parse_label(row[task.label])
    if row.get("index", f"{place}") != f"{place}":  # a submission file numbers the rows from 0
        raise ValueError(f"index is {row['index']!r:.60}, expected {place}; sort or renumber")
    return texts, None


def read_tsv(path: Path, remedy: str = "check --data-dir") -> list[list[str]]:
    r"""Read a file as rows of cells. DataError, with this remedy, if there is no such file.

    A tab ends a cell and "\n" a row, and nothing else does: quotes, U+0085 and U+2028 are text.
    "\r\n" and a missing final newline are fine.
    """
    lines = read_text(path, remedy).removesuffix("\n").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines]


# ---- RoBERTa's byte-level BPE --------------------------------------------------------------------

BOS, PAD, EOS = 0, 1, 2
SPECIAL = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": 3}

# GPT-2 writes a visible byte as its own character, the others in order as U+0100, U+0101, ...
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = sorted({*range(256)} - {*VISIBLE})
BYTE_CHARS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}  # "Ġ": 32

# GPT-2's pattern for the pieces of a text, which no merge crosses, for text in ASCII. Other text is
# cut where its ASCII likeness is cut: "é²x" -> "z0x" -> "z", "0", "x" -> "é", "²", "x".
# re.ASCII: \s is then what the reference means by it (Python's own \s includes U+001C to U+001F).
PIECES = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


@functools.cache
def ascii_like(char: str) -> str:
    r"""Return an ASCII character that PIECES treats as the reference's pattern treats `char`.

    The reference has the classes \p{L}, \p{N} and \s, which `re` lacks: [^\W\d_] and \d are wrong
    on "²" and 1,130 other characters. Classifying all of Unicode takes 0.3 s, so each character
    beyond ASCII is classified on first use. Characters that are newer than Python's Unicode tables
    (unicodedata.unidata_version; 9,392 of them in Python 3.11) count as punctuation, even if they
    are letters: next to one, a text may get other ids than those of the tokenizers library.
    """
    kind = "Z" if char == "\x85" else unicodedata.category(char)[0]
    # z is in no contraction; "\n", unlike " ", does not join the word that follows
    return {"L": "z", "N": "0", "Z": "\n"}.get(kind, "!")


def byte_chars(piece: str) -> list[str]:
    """Return the UTF-8 bytes of a piece in GPT-2's characters: " é" -> Ġ Ã ©."""
    return [BYTE_CHARS[byte] for byte in piece.encode()]


class BPE:
    """RoBERTa's tokenizer (Radford et al. 2019, section 2.2).

    A literal "</s>" in a text is four characters like any others, never the special token.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Read vocab.json and merges.txt, or else tokenizer.json. Raises DataError."""
        vocab, merges = read_tokenizer(expanded(folder))
        self.vocab = vocab  # token -> id
        self.tokens = sorted(vocab, key=vocab.__getitem__)  # id -> token
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}  # pair -> order of learning
        self.cache: dict[str, list[int]] = {}  # piece -> ids; most pieces of a corpus repeat

    @staticmethod
    def pieces(text: str) -> list[str]:
        """Cut a text where no merge may cross: "I'm 10²" -> ["I", "'m", " 10²"]."""
        if text.isascii():
            return PIECES.findall(text)
        likeness = re.sub(r"[^\0-\x7f]", lambda match: ascii_like(match[0]), text)
        return [text[match.start():match.end()] for match in PIECES.finditer(likeness)]

    def encode(self, text: str, limit: int = sys.maxsize) -> list[int]:
        """Return the token ids of a text, the first `limit` of them, without <s> and </s>."""
        ids: list[int] = []
        for piece in self.pieces(text):
            if piece not in self.cache:
                self.cache[piece] = [self.vocab[token] for token in self.merged(piece)]
            ids += self.cache[piece]
            if len(ids) >= limit:
                return ids[:limit]
        return ids

    def merged(self, piece: str) -> list[str]:
        """Return the tokens of a piece: its bytes, merged in the order in which pairs were learned.

        With the merges (e, s), (es, t): n e w e s t -> n e w es t -> n e w est.
        """
        # While a pair of neighbours is in ranks, join the one that was learned first, the leftmost
        # if there are several. A heap finds it in O(log n), so a word of n bytes takes O(n log n)
        # and not O(n^2).
        symbols = ["", *byte_chars(piece), ""]  # "" marks the ends, and those that were joined
        before = [*range(-1, len(symbols) - 1)]  # position of the neighbour on the left
        after = [*range(1, len(symbols) + 1)]  # and on the right
        ranks = self.ranks
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        heapq.heapify(heap)

        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if ranks.get((symbols[left], symbols[right])) != rank:
                continue  # one of the two has been joined with another neighbour

            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            for i in (before[left], left):  # the two pairs that the new symbol is in
                pair = symbols[i], symbols[after[i]]
                if pair in ranks:
                    heapq.heappush(heap, (ranks[pair], i))
        return [symbol for symbol in symbols if symbol]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids: special tokens by name, half a character as U+FFFD."""
        raw = bytes(CHAR_BYTES[char] for i in ids for char in self.tokens[i])
        return raw.decode(errors="replace")


def encode_row(bpe: BPE, texts: Sequence[str], max_len: int) -> list[int]:
    """Encode the texts of a row, as far as they can fit into max_len, and join their ids."""
    room = max_len - 2 * len(texts)
    ids = [bpe.encode(text, limit=room + 1) for text in texts]
    if len(texts) == 2 and room % 2 and min(map(len, ids)) > room:
        # the odd place goes to the longer of two long texts: only all ids tell which one that is
        ids = [bpe.encode(text) for text in texts]
    return join_ids(ids, max_len)


def join_ids(texts: Sequence[list[int]], max_len: int) -> list[int]:
    """Return <s> a </s> or <s> a </s></s> b </s>, cut to max_len ids, from the longer text first.

    As in the tokenizers library's "longest_first", the shorter text is not cut while it fits into
    half of the room. Else each gets half, and an odd place goes to the longer one (b, if equal).
    """
    room = max_len - 2 * len(texts)
    if len(texts) == 1:
        return [BOS, *texts[0][:room], EOS]

    a, b = texts
    shorter = min(len(a), len(b), room // 2)  # what the shorter text keeps
    longer = room - shorter  # what the longer text may keep
    if len(a) > len(b):
        a, b = a[:longer], b[:shorter]
    else:
        a, b = a[:shorter], b[:longer]
    return [BOS, *a, EOS, EOS, *b, EOS]


# ---- batches -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B examples, padded to the longest, T ids."""

    ids: torch.Tensor  # (B, T) int64, padded with <pad>
    mask: torch.Tensor  # (B, T) bool, True = token
    labels: torch.Tensor  # (B,) int64 class ids, float32 for regression; -1 in a test file
    rows: torch.Tensor  # (B,) int64, positions in the list of examples

    def split(self, n: int) -> list["Batch"]:
        """Cut into n parts: part i has the rows i, i + n, ..., and is as wide as its longest row.

        If n > B, only the first B parts have examples; the rest are empty, with ids (0, 1).
        """
        parts = []
        for i in range(n):
            part = slice(i, None, n)
            width = max([1, *self.mask[part].sum(1).tolist()])
            ids, mask = self.ids[part, :width], self.mask[part, :width]
            parts.append(Batch(ids, mask, self.labels[part], self.rows[part]))
        return parts

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        # elsewhere the source might be freed before it is copied
        non_blocking = torch.device(device).type == "cuda"
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


# batches whose examples are sorted together; larger: less padding; smaller: better shuffled
POOL = 64


def batches(examples: Sequence[Example], batch_size: int, seed: int | None, epoch: int,
            skip: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield each example once, in batches of similar length; one batch may be smaller.

    Its only randomness is that of (seed, epoch). seed None, for evaluation, puts the longest
    first (running out of memory shows at once), and Batch.rows says where each belongs. The first
    `skip` batches are left out. Process `rank` of `world` gets batch.split(world)[rank] of each.
    """
    lengths = np.array([len(example.ids) for example in examples])
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(examples))
        pool = np.arange(len(order)) // (POOL * batch_size)
        order = order[np.lexsort((lengths[order], pool))]  # by pool, then by length

    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    for group in groups[skip:]:
        yield collate(examples, group[rank::world])


def endless_batches(examples: Sequence[Example], batch_size: int, seed: int,
                    step: int = 0) -> Iterator[Batch]:
    """Yield epoch after epoch, without end, from optimizer step `step` (0, 1, ...) on."""
    epoch, skip = divmod(step, math.ceil(len(examples) / batch_size))
    yield from batches(examples, batch_size, seed, epoch, skip)
    for later in itertools.count(epoch + 1):
        yield from batches(examples, batch_size, seed, later)


def collate(examples: Sequence[Example], rows: np.ndarray) -> Batch:
    """Return the examples at these rows (B,) as one padded batch; without rows, ids are (0, 1)."""
    chosen = [examples[row] for row in rows]
    width = max([1, *(len(example.ids) for example in chosen)])
    padded = np.full((len(chosen), width), PAD, dtype=np.int64)  # (B, T)
    for row, example in zip(padded, chosen):
        row[:len(example.ids)] = example.ids

    ids = torch.from_numpy(padded)
    labels = [-1 if example.label is None else example.label for example in chosen]
    dtype = torch.float32 if isinstance(examples[0].label, float) else torch.int64
    return Batch(ids, ids != PAD, torch.tensor(labels, dtype=dtype), torch.tensor(rows))


# ---- metrics -------------------------------------------------------------------------------------

METRICS: dict[str, Callable[[Any, Any], float]] = {}  # filled by @metric


def metric(function: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Any, Any], float]:
    """Add a function of predictions and labels, both (N,), to METRICS, with checks before it.

    A NaN among them makes the result NaN. ValueError for other shapes, which would broadcast, for
    no entries, and for entries that are not numbers.
    """
    @functools.wraps(function)
    def checked(predictions: Any, labels: Any) -> float:
        x, y = np.asarray(predictions), np.asarray(labels)
        if x.ndim != 1 or x.shape != y.shape or not len(x):
            raise ValueError(f"expected two vectors of equal length, not empty; got {x.shape} and "
                             f"{y.shape}")
        if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
            raise ValueError(f"expected two vectors of numbers, got {x.dtype} and {y.dtype}")
        if np.isnan(x).any() or np.isnan(y).any():
            return math.nan
        return float(function(x, y))

    METRICS[function.__name__] = checked
    return checked


@metric
def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal entries of two vectors, (N,)."""
    return (predictions == labels).mean()


@metric
def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return 2 TP / (2 TP + FP + FN) of class 1, and 0 for 0/0, of two vectors of ids, (N,)."""
    predicted, true = predictions == 1, labels == 1
    tp = (predicted & true).sum()
    return 2 * tp / max(1, predicted.sum() + true.sum())  # the sum is 2 TP + FP + FN


@metric
def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of two vectors of ids 0 and 1, (N,). ValueError for other ids.

    For two classes it is Pearson's (the phi coefficient), and so 0 if all predictions are equal,
    as those of a model that collapsed to one class.
    """
    if not np.isin((predictions, labels), (0, 1)).all():
        raise ValueError("matthews is for two classes, with ids 0 and 1")
    return pearson(predictions, labels)


@metric
def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation of two vectors, (N,): 0 if one is constant."""
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0  # tested exactly, since rounding would leave a spurious x - mean

    x, y = x - x.mean(), y - y.mean()
    correlation = x @ y / np.sqrt((x @ x) * (y @ y))
    return np.clip(correlation, -1, 1)  # rounding may lead out of this range


@metric
def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return Pearson's correlation of the ranks of two vectors, (N,)."""
    return pearson(mean_ranks(predictions), mean_ranks(labels))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks 1 to N of a vector (N,). Equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the last rank of each distinct value
    return (last - (counts - 1) / 2)[which]


def score(task: Task, predictions: Any, labels: Any) -> dict[str, float]:
    """Return the task's metrics by name, the headline first, for one file's predictions, (N,)."""
    return {name: METRICS[name](predictions, labels) for name in task.metrics}


# ---- submission files ----------------------------------------------------------------------------


def write_submission(task: Task, split: str, predictions: Any, folder: AnyPath) -> Path:
    """Write GLUE's submission file, "index<TAB>prediction", atomically, and return its path.

    The predictions (N,) are in the order of the test file and in the units of Example.label: class
    ids are written as their label words, y/top as y clipped to 0..top.
    """
    values = np.asarray(predictions)
    if task.labels:
        cells = [task.labels[int(value)] for value in values]
    else:
        cells = [f"{value:.5f}" for value in np.clip(values * task.top, 0, task.top)]

    path = expanded(folder) / f"{task.submission(split)}.tsv"
    write_tsv(path, [("index", "prediction"), *enumerate(cells)])
    return path


# ==================================================================================================
# You can stop reading here: what follows is plumbing (the toy, checks of files, downloads).
# ==================================================================================================

# ---- the toy: generated sentences and a tokenizer learned from them ------------------------------

NOUNS = ("dog", "cat", "bird", "teacher", "doctor", "student", "singer", "farmer", "pilot",
         "lawyer", "writer", "painter", "king", "queen", "robot")
VERBS = ("see", "hear", "like", "follow", "help", "know", "visit", "call", "admire", "thank")
ADJECTIVES = ("old", "young", "happy", "quiet", "tall", "clever")
PREPOSITIONS = ("near", "behind", "with", "beside", "above")
DETERMINERS = (("the", "this", "a"), ("the", "these", "some"))  # singular, plural

TOY_SIZES = {
    ("toy-pretrain", "train"): 4000,
    ("toy-pretrain", "dev"): 400,
    ("toy", "train"): 1000,
    ("toy", "dev"): 400,
}
TOY_PHRASES = (2, 5)  # a sentence of the adaptation task has from 2 to 4


def toy_sentence(rng: np.random.Generator, phrases: int) -> tuple[str, int, int]:
    """Return (text, subject is plural, verb is plural), with `phrases` between the two.

    An example with one: "these dogs near the king see a bird". In half of the sentences the verb
    does not agree with the subject.
    """
    def noun_phrase(plural: int) -> list[str]:
        words = [rng.choice(DETERMINERS[plural])]
        if rng.random() < 0.3:
            words.append(rng.choice(ADJECTIVES))
        return [*words, rng.choice(NOUNS) + "s" * plural]

    subject, verb = rng.integers(2, size=2).tolist()
    words = noun_phrase(subject)
    for _ in range(phrases):
        words.append(rng.choice(PREPOSITIONS))
        words += noun_phrase(int(rng.integers(2)))

    words.append(rng.choice(VERBS) + "s" * (1 - verb))
    words += noun_phrase(int(rng.integers(2)))
    return " ".join(words), subject, verb


def write_toy(data_dir: AnyPath, model_dir: AnyPath) -> BPE:
    """Write the toy's files in CoLA's layout, and a tokenizer learned from them.

    toy-pretrain asks for the numbers of subject and verb in short sentences (four classes). toy
    asks if a sentence is correct, with two to four phrases whose nouns distract from the subject.
    """
    rng = np.random.default_rng(0)
    texts = []
    for (name, split), size in TOY_SIZES.items():
        rows = []
        for _ in range(size):
            phrases = 0 if name == "toy-pretrain" else int(rng.integers(*TOY_PHRASES))
            text, subject, verb = toy_sentence(rng, phrases)
            label = int(subject == verb) if phrases else 2 * subject + verb
            rows.append(("toy", label, "", text))
            texts.append(text)
        write_tsv(Path(data_dir) / name / f"{split}.tsv", rows)

    train_bpe(texts, 200, model_dir)
    return BPE(model_dir)


def train_bpe(texts: Iterable[str], n_merges: int, folder: AnyPath) -> None:
    """Learn merges (Sennrich et al. 2016, algorithm 1) and write vocab.json and merges.txt.

    The vocabulary is: special tokens, bytes, merges, <mask>. Ties are broken alphabetically. This
    is for small corpora, since each merge counts all pairs again.
    """
    counts = Counter(piece for text in texts for piece in BPE.pieces(text))
    words = [(byte_chars(piece), n) for piece, n in counts.items()]
    vocab = {token: i for i, token in enumerate((*SPECIAL, *CHAR_BYTES))}
    merges: list[tuple[str, str]] = []

    for _ in range(n_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, n in words:
            for pair in pairwise(symbols):
                pairs[pair] += n
        taken = vocab.keys() | {"<mask>"}
        new = [pair for pair in pairs if "".join(pair) not in taken]
        if not new:
            break

        best = min(new, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocab["".join(best)] = len(vocab)
        words = [(merge(symbols, best), n) for symbols, n in words]

    vocab["<mask>"] = len(vocab)
    write_file(Path(folder) / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_file(Path(folder) / "merges.txt", "\n".join(lines) + "\n")


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left: a b a b c, (a, b) -> ab ab c."""
    out = symbols[:1]
    for symbol in symbols[1:]:
        if (out[-1], symbol) == pair:
            out[-1] += symbol  # longer than pair[0], so never the left half of the next pair
        else:
            out.append(symbol)
    return out


# ---- files and their checks ----------------------------------------------------------------------

CHECK_MODEL_DIR = ("check --model-dir, a folder with a RoBERTa model, or leave it out to download "
                   "roberta-base")


def expanded(path: AnyPath) -> Path:
    """Return a path with ~ replaced by the home folder, which a shell does not do in --out=~/x."""
    return Path(path).expanduser()


def write_file(path: AnyPath, content: str | bytes | memoryview) -> None:
    """Write a file atomically, a text in UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_tsv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows of cells atomically."""
    write_file(path, "".join("\t".join(map(str, row)) + "\n" for row in rows))


def read_text(path: Path, remedy: str) -> str:
    """Read a UTF-8 file, without its byte order mark if it has one. DataError for other files."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")  # bad byte -> U+DCxx
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}; {remedy}") from None

    require(text and not text.isspace(), f"{path}: the file is empty; {remedy}")
    require(not text.startswith("version https://git-lfs"),
            f"{path}: a git-lfs pointer, not the file itself; run git lfs pull")
    if bad := re.search("[\0\udc80-\udcff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise DataError(f"{path} line {line}: byte {ord(bad[0]) & 255:#04x}, expected text in "
                        f"UTF-8; save the file as UTF-8 or download it again")
    return text


def read_json(path: Path, remedy: str = CHECK_MODEL_DIR) -> dict[str, Any]:
    """Read a file with a JSON object. DataError, with this remedy, for other files."""
    text = read_text(path, remedy)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not valid JSON ({e}); {remedy}") from None
    require(isinstance(content, dict), f"{path}: not a JSON object; {remedy}")
    return content


def check_header(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError unless each wanted column is in the header exactly once."""
    for name in wanted:
        require(columns.count(name) == 1,
                f"{path} line 1: {columns.count(name)} columns {name!r} among "
                f"{', '.join(columns):.200}; expected a header with {', '.join(wanted)}, with tabs "
                f"between them")


# ---- tokenizer files -----------------------------------------------------------------------------

Tokenizer = tuple[dict[str, int], list[tuple[str, str]]]  # token -> id; pairs in order of learning
UNMERGED = re.compile(r"<[!-~]+>|madeupword\d+")  # RoBERTa's tokens that no merge makes
OTHER_FILES = "take all tokenizer files from one RoBERTa folder, or download them again"


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read vocab.json and merges.txt of a folder, or else tokenizer.json.

    Raises DataError if files are missing, damaged, those of another kind of model, or of different
    tokenizers.
    """
    vocab, merges, whole = (folder / f for f in ("vocab.json", "merges.txt", "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    require(not settings.exists() or not read_json(settings).get("add_prefix_space"),
            f"{settings}: add_prefix_space is true, expected false; take a RoBERTa model")
    try:
        if vocab.exists() and merges.exists():
            return read_vocab_and_merges(vocab, merges)
        if whole.exists():
            return read_tokenizer_json(whole)
    except (AttributeError, LookupError, TypeError) as e:
        raise DataError(f"{folder}: damaged ({e!r:.80}); {OTHER_FILES}") from None
    raise DataError(f"{folder}: expected vocab.json and merges.txt, or tokenizer.json; "
                    f"{CHECK_MODEL_DIR}")


def read_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """Read the two files of RoBERTa's first release."""
    added_path = vocab_path.with_name("added_tokens.json")
    added = read_json(added_path) if added_path.exists() else ()
    lines = read_text(merges_path, CHECK_MODEL_DIR).splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    return check_tokenizer(merges_path, read_json(vocab_path), pairs, added)


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Read the one file that transformers 5 saves."""
    content = read_json(path)
    model, added = content["model"], content.get("added_tokens", ())
    splitter = content.get("pre_tokenizer") or {}
    found = {"type": model["type"], "normalizer": content.get("normalizer"),
             "pre_tokenizer": splitter.get("type"),
             "add_prefix_space": splitter.get("add_prefix_space")}
    expected = {"type": "BPE", "normalizer": None, "pre_tokenizer": "ByteLevel",
                "add_prefix_space": False}
    require(found == expected,
            f"{path}: {found!r:.200}, expected {expected}; take a RoBERTa model")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return check_tokenizer(path, model["vocab"], pairs, [token["content"] for token in added])


def check_tokenizer(path: Path, vocab: dict[str, int], pairs: Sequence[Sequence[str]],
                    added: Iterable[str]) -> Tokenizer:
    """Return the vocabulary, and the merges as tuples.

    Raises DataError unless the ids are 0 to n - 1, special tokens have theirs, and the other tokens
    are the bytes and the products of the merges (with a file that was cut short, they are not), and
    if a text could contain an added token, which would get other ids here.
    """
    require(sorted(vocab.values()) == [*range(len(vocab))],
            f"{path}: expected token: id, each id from 0 to n - 1 once; {OTHER_FILES}")
    for token, i in SPECIAL.items():
        require(vocab.get(token) == i,
                f"{path}: {token!r} has the id {vocab.get(token)}, expected {i}; {OTHER_FILES}")
    for token in added:
        require(token in (*SPECIAL, "<mask>"), f"{path.parent}: the tokenizer has the added token "
                f"{token!r:.60}; take one without it, or delete it if no text contains it")

    made = {*CHAR_BYTES, *map("".join, pairs)}
    for token in made ^ {token for token in vocab if not UNMERGED.fullmatch(token)}:
        fault = "made by no merge" if token in vocab else "not in the vocabulary"
        raise DataError(f"{path}: {token!r:.60} is {fault}; {OTHER_FILES}")
    for pair in pairs:
        require(len(pair) == 2, f"{path}: {pair!r:.60} is not a pair; {OTHER_FILES}")
    return vocab, [(left, right) for left, right in pairs]


# ---- downloads -----------------------------------------------------------------------------------

WAITS = (0.5, 1.0, 2.0)  # seconds before each new attempt
TIMEOUT = 30.0  # seconds without a byte
HUB = "HF_ENDPOINT", "https://huggingface.co", "--model-dir"
GLUE = "GLUE_ENDPOINT", "https://dl.fbaipublicfiles.com", "--data-dir"


def fetch(source: tuple[str, str, str], file: str, path: AnyPath) -> None:
    """Download a file of a source (HUB or GLUE) atomically. Raises DataError.

    Time-outs, server errors and answers of the wrong size are tried again.
    """
    variable, address, flag = source
    url = f"{(os.environ.get(variable) or address).rstrip('/')}/{file}"

    for wait in (*WAITS, None):
        try:
            return fetch_once(url, path)
        except (error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
            code = getattr(e, "code", 500)
            if wait is None or (code < 500 and code != 429):  # 429: too many requests
                raise DataError(f"{url}: {e}; check the name, try again later, or use your own "
                                f"files with {flag}") from None
            time.sleep(wait)
        except ValueError as e:  # the address is not one
            raise DataError(f"{url}: {e}; fix {variable}") from None


def fetch_once(url: str, path: AnyPath) -> None:
    """Download once. Raises what urllib raises, and HTTPException for a wrong size."""
    with request.urlopen(url, timeout=TIMEOUT) as answer:
        size = int(answer.headers["Content-Length"] or 0)
        with atomic_file(path) as file, tqdm(  # disable=None: no bar where stderr is a file
                total=size or None, desc=Path(url).name, unit="B", unit_scale=True,
                disable=None) as bar:
            while block := answer.read(1 << 20):
                bar.update(file.write(block))
            if size and file.tell() != size:
                raise http.client.HTTPException(f"{file.tell()} bytes, expected {size}")


def cache_folder() -> Path:
    """Return where downloads go: $DORA_CACHE, or ~/.cache/dora-glue."""
    return expanded(os.environ.get("DORA_CACHE") or "~/.cache/dora-glue")


def download_model(repo: str = "FacebookAI/roberta-base") -> Path:
    """Return the model's folder in the cache, after fetching missing files from $HF_ENDPOINT.

    Raises DataError if they are not available.
    """
    folder = cache_folder() / "models" / repo.replace("/", "--")
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        if not (folder / name).exists():
            fetch(HUB, f"{repo}/resolve/main/{name}", folder / name)
    return folder


def download_task(name: str) -> Path:
    """Return a data_dir that holds the task, after fetching missing files from $GLUE_ENDPOINT.

    Raises DataError if they are not available.
    """
    task = find_task(name)
    folder = cache_folder() / "glue" / task.folder
    require(task.source, f"{name}: nowhere to download it from; use --data-dir with "
            f"{task.folder}/ in it")
    if all((folder / file).exists() for file in task.files.values()):
        return folder.parent

    if task.name == "mrpc":
        download_mrpc(folder)
    elif task.source.endswith(".zip"):
        download_zip(task.source, folder, task.files.values())
    else:
        fetch(GLUE, f"glue/data/{task.source}", folder / task.files["test"])
    return folder.parent


def download_zip(source: str, folder: Path, files: Iterable[str]) -> None:
    """Take folder.name/file out of a zip for each file. DataError for a damaged zip."""
    archive = folder / f"{os.urandom(6).hex()}.zip"  # two runs at once have two archives
    fetch(GLUE, f"glue/data/{source}", archive)
    try:
        with zipfile.ZipFile(archive) as members:
            for name in files:
                write_file(folder / name, members.read(f"{folder.name}/{name}"))
    except Exception as e:  # zipfile has no common error for damage
        raise DataError(f"{source}: {e!s:.200}; not the expected zip, try again later or use your "
                        f"own files with --data-dir") from None
    finally:
        archive.unlink(missing_ok=True)


def download_mrpc(folder: Path) -> None:
    """Make GLUE's MRPC from Microsoft's files.

    The dev set is those pairs of Microsoft's train set whose ids are listed. In the test set an
    index replaces the labels.
    """
    def rows_of(source: str) -> list[list[str]]:
        path = folder / "raw" / Path(source).name
        fetch(GLUE, source, path)
        return read_tsv(path, "try again later")

    header, *pairs = rows_of("senteval/senteval_data/msr_paraphrase_train.txt")
    _, *tests = rows_of("senteval/senteval_data/msr_paraphrase_test.txt")
    dev_ids = [row[:2] for row in rows_of("glue/data/mrpc_dev_ids.tsv")]

    splits = {
        "train": [row for row in pairs if row[1:3] not in dev_ids],
        "dev": [row for row in pairs if row[1:3] in dev_ids],
        "test": [[str(i), *row[1:]] for i, row in enumerate(tests)],
    }
    for split, rows in splits.items():
        first = "index" if split == "test" else header[0]
        write_tsv(folder / f"{split}.tsv", [[first, *header[1:]], *rows])
