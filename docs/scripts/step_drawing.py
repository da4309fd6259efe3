"""The drawing at the top of the README, for light and dark pages: python docs/scripts/step_drawing.py writes both.

It shows one forward step of kernels/triton_rnn/threads/resident.py, whose docstring describes the same step in words.
"""

from drawings import FOLDER, PALETTES, Palette, arrow, box, canvas
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


def step(palette: Palette) -> Figure:
    """Draw one step: the product with W_hh, the gates and the cell. Colours tell registers from memory."""
    figure, axes = canvas(96, 56, palette)
    axes.text(2, 4.5, "One step of an LSTM, fused", size=12, weight="bold", color=palette.ink, va="center")
    frame = FancyBboxPatch((2, 12), 92, 32, boxstyle="round,pad=0,rounding_size=1.2", facecolor="none",
                           edgecolor=palette.faint, lw=1.2, ls=(0, (4, 3)))  # fmt: skip
    axes.add_patch(frame)
    axes.text(4, 14.2, "one launch runs all T steps", size=9.5, color=palette.faint, va="center")

    from_x = "x W_ih^T + b of this step; one product has computed it for all steps"
    for left, top, width, title, text, colour in (
        (37, 1, 57, "GPU memory, read", from_x, palette.memory),
        (4, 17, 27, "W_hh", "loaded once, stays in registers", palette.kernel),
        (69, 17, 23, "c", "stays in registers, float32", palette.kernel),
        (4, 28.5, 27, "product  W_hh h", "on tensor cores", palette.computed),
        (37, 28.5, 26, "gates", "i, f, o = sigmoid, g = tanh", palette.computed),
        (69, 28.5, 23, "cell", "c = f c + i g,  h = o tanh(c)", palette.computed),
        (37, 48, 57, "GPU memory, written", "h of this step; for backward also i, f, g, o and c", palette.memory),
    ):  # fmt: skip
        box(axes, (left, top), (width, 7), (title, text), colour, palette)

    for start, end in (
        ((17.5, 24), (17.5, 28.5)), ((31, 32), (37, 32)), ((63, 32), (69, 32)),  # from W_hh on to the cell
        ((50, 8), (50, 28.5)), ((78, 24), (78, 28.5)), ((84, 28.5), (84, 24)), ((88, 35.5), (88, 48)),
    ):  # fmt: skip
        arrow(axes, start, end, palette.ink)
    axes.plot([75, 75, 17.5, 17.5], [35.5, 40, 40, 37], color=palette.state, lw=1.6, solid_joinstyle="round")
    arrow(axes, (17.5, 39), (17.5, 35.5), palette.state)
    axes.text(46, 41.7, "h for the next step goes through shared memory: one barrier", size=9.5, color=palette.state,
              ha="center", va="center")  # fmt: skip

    named = (
        ("stays in registers for all steps", palette.kernel), ("computed, in registers", palette.computed),
        ("GPU memory", palette.memory),
    )  # fmt: skip
    for k, (text, colour) in enumerate(named):
        top = 47.6 + 2.7 * k
        axes.add_patch(FancyBboxPatch((4, top), 2.4, 1.6, boxstyle="round,pad=0,rounding_size=0.3", facecolor=colour,
                                      edgecolor=palette.ink, lw=0.7))  # fmt: skip
        axes.text(7.4, top + 0.9, text, size=9, color=palette.ink, va="center")
    return figure


if __name__ == "__main__":
    for name, palette in PALETTES.items():
        step(palette).savefig(FOLDER / f"step_{name}.svg", metadata={"Date": None})
