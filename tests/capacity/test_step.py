"""A step takes what one can work out by hand where one thing limits it, and is fast to predict for hundreds of workers."""

import dataclasses
import math
import time

import pytest

from ps_accordion.capacity import (
    Candidate,
    Carry,
    Compute,
    Costs,
    Handling,
    Job,
    Link,
    Spent,
    Work,
    candidates,
    costs_from,
    memory_of,
    recommended,
    simulate,
)
from ps_accordion.capacity.models import linear, resnet50
from ps_accordion.capacity.step import WAITING
from ps_accordion.codecs import get
from ps_accordion.config import Settings
from ps_accordion.errors import ConfigError
from ps_accordion.layout import Tensor
from ps_accordion.regimes.base import Choice

TOPK, DENSE, SMALL = Choice("topk", 0.01), Choice("dense", 32.0), Choice("dense", 16.0)
FREE = Work(0.0, 0.0, 0.0, 0.0)
NOTHING = Costs({TOPK: FREE, DENSE: FREE, SMALL: FREE}, copy=0.0, worker=Handling(), server=Handling())
ONE_KEY = (Tensor("weight", (512, 512), "float32"),)
FAST = Link(math.inf)


def job(**changes) -> Job:
    """One worker, one server, one dense key of 1 MiB, and nothing that takes time."""
    default = {"tensors": ONE_KEY, "choice": DENSE, "workers": 1, "servers": 1, "shards_per_server": 1, "worker_link": FAST}
    default |= {"server_link": FAST, "worker_cores": 64, "server_cores": 64, "threads": 1, "partition_elements": 512 * 1024}
    return Job(**default | changes)


def test_nothing_takes_no_time():
    """The simulation adds nothing of its own."""
    assert simulate(job(), NOTHING).seconds == 0.0


def test_a_key_passes_all_that_handles_it():
    """Forward, backward, encode, socket, socket, answer, socket, socket, decode, optimizer: one key waits for nobody."""
    n, work = 512 * 512, Work(1e-9, 2e-9, 40e-9, 4e-9)
    worker, server = Handling(2e-3, Carry(1e-3, 1e-9), Carry(5e-4, 2e-9)), Handling(3e-3, Carry(1e-4), Carry(0.0, 3e-9))
    costs = Costs({DENSE: work}, copy=0.0, worker=worker, server=server)
    step = simulate(job(compute=Compute(0.1, 0.2, 0.3)), costs)
    (load,) = job().loads(costs)
    assert 4 * n < load.nbytes < 4 * n + 200, "a header is counted"
    codec, answer = 2e-3 + n * 3e-9, 3e-3 + n * (40e-9 - 7 * 4e-9)
    here, there = 2 * (1.5e-3 + 3e-9 * load.nbytes), 2 * (1e-4 + 3e-9 * load.nbytes)
    assert step.seconds == pytest.approx(0.6 + codec + answer + here + there)
    assert step.worker_cpu == pytest.approx(codec + here)
    assert step.server_cpu == pytest.approx(answer + there)
    assert step.limit == "computing"


@pytest.mark.parametrize("workers", [1, 4])
def test_a_slow_link_decides_and_twice_the_rate_takes_half(workers):
    """Dense through one server: all workers' bytes come in through its link, and all results leave."""
    slow, fast = (Link(bits, 0.0) for bits in (1e8, 2e8))
    tensors = tuple(linear(2, 2048))
    seconds = [
        simulate(job(tensors=tensors, workers=workers, worker_link=link, server_link=link), NOTHING) for link in (slow, fast)
    ]
    assert seconds[0].seconds == pytest.approx(2 * seconds[1].seconds)
    nbytes = seconds[0].worker_bytes
    there = workers * nbytes / slow.bytes_per_second
    # Results leave while pushes still come in; only the first key's push and the last one's result go alone.
    assert there < seconds[0].seconds < there * (1 + 2 / 17)
    assert seconds[0].limit in ("server link up", "server link down", "worker link up", "worker link down")


def test_far_away_a_step_takes_a_round_trip_more():
    """A delay is on the way twice."""
    link = Link(math.inf, 0.01)  # 20 ms from host to host
    step = simulate(job(worker_link=link, server_link=link), NOTHING)
    assert step.seconds == pytest.approx(0.04)
    assert step.limit == WAITING


