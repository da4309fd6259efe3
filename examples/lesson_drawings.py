"""The drawings of lstm_explained.ipynb: networks in the letters of the formulas, gates in the colours of the plots."""

from lesson_plots import HUES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

INK, PALE = "#22303c", "#f2f4f6"
Point = tuple[float, float]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure whose unit is a tenth of an inch, with the origin at the bottom left."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, middle: Point, size: Point, text: str, colour: str = INK, fill: str = PALE) -> None:
    """A box around a text."""
    x, y = middle
    width, height = size
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=colour, lw=1.3))
    axes.text(x, y, text, ha="center", va="center", size=11, color=colour, linespacing=1.4)


def operation(axes: Axes, middle: Point, text: str, colour: str = INK) -> None:
    """A circle around a sign."""
    axes.add_patch(Circle(middle, 1.7, facecolor="white", edgecolor=colour, lw=1.3, zorder=3))
    axes.text(*middle, text, ha="center", va="center_baseline", size=11, color=colour, zorder=4)


def arrow(axes: Axes, *points: Point, colour: str = INK, head: bool = True) -> None:
    """Draw a line from point to point, with a head at the last one."""
    line = points[:-1] if head else points
    axes.plot(*zip(*line), color=colour, lw=1.3, solid_joinstyle="round", zorder=2)
    if head:
        style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=2)


def label(axes: Axes, x: float, y: float, text: str, colour: str = INK, size: float = 11, ha: str = "center") -> None:
    axes.text(x, y, text, ha=ha, va="center", size=size, color=colour, linespacing=1.4)


def dots(axes: Axes, middle: Point, count: int, colour: str, fill: str) -> None:
    """A dot for each number of a vector."""
    for k in range(count):
        place = middle[0] + 1.7 * (k - (count - 1) / 2), middle[1]
        axes.add_patch(Circle(place, 0.62, facecolor=fill, edgecolor=colour, zorder=3))


def rnn() -> Figure:
    """A plain recurrent network, folded and unrolled over three steps."""
    figure, axes = canvas(88, 34)
    for x, t in ((12, "t"), (40, "t-1"), (57, "t"), (74, "t+1")):
        box(axes, (x, 16), (7, 6), f"$h_{{{t}}}$", HUES["hidden"])
        label(axes, x, 3, f"$x_{{{t}}}$")
        label(axes, x, 29, f"$y_{{{t}}}$")
        arrow(axes, (x, 4.8), (x, 13))
        arrow(axes, (x, 19), (x, 27))
        label(axes, x + 0.8, 8.5, "$W_x$", ha="left")
        label(axes, x + 0.8, 23, "$W_y$", ha="left")
    arrow(axes, (15.5, 17.8), (20, 17.8), (20, 14.2), (15.5, 14.2), colour=HUES["hidden"])
    label(axes, 20.8, 16, "$W_h$", HUES["hidden"], ha="left")
    for left, right in ((28.5, 36.5), (43.5, 53.5), (60.5, 70.5), (77.5, 85.5)):
        arrow(axes, (left, 16), (right, 16), colour=HUES["hidden"])
        label(axes, (left + right) / 2 - 0.3, 18, "$W_h$", HUES["hidden"])
    label(axes, 12, 32.4, "folded", size=9.5)
    label(axes, 57, 32.4, "unrolled: the same three matrices at every step", size=9.5)
    return figure


