"""Pictures of a plan: the decided graph (DOT and SVG) and its memory over time (SVG).

Everything is drawn from the plan and the checker's report, so a picture shows what the replay
found, not what the solver meant.
"""

from .dot import write_dot
from .graph_svg import write_svg
from .memory_svg import write_memory_svg

__all__ = ["write_dot", "write_memory_svg", "write_svg"]
