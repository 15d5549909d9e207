"""GLUE as tensors: text -> token ids -> batches -> scores. Knows nothing of models.

    TASKS, load_task         a row per task; the rows of a TSV file -> list of Example(ids, label)
    BPE, train_bpe           RoBERTa's byte-level byte-pair encoding, and how its merges are learned
    batches, Batch           examples of similar length together, shuffled by (seed, epoch), padded
    score, write_submission  the task's metrics; the file that gluebenchmark.com takes
    download_task / _model   the public sources, for those with internet
"""
import functools
import hashlib
import http.client
import json
import os
import re
import ssl
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib import error, request

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

AnyPath = str | os.PathLike[str]

class DataError(ValueError):
    """Input that cannot be used: one line that names file, line, what was found, and the remedy."""

# ---- Tasks -------------------------------------------------------------------------------------

class Task(NamedTuple):
    """A row of TASKS. Files are tab-separated; columns go by the names in their header line."""
    name: str
    folder: str                            # below the data folder; also the submission's name
    texts: tuple[str, ...]                 # one or two text columns
    label: str                             # label column, absent from test files
    metrics: tuple[str, ...]               # names of functions below; the first is the headline
    labels: tuple[str, ...] = ("0", "1")   # label words in the order of their ids; () = regression
    top: float = 5.0                       # regression: labels run from 0 to top, trained as y/top
    columns: tuple[str, ...] = ()          # names for train and dev files that have no header line
    bad_rows: int = 0                      # malformed train and dev rows that may be left out
    source: str = ""                       # what download_task fetches, below glue/data/
    files: Mapping[str, str] = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
    submissions: Mapping[str, str] = {}    # names of submission files, where not the folder's

    @property
    def num_labels(self) -> int:
        """Width of the model's output: the number of classes, or 1 for regression."""
        return len(self.labels) or 1

    def number(self, cell: str) -> int | float | None:
        """A label as it is trained on: class id, or y/top (float); None if it is no label."""
        try:
            value = self.labels.index(cell) if self.labels else float(cell) / self.top
        except ValueError:
            return None
        return value if self.labels or 0 <= value <= 1 else None      # NaN is not in 0..1

PAIR, NLI2 = ("sentence1", "sentence2"), ("entailment", "not_entailment")
NLI3 = ("entailment", "neutral", "contradiction")
COLA = ("source", "label", "mark", "sentence")           # its files have no header; nor has the toy
TOY_FILES = {"train": "train.tsv", "dev": "dev.tsv"}     # made by write_toy

# A task of your own is one more row, in a script that imports this file:
#   TASKS["mine"] = Task("mine", "my_folder", ("review",), "stars", ("accuracy",), ("bad", "good"))
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", ("sentence",), "label", ("matthews",), columns=COLA, source="CoLA.zip"),
    Task("sst2", "SST-2", ("sentence",), "label", ("accuracy",), source="SST-2.zip"),
    Task("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1"), source="MRPC"),
    Task("qqp", "QQP", ("question1", "question2"), "is_duplicate", ("accuracy", "f1"),
         bad_rows=100, source="QQP-clean.zip"),
    Task("stsb", "STS-B", PAIR, "score", ("pearson", "spearman"), (), source="STS-B.zip"),
    Task("mnli", "MNLI", PAIR, "gold_label", ("accuracy",), NLI3, source="MNLI.zip",
         files={"train": "train.tsv", "dev": "dev_matched.tsv", "dev_mm": "dev_mismatched.tsv",
                "test": "test_matched.tsv", "test_mm": "test_mismatched.tsv"},
         submissions={"test": "MNLI-m", "test_mm": "MNLI-mm"}),
    Task("qnli", "QNLI", ("question", "sentence"), "label", ("accuracy",), NLI2,
         source="QNLIv2.zip"),
    Task("rte", "RTE", PAIR, "label", ("accuracy",), NLI2, source="RTE.zip"),
    Task("wnli", "WNLI", PAIR, "label", ("accuracy",), source="WNLI.zip"),
    Task("ax", "AX", PAIR, "label", ("matthews",), NLI3, source="AX.tsv",
         files={"test": "test.tsv"}),       # GLUE's diagnostic set, for a model trained on MNLI
    Task("toy", "toy", ("sentence",), "label", ("matthews",), columns=COLA, files=TOY_FILES),
    Task("toy-pretrain", "toy-pretrain", ("sentence",), "label", ("accuracy",),
         ("0", "1", "2", "3"), columns=COLA, files=TOY_FILES),
)}

