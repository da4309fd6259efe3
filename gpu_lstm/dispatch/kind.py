"""Kinds of calls: the facts that decide which backend is faster, and that determine the kernels' problems."""

from typing import Any, NamedTuple

import torch

from ..backends import torch_rnn
from ..backends.plain_inference import can_infer
from ..call import roles
from ..call.choices import Backend
from ..call.modes import Recording
from ..call.request import Request
from ..call.roles import RESET_STATES
from ..call.weights import NAMES, size_of
from ..kernels.problem import Pass, Problem, fields_of, power_of_two, problem_with


class Kind(NamedTuple):
    """A kind of call: its problems, and all other facts that decide how it runs.

    The keys of decisions and of races are made of it.
    """

    problems: tuple[Problem, ...]  # [L*D], the problem of each layer and direction
    inputs: tuple[int | None, ...]  # [L], the input features I of each layer
    steps: int  # T, rounded up to a power of two
    training: bool  # whether backward follows forward
    recompute: bool  # whether backward recomputes the gates
    feature: str | None  # the feature that the fewest backends support, in words; None if all support all
    torch_lacks: str | None = None  # the feature that torch's own layer lacks, in words, or None if it can run the call
    plain: bool = False  # see backends/plain_inference.py

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layers compute in."""
        return self.problems[0].dtype

    @property
    def fallback(self) -> Backend:
        """The backend that runs the call without kernels of ours."""
        return Backend.REFERENCE if self.torch_lacks else Backend.TORCH

    @property
    def directions(self) -> int:
        """The number of directions of each layer, D."""
        return len(self.problems) // len(self.inputs)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes that a layer runs."""
        return (Pass(), Pass(True)) if self.training else (Pass(save=False),)

    def rounded(self) -> "Kind":
        """Return the kind that a race decides about: the batch size is rounded up to a power of two."""
        return self._replace(problems=tuple([p._replace(batch=power_of_two(p.batch)) for p in self.problems]))

    def as_json(self) -> dict[str, Any]:
        """Return the key of a race as JSON values.

        It holds the first layer's problem, from which the others differ only in sizes, and the sizes of all layers.
        """
        of_layers = zip(self.inputs, self.problems[:: self.directions])
        layers = [[inputs, p.hidden, p.projected, p.heads] for inputs, p in of_layers]
        return self.rounded().problems[0].as_json() | {
            "layers": layers, "directions": self.directions, "steps": self.steps, "training": self.training,
            "recompute": self.recompute, "feature": self.torch_lacks,
        }  # fmt: skip


def kind_of(request: Request) -> Kind:
    """Return the Kind of a call."""
    options, traversal, cell, dtype = request.options, request.traversal, request.options.cell, dtype_of(request)
    fields = fields_of(
        dict(zip(NAMES, request.weights[0][0])) | {"lengths": traversal.lengths, "resets": traversal.resets}
    )
    if request.form.packed is not None:
        fields["lengths"] = torch.int64
    if traversal.reset_states is not None:
        fields |= {"reset_h": True, "reset_c": True}
    for regulariser, rate in options.on:
        fields |= regulariser.flags(rate, options.training)
    sizes = options.sizes
    if request.modes.recording >= Recording.COMPILED:  # sizes of weights are constants, sizes of options may be symbols
        sizes = tuple([size_of(weights, cell.rows) for weights, *_ in request.weights])
    steps, batch = int(request.steps), int(request.batch)
    problems = [
        problem_with(
            fields, cell.name, steps, batch=batch, hidden=hidden, dtype=dtype, projected=projected,
            precision=request.modes.precision if dtype is torch.float32 else "ieee", reverse=options.reverse or d == 1,
            heads=heads,
        )
        for _, hidden, projected, heads in sizes for d in range(options.directions)
    ]  # fmt: skip
    feature = options.feature or (RESET_STATES if traversal.reset_states is not None else None)
    if feature is None and any(0 < p.projected == p.hidden for p in problems):
        feature = torch_rnn.SQUARE
    long = f"sequences of more than {torch_rnn.MOST_STEPS:,} steps" if torch_rnn.too_long(request.x, steps) else None
    return Kind(
        tuple(problems), tuple([i for i, *_ in sizes]), power_of_two(steps), request.learns, options.recompute, feature,
        feature or long, can_infer(request),
    )  # fmt: skip


def dtype_of(request: Request) -> torch.dtype:
    """Return the dtype that layers compute in: the input's dtype, or under autocast the dtype of torch's own results.

    On a CPU, autocast casts the whole of torch's LSTM. In these cases it casts only the products: a GRU, a cell, an
    LSTM over a PackedSequence, and every LSTM if oneDNN is off. The state is added to the products and keeps its dtype,
    so the result has the wider dtype of the two. With a projection the result is a product, in the dtype of autocast.
    """
    autocast, options = request.modes.autocast, request.options
    if autocast is None or not request.x.is_cpu:
        return autocast or request.x.dtype
    packed = request.form.packed is not None and type(options.role) is roles.Module and options.in_one_call
    products = options.one_state or isinstance(options.role, roles.Cell)
    if options.cell.of_torch and not options.sizes[0].projected:
        products |= packed or not request.modes.whole
    return torch.promote_types(autocast, request.states[0][1].dtype) if products else autocast


def describe(kind: Kind, device: torch.device, **exact: int) -> str:
    """Describe a kind of call on a device in a few words. `exact` steps and batch size replace the rounded ones."""
    switched = {} if device.type == "cuda" else {"precision": ""}  # the switch of float32 products is for CUDA alone
    return in_words(kind.as_json() | exact | switched)


def in_words(key: dict[str, Any]) -> str:
    """Describe a kind of call in a few words, from its as_json()."""
    layers = key["layers"]
    sizes = [f"{h}" + f" (P={p})" * bool(p) + f" ({n} heads)" * (n > 1) for _, h, p, n in layers]
    words = ["both directions"] * (key["directions"] - 1)
    words += [name for name in ("lengths", "resets", "recompute") if key[name]]
    words += [key["feature"]] * bool(key["feature"])
    words.append("with gradients" if key["training"] else "inference")
    dtype = key["dtype"].removeprefix("torch.")
    if dtype == "float32" and key["precision"]:
        dtype += f" ({key['precision']})"
    widths = " -> ".join([str(layers[0][0] or "W_ih x"), *sizes])
    return f"{key['cell'].upper()} {widths}, T <= {key['steps']}, B <= {key['batch']}, {dtype}, {', '.join(words)}"
