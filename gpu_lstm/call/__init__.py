"""A prepared call: the user's arguments, checked and with time as first dimension, and all that decides how it runs."""
