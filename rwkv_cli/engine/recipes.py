"""The format that each tensor of a model is stored in, by the name that `--quant` has for it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from rwkv_cli.models.naming import kind_of
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

LADDER = ("q4", "q5", "q6", "int8")
"""The formats that a mixture is made of, by their bits."""


def mixed_kind(name: str) -> str:
    """The kind of a tensor: all of one kind have the same format in a mixture. Low-rank matrices are one, being few."""
    return kind_of(name) if name.endswith(".weight") else "low rank"


def mixture_name(bits: float) -> str:
    """The name of a mixture of so many bits, in the place of a recipe's."""
    return f"{bits}bits"


def is_known(quantization: str) -> bool:
    """Return true for the name of a recipe or of a mixture."""
    return quantization in RECIPES or re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,16}bits", quantization) is not None


assert RECIPES.keys() == FORMATS.keys()
