"""data.py: TSV files, byte-level BPE, batches, metrics, submissions."""
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures.record import recorded
from small import table
from tiny import GLUE, MINILM, refused, same

import data
from data import BPE, TASKS, Example, Task

needs_glue = pytest.mark.skipif(not GLUE.exists(), reason="needs ../shared/data/glue")
needs_model = pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared/models")


@pytest.fixture(scope="module")
def roberta():
    return BPE(MINILM)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A small vocabulary: 4 + 256 + 4 merges + 1 tokens."""
    folder = tmp_path_factory.mktemp("toy")
    data.train_bpe(["low low low lower newest newest"], 4, folder)
    return folder


@pytest.fixture(scope="module")
def toy(toy_folder):
    return BPE(toy_folder)


@pytest.fixture
def load(tmp_path, toy):
    """load(text, task, split) writes the text (or bytes) as that file, loads it and returns (text
    with the special tokens, label) of each example."""
    def write_and_load(text, name="rte", split="train"):
        path = tmp_path / TASKS[name].folder / TASKS[name].files[split]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        examples = data.load_task(name, tmp_path, split, toy, 128)
        return [(toy.decode(ids), label) for ids, label in examples]

    return write_and_load


# Task, rows of train, dev and test, as in shared/glue.md, but for MRPC's train file: the copy in
# ../shared lacks the pair 2750203, 2750153 of Microsoft's file; download_task builds all 3,668.
ROWS = """
    cola   8551  1043  1063
    sst2  67349   872  1821
    mrpc   3667   408  1725
    stsb   5749  1500  1379
    qnli   none  5463  5463
    rte    2490   277  3000
    wnli    635    71   146
"""


class NoTokens:
    """A tokenizer that costs nothing: the ids of a text are its length."""
    def encode(self, text, limit=None):
        return [len(text)]


@needs_glue
@pytest.mark.parametrize("row", table(ROWS))
def test_row_counts(row):
    """Rows of every file in ../shared against GLUE's published counts; labels in range."""
    name, *counts = row
    for split, count in zip(("train", "dev", "test"), counts):
        if count == "none":
            continue
        examples = data.load_task(name, GLUE, split, NoTokens(), 128)
        assert len(examples) == int(count)
        labels = {example.label for example in examples}
        if split == "test":
            assert labels == {None}
        elif name == "stsb":
            assert min(labels) == 0 and max(labels) == 1
        else:
            assert labels == {0, 1}


RTE = "index\tsentence1\tsentence2\tlabel\n0\tA \"b\tc\" d\tentailment\n1\te\tf\tnot_entailment\n"
RTE_LOADED = [('<s>A "b</s></s>c" d</s>', 0), ("<s>e</s></s>f</s>", 1)]


@pytest.mark.parametrize("text", [
    RTE.rstrip("\n"), RTE.replace("\n", "\r\n"), RTE + "\r\n\r\n", "\ufeff" + RTE,
    "label\tsentence2\tsentence1\nentailment\tc\" d\tA \"b\nnot_entailment\tf\te\n"])
def test_tolerated_forms(text, load):
    """CRLF, byte order mark, blank lines at the end or no final newline, other order of columns:
    the same examples. In a file of one column a blank line is a row with an empty text."""
    assert load(text) == load(RTE) == RTE_LOADED
    rows = load("sentence\nlow\n\nslow\n\n", "sst2", "test")
    assert [text for text, _ in rows] == ["<s>low</s>", "<s></s>", "<s>slow</s>", "<s></s>"]


@pytest.mark.parametrize("odd", "\x85 \u2028 \u2029 \x0b \x0c \x1c \r \" '".split(" "))
def test_only_newline_ends_a_row(odd, load):
    """Characters at which str.splitlines or a CSV reader would cut stay inside the text."""
    assert load(f"sentence\tlabel\na{odd}b\t1\n", "sst2") == [(f"<s>a{odd}b</s>", 1)]