def test_cores_that_all_share_do_the_work_of_all():
    """Four workers that compute for 1 s take 2 s on two cores, and on cores of their own 1 s."""
    compute = Compute(1.0, 0.0, 0.0)
    assert simulate(job(workers=4, compute=compute), NOTHING).seconds == pytest.approx(1.0)
    shared = simulate(job(workers=4, compute=compute, shared_cores=2), NOTHING)
    assert shared.seconds == pytest.approx(2.0)
    assert shared.busy["cores"] == pytest.approx(1.0)


def test_codec_threads_and_shards_work_beside_each_other():
    """32 MiB in 16 keys: four threads take a quarter of the time, two shards half."""
    tensors = (Tensor("weight", (4096, 2048), "float32"),)
    encode = dataclasses.replace(NOTHING, works={DENSE: Work(1e-9, 0.0, 0.0, 0.0)})
    answer = dataclasses.replace(NOTHING, works={DENSE: Work(0.0, 0.0, 1e-9, 0.0)})
    n = 4096 * 2048
    assert simulate(job(tensors=tensors, threads=4), encode).seconds == pytest.approx(n * 1e-9 / 4)
    assert simulate(job(tensors=tensors, shards_per_server=2), answer).seconds == pytest.approx(n * 1e-9 / 2)
    assert simulate(job(tensors=tensors, shards_per_server=2), answer).limit == "server shards"


def test_pushes_overlap_with_backward():
    """Buckets go as they fill: the link is done soon after backward, not a whole transfer later."""
    tensors = tuple(linear(6, 2048))
    link = Link(8e9)
    step = simulate(job(tensors=tensors, compute=Compute(0.0, 1.0, 0.0), worker_link=link, server_link=link), NOTHING)
    whole = step.worker_bytes / link.bytes_per_second
    assert 1.0 < step.seconds < 1.0 + whole
    assert [round(share, 2) for _, share in job(tensors=tensors).buckets()] == [0.17, 0.33, 0.33, 0.17]


def test_servers_on_the_workers_hosts_share_their_links():
    """Half of the keys stay on their host: with two workers, half as many bytes pass each link."""
    link, tensors = Link(1e8), tuple(linear(4, 2048))
    apart, together = (
        simulate(job(tensors=tensors, workers=2, servers=2, worker_link=link, server_link=link, colocated=where), NOTHING)
        for where in (False, True)
    )
    assert together.busy["worker link up"] * together.seconds == pytest.approx(
        apart.busy["worker link up"] * apart.seconds, rel=0.01
    ), "half of its pushes, and results to the other"
    assert together.worker_bytes == apart.worker_bytes


def test_256_workers_are_a_matter_of_seconds():
    """A quarter of a million events of 25 M parameters in full, and a simulation of a few workers for all that agrees with it."""
    work = Work(1.2e-9, 0.3e-9, 4e-9, 0.2e-9)
    handling = Handling(5e-4, Carry(2e-4, 1e-10), Carry(4e-5, 3e-10))
    costs = Costs({TOPK: work, SMALL: work}, copy=0.0, worker=handling, server=handling)
    large = job(
        tensors=tuple(linear(6, 2048)), choice=TOPK, workers=256, servers=8, shards_per_server=2, worker_link=Link(1e9),
        server_link=Link(1e10), compute=Compute(0.05, 0.1, 0.01), threads=4,
    )  # fmt: skip
    began = time.process_time()
    whole = simulate(large, costs)
    taken = time.process_time() - began
    assert taken < 10.0, "processor time; some 1.5 s on a machine with nothing else to do"
    assert simulate(large, costs, most_workers=16).seconds == pytest.approx(whole.seconds, rel=0.02)
    assert simulate(large, costs, most_workers=48).server_cpu == pytest.approx(whole.server_cpu)


def test_costs_that_were_not_measured_are_asked_for():
    """With the command that measures them."""
    with pytest.raises(ConfigError, match=r"no coefficients of topk:0.02; .*bench codecs --only topk:0.02"):
        simulate(job(choice=Choice("topk", 0.02)), NOTHING)