def cell() -> Figure:
    """One step of an LSTM: three gates, the candidate, the cell state and the hidden state."""
    figure, axes = canvas(88, 46)
    axes.add_patch(FancyBboxPatch((9, 5.5), 69, 37, boxstyle="round,pad=0,rounding_size=1.5", fc=PALE, ec="0.75"))
    keep, write, show = HUES["forget"], HUES["input"], HUES["output"]
    new, memory, shown = HUES["candidate"], HUES["cell"], HUES["hidden"]
    gates = ((19, "forget", "f", r"\sigma"), (32, "input", "i", r"\sigma"),
             (45, "candidate", "g", r"\tanh"), (60, "output", "o", r"\sigma"))  # fmt: skip
    for x, field, letter, squashing in gates:
        arrow(axes, (x, 9), (x, 13))
        box(axes, (x, 16), (11, 6), f"${letter}_t$   ${squashing}$\n", HUES[field], "white")
        label(axes, x, 14.6, "forget (keep)" if field == "forget" else field, HUES[field], size=8.5)

    # The cell state runs along the top.
    arrow(axes, (4.5, 37), (17.3, 37), colour=memory)
    arrow(axes, (20.7, 37), (36.8, 37), colour=memory)
    arrow(axes, (40.2, 37), (83, 37), colour=memory)
    label(axes, 4.5, 39.5, "$c_{t-1}$", memory)
    label(axes, 83, 39.5, "$c_t$", memory)
    label(axes, 52, 39, "cell state", memory, size=9)
    arrow(axes, (19, 19), (19, 35.3), colour=keep)
    operation(axes, (19, 37), r"$\odot$", keep)
    operation(axes, (38.5, 37), "+", memory)
    arrow(axes, (32, 19), (32, 27.5), (36.8, 27.5), colour=write)
    arrow(axes, (45, 19), (45, 27.5), (40.2, 27.5), colour=new)
    arrow(axes, (38.5, 29.2), (38.5, 35.3), colour=new)
    operation(axes, (38.5, 27.5), r"$\odot$", write)

    # The hidden state.
    arrow(axes, (72, 37), (72, 33.2), colour=memory)
    box(axes, (72, 31.2), (6.5, 4), r"$\tanh$", memory, "white")
    arrow(axes, (72, 29.2), (72, 25.2), colour=memory)
    arrow(axes, (60, 19), (60, 23.5), (70.3, 23.5), colour=show)
    operation(axes, (72, 23.5), r"$\odot$", show)
    arrow(axes, (72, 21.8), (72, 9), (83, 9), colour=shown)
    label(axes, 83, 11.5, "$h_t$", shown)
    label(axes, 71, 11, "hidden state", shown, size=9, ha="right")

    # The inputs of all gates run along the bottom.
    arrow(axes, (4.5, 9), (12, 9), colour=shown, head=False)
    arrow(axes, (12, 9), (60, 9), head=False)
    arrow(axes, (12, 3.2), (12, 9), head=False)
    label(axes, 4.5, 11.5, "$h_{t-1}$", shown)
    label(axes, 12, 1.8, "$x_t$")
    label(axes, 14, 2, "Each of the four boxes has weights of its own for $x_t$ and for $h_{t-1}$.", size=9, ha="left")
    return figure


def stack() -> Figure:
    """Layers of 4 and 5 units over three steps of 6 features."""
    figure, axes = canvas(88, 43)
    for t, x in enumerate((25, 44, 63), start=1):
        for y, count in ((15, 4), (27, 5)):
            box(axes, (x, y), (11, 5.5), "", HUES["hidden"])
            dots(axes, (x, y), count, HUES["hidden"], HUES["hidden"])
        dots(axes, (x, 3.5), 6, INK, "white")
        label(axes, x + 7.4, 3.5, f"$x_{t}$")
        label(axes, x, 37, f"$h^2_{t}$", HUES["hidden"])
        arrow(axes, (x, 5), (x, 12.2))
        arrow(axes, (x, 17.8), (x, 24.2), colour=HUES["hidden"])
        arrow(axes, (x, 29.8), (x, 35), colour=HUES["hidden"])
        label(axes, x + 0.8, 21, f"$h^1_{t}$", HUES["hidden"], ha="left")
    for layer, y in ((1, 15), (2, 27)):
        for left, right in ((13, 19.5), (30.5, 38.5), (49.5, 57.5), (68.5, 75)):
            arrow(axes, (left, y - 1.2), (right, y - 1.2), colour=HUES["hidden"])
            arrow(axes, (left, y + 1.2), (right, y + 1.2), colour=HUES["cell"])
        label(axes, 12.3, y + 1.4, f"$c^{layer}_0 = 0$", HUES["cell"], ha="right")
        label(axes, 12.3, y - 1.4, f"$h^{layer}_0 = 0$", HUES["hidden"], ha="right")
        label(axes, 75.7, y + 1.4, f"$c^{layer}_3$", HUES["cell"], ha="left")
        label(axes, 75.7, y - 1.4, f"$h^{layer}_3$", HUES["hidden"], ha="left")
        label(axes, 79, y, ("4 units", "5 units")[layer - 1], size=9.5, ha="left")
    label(axes, 79, 3.5, "6 features", size=9.5, ha="left")
    label(axes, 79, 37, "output", size=9.5, ha="left")
    label(axes, 44, 41, "step by step to the right, layer by layer upwards", size=9.5)
    return figure


