"""The drawings of docs/design.md: python docs/drawings.py writes them into docs/drawings/."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

matplotlib.use("Agg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "gpu_lstm", "font.family": "sans-serif"}

FOLDER = Path(__file__).with_name("drawings")
INK, FAINT = "#22303c", "#8a97a3"
PYTHON, TORCH, KERNEL, MEMORY = "#dbe9f6", "#ececec", "#fde3c8", "#dcefdc"
HANDED_OVER = {"arrowstyle": "-|>", "color": "#c0392b", "lw": 0.6, "alpha": 0.55}
PRODUCT, CELL, STORE, WAIT = "#f6b26b", "#93c47d", "#9fc5e8", "#ffffff"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose unit is a tenth of an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, left: float, top: float, size: tuple[float, float], title: str, text: str, colour: str) -> None:
    """A box with a name and what it does."""
    width, height = size
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, lw=0.8))
    axes.text(left + width / 2, top + 1.9, title, ha="center", va="center", size=8.5, weight="bold", color=INK)
    axes.text(left + width / 2, top + 3.2, text, ha="center", va="top", size=7, color=INK, linespacing=1.25)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", side: int = 1) -> None:
    """From start to end, with a text beside its middle: right of it, or with side=-1 left."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})
    middle = (start[0] + end[0]) / 2 + 0.7 * side, (start[1] + end[1]) / 2
    axes.text(*middle, text, ha="left" if side > 0 else "right", va="center", size=6.8, color=INK, linespacing=1.2)


def data_flow() -> Figure:
    """One call, from the module to the kernels."""
    figure, axes = canvas(92, 67)
    box(axes, 20, 1, (52, 7), "modules.py, functional.py, races.py",
        "LSTM, StackedLSTM, LSTMCell; lstm_layer\n"
        "check the input, read weights and arguments; who runs it, the fastest by a race", PYTHON)  # fmt: skip
    arrow(axes, (46, 8), (46, 12), "x [T, B, I], states, weights, Traversal (lengths, resets, direction), Settings")
    box(axes, 20, 12, (52, 8.5), "layers.stack",
        "draws the noise of the call; layer on layer, dropout, residual\n"
        "chunks.py cuts time where memory is to be bounded\n"
        "streams.py runs layers or directions side by side", PYTHON)  # fmt: skip
    arrow(axes, (30, 20.5), (15, 25))
    arrow(axes, (46, 20.5), (46, 25), "one direction of\none layer")
    arrow(axes, (62, 20.5), (77, 25))
    box(axes, 1, 25, (26, 7), "native.layer", "torch's own LSTM\n(ATen on CPU, cuDNN on CUDA)", TORCH)
    box(axes, 32, 25, (28, 7), "fused.layer", "save for backward?\ngates_x = x W_ih^T + b: one GEMM", PYTHON)
    box(axes, 65, 25, (26, 7), "reference.layer",
        "a plain loop: any device and dtype,\ndifferentiable to any order", TORCH)  # fmt: skip
    arrow(axes, (46, 32), (46, 36), "gates_x [T, B, 4H]")
    box(axes, 22, 36, (48, 7), "autograd.py, ops.py",
        "what is saved; weight gradients as GEMMs over all steps\n"
        "gpu_lstm::layer_forward, layer_backward: what torch.compile sees", PYTHON)  # fmt: skip
    arrow(axes, (70, 39.5), (78, 32), "  double\n  backward")
    arrow(axes, (38, 43), (25, 48), "Recurrence ", side=-1)
    arrow(axes, (54, 43), (67, 48))
    box(axes, 1, 48, (46, 8), "kernels/triton_lstm/launch.py",
        "the first plan that fits the card and is right there\nresident.py    cooperative.py    step.py\n"
        "one launch: one program | many exchange h | all meet", KERNEL)  # fmt: skip
    box(axes, 51, 48, (40, 8), "kernels/cupy_lstm/launch.py",
        "CUDA C++, where Triton cannot run\ncooperative", KERNEL)  # fmt: skip
    arrow(axes, (24, 56), (24, 60))
    arrow(axes, (67, 56), (67, 60))
    box(axes, 1, 60, (90, 6), "GPU memory",
        "in: gates_x, W_hh, h0, c0      out: h, h_n, c_n; for backward the activated gates (over gates_x) and c",
        MEMORY)  # fmt: skip
    return figure


def exchange() -> Figure:
    """Three programs of one batch tile over two steps of the cooperative family."""
    figure, axes = canvas(92, 40)
    colours = {"load, product": PRODUCT, "gates, cell": CELL, "store, prefetch": STORE, "wait": WAIT}
    names, lanes = ("program 0\nunits 0..15", "program 1\nunits 16..31", "program 2\nunits 32..47"), (7, 16, 25)
    slower = (0.0, 3.0, 1.0)  # programs do not run in step
    for lane, name in zip(lanes, names):
        axes.text(1, lane + 2, name, va="center", size=7.5, color=INK, linespacing=1.2)
    starts = [13.0] * 3
    for step in range(2):
        published = []
        for number, lane in enumerate(lanes):
            at = starts[number]
            for part, width in (("load, product", 12 + slower[number]), ("gates, cell", 7)):
                bar(axes, at, lane, width, part, colours[part])
                at += width
            published.append(at)
            bar(axes, at, lane, 8, "store, prefetch", colours["store, prefetch"])
        ready = max(published) + 14  # a write to L2, and a read
        for number, lane in enumerate(lanes):
            bar(axes, published[number] + 8, lane, max(ready - published[number] - 8, 0), "wait", colours["wait"])
            axes.plot([published[number]] * 2, [lane - 1, lane + 4.6], color="#c0392b", lw=1.4)
            for other in lanes:
                if other != lane:
                    end = other + (4 if other < lane else 0)
                    start = published[number], lane + (4 if other > lane else 0)
                    axes.annotate("", (ready, end), start, arrowprops=HANDED_OVER)
            starts[number] = max(ready, published[number] + 8)
        axes.text(min(published), lanes[0] - 1.6, f"h of step {step} published", size=6.8, color="#c0392b", ha="center")
    axes.annotate("", (90, 33), (13, 33), arrowprops={"arrowstyle": "-|>", "color": FAINT})
    axes.text(88, 34.3, "time", size=7.5, color=FAINT, ha="center")
    axes.text(
        13, 36, "Each program publishes h of its own units first. The next step starts once no word of h that it loads "
        "holds the fill;\nstores and prefetched gates hide behind the wait. Every step has its own place in memory: "
        "nothing is overwritten.", size=7, color=INK, va="center", linespacing=1.3,
    )  # fmt: skip
    return figure


def bar(axes: Axes, left: float, top: float, width: float, text: str, colour: str) -> None:
    """One activity of a program."""
    if width > 0:
        axes.add_patch(Rectangle((left, top), width, 4, facecolor=colour, edgecolor=INK, lw=0.6))
        if width > 3:
            axes.text(left + width / 2, top + 2, text, ha="center", va="center", size=6.2, color=INK)


def main() -> None:
    """Write every drawing."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (data_flow, exchange):
        draw().savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
