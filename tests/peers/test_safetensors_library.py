"""dora.py's safetensors reader and writer against the safetensors library."""
import json
import random
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_safetensors import HOSTILE, file_of, write_hostile  # noqa: E402

from dora import DTYPES, DoRAError, read_safetensors, write_safetensors

STRICTER = {"a name twice", "0 first, then a size of 2^94", "empty, but huge", "a field too many",
            "65 dimensions", "a million dimensions", "a space before the header",
            "a line feed before the header"}  # the library reads these
MINILM = Path(__file__).parents[2] / "../shared/models/minilm-l6-roberta"


def tensors_of(seed):
    """Tensors of all types and many shapes, names with odd characters."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    shapes = [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (2, 3, 4, 5), (1, 1, 129)]
    return {f"{i}.é\n\"日{name}": (torch.randn(rng.choice(shapes)) * 50).abs().to(dtype)
            for i in range(3) for name, dtype in DTYPES.items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert bits(a[name]) == bits(b[name])


def bits(tensor):
    """The bytes of a tensor, of any dtype and shape."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_the_library_reads_our_files(tmp_path, seed):
    """T12: every type, scalars and empty tensors, transposed ones: bit for bit; and the metadata
    says "pt", which transformers asks for."""
    tensors = tensors_of(seed)
    tensors["view"] = torch.randn(4, 6).T
    write_safetensors(tmp_path / "x.safetensors", tensors)
    equal(load_file(tmp_path / "x.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": 'a "b" \n é'}])
def test_we_read_the_librarys_files(tmp_path, seed, metadata):
    """The same the other way round, with and without metadata."""
    tensors = tensors_of(seed)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    equal(read_safetensors(tmp_path / "x.safetensors"), tensors)


@pytest.mark.skipif(not MINILM.exists(), reason="needs ../shared/models")
def test_a_real_checkpoint():
    """The shared encoder's file reads as the library reads it."""
    equal(read_safetensors(MINILM / "model.safetensors"), load_file(MINILM / "model.safetensors"))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_of_both(tmp_path, case):
    """T10: each file of the table in test_safetensors.py: ours refuses it, whatever the library
    does; those that the library reads are listed here."""
    path = write_hostile(tmp_path / "x.safetensors", case)
    with pytest.raises(DoRAError):
        read_safetensors(path)
    try:
        load_file(path)
    except Exception:
        assert case not in STRICTER
    else:
        assert case in STRICTER


def random_json(rng, depth=0):
    """A JSON text that is sometimes a good header, mostly nearly one."""
    number = ["0", "1", "4", "8", "-0", "-1", "1.0", "1e0", "01", "4294967296", "true", "null",
              '"4"', "[]", "NaN", "9007199254740993", "18446744073709551616"]

    def pick(good, p=0.85):
        return good if rng.random() < p else rng.choice(number)

    entries, end = [], 0
    for i in range(rng.randint(0, 3)):
        name, size = rng.choice([("F32", 4), ("U8", 1), ("F64", 8), ("BOOL", 1), ("F8_E4M3", 1),
                                 ("C64", 8), ("I4", 1), ("F4", 1), ("F6_E2M3", 1), ("U32", 4)])
        shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randint(0, 3))]
        count = 1
        for n in shape:
            count *= n
        dims = ",".join(pick(str(n), 0.95) for n in shape)
        fields = [f'"dtype":{pick(json.dumps(name), 0.97)}', f'"shape":[{dims}]',
                  f'"data_offsets":[{pick(str(end), 0.95)},{pick(str(end + count * size), 0.95)}]']
        if rng.random() < 0.05:
            fields.append(rng.choice(['"x":1', '"shape":[1]', '"dtype":"U8"']))
        rng.shuffle(fields)
        key = rng.choice([f'"{i}"', f'"{i}"', f'"{i}"', '"0"', '"\\ud83d"', '"\\ud83d\\ude00"',
                          '"\\u0000"', '"__metadata__"', '"\\x"', '"\t"'])
        entries.append(f"{key}:{{{','.join(fields)}}}")
        end += count * size
    if rng.random() < 0.4:
        entries.append('"__metadata__":' + rng.choice(
            ["{}", '{"a":"b"}', '{"a":1}', "null", "[]", '{"a":null}', '{"a":"\\ud800"}',
             '{"a":"b","a":"c"}']))
    rng.shuffle(entries)
    text = "{" + rng.choice([",", ",", ",", " ,\n"]).join(entries) + "}"
    text = rng.choice(["", "", "", "", " ", "\n", "\ufeff"]) + text + rng.choice(
        ["", "", "", "", " ", "\n", "\0", ",", "{}"])
    return text.encode(rng.choice(["utf-8"] * 20 + ["utf-16", "utf-16-le", "utf-32"])), end


@pytest.mark.parametrize("seed", range(4))
def test_headers_by_chance(tmp_path, seed):
    """T10: 1,000 random headers each: what the library refuses, ours refuses; what both read is
    equal."""
    rng, path, refused, both = random.Random(seed), tmp_path / "x.safetensors", 0, 0
    for _ in range(1000):
        header, end = random_json(rng)
        file_of(path, header, bytes(max(0, end + rng.choice([0] * 20 + [1, -1]))))
        try:
            expected = load_file(path)
        except Exception:
            refused += 1
            with pytest.raises(DoRAError):
                read_safetensors(path)
            continue
        try:
            found = read_safetensors(path)
        except DoRAError:  # a name twice, a type that torch lacks
            continue
        both += 1
        equal(found, expected)
    assert refused > 250 and both > 50


@pytest.mark.parametrize("seed", range(3))
def test_no_more_lenient_than_the_library(tmp_path, seed):
    """1,500 mutations of a file: what the library refuses, we refuse, and what both read is
    equal."""
    write_safetensors(tmp_path / "good", {
        "w": torch.arange(6.0).view(2, 3), "h": torch.ones(3).half(), "n": torch.tensor(7),
        "none": torch.empty(0, 4)})
    raw = (tmp_path / "good").read_bytes()
    rng = random.Random(seed)
    path, both = tmp_path / "mutated", 0
    for _ in range(500):
        new = bytearray(raw)
        if rng.random() < 0.7:
            for _ in range(rng.randint(1, 3)):
                byte = rng.choice([*b'0123456789[]{}:,"- ', rng.randrange(256)])
                new[rng.randrange(len(new))] = byte
        else:
            i = rng.randrange(len(new))
            new[i:i + rng.randint(0, 4)] = b""
        path.write_bytes(new)
        try:
            expected = safetensors.torch.load(bytes(new))
        except safetensors.SafetensorError:
            with pytest.raises(DoRAError):
                read_safetensors(path)
            continue
        try:
            found = read_safetensors(path)
        except DoRAError:                           # types we do not know, say
            continue
        both += 1
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name].numpy().tobytes() == expected[name].numpy().tobytes()
    assert both > 20
