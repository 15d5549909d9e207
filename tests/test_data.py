"""data.py: TSV files, byte-level BPE, batches, metrics, submissions, and the file itself."""
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import BPE, TASKS, DataError, Example, Task

ROOT = Path(__file__).parents[1]
GLUE = ROOT / "../shared/data/glue"
MODEL = ROOT / "../shared/models/minilm-l6-roberta"
RECORDED = Path(__file__).parent / "fixtures"
needs_glue = pytest.mark.skipif(not GLUE.exists(), reason="needs ../shared/data/glue")
needs_model = pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared/models")


@pytest.fixture(scope="module")
def roberta():
    return BPE(MODEL)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """A small vocabulary: 4 + 256 + 4 merges + 1 tokens."""
    folder = tmp_path_factory.mktemp("toy")
    data.train_bpe(["low low low lower newest newest"], 4, folder)
    return folder


@pytest.fixture(scope="module")
def toy(toy_folder):
    return BPE(toy_folder)


def refused(*says, use):
    """The message with which something is refused: one line that has all of these parts."""
    with pytest.raises(DataError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert [part for part in says if part not in message] == [], message
    return message


# ---- TSV files ---------------------------------------------------------------------------------

# As in shared/glue.md, but for MRPC's train file: the copy in ../shared has 3,667 rows. It lacks
# the pair 2750203, 2750153 of Microsoft's file; download_task builds all 3,668.
ROWS = {"cola": (8551, 1043, 1063), "sst2": (67349, 872, 1821), "mrpc": (3667, 408, 1725),
        "stsb": (5749, 1500, 1379), "qnli": (None, 5463, 5463), "rte": (2490, 277, 3000),
        "wnli": (635, 71, 146)}


class NoTokens:
    """A tokenizer that costs nothing: the ids of a text are its length."""
    def encode(self, text, limit=None):
        return [len(text)]


@needs_glue
@pytest.mark.parametrize("name", ROWS)
def test_row_counts(name):
    """Rows of every file in ../shared against GLUE's published counts; labels in range."""
    for split, rows in zip(("train", "dev", "test"), ROWS[name]):
        if rows is None:
            continue
        examples = data.load_task(name, GLUE, split, NoTokens(), 128)
        assert len(examples) == rows
        labels = {example.label for example in examples}
        if split == "test":
            assert labels == {None}
        elif name == "stsb":
            assert min(labels) == 0 and max(labels) == 1
        else:
            assert labels == {0, 1}


def put(folder, text, name="rte", file="train.tsv"):
    """Write text (or bytes) as a file of a task in the folder."""
    path = Path(folder) / TASKS[name].folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


RTE = "index\tsentence1\tsentence2\tlabel\n0\tA \"b\tc\" d\tentailment\n1\te\tf\tnot_entailment\n"


@pytest.mark.parametrize("text", [
    RTE, RTE.rstrip("\n"), RTE.replace("\n", "\r\n"), "\ufeff" + RTE, "\ufeff" + RTE.rstrip("\n"),
    "label\tsentence2\tsentence1\nentailment\tc\" d\tA \"b\nnot_entailment\tf\te\n"])
def test_tolerated_forms(text, tmp_path, toy):
    """CRLF, byte order mark, missing final newline, other order of columns: the same examples."""
    put(tmp_path, text, "rte")
    expected = [Example([0, *toy.encode('A "b'), 2, 2, *toy.encode('c" d'), 2], 0),
                Example([0, *toy.encode("e"), 2, 2, *toy.encode("f"), 2], 1)]
    assert data.load_task("rte", tmp_path, "train", toy, 128) == expected


@pytest.mark.parametrize("odd", [
    "\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\r", "\"", "'"])
def test_only_newline_ends_a_row(odd, tmp_path, toy):
    """Characters at which str.splitlines or a CSV reader would cut stay inside the text."""
    put(tmp_path, f"sentence\tlabel\na{odd}b\t1\n", "sst2")
    (example,) = data.load_task("sst2", tmp_path, "train", toy, 128)
    assert toy.decode(example.ids[1:-1]) == f"a{odd}b"


MALFORMED = [  # (task, file, line, parts of the message)
    ("rte", RTE + "2\tx\tentailment\n", 4, "3 columns", "expected 4"),
    ("rte", RTE + "\n2\tx\ty\tentailment\n", 4, "1 columns", "expected 4"),
    ("rte", RTE.replace("\t", ","), 1, "tabs", "sentence1"),
    ("cola", "gj04,1,,A cat.\n", 1, "1 columns", "tabs"),
    ("rte", RTE.replace("not_", "Not"), 3, "'Notentailment'", "'not_entailment'"),
    ("rte", RTE.replace("not_entailment", ""), 3, "''"),
    ("rte", RTE.replace("not_entailment", "x" * 9000), 3, "expected"),
    ("rte", "0\ta\tb\tentailment\n", 1, "0 columns 'sentence1'"),
    ("rte", "index\tsentence1\tsentence2\n0\ta\tb\n", 1, "0 columns 'label'"),
    ("rte", RTE.replace("index", "label"), 1, "2 columns 'label'"),
    ("rte", RTE.split("\n")[0] + "\n", None, "no rows"),
    ("rte", "", None, "empty"), ("cola", "\ufeff\r\n\n", None, "empty"),
    ("rte", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None, "git lfs pull"),
    ("rte", RTE + "2\tx\0\ty\tentailment\n", 4, "0x00"),
    ("rte", (RTE + "2\tcaf\xe9\ty\tentailment\n").encode("latin-1"), 4, "0xe9", "UTF-8"),
    ("rte", RTE.encode("utf-16"), 1, "0xff", "UTF-8"),
    *(("stsb", f"sentence1\tsentence2\tscore\na\tb\t{value}\n", 2, f"'{value}'", "0 to 5")
      for value in ("good", "5.001", "-0.1", "nan")),
]


@pytest.mark.parametrize("name, text, line, says", [(*row[:3], row[3:]) for row in MALFORMED])
def test_malformed_files(name, text, line, says, tmp_path, toy):
    """Each malformed file is refused by one line that names the file, the line and the value."""
    path = put(tmp_path, text, name)
    message = refused(*says, use=lambda: data.load_task(name, tmp_path, "train", toy, 128))
    assert message.startswith(f"{path} line {line}: " if line else f"{path}: ")


@pytest.mark.parametrize("index", ["2", ""])
def test_a_test_file_whose_rows_are_not_in_their_places(index, tmp_path, toy):
    """A submission names the rows 0, 1, ...: a test file with another order in its index, or with a
    spreadsheet's empty rows, is refused. One without an index is taken as it is."""
    text = f"index\tsentence1\tsentence2\n0\ta\tb\n{index}\tc\td\n"
    put(tmp_path, text, file="test.tsv")
    refused("index", "line 3", f"'{index}'", "expected 1",
            use=lambda: data.load_task("rte", tmp_path, "test", toy, 128))
    put(tmp_path, text.replace("index", "id"), file="test.tsv")
    assert len(data.load_task("rte", tmp_path, "test", toy, 128)) == 2


def test_missing_files(tmp_path, toy):
    """No file, no such folder, no such split: the message names what there is, and the flag that
    helps alone."""
    for says, use in (
            (("RTE/train.tsv", "--data-dir", "RTE/"),
             lambda: data.load_task("rte", tmp_path, "train", toy, 128)),
            (("ax", "'train'", "test"), lambda: data.load_task("ax", tmp_path, "train", toy, 128)),
            ((str(tmp_path), "merges.txt", "tokenizer.json", "--model-dir"), lambda: BPE(tmp_path)),
            (("nowhere", "--model-dir"), lambda: BPE(tmp_path / "nowhere"))):
        message = refused(*says, use=use)
        assert not {"--data-dir", "--model-dir"} <= {*re.findall(r"--[\w-]+", message)}


def test_names_of_tasks():
    """Tasks are found however people write them; an unknown one is named beside all that exist."""
    for name, found in (("MRPC", "mrpc"), ("sst-2", "sst2"), ("SST2", "sst2"), ("STS-B", "stsb"),
                        ("toy_pretrain", "toy-pretrain"), *((name, name) for name in TASKS)):
        assert data.find_task(name) is TASKS[found]
    refused("'boolq'", *TASKS, use=lambda: data.find_task("boolq"))


@pytest.mark.parametrize("blank", ["\n", "\r\n\r\n"])
def test_blank_lines(blank, tmp_path, toy):
    """Blank lines at the end change nothing; in a file of one column each is a row with an empty
    text."""
    put(tmp_path, RTE)
    expected = data.load_task("rte", tmp_path, "train", toy, 128)
    put(tmp_path, RTE + blank)
    assert data.load_task("rte", tmp_path, "train", toy, 128) == expected
    put(tmp_path, "sentence\nlow\n" + blank + "slow\n", "sst2", "test.tsv")
    assert data.load_task("sst2", tmp_path, "test", toy, 128) == [
        Example([0, *toy.encode(text), 2], None)
        for text in ("low", *[""] * blank.count("\n"), "slow")]


def test_known_bad_rows_are_counted(tmp_path, toy, capsys):
    """QQP: up to 100 malformed train or dev rows are left out and reported in one line; one more,
    or any in a test file (whose rows must keep their places), is an error."""
    header, good = "id\tquestion1\tquestion2\tis_duplicate\n", "1\ta\tb\t0\n"
    bad = "2\ta\n3\ta\tb\t7\n"
    put(tmp_path, header + good + bad + good, "qqp")
    assert len(data.load_task("qqp", tmp_path, "train", toy, 128)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "left out 2 malformed rows" in err and "line 3: 2 columns" in err
    put(tmp_path, header + good + "2\ta\n" * 101, "qqp")
    with pytest.raises(DataError, match="line 3: 2 columns, expected 4"):
        data.load_task("qqp", tmp_path, "train", toy, 128)
    (tmp_path / "QQP/test.tsv").write_text("id\tquestion1\tquestion2\n0\ta\tb\n1\ta\n")
    with pytest.raises(DataError, match="line 3: 2 columns, expected 3"):
        data.load_task("qqp", tmp_path, "test", toy, 128)


def test_a_task_of_your_own(tmp_path, toy, monkeypatch):
    """One more row of TASKS loads your own TSV files, with two labels or with real numbers; two
    test files make two submission files."""
    monkeypatch.setitem(TASKS, "mine", Task(
        "mine", "my_folder", ("review",), "stars", ("accuracy",), ("bad", "good"),
        files={**data.SPLITS, "dev_b": "b.tsv"}))
    monkeypatch.setitem(TASKS, "real", Task(
        "real", "my_reals", ("a", "b"), "mark", ("pearson",), (), top=10))
    put(tmp_path, "stars\treview\ngood\tI liked it\nbad\tMeh\n", "mine", "b.tsv")
    examples = data.load_task("mine", tmp_path, "dev_b", toy, 128)
    assert [example.label for example in examples] == [1, 0]
    assert toy.decode(examples[1].ids[1:-1]) == "Meh"
    put(tmp_path, "mark\ta\tb\n7.5\tx\ty\n", "real")
    assert data.load_task("real", tmp_path, "train", toy, 128)[0].label == 0.75
    assert [TASKS["mine"].submission(split) for split in ("test", "test_b")] == [
        "my_folder", "my_folder-b"]


GOOD_ROW = dict(name="mine", folder="m", texts=("review",), label="stars", metrics=("accuracy",))


@pytest.mark.parametrize("changes, says", [
    (dict(metrics=("f1")), "metrics = 'f1'"), (dict(texts=("review")), "texts = 'review'"),
    (dict(labels=(0, 1)), "labels = (0, 1)"), (dict(labels=("bad", "bad")), "('bad', 'bad')"),
    (dict(labels=("bad",)), "('bad',)"), (dict(texts=("a", "b", "c")), "('a', 'b', 'c')"),
    (dict(columns=("review", "star")), "'stars'"),
    (dict(metrics=("matthews",), labels=("a", "b", "c")), "matthews"),
    (dict(labels=()), "('accuracy',)"),
    (dict(files={"train": "train.tsv", "valid": "v.tsv"}), "'dev'")])
def test_a_task_checks_itself(changes, says):
    """A row that cannot work is refused when it is made, in one line that names it."""
    refused("'mine'", says, use=lambda: Task(**{**GOOD_ROW, **changes}))


def test_an_unknown_metric(monkeypatch):
    """A metric that does not exist is named when the task is looked up, before a file is read. A
    metric of your own is one more row of METRICS."""
    monkeypatch.setitem(TASKS, "mine", Task(**{**GOOD_ROW, "metrics": ("accuracy", "acuracy")}))
    refused("'mine'", "'acuracy'", "matthews", use=lambda: data.find_task("mine"))
    monkeypatch.setitem(data.METRICS, "acuracy", data.accuracy)
    assert data.find_task("mine", "dev").num_labels == 2


# ---- BPE ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded():
    return json.loads((RECORDED / "bpe.json").read_text())


def test_recorded_pieces(recorded):
    """Pieces of 30 texts against those that the tokenizers library gave (fixtures/record.py)."""
    for row in recorded["texts"]:
        assert BPE.pieces(row["text"]) == row["pieces"]


@needs_model
def test_recorded_ids(recorded, roberta):
    """Ids of the same texts against the library's, and decode gives the text back."""
    for row in recorded["texts"]:
        assert roberta.encode(row["text"]) == row["ids"]
        assert roberta.decode(row["ids"]) == row["text"]


def test_recorded_truncation(recorded):
    """How much of two texts of n and m tokens is kept, against the library's longest_first."""
    for room, n, m, a, b in [row for line in recorded["cuts"] for row in line]:
        expected = [0, *range(10, 10 + a), 2, 2, *range(50, 50 + b), 2]
        assert data.join_ids([[*range(10, 10 + n)], [*range(50, 50 + m)]], room + 4) == expected


def test_truncation_by_hand():
    """Input formats and cuts against hand-worked lists."""
    assert data.join_ids([[7, 8, 9]], 5) == [0, 7, 8, 9, 2]
    assert data.join_ids([[7, 8, 9]], 4) == [0, 7, 8, 2]
    assert data.join_ids([[7], [8, 9]], 8) == [0, 7, 2, 2, 8, 9, 2]
    assert data.join_ids([[7], [8, 9]], 6) == [0, 7, 2, 2, 8, 2]
    assert data.join_ids([[7, 7], [8, 8]], 7) == [0, 7, 2, 2, 8, 8, 2]        # the odd place is b's
    assert data.join_ids([[7, 7, 7], [8, 8]], 7) == [0, 7, 7, 2, 2, 8, 2]     # or the longer text's
    assert data.join_ids([[], []], 5) == [0, 2, 2, 2]


def test_every_character_is_of_its_class():
    """ascii_like of every code point beyond ASCII against Unicode's categories and White_Space."""
    spaces = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
    expected = {"L": "z", "N": "0"}
    for code in range(128, sys.maxunicode + 1):
        kind = "\n" if code in spaces else expected.get(unicodedata.category(chr(code))[0], "!")
        assert data.ascii_like.__wrapped__(chr(code)) == kind, hex(code)


def test_pieces_make_the_text():
    """For random texts, pieces concatenate to the text and equal a naive reading of the pattern,
    with character sets that are spelled out."""
    letters = "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c)[0] == "L")
    numbers = "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c)[0] == "N")
    space = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + \
        "\u2028\u2029\u202f\u205f"
    naive = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+|"
                       f" ?[^{space}{letters}{numbers}]+|[{space}]+(?![^{space}])|[{space}]+")
    rng = random.Random(0)
    atoms = ["a", "Z", "é", "ß", "ʰ", "7", "²", "Ⅷ", "٣", " ", "  ", "\t", "\x1f", "\x85", "\u2003",
             "'", "'s", "'re", "’", "-", "\u200b", "\u0301", "_"]
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


@needs_model
def test_merges_in_the_order_of_the_file(roberta, monkeypatch):
    """Tokens of words, real and random, against all 50,000 merges applied one after the other. A
    word of 16,000 letters takes linear time: at most two pushes onto the heap per letter."""
    rng = random.Random(0)
    words = ["Ġrunning", "antidisestablishment", "日本", "zzzzzzz", "\n\n\n\n"]
    words += ["".join(rng.choices(letters, k=length)) for letters, length in (
        ("etaoins", 5), ("etaoins", 12), ("abcdefghijklmnopqrstuvwxyz", 40), ("ab", 40))]
    for word in words:
        assert roberta.merged(word) == naive_tokens(word, roberta.ranks)

    pushes, push = [], data.heapq.heappush
    monkeypatch.setattr(data.heapq, "heappush", lambda *args: pushes.append(1) or push(*args))
    word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=16_000))
    assert "".join(roberta.merged(word)) == word and 1000 < len(pushes) < 2 * len(word)


