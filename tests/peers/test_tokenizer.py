"""data.BPE against the tokenizers library: ids, piece boundaries, tokenizer.json. (Truncation:
test_recordings.py.)"""
import random
import re
import sys
import unicodedata

import pytest
from tiny import GLUE, MINILM
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, RobertaTokenizerFast

import data

pytestmark = pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared with the real encoder")

FILES = (str(MINILM / "vocab.json"), str(MINILM / "merges.txt"))
CONTEXTS = ("{}", "a{}b", "1{}2", " {} ", "'{}s {}{}")  # alone, in a word, in a number, ...
SPLITTER = ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def bpe():
    return data.BPE(MINILM)


@pytest.fixture(scope="module")
def reference():
    return ByteLevelBPETokenizer(*FILES, add_prefix_space=False)


def differences(bpe, reference, texts):
    """The texts whose ids or pieces differ from the library's."""
    def reference_pieces(text):
        return [text[a:b] for _, (a, b) in SPLITTER.pre_tokenize_str(text)]

    encoded = reference.encode_batch(texts)
    return [text for text, theirs in zip(texts, encoded)
            if bpe.encode(text) != theirs.ids or bpe.pieces(text) != reference_pieces(text)]


ATOMS = [*" \t\n'_$\0aBǄªx²½Ⅷ٣é\x1c\x85\xa0\u2003\u2028\u3000\u200b\ufeff\ufffd🙂🏽"]
ATOMS += "the RoBERTa naïve don't 're 'LL 's ’s 42 3.14 e\u0301 日本語 한국 हिन्दी 👩‍👩‍👧".split(" ")
ATOMS += ["  ", "   ", "\r\n", "--", "...", "<s>", "</s>", "<mask>"]


def mixed(n, seed=0):
    """n strings of up to 12 atoms."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(n)]
    return ["".join(rng.choices(ATOMS, k=length)) for length in lengths]


def test_glue_files(bpe, reference):
    """Every line of every GLUE file: ids and piece boundaries equal the library's."""
    paths = sorted(GLUE.glob("*/*.tsv"))
    assert len(paths) == 20
    for path in paths:
        cells = {cell for row in data.read_tsv(path) for cell in row if cell}
        assert differences(bpe, reference, sorted(cells)) == [], path


def test_every_assigned_character(bpe, reference):
    """All assigned characters but surrogates in five contexts: ids and pieces are the library's."""
    chars = [chr(i) for i in range(sys.maxunicode + 1)
             if unicodedata.category(chr(i)) not in ("Cn", "Cs")]
    assert len(chars) > 280_000  # 144,762 by Unicode 14, and 137,468 for private use
    for context in CONTEXTS:
        assert differences(bpe, reference, [context.replace("{}", char) for char in chars]) == []


def test_mixed_strings(bpe, reference):
    """20,000 mixed strings: ids and piece boundaries equal the library's, and decode inverts. So it
    is with words of up to 16,000 letters, random or repeated, which one piece holds."""
    rng, words = random.Random(0), []
    for letters in ("abcdefghijklmnopqrstuvwxyz", "ab", "a", "éè日本", "01", "!?-"):
        words += ["".join(rng.choices(letters, k=n)) for n in (1, 2, 3, 50, 1000, 16_000)]
    texts = mixed(20_000) + words
    assert differences(bpe, reference, texts) == []
    assert all(bpe.decode(bpe.encode(text)) == text for text in texts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What transformers saves for this tokenizer: without and with an added token [USER]."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = RobertaTokenizerFast.from_pretrained(MINILM)
    tokenizer.save_pretrained(folder / "plain")
    tokenizer.add_tokens(["[USER]"])
    tokenizer.save_pretrained(folder / "user")
    return folder


def test_tokenizer_json(bpe, saved):
    """The folder that transformers saves holds no vocab.json, and gives the same tokenizer; ids
    of mixed strings equal those of the library with this file."""
    assert not (saved / "plain" / "merges.txt").exists()
    loaded = data.BPE(saved / "plain")
    assert loaded.vocab == bpe.vocab and loaded.ranks == bpe.ranks
    peer = PreTrainedTokenizerFast(tokenizer_file=str(saved / "plain" / "tokenizer.json"))
    special = re.compile("</?s>|<mask>")  # text here, tokens there
    for text in mixed(500, seed=1):
        text = special.sub("", text)
        assert loaded.encode(text) == peer.encode(text, add_special_tokens=False)


def test_added_token(saved):
    """With the library a text becomes [USER], which the saved tokenizer.json adds: refused."""
    peer = PreTrainedTokenizerFast(tokenizer_file=str(saved / "user" / "tokenizer.json"))
    assert 50265 in peer.encode("a [USER] b")
    with pytest.raises(data.DataError, match=r"added token '\[USER\]'"):
        data.BPE(saved / "user")
