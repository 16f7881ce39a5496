"""The durable memory of a shard: a server that is killed at any instant, and started again, goes on from the last finished state.

    <directory>/shard-<n>.lock              held by the process that has the shard open; its number is inside
    <directory>/shard-<n>.state             which memory this is, whether it was closed, the shard's own record
    <directory>/shard-<n>-layout-<m>.state  of every key: two halves of its residual, and its record
    <directory>/*.bad                       what could not be trusted, kept for whoever wants to look

All files are mapped: a kernel writes a residual where it lies, and a record costs a copy and a checksum, no call of the system.
What a process has stored is in the kernel's pages, which outlive it. Nothing is synced in a round, so a *machine* that stops
without warning loses the shard; that is found out and said (`ShardStore.lost`), and the shard starts blank.

`store.py` is the set of files of one shard, `keys.py` one layout's file, `mapped.py` a file in memory, `lock.py` what keeps other
processes out, `slots.py` a record that is never half written, `snapshots.py` copies of residuals for when all that is lost.
Nothing here knows a message: records are bytes.
"""

from .keys import KeySize, KeyStore, Stored
from .snapshots import Copies, Snapshots
from .store import ShardStore

__all__ = ["Copies", "KeySize", "KeyStore", "ShardStore", "Snapshots", "Stored"]