MALFORMED = [  # task, file, line, parts of the message
    ("rte", RTE + "2\tx\tentailment\n", 4, "3 columns", "expected 4"),
    ("rte", RTE + "\n2\tx\ty\tentailment\n", 4, "1 columns", "expected 4"),
    ("rte", RTE.replace("\t", ","), 1, "tabs", "sentence1"),
    ("cola", "gj04,1,,A cat.\n", 1, "1 columns", "tabs"),
    ("rte", RTE.replace("not_", "Not"), 3, "'Notentailment'", "'not_entailment'"),
    ("rte", RTE.replace("not_entailment", "x" * 9000), 3, "expected"),
    ("rte", "index\tsentence1\tsentence2\n0\ta\tb\n", 1, "0 columns 'label'"),
    ("rte", RTE.replace("index", "label"), 1, "2 columns 'label'"),
    ("rte", RTE.split("\n")[0] + "\n", None, "no rows"),
    ("rte", "", None, "empty"),
    ("cola", "\ufeff\r\n\n", None, "empty"),
    ("rte", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None, "git lfs pull"),
    ("rte", RTE + "2\tx\0\ty\tentailment\n", 4, "0x00"),
    ("rte", (RTE + "2\tcaf\xe9\ty\tentailment\n").encode("latin-1"), 4, "0xe9", "UTF-8"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\tgood\n", 2, "'good'", "0 to 5"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.001\n", 2, "'5.001'", "0 to 5"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\t-0.1\n", 2, "'-0.1'", "0 to 5"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", 2, "'nan'", "0 to 5"),
]


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files(case, load, tmp_path):
    """Each malformed file is refused by one line that names the file, the line and the value."""
    name, text, line, *says = case
    message = refused(*says, use=lambda: load(text, name))
    path = tmp_path / TASKS[name].folder / "train.tsv"
    assert message.startswith(f"{path} line {line}: " if line else f"{path}: ")


@pytest.mark.parametrize("index", ["2", ""])
def test_a_test_file_whose_rows_are_not_in_their_places(index, load):
    """A submission names the rows 0, 1, ...: a test file with another order in its index, or with a
    spreadsheet's empty rows, is refused. One without an index is taken as it is."""
    text = f"index\tsentence1\tsentence2\n0\ta\tb\n{index}\tc\td\n"
    refused("index", "line 3", f"'{index}'", "expected 1", use=lambda: load(text, "rte", "test"))
    assert len(load(text.replace("index", "id"), "rte", "test")) == 2


def test_missing_files(tmp_path, toy):
    """No file, split or folder: the message names what there is, and the one flag that helps."""
    message = refused("RTE/train.tsv", "--data-dir", "RTE/",
                      use=lambda: data.load_task("rte", tmp_path, "train", toy, 128))
    assert "--model-dir" not in message
    message = refused(f"{tmp_path}", "merges.txt", "tokenizer.json", "--model-dir",
                      use=lambda: BPE(tmp_path))
    assert "--data-dir" not in message
    refused("nowhere", "--model-dir", use=lambda: BPE(tmp_path / "nowhere"))
    refused("ax", "'train'", "test", use=lambda: data.find_task("ax", "train"))


def test_names_of_tasks():
    """Tasks are found however people write them; an unknown one is named beside all that exist."""
    spelled = {"MRPC": "mrpc", "sst-2": "sst2", "STS-B": "stsb", "toy_pretrain": "toy-pretrain"}
    for word, name in spelled.items():
        assert data.find_task(word) is data.find_task(name) is TASKS[name]
    refused("'boolq'", *TASKS, use=lambda: data.find_task("boolq"))


