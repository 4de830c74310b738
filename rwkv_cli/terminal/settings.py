"""The settings of an answer as a person gives them: options of a command, or /set in a chat."""

import math
from dataclasses import dataclass
from typing import Any

import click


class Whole(click.IntRange):
    """A range of whole numbers. Messages call it by this name."""

    name = "whole number"


class _Finite(click.FloatRange):
    """A range of finite numbers. The plain range lets nan pass, as nan compares with no border."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


@dataclass(frozen=True)
class Setting:
    """The values that a setting takes, and how help texts describe it."""

    kind: click.ParamType[Any]
    metavar: str
    help: str


SAMPLING = {
    "temperature": Setting(_Finite(min=0), "T", "Spread of the choice; 0 always takes the likeliest token."),
    "top_p": Setting(_Finite(0, 1), "P", "Keep the likeliest tokens that make up this probability."),
    "top_k": Setting(Whole(min=0), "K", "Keep the K likeliest tokens; 0: all."),
    "min_p": Setting(_Finite(0, 1), "P", "Drop tokens less likely than P times the likeliest."),
    "presence_penalty": Setting(_Finite(-100, 100), "A", "Taken off the logit of a token that has occurred."),
    "frequency_penalty": Setting(_Finite(-100, 100), "A", "Taken off for each time that it has occurred."),
    "penalty_decay": Setting(_Finite(0, 1), "D", "What a past occurrence keeps of its weight with each new token."),
    "seed": Setting(Whole(min=0), "N", "Same seed, same text; default: random."),
}
"""The sampler's settings, and its seed."""

MAX_TOKENS = Whole(min=1)
"""The values that the most tokens of a text may have."""
