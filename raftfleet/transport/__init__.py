"""ZeroMQ sockets between nodes, and CURVE keys."""
