"""GPU kernels of gpu_lstm and their launchers, one folder per backend.

Ships as ``gpu_lstm.kernels``: another distribution owns the top-level name ``kernels``.
"""

if __name__ != "gpu_lstm.kernels":
    # Imported as `kernels` from the root of a checkout, e.g. by transformers, which looks for the other distribution.
    # It must find nothing here: a second copy of the kernels would be a mistake.
    __path__ = []
