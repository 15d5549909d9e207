"""Files, good and broken: safetensors byte by byte, and damaged files of every kind through the
whole program. (The safetensors library's own files: peers/test_safetensors_library.py.)"""
import json
import os
import re
import shutil
import struct

import pytest
import torch
from small import numbers
from tiny import files, flags, read_json, run, run_settings

from dora import DTYPES, DoRAError, atomic_file, read_file, read_safetensors, write_safetensors
from train_glue import main


def file_of(path, header, data=b""):
    """A file by hand: length of the header, header (JSON text), data."""
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entries(*words):
    """A header by hand: each word is dtype,shape,begin,end of a tensor "0", "1", ..."""
    header = {}
    for name, word in enumerate(words):
        dtype, shape, begin, end = word.split(",")
        sizes = [int(size) for size in shape.split("x") if size]
        header[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [int(begin), int(end)]}
    return json.dumps(header)


def test_golden_bytes(tmp_path):
    """A file spelled out byte by byte reads as the two tensors it says, in any order of its
    entries, and at any byte: the I16 of the second file begins at an odd one."""
    text = ('{"n":{"dtype":"I16","shape":[3],"data_offsets":[16,22]},'
            '"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}')
    data = bytes.fromhex("0000803f" "00000040" "000040c0" "0000003f" "0100" "ffff" "0004")
    tensors = read_safetensors(file_of(tmp_path / "x", text, data))
    w, n = tensors["w"], tensors["n"]
    assert w.dtype == torch.float32 and n.dtype == torch.int16
    assert w.equal(numbers("1 2; -3 0.5").float())
    assert n.tolist() == [1, -1, 1024]

    odd = file_of(tmp_path / "y", entries("U8,1,0,1", "I16,1,1,3"), b"\7" + b"\0\4")
    u, n = read_safetensors(odd).values()
    assert u.item() == 7 and n.item() == 1024
    assert read_safetensors(file_of(tmp_path / "z", "{}")) == {}


def test_written_bytes(tmp_path):
    """A written file, taken apart by hand: length, a JSON header padded to 8 bytes, the data
    without a hole, each tensor on a multiple of its item size."""
    write_safetensors(tmp_path / "x", {
        "b": numbers("1 0 1").bool(), "h": numbers("1.5 -2").half(),
        "f": numbers("1 2 3;").float()})
    raw = (tmp_path / "x").read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + n])
    data = raw[8 + n:]
    assert n % 8 == 0 and len(data) == 12 + 4 + 3
    assert header.pop("__metadata__") == {"format": "pt"}
    found = {}
    for name, info in header.items():
        begin, end = info.pop("data_offsets")
        found[name] = data[begin:end]
        assert begin % {"f": 4, "h": 2, "b": 1}[name] == 0
    assert header == {"f": {"dtype": "F32", "shape": [1, 3]}, "h": {"dtype": "F16", "shape": [2]},
                      "b": {"dtype": "BOOL", "shape": [3]}}
    assert found["f"] == struct.pack("<3f", 1, 2, 3)
    assert found["b"] == b"\1\0\1"


