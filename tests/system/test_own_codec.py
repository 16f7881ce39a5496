"""A codec of somebody else in a whole run, with real processes and real metadata: the one of docs/own-codecs.md."""

import re
import sys

import own_codec
import pytest
from launched import events, launch

TRAIN = """
torch.manual_seed(1)
images, labels = torch.randn(32, 64), torch.randint(8, (32,))
with connect() as session:
    model = DistributedModel(nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 32)), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    print("loss", nn.functional.cross_entropy(model(images), labels).item())
    print("sum", sum(parameter.detach().double().sum().item() for parameter in model.parameters()))
"""
TABLE = 'codec.tensors={"0.*" = {codec = "peaks", light = 16}, "*.bias" = "dense", "encodr.*" = "int"}'


@pytest.fixture
def on_path(tmp_path_factory, monkeypatch):
    """Install the codec of the page for all processes of a run."""
    folder = own_codec.install(tmp_path_factory.mktemp("site"))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_codec_of_another_distribution_trains_beside_ours(tmp_path, on_path):
    """Two ways, with feedback at both ends: replicas agree, the loss falls from 3.5, and the ledger balances."""
    code, said = launch(tmp_path, TRAIN, "--codec", "int", "--policy", "static", "--set", TABLE)
    assert code == 0, said
    assert "codec int (peaks for 0.*, dense for *.bias, int for encodr.*)" in said
    assert said.count("codec.tensors: 'encodr.*' decides about no tensor so far; the nearest names are ") == 1
    assert len(set(re.findall(r"\] sum (\S+)", said))) == 1
    assert all(float(loss) < 0.5 for loss in re.findall(r"\] loss (\S+)", said))
    (ledger,) = [event for event in events(tmp_path, "coordinator") if event["event"] == "ledger"]
    assert ledger["balanced"], ledger["text"]


@pytest.mark.full
def test_a_worker_that_lacks_the_codec_says_so_before_the_first_round(tmp_path, on_path):
    """Coordinator and servers have it; whoever does not is named, with what to do, and the run ends."""
    command = ("env", "PYTHONPATH=", sys.executable, "train.py")
    code, said = launch(tmp_path, TRAIN, "--set", TABLE, command=command)
    assert code == 1, said
    assert "codec.tensors '0.*': expected a codec among bf16, dense, " in said
    assert "got 'peaks'; one of another distribution must be installed wherever a process of the job runs" in said
    assert not any(event["event"] == "layout" for event in events(tmp_path, "coordinator"))
