"""Experiments that notebooks call: each returns plain tables and arrays."""
