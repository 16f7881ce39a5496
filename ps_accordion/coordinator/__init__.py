"""The coordinator: who is in the run, under which terms, and how hard to compress.

It is off the path of a round: gradients never pass through it, and a plan travels inside the results of a shard.

`machine.py` is the state machine, `roster.py` what it knows of the others, `planning.py` turns reports into plans, and `loop.py`
moves messages between the machine and its socket.
"""
