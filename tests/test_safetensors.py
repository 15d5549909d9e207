"""dora.py: read_safetensors and write_safetensors on good, broken and hostile files. The library's
own files: peers/test_safetensors_library.py."""
import json
import os
import re
import struct
import time
import warnings
from pathlib import Path

import pytest
import torch

import dora
from dora import DTYPES, DoRAError, adapter_metadata, read_safetensors, write_safetensors

def file_of(path, header, data=b"", length=None):
    """A file by hand: header length, header (a dict, JSON text or bytes), data."""
    text = header if isinstance(header, (bytes, str)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ---- good files ---------------------------------------------------------------------------------

def test_golden_bytes(tmp_path):
    """A file spelled out byte by byte reads as the two tensors it says."""
    text = ('{"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
            '"n":{"dtype":"I16","shape":[3],"data_offsets":[16,22]}}')
    data = bytes.fromhex("0000803f" "00000040" "000040c0" "0000003f" "0100" "ffff" "0004")
    tensors = read_safetensors(file_of(tmp_path / "x", text, data))
    assert list(tensors) == ["w", "n"]
    assert tensors["w"].tolist() == [[1.0, 2.0], [-3.0, 0.5]]
    assert tensors["n"].tolist() == [1, -1, 1024]
    assert (tensors["w"].dtype, tensors["n"].dtype) == (torch.float32, torch.int16)


def test_written_bytes(tmp_path):
    """A written file, taken apart by hand: length, a JSON header padded to 8 bytes, the data
    without a hole, each tensor on a multiple of its item size."""
    tensors = {"b": torch.tensor([True, False, True]), "h": torch.tensor([1.5, -2.0]).half(),
               "f": torch.tensor([[1.0, 2.0, 3.0]])}
    write_safetensors(tmp_path / "x", tensors)
    raw = (tmp_path / "x").read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:8 + n]), raw[8 + n:]
    assert n % 8 == 0 and len(data) == 12 + 4 + 3
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {k: (v["dtype"], v["shape"]) for k, v in header.items()} == {
        "f": ("F32", [1, 3]), "h": ("F16", [2]), "b": ("BOOL", [3])}
    for info in header.values():
        assert info["data_offsets"][0] % {"F32": 4, "F16": 2, "BOOL": 1}[info["dtype"]] == 0
    begin, end = header["f"]["data_offsets"]
    assert struct.unpack("<3f", data[begin:end]) == (1.0, 2.0, 3.0)
    begin, end = header["b"]["data_offsets"]
    assert data[begin:end] == b"\1\0\1"


def bits(tensor):
    """The bytes of a tensor: not every dtype can be compared."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bits(
        tensor[None])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5,), (2, 3), (2, 1, 3, 2)])
def test_round_trip(tmp_path, dtype, shape):
    """T12: every type and shape, scalars and empty tensors too, reads back bit for bit, also beside
    others in one file."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 100).abs().to(dtype)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "x": x, "y": torch.zeros(1)}
    write_safetensors(tmp_path / "x", tensors)
    back = read_safetensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor)


def test_round_trip_of_views_and_names(tmp_path):
    """Transposed, sliced, expanded and trained tensors and unusual names read back equal."""
    x = torch.arange(12.0).view(3, 4)
    tensors = {"t": x.T, "s": x[:, 1:3], "e": x[:1].expand(5, 4), "p": torch.nn.Parameter(x),
               'q"\\ é\n日本': x, "": x[0], "a.b.c": x[1, 1]}
    write_safetensors(tmp_path / "x", tensors)
    back = read_safetensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) and not back[k].requires_grad for k, v in tensors.items())


def test_views_that_are_computed_late(tmp_path):
    """T12: a conjugated and a negated view, whose bytes torch computes late, are written as they
    read."""
    z = torch.randn(5, dtype=torch.complex64)
    write_safetensors(tmp_path / "x", {"conj": z.conj(), "neg": z.conj().imag})
    back = read_safetensors(tmp_path / "x")
    assert torch.equal(back["conj"], z.conj().resolve_conj())
    assert torch.equal(back["neg"], -z.imag)


