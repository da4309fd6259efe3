"""docs/production.md: its image, built without docker and without a network, its table of failures, and its logs."""

import fcntl
import importlib.metadata
import os
import pty
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from installed import ROOT, checkout, empty_environment, run

pytest.importorskip("numba")
PAGE = (ROOT / "docs/production.md").read_text()
VERSIONS = (ROOT / "docs/versions.md").read_text()
(DOCKERFILE,) = re.findall(r"```dockerfile\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line.split(" ", 1) for line in DOCKERFILE.splitlines()]
SET = dict(rest.split("=") for word, rest in LINES if word == "ENV")
PINS = dict(re.findall(r"(\w+)==([\d.]+)", DOCKERFILE))
HIDDEN = int(re.search(r"--hidden (\d+)$", DOCKERFILE, re.MULTILINE)[1])
# Variables of the tests that these processes do not get.
NOT_TOLD = "GPU_LSTM_", "XDG_CACHE_HOME", "TRITON_", "NUMBA_", "PYTHON"
OF_TESTS = {name: value for name, value in os.environ.items() if not name.startswith(NOT_TOLD)}
OF_TESTS |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The folder that takes the place of /, after COPY and RUN. Other workers wait for the first, since compiling takes
    long."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "image"
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "finished").exists():
            make_image(root)
            (root / "finished").touch()
    return root


def make_image(root):
    """Execute each line of the Dockerfile that makes something, with /src and /opt in a folder.

    The pinned versions are replaced by the installed ones."""
    shutil.rmtree(root, ignore_errors=True)
    python = empty_environment(root / "python")
    (pip := python.with_name("pip")).write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    pip.chmod(0o755)
    assert ["COPY", "gpu_lstm /src"] in LINES
    checkout(root / "src")
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_ROOT_USER_ACTION": "ignore", "HOME": str(root)}
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    for word, line in LINES:
        if word == "ENV":
            path |= [line.split("=")]
        if word != "RUN":
            continue
        for name, version in PINS.items():
            line = line.replace(f"{name}=={version}", f"{name}=={importlib.metadata.version(name)}")
        done = run(["sh", "-ec", re.sub(r"(?<![\w/])/(?=src|opt)", f"{root}/", line)], cwd=root, env=offline | path)
        assert "gpu_lstm compile" not in line or not done.stderr, done.stderr


