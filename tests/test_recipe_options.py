"""Command lines of the recipes' scripts: their help, and options that are wrong."""

import re
from pathlib import Path

import pytest
from recipe_scripts import RECIPES, folders, run_script

SSL, CLS = "ssl1/run.sh", "cls1/finetune.sh"
SCRIPTS = (SSL, "asr1/run.sh", CLS, "eval1/run.sh", "eval1/evidence.sh")
STAGE_1 = "ssl1/local/data.sh"


@pytest.mark.parametrize("script", [*SCRIPTS, STAGE_1])
def test_help_names_every_option(script: str) -> None:
    shown = run_script(script, "--help", cwd=RECIPES / "ssl1")
    assert shown.returncode == 0
    text = (RECIPES / script).read_text()
    door = "\n. local/parse" if script == STAGE_1 else "\n. ../ssl1/local/recipe"
    begin, end = text.index("\nhelp_message="), text.index(door)
    _, *names = re.findall(r"^([a-z_]+)=", text[begin:end], re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert re.search(rf"--{name}\b", shown.stdout), name


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (SSL, "--no_such_option 1", "unknown option --no_such_option"),
        (SSL, "--cmd_backend slurm", "unknown option --cmd_backend"),  # a variable
        (SSL, "--stage", "option --stage needs a value"),
        (SSL, "stray", "unexpected argument 'stray'"),
        (SSL, "--stage 2 --stop_stage 2 --datadir none", "run stage 1"),
        (CLS, "--setting timit", "--setting must be esc50, audioset20k or audioset2m"),
        (CLS, "--setting esc50 --fold 6", "--fold must be 1 to 5, not '6'"),
        (CLS, "--setting esc50", "--ckpt '': must be the file of a"),
        (CLS, "--setting esc50 x", "unexpected argument 'x'"),
    ],
)
def test_wrong_options(tmp_path: Path, script: str, options: str, message: str) -> None:
    done = run_script(script, *folders(tmp_path), *options.split())
    assert done.returncode != 0 and message in done.stdout + done.stderr
