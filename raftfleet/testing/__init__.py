"""For tests of raftfleet and of applications on it: simulated clock, network and fleet; local fleets of real nodes."""
