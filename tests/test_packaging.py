"""What is built and installed from this checkout, and what happens where an optional package is missing or broken."""

import email
import re
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from installed import ROOT, build, environment, run

from gpu_lstm.call.modes import constant_when_traced


def says(python: Path | str, code: str, **options) -> str:
    """What a program prints."""
    return run([str(python), "-c", textwrap.dedent(code)], **options).stdout


def files(folder: Path) -> set[str]:
    """Of the source, relative to a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".typed")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    kernels = {f"gpu_lstm/kernels/{name}" for name in files(ROOT / "kernels")}
    package = {f"gpu_lstm/{name}" for name in files(ROOT / "gpu_lstm")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package | kernels
    assert {"gpu_lstm/py.typed", "gpu_lstm/kernels/cupy_lstm/cuda/cooperative.cu"} <= names


def test_the_long_description_is_the_readme_with_links_that_work_anywhere(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text()
    host, version = r"https://(?:raw\.githubusercontent|github)\.com/gpu-lstm/gpu_lstm/", re.escape(metadata["Version"])
    assert re.sub(rf"\]\({host}(?:blob/)?v{version}/", "](", text) == readme
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)
    assert any(picture for picture, _ in links)
    for picture, link in links:
        start = "https://raw." if picture else ("https://github.com/", "#")
        assert link.startswith(start), link
        if not link.startswith("#"):
            assert (ROOT / link.split(f"/v{metadata['Version']}/")[1]).exists(), link
    for header in ("Author", "Keywords", "Classifier", "License-Expression", "Project-URL"):
        assert metadata[header], header


def test_wheel_and_sdist_pass_the_checks_of_the_index(wheel, sdist):
    run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("gpu_lstm", "kernels", "tests", "bench", "docs", "examples"):
        assert files(folder / name) == files(ROOT / name)
    tests = ["tests/test_planning.py", "tests/test_workflows.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    assert re.search(r"^\d+ passed", run(command, cwd=folder, env={"PYTHONPATH": str(folder)}).stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_editable_install_follows_the_checkout_and_warns_of_nothing(tmp_path):
    pip = [sys.executable, "-m", "pip", "--python", str(environment(tmp_path / "environment")), "install", "--verbose"]
    done = run([*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", "--editable", str(ROOT)])
    assert not re.search("warning|deprecat", done.stdout + done.stderr, re.IGNORECASE)
    code = "import gpu_lstm, gpu_lstm.kernels; print(gpu_lstm.__file__, gpu_lstm.kernels.__file__)"
    printed = says(tmp_path / "environment/bin/python", code, cwd=tmp_path)
    assert printed.split() == [str(ROOT / "gpu_lstm/__init__.py"), str(ROOT / "kernels/__init__.py")]


@pytest.mark.slow
def test_a_checkout_on_pythonpath_works_and_for_a_package_that_is_missing_names_the_command_of_pip(tmp_path):
    """Where gpu_lstm is not installed."""
    missing = ["gpu_lstm", "__editable__", "triton", "cupy", "matplotlib", "rich"]
    python = environment(tmp_path / "environment", without=missing)
    code = """
        import contextlib, sys
        import torch, gpu_lstm
        from gpu_lstm.__main__ import main
        x = torch.zeros(5, 2, 3)
        for backend in ("triton", "cupy"):
            try:
                gpu_lstm.LSTM(3, 4, backend=backend)(x)
            except ImportError as error:
                print(error)
        try:
            gpu_lstm.trace(gpu_lstm.LSTM(3, 4), x).plot()
        except ImportError as error:
            print(error)
        try:
            import bench
        except ImportError as error:
            print(error)
        print(main(["plan", "--hidden", "8", "--batch", "2", "--device", "h100"]), main(["races", "--json"]))
        with contextlib.redirect_stderr(sys.stdout):
            print(main(["kernels"]))
        output, _ = gpu_lstm.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4)))(x)
        output.sum().backward()
        print(gpu_lstm.__file__)
    """
    extra = "cupy12" if (torch.version.cuda or "").startswith("12.") else "cupy13"
    environ = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    assert says(python, code, cwd=tmp_path, env=environ).splitlines() == [
        "backend 'triton' needs Triton: pip install triton (No module named 'triton')",
        f"backend 'cupy' needs CuPy and NVRTC: pip install \"gpu-lstm[{extra}]\" (No module named 'cupy')",
        "plot needs matplotlib: pip install matplotlib (No module named 'matplotlib')",
        'bench needs matplotlib: pip install --editable ".[bench]"',
        "[]",
        "1 0",
        "python -m gpu_lstm kernels needs Triton: pip install triton (No module named 'triton')",
        "1",
        str(ROOT / "gpu_lstm/__init__.py"),
    ]


def test_importing_it_is_cheap_and_writes_nothing():
    """Beyond torch: at most 0.2 s of a core, no Triton, no compiler, no Keras, no file but what Python reads."""
    code = """
        import sys, time
        import torch
        before, touched = set(sys.modules), []

        def audit(event, arguments):
            if event == "os.listdir":
                pass  # as Python itself looks for modules
            elif event.startswith(("os.", "tempfile.", "shutil.", "subprocess.", "socket.")):
                touched.append(event)
            elif event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
                touched.append(arguments[0])

        sys.addaudithook(audit)
        start = time.process_time()
        import gpu_lstm
        seconds = time.process_time() - start
        new = set(sys.modules) - before
        heavy = {"triton", "sympy", "cupy", "keras", "matplotlib", "torch._dynamo", "torch._inductor"} & new
        print(seconds < 0.2 or seconds, touched, heavy)
        gpu_lstm.keras.keras_init(gpu_lstm.LSTM(2, 3))
        gpu_lstm.keras.lengths_of(torch.ones(2, 3, dtype=torch.bool))
        print("keras" in sys.modules)
    """
    printed = says(sys.executable, code, env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert printed == "True [] set()\nFalse\n"


def test_packages_that_are_broken_in_any_way_stop_nobody(tmp_path):
    """Neither the import, nor a call, nor auto, nor the doctor, who says what is broken.

    A call on the CPU imports no compiler of torch's, which takes a second, and imports Triton.
    """
    for name in ("triton", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "import builtins, os\nraise getattr(builtins, os.environ['BROKEN'])('broken here')\n"
        )
    code = """
        import contextlib, io, os, sys, warnings
        os.environ["BROKEN"] = "OSError"
        import torch, gpu_lstm
        output, _ = gpu_lstm.LSTM(3, 4)(torch.randn(5, 2, 3), lengths=torch.tensor([5, 3]))
        print(*output.shape, "torch._dynamo" in sys.modules)
        try:
            gpu_lstm.LSTM(3, 4, backend="triton")(torch.randn(5, 2, 3))
        except ImportError as error:
            print(error)
        from gpu_lstm.dispatch import available
        from gpu_lstm.__main__ import main

        for error in ("OSError", "RuntimeError", "AttributeError", "SyntaxError", "KeyError", "ImportError"):
            os.environ["BROKEN"] = error
            for cached in (available.triton_import_problem, available.cupy_import_problem, available._say_once):
                cached.cache_clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = available.select(None, torch.device("cuda"), torch.float32, None, False)
                assert found is gpu_lstm.Backend.TORCH
            assert len(caught) == (0 if error == "ImportError" else 2), caught
            gpu_lstm.LSTM(3, 4)(torch.randn(5, 2, 3))
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert main(["doctor"]) == 0
            lines = [line for line in printed.getvalue().splitlines() if "broken here" in line]
            print(error, *(any(name in line for line in lines) for name in ("'triton' needs", "'cupy' needs")))
    """
    called, said, *printed = says(
        sys.executable, code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ).splitlines()  # fmt: skip
    assert called == "5 2 4 False"
    assert said == "backend 'triton' needs Triton: pip install triton (OSError: broken here)"
    assert len(printed) == 6
    assert all(line.endswith(" True True") for line in printed), printed


def test_a_constant_for_the_compiler_is_marked_as_torch_marks_it():
    def ours():
        pass

    def theirs():
        pass

    assert vars(constant_when_traced(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
