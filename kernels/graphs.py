"""What torch.compile is told of functions that it is not to trace."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_in_graphs(function: F) -> F:
    """Have torch.compile call a function once for each set of arguments and take its result as a constant.

    Source: the mark that `torch.compiler.assume_constant_result` sets, which imports the whole compiler for it: two of
    the four seconds that importing the kernels took.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
