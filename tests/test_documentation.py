"""The pages and .github.

README, pages, examples and the lesson run, do what they say, and have no dead links, and the site is built. Workflows,
the section on CI and the page on a first run are valid and safe, and everything that they name exists.
"""

import copy
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial

import check_jsonschema
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from installed import ROOT, load
from nbclient import NotebookClient

import gpu_lstm
from bench import report, results
from bench.__main__ import main as bench_main
from gpu_lstm.__main__ import main as gpu_lstm_main

DOCS, EXAMPLES, README, CPU = ROOT / "docs", ROOT / "examples", ROOT / "README.md", ROOT / "bench/results/cpu"
ONE_THREAD = CPU.parent / "amd-epyc-1-thread.csv"
PAGES, LESSON = sorted(DOCS.glob("*.md")), nbformat.read(EXAMPLES / "lstm_explained.ipynb", as_version=4)
WITHOUT_EXAMPLES = "api", "benchmarks", "compared", "design", "first_gpu_run", "testing", "versions"
WITH_EXAMPLES = [README, *(page for page in PAGES if page.stem not in WITHOUT_EXAMPLES)]
website = load(DOCS / "scripts" / "website.py")


def read(file):
    return (ROOT / file).read_text()


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # test_graphs.py tests the other backends.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # test_stream.py tests the newer exporter.
    monkeypatch.setattr(torch.onnx, "export", partial(torch.onnx.export, dynamo=False))
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    if page != README:
        return
    found = [names[name] for name in ("output", "h1", "c1", "h2", "c2")]  # results of the last example
    assert [tuple(t.shape) for t in found] == [(50, 3, 5), (3, 4), (3, 4), (3, 5), (3, 5)]
    assert type(names["model"][0]) is torch.nn.LSTM  # it was converted, and back


def test_the_figures_of_the_pages_are_those_of_the_stored_results():
    names = "docs/reinforcement_learning", "docs/cells_and_options", "docs/benchmarks", "CHANGELOG"
    page, of_gru, benchmarks, changelog = (read(f"{name}.md") for name in names)
    updates = pd.read_csv(CPU / "ppo.csv").query("H == 128 and device == 'AMD EPYC, 1 thread'")
    rows = report.measured(results.read(ONE_THREAD))
    ways = ["rl_games-pieces", "rsl_rl-padded", "torchrl-pad", "cleanrl-loop"]
    beside = rows[(rows["reset_rate"] > 0) & rows["over_ours"].notna()]
    its = beside[beside["provider"].isin(ways) & (beside["mode"] == "training") & (beside["variant"] == "plain")]
    small = its["hidden_size"] <= 256
    kinds = [its["cell"], small, small & (its["reset_rate"] < 0.01), its["provider"]]  # rows and columns of the page
    spans = (
        its.groupby(kinds)["over_ours"]
        .agg(lambda each: f"{each.min():#.3g} to {each.max():#.3g}")
        .unstack(fill_value="not measured")
    )
    best = its[(its["cell"] == "lstm") & its["provider"].isin(ways[:2])]
    fast, around = updates.groupby("cell")["times as fast"].agg(["min", "max"]), best.groupby("case")["over_ours"].min()
    lstm, gru = ("{:.1f} to {:.1f}".format(*fast.loc[cell]) for cell in ("LSTM", "GRU"))
    for text, said in (
        (page, f"{lstm} times as fast with an LSTM"), (benchmarks, f"| LSTM {lstm}, GRU {gru} |"),
        (page, f"{gru} times with a GRU"), (of_gru, f"{lstm} times as fast, and with a GRU {gru} times"),
        (benchmarks, f"| {around.min():.1f} to {around.max():.1f} |"),
        (changelog, "recipes for seven trainers"),
        *((page, f"| {' | '.join(row)} |") for row in spans[ways].to_numpy()),
    ):  # fmt: skip
        assert said in " ".join(text.split())
    assert len(re.findall(r"(?m)^### ", re.search(r"## Your trainer\n(.*?)\n## ", page, flags=re.DOTALL)[1])) == 7


