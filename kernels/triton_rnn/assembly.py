"""What all inline assembly needs: the constraints of its results and arguments, and the types of its results."""

import triton.language as tl

from .features import constexpr_function


@constexpr_function
def constraints(*letters: str | int) -> str:
    """Given as a letter of PTX's, how many results or arguments have it, the next letter..."""
    return ",".join(",".join([letter] * count) for letter, count in zip(letters[::2], letters[1::2]))


@constexpr_function
def types(dtype: tl.dtype, count: int) -> tuple[tl.dtype, ...]:
    """The types of the results."""
    return (dtype,) * count