def in_process(code, *arguments, python=sys.executable, status=0, **environment):
    """Run a program in which main() is the command line. Check the exit status."""
    program = "import sys\ndef main():\n    from gpu_lstm import __main__ as command\n"
    program += "    sys.exit(command.main(sys.argv[1:]))\n" + textwrap.dedent(code)
    told = {name: value for name, value in (OF_TESTS | environment).items() if value is not None}
    done = subprocess.run([python, "-W", "error:gpu_lstm", "-c", program, *arguments], env=told, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture
def shared(image, tmp_path):
    """The environment of a process that reads the image's folder, and has a new folder of its own."""
    return dict(GPU_LSTM_SHARED_CACHE=str(image / "opt/gpu_lstm"), XDG_CACHE_HOME=str(tmp_path))


FIRST_CALLS = """
    import itertools, logging, torch, gpu_lstm
    from gpu_lstm.verification import verify
    from gpu_lstm.kernels.numba_rnn import build
    logging.basicConfig(level="INFO")
    def verdict(layer, pass_, *_):
        raise AssertionError(f"verified again: {layer.problem} {pass_}")
    verify._verdict = verdict
    x, H = torch.randn(50, 5, 3), int(sys.argv[1])
    lengths, resets = torch.tensor([50, 3, 0, 9, 20]), torch.rand(50, 5) < 0.2
    ragged = ({}, dict(lengths=lengths), dict(lengths=lengths.int()))
    calls = [(x[:1], {}), *((x, each | more) for each in ragged for more in ({}, dict(resets=resets)))]
    cells, kinds = ["LSTM", "GRU", "SLSTM"], [False, True]
    for cell, both, backend, lost in itertools.product(cells, kinds, [None, "numba"], range(3)):
        module = getattr(gpu_lstm, cell)(3, H, bidirectional=both, backend=backend)
        for sequences, given in calls:
            with torch.no_grad():
                module(sequences, **given)
            y, state = module(sequences, **given)
            h_n = state if cell == "GRU" else state[0]
            sum(t.square().mean() for t in ([y], [h_n], [y, h_n])[lost]).backward()
    print([build.function(name).compiled.cache_hits for name in ("forward", "backward", "matmul")])
"""


def test_in_the_image_a_first_training_and_a_first_inference_compile_and_verify_nothing(image):
    """The user has no home, and cannot write to the folder."""
    folder = Path(f"{image}{SET['GPU_LSTM_SHARED_CACHE']}")
    # Other workers may write verifications into the image meanwhile.
    before = {path: path.stat().st_mtime_ns for path in (folder / "compiled").rglob("*")}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in before)
    serving = SET | dict(GPU_LSTM_SHARED_CACHE=str(folder), HOME="/nonexistent", PYTHONPATH=None)
    done = in_process(FIRST_CALLS, str(HIDDEN), python=image / "python/bin/python", **serving)
    assert done.stdout == "[1, 1, 1]\n"
    assert "compiles" not in done.stderr
    assert re.search(rf"INFO:gpu_lstm:GRU 3 -> {HIDDEN}, .*: numba: asked for by the argument `backend`", done.stderr)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "compiled").rglob("*")}
    arguments = re.search("gpu_lstm (compile .*)", DOCKERFILE)[1].split()
    check = in_process("main()", *arguments, python=image / "python/bin/python", **serving)
    assert check.stderr == ""
    assert f"kept in {folder}/compiled/" in check.stdout


def test_a_size_that_was_not_named_is_verified_at_its_first_call(shared):
    assert "verified again" in in_process(FIRST_CALLS, str(HIDDEN + 1), status=1, **shared).stderr


def rows():
    """Return the rows of the table of failures, by words that tell them apart."""
    table = PAGE.split("## Failures")[1].split("\n## ")[0]
    found = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    names = "Numba", "kept", "unwritable", "copied", "another", "mistyped", "wrong", "memory"
    return dict(zip(names, found, strict=True))


def quoted(cell):
    """Return the quotations in a cell of that table, without the code of users."""
    return [text for text in re.findall("`([^`]+)`", cell) if " " in text]


