"""Files: foreign checkpoints in, one quantized safetensors out, and that file mapped back."""

from rwkv_cli.quant.checkpoint import Checkpoint
from rwkv_cli.quant.errors import FormatError
from rwkv_cli.quant.source import Source, SourceTensor, open_source
from rwkv_cli.quant.tensor import Floats, Int8
from rwkv_cli.quant.writer import replacing

__all__ = ["Checkpoint", "Floats", "FormatError", "Int8", "Source", "SourceTensor", "open_source", "replacing"]
