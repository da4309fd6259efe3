"""A mode that counts torch's operators as they run."""

from torch.utils._python_dispatch import TorchDispatchMode


class Watched(TorchDispatchMode):
    """A block. `count` is the number of operators for which counts(operator, its arguments, its result) is true."""

    def __init__(self, counts):
        super().__init__()
        self.counts, self.count = counts, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += bool(self.counts(function, (args, kwargs), result))
        return result
