"""The bodies of a node's child processes; installed as ``raftfleet.workers``, never imported as ``workers``."""
