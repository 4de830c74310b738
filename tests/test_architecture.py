"""The house's rules, checked: who imports whom, what --help loads, twins and their Protocol, what is packaged."""

import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
BELOW = {
    "kernels": {"errors", "numbers"},
    "quant": {"errors", "numbers"},
    "models": {"errors", "numbers", "kernels", "quant"},
    "rwkv_cli": {"errors", "numbers", "kernels", "quant", "models"},
}
SOURCES = [path for folder in BELOW for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("kernels", "quant", "models"), f"{name}: write rwkv_cli.{name}"
        assert parts[0] not in ("torch", "rwkv"), f"{name} at run time"
        if parts[0] == "rwkv_cli" and len(parts) > 1:
            target = parts[1] if parts[1] in (*BELOW, "errors", "numbers") and here != "rwkv_cli" else "rwkv_cli"
            assert target == here or target in BELOW[here], f"{path} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_stays_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "says what it is"


def test_models_do_not_know_the_device() -> None:
    for path in (ROOT / "models").glob("*.py"):
        assert "cuda" not in path.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_is_its_protocol(device: str) -> None:
    from rwkv_cli.kernels.contract import Backend, Recorder

    if device == "cuda":
        pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (rwkv-cli[cuda])")
    module = importlib.import_module(f"rwkv_cli.kernels.{device}.{'lower' if device == 'cpu' else 'backend'}")
    for protocol, twin, bound in ((Backend, module, 0), (Recorder, module.Recorder, 1)):
        for name, method in inspect.getmembers(protocol, inspect.isfunction):
            if name.startswith("_"):
                continue
            wanted = [(p.name, p.default) for p in inspect.signature(method).parameters.values()][1:]
            found = [(p.name, p.default) for p in inspect.signature(getattr(twin, name)).parameters.values()][bound:]
            assert found == wanted, name


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rwkv_cli.main import cli\ncli(['--help'], standalone_mode=False)\nprint(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    for name in ("numpy", "numba", "numba_cuda", "cuda", "rich", "tokenizers", "safetensors"):
        assert f"'{name}'" not in done.stdout


def test_the_cpu_needs_nothing_of_cuda() -> None:
    code = "import sys, rwkv_cli.kernels.cpu.lower; print('numba_cuda' in sys.modules, 'cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_source_folder_is_packaged() -> None:
    """A folder that `packages` does not list would be missing from the wheel."""
    folders = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            folders.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert folders == set(SETUPTOOLS["packages"])
    assert {str(path.relative_to(ROOT)) for path in SOURCES} <= {
        str(file.relative_to(ROOT))
        for folder in SETUPTOOLS["package-dir"].values()
        for file in (ROOT / folder).rglob("*.py")
        if (file.parent / "__init__.py").is_file()
    }


def test_generic_names_are_not_ours() -> None:
    for name in ("kernels", "quant", "models"):
        spec = importlib.util.find_spec(name)
        assert spec is None or not str(spec.origin).startswith(str(ROOT))


def test_the_version_is_one() -> None:
    import rwkv_cli

    assert rwkv_cli.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("rwkv-cli")
    assert f"## {rwkv_cli.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert importlib.resources.files("rwkv_cli").joinpath("py.typed").is_file()


def test_dependencies_are_what_is_imported() -> None:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["plot"]]
    declared = {line.split(">")[0].split("=")[0].strip() for line in lines}
    used = {name.split(".")[0] for path in SOURCES for name in imports(path)} - set(sys.stdlib_module_names)
    # llvmlite comes with numba, cuda.bindings with numba-cuda, which is numba.cuda; rwkv is read as data
    assert used - {"rwkv_cli", "llvmlite", "cuda"} == declared - {"rwkv"}
    assert project["optional-dependencies"]["cuda"][0].startswith("numba-cuda[")


def test_the_kernel_cache_changes_with_any_kernel_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rwkv_cli.kernels import cache as jit

    folders = []
    for text in ("a", "b"):
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "cpu" / "other.py").write_text(text)
        monkeypatch.setattr(jit, "__file__", str(tmp_path / "cache.py"))
        folders.append(jit.cache_folder.__wrapped__())
    assert folders[0] != folders[1]


def test_the_kernel_cache_survives_a_read_only_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rwkv_cli.kernels import cache as jit

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(jit, "user_cache_path", lambda _: tmp_path / "file" / "below")
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = jit.cache_folder.__wrapped__()
    assert folder.is_dir()
    assert folder.parent.parent == tmp_path
    # a folder that others can write to could hold anybody's code
    folder.parent.chmod(0o777)
    monkeypatch.setattr(jit.tempfile, "mkdtemp", lambda prefix: f"{tmp_path}/{prefix}x")
    assert jit.cache_folder.__wrapped__() == tmp_path / "rwkv-kernels-x"


def test_python_in_the_source_folder_finds_everything() -> None:
    """Also where the package is installed as a copy, which the folder of the same name hides."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import rwkv_cli.kernels.cpu.lower, rwkv_cli.models, rwkv_cli.quant; print(rwkv_cli.models.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "models" / "__init__.py"
