"""Tell comments and strings from code, one character at a time: a highlighter of Python that learns from examples.

Run it from the root of the repository. The texts are the standard library of the Python that runs it::

    pip install -e ".[demo]"
    python examples/highlight.py

A line in the middle of a docstring may look like code. Only the quotation marks that opened the docstring tell the
difference, and they may be a thousand characters back. gpu_lstm.StackedLSTM reads 140 files once, on the GPU if there
is one. Its state is carried from chunk to chunk, and reset where a file starts. Then it reads 20 other files. Two
rivals with short memories read them, too: a table of the labels that followed up to 16 characters, and the same LSTM
with its state set to zero every 32 characters.

The example prints how often each reader is right. It draws a page of an unseen file in out/highlight.png, with the cell
that knows whether a quotation is open. out/highlight_cell.png shows the state of this cell at each character.
"""

import argparse
import hashlib
import io
import statistics
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import gpu_lstm

CODE, STRING, COMMENT = range(3)
TRAINING_FILES, TEST_FILES = 140, 20
SHORTEST, LONGEST = 8_000, 30_000  # characters of a file; a longer file is cut off
STREAMS = 32  # N: the text of all files is cut into so many streams, which are read at the same time
STEPS = 128  # T, the steps of a chunk
HIDDEN_SIZES = [64]
LEARNING_RATE = 8e-3  # its greatest value
CUT = 32  # characters after which the second rival forgets
CONTEXTS = 1, 2, 3, 4, 6, 8, 12, 16  # characters that the table sees
FAR = 1000  # characters after a string's first one
LINES, COLUMNS = 28, 72  # the size of the page that is drawn

State = list[tuple[Tensor, Tensor]]
"""h and c of each layer."""


class Source(NamedTuple):
    """A file of Python."""

    name: str
    text: str
    characters: Tensor  # [characters], ASCII
    labels: Tensor  # [characters]


class Score(NamedTuple):
    """How often a reader of the test files is right."""

    accuracy: float  # over all characters
    balanced: float  # the mean of the accuracies of code, strings and comments
    far: float  # over characters in strings that are more than FAR after the first one


def main(seed: int = 0, files: int = TRAINING_FILES, out: Path = Path("out")) -> dict[str, Score]:
    """Train on so many files, evaluate and draw. Return the scores by the name of the reader."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more do not help so small a model, and slow it down if other work shares the cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = standard_library(TEST_FILES + files)
    test, training = sources[:TEST_FILES], sources[TEST_FILES:]
    x, y, starts = (stream.to(device) for stream in streams(training))  # [steps, N] each
    print(f"{x.numel():,} characters of {len(training)} files to learn from, each read once, on {device}.")

    models = {"StackedLSTM": Tagger(), f"the same, state zeroed every {CUT}": Tagger(cut=CUT)}
    by_table = f"table of the last {CONTEXTS[-1]} characters"
    with Progress(TextColumn("{task.description}"), BarColumn(24), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"Counting: {by_table}", total=len(models) * len(x))
        guesses = {by_table: padded(table_of_contexts(training, test), -1)}
        for name, model in models.items():
            bar.update(task, description=f"Training: {name}")
            train(model.to(device), x, y, starts, lambda: bar.advance(task, STEPS))

    labels = padded([source.labels for source in test], -1)  # [L, files]
    for name, model in models.items():
        guesses[name] = read(model, test).cpu()
    scores = {name: score(guess, labels) for name, guess in guesses.items()}
    table = Table(
        "", "accuracy", "mean of\nthe classes", f"over {FAR:,} after\nthe quote", title="Right, % of characters"
    )
    for name, its in scores.items():
        table.add_row(name, *(f"{100 * share:.1f}" for share in its))
    count, long = (labels >= 0).sum(), far_from_the_quote(labels).sum()
    table.caption = f"{count:,} characters of {len(test)} other files; {long:,} so far after the quote"
    Console().print(table)

    model = models["StackedLSTM"]
    file, rows = page_of(test)
    unit = cell_of_strings(model, x[:1024], y[:1024], starts[:1024])
    cell = cell_along(model, test[file], rows, unit)
    pages = {
        "The truth": labels,
        f"Table of {CONTEXTS[-1]} characters": guesses[by_table],
        f"{HIDDEN_SIZES[-1]} LSTM units": guesses["StackedLSTM"],
    }
    draw(test[file], rows, cell, {name: its[rows, file] for name, its in pages.items()}, out / "highlight.png")
    draw_cell(test[file].text[rows], cell, out / "highlight_cell.png")
    return scores


# The texts


def standard_library(count: int) -> list[Source]:
    """Return `count` files of the library. Their order is random, but the same in every version of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in (*root.glob("*.py"), *root.glob("*/*.py"))]
    left_out = "test", "-packages", "encodings", "idlelib", "pydoc_data"  # tables; modules that may be missing
    names = [name for name in names if not any(part in name for part in left_out)]
    sources: list[Source] = []
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = (root / name).read_text("utf-8")
        if len(text) >= SHORTEST and len(sources) < count:
            characters = np.frombuffer(text.encode("ascii", "replace"), np.uint8)[:LONGEST]
            labels = np.frombuffer(label(text), np.uint8)[:LONGEST]
            sources.append(Source(name, text, *(torch.from_numpy(t.astype(np.int64)) for t in (characters, labels))))
    return sources


