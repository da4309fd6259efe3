"""What .github has, the section on CI of the pages, and that on a first run: valid, safe, and what they name exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import check_jsonschema
import conftest
import pytest
import torch
import yaml

import gpu_lstm
from bench.__main__ import main as bench_main
from gpu_lstm.__main__ import main as gpu_lstm_main

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github/actions/gpu-lstm/action.yml"
PAGE = (ROOT / "docs/what_runs.md").read_text().split("## In your CI")[1]
FIRST_RUN = (ROOT / "docs/first_gpu_run.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)  # of the page: (language, text)
TEXTS = {path.stem: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
TEXTS |= {f"docs-{number}": text for number, text in enumerate(text for kind, text in BLOCKS if kind == "yaml")}
WORKFLOWS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = {(name, key): job for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
STEPS += yaml.safe_load(ACTION.read_text())["runs"]["steps"]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]
COMMANDS = "\n".join(
    [*SCRIPTS, *(text for kind, text in BLOCKS if not kind), *re.findall(r"`([^`\n]+)`", PAGE + FIRST_RUN)]
)
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, **{"cwd": ROOT, "capture_output": True, "text": True, **options})


def written(path: Path, line: str) -> None:
    """A program that runs a line of bash."""
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


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
        assert "self-hosted" not in job["runs-on"] or "pull_request" not in workflow[True]  # YAML 1.1: on is True
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
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    (tmp_path / "dist").mkdir()
    (tmp_path / f"dist/gpu_lstm-{gpu_lstm.__version__}-py3-none-any.whl").touch()
    assert run(*BASH, script, cwd=tmp_path, env={"TAG": tag}).returncode == status
    (tmp_path / "CHANGELOG.md").write_text(f"## {gpu_lstm.__version__}, unreleased\n")
    assert run(*BASH, script, cwd=tmp_path, env={"TAG": tag}).returncode == 1


def test_actions_of_others_are_pinned_to_commits_with_their_versions():
    pinned = {}
    for path in [*(ROOT / ".github/workflows").glob("*.yml"), ACTION]:
        for action, rest in re.findall(r"uses: ([^.@\s][^@\s]+)(.*)", path.read_text()):
            assert re.fullmatch(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", rest), f"{path.name}: {action}{rest}"
            assert pinned.setdefault(action, rest) == rest
    assert {"actions/checkout", "pypa/gh-action-pypi-publish"} <= set(pinned)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(re.fullmatch("[0-9a-f]{40}", hook["rev"]) for hook in hooks)


def test_versions_agree():
    matrix, project = JOBS["ci", "test"]["strategy"]["matrix"], (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={matrix["python"][0]}"' in project
    assert f"Python {matrix['python'][0]} to {matrix['python'][-1]}" in (ROOT / "Makefile").read_text()
    for name, key in ("ci", "wheel"), ("release", "test"):
        assert JOBS[name, key]["strategy"]["matrix"]["python"] == [matrix["python"][0], matrix["python"][-1]]
    (oldest,) = {each["torch"] for each in matrix["include"]}
    assert f'"torch>={oldest}"' in project
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == gpu_lstm.__version__


def test_scripts_are_bash_without_expressions_and_name_files_and_make_targets_that_exist():
    for script in SCRIPTS:
        assert "${{" not in script  # its value would be run as code; it comes by the environment
        assert run("bash", "-n", "-c", script).returncode == 0, script
    for target in set(re.findall(r"\bmake ([\w.-]+)", COMMANDS)):
        assert run("make", "-n", target).returncode == 0, target
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "out")
    named = re.findall(rf"(?<![\w/.$])(?:{folders})/[\w./-]*", "\n".join([*SCRIPTS, FIRST_RUN]))
    named += re.findall(r"cache-dependency-path: (\S+)", "\n".join(TEXTS.values()))
    for name in named:
        made = name.startswith((".venv/", "bench/results/"))  # by the workflow; by whoever stores a run
        assert made or (ROOT / name).exists(), name


@pytest.mark.parametrize(("cards", "chosen"), [(0, ""), (1, ""), (1, "tests/test_main.py")])
def test_make_test_hides_a_gpu_from_what_is_interpreted_and_then_runs_what_needs_it(tmp_path, cards, chosen):
    """By a python that says what it is given, and ends as where no test was chosen if there are cards."""
    says = f'echo "${{CUDA_VISIBLE_DEVICES-visible}}: $@"; case "$*" in *require-gpu*) exit {5 * cards};; esac'
    for name, line in {"python": says, "nvidia-smi": f"exit {1 - cards}", "installed": ""}.items():
        written(tmp_path / name, line)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0"}
    settings = f"BIN={tmp_path}", f"INSTALLED={tmp_path / 'installed'}", f"PYTEST={chosen}"
    done = run("make", "--silent", *settings, "test", env=environment)
    hidden, then, *_ = done.stdout.splitlines()
    assert re.match("(?!.*gpu): -m pytest -n auto", hidden)
    on_a_card = f"0: -m pytest -n auto --dist worksteal -m gpu or device --require-gpu {chosen}".rstrip()
    assert then == (on_a_card if cards else "There is no GPU here: tests that need one were skipped")
    assert (done.returncode == 0) == (not cards or bool(chosen)), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_gpu_that_is_required_and_cannot_be_used_is_an_error_at_once_with_torchs_reason():
    with pytest.raises(pytest.UsageError, match=r"^--require-gpu: there is no CUDA device that torch can use: "):
        conftest.pytest_configure(Mock())  # which has every option


def test_inputs_of_this_repositorys_action_exist_and_so_do_commands_and_their_options(capsys):
    inputs = set(yaml.safe_load(ACTION.read_text())["inputs"])
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
    """The run of this card is stored, or another `baseline` is given; None: neither."""
    (script,) = (script for script in SCRIPTS if "bench compare" in script)
    file = "bench/results/nvidia-h100-80gb-hbm3.csv"
    for folder in ("gpu-lstm", "bench/results"):
        (tmp_path / folder).mkdir(parents=True)
    card = 'if [ "$1" = -c ]; then echo "NVIDIA H100 80GB HBM3"; exit; fi'
    written(tmp_path / "python", f'{card}\necho "$@"\nexit {status}')
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


@pytest.mark.deep
def test_the_pages_conftest_does_as_it_says(tmp_path):
    """In a user's project: pass without a GPU, and fail where one or a chosen backend is required and cannot run."""
    (conftest,) = (text for kind, text in BLOCKS if kind == "python")
    test = "import gpu_lstm, torch\ndef test_lstm(): gpu_lstm.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
    gpu = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): import torch; assert torch.zeros(1, device='cuda') == 0\n"
    for name, text in {"conftest": conftest, "test_lstm": test, "test_gpu": gpu}.items():
        (tmp_path / f"{name}.py").write_text(text)

    def said(backend, interpret, *arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), *arguments]
        environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GPU_LSTM_BACKEND": backend,
                       "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}  # fmt: skip
        return run(*command, cwd=tmp_path, env=environment).stdout

    assert "1 passed, 1 skipped" in said("triton", "1")
    required = said("triton", "0", "--require-gpu")
    assert "1 failed, 1 error" in required
    assert "needs a CUDA device" in required
    assert "backend 'triton' runs on CUDA tensors" in required
