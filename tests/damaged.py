"""Files that may be damaged: each is read, or refused in one line that begins with its name."""

from collections.abc import Callable
from pathlib import Path

from rwkv_cli.errors import FormatError, UnsupportedModelError
from rwkv_cli.models import naming, registry
from rwkv_cli.quant import open_source


def read_source(path: Path) -> None:
    """Read everything that conversion reads of a checkpoint."""
    source = naming.official(open_source(path))
    shapes = {name: tensor.shape for name, tensor in source.items()}
    registry.match(registry.detect(shapes), shapes)
    for each in source.values():
        each.float32()


def read_or_refused(path: Path, read: Callable[[Path], object] = read_source) -> bool:
    """Read a file, or have it refused. Returns whether it was read."""
    try:
        read(path)
    except FormatError as error:
        says = str(error)
    except UnsupportedModelError as error:  # whoever names the file adds its name
        says = f"{path}: {error}"
    else:
        return True
    assert says.startswith(f"{path}: ")
    assert says.isprintable()
    return False