def test_encode_row_cuts_as_join_ids_does(toy):
    """For pairs and single texts of all lengths around the limit, and far beyond it, ids of
    texts that were encoded in part equal the cut of all their ids."""
    for max_len in range(5, 14):
        for n in (*range(max_len + 3), 40, 41):
            for m in (*range(max_len + 3), 40, 41):
                texts = ["q" * n, "xy" * m]
                ids = [toy.encode(text) for text in texts]
                assert data.encode_row(toy, texts, max_len) == data.join_ids(ids, max_len), (n, m)
            assert data.encode_row(toy, texts[:1], max_len) == data.join_ids(ids[:1], max_len)


@needs_model
def test_special_tokens_in_a_text_are_text(roberta):
    """The names of special tokens, written in a text, give no special id."""
    for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"):
        ids = roberta.encode(f"a {name}{name} b")
        assert not set(ids) & {0, 1, 2, 3, 50260, 50264}
        assert roberta.decode(ids) == f"a {name}{name} b"


def test_decode_of_half_a_character(toy):
    """An id that is half of "é" decodes to U+FFFD, special ids to their names."""
    ids = toy.encode("é")
    assert len(ids) == 2 and toy.decode(ids) == "é" and toy.decode(ids[:1]) == "\ufffd"
    assert toy.decode([0, *toy.encode("low"), 2]) == "<s>low</s>"