def gru() -> Figure:
    """One step of a GRU: two gates, the candidate, and the hidden state, which is the memory, too."""
    figure, axes = canvas(88, 46)
    axes.add_patch(FancyBboxPatch((9, 5.5), 69, 37, boxstyle="round,pad=0,rounding_size=1.5", fc=PALE, ec="0.75"))
    keep, look, new, state = HUES["update"], HUES["reset"], HUES["candidate"], HUES["hidden"]
    for x, field, letter, squashing in ((18.5, "update", "z", r"\sigma"), (34, "reset", "r", r"\sigma"),
                                        (70, "candidate", "n", r"\tanh")):  # fmt: skip
        arrow(axes, (x + 2, 7.5), (x + 2, 13))
        box(axes, (x, 16), (11, 6), f"${letter}_t$   ${squashing}$\n", HUES[field], "white")
        label(axes, x, 14.6, field, HUES[field], size=8.5)

    # The hidden state runs along the top. z, r and the product with W_hn read it.
    arrow(axes, (4.5, 37), (16.8, 37), colour=state)
    arrow(axes, (20.2, 37), (68.3, 37), colour=state)
    arrow(axes, (71.7, 37), (83, 37), colour=state)
    label(axes, 4.5, 39.5, "$h_{t-1}$", state)
    label(axes, 83, 39.5, "$h_t$", state)
    label(axes, 43.5, 39, "hidden state", state, size=9)
    arrow(axes, (11, 37), (11, 10), (50, 10), colour=state, head=False)
    for x in (16.5, 32, 50):
        arrow(axes, (x, 10), (x, 13), colour=state)

    # The part of h that stays, z h, and the part of n that is added, (1 - z) n.
    arrow(axes, (18.5, 19), (18.5, 35.3), colour=keep)
    operation(axes, (18.5, 37), r"$\odot$", keep)
    arrow(axes, (18.5, 28.5), (41.8, 28.5), colour=keep)
    operation(axes, (43.5, 28.5), "$1{-}$", keep)
    arrow(axes, (45.2, 28.5), (68.3, 28.5), colour=keep)
    arrow(axes, (70, 19), (70, 26.8), colour=new)
    operation(axes, (70, 28.5), r"$\odot$", keep)
    arrow(axes, (70, 30.2), (70, 35.3), colour=new)
    operation(axes, (70, 37), "+", state)

    # r acts on the product of h with W_hn, not on h itself.
    box(axes, (50, 16), (14, 6), "$W_{hn} h_{t-1} + b_{hn}$", state, "white")
    arrow(axes, (57, 16), (59.1, 16), colour=state)
    arrow(axes, (34, 19), (34, 23), (60.8, 23), (60.8, 17.7), colour=look)
    operation(axes, (60.8, 16), r"$\odot$", look)
    arrow(axes, (62.5, 16), (64.5, 16), colour=look)

    arrow(axes, (11, 3.2), (11, 7.5), (72, 7.5), head=False)
    label(axes, 11, 1.8, "$x_t$")
    text = "$z$ and $r$ have weights for $x_t$ and for $h_{t-1}$; "
    text += "the candidate multiplies $h_{t-1}$ by $W_{hn}$ before $r$ acts."
    label(axes, 13, 2, text, size=9, ha="left")
    return figure
