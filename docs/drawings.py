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
    """From start to end, with a text next to its middle: right of it, or with side=-1 left."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0})
    middle = (start[0] + end[0]) / 2 + 1.2 * side, (start[1] + end[1]) / 2
    axes.text(*middle, text, ha="left" if side > 0 else "right", va="center", size=7, color=INK, linespacing=1.2)


def data_flow() -> Figure:
    """One call, from the module to the kernels."""
    figure, axes = canvas(92, 90)
    box(axes, 17, 1, (58, 6), "modules/, functional.py",
        "LSTM, GRU, stacks, cells; lstm_layer: arguments and weights as they are now", PYTHON)  # fmt: skip
    arrow(axes, (46, 7), (46, 11), "Options, weights, input, hx, lengths, resets, reset_states")
    box(axes, 17, 11, (58, 6), "call/prepare.py, roles.py", "all checks of a call; what the process has set", PYTHON)
    arrow(axes, (46, 17), (46, 21), "Request: x and states as given, weights, Traversal, Modes")
    box(axes, 17, 21, (58, 8), "dispatch/route.py, dispatch/run.py",
        "the Route of the call, looked up; decided once for each kind of call:\n"
        "available.py -> race.py: backend, kernels, schedule", PYTHON)  # fmt: skip
    for start, end in (((24, 29), (11, 34)), ((38, 29), (34, 34)), ((54, 29), (58, 34)), ((68, 29), (81, 34))):
        arrow(axes, start, end)
    axes.text(46, 31.5, "Call: x [T, B, I], [L*D] of states", ha="center", va="center", size=6.8, color=INK)
    for left, name, text, colour in (
        (1, "torch_rnn.py", "torch's own LSTM: ATen\non the CPU, cuDNN on CUDA;\nlengths and resets", TORCH),
        (24, "schedule.py", "layer on layer by kernels,\ndirections side by side,\ninference in chunks", PYTHON),
        (48, "graph.py", "torch.compile, export:\none operator a layer,\nby any of the other three", PYTHON),
        (71, "reference.py", "a plain loop: any device,\nany dtype, differentiable\nto any order", TORCH),
    ):
        box(axes, left, 34, (20, 9), name, text, colour)
    arrow(axes, (34, 43), (34, 48), "layer_loop.py: the Inputs of one layer in one direction")
    box(axes, 13, 48, (48, 8), "autograd.py, fused.py",
        "what is saved for backward; gates_x = x W_ih^T + b: one product\n"
        "gradients of weights: products over all steps", PYTHON)  # fmt: skip
    arrow(axes, (61, 52), (81, 43))
    axes.text(74, 50, "gradients of gradients", va="center", size=7, color=INK)
    arrow(axes, (37, 56), (37, 60), "gates_x [T, B, 4H], Recurrence of the Inputs, states [1, B, P] and [1, B, H]")
    box(axes, 13, 60, (48, 7), "kernels/layer.py",
        "a Layer for each Problem, which has all sizes, and card\n"
        "its plan is chosen and verified once", KERNEL)  # fmt: skip
    box(axes, 66, 60, (25, 7), "kernels/memory.py",
        "results, gradients, scratch;\nmargins around all of them", KERNEL)  # fmt: skip
    arrow(axes, (61, 63.5), (66, 63.5))
    arrow(axes, (30, 67), (24, 71))
    arrow(axes, (50, 67), (67, 71))
    box(axes, 1, 71, (46, 8), "kernels/triton_rnn/launch.py",
        "resident.py: one program | cooperative.py: many, exchange h\n"
        "step.py: many, a grid-wide barrier after each step | pointwise.py: cuBLAS at each step", KERNEL)  # fmt: skip
    box(axes, 51, 71, (40, 8), "kernels/cupy_rnn/launch.py",
        "CUDA C++, where Triton cannot run:\ncuBLAS and a kernel at each step", KERNEL)  # fmt: skip
    arrow(axes, (24, 79), (24, 83))
    arrow(axes, (67, 79), (67, 83))
    box(axes, 1, 83, (90, 6), "GPU memory",
        "in: gates_x, W_hh, h0, c0; out: h, h_n, c_n; for backward the activated gates (over gates_x) and c",
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
                    axes.annotate("", (ready, end), start, arrowprops=HANDED_OVER, zorder=0.5)  # behind the bars
            starts[number] = max(ready, published[number] + 8)
        axes.text(min(published), lanes[0] - 1.6, f"h of step {step} published", size=6.8, color="#c0392b", ha="center")
    axes.annotate("", (90, 33), (13, 33), arrowprops={"arrowstyle": "-|>", "color": FAINT})
    axes.text(88, 34.3, "time", size=7.5, color=FAINT, ha="center")
    axes.text(
        13, 36, "Each program publishes h of its own units first. The next step starts once no word of h that it loads "
        "is the sentinel;\nstores and prefetched gates hide behind the wait. Every step has its own place in memory: "
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
