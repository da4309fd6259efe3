"""GPU kernels of gpu_lstm and their launchers, one folder a backend.

Ships as ``gpu_lstm.kernels``: another distribution owns the top-level name ``kernels``, so an import under
that name is a mistake and is refused.
"""

if __name__ != "gpu_lstm.kernels":
    raise ImportError(f"this package is gpu_lstm.kernels; it was imported as {__name__!r}")
