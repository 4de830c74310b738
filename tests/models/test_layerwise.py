"""A text that goes through a model layer by layer: the same outputs, and the inputs of every matrix."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

from rwkv_cli.models import Model
from rwkv_cli.models.layerwise import Layerwise
from rwkv_cli.models.registry import tensors
from rwkv_cli.quant import Checkpoint

IDS = np.random.default_rng(0).integers(0, 300, 300)


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_text_goes_through_one_layer_after_the_other(version: str, converted: Callable[..., Path]) -> None:
    model = Model(Checkpoint(converted(version, "none")))
    found: dict[str, list[NDArray[np.float32]]] = {}

    def take(names: Sequence[str], rows: NDArray[np.float32]) -> None:
        for name in names:
            found.setdefault(name, []).append(rows)

    way = Layerwise(model, IDS)
    for _ in range(model.config.layers):
        way.advance(take)
    way.outputs(take)
    # every matrix is multiplied by rows of its width, one a token
    shapes = {name: entry.shape for name, entry in tensors(model.config).items() if entry.kind in ("matrix", "sparse")}
    assert {name: np.concatenate(rows).shape for name, rows in found.items()} == {
        name: (len(IDS), columns) for name, (_, columns) in shapes.items()
    }
    np.testing.assert_array_equal(np.concatenate(found["head.weight"]), model.outputs(IDS, model.new_state()))
    squares = np.concatenate(found["blocks.1.ffn.value.weight"])
    assert squares.min() >= 0 or version == "7a", "the channel mixing multiplies squares"
