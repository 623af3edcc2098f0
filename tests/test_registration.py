"""What is registered in ESPnet, and when.

Importing ESPnet takes up to 20 s, and registration is a matter of whole processes: two
scripts run, each once, and print what they found.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from spawn_script import SPAWN

from espnet2_spear import registration

FRONTEND = "espnet2_spear.asr.frontend.spear:SpearFrontend"
ENCODER = "espnet2_spear.asr.encoder.zipformer_encoder:ZipformerEncoder"
OPTIM = "espnet2_spear.optimizers.scaled_adam:ScaledAdam"
SCHEDULER = "espnet2_spear.schedulers.eden:Eden"
ALL = {"spear": FRONTEND, "zipformer": ENCODER, "scaledadam": OPTIM, "eden": SCHEDULER}

FIND = """
import json, multiprocessing, os, sys, warnings

def registered():
    from espnet2.tasks import abs_task, asr
    found = {}
    for choices in (
        asr.frontend_choices.classes,
        asr.encoder_choices.classes,
        abs_task.optim_classes,
        abs_task.scheduler_classes,
    ):
        for name, cls in choices.items():
            if cls.__module__.startswith("espnet2_spear."):
                found[name] = f"{cls.__module__}:{cls.__qualname__}"
    return found

def child(connection):
    connection.send((__name__, registered()))
"""

PLAIN = (
    """
import espnet2_spear
"""
    + FIND
    + """
if __name__ == "__main__":
    heavy = [m for m in ("torch", "espnet", "espnet2", "numpy") if m in sys.modules]
    context = multiprocessing.get_context("spawn")
    parent, other = context.Pipe()
    process = context.Process(target=child, args=(other,))
    process.start()
    here = registered()
    from espnet2.tasks.asr import ASRTask
    actions = {a.dest: a for a in ASRTask.get_parser()._actions}
    choices = {k: list(actions[k].choices)
               for k in ("frontend", "encoder", "optim", "scheduler")}
    import espnet2.tasks.asr as module
    loader = type(module.__spec__.loader).__name__
    there = parent.recv()
    process.join()
    print(json.dumps({"heavy": heavy, "here": here, "choices": choices,
                      "child": there, "loader": loader}))
"""
)

LATE = (
    FIND
    + """
os.environ["SPEAR_ESPNET_DISABLE"] = "1"
import espnet2_spear
disabled = registered()
from espnet2.tasks.asr import encoder_choices
theirs = encoder_choices.classes["zipformer"] = encoder_choices.classes["rnn"]
del os.environ["SPEAR_ESPNET_DISABLE"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    espnet2_spear.register()
late = registered()
again = (espnet2_spear.register(), registered())[1]
print(json.dumps({"disabled": disabled, "late": late, "again": again,
                  "kept": encoder_choices.classes["zipformer"] is theirs,
                  "warnings": [str(w.message) for w in caught
                               if "espnet2_spear" in str(w.message)]}))
"""
)


def run_script(folder: Path, code: str) -> dict:
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "SPEAR_ESPNET_DISABLE"}
    env.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_script(tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_script(tmp_path_factory.mktemp("late"), LATE)


@pytest.mark.second_env
def test_plain_import_registers_everything(plain: dict) -> None:
    assert plain["here"] == ALL
    for kind, name in zip(
        ("frontend", "encoder", "optim", "scheduler"), ALL, strict=True
    ):
        assert name in plain["choices"][kind]
    # The module keeps its own loader, so that inspect and reload work as before.
    assert plain["loader"] == "SourceFileLoader"


@pytest.mark.second_env
def test_spawned_child_knows_the_classes(plain: dict) -> None:
    assert plain["child"] == ["__mp_main__", ALL]


def test_import_brings_no_heavy_package(plain: dict) -> None:
    assert plain["heavy"] == []


def test_environment_variable_switches_off(late: dict) -> None:
    assert late["disabled"] == {}


@pytest.mark.second_env
def test_late_import_registers_and_keeps_foreign_names(late: dict) -> None:
    expected = {**ALL, "spear_zipformer": ENCODER}
    del expected["zipformer"]
    assert late["late"] == late["again"] == expected
    assert late["kept"]
    assert len(late["warnings"]) == 1
    assert "spear_zipformer" in late["warnings"][0]


def task_module(**choices: object) -> ModuleType:
    """A task module of which only the choices given exist."""
    module = ModuleType("espnet2.tasks.abs_task")
    vars(module).update({"optim_classes": {}, "scheduler_classes": {}}, **choices)
    return module


@pytest.mark.parametrize(
    ("optimizer", "choices", "message", "registered"),
    [
        ("no_such_module:Nothing", {}, "no_such_module", ["eden"]),
        (OPTIM, {"scheduler_classes": None}, "no scheduler_classes", ["scaledadam"]),
    ],
)
def test_what_cannot_be_registered_only_warns(
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    choices: dict,
    message: str,
    registered: list[str],
) -> None:
    classes = {"scaledadam": optimizer}
    monkeypatch.setitem(registration.CLASSES, "optim_classes", classes)
    monkeypatch.setattr(registration, "problems", [])
    module = task_module(**choices)
    with pytest.warns(registration.RegistrationWarning, match=message):
        registration.register_into(module)
    found = [*module.optim_classes, *(module.scheduler_classes or {})]
    assert found == registered and len(registration.problems) == 1


def test_plugin_beside_the_script_only(tmp_path: Path) -> None:
    """Not installed: children start with another sys.path than that of the script."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "script.py").write_text(SPAWN, encoding="utf-8")
    package = Path(registration.__file__).parent
    (project / "espnet2_spear").symlink_to(package, target_is_directory=True)
    # The Python under the virtual environment, which does not have the plugin.
    python = getattr(sys, "_base_executable", sys.executable)
    command = [python, "-E", project / "script.py", "spawn", "import"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"True False\nTrue\n", done.stderr


def test_registering_twice_is_silent() -> None:
    module = task_module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.register_into(module)
        registration.register_into(module)
    assert list(module.optim_classes) == ["scaledadam"]
