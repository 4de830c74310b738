"""RWKV-4, 5, 6 and 7: configuration, tensors, forward pass, state."""

from rwkv_cli.models.base import Model
from rwkv_cli.models.config import Config
from rwkv_cli.models.state import Snapshots, State

__all__ = ["Config", "Model", "Snapshots", "State"]
