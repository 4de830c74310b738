"""Checkpoints on a hub of Hugging Face's kind: what a repository has, and downloads that go on where they stopped.

Only the library's requests are used. Its own downloads begin anew after a process has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get

from rwkv_cli.engine import library
from rwkv_cli.engine.bars import Bar
from rwkv_cli.engine.conversion import ENDINGS
from rwkv_cli.errors import PullError, reason
from rwkv_cli.quant.replacing import lock

constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
# The library reads so many bytes at a time. It would be 10 MB, which are lost when a connection breaks.
constants.HF_HUB_DISABLE_TELEMETRY = True
# The library would tell the hub what else runs here, and ask it for what to look for.

_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the library that makes the requests, which is not always the same one."""

_PART_OF_FOLDER = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin)$")
"""Names of weights that are one checkpoint together with all such files in their folder."""

_NO_CHECKPOINT = re.compile(r"(training_args|optimizer|scheduler|rng_state)")
"""Beginnings of names of what training programs keep beside a checkpoint."""

_BESIDE_FILE = re.compile(
    r"((20B_)?tokenizer\.json|tokenizer_config\.json|chat_template\.jinja|vocab\.json|rwkv_vocab_.*\.txt)$"
)
"""Names of files that conversion looks for beside a checkpoint of one file."""


@dataclass(frozen=True)
class Remote:
    """A file of a repository."""

    name: str
    size: int
    digest: str
    """The file's SHA-256 in hexadecimal, or git's SHA-1 of a small file."""


@dataclass(frozen=True)
class Choice:
    """A checkpoint of a repository: one file, or the weights of a folder."""

    name: str
    """The file that names it, the first one of several."""
    weights: tuple[Remote, ...]
    beside: tuple[Remote, ...]
    """Small files that conversion needs or may need."""
    is_folder: bool

    @property
    def files(self) -> tuple[Remote, ...]:
        return self.weights + self.beside

    @property
    def size(self) -> int:
        return sum(remote.size for remote in self.files)


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, and the checkpoints in it."""

    name: str
    commit: str
    choices: tuple[Choice, ...]

    @property
    def folder(self) -> Path:
        """The folder of its files on this machine."""
        return library.folder() / "downloads" / self.name

    def choice(self, file: str) -> Choice:
        """Find the checkpoint that a file belongs to. Raises PullError if there is none."""
        for choice in self.choices:
            if any(file == remote.name for remote in choice.weights):
                return choice
        known = ", ".join(choice.name for choice in self.choices[:10])
        raise PullError(f"{self.name}: has no checkpoint {file}; it has {known or 'none at all'}")

    def origin(self, choice: Choice, quantization: str) -> library.Origin:
        """Describe where a model comes from that is made of this checkpoint."""
        state: list[list[Any]] = [[remote.name, remote.size, remote.digest] for remote in choice.files]
        return library.Origin(f"hub:{self.name}/{choice.name}", state, quantization)

    def path(self, choice: Choice) -> Path:
        """Return where the checkpoint lies once it is downloaded: a file or a folder."""
        path = self.folder / choice.name
        return path.parent if choice.is_folder else path


def split(word: str) -> tuple[str, str | None]:
    """Split OWNER/NAME/FILE, or a link to it, into the repository and the file, if there is one. Raises PullError."""
    short = re.sub(r"^https?://[^/]+/", "", word.strip().rstrip("/"))
    short = re.sub(r"^([^/]+/[^/]+)/(blob|resolve|tree)/main(?=/|$)", r"\1", short)
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", short)
    if not found:
        raise PullError(f"{word}: names no repository; give OWNER/NAME, or OWNER/NAME/FILE")
    return found[1], found[2]


def endpoint() -> str:
    """Return the hub's address: $HF_ENDPOINT, else Hugging Face's."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def open_repository(name: str) -> Repository:
    """Ask the hub what a repository has. Raises PullError."""
    with _worded(name):
        info = HfApi(endpoint()).model_info(name, files_metadata=True, timeout=30)
    remotes = []
    for file in info.siblings or []:
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        path = PurePosixPath(file.rfilename)
        inside = not path.is_absolute() and ".." not in path.parts and not re.search(r'[\\:"<>|?*\0]', file.rfilename)
        if inside and file.size is not None and digest:
            remotes.append(Remote(str(path), file.size, digest))
    return Repository(name, info.sha or "main", tuple(_choices(remotes)))


def _choices(remotes: list[Remote]) -> Iterator[Choice]:
    """Find the checkpoints among the files of a repository."""
    folders: dict[PurePosixPath, dict[str, Remote]] = defaultdict(dict)
    for remote in sorted(remotes, key=lambda remote: remote.name):
        path = PurePosixPath(remote.name)
        folders[path.parent][path.name] = remote
    for files in folders.values():
        parts = [remote for name, remote in files.items() if _PART_OF_FOLDER.match(name)]
        safe = [remote for remote in parts if remote.name.endswith(".safetensors")]
        if parts:
            small = [remote for name, remote in files.items() if name.endswith((".json", ".jinja", ".txt"))]
            yield Choice((safe or parts)[0].name, tuple(safe or parts), tuple(small), is_folder=True)
        for name, remote in files.items():
            path = PurePosixPath(name)
            if path.suffix.lower() not in ENDINGS or remote in parts or _NO_CHECKPOINT.match(name):
                continue
            own = f"{path.stem}.tokenizer.json"
            small = [other for beside, other in files.items() if _BESIDE_FILE.match(beside) or beside == own]
            yield Choice(remote.name, (remote,), tuple(small), is_folder=False)