def test_what_is_spent_beside_kernels_follows_from_what_threads_took():
    """Two cases whose processor time is that of known costs give these costs back."""
    work = Work(1e-9, 3e-10, 4e-9, 2e-10)
    worker = Handling(5e-4, Carry(2e-4, 1e-10), Carry(4e-5, 3e-10))
    server = Handling(6e-4, Carry(1e-4, 2e-10), Carry(3e-5, 4e-10))
    true = Costs(dict.fromkeys((TOPK, DENSE, SMALL), work), 0.0, worker, server)
    jobs = [job(tensors=(Tensor("bench", (1, 1 << 21), "float32"),), workers=3, choice=choice) for choice in (DENSE, TOPK)]
    spent = []
    for one in jobs:
        loads = one.loads(true)
        cpu = {
            "worker codec": sum(load.encode + load.decode for load in loads),
            "worker sockets": sum(2 * worker.sockets.of(load.nbytes) for load in loads),
            "worker zeromq": sum(2 * worker.zeromq.of(load.nbytes) for load in loads),
            "server shards": sum(load.answer for load in loads),
            "server sockets": sum(6 * server.sockets.of(load.nbytes) for load in loads),
            "server zeromq": sum(6 * server.zeromq.of(load.nbytes) for load in loads),
        }
        spent.append(Spent(one, cpu))
    found = costs_from(true.works, 0.0, spent)
    for one, expected in ((found.worker, worker), (found.server, server)):
        assert one.task == pytest.approx(expected.task)
        assert one.sockets == pytest.approx(expected.sockets)
        assert one.zeromq == pytest.approx(expected.zeromq)
    with pytest.raises(ConfigError, match="a compressed and a dense one"):
        costs_from(true.works, 0.0, spent[:1])
    with pytest.raises(ConfigError, match=r"no processor time of 'worker sockets' .*on Linux"):
        costs_from(true.works, 0.0, [one._replace(cpu={"worker codec": 1.0}) for one in spent])


def test_keys_are_as_large_as_those_of_a_job_over_a_network():
    """Dense ones are a quarter as large as those that are compressed, where nobody sets it."""
    large = (Tensor("weight", (4096, 2048), "float32"),)
    keys = [len(job(tensors=large, choice=choice, partition_elements=0).layout().keys) for choice in (TOPK, DENSE)]
    sizes = [Settings(codec=job(choice=choice).settings).partition_elements for choice in (TOPK, DENSE)]
    assert keys == [8, 32] == [4096 * 2048 // size for size in sizes]


def test_the_fewest_servers_that_are_about_as_fast_are_recommended():
    """A server's link limits 8 workers of dense until there is a server a worker; then no further server would help."""
    link = Link(1e9)
    found = candidates(job(tensors=tuple(linear(4, 2048)), workers=8, worker_link=link, server_link=link), NOTHING)
    assert [(one.job.servers, one.job.shards_per_server) for one in found] == [(1, 1), (2, 1), (4, 1), (8, 1)]
    assert [one.step.seconds for one in found] == sorted((one.step.seconds for one in found), reverse=True)
    assert recommended(found) is found[-1]
    same = [Candidate(one.job, found[-1].step) for one in found]
    assert recommended(same) is same[0]


def test_more_shards_are_tried_where_shards_limit():
    """Heavy sums: shards up to the server's cores."""
    costs = dataclasses.replace(NOTHING, works={DENSE: Work(0.0, 0.0, 1e-7, 0.0)})
    tensors = (Tensor("weight", (4096, 2048), "float32"),)
    found = candidates(job(tensors=tensors, server_cores=4), costs)
    assert [one.job.shards_per_server for one in found] == [1, 2, 4]
    assert recommended(found).job.shards_per_server == 4


def test_memory_follows_the_formula():
    """One key, three members: worked out by hand."""
    n, payload = 512 * 512, get("topk").payload_bound(512 * 512, 0.01)
    memory = memory_of(job(choice=TOPK, workers=3, replay_rounds=8, threads=2))
    assert memory.server == {
        "residuals": 8 * n, "held payloads": 3 * payload, "accumulators": 4 * n, "last results": 2 * payload,
    }  # fmt: skip
    assert memory.worker == {
        "residual": 4 * n, "codec state": 0, "spare vectors": 8 * n, "payloads and results": 3 * payload,
        "retained payloads": 8 * payload,
    }  # fmt: skip
    assert memory_of(job()).server["residuals"] == 0, "dense float32 keeps nothing"


def test_resnet_50_is_pushed_in_a_350th_of_its_bytes():
    """Small tensors included: topk 0.1 % of the others, 2 bytes an element of vectors."""
    payloads = [nbytes for _, _, nbytes in job(tensors=tuple(resnet50()), choice=Choice("topk", 0.001), servers=8).payloads()]
    assert 4 * 25_557_032 / sum(payloads) >= 350