def test_train_bpe_by_hand(toy_folder, toy):
    """Merges of a small text against pair counts by hand: "low" thrice and in "lower", so l+o and
    o+w stand 4 times; then the ties go by alphabet."""
    merges = (toy_folder / "merges.txt").read_text().split("\n")
    # after "lo" and "low": Ġ+low 3 times (two "low" and "lower" after a space); then e+s, s+t, ...
    # (in " newest", "newest": twice each): e+s comes before e+w, n+e, s+t, w+e and Ġ+n
    assert merges == ["#version: 0.2", "l o", "lo w", "Ġ low", "e s", ""]
    vocab = json.loads((toy_folder / "vocab.json").read_text())
    assert list(vocab.values()) == list(range(4 + 256 + 4 + 1))
    assert list(vocab)[:5] == ["<s>", "<pad>", "</s>", "<unk>", "!"]
    assert list(vocab)[-5:] == ["lo", "low", "Ġlow", "es", "<mask>"]
    assert [toy.tokens[i] for i in toy.encode("low slow lowest")] == [
        "low", "Ġ", "s", "low", "Ġlow", "es", "t"]


def test_train_bpe_never_makes_a_token_twice(tmp_path):
    """Texts full of special tokens, and more merges asked for than there are: the files load, and
    the texts still hold no special id."""
    texts = ["<s><s><s> <mask><mask> <pad></s></s> abc abc ab bc"] * 5
    data.train_bpe(texts, 10_000, tmp_path)
    bpe = BPE(tmp_path)
    last = len(bpe.vocab) - 1
    assert bpe.vocab["<mask>"] == last
    assert not set(bpe.encode(texts[0])) & {0, 1, 2, 3, last}
    data.train_bpe([], 5, tmp_path)
    assert len(BPE(tmp_path).vocab) == 261


