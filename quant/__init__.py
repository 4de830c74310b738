"""Files: foreign checkpoints in, one quantized safetensors out, and that file mapped back."""

from rwkv_cli.quant.checkpoint import Checkpoint
from rwkv_cli.quant.opening import open_source
from rwkv_cli.quant.source import Source, SourceTensor
from rwkv_cli.quant.tensor import Floats, Int8
from rwkv_cli.quant.writer import replacing

__all__ = ["Checkpoint", "Floats", "Int8", "Source", "SourceTensor", "open_source", "replacing"]
