"""The report of a plan as one HTML file that needs no network: drawings, tables and figures.

The page is whole without scripts; they add zoom, search, tooltips and sorting.
"""

from .page import Page, Section, Table, write_page
from .plan_page import plan_page

__all__ = ["Page", "Section", "Table", "plan_page", "write_page"]
