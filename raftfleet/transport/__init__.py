"""Sockets between nodes, plain TCP or ZeroMQ with CURVE keys, and Unix sockets for local clients."""
