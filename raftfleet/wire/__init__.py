"""Frames between nodes and between a client and its node: msgpack to checked messages and back, with limits."""
