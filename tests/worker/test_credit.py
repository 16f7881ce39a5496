"""How many bytes are under way to a server: what is ahead waits, and nothing waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ps_accordion.worker.credit import Credit

A, B = "server 0", "server 1"


def test_what_is_more_than_the_limit_waits_until_something_has_arrived_and_goes_in_order():
    credit = Credit(10)
    assert [credit.may_go(A, key, 4) for key in range(5)] == [True, True, False, False, False]
    assert credit.released() == []
    credit.arrived(A, 0)
    assert credit.released() == [2]
    credit.arrived(A, 1)
    credit.arrived(A, 2)
    assert credit.released() == [3, 4]


def test_what_waits_goes_in_the_order_of_its_numbers_whenever_it_was_ready():
    """Two workers whose codec threads are done in different orders push the same keys next."""
    one, other = Credit(10), Credit(10)
    for credit, order in ((one, [0, 3, 1, 4, 2]), (other, [0, 1, 2, 3, 4])):
        for key in order:
            credit.may_go(A, key, 10)
        credit.arrived(A, 0)
    for key in range(1, 5):
        assert one.released() == other.released() == [key]
        one.arrived(A, key)
        other.arrived(A, key)


def test_servers_do_not_wait_for_each_other():
    credit = Credit(10)
    assert [credit.may_go(A, 0, 10), credit.may_go(A, 1, 1), credit.may_go(B, 2, 10)] == [True, False, True]
    credit.arrived(B, 2)
    assert credit.released() == []


def test_one_push_may_always_go_and_one_without_a_payload_never_waits():
    credit = Credit(10)
    assert [credit.may_go(A, 0, 99), credit.may_go(A, 1, 1), credit.may_go(A, 2, 0)] == [True, False, True]
    assert not credit.arrived(A, 2)  # it was not under way
    assert credit.released() == []
    assert credit.arrived(A, 0)
    assert not credit.arrived(A, 0)
    assert credit.released() == [1]


def test_a_small_one_does_not_overtake_a_large_one():
    credit = Credit(10)
    assert [credit.may_go(A, 0, 8), credit.may_go(A, 1, 5), credit.may_go(A, 2, 1)] == [True, False, False]


def test_zero_is_no_limit():
    credit = Credit(0)
    assert all(credit.may_go(A, key, 1 << 40) for key in range(3))
    credit.arrived(A, 0)
    credit.ease(A)
    credit.end()
    assert credit.released() == []


def test_the_limit_doubles_where_workers_wait_for_each_other_and_comes_back():
    credit = Credit(10)
    assert [credit.may_go(A, key, 10) for key in range(4)] == [True, False, False, False]
    credit.arrived(A, 0)
    credit.ease(A)
    assert credit.released() == [1, 2]
    credit.end()
    assert [credit.may_go(A, key, 10) for key in range(3)] == [True, True, False]  # the round after
    credit.end()
    assert [credit.may_go(A, key, 10) for key in range(2)] == [True, False]
    credit.arrived(A, 0)
    credit.arrived(A, 1)
    credit.released()
    credit.ease(A)  # nothing waits: whom it waits for is slow, and not its order
    credit.end()
    assert [credit.may_go(A, key, 10) for key in range(2)] == [True, False]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(0, 30)), max_size=40), st.integers(1, 40), st.randoms())
def test_all_go_once_and_never_more_than_the_limit_at_a_time(pushes, limit, draw):
    credit, sizes, under_way, gone = Credit(limit), dict(enumerate(pushes)), set(), []

    def go(keys):
        gone.extend(keys)
        under_way.update(key for key in keys if sizes[key][1])
        for server in (A, B):
            there = [sizes[key][1] for key in under_way if sizes[key][0] == server]
            assert sum(there) <= limit or len(there) == 1

    for key, (server, nbytes) in sizes.items():
        go([key] if credit.may_go(server, key, nbytes) else [])
        if under_way and draw.random() < 0.3:
            key = under_way.pop()
            credit.arrived(sizes[key][0], key)
            go(credit.released())
    while under_way:
        key = under_way.pop()
        credit.arrived(sizes[key][0], key)
        go(credit.released())
    assert sorted(gone) == sorted(sizes)
