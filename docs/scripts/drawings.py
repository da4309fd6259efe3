"""The drawings of docs/design.md, for light and dark pages.

python docs/scripts/drawings.py writes them into docs/drawings/.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gpu_lstm", "font.family": "sans-serif"}

FOLDER = Path(__file__).parents[1] / "drawings"
Point = tuple[float, float]


class Palette(NamedTuple):
    """Colours for light or for dark pages."""

    page: str
    ink: str
    faint: str
    kernel: str  # kernels, and tensors that stay in registers
    computed: str
    memory: str
    state: str  # h on its way from step to step


PALETTES = {
    "light": Palette("#ffffff", "#1f2328", "#59636e", "#fde3c8", "#dbe9f6", "#dcefdc", "#b3261e"),
    "dark": Palette("#0d1117", "#e6edf3", "#9198a1", "#63400f", "#1d3f66", "#1f4a2b", "#ff8f85"),
}


def canvas(width: float, height: float, palette: Palette) -> tuple[Figure, Axes]:
    """Return a figure whose unit is a tenth of an inch."""
    figure = Figure(figsize=(width / 10, height / 10), facecolor=palette.page)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, place: Point, size: Point, words: tuple[str, str], colour: str, palette: Palette) -> None:
    """Draw a box at (left, top) of a size. `words` are its title, and a text of one or more lines."""
    (left, top), (width, height), (title, text) = place, size, words
    style = "round,pad=0,rounding_size=0.8"
    shape = FancyBboxPatch(place, width, height, boxstyle=style, facecolor=colour, edgecolor=palette.ink, lw=1)
    axes.add_patch(shape)
    middle = left + width / 2
    axes.text(middle, top + 2.2, title, ha="center", va="center", size=10.5, weight="bold", color=palette.ink)
    axes.text(middle, top + 3.8, text, ha="center", va="top", size=9, color=palette.ink, linespacing=1.3)


def arrow(axes: Axes, start: Point, end: Point, colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13}
    axes.annotate("", end, start, arrowprops=style)


def data_flow(palette: Palette) -> Figure:
    """Draw one call in five stages, from the module down to the kernel, with the files of each stage."""
    figure, axes = canvas(100, 83, palette)
    for place, size, colour, title, text in (
        ((1, 1), (46, 8), palette.computed, "1  module",
         "modules/, functional.py\ncollects arguments, and weights as they are now"),
        ((1, 15), (46, 8), palette.computed, "2  request",
         "call/prepare.py, roles.py, modes.py\nchecks the call, here and nowhere else"),
        ((1, 29), (46, 8), palette.computed, "3  route",
         "dispatch/route.py, run.py\nlooks up how calls of this kind run"),
        ((1, 49), (62, 10.5), palette.computed, "4  layer",
         "backends/layer_loop.py, execution/autograd.py, backends/fused.py, kernels/layer.py\n"
         "runs layers and directions in order, with products over all steps and gradients\n"
         "chooses a plan of its kernels once, and verifies it"),
        ((1, 67), (98, 15), palette.kernel, "5  kernel", "runs the recurrence of one layer in one direction"),
        ((62, 24), (37, 13), palette.page, "first call of a kind",
         "kind.py: the facts that decide\navailable.py: which backends can run it\n"
         "race.py: which one is faster\nthe decision is cached on disk"),
        ((66, 41.5), (33, 6.6), palette.memory, "torch", "torch_rnn.py: ATen, oneDNN, cuDNN"),
        ((66, 49.5), (33, 6.6), palette.memory, "reference", "reference.py: derivatives of any order"),
        ((66, 57.5), (33, 6.6), palette.memory, "graph", "graph.py: one operator for each layer"),
        ((3, 73), (45, 8), palette.page, "triton_rnn/",
         "resident, cooperative, held, step: one launch\npointwise: cuBLAS and a kernel at each step"),
        ((50, 73), (23, 8), palette.page, "cupy_rnn/", "CUDA C++:\na kernel at each step"),
        ((75, 73), (22, 8), palette.page, "numba_rnn/", "a loop for CPUs,\ncompiled by LLVM"),
    ):  # fmt: skip
        box(axes, place, size, (title, text), colour, palette)
    for top, bottom, middle, text in (  # the arrows from stage to stage, each with a text
        (9, 15, 12, "options, weights, input, hx,\nlengths, resets"),
        (23, 29, 26, "Request: x, states, weights,\nand settings of the process"),
        (37, 49, 43, "Call: x [T, B, I], one pair of states\nfor each layer and direction"),
        (59.5, 67, 63.2, "gates = x W_ih^T + b [T, B, 4H],\nW_hh, states, lengths, resets"),
    ):
        arrow(axes, (24, top), (24, bottom), palette.ink)
        axes.text(26, middle, text, size=9, color=palette.faint, va="center", linespacing=1.2)
    arrow(axes, (47, 31.5), (62, 31.5), palette.faint)
    arrow(axes, (62, 34.5), (47, 34.5), palette.faint)
    axes.plot([43, 43, 64.5, 64.5], [37, 39.4, 39.4, 60.8], color=palette.ink, lw=1.4)
    for top in (44.8, 52.8, 60.8):
        arrow(axes, (64.5, top), (66, top), palette.ink)
    return figure


def exchange(palette: Palette) -> Figure:
    """Draw three programs of one batch tile over two steps of the cooperative family."""
    figure, axes = canvas(92, 40, palette)
    colours = {"load, product": palette.kernel, "gates, cell": palette.computed, "store, prefetch": palette.memory}
    names, lanes = ("program 0\nunits 0..15", "program 1\nunits 16..31", "program 2\nunits 32..47"), (7, 16, 25)
    slower = (0.0, 3.0, 1.0)  # programs do not run at the same pace
    for lane, name in zip(lanes, names):
        axes.text(1, lane + 2, name, va="center", size=9, color=palette.ink, linespacing=1.2)
    starts = [13.0] * 3
    for step in range(2):
        published = []
        for number, lane in enumerate(lanes):
            at = starts[number]
            for part, width in (("load, product", 12 + slower[number]), ("gates, cell", 7)):
                bar(axes, (at, lane), width, part, colours[part], palette)
                at += width
            published.append(at)
            bar(axes, (at, lane), 8, "store, prefetch", colours["store, prefetch"], palette)
        ready = max(published) + 14  # a write to L2, and a read
        for number, lane in enumerate(lanes):
            waits = max(ready - published[number] - 8, 0)
            bar(axes, (published[number] + 8, lane), waits, "wait", palette.page, palette)
            axes.plot([published[number]] * 2, [lane - 1, lane + 4.6], color=palette.state, lw=1.4)
            for other in lanes:
                if other != lane:
                    end = other + (4 if other < lane else 0)
                    start = published[number], lane + (4 if other > lane else 0)
                    style = {"arrowstyle": "-|>", "color": palette.state, "lw": 0.6, "alpha": 0.7}
                    axes.annotate("", (ready, end), start, arrowprops=style, zorder=0.5)  # behind the bars
            starts[number] = max(ready, published[number] + 8)
        axes.text(min(published), lanes[0] - 1.6, f"h of step {step} published", size=8, color=palette.state,
                  ha="center")  # fmt: skip
    axes.annotate("", (90, 33), (13, 33), arrowprops={"arrowstyle": "-|>", "color": palette.faint})
    axes.text(88, 34.3, "time", size=9, color=palette.faint, ha="center")
    axes.text(
        13, 36.6, "Each program publishes h of its own units first. The next step starts when no word of h that it\n"
        "loads is the sentinel any more. Stores and prefetched gates hide behind the wait. Every step has\n"
        "its own place in memory, so nothing is overwritten.", size=8.5, color=palette.ink, va="center",
        linespacing=1.3,
    )  # fmt: skip
    return figure


def bar(axes: Axes, place: Point, width: float, text: str, colour: str, palette: Palette) -> None:
    """Draw one activity of a program."""
    if width > 0:
        axes.add_patch(Rectangle(place, width, 4, facecolor=colour, edgecolor=palette.ink, lw=0.6))
        if width > 3:
            left, top = place
            axes.text(left + width / 2, top + 2, text, ha="center", va="center", size=7, color=palette.ink)


def main() -> None:
    """Write every drawing."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (data_flow, exchange):
        for name, palette in PALETTES.items():
            draw(palette).savefig(FOLDER / f"{draw.__name__}_{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
