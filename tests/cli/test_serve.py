"""hotstart serve: what is said of a configuration before anything is started."""

import json
import subprocess
import sys

import pytest

GOOD = 'listen = "127.0.0.1:0"\n[[model]]\nname = "a"\ncommand = ["x"]\nport = 1\n[[model]]\nname = "b"\ncommand = ["x"]\nport = 2\n'


def serve(*arguments, **environment):
    command = [sys.executable, "-m", "hotstart.cli.main", "serve", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", **environment}
    )


def test_a_good_configuration_is_told_to_be_so(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    run = serve(str(path), "--check", "--json")
    assert (run.returncode, json.loads(run.stdout)) == (0, {"listen": "127.0.0.1:0", "models": ["a", "b"]})
    assert "2 models, a, b" in serve(str(path), "--check").stdout


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (GOOD.replace("port = 2", "prt = 2"), 2, "model b: "),
        ("", 2, "it lacks the key `model`"),
        (GOOD.replace('"b"', '"a"'), 2, "two models have the name a"),
        (None, 3, "is not there"),
    ],
)
def test_a_bad_one_is_one_line_and_an_exit_code(tmp_path, text, code, said):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    for extra in (["--check"], []):
        run = serve(str(path), *extra, HOTSTART_HOME=str(tmp_path / "home"), HOTSTART_RUN=str(tmp_path / "run"))
        assert (run.returncode, run.stdout) == (code, "")
        assert said in run.stderr
        assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