def test_special_numbers(tmp_path):
    """NaN, infinities, -0.0 and denormals keep their bits."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    write_safetensors(tmp_path / "x", {"x": x})
    assert torch.equal(read_safetensors(tmp_path / "x")["x"].view(torch.int32), x.view(torch.int32))


def test_no_tensor_and_only_metadata(tmp_path):
    """A file without tensors, with and without metadata, is an empty dictionary."""
    write_safetensors(tmp_path / "x", {})
    assert read_safetensors(tmp_path / "x") == {}
    assert read_safetensors(file_of(tmp_path / "y", "{}")) == {}


def test_a_start_that_is_not_aligned(tmp_path):
    """The format lets a tensor start at any byte: an F32 after one U8 reads right."""
    header = {"u": entry([1], 0, 1, "U8"), "f": entry([2], 1, 9)}
    tensors = read_safetensors(file_of(tmp_path / "x", header, b"\7" + struct.pack("<2f", 1.5, -2)))
    assert tensors["u"].tolist() == [7] and tensors["f"].tolist() == [1.5, -2.0]
    assert (tensors["f"] + torch.ones(2)).tolist() == [2.5, -1.0]


def test_order_in_the_header_is_free(tmp_path):
    """Entries need not stand in the order of their data."""
    header = {"b": entry([1], 4, 8), "__metadata__": {"format": "pt"}, "a": entry([1], 0, 4)}
    tensors = read_safetensors(file_of(tmp_path / "x", header, struct.pack("<2f", 1, 2)))
    assert tensors["a"].item() == 1 and tensors["b"].item() == 2


def test_what_is_written_to_a_tensor_is_private(tmp_path):
    """The file is mapped: changing a tensor that was read neither fails nor changes the file."""
    write_safetensors(tmp_path / "x", {"x": torch.zeros(4)})
    read_safetensors(tmp_path / "x")["x"].fill_(1)
    assert read_safetensors(tmp_path / "x")["x"].tolist() == [0] * 4


# ---- writing ------------------------------------------------------------------------------------

class Broken(torch.Tensor):
    """A tensor that fails when its bytes are asked for, as a full disk or a kill would."""

    def detach(self):
        raise OSError("disk full")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """An error half-way: the old content stays under the name, and no temporary file beside it."""
    write_safetensors(tmp_path / "x", {"x": torch.zeros(4)})
    old = (tmp_path / "x").read_bytes()
    broken = torch.ones(4).as_subclass(Broken)
    with pytest.raises(OSError):
        write_safetensors(tmp_path / "x", {"x": torch.ones(4), "y": broken})

    with pytest.raises(OSError), dora.atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError("disk full")
    assert (tmp_path / "x").read_bytes() == old and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_is_not_there(tmp_path):
    """A missing folder is made; where there cannot be one, an OSError names it."""
    write_safetensors(tmp_path / "missing" / "x", {"x": torch.zeros(1)})
    assert read_safetensors(tmp_path / "missing" / "x")["x"].tolist() == [0]
    with pytest.raises(OSError) as error:
        write_safetensors(tmp_path / "missing" / "x" / "y", {"x": torch.zeros(1)})
    assert "missing" in str(error.value.filename)


def quantized(tensor):
    """The tensor in a number type that torch is about to give up, which it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize("tensors, metadata, says", [
    ({"__metadata__": torch.ones(2)}, None, "tensor named '__metadata__'"),
    ({"x": torch.ones(2, dtype=torch.complex128)}, None, "named 'x' of torch.complex128"),
    ({"x": torch.ones(2).to_sparse()}, None, "'x' has no plain data .layout torch.sparse_coo"),
    ({"x": quantized(torch.ones(2))}, None, "qint8"),
    ({"x": [1.0]}, None, "named 'x' of list"),
    ({"x": torch.empty(2, device="meta")}, None, "device meta"),
    ({3: torch.ones(2)}, None, "cannot hold a tensor named 3 of"),
    ({"x\ud83d": torch.ones(2)}, None, r"cannot hold a tensor named 'x\\ud83d' of"),
    ({"x": torch.ones(2)}, {"epoch": 3}, "metadata 'epoch' = 3 is not valid text"),
    ({"x": torch.ones(2)}, {3: "a"}, "metadata 3 = 'a' is not valid text"),
    ({"x": torch.ones(2)}, {"a": "\udc00"}, r"metadata 'a' = '\\udc00' is not valid text")])
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_written(tmp_path, tensors, metadata, says):
    """T13: names, types and metadata that the format does not have are refused before anything is
    written; the old file stays."""
    path = tmp_path / "x"
    write_safetensors(path, {"old": torch.zeros(1)})
    with pytest.raises(DoRAError, match=says) as error:
        write_safetensors(path, tensors, metadata)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert list(read_safetensors(path)) == ["old"] and os.listdir(tmp_path) == ["x"]


def test_metadata(tmp_path):
    """T13: metadata reads back, with any text in it."""
    notes = {"task": "rte", "labels": 'a "b"\n\\ é日本', "": ""}
    write_safetensors(tmp_path / "adapter_model.safetensors", {"x": torch.ones(2)}, notes)
    assert adapter_metadata(tmp_path) == {"format": "pt", **notes}


# ---- broken and hostile files -------------------------------------------------------------------

