"""The route of a kind of call by a backend."""

from ..backends import verify
from ..backends.run import Route
from ..backends.schedule import schedule_of
from ..call.choices import KERNEL_BACKENDS, Backend
from ..call.request import Request
from .kind import Kind


def build(call: Request, kind: Kind, backend: Backend) -> Route:
    if backend not in KERNEL_BACKENDS:
        return Route(backend, kind.dtype)
    schedule = schedule_of(call, kind.steps, kind.dtype.itemsize)
    problems = [problem._replace(side_by_side=schedule.side_by_side) for problem in kind.problems]
    layers = [verify.layer_of(backend, problem, call.x.device) for problem in problems]
    return Route(backend, kind.dtype, None, layers, schedule)