def test_the_table_of_models_is_that_of_the_stored_results():
    benchmarks = read("docs/benchmarks.md")
    digits = lambda values: " | ".join(f"{v:.2f}" if v < 9.995 else f"{v:.1f}" for v in values)  # noqa: E731
    models = pd.read_csv(CPU / "models.csv")
    for (name, layers), its in models.groupby(["model", "recurrent layers"]):
        assert f"| {name} | {layers} | {digits(its['times as fast'])} |" in benchmarks
    of_readme = {  # the beginning of a row of the README, and its model
        "an xLSTM stack": "xLSTM stack",
        "a speech recogniser": "speech recogniser, CTC",
        "a keyword spotter": "keyword spotter, streamed",
        "a speech separator": "speech separator, DPRNN",
    }
    readme, by_model = read(README), models.groupby("model")["times as fast"]
    for begin, name in of_readme.items():
        cells = re.escape(digits(by_model.get_group(name)[:2]))
        assert re.search(rf"\| {begin}[^|]* \| {cells} \|", readme)
    rest = models[models["device"].str.endswith("1 thread") & ~models["model"].isin(of_readme.values())]
    low, high = (rest.groupby("pass")["times as fast"].agg(each) for each in ("min", "max"))
    training, inference = (f"{low[each]:.2f} to {high[each]:.2f}" for each in ("training", "inference"))
    assert rest["model"].nunique() == 4
    said = f"The other four models are {training} times as fast in training, and {inference} times in inference."
    assert said in " ".join(readme.split())


def test_the_tables_of_recurrent_ppo_and_of_acting_have_the_stored_medians_and_percentiles():
    """Written from the stored rows, the page does not change."""
    drawing, page = load(DOCS / "scripts" / "ppo_updates.py"), read("docs/reinforcement_learning.md")
    iterations, steps = "| cell, units | environments |", "| cell, N |"
    stored = [pd.read_csv(CPU / f"{name}.csv").query("device == 'AMD EPYC, 1 thread'") for name in ("ppo", "acting")]
    again = drawing.write(page, iterations, drawing.iterations(stored[0]))
    assert drawing.write(again, steps, drawing.steps(stored[1])) == page
    ends = {"times as fast": 9.994, "p20": 0.5, "p80": 9.995}
    of = lambda *names: {f"{name}{each}": end for name in names for each, end in ends.items()}  # noqa: E731
    of_ppo = pd.DataFrame([{"cell": "GRU", "H": 7, "N": 3} | of("", "rollout, ", "iteration, ")])
    assert drawing.iterations(of_ppo) == [["GRU, 7", "3", *["9.99 (0.50 to 10.0)"] * 3]]
    rows = [{"cell": "GRU", "N": 4096, "resets": on, "torch.nn us": 1234.5 + on} | of("module, ", "Stream, ")
            for on in (True, False)]  # fmt: skip
    both = ["9.99 (0.50 to 10.0)"] * 2
    assert drawing.steps(pd.DataFrame(rows)) == [["GRU, 4,096", "1,234", *both, "1,236", *both]]
    with pytest.raises(ValueError, match="one table"):
        drawing.write("| cell, N |", steps, [])


