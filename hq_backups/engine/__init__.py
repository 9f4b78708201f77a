"""Make, store, list, verify and restore backups, in plain Python.

Nothing in here imports Django: the engine runs as any user, on a host with no HQ code, with the database down.
"""
