"""The NumPy back end: executes a plan's steps inside one buffer of exactly the arena's bytes."""

from .data import chosen_of, load_data
from .runtime import Runtime
from .train import History, save_learned, train

__all__ = ["History", "Runtime", "chosen_of", "load_data", "save_learned", "train"]
