"""Sweeps: a config makes points, each a run directory; rows and tables are made of what the directories hold."""
