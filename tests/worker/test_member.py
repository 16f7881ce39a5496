"""How a worker becomes a member: what it repeats, whom it believes, and what it says when it fails."""

import pytest
from machines import layout_of, settings_of, view_of

from ps_accordion.errors import CodecError, JoinRefused, RunAborted, Unreachable, WireError
from ps_accordion.wire import messages as m
from ps_accordion.worker.member import COORDINATOR, Connect, Membership

ADDRESS = "tcp://127.0.0.1:5650"


class Job:
    """One worker's membership with a clock, and a coordinator that the test speaks for."""

    def __init__(self, *, slot: int = 1, terms=None, **options) -> None:
        self.theirs = settings_of(servers_count=2, **options)
        self.mine = settings_of(servers_count=1, workers_count=7, timeouts_heartbeat=1.0)
        self.now = 100.0
        self.membership = Membership(self.mine, terms=terms or {"seed": 0}, slot=slot, token="me", now=self.now)

    def hear(self, message: m.Message, peer=COORDINATOR) -> list:
        return self.membership.handle(peer, message, [], self.now)

    def later(self, seconds: float = 0.2) -> list:
        """Let time pass; return (peers, message) of what is sent."""
        self.now += seconds
        return [(send.peers, send.message) for send in self.membership.tick(self.now)]

    def welcome(self) -> "Job":
        self.hear(m.Welcome("me", 1, 2, self.theirs.terms()))
        return self

    def inside(self) -> "Job":
        self.welcome()
        self.hear(view_of(self.theirs))
        for number in (0, 1):
            self.hear(m.Hello(1, 2), f"server {number}")
        assert self.membership.inside
        return self


def kinds(sent) -> list[str]:
    return [type(message).__name__ for _, message in sent]


@pytest.mark.parametrize("options", [{"codec_name": "zzz"}, {"codec_tensors": '{"*.bias" = "zzz"}'}])
def test_a_codec_that_this_process_does_not_have_is_said_when_it_is_let_in(options):
    """Not at the first push; by then it has a place, so that the coordinator can be told why it goes."""
    job = Job(**options)
    with pytest.raises(CodecError, match=r"expected a codec among .*, got 'zzz'; one of another distribution must be installed"):
        job.welcome()
    assert job.membership.joined


def test_what_a_worker_is_busy_with_is_said_at_once():
    """Not with the next sign of life, which others would wait for; and again with each, until it goes on."""
    job = Job().inside()
    job.later(1.1)
    assert job.later(0.01) == []

    def heard(seconds):
        return [message.busy for _, message in job.later(seconds) if isinstance(message, m.Alive)]

    job.membership.say_busy("evaluation")
    assert [heard(0.01), heard(0.01), heard(1.1)] == [["evaluation"], [], ["evaluation"]]
    job.membership.say_busy("")
    assert [heard(0.01), heard(1.1)] == [[""], [""]]


def test_being_busy_before_the_welcome_waits_for_it():
    """Nobody would know who says so."""
    job = Job()
    job.membership.say_busy("loading")
    assert kinds(job.later()) == ["Join"]
    job.welcome()
    assert [message.busy for _, message in job.later(0.01)] == ["loading"]


def test_a_join_is_repeated_until_the_welcome():
    """Ten times a second, the same request; then signs of life take its place, under the name that was given."""
    job = Job(slot=-1)
    for _ in range(5):
        assert job.later() == [((COORDINATOR,), m.Join("me", -1, {"seed": 0}))]
    assert job.later(0.01) == []
    job.welcome()
    assert (job.membership.slot, job.membership.incarnation) == (1, 2)
    assert job.later() == [((COORDINATOR,), m.Alive(1, 2, -1, [], True, False))]


def test_the_terms_of_the_job_are_taken_over():
    """What this process was not told, it learns; where it listens and writes stays its own affair."""
    job = Job().welcome()
    assert job.membership.settings.terms() == job.theirs.terms()
    assert job.membership.settings.coordinator == job.mine.coordinator


def test_a_welcome_for_another_is_not_ours():
    """Nor does a second one change anything."""
    job = Job()
    job.hear(m.Welcome("you", 0, 1, {}))
    assert not job.membership.joined
    job.welcome()
    job.hear(m.Welcome("me", 5, 9, {}))
    assert (job.membership.slot, job.membership.incarnation) == (1, 2)


def test_a_view_before_the_welcome_waits():
    """The welcome was lost, the view was not: links are named by how many shards a server has, which the welcome says."""
    job = Job(servers_shards_per_server=4)
    assert job.hear(view_of(job.theirs)) == []
    assert kinds(job.later()) == ["Join"]
    job.welcome()
    assert [message.view for _, message in job.later() if isinstance(message, m.Alive)] == [-1]  # so it is sent again
    links = job.hear(view_of(job.theirs))
    assert [link.name for link in links] == ["server 0", "server 1"]


