"""Locality: places for the nodes of a model, wires between them, and how long those are; no training loop."""
