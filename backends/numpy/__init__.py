"""The NumPy back end: executes a plan's steps inside one buffer of exactly the arena's bytes."""

from .runtime import Runtime
from .train import History, save_learned, train

__all__ = ["History", "Runtime", "save_learned", "train"]
