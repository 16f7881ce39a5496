"""Workers under torchrun: a coordinator and a server stand beside it, and its process group stays the script's own."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 100
"""More than it takes on a busy machine with cold kernels; reached only when something hangs."""

EVERYTHING = """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DistributedSampler

    from ps_accordion.worker import DistributedModel, attach, connect

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            model(x).square().mean().backward()
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def module():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 30))

    dist.init_process_group("gloo")
    sampler = DistributedSampler(range(100))
    with connect() as session:
        assert (session.rank, session.world_size) == (dist.get_rank(), dist.get_world_size())
        dist.barrier()
        theirs = train(DistributedDataParallel(module()))
        ours = train(DistributedModel(module()))
        hooked = DistributedDataParallel(module())
        attach(hooked)
        attached = train(hooked)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(attached, ours)
    assert dist.get_world_size() == sampler.num_replicas == 2
    both = [torch.empty_like(ours) for _ in range(2)]
    dist.all_gather(both, ours)
    assert torch.equal(*both)
    print("agreed", len(sampler))
    dist.barrier()
    dist.destroy_process_group()
"""


@contextmanager
def started(directory, name, arguments, **environment):
    """Start `python -P -m <arguments>`; yield the process and where its output goes. What still runs at the end is killed."""
    output = directory / f"{name}.log"
    # torch and torchrun leave folders in the temporary directory.
    environment = os.environ | {"TMPDIR": str(directory), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    with (
        output.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield process, output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def torchrun(script):
    """Return the arguments that run a script as two workers, at a port that is free. Rank 0's output is shown."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "0", str(script)]


def run(directory, script):
    """Run a script under torchrun beside a coordinator and a server; return what it printed."""
    address = f"ipc://{directory}/c"
    job = ["--workers", "2", "--servers", "1", "--codec", "dense", "--light", "32", "--policy", "static"]
    job += ["--set", f"coordinator.address={address}", "--set", f"servers.bind=ipc://{directory}/s"]
    with ExitStack() as stack:
        roles = {
            name: stack.enter_context(started(directory, name, ["ps_accordion.launcher", name, *number, *job]))
            for name, number in (("coordinator", ()), ("server", ("--number", "0")))
        }
        workers = started(directory, "workers", torchrun(script), PS_ACCORDION_COORDINATOR_ADDRESS=address)
        roles["workers"] = stack.enter_context(workers)
        code = roles["workers"][0].wait(SECONDS)
        said = {name: output.read_text() for name, (_, output) in roles.items()}
        assert code == 0, said
        codes = {name: process.wait(SECONDS) for name, (process, _) in roles.items()}
    assert codes == {"coordinator": 0, "server": 0, "workers": 0}, said
    return said["workers"]


def test_the_group_stays_the_scripts_own_and_all_three_ways_agree(tmp_path):
    """Real DDP, our wrapper and our hook on a DDP, one after another in one script: the same parameters."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(EVERYTHING))
    assert "agreed 50" in run(tmp_path, script)


@pytest.mark.full
def test_the_example_that_comes_from_ddp_trains_like_it(tmp_path):
    """`ddp.py`, and the same with three lines changed, dense: the same losses and accuracy."""
    (tmp_path / "theirs").mkdir()
    with started(tmp_path / "theirs", "workers", torchrun(EXAMPLES / "ddp.py")) as (process, output):
        (tmp_path / "ours").mkdir()
        ours = run(tmp_path / "ours", EXAMPLES / "from_ddp.py")
        assert process.wait(SECONDS) == 0, output.read_text()
        theirs = output.read_text()
    said = [[line for line in text.splitlines() if line.startswith(("epoch ", "accuracy "))] for text in (ours, theirs)]
    assert len(said[0]) == 5
    assert said[0] == said[1]
    assert float(said[0][-1].split()[-1]) > 0.98


@pytest.mark.full
def test_without_servers_a_single_process_trains_alone_and_says_so(tmp_path):
    """`python train.py` with nothing in the environment: the same script, plain training."""
    command = [sys.executable, str(EXAMPLES / "train.py")]
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.98
    assert done.stderr.startswith("ps-accordion: no coordinator is named (PS_ACCORDION_COORDINATOR_ADDRESS), so this process")
    assert done.stderr.count("\n") == 1


def test_one_of_several_without_a_coordinator_is_an_error(tmp_path):
    """It would else train alone, as one of many who do."""
    command = [sys.executable, "-c", "from ps_accordion.worker import connect; connect()"]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode != 0
    assert "ConfigError: this is rank 0 of 2 processes (torchrun), and nobody names a coordinator" in done.stderr
    assert "PS_ACCORDION_COORDINATOR_ADDRESS" in done.stderr
