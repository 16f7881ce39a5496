"""Training comes to the accuracy of dense training with every codec, at the level that it has where a job sets none."""

import json
import subprocess
import sys

import pytest
from launched import launch

from ps_accordion.codecs import registry
from ps_accordion.selection import levels_of

pytestmark = pytest.mark.full

POINTS = 1.5
EPOCHS, SEED = 24, 0


def script(result, *more):
    """Return the demo's training command."""
    command = [sys.executable, "-P", "-m", "ps_accordion.worker.demo", "--epochs", str(EPOCHS), "--seed", str(SEED)]
    return [*command, "--result", str(result), *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The accuracy of one process that compresses nothing, in points."""
    result = tmp_path_factory.mktemp("alone") / "result.json"
    subprocess.run(script(result, "--dense"), check=True, timeout=120)
    return 100 * json.loads(result.read_text())["accuracy"]


@pytest.mark.parametrize("codec", registry.names())
def test_digits_are_learned_with_every_codec(tmp_path, alone, codec):
    """Two workers through a server, both ways, at the light level throughout; dgc brings its own momentum."""
    light, _ = levels_of(codec)
    sets = {"codec.name": codec, "codec.light": light, "regime.policy": "static", "seed": SEED}
    flags = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    command = script(tmp_path / "result-{rank}.json", *(["--momentum", "0"] if codec == "dgc" else []))
    code, output = launch(tmp_path, "", *flags, command=command)
    assert code == 0, output
    accuracies = {json.loads((tmp_path / f"result-{rank}.json").read_text())["accuracy"] for rank in range(2)}
    assert len(accuracies) == 1
    assert 100 * accuracies.pop() >= alone - POINTS
