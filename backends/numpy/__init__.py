"""The NumPy back end: executes a plan's steps inside one buffer of exactly the arena's bytes."""

from .data import DataSet, chosen_of, data_set, load_data, reconstruction_set
from .history import Epoch, History
from .metrics import Evaluation
from .runtime import Runtime
from .session import Listener, SessionOptions, train_session
from .train import save_learned, train

__all__ = [
    "DataSet",
    "Epoch",
    "Evaluation",
    "History",
    "Listener",
    "Runtime",
    "SessionOptions",
    "chosen_of",
    "data_set",
    "load_data",
    "reconstruction_set",
    "save_learned",
    "train",
    "train_session",
]