def test_the_speeds_of_the_slstm_are_those_of_the_stored_results():
    page = " ".join(read("docs/slstm.md").split())
    for file, machine, batches in (("amd-epyc", "AMD EPYC", (16, 1)), ("intel-xeon", "Intel Xeon", (16,))):
        rows = results.read(CPU.parent / f"{file}-1-thread.csv")
        its = rows[(rows["cell"] == "slstm") & (rows["provider"] == "xlstm-vanilla")]
        for batch in batches:
            cells = []
            for mode in ("training", "forward"):
                row = its[(its["batch"] == batch) & (its["mode"] == mode)].iloc[0]
                low_and_high = f"{row['over_ours_low']:#.3g}-{row['over_ours_high']:#.3g}"
                cells.append(f"{row['over_ours']:#.3g} ({low_and_high})")
            assert f"| {machine}, 1 thread | {batch} | {' | '.join(cells)} |" in page
    rows = results.read(ONE_THREAD)
    its = rows[(rows["cell"] == "slstm") & rows["provider"].isin(["ours", "xlstm-vanilla"])].groupby("provider")
    (ours, theirs), kept = 2 * its["error"].max(), its["kept_bytes"].max()  # errors are shares of the limit, 2
    assert f"at most {ours:.2f} times the errors of torch's operators, and xlstm's own are at most {theirs:.2f}" in page
    assert f"it keeps {kept.iloc[1] / 1e9:.2f} GB for backward, and ours keeps {kept.iloc[0] / 1e6:.0f} MB" in page
    models = pd.read_csv(CPU / "models.csv")
    stack = models[models["model"] == "xLSTM stack"]
    for threads, its in stack.groupby(stack["device"].str.extract(r"(\d threads?)$")[0]):
        rows = its.set_index("pass").loc[["training", "inference"], ["times as fast", "p20", "p80"]]
        cells = [f"{fast:.2f} ({low:.2f}-{high:.2f})" for fast, low, high in rows.to_numpy()]
        assert f"| {threads} | {' | '.join(cells)} |" in page


def test_the_choices_on_a_cpu_waste_little_and_are_nowhere_much_slower_than_torchs_own():
    files, page = ("choices.csv", "choices-amd-epyc.csv"), read("docs/benchmarks.md")
    rows = pd.concat([pd.read_csv(CPU / name) for name in files])
    rows["machine"] = rows["device"].str.replace(r"\(R\)| Processor|, \d thread.*", "", regex=True)
    loops = rows["chosen"] == "numba"
    rows["waste"] = rows["ratio"].where(loops, 1 / rows["ratio"]).clip(lower=1)
    rows["over"] = rows["ratio"].where(loops, 1.0)
    mean = lambda values: np.exp(np.log(values).mean())  # noqa: E731
    assert (rows.groupby(["machine", "threads", "cell", "what"])["waste"].agg(mean) <= 1.03).all()
    assert rows["waste"].max() <= 1.3
    above = rows["over"][(rows["before"] == "torch") & (rows["over"] > 1.05)]
    assert f"One call of these {len(rows):,} took more than 1.05 times" in " ".join(page.split())
    assert f"{above.item():.2f} times" in page
    for (machine, threads), its in rows.groupby(["machine", "threads"]):
        figures = f"{mean(its['waste']):.3f} | {its['waste'].max():.2f} | {mean(its['over']):.2f}"
        figures += f" | {its['over'].max():.2f}"
        share = (its["chosen"] == "numba").mean()
        assert f"| {machine} | {threads} | {len(its)} | {share:.0%} | {figures} |".replace("%", " %") in page


OF_README = {  # how a row of the README begins, its case, and its rival
    "train a GRU |": ("training-fp32-T128-B16-I128-H128-gru", "torch"),
    "train an LSTM on sequences of different lengths": ("training-fp32-T128-B16-I128-H128-ragged", "torch-packed"),
    "train an LSTM on sequences in which 2 %": ("training-fp32-T128-B16-I128-H128-resets-2.0%", "rl_games-pieces"),
    "update an LSTM by recurrent PPO, with 8 environments": ("ppo", "LSTM, N = 8, H = 128"),
    "train a plain LSTM": ("training-fp32-T128-B16-I128-H128", "torch"),
    "run one step of a GRU": ("step-fp32-T1-B1-I128-H128-gru", "torch"),
    "train an LSTM with layer norm": ("training-fp32-T128-B16-I128-H128-layer_norm", "torch"),
}


