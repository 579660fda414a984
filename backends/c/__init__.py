"""C99 back end."""

from .ecosystems import ECOSYSTEMS
from .emit import emit_c
from .schedule import clips, decays
from .session_file import session_file

__all__ = ["ECOSYSTEMS", "clips", "decays", "emit_c", "session_file"]
