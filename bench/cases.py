"""The cases that are measured, and a grid of them for each kind of device, the most informative cases first."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

ROWS = {"lstm": 4, "gru": 3, "slstm": 4}  # rows of a weight matrix, in units of H, by the name of the cell
# The dtype of every tensor, by name. With tf32 float32 matmuls are computed in TF32, with fp32 exactly.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
# Variants of the cell, by the argument of gpu_lstm.LSTM: its value, and n for each weight [n * H] that it adds.
VARIANTS: dict[str, tuple[Any, dict[str, int]]] = {
    "peepholes": (True, {"weight_peephole": 3}), "recurrent_dropout": (0.25, {}), "zoneout": (0.1, {}),
    "layer_norm": (True, {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An LSTM, a GRU or an sLSTM, and a batch for it."""

    mode: str  # "forward" (without autograd), "training" (forward and backward) or "step" (one step of inference)
    dtype: str  # a name of DTYPES
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    layers: int = 1  # L
    directions: int = 1  # D
    # "full" (all have T steps), "ragged" (padded, with lengths), "packed" (a PackedSequence), or "active" (only some
    # sequences make the step)
    sequences: str = "full"
    reset_rate: float = 0.0  # the fraction of all steps that have a reset
    variant: str = "plain"  # or a name of VARIANTS, or "reset_states": resets set the states to given ones
    cell: str = "lstm"  # a name of ROWS
    heads: int = 1  # each head has H / heads units, which read only the h of that head

    @property
    def name(self) -> str:
        name = f"{self.mode}-{self.dtype}-T{self.steps}-B{self.batch}-I{self.input_size}-H{self.hidden_size}"
        name += f"-L{self.layers}" * (self.layers > 1) + "-both-directions" * (self.directions > 1)
        name += f"-{self.sequences}" * (self.sequences != "full")
        name += f"-resets-{self.reset_rate:.1%}" * (self.reset_rate > 0)
        name += f"-{self.variant}" * (self.variant != "plain") + f"-{self.cell}" * (self.cell != "lstm")
        return name + f"-heads{self.heads}" * (self.heads > 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def plain(self) -> "Case":
        """Return the case with the same sizes, without lengths, resets and variant, which torch's modules lack."""
        return replace(self, sequences="full", reset_rate=0.0, variant="plain")

    def operations(self) -> int:
        """Return the floating-point operations of the matmuls.

        A multiply-add counts as 2. Backward needs twice as many operations as forward.
        """
        H, D, rows = self.hidden_size, self.directions, ROWS[self.cell] * self.hidden_size
        each = H // self.heads  # columns of W_hh
        elements = rows * D * ((self.input_size + each) + (self.layers - 1) * (D * H + each))  # of all weight matrices
        return 2 * self.steps * self.batch * elements * (3 if self.training else 1)

    def bytes_moved(self) -> int:
        """Return the least traffic in bytes: each input is read once, each result written once.

        In training the gates and c, which is float32, are written and read, too.
        """
        size, cells, units = self.torch_dtype.itemsize, self.steps * self.batch, self.hidden_size * self.directions
        biases = 2 * ROWS[self.cell] * units * self.layers
        weights = replace(self, mode="forward").operations() // (2 * cells) + biases
        once, states = size * (weights + cells * (self.input_size + units)), cells * units * self.layers
        return 2 * (once + size * 4 * states + 4 * states) if self.training else once


RL = (  # T, B, H of recurrent PPO in rl_games' shadow hand, Dextreme and its critic, rsl_rl, TorchRL, few environments
    (4, 4096, 1024), (16, 1024, 1024), (16, 1024, 2048), (24, 1024, 256), (24, 4096, 256), (32, 256, 256),
    (32, 8192, 256), (64, 128, 128),
)  # fmt: skip
GRIDS: dict[str, tuple[Case, dict[str, tuple[Any, ...]]]] = {  # for each device the headline, and the varied fields
    "cuda": (Case("training", "bf16", steps=1024, batch=16, input_size=768, hidden_size=768), {
        "hidden_size": (128, 512, 1024, 64, 129, 256, 1536, 2048), "batch": (1, 64, 4, 256, 12), "steps": (128, 4096),
        "dtype": ("fp16", "tf32", "fp32"), "reset_rate": (0.02, 0.005, 0.1), "rl_dtype": ("tf32", "bf16"), "rl": RL,
        "heads": (16, 256, 1, 64, 1024), "gru": (),
    }),
    "cpu": (Case("training", "fp32", steps=128, batch=16, input_size=128, hidden_size=128), {
        "hidden_size": (32, 256, 512), "batch": (1, 64), "steps": (32, 512), "dtype": (), "reset_rate": (0.02, 0.1),
        "heads": (16, 1), "gru": ((512, 4, 32), (128, 1, 64), (16, 256, 256)), "rl_dtype": ("fp32",),
        "rl": (*((T, max(8, B // 128), H) for T, B, H in RL),),
    }),
}  # fmt: skip


def grid(kind: str) -> dict[str, list[Case]]:
    """Return the cases for a kind of device, "cuda" or "cpu", in named groups. The most important come first."""
    (headline, varied), modes = GRIDS[kind], ("training", "forward")

    def each(*fields: str) -> list[Case]:
        values = (dict.fromkeys(fields, value) for value in varied[fields[0]])
        return [replace(headline, mode=mode, **changes) for changes in values for mode in modes]

    def of(cell: str, *its: Case) -> list[Case]:
        return [replace(case, cell=cell) for case in its]

    varied_rl = itertools.product(modes, (0.03, 0.005), varied["rl_dtype"], varied["rl"])
    rl = [Case(mode, dtype, T, B, H, H, reset_rate=rate) for mode, rate, dtype, (T, B, H) in varied_rl]
    step = replace(headline, mode="step", steps=1)
    resets = [replace(headline, reset_rate=rate) for rate in varied["reset_rate"]]
    others = replace(resets[0], variant="reset_states"), replace(step, sequences="active")
    grus = [replace(headline, steps=T, batch=B, input_size=H, hidden_size=H) for T, B, H in varied["gru"]]
    both, ragged = [replace(headline, mode=mode) for mode in modes], replace(headline, sequences="ragged")
    first = len(varied["rl"])
    rl[first:first] = of("gru", *rl[:first])
    of_512 = [replace(case, input_size=512, hidden_size=512, heads=n) for n in (4, 8, 1) for case in both]
    heads = [replace(case, batch=B) for B in varied["heads"] for case in of_512]
    return {
        "first": [headline, *of("gru", headline), heads[0], *of("slstm", heads[0])],  # for when time is short
        "headline": both,
        "gru": of("gru", *both, resets[0], ragged, replace(step, batch=1), *grus),
        "rl": rl,
        "hidden": each("hidden_size", "input_size"),
        "dtypes": each("dtype"),
        "resets": resets,
        "ragged": [ragged, replace(headline, sequences="packed")],
        "stacks": [replace(headline, layers=layers, directions=D) for layers, D in ((2, 1), (1, 2), (2, 2))],
        "step": [replace(step, batch=1), step],
        "heads": heads + of("slstm", *(case for case in heads if case.heads == 4 and case.batch in (1, 16, 256))),
        "variants": [*(replace(headline, variant=name) for name in VARIANTS), *others],
        "batch": each("batch"),
        "steps": each("steps"),
    }


def choose(kind: str, names: list[str] | None) -> list[Case]:
    """Return the cases with these names, and all cases of the groups with these names. None selects the whole grid."""
    groups = grid(kind)
    known = groups | {case.name: [case] for cases in groups.values() for case in cases}
    if unknown := set(names or ()) - set(known):
        lists = f"known groups: {', '.join(groups)}; known: {', '.join(known)}"
        raise ValueError(f"unknown case {unknown.pop()!r}; {lists}")
    return list(dict.fromkeys(case for name in names or groups for case in known[name]))
