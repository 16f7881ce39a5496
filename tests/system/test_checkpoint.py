"""A job that is stopped and goes on ends with the bits of one that was not, as a user meets it: through the command line.

With topk and dgc, Accordion's plans, skipped rounds, batch norm, dropout, momentum and a schedule; on as many servers as before,
or not.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from suites import usually

SCRIPT = """
import hashlib, os, signal, torch
from torch import nn
from ps_accordion.worker import DistributedModel, connect
torch.set_num_threads(1)
rank, stop, hold = int(os.environ["PS_ACCORDION_RANK"]), int(os.environ.get("STOP", -1)), int(os.environ.get("HOLD", -1))
with connect() as session:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    model = DistributedModel(model, session=session)
    rest, last = [[p for name, p in model.named_parameters() if (".4." in name) == last] for last in (False, True)]
    # Of the last layer, momentum is the codec's.
    optimizer = torch.optim.SGD([{"params": rest}, {"params": last, "momentum": 0}], lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    session.track(optimizer, scheduler=scheduler)
    for step in session.steps(24):
        if step == stop:
            if step % 2:
                session.checkpoint()
            os._exit(9)
        if step == hold:
            print("HOLDS", flush=True)
            signal.pause()
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1000 * step + rank))
        if (step, rank) in ((5, 1), (11, 0), (12, 0)):
            x[0, 0] = float("nan")  # the round is skipped
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in rest]
    state = b"".join(t.numpy().tobytes() for t in [*model.state_dict().values(), *momenta])
    print("STATE", hashlib.sha1(state).hexdigest(), optimizer.param_groups[0]["lr"], step)
"""
JOB = {
    "codec.light": 0.2,
    "codec.heavy": 0.05,
    "codec.tensors": '{"4.*" = {codec = "dgc", light = 0.2, heavy = 0.05}}',
    "regime.window": "2 steps",
    "regime.interval": 1,
    "regime.threshold": 0.1,
    "checkpoint.every_steps": 2,
}
"""Windows end where checkpoints are made, so that a plan reaches its round by order and not by chance."""
CODECS = {
    "topk": {},
    "powersgd": {"codec.name": "powersgd", "codec.light": 4, "codec.heavy": 1},
    "dense": {"codec.name": "dense", "codec.light": 32, "codec.heavy": 32},
}
"""Settings besides, by codec; powersgd goes on from the last result, which must be in the checkpoint, and the size of dense keys
depends on where the job runs, which the launcher only decides after it has read the checkpoint."""


def command(tmp_path, run, *flags, servers, **job):
    (tmp_path / "train.py").write_text(SCRIPT)
    settings = [f"--set={name}={value}" for name, value in (JOB | job).items()]
    argv = [sys.executable, "-P", "-m", "ps_accordion.launcher", "launch", "--servers", str(servers)]
    argv += ["--run-directory", str(tmp_path / run), "--progress", "none", *settings, *flags]
    return [*argv, "--", sys.executable, "train.py"]


def launch(tmp_path, run, *flags, servers=2, stop=-1, **job):
    """Run the script; return (exit code, states of the workers as they end, everything printed)."""
    argv = command(tmp_path, run, *flags, servers=servers, **job)
    environment = os.environ | {"STOP": str(stop)}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment, check=False)
    return done.returncode, states_in(done.stdout), done.stdout + done.stderr


def states_in(text):
    return [line.partition("STATE ")[2] for line in text.splitlines() if "STATE" in line]


def plans(tmp_path, run):
    events = map(json.loads, (tmp_path / run / "events-coordinator.jsonl").read_text().splitlines())
    return [(event["version"], event["round"], event["levels"]) for event in events if event["event"] == "plan"]


def compared(tmp_path, run):
    """Return how many sums a run's ledger has compared, once it balances and nothing was left out."""
    events = map(json.loads, (tmp_path / run / "events-coordinator.jsonl").read_text().splitlines())
    (ledger,) = [event for event in events if event["event"] == "ledger"]
    assert ledger["balanced"], ledger["text"]
    assert not ledger["open"]
    return ledger["compared"]


@pytest.mark.parametrize("codec", usually(CODECS, "topk"))
def test_a_job_goes_on_from_a_checkpoint_on_another_number_of_servers(tmp_path, codec):
    """Bit for bit, with the plans that would have been made; the parameters load with nothing of ours."""
    job = CODECS[codec]
    code, whole, said = launch(tmp_path, "whole", **job, **{"checkpoint.keep": 20})
    assert (code, len(whole), len(set(whole))) == (0, 2, 1), said
    assert "checkpoint of step 12: 0." in said
    at = tmp_path / "whole" / "checkpoints" / "step-00000012"
    parameters = load_file(at / "model-0.safetensors")
    assert parameters["4.weight"].shape == (10, 128)
    assert "1.running_mean" in parameters
    code, states, said = launch(tmp_path, "on", "--resume", str(at), servers=1, **job, **{"checkpoint.directory": "new"})
    assert (code, states) == (0, whole), said
    assert f"going on from {at}: step 12" in said
    assert plans(tmp_path, "on") == plans(tmp_path, "whole")[-len(plans(tmp_path, "on")) :]
    assert len({str(levels) for _, _, levels in plans(tmp_path, "whole")}) > 1
    # Each run's ledger begins with what the checkpoint had: all that can be compared is, of each shard.
    assert compared(tmp_path, "whole") == 2 * (2 + 1 + 2 + 1)
    assert compared(tmp_path, "on") == 2 + 1 + 2 + 1


@pytest.mark.full
@pytest.mark.timeout(1200)  # twenty-one runs
def test_stopped_at_any_of_ten_rounds_it_ends_as_if_it_had_not_been(tmp_path):
    """At rounds before, at and behind skipped ones; every time on as many servers as the number says."""
    stops = {2: 1, 4: 2, 5: 3, 6: 1, 8: 2, 12: 3, 13: 1, 14: 2, 18: 3, 22: 1}
    code, whole, said = launch(tmp_path, "whole")
    assert (code, len(set(whole))) == (0, 1), said
    for stop, servers in stops.items():
        code, _, said = launch(tmp_path, f"stop-{stop}", stop=stop)
        assert code == 9, said
        checkpoints = tmp_path / f"stop-{stop}" / "checkpoints"
        code, states, said = launch(tmp_path, f"on-{stop}", "--resume", str(checkpoints), servers=servers)
        assert (code, states) == (0, whole), (stop, servers, said)


@pytest.mark.full
def test_after_ctrl_c_the_launcher_says_how_to_go_on_and_that_works(tmp_path):
    """The last checkpoint loses what came after it, and nothing else; another number of workers is refused by name."""
    _, whole, _ = launch(tmp_path, "whole")
    environment = os.environ | {"HOLD": "13"}
    argv = command(tmp_path, "cut", servers=2)
    with subprocess.Popen(
        argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = ""
        while "HOLDS" not in said:
            said += (line := process.stdout.readline())
            assert line, said
        process.send_signal(signal.SIGINT)
        said += process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "to go on from the last checkpoint: ps-accordion launch --resume cut/checkpoints" in said
    code, _, said = launch(tmp_path, "three", "--resume", "cut/checkpoints", **{"workers.count": 3})
    assert code == 2
    assert "was made with workers.count = 2, and this job has 3" in said
    code, states, said = launch(tmp_path, "on", "--resume", "cut/checkpoints")
    assert (code, states) == (0, whole), said
    assert "step-00000012: step 12" in said
