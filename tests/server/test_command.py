"""The command `rwkv serve`: its options, its settings, and its end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client import stream

from rwkv_cli.errors import DraftError
from rwkv_cli.server.hosting import Usual


@contextmanager
def command(*options: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`rwkv serve` as a process, and its port."""
    line = [sys.executable, "-P", "-m", "rwkv_cli", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = next((line for line in process.stderr if line.startswith("Serving ")), "")
            port = re.search(r":([0-9]+)/v1", said)
            assert port, said
            yield process, int(port[1])
        finally:
            process.kill()


def test_sigterm_lets_answers_end_and_ctrl_c_does_not(byte_model: Path) -> None:
    name = byte_model.name.removesuffix(".safetensors")
    endless = {"model": name, "logit_bias": {"65": 100}, "max_tokens": 4000}
    with (
        command("-m", byte_model, "--cache-disk", "0") as (process, port),
        stream(port, **endless),
        stream(port, **{**endless, "max_tokens": 50}) as short,
    ):
        process.send_signal(signal.SIGTERM)
        assert b"data: [DONE]" in b"".join(iter(lambda: short.recv(1 << 16), b""))
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5  # it is a tenth of a second where nothing else runs
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_states_outlive_the_server(byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_cli.engine import prefixes
    from rwkv_cli.engine.model import LanguageModel

    monkeypatch.setattr(prefixes, "_CLOSING", 10.0)
    model = LanguageModel.load(byte_model)
    ids = list(b"Once upon a time")
    for known in (0, len(ids)):
        kept = prefixes.Prefixes(prefixes.Bounds(memory=1 << 20, disk=1 << 20, folder=tmp_path / "states"))
        states = prefixes.ModelPrefixes(kept, model)
        assert states.find([*ids, 5])[1] == known
        states.keep(ids, model.forward(ids)[1])
        kept.close()
    assert (tmp_path / "states").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--host", "0.0.0.0"), "give --api-key KEY, or --no-auth"),
        (("--api-key", ""), "an empty key is none"),
        (("--port", "70000"), "--port"),
    ],
)
def test_unsafe_options_are_refused(rwkv: Callable[..., Any], options: tuple[str, ...], says: str) -> None:
    result = rwkv("serve", *options)
    assert result.exit_code == 2
    assert says in result.output


def test_mistakes_are_sentences(rwkv: Callable[..., Any], byte_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = rwkv("serve", "-m", byte_model, "--port", taken.getsockname()[1])
    assert result.exit_code == 1
    assert "choose another with --host or --port" in result.output
    other = tmp_path / byte_model.name
    os.link(byte_model, other)
    result = rwkv("serve", "-m", byte_model, "-m", other)
    assert result.exit_code == 2
    assert "two models are named" in result.output
    result = rwkv("serve", "-m", tmp_path / "none.safetensors")
    assert result.exit_code == 1
    assert "none.safetensors" in result.output


def test_models_and_settings_are_those_of_config_toml(
    rwkv: Callable[..., Any], byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_cli.server import app

    hosts: list[Any] = []
    monkeypatch.setattr(app, "serve", lambda host, *_: hosts.append(host))
    monkeypatch.setenv("RWKV_MODELS", str(tmp_path))
    monkeypatch.setenv("RWKV_CONFIG", str(tmp_path / "config.toml"))
    for name in ("one-a", "two-b"):
        (tmp_path / f"{name}.safetensors").symlink_to(byte_model)
    settings = 'top-p = 0.4\n[serve]\nmodel = ["two", "one-a"]\ncache = 0\n[chat]\nthink = "short"\n'
    presets = '[presets.one]\ntemperature = 0.7\nsystem = "Be kind."\nseed = 3\n[presets.two]\ntemplate = "g1"\n'
    (tmp_path / "config.toml").write_text(settings + presets)
    result = rwkv("serve", "--port", 0)
    assert result.exit_code == 0, result.output
    two, one = hosts[0].models.values()
    assert (two.name, one.name) == ("two-b", "one-a")
    assert one.in_chats == Usual(sampling={"top_p": 0.4, "temperature": 0.7}, seed=3, system="Be kind.", think="short")
    assert one.elsewhere == Usual(sampling={"top_p": 0.4, "temperature": 0.7}, seed=3)
    assert two.in_chats == Usual(sampling={"top_p": 0.4}, template="g1", think="short")
    hosts[0].scheduler.close(0)
    (tmp_path / "config.toml").write_text("[presets.one]\ntemperature = -1\n")
    result = rwkv("serve", "-m", "one", "--port", 0)
    assert result.exit_code == 1
    assert "presets.one.temperature" in result.output
    (tmp_path / "config.toml").write_text('[presets.one]\nstyle = "assistant"\n')
    result = rwkv("serve", "-m", "one", "--port", 0)
    assert result.exit_code == 1
    assert "has no style assistant" in result.output


def test_who_guesses_ahead_is_opened_for_every_model(
    rwkv: Callable[..., Any], byte_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_cli.engine.drafting import DraftModel, PromptLookup
    from rwkv_cli.engine.model import LanguageModel
    from rwkv_cli.server import app

    hosts: list[Any] = []
    monkeypatch.setattr(app, "serve", lambda host, *_: hosts.append(host))
    same = DraftModel.__init__

    def begin(drafter: DraftModel, model: LanguageModel, of: LanguageModel) -> None:
        if "words" in of.path.name:
            raise DraftError(f"{model.path}: has another vocabulary than {of.path}")
        same(drafter, model, of)

    monkeypatch.setattr(DraftModel, "__init__", begin)
    words = tmp_path / "words.safetensors"
    words.symlink_to(byte_model)
    for options, kind in ((("--lookup",), PromptLookup), (("--draft", byte_model), DraftModel)):
        result = rwkv("serve", "-m", byte_model, "--port", 0, "--cache", 0, *options)
        assert result.exit_code == 0, result.output
        (hosted,) = hosts[-1].models.values()
        assert isinstance(hosts[-1].scheduler._speculation(hosted.model()).drafter, kind)
        hosts[-1].scheduler.close(0)
    result = rwkv("serve", "-m", words, "--port", 0, "--draft", byte_model)
    assert (result.exit_code, "another vocabulary" in result.output) == (1, True)
    result = rwkv("serve", "-m", byte_model, "-m", words, "--port", 0, "--cache", 0, "--draft", byte_model)
    assert result.exit_code == 0, result.output
    second = hosts[-1].models["words"].model()
    assert hosts[-1].scheduler._speculation(second) is None
    hosts[-1].scheduler.close(0)
    result = rwkv("serve", "-m", byte_model, "--port", 0, "--lookup", "--draft", byte_model)
    assert (result.exit_code, "exclude each other" in result.output) == (2, True)
