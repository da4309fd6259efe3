"""GPU kernels of gpu_lstm and their launchers, one folder per backend.

Ships as ``gpu_lstm.kernels``: another distribution owns the top-level name ``kernels``.
"""

if "." not in __name__:
    # Imported as `kernels` from the root of a checkout, e.g. by transformers, which looks for the other distribution.
    # It must find nothing here: a second copy of the kernels would be a mistake.
    __path__ = []
