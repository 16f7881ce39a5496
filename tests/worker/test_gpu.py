"""Whole runs on a GPU, a process for each worker, as people have them.

Two workers on one GPU cannot share a process: torch gives each device one thread for all backwards, and a worker's backward
waits there for what the other pushes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launched import launch
from networks import same

TESTS = Path(__file__).resolve().parent.parent
CODECS = {"dense": 32, "onebit": 512, "topk": 0.1, "random_block": 0.25}

if torch.cuda.is_available():

    def run(directory: Path, codec: str, work: str, *, elements: int = 1024) -> list[list[torch.Tensor]]:
        """Let two workers return tensors from an expression of `session`, `rank` and `networks`; return them by rank."""
        directory.mkdir()
        settings = {"servers.count": 2, "layout.partition_elements": elements, "regime.policy": "static", "run.restarts": 0}
        settings |= {"codec.name": codec, "codec.light": CODECS[codec]}
        script = f"""
            import sys
            sys.path.insert(0, {str(TESTS)!r})
            import networks
            from ps_accordion.worker import connect
            with connect() as session:
                torch.save({work}, f"made-{{rank}}.pt")
            """
        code, output = launch(
            directory, script, *(word for item in settings.items() for word in ("--set", "{}={}".format(*item)))
        )
        assert code == 0, output
        return [torch.load(directory / f"made-{rank}.pt", weights_only=True) for rank in range(2)]

    @pytest.mark.cuda
    @pytest.mark.parametrize("codec", CODECS)
    def test_a_gpu_trains_as_the_host_does(tmp_path: Path, codec: str) -> None:
        """The same mean gradients and parameters to the bit in five steps, from the parameters of worker 0."""
        expected = run(tmp_path / "host", codec, "networks.train_sums(session, 'cpu')")
        made = run(tmp_path / "gpu", codec, "networks.train_sums(session, 'cuda')")
        mixed = run(tmp_path / "mixed", codec, "networks.train_sums(session, 'cuda' if rank else 'cpu')")
        assert len(made[0]) == 4 * 2 + 2
        for mine in (expected[1], *made, *mixed):
            assert same(expected[0], mine)

    @pytest.mark.cuda
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_gpu_trains_a_network(tmp_path: Path, dtype: str) -> None:
        """Branches, batch-norm, skips and half precision: two workers stay the same to the bit, and all is finite."""
        module = f"networks.Network(norm=True).to('cuda', torch.{dtype})"
        mine, theirs = run(tmp_path / "run", "topk", f"networks.train(session, {module}, bad=(2,), find_unused_parameters=True)")
        assert same(mine, theirs)
        assert all(torch.isfinite(tensor).all() for tensor in mine)

    @pytest.mark.cuda
    @pytest.mark.parametrize("codec", ["dense", "onebit", "topk"])
    def test_a_gpu_draws_random_numbers_in_backward(tmp_path: Path, codec: str) -> None:
        """What is recorded meanwhile, beside results that come in, leaves them to the model."""
        train = "networks.train(session, networks.Dropping().to('cuda'), bucket_cap_mb=0.25)"
        mine, theirs = run(tmp_path / "run", codec, train, elements=1 << 14)
        assert same(mine, theirs)
        assert all(torch.isfinite(tensor).all() for tensor in mine)
