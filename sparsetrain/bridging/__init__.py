"""Bridges between a weight-sparse model and an existing dense one."""
