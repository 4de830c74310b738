"""`rwkv pull`, from a server on loopback that speaks the hub's API."""

import hashlib
import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import Result
from extras import needs

from rwkv_cli.engine import library

needs("huggingface_hub", "dev")

Run = Callable[..., Result]
COMMIT = "c" * 40


class Hub:
    """A hub with repositories of files, which may fail in some ways."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        """The status and the error code that asking for a repository gets."""
        self.cut: list[int] = []
        """After how many bytes the next answers with a file end; then connections for files are refused."""
        self.broken = False
        self.ranges = True
        self.lies: dict[str, str] = {}
        """Wrong hashes of files."""
        self.asked: list[tuple[str, str | None]] = []
        """The paths that were asked for, each with its range."""
        self.tokens: set[str | None] = set()

    def info(self, name: str) -> dict[str, Any]:
        """The API's answer about a repository. Large files are those of Git LFS."""
        siblings: list[dict[str, Any]] = []
        for file, data in self.repositories[name].items():
            sibling = {"rfilename": file, "size": len(data), "blobId": git_digest(data)}
            if len(data) > 1000:
                digest = self.lies.get(file, hashlib.sha256(data).hexdigest())
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": name, "sha": COMMIT, "siblings": siblings}


def git_digest(data: bytes) -> str:
    """The name that git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    """The hub's side of the protocol."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append((path, self.headers["Range"]))
            hub.tokens.add(self.headers["Authorization"])
            if path.startswith("/api/models/"):
                self.answer_api(path.removeprefix("/api/models/"))
                return
            owner, name, verb, commit, file = path.lstrip("/").split("/", 4)
            assert (verb, commit) == ("resolve", COMMIT)
            self.answer_file(hub.repositories[f"{owner}/{name}"][file])

        def answer_api(self, name: str) -> None:
            status, code = hub.refusals.get(name, (200 if name in hub.repositories else 404, "RepoNotFound"))
            body = json.dumps(hub.info(name)).encode() if status == 200 else b'{"error": "no"}'
            self.send_response(status)
            if status != 200 and code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer_file(self, data: bytes) -> None:
            if hub.broken:
                self.send_error(503)
                return
            start = 0
            if hub.ranges and self.headers["Range"]:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if hub.cut:
                self.wfile.write(data[start : start + hub.cut.pop(0)])
                hub.broken = not hub.cut
                self.close_connection = True
                return
            self.wfile.write(data[start:])

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that runs, and an empty models folder."""
    from rwkv_cli.engine import pulling

    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("RWKV_MODELS", str(tmp_path / "models"))
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        monkeypatch.setattr(pulling.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        yield hub
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint over bytes."""
    path = tmp_path_factory.mktemp("pull") / "a.pth"
    return tiny.write_pth(path, tiny.weights("7", layers=1, vocab=256)).read_bytes()


