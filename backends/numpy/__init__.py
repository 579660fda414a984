"""The NumPy back end: executes a plan's steps inside one buffer of exactly the arena's bytes."""

from .data import DataSet, data_set, reconstruction_set, remarks
from .data_files import DataFile, load_data, read_data
from .history import Epoch, History
from .media_files import Normalization
from .metrics import Evaluation, MetricName, metric_of
from .regularization import Regularization, clipped_by
from .runtime import Runtime
from .schedule import ScheduleName
from .session import train_session
from .session_options import Listener, SessionOptions
from .train import save_learned, train

__all__ = [
    "DataFile",
    "DataSet",
    "Epoch",
    "Evaluation",
    "History",
    "Listener",
    "MetricName",
    "Normalization",
    "Regularization",
    "Runtime",
    "ScheduleName",
    "SessionOptions",
    "clipped_by",
    "data_set",
    "load_data",
    "metric_of",
    "read_data",
    "reconstruction_set",
    "remarks",
    "save_learned",
    "train",
    "train_session",
]
