"""Runs rows of the table in one process: `python -m behaviour.run ddp|ours FOLDER [NAME ...]`, the rank in the environment.

What a row notes becomes `FOLDER/<row>-<rank>.safetensors`. With our hook on the script's own DistributedDataParallel it becomes
`FOLDER/attached/...`. A row that raises ends the run, as the others would wait for this process; its traceback becomes
`FOLDER/failed-<rank>`.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from behaviour.table import ATTACHED, LONGER, ROWS
from behaviour.wrap import Attached, Ours, Theirs, Wrap
from safetensors.torch import save_file

BEGAN = time.monotonic()


def run(wrap: Wrap, folder: Path, names: Sequence[str]) -> None:
    """Run rows one after another."""
    folder.mkdir(exist_ok=True)
    for name in names:
        print(f"{time.monotonic() - BEGAN:6.2f} s: {name}", flush=True)
        torch.manual_seed(17)
        try:
            notes = (ROWS | LONGER)[name](wrap)
        except BaseException:
            (folder / f"failed-{wrap.rank}").write_text(f"row {name!r}:\n{traceback.format_exc()}", encoding="utf-8")
            raise
        save_file(notes, folder / f"{name}-{wrap.rank}.safetensors")
        gc.collect()  # the models of a row are gone before the next begins, on every rank alike
        gc.freeze()  # what has been loaded so far stays, and need not be looked through again


def main(under: str, where: str, *names: str) -> None:
    """Run the rows with these names, or all."""
    torch.set_num_threads(1)
    folder = Path(where)
    if under == "ours":
        from ps_accordion.worker import connect

        with connect() as session:
            run(Ours(session), folder, names or list(ROWS))
            if not names:
                run(Attached(session, folder), folder / "attached", ATTACHED)
                _leave()
    else:
        run(Theirs(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder), folder, names or list(ROWS))
        _leave()


def _leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
