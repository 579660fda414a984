"""Optimal rematerialization and paging of a bare cost graph under a memory budget."""
