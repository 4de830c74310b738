"""The house's rules, checked: who imports whom, what --help loads, twins and their Protocol, what is packaged."""

import ast
import graphlib
import importlib
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from extras import needs

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
BELOW = {
    "errors": set(),
    "numbers": set(),
    "kernels": {"errors", "numbers"},
    "quant": {"errors", "numbers"},
    "models": {"errors", "numbers", "kernels", "quant"},
    "engine": {"errors", "numbers", "kernels", "quant", "models"},
    "terminal": {"errors", "numbers", "kernels", "quant", "models", "engine"},
    "server": {"errors", "numbers", "kernels", "quant", "models", "engine"},
    "commands": {"errors", "numbers", "kernels", "quant", "models", "engine", "terminal", "server"},
    "entry": {"errors", "numbers", "kernels", "quant", "models", "engine", "terminal", "server", "commands", "entry"},
}
"""The wings of the house, and those below each. A module imports its own wing and these."""

SOURCES = [
    path for folder in ("kernels", "quant", "models", "rwkv_cli") for path in sorted((ROOT / folder).rglob("*.py"))
]


def module_name(path: Path) -> str:
    """Return the name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "rwkv_cli" else ("rwkv_cli", *parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}
"""Every module of the product, with its file."""


def wing(module: str) -> str:
    """Return the wing that a module of the product belongs to."""
    part = [*module.split("."), ""][1]
    return part if part in BELOW else "entry"


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def product_imports(module: str) -> set[str]:
    """Modules of the product that a module imports, anywhere in it. A package counts only where it has the name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return names & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for name in imports(MODULES[module]):
        first, *_ = name.split(".")
        assert first not in ("kernels", "quant", "models"), f"{name}: write rwkv_cli.{name}"
        assert first not in ("torch", "rwkv"), f"{name} at run time"
    here = wing(module)
    for name in product_imports(module):
        assert wing(name) == here or wing(name) in BELOW[here], f"{module} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports inside functions and imports for types count, too."""
    graphlib.TopologicalSorter({module: product_imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if wing(module) == "engine"])
def test_the_engine_neither_prints_nor_knows_a_command_line(module: str) -> None:
    """A server or a script uses the engine, too. It gets functions to call where there is something to say."""
    used = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not used & {"click", "rich", "prompt_toolkit", "logging", "warnings"}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "input"), f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.stdin", "sys.stdout", "sys.stderr"), f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_stays_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "says what it is"


def test_models_do_not_know_the_device() -> None:
    for path in (ROOT / "models").glob("*.py"):
        assert "cuda" not in path.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_backend_is_its_protocol(device: str) -> None:
    from rwkv_cli.kernels.contract import Backend, Executable

    if device == "cuda":
        needs("numba_cuda", "dev")
    backend = importlib.import_module(f"rwkv_cli.kernels.{device}.backend")
    assert backend.name == device
    executable = inspect.signature(backend.compile).return_annotation
    for protocol, twin, bound in ((Backend, backend, 0), (Executable, executable, 1)):
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


def test_every_data_file_is_packaged() -> None:
    listed = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            listed |= set(ROOT.joinpath(*package.split(".")).glob(pattern))
    files = {path for path in (ROOT / "rwkv_cli").rglob("*") if path.is_file()}
    assert listed == {path for path in files if path.suffix not in (".py", ".pyc")}


@pytest.mark.parametrize("path", sorted((ROOT / "rwkv_cli" / "server" / "page").iterdir()), ids=lambda path: path.name)
def test_a_file_of_the_page_stays_readable_and_makes_no_markup_of_texts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "://cdn", "https://"):
        assert word not in text


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
    extras = project["optional-dependencies"]
    wanted = ("lm-eval", "plot", "pull", "ray", "serve")
    lines = [*project["dependencies"], *(line for extra in wanted for line in extras[extra])]
    declared = {re.split(r"[\[>=]", line)[0].strip().replace("-", "_") for line in lines}
    used = {name.split(".")[0] for path in SOURCES for name in imports(path)} - set(sys.stdlib_module_names)
    # llvmlite comes with numba, cuda.bindings with numba-cuda, which is numba.cuda; rwkv is read as data
    assert used - {"rwkv_cli", "llvmlite", "cuda"} == declared - {"rwkv"}
    assert extras["cuda"][0].startswith("numba-cuda[")


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
    """This holds also where the package is installed as a copy, which the folder of the same name hides."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import rwkv_cli.kernels.cpu.lower, rwkv_cli.models, rwkv_cli.quant; print(rwkv_cli.models.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "models" / "__init__.py"
