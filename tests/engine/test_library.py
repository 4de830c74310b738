"""The models folder: what a word stands for, and which name a converted checkpoint gets."""

import os
from pathlib import Path

import pytest

from rwkv_cli.engine import library
from rwkv_cli.errors import ModelNameError

NAMES = ["rwkv7-g1a-0.1b.int8", "rwkv7-g1a-0.4b.int8", "RWKV-x060.float", "RWKV-x060.int8", "tiny"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with these names, and an empty folder to be in."""
    models = tmp_path / "models"
    models.mkdir()
    for name in NAMES:
        (models / f"{name}.safetensors").touch()
    (models / ".hidden.safetensors").touch()
    (models / "notes.txt").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("RWKV_MODELS", str(models))
    return models


def test_names_are_those_of_converted_files(folder: Path) -> None:
    assert library.names() == sorted(NAMES)
    assert library.folder() == folder


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("rwkv7-g1a-0.1b.int8", "rwkv7-g1a-0.1b.int8"),
        ("rwkv7-g1a-0.1b.int8.safetensors", "rwkv7-g1a-0.1b.int8"),
        ("rwkv7-g1a-0.4b", "rwkv7-g1a-0.4b.int8"),
        ("rwkv7-g1a-0.4", "rwkv7-g1a-0.4b.int8"),
        ("RWKV7-G1A-0.1", "rwkv7-g1a-0.1b.int8"),
        ("rwkv-x060.f", "RWKV-x060.float"),
        ("t", "tiny"),
    ],
)
def test_a_name_or_a_unique_beginning_of_one_is_enough(folder: Path, word: str, name: str) -> None:
    assert library.find(word) == folder / f"{name}.safetensors"


def test_a_whole_name_is_never_ambiguous(folder: Path) -> None:
    for name in ("tiny-2.int8", "tiny-20.int8", "tiny.int8"):
        (folder / f"{name}.safetensors").touch()
    assert library.find("tiny") == folder / "tiny.safetensors"
    assert library.find("tiny-2.int8") == folder / "tiny-2.int8.safetensors"
    assert library.find("tiny-2") == folder / "tiny-2.int8.safetensors"


def test_a_path_goes_before_a_name(folder: Path) -> None:
    Path("tiny").touch()
    assert library.find("tiny") == Path("tiny")
    assert library.find(str(folder / "notes.txt")) == folder / "notes.txt"
    with pytest.raises(FileNotFoundError):
        library.find("./rwkv7-g1a-0.1b.int8")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("rwkv7", r"rwkv7: may be rwkv7-g1a-0\.1b\.int8, rwkv7-g1a-0\.4b\.int8; give more of the name"),
        ("RWKV-x060", r"RWKV-x060: may be RWKV-x060\.float, RWKV-x060\.int8; give more"),
        ("tony", r"tony: No such file or directory, and no model has this name \(nearest: tiny\)"),
        ("zzz", r"zzz: No such .* \(known: RWKV-x060\.float, RWKV-x060\.int8, rwkv7-g1a-0\.1b\.int8, .*tiny\)"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_word_that_names_no_model_or_several_lists_candidates(word: str, says: str) -> None:
    with pytest.raises(ModelNameError, match=says):
        library.find(word)


def test_an_empty_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_MODELS", str(tmp_path / "none"))
    assert library.names() == []
    with pytest.raises(ModelNameError, match=f"the models folder {tmp_path / 'none'} is empty"):
        library.find("a")


def test_many_candidates_are_counted(folder: Path) -> None:
    for number in range(12):
        (folder / f"many-{number:02}.safetensors").touch()
    with pytest.raises(ModelNameError, match=r"many: may be many-00, .*, many-09 and 2 more; give"):
        library.find("many")


def write(origin: library.Origin, file: str) -> str:
    """Make a model of an origin, and return the name it got."""
    with library.place(origin, file) as path:
        path.write_text("weights")
    assert library.is_current(path, origin)
    return library.name_of(path)


def test_each_source_has_its_own_name(folder: Path, tmp_path: Path) -> None:
    """Training folders call every checkpoint the same. A source that has changed keeps its name."""
    origins = []
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        source = tmp_path / f"{number}" / "rwkv-final.pth"
        source.write_text("a")
        origins.append(library.Origin.of(source, "int8"))
    names = [write(origin, "rwkv-final.int8.safetensors") for origin in origins]
    assert names == ["rwkv-final.int8", "rwkv-final-2.int8", "rwkv-final-3.int8"]
    assert [library.made_from(origin) for origin in origins] == [folder / f"{name}.safetensors" for name in names]

    source.write_text("another")
    changed = library.Origin.of(source, "int8")
    path = library.made_from(changed)
    assert path == folder / "rwkv-final-3.int8.safetensors"
    assert not library.is_current(path, changed)
    assert write(changed, "rwkv-final.int8.safetensors") == "rwkv-final-3.int8"
    assert library.made_from(library.Origin.of(source, "none")) is None


def test_a_file_put_there_by_hand_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.pth").touch()
    origin = library.Origin.of(tmp_path / "tiny.pth", "int8")
    (folder / "tiny.int8.safetensors").write_text("mine")
    assert write(origin, "tiny.int8.safetensors") == "tiny-2.int8"
    assert (folder / "tiny.int8.safetensors").read_text() == "mine"


def test_a_failure_leaves_the_name_free(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    origin = library.Origin.of(tmp_path / "a.pth", "int8")
    with pytest.raises(OSError, match="full"), library.place(origin, "a.int8.safetensors"):
        raise OSError("full")
    assert not list(folder.glob("a*"))
    (folder / "b.int8.json").write_text("no record")
    assert library.made_from(origin) is None
    assert write(origin, "a.int8.safetensors") == "a.int8"


def test_the_last_use_is_kept_where_that_can_be_written(folder: Path) -> None:
    path = folder / "tiny.safetensors"
    assert library.last_used(path) is None
    library.note_use(path)
    os.utime(folder / "tiny.json", (1000, 1000))
    assert library.last_used(path) == 1000
    library.note_use(path)
    assert (library.last_used(path) or 0) > 1000
    library.remove("tiny")
    assert not list(folder.glob("tiny*"))
    library.note_use(folder.parent / "here" / "other.safetensors")
    assert not list((folder.parent / "here").iterdir())
