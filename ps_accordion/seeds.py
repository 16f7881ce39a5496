"""Counter seeds: every random choice is a function of where it is made, never of when or in which order.

    seed = mix(job seed, layout, key, round, who)

`who` is a worker's slot + 1, or `SHARED` where all members and the server must draw the same positions.
The mixer is one step of splitmix64 (Steele, Lea and Flood, 2014): `seed := mix64(seed xor field)`, from `mix64(job seed)`.
"""

from __future__ import annotations

__all__ = ["SERVER", "SHARED", "mix64", "seed_for", "unmix64"]

SHARED = 0
SERVER = (1 << 32) - 1
_MASK = (1 << 64) - 1


def mix64(value: int) -> int:
    """Return what splitmix64 gives first from the state `value` (taken modulo 2**64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def unmix64(value: int) -> int:
    """Return the state, below 2**64, from which `mix64` gives `value`: it is a bijection."""
    value ^= (value >> 31) ^ (value >> 62)
    value = (value * 0x319642B2D24D8EC3) & _MASK
    value ^= (value >> 27) ^ (value >> 54)
    value = (value * 0x96DE1B173F119089) & _MASK
    value ^= (value >> 30) ^ (value >> 60)
    return (value - 0x9E3779B97F4A7C15) & _MASK


def seed_for(job: int, layout: int, key: int, round_: int, who: int) -> int:
    """Return the 64-bit seed of one random choice.

    Args:
        job: Seed of the job.
        layout: Number of the layout.
        key: Number of the key in the layout.
        round_: Round number.
        who: A worker's slot + 1, `SERVER`, or `SHARED` where all must draw alike.
    """
    # The job's seed is mixed before the first field meets it, or (job 0, layout 1) and (job 1, layout 0) would draw alike.
    seed = mix64(job)
    for field in (layout, key, round_, who):
        seed = mix64(seed ^ field)
    return seed