DAMAGED = [  # (file, text of the good file -> text, part of the message)
    ("vocab.json", lambda s: s[:len(s) // 2], "not valid JSON"),
    ("vocab.json", lambda s: "[1, 2]", "JSON object"),
    ("vocab.json", lambda s: s.replace(": 7,", ': "7",'), "damaged"),
    ("vocab.json", lambda s: s.replace(": 8,", ": 7,"), "once"),
    ("vocab.json", lambda s: s.replace('"<pad>": 1, "</s>": 2', '"<pad>": 2, "</s>": 1'), "<pad>"),
    ("vocab.json", lambda s: s.replace('"lo"', '"ol"'), "l"),
    ("merges.txt", lambda s: s.removesuffix(" s\n"), "'es'"),
    ("merges.txt", lambda s: s + "q u\n", "'qu'"),
    ("merges.txt", lambda s: s.replace("l o\n", "l o\nl o w\n"), "'l', 'o', 'w'"),
    ("merges.txt", lambda s: "#version: 0.2\n", "no merge"),
]


def copied(toy_folder, folder, *names):
    """Copy files of the small tokenizer, and return their folder."""
    for name in names or ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((toy_folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("name, change, says", DAMAGED)
def test_damaged_vocab_and_merges(name, change, says, toy_folder, tmp_path):
    """Files that were cut short, damaged or taken from another model: one line names the file."""
    path = copied(toy_folder, tmp_path) / name
    text = change(path.read_text())
    path.write_text(text)
    refused(str(tmp_path), says, use=lambda: BPE(tmp_path))


@pytest.mark.parametrize("name, change", [
    ("merges.txt", lambda s: s.replace("\n", "\r\n")), ("merges.txt", lambda s: s.rstrip("\n")),
    ("merges.txt", lambda s: s + "\n"), ("merges.txt", lambda s: s.split("\n", 1)[1]),
    ("vocab.json", lambda s: "\ufeff" + s.replace('": ', '"  :\t'))])
def test_good_variants_of_vocab_and_merges(name, change, toy_folder, tmp_path, toy):
    """CRLF, blank lines at the end or no final newline, no version line, spaces and a byte order
    mark: the same tokenizer."""
    path = copied(toy_folder, tmp_path) / name
    path.write_bytes(change(path.read_text()).encode())
    assert BPE(tmp_path).ranks == toy.ranks


def tokenizer_json(toy_folder, as_text=False, **changes):
    """What transformers 5 saves instead of the two files; changes by dotted name, with __."""
    lines = (toy_folder / "merges.txt").read_text().splitlines()[1:]
    content = {
        "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 264, "content": "<mask>"}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": json.loads((toy_folder / "vocab.json").read_text()),
                  "merges": lines if as_text else [line.split(" ") for line in lines]}}
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content[outer[0]] if outer else content
        place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize("as_text", [False, True])
def test_tokenizer_json(as_text, toy_folder, toy, tmp_path):
    """tokenizer.json alone gives the same tokenizer as the two older files."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(toy_folder, as_text))
    assert BPE(tmp_path).vocab == toy.vocab and BPE(tmp_path).ranks == toy.ranks


@pytest.mark.parametrize("changes, says", [
    (dict(model__type="WordPiece"), "'WordPiece'"),
    (dict(normalizer={"type": "Lowercase"}), "normalizer"),
    (dict(pre_tokenizer=None), "'pre_tokenizer': None"),
    (dict(pre_tokenizer__add_prefix_space=True), "'add_prefix_space': True"),
    (dict(added_tokens=[{"id": 265, "content": "[USER]"}]), "'[USER]'"),
    (dict(model__vocab=[["a", 0.5]]), "damaged"), (dict(model__merges=[]), "no merge")])
def test_tokenizers_of_other_kinds(changes, says, toy_folder, tmp_path):
    """A tokenizer.json that would give other ids, or is damaged: one line with the reason."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(toy_folder, **changes))
    refused(str(tmp_path), says, use=lambda: BPE(tmp_path))


@pytest.mark.parametrize("file, text, says", [
    ("tokenizer_config.json", '{"add_prefix_space": true}', "add_prefix_space"),
    ("added_tokens.json", '{"[USER]": 265}', "'[USER]'"),
    ("tokenizer_config.json", '{"add_prefix_space": false}', None),
    ("added_tokens.json", '{"<mask>": 264}', None)])
def test_files_beside_the_tokenizer(file, text, says, toy_folder, toy, tmp_path):
    """A space before each text and added tokens would give other ids than ours, so they are
    refused; RoBERTa's own values are taken."""
    (copied(toy_folder, tmp_path) / file).write_text(text)
    if says:
        refused(str(tmp_path), says, use=lambda: BPE(tmp_path))
    else:
        assert BPE(tmp_path).ranks == toy.ranks


# ---- Batches -----------------------------------------------------------------------------------

def some_examples(n=203, seed=0, regression=False):
    rng = random.Random(seed)
    return [Example([0, *[rng.randint(4, 99) for _ in range(rng.randint(0, 40))], 2],
                    rng.random() if regression else i % 3) for i in range(n)]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def test_each_example_once():
    """For several sizes, rows of all batches against the list: each once, ids, mask and labels at
    their places, padded with 1 to the batch's longest."""
    for n, size, seed in ((203, 16, 1), (203, 16, None), (5, 8, 1), (1, 1, 0), (64, 16, 3)):
        examples, seen = some_examples(n), []
        for batch in data.batches(examples, size, seed, 0):
            assert batch.ids.dtype == batch.labels.dtype == batch.rows.dtype == torch.int64
            assert batch.mask.sum(1).max() == batch.ids.shape[1]
            for ids, mask, label, row in zip(*batch):
                assert ids[mask].tolist() == examples[row].ids
                assert (ids[~mask] == 1).all() and label == examples[row].label
            seen.append(batch.rows.tolist())
        assert sorted(row for rows in seen for row in rows) == list(range(n))
        assert sorted(map(len, seen))[1:] == [size] * (math.ceil(n / size) - 1)


def test_order_is_a_function_of_seed_and_epoch():
    """Equal (seed, epoch) give equal batches, whatever else was drawn; others differ; seed None
    goes from long to short."""
    examples = some_examples()
    first = list(data.batches(examples, 16, 7, 2))
    np.random.seed(0)
    torch.manual_seed(3)
    assert all(map(same, first, data.batches(examples, 16, 7, 2)))
    for seed, epoch in ((7, 3), (8, 2), (2, 7)):
        assert not all(map(same, first, data.batches(examples, 16, seed, epoch)))
    lengths = [int(n) for b in data.batches(examples, 16, None, 0) for n in b.mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("n, size", [(203, 16), (203, 203), (3, 8), (32, 16)])
def test_endless_batches(n, size):
    """From any step on, the batches equal those of the epochs, one after another."""
    examples = some_examples(n)
    expected = [batch for epoch in range(4) for batch in data.batches(examples, size, 7, epoch)]
    for step in (0, 1, 2, len(expected) // 4, len(expected) // 4 + 1, len(expected) - 1):
        stream = data.endless_batches(examples, size, 7, step)
        assert all(same(batch, next(stream)) for batch in expected[step:])


@pytest.mark.parametrize("regression", [False, True])
def test_split_and_ranks(regression):
    """The parts of a batch against rows i, i + n, ... trimmed to their longest; rank r of a world
    gets part r; parts beyond the rows are (0, 1), of the same types."""
    examples = some_examples(50, regression=regression)
    kind = torch.float32 if regression else torch.int64
    for world in (1, 2, 3, 5):
        per_rank = [list(data.batches(examples, 16, 1, 0, 0, r, world)) for r in range(world)]
        for i, batch in enumerate(data.batches(examples, 16, 1, 0)):
            for r, part in enumerate(batch.split(world)):
                assert same(part, per_rank[r][i])
                assert part.rows.tolist() == batch.rows[r::world].tolist()
                assert part.labels.dtype == kind
                if len(part.rows):
                    width = max(len(examples[row].ids) for row in part.rows)
                    assert part.ids.shape == (len(part.rows), width) == part.mask.shape
                    assert torch.equal(part.ids, batch.ids[r::world, :width])
    parts = next(data.batches(examples[:2], 2, 1, 0)).split(4)
    assert [len(part.ids) for part in parts] == [1, 1, 0, 0]
    assert parts[3].ids.shape == parts[3].mask.shape == (0, 1)
    assert parts[3].labels.dtype == kind and parts[3].rows.shape == (0,)
    (batch,) = data.batches([Example([0, 2], None)] * 2, 8, None, 0)  # of a test file
    assert batch.labels.tolist() == [-1, -1] and batch.labels.dtype == torch.int64


@needs_glue
@needs_model
@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_padding(name, roberta):
    """Less than 5 % of the training batches is padding, and hardly a batch of one epoch stays
    together in the next."""
    examples = data.load_task(name, GLUE, "train", roberta, 128)
    for size in (16, 32):
        first, second = (list(data.batches(examples, size, 1, epoch)) for epoch in (0, 1))
        assert sum(int(b.mask.sum()) for b in first) > 0.95 * sum(b.mask.numel() for b in first)
        group = {row: i for i, batch in enumerate(second) for row in batch.rows.tolist()}
        together = [max(Counter(group[row] for row in batch.rows.tolist()).values()) > size // 2
                    for batch in first]
        assert sum(together) < 0.05 * len(together)


# ---- Metrics -----------------------------------------------------------------------------------

def test_metrics_by_hand():
    """Each metric against a number worked out by hand."""
    p, y = [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]          # TP 2, FP 1, FN 1, TN 1
    assert data.accuracy(p, y) == 3 / 5
    assert data.f1(p, y) == 2 * 2 / (2 * 2 + 1 + 1)
    assert data.matthews(p, y) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert data.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert data.spearman([10, 20, 20, 90], [1, 3, 2, 4]) == pytest.approx(   # 1, 2.5, 2.5, 4
        (1.5 * 1.5 * 2 + 0) / math.sqrt(4.5 * 5))


def test_recorded_metrics():
    """Metrics of random vectors, ties included, against scikit-learn's and scipy's
    (fixtures/record.py)."""
    recorded = json.loads((RECORDED / "metrics.json").read_text())
    for row in recorded["classes"] + recorded["reals"]:
        for name in row.keys() & data.METRICS.keys():
            assert data.METRICS[name](row["predictions"], row["labels"]) == \
                pytest.approx(row[name], abs=1e-12), name


def test_constant_predictions_score_nothing():
    """Predictions or labels all equal: correlation and Matthews are 0, not NaN, even for a constant
    whose mean rounds; F1 without a positive is 0."""
    y = [0, 1, 1, 0, 1, 1, 0]
    for constant in (0, 1):
        assert data.matthews([constant] * 7, y) == 0 == data.matthews(y, [constant] * 7)
    for constant in (0.1, -7, 0.3):
        for metric in (data.pearson, data.spearman):
            assert metric([constant] * 7, y) == 0 == metric(y, [constant] * 7)
    assert data.f1([0] * 3, [0] * 3) == 0 and data.f1([0] * 3, [1] * 3) == 0


def test_metrics_take_two_vectors():
    """Shapes that would broadcast silently, empty vectors and entries that are not numbers, such as
    the labels of a test file, are refused; tensors are taken; NaN gives NaN."""
    for metric in data.METRICS.values():
        for p, y in (([[1], [0]], [1, 0]), ([1], [1, 0]), ([], []), ([1, 0], [None, None]),
                     (["1", "0"], [1, 0])):
            with pytest.raises(ValueError, match="two vectors"):
                metric(p, y)
        assert isinstance(metric(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0])), float)
        assert math.isnan(metric([1, 0, math.nan], [1, 0, 1]))
    with pytest.raises(ValueError, match="two classes"):
        data.matthews([0, 2], [0, 1])


# ---- Submissions -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, split, file, predictions, cells", [
    ("cola", "test", "CoLA.tsv", [0, 1], ["0", "1"]),
    ("sst2", "test", "SST-2.tsv", [1, 1], ["1", "1"]),
    ("mrpc", "test", "MRPC.tsv", [1, 0], ["1", "0"]),
    ("qqp", "test", "QQP.tsv", [1, 0], ["1", "0"]),
    ("stsb", "test", "STS-B.tsv", [0.5, -0.1, 1.2], ["2.50000", "0.00000", "5.00000"]),
    ("mnli", "test", "MNLI-m.tsv", [0, 1, 2], ["entailment", "neutral", "contradiction"]),
    ("mnli", "test_mm", "MNLI-mm.tsv", [2], ["contradiction"]),
    ("qnli", "test", "QNLI.tsv", [0, 1], ["entailment", "not_entailment"]),
    ("rte", "test", "RTE.tsv", [1], ["not_entailment"]),
    ("wnli", "test", "WNLI.tsv", [0], ["0"]),
    ("ax", "test", "AX.tsv", [2, 0], ["contradiction", "entailment"])])
def test_submission(name, split, file, predictions, cells, tmp_path):
    """Name and every byte of each task's file against gluebenchmark.com's format."""
    path = data.write_submission(TASKS[name], split, np.array(predictions), tmp_path / "new")
    assert path == tmp_path / "new" / file
    expected = "index\tprediction\n" + "".join(f"{i}\t{cell}\n" for i, cell in enumerate(cells))
    assert path.read_bytes() == expected.encode()


# ---- The file itself ---------------------------------------------------------------------------

def test_what_data_imports():
    """Modules that data.py imports against the standard library, numpy, torch, tqdm and dora, of
    which it takes the function that writes files: it knows nothing of models."""
    text = (ROOT / "data.py").read_text("utf-8")
    names = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert names - {*sys.stdlib_module_names} == {"numpy", "torch", "tqdm", "dora"}
    assert "\nfrom dora import atomic_file\n" in text and not re.search(r"torch\.nn|\bnn\.", text)
