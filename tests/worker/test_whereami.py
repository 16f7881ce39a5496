"""Which worker a process is: the variables of every launcher that is known, and clear words about the others."""

import pytest

from ps_accordion.errors import ConfigError
from ps_accordion.worker.whereami import FAMILIES, Place, place


@pytest.mark.parametrize(("source", "rank", "size", "local"), FAMILIES)
def test_each_launcher_is_understood(source: str, rank: str, size: str, local: str) -> None:
    """Rank, number of processes and number of those on this machine, and who said so."""
    assert place({rank: "3", size: "16", local: "8"}) == Place(3, 16, 8, source)
    assert place({rank: "3", size: "16"}) == Place(3, 16, 1, source)
    assert place({rank: "0"}) == Place(0, 0, 1, source)


def test_nobody_said() -> None:
    """A script started by hand asks for any rank; variables without a rank say nothing."""
    assert place({}) == Place(-1, 0, 1, "nobody")
    assert place({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}) == Place(-1, 0, 1, "nobody")


def test_sizes_come_from_who_gave_the_rank() -> None:
    """A rank of one launcher and a size of another would count the wrong processes."""
    assert place({"PS_ACCORDION_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == Place(
        1, 0, 1, "ps-accordion"
    )


def test_our_own_launcher_comes_first() -> None:
    """It may run inside torchrun or a Slurm job, whose variables are still there."""
    everything = {name: str(number) for number, (_, name, *_) in enumerate(FAMILIES)}
    for source, name, *_ in FAMILIES:
        assert place(everything).source == source
        del everything[name]


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    """It must not make everybody rank 0."""
    assert place({"PS_ACCORDION_RANK": "", "RANK": "2"}) == Place(2, 0, 1, "torchrun")
    assert place({"RANK": ""}) == Place(-1, 0, 1, "nobody")
    assert place({"RANK": "1", "LOCAL_WORLD_SIZE": ""}) == Place(1, 0, 1, "torchrun")


def test_slurm_counts_tasks_in_its_own_way() -> None:
    """`4(x2)` is four tasks on each of two nodes."""
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4(x2)"}
    assert place(slurm) == Place(5, 8, 4, "Slurm")
    assert place({"SLURM_PROCID": "5", "SLURM_NTASKS_PER_NODE": "0"}).local_size == 1


@pytest.mark.parametrize("text", ["one", "-1", "1.0", " 1", "0x1", "²"])
def test_what_is_no_number_is_refused_by_name(text: str) -> None:
    """With the variable and what stands in it."""
    with pytest.raises(ConfigError, match="expected a number in RANK, got") as raised:
        place({"RANK": text})
    assert repr(text) in str(raised.value)
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE"):
        place({"RANK": "1", "LOCAL_WORLD_SIZE": text})
    with pytest.raises(ConfigError, match="expected a number in WORLD_SIZE"):
        place({"RANK": "1", "WORLD_SIZE": text})