def test_the_rows_of_the_readme_are_those_of_the_stored_results_and_its_counts_those_of_the_pages():
    readme = read(README)
    cases, of_xeon = (
        report.measured(results.read(CPU.parent / f"{name}-1-thread.csv")).set_index(["case", "provider"])["over_ours"]
        for name in ("amd-epyc", "intel-xeon")
    )
    ppo = pd.read_csv(CPU / "ppo.csv").query("cell == 'LSTM' and N == 8 and H == 128").set_index("device")
    (update, iteration), of_xeon_ppo = (
        ppo.loc[f"{cpu}, 1 thread", ["times as fast", "iteration, times as fast"]]
        for cpu in ("AMD EPYC", "Intel(R) Xeon(R) Processor")
    )
    key = OF_README["update an LSTM by recurrent PPO, with 8 environments"]
    rows, on_xeon = {**cases, key: update}, {**of_xeon, key: of_xeon_ppo.iloc[0]}
    cell = lambda figure: "–" if figure is None else f"{figure:.2f}"  # noqa: E731, RUF001
    table = re.search(r"## Speed on a CPU\n(.*?)\n## ", readme, flags=re.DOTALL)[1]
    lines = [line.removeprefix("| ") for line in table.splitlines() if re.search(r"\d \| \S+ \|$", line)]
    for line, (begin, key) in zip(lines, OF_README.items(), strict=True):
        assert line.startswith(begin)
        assert line.endswith(f"| {cell(rows[key])} | {cell(on_xeon.get(key))} |"), (line, rows[key])
    of_torch, words = cases.xs("torch", level="provider"), " ".join(readme.split())
    gru = OF_README["train a GRU |"]
    assert f"{cases[gru]:.2f} times as fast as `nn.GRU` on an AMD EPYC, and {of_xeon[gru]:.2f} times as fast" in words
    plain_grus = "training.*-H\\d+-gru$"
    others = pd.concat(
        each.xs("torch", level="provider").filter(regex=plain_grus).drop(gru[0]) for each in (cases, of_xeon)
    )
    assert f"GRUs of other sizes train {others.min():.2f} to {others.max():.1f} times as fast" in words
    loop, plain = (("training-fp32-T128-B16-I128-H128", name) for name in ("ours-reference", "torch"))
    assert [round(each[loop] / each[plain]) for each in (cases, of_xeon)] == [3, 5]  # "a third", "a fifth"
    assert of_torch.idxmax().endswith("H32-gru")
    assert of_torch.idxmin().endswith("-layer_norm")
    span = f"from {of_torch.max():.1f} times as fast (a GRU of 32 units) to {of_torch.min():.2f} (layer norm)"
    assert span in words
    both = f"{iteration:.2f} times as fast on the AMD EPYC, and {of_xeon_ppo.iloc[1]:.2f} times on the Intel Xeon"
    assert f"a rollout and four updates. It is {both}" in words
    compiled = re.findall(r"(?m)^\| `(\w+)`", read("dev/compile_table/README.md"))
    for counted, name in (set(compiled), "kernels"), (compiled, "combinations"):
        assert re.findall(rf"\b(\d+) {name}\b", words) == [str(len(counted))] * 2
    (runs,) = re.findall(r"in ([\d,]+) runs", read("docs/testing.md"))
    (tests,) = re.findall(r"([\d,]+) tests and [\d,]+ deep tests passed", read("docs/testing.md"))
    hundreds = round(int(tests.replace(",", "")), -2)
    assert re.findall(r"([\d,]+) tests\b", words) == [f"{hundreds:,}"] * 3
    assert set(re.findall(r"([\d,]+)\s+runs\b", readme)) == {runs}


