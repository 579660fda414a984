"""C99 back end."""

from .emit import emit_c
from .session_file import session_file

__all__ = ["emit_c", "session_file"]
