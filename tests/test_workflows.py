"""What .github has, and docs/ci.md: valid, and every command, file, input and version that they name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gpu_lstm
from bench.__main__ import main as bench_main
from gpu_lstm.__main__ import main as gpu_lstm_main

ROOT = Path(__file__).parent.parent
ACTION = ROOT / ".github/actions/gpu-lstm/action.yml"
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PAGE = (ROOT / "docs/ci.md").read_text()


def blocks(language: str) -> list[str]:
    """Of the page, between ```language and ```."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
WORKFLOWS |= {f"docs-{number}.yml": text for number, text in enumerate(blocks("yaml"))}


def jobs(text: str) -> list[dict]:
    return list(yaml.safe_load(text)["jobs"].values())


STEPS = [step for text in WORKFLOWS.values() for job in jobs(text) for step in job["steps"]]
STEPS += yaml.safe_load(ACTION.read_text())["runs"]["steps"]
SCRIPTS = [step["run"] for step in STEPS if "run" in step]
COMMANDS = "\n".join([*SCRIPTS, *blocks(""), *re.findall(r"`([^`\n]+)`", PAGE)])


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_all_are_found_and_valid(tmp_path):
    assert {"ci.yml", "docs.yml", "gpu.yml", "release.yml", "docs-0.yml", "docs-1.yml"} == set(WORKFLOWS)
    assert FORMS
    for name, text in WORKFLOWS.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in WORKFLOWS]
    for schema, files in (
        ("vendor.github-workflows", paths), ("custom.github-workflows-require-timeout", paths),
        ("vendor.github-actions", [str(ACTION)]), ("vendor.github-issue-forms", list(map(str, FORMS))),
        ("vendor.dependabot", [".github/dependabot.yml"]), ("vendor.citation-file-format", ["CITATION.cff"]),
    ):  # fmt: skip
        done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_only_read_do_not_pile_up_and_run_no_pull_request_on_a_self_hosted_runner(name):
    workflow = yaml.safe_load(WORKFLOWS[name])
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    triggers = workflow[True]  # `on` is a boolean in YAML 1.1
    self_hosted = any("self-hosted" in job["runs-on"] for job in jobs(WORKFLOWS[name]))
    assert self_hosted <= ("pull_request" not in triggers)


def test_only_a_tag_publishes_what_was_tested_and_nothing_else_may(tmp_path):
    release = yaml.safe_load(WORKFLOWS["release.yml"])
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert {name: job.get("needs") for name, job in release["jobs"].items()} == {
        "build": None, "test": "build", "publish": "test",
    }  # fmt: skip
    may = {
        (name, key): job["permissions"]
        for name, text in WORKFLOWS.items()
        for key, job in yaml.safe_load(text)["jobs"].items()
        if "permissions" in job
    }
    assert may == {
        ("release.yml", "publish"): {"id-token": "write"},
        ("docs.yml", "publish"): {"id-token": "write", "pages": "write"},
    }
    uses = [step["uses"].split("@")[0] for step in release["jobs"]["publish"]["steps"]]
    assert uses == ["actions/download-artifact", "pypa/gh-action-pypi-publish"]  # no code of ours runs there
    (script,) = (step["run"] for step in release["jobs"]["build"]["steps"] if "TAG" in step.get("env", ()))
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"gpu_lstm-{gpu_lstm.__version__}-py3-none-any.whl").touch()
    for tag, status in ((f"v{gpu_lstm.__version__}", 0), ("v9.9.9", 1)):
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        assert subprocess.run(command, cwd=tmp_path, env={"TAG": tag}).returncode == status


