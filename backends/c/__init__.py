"""C99 back end."""

from .emit import emit_c

__all__ = ["emit_c"]
