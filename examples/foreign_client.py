"""A worker that shares no code with ps-accordion: it was written from docs/wire.md, with ZeroMQ, msgpack and xxhash alone.

It joins a run, declares a layout of one small tensor, exchanges it for some rounds with error feedback, and leaves.
To see it, start a coordinator and a server for one worker, then this:

    PS_ACCORDION_WORKERS_COUNT=1 PS_ACCORDION_SERVERS_COUNT=1 ps-accordion coordinator &
    PS_ACCORDION_WORKERS_COUNT=1 PS_ACCORDION_SERVERS_COUNT=1 ps-accordion server --number 0 &
    python examples/foreign_client.py tcp://127.0.0.1:5650

Each round is one line of JSON on standard output: its kind, and what stands in the tensor afterwards.
"""

import argparse
import contextlib
import json
import math
import secrets
import struct
import time

import msgpack
import xxhash
import zmq

VERSION = 2
COORDINATOR = "coordinator"


class Stopped(Exception):
    """Somebody said that this worker cannot go on."""


# ---------------------------------------------------------------- frames


def pack(message, payload=()):
    """Return the frames of a message: a header with its checksum, then the payload."""
    body = msgpack.packb(message)
    checksum = xxhash.xxh3_64(b"".join([body, *payload])).intdigest()
    return [b"PSA" + bytes([VERSION]) + checksum.to_bytes(8, "little") + body, *payload]


