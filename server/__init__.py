"""A server: holds shards, sums what the workers push, and answers all of them with the same bytes.

`shard.py` is the state machine of one shard, `record.py` what it keeps of a key between rounds, `relay.py` passes the model's
state from one worker to another, and `loop.py` runs it all: one thread owns the sockets, one thread computes for each shard.
"""
