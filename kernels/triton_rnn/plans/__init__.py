"""The plans for a problem: the proposals of each family, estimates of their times, and the choice of one.

All of it runs on the host.
"""
