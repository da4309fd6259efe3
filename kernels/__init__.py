"""GPU kernels of gpu_lstm and their launchers, one folder a backend.

Ships as ``gpu_lstm.kernels``: another distribution owns the top-level name ``kernels``.
"""

if __name__ != "gpu_lstm.kernels":
    # Found by that name in the root of a checkout, as by transformers, which looks for the other distribution. It finds
    # nothing: a second copy of the kernels would be a mistake.
    __path__ = []
