"""`python -m benchmarks [table ...]`: measure, side by side in one run, and print tables in Markdown.

Each column is measured by a process of its own, with its own number of threads. Tables go to standard output, so that
`python -m benchmarks > docs/benchmarks-tables.md` keeps them; what libraries say goes to standard error.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

from .harness import Column, Figure, Meter, machine, require_idle, table, worked

ON_REQUEST = ("scaling", "learning")  # which can be drawn
TABLES = (
    *("update", "rules", "rates", "cliff", "loop", "loader", "tree", "frozen", "memory", "step"),
    *("packages", "processes", "peers"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fluxpy against torch.optim.")
    parser.add_argument("tables", nargs="*", metavar="table", help=f"some of {', '.join((*TABLES, *ON_REQUEST))}")
    parser.add_argument("--quick", action="store_true", help="two minutes: small, nothing compiled, fewer columns")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose names contain this, in any case")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw scaling or learning as a PNG there")
    parser.add_argument("--device", default="cpu", help="where the tensors live (cpu)")
    parser.add_argument("--worker", nargs=2, metavar=("COLUMN", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.tables) - {*TABLES, *ON_REQUEST}
    if unknown:
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join((*TABLES, *ON_REQUEST))}")
    if given.plot and len({*given.tables}.intersection(ON_REQUEST)) != 1:
        parser.error(f"--plot is for one of {', '.join(ON_REQUEST)}")
    if not given.tables:
        given.tables = [t for t in TABLES if not (given.quick and t in ("rules", "peers"))]
    return given


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def measure(name: str, column: str, given: argparse.Namespace) -> Column:
    """One column, by a process whose thread pools are its own; by one for each row that a table wants alone."""
    rows = [row for row in getattr(module_of(name), "ALONE", ()) if given.only.lower() in row.lower()]
    found: Column = {}
    for only in rows or [given.only]:
        found |= _by_process(name, column, given, only)
    return found


def _by_process(name: str, column: str, given: argparse.Namespace, only: str) -> Column:
    threads = str(module_of(name).COLUMNS[column][1])
    pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", __package__ or "benchmarks", name, "--device", given.device]
        command += ["--worker", column, str(file), "--only", only]
        command += ["--quick"] if given.quick else []
        pools |= getattr(module_of(name), "ENVIRONMENT", {}).get(column, {})
        done = subprocess.run(command, env=os.environ | pools, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"the table {name!r} failed in its column {column!r}; see above")
        return {row: Figure(**f) for row, f in json.loads(file.read_text()).items()}


def work(name: str, given: argparse.Namespace) -> None:
    (column, file), module = given.worker, module_of(name)
    torch.set_num_threads(module.COLUMNS[column][1])
    meter = Meter(given.quick, given.device, given.only)
    found = module.measure(column, meter)
    Path(file).write_text(json.dumps({row: asdict(f) for row, f in found.items() if meter.wants(row)}))


def main() -> None:
    given = arguments()
    if given.worker:
        return work(given.tables[0], given)
    print(f"# Benchmarks\n\n{machine(given.device)}\n\nMedians over rounds in which contenders take turns (quartiles).")
    print("Quick: smaller sizes than the tables say, and nothing is compiled." if given.quick else "", flush=True)
    every: list[Figure] = []
    for name in given.tables:
        module, columns = module_of(name), {}
        for column in list(module.COLUMNS)[: 2 if given.quick else None]:
            if not given.force and not (given.quick and every):
                require_idle()
            with others(column):
                columns[column] = measure(name, column, given)
        if any(columns.values()):
            print("\n" + table(module.TITLE, module.NOTE, columns), flush=True)
        every += [f for column in columns.values() for f in column.values() if f.target is not None]
        if name in ON_REQUEST and given.plot:
            module.draw(columns, given.plot, machine(given.device))
    print(f"{sum(f.met for f in every)} of {len(every)} targets met.")


@contextlib.contextmanager
def others(column: str) -> Iterator[None]:
    """Say so where other processes worked meanwhile."""

    def rest() -> float:
        ours = resource.getrusage(resource.RUSAGE_CHILDREN)
        return worked() - ours.ru_utime - ours.ru_stime

    start, before = time.monotonic(), rest()
    yield
    load = (rest() - before) / (time.monotonic() - start)
    if load > 0.1:
        print(f"> While {column!r} was measured, something else used {load:.1f} cores.", flush=True)


if __name__ == "__main__":
    main()
