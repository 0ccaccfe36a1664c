"""Algorithms in plain torch operations.

Each is an optimizer class in the shape of torch's own: what ``backend="torch"`` runs, what decides
about state and its names, and what the kernels are measured against. Torch has most of them; the
modules here are those that it lacks.
"""
