"""How often a busy thread hands on."""

from ps_accordion.pace import Pace


def test_the_first_task_is_told_at_once_and_later_ones_together() -> None:
    """Twice as many each time, up to the most."""
    pace = Pace(4)
    assert [number for number in range(1, 16) if pace.hand_on(idle=False)] == [1, 3, 7, 11, 15]


def test_who_has_nothing_left_to_do_keeps_nothing_back() -> None:
    """And begins anew with one."""
    pace = Pace(8)
    told = [pace.hand_on(idle=number in (4, 9)) for number in range(12)]
    assert [number for number, each in enumerate(told) if each] == [0, 2, 4, 5, 7, 9, 10]
