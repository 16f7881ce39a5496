"""Several processes of a host as one worker: two hosts of two processes, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import copy, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from ps_accordion.worker import DistributedModel, connect

dist.init_process_group("gloo")
torch.set_num_threads(1)
fail = "fail" in sys.argv
with connect(local_group=dist.group.WORLD) as session:
    torch.manual_seed(session.rank)
    module = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))
    model = DistributedModel(module, session=session, bucket_cap_mb=0.004, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.track(optimizer)
    first = [p.detach().clone() for p in model.parameters()]
    for step in range(6):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + session.rank))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if step == 2 and session.rank == 3:
            loss = loss * float("inf")
        if fail and step == 3 and session.rank == 2:
            raise ZeroDivisionError("the true cause")
        loss.backward()
        if step == 0:
            gradients = [p.grad.clone() for p in model.parameters()]
        if step == 2:
            skipped = all(p.grad is None for p in model.parameters())
        optimizer.step()
    digest = [round(t.double().sum().item(), 12) for t in (*model.state_dict().values(), *gradients)]
    result = [session.rank, session.world_size, skipped, digest, session.counters.rounds]
    # To a file: two processes share each pipe.
    Path(f"result-{session.rank}.json").write_text(json.dumps(result))
    if session.rank == 0:
        expected, module = [torch.zeros_like(p) for p in first], copy.deepcopy(module)
        for rank in range(4):
            with torch.no_grad():
                for parameter, start in zip(module.parameters(), first):
                    parameter.copy_(start)
            module.train()
            module.zero_grad()
            module(torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
            for total, parameter in zip(expected, module.parameters()):
                total += parameter.grad / 4
        for mine, other in zip(gradients, expected):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        Path("checked").touch()
dist.destroy_process_group()
"""

LAST_WORDS = """
import sys
import torch.distributed as dist
from ps_accordion.worker.local import LocalGroup

dist.init_process_group(sys.argv[3] or None, init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
local = LocalGroup(dist.group.WORLD)
sys.setswitchinterval(100)
for _ in range(20):
    assert local.tell([1, 2, 3]) == [1, 2, 3]
    assert local.any([False, True], local._device) == [False, True]
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo", ""])
def test_no_thread_of_gloo_outlives_a_collective_with_a_tensor_of_ours(tmp_path, backend):
    """It would ask an interpreter that has ended for its lock, which aborts the process: every third here."""
    for run in range(3):
        both = [
            subprocess.Popen(
                [sys.executable, "-c", LAST_WORDS, str(tmp_path / f"store-{run}"), str(rank), backend],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        ends = [(process.communicate(timeout=100)[1], process.returncode) for process in both]
        assert [code for _, code in ends] == [0, 0], ends


def launch(tmp_path, *arguments):
    """Start two hosts of two processes each; return what happened."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    bin_ = Path(sys.executable).parent
    settings = {"CODEC_NAME": "dense", "CODEC_LIGHT": "32", "REGIME_POLICY": "static"}
    environment = os.environ | {f"PS_ACCORDION_{name}": value for name, value in settings.items()} | {"OMP_NUM_THREADS": "1"}
    command = [bin_ / "ps-accordion", "launch", "--workers", "2", "--servers", "1", "--"]
    torchrun = [bin_ / "torchrun", "--standalone", "--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs")]
    torchrun += [str(script), *arguments]
    return subprocess.run(
        [*map(str, command), *map(str, torchrun)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.full
@pytest.mark.timeout(150)
def test_two_hosts_of_two_processes_train_as_four(tmp_path):
    """The first gradient is the mean over all four, replicas have the same bits, and a skipped round reaches all."""
    done = launch(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checked").exists()
    results = [json.loads(file.read_text()) for file in tmp_path.glob("result-*.json")]
    assert sorted(rank for rank, *_ in results) == [0, 1, 2, 3]
    assert {size for _, size, *_ in results} == {4}
    assert all(skipped for _, _, skipped, *_ in results)
    assert all(digest == results[0][3] for _, _, _, digest, _ in results)
    assert sorted(rounds for *_, rounds in results) == [0, 0, 6, 6]


@pytest.mark.full
@pytest.mark.timeout(150)
def test_an_error_in_one_process_of_a_host_ends_all(tmp_path):
    """With its cause on the screen, and nobody left waiting."""
    done = launch(tmp_path, "fail")
    assert done.returncode != 0
    assert "the true cause" in done.stdout + done.stderr
