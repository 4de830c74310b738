"""Files: foreign checkpoints are read, one quantized safetensors is written, and that file is mapped again."""

from rwkv_cli.quant.checkpoint import Checkpoint, ModelFile
from rwkv_cli.quant.formats import Floats, Int8
from rwkv_cli.quant.opening import open_source, read_settings
from rwkv_cli.quant.replacing import check_regular, replacing
from rwkv_cli.quant.safetensors import is_safetensors
from rwkv_cli.quant.source import Joined, Source, SourceTensor, Zeros

__all__ = [
    "Checkpoint",
    "Floats",
    "Int8",
    "Joined",
    "ModelFile",
    "Source",
    "SourceTensor",
    "Zeros",
    "check_regular",
    "is_safetensors",
    "open_source",
    "read_settings",
    "replacing",
]
