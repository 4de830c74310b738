"""Which format each tensor of a model is stored in, by the name that `--quant` has for it."""

from collections.abc import Mapping
from typing import NamedTuple

from rwkv_cli.quant.formats import FORMATS


class Recipe(NamedTuple):
    """Names of formats (`quant.formats.FORMATS`)."""

    matrices: str
    """For the large matrices of the layers."""
    head: str
    embedding: str
    small: str
    """For low-rank matrices. They are few, and much hangs on them."""

    def format_of(self, name: str) -> str:
        """The format of the tensor `name`."""
        if name == "emb.weight":
            return self.embedding
        if name == "head.weight":
            return self.head
        return self.matrices if name.endswith(".weight") else self.small


RECIPES: Mapping[str, Recipe] = {
    **{name: Recipe(name, name, name, name) for name in ("int8", "none")},
    "q6": Recipe("q6", "q6", "int8", "q6"),
    "q5": Recipe("q5", "q6", "q6", "q6"),
    "q4": Recipe("q4", "q6", "q6", "q6"),
}
"""The recipes that `--quant` offers. Half of what 4 bits cost would come from the head, if it had 4 bits as well."""

assert RECIPES.keys() == FORMATS.keys()