def links(text):
    """Return the files that Markdown links to or shows, also in HTML, except in its examples."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.findall(r"(?:\]\(|(?:src|srcset)=\")(?!https?:)([^)#\"]+)", text)


def test_every_page_is_in_the_readme_and_the_navigation_and_every_link_leads_somewhere():
    assert {f"docs/{page.name}" for page in PAGES} <= set(links(read(README)))
    named = re.findall(r"\w+\.md", str(yaml.safe_load(read("mkdocs.yml"))["nav"]))
    made = ["index.md", "lesson.md"]  # website.py makes them of the README and of the notebook
    assert sorted(named) == sorted([*made, *(page.name for page in PAGES)])
    markdown = "\n".join(cell.source for cell in LESSON.cells if cell.cell_type == "markdown")
    texts = {EXAMPLES / "lstm_explained.ipynb": markdown} | {page: read(page) for page in (README, *PAGES)}
    for page, path in ((page, path) for page, text in texts.items() for path in links(text)):
        assert (page.parent / path).exists(), (page.name, path)


def test_the_page_of_the_api_has_every_public_name_once(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # gpu_lstm.keras.LSTM imports Keras
    api = read("docs/api.md")
    described = [pkgutil.resolve_name(name) for name in re.findall(r"(?m)^- `([\w.]+)`", api)]
    assert len(described) == len(set(described))
    named = [getattr(gpu_lstm, name) for name in gpu_lstm.__all__]
    public = {value for value in named if not inspect.ismodule(value)}
    for module in (gpu_lstm.compat, gpu_lstm.functional):  # without names that they import
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        public |= {value for value in own.values() if getattr(value, "__module__", "") == module.__name__}
    of_keras = {getattr(gpu_lstm.keras, name) for name in [*gpu_lstm.keras.__all__, "LSTM", "GRU"]}
    assert public | of_keras <= set(described)
    (members,) = re.findall(r"- `gpu_lstm.Stream` with (.*):", api)
    assert {name for name in vars(gpu_lstm.Stream) if not name.startswith("_")} <= set(re.findall(r"\w+", members))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Return the kinds of a cell's output: "stdout", or the formats in which something was displayed."""
    return {output["name"] if output.output_type == "stream" else frozenset(output.data) for output in cell.outputs}


def execute(notebook, folder):
    """Run the cells of a notebook. They may take any time, and so may the start of a kernel on a loaded machine."""
    resources = {"metadata": {"path": folder}}
    NotebookClient(notebook, startup_timeout=3600, kernel_name="python3", resources=resources).execute()


@pytest.mark.deep
def test_every_cell_of_the_lesson_runs_and_the_kinds_of_output_are_stored(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel chooses its own
    examples = shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "__pycache__"))
    executed = copy.deepcopy(LESSON)
    for cell in code(executed):
        cell.outputs = []  # less training is enough here; make lesson-run trains in full
        cell.source = re.sub(r"for seed in range\(\d\)", "for seed in range(1)", cell.source)
        cell.source = cell.source.replace("epochs=40", "epochs=12")
    execute(executed, examples)
    kept = code(LESSON)
    for ran, stored in zip(code(executed), kept):
        assert kinds(ran) == kinds(stored), ran.source
    assert sum(ran.source != stored.source for ran, stored in zip(code(executed), kept)) == 2