def test_actions_of_others_are_pinned_to_commits_with_their_versions():
    pinned = {}
    for path in [*(ROOT / ".github/workflows").glob("*.yml"), ACTION]:
        for action, rest in re.findall(r"uses: ([^@\s]+)(.*)", path.read_text()):
            if not action.startswith("./"):
                assert re.fullmatch(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+", rest), f"{path.name}: {action}{rest}"
                assert pinned.setdefault(action, rest) == rest
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(re.fullmatch("[0-9a-f]{40}", hook["rev"]) for hook in hooks)
    assert {"ruff-check", "ruff-format", "end-of-file-fixer"} <= {
        each["id"] for hook in hooks for each in hook["hooks"]
    }


def test_the_matrix_has_the_oldest_and_the_newest_of_what_is_supported():
    matrix = yaml.safe_load(WORKFLOWS["ci.yml"])["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    first, last = matrix["python"][0], matrix["python"][-1]
    assert f'requires-python = ">={first}"' in project
    assert f"Python {first} to {last}" in (ROOT / "Makefile").read_text()
    (oldest,) = {each["torch"] for each in matrix["include"]}
    assert f'"torch>={oldest}"' in project
    assert matrix["torch"] == [""]


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == gpu_lstm.__version__


def test_the_site_is_published_from_main_alone_after_it_was_built_by_a_job_that_may_nothing_else():
    site = yaml.safe_load(WORKFLOWS["docs.yml"])["jobs"]
    assert site["publish"]["if"] == "github.ref == 'refs/heads/main'"
    assert site["publish"]["needs"] == "build"
    assert site["publish"]["permissions"] == {"id-token": "write", "pages": "write"}
    assert [step["uses"].split("@")[0] for step in site["publish"]["steps"]] == ["actions/deploy-pages"]
    assert "permissions" not in site["build"]
    (uploaded,) = (step["with"]["path"] for step in site["build"]["steps"] if "upload" in step.get("uses", ""))
    assert uploaded == yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_dir"]


def test_scripts_are_bash_and_take_no_expressions():
    for script in SCRIPTS:
        assert "${{" not in script  # what it says would be run as code; it comes by the environment
        assert run("bash", "-n", "-c", script).returncode == 0, script


def test_actions_of_this_repository_and_their_inputs_exist():
    used = [step for step in STEPS if re.match(r"\./|OWNER/gpu_lstm/", step.get("uses", ""))]
    assert len(used) == 2
    for step in used:
        folder = step["uses"].removeprefix("OWNER/gpu_lstm/").split("@")[0]
        inputs = yaml.safe_load((ROOT / folder / "action.yml").read_text())["inputs"]
        assert set(step["with"]) <= set(inputs)
    commented = re.findall(r"^ +# ([\w-]+):", PAGE, flags=re.MULTILINE)
    assert commented
    assert set(commented) <= set(inputs)


def test_make_targets_exist():
    targets = re.findall(r"\bmake ([\w.-]+)", COMMANDS)
    assert {"test", "lint"} <= set(targets)
    for target in targets:
        assert run("make", "-n", target).returncode == 0, target


def test_commands_and_their_options_exist(capsys):
    mains = {"bench": bench_main, "gpu_lstm": gpu_lstm_main}
    named = re.findall(r"python -m (bench|gpu_lstm)(?: ([a-z]\w*))?([^\n]*)", COMMANDS)
    assert {("bench", "gpu"), ("bench", "compare"), ("gpu_lstm", "")} <= {(module, word) for module, word, _ in named}
    for module, word, rest in named:
        with pytest.raises(SystemExit, match=r"^0$"):
            mains[module]([*[word] * bool(word), "--help"])
        usage = capsys.readouterr().out
        for option in re.findall(r"(?<!\S)--[\w-]+", rest):
            assert re.search(rf"{option}\b", usage), f"{module} {word} {option}"


def test_files_that_are_named_exist():
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != "out")
    named = re.findall(rf"(?<![\w/.$])(?:{folders})/[\w./-]*", "\n".join(SCRIPTS))
    named += re.findall(r"cache-dependency-path: (\S+)", "\n".join(WORKFLOWS.values()))
    named += [f"docs/{link}" for link in re.findall(r"\]\(([^)]+)\)", PAGE)]
    assert {"pyproject.toml", "docs/../bench/compare.py"} <= set(named)
    for name in named:
        made = name.startswith((".venv/", "bench/results/"))  # by the workflow; by whoever stores a run
        assert made or (ROOT / name).exists(), name


@pytest.fixture
def comparing(tmp_path):
    """Run the action's comparison on a card of its own naming: its exit status, what it ran, and the summary."""
    (script,) = (script for script in SCRIPTS if "bench compare" in script)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        """#!/bin/bash\nif [ "$1" = -c ]; then echo "NVIDIA H100 80GB HBM3"; else echo "$@"; exit $STATUS; fi\n"""
    )
    python.chmod(0o755)
    (tmp_path / "gpu-lstm").mkdir()

    def compare(status: int = 0, baseline: str = "") -> tuple[int, str, str]:
        summary = tmp_path / "summary"
        summary.write_text("")
        environment = {
            "PATH": f"{python.parent}:/usr/bin:/bin", "STATUS": str(status), "BASELINE": baseline, "FAIL_UNDER": "0.9",
            "GITHUB_WORKSPACE": "/project", "GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(tmp_path),
        }  # fmt: skip
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, summary.read_text()

    return compare


def test_the_action_says_so_where_it_has_nothing_to_compare_with(comparing):
    status, said, summary = comparing(status=1)
    assert status == 0
    assert said == summary
    assert "no earlier run on NVIDIA H100 80GB HBM3, no bench/results/nvidia-h100-80gb-hbm3.csv" in summary


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_action_ends_as_the_comparison_does(comparing, tmp_path, status):
    stored = "bench/results/nvidia-h100-80gb-hbm3.csv"
    (tmp_path / stored).parent.mkdir(parents=True)
    (tmp_path / stored).touch()
    for baseline, path in (("", stored), ("ci/mine.csv", "/project/ci/mine.csv")):
        ended, said, summary = comparing(status, baseline)
        assert ended == status
        assert said == f"-m bench compare {path} {tmp_path}/gpu-lstm/results.csv --fail-under 0.9\n"
        assert summary == f"```\n{said}```\n"


@pytest.mark.slow
def test_the_pages_conftest_and_test_do_as_it_says(tmp_path):
    """In a user's project: pass without a GPU, and fail where one or a chosen backend is required and cannot run."""
    conftest, test = blocks("python")
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_lstm.py").write_text(test)
    gpu = "import pytest\n@pytest.mark.gpu\ndef test_gpu(): import torch; assert torch.zeros(1, device='cuda') == 0\n"
    (tmp_path / "test_gpu.py").write_text(gpu)

    def said(backend, interpret, *arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), *arguments]
        environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GPU_LSTM_BACKEND": backend,
                       "TRITON_INTERPRET": interpret}  # fmt: skip
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "1 passed, 1 skipped" in said("triton", "1")
    required = said("triton", "0", "--require-gpu")
    assert "1 failed, 1 error" in required
    assert "needs a CUDA device" in required
    assert "backend 'triton' takes CUDA tensors" in required