def test_known_bad_rows_are_counted(load, capsys):
    """QQP: up to 100 malformed train or dev rows are left out and reported in one line; one more,
    or any in a test file (whose rows must keep their places), is an error."""
    header, good = "id\tquestion1\tquestion2\tis_duplicate\n", "1\ta\tb\t0\n"
    assert len(load(header + good + "2\ta\n3\ta\tb\t7\n" + good, "qqp")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "left out 2 malformed rows" in err and "line 3: 2 columns" in err
    many = header + good + "2\ta\n" * 101
    refused("line 3: 2 columns, expected 4", use=lambda: load(many, "qqp"))
    test = "id\tquestion1\tquestion2\n0\ta\tb\n1\ta\n"
    refused("line 3: 2 columns, expected 3", use=lambda: load(test, "qqp", "test"))


GOOD_ROW = dict(name="mine", folder="m", texts=("review",), label="stars", metrics=("accuracy",))


def test_a_task_of_your_own(load, monkeypatch):
    """One more row of TASKS loads your own TSV files, with two labels or with real numbers; two
    test files make two submission files. A metric that is not in METRICS is named at once."""
    files = {**data.SPLITS, "dev_b": "b.tsv"}
    mine = Task("mine", "my_folder", ("review",), "stars", ("own",),
                labels=("bad", "good"), files=files)
    real = Task("real", "my_reals", ("a", "b"), "mark", ("pearson",), labels=(), top=10)
    monkeypatch.setitem(TASKS, "mine", mine)
    monkeypatch.setitem(TASKS, "real", real)
    text = "stars\treview\ngood\tI liked it\nbad\tMeh\n"
    refused("'mine'", "'own'", "matthews", use=lambda: load(text, "mine", "dev_b"))
    monkeypatch.setitem(data.METRICS, "own", data.accuracy)
    assert load(text, "mine", "dev_b") == [("<s>I liked it</s>", 1), ("<s>Meh</s>", 0)]
    assert load("mark\ta\tb\n7.5\tx\ty\n", "real") == [("<s>x</s></s>y</s>", 0.75)]
    assert mine.submission("test") == "my_folder"
    assert mine.submission("test_b") == "my_folder-b"


@pytest.mark.parametrize("changes, says", [
    (dict(metrics="f1"), "metrics = 'f1'"),
    (dict(texts="review"), "texts = 'review'"),
    (dict(labels=(0, 1)), "labels = (0, 1)"),
    (dict(labels=("bad", "bad")), "('bad', 'bad')"),
    (dict(texts=(*"abc",)), "('a', 'b', 'c')"),
    (dict(columns=("review", "star")), "'stars'"),
    (dict(metrics=("matthews",), labels=(*"abc",)), "matthews"),
    (dict(labels=()), "('accuracy',)"),
    (dict(files={"train": "train.tsv", "valid": "v.tsv"}), "'dev'")])
def test_a_task_checks_itself(changes, says):
    """A row that cannot work is refused when it is made, in one line that names it."""
    refused("'mine'", says, use=lambda: Task(**{**GOOD_ROW, **changes}))


def test_recorded_pieces():
    """Pieces of 30 texts against those that the tokenizers library gave (fixtures/record.py)."""
    for row in recorded("bpe")["texts"]:
        assert BPE.pieces(row["text"]) == row["pieces"]


@needs_model
def test_recorded_ids(roberta):
    """Ids of the same texts against the library's, and decode gives the text back."""
    for row in recorded("bpe")["texts"]:
        assert roberta.encode(row["text"]) == row["ids"]
        assert roberta.decode(row["ids"]) == row["text"]


def test_recorded_truncation():
    """How much of two texts of n and m tokens is kept, against the library's longest_first."""
    a, b = "abcdefghij", "ABCDEFGHIJKL"
    for room, n, m, kept_a, kept_b in sum(recorded("bpe")["cuts"], []):
        expected = [0, *a[:kept_a], 2, 2, *b[:kept_b], 2]
        assert data.join_ids([a[:n], b[:m]], room + 4) == expected


def cut(max_len, *texts):
    """join_ids, where each digit is an id."""
    ids = [[int(digit) for digit in text] for text in texts]
    return "".join(map(str, data.join_ids(ids, max_len)))


def test_truncation_by_hand():
    """Input formats and cuts against hand-worked ids; <s> is 0, </s> is 2."""
    assert cut(5, "789") == "0" "789" "2"
    assert cut(4, "789") == "0" "78" "2"
    assert cut(8, "7", "89") == "0" "7" "22" "89" "2"
    assert cut(6, "7", "89") == "0" "7" "22" "8" "2"
    assert cut(7, "77", "88") == "0" "7" "22" "88" "2"   # the odd place is b's
    assert cut(7, "777", "88") == "0" "77" "22" "8" "2"  # or the longer text's
    assert cut(5, "", "") == "0" "22" "2"


SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def test_every_character_is_of_its_class():
    """ascii_like of every code point beyond ASCII against Unicode's categories and White_Space."""
    kinds = {"L": "z", "N": "0"}
    for char in map(chr, range(128, sys.maxunicode + 1)):
        expected = kinds.get(unicodedata.category(char)[0], "!")
        expected = "\n" if char in SPACES else expected
        assert data.ascii_like.__wrapped__(char) == expected, hex(ord(char))


def test_pieces_make_the_text():
    """Pieces of random texts against a naive pattern whose sets of characters are spelled out."""
    sets = {"L": "", "N": ""}
    for char in map(chr, range(0x3000)):
        kind = unicodedata.category(char)[0]
        if kind in sets:
            sets[kind] += char
    letters, numbers, space = sets["L"], sets["N"], "\t\n\x0b\x0c\r " + SPACES
    naive = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+|"
                       f" ?[^{space}{letters}{numbers}]+|[{space}]+(?![^{space}])|[{space}]+")
    rng = random.Random(0)
    atoms = [*"aZéßʰ7²Ⅷ٣ \t\x1f\x85\u2003'’-\u200b\u0301_", "  ", "'s", "'re"]
    for _ in range(3000):
        text = "".join(rng.choices(atoms, k=rng.randint(0, 10)))
        assert "".join(BPE.pieces(text)) == text
        assert BPE.pieces(text) == naive.findall(text)


