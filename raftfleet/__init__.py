"""Many Raft consensus groups on a fleet of nodes."""