class Example(NamedTuple):
    """A row of a task's file, as the model gets it."""
    ids: list[int]                # <s> a </s>  or  <s> a </s></s> b </s>
    label: int | float | None     # class id; y / top, in 0..1; None in a test file

def find_task(name: str, split: str = "") -> Task:
    """The row of TASKS; DataError if there is none, or none of its files is this split."""
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; expected one of {', '.join(TASKS)}")
    if split and split not in TASKS[name].files:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(TASKS[name].files)}")
    return TASKS[name]

def load_task(name: str, data_dir: AnyPath, split: str, bpe: "BPE", max_len: int) -> list[Example]:
    """The examples of one file, in its order. Raises DataError for a malformed row; up to
    task.bad_rows of a train or dev file are left out instead, and stderr says so."""
    task = find_task(name, split)
    path = Path(data_dir) / task.folder / task.files[split]
    labelled = not split.startswith("test")
    rows = enumerate(read_tsv(path), 1)
    columns = task.columns if labelled and task.columns else next(rows)[1]
    wanted = (*task.texts, task.label) if labelled else task.texts
    if missing := set(wanted) - set(columns):
        raise DataError(f"{path} line 1: no column {min(missing)!r} in {columns!r:.120}; expected "
                        f"a header with {', '.join(wanted)}; mend it")
    examples, bad, label = [], [], None
    for number, row in rows:
        cells = dict(zip(columns, row))
        if len(row) != len(columns):
            bad.append(f"{path} line {number}: {len(row)} columns, expected {len(columns)}: "
                       f"{', '.join(columns)}; mend the row (quotes protect no tab)")
        elif labelled and (label := task.number(cells[task.label])) is None:
            bad.append(f"{path} line {number}: {task.label} is {cells[task.label]!r:.60}, expected "
                       f"{', '.join(task.labels) or f'a number from 0 to {task.top:g}'}; mend it")
        else:
            ids = [bpe.encode(cells[text]) for text in task.texts]
            examples.append(Example(join_ids(ids, max_len), label))
        if len(bad) > (task.bad_rows if labelled else 0):
            raise DataError(bad[0])
    if not examples:
        raise DataError(f"{path}: no rows, expected {', '.join(columns)}; get the file anew")
    if bad:
        print(f"left out {len(bad)} malformed rows, the first: {bad[0]}", file=sys.stderr)
    return examples

def read_tsv(path: Path) -> list[list[str]]:
    """Rows of cells. A tab ends a cell and "\\n" a row, nothing else does: quotes, U+0085 and
    U+2028 are text. "\\r\\n" and a missing final newline are fine."""
    lines = read_text(path).removesuffix("\n").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines]

def read_text(path: Path) -> str:
    """A whole UTF-8 file, without its byte order mark if it has one; else DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")    # bad byte -> U+DCxx
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}; point --data-dir (tasks) or --model-dir (RoBERTa) "
                        "at a folder that has it, or leave them out to download") from None
    if bad := re.search("[\0\udc80-\udcff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise DataError(f"{path} line {line}: byte {ord(bad[0]) & 255:#04x}, expected text in "
                        "UTF-8; save the file as UTF-8 or get it anew")
    return text

# ---- RoBERTa's byte-level BPE ------------------------------------------------------------------

BOS, PAD, EOS = 0, 1, 2
SPECIAL = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": 3}
UNMERGED = re.compile(r"<[!-~]+>|madeupword\d+")   # tokens of RoBERTa's that no merge makes

# GPT-2 writes a visible byte as its own character, the others in order as U+0100, U+0101, ...
VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = sorted({*range(256)} - {*VISIBLE})
BYTE_CHARS = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}    # "Ġ": 32

# GPT-2's pattern for the pieces of a text, which merges never cross. re.ASCII: \s is then what the
# reference means by it (Python's own \s takes U+001C to U+001F, too).
PIECES = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)

@functools.cache
def ascii_like(char: str) -> str:
    """An ASCII character that PIECES treats as the reference's \\p{L}, \\p{N} and \\s treat `char`.

    `re` lacks these classes ([^\\W\\d_] and \\d are wrong on '²' and 1,130 others), and finding
    them for all of Unicode takes 0.3 s: so each character beyond ASCII is asked when it is met.
    """
    # z is in no contraction; "\n", unlike " ", leads no word
    kind = "Z" if char == "\x85" else unicodedata.category(char)[0]
    return {"L": "z", "N": "0", "Z": "\n"}.get(kind, "!")

def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left: a b a b c, (a, b) -> ab ab c."""
    out = symbols[:1]
    for symbol in symbols[1:]:
        if (out[-1], symbol) == pair:
            out[-1] += symbol      # longer than pair[0]: never the left half of the next
        else:
            out.append(symbol)
    return out

