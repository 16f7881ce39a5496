"""A worker notices which servers have been away: they are greeted again, for a process that was started again may be there."""

from types import SimpleNamespace

import pytest

from ps_accordion.worker.client import Client


@pytest.mark.parametrize(
    ("broke", "linked", "greeted"),
    [
        ("----", "yyyy", "0000"),
        ("----", "ynyy", "0011"),
        ("-x--", "yyyy", "0011"),
        ("-x--", "ynny", "0001"),
        ("-xx-", "yyyy", "0001"),
        ("x-x-", "yyyy", "0112"),
    ],
)
def test_a_server_is_greeted_once_for_each_time_that_it_was_away(broke, linked, greeted):
    """Also if it is back before anybody looks; and not while the old connection may still seem to be there."""
    greetings, seen = [], ""
    client = SimpleNamespace(
        membership=SimpleNamespace(links=["server 0"], greet_again=greetings.append), exchanges={}, _broken=set()
    )
    for now in range(4):
        client.transport = SimpleNamespace(
            broke=lambda name, now=now: broke[now] == "x",
            linked=lambda name, now=now: linked[now] == "y",
            lending=SimpleNamespace(begin_again=lambda name: None),
        )
        Client._look_at_links(client, float(now))
        seen += str(len(greetings))
    assert seen == greeted