def label(text: str) -> bytearray:
    """Return the label of each character, by Python's own tokenizer. An f-string is a string with its expressions."""
    labels, places = bytearray(len(text)), [0]  # places: where lines start
    for line in text.split("\n"):
        places.append(places[-1] + len(line) + 1)
    opened: list[int] = []  # f-strings, which may be nested; before Python 3.12 each is one token
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        begin, end = (places[row - 1] + column for row, column in (token.start, token.end))
        if name.endswith("STRING_START"):  # FSTRING_START, and TSTRING_START since 3.14
            opened.append(begin)
        elif name.endswith("STRING_END"):
            begin, name = opened.pop(), "STRING"
        if name in ("STRING", "COMMENT") and not opened:
            labels[begin:end] = bytes([STRING if name == "STRING" else COMMENT]) * (end - begin)
    return labels


def streams(sources: list[Source]) -> tuple[Tensor, Tensor, Tensor]:
    """Return characters, labels and starts of all files, one after another, cut into streams: [steps, N]."""
    characters, labels = (torch.cat(texts) for texts in zip(*(source[2:] for source in sources)))
    starts = torch.cat([torch.arange(len(source.labels)) == 0 for source in sources])
    steps = len(labels) // STREAMS // STEPS * STEPS
    characters, labels, starts = (t[: steps * STREAMS].view(STREAMS, steps).T for t in (characters, labels, starts))
    return characters.contiguous(), labels.contiguous(), starts.contiguous()


def padded(sequences: list[Tensor], value: int = 0) -> Tensor:
    """Return the sequences as one tensor [L, sequences], padded with `value`."""
    return nn.utils.rnn.pad_sequence(sequences, padding_value=value)


# The readers


