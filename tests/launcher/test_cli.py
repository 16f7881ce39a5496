import re
import resource
import subprocess
import sys

from ps_accordion import config
from ps_accordion.launcher.cli import app

COMMANDS = ("launch", "coordinator", "server", "worker", "demo", "bench", "config", "plan", "trace")


def test_help_is_quick_and_names_every_command(command):
    """Help takes under 0.7 s: the best of three, in processor time, which is what it takes where nothing else runs."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code, output, error = command("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (code, error) == (0, "")
        assert [name for name in COMMANDS if f" {name} " not in output] == []
    assert min(seconds) < 0.7


def test_help_loads_no_numeric_library():
    """Neither torch, numba nor a socket library is needed to print help."""
    script = "import sys; from ps_accordion.launcher.cli import app; app('--help', result_action='return_value')"
    script += "; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "ps_accordion.launcher.cli" in loaded
    assert {"torch", "numba", "zmq", "numpy", "ps_accordion.launcher.local"}.isdisjoint(loaded)


def test_help_teaches_codecs_by_name(capsys):
    """A table as a flag has a form that nobody guesses."""
    app(["launch", "--help"], result_action="return_value")
    assert """'codec.tensors={"*.bias" = "dense", "head.*" = "int"}'""" in re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_every_commands_help_teaches_with_an_example(capsys):
    """An example can be copied."""
    for name in (*COMMANDS, "bench codecs", "bench pushpull", "bench step"):
        app([*name.split(), "--help"], result_action="return_value")
        assert "Example: ps-accordion" in " ".join(capsys.readouterr().out.split())


def test_a_misspelt_command_or_flag_is_named_with_a_suggestion(command):
    """Usage errors are one line on standard error and exit code 2."""
    for arguments, wanted in ((["lunch"], 'Did you mean "launch"'), (["launch", "--wrokers", "2", "--", "true"], "--workers")):
        code, output, error = command(*arguments)
        assert (code, output, error.count("\n")) == (2, "", 1)
        assert wanted in error


def test_an_unknown_key_in_the_config_is_named_with_file_and_suggestion(command, tmp_path):
    """The message says file, key and the nearest legal name."""
    (tmp_path / "job.toml").write_text("[codec]\nlite = 0.1\n", encoding="utf-8")
    code, _, error = command("launch", "--config", "job.toml", "--", "true")
    assert code == 2
    assert error.startswith("ps-accordion: job.toml: unknown key 'codec.lite'")
    assert "did you mean 'codec.light'" in error


def test_zero_workers_are_refused(command):
    """A run without workers is a mistake, named with its source."""
    code, _, error = command("launch", "--workers", "0", "--", "true")
    assert code == 2
    assert "command line: workers.count = 0 is not legal" in error
    assert "Traceback" not in error


def test_a_launch_without_a_command_says_where_the_command_goes(command):
    """The message shows the right form."""
    code, _, error = command("launch", "--workers", "2")
    assert code == 2
    assert "put the training command after --" in error


def test_a_command_that_does_not_exist_is_named_before_anything_starts(command, tmp_path):
    """No run directory is made for a run that cannot start."""
    code, _, error = command("launch", "--", "pyhton", "train.py")
    assert code == 2
    assert "there is no command 'pyhton'" in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_of_another_run_is_refused(command, tmp_path):
    """Two runs never mix their metrics."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("", encoding="utf-8")
    code, _, error = command("launch", "--run-directory", "run", "--", "true")
    assert code == 2
    assert "holds another run already" in error


def test_a_malformed_set_flag_shows_the_form(command):
    """--set takes section.key=value."""
    code, _, error = command("config", "--set", "codec.light")
    assert code == 2
    assert "section.key=value" in error


def test_config_prints_toml_that_gives_the_same_settings(command, tmp_path):
    """What `config` prints is a config file: flags win over the environment."""
    code, output, _ = command(
        "config", "--light", "0.02", "--set", "timeouts.grace=2", PS_ACCORDION_CODEC_LIGHT="0.5", PS_ACCORDION_SEED="7"
    )
    assert code == 0
    (tmp_path / "job.toml").write_text(output, encoding="utf-8")
    settings = config.load(tmp_path / "job.toml", environment={})
    assert (settings.codec.light, settings.timeouts.grace, settings.seed) == (0.02, 2.0, 7)
    assert "# Level elsewhere: much compression. 0 takes the codec's own: dgc and topk 0.005, " in output
    assert output.count("\n# ") >= len(config.flatten(settings))
    assert "\n# \n" not in output


def test_a_worker_outside_the_run_is_refused(command):
    """Ranks count from 0 to workers.count - 1."""
    code, _, error = command("worker", "--rank", "2", "--workers", "2", "--", "true")
    assert code == 2
    assert "--rank 2: expected 0 to 1" in error


def test_a_worker_gets_its_place_and_its_settings(command):
    """One worker in the foreground becomes the command: its output is plain, its exit code is the command's own."""
    names = "PS_ACCORDION_RANK", "PS_ACCORDION_WORLD_SIZE", "OMP_NUM_THREADS"
    script = f"import os; print(*(os.environ[name] for name in {names})); raise SystemExit(9)"
    arguments = ("worker", "--rank", "1", "--workers", "3", "--", "python", "-c", script)
    assert command(*arguments, OMP_NUM_THREADS="1") == (9, "1 3 1\n", "")