def test_servers_without_a_connection_are_named_by_number():
    """Also where a server holds several shards, and none before the first view."""
    job = Job(servers_shards_per_server=4).welcome()
    job.membership.cut = {"server 1", "server 7"}
    assert [message.cut for _, message in job.later() if isinstance(message, m.Alive)] == [[]]
    job.hear(view_of(job.theirs))
    assert [message.cut for _, message in job.later(1.1) if isinstance(message, m.Alive)] == [[1]]


def test_greetings_are_repeated_until_all_servers_have_answered():
    """A lost greeting or a lost echo is the same: it is said again, to those that have not answered."""
    job = Job().welcome()
    links = job.hear(view_of(job.theirs))
    assert links == [Connect("server 0", "tcp://127.0.0.1:5000"), Connect("server 1", "tcp://127.0.0.1:5001")]
    assert (("server 0", "server 1"), m.Hello(1, 2)) in job.later()
    job.hear(m.Hello(1, 2), "server 1")
    assert not job.membership.inside
    assert (("server 0",), m.Hello(1, 2)) in job.later()
    job.hear(m.Hello(1, 2), "server 1")
    assert not job.membership.inside
    job.hear(m.Hello(1, 2), "server 0")
    assert job.membership.inside
    assert "Hello" not in kinds(job.later())


def test_a_repeated_or_older_view_changes_nothing():
    """Links are opened once."""
    job = Job().inside()
    for p in (1, 0):
        assert job.hear(view_of(job.theirs, p=p, slots=[0])) == []
    assert job.membership.view == view_of(job.theirs)
    assert [message.view for _, message in job.later(1.1) if isinstance(message, m.Alive)] == [1]


def test_a_layout_is_declared_until_it_is_ready():
    """With its table; an answer for another table or another layout is none."""
    job = Job().inside()
    layout = layout_of(job.theirs)
    job.membership.declare(0, layout)
    for answer in (None, m.Ready(1, layout.digest), m.Ready(0, "0" * 16)):
        if answer is not None:
            job.hear(answer)
        sends = [send for send in job.membership.tick(job.now + 0.2) if isinstance(send.message, m.Declare)]
        job.now += 0.2
        assert [(send.message, send.payload) for send in sends] == [(m.Declare(1, 2, 0, layout.digest), (layout.table,))]
        assert not job.membership.layouts[0].ready
    job.hear(m.Ready(0, layout.digest))
    assert job.membership.layouts[0].ready
    assert "Declare" not in kinds(job.later())


def test_signs_of_life_come_with_every_heartbeat():
    """No more and no less; they carry the progress that the loop has noted, and the view."""
    job = Job(timeouts_heartbeat=1.0).inside()
    job.membership.progress = [(0, 17, 3)]
    beats = [message for _ in range(100) for _, message in job.later(0.1) if isinstance(message, m.Alive)]
    assert 9 <= len(beats) <= 11
    assert beats[-1] == m.Alive(1, 2, 1, [(0, 17, 3)], True, False)


@pytest.mark.parametrize("token", ["", "me"])
def test_a_refusal_says_where_and_why(token):
    """In the coordinator's words."""
    with pytest.raises(JoinRefused, match=rf"the coordinator at {ADDRESS} refused: rank 1 is taken"):
        Job().hear(m.Refused(token, "rank 1 is taken"))


def test_a_refusal_of_another_is_not_ours():
    """Tokens tell processes apart."""
    job = Job()
    assert job.hear(m.Refused("you", "no")) == []


def test_an_answer_of_another_version_says_both():
    """While joining, garbage is an answer too; a member that hears some later goes on."""
    error = WireError("protocol version 9 from there, 1 here; install the same release of ps-accordion everywhere")
    with pytest.raises(JoinRefused, match=rf"{ADDRESS} cannot be understood: protocol version 9 from there, 1 here"):
        Job().membership.garbage(error)
    Job().inside().membership.garbage(error)


def test_no_coordinator_is_noticed_after_the_time_for_joining():
    """Not before; the message says where it looked and what to do."""
    job = Job()
    limit = job.mine.timeouts.join
    assert kinds(job.later(limit - 0.1)) == ["Join"]
    with pytest.raises(Unreachable, match=rf"no coordinator has answered at {ADDRESS} within {limit:g} s; start one with"):
        job.later(0.3)


def test_a_coordinator_that_falls_silent_is_noticed():
    """After `timeouts.lost`; any word from it counts, and none from a server does."""
    job = Job().inside()
    lost = job.theirs.timeouts.lost
    job.later(lost - 1)
    job.hear(m.Pulse())
    job.later(lost - 1)
    job.hear(m.Hello(1, 2), "server 0")
    with pytest.raises(Unreachable, match=rf"{ADDRESS} has not been heard for {lost:g} s"):
        job.later(2)