@pytest.mark.deep
def test_the_notebook_for_a_card_runs_on_a_cpu_too_and_ends_in_the_line_to_send_back(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    notebook = nbformat.read(EXAMPLES / "colab_gpu.ipynb", as_version=4)
    nbformat.validate(notebook)
    execute(notebook, ROOT)
    found = json.loads(code(notebook)[-1].outputs[0].text)
    assert {"device", "backend", "torch", "gpu_lstm"} <= set(found)
    assert all(row[found["columns"].index("error")] <= 1 for row in found["rows"])
    assert frozenset({"text/plain", "image/png"}) in kinds(code(notebook)[-2])


def test_the_lesson_is_stored_of_one_run_without_errors_or_the_machine_that_ran_it_and_its_page_has_it_all():
    nbformat.validate(LESSON)
    cells = code(LESSON)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" and output.get("name") != "stderr" for output in cell.outputs), cell
        texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
        assert not any(re.search(r"/(tmp|home|root|Users)/|site-packages", text) for text in texts), cell.source
        if any("image/png" in kind for kind in kinds(cell)):
            assert re.search(r"  # [A-Z].{20,}$", cell.source), f"what does the picture show? {cell.source}"
    assert set(LESSON.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in LESSON.cells)  # metadata includes times of execution
    text, pictures = website.lesson(LESSON)
    assert [n for n in range(1, len(cells) + 1) if f"(../docs/pictures/lesson_{n}.png)" in text] == [*pictures]
    for cell in LESSON.cells:
        shown = cell.source.rpartition("  # ")[0] if cell.get("execution_count") in pictures else cell.source
        assert shown in text or "\n" not in shown


def test_the_stored_table_of_kernels_has_every_case_and_nothing_that_spills():
    from dev.compile_table import triton_kernels

    triton, _ = read("dev/compile_table/README.md").split("## CUDA C++")
    rows = [line.strip("| ").split(" | ") for line in triton.splitlines() if line.startswith("| `")]
    stored = Counter()
    for kernel, case, *_ in rows:  # a row names every B that its kernel serves
        batches, rest = re.fullmatch(r"B=([\d, ]+)( H=.*)", case).groups()
        stored.update((f"B={batch}{rest}", "backward" in kernel) for batch in batches.split(", "))
    assert stored == Counter((str(c).removeprefix("bfloat16 "), c.backward) for c in triton_kernels.cases(h100=True))
    assert {row[4] for row in rows} == {"0"}
    assert {row[9] for row in rows if "step" not in row[0]} == {"0"}


@pytest.mark.deep
def test_the_site_is_built_strictly_with_its_formulas_and_docstrings_and_loads_nothing_from_elsewhere(tmp_path):
    """Three links in the copy lead nowhere. They are the only complaints."""
    pytest.importorskip("zensical", reason="zensical needs Python 3.11")
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bench", "dev", "examples", "gpu_lstm", "kernels", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "what_runs.md").open("a") as file:
        file.write("\n[x](nowhere.md) [x](design.md#nowhere) [x](../README.md#nowhere)\n")
    subprocess.run([sys.executable, "docs/scripts/website.py"], cwd=tmp_path, check=True)  # as make docs does
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 1
    assert re.search(r"(?m)^3 issues found$.*Aborted because --strict", done.stdout, re.DOTALL), done.stdout
    assert "griffe:" not in done.stdout, done.stdout
    site = tmp_path / "out" / "site"
    pages = {path.parent.name: path for path in site.rglob("index.html") if path.parent != site}
    assert set(pages) == {"lesson", *(page.stem for page in PAGES)}
    loaded = r'<(?:script|img|link rel="?stylesheet)\b[^>]*?\b(?:src|href)="?([^">\s]+)'
    for path in pages.values():
        for target in re.findall(loaded, text := read(path)):
            assert (path.parent / target.split("?")[0]).exists() or target.startswith("data:"), (path, target)
        assert 'data-md-component="source"' not in text, "from which a script asks GitHub"
    text = read(pages["lesson"])
    assert text.count("<math") > 50
    assert ('display="block"' in text, text.count("<mtr>") > 1, "&<" in text) == (True, True, False)
    assert "$" not in re.sub(r"<(pre|script|code).*?</\1>", "", text, flags=re.DOTALL)
    api = read(pages["api"])
    assert all(said in api for said in ("(D*L, N, P) and (D*L, N, H)", "<strong>Example</strong>"))
    assert "Bases: " not in api
    assert "resets_from_dones" in (site / "search.json").read_text()


ACTION = ROOT / ".github/actions/gpu-lstm/action.yml"
PAGE = read("docs/what_runs.md").split("## In your CI")[1]
FIRST_RUN = read("docs/first_gpu_run.md")
# The blocks of the page: (language, text).
BLOCKS = re.findall(r"^```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
TEXTS = {path.stem: read(path) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TEXTS |= {f"docs-{number}": text for number, text in enumerate(text for kind, text in BLOCKS if kind == "yaml")}
WORKFLOWS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = {(name, key): job for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
STEPS += yaml.safe_load(read(ACTION))["runs"]["steps"]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]
COMMANDS = "\n".join(
    [*SCRIPTS, *(text for kind, text in BLOCKS if not kind), *re.findall(r"`([^`\n]+)`", PAGE + FIRST_RUN)]
)
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]


def run(*command, **options):
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, **options})