class Tagger(nn.Module):
    """Map characters to scores of code, string and comment. With `cut`, the state is set to zero every `cut` steps."""

    def __init__(self, cut: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = gpu_lstm.StackedLSTM(32, HIDDEN_SIZES)
        self.head = nn.Linear(HIDDEN_SIZES[-1], 3)
        self.cut = cut

    def forward(
        self, x: Tensor, state: State | None = None, starts: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return scores [T, N, 3] and the state, for characters [T, N] and the starts of files, bool [T, N]."""
        if self.cut:
            every = (torch.arange(len(x), device=x.device) % self.cut == 0)[:, None].expand_as(x)
            starts = every if starts is None else starts | every
        y, state = self.lstm(self.embedding(x), state, resets=starts, lengths=lengths)
        return self.head(y), state


def training_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, starts: Tensor, state: State | None
) -> State:
    """Run forward, backward, clipping and the optimiser on one chunk [T, N]. Return the state for the next chunk."""
    scores, state = model(x, state, starts)
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return [(h.detach(), c.detach()) for h, c in state]


def train(model: Tagger, x: Tensor, y: Tensor, starts: Tensor, advance: Callable[[], None]) -> None:
    """Read all streams [steps, N] once, and call advance() after each chunk."""
    optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=len(x) // STEPS)
    state = None
    for chunk in zip(*(t.split(STEPS) for t in (x, y, starts))):
        state = training_step(model, optimiser, *chunk, state)
        schedule.step()
        advance()


@torch.no_grad()
def read(model: Tagger, sources: list[Source]) -> Tensor:
    """Return the labels [L, files] of all files, by one padded call."""
    lengths = torch.tensor([len(source.characters) for source in sources])
    device = model.head.weight.device
    scores, _ = model(padded([source.characters for source in sources]).to(device), lengths=lengths.to(device))
    return scores.argmax(dim=2)


def table_of_contexts(training: list[Source], test: list[Source]) -> list[Tensor]:
    """Return the labels [characters] of each test file, by a table of contexts.

    The label of a character is the commonest label in training for the same context. A context is the last CONTEXTS[-1]
    characters, this one included, or fewer if that context was not seen in training.
    """
    characters, labels = (torch.cat(texts).numpy() for texts in zip(*(source[2:] for source in training + test)))
    split = sum(len(source.labels) for source in training)
    guess = np.full(len(labels) - split, CODE)
    hashed = np.zeros(len(labels), np.uint64)  # a hash of the last `length` characters
    for length in range(1, CONTEXTS[-1] + 1):
        earlier = np.roll(characters, length - 1).astype(np.uint64)  # reaches into the file before, at a file's start
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + earlier + np.uint64(1)
        if length in CONTEXTS:
            contexts, which = np.unique(hashed, return_inverse=True)
            seen = np.bincount(3 * which[:split] + labels[:split], minlength=3 * len(contexts)).reshape(-1, 3)
            its = seen[which[split:]]  # [characters, 3]
            guess = np.where(its.any(axis=1), its.argmax(axis=1), guess)
    return list(torch.from_numpy(guess).split([len(source.labels) for source in test]))


# The scores


def far_from_the_quote(labels: Tensor) -> Tensor:
    """Return bool [L, files]: whether a character is in a string, and more than FAR after the first one of it."""
    steps = torch.arange(len(labels))[:, None].expand_as(labels)
    begin = torch.where(labels == STRING, 0, steps).cummax(dim=0).values  # the last step outside a string
    return (labels == STRING) & (steps - begin > FAR + 1)


def score(guess: Tensor, labels: Tensor) -> Score:
    """Return the score of guesses [L, files]. The labels [L, files] are -1 past the end of a file."""
    right = (guess == labels).double()
    classes = [right[labels == kind].mean().item() for kind in (CODE, STRING, COMMENT)]
    return Score(
        right[labels >= 0].mean().item(), statistics.mean(classes), right[far_from_the_quote(labels)].mean().item()
    )


# The picture


def page_of(sources: list[Source]) -> tuple[int, slice]:
    """Return a file, and the characters of LINES of its lines that have much of a docstring, comments and code."""
    best, found = 0, (0, slice(0))
    for number, source in enumerate(sources):
        lines = source.text[: len(source.labels)].split("\n")[:-1]
        places = np.cumsum([0, *(len(line) + 1 for line in lines)])
        for first in range(len(lines) - LINES + 1):
            begin, end = places[first], places[first + LINES]
            whole = source.labels[begin] == source.labels[end - 1] == CODE
            if whole and max(map(len, lines[first : first + LINES])) <= COLUMNS:
                length = [0, 0, 0]  # characters of code, of the longest docstring and of comments
                for kind, run in runs(source.labels[begin:end]):
                    size = run.stop - run.start
                    if kind != STRING:
                        length[kind] += size
                    elif source.text.startswith('"""', begin + run.start):
                        length[kind] = max(length[kind], size)
                worth = min(length)
                if worth > best:
                    best, found = worth, (number, slice(begin, end))
    return found


def runs(labels: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each run of equal labels [characters]: the label and its place."""
    changes = (labels.diff().nonzero().flatten() + 1).tolist()
    for begin, end in pairwise([0, *changes, len(labels)]):
        if begin < end:
            yield int(labels[begin]), slice(begin, end)


@torch.no_grad()
def cell_of_strings(model: Tagger, x: Tensor, y: Tensor, starts: Tensor) -> int:
    """Return the unit whose cell state correlates most with being inside a string, over [T, N] of training files."""
    c = gpu_lstm.trace(model.lstm, model.embedding(x), resets=starts).layers[0][0].cell.flatten(0, 1)  # [T*N, H]
    inside = (y == STRING).flatten().to(c.dtype)
    return int(torch.corrcoef(torch.column_stack([inside, c]).T)[0, 1:].abs().argmax())


@torch.no_grad()
def cell_along(model: Tagger, source: Source, rows: slice, unit: int) -> np.ndarray:
    """Return the cell state of a unit at these characters of a file. The file is read from its start."""
    x = source.characters[: rows.stop, None].to(model.head.weight.device)
    state = model(x[: rows.start])[1] if rows.start else None
    return gpu_lstm.trace(model.lstm, model.embedding(x[rows]), state).layers[0][0].cell[:, 0, unit].cpu().numpy()


INK = "#22303c", "#a03c00", "#1b58a0"  # the colours of code, strings and comments
TINT = "#ffffff", "#ffdcb8", "#cfe3fa"
DOTS = 150  # per inch
FONT = 7 / 0.602 * 72 / DOTS  # points: letters of DejaVu Sans Mono are 7 dots wide
TITLE: dict = {"fontsize": 8, "loc": "left", "pad": 3}


def draw(source: Source, rows: slice, cell: np.ndarray, pages: dict[str, Tensor], path: Path) -> None:
    """Draw the cell's state, and below it the page in the colours of labels [characters], the true labels first."""
    truth = next(iter(pages.values()))
    wide, high = COLUMNS * 7 / DOTS, LINES * 14.5 / DOTS  # inches
    gap, above = 0.16, 0.95
    total = len(pages) * (wide + gap) + gap, high + above + 0.85
    figure = Figure(figsize=total)

    def panel(left: float, bottom: float, width: float, height: float) -> Axes:
        axes = figure.add_axes((left / total[0], bottom / total[1], width / total[0], height / total[1]))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("0.8")
        return axes

    axes = panel(gap, high + 0.6, total[0] - 2 * gap, above)
    band = to_rgba_array(TINT)[truth.numpy()][None]  # [1, characters, RGBA]
    axes.imshow(band, aspect="auto", extent=(0, len(cell), cell.min() - 0.1, cell.max() + 0.1))
    axes.plot(np.arange(len(cell)) + 0.5, cell, color="#c0392b", linewidth=1)
    if np.corrcoef(cell, truth == STRING)[0, 1] < 0:
        axes.invert_yaxis()  # strings above
    axes.set_title("What one of the LSTM's cells holds while the page below is read, character by character", **TITLE)
    for number, (name, labels) in enumerate(pages.items()):
        axes = panel(gap + number * (wide + gap), gap, wide, high)
        write(axes, source.text[rows], labels, to_rgba_array(TINT)[labels.numpy()])
        wrong = 100 * (labels != truth).double().mean()
        axes.set_title(f"{name}: {wrong:.1f} % wrong" if number else name, **TITLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS)
    print(f"Picture: {path}, with lines of {source.name}")


def draw_cell(text: str, cell: np.ndarray, path: Path) -> None:
    """Draw the page. A character is the redder, the farther the cell's state [characters] is from its median."""
    away = np.abs(cell - np.median(cell))
    wide, high, gap, above = COLUMNS * 7, LINES * 14.5, 6, 24  # dots
    figure = Figure(figsize=((wide + 2 * gap) / DOTS, (high + gap + above) / DOTS))
    area = gap, gap, wide, high
    axes = figure.add_axes([part / whole for part, whole in zip(area, 2 * tuple(DOTS * figure.get_size_inches()))])
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")
    axes.set_title("One cell of the LSTM, letter by letter: red inside a string", **TITLE)
    tints = to_rgba_array(["#e8402a"] * len(cell), alpha=away / away.max())
    write(axes, text, torch.zeros(len(cell), dtype=torch.long), tints)
    figure.savefig(path, dpi=DOTS)


def write(axes: Axes, text: str, labels: Tensor, tints: np.ndarray) -> None:
    """Write LINES of text in the ink of labels [characters], on tints [characters, RGBA]."""
    colours, begin = np.ones((LINES, COLUMNS, 4)), 0  # RGBA, white
    for number, line in enumerate(text.split("\n")[:-1]):
        its = slice(begin, begin + len(line))
        colours[number, : len(line)] = tints[its]
        for kind, run in runs(labels[its]):
            style = {"fontsize": FONT, "family": "monospace", "va": "center", "parse_math": False}
            axes.text(run.start, number + 0.55, line[run], color=INK[kind], **style)
        begin += len(line) + 1
    axes.imshow(colours, aspect="auto", extent=(0, COLUMNS, LINES, 0), interpolation="nearest")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--files", type=int, default=TRAINING_FILES, help="to learn from; default: %(default)s")
    main(**vars(parser.parse_args()))
