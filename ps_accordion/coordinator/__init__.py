"""The coordinator: who is in the run, under which terms, and how hard to compress.

It is off the path of a round: gradients never pass through it, and a plan travels inside the results of a shard.

`machine.py` is the state machine; `membership.py` (who is in) and `ending.py` are parts of it, and `run.py` what they share.
`roster.py`, `layouts.py` and `views.py` are what is known of others, of models, of rounds; `planning.py` makes plans of reports.
`loop.py` moves messages between the machine and its socket, and what `history.py` names into the log.
"""
