"""Payloads of fixed inputs, as digests: the format cannot drift without somebody deciding so."""

import hashlib

import numpy as np
import pytest

from .cases import CASES, encode


def fixed(n):
    """Return float32[n] made of integers alone: magnitudes over six decades, of both signs."""
    i = np.arange(n, dtype=np.uint64)
    mixed = (i * np.uint64(0x9E3779B97F4A7C15)) ^ ((i * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(29))
    mantissa = ((mixed >> np.uint64(20)) & np.uint64(0xFFFFF)).astype(np.float64) - 2.0**19
    return (mantissa * np.exp2(((mixed >> np.uint64(50)) % np.uint64(20)).astype(np.float64) - 30)).astype(np.float32)


DIGESTS = {
    "dense-32": "54216d7fc06cc755f585222679c19786",
    "dense-16": "6bf49715a9c0f8ccbc7db7656f00754f",
    "bf16-16": "ee23b1cd5428b9fa7fce9a61300a66dc",
    "int-8": "4d7cf69c68c2ca713539a7953581cd12",
    "int-4": "7b4d3735aada437fd78c02bbaace9be7",
    "int-2": "c767fb3b853ddf336a132010b3cb9d1a",
    "qsgd-8": "d116e9e0f1f3053fa7fd2f9ed4b49572",
    "qsgd-4": "f53418d9ee89a8b527a4cb63b63d2444",
    "qsgd-2": "f2c548499069b933453c285f276a9974",
    "natural-8": "ab602c39c8d4b274d3412dd7a8ce1441",
    "terngrad-2": "9920c57743f72e937216d3bf1adc0c92",
    "quic_fl-8": "8cc86d78c870c4136b55ab4de038eabe",
    "quic_fl-2": "e988172f1d71db9bef097c335414fa36",
    "eden-1": "b618b584cc6ea664ff1e8a867f00750d",
    "eden-3": "1c2d2e0b489c1c77357454064bffc7de",
    "signsgd-0.000976562": "af0987d5a1be329e8e49d1c103af5ad7",
    "topk-0.01-fp16": "1cc38f6c153ce463e9f590abc9e9ff5f",
    "topk-0.001-fp32": "05fb1f3d2cc89c0419dd5d3286c356b5",
    "topk-0.3-fp16": "1b4c54a9f1624f566b819838755e8cef",
    "topk-1-fp32": "53be0810faa3bbb7274f52064dee0578",
    "random_k-0.01": "efbdf331e836527ac38ea571014ac535",
    "dgc-0.1-int8": "df31504d95d02ff2496201c392ee61dc",
    "threshold-0.5-fp16": "3ac0133e4537377fcf65230a523768fc",
    "threshold-2-packed": "c10d33d73e861d21ff5cd3928b0cc3cf",
    "onebit-512": "d5413b69fa93d8274f3008d9f3522e1d",
    "onebit-16384": "a56a585da61715e422c382556b45e194",
    "powersgd-4": "5eaa6d49d9f8c40eb3ed73c9d014f8e8",
    "powersgd-6": "d4968c329bacee8b03466064e3f5a03b",
    "random_block-0.01": "10aec4eb279d8d73f46a28d96e16d8fa",
    "random_block-0.37": "a5080cbb93085ae27cd6d3cdd351463a",
    "random_block-1": "e91e871e1839f40170756162293e86a8",
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_payload_has_the_bytes_it_had_when_the_format_was_fixed(case):
    """A change here is a change of the protocol: raise its version."""
    digest = hashlib.sha256()
    for n in (1, 1000, 70_000):
        residual = np.zeros(n, np.float32)
        for _ in range(2):
            _, payload = encode(case, fixed(n), residual)
            digest.update(payload.tobytes())
        digest.update(residual.tobytes())
    assert DIGESTS[str(case)] == digest.hexdigest()[:32]


def test_the_smallest_payloads_byte_by_byte():
    """Three elements, written out, for whoever writes another implementation."""
    v = np.array([1.0, -3.0, 0.5], np.float32)
    by_name = {str(case): case for case in CASES}

    def payload(name):
        return encode(by_name[name], v, np.zeros(3, np.float32))[1].tobytes().hex(" ", 2)

    assert payload("dense-32") == "0000 803f 0000 40c0 0000 003f"
    # exponent -13: 3.0 becomes 24576, which lies in [2^14, 2^15)
    assert payload("dense-16") == "0100 f3ff 0070 00f6 006c"
    assert payload("bf16-16") == "803f 40c0 003f"
    # bucket 512, unit 3/7; codes 10 and 9 in the first byte, 1 in the second
    assert payload("int-4") == "0002 0000 b76d db3e 9a01"
    # scale 4: 1.0 is 2^-2 of it, and its code 125; -3.0 has become -2, 0.5 is exact
    assert payload("natural-8") == "00 0200 0000 0080 407d fe7c"
    assert payload("topk-0.3-fp16") == "0100 f3ff 00f6 0100 0100"
    assert payload("topk-1-fp32") == "0000 0000 0000 803f 0000 40c0 0000 003f 0000 0100 0200 0300"
    assert payload("onebit-512") == "0000 c03f 0200 0000"
    # one row; the right factor is 3 numbers that are drawn, of length 1, and the left one what the row has along them
    assert payload("powersgd-4") == "0100 0000 0100 0000 6542 91bf 5796 42bf 3c5e 883c 384b 26bf"
    assert payload("random_block-0.37") in ("0000 803f", "0000 40c0", "0000 003f")
