"""data.BPE against the tokenizers library: ids, piece boundaries, truncation, tokenizer.json."""
import json
import random
import re
import shutil
import sys
import unicodedata

import pytest
from tiny import GLUE, MINILM
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
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


ATOMS = [  # words, contractions, digits, runs of spaces, emoji, accents
    "the", "RoBERTa", "naïve", "x²", "½", "Ⅷ", "don't", "'re", "'LL", "'s", "'", "’s", "42", "3.14",
    "٣", " ", "  ", "   ", "\t", "\n", "\r\n", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000",
    "\u200b", "é", "e\u0301", "日本語", "한국", "हिन्दी", "👩‍👩‍👧", "🙂", "🏽", "</s>", "<mask>",
    "<s>", "_", "--", "...", "$", "\0", "\ufeff", "\ufffd", "a", "B", "Ǆ", "ª"]


def mixed(n, seed=0):
    """n strings of up to 12 atoms."""
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randint(1, 12))) for _ in range(n)]


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
    rng = random.Random(0)
    words = ["".join(rng.choices(letters, k=n)) for n in (1, 2, 3, 50, 1000, 16_000)
             for letters in ("abcdefghijklmnopqrstuvwxyz", "ab", "a", "éè日本", "01", "!?-")]
    texts = mixed(20_000) + words
    assert differences(bpe, reference, texts) == []
    assert all(bpe.decode(bpe.encode(text)) == text for text in texts)


def test_truncation(bpe):
    """Pairs and single texts of all lengths around the limit, and pairs far above it: the ids equal
    the library's longest_first with RoBERTa's template, which gives an odd place to the longer."""
    reference = ByteLevelBPETokenizer(*FILES, add_prefix_space=False)
    reference._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)])
    for max_len in (5, 6, 7, 8, 9, 12, 33):
        reference.enable_truncation(max_len, strategy="longest_first")
        lengths = {(n, max(0, m)) for n in range(max_len + 3) for m in (
            0, 1, 2, 3, n - 1, n, n + 1, max_len - n, max_len // 2, max_len + 1)}
        for n, m in [*lengths, (500, 500), (500, 501), (501, 500), (500, 3), (3, 500)]:
            a, b = "a" + " a" * n, "b" + " b" * m
            assert data.encode_row(bpe, [a, b], max_len) == reference.encode(a, b).ids, (n, m)
            assert data.encode_row(bpe, [a], max_len) == reference.encode(a).ids, n


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


def test_added_token(bpe, saved, tmp_path):
    """With the library a text becomes [USER], which the saved tokenizer.json adds: refused by name.
    So is a vocab.json with that token, which no merge makes."""
    peer = PreTrainedTokenizerFast(tokenizer_file=str(saved / "user" / "tokenizer.json"))
    assert 50265 in peer.encode("a [USER] b")
    with pytest.raises(data.DataError, match=r"added token '\[USER\]'"):
        data.BPE(saved / "user")

    (tmp_path / "vocab.json").write_text(json.dumps({**bpe.vocab, "[USER]": 50265}))
    shutil.copy(FILES[1], tmp_path)
    with pytest.raises(data.DataError, match=r"'\[USER\]'"):
        data.BPE(tmp_path)