def test_all_are_found_and_valid(tmp_path, capsys):
    assert {"ci", "docs", "gpu", "nightly", "release", "docs-0"} == set(WORKFLOWS)
    paths = [tmp_path / f"{name}.yml" for name in TEXTS]
    for path in paths:
        path.write_text(TEXTS[path.stem])
    for schema, files in {
        "vendor.github-workflows": paths, "custom.github-workflows-require-timeout": paths,
        "vendor.github-actions": [ACTION], "vendor.dependabot": [ROOT / ".github/dependabot.yml"],
        "vendor.github-issue-forms": (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"),
        "vendor.citation-file-format": [ROOT / "CITATION.cff"],
    }.items():  # fmt: skip
        status = check_jsonschema.main(["--builtin-schema", schema, *map(str, files)], standalone_mode=False)
        assert status == 0, capsys.readouterr()


def test_jobs_may_only_read_but_for_two_that_publish_and_run_no_code_of_ours():
    for (name, key), job in JOBS.items():
        workflow = WORKFLOWS[name]
        assert workflow["permissions"] == {"contents": "read"}
        assert "self-hosted" not in job["runs-on"] or "pull_request" not in workflow[True]  # YAML 1.1 reads on as True
        assert key == "publish" or "permissions" not in job, name
    for name, permissions, actions in (
        ("release", {}, ["actions/download-artifact", "pypa/gh-action-pypi-publish"]),
        ("docs", {"pages": "write"}, ["actions/deploy-pages"]),
    ):
        job = JOBS[name, "publish"]
        assert job["permissions"] == {"id-token": "write"} | permissions
        assert [step["uses"].split("@")[0] for step in job["steps"]] == actions
    assert (JOBS["release", "publish"]["needs"], JOBS["release", "test"]["needs"]) == ("test", "build")
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}
    assert JOBS["docs", "publish"]["if"] == "github.ref == 'refs/heads/main'"


@pytest.mark.parametrize(("tag", "status"), [(f"v{gpu_lstm.__version__}", 0), ("v9.9.9", 1)])
def test_a_tag_that_is_not_the_version_is_not_released(tmp_path, tag, status):
    (script,) = (step["run"] for step in JOBS["release", "build"]["steps"] if "TAG" in step.get("env", ()))
    (tmp_path / "CHANGELOG.md").write_text(f"## {gpu_lstm.__version__}, 2027-01-31\n")
    (tmp_path / "dist").mkdir()
    (tmp_path / f"dist/gpu_lstm-{gpu_lstm.__version__}-py3-none-any.whl").touch()
    assert run(*BASH, script, cwd=tmp_path, env={"TAG": tag}).returncode == status
    (tmp_path / "CHANGELOG.md").write_text(f"## {gpu_lstm.__version__}, unreleased\n")
    assert run(*BASH, script, cwd=tmp_path, env={"TAG": tag}).returncode == 1


def test_actions_of_others_are_pinned_to_commits_with_their_versions():
    pinned = {}
    for path in [*(ROOT / ".github/workflows").glob("*.yml"), ACTION]:
        for action, rest in re.findall(r"uses: ([^.@\s][^@\s]+)(.*)", read(path)):
            assert re.fullmatch(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", rest), f"{path.name}: {action}{rest}"
            assert pinned.setdefault(action, rest) == rest
    assert {"actions/checkout", "pypa/gh-action-pypi-publish"} <= set(pinned)
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert all(re.fullmatch("[0-9a-f]{40}", hook["rev"]) for hook in hooks)


def test_versions_agree():
    matrix, project = JOBS["ci", "test"]["strategy"]["matrix"], read("pyproject.toml")
    assert f'requires-python = ">={matrix["python"][0]}"' in project
    assert f"Python {matrix['python'][0]} to {matrix['python'][-1]}" in read("Makefile")
    for name, key in ("ci", "wheel"), ("release", "test"):
        assert JOBS[name, key]["strategy"]["matrix"]["python"] == [matrix["python"][0], matrix["python"][-1]]
    (oldest,) = {each["torch"] for each in matrix["include"]}
    assert f'"torch>={oldest}"' in project
    assert yaml.safe_load(read("CITATION.cff"))["version"] == gpu_lstm.__version__


def test_scripts_are_bash_without_expressions_and_name_files_and_make_targets_that_exist():
    for script in SCRIPTS:
        assert "${{" not in script  # its value would be run as code, so it comes by the environment
        assert run("bash", "-n", "-c", script).returncode == 0, script
    for target in set(re.findall(r"\bmake ([\w.-]+)", COMMANDS)):
        assert run("make", "-n", target).returncode == 0, target
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "out")
    named = re.findall(rf"(?<![\w/.$])(?:{folders})/[\w./-]*", "\n".join([*SCRIPTS, FIRST_RUN]))
    named += re.findall(r"cache-dependency-path: (\S+)", "\n".join(TEXTS.values()))
    for name in named:
        made = name.startswith((".venv/", "bench/results/"))  # by the workflow, or by whoever stores a run
        assert made or (ROOT / name).exists(), name


