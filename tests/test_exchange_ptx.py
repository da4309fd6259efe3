"""What the exchange of the cooperative kernels became in PTX: one width, strong, in the order of the source.

Compiled in a process of its own, since in this one the kernels may belong to Triton's interpreter. PTX is read as text:
an access belongs to a buffer if its address was computed from the pointer to it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

import pytest

SCRIPT = """
import json, os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
import torch, triton, triton.language as tl
from gpu_lstm.kernels.triton_lstm import cooperative, exchange
from gpu_lstm.kernels.triton_lstm.binary import compile_for
from gpu_lstm.kernels.triton_lstm.compile import recorded_launches
from gpu_lstm.kernels.triton_lstm.families import plans
from gpu_lstm.kernels.triton_lstm.planning import DEVICES, Family, Problem

DTYPES = {"bf16": (torch.bfloat16, "ieee"), "fp16": (torch.float16, "ieee"), "tf32": (torch.float32, "tf32")}

@triton.jit
def publish_halves(at, words, mask):
    tl.store(at.to(tl.pointer_type(tl.int16)), words.to(tl.int16), mask=mask)
    tl.store(at.to(tl.pointer_type(tl.int16)) + 1, (words >> 16).to(tl.int16), mask=mask)

@triton.jit
def collect_volatile(at, left, error_ptr, step, TILES: tl.constexpr, STRIDE: tl.constexpr, PATIENCE, FLAGGED):
    return exchange.load_volatile(at, left, TILES, STRIDE)

if FAULT:
    setattr(cooperative, FAULT, {"publish": publish_halves, "collect": collect_volatile}[FAULT])

def launches():
    found = []
    for dtype, card, (hidden, batch), backward in product(DTYPES, ("a100", "h100"), SIZES, (False, True)):
        problem = Problem(2, batch, hidden, DTYPES[dtype][0], 0, DTYPES[dtype][1])
        proposed = [p for p in plans(problem, DEVICES[card], backward) if p.family is Family.COOPERATIVE]
        for plan in proposed[:MOST]:
            direction = "backward" if backward else "forward"
            name = f"{dtype} {card} H={hidden} B={batch} {direction} {plan.rows}x{plan.columns}"
            found.append((name, problem, backward, plan, card))
    return [case for case in found if MATCH in case[0]]

