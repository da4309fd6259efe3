"""Where operators are registered, apart from the modules that register them: these can be loaded again."""

import torch

_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})  # by module; survives a reload


def library_of(module: str) -> torch.library.Library:
    """A library for the operators of a module; what that module has registered before is taken away."""
    if module in _libraries:
        _libraries.pop(module)._destroy()
    return _libraries.setdefault(module, torch.library.Library("gpu_lstm", "FRAGMENT"))
