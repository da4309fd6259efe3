"""A call, prepared: what the user gave, checked, time-major, with all that decides how it is run."""
