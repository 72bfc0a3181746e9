"""The fleet group's state machine, placement and reconciling plans: pure functions and objects."""
