"""Devices, costs, the joint optimization problem, its solvers, layout, plans and the checker."""
