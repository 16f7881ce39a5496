"""The one place that knows how kernels are compiled, kept and called.

`@kernel(void(F32_IN, float32, F32))` stands above a plain loop; the loop may call functions marked `@helper`, and the intrinsics.
The kernels of one module make a library: one piece of object code, which is compiled by numba when nothing is kept yet, and from
then on loaded without numba. That is why nothing but what `compiler` imports may import numba: it takes half a second of
processor time a process, and reading its own cache as long again.

Options of the compilation, and why:

* `nogil`: a kernel runs on one thread and lets the others go on; parallelism is many keys in flight.
* `error_model="numpy"`: no branch for a division by zero.
* **no** `fastmath`: without reassociation and contraction the same bytes come out on every host.
* explicit signatures: one machine-code version a kernel, compiled before training, never in the middle of it.
  Inputs are declared read-only and unaligned, because payloads are slices of received frames; writable and aligned arrays are
  accepted there too.

`signature` has the types, `intrinsics` and `quantisers` what a loop cannot say, `library` the decorators and when what is
loaded; `store` keeps object code, `native` makes it callable. `compiler`, `entry`, `lanes`, `lowering`, `picking`, `products`
and `rounding` know numba.
"""

from .intrinsics import (
    add_signs64,
    bits,
    butterfly32,
    count_bits,
    dots22,
    dots64,
    fetch,
    flush,
    fold64,
    gather44,
    keep,
    lowest_bit,
    mask64,
    masses64,
    mix64,
    mix_past64,
    off_line,
    real,
    signed16,
    stream16,
    take44,
    take_signs64,
    take_signs_past64,
    within,
)
from .library import helper, kernel, load
from .quantisers import (
    add4,
    add8,
    add_powers8,
    begin4,
    begin8,
    begin_powers8,
    dither4,
    dither8,
    peak64,
    powers8,
    round4,
    round8,
    round_past4,
    round_past8,
    scale64,
    sum64,
    sum_past64,
)
from .signature import (
    F32,
    F32_IN,
    F64,
    I32,
    U8,
    U8_IN,
    U16,
    U16_IN,
    U32,
    U32_IN,
    Scalar,
    Signature,
    Vector,
    boolean,
    float32,
    float64,
    int32,
    int64,
    void,
)
from .store import cache_directory

__all__ = [
    "F32",
    "F32_IN",
    "F64",
    "I32",
    "U8",
    "U8_IN",
    "U16",
    "U16_IN",
    "U32",
    "U32_IN",
    "Scalar",
    "Signature",
    "Vector",
    "add4",
    "add8",
    "add_powers8",
    "add_signs64",
    "begin4",
    "begin8",
    "begin_powers8",
    "bits",
    "boolean",
    "butterfly32",
    "cache_directory",
    "count_bits",
    "dither4",
    "dither8",
    "dots22",
    "dots64",
    "fetch",
    "float32",
    "float64",
    "flush",
    "fold64",
    "gather44",
    "helper",
    "int32",
    "int64",
    "keep",
    "kernel",
    "load",
    "lowest_bit",
    "mask64",
    "masses64",
    "mix64",
    "mix_past64",
    "off_line",
    "peak64",
    "powers8",
    "real",
    "round4",
    "round8",
    "round_past4",
    "round_past8",
    "scale64",
    "signed16",
    "stream16",
    "sum64",
    "sum_past64",
    "take44",
    "take_signs64",
    "take_signs_past64",
    "void",
    "within",
]
