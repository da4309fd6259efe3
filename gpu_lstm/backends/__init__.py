"""The backends: each runs layers as a route says, and decides nothing. layer_loop.py has what they share."""
