"""A prepared call: the user's arguments, checked and time-major, with everything that decides how it runs."""
