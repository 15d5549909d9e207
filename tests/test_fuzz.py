"""Files of every text format and safetensors, 2,000 damaged ones each (hypothesis, the
same in each run): a file loads and can be used, or one line that names it refuses it.
"""
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import tokenizer_json
from tiny import files

import data
from dora import DoRAError, read_safetensors

pytestmark = pytest.mark.slow
N = 2000
WORDS = b'\0 \t \n \r\n \xff \xef\xbb\xbf " { } [ ] : , -1 0 1e999 1.5 NaN null true <s> \\ud800'
TOKENS = [*WORDS.split(b" "), b" ", b"9" * 9, b"9" * 5000, b"[" * 3000,
          b"\xed\xa0\x80", b"\xc2\x85", b"\xe2\x80\xa8",
          b"#version: 0.2\n", (2**60).to_bytes(8, "little")]
ROWS = {"rte": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
        "cola": "s\t1\t\tA cat.\ns\t0\t*\tCat a.\n" * 3,
        "stsb": "index\tsentence1\tsentence2\tscore\n0\ta b\tc\t3.25\n1\td\té²\t5\n"}


@st.composite
def damaged(draw, original):
    """The bytes after one to four edits: each replaces up to 40 bytes by none, by others, or by a
    token that parsers trip over; a tenth is cut short."""
    raw = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(raw), 3000)) | st.integers(0, len(raw)))
        end = at + draw(st.integers(0, 40))
        raw[at:end] = draw(st.binary(max_size=8) | st.sampled_from(TOKENS))
    if draw(st.integers(0, 9)) == 9:
        del raw[draw(st.integers(0, len(raw))):]
    return bytes(raw)


def use(folder, name):
    """Use a file of a folder that holds all formats, so that a fault in it shows."""
    if name in ROWS:
        examples = data.load_task(name, folder, "train", data.BPE(files()[1]), 32)
        for batch in data.batches(examples, 4, 0, 0):
            assert batch.labels.isfinite().all()
    elif name == "model.safetensors":
        tensors = read_safetensors(folder / name).values()
        assert sum(tensor.clone().nbytes for tensor in tensors) < (folder / name).stat().st_size
    else:  # a tokenizer that could be made gives ids that turn back into the text
        bpe, text = data.BPE(folder), "low newest <s> é² "
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and min(ids) > 3


@pytest.mark.parametrize("name", [*ROWS, "vocab.json", "merges.txt", "tokenizer.json",
                                  "model.safetensors"])
def test_damaged_files(tmp_path, name):
    """2,000 damaged files of a format: each is used, or refused by one line that names the file."""
    path = tmp_path / name
    if name in ROWS:
        path = tmp_path / data.TASKS[name].folder / "train.tsv"
        path.parent.mkdir()
        path.write_text(ROWS[name], "utf-8")
    elif name == "tokenizer.json":
        path.write_text(tokenizer_json(files()[1]), "utf-8")
    else:
        for file in ("vocab.json", "merges.txt", "model.safetensors"):
            (tmp_path / file).write_bytes((files()[1] / file).read_bytes())

    use(tmp_path, name)
    found = []

    @settings(max_examples=N, derandomize=True, database=None, deadline=None,
              suppress_health_check=[*HealthCheck])
    @given(damaged(path.read_bytes()))
    def check(raw):
        path.write_bytes(raw)
        try:
            use(tmp_path, name)
            found.append("used")
        except (DoRAError, data.DataError) as error:
            found.append("refused")
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert str(tmp_path) in str(error)

    check()
    assert len(found) >= N and found.count("refused") > N / 10
