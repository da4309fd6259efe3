"""Which plans there are for a problem, on the host: each family's, their estimated times, and the choice."""