def download(repository: Repository, choice: Choice, bar: Bar, check_bar: Bar) -> Path:
    """Download a checkpoint, or what is missing of it, and check its hashes. Returns its path.

    What has arrived stays when this fails, and the next call goes on there. Raises PullError and OSError.
    """
    folder = repository.folder
    folder.mkdir(parents=True, exist_ok=True)
    _delete_wrong(folder, [remote for remote in choice.files if (folder / remote.name).is_file()], check_bar)
    missing = [remote for remote in choice.files if not (folder / remote.name).is_file()]
    _check_room(folder, sum(remote.size - _arrived(folder, remote) for remote in missing))
    with bar(sum(remote.size for remote in missing)) as advance, _worded(repository.name):
        for remote in missing:
            _fetch(repository, remote, advance)
    for remote, digest in _delete_wrong(folder, missing, check_bar):
        raise PullError(
            f"{folder / remote.name}: its hash is {digest[:12]}…, and the hub's is {remote.digest[:12]}…, so it is "
            "damaged and was deleted; run the same command again"
        )
    return repository.path(choice)


def _check_room(folder: Path, size: int) -> None:
    """Refuse to download more than the disk has room for."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise PullError(
            f"{folder}: {size / 1e9:.2f} GB are to come, and {free / 1e9:.2f} GB are free; make room, or name another "
            "folder with $RWKV_MODELS"
        )


def remove(repository: Repository, choice: Choice) -> None:
    """Delete a downloaded checkpoint, and the folders that are empty then."""
    for remote in choice.files:
        path = repository.folder / remote.name
        path.unlink(missing_ok=True)
        for parent in path.parents[: len(path.relative_to(library.folder()).parts) - 1]:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _part(folder: Path, remote: Remote) -> Path:
    """Return the file that a download grows in. A newer file of the same name has another one."""
    path = folder / remote.name
    return path.with_name(f"{path.name}.{remote.digest[:12]}.part")


def _arrived(folder: Path, remote: Remote) -> int:
    """Return how many bytes of a file that is not whole are here."""
    part = _part(folder, remote)
    return min(part.stat().st_size, remote.size) if part.is_file() else 0


def _fetch(repository: Repository, remote: Remote, advance: Callable[[int], object]) -> None:
    """Download what is missing of a file."""
    path, part = repository.folder / remote.name, _part(repository.folder, remote)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("ab") as file:
            if lock(file) is False:
                raise PullError(f"{part}: another process is downloading it; wait for its end")
            if file.tell() > remote.size:
                file.truncate(0)
            advance(file.tell())
            while file.tell() < remote.size:
                _receive(repository, remote, file, advance)
        part.replace(path)
    except OSError as error:
        if error.errno is None or isinstance(error, HfHubHTTPError):
            raise
        raise OSError(error.errno, f"{error.strerror}; the same command goes on where it stopped", str(part)) from None


def _receive(repository: Repository, remote: Remote, file: BinaryIO, advance: Callable[[int], object]) -> None:
    """Append to a file what the hub sends of the rest. It is no error if a connection breaks after something came."""
    have = file.tell()

    class Meter:
        """A stand-in for the library's bar. It counts the bytes, and where a server begins anew, it goes back."""

        def __init__(self, initial: int = 0, **_: object) -> None:
            advance(initial - have)

        def update(self, count: int) -> None:
            advance(count)

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    token = get_token()
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    url = hf_hub_url(repository.name, remote.name, revision=repository.commit, endpoint=endpoint())
    meter: Any = Meter
    try:
        http_get(url, file, resume_size=have, headers=headers, tqdm_class=meter)
    except (_HTTPError, OSError) as error:
        of_system = isinstance(error, OSError) and error.errno is not None
        if of_system or isinstance(error, HfHubHTTPError) or file.tell() == have:
            raise
    if file.tell() > remote.size:
        file.truncate(0)
        raise PullError(
            f"{repository.name}: the hub sends more of {remote.name} than it says; try another $HF_ENDPOINT"
        )


def _delete_wrong(folder: Path, remotes: list[Remote], bar: Bar) -> list[tuple[Remote, str]]:
    """Compare files with their hashes. Those that differ are deleted, and returned with the hash that they have."""
    wrong = []
    with bar(sum(remote.size for remote in remotes)) as advance:
        for remote in remotes:
            path = folder / remote.name
            of_git = len(remote.digest) == 40
            found = hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False) if of_git else hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
                    advance(len(block))
            if found.hexdigest() != remote.digest:
                path.unlink()
                wrong.append((remote, found.hexdigest()))
    return wrong


@contextlib.contextmanager
def _worded(name: str) -> Iterator[None]:
    """Say in a sentence why a hub does not give what it was asked for."""
    hub = endpoint()
    try:
        yield
    except PullError:
        raise
    except GatedRepoError:
        raise PullError(
            f"{name}: its owner has to let you in: ask for it at {hub}/{name}, then log in with `hf auth login`, or "
            "put your token into $HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 404):  # it is not said which repositories there are
            raise PullError(
                f"{name}: {hub} has no such repository, or it is private; check the name, or put your token into "
                "$HF_TOKEN"
            ) from None
        advice = "put a token into $HF_TOKEN that may read it" if status == 403 else "try again later"
        raise PullError(f"{name}: {hub} answers {status} {error.response.reason_phrase}; {advice}") from None
    except OfflineModeIsEnabled:
        raise PullError(f"{name}: $HF_HUB_OFFLINE forbids to ask {hub}; unset it") from None
    except (_HTTPError, ValueError) as error:  # also what is no JSON, or is no address
        why = str(error).partition("\n")[0] or type(error).__name__
        raise PullError(
            f"{name}: {hub} cannot be reached ({why}); check the connection, and run the same command again"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise PullError(f"{name}: {hub}: {reason(error)}; run the same command again") from None
