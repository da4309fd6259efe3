"""The backends. Each runs the layers of a call as the route says, and decides nothing. All share layer_loop.py."""