def naive_tokens(piece, merges):
    """Apply the merges one after the other, in the order of the file."""
    symbols = [data.BYTE_CHARS[byte] for byte in piece.encode()]
    for left, right in merges:
        i = 0
        while i < len(symbols) - 1:
            if (symbols[i], symbols[i + 1]) == (left, right):
                symbols[i:i + 2] = [left + right]
            i += 1
    return symbols


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@needs_model
def test_merges_in_the_order_of_the_file(roberta, monkeypatch):
    """Tokens of words, real and random, against all 50,000 merges applied one after the other. A
    word of 16,000 letters takes linear time: at most two pushes onto the heap per letter."""
    rng = random.Random(0)
    words = ["Ġrunning", "antidisestablishment", "日本", "zzzzzzz", "\n\n\n\n"]
    for letters in ("etaoins", LETTERS, "ab"):
        words.append("".join(rng.choices(letters, k=40)))
    for word in words:
        assert roberta.merged(word) == naive_tokens(word, roberta.ranks)

    pushes, push = [], data.heapq.heappush

    def counted(*args):
        pushes.append(1)
        push(*args)

    monkeypatch.setattr(data.heapq, "heappush", counted)
    word = "".join(rng.choices(LETTERS, k=16_000))
    assert "".join(roberta.merged(word)) == word
    assert 1000 < len(pushes) < 2 * len(word)


def test_encode_row_cuts_as_join_ids_does(toy):
    """For pairs and single texts of all lengths around the limit, and far beyond it, ids of
    texts that were encoded in part equal the cut of all their ids."""
    for max_len in range(5, 14):
        lengths = [*range(max_len + 3), 40, 41]
        pairs = [["q" * n, "xy" * m] for n in lengths for m in lengths]
        for texts in [*pairs, *(["q" * n] for n in lengths)]:
            ids = [toy.encode(text) for text in texts]
            assert data.encode_row(toy, texts, max_len) == data.join_ids(ids, max_len), texts


def test_train_bpe_by_hand(toy_folder, toy):
    """Merges of a small text against counts of pairs by hand; ties go by alphabet."""
    merges = (toy_folder / "merges.txt").read_text().split("\n")
    # after "lo" and "low": Ġ+low 3 times (two "low" and "lower" after a space); then e+s, s+t, ...
    # (in " newest", "newest": twice each): e+s comes before e+w, n+e, s+t, w+e and Ġ+n
    assert merges == ["#version: 0.2", "l o", "lo w", "Ġ low", "e s", ""]
    vocab = json.loads((toy_folder / "vocab.json").read_text())
    assert [*vocab.values()] == [*range(4 + 256 + 4 + 1)]
    tokens = [*vocab]
    assert " ".join(tokens[:5]) == "<s> <pad> </s> <unk> !"
    assert " ".join(tokens[-5:]) == "lo low Ġlow es <mask>"
    assert " ".join(toy.tokens[i] for i in toy.encode("low slow lowest")) == "low Ġ s low Ġlow es t"


