"""Count what makes a source tree hard to read.

    python tools/count_house.py [FOLDER …] [--where WORD]

Each folder is a checkout. The table has the files and lines of product and tests, circles of imports, functions that
take many values by position, and marks that switch a check off.
"""

import argparse
import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PRODUCT = ["rwkv_cli", "kernels", "models", "quant"]
POSITIONAL = 5
"""More parameters than this are hard to tell apart by position."""
MID_SENTENCE = re.compile(r"(Of|It|Or|And|Its|Their|What|Whether|Where|Which|That)\b")


def module_name(path: Path) -> str:
    """The dotted name of a product's source file, relative to the checkout."""
    parts = path.with_suffix("").parts
    name = ".".join(parts if parts[0] == "rwkv_cli" else ("rwkv_cli", *parts))
    return name.removesuffix(".__init__")


def imports(name: str, tree: ast.AST, modules: set[str]) -> set[str]:
    """The product's modules that a module imports anywhere, by their absolute names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import name` needs the package only where the name is no module
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full & modules
            if full - modules:
                found.add(node.module)
    return found & modules - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def wide_functions(tree: ast.AST) -> Iterator[str]:
    """Functions with many positional parameters, self and cls not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > POSITIONAL:
                yield f"{node.lineno}: {node.name}"


def broken_docstrings(tree: ast.AST) -> Iterator[str]:
    """Docstrings that start mid-sentence, also those of attributes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for owner, statement in itertools.pairwise([node, *body] if isinstance(body, list) else []):
            if (
                isinstance(owner, owners)
                and isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
            ):
                text = inspect.cleandoc(str(statement.value.value))
                if MID_SENTENCE.match(text):
                    yield f"{statement.lineno}: {text.splitlines()[0]}"


def marks(text: str, mark: str) -> list[str]:
    """Lines that have a mark."""
    return [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if mark in line]


def look(folder: Path) -> dict[str, list[str]]:
    """The places in a checkout, by what is counted."""
    product, tests = (
        {path.relative_to(folder): path.read_text() for part in parts for path in sorted((folder / part).rglob("*.py"))}
        for parts in (PRODUCT, ["tests"])
    )
    trees = {path: ast.parse(text) for path, text in product.items()}
    names = {module_name(path): tree for path, tree in trees.items()}
    loops = circles({name: imports(name, tree, set(names)) for name, tree in names.items()})

    def places(find: Callable[[Path], Iterable[str]]) -> list[str]:
        return [f"{path}:{place}" for path in product for place in find(path)]

    return {
        "files of the product": list(map(str, product)),
        "lines of the product": "".join(product.values()).splitlines(),
        "files past 400 lines": [str(path) for path, text in product.items() if text.count("\n") > 400],
        "files of tests": list(map(str, tests)),
        "lines of tests": "".join(tests.values()).splitlines(),
        "import circles": [" ".join(loop) for loop in loops],
        f"functions with more than {POSITIONAL} positional parameters": places(
            lambda path: wide_functions(trees[path])
        ),
        "fmt: skip": places(lambda path: marks(product[path], "# fmt: skip")),
        "docstrings that start mid-sentence": places(lambda path: broken_docstrings(trees[path])),
        "no-untyped-def ignored": places(lambda path: marks(product[path], "no-untyped-def")),
        "type: ignore": places(lambda path: marks(product[path], "# type: ignore")),
    }


def main() -> None:
    """Print a column for each checkout, or the places of one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path(__file__).resolve().parent.parent])
    parser.add_argument("--where", metavar="WORD", help="print the places that the figures with this word count")
    options = parser.parse_args()
    found = [look(folder) for folder in options.folders]
    width = max(map(len, found[0]))
    for what in found[0]:
        if options.where is None:
            print(f"{what:{width}}", *(f"{len(column[what]):7}" for column in found))
        elif options.where in what:
            print(*(place for column in found for place in column[what]), sep="\n")


if __name__ == "__main__":
    main()
