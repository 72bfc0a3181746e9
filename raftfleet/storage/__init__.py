"""Where logs, terms, votes and snapshots are kept."""