DAMAGED = [  # file, text of the good file -> text, part of the message
    ("vocab.json", lambda s: s[:len(s) // 2], "not valid JSON"),
    ("vocab.json", lambda s: "[1, 2]", "JSON object"),
    ("vocab.json", lambda s: s.replace(": 7,", ': "7",'), "damaged"),
    ("vocab.json", lambda s: s.replace(": 8,", ": 7,"), "once"),
    ("vocab.json", lambda s: s.replace('"<pad>": 1, "</s>": 2', '"<pad>": 2, "</s>": 1'), "<pad>"),
    ("merges.txt", lambda s: s.removesuffix(" s\n"), "'es'"),
    ("merges.txt", lambda s: s + "q u\n", "'qu'"),
    ("merges.txt", lambda s: s.replace("l o\n", "l o\nl o w\n"), "'l', 'o', 'w'"),
    ("merges.txt", lambda s: "#version: 0.2\n", "no merge"),
]


@pytest.fixture
def copied(toy_folder, tmp_path):
    """A copy of the small tokenizer that a test may change."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((toy_folder / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name, change, says", DAMAGED)
def test_damaged_vocab_and_merges(name, change, says, copied):
    """Files that were cut short, damaged or taken from another model: one line names the file."""
    path = copied / name
    path.write_text(change(path.read_text()))
    refused(f"{copied}", says, use=lambda: BPE(copied))


@pytest.mark.parametrize("name, change", [
    ("merges.txt", lambda s: s.replace("\n", "\r\n")),
    ("merges.txt", lambda s: s.rstrip("\n")),
    ("merges.txt", lambda s: s + "\n"),
    ("merges.txt", lambda s: s.split("\n", 1)[1]),
    ("vocab.json", lambda s: "\ufeff" + s.replace('": ', '"  :\t'))])
def test_good_variants_of_vocab_and_merges(name, change, copied, toy):
    """CRLF, other ends of the file, no version line, spaces, a byte order mark: the same."""
    path = copied / name
    path.write_bytes(change(path.read_text()).encode())
    assert BPE(copied).ranks == toy.ranks


def tokenizer_json(toy_folder, as_text=False, **changes):
    """What transformers 5 saves instead of the two files; changes by dotted name, with __."""
    merges = (toy_folder / "merges.txt").read_text().splitlines()[1:]
    if not as_text:
        merges = [line.split(" ") for line in merges]
    vocab = json.loads((toy_folder / "vocab.json").read_text())
    content = {
        "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 264, "content": "<mask>"}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content[outer[0]] if outer else content
        place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize("as_text", [False, True])
def test_tokenizer_json(as_text, toy_folder, toy, tmp_path):
    """tokenizer.json alone gives the same tokenizer as the two older files."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(toy_folder, as_text))
    found = BPE(tmp_path)
    assert found.vocab == toy.vocab and found.ranks == toy.ranks


@pytest.mark.parametrize("changes, says", [
    (dict(model__type="WordPiece"), "'WordPiece'"),
    (dict(normalizer={"type": "Lowercase"}), "normalizer"),
    (dict(pre_tokenizer=None), "'pre_tokenizer': None"),
    (dict(pre_tokenizer__add_prefix_space=True), "'add_prefix_space': True"),
    (dict(added_tokens=[{"id": 265, "content": "[USER]"}]), "'[USER]'"),
    (dict(model__vocab=[["a", 0.5]]), "damaged"),
    (dict(model__merges=[]), "no merge")])
def test_tokenizers_of_other_kinds(changes, says, toy_folder, tmp_path):
    """A tokenizer.json that would give other ids, or is damaged: one line with the reason."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(toy_folder, **changes))
    refused(f"{tmp_path}", says, use=lambda: BPE(tmp_path))


@pytest.mark.parametrize("file, bad, says, good", [
    ("tokenizer_config.json", '{"add_prefix_space": true}', "add_prefix_space",
     '{"add_prefix_space": false}'),
    ("added_tokens.json", '{"[USER]": 265}', "'[USER]'", '{"<mask>": 264}')])
def test_files_beside_the_tokenizer(file, bad, says, good, copied, toy):
    """Settings that would give other ids than ours are refused; RoBERTa's own are taken."""
    (copied / file).write_text(bad)
    refused(f"{copied}", says, use=lambda: BPE(copied))
    (copied / file).write_text(good)
    assert BPE(copied).ranks == toy.ranks


def some_examples(n=203, regression=False):
    """n examples of 2 to 42 tokens with labels 0, 1, 2 or real numbers."""
    rng = random.Random(0)
    examples = []
    for i in range(n):
        text = rng.choices(range(4, 100), k=rng.randint(0, 40))
        label = rng.random() if regression else i % 3
        examples.append(Example([0, *text, 2], label))
    return examples


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("n", [203, 5, 64])
def test_each_example_once(n, seed):
    """Rows of all batches against the list: each once, in its place, padded with 1."""
    examples, seen = some_examples(n), []
    for batch in data.batches(examples, 16, seed, 0):
        assert {tensor.dtype for tensor in batch} == {torch.int64, torch.bool}
        assert batch.mask.sum(1).max() == batch.ids.shape[1]
        for ids, mask, label, row in zip(*batch):
            assert (ids[mask].tolist(), label) == examples[row]
            assert (ids[~mask] == 1).all()
        seen.append(batch.rows.tolist())
    assert sorted(sum(seen, [])) == [*range(n)]
    smallest, *others = sorted(map(len, seen))
    assert smallest <= 16 and {*others} <= {16}


def rows_of(examples, seed, epoch):
    """The rows of each batch of an epoch."""
    return [batch.rows.tolist() for batch in data.batches(examples, 16, seed, epoch)]


def test_order_is_a_function_of_seed_and_epoch():
    """Equal (seed, epoch) give equal batches, others differ; seed None goes from long to short."""
    examples = some_examples()
    first = rows_of(examples, 7, 2)
    np.random.seed(0)
    torch.manual_seed(3)
    assert rows_of(examples, 7, 2) == first
    for seed, epoch in ((7, 3), (8, 2), (2, 7)):
        assert rows_of(examples, seed, epoch) != first
    rows = sum(rows_of(examples, None, 0), [])
    lengths = [len(examples[row].ids) for row in rows]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("regression", [False, True])
def test_split_and_ranks(regression, world):
    """Part r of each batch against the batches that rank r of a world makes of the rows r, r + n,
    ...; the last batch has two rows, so that the parts beyond them are empty, (0, 1)."""
    examples = some_examples(50, regression)
    whole = [*data.batches(examples, 16, 1, 0)]
    for rank in range(world):
        parts = [batch.split(world)[rank] for batch in whole]
        same(parts, [*data.batches(examples, 16, 1, 0, 0, rank, world)])
        rows = [part.rows.tolist() for part in parts]
        assert rows == [batch.rows[rank::world].tolist() for batch in whole]
        assert parts[0].labels.dtype == (torch.float32 if regression else torch.int64)


def test_padding():
    """Less than 5 % is padding, and hardly a batch of one epoch stays together in the next."""
    examples = some_examples(20_000)
    masks = [batch.mask for batch in data.batches(examples, 16, 1, 0)]
    tokens = sum(mask.sum().item() for mask in masks)
    assert tokens > 0.95 * sum(mask.numel() for mask in masks)
    group, together = {}, 0
    for i, rows in enumerate(rows_of(examples, 1, 1)):
        group |= dict.fromkeys(rows, i)
    for rows in rows_of(examples, 1, 0):
        ((_, largest),) = Counter(group[row] for row in rows).most_common(1)
        together += largest > 8
    assert together < 0.05 * len(masks)


def test_metrics_by_hand():
    """Each metric against a number worked out by hand."""
    p = [1, 1, 0, 1, 0]
    y = [1, 0, 0, 1, 1]  # TP 2, FP 1, FN 1, TN 1
    assert data.accuracy(p, y) == 3 / 5
    assert data.f1(p, y) == 4 / (4 + 1 + 1)
    assert data.matthews(p, y) == pytest.approx(1 / 6)  # (2 * 1 - 1 * 1) / √(3 * 3 * 2 * 2)

    y = [1, 3, 2, 4]
    assert data.pearson([1, 2, 3], y[:3]) == pytest.approx(0.5)
    assert data.pearson([0.1, 1.1], [0.1 * 3, 1.1 * 3]) == 1  # rounding would give more
    # ranks 1, 2.5, 2.5, 4: squares about the mean 4.5 and 5, products 4.5
    rho = 4.5 / math.sqrt(4.5 * 5)
    assert data.spearman([10, 20, 20, 90], y) == pytest.approx(rho)


def test_recorded_metrics():
    """Metrics of random vectors, ties included, against those that scikit-learn and scipy gave."""
    rows = recorded("metrics")
    for row in rows["classes"] + rows["reals"]:
        predictions, labels = row.pop("predictions"), row.pop("labels")
        for name, value in row.items():
            found = data.METRICS[name](predictions, labels)
            assert found == pytest.approx(value, abs=1e-12), name


def test_constant_predictions_score_nothing():
    """Predictions or labels all equal: 0, not NaN, even where the mean rounds."""
    y = [0, 1, 1, 0, 1, 1, 0]
    cases = [(data.matthews, 0), (data.matthews, 1)]
    for constant in (0.1, -7, 0.3):
        cases += [(data.pearson, constant), (data.spearman, constant)]
    for metric, constant in cases:
        assert metric([constant] * 7, y) == 0
        assert metric(y, [constant] * 7) == 0
    none = [0] * 7
    assert data.f1(none, none) == data.f1(none, y) == 0


@pytest.mark.parametrize("metric", data.METRICS.values())
def test_metrics_take_two_vectors(metric):
    """Shapes that would broadcast silently, empty vectors and entries that are not numbers, such as
    the labels of a test file, are refused; tensors are taken; NaN gives NaN."""
    good = [1, 0]
    columns, words, missing = [[1], [0]], ["1", "0"], [None, None]
    for wrong in (columns, words, missing, [1]):
        with pytest.raises(ValueError, match="two vectors"):
            metric(wrong, good)
    with pytest.raises(ValueError, match="two vectors"):
        metric([], [])
    tensor = torch.tensor(good)
    assert type(metric(tensor, tensor)) is float  # a checkpoint cannot hold numpy's
    assert math.isnan(metric([*good, math.nan], [1, 0, 1]))
    with pytest.raises(ValueError, match="two classes"):
        data.matthews([0, 2], good)


SUBMISSIONS = """
    cola  test     CoLA.tsv     0,1           0,1
    sst2  test     SST-2.tsv    1,1           1,1
    mrpc  test     MRPC.tsv     1,0           1,0
    qqp   test     QQP.tsv      1,0           1,0
    stsb  test     STS-B.tsv    0.5,-0.1,1.2  2.50000,0.00000,5.00000
    mnli  test     MNLI-m.tsv   0,1,2         entailment,neutral,contradiction
    mnli  test_mm  MNLI-mm.tsv  2             contradiction
    qnli  test     QNLI.tsv     0,1           entailment,not_entailment
    rte   test     RTE.tsv      1             not_entailment
    wnli  test     WNLI.tsv     0             0
    ax    test     AX.tsv       2,0           contradiction,entailment
"""


@pytest.mark.parametrize("row", table(SUBMISSIONS))
def test_submission(row, tmp_path):
    """Name and every byte of each task's file against gluebenchmark.com's format."""
    name, split, file, predictions, cells = row
    values = np.array(json.loads(f"[{predictions}]"))
    path = data.write_submission(TASKS[name], split, values, tmp_path / "new")
    assert path == tmp_path / "new" / file
    lines = ["index\tprediction"]
    lines += [f"{i}\t{cell}" for i, cell in enumerate(cells.split(","))]
    assert path.read_bytes() == "".join(f"{line}\n" for line in lines).encode()
