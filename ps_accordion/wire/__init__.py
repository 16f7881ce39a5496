"""What goes over a socket: typed messages, their frames and checksums, and the sockets themselves.

`docs/wire.md` describes all of it completely enough to write a client in another language.
"""