def test_inputs_of_this_repositorys_action_exist_and_so_do_commands_and_their_options(capsys):
    inputs = set(yaml.safe_load(read(ACTION))["inputs"])
    used = [step for step in STEPS if re.search(r"/\.github/actions/gpu-lstm(@|$)", step.get("uses", ""))]
    assert len(used) == 2
    assert all(set(step["with"]) <= inputs for step in used)
    assert set(re.findall(r"^ +# ([\w-]+):", PAGE, flags=re.MULTILINE)) <= inputs
    mains = {"bench": bench_main, "gpu_lstm": gpu_lstm_main}
    named = re.findall(r"python -m (bench|gpu_lstm)(?: ([a-z]\w*))?([^\n]*)", COMMANDS)
    assert {("bench", "gpu"), ("bench", "compare"), ("gpu_lstm", "")} <= {(module, word) for module, word, _ in named}
    for module, word, rest in named:
        with pytest.raises(SystemExit, match=r"^0$"):
            mains[module]([*[word] * bool(word), "--help"])
        usage = capsys.readouterr().out
        for option in re.findall(r"(?<!\S)--[\w-]+", rest):
            assert re.search(rf"{option}\b", usage), f"{module} {word} {option}"


@pytest.mark.parametrize(("status", "baseline"), [(1, ""), (2, "ci/mine.csv"), (0, None)])
def test_the_action_compares_with_the_run_of_this_card_if_any_and_ends_as_that(tmp_path, status, baseline):
    """The run of this card is stored, or another `baseline` is given. With None there is neither."""
    (script,) = (script for script in SCRIPTS if "bench compare" in script)
    file = "bench/results/nvidia-h100-80gb-hbm3.csv"
    for folder in ("gpu-lstm", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
    card = 'if [ "$1" = -c ]; then echo "NVIDIA H100 80GB HBM3"; exit; fi'
    (tmp_path / "python").write_text(f'#!/bin/bash\n{card}\necho "$@"\nexit {status}\n')
    (tmp_path / "python").chmod(0o755)
    if baseline is not None:
        (tmp_path / file).touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BASELINE": baseline or "", "FAIL_UNDER": "0.9",
                   "GITHUB_WORKSPACE": "/project", "GITHUB_STEP_SUMMARY": f"{tmp_path}/summary",
                   "RUNNER_TEMP": str(tmp_path)}  # fmt: skip
    done, path = run(*BASH, script, cwd=tmp_path, env=environment), f"/project/{baseline}" if baseline else file
    said = f"-m bench compare {path} {tmp_path}/gpu-lstm/results.csv --fail-under 0.9\n"
    assert done.returncode == status
    if baseline is None:
        said = done.stdout
        assert f"no earlier run on NVIDIA H100 80GB HBM3, no {file}" in said
    assert done.stdout == said
    assert (tmp_path / "summary").read_text() == (said if baseline is None else f"```\n{said}```\n")
