"""One process without servers: the same script is plain training, and says so."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from ps_accordion import config
from ps_accordion.errors import ConfigError, UsageError
from ps_accordion.worker import DistributedModel, attach, connect
from ps_accordion.worker.alone import Alone

OURS = ("PS_ACCORDION_", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_", "SLURM_", "DMLC_")


@pytest.fixture(autouse=True)
def _nobody(monkeypatch):
    """No launcher has started this process."""
    for name in os.environ:
        if name.startswith(OURS):
            monkeypatch.delenv(name)


def network():
    """Return a network with batch-norm."""
    module = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.randn(*parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.2)
    return module


def train(model, optimizer, scaler=None):
    """Make five steps; return the losses."""
    losses = []
    for step in range(5):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(100 + step))
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), x[:, :4])
        losses.append(loss.item())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return losses


@pytest.mark.parametrize("scaled", [False, True])
def test_training_alone_is_plain_training_to_the_bit(scaled, capfd):
    """Same losses, parameters and buffers as without ps-accordion; one line on stderr says that nobody else takes part."""
    plain = network()
    expected = train(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    with connect() as session:
        assert (session.rank, session.world_size) == (0, 1)
        module = network()
        model = DistributedModel(module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        session.track(optimizer, scaler=scaler)
        with session.join(), session.busy("evaluation"):
            losses = train(model, optimizer, scaler)
        session.begin_epoch(1)
        session.log(loss=losses[-1])
        assert session.counters.rounds == 5
        assert session.batch_multiplier == 1
        assert list(session.steps(3)) == [0, 1, 2]
        tensor = torch.ones(3)
        assert session.push_pull(tensor, name="t") is tensor
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), plain.state_dict().values(), strict=True))
    said = capfd.readouterr().err
    assert said.count("trains alone") == 1
    assert "PS_ACCORDION_COORDINATOR_ADDRESS" in said


def test_what_is_not_finite_stays_as_plain_training_has_it():
    """Nobody else would be poisoned, so nothing is skipped."""
    with Alone(config.load(environment={})) as session:
        model = DistributedModel(network(), session=session)
        (model(torch.ones(4, 20)).sum() * float("inf")).backward()
        assert not torch.isfinite(model.module[3].bias.grad).any()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_one_of_several_processes_does_not_train_alone(environment, monkeypatch):
    """Each would train a model of its own: the error says what to start and what to set."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="PS_ACCORDION_COORDINATOR_ADDRESS") as raised:
        connect()
    assert "ps-accordion coordinator" in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [("RESUME", "runs/before/step-12"), ("EVERY_STEPS", "100")])
def test_checkpoints_are_not_left_out_in_silence(name, value, monkeypatch):
    """Who wants them and forgets the launcher hears it before the first step, not after the last."""
    monkeypatch.setenv(f"PS_ACCORDION_CHECKPOINT_{name}", value)
    with pytest.raises(ConfigError, match=f"checkpoint.{name.lower()} is set, and nobody names a coordinator"):
        connect()


def test_a_model_without_a_session_is_refused():
    """There is none, or it is gone: nothing would keep it open."""
    session = connect()
    session.close()
    del session
    with pytest.raises(UsageError, match=r"connect\(\)"):
        DistributedModel(network())


def test_a_session_leaves_nothing_behind():
    """Hooks on optimizers are gone with it."""
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with Alone(config.load(environment={})) as session:
        session.track(optimizer)
        assert optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_metrics_of_a_run_directory_are_written(tmp_path):
    """Without servers, too: what the script logs."""
    settings = config.load(environment={}, overrides={"run.directory": str(tmp_path)})
    with Alone(settings) as session:
        DistributedModel(network(), session=session)(torch.ones(4, 20)).sum().backward()
        session.log(loss=0.5)
    (file,) = tmp_path.rglob("*.jsonl")
    assert '"loss":0.5' in file.read_text().replace(" ", "")


@pytest.mark.parametrize("wrapped", [nn.Linear(2, 2), None])
def test_attach_takes_a_distributed_data_parallel_only(wrapped):
    """With a word on what to do instead."""
    with Alone(config.load(environment={})) as session:
        model = wrapped if wrapped is not None else DistributedModel(network(), session=session)
        with pytest.raises(UsageError, match="DistributedModel"):
            attach(model, session=session)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex"),
        (lambda: nn.SyncBatchNorm(4), "SyncBatchNorm"),
        (lambda: nn.EmbeddingBag(4, 4, sparse=True), "sparse=False"),
        (lambda: nn.LazyLinear(4), "no shape yet"),
    ],
    ids=["complex", "sync-batch-norm", "sparse", "lazy"],
)
def test_what_would_train_wrongly_is_refused_with_an_alternative(make, said):
    """At once, before anything is sent."""
    module = make()
    with Alone(config.load(environment={})) as session, pytest.raises(UsageError, match=said):
        DistributedModel(module, session=session)


SHARDED = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import distribute_module
from ps_accordion.errors import UsageError
from ps_accordion.worker import DistributedModel, connect

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
options = {"device_id": torch.device("cpu"), "sharding_strategy": ShardingStrategy.NO_SHARD}
models = [
    fully_shard(nn.Linear(4, 4)),
    nn.Sequential(FullyShardedDataParallel(nn.Linear(4, 4), **options)),
    distribute_module(nn.Linear(4, 4), init_device_mesh("cpu", (1,))),
]
with connect() as session:
    for model in models:
        try:
            DistributedModel(model)
        except UsageError as error:
            print("REFUSED", error)
dist.destroy_process_group()
"""


def test_models_of_which_each_worker_holds_a_part_are_refused(tmp_path):
    """FSDP of both kinds, and DTensors: real ones, in a process of their own."""
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert [("FSDP" in line, "without ps-accordion" in line) for line in said] == [(True, True)] * 3


@pytest.mark.parametrize(
    "option", ["process_group", "device_mesh", "delay_all_reduce_named_params", "skip_all_reduce_unused_params"]
)
def test_options_that_cannot_be_obeyed_are_refused_by_name(option):
    """With the reason."""
    with Alone(config.load(environment={})) as session, pytest.raises(UsageError, match=option):
        DistributedModel(network(), session=session, **{option: True})


def test_a_wrapped_model_is_not_wrapped_again():
    """`attach` is for those who wrap themselves."""
    with Alone(config.load(environment={})) as session:
        model = DistributedModel(network(), session=session)
        with pytest.raises(UsageError, match="attach"):
            DistributedModel(model, session=session)