class BPE:
    """RoBERTa's tokenizer (Radford et al. 2019, section 2.2) from its vocab.json and merges.txt.

    A literal "</s>" in a text is four characters like any others, never the special token.
    Raises DataError for files that are damaged or belong to another model.
    """
    def __init__(self, vocab_path: AnyPath, merges_path: AnyPath) -> None:
        self.vocab = read_vocab(Path(vocab_path))                     # token -> id
        self.ranks = read_merges(Path(merges_path), self.vocab)       # pair -> place in the file
        self.tokens = sorted(self.vocab, key=self.vocab.__getitem__)  # id -> token
        self.cache: dict[str, list[int]] = {}      # most pieces of a corpus were met before

    @staticmethod
    def pieces(text: str) -> list[str]:
        """The text cut where no merge may cross: "I'm 10²" -> ["I", "'m", " 10²"]."""
        if text.isascii():
            return PIECES.findall(text)
        shape = re.sub(r"[^\0-\x7f]", lambda match: ascii_like(match[0]), text)
        return [text[match.start():match.end()] for match in PIECES.finditer(shape)]

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without <s> and </s>."""
        ids: list[int] = []
        for piece in self.pieces(text):
            if piece not in self.cache:
                self.cache[piece] = [self.vocab[token] for token in self.merged(piece)]
            ids += self.cache[piece]
        return ids

    def merged(self, piece: str) -> list[str]:
        """Tokens of a piece: its bytes, the pair that was learned first merged first."""
        symbols, last = [BYTE_CHARS[byte] for byte in piece.encode()], len(self.ranks)
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, last))
            if pair not in self.ranks:
                break
            symbols = merge(symbols, pair)
        return symbols

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens by their names; half a character becomes U+FFFD."""
        chars = "".join(self.tokens[i] for i in ids)
        return bytes(CHAR_BYTES[char] for char in chars).decode(errors="replace")

OTHER_FILES = "take vocab.json and merges.txt from one RoBERTa folder, or download them anew"

def read_vocab(path: Path) -> dict[str, int]:
    """token -> id. DataError unless ids are 0..n-1 and special tokens and all bytes have theirs."""
    text = read_text(path)
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not whole JSON ({e}); {OTHER_FILES}") from None
    if not isinstance(vocab, dict) or {type(i) for i in vocab.values()} != {int} \
            or sorted(vocab.values()) != [*range(len(vocab))]:
        raise DataError(f"{path}: expected token: id, with ids 0 to n - 1 each once; {OTHER_FILES}")
    wrong = [token for token, i in SPECIAL.items() if vocab.get(token) != i]
    if wrong := wrong + [char for char in CHAR_BYTES if char not in vocab]:
        raise DataError(f"{path}: {wrong[0]!r} is {vocab.get(wrong[0])}, expected {SPECIAL} and an "
                        f"id for each byte; {OTHER_FILES}")
    return vocab

def read_merges(path: Path, vocab: dict[str, int]) -> dict[tuple[str, str], int]:
    """pair -> rank. DataError unless pairs and products are tokens, and merges make every token."""
    ranks: dict[tuple[str, str], int] = {}
    made = {*CHAR_BYTES}
    lines = read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        left, _, right = line.removesuffix("\r").partition(" ")
        if left in made and right in made and vocab.get(left + right, 0) >= len(SPECIAL):
            made.add(left + right)
            ranks[left, right] = len(ranks)
        elif number > 1 or left != "#version:":
            raise DataError(f"{path} line {number}: {line!r:.60}, expected two "
                            f"tokens whose product is in vocab.json; {OTHER_FILES}")
    if lost := [token for token in vocab if token not in made and not UNMERGED.fullmatch(token)]:
        raise DataError(f"{path}: cut short, no merge makes {lost[0]!r:.60}; {OTHER_FILES}")
    return ranks

