"""dev/sentences.py, which `make lint` runs: it warns about sentences on added lines, and never fails."""

import subprocess
import sys

from installed import ROOT

CODE = '''def f():
    """Return x."""
    return 1  # the sum of both
'''


def run(folder, *command):
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def warned(folder, *arguments):
    return run(folder, sys.executable, str(ROOT / "dev" / "sentences.py"), *arguments)


def test_only_added_sentences_are_suspects_each_with_its_place_and_a_reason(tmp_path):
    page, code, new = (tmp_path / name for name in ("page.md", "code.py", "new.md"))
    page.write_text("# Title\n\nOf a layer the size.\n")
    code.write_text(CODE)
    run(tmp_path, "git", "init", "--quiet", "--initial-branch", "main")
    identity = "-c", "user.name=a", "-c", "user.email=a@b"
    for number in range(2):
        run(tmp_path, "git", "add", ".")
        run(tmp_path, "git", *identity, "commit", "--quiet", "--allow-empty", "--message", str(number))
    assert warned(tmp_path) == "sentences: 0 of 0 on added lines are suspects\n"

    page.write_text(
        page.read_text() + "\n```\nOf a thing in code.\n```\n\nThis is fine. It is that of a\nlayer, too.\n"
    )
    code.write_text(CODE.replace("Return x.", "What a layer lacks.").replace("the sum", "but for the sum"))
    new.write_text("A sentence of a new file.\n\n- What is new is here.\n")
    *lines, last = warned(tmp_path).splitlines()
    assert [line.split(" ")[0] for line in lines[::2]] == ["code.py:2:", "code.py:3:", "page.md:9:", "new.md:3:"]
    assert [line.strip() for line in lines[1::2]] == [
        "What a layer lacks.", "but for the sum of both", "It is that of a layer, too.", "What is new is here.",
    ]  # fmt: skip
    assert last == "sentences: 4 of 6 on added lines are suspects"
    assert "page.md:3: it begins with a phrase" in warned(tmp_path, "--all", ".")
