"""Downloads of data.py against a server on this machine that misbehaves on demand."""
import io
import os
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import refused

import data

BODY = bytes(range(256)) * 1000


class Server:
    """Answers each path with its list of answers, one after the other, the last one for ever.

    An answer is bytes, an HTTP status, or (bytes, what is odd): a "short" answer announces more
    bytes than are sent, a "slow" one sends half of them late, a "chunked" one announces nothing.
    """
    def __init__(self):
        self.answers, self.asked, self.lock = {}, [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with outer.lock:
                    outer.asked.append(self.path)
                    queue = outer.answers.get(self.path, [404])
                    answer = queue.pop(0) if len(queue) > 1 else queue[0]
                body, odd = answer if isinstance(answer, tuple) else (answer, "")
                self.send_response(answer if isinstance(answer, int) else 200)
                body = b"" if isinstance(answer, int) else body
                if odd != "chunked":
                    self.send_header("Content-Length", str(len(body) + 5 * (odd == "short")))
                self.end_headers()
                try:
                    self.wfile.write(body[:len(body) // 2])
                    self.wfile.flush()
                    time.sleep(0.5 * (odd == "slow"))
                    self.wfile.write(body[len(body) // 2:])
                except OSError:
                    pass

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The two sources and the cache, tmp_path/cache (~ is the home folder)."""
    monkeypatch.setattr(data, "WAITS", (0, 0, 0))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DORA_CACHE", "~/cache")
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GLUE_ENDPOINT", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_complete_file(server, tmp_path):
    """A plain download, an empty file and one without a Content-Length, against their bytes."""
    server.answers = {"/a": [BODY], "/empty": [b""], "/c": [(BODY, "chunked")]}
    for file, body in (("a", BODY), ("empty", b""), ("c", BODY)):
        data.fetch(data.GLUE, file, tmp_path / "new/folder/x")
        assert (tmp_path / "new/folder/x").read_bytes() == body
    assert os.listdir(tmp_path / "new/folder") == ["x"]  # no temporary file is left


@pytest.mark.parametrize("trouble, says", [
    (500, ["500"]), (503, ["503"]), (429, ["429"]), ((BODY, "slow"), []),
    ((BODY, "short"), [f"{len(BODY)}", f"{len(BODY) + 5}"])])
def test_transient_trouble_is_tried_again(trouble, says, server, tmp_path, monkeypatch):
    """Twice a server error, a short answer or one that stops for too long, then the file: it
    arrives complete. Always trouble: an error after four attempts, and no file of any name."""
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    server.answers = {"/a": [trouble, trouble, BODY], "/b": [trouble]}
    data.fetch(data.HUB, "a", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and len(server.asked) == 3
    refused("/b", "--model-dir", *says, use=lambda: data.fetch(data.HUB, "b", tmp_path / "y"))
    assert len(server.asked) == 3 + 4 and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_not_tried_again(status, server, tmp_path):
    """A file that is missing or forbidden: asked once, with the status and the flag that helps."""
    server.answers = {"/a": [status]}
    refused(f"{status}", "/a", "--data-dir", use=lambda: data.fetch(data.GLUE, "a", tmp_path / "x"))
    assert len(server.asked) == 1 and os.listdir(tmp_path) == []


def test_without_a_network(tmp_path, monkeypatch):
    """A refused connection and an address without https://: one line with the remedy."""
    monkeypatch.setattr(data, "WAITS", (0,))
    monkeypatch.setenv("DORA_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("refused", "--model-dir", use=data.download_model)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    refused("hub.example", "HF_ENDPOINT", use=data.download_model)


def test_a_full_disk(server, tmp_path, monkeypatch):
    """Not tried again: the error names the file, and the old one stays."""
    server.answers = {"/a": [BODY]}
    (tmp_path / "x").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        data.fetch(data.HUB, "a", tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x") and len(server.asked) == 1
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


MODEL_FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def test_model(server, tmp_path, monkeypatch):
    """HF_ENDPOINT and DORA_CACHE are honoured, a second call asks for nothing, and a file that is
    missing is fetched alone. The default cache is ~/.cache/dora-glue."""
    server.answers = {f"/own/er-1.0/resolve/main/{f}": [f.encode()] for f in MODEL_FILES}
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    folder = data.download_model("own/er-1.0")
    assert folder == tmp_path / "cache/models/own--er-1.0"
    assert {f.name: f.read_text() for f in folder.iterdir()} == {f: f for f in MODEL_FILES}
    assert data.download_model("own/er-1.0") == folder
    assert len(server.asked) == 4
    (folder / "merges.txt").unlink()
    data.download_model("own/er-1.0")
    assert server.asked[4:] == ["/own/er-1.0/resolve/main/merges.txt"]
    monkeypatch.delenv("DORA_CACHE")
    assert data.cache_folder() == tmp_path / ".cache/dora-glue"


def zipped(members):
    """The bytes of a zip of {name: text}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


@pytest.mark.parametrize("name, source, folder, files", [
    ("qqp", "QQP-clean.zip", "QQP", ("train", "dev", "test")),
    ("mnli", "MNLI.zip", "MNLI", ("train", "dev_matched", "dev_mismatched", "test_matched",
                                 "test_mismatched"))])
def test_zipped_tasks(name, source, folder, files, server, tmp_path):
    """A zip gives the files that load_task reads, and no others; a second call asks nothing."""
    members = {f"{folder}/{file}.tsv": f"{file}\n" for file in files}
    other = {f"{folder}/original/x.txt": "x"}
    server.answers = {f"/glue/data/{source}": [zipped({**members, **other})]}
    for _ in range(2):
        assert data.download_task(name) == tmp_path / "cache/glue"
        found = (tmp_path / "cache/glue" / folder).iterdir()
        assert {f"{folder}/{f.name}": f.read_text() for f in found} == members
    assert len(server.asked) == 1
    assert set(data.TASKS[name].files.values()) == {f"{file}.tsv" for file in files}


GOOD = {f"RTE/{split}.tsv": f"{split}\n" * 50 for split in ("train", "dev", "test")}
DAMAGED = bytearray(zipped(GOOD))
DAMAGED[45:50] = b"\xff" * 5


@pytest.mark.parametrize("body, says", [
    (zipped({"RTE/train.tsv": "x"}), "RTE/dev.tsv"), (bytes(DAMAGED), ""),
    (zipped(GOOD)[10:], ""),  # zipfile seeks to -10, an OSError
    (zipped(GOOD)[:-30], "not a zip"), (b"<html>", "not a zip")])
def test_bad_zips(body, says, server, tmp_path):
    """Missing members, damaged archives: one line; the next call downloads again."""
    server.answers = {"/glue/data/RTE.zip": [body, zipped(GOOD)]}
    refused("RTE.zip", says, use=lambda: data.download_task("rte"))
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    assert files <= {f"cache/glue/{name}" for name in GOOD}
    data.download_task("rte")
    for name, text in GOOD.items():
        assert (tmp_path / "cache/glue" / name).read_text() == text


def test_mrpc_and_ax(server, tmp_path):
    """MRPC is built from Microsoft's two files, which have CRLF, and the list of dev pairs: the
    three files by hand. AX is one file, without a zip."""
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    train = header + "1\t1\t2\ta \"b\tc\r\n0\t3\t4\td\te\r\n1\t5\t6\tf\tg\r\n"
    senteval = "/senteval/senteval_data/msr_paraphrase_"
    server.answers = {senteval + "train.txt": [train.encode()],
                      senteval + "test.txt": [(header + "1\t7\t8\th\ti\r\n0\t9\t1\tj\tk").encode()],
                      "/glue/data/mrpc_dev_ids.tsv": [b"3\t4\n9\t9\n"]}
    folder = data.download_task("mrpc") / "MRPC"
    names = header[1:].replace("\r", "")
    assert (folder / "train.tsv").read_text() == names + "1\t1\t2\ta \"b\tc\n1\t5\t6\tf\tg\n"
    assert (folder / "dev.tsv").read_text() == names + "0\t3\t4\td\te\n"
    assert (folder / "test.tsv").read_text() == \
        names.replace("Quality", "index") + "0\t7\t8\th\ti\n1\t9\t1\tj\tk\n"
    data.download_task("mrpc")
    assert len(server.asked) == 3

    server.answers = {"/glue/data/AX.tsv": [b"index\tsentence1\tsentence2\n0\ta\tb\n"]}
    assert (data.download_task("ax") / "AX/test.tsv").read_bytes().count(b"\n") == 2


def test_a_task_without_a_source(monkeypatch):
    """A task of your own has nothing to download, and the message says so."""
    monkeypatch.setitem(data.TASKS, "mine", data.Task("mine", "m", ("a",), "b", ("accuracy",)))
    refused("mine", "m/", "--data-dir", use=lambda: data.download_task("mine"))