def test_an_abort_ends_this_worker_with_its_reason():
    """Whose fault it was, in its own words."""
    with pytest.raises(RunAborted, match=r"because of worker 0: it broke"):
        Job().inside().hear(m.Abort("worker 0", "it broke"))
    with pytest.raises(RunAborted, match=r"because of coordinator: nobody came"):
        Job().hear(m.Abort("coordinator", "nobody came"))


def test_who_was_taken_out_before_it_knew_that_it_was_in_asks_as_another():
    """The view with it was lost on the way; the next one says that it is out. The same incarnation would not be let in again."""
    job = Job().welcome()
    job.hear(view_of(job.theirs, slots=[0]))
    job.membership.ask_in("first", job.now)
    assert not job.membership.out
    assert job.membership.incarnation == 2
    job.hear(view_of(job.theirs, p=3, slots=[0], removed=[(1, 2, 0, 4)]))
    assert job.membership.out
    assert job.membership.came_late
    job.membership.ask_in("second", job.now)
    assert not job.membership.out
    assert [message.token for _, message in job.later() if isinstance(message, m.Join)] == ["second"]


def test_leaving_is_repeated_until_the_end():
    """Nothing else is, but signs of life, which say that it is done. The end is answered: the coordinator need not wait."""
    job = Job().inside()
    job.membership.declare(0, layout_of(job.theirs))
    job.membership.leave("", 0)
    for _ in range(3):
        assert ((COORDINATOR,), m.Leave(1, 2, "", 0)) in job.later()
    assert [message.done for _, message in job.later(1.5) if isinstance(message, m.Alive)] == [True]
    assert "Declare" not in kinds(job.later())
    (bye,) = job.hear(m.Ended())
    assert (bye.peers, bye.message) == ((COORDINATOR,), m.Bye("worker 1"))
    assert job.membership.gone
    job.later(1000)  # nobody is missed any more


def test_who_hears_of_the_end_first_gives_its_account_before_its_goodbye():
    """A sign of life is answered with the end while this worker is still at its last round: the coordinator would not wait."""
    job = Job().inside()
    assert job.hear(m.Ended()) == []
    assert job.membership.over
    (bye,) = job.membership.bye()  # when its session ends
    assert bye.message == m.Bye("worker 1")
    assert job.membership.bye() == []


@pytest.mark.parametrize("goodbye", [lambda job: job.leave("it broke", 1), lambda job: job.leave_others([(0, 4)])])
def test_only_who_has_seen_the_end_says_that_it_is_done(goodbye):
    """Who fails ends the run by another word, and who leaves the others ends nothing."""
    job = Job().inside()
    goodbye(job.membership)
    assert [message.done for _, message in job.later(1.5) if isinstance(message, m.Alive)] == [False]


def test_an_abort_is_the_answer_to_a_worker_that_fails():
    """It is leaving because of its own error: the abort that follows from it is no second error."""
    job = Job().inside()
    job.membership.leave("it broke", 1)
    (bye,) = job.hear(m.Abort("worker 1", "it broke"))
    assert bye.message == m.Bye("worker 1")
    assert job.membership.gone


def test_any_error_text_can_be_told():
    """Too long, in any script, or with bytes of a file name that are no text: what leaves can be read."""
    for text in ("x" * 5000, "错误" * 3000, "cannot open \udcff\udc80.txt"):
        job = Job().inside()
        job.membership.leave(text, 1)
        assert job.membership.leaving is not None
        assert 0 < len(job.membership.leaving.error) <= m.MAX_TEXT
        job.membership.leaving.error.encode()


def test_who_comes_after_the_end_is_told_so():
    """It is not left waiting for a welcome that never comes."""
    with pytest.raises(JoinRefused, match=rf"{ADDRESS} is over"):
        Job().hear(m.Ended())


def test_a_server_whose_connection_is_new_is_greeted_again():
    """It may have been started again, and then it does not know whose connection it is; a link of another name is none."""
    job = Job().inside()
    assert "Hello" not in kinds(job.later())
    job.membership.greet_again("server 1")
    job.membership.greet_again("coordinator")
    assert [(peers, type(message)) for peers, message in job.later() if isinstance(message, m.Hello)] == [
        (("server 1",), m.Hello)
    ]
    job.hear(m.Hello(1, 2), "server 1")
    assert "Hello" not in kinds(job.later())


def test_the_word_of_the_coordinator_is_enough_at_the_end():
    """All have finished: who lacks a server's word for it need not wait for that. An abort is another end."""
    job = Job().inside()
    assert not job.membership.over
    job.hear(m.Ended())
    assert job.membership.over
    other = Job().inside()
    with pytest.raises(RunAborted):
        other.hear(m.Abort("worker 0", "it failed"))
    assert not other.membership.over
