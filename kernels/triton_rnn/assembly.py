"""What all inline assembly needs: the constraints of its results and arguments, and the types of its results."""

import triton.language as tl

from .features import constexpr_function


@constexpr_function
def constraints(*kinds: str | int) -> str:
    """Given as a kind, how many results or arguments are of that kind, the next kind..."""
    return ",".join(",".join([kind] * count) for kind, count in zip(kinds[::2], kinds[1::2]))


@constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    """The types of the results."""
    return (dtype,) * count