def refused(result: Result, says: str) -> None:
    """A pull ended with a sentence after it had said what it downloads."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(f"(Downloading .*\n)?Error: .*{says}.*\n", result.stderr), result.stderr


def left(tmp_path: Path) -> list[str]:
    """All files of the models folder."""
    folder = tmp_path / "models"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_only_checkpoint_is_pulled_and_converted(rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path) -> None:
    hub.repositories["BlinkDL/one"] = {"README.md": b"hello", "rwkv7-g1a.pth": pth}
    result = rwkv("pull", "BlinkDL/one")
    assert (result.exit_code, result.stdout) == (0, "rwkv7-g1a.int8\n"), result.output
    assert "rwkv chat -m rwkv7-g1a.int8" in result.stderr
    assert left(tmp_path) == ["rwkv7-g1a.int8.json", "rwkv7-g1a.int8.safetensors"]
    assert not (tmp_path / "models" / "downloads").exists()
    assert rwkv("generate", "a", "-n", 2, "-m", "rwkv7-g1a").exit_code == 0
    assert hub.tokens == {"Bearer secret"}
    asked = [path for path, _ in hub.asked]
    assert asked == ["/api/models/BlinkDL/one", f"/BlinkDL/one/resolve/{COMMIT}/rwkv7-g1a.pth"]

    hub.asked.clear()
    again = rwkv("pull", "BlinkDL/one")
    assert (again.exit_code, again.stdout) == (0, "rwkv7-g1a.int8\n")
    assert "is there already" in again.stderr
    assert [path for path, _ in hub.asked] == ["/api/models/BlinkDL/one"]


def test_a_changed_checkpoint_is_pulled_again(rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path) -> None:
    hub.repositories["a/b"] = {"m.pth": pth}
    assert rwkv("pull", "a/b", "--keep", "--quant", "none").stdout == "m.float\n"
    assert left(tmp_path) == ["downloads/a/b/m.pth", "m.float.json", "m.float.safetensors"]
    other = tiny.write_pth(tmp_path / "other.pth", tiny.weights("7", layers=1, vocab=256, seed=1)).read_bytes()
    assert len(other) == len(pth)
    hub.repositories["a/b"] = {"m.pth": other}
    before = (tmp_path / "models" / "m.float.safetensors").read_bytes()
    assert rwkv("pull", "a/b", "--quant", "none").exit_code == 0
    assert (tmp_path / "models" / "m.float.safetensors").read_bytes() != before
    assert left(tmp_path) == ["m.float.json", "m.float.safetensors"]


def test_several_checkpoints_are_listed(rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path) -> None:
    hub.repositories["a/b"] = {
        "x.pth": pth,
        "old/y.gguf": pth,
        "model-00001-of-00002.safetensors": pth,
        "model-00002-of-00002.safetensors": pth,
        "pytorch_model.bin": pth,
        "optimizer.bin": pth,
        "config.json": b"{}",
        "../evil.pth": pth,
        "/evil.pth": pth,
    }
    result = rwkv("pull", "a/b")
    assert result.exit_code == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["checkpoint", "MB"]
    assert [line[0] for line in lines[1:]] == ["model-00001-of-00002.safetensors", "x.pth", "old/y.gguf"]
    assert "has 3 checkpoints; name one, such as: rwkv pull a/b/model-00001-of-00002.safetensors" in result.stderr
    tiny.refused(rwkv("pull", "a/b/z.pth"), "a/b: has no checkpoint z.pth; it has model-00001.*, x.pth, old/y.gguf")
    assert left(tmp_path) == []
    assert rwkv("pull", "a/b/x.pth").stdout == "x.int8\n"
    assert not any("evil" in path or "model-" in path for path, _ in hub.asked)
    hub.repositories["a/b"] = {"README.md": b""}
    tiny.refused(rwkv("pull", "a/b"), "a/b: has no checkpoint")


def test_a_folder_comes_with_what_belongs_to_it(rwkv: Run, hub: Hub, tmp_path: Path) -> None:
    """A sharded model with its tokenizer: the vocabulary has 300 tokens, so that conversion finds it there only."""
    weights = tiny.weights("7", layers=1, vocab=65536 // 512 + 172)
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    files = {
        f"sub/model-0000{n}-of-00002.safetensors": tiny.write_safetensors(tmp_path / "part", part).read_bytes()
        for n, part in enumerate(parts, 1)
    }
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    files["sub/config.json"] = b'{"eos_token_id": 0}'
    files["sub/chat_template.jinja"] = template.encode()
    files["sub/modeling.py"] = b"raise SystemExit"
    hub.repositories["a/b"] = files
    result = rwkv("pull", "https://huggingface.co/a/b/blob/main/sub/model-00002-of-00002.safetensors")
    assert (result.exit_code, result.stdout) == (0, "sub.int8\n"), result.output
    assert json.loads(rwkv("info", "sub", "--json").stdout)["template"] == "own"
    assert not any("modeling" in path for path, _ in hub.asked)
    assert left(tmp_path) == ["sub.int8.json", "sub.int8.safetensors"]


def test_a_cut_connection_goes_on_at_once(rwkv: Run, hub: Hub, pth: bytes) -> None:
    hub.repositories["a/b"] = {"m.pth": pth}
    hub.cut = [1000, 2000, len(pth)]
    assert rwkv("pull", "a/b").exit_code == 0
    assert [ranged for path, ranged in hub.asked if "resolve" in path] == [None, "bytes=1000-", "bytes=3000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_the_next_command_goes_on_where_a_download_stopped(
    rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path, ranges: bool
) -> None:
    """A server that knows no ranges sends all of it again."""
    hub.repositories["a/b"] = {"m.pth": pth}
    hub.cut = [5000]
    refused(rwkv("pull", "a/b"), "a/b: http://127.0.0.1:.* answers 503 Service Unavailable; try again later")
    (part,) = (tmp_path / "models").rglob("*.part")
    assert part.read_bytes() == pth[:5000]
    hub.broken, hub.ranges = False, ranges
    hub.asked.clear()
    assert rwkv("pull", "a/b").exit_code == 0
    assert [ranged for path, ranged in hub.asked if "resolve" in path] == ["bytes=5000-"]
    assert left(tmp_path) == ["m.int8.json", "m.int8.safetensors"]


def test_a_wrong_hash_deletes_the_download(rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path) -> None:
    hub.repositories["a/b"] = {"m.pth": pth}
    hub.lies["m.pth"] = "0" * 64
    refused(rwkv("pull", "a/b"), r"m\.pth: its hash is \w{12}…, and the hub's is 000000000000…, .*again")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", "a/b: http://.* has no such repository, or it is private; .*HF_TOKEN"),
        (401, "", "a/b: http://.* has no such repository, or it is private; .*HF_TOKEN"),
        (401, "GatedRepo", "a/b: its owner has to let you in: ask for it at http://.*/a/b, then log in"),
        (403, "GatedRepo", "a/b: its owner has to let you in"),
        (403, "", "a/b: http://.* answers 403 Forbidden; put a token into .HF_TOKEN that may read it"),
        (500, "", "a/b: http://.* answers 500 Internal Server Error; try again later"),
    ],
)
def test_a_refusal_is_said_in_a_sentence(rwkv: Run, hub: Hub, status: int, code: str, says: str) -> None:
    hub.repositories["a/b"] = {}
    hub.refusals["a/b"] = (status, code)
    tiny.refused(rwkv("pull", "a/b/m.pth"), says)


@pytest.mark.parametrize("word", ["model", "a/..", "../b", "a b/c", "", "https://huggingface.co/", "a/b/../../c"])
@pytest.mark.usefixtures("hub")
def test_what_names_no_repository_is_refused(rwkv: Run, word: str) -> None:
    result = rwkv("pull", "--", word)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("hub")
def test_no_hub_is_said_in_a_sentence(rwkv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    tiny.refused(rwkv("pull", "a/b"), "a/b: http://127.0.0.1:1 cannot be reached .*; check the connection")
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    tiny.refused(rwkv("pull", "a/b"), "a/b: no address cannot be reached")


def test_a_full_disk_is_said_before_and_meanwhile(
    rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["a/b"] = {"m.pth": pth}
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        refused(rwkv("pull", "a/b"), "GB are to come, and 0.00 GB are free; make room")

    class Full:
        """A file on a full disk."""

        def __init__(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rwkv_cli.engine.pulling.http_get", Full)
        refused(rwkv("pull", "a/b"), r"m\.pth.*\.part: No space left on device; the same command goes on")
    assert rwkv("pull", "a/b").exit_code == 0


def test_two_downloads_of_one_file_do_not_mix(rwkv: Run, hub: Hub, pth: bytes, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    hub.repositories["a/b"] = {"m.pth": pth}
    hub.cut = [5000]
    rwkv("pull", "a/b")
    hub.broken = False
    (part,) = (tmp_path / "models").rglob("*.part")
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(rwkv("pull", "a/b"), "another process is downloading it")
    assert rwkv("pull", "a/b").exit_code == 0


def test_what_does_not_convert_is_kept(rwkv: Run, hub: Hub, tmp_path: Path) -> None:
    data = tiny.write_pth(tmp_path / "odd.pth", {"weight": tiny.weights("7")["emb.weight"]}).read_bytes()
    hub.repositories["a/b"] = {"odd.pth": data}
    result = rwkv("pull", "a/b")
    assert result.exit_code == 1
    assert f"The download is kept: {tmp_path / 'models' / 'downloads' / 'a' / 'b' / 'odd.pth'}" in result.stderr
    assert library.names() == []
