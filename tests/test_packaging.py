"""Wheel and sdist, packages that are missing or broken, copies under another name, and type checkers on a user's
program."""

import ast
import base64
import email
import graphlib
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import re
import runpy
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from functools import partial
from importlib.util import resolve_name
from pathlib import Path
from types import MethodType
from typing import get_args

import pytest
import torch
from installed import ROOT, build, environment, run
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import gpu_lstm
from gpu_lstm.call.choices import BackendName
from gpu_lstm.execution import graph


def says(python, code, **options):
    return run([str(python), "-c", textwrap.dedent(code)], **options).stdout.splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"), "wheel", "sdist")


def test_the_wheel_has_the_package_and_a_long_description_with_links_that_work_anywhere(built):
    archive, source = zipfile.ZipFile(built[0]), set()
    for folder, name in (("gpu_lstm", "gpu_lstm"), ("kernels", "gpu_lstm/kernels")):
        files = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".typed"))
        source |= {f"{name}/{path.relative_to(ROOT / folder)}" for path in files}
    assert {name for name in archive.namelist() if ".dist-info/" not in name} == source
    assert {"gpu_lstm/py.typed", "gpu_lstm/kernels/cupy_rnn/cuda/steps.cu"} <= source
    assert f"The wheel has {built[0].stat().st_size / 1e6:.1f} MB" in (ROOT / "docs/versions.md").read_text()

    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    text, readme = metadata.get_payload(decode=True).decode(), (ROOT / "README.md").read_text()
    version = metadata["Version"]
    host = r"https://(?:raw\.githubusercontent|github)\.com/gpu-lstm/gpu_lstm/"
    assert re.sub(rf"(\]\(|(?:src|srcset)=\"){host}(?:blob/)?v{re.escape(version)}/", r"\1", text) == readme
    shown = [("!", link) for link in re.findall(r"\b(?:src|srcset)=\"([^\"]*)", text)]
    assert len(shown) == 2
    for picture, link in [*shown, *re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)]:
        assert link.startswith("https://raw." if picture else ("https://github.com/", "#")), link
        assert link.startswith("#") or (ROOT / link.split(f"/v{version}/")[1].partition("#")[0]).exists(), link


def test_the_sdist_has_all_that_is_in_git_and_both_pass_the_checks_of_the_index(built):
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)])
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = listing.stdout.splitlines() if listing.returncode == 0 else []  # an sdist's own tests have no git
    assert {name for name in tracked if (ROOT / name).exists()} - names <= {".gitignore"}
    of_kinds = (
        "tests/support/host_cuda.h",
        "tests/support/driver_stub.c",
        "docs/pictures/denoise.png",
        "kernels/cupy_rnn/cuda/steps.cu",
    )
    assert {*of_kinds} <= names


