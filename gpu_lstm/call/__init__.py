"""A prepared call: the user's arguments, checked and with time first, and everything that decides how the call runs."""