def bits(tensor):
    """The bytes of a tensor: not every dtype can be compared, and NaN equals nothing."""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_round_trip(tmp_path):
    """Every type, scalars, empty tensors, views and odd names read back bit for bit, with their
    metadata; a tensor that was read can be changed, and the file stays."""
    torch.manual_seed(0)
    x = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": x.T, "sliced": x[:, 1:3], "expanded": x[:1].expand(5, 4),
               "": x[0], "trained": torch.nn.Parameter(x), 'q"\\ é\n日本': x,
               "special": numbers("nan inf -inf -0.0 1e-45").float()}
    for name, dtype in DTYPES.items():
        for shape in ((), (0,), (3, 0, 2), (2, 1, 3)):
            tensor = torch.randn(shape).abs() * 100
            tensors[f"{name} {shape}"] = tensor.to(dtype)
    notes = {"task": "rte", "labels": 'a "b"\n\\ é日本', "": ""}
    path = tmp_path / "adapter_model.safetensors"
    write_safetensors(path, tensors, notes)
    back = read_safetensors(path)
    assert back.keys() == tensors.keys() and read_file(path)[1] == {"format": "pt", **notes}
    for name, tensor in tensors.items():
        found = back[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert bits(found) == bits(tensor) and not found.requires_grad
    raw = path.read_bytes()
    back["sliced"].fill_(7)
    assert path.read_bytes() == raw


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A type that the format lacks, an error half-way: the old content stays, and nothing else."""
    path = tmp_path / "folder" / "x"
    write_safetensors(path, {"x": torch.zeros(4)})
    old = path.read_bytes()
    with pytest.raises(DoRAError, match="'bad'.*complex128"):
        write_safetensors(path, {"x": torch.ones(4), "bad": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(OSError) as error, atomic_file(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert error.value.filename == str(path)
    assert path.read_bytes() == old and os.listdir(path.parent) == ["x"]


BROKEN = [  # whole content, or header and size of the data
    b"", struct.pack("<Q", 2**60) + b"{}", b"\0" * 100, b"<html>404</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n",
    ("{x", 0), ("[]", 0), ('{"x": {"dtype": "F32", "data_offsets": [0, 4]}}', 4),  # no shape
    (entries("F31,1,0,4"), 4), (entries("F64,1,0,4"), 4),
    (entries(f"F32,{2**40}x{2**40},0,4"), 4), (entries("F32,-1x-1,0,4"), 4),
    (entries("F32,2,0,4"), 4),  # shape and place disagree
    (entries("F32,2,0,8"), 7),  # truncated
    (entries("F32,1,0,4", "F32,1,2,6"), 6),  # overlap
    (entries("F32,1,0,4", "F32,1,8,12"), 12),  # a hole
    (entries("F32,1,4,8"), 8),  # a hole at the start
    (entries("F32,1,0,4"), 5)]  # bytes after the end


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(tmp_path, case):
    """Each is a DoRAError of one line, not too long, that names the file and a remedy."""
    path = tmp_path / "bad.safetensors"
    if isinstance(case, bytes):
        path.write_bytes(case)
    else:
        header, size = case
        file_of(path, header, bytes(size))
    with pytest.raises(DoRAError, match=re.escape(str(path))) as error:
        read_safetensors(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < len(str(path)) + 400
    assert "again" in text and "git lfs pull" in text


@pytest.fixture
def place(tmp_path):
    """(data_dir, model_dir): copies that a test may break."""
    data_dir, model_dir = files()
    shutil.copytree(data_dir / "toy", tmp_path / "d" / "toy")
    shutil.copytree(model_dir, tmp_path / "m")
    return tmp_path / "d", tmp_path / "m"


def refused(capsys, place, path, *words):
    """Assert that main on these folders returns 2 with one short line on stderr that names the
    file, makes no run folder and leaves the broken file as it is; return the line."""
    data_dir, model_dir = place
    before = path.read_bytes() if path.exists() else None
    out = data_dir.parent / "out"
    capsys.readouterr()
    settings = run_settings(out, data_dir=data_dir, model_dir=model_dir)
    code = main([*flags(**settings), *words])
    error = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in error and len(error) < 1200
    assert error.startswith("train_glue.py: error: ")
    assert str(path) in error or str(path.parent) in error
    assert not out.exists()
    assert (path.read_bytes() if path.exists() else None) == before
    return error


def broken(path):
    """Break a file in each way that people meet: missing, empty, zeros, a web page, cut in half."""
    raw = path.read_bytes()
    path.unlink()
    yield
    for content in (b"", b"\0\0\0", b"<html>404</html>", raw[:len(raw) // 2]):
        path.write_bytes(content)
        yield
    path.write_bytes(raw)


def test_broken_model_files(place, capsys):
    """Each file of the model's folder, broken in each way."""
    for name in ("config.json", "vocab.json", "merges.txt", "model.safetensors"):
        for _ in broken(place[1] / name):
            refused(capsys, place, place[1] / name)


def test_a_configuration_of_another_model(place, capsys):
    """Sizes that are not the weights', up to terabytes, and another architecture: refused."""
    path = place[1] / "config.json"
    config = read_json(path)
    for changes in (dict(hidden_size=2**23), dict(num_hidden_layers=99), dict(model_type="bert"),
                    dict(max_position_embeddings=10)):
        path.write_text(json.dumps({**config, **changes}))
        refused(capsys, place, path)


def test_broken_adapters(place, capsys, tmp_path):
    """--eval-only --adapter with either file broken, or with a matrix that the model lacks."""
    run(tmp_path / "run", max_steps=5, interval=1)
    adapter = tmp_path / "adapter"
    (tmp_path / "run" / "adapter").rename(adapter)  # elsewhere, as one that was sent
    words = ("--eval-only", "--adapter", str(adapter))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for _ in broken(adapter / name):
            refused(capsys, place, adapter / name, *words)
    path = adapter / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in read_safetensors(path).items()}
    A = next(key for key in tensors if "lora_A" in key)
    tensors[A.replace("layer.", "layer.7")] = tensors[A]
    write_safetensors(path, tensors)
    assert "layer.7" in refused(capsys, place, path, *words)
