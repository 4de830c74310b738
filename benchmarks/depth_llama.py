"""Measure a GGUF model in llama.cpp at growing depths; benchmarks/constant.py runs this in another Python.

    depth_llama.py MODEL.gguf SECONDS DEPTH…    prints a line of JSON for each depth

A Transformer reads for SECONDS. After that its cache is filled with copies of what it holds, in llama.cpp's format of a
sequence's state: cells, then rows of K and of V for each layer. The time of a token depends on how many there are, and
not on what is in them.
"""

import ctypes
import json
import struct
import sys

import llama_cpp as ll
import numpy as np
from depth import CHUNK, REPETITIONS, TOKENS, measure


class Context:
    """A model and its memory of one sequence."""

    def __init__(self, path: str, most: int) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = most, CHUNK, CHUNK
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 1
        self.context = ll.llama_init_from_model(self.model, params)
        self.batch = ll.llama_batch_init(CHUNK, 0, 1)
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.depth = 0

    def read(self, tokens: int) -> None:
        """Read random tokens, up to `CHUNK` of them, with the logits after the last one."""
        self.batch.n_tokens = tokens
        for i, token in enumerate(np.random.default_rng(self.depth).integers(0, self.vocab, tokens)):
            self.batch.token[i], self.batch.pos[i] = int(token), self.depth + i
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, 0, i == tokens - 1
        assert ll.llama_decode(self.context, self.batch) == 0
        self.depth += tokens

    def state(self) -> bytes:
        """All that the context remembers."""
        size = ll.llama_state_seq_get_size(self.context, 0)
        data = (ctypes.c_uint8 * size)()
        assert ll.llama_state_seq_get_data(self.context, data, size, 0) == size
        return bytes(data)

    def memory(self) -> int:
        return ll.llama_state_seq_get_size(self.context, 0)

    def grow(self, depth: int) -> bool:
        if ll.llama_model_is_recurrent(self.model):
            return False
        state = grown(self.state(), depth)
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert ll.llama_state_seq_set_data(self.context, data, len(state), 0) == len(state)
        self.depth = depth
        return True


def grown(state: bytes, cells: int) -> bytes:
    """Return the state of a sequence of so many cells, which repeats the cells of a shorter one."""
    streams, have = struct.unpack_from("<II", state, 8)  # behind a magic number and flags
    assert streams == 1
    at, out = 16, [state[:8], struct.pack("<II", 1, cells)]
    width = struct.unpack_from("<I", state, at + 4)[0] * 4 + 8  # a position, and the sequences of the cell
    for cell in range(cells):
        out.append(struct.pack("<i", cell) + state[at + 4 : at + width])
    at += have * width
    transposed, layers = struct.unpack_from("<II", state, at)
    assert not transposed
    out.append(state[at : at + 8])
    at += 8
    for _ in range(2 * layers):
        (row,) = struct.unpack_from("<Q", state, at + 4)
        out.append(state[at : at + 12])
        rows = state[at + 12 : at + 12 + have * row]
        out.append((rows * -(-cells // have))[: cells * row])
        at += 12 + have * row
    assert at == len(state), (at, len(state))
    return b"".join(out)


if __name__ == "__main__":
    depths = [int(depth) for depth in sys.argv[3:]]
    context = Context(sys.argv[1], max(depths) + TOKENS * REPETITIONS + CHUNK)
    for row in measure(context, float(sys.argv[2]), depths):
        print(json.dumps(row), flush=True)