def join_ids(texts: list[list[int]], max_len: int) -> list[int]:
    """<s> a </s> or <s> a </s></s> b </s>, at most max_len ids; the longer text is cut first.

    Like the tokenizers library's "longest_first": the shorter text stays whole while it fits in
    half of the room; else both get half, and an odd place goes to the longer (b, if equal).
    DataError if there is no room for text.
    """
    a, b = (*texts, [])[:2]
    room = max_len - 2 * len(texts)
    if room < 1:
        raise DataError(f"max_len {max_len}: no room for text beside the special tokens; raise it")
    short = min(len(a), len(b), room // 2)         # what the shorter text keeps
    a, b = (a[:room - short], b[:short]) if len(a) > len(b) else (a[:short], b[:room - short])
    return [BOS, *a, EOS, EOS, *b, EOS] if len(texts) > 1 else [BOS, *a, EOS]

def train_bpe(texts: Iterable[str], n_merges: int, vocab_path: AnyPath,
              merges_path: AnyPath) -> None:
    """Learn merges (Sennrich et al. 2016, algorithm 1) and write both files in RoBERTa's layout:
    special tokens, bytes, merges, <mask>. Ties go by alphabet. For small corpora: each merge
    counts all pairs anew."""
    counts = Counter(piece for text in texts for piece in BPE.pieces(text))
    words = [([BYTE_CHARS[byte] for byte in piece.encode()], n) for piece, n in counts.items()]
    vocab = {token: i for i, token in enumerate((*SPECIAL, *CHAR_BYTES))}
    merges: list[tuple[str, str]] = []
    for _ in range(n_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, n in words:
            for pair in pairwise(symbols):
                pairs[pair] += n
        new = [p for p in pairs if "".join(p) not in vocab and "".join(p) != "<mask>"]
        if not new:
            break
        best = min(new, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        vocab["".join(best)] = len(vocab)
        words = [(merge(symbols, best), n) for symbols, n in words]
    vocab["<mask>"] = len(vocab)
    with written_whole(vocab_path) as file:
        file.write(json.dumps(vocab, ensure_ascii=False).encode())
    with written_whole(merges_path) as file:
        file.write("\n".join(("#version: 0.2", *map(" ".join, merges), "")).encode())

# ---- The toy: generated sentences --------------------------------------------------------------

NOUNS = ("dog", "cat", "bird", "teacher", "doctor", "student", "singer", "farmer", "pilot",
         "lawyer", "writer", "painter", "king", "queen", "robot")
VERBS = ("see", "hear", "like", "follow", "help", "know", "visit", "call", "admire", "thank")
ADJECTIVES = ("old", "young", "happy", "quiet", "tall", "clever")
PREPOSITIONS = ("near", "behind", "with", "beside", "above")

def toy_sentence(rng: np.random.Generator, phrases: int) -> tuple[str, int, int]:
    """(text, subject is plural, verb is plural), with `phrases` between the two:
    "these dogs near the king see a bird". In half of the sentences the verb does not agree."""
    def noun_phrase(plural: int) -> list[str]:
        determiner = rng.choice((("the", "this", "a"), ("the", "these", "some"))[plural])
        adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.3 else []
        return [determiner, *adjective, rng.choice(NOUNS) + "s" * plural]

    subject, verb = rng.integers(2, size=2).tolist()
    words = noun_phrase(subject)
    for _ in range(phrases):
        words += [rng.choice(PREPOSITIONS), *noun_phrase(int(rng.integers(2)))]
    words += [rng.choice(VERBS) + "s" * (1 - verb), *noun_phrase(int(rng.integers(2)))]
    return " ".join(words), subject, verb

def write_toy(data_dir: AnyPath, model_dir: AnyPath) -> BPE:
    """Write the toy's files in CoLA's layout, and a tokenizer learned from them.

    toy-pretrain asks for the numbers of subject and verb in short sentences (four classes). toy
    asks if a sentence is right, with one or two phrases in which the nearest noun misleads.
    """
    rng, texts = np.random.default_rng(0), []
    for name, split, size in (("toy-pretrain", "train", 4000), ("toy-pretrain", "dev", 400),
                              ("toy", "train", 1000), ("toy", "dev", 400)):
        with written_whole(Path(data_dir) / name / f"{split}.tsv") as file:
            for _ in range(size):
                phrases = 0 if name == "toy-pretrain" else int(rng.integers(1, 3))
                text, subject, verb = toy_sentence(rng, phrases)
                label = int(subject == verb) if phrases else 2 * subject + verb
                file.write(f"toy\t{label}\t\t{text}\n".encode())
                texts.append(text)
    paths = Path(model_dir) / "vocab.json", Path(model_dir) / "merges.txt"
    train_bpe(texts, 200, *paths)
    return BPE(*paths)

# ---- Batches -----------------------------------------------------------------------------------

class Batch(NamedTuple):
    """B examples, padded to the longest, T ids."""
    ids: torch.Tensor       # (B, T) int64, padded with <pad>
    mask: torch.Tensor      # (B, T) bool, True = token
    labels: torch.Tensor    # (B,)   int64 class ids, float32 for regression; -1 in a test file
    rows: torch.Tensor      # (B,)   int64, positions in the list of examples

    def split(self, n: int) -> list["Batch"]:
        """n parts, part i the rows i, i + n, ..., as wide as its longest row; (0, 1) if empty."""
        widths = [max([1, *self.mask[i::n].sum(1).tolist()]) for i in range(n)]
        return [Batch(self.ids[i::n, :width], self.mask[i::n, :width],
                      self.labels[i::n], self.rows[i::n]) for i, width in enumerate(widths)]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

POOL = 64     # batches whose examples are sorted together: more pad less, fewer mix better

def batches(examples: Sequence[Example], batch_size: int, seed: int | None, epoch: int,
            skip: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Each example once, in batches of similar length; one batch may be smaller.

    The order is a function of (seed, epoch) alone. seed None, for evaluation: the longest first
    (running out of memory shows at once); Batch.rows says where each belongs. `skip` leaves out
    batches at the start. Process `rank` of `world` gets batch.split(world)[rank] of each batch.
    """
    lengths = np.array([len(example.ids) for example in examples])
    order = np.argsort(-lengths, kind="stable")
    if seed is not None:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(examples))
        pool = np.arange(len(order)) // (POOL * batch_size)
        order = order[np.lexsort((lengths[order], pool))]      # by pool, in it by length
    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    for group in groups[skip:]:
        yield collate(examples, group).split(world)[rank]

def collate(examples: Sequence[Example], rows: np.ndarray) -> Batch:
    """The examples at these rows (B,) as one padded batch."""
    chosen = [examples[row] for row in rows]
    width = max(len(example.ids) for example in chosen)
    ids = torch.tensor([[*e.ids, *[PAD] * (width - len(e.ids))] for e in chosen])
    labels = torch.tensor([-1 if e.label is None else e.label for e in chosen],
                          dtype=torch.float32 if isinstance(chosen[0].label, float) else None)
    return Batch(ids, ids != PAD, labels, torch.tensor(rows))

# ---- Metrics of (predictions, labels): class ids or real numbers, both (N,) --------------------

def vectors(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, (N,); ValueError for other shapes, which would broadcast."""
    x, y = np.asarray(predictions), np.asarray(labels)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"expected two vectors of one length, not empty: {x.shape} and {y.shape}")
    return x, y

def accuracy(predictions: Any, labels: Any) -> float:
    """Share of equal entries."""
    x, y = vectors(predictions, labels)
    return float((x == y).mean())

def f1(predictions: Any, labels: Any) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 if that is 0/0."""
    x, y = (v == 1 for v in vectors(predictions, labels))
    return float(2 * (x & y).sum() / max(1, x.sum() + y.sum()))

def matthews(predictions: Any, labels: Any) -> float:
    """Matthews' correlation: for ids 0 and 1, Pearson's (the phi coefficient), and so 0 if all
    predictions are equal, a model collapsed to one class. ValueError for other ids."""
    x, y = vectors(predictions, labels)
    if not np.isin((x, y), (0, 1)).all():
        raise ValueError("matthews is for two classes, with ids 0 and 1")
    return pearson(x, y)

def pearson(predictions: Any, labels: Any) -> float:
    """Linear correlation; 0, not NaN, if either side is constant."""
    x, y = (v.astype(np.float64) for v in vectors(predictions, labels))
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0                 # asked exactly: what rounding leaves of x - mean is no signal
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()        # squares neither overflow nor vanish
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))

def spearman(predictions: Any, labels: Any) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""
    ranks = []
    for values in vectors(predictions, labels):
        _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[which])
    return pearson(*ranks)

METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}

def score(task: Task, predictions: Any, labels: Any) -> dict[str, float]:
    """The task's metrics by name, its headline first."""
    return {name: METRICS[name](predictions, labels) for name in task.metrics}

def write_submission(task: Task, split: str, predictions: Any, folder: AnyPath) -> Path:
    """GLUE's submission file, "index<TAB>prediction", whole or not at all; returns its path.

    predictions: (N,) in the order of the test file and in the units of Example.label: class ids,
    written as their label words, or y/top, written as y cut to 0..top. DataError for others.
    """
    values = np.asarray(predictions)
    valid = np.isin(values, range(len(task.labels))) if task.labels else np.isfinite(values)
    if values.ndim != 1 or not valid.all():
        raise DataError(f"{task.name}: predictions of shape {values.shape}, expected a vector of "
                        f"{f'class ids below {task.num_labels}' if task.labels else 'numbers'}")
    cells = [task.labels[int(value)] for value in values] if task.labels else \
        [f"{value:.5f}" for value in np.clip(values * task.top, 0, task.top)]
    path = Path(folder) / f"{task.submissions.get(split, task.folder)}.tsv"
    with written_whole(path) as file:
        file.write(b"index\tprediction\n")
        file.writelines(f"{i}\t{cell}\n".encode() for i, cell in enumerate(cells))
    return path

# ---- Files and downloads -----------------------------------------------------------------------

@contextmanager
def written_whole(path: AnyPath) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once it is complete and on disk, else never. The
    temporary name is unique: two processes may write the same file at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

WAITS = (0.5, 1.0, 2.0)       # seconds before each new attempt
TIMEOUT = 30.0                # seconds without a byte
WAYS_OUT = "or use your own files: --data-dir FOLDER (GLUE) and --model-dir FOLDER (RoBERTa)"

def fetch(url: str, path: AnyPath, sha256: str | None = None, size: int | None = None) -> None:
    """Download url to path, whole or not at all; size (bytes) and hash, ours or else the server's,
    must match. Time-outs, server errors and damage are tried again. Raises DataError."""
    for wait in (*WAITS, None):
        try:
            return fetch_once(url, path, sha256, size)
        except (error.URLError, http.client.HTTPException, TimeoutError, ConnectionError,
                ssl.SSLError) as e:
            code = getattr(e, "code", 500)
            if wait is None or (code < 500 and code != 429):     # 429: too many requests
                remedy = {403: "access denied", 404: "check the name"}.get(code, "try again later")
                raise DataError(f"{url}: {e}; {remedy}, {WAYS_OUT}") from None
            time.sleep(wait)
        except ValueError as e:            # the address itself, or a header that is no number
            raise DataError(f"{url}: {e}; mend HF_ENDPOINT or GLUE_ENDPOINT") from None
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}; make room or set DORA_CACHE") from None

class FirstAnswer(request.HTTPRedirectHandler):
    """Follows redirects and keeps the first answer's headers: there the hub gives the hash."""
    headers: Any = None

    def redirect_request(self, *args: Any, **kwargs: Any) -> Any:
        """urllib's hook, called at each redirect."""
        self.headers = self.headers or args[4]
        return super().redirect_request(*args, **kwargs)

def fetch_once(url: str, path: AnyPath, sha256: str | None, size: int | None) -> None:
    """One attempt; raises what urllib raises, and HTTPException for a wrong size or hash."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("no http(s):// address")
    handler, digest = FirstAnswer(), hashlib.sha256()
    with request.build_opener(handler).open(url, timeout=TIMEOUT) as answer:
        first = handler.headers or answer.headers
        tag = (first["X-Linked-ETag"] or first["ETag"] or "").strip('"')
        sha256 = sha256 or (tag if re.fullmatch("[0-9a-f]{64}", tag) else None)
        size = size or int(first["X-Linked-Size"] or answer.headers["Content-Length"] or 0)
        with written_whole(path) as file, tqdm(     # disable=None: no bar where stderr is a file
                total=size or None, desc=Path(url).name, unit="B", unit_scale=True,
                disable=None) as bar:
            while block := answer.read(1 << 20):
                digest.update(block)
                bar.update(file.write(block))
            if size and file.tell() != size:
                raise http.client.HTTPException(f"{file.tell()} bytes, expected {size}")
            if sha256 and digest.hexdigest() != sha256:
                raise http.client.HTTPException(f"sha256 {digest.hexdigest()}, expected {sha256}")

def cache_folder() -> Path:
    """Where downloads go: $DORA_CACHE, or ~/.cache/dora-glue."""
    return Path(os.environ.get("DORA_CACHE") or Path.home() / ".cache" / "dora-glue")

def download_model(repo: str = "FacebookAI/roberta-base", cache: AnyPath | None = None) -> Path:
    """The model's folder in the cache; files it lacks come from $HF_ENDPOINT (huggingface.co).
    DataError if they cannot be had."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repo, re.ASCII):
        raise DataError(f"model {repo!r}: expected OWNER/NAME as on huggingface.co")
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    folder = Path(cache or cache_folder()) / "models" / repo.replace("/", "--")
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        if not (folder / name).exists():
            fetch(f"{endpoint}/{repo}/resolve/main/{name}", folder / name)
    return folder

def download_task(name: str, cache: AnyPath | None = None) -> Path:
    """A data_dir that holds the task; if it lacks files, they come from their public source.
    DataError if they cannot be had."""
    task = find_task(name)
    folder = Path(cache or cache_folder()) / "glue" / task.folder
    base = (os.environ.get("GLUE_ENDPOINT") or "https://dl.fbaipublicfiles.com").rstrip("/")
    if not task.source:
        raise DataError(f"{name}: has no public source; give --data-dir with {task.folder}/ in it")
    if all((folder / file).exists() for file in task.files.values()):
        return folder.parent
    if name == "mrpc":
        download_mrpc(base, folder)
    elif task.source.endswith(".zip"):
        download_zip(f"{base}/glue/data/{task.source}", folder, task.files.values())
    else:
        fetch(f"{base}/glue/data/{task.source}", folder / task.files["test"])
    return folder.parent

def download_zip(url: str, folder: Path, files: Iterable[str]) -> None:
    """Take folder.name/file out of a zip for each file. DataError for a zip that is damaged or has
    any member that would land outside of the folder it is unpacked in."""
    archive = folder / f"{os.urandom(6).hex()}.zip"       # two runs at once: two archives
    fetch(url, archive)
    try:
        with zipfile.ZipFile(archive) as members:
            for name in members.namelist():
                if ".." in re.split(r"[/\\]", name) or re.match(r"[/\\]|\w:", name):
                    raise zipfile.BadZipFile(f"member {name!r:.80} leads out of its folder")
            for name in files:
                with written_whole(folder / name) as file:
                    file.write(members.read(f"{folder.name}/{name}"))
    except Exception as e:     # zipfile has no one error for damage
        raise DataError(f"{url}: {e!s:.200}; not the expected zip, try later, {WAYS_OUT}") from None
    finally:
        archive.unlink(missing_ok=True)

def download_mrpc(base: str, folder: Path) -> None:
    """GLUE's MRPC out of Microsoft's files: dev is those pairs of train whose ids are listed, test
    has an index in the place of its labels."""
    def rows_of(url: str) -> list[list[str]]:
        path = folder / "raw" / Path(url).name
        fetch(f"{base}/{url}", path)
        return read_tsv(path)

    header, *pairs = rows_of("senteval/senteval_data/msr_paraphrase_train.txt")
    _, *tests = rows_of("senteval/senteval_data/msr_paraphrase_test.txt")
    ids = [row[:2] for row in rows_of("glue/data/mrpc_dev_ids.tsv")]
    files = {"train": [header, *(row for row in pairs if row[1:3] not in ids)],
             "dev": [header, *(row for row in pairs if row[1:3] in ids)],
             "test": [["index", *header[1:]], *([f"{i}", *r[1:]] for i, r in enumerate(tests))]}
    for split, rows in files.items():
        with written_whole(folder / f"{split}.tsv") as file:
            file.write("".join("\t".join(row) + "\n" for row in rows).encode())