F4 = struct.pack("<f", 1.0)
HOSTILE = {
    "empty file": b"",
    "three bytes": b"\1\0\0",
    "length alone": struct.pack("<Q", 0),
    "header of 0 bytes": struct.pack("<Q", 0) + b"{}",
    "header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header longer than the file": struct.pack("<Q", 3) + b"{}",
    "not JSON": ("{x", b""),
    "no UTF-8": (b'{"\xff":1}', b""),
    "a list": ([], b""),
    "a number": ("7", b""),
    "null": ("null", b""),
    "two documents": ("{} {}", b""),
    "NUL bytes": (b"\0" * 16, b""),
    "nesting": ("[" * 100_000, b""),
    "nesting of objects": ('{"a":' * 100_000, b""),
    "nesting in a tensor": ('{"x":' + "[" * 5000 + "]" * 5000 + "}", b""),
    "a number of 10,000 digits": ('{"x":{"dtype":"F32","shape":[' + "9" * 10_000
                                  + '],"data_offsets":[0,4]}}', F4),
    "entry is a list": ({"x": [1]}, b""),
    "entry is null": ({"x": None}, b""),
    "entry is empty": ({"x": {}}, b""),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, F4),
    "a field too many": ({"x": {**entry([1], 0, 4), "z": 1}}, F4),
    "a name twice": ('{"x":%s,"x":%s}' % ((json.dumps(entry([1], 0, 4)),) * 2), F4),
    "a field twice": ('{"x":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', F4),
    "unknown type": ({"x": entry([1], 0, 4, "F31")}, F4),
    "type is a number": ({"x": entry([1], 0, 4, 5)}, F4),
    "type is a list": ({"x": entry([1], 0, 4, ["F32"])}, F4),
    "type is an object": ({"x": entry([1], 0, 4, {"F32": 1})}, F4),
    "shape is a number": ({"x": entry(1, 0, 4)}, F4),
    "shape is text": ({"x": entry("1", 0, 4)}, F4),
    "shape is null": ({"x": entry(None, 0, 4)}, F4),
    "shape holds a float": ({"x": entry([1.0], 0, 4)}, F4),
    "shape holds a bool": ({"x": entry([True], 0, 4)}, F4),
    "shape holds text": ({"x": entry(["1"], 0, 4)}, F4),
    "shape holds NaN": ('{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', F4),
    "negative shape": ({"x": entry([-1], 0, 4)}, F4),
    "two negative sizes": ({"x": entry([-1, -1], 0, 4)}, F4),
    "huge shape": ({"x": entry([2**40, 2**40], 0, 4)}, F4),
    "a shape that wraps around 2^64": ({"x": entry([2**32, 2**32, 2**32, 2**32], 0, 0)}, b""),
    "empty, but huge": ({"x": entry([0, 2**62, 2**62], 0, 0)}, b""),
    "empty, but 2^64": ({"x": entry([0, 2**64], 0, 0)}, b""),
    "shape and offsets disagree": ({"x": entry([2], 0, 4)}, F4),
    "itemsize disagrees": ({"x": entry([1], 0, 4, "F64")}, F4),
    "one offset": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}, F4),
    "three offsets": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, F4),
    "offsets are text": ({"x": entry([1], "0", "4")}, F4),
    "offsets are bools": ({"x": entry([1], False, True, "U8")}, b"\0"),
    "offsets are floats": ({"x": entry([1], 0.0, 4.0)}, F4),
    "negative offset": ({"x": entry([1], -4, 0)}, F4),
    "end before begin": ({"x": entry([1], 4, 0)}, F4),
    "beyond the end": ({"x": entry([2], 0, 8)}, F4),
    "far beyond the end": ({"x": entry([1], 2**60, 2**60 + 4)}, F4),
    "truncated data": ({"x": entry([2], 0, 8)}, F4 + b"\0\0\0"),
    "overlap": ({"x": entry([1], 0, 4), "y": entry([1], 2, 6)}, F4 + b"\0\0"),
    "the same bytes twice": ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, F4),
    "hole": ({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, F4 * 3),
    "hole at the start": ({"x": entry([1], 4, 8)}, F4 * 2),
    "bytes after the end": ({"x": entry([1], 0, 4)}, F4 + b"\0"),
    "data, but no tensor": ({}, F4),
    "empty tensor within another": ({"x": entry([1], 0, 4), "y": entry([0], 2, 2)}, F4),
    "65 dimensions": ({"x": entry([1] * 65, 0, 4)}, F4),
    "header in UTF-16": (json.dumps({"x": entry([1], 0, 4)}).encode("utf-16"), F4),
    "header in UTF-16 without a mark": (json.dumps({"x": entry([1], 0, 4)}).encode("utf-16-le"),
                                        F4),
    "header in UTF-32": (json.dumps({"x": entry([1], 0, 4)}).encode("utf-32"), F4),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"x": entry([1], 0, 4)}).encode(), F4),
    "a space before the header": (" " + json.dumps({"x": entry([1], 0, 4)}), F4),
    "a line feed before the header": ("\n" + json.dumps({"x": entry([1], 0, 4)}), F4),
    "overlong UTF-8": (b'{"\xc0\xaf":%s}' % json.dumps(entry([1], 0, 4)).encode(), F4),
    "half a surrogate pair": ('{"\\ud83d":%s}' % json.dumps(entry([1], 0, 4)), F4),
    "half a surrogate pair in UTF-8": (
        b'{"\xed\xa0\xbd":%s}' % json.dumps(entry([1], 0, 4)).encode(), F4),
    "metadata is a list": ({"__metadata__": ["a"]}, b""),
    "metadata is text": ({"__metadata__": "a"}, b""),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b""),
    "metadata with null": ({"__metadata__": {"a": None}}, b""),
    "metadata with metadata": ({"__metadata__": {"a": {}}}, b""),
    "metadata with half a pair": ('{"__metadata__":{"a":"\\udc00"}}', b""),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', b""),
    "minus zero as an offset": ('{"x":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', F4),
    "minus zero as a size": ('{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
    "a size of 2^47 squared times 0": ({"x": entry([2**47, 2**47, 0], 0, 0)}, b""),
    "0 first, then a size of 2^94": ({"x": entry([0, 2**47, 2**47], 0, 0)}, b""),
    "an offset of 1e0": ('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1e0]}}', b"1"),
    "an offset of 01": ('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,01]}}', b"1"),
    "an offset of 2^64 + 4": ({"x": entry([1], 0, 2**64 + 4)}, F4),
    "a comma too many": ('{"x":%s,}' % json.dumps(entry([1], 0, 4)), F4),
    "a comment": ('{"x":%s /* */}' % json.dumps(entry([1], 0, 4)), F4),
    "a NUL after the header": (json.dumps({"x": entry([1], 0, 4)}) + "\0", F4),
    "a raw line feed in a name": ('{"x\n":%s}' % json.dumps(entry([1], 0, 4)), F4),
    "lower-case type": ({"x": entry([1], 0, 4, "f32")}, F4),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n",
    "an error page": b"<html>404</html>",
    "a million dimensions": ({"x": entry([1] * 1_000_000, 0, 4)}, F4),
}