NO_NUMBA = "sys.modules['numba'] = None\n"
ANOTHER_CPU = "import llvmlite.binding as of\nof.get_host_cpu_name = lambda: 'another'\n"
WRONG = "from gpu_lstm.verification import verify\nverify._verdict = lambda *_: 'the RMS error of h is 1'\n"
SLIGHTLY_WRONG = """
from gpu_lstm.verification.verify import Small
right = Small.by_kernels
Small.by_kernels = lambda *given: {name: t * 1.0005 for name, t in right(*given).items()}
"""  # the error is smaller than TF32 rounds, but no CPU has TF32
MEMORY = """
import resource, torch
import gpu_lstm.kernels.numba_rnn.launch
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
"""
KILLED = """
import os
from gpu_lstm.verification import verify
if os.fork():
    os.wait()
else:
    verify._verdict = lambda *_: os.kill(os.getpid(), 15)
"""  # a child runs the program before its parent does
MISTYPED = "import os\nos.environ['GPU_LSTM_SHARED_CACHE'] = '/opt/gpu_lstn'\n"
NO_TEMPORARY = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # no file can be written
# Larger files cannot be written. Python 3.11 would keep the first 4,096 bytes of its bytecode.
FULL_DISK = (
    "import resource, sys\nsys.dont_write_bytecode = True\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="as Linux has it")


@pytest.mark.parametrize(("row", "fault", "words", "cache", "found"), [
    ("Numba", NO_NUMBA, [], "new", 1), pytest.param("kept", "", [], "/sys", 1, marks=LINUX),
    ("kept", "", [], "a file", 1), ("kept", FULL_DISK, [], "new", 1),
    pytest.param("unwritable", "", ["--hidden", "4"], "shared", 1, marks=LINUX),
    ("copied", NO_TEMPORARY, [], "shared", 2), ("mistyped", MISTYPED, [], "image", 1),
    ("wrong", WRONG, ["--hidden", "7"], "image", 1),
    ("wrong", SLIGHTLY_WRONG, ["--hidden", "5"], "image", 1),
    ("wrong", KILLED, ["--hidden", "6"], "image", 3),
    pytest.param("memory", MEMORY, ["--hidden", "3000"], "image", 1, marks=LINUX),
])  # fmt: skip
def test_compile_says_in_one_line_what_failed_as_the_table_has_it(
    image, shared, tmp_path, row, fault, words, cache, found
):
    """`found` of the quotations in the table are in the line."""
    (file := tmp_path / "a file").touch()
    folders = {"new": tmp_path, "a file": file, "image": image / "opt"}
    told = (shared if cache == "shared" else {}) | dict(XDG_CACHE_HOME=str(folders.get(cache, "/sys")))
    done = in_process(f"{fault}main()", "compile", "--cells", "gru", *words, status=1, **told)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert sum(text in line for text in quoted(rows()[row][1])) == found, line
    assert not list(tmp_path.rglob("*.nb?")), "half of it is not kept"


CALL = "import torch, gpu_lstm\ngpu_lstm.GRU(3, 9, backend={})(torch.randn(20, 2, 3))\n"
AT_INFO = "import logging\nlogging.basicConfig(level='INFO')\n"


@pytest.mark.parametrize(("row", "fault", "backend", "fails"), [
    ("Numba", NO_NUMBA, None, False), ("Numba", NO_NUMBA, "numba", True), ("another", ANOTHER_CPU, "numba", False),
    pytest.param("unwritable", "", None, True, marks=LINUX), ("copied", NO_TEMPORARY, None, True),
    ("mistyped", MISTYPED, None, True),
    ("wrong", KILLED, "numba", True), ("wrong", WRONG, None, True), ("wrong", WRONG, "numba", True),
])  # fmt: skip
def test_a_process_says_what_the_table_has(shared, row, fault, backend, fails):
    """A warning is an error here. A stand-in, which computes nothing, replaces the loop that another CPU has to
    compile."""
    if row == "another":
        fault += "from gpu_lstm.kernels.numba_rnn import build\nfrom gpu_lstm.verification import verify\n"
        fault += "build.compile_in = lambda *_: build.numba.cfunc('void(intp)')(lambda address: None)\n"
        fault += "verify._verdict = lambda *_: 'right'\n"
    if row == "unwritable":
        shared["XDG_CACHE_HOME"] = "/sys"
    done = in_process(AT_INFO + fault + CALL.format(repr(backend)), status=int(fails), **shared)
    said = quoted(rows()[row][1 if row != "another" else 2])
    assert any(text in done.stderr for text in said), done.stderr


def test_the_doctor_says_whether_loops_are_compiled_for_this_cpu_and_with_what(image, shared, tmp_path):
    def said(fault="", **environment):
        printed = in_process(f"{fault}main()", **environment).stdout
        return dict(re.findall(r"^ +(\S+(?: \S+)*) {2,}(\S.*)$", printed, re.MULTILINE))

    ours = said(XDG_CACHE_HOME=str(image / "opt"))
    assert ours["folder"] == f"{image}/opt/gpu_lstm"
    assert re.fullmatch(rf"{image}/opt/gpu_lstm/compiled/\w{{16}}", ours["loops compiled for this CPU"])
    assert ours["threads"] == "1"
    assert re.fullmatch("[0-9.]+", ours["llvmlite"])
    assert ours["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert said(**shared)["loops compiled for this CPU"] == ours["loops compiled for this CPU"]
    assert said(XDG_CACHE_HOME=str(tmp_path))["loops compiled for this CPU"] == "none yet"
    (text,) = quoted(rows()["another"][2])
    assert said(ANOTHER_CPU, XDG_CACHE_HOME=str(image / "opt"))["loops compiled for this CPU"] == f"none yet; {text}"
    assert said(NO_NUMBA)["loops compiled for this CPU"].startswith(f"none: {quoted(rows()['Numba'][1])[0]}")


def test_where_a_card_is_compile_says_that_the_first_call_compiles(image):
    card = "from gpu_lstm import __main__ as command\ncommand.cuda_devices = lambda: 1\n"
    words, cache = ["compile", "--hidden", str(HIDDEN)], str(image / "opt")
    done = [in_process(f"{fault}main()", *words, XDG_CACHE_HOME=cache) for fault in ("", card)]
    first, *rest = done[1].stdout.splitlines()
    assert [first] == done[0].stdout.splitlines()
    assert rest == ["on a card the first call of each kind compiles its kernels"]


LITTLE = """
    from gpu_lstm.kernels.numba_rnn import build, steps
    def little(address):
        pass
    steps.little = little
    build.function("little")(0)
"""


def test_before_it_compiles_one_line_tells_whoever_waits_at_a_terminal(tmp_path):
    """It runs in another process, since only the system knows whether there is a terminal."""
    program = ["-W", "error", "-c", textwrap.dedent(LITTLE)]
    ours, theirs = pty.openpty()
    environment = OF_TESTS | {"XDG_CACHE_HOME": str(tmp_path / "terminal")}
    subprocess.run([sys.executable, *program], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    said = "gpu_lstm compiles its little loop for this CPU, once, in up to 10 seconds"
    assert os.read(ours, 1 << 16).decode().splitlines() == [said]
    os.close(ours)
    for of_log, lines in (("", ""), (AT_INFO, f"INFO:gpu_lstm:{said}\n")):
        done = in_process(of_log + textwrap.dedent(LITTLE), XDG_CACHE_HOME=str(tmp_path / f"log {bool(of_log)}"))
        assert done.stderr == lines


def test_the_examples_write_the_lines_that_they_show(tmp_path):
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    lines = re.findall("^# (INFO:.*\n)", code, flags=re.MULTILINE)
    assert len(lines) == 3
    assert in_process(code, XDG_CACHE_HOME=str(tmp_path)).stderr == "".join(lines)


LOOPS_WIN = """
from gpu_lstm.dispatch import race
race.times_of = lambda rivals, now: {name: [1.0 + (name == "torch")] * 4 for name in rivals}
"""  # the rule would choose torch's own
ONE_CALL = f"import torch, gpu_lstm\ntorch.no_grad().__enter__()\ngpu_lstm.LSTM(3, {HIDDEN})(torch.randn(20, 2, 3))\n"


def test_races_that_one_process_has_run_decide_in_the_image_for_the_same_number_of_threads(image, shared, tmp_path):
    """The commands of the page run the race."""
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    folder = re.search(r"Copy `/races/(\S+)`\s+to `/opt/gpu_lstm/races`", PAGE)[1]
    (tmp_path / "warm_up.py").write_text(LOOPS_WIN + ONE_CALL)
    commands = commands.replace("/races", f"{tmp_path}/races").replace("python", str(image / "python/bin/python"))
    done = run(["sh", "-ec", commands], cwd=tmp_path, env=OF_TESTS | shared | SET | shared)
    assert re.search(rf"^races: 1\n.*LSTM 3 -> {HIDDEN}, .*: numba: won a race, 2.00 times", done.stdout)
    shutil.copytree(image / "opt/gpu_lstm", tmp_path / "gpu_lstm")
    shutil.copytree(tmp_path / "races" / folder, tmp_path / "gpu_lstm/races")
    for mode, threads, said in (("read", 1, "numba: won a race"), ("read", 2, "torch: exp"), ("off", 1, "torch: exp")):
        told = {"GPU_LSTM_RACE": mode, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(tmp_path / "own")}
        told["GPU_LSTM_SHARED_CACHE"] = str(tmp_path / "gpu_lstm")
        assert said in in_process(f"{AT_INFO}{LOOPS_WIN}race.times_of = None\n{ONE_CALL}", **told).stderr


def test_a_full_memory_is_no_damage(image, tmp_path):
    """Kept loops stay, and are used once there is memory."""
    shutil.copytree(image / "opt/gpu_lstm", tmp_path / "gpu_lstm")
    kept = sorted(tmp_path.rglob("*.nb?"))
    fault = (
        "from gpu_lstm.kernels.numba_rnn import build\ndef full(*_):\n    raise MemoryError\nbuild.compile_in = full\n"
    )
    done = in_process(f"{fault}main()", "compile", "--cells", "gru", status=1, XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr == "memory is full\n"
    assert sorted(tmp_path.rglob("*.nb?")) == kept
    assert len(kept) == 2 * 3, "an index and a function for each of forward, backward and matmul"


EXPORTED = """
    import torch, gpu_lstm
    torch.manual_seed(0)
    gru, x = gpu_lstm.GRU(3, 9), torch.randn(20, 2, 3)
    program = torch.export.export(gru, (x,))
    (layer,) = [node for node in program.graph.nodes if "layer" in str(node.target)]
    assert layer.args[2] == "auto numba", layer.args[:4]
    state = {name: t.shape for name, t in program.state_dict.items()}
    assert state == {name: t.shape for name, t in gru.state_dict().items()}
    for name in "auto numba", "auto triton", "triton":  # the others as on a laptop with a card
        layer.args = *layer.args[:2], name, *layer.args[3:]
        torch.export.save(program, f"{sys.argv[1]}/{name}.pt2")
    theirs = torch.nn.GRU(3, 9).requires_grad_(False)
    theirs.load_state_dict(gru.state_dict())
    torch.save((x, theirs(x)), f"{sys.argv[1]}/expected")
    with gpu_lstm.backend("torch"):
        torch.export.save(torch.export.export(gru, (x,)), f"{sys.argv[1]}/way back.pt2")
"""
SERVED = """
    import torch, gpu_lstm, warnings
    x, expected = torch.load(f"{sys.argv[1]}/expected")
    warnings.simplefilter("default")
    for name in sys.argv[2:]:
        for found, true in zip(torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()(x), expected, strict=True):
            torch.testing.assert_close(found, true)
"""


def test_an_export_binds_the_name_of_a_backend_and_runs_where_that_cannot(shared, tmp_path):
    here = shared | {"TRITON_INTERPRET": None}
    in_process(EXPORTED, str(tmp_path), **here)
    does_without = "'auto' does without '{}', for which the program was made: ".format
    done = in_process(NO_NUMBA + textwrap.dedent(SERVED), str(tmp_path), "auto numba", **here)
    assert does_without("numba") in done.stderr
    done = in_process(textwrap.dedent(SERVED), str(tmp_path), "auto numba", "auto triton", "triton", status=1, **here)
    assert does_without("numba") not in done.stderr
    assert f"{does_without('triton')}backend 'triton' runs " in done.stderr
    assert "RuntimeError: backend 'triton' runs on CUDA tensors, got cpu" in done.stderr
    # The variable changes no program, and no line names a backend.
    back = here | {"GPU_LSTM_BACKEND": "torch"}
    programs = (NO_NUMBA, "auto numba", True), (NO_NUMBA, "way back", False), ("", "auto numba", False)
    for fault, name, warned in programs:
        done = in_process(AT_INFO + fault + textwrap.dedent(SERVED), str(tmp_path), name, **back)
        assert (does_without("numba") in done.stderr, bool(done.stderr)) == (warned, warned)
        assert "INFO:gpu_lstm" not in done.stderr


def test_the_pinned_versions_are_those_with_which_all_tests_ran():
    rows = re.findall(r"\| ([\d.]+) \| [\d.]+; Numba ([\d.]+) \| ([\d.]+) \| run, all tests", VERSIONS)
    (python,) = re.findall(r"^FROM python:([\d.]+)-slim$", DOCKERFILE, re.MULTILINE)
    assert rows == [(PINS["torch"], PINS["numba"], python)]
