"""Analyses of trained adapters: what they say in words, and how they do on other tasks, together and beside each other.

Each module makes numbers of adapters and of what `train` found; nothing here trains, and tables are `report`'s.
"""