def unpack(frames):
    """Return the messages in some frames, each with its payload: one, or those of a bundle."""
    header, payload = frames[0], frames[1:]
    if header[:3] != b"PSA" or header[3] != VERSION:
        raise Stopped(f"expected magic PSA and version {VERSION}, got {header[:4]!r}")
    if xxhash.xxh3_64(b"".join([header[12:], *payload])).intdigest() != int.from_bytes(header[4:12], "little"):
        raise Stopped("the checksum of a message is wrong")
    message = msgpack.unpackb(header[12:])
    if message[0] != "bundle":
        return [(message, payload)]
    parts, end = [], 0
    for part, lengths in message[1]:
        frames = []
        for length in lengths:
            start = -(-end // 8) * 8 if length else end
            end = start + length
            frames.append(payload[0][start:end] if length else b"")
        parts.append((part, frames))
    return parts


# ---------------------------------------------------------------- the dense codec


def single(value):
    """Round to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def encode(vector, bits):
    """Return the dense payload of a vector: float32, or halves that share a power of two."""
    if bits == 32:
        return struct.pack(f"<{len(vector)}f", *vector)
    peak = max(map(abs, vector))
    exponent = max(math.frexp(peak)[1] - 1 - 14, -126) if peak else 0
    halves = [max(-32752.0, min(32752.0, math.ldexp(value, -exponent))) for value in vector]
    return struct.pack(f"<BBh{len(vector)}e", 1, 0, exponent, *halves)


def decode(payload, bits, count):
    """Return the vector in a dense payload."""
    if bits == 32:
        return list(struct.unpack(f"<{count}f", payload))
    form, zero, exponent, *halves = struct.unpack(f"<BBh{count}e", payload)
    if (form, zero) != (1, 0):
        raise Stopped(f"expected a value block of halves, got format {form}")
    return [math.ldexp(half, exponent) for half in halves]


# ---------------------------------------------------------------- the worker


class Worker:
    """One worker with one layout of one key.

    Args:
        address: Where the coordinator listens.
        slot: The slot to ask for; -1 for any.
    """

    def __init__(self, address, slot):
        self.context = zmq.Context()
        self.poller = zmq.Poller()
        self.links = {}
        self.token = secrets.token_hex(16)
        self.slot, self.incarnation = slot, -1
        self.terms, self.view = {}, None
        self.greeted = set()
        self.ready = self.leaving = self.over = False
        self.round, self.plan, self.skipped = 0, 0, False
        self.push = self.result = None
        self.beat = 0.0
        self.connect(COORDINATOR, address)

    def connect(self, name, address):
        """Open a link."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.LINGER, 500)
        socket.connect(address)
        self.links[name] = socket
        self.poller.register(socket, zmq.POLLIN)

    def close(self):
        """Close all links, when what is queued has been sent or half a second has passed."""
        for socket in self.links.values():
            socket.close()
        self.context.term()

    def send(self, name, message, payload=()):
        """Send a message. It may be lost: nobody may be there."""
        with contextlib.suppress(zmq.Again):
            self.links[name].send_multipart(pack(message, payload), zmq.DONTWAIT)

    def until(self, done, repeat, every=0.1):
        """Handle what comes until `done()`, with a sign of life every second, and call `repeat()` now and then."""
        due = time.monotonic()
        while not done():
            now = time.monotonic()
            if now >= due:
                due = now + every
                repeat()
            if self.incarnation >= 0 and now >= self.beat:
                self.beat = now + 1.0
                view = -1 if self.view is None else self.view[1]
                layouts = [[0, self.round, self.plan]] if self.ready else []
                self.send(COORDINATOR, ["alive", self.slot, self.incarnation, view, layouts, True, self.leaving, ""])
            for socket, _ in self.poller.poll(20):
                for message, payload in unpack(socket.recv_multipart()):
                    self.handle(socket, message, payload)

    def handle(self, socket, message, payload):
        """Take in a message."""
        tag, *fields = message
        if tag == "welcome" and fields[0] == self.token:
            _, self.slot, self.incarnation, self.terms = fields
        elif tag == "view" and self.terms and self.view is None:
            self.view = message
            _, _, _, shards, *_ = fields
            for number, _, address in shards:
                server = number // self.terms["servers.shards_per_server"]
                if server not in self.links:
                    self.connect(server, address)
        elif tag == "hello":
            self.greeted.add(socket)
        elif tag == "ready" and fields[:2] == [0, self.digest]:
            self.ready = True
        elif tag == "result" and fields[2] == self.round and self.push is not None and self.counts(fields):
            self.take(fields, payload)
        elif tag == "missing" and fields[1] == self.round:
            self.send(self.server, *self.push)
        elif tag == "ended":
            self.over = True
        elif tag in ("refused", "refuse", "abort"):
            raise Stopped(f"{tag}: {fields[-1]}")

    def counts(self, fields):
        """Say whether a result was finished under the view that counts for its round."""
        _, p, _, cuts, *_ = self.view
        cut, previous_epoch = next(((cut, epoch) for layout, cut, epoch in cuts if layout == 0), (0, -1))
        return fields[3] == (p if self.round >= cut else previous_epoch)

    def take(self, fields, payload):
        """Keep the result of the open round, and note a plan that came with it: it rules no tensor as small as ours."""
        lengths, plan = fields[12], fields[13]
        if [len(frame) for frame in payload] != [*lengths, *([plan] if plan else [])]:
            raise Stopped("the frames of a result have other lengths than its header says")
        if plan:
            self.plan = msgpack.unpackb(payload[-1])[1]
        self.result = fields, b"".join(payload[: len(lengths)])

    # ------------------------------------------------------------ one step after another

    def join(self):
        """Become a member: a welcome, a view, and an echo from every server."""
        self.until(lambda: self.incarnation >= 0, lambda: self.send(COORDINATOR, ["join", self.token, self.slot, {}]))
        self.until(lambda: self.view is not None, lambda: None)
        servers = [name for name in self.links if name != COORDINATOR]

        def greet():
            for name in servers:
                if self.links[name] not in self.greeted:
                    self.send(name, ["hello", self.slot, self.incarnation])

        self.until(lambda: len(self.greeted) == len(servers), greet)

    def declare(self, name, elements):
        """Agree with the others on a layout of one float32 vector of up to 1,024 elements: one key, on the last shard."""
        table = msgpack.packb([[name, [elements], "float32", False]])
        num_shards = self.terms["servers.count"] * self.terms["servers.shards_per_server"]
        cut = f"/{num_shards}/{self.terms['layout.partition_elements']}"
        self.digest = xxhash.xxh3_64_hexdigest(table + cut.encode())
        self.elements = elements
        self.server = (num_shards - 1) // self.terms["servers.shards_per_server"]
        self.residual = [0.0] * elements
        declare = ["declare", self.slot, self.incarnation, 0, self.digest]
        self.until(lambda: self.ready, lambda: self.send(COORDINATOR, declare, [table]))

    def exchange(self, kind, weight, used, coding=("", 0.0, 0, 0, 0, []), payload=()):
        """Push the key in the open round and wait for its result; ask after it every second."""
        head = ["push", 0, 0, self.round, self.slot, self.incarnation, kind, weight, used, self.skipped]
        self.push, self.result = ([*head, *coding], payload), None
        self.send(self.server, *self.push)
        ask = ["ask", 0, self.round, self.slot, self.incarnation, [0]]
        self.until(lambda: self.result is not None, lambda: self.send(self.server, ask), every=1.0)
        self.round += 1
        fields, data = self.result
        self.skipped = fields[4] == "SKIP"
        return fields, data

    def push_pull(self, gradient, bits):
        """Exchange one gradient; return the kind of the round, and the mean of all workers' (None if it was skipped)."""
        vector = [single(a + b) for a, b in zip(gradient, self.residual, strict=True)]
        payload = encode(vector, bits)
        sent = decode(payload, bits, self.elements)
        self.residual = [single(a - b) for a, b in zip(vector, sent, strict=True)]
        coding = ["dense", float(bits), self.elements, self.elements, 0, [len(payload)]]
        fields, data = self.exchange("DATA", 1.0, 1, coding, [payload])
        kind, codec, level, elements = fields[4], *fields[7:10]
        if kind == "SKIP":
            self.residual = [single(a + b) for a, b in zip(self.residual, sent, strict=True)]
            return kind, None
        if (kind, codec, elements) != ("DATA", "dense", self.elements):
            raise Stopped(f"expected dense data of {self.elements} elements, got {fields}")
        return kind, decode(data, int(level), elements)

    def leave(self):
        """Say that there are no more gradients until all workers say so, then say goodbye."""
        while self.exchange("EMPTY", 0.0, 0)[0][4] != "END":
            pass
        self.leaving = True
        self.until(lambda: self.over, lambda: self.send(COORDINATOR, ["leave", self.slot, self.incarnation, "", 0]))
        self.send(COORDINATOR, ["bye", f"worker {self.slot}"])

    def fail(self, error):
        """Tell the others why this worker cannot go on, which ends the run, until they know or three seconds have passed."""
        leave = ["leave", self.slot, self.incarnation, f"worker {self.slot}: {error!r}"[:2000], 1]
        until = time.monotonic() + 3.0
        self.leaving = True
        with contextlib.suppress(Stopped):
            self.until(lambda: self.over or time.monotonic() > until, lambda: self.send(COORDINATOR, leave))
        self.send(COORDINATOR, ["bye", f"worker {self.slot}"])


def main():
    """Exchange made-up gradients, and print what comes back."""
    parser = argparse.ArgumentParser(description="A ps-accordion worker written from docs/wire.md alone.")
    parser.add_argument("address", help="where the coordinator listens, such as tcp://127.0.0.1:5650")
    parser.add_argument("--slot", type=int, default=-1, help="the slot to ask for; -1 takes any")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--elements", type=int, default=5, help="length of the tensor, at most 1024")
    parser.add_argument("--bits", type=int, choices=(16, 32), default=16)
    options = parser.parse_args()
    worker = Worker(options.address, options.slot)
    try:
        worker.join()
        worker.declare("example", options.elements)
        for round_ in range(options.rounds):
            gradient = [single(math.sin(round_ + index)) for index in range(options.elements)]
            kind, mean = worker.push_pull(gradient, options.bits)
            print(json.dumps({"round": round_, "kind": kind, "mean": mean}), flush=True)
        worker.leave()
    except Exception as error:
        if worker.incarnation >= 0:
            worker.fail(error)
        raise
    finally:
        worker.close()


if __name__ == "__main__":
    main()
