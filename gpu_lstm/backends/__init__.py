"""The backends: each runs a prepared call by its route, and decides nothing."""