def write_hostile(path, case):
    """Write the file of a case of HOSTILE: its bytes, or header and data."""
    if isinstance(HOSTILE[case], bytes):
        path.write_bytes(HOSTILE[case])
        return path
    return file_of(path, *HOSTILE[case])


@pytest.fixture
def little_memory():
    """At most 300 MB more than what the process has now; beyond that an allocation fails."""
    resource = pytest.importorskip("resource")
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        pytest.skip("needs /proc")
    old = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + 300 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case, little_memory):
    """Each is a DoRAError of one line, not too long, that names the file and the remedy; memory
    does not grow with what the file claims."""
    path = write_hostile(tmp_path / "bad.safetensors", case)
    with pytest.raises(DoRAError, match=re.escape(str(path))) as error:
        read_safetensors(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < len(str(path)) + 400
    assert re.search("again|git lfs pull", text)


def test_a_million_entries_that_overlap(tmp_path):
    """T14: 1,000,000 entries on the same four bytes are refused in at most four times the time of
    parsing their JSON alone (twice; an earlier form took five times as long as this one)."""
    header = "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
                            for i in range(1_000_000)) + "}"
    path = file_of(tmp_path / "x", header, F4)
    start = time.process_time()
    json.loads(header)
    parsing = time.process_time() - start
    start = time.process_time()
    with pytest.raises(DoRAError, match="its place is 4 to 8"):
        read_safetensors(path)
    assert time.process_time() - start < 4 * parsing


@pytest.mark.parametrize("shape", [[0, 2**30, 2**30, 2**30], [2**47, 0, 2**47], [0] + [2**40] * 20])
def test_empty_tensors_of_absurd_shape(tmp_path, shape):
    """T11: no data but sizes whose product is beyond 64 bits: a DoRAError or an empty tensor of
    this shape, never another exception."""
    path = file_of(tmp_path / "x", {"x": entry(shape, 0, 0)})
    try:
        assert list(read_safetensors(path)["x"].shape) == shape
    except DoRAError:
        pass


def test_a_file_that_is_not_there(tmp_path):
    """A missing file and a folder are an OSError that names it: the command line prints its
    name."""
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(OSError) as error:
            read_safetensors(path)
        assert error.value.filename == str(path) or error.value.filename == path
