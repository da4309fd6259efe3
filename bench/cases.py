"""What is measured: single cases, and the grid of them for a kind of device, the most telling first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,  # products of float32 tensors in TF32
    "fp32": torch.float32,  # and exactly
}
PASSES = ("forward", "training", "step")  # without autograd; forward and backward; one step of inference
SEQUENCES = ("full", "ragged", "packed")  # a padded batch, all of T steps; with lengths; a PackedSequence


@dataclass(frozen=True)
class Case:
    """An LSTM and a batch for it."""

    run: str  # of PASSES
    dtype: str  # of DTYPES
    steps: int  # T
    batch: int  # B
    inputs: int  # I
    hidden: int  # H
    layers: int = 1  # L
    directions: int = 1  # D
    sequences: str = "full"  # of SEQUENCES
    reset_rate: float = 0.0  # of all steps

    @property
    def name(self) -> str:
        """What tells it from every other case, in the order of the fields."""
        parts = [self.run, self.dtype, f"T{self.steps}", f"B{self.batch}", f"I{self.inputs}", f"H{self.hidden}"]
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        if self.directions > 1:
            parts.append("both-directions")
        if self.sequences != "full":
            parts.append(self.sequences)
        if self.reset_rate:
            parts.append(f"resets-{self.reset_rate:.1%}")
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of every tensor."""
        return DTYPES[self.dtype]

    def plain(self) -> "Case":
        """The same sizes without lengths and resets, as torch.nn.LSTM takes them."""
        return replace(self, sequences="full", reset_rate=0.0)

    def operations(self) -> int:
        """Floating-point operations of the products, 2 a multiply-add; backward takes twice those of forward."""
        forward = 0
        for layer in range(self.layers):
            features = self.inputs if layer == 0 else self.directions * self.hidden
            forward += 2 * 4 * self.hidden * (features + self.hidden) * self.directions
        return self.steps * self.batch * forward * (3 if self.run == "training" else 1)

    def bytes_moved(self) -> int:
        """The least that goes through memory: every input read once, every result written once.

        Training also hands in the output's gradient, hands out those of input and weights, and between the two
        passes writes and reads the four gates and c of every unit and step.
        """
        size, cells = self.torch_dtype.itemsize, self.steps * self.batch
        weights = states = 0
        for layer in range(self.layers):
            features = self.inputs if layer == 0 else self.directions * self.hidden
            weights += 4 * self.hidden * (features + self.hidden + 2) * self.directions
            states += self.hidden * self.directions
        in_and_out = cells * (self.inputs + self.directions * self.hidden)
        if self.run != "training":
            return size * (weights + in_and_out)
        return size * (2 * weights + 2 * in_and_out + 2 * cells * 4 * states) + 2 * 4 * cells * states


@dataclass(frozen=True)
class Sizes:
    """The middle of a grid, and what it varies."""

    dtype: str
    steps: int
    batch: int
    hidden: int
    hiddens: tuple[int, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    reset_rates: tuple[float, ...]


SIZES = {
    "cuda": Sizes(
        dtype="bf16", steps=1024, batch=16, hidden=768,
        hiddens=(128, 512, 1024, 64, 129, 256, 1536, 2048), batches=(1, 64, 4, 256, 12), lengths=(128, 4096),
        dtypes=("fp16", "tf32", "fp32"), reset_rates=(0.02, 0.005, 0.1),
    ),
    "cpu": Sizes(
        dtype="fp32", steps=128, batch=16, hidden=128,
        hiddens=(32, 256, 512), batches=(1, 64), lengths=(32, 512), dtypes=(), reset_rates=(0.02, 0.1),
    ),
}  # fmt: skip


def grid(kind: str) -> dict[str, list[Case]]:
    """The cases for a kind of device, "cuda" or "cpu": groups by name, groups and cases in order of importance."""
    sizes = SIZES[kind]

    def both(**changes) -> Iterator[Case]:
        for run in ("training", "forward"):
            hidden = changes.get("hidden", sizes.hidden)
            yield replace(Case(run, sizes.dtype, sizes.steps, sizes.batch, hidden, hidden), **changes)

    def training(**changes) -> Case:
        return next(both(**changes))

    return {
        "headline": list(both()),
        "hidden": [case for hidden in sizes.hiddens for case in both(hidden=hidden)],
        "dtypes": [case for dtype in sizes.dtypes for case in both(dtype=dtype)],
        "resets": [training(reset_rate=rate) for rate in sizes.reset_rates],
        "ragged": [training(sequences="ragged"), training(sequences="packed")],
        "stacks": [training(layers=2), training(directions=2), training(layers=2, directions=2)],
        "step": [replace(training(), run="step", steps=1, batch=batch) for batch in (1, sizes.batch)],
        "batch": [case for batch in sizes.batches for case in both(batch=batch)],
        "steps": [case for steps in sizes.lengths for case in both(steps=steps)],
    }


def choose(kind: str, names: list[str] | None) -> list[Case]:
    """The cases of groups or of single cases by name; the whole grid if None.

    Raises:
        ValueError: a name that is neither.
    """
    groups = grid(kind)
    if names is None:
        return [case for cases in groups.values() for case in cases]
    single = {case.name: [case] for cases in groups.values() for case in cases}
    unknown = [name for name in names if name not in groups and name not in single]
    if unknown:
        raise ValueError(
            f"unknown case {unknown[0]!r}; known groups: {', '.join(groups)}; known cases: {', '.join(single)}"
        )
    return list(dict.fromkeys(case for name in names for case in (groups | single)[name]))