def compiled(case):
    name, problem, backward, plan, card = case
    (launch,) = recorded_launches(problem, backward, plan)
    arguments = [n for n, p in zip(launch.kernel.arg_names, launch.kernel.params)
                 if not p.is_constexpr and launch.arguments[n] is not None]
    tile = plan.k * problem.size // 4  # words
    return dict(
        name=name, ptx=compile_for(launch, DEVICES[card].architecture).asm["ptx"], arguments=arguments,
        # words of a thread: of h or dgates collected and published, then of the partial sums
        collected=-(-problem.hidden // plan.k) * max(1, tile * plan.rows // plan.threads),
        published=(4 if backward else 1) * max(1, plan.columns * problem.size // 4 * plan.rows // plan.threads),
        sums=max(1, 4 * plan.columns * plan.rows // plan.threads) if backward else 0,
    )

if __name__ == "__main__":
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        print(json.dumps(list(pool.map(compiled, launches()))))
"""


@dataclass(frozen=True)
class Access:
    """One instruction, in the order of the text: a product, or an access to one of the buffers."""

    instruction: str
    buffer: str = ""

    @property
    def kind(self) -> str:
        """load, store or product, and of which buffer."""
        return f"{'load' if self.instruction.startswith('ld') else 'store'} {self.buffer}" if self.buffer else "product"


STRONG = {"load": "ld.relaxed.gpu.global.b32", "store": "st.relaxed.gpu.global.b32"}
FORWARD = ["load words", "product", "store words"]
BACKWARD = ["load words", "product", "store partials", "load partials", "store words"]


def _kernels(tmp_path, sizes: Sequence[tuple[int, int]], most: int = 1, match: str = "", fault: str = "") -> list[dict]:
    """The kernels of the first plans for each (H, B), of `match` in their names, and with a fault planted."""
    path = tmp_path / "script.py"  # a file, since the kernels are compiled in processes that import it
    path.write_text(f"SIZES, MOST, MATCH, FAULT = {sizes}, {most}, {match!r}, {fault!r}\n{SCRIPT}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def _accesses(kernel: dict) -> list[Access]:
    """The products, and every access to words_ptr and partials_ptr by any instruction."""
    # The registers that hold an address in a buffer: whatever was computed from its pointer.
    of: dict[str, str] = {}
    for register, number in re.findall(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]", kernel["ptx"]):
        name = kernel["arguments"][int(number)] if int(number) < len(kernel["arguments"]) else ""
        if name in ("words_ptr", "partials_ptr"):
            of[register] = name.removesuffix("_ptr")
    computed = re.findall(r"^\s*(?:add|sub|mad|mov|selp|cvta)[\w.]*\s+(%rd\d+), ([^;]*);", kernel["ptx"], re.M)
    while new := {
        to: of[register]
        for to, operands in computed
        for register in re.findall(r"%rd\d+", operands)
        if to not in of and register in of
    }:
        of |= new
    found = []
    for line in kernel["ptx"].splitlines():
        if re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", line):
            found.append(Access("product"))
        access = re.search(r"\b((?:ld|st|atom|red|cp)\.[\w.:]*)\s[^\[]*(?:\[[^\]]*\],\s*)?\[\s*(%rd\d+)", line)
        if access and access[2] in of:
            found.append(Access(access[1], of[access[2]]))
    return found


def _problems(kernel: dict) -> list[str]:
    """What is wrong with the exchange of a compiled kernel."""
    accesses = _accesses(kernel)
    problems = [
        f"{access.instruction} of {access.buffer}"
        for access in accesses
        if access.buffer and access.instruction not in STRONG.values()
    ]
    order = [kind for kind, _ in groupby(access.kind for access in accesses)]
    if order != (BACKWARD if "backward" in kernel["name"] else FORWARD):
        problems.append(f"the order is {order}")
    kinds = [access.kind for access in accesses]
    counts = {
        "load words": kernel["collected"], "store words": kernel["published"],
        "load partials": kernel["sums"], "store partials": kernel["sums"],
    }  # fmt: skip
    problems += [f"{kinds.count(kind)} x {kind}, not {n}" for kind, n in counts.items() if kinds.count(kind) < n]
    return problems


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        pytest.param([(768, 16), (513, 17)], 1, id="first plans"),
        pytest.param(list(product((768, 513), (16, 17))), 100, marks=pytest.mark.slow, id="every plan"),
    ],
)
def test_words_are_whole_and_strong_and_in_order(tmp_path, sizes, most):
    kernels = _kernels(tmp_path, sizes, most)
    assert len(kernels) >= 12 * len(sizes)  # three dtypes, two cards, forward and backward
    assert {kernel["name"]: problems for kernel in kernels if (problems := _problems(kernel))} == {}


@pytest.mark.parametrize(
    ("fault", "seen"), [("publish", "st.global.b16 of words"), ("collect", "ld.volatile.global.b32 of words")]
)
def test_a_weak_or_narrow_access_is_seen(tmp_path, fault, seen):
    (kernel,) = _kernels(tmp_path, [(768, 16)], match="bf16 h100 H=768 B=16 forward", fault=fault)
    assert any(seen in problem for problem in _problems(kernel))


def test_a_store_before_the_product_and_a_lost_one_are_seen(tmp_path):
    (kernel,) = _kernels(tmp_path, [(768, 16)], match="bf16 h100 H=768 B=16 forward")
    assert _problems(kernel) == []
    store = next(line for line in kernel["ptx"].splitlines() if STRONG["store"] in line)
    without = kernel["ptx"].replace(store, "")
    early = re.sub(r".*\bmma\.sync", lambda product: f"{store}\n{product[0]}", without, count=1)
    for ptx, problem in ((without, "0 x store words, not 1"), (early, "the order is")):
        assert any(problem in each for each in _problems(kernel | {"ptx": ptx}))