def test_importing_it_is_cheap_and_writes_nothing_and_packages_that_are_missing_or_broken_stop_nobody(tmp_path):
    """The import adds our modules without kernels, and a dozen of Python's, to torch. It opens no file except those
    that Python reads. A call on the CPU does not import a compiler of torch's, which takes a second.

    A user who needs a package is told how to install it. Here Triton is broken, and CuPy and matplotlib are missing.
    """
    (tmp_path / "triton.py").write_text("raise OSError('broken here')")
    code = """
        import contextlib, importlib, sys
        import torch
        sys.modules |= dict.fromkeys(("cupy", "matplotlib"))
        before, touched = set(sys.modules), []

        def audit(event, arguments):
            if event == "os.listdir":
                pass  # as Python itself looks for modules
            elif event.startswith(("os.", "tempfile.", "shutil.", "subprocess.", "socket.")):
                touched.append(event)
            elif event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
                touched.append(arguments[0])

        sys.addaudithook(audit)
        import gpu_lstm
        new = set(sys.modules) - before
        ours = {name for name in new if name.partition(".")[0] == "gpu_lstm"}
        kernels = {name for name in ours if name.startswith("gpu_lstm.kernels.") and "_rnn" in name}
        of_python = {name for name in new if name.partition(".")[0] in sys.stdlib_module_names}
        print(touched, new - ours - of_python, kernels, len(of_python) <= 12 or of_python, len(ours) <= 80 or ours)
        gpu_lstm.keras.keras_init(gpu_lstm.LSTM(2, 3))
        gpu_lstm.keras.lengths_of(torch.ones(2, 3, dtype=torch.bool))
        x = torch.zeros(5, 2, 3)
        output, _ = gpu_lstm.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4)))(x)
        output.sum().backward()
        print("keras" in sys.modules, "torch._dynamo" in sys.modules, gpu_lstm.__file__)
        for call in (lambda: gpu_lstm.LSTM(3, 4, backend="triton")(x), lambda: gpu_lstm.LSTM(3, 4, backend="cupy")(x),
                     lambda: importlib.import_module("bench")):
            try:
                call()
            except ImportError as error:
                print(error)
        from gpu_lstm.__main__ import main
        with contextlib.redirect_stderr(sys.stdout):
            print(main("plan --hidden 8 --batch 1 --device h100".split()))
        main(["doctor"])
    """
    environ = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    *said, doctor = "\n".join(says(sys.executable, code, env=environ)).split("\n", 7)
    cuda = "12" if (torch.version.cuda or "").startswith("12.") else "13"
    (cupy,) = re.findall(rf'cupy{cuda} = \["(.*)"\]', (ROOT / "pyproject.toml").read_text())
    needs_triton = "needs Triton: pip install triton (OSError: broken here)"
    needs_cupy = f'needs CuPy and NVRTC: pip install "{cupy}" (import of cupy halted; None in sys.modules)'
    assert said == [
        "[] set() set() True True", f"False False {ROOT / 'gpu_lstm/__init__.py'}", f"backend 'triton' {needs_triton}",
        f"backend 'cupy' {needs_cupy}", 'bench needs matplotlib: pip install --editable ".[bench]"',
        f"python -m gpu_lstm plan {needs_triton}", "1",
    ]  # fmt: skip
    assert needs_triton in doctor
    assert needs_cupy in doctor


