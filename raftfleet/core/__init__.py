"""The Raft core, sans-IO: members, logs, membership, reads, links and the shard that holds many members."""
