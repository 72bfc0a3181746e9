"""A node on this machine: supervisor, configuration, run directory, leader table, command line."""
