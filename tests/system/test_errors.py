"""What goes wrong in a whole run, as a user meets it: through the command line, with real processes."""

import json
import re
import textwrap

import pytest
from launched import events, launch

TRAIN = """
with connect() as session:
    model = DistributedModel(nn.Linear(64, WIDTH), session=session)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(50):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
"""


def test_two_different_models_are_refused_with_both_shapes(tmp_path):
    """The message names the tensor, both shapes, and what to do."""
    code, said = launch(tmp_path, "WIDTH = 32 + rank\n" + TRAIN)
    assert code not in (0, 5)
    assert re.search(r"worker [01] and worker [01] hold different models", said)
    assert "(32, 64)" in said
    assert "(33, 64)" in said
    assert "Build the same model" in said


def test_another_seed_is_refused_with_both_values(tmp_path):
    """A worker that was told another seed than the job's."""
    script = 'if rank == 1:\n    os.environ["PS_ACCORDION_SEED"] = "77"\nWIDTH = 32\n' + TRAIN
    code, said = launch(tmp_path, script, "--set", "seed=5")
    assert code != 0
    assert "seed is 77 at worker 1 and 5 in this job" in said


def test_another_protocol_version_is_refused_with_both_versions(tmp_path):
    """A worker of another release."""
    script = "from ps_accordion.wire import framing\nif rank == 1:\n    framing.PROTOCOL_VERSION = 9\nWIDTH = 32\n" + TRAIN
    code, said = launch(tmp_path, script)
    assert code != 0
    assert "protocol version 2 from there, 9 here" in said


TAMPER = {
    "length": ("frames[-1] = bytes(frames[-1])[:-2]", r"expected payload frames of \[\d+\] bytes, got \[\d+\]"),
    "index": (
        "body = bytearray(frames[-1]); body[-7:-3] = b'\\xff\\xff\\xff\\xff'; frames[-1] = bytes(body)",
        "from worker 1 is refused",
    ),
    "checksum": ("", "checksum [0-9a-f]{16} of what came, [0-9a-f]{16} of what was sent"),
}


@pytest.mark.parametrize("what", TAMPER)
def test_a_wrong_payload_is_refused_and_its_sender_named(tmp_path, what):
    """Length and index with a right checksum are a broken worker; a checksum that is wrong every time is a broken link."""
    change, expected = TAMPER[what]
    script = f"""
    from ps_accordion.wire import framing, messages
    from ps_accordion.wire.transport import Transport

    def tampered(self, peer, frames, send=Transport.send_frames):
        if rank == 1 and b"push" in bytes(frames[0])[:24] and len(frames) == 2:
            message, payload = framing.unpack(frames)
            if {what == "checksum"}:
                frames = [frames[0], bytes(frames[1])[:-1] + bytes([bytes(frames[1])[-1] ^ 1])]
            elif message.codec == "topk":
                frames = list(frames)
                {change or "pass"}
                frames = framing.pack(message, frames[1:])
        send(self, peer, frames)

    Transport.send_frames = tampered
    Transport.send_soon = Transport.send  # one by one, or there is no telling which push goes with which
    WIDTH = 32
    """
    code, said = launch(tmp_path, textwrap.dedent(script) + TRAIN, "--set", "timeouts.resend=0.2")
    assert code != 0
    assert "worker 1" in said
    assert re.search(expected, said), said
    logged = [event for event in events(tmp_path, "server-0") if event["event"] in ("refused", "garbage")]
    assert logged
    assert all(event.get("culprit", event.get("sender")) == "worker 1" for event in logged)


def test_a_nan_that_stays_ends_the_run_with_the_setting_named(tmp_path):
    """After `skip.limit` rounds, in every worker."""
    script = TRAIN.replace("torch.randn(4, 64)", 'torch.full((4, 64), float("nan") if rank else 1.0)')
    code, said = launch(tmp_path, "WIDTH = 32\n" + script, "--set", "skip.limit=6")
    assert code != 0
    assert "rounds 0 to 5 were all skipped" in said
    assert "skip.limit = 6" in said
    assert [event["round"] for event in events(tmp_path, "worker-0") if event["event"] == "skip"] == list(range(6))


def test_a_good_run_ends_with_zero_and_leaves_its_records(tmp_path):
    """Resolved config, events of each role, the round log, metrics a step."""
    code, said = launch(tmp_path, "WIDTH = 32\n" + TRAIN)
    assert code == 0, said
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.toml", "events-coordinator.jsonl", "events-server-0.jsonl", "events-worker-1.jsonl"} <= names
    rounds = [event for event in events(tmp_path, "server-0") if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(51))
    assert [event["kind"] for event in rounds] == ["DATA"] * 50 + ["END"]
    metrics = (tmp_path / "run" / "metrics-worker-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in metrics] == list(range(50))
