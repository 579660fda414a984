"""C99 back end."""

from .built import BuildError, Built, measure_built
from .ecosystems import ECOSYSTEMS
from .emit import emit_c
from .schedule import clips, decays
from .session_file import session_file

__all__ = [
    "ECOSYSTEMS",
    "BuildError",
    "Built",
    "clips",
    "decays",
    "emit_c",
    "measure_built",
    "session_file",
]