PROGRAM = ROOT / "tests/support/typed_program.py"
STRICT = """[mypy]
[mypy-program,mistakes,gpu_lstm.*]  # all other modules as make lint has them, whose cache is used
check_untyped_defs = true
disallow_any_generics = true
disallow_subclassing_any = true
disallow_untyped_calls = true
disallow_untyped_decorators = true
implicit_reexport = false
strict_equality = true
warn_return_any = true
"""
MISTAKES = [
    *(f'gpu_lstm.{call}, backend="trition")' for call in (
        "LSTM(6, 8", "StackedLSTM(6, [8]", "LSTMCell(6, 8", "functional.lstm_layer(x, [x, x]",
        "keras.from_keras(None")),
    'gpu_lstm.backend("trition")', 'gpu_lstm.racing("of")', "lstm(packed, lengths=x)", "lstm(x)[0].batch_sizes",
    "lstm.forward(x)[0].batch_sizes", "lstm(packed)[0].relu()", "lstm.forward(packed)[0].relu()",
    "stack.forward(packed)[0].relu()", "lstm.forward(x)[1].relu()", "lstm(x, None, x)", "lstm.forward(x, None, x)",
    "gpu_lstm.compat.LSTM(6, 8)(packed)[0].relu()", "stack(packed)[0].relu()", "stack(x, (x, x))", "stack(x)[1].relu()",
    "gpu_lstm.keras.GoBackwards(lstm)(x)[0].batch_sizes", "gpu_lstm.LSTMCell(6, 8)(packed)",
    "a: torch.nn.LSTM = gpu_lstm.convert(torch.nn.LSTM(6, 8))", "b: gpu_lstm.LSTM = gpu_lstm.to_torch(lstm)",
    "c: torch.nn.Sequential = gpu_lstm.convert(torch.nn.Linear(6, 8))", "gpu_lstm.resets_from_dones(3)",
    "d: torch.nn.Sequential = gpu_lstm.to_torch(torch.nn.Linear(6, 8))", "gpu_lstm.explain(lstm, x).backed",
    "gpu_lstm.Stream(torch.nn.LSTM(6, 8), batch=3)", "gpu_lstm.Stream(lstm, batch=3)(x).batch_sizes",
    "gpu_lstm.trace(lstm, x).layers[0][0].forgot", "gpu_lstm.explain(torch.nn.LSTM(6, 8), x)",
    "gpu_lstm.SLSTM(6, 8)(x, (x, x))", "gpu_lstm.SLSTM(6, 8)(x)[1].relu()",
    "gpu_lstm.use_for_slstm([lstm])"]  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize(("checker", "interpreter", "install"), [
    (f"mypy --config-file strict.ini --cache-dir {ROOT / '.mypy_cache'}", "--python-executable", "wheel"),
    ("pyright", "--pythonpath", "editable"),
], ids=["mypy", "pyright"])  # fmt: skip
def test_type_checkers_accept_a_program_and_find_every_mistake(tmp_path, built, checker, interpreter, install):
    """The program has no error, and every line of the other file has one."""
    folder = tmp_path / "environment"
    python = environment(folder, [str(built[0])] if install == "wheel" else ["--editable", str(ROOT)])
    for file in says(python, "import gpu_lstm, gpu_lstm.kernels as k; print(gpu_lstm.__file__, k.__file__, sep='\\n')",
                     cwd=tmp_path):  # fmt: skip
        assert Path(file).is_relative_to(folder if install == "wheel" else ROOT)
    header = "def mistaken(lstm: gpu_lstm.LSTM, stack: gpu_lstm.StackedLSTM, x: torch.Tensor, packed: PackedSequence):"
    imports = "import torch, gpu_lstm\nfrom torch.nn.utils.rnn import PackedSequence"
    (tmp_path / "strict.ini").write_text(STRICT)
    (tmp_path / "program.py").write_text(PROGRAM.read_text())
    (tmp_path / "mistakes.py").write_text("\n    ".join([f"{imports}\n{header}", *MISTAKES]) + "\n")
    command = [sys.executable, "-m", *checker.split(), interpreter, str(python), "program.py", "mistakes.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "program.py:" not in said.stdout, said.stdout
    found = {int(line) for line in re.findall(r"mistakes\.py:(\d+)(?::\d+)?(?: -|:) error", said.stdout)}
    missed = [mistake for line, mistake in enumerate(MISTAKES, start=4) if line not in found]
    assert not missed, f"{checker} does not detect {missed}\n{said.stdout}{said.stderr}"


def test_the_program_runs_and_is_over_all_of_the_public_api_which_dir_shows(capsys):
    runpy.run_path(str(PROGRAM), run_name="__main__")
    assert "torch.Size([5, 2, 3])" in capsys.readouterr().out
    for name in gpu_lstm.__all__:
        assert re.search(rf"\bgpu_lstm\.{name}\b", PROGRAM.read_text()), name
    assert sorted(name for name in dir(gpu_lstm) if not name.startswith("__")) == sorted(gpu_lstm.__all__)
    assert "__version__" in dir(gpu_lstm)
    assert get_args(BackendName) == tuple(backend.value for backend in gpu_lstm.Backend)


@pytest.mark.parametrize("cls", [gpu_lstm.LSTM, gpu_lstm.StackedLSTM, gpu_lstm.LSTMCell, gpu_lstm.GRU,
                                 gpu_lstm.GRUCell])  # fmt: skip
def test_forward_says_what_it_accepts_and_raises(cls):
    said = cls.forward.__doc__
    for name in inspect.signature(cls.forward).parameters:
        assert name == "self" or re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", said, re.MULTILINE), name
    assert all(title in said for title in ("Args:", "Returns:", "Raises:"))


def imported_by(name, modules):
    """Return the modules of the checkout that a module imports."""
    path, found = modules[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {inner if (inner := f"{source}.{alias.name}") in modules else source for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & modules.keys()) - {name}


def test_imports_have_no_circle():
    modules = {}
    for path in (path for folder in ("gpu_lstm", "kernels", "bench", "dev") for path in (ROOT / folder).rglob("*.py")):
        place = path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__").replace("/", ".")
        modules[f"gpu_lstm.{place}" if place.startswith("kernels") else place] = path
    assert imported_by("gpu_lstm.compat", modules) == {"gpu_lstm.modules", "gpu_lstm.modules.recurrent"}
    graphlib.TopologicalSorter({name: imported_by(name, modules) for name in modules}).prepare()
    order = re.search(r"the order\s+is (.*?)\.\s", (ROOT / "docs/design.md").read_text(), re.DOTALL)[1]
    rank = {folder: n for n, folder in enumerate(re.findall(r"\w+", order.replace(" and ", " ")))}
    inside = {name: rank[name.split(".")[1]] for name in modules if re.match(rf"gpu_lstm\.({'|'.join(rank)})\b", name)}
    above = lambda name: {source for source in imported_by(name, modules) if inside.get(source, 99) < inside[name]}  # noqa: E731
    assert len(inside) > 50
    assert {name: above(name) for name in inside if above(name)} == {}


def test_a_private_name_that_is_gone_is_named_with_the_version_of_torch():
    code = "import torch; del torch._C._is_any_autocast_enabled; import gpu_lstm"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = rf"ImportError: torch {re.escape(torch.__version__)} lacks a private name that gpu_lstm needs: .*_is_any_a"
    assert re.search(said, done.stderr), done.stderr


def test_private_names_of_torch_triton_and_python_are_in_one_file():
    """This covers names that are written behind the name of a package, or imported."""
    of_packages = r"(?<![\w\"])(?:torch|triton|tl|sys|threading)(?:\.\w+)*\._[a-zA-Z]\w*"
    private = re.compile(rf"{of_packages}|(?:from|import) [\w.]*\b_[a-zA-Z]\w+")
    paths = [path for folder in ("gpu_lstm", "kernels") for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): private.findall(path.read_text()) for path in paths}
    assert len(found.pop("kernels/private.py")) > 15
    assert {path: names for path, names in found.items() if names} == {}


def in_another_process(function, *args):
    """Return the result of a function in a fork, in which torch is imported already, and numbers are float64."""
    with multiprocessing.get_context("fork").Pool(1, torch.set_default_dtype, [torch.float64]) as another:
        return another.apply(function, args)


def results(module, x):
    """Return the output and states, and the gradients of the parameters."""
    found = tree_leaves(module(x))
    return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found), list(module.parameters()))]


exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def compare(other):
    """Compare another copy with torch's own module, eager and compiled."""
    theirs, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    for backend, compiler in (("reference", "eager"), ("torch", "aot_eager")):
        ours = other.LSTM(3, 4, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        called = torch.compile(ours, backend=compiler, disable=compiler == "eager", fullgraph=True)
        exactly(results(called, x), results(theirs, x))


def again():
    for module in (graph, gpu_lstm):
        importlib.reload(module)
    compare(gpu_lstm)
    for name in [name for name in sys.modules if name.startswith("gpu_lstm")]:
        del sys.modules[name]
    other = importlib.import_module("gpu_lstm")
    assert other is not gpu_lstm
    compare(other)
    return repr(other.LSTM(3, 4))


def test_a_copy_that_is_imported_again_runs_beside_the_first():
    assert in_another_process(again) == "gpu_lstm.LSTM(3, 4)"


def kernelized(path):
    """Check that torch's modules with the forward of `layers` compute the same as before. Return the facts that
    `kernels` requires of a layer."""
    spec = importlib.util.spec_from_file_location("_a_kernel", path)
    sys.modules[spec.name] = other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    x = torch.randn(5, 2, 3)
    for kind, options in (("LSTM", dict(num_layers=2, bidirectional=True)), ("LSTM", dict(proj_size=2)), ("GRU", {})):
        for given in (x, x[:, 0], pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)):
            theirs = getattr(nn, kind)(3, 4, **options)
            expected = results(theirs, given)
            theirs.forward = MethodType(getattr(other.layers, kind).forward, theirs)
            exactly(results(theirs, given), expected)
    signatures = [inspect.signature(of.LSTM.forward).parameters.values() for of in (other.layers, nn)]
    own = set(dir(other.layers.LSTM)) - set(dir(nn.Module))
    return own, *([p.kind for p in parameters] for parameters in signatures), other.__all__


def test_modules_of_torch_with_the_forward_of_the_folder_that_make_hub_writes_compute_the_same(tmp_path):
    subprocess.run([sys.executable, ROOT / "dev/hub/write.py", tmp_path], check=True)
    variant = tmp_path / "build/torch-universal"
    files = {path.relative_to(variant).as_posix(): path.read_bytes() for path in variant.rglob("*") if path.is_file()}
    metadata = json.loads(files.pop("metadata.json"))
    # Older versions of `kernels` load this file; it loads the other.
    asked = kernelized, variant / "gpu_lstm/__init__.py"
    own, ours, torchs, names = in_another_process(*asked)
    assert (own, ours, names) == ({"can_torch_compile"}, torchs, [*gpu_lstm.__all__, "layers"])
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
